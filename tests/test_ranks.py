"""One command on several processes: alone it is rank 0 of 1, under torchrun values meet on rank 0."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from memdiag import ranks

WORKER = """
import json, sys
from pathlib import Path

import numpy as np

from memdiag import ranks

rank, size = ranks.start()
gathered = ranks.gather({"rank": rank, "array": np.full(2, rank)})
found = {
    "rank": rank,
    "size": size,
    "again": ranks.start(),
    "gathered": [(value["rank"], value["array"].tolist()) for value in gathered],
    "broadcast": ranks.broadcast(f"from {rank}"),
    "none": ranks.broadcast(None),
}
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
"""


def test_alone_there_is_one_process_and_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        assert ranks.start() == (0, 1)
    value = {"x": 1}
    assert ranks.gather(value) == [value]
    assert ranks.gather(None) == [None]
    assert ranks.broadcast(value) is value


def test_tests_reach_this_machine_only() -> None:
    for address in (("192.0.2.1", 80), ("example.invalid", 443)):  # reserved: nobody is there
        with socket.socket() as attempt, pytest.raises(AssertionError, match="without a network"):
            attempt.connect(address)
    with socket.socket() as listening, socket.socket() as near:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        near.connect(listening.getsockname())


def test_two_processes_gather_on_rank_0_and_hear_it(
    tmp_path: Path, torchrun: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = torchrun(str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [(x["rank"], x["size"], x["again"]) for x in (first, second)] == [(0, 2, [0, 2]), (1, 2, [1, 2])]
    assert first["gathered"] == [[0, [0, 0]], [1, [1, 1]]]
    assert second["gathered"] == []
    assert first["broadcast"] == second["broadcast"] == "from 0"
    assert first["none"] is second["none"] is None
