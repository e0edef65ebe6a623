"""Other people's code at arm's length: silence, and one InputError for whatever it raises; names for messages."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping

from memdiag.checkpoint.weights import Entry
from memdiag.errors import InputError, one_line


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without log lines and progress bars: what it has to say becomes our one line."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def mute() -> Iterator[None]:
    """Nothing reaches stdout or stderr, not even from a compiled library: tokenizers prints to stdout what it skips."""
    kept = {}
    with open(os.devnull, "w") as nowhere:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            with contextlib.suppress(AttributeError, OSError):  # closed, or no stream at all
                stream.flush()
                kept[number] = os.dup(number)
                os.dup2(nowhere.fileno(), number)
        try:
            yield
        finally:
            for number, old in kept.items():
                os.dup2(old, number)
                os.close(old)


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever a library raises over a file becomes one InputError; running out of memory stays what it is."""
    import torch

    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"{what}: {type(error).__name__}: {one_line(error, 200)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a Rust library's crash; not an Exception
            raise
        raise InputError(f"{what}: {one_line(error, 200)}") from None


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names and how many there are."""
    ordered = [repr(name[:120]) for name in sorted(names)]
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def mismatches(shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Entry]) -> str:
    wrong = [name for name, shape in shapes.items() if name in stored and stored[name].shape != shape]
    if not wrong:
        return ""
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    name = wrong[0]
    return f"tensor {name[:120]!r} has shape {list(stored[name].shape)}, the model wants {list(shapes[name])}{more}"
