"""Memorization of an example, estimated from models that were trained on random subsets (Feldman and Zhang,
arXiv:2008.03703; for language models Zhang et al., arXiv:2112.12938).

Every model has a coin per example: in its training set or not. With M(i) what a model makes of example i, e.g. whether
it is right:

    mem(i) = E[M(i) | i in] - E[M(i) | i out]          p_in and p_out are the means over the models of each arm
    simplicity(i) = p_in + p_out

The interval is the hybrid of one interval per arm (Newcombe 1998, method 10; also called MOVER), d = p_in - p_out:

    lo = d - sqrt((p_in - l_in)² + (u_out - p_out)²)          hi = d + sqrt((u_in - p_in)² + (p_out - l_out)²)

with Wilson's interval [l, u] of a share, and Student's t interval of a mean. The standard error is the plug-in one,
which is 0 where both arms are at 0 or 1; that is no proof, and the interval is not empty there.

Kinds of measure:
    binary    0 or 1, as a classifier's correctness
    bounded   in [0, 1], as a mean token accuracy or a probability
    real      any number, as a mean log-probability

Axes: a arm (0 out, 1 in), n example. Needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from memdiag import agreement

OUT, IN = 0, 1

Kind = Literal["binary", "bounded", "real"]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass
class Sums:
    """What is kept of the models: count, mean and sum of squared deviations of each arm.

    Attributes:
        count: (a, n) models with a value.
        mean: (a, n) of their values; 0 where there are none.
        squares: (a, n) sum of (value - mean)², by Welford's recurrence: exactly 0 if all values are equal.
    """

    count: Ints
    mean: Floats
    squares: Floats

    @classmethod
    def empty(cls, n: int) -> Sums:
        """No models yet, n examples."""
        return cls(np.zeros((2, n), dtype=np.int64), np.zeros((2, n)), np.zeros((2, n)))

    def add(self, included: Bools, measure: NDArray[np.floating]) -> None:
        """Count one model.

        Args:
            included: (n,) the coin of each example.
            measure: (n,) what the model makes of each; NaN is no value and counts in neither arm.
        Raises:
            ValueError: another shape, or an infinity, which no mean survives.
        """
        n = self.count.shape[1]
        if included.shape != (n,) or measure.shape != (n,) or included.dtype != np.bool_:
            raise ValueError(
                f"included is {included.dtype} {included.shape}, measure {measure.shape}; wanted bool and float ({n},)"
            )
        if np.isinf(measure).any():
            raise ValueError("the measure of a model is infinite; wanted finite numbers, or NaN for no value")
        at = np.flatnonzero(~np.isnan(measure))
        arm, value = included[at].astype(np.int64), measure[at].astype(np.float64)
        self.count[arm, at] += 1
        apart = value - self.mean[arm, at]
        self.mean[arm, at] += apart / self.count[arm, at]
        self.squares[arm, at] += apart * (value - self.mean[arm, at])

    def merge(self, other: Sums) -> Sums:
        """The sums of both sets of models, which must have none in common.

        Raises:
            ValueError: they are of different numbers of examples.
        """
        if self.count.shape != other.count.shape:
            raise ValueError(f"sums of {self.count.shape[1]} and of {other.count.shape[1]} examples do not merge")
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        apart = other.mean - self.mean
        return Sums(count, self.mean + apart * share, self.squares + other.squares + apart**2 * self.count * share)


@dataclass(frozen=True)
class Memorization:
    """Estimates of n examples, each array (n,); NaN where they cannot be told.

    Attributes:
        memorization: p_in - p_out; NaN, as all the others, where an arm has no model.
        se: plug-in standard error; for bounded and real measures NaN where an arm has one model.
        lo, hi: interval of `level`.
        p_in, p_out: mean measure over the models with the example and over those without; NaN for an empty arm.
        n_in, n_out: how many models those are.
        simplicity: p_in + p_out.
        s_in, s_out: standard deviation over the models of an arm; sqrt(p (1 - p)) of a binary measure, else with
            n - 1, and NaN for one model.
        kind: of the measure.
    """

    memorization: Floats
    se: Floats
    lo: Floats
    hi: Floats
    p_in: Floats
    p_out: Floats
    n_in: Ints
    n_out: Ints
    simplicity: Floats
    s_in: Floats
    s_out: Floats
    kind: Kind
    level: float


@dataclass(frozen=True)
class Stability:
    """How far two halves of the models agree.

    Attributes:
        spearman: of their memorization.
        rmse: sqrt(mean((a - b)²) / 2), the error of one half that their difference shows.
        rms_se: sqrt(mean of se² over both halves), the error that the standard errors promise.
        n: examples with a standard error in both.
    """

    spearman: agreement.Estimate
    rmse: float | None
    rms_se: float | None
    n: int


def estimate(sums: Sums, *, kind: Kind, level: float = agreement.LEVEL) -> Memorization:
    """Memorization, its standard error and its interval, of every example.

    An arm's interval is Wilson's for a binary measure and Student's t otherwise; that of a bounded measure is cut to
    [0, 1]. Where the mean of a bounded measure is nearer to 0 or 1 than 1 / n, the interval is the wider of t and
    Wilson's with each model as one trial: n models that nearly agree there do not show how a different one fares, e.g.
    one in ten that has not learned the example. So it is where all values are equal (one model also). A real measure
    has no interval where they are.

    Args:
        sums: of the models.
        kind: of the measure.
        level: of the interval, 0 < level < 1.
    Raises:
        ValueError: values that no measure of this kind has, or another level.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; wanted more than 0 and less than 1")
    count = sums.count
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.where(count > 0, sums.mean, np.nan)
        _check(sums, p, kind)
        if kind == "binary":
            p = np.rint(p * count) / count  # exact, whatever order the models came in
            s = np.sqrt(p * (1 - p))
        else:
            s = np.sqrt(sums.squares / np.where(count > 1, count - 1, np.nan))
        se = np.sqrt((s**2 / count).sum(axis=0))
    lo, hi = _hybrid(p, s, count.astype(np.float64), kind, level)
    return Memorization(
        memorization=p[IN] - p[OUT],
        se=se,
        lo=lo,
        hi=hi,
        p_in=p[IN],
        p_out=p[OUT],
        n_in=count[IN].copy(),
        n_out=count[OUT].copy(),
        simplicity=p[IN] + p[OUT],
        s_in=s[IN],
        s_out=s[OUT],
        kind=kind,
        level=level,
    )


def any_included(included: Bools, groups: Ints) -> Bools:
    """The coin of a group of exact copies: whether any of them is in.

    A copy that is out tells nothing while another is in: with c copies that have independent coins, a model that knows
    what it saw has mem = (1 - r)^(c - 1) of each copy, but 1 of the group. Feed this to a second `Sums`.

    Args:
        included: (n,) coins of one model.
        groups: (n,) the group of each example, any numbers.
    Returns:
        (n,) the same for all of a group.
    """
    _, place = np.unique(groups, return_inverse=True)
    return np.bincount(place, weights=included)[place] > 0


def at_least(memorization: Floats, threshold: float) -> Bools:
    """(n,) whether it reaches a threshold; 1 − 0.9 reaches 0.1, and NaN nothing."""
    found: Bools = np.nan_to_num(memorization, nan=-np.inf) >= threshold - 1e-9
    return found


def median_width(found: Memorization) -> float | None:
    """Median of hi - lo over the examples with an interval; None if there is none."""
    width = found.hi - found.lo
    known = width[~np.isnan(width)]
    return float(np.median(known)) if len(known) else None


def models_needed(found: Memorization, n_models: int, width: float) -> int | None:
    """How many models in all until the median width of the interval is at most `width`.

    It assumes that means, standard deviations and the shares of models in and out stay what they are now.

    Args:
        found: from n_models models.
        n_models: how many there are now; n_in + n_out may be fewer where models have no value.
        width: wanted, > 0.
    Returns:
        n_models if they are enough; None if no example has an interval.
    Raises:
        ValueError: another width.
    """
    if not width > 0:
        raise ValueError(f"width is {width}; wanted more than 0")
    now = median_width(found)
    if now is None:
        return None
    known = ~np.isnan(found.hi - found.lo)
    p = np.stack([found.p_out, found.p_in])[:, known]
    s = np.stack([found.s_out, found.s_in])[:, known]
    count = np.stack([found.n_out, found.n_in])[:, known]

    def enough(n: int) -> bool:
        lo, hi = _hybrid(p, s, count * (n / n_models), found.kind, found.level)
        return float(np.median(hi - lo)) <= width

    if now <= width:
        return n_models
    few, many = n_models, 2 * n_models
    while not enough(many):
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


def split_half(a: Memorization, b: Memorization) -> Stability:
    """How far estimates from two disjoint sets of models agree, and whether their standard errors foretell it.

    Args:
        a, b: the same n examples.
    """
    both = ~(np.isnan(a.memorization + a.se) | np.isnan(b.memorization + b.se))
    n = int(both.sum())
    rank = agreement.spearman(a.memorization, b.memorization)
    if not n:
        return Stability(rank, None, None, 0)
    apart = (a.memorization - b.memorization)[both]
    variance = (a.se**2 + b.se**2)[both]
    return Stability(rank, math.sqrt((apart**2).mean() / 2), math.sqrt(variance.mean() / 2), n)


def _hybrid(
    p: Floats, s: NDArray[np.floating], n: NDArray[np.floating], kind: Kind, level: float
) -> tuple[Floats, Floats]:
    """Newcombe's interval of p_in - p_out from arms (a, n); the numbers of models need not be whole."""
    if kind == "binary":
        low, high = _wilson(p, n, level)
    else:
        low, high = _student(p, s, n, level)
    if kind == "bounded":
        one, other = _wilson(p, n, level)
        near = (p * n < 1) | ((1 - p) * n < 1)
        low = np.where(near, np.fmin(low, one), np.where(s > 0, low, one)).clip(min=0.0)
        high = np.where(near, np.fmax(high, other), np.where(s > 0, high, other)).clip(max=1.0)
    d = p[IN] - p[OUT]
    lo = d - np.hypot(p[IN] - low[IN], high[OUT] - p[OUT])
    hi = d + np.hypot(high[IN] - p[IN], p[OUT] - low[OUT])
    # arms within [0, 1] lead beyond [-1, 1] by rounding alone
    return (lo, hi) if kind == "real" else (np.maximum(lo, -1.0), np.minimum(hi, 1.0))


def _wilson(p: Floats, n: NDArray[np.floating], level: float) -> tuple[Floats, Floats]:
    z = float(special.ndtri((1 + level) / 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * np.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    return middle - half, middle + half


def _student(p: Floats, s: NDArray[np.floating], n: NDArray[np.floating], level: float) -> tuple[Floats, Floats]:
    sizes, place = np.unique(n, return_inverse=True)  # few, and the quantile is slow
    t = special.stdtrit(np.where(sizes > 1, sizes - 1, np.nan), (1 + level) / 2)[place].reshape(n.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        half = np.where(s > 0, t * s / np.sqrt(n), np.nan)
    return p - half, p + half


def _check(sums: Sums, p: Floats, kind: Kind) -> None:
    """Raise unless the sums could be of such a measure; Σ x² = Σ x only for 0 and 1, Σ x² ≤ Σ x in [0, 1]."""
    room = sums.count * p * (1 - p)
    if kind == "binary" and (np.abs(sums.squares - room) > 1e-9 * sums.count).any():
        raise ValueError("a binary measure has values other than 0 and 1")
    # a probability in single precision may be a little more than 1
    if kind == "bounded" and (sums.squares > room + 1e-5 * sums.count).any():
        raise ValueError("a bounded measure has values outside [0, 1]")
