"""Many pieces of work side by side: one process per core, one thread each, in any order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from memdiag.errors import IncompleteError
from memdiag.progress import Progress

Item = TypeVar("Item")
POLL_S = 0.2

_shared: dict[str, Any] = {}  # of a worker: what it shares with the process that started it


def each(
    function: Callable[[Item, Callable[[int], None]], None],
    items: Sequence[Item],
    progress: Progress,
    *,
    one_by_one: bool = False,
) -> None:
    """Call function(item, advance) for every item; where there are several items and cores, in processes of their own.

    Args:
        function: a function of a module, which writes its result to a file; advance(n) says that n steps are done.
        items: each can be pickled.
        progress: started by the caller.
        one_by_one: in this process, for work that needs all of an accelerator.
    Raises:
        IncompleteError: a process died, e.g. for want of memory; what the others finished is kept.
        Whatever `function` raises.
    """
    n = min(len(items), os.cpu_count() or 1)
    if n < 2 or one_by_one:
        for item in items:
            function(item, progress.advance)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in whatever state they are
    # without locks, which a process that is killed would take with it
    done, stop = context.RawArray("q", len(items)), context.RawValue("b", 0)
    with ProcessPoolExecutor(n, context, _begin, (done, stop, os.getpid())) as pool:
        try:
            waiting = {pool.submit(_call, function, i, item) for i, item in enumerate(items)}
            said = 0
            while waiting:
                finished, waiting = wait(waiting, timeout=POLL_S)
                now = sum(done)
                progress.advance(now - said)
                said = now
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise IncompleteError("a worker process died; run the same command again to go on") from None
        finally:
            stop.value = 1  # whoever is still at work ends
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(done: Any, stop: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _shared.update(done=done)
    threading.Thread(target=_leave, args=(stop, parent), daemon=True).start()


def _leave(stop: Any, parent: int) -> None:
    """End this process, whatever it is doing, once nobody waits for it: also if its parent was killed."""
    while os.getppid() == parent and not stop.value:
        time.sleep(POLL_S)
    os._exit(1)


def _call(function: Callable[[Any, Callable[[int], None]], None], index: int, item: Any) -> None:
    def advance(n: int) -> None:
        _shared["done"][index] += n

    function(item, advance)
