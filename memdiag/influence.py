"""Influence of training examples on test examples, from models that were trained on random subsets (Feldman and Zhang,
arXiv:2008.03703).

Training examples that share a coin are a group: all in a model's training set or none. With c_t what a model makes of
test example t, e.g. whether it is right:

    infl[t, g] = mean of c_t over the models with g in - mean of c_t over those with g out

The sum over the models with g in is one product Cᵀ K of measures and coins; the other sum is the total less it.

The variance of an arm's values, of a binary measure, is that with two imagined models added, one right and one wrong
(the add-one of Agresti and Caffo 2000):

    se² = v_in / n_in + v_out / n_out          v = q - a², a = (Σ c + 1) / (n + 2), q = (Σ c² + 1) / (n + 2)

It is never 0, so that a pair with one model out, or with equal values, does not look certain. Agresti and Caffo divide
by n + 2, as theirs is the variance of the mean that is shrunk likewise. Of the difference of plain means it is too
small: with 8 to 40 models up to nine times as many pairs as of a normal variable were beyond three of it by chance, and
at most twice as many with this one.

A measure between 0 and 1 spreads far less than 0 and 1 do. There v is the sample variance, n - 1, and the imagined
models serve only where an arm has one model or equal values; that a variance from few models may be too small is met
by Student's t when a pair is called significant.

Axes: m model, t test example, g group, b test example of a block. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

SHUFFLE = 4  # key of the draw beside the seed
EQUAL = 1e-12  # variance below which values differ by rounding alone

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Influence of all groups on some test examples.

    Attributes:
        first: number of the block's first test example.
        influence: (b, g) in [-1, 1]; NaN where an arm has no model, and for a test example with a NaN.
        se: (b, g) > 0; NaN where influence is. Above 0.4 where an arm has one model.
        n_in, n_out: (g,) models with the group and without.
        binary: whether the measure is 0 or 1.
    """

    first: int
    influence: Floats
    se: Floats
    n_in: Ints
    n_out: Ints
    binary: bool


def blocks(
    bits: NDArray[np.uint8],
    n_groups: int,
    measure: NDArray[np.floating],
    *,
    binary: bool,
    block: int = 256,
    model_block: int = 256,
) -> Iterator[Block]:
    """Influence of every group on every test example, some test examples at a time.

    It holds some ten arrays of block x n_groups numbers of 8 bytes and one of model_block x n_groups.

    Args:
        bits: (m, ceil(g / 8)) `np.packbits` of the coins along the groups, 1 in.
        n_groups: g.
        measure: (m, t) in [0, 1], an array or a memmap. A test example with NaN from any model has NaN throughout.
        binary: it is 0 or 1: sums are then whole numbers, and single precision holds them.
        block, model_block: test examples and models at a time, ≥ 1.
    Raises:
        ValueError: shapes that do not match, or a measure out of range.
    """
    n_models, n_tests = measure.shape
    if bits.shape != (n_models, -(-n_groups // 8)) or bits.dtype != np.uint8:
        raise ValueError(
            f"coins are {bits.dtype} {bits.shape}; {n_models} models and {n_groups} groups need "
            f"uint8 {(n_models, -(-n_groups // 8))}"
        )
    if block < 1 or model_block < 1:
        raise ValueError(f"block is {block}, model_block {model_block}; wanted at least 1")
    n_in = np.zeros(n_groups, dtype=np.int64)
    for start in range(0, n_models, model_block):
        n_in += _coins(bits[start : start + model_block], n_groups, np.uint8).sum(axis=0, dtype=np.int64)
    n_out = n_models - n_in
    for first in range(0, n_tests, block):
        c = np.asarray(measure[:, first : first + block], dtype=np.float64)  # (m, b)
        unknown = np.isnan(c).any(axis=0)
        c[:, unknown] = 0.0
        if binary and not ((c == 0) | (c == 1)).all():
            raise ValueError("a binary measure has values other than 0 and 1")
        if not ((c >= 0) & (c <= 1)).all():
            raise ValueError("a measure has values outside [0, 1]")
        influence, se = _of_block(bits, n_groups, c, n_in, n_out, binary, model_block)
        influence[unknown] = np.nan
        se[unknown] = np.nan
        yield Block(first, influence, se, n_in, n_out, binary)


def pairs(
    found: Iterable[Block], *, min_influence: float = 0.15, n_se: float = 3.0, top: int = 3
) -> Iterator[dict[str, NDArray[Any]]]:
    """The pairs worth listing: of each block those that are significant, and the first of each test example.

    Args:
        found: from `blocks`.
        min_influence: a significant pair has |influence| of at least this,
        n_se: and of at least so many standard errors; of a measure that is not binary, as many as Student's t has for
            the same chance with the smaller arm's models less one.
        top: how many pairs each test example has at least, if so many are known.
    Yields:
        For each block, arrays of one length, ordered by test and rank: test, group (int64), influence, se (float64),
        n_in, n_out (int64), rank (int64, from 1, of |influence| among all groups of the test example; equal ones by
        group), significant (bool).
    """
    for part in found:
        # float32, so that 0.6 - 0.45 reaches 0.15 and what differs by rounding alone is equal
        size = np.abs(part.influence).astype(np.float32)
        size[np.isnan(size)] = -1.0
        wanted = size >= np.float32(min_influence)
        significant = wanted & (size >= _quantile(part, n_se) * part.se)
        # all that outrank a significant pair reach min_influence, so that ranks among `wanted` are ranks among all
        wanted |= _first(size, top)
        test, group = np.nonzero(wanted & (size >= 0))
        order = np.lexsort((group, -size[test, group], test))
        test, group = test[order], group[order]
        starts = np.searchsorted(test, np.arange(len(size)))
        rank = np.arange(len(test)) - starts[test] + 1
        chosen = significant[test, group] | (rank <= top)
        test, group, rank = test[chosen], group[chosen], rank[chosen]
        yield {
            "test": part.first + test,
            "group": group,
            "influence": part.influence[test, group],
            "se": part.se[test, group],
            "n_in": part.n_in[group],
            "n_out": part.n_out[group],
            "rank": rank,
            "significant": significant[test, group],
        }


def shuffled(measure: NDArray[Any], seed: int) -> NDArray[Any]:
    """The control: the models' outcomes given to other models, so that every influence is chance.

    One permutation serves all test examples, so that what they have in common stays. It is only the pairing of
    outcomes and coins that is broken: shuffling the coins (`bits`) instead does the same with less memory.

    Args:
        measure: (m, t), or anything with models along its first axis.
        seed: of the permutation.
    Returns:
        A copy.
    """
    return np.asarray(measure[np.random.default_rng([seed, SHUFFLE]).permutation(len(measure))])


def _coins(bits: NDArray[np.uint8], n_groups: int, dtype: Any) -> NDArray[Any]:
    return np.unpackbits(bits, axis=1, count=n_groups).astype(dtype)


def _of_block(
    bits: NDArray[np.uint8], n_groups: int, c: Floats, n_in: Ints, n_out: Ints, binary: bool, model_block: int
) -> tuple[Floats, Floats]:
    """Influence and standard errors (b, g) from measures (m, b)."""
    n_models, b = c.shape
    # counts of up to 2^24 models are exact in float32, which is twice as fast
    dtype = np.float32 if binary and n_models < 2**24 else np.float64
    total = np.zeros((b, n_groups))
    squares = total if binary else np.zeros((b, n_groups))
    for start in range(0, n_models, model_block):
        k = _coins(bits[start : start + model_block], n_groups, dtype)  # (m', g)
        part = c[start : start + model_block].astype(dtype)
        total += part.T @ k
        if not binary:
            squares += (part**2).T @ k
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = _variance(total, squares, n_in, binary)
        rest = c.sum(axis=0)[:, None] - total
        variance += _variance(rest, rest if binary else (c**2).sum(axis=0)[:, None] - squares, n_out, binary)
        influence = np.divide(total, n_in, out=total)
        influence -= np.divide(rest, n_out, out=rest)
    variance[:, (n_in == 0) | (n_out == 0)] = np.nan
    return influence, np.sqrt(variance, out=variance)


def _variance(total: Floats, squares: Floats, n: Ints, binary: bool) -> Floats:
    """Variance of an arm's mean, from its sums (b, g) and numbers of models (g,)."""
    found = (squares + 1) / (n + 2)
    found -= ((total + 1) / (n + 2)) ** 2
    if not binary:
        spread = (squares - total**2 / n) / (n - 1)
        found = np.where((n > 1) & (spread > EQUAL), spread, found)
    found /= n
    return found


def _quantile(part: Block, n_se: float) -> float | Floats:
    """Standard errors that are as rare as n_se of a normal variable; (g,), infinite with a single model in an arm."""
    if part.binary:
        return n_se
    freedom = np.minimum(part.n_in, part.n_out) - 1
    sizes, place = np.unique(freedom, return_inverse=True)  # few, and the quantile is slow
    found = stats.t.isf(stats.norm.sf(n_se), np.maximum(sizes, 1))
    return np.asarray(np.where(sizes > 0, found, np.inf)[place])


def _first(size: NDArray[np.float32], top: int) -> NDArray[np.bool_]:
    """(b, g) whether a group is among the first of its row: the largest, equal ones by group."""
    b, n_groups = size.shape
    top = min(top, n_groups)
    if top < 1:
        return np.zeros((b, n_groups), dtype=np.bool_)
    cut = np.partition(size, n_groups - top, axis=1)[:, n_groups - top, None]
    above, at = size > cut, size == cut
    room = top - above.sum(axis=1, keepdims=True)
    first: NDArray[np.bool_] = above | (at & (np.cumsum(at, axis=1) <= room))
    return first
