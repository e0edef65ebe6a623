"""All pairs (m, n) modulo p with their sum, difference or product, split in two, some training labels redrawn.

The setting of Doshi et al., "To grok or not to grok" (arXiv:2310.13061). Needs no torch.

Axes: i pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdiag.errors import InputError, unknown

OPERATIONS: dict[str, Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]] = {
    "addition": lambda m, n: m + n,
    "subtraction": lambda m, n: m - n,
    "multiplication": lambda m, n: m * n,
}
LAWS = ("uniform", "wrong")
MAX_P = 1009  # a million pairs; beyond it nothing here was ever tried


@dataclass(frozen=True, eq=False)
class Pairs:
    """The p² pairs in a random order: the first `n_train` are the training set, the others are held out."""

    p: int
    operation: str
    operands: NDArray[np.int64]  # (i, 2) m and n, each in [0, p)
    truth: NDArray[np.int64]  # (i,) in [0, p)
    labels: NDArray[np.int64]  # (i,) what is trained on; truth but for the corrupted pairs
    corrupted: NDArray[np.bool_]  # (i,) the label was redrawn; under the law `uniform` it may still be right
    n_train: int

    @property
    def ids(self) -> NDArray[np.int64]:
        """(i,) m p + n: a pair's number, whatever the split."""
        return np.asarray(self.operands[:, 0] * self.p + self.operands[:, 1])


def make_pairs(
    operation: str,
    p: int,
    *,
    train_fraction: float = 0.5,
    corruption: float = 0.0,
    law: str = "uniform",
    seed: int = 0,
) -> Pairs:
    """Draw the split and the corrupted labels.

    Args:
        operation: addition, subtraction or multiplication.
        p: the modulus; a prime for multiplication.
        train_fraction: int(train_fraction p²) pairs are trained on.
        corruption: ξ; int(ξ n_train) of these get a new label.
        law: `uniform` draws it from all p classes, as the paper's code does, so that one in p is still right;
            `wrong` from the p − 1 wrong ones.
        seed: of both draws. The split does not depend on ξ, and a larger ξ corrupts the same pairs and more.
    Raises:
        InputError: a value out of its range.
    """
    _check(operation, p, train_fraction, corruption, law, seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(p * p)
    operands = np.stack([order // p, order % p], axis=1)
    truth = OPERATIONS[operation](operands[:, 0], operands[:, 1]) % p
    n_train = int(train_fraction * p * p)
    corrupted = np.arange(p * p) < int(corruption * n_train)  # the order is random, so its first ones are
    shift = rng.integers(0 if law == "uniform" else 1, p, size=p * p)
    labels = np.where(corrupted, (truth + shift) % p, truth)
    return Pairs(p, operation, operands, truth, labels, corrupted, n_train)


def examples(
    operation: str, p: int, split: str, train_fraction: float, corruption: float, corruption_law: str, seed: int
) -> Iterator[dict[str, Any]]:
    """The rows of a task: {id, features, label, true_label, corrupted}, in the order drawn.

    Args:
        split: train, test or all. The id, m p + n, is the pair's whatever the split.
    Yields:
        features is (2 p,) float32, onehot(m) and onehot(n); corrupted says that the label was redrawn.
    Raises:
        InputError: a value out of its range.
    """
    if split not in ("train", "test", "all"):
        raise unknown(f"split of task:modular-{operation}", split, ("train", "test", "all"))
    pairs = make_pairs(
        operation, p, train_fraction=train_fraction, corruption=corruption, law=corruption_law, seed=seed
    )
    chosen = {"train": slice(0, pairs.n_train), "test": slice(pairs.n_train, None), "all": slice(None)}[split]
    for i in range(p * p)[chosen]:
        features = np.zeros(2 * p, dtype=np.float32)
        features[[pairs.operands[i, 0], p + pairs.operands[i, 1]]] = 1
        yield {
            "id": str(pairs.ids[i]),
            "features": features,
            "label": int(pairs.labels[i]),
            "true_label": int(pairs.truth[i]),
            "corrupted": bool(pairs.corrupted[i]),
        }


def _check(operation: str, p: int, train_fraction: float, corruption: float, law: str, seed: int) -> None:
    if operation not in OPERATIONS:
        raise unknown("operation", operation, OPERATIONS)
    if not 3 <= p <= MAX_P:
        raise InputError(f"p is {p}; wanted a modulus from 3 to {MAX_P}")
    if operation == "multiplication" and not is_prime(p):
        raise InputError(f"p is {p}, which is not prime; multiplication needs a prime, e.g. {_prime_near(p)}")
    if law not in LAWS:
        raise unknown("corruption law", law, LAWS)
    if not 0 <= corruption < 1:
        raise InputError(f"corruption is {corruption}; wanted a share of at least 0 and less than 1")
    if not 0 < train_fraction < 1 or not int(train_fraction * p * p) >= 1:
        raise InputError(f"train_fraction is {train_fraction}; wanted a share between 0 and 1 of the {p * p} pairs")
    if seed < 0:
        raise InputError(f"seed is {seed}; wanted at least 0")


def is_prime(p: int) -> bool:
    """Whether p has no divisor but 1 and itself."""
    return p > 1 and all(p % d for d in range(2, int(p**0.5) + 1))


def _prime_near(p: int) -> int:
    return min((q for q in range(3, MAX_P + 1) if is_prime(q)), key=lambda q: abs(q - p))


def discrete_log_order(p: int) -> NDArray[np.int64]:
    """(p − 1,) the powers g⁰, g¹, … modulo a prime p of its smallest primitive root g.

    In this order, multiplication by g is a step of one, so that what is periodic under multiplication is a plain wave.
    0 has no logarithm and is left out.
    Raises:
        ValueError: p is not prime.
    """
    if not is_prime(p):
        raise ValueError(f"p must be prime, got {p}")
    for g in range(1, p):
        powers = [1]
        while (power := powers[-1] * g % p) != 1:
            powers.append(power)
        if len(powers) == p - 1:
            return np.array(powers, dtype=np.int64)
    raise AssertionError("every prime has a primitive root")
