"""Work for the tests of memdiag.engine, in a module of its own so that worker processes can import it."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from memdiag import engine
from memdiag.errors import IncompleteError, InputError
from memdiag.progress import Progress

Advance = Callable[[int], None]


def path_of(folder: Path, k: int) -> Path:
    return folder / f"{k}.item"


def calls(folder: Path, k: int) -> int:
    """How often item k was tried."""
    return len(list(folder.glob(f"{k}.call-*")))


def mark(folder: Path, k: int) -> int:
    """Leaves a file for this call, whose name nobody else has; how many calls there were before."""
    n = 0
    while True:
        try:
            (folder / f"{k}.call-{n}").open("x").close()
        except FileExistsError:
            n += 1
        else:
            return n


def finish(folder: Path, k: int) -> None:
    partial_file = folder / f"{k}.{os.getpid()}.partial"
    partial_file.write_bytes(f"{k} {k**2}".encode() * 1000)
    partial_file.rename(path_of(folder, k))


def write(chunk: tuple[int, ...], advance: Advance, folder: Path) -> None:
    for k in chunk:
        mark(folder, k)
        advance(2)
        finish(folder, k)
        advance(1)


def kill_itself_once(chunk: tuple[int, ...], advance: Advance, folder: Path, bad: int) -> None:
    for k in chunk:
        if mark(folder, k) == 0 and k == bad:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(folder, k)
        advance(1)


def kill_itself(chunk: tuple[int, ...], advance: Advance, folder: Path, bad: int) -> None:
    """Dies at once of the bad item, over and over, while the others are busy for longer than that."""
    for k in chunk:
        mark(folder, k)
        if k == bad:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        finish(folder, k)
        advance(1)


def fail(chunk: tuple[int, ...], advance: Advance, folder: Path, bad: int, times: int) -> None:
    """Nothing of a chunk is there until all of it is, as with models trained side by side."""
    before = [mark(folder, k) for k in chunk]
    advance(len(chunk))
    if bad in chunk and before[chunk.index(bad)] < times:
        raise ZeroDivisionError(f"item {bad} is bad")
    for k in chunk:
        finish(folder, k)


def refuse(chunk: tuple[int, ...], advance: Advance, folder: Path, bad: int, incomplete: bool) -> None:
    for k in chunk:
        mark(folder, k)
        if k == bad:
            raise (IncompleteError if incomplete else InputError)(f"item {k} is at fault")
        time.sleep(60)


def forget(chunk: tuple[int, ...], advance: Advance, folder: Path) -> None:
    """Ends well and has written nothing."""
    for k in chunk:
        mark(folder, k)


def threads(chunk: tuple[int, ...], advance: Advance, folder: Path) -> None:
    for k in chunk:
        path_of(folder, k).write_text(f"{os.environ['OMP_NUM_THREADS']} {os.getpid()}")


def linger(chunk: tuple[int, ...], advance: Advance, folder: Path) -> None:
    """The first three items are quick, the others take a minute, half-written all the while."""
    for k in chunk:
        mark(folder, k)
        (folder / f"{os.getpid()}.pid").touch()
        if k >= 3:
            (folder / f"{k}.{os.getpid()}.partial").write_bytes(b"half")
            time.sleep(60)
        finish(folder, k)
        advance(1)


class Deadly:
    """Kills the process that unpickles it."""

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return os._exit, (7,)


class Unsteady:
    """A number that kills two of three processes that unpickle it."""

    def __init__(self, folder: Path, number: int) -> None:
        self.given = folder, number

    def __reduce__(self) -> tuple[Callable[[Path, int], int], tuple[Path, int]]:
        return two_of_three_die, self.given


def two_of_three_die(folder: Path, number: int) -> int:
    if mark(folder, 1000) % 3 < 2:
        os._exit(7)
    return number


def run(
    function: Callable[..., None],
    chunks: Iterable[Iterable[int]],
    folder: Path,
    options: engine.Engine,
    done: Callable[[int], bool] | None = None,
    **context: object,
) -> Counted:
    """Dispatch; the progress that was made."""
    progress = Counted()
    engine.dispatch(
        functools.partial(function, folder=folder, **context),
        [tuple(chunk) for chunk in chunks],
        engine=options,
        done=done or (lambda k: path_of(folder, k).exists()),
        logs=folder / "logs",
        progress=progress,
    )
    return progress


class Counted(Progress):
    """Progress that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def advance(self, n: int, note: str = "") -> None:
        self.n += n
