"""What can go wrong that is not a bug: the user's input, and work that could not be finished."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """The user's input is at fault (exit 2). The message is one line: found, wanted, what to do."""


class IncompleteError(Exception):
    """The work could not be finished but can be taken up again (exit 3), e.g. the disk is full."""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that does not exist: it lists the known ones and the nearest.

    >>> print(unknown("column", "txet", ["text", "label"]))
    no column 'txet'; there are label, text; did you mean 'text'?
    """
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(choices) if choices else "none"
    return InputError(f"no {kind} {name!r}; there are {listed}{hint}")


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """A library's message folded to one line, so that an error never spills over a terminal."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
