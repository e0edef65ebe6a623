"""Datasets: any file of rows as a stream of checked examples. Needs neither torch nor transformers.

Formats, by suffix: .parquet .jsonl .jsonl.gz .csv .npz .safetensors .txt .md, a directory written by `datasets`'
save_to_disk, and `task:NAME?key=value`. Rows count from 0, in CSV without the header, in text formats without blank
lines; the columns' roles are in memdiag/dataset/columns.py.

Axes: b example of a batch, t token, d feature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from memdiag import tasks
from memdiag.dataset import cells
from memdiag.dataset.batching import Batch, Example, batches, collate
from memdiag.dataset.columns import ROLES, Kind, choose
from memdiag.dataset.faults import DAMAGED, fault, printable, reading
from memdiag.dataset.readers import open_file, open_task
from memdiag.dataset.source import Source
from memdiag.errors import InputError, one_line

__all__ = ["ROLES", "Batch", "Dataset", "Example", "batches", "collate", "open_dataset"]

TOKENIZE_ROWS, TOKENIZE_CHARS = 256, 2**20  # texts given to the tokenizer at once
ID_BYTES = 8  # of a hash: all that is kept of an id while looking for duplicates


def open_dataset(name: str | Path, *, columns: Mapping[str, str] | None = None, limit: int | None = None) -> Dataset:
    """Open a dataset, look at its first row, and check that its ids are unique.

    Args:
        name: a path, or `task:NAME?key=value&key=value`.
        columns: role -> column, e.g. {"text": "body", "label": "y"}; a role that is not named is guessed
            (memdiag/dataset/columns.py), one that is "" is switched off.
        limit: only the first `limit` rows.
    Raises:
        InputError: one line with the dataset's name, what was found, what was wanted.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; wanted at least 1")
    if str(name).startswith(tasks.PREFIX):
        task = tasks.load(str(name))
        shown, source = task.name, open_task(task)
    else:
        shown, source = str(name), open_file(Path(name))
    if not source.columns:
        raise fault(shown, "is empty: no rows, or no columns in them; wanted at least one example")
    kind, roles = choose(shown, source.columns, columns or {}, lambda column: _may_be_label(shown, source, column))
    dataset = Dataset(shown, kind, roles, limit, source)
    dataset._check()
    return dataset


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset that can be read as often as needed; nothing of it is held in memory."""

    name: str  # the path as given, or the task with all its keys
    kind: Kind
    columns: dict[str, str]  # role -> column, those in use
    limit: int | None
    source: Source

    @property
    def has_labels(self) -> bool:
        """Whether every example has a label."""
        return "label" in self.columns

    @cached_property
    def n_examples(self) -> int:
        """Rows, at most `limit`. Parquet and arrays state them, other formats are read through once."""
        stated = self.source.count(list(self.columns.values()))
        if stated is None:
            stated = sum(1 for _ in self._cells(next(iter(self.columns))))
        return stated if self.limit is None else min(stated, self.limit)

    def fingerprint(self) -> str:
        """sha256 (hex) of the content: one file's is what sha256sum prints; path and age do not matter.

        A save_to_disk directory counts with its Arrow files, a task with its keys and rows.
        """
        if not self.source.files:
            return self._task_fingerprint()
        with reading(self.name, "file"):
            digests = []
            for file in self.source.files:
                with file.open("rb") as stream:
                    digests.append(hashlib.file_digest(stream, "sha256"))
        one = digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(d.digest() for d in digests))
        return one.hexdigest()

    def examples(
        self,
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        vocab_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        keep: Callable[[int], bool] | None = None,
    ) -> Iterator[Example]:
        """Stream the examples in row order; rank r of w gets the rows with row % w == r.

        Args:
            tokenizer: of the Hugging Face kind; needed for text. Special tokens are added.
            max_length: keep the first `max_length` tokens, whatever they are, and mark the example truncated.
            vocab_size: of the model; a token id beyond it is an error.
            keep: whether a row is wanted; the others are neither checked nor tokenised.
        Raises:
            InputError: at once for a missing tokenizer, while streaming for a row ("row 17: text is null").
            ValueError: rank and world_size that do not fit.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got {rank} of {world_size}")
        if max_length is not None and max_length < 1:
            raise InputError(f"max_length is {max_length}; wanted at least 1")
        rows = self._rows(rank, world_size)
        if keep is not None:
            rows = (found for found in rows if keep(found[0]))
        if self.kind != "text":
            return (self._example(*row, max_length, vocab_size) for row in rows)
        if tokenizer is None:
            raise fault(self.name, "holds text; wanted a tokenizer (--tokenizer PATH) or a column of input_ids")
        return self._tokenised(rows, tokenizer, max_length, vocab_size)

    def texts(self) -> Iterator[tuple[int, str]]:
        """(row, text) of every example of a dataset of texts, in row order; errors as `examples`."""
        return ((row, self._value(row, "text", cell)) for row, cell in self._cells("text"))

    # --- rows

    def _rows(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row, role -> cell) of a rank's rows."""
        row = 0
        for chunk in self.source.read(sorted(set(self.columns.values()))):
            length = len(next(iter(chunk.values())))
            for i in range((rank - row) % world_size, length, world_size):
                if self.limit is not None and row + i >= self.limit:
                    return
                yield row + i, {role: self._cell(row + i, role, chunk[c], i) for role, c in self.columns.items()}
            row += length

    def _cells(self, role: str) -> Iterator[tuple[int, Any]]:
        """(row, cell) of one role; the other columns are not read."""
        only = Dataset(self.name, self.kind, {role: self.columns[role]}, self.limit, self.source)
        return ((row, values[role]) for row, values in only._rows())

    def _cell(self, row: int, role: str, column: Any, index: int) -> Any:
        try:
            value = cells.cell(column, index)
        except DAMAGED as error:  # Arrow's values are decoded only here
            raise self._fault(row, role, _told(error)) from None
        return value if self.source.typed else cells.from_text(role, value)

    def _value(self, row: int, role: str, cell: Any, *args: Any) -> Any:
        """The cell as its role's checked value; the check knows what is wrong, only this knows where."""
        try:
            return _CONVERT[role](cell, *args)
        except ValueError as error:
            raise self._fault(row, role, _told(error)) from None

    def _fault(self, row: int, role: str, what: str) -> InputError:
        column = self.columns.get(role, self.columns.get("text"))  # input_ids made from text
        where = role if column == role else f"{role} (column {column!r})"
        hint = f"; to go without: --columns {role}=" if role in ("label", "id") else ""
        return fault(self.name, f"row {row}: {where} {printable(what)}{hint}")

    # --- examples

    def _example(self, row: int, found: Mapping[str, Any], max_length: int | None, vocab_size: int | None) -> Example:
        label, truth, true_label, group = (
            self._value(row, role, found[role]) if role in self.columns else None
            for role in ("label", "truth", "true_label", "group")
        )
        example_id = self._value(row, "id", found["id"]) if "id" in self.columns else str(row)
        if self.kind == "features":
            features = self._value(row, "features", found["features"], self._shape)
            return Example(row, example_id, None, features, label, False, truth, true_label, group)
        ids = self._value(row, "input_ids", found["input_ids"], vocab_size)
        if "attention_mask" in found:
            ids = ids[self._value(row, "attention_mask", found["attention_mask"], len(ids))]
            if not len(ids):
                raise self._fault(row, "attention_mask", "is all 0: no token is left")
        truncated = max_length is not None and len(ids) > max_length
        return Example(row, example_id, ids[:max_length], None, label, truncated, truth, true_label, group)

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        """The features' shape in row 0, which every row must have."""
        row, cell = next(self._cells("features"))
        shape: tuple[int, ...] = self._value(row, "features", cell).shape
        return shape

    def _tokenised(
        self, rows: Iterator[tuple[int, dict[str, Any]]], tokenizer: Any, max_length: int | None, vocab_size: int | None
    ) -> Iterator[Example]:
        empty, some = self._token_ids([(0, {"text": ""}), (0, {"text": "a"})], tokenizer)
        n_before = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(empty, some)))
        end = empty[n_before:]  # the special tokens that close every text, e.g. [SEP]
        for group in _by_size(self._texts(rows)):
            for (row, found), ids in zip(group, self._token_ids(group, tokenizer), strict=True):
                if len(ids) <= len(empty):
                    raise self._fault(row, "text", f"{cells.found(found['text'])} gives no token; drop the row")
                example = self._example(row, {**found, "input_ids": ids}, max_length, vocab_size)
                if example.truncated and example.input_ids is not None and len(example.input_ids) > len(empty):
                    # cut like the tokenizer does it: an encoder has never seen a text that does not end
                    example.input_ids[len(example.input_ids) - len(end) :] = end
                yield example

    def _texts(self, rows: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for row, found in rows:
            yield row, {**found, "text": self._value(row, "text", found["text"])}

    def _token_ids(self, group: list[tuple[int, dict[str, Any]]], tokenizer: Any) -> list[Any]:
        texts = [found["text"] for _, found in group]
        try:
            # verbose: no warning about texts beyond the model's length, which max_length takes care of
            out = tokenizer(texts, add_special_tokens=True, truncation=False, padding=False, verbose=False)
        except Exception as error:  # a tokenizer is a file of the user's, and fails in its own ways
            where = f"rows {group[0][0]} to {group[-1][0]}"
            raise fault(self.name, f"{where}: the tokenizer fails on the text: {printable(error, 200)}") from None
        return list(out["input_ids"])

    # --- checks at opening, so that hours are not lost to a fault that was there from the start

    def _check(self) -> None:
        first = next(self._rows(), None)
        if first is None:
            raise fault(self.name, "is empty: no rows; wanted at least one example")
        row, found = first
        if self.kind == "text":
            self._value(row, "text", found["text"])
        self._example(row, {"input_ids": [0], **found}, None, None)  # stands in for text's tokens
        if "id" in self.columns:
            self._check_unique()

    def _check_unique(self) -> None:
        """One pass keeps 8 bytes per id; a second one looks at the ids whose hashes meet."""
        hashes = np.fromiter((_hash(self._value(row, "id", c)) for row, c in self._cells("id")), dtype=np.uint64)
        self.__dict__["n_examples"] = len(hashes)  # counted on the way
        hashes.sort()
        suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        first: dict[str, int] = {}
        for row, cell in self._cells("id") if suspects else ():
            example_id = self._value(row, "id", cell)
            if _hash(example_id) in suspects and first.setdefault(example_id, row) != row:
                raise fault(
                    self.name,
                    f"rows {first[example_id]} and {row} have the same id {example_id[:40]!r}; "
                    f"wanted unique ids; to use row numbers instead: --columns id=",
                )

    def _task_fingerprint(self) -> str:
        digest = hashlib.sha256(self.name.encode())
        for row in tasks.load(self.name).rows():
            for column in sorted(row):
                digest.update(_framed(column.encode()) + _framed(_content(row[column])))
        return digest.hexdigest()


_CONVERT: dict[str, Callable[..., Any]] = {
    "text": cells.as_text,
    "id": cells.as_id,
    "label": cells.as_label,
    "true_label": cells.as_label,
    "truth": cells.as_truth,
    "group": cells.as_id,
    "input_ids": cells.as_input_ids,
    "attention_mask": cells.as_mask,
    "features": cells.as_features,
}


def _told(error: BaseException) -> str:
    return "is not UTF-8" if isinstance(error, UnicodeDecodeError) else one_line(error)


def _may_be_label(name: str, source: Source, column: str) -> bool:
    only = Dataset(name, "features", {"label": column}, 1, source)
    return all(not isinstance(cell, str | bytes) and not hasattr(cell, "__len__") for _, cell in only._cells("label"))


def _hash(example_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(example_id.encode(), digest_size=ID_BYTES).digest(), "little")


def _by_size(rows: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Groups of rows whose texts together are small enough to be tokenised at once."""
    held: list[tuple[int, dict[str, Any]]] = []
    n_chars = 0
    for row, found in rows:
        held.append((row, found))
        n_chars += len(found["text"])
        if len(held) == TOKENIZE_ROWS or n_chars >= TOKENIZE_CHARS:
            yield held
            held, n_chars = [], 0
    if held:
        yield held


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data


def _content(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        return f"{value.dtype.str}{value.shape}".encode() + value.tobytes()
    return f"{type(value).__name__}:{value}".encode()
