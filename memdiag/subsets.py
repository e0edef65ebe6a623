"""Which examples each of many models is trained on: one coin for every group of examples that belong together.

    balanced    in every block of B models each coin falls "in" exactly r·B times; B is the smallest number that makes
                r·B whole (r = 0.7: 7 of 10; r = 0.5: 1 of 2)
    bernoulli   each coin of each model falls "in" with probability r, whatever the others do

The coins of model k are a function of (seed, k) alone, so that asking for more models only adds some, and several
machines can share them. Exact copies share a coin unless the user groups examples otherwise: with a coin each, a copy
that is left out is still known from the others, and c copies of what is only learned by heart seem to be memorized no
more than (1 − r)^(c − 1) (Zhang et al., arXiv:2112.12938).

Needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from memdiag.errors import InputError, unknown

DESIGNS = ("balanced", "bernoulli")
FINEST = 1000  # the largest B
COINS = 11  # key of the draws beside the seed

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Design:
    """How the coins fall; the field names are the command's option names."""

    subset_ratio: float = 0.7
    design: str = "balanced"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.design not in DESIGNS:
            raise unknown("design", self.design, DESIGNS)
        if not 0 < self.subset_ratio < 1:
            raise InputError(f"--subset-ratio must be more than 0 and less than 1, got {self.subset_ratio}")
        if self.design == "balanced" and not 0 < self.share < 1:
            raise InputError(
                f"--subset-ratio {self.subset_ratio}: blocks of {FINEST} models cannot hold it; use --design bernoulli"
            )

    @property
    def share(self) -> Fraction:
        """r as the nearest fraction whose denominator is at most 1000: 0.3333 counts as 1/3."""
        return Fraction(str(self.subset_ratio)).limit_denominator(FINEST)

    @property
    def block(self) -> int:
        """B, the models of a balanced block; 1 where the coins are independent."""
        return self.share.denominator if self.design == "balanced" else 1

    def coins(self, model: int, n_groups: int) -> Bools:
        """(n_groups,) whether each group is in the subset of model k, counted from 0."""
        block, place = divmod(model, self.block)
        rng = np.random.default_rng([self.seed, COINS, block])
        if self.design == "bernoulli":
            return rng.random(n_groups) < self.subset_ratio
        # one model after another, each group with the probability that its quota leaves: every choice of r·B of the B
        # is as likely as any other, and only n numbers are held
        quota = np.full(n_groups, self.share.numerator)
        for at in range(place + 1):
            found: Bools = rng.random(n_groups) * (self.block - at) < quota
            quota -= found
        return found


def fingerprint(included: Bools) -> str:
    """sha256 (hex) of a subset."""
    return hashlib.sha256(np.packbits(included).tobytes()).hexdigest()


def groups_of(keys: Iterable[Hashable]) -> Ints:
    """(n,) the number of each example's group: equal keys are a group, counted as they first appear."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int64)


def contents(inputs: Iterable[NDArray[np.generic]], labels: Ints | None) -> Iterator[bytes]:
    """A key for what each example holds: equal for exact copies, i.e. the same numbers or tokens and the same label."""
    for i, found in enumerate(inputs):
        label = b"" if labels is None else int(labels[i]).to_bytes(8, "little", signed=True)
        yield hashlib.blake2b(label + np.ascontiguousarray(found).tobytes(), digest_size=16).digest()
