"""Texts as sequences of tokens to train on: packed end to end, or one for each example.

The tokens are kept in a file without a name, so that memory does not grow with the data and nothing is left behind.

Axes: s sequence, b sequence of a batch, t token.
"""

from __future__ import annotations

import array
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memdiag.dataset import Example
from memdiag.errors import InputError


@dataclass(frozen=True, eq=False)
class Corpus:
    """Sequences of at least two tokens, any of which can be had at any time."""

    tokens: NDArray[np.int32]  # all of them, on the disk
    starts: NDArray[np.int64]  # (s,) where each sequence begins
    lengths: NDArray[np.int64]  # (s,)
    n_examples: int  # that the tokens come from
    n_left_out: int  # tokens in no sequence, or examples of a single token

    def __len__(self) -> int:
        return len(self.starts)

    def n_targets(self, rows: NDArray[np.int64]) -> int:
        """Tokens to predict in some sequences: all but the first of each."""
        return int((self.lengths[rows] - 1).sum())

    def n_patches(self, rows: NDArray[np.int64], patch_size: int) -> int:
        """Patches that lie wholly in some sequences."""
        return int((self.lengths[rows] // patch_size).sum())

    def batch(self, rows: NDArray[np.int64], *, pad_id: int = 0) -> tuple[Tensor, Tensor]:
        """Token ids (b, t) int64, right padded, and the mask (b, t) of real tokens."""
        lengths = self.lengths[rows]
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(mask.shape, pad_id, dtype=np.int64)
        for i, (start, length) in enumerate(zip(self.starts[rows], lengths)):
            ids[i, :length] = self.tokens[start : start + length]
        return torch.from_numpy(ids), torch.from_numpy(mask)


def pack(examples: Iterable[Example], length: int, *, end: int | None, keep_tail: bool = False) -> Corpus:
    """All examples end to end, cut into sequences of `length` tokens.

    Args:
        examples: with input_ids.
        end: the token that goes behind an example which does not end with it; None for none.
        keep_tail: also a last sequence that is shorter; otherwise its tokens are left out.
    """
    if length < 2:
        raise InputError(f"sequences of {length} token leave nothing to predict; wanted at least 2")
    with tempfile.TemporaryFile() as file:
        n = 0
        for example in examples:
            n += 1
            ids = _ids(example)
            if end is not None and ids[-1] != end:
                ids = np.append(ids, end)
            file.write(_as_int32(ids))
        tokens = _mapped(file)
    starts = np.arange(0, len(tokens), length, dtype=np.int64)
    lengths = np.minimum(length, len(tokens) - starts)
    keep = lengths > 1 if keep_tail else lengths == length
    return Corpus(tokens, starts[keep], lengths[keep], n, len(tokens) - int(lengths[keep].sum()))


def documents(examples: Iterable[Example]) -> Corpus:
    """A sequence for each example; those of one token have nothing to predict and are left out."""
    lengths = array.array("q")
    with tempfile.TemporaryFile() as file:
        n = 0
        for example in examples:
            n += 1
            ids = _ids(example)
            if len(ids) > 1:
                lengths.append(len(ids))
                file.write(_as_int32(ids))
        tokens = _mapped(file)
    sizes = np.array(lengths, dtype=np.int64)
    return Corpus(tokens, np.cumsum(sizes) - sizes, sizes, n, n - len(sizes))


def _ids(example: Example) -> NDArray[np.int64]:
    if example.input_ids is None:
        raise InputError("the dataset holds features; a language model is trained on text or input_ids")
    return example.input_ids


def _as_int32(ids: NDArray[np.int64]) -> bytes:
    return ids.astype(np.int32).tobytes()


def _mapped(file: object) -> NDArray[np.int32]:
    """The file as an array; the mapping outlives its name and handle."""
    file.flush()  # type: ignore[attr-defined]
    if not file.tell():  # type: ignore[attr-defined]
        return np.empty(0, dtype=np.int32)
    return np.memmap(file, dtype=np.int32, mode="r")  # type: ignore[call-overload, no-any-return]
