"""Learners whose memorization is known exactly, for tests: the nearest neighbour and the lookup table.

Axes: m model, n example, r rank of a neighbour.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from memdiag.memorization import Sums

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NEAREST = 64  # neighbours looked at: one of them is in a subset of half the rows or more, but for 2^-64


def log_binomial(n: Floats, k: Floats) -> Floats:
    return gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)


def nearest_neighbour_rank_probabilities(n: int, m: int) -> Floats:
    """P_r = C(n-1-r, m-1) / C(n-1, m), r = 1 … n - m: of m of the n - 1 others the nearest is the r-th."""
    r = np.arange(1, n - m + 1)
    return np.exp(log_binomial(n - 1.0 - r, m - 1.0) - log_binomial(n - 1.0, float(m)))


def neighbours(x: Floats) -> Ints:
    """(n, n - 1) the other rows, nearest first, ties by number; exact where x holds small whole numbers."""
    lengths = (x**2).sum(axis=1)
    distance = lengths[:, None] + lengths - 2 * x @ x.T
    np.fill_diagonal(distance, -1.0)
    return np.argsort(distance, axis=1, kind="stable")[:, 1:]


def nearest_neighbour_memorization(order: Ints, y: Ints, m: int) -> Floats:
    """mem(i) = 1 - Σ_r P_r [y_(r) = y_i] of subsets of m rows; p_in = 1 where no input is there twice."""
    n = len(y)
    probability = nearest_neighbour_rank_probabilities(n, m)
    return 1 - (y[order[:, : n - m]] == y[:, None]) @ probability


def subsets(n_models: int, n: int, m: int, rng: np.random.Generator) -> Bools:
    """(m, n) coins: each model has m rows."""
    return rng.permuted(np.tile(np.arange(n) < m, (n_models, 1)), axis=1)


def nearest_neighbour_correct(order: Ints, y: Ints, included: Bools) -> Floats:
    """(m, n) whether each model gives each row its label: its own if in, else the nearest included row's."""
    near = order[:, :NEAREST]
    correct = np.empty(included.shape)
    for model, coins in enumerate(included):
        there = coins[near]
        assert there.any(axis=1).all()
        label = y[near[np.arange(len(y)), there.argmax(axis=1)]]
        correct[model] = coins | (label == y)
    return correct


def lookup_correct(included: Bools, groups: Ints) -> Floats:
    """(m, n) 1 if any copy of the row is in; by a plain loop."""
    correct = np.zeros(included.shape)
    for model, coins in enumerate(included):
        known = set(groups[coins].tolist())
        correct[model] = [group in known for group in groups.tolist()]
    return correct


def summed(included: Bools, measure: Floats) -> Sums:
    """Sums over models (m, n), one after another."""
    sums = Sums.empty(included.shape[1])
    for coins, values in zip(included, measure):
        sums.add(coins, values)
    return sums
