"""Many pieces of work side by side: one process per core, one thread each, in any order."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from memdiag.errors import IncompleteError
from memdiag.progress import Progress

Item = TypeVar("Item")
POLL_S = 0.2

_shared: dict[str, Any] = {}  # of a worker: what it shares with the process that started it


def each(function: Callable[[Item, Callable[[int], None]], None], items: Sequence[Item], progress: Progress) -> None:
    """Call function(item, advance) for every item; where there are several items and cores, in processes of their own.

    Args:
        function: a function of a module, which writes its result to a file; advance(n) says that n steps are done.
        items: each can be pickled.
        progress: started by the caller.
    Raises:
        IncompleteError: a process died, e.g. for want of memory; what the others finished is kept.
        Whatever `function` raises.
    """
    n = min(len(items), os.cpu_count() or 1)
    if n < 2:
        for item in items:
            function(item, progress.advance)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in whatever state they are
    done, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(n, context, _begin, (done, stop, os.getpid())) as pool:
        try:
            waiting = {pool.submit(_call, function, item) for item in items}
            said = 0
            while waiting:
                finished, waiting = wait(waiting, timeout=POLL_S)
                progress.advance(done.value - said)
                said = done.value
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise IncompleteError("a worker process died; run the same command again to go on") from None
        finally:
            stop.set()  # whoever is still at work ends at its next step
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(done: Any, stop: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _shared.update(done=done, stop=stop, parent=parent)


def _call(function: Callable[[Any, Callable[[int], None]], None], item: Any) -> None:
    function(item, _advance)


def _advance(n: int) -> None:
    if _shared["stop"].is_set() or os.getppid() != _shared["parent"]:
        os._exit(1)  # nobody waits for what this would give
    with _shared["done"].get_lock():
        _shared["done"].value += n
