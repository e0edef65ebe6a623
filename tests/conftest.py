"""What every test shares: the fixtures' folder, one thread, and no way out to other hosts."""

from __future__ import annotations

import functools
import ipaddress
import logging
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memdiag.checkpoint import open_checkpoints

os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes that tests start
torch.set_num_threads(1)  # what is measured is tiny, and tests run side by side

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):  # AF_UNIX
        return True
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return address[0] in ("localhost", "")


def _guarded(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def connect(self: socket.socket, address: Any) -> Any:
        if not _is_local(address):
            raise AssertionError(f"a test tried to reach {address}: tests must work without a network")
        return original(self, address)

    return connect


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets connect within this machine only."""
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))


@pytest.fixture(autouse=True)
def _no_handler_left() -> Iterator[None]:
    """A command logs to the stderr of its test, which is closed afterwards."""
    yield
    logging.getLogger("memdiag").handlers.clear()
    logging.getLogger("memdiag").setLevel(logging.NOTSET)


def _torchrun(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, "--master-addr", "127.0.0.1", "--master-port", str(port), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        cwd=FIXTURES.parent,
        check=False,
    )


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script, or `-m module`, on two processes under torchrun, and returns what they printed."""
    return _torchrun


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of tiny checkpoints and datasets."""
    return FIXTURES


@functools.cache
def _model(name: str) -> nn.Module:
    return open_checkpoints(FIXTURES / name)[0].load(dtype="float32")


@pytest.fixture(scope="session")
def load() -> Callable[[str], nn.Module]:
    """A fixture's model by name, in float32; shared, so not to be changed."""
    return _model


def _assert_same_rows(
    found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]], *, rel: float, abs: float = 0.0
) -> None:
    assert len(found) == len(expected)
    for i, (row, wanted) in enumerate(zip(found, expected)):
        assert row.keys() == wanted.keys()
        where = f"row {i} ({wanted.get('layer_name')}, {wanted.get('unit')}), column"
        for name, value in wanted.items():
            mine, undefined = row[name], value is None or value != value
            if undefined or not isinstance(value, float):
                assert (None if mine is not None and mine != mine else mine) == (None if undefined else value), (
                    f"{where} {name}: {mine} is not {value}"
                )
            else:
                close = isinstance(mine, float) and math.isclose(mine, value, rel_tol=rel, abs_tol=abs)
                assert close, f"{where} {name}: {mine} is not {value} to {rel:g}"


@pytest.fixture(scope="session")
def assert_same_rows() -> Callable[..., None]:
    """Asserts that two lists of a report's rows agree: floats to `rel` or `abs`, all else exactly; NaN is null."""
    return _assert_same_rows
