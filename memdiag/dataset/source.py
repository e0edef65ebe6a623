"""What a file of rows is to the rest: its columns, and a way to stream them.

A chunk is a dict of columns of equal length, each a list, a numpy array (n, ...) or an Arrow array. Chunks are small
(about CHUNK_BYTES), so that a reader holds one chunk however large the file and its row groups are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdiag.dataset.faults import fault

CHUNK_BYTES = 2**20
MAX_ROW_BYTES = 2**26  # a line or row beyond this is damage or an attack, not an example

Chunk = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A file of rows that can be read as often as needed."""

    columns: list[str]
    read: Callable[[list[str]], Iterator[Chunk]]  # only these columns, all rows in order
    count: Callable[[list[str]], int | None]  # rows as the format states them; None: they must be counted
    files: list[Path]  # what the content is, in order
    typed: bool = True  # False: every cell is text, as in CSV


def refuse_twins(path: Path, columns: Sequence[str]) -> None:
    twins = sorted({column for column in columns if columns.count(column) > 1})
    if twins:
        raise fault(str(path), f"has more than one column {twins[0]!r}; wanted each name once")
