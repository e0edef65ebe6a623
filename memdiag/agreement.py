"""How far scores agree with each other and with the truth: means, rank correlations, areas under the curve.

Every figure has a 95 % interval. All of it is of oriented scores, higher = more memorized; NaN is no value, while an
infinity is a value beyond all others.

Axes: n example, m truly memorized or corrupted example, c example that is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
RESAMPLES = 1000
MOST_RESAMPLED = 10_000


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95 % interval (null where it cannot be told) and how many examples it is from."""

    value: float | None
    lo: float | None
    hi: float | None
    n: int


UNKNOWN = Estimate(None, None, None, 0)


def mean(values: NDArray[np.float64], *, seed: int = 0) -> Estimate:
    """The mean of the finite values, with a percentile bootstrap over examples; one example has no interval.

    Of more than `MOST_RESAMPLED` examples it is the normal interval, which the bootstrap's has long become.

    Args:
        values: (n,).
        seed: of the resamples.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return UNKNOWN
    value = float(known.mean())
    if len(known) < 2:
        return Estimate(value, None, None, len(known))
    if len(known) > MOST_RESAMPLED:
        half = float(stats.norm.ppf((1 + LEVEL) / 2)) * float(known.std(ddof=1)) / math.sqrt(len(known))
        return Estimate(value, value - half, value + half, len(known))
    rng = np.random.default_rng(seed)
    # one resample at a time, so that memory does not grow with n x resamples
    means = np.array([known[rng.integers(len(known), size=len(known))].mean() for _ in range(RESAMPLES)])
    lo, hi = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(lo), float(hi), len(known))


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> Estimate:
    """Spearman's rank correlation of the examples that have both scores, ties by mean ranks.

    The interval is Bonett and Wright's (2000): ± 1.96 sqrt((1 + r² / 2) / (n - 3)) around Fisher's z. Null where one
    of the two is the same everywhere; no interval for fewer than four examples.
    """
    both = ~(np.isnan(a) | np.isnan(b))
    x, y = a[both], b[both]
    n = len(x)
    if n < 2 or (x == x[0]).all() or (y == y[0]).all():
        return Estimate(None, None, None, n)
    r = float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])
    if n < 4:
        return Estimate(r, None, None, n)
    if abs(r) >= 1 - 1e-12:
        return Estimate(r, r, r, n)
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt((1 + r * r / 2) / (n - 3))
    z = math.atanh(r)
    return Estimate(r, math.tanh(z - half), math.tanh(z + half), n)


def auc(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> Estimate:
    """P(a true example scores higher than another one), ties half, with DeLong's interval (1988).

    Null where one of the two groups is empty. The interval is cut to [0, 1]; with fewer than two examples in a group,
    or none that is out of order, there is no variance to take it from.
    """
    known = ~np.isnan(scores)
    x, y = scores[known & truth], scores[known & ~truth]
    m, c, n = len(x), len(y), int(known.sum())
    if not m or not c:
        return Estimate(None, None, None, n)
    ranks = stats.rankdata(np.concatenate([x, y]))
    # how often each true example beats the others, and each of the others is beaten: DeLong's structural components
    over = (ranks[:m] - stats.rankdata(x)) / c
    under = 1 - (ranks[m:] - stats.rankdata(y)) / m
    value = float(over.mean())
    if m < 2 or c < 2:
        return Estimate(value, None, None, n)
    se = math.sqrt(over.var(ddof=1) / m + under.var(ddof=1) / c)
    if se == 0.0:
        return Estimate(value, None, None, n)
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * se
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), n)


def found_in_top(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> Estimate:
    """Of the k true examples, the share among the k that score highest, with a Clopper-Pearson interval.

    Examples that tie at the cut count with the share of them that fits; those without a score come last. Null
    without a true example.
    """
    k = int(truth.sum())
    if not k:
        return UNKNOWN
    values = np.where(np.isnan(scores), -np.inf, scores)
    cut = np.sort(values)[-k]
    above, at = values > cut, values == cut
    found = float((above & truth).sum()) + float((at & truth).sum()) * (k - int(above.sum())) / int(at.sum())
    interval = stats.binomtest(round(found), k).proportion_ci(LEVEL, "exact")
    return Estimate(found / k, float(interval.low), float(interval.high), len(values))


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean ranks scaled to [0, 1], 1 the highest; NaN where there is no value, 0.5 for a single one or all equal."""
    out = np.full(len(values), np.nan)
    known = ~np.isnan(values)
    n = int(known.sum())
    if n:
        out[known] = (stats.rankdata(values[known]) - 1) / (n - 1) if n > 1 else 0.5
    return out
