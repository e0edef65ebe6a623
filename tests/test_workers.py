"""Work side by side: the same results in any number of processes, and no process outlives who started it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from memdiag import workers
from memdiag.errors import IncompleteError, InputError
from memdiag.progress import Progress


class Counted(Progress):
    """Progress that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def advance(self, n: int) -> None:
        self.n += n


def write(item: tuple[str, int], advance: Callable[[int], None]) -> None:
    folder, number = item
    advance(2)
    (Path(folder) / str(number)).write_text(f"{number**2} {os.getpid()}")
    advance(1)


def refuse(item: int, advance: Callable[[int], None]) -> None:
    if item == 1:
        raise InputError("item 1 is at fault")
    for _ in range(3000):
        time.sleep(0.01)
        advance(1)


def die(item: int, advance: Callable[[int], None]) -> None:
    if item == 1:
        os._exit(9)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_every_item_is_done_once(tmp_path: Path, n: int) -> None:
    progress = Counted()
    workers.each(write, [(str(tmp_path), i) for i in range(n)], progress)
    found = {path.name: path.read_text().split() for path in tmp_path.iterdir()}
    assert {name: words[0] for name, words in found.items()} == {str(i): str(i * i) for i in range(n)}
    assert progress.n == 3 * n
    mine = {words[1] == str(os.getpid()) for words in found.values()}
    assert mine == (set() if n == 0 else {n == 1 or os.cpu_count() == 1})  # one item needs no other process


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_an_error_ends_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match="item 1 is at fault"):
        workers.each(refuse, [0, 1], Counted())
    assert time.monotonic() - began < 25  # item 0 alone takes 30 s


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_a_process_that_dies_can_be_gone_on_from() -> None:
    with pytest.raises(IncompleteError, match="run the same command again"):
        workers.each(die, [0, 1, 2], Counted())


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_no_process_outlives_a_kill_9(tmp_path: Path) -> None:
    code = (
        "import sys, time, os\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_workers import Counted, linger\n"
        "from memdiag import workers\n"
        "if __name__ == '__main__':\n"
        f"    workers.each(linger, [({str(tmp_path)!r}, 0), ({str(tmp_path)!r}, 1)], Counted())\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)])
    deadline = time.monotonic() + 50
    while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert len(pids) == 2
    process.kill()
    process.wait()
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


def linger(item: tuple[str, int], advance: Callable[[int], None]) -> None:
    """One process is at work for a minute, the other has nothing left to do."""
    folder, number = item
    pid = Path(folder) / f"{number}.pid.partial"
    pid.write_text(str(os.getpid()))
    pid.rename(Path(folder) / f"{number}.pid")
    advance(1)
    time.sleep(60 * number)


def alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def _pid(item, advance):
    path, name = item
    (path / name).write_text(str(os.getpid()))
    advance(1)


def test_one_by_one_is_in_this_process(tmp_path):
    workers.each(_pid, [(tmp_path, "a"), (tmp_path, "b")], Progress(), one_by_one=True)
    assert {(tmp_path / name).read_text() for name in "ab"} == {str(os.getpid())}
