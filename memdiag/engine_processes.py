"""Chunks of work in this process, or in processes of this machine: one per core, one thread each."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

from memdiag.errors import IncompleteError, InputError
from memdiag.progress import Progress

POLL_S = 0.2
STARTS = 3  # of processes, in a row, that die before they have begun

Chunk = tuple[int, ...]
Advance = Callable[[int], None]
Work = Callable[[Chunk, Advance], None]
Outcome = InputError | IncompleteError | str | None  # an error to pass on, what went wrong, or nothing did
Ended = tuple[Chunk, Outcome, int]  # the last is the steps that it said were done


def attempt(function: Work, chunk: Chunk, advance: Advance) -> Outcome:
    try:
        function(chunk, advance)
    except (InputError, IncompleteError) as error:
        return error
    except Exception:
        return traceback.format_exc()
    return None


# -- in this process -----------------------------------------------------------------------------------------------


class Here:
    """This process itself."""

    room = 1

    def __init__(self, function: Work, progress: Progress) -> None:
        self._function, self._progress = function, progress
        self._ended: list[Ended] = []

    @property
    def busy(self) -> int:
        return len(self._ended)

    def give(self, chunk: Chunk) -> None:
        steps = 0

        def advance(n: int) -> None:
            nonlocal steps
            steps += n
            self._progress.advance(n)

        outcome = attempt(self._function, chunk, advance)
        self._ended.append((chunk, outcome, steps))

    def wait(self) -> list[Ended]:
        ended, self._ended = self._ended, []
        return ended


# -- processes of this machine -------------------------------------------------------------------------------------


@dataclass
class _Seat:
    """A worker process, or room for one."""

    number: int
    process: Any = None
    connection: Any = None
    chunk: Chunk | None = None
    begun: bool = False  # the process has the chunk: from here on its death is the chunk's doing
    told: int = 0  # steps that `progress` knows of
    before: int = 0  # steps before this chunk


class Processes:
    """At most one process per core. Each has a pipe of its own, so a death costs nobody else anything.

    (A process pool is broken by the death of one: it cannot say whose work that was, and ends the innocent, too.)
    """

    def __init__(self, function: Work, n: int, progress: Progress) -> None:
        self.room = n
        self._function, self._progress = function, progress
        self._context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in whatever state
        self._steps = self._context.RawArray("q", n)  # no lock, which a process that is killed would take with it
        self._seats = [_Seat(i) for i in range(n)]
        self._stillborn = 0

    @property
    def busy(self) -> int:
        return sum(seat.chunk is not None for seat in self._seats)

    def give(self, chunk: Chunk) -> None:
        free = [seat for seat in self._seats if seat.chunk is None]
        seat = next((seat for seat in free if seat.process is not None), free[0])
        seat.chunk, seat.begun, seat.before = chunk, False, self._steps[seat.number]
        if seat.process is None:
            self._start(seat)
        else:
            self._send(seat)

    def _start(self, seat: _Seat) -> None:
        seat.connection, theirs = self._context.Pipe()
        given = (theirs, self._function, self._steps, seat.number, os.getpid())
        seat.process = self._context.Process(target=_serve, args=given)
        with _one_thread_no_ctrl_c():
            seat.process.start()
        theirs.close()

    def _send(self, seat: _Seat) -> None:
        seat.begun = True
        with contextlib.suppress(OSError):  # it has died, which wait() sees
            seat.connection.send(seat.chunk)

    def wait(self) -> list[Ended]:
        ended: list[Ended] = []
        alive = [seat for seat in self._seats if seat.process is not None]
        multiprocessing.connection.wait([seat.connection for seat in alive], POLL_S)
        for seat in alive:
            dead = not seat.process.is_alive()  # asked first: what it said before it died is in the pipe
            try:
                if seat.connection.poll():
                    message = seat.connection.recv()
                    if not seat.begun:
                        self._stillborn = 0
                        self._send(seat)
                    else:
                        ended.append(self._end(seat, message))
                    continue
            except (EOFError, OSError):
                dead = True
            if dead:
                ended += self._bury(seat)
        self._tell()
        return ended

    def _end(self, seat: _Seat, outcome: Outcome) -> Ended:
        assert seat.chunk is not None
        chunk, seat.chunk = seat.chunk, None
        return chunk, outcome, self._steps[seat.number] - seat.before

    def _bury(self, seat: _Seat) -> list[Ended]:
        code = self._close(seat)
        if seat.chunk is None:
            return []
        if seat.begun:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            why = ": often a want of memory" if -code == signal.SIGKILL else ""
            return [self._end(seat, f"the process ended with {how}{why}\n")]
        self._stillborn += 1  # it never had the chunk
        if self._stillborn >= STARTS:
            raise IncompleteError(
                "worker processes end before they begin; a script must call memdiag under if __name__ == '__main__'; "
                "else run the same command again to go on"
            )
        self._start(seat)
        return []

    def _tell(self) -> None:
        for seat in self._seats:
            now = self._steps[seat.number]
            if now != seat.told:
                self._progress.advance(now - seat.told)
                seat.told = now

    def _close(self, seat: _Seat) -> int:
        process, seat.process = seat.process, None
        process.kill()
        process.join()
        seat.connection.close()
        return int(process.exitcode)

    def stop(self) -> None:
        """Kill them: a file that is not whole has not got its name yet."""
        for seat in self._seats:
            if seat.process is not None:
                self._close(seat)


@contextmanager
def _one_thread_no_ctrl_c() -> Iterator[None]:
    """What a process that starts now is born with: Ctrl-C is this process's to answer, and cores are shared out."""
    before = os.environ.get("OMP_NUM_THREADS")
    resource_tracker.ensure_running()  # which unblocks the signal when it starts
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _serve(connection: Any, function: Work, steps: Any, seat: int, parent: int) -> None:
    threading.Thread(target=_leave, args=(parent,), daemon=True).start()

    def advance(n: int) -> None:
        steps[seat] += n

    connection.send(None)
    while True:
        connection.send(attempt(function, connection.recv(), advance))


def _leave(parent: int) -> None:
    """End this process, whatever it is doing, when its parent was killed."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)
