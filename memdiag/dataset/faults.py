"""How a dataset's faults are told: one printable line that begins with the dataset's name."""

from __future__ import annotations

import csv
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
from safetensors import SafetensorError

from memdiag.errors import InputError, one_line

# What the standard library, numpy and Arrow raise on a damaged file. RuntimeError: an encrypted zip,
# and through its children too deep a nesting and an unknown compression. SyntaxError: numpy's header.
DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    MemoryError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,
    csv.Error,
    zlib.error,
    zipfile.BadZipFile,
    SafetensorError,
    pa.ArrowException,
)


def printable(text: object, limit: int = 600) -> str:
    """The text on one line, with line breaks, terminal codes and half surrogates replaced.

    Names of files and columns are the user's data: they may hold anything.
    """
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in one_line(str(text), limit))


def fault(name: str, what: object) -> InputError:
    """The error for a dataset: its name, then what was found and what to do."""
    return InputError(f"{printable(name, 300)}: {printable(what)}")


@contextmanager
def reading(name: str, kind: str) -> Iterator[None]:
    """Turn whatever a damaged file makes a library raise into an InputError that says `kind` was wanted."""
    try:
        yield
    except InputError:
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise fault(name, f"cannot be opened: {error.strerror}") from None
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        raise fault(name, f"is no readable {kind} ({reason}); is it complete and its suffix right?") from None
