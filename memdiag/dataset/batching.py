"""Examples, and batches of them that hold about the same number of tokens.

Axes: b example of a batch, t token (right padded), d feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdiag.errors import InputError

WINDOW_TOKENS = 2**22  # a window of very long examples is cut short here, so that it fits in memory


@dataclass(frozen=True, eq=False)
class Example:
    """One row of a dataset, checked and tokenised."""

    row: int  # 0-based
    example_id: str
    input_ids: NDArray[np.int64] | None  # (t,) at least one token
    features: NDArray[np.float32] | None  # finite, the same shape in every row
    label: int | None
    truncated: bool  # input_ids were longer than max_length
    truth: bool | None = None  # whether it is suspect, if the dataset says so
    true_label: int | None = None
    group: str | None = None  # which examples belong together, if the dataset says so

    @property
    def n_tokens(self) -> int:
        """Tokens, or for features the number of vectors along the last axis: 1 for (d,), t for (t, d)."""
        if self.input_ids is not None:
            return len(self.input_ids)
        assert self.features is not None
        return int(np.prod(self.features.shape[:-1], dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples side by side; what lies under a False of the mask is padding and must not be read."""

    example_ids: list[str]
    rows: NDArray[np.int64]  # (b,)
    input_ids: NDArray[np.int64] | None  # (b, t) right padded
    mask: NDArray[np.bool_] | None  # (b, t) True at a real token
    features: NDArray[np.float32] | None  # (b, ...)
    labels: NDArray[np.int64] | None  # (b,)
    truncated: int  # examples of the batch that were cut to max_length
    truth: NDArray[np.bool_] | None = None  # (b,)
    true_labels: NDArray[np.int64] | None = None  # (b,)


def batches(
    examples: Iterable[Example],
    *,
    tokens_per_batch: int,
    pad_id: int = 0,
    examples_per_batch: int | None = None,
    window: int = 1024,
) -> Iterator[Batch]:
    """Batches of at most `tokens_per_batch` tokens, padding included; every example comes exactly once.

    Inside windows of `window` examples they are sorted by length, longest first and ties in the order
    they came, so that little is padding and too large a batch fails at once instead of after hours.

    Args:
        examples: with input_ids, or with features; not mixed.
        tokens_per_batch: b · t at most; an example longer than that is a batch of its own. Features
            count one token for every vector along their last axis: 1 for (d,), t for (t, d).
        pad_id: what stands in input_ids where mask is False.
        examples_per_batch: b at most.
        window: examples held at once to sort; fewer where they are very long.
    Raises:
        InputError: a number below 1.
    """
    limits = {"tokens_per_batch": tokens_per_batch, "examples_per_batch": examples_per_batch, "window": window}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; wanted at least 1")
    most = examples_per_batch or tokens_per_batch
    return (
        collate(group, pad_id=pad_id)
        for held in _windows(examples, window)
        for group in _groups(held, tokens_per_batch, most)
    )


def collate(group: list[Example], *, pad_id: int = 0) -> Batch:
    """One batch of examples that all have input_ids, or all have features of one shape."""
    ids, mask = _pad([e.input_ids for e in group if e.input_ids is not None], pad_id)

    def of_all(values: list[Any], dtype: Any) -> NDArray[Any] | None:
        return None if any(value is None for value in values) else np.array(values, dtype=dtype)

    return Batch(
        example_ids=[e.example_id for e in group],
        rows=np.array([e.row for e in group], dtype=np.int64),
        input_ids=ids,
        mask=mask,
        features=None if ids is not None else np.stack([e.features for e in group if e.features is not None]),
        labels=of_all([e.label for e in group], np.int64),
        truncated=sum(e.truncated for e in group),
        truth=of_all([e.truth for e in group], np.bool_),
        true_labels=of_all([e.true_label for e in group], np.int64),
    )


def _windows(examples: Iterable[Example], window: int) -> Iterator[list[Example]]:
    held: list[Example] = []
    n_values = 0
    for example in examples:
        held.append(example)
        n_values += example.n_tokens if example.features is None else example.features.size
        if len(held) == window or n_values >= WINDOW_TOKENS:
            yield held
            held, n_values = [], 0
    if held:
        yield held


def _groups(held: list[Example], tokens_per_batch: int, most: int) -> Iterator[list[Example]]:
    held = sorted(held, key=lambda e: -e.n_tokens)  # stable: ties stay in order
    start = 0
    while start < len(held):
        size = min(most, max(1, tokens_per_batch // held[start].n_tokens))  # the first is the longest
        yield held[start : start + size]
        start += size


def _pad(rows: list[NDArray[np.int64]], pad_id: int) -> tuple[NDArray[np.int64] | None, NDArray[np.bool_] | None]:
    if not rows:
        return None, None
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]  # (b, t)
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return ids, mask
