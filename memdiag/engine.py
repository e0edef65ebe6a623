"""Where the items of a long job run: in processes of this machine, or as tasks of Ray.

Item k writes its own file, under its name only once it is whole. That file is the only state: an engine hands out
chunks of items and looks which files are there, so any engine, or several machines that share a file system, may fill
one directory, and whatever is stopped at any moment goes on where it was.
"""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memdiag import engine_ray
from memdiag.engine_processes import Chunk, Here, Processes, Work
from memdiag.errors import IncompleteError, InputError, unknown
from memdiag.progress import Progress

ENGINES = ("inline", "ray")
ATTEMPTS = 3  # the first and two more
SHOWN = 20  # ranges of failed items in a message


@dataclass(frozen=True)
class Engine:
    """Where items run; the fields are the options of the command."""

    name: str = "inline"
    ray_address: str | None = None  # none: a cluster of this machine's cores, for this job; "auto" or an address
    ray_gpus: float = 0.0  # of each task, may be a fraction
    one_by_one: bool = False  # inline: in this process, for work that needs all of an accelerator

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise unknown("engine", self.name, ENGINES)
        if not 0 <= self.ray_gpus < math.inf or (self.ray_gpus > 1 and self.ray_gpus % 1):
            raise InputError(f"--ray-gpus is {self.ray_gpus}; it is from 0 to 1, or a whole number")
        if self.name != "ray" and (self.ray_address is not None or self.ray_gpus):
            raise InputError(f"{'--ray-gpus' if self.ray_address is None else '--ray-address'} needs --engine ray")


def dispatch(
    function: Work,
    chunks: Iterable[Sequence[int]],
    *,
    engine: Engine,
    done: Callable[[int], bool],
    logs: Path,
    progress: Progress,
    unit: str = "models",
) -> None:
    """Call function(chunk, advance) for every chunk until the file of each item is there.

    An attempt of an item is a call of `function` with it that ended without its file: by an exception, by the death of
    its process, or just so. Only what was in that call is tried again, item by item, so that one bad item costs the
    others nothing; after `ATTEMPTS` attempts it has failed.

    Args:
        function: can be pickled (a function of a module, or functools.partial of one with plain values; paths are
            absolute). It writes a file for each item of the chunk; advance(n) says that n steps are done. In a process
            of its own or a task it has one thread (OMP_NUM_THREADS=1); in this process it sees to that itself.
        chunks: item numbers, those that are done left out here; an item may not be in two.
        done: whether item k's file is there; asked in this process.
        logs: a directory, made for the first failed attempt: chunk-FIRST-LAST.attempt-N.log with the traceback.
        progress: started by the caller; under Ray it moves when an attempt ends.
        unit: what items are called.
    Raises:
        InputError, IncompleteError: raised by `function`, at once: the other calls are stopped, nothing is tried again.
        InputError: Ray is not installed, or there is no such cluster.
        IncompleteError: some items failed, all others are done; or no process can be started.
    """
    waiting = deque(chunk for given in chunks if (chunk := tuple(k for k in given if not done(k))))
    total = sum(len(chunk) for chunk in waiting)
    attempts: Counter[int] = Counter()
    failed: list[int] = []
    if not waiting:
        return
    with _crew(engine, function, total, progress) as crew:
        while waiting or crew.busy:
            while waiting and crew.busy < crew.room:
                # another machine may have done some meanwhile
                if chunk := tuple(k for k in waiting.popleft() if not done(k)):
                    crew.give(chunk)
            for chunk, outcome, steps in crew.wait():
                if isinstance(outcome, InputError | IncompleteError):
                    raise outcome
                left = [k for k in chunk if not done(k)]
                if not left:
                    continue
                if left == list(chunk):
                    progress.advance(-steps)  # they are done again
                attempts.update(left)
                _write_log(logs, chunk, attempts[left[0]], outcome)
                failed += [k for k in left if attempts[k] >= ATTEMPTS]
                waiting.extend((k,) for k in left if attempts[k] < ATTEMPTS)
    if failed:
        raise IncompleteError(
            f"{len(failed)} of {total} {unit} failed: {_ranges(failed)}; see {logs}; "
            "run the same command again to try them again"
        )


def _write_log(logs: Path, chunk: Chunk, attempt: int, outcome: str | None) -> None:
    logs.mkdir(parents=True, exist_ok=True)
    text = outcome or (
        "the call ended without an error but the file is not there; "
        "on a cluster, every machine has to see the same directory under the same path\n"
    )
    (logs / f"chunk-{chunk[0]}-{chunk[-1]}.attempt-{attempt}.log").write_text(text, encoding="utf-8")


def _ranges(items: Iterable[int]) -> str:
    """
    >>> _ranges([21, 4, 20, 22, 17])
    '4, 17, 20-22'
    """
    runs: list[list[int]] = []
    for k in sorted(items):
        if runs and k == runs[-1][1] + 1:
            runs[-1][1] = k
        else:
            runs.append([k, k])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:SHOWN]]
    return ", ".join(shown + ["…"] * (len(runs) > SHOWN))


@contextmanager
def _crew(
    engine: Engine, function: Work, total: int, progress: Progress
) -> Iterator[Here | Processes | engine_ray.Tasks]:
    """Who does the work. Each has `room` for chunks, gets one by give(chunk), and says by wait() which have ended."""
    if engine.one_by_one and engine.name == "inline":
        yield Here(function, progress)
    elif engine.name == "inline":
        processes = Processes(function, min(total, os.cpu_count() or 1), progress)
        try:
            yield processes
        finally:
            processes.stop()
    else:
        with engine_ray.connected(engine.ray_address) as ray:
            tasks = engine_ray.Tasks(ray, engine.ray_gpus, function, progress)
            try:
                yield tasks
            finally:
                tasks.stop()
