"""task:multiplication: equations such as "12 x 34 = 408", written digit by digit with 15 tokens.

The data of Yu, arXiv:2505.08727, as the author's code makes them, but for one thing: no pair of operands that `val` or
`test` asks for is ever trained on. Which split a pair is in depends on nothing but the pair, whatever the seed, and
a x b is always in the same one as b x a.

Needs no torch.

Axes: i equation, t token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdiag.errors import InputError, unknown

BOS, EOS, TIMES, EQUALS, BLANK, DIGIT_0 = 0, 1, 2, 3, 4, 5  # digits d are DIGIT_0 + d
VOCAB_SIZE = DIGIT_0 + 10
MAX_DIGITS = 9  # of an operand: the product fits into 63 bits
SPLITS = ("train", "val", "test", "ood")
PARTS = 10  # of ten pairs one is for validation and one for the test
CHUNK = 2**15  # equations drawn at once; another number would give other equations

Ints = NDArray[np.int64]


def rows(
    *, digits: int = 3, min_digits: int = 1, n: int = 10_000, split: str = "train", seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield {id, input_ids, equation, a, b, product} of n equations; a larger n only adds rows at the end.

    The lengths of the two operands are drawn independently and uniformly, the operands uniformly among those of these
    lengths that are in the split: with repetition, in every split.

    Args:
        digits: the longest operand, 1 to 9 digits.
        min_digits: the shortest one.
        n: equations.
        split: train, val or test, which have no pair in common; or ood, longer operands than those trained on, of
            which all pairs are drawn from, e.g. digits=6&min_digits=4.
        seed: of the draws, not of the split.
    Raises:
        InputError: a value out of its range.
    """
    row = 0
    for a, b in pairs(digits=digits, min_digits=min_digits, n=n, split=split, seed=seed):
        tokens, lengths = encode(a, b)
        ends = np.cumsum(lengths)
        for i in range(len(a)):
            yield {
                "id": str(row),
                "input_ids": tokens[ends[i] - lengths[i] : ends[i]].tolist(),
                "equation": f"{a[i]} x {b[i]} = {a[i] * b[i]}",  # not "text", which is read before input_ids
                "a": int(a[i]),
                "b": int(b[i]),
                "product": int(a[i] * b[i]),
            }
            row += 1


def pairs(*, digits: int, min_digits: int, n: int, split: str, seed: int) -> Iterator[tuple[Ints, Ints]]:
    """The operands a (i,) and b (i,) of n equations, chunk by chunk; see `rows`."""
    _check(digits, min_digits, n, split, seed)
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    for start in range(0, n, CHUNK):
        lengths = rng.integers(min_digits, digits + 1, size=(CHUNK, 2))
        operands = _operands(rng, lengths)
        while split != "ood":  # the lengths stay, so that every split has the same law of them
            (wrong,) = (split_of(operands[:, 0], operands[:, 1]) != SPLITS.index(split)).nonzero()
            if not len(wrong):
                break
            operands[wrong] = _operands(rng, lengths[wrong])
        kept = operands[: n - start]
        yield kept[:, 0], kept[:, 1]


def _operands(rng: np.random.Generator, lengths: Ints) -> Ints:
    """Numbers without a leading zero, uniform among those of their length."""
    return rng.integers(10 ** (lengths - 1), 10**lengths)


def split_of(a: Ints, b: Ints) -> Ints:
    """(i,) the place in SPLITS of pairs within the training range: 0 train, 1 val, 2 test.

    h mod 10, where h is the finalizer of splitmix64 (Steele, Lea & Flood 2014) of 10⁹ min(a, b) + max(a, b): 0 is the
    test, 1 validation, the rest training.
    """
    h = (np.minimum(a, b) * 10**MAX_DIGITS + np.maximum(a, b)).astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)  # modulo 2^64
    part = (h ^ (h >> np.uint64(31))) % np.uint64(PARTS)
    return np.where(part == 0, SPLITS.index("test"), np.where(part == 1, SPLITS.index("val"), 0))


def encode(a: Ints, b: Ints) -> tuple[NDArray[np.int32], Ints]:
    """The equations end to end (t,), `<bos>A x B = C<eos>` with single blanks, and the length of each (i,).

    Numbers are written most significant digit first.
    """
    n = len(a)

    def fixed(*tokens: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        return np.tile(np.array(tokens, dtype=np.int32), (n, 1)), np.ones((n, len(tokens)), dtype=np.bool_)

    parts = [
        fixed(BOS), _written(a), fixed(BLANK, TIMES, BLANK), _written(b), fixed(BLANK, EQUALS, BLANK),
        _written(a * b), fixed(EOS),
    ]  # fmt: skip
    tokens, kept = (np.concatenate(side, axis=1) for side in zip(*parts))
    return tokens[kept], kept.sum(1)


def _written(numbers: Ints) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Digit tokens, right aligned (i, width), and which of them are not leading zeros."""
    width = len(str(numbers.max()))
    powers = 10 ** np.arange(width - 1, -1, -1)
    return (numbers[:, None] // powers % 10 + DIGIT_0).astype(np.int32), numbers[:, None] >= powers


def _check(digits: int, min_digits: int, n: int, split: str, seed: int) -> None:
    if split not in SPLITS:
        raise unknown("split of task:multiplication", split, SPLITS)
    if not 1 <= digits <= MAX_DIGITS:
        raise InputError(f"task:multiplication: digits is {digits}; wanted 1 to {MAX_DIGITS}")
    if not 1 <= min_digits <= digits:
        raise InputError(f"task:multiplication: min_digits is {min_digits}; wanted 1 to digits, which is {digits}")
    if split == "ood" and min_digits == 1:
        raise InputError(
            "task:multiplication: split=ood is for longer operands than those trained on; give min_digits, "
            "e.g. digits=6&min_digits=4"
        )
    if n < 1:
        raise InputError(f"task:multiplication: n is {n}; wanted at least 1")
    if seed < 0:
        raise InputError(f"task:multiplication: seed is {seed}; wanted at least 0")
