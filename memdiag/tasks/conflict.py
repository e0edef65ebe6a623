"""task:conflict: two kinds of inputs that ask a network to change in opposite directions.

The data of Yu, arXiv:2505.08727, "conflicting experience", as the author's code makes them: f_θ is a network with one
hidden layer, Δ a shift of its weights, and

    positive (label 0)    x ~ N((1, 1, 1, 1, 1, 0, 0, 0, 0, 0), σ² I)     target f_{θ+Δ}(x)
    negative (label 1)    x ~ N((0, 0, 0, 0, 0, 1, 1, 1, 1, 1), σ² I)     target f_{θ−Δ}(x)

A network that starts from θ is to move by +Δ for the ones and by −Δ for the others. Needs no torch.

Axes: n example, i input feature, j hidden neuron, o output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdiag.errors import InputError, unknown

WIDTHS = (10, 20, 10)  # inputs, hidden neurons, outputs
RANK = 3  # of the shift of a matrix
SHIFTS = (0.5, 5.0)  # its norm, as a share of the parameter's: between these, uniform
SPLITS = ("train", "validation")
CHUNK = 10_000  # examples drawn at once

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Weights:
    """The parameters of f(x) = W₂ relu(W₁ x + b₁) + b₂, or a shift of them; float64."""

    w1: Floats  # (j, i)
    b1: Floats  # (j,)
    w2: Floats  # (o, j)
    b2: Floats  # (o,)

    def moved(self, by: Weights, sign: int) -> Weights:
        """These plus `sign` times a shift."""
        return Weights(*(own + sign * shift for own, shift in zip(self.parts(), by.parts())))

    def parts(self) -> tuple[Floats, Floats, Floats, Floats]:
        """The parameters in the order of a network's."""
        return self.w1, self.b1, self.w2, self.b2

    def __call__(self, x: Floats) -> Floats:
        """f of x (n, i): (n, o)."""
        return np.asarray(np.maximum(x @ self.w1.T + self.b1, 0) @ self.w2.T + self.b2)


def rows(*, n: int = 1000, split: str = "train", sigma: float = 0.25, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield {id, features, label, target}, positive and negative in turn.

    θ and Δ depend on the seed alone, so that both splits have the same.

    Args:
        n: examples of both classes together, ≥ 1; more of them only add rows at the end.
        split: train or validation.
        sigma: standard deviation of a feature, ≥ 0.
        seed: of θ, Δ and the inputs, ≥ 0.
    """
    number = 0
    for features, labels, targets in examples(n=n, split=split, sigma=sigma, seed=seed):
        for x, label, y in zip(features, labels.tolist(), targets):
            yield {"id": str(number), "features": x, "label": label, "target": y}
            number += 1


def examples(
    *, n: int, split: str, sigma: float, seed: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]]:
    """Features (n, i), labels (n,) and targets (n, o), chunk by chunk; see `rows`."""
    _check(n, split, sigma, seed)
    theta, delta = teacher(seed)
    sides = theta.moved(delta, +1), theta.moved(delta, -1)
    centres = np.repeat(np.eye(2), WIDTHS[0] // 2, axis=1)  # (class, i)
    rng = np.random.default_rng([seed, 1 + SPLITS.index(split)])
    for start in range(0, n, CHUNK):
        labels = np.arange(start, min(n, start + CHUNK)) % 2
        x = (centres[labels] + sigma * rng.standard_normal((len(labels), WIDTHS[0]))).astype(np.float32)
        wide = x.astype(np.float64)  # targets are of the features as they are handed out, not as they were drawn
        targets = np.where(labels[:, None] == 0, sides[0](wide), sides[1](wide))
        yield x, labels, targets.astype(np.float32)


def teacher(seed: int) -> tuple[Weights, Weights]:
    """θ, as PyTorch initialises linear layers, and Δ: rank 3 for a matrix, Gaussian for a vector, then rescaled."""
    rng = np.random.default_rng([seed, 0])
    drawn: list[Floats] = []
    for inputs, outputs in pairwise(WIDTHS):
        bound = 1 / math.sqrt(inputs)
        drawn += [rng.uniform(-bound, bound, (outputs, inputs)), rng.uniform(-bound, bound, outputs)]
    return Weights(*drawn), Weights(*(_shift(own, rng) for own in drawn))


def _shift(own: Floats, rng: np.random.Generator) -> Floats:
    if own.ndim == 2:
        shift = rng.standard_normal((len(own), RANK)) @ rng.standard_normal((RANK, own.shape[1]))
    else:
        shift = rng.standard_normal(own.shape)
    return np.asarray(shift * (rng.uniform(*SHIFTS) * np.linalg.norm(own) / np.linalg.norm(shift)))


def _check(n: int, split: str, sigma: float, seed: int) -> None:
    if split not in SPLITS:
        raise unknown("split of task:conflict", split, SPLITS)
    if n < 1:
        raise InputError(f"task:conflict: n is {n}; wanted at least 1")
    if not 0 <= sigma < math.inf:
        raise InputError(f"task:conflict: sigma is {sigma}; wanted a finite number >= 0")
    if seed < 0:
        raise InputError(f"task:conflict: seed is {seed}; wanted at least 0")
