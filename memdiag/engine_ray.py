"""Chunks of work as tasks of Ray, on this machine or a cluster: one core each, and perhaps a share of a GPU."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import memdiag
from memdiag.engine_processes import Chunk, Ended, Outcome, Work, attempt
from memdiag.errors import InputError, one_line
from memdiag.progress import Progress

POLL_S = 0.2
CONNECT_S = 10.0
QUEUED = 2  # tasks that wait within Ray, so that no core is idle between two
STORE_BYTES = 80 * 2**20  # Ray's object store, by default 30 % of memory: about the least, as results are files


def _ray() -> Any:
    # read when Ray is imported: it reports to nobody, and does not print to stdout that a worker died, as a log says so
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise InputError('--engine ray needs Ray, which is not installed: pip install "memdiag[ray]"') from None


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray's module, connected; a cluster that is started here ends here, no other does.

    Args:
        address: of a cluster that runs already, or "auto"; None: this machine's cores, as a cluster for this job only.
    Raises:
        InputError: Ray is not installed, or no cluster is there.
    """
    ray = _ray()
    if ray.is_initialized():  # whoever calls this as a library has chosen
        yield ray
        return
    environment = {"OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    # not /tmp/ray, where every session stays for ever and others who say "auto" would find this cluster
    with tempfile.TemporaryDirectory(prefix="memdiag-ray-", ignore_cleanup_errors=True) as directory:
        if address is None:
            _check_paths(ray)
            # import from where this process does, as processes of multiprocessing do
            environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
            options |= {"address": "local", "num_cpus": os.cpu_count(), "include_dashboard": False}
            options |= {"object_store_memory": STORE_BYTES, "_temp_dir": directory, "_node_ip_address": "127.0.0.1"}
        else:
            _answers(address)
            options["address"] = address
        handler = signal.getsignal(signal.SIGTERM)
        try:
            try:
                ray.init(runtime_env={"env_vars": environment}, **options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                if address is None:
                    raise
                raise InputError(f"--ray-address {address}: no Ray cluster to work with: {one_line(error)}") from None
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
            yield ray
        finally:
            ray.shutdown()


def _check_paths(ray: Any) -> None:
    """Ray starts its workers by a line of bash that does not quote their paths, and waits for them for ever."""
    for path in (sys.executable, str(ray.__file__)):
        if any(letter.isspace() for letter in path):
            raise InputError(
                f"--engine ray: Ray cannot start from a path with a space, {path}; install memdiag elsewhere, or use "
                "--engine inline"
            )


def _answers(address: str) -> None:
    """Ray itself tries for minutes, and then ends the process."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"--ray-address {address}: nobody answers there: {one_line(error)}") from None


@dataclass
class Tasks:
    """Tasks of a cluster."""

    ray: Any
    gpus: float  # of each
    function: Work
    progress: Progress
    running: dict[Any, Chunk] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._task = self.ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=0)(_at_work)
        there = self.ray.cluster_resources().get("GPU", 0)
        if self.gpus > there:  # Ray would wait for ever
            raise InputError(f"--ray-gpus is {self.gpus:g}; the Ray cluster has {there:g} GPUs")

    @property
    def room(self) -> int:
        """Of the cluster as it is now: it may grow and shrink."""
        there = self.ray.cluster_resources()
        n = there.get("CPU", 0)
        return int(min(n, there.get("GPU", 0) / self.gpus) if self.gpus else n) + QUEUED

    @property
    def busy(self) -> int:
        return len(self.running)

    def give(self, chunk: Chunk) -> None:
        self.running[self._task.remote(self.function, chunk, memdiag.__version__)] = chunk

    def wait(self) -> list[Ended]:
        ended: list[Ended] = []
        for task in self.ray.wait(list(self.running), timeout=POLL_S)[0]:
            outcome: Outcome
            try:
                outcome, steps = self.ray.get(task)
            except self.ray.exceptions.RayError as error:
                outcome, steps = f"{type(error).__name__}: {error}\n", 0
            self.progress.advance(steps)
            ended.append((self.running.pop(task), outcome, steps))
        return ended

    def stop(self) -> None:
        for task in self.running:
            self.ray.cancel(task, force=True)


def _at_work(function: Work, chunk: Chunk, version: str) -> tuple[Outcome, int]:
    """A task. An error to pass on is a value, or Ray would make another class of it."""
    if version != memdiag.__version__:
        return InputError(f"this is memdiag {version}, a machine of the Ray cluster has {memdiag.__version__}"), 0
    steps = 0

    def advance(n: int) -> None:
        nonlocal steps
        steps += n

    outcome = attempt(function, chunk, advance)
    return outcome, steps
