"""How sure is a mean, or a rate? Intervals and p-values that allow for skewed values.

The bootstrap-t of a mean (Efron; Hall, The Bootstrap and Edgeworth Expansion, 1992): with values x of mean x̄ and
standard error s / √n, each resample x* of n of them gives

    t* = (x̄* - x̄) √n / s*                     and the interval  [x̄ - t*_(1 - α/2) s / √n,  x̄ - t*_(α/2) s / √n]

For more values than are resampled, what the bootstrap comes to: Hall's transformation of t, which takes out the
skewness γ, with a = γ / √n,

    g(t) = t + a t² / 3 + a² t³ / 27 + a / 6     g⁻¹(y) = 3 ((1 + a (y - a / 6))^(1/3) - 1) / a

    [x̄ - g⁻¹(y_(1 - α/2)) s / √n,  x̄ - g⁻¹(y_(α/2)) s / √n]       y: Student's t with n - 1 degrees of freedom

Rates have Clopper and Pearson's interval, which holds at every n.

There is no interval, and `note` says why, where the values cannot tell it: a single one, all equal, so few different
ones that resamples often have no spread at all, or a mean that hangs on a handful among thousands.

Axes: n values, b resamples. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 9_999
MOST_RESAMPLED = 5_000
CELLS = 1_000_000  # values resampled at once, 20 bytes each
SMALLEST_P = 1e-300

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean or rate and its interval: both ends, with the method, or neither, with a note."""

    value: float | None
    lo: float | None
    hi: float | None
    n: int
    method: str | None
    note: str | None


@dataclass(frozen=True)
class Resampled:
    """A mean with its resamples, from which intervals of any confidence are read off.

    mean, error (x̄ and s / √n); t (b,) sorted, with infinities where a resample has no spread.
    """

    n: int
    mean: float
    error: float
    t: Floats

    def interval(self, alpha: float) -> Interval:
        """The interval of confidence 1 - alpha."""
        b = len(self.t)
        # the k-th from either end, so that a mean lies outside in 2 k / (b + 1) of cases; rounded down: wider
        k = math.floor((b + 1) * alpha / 2 + 1e-9)
        if k < 1:
            return Interval(self.mean, None, None, self.n, None, f"{b} resamples do not reach such a confidence")
        low, high = float(self.t[k - 1]), float(self.t[b - k])
        if math.isinf(low) or math.isinf(high):
            return Interval(self.mean, None, None, self.n, None, "too few different values for an interval")
        lo, hi = self.mean - high * self.error, self.mean - low * self.error
        return Interval(self.mean, lo, hi, self.n, "bootstrap-t", None)


def mean_interval(values: ArrayLike, confidence: float, *, seed: int = 0) -> Interval:
    """The mean of some values with its bootstrap-t interval; of more than `MOST_RESAMPLED` as `of_moments`.

    Args:
        values: (n,) finite, in any order.
        confidence: of the interval, above 0 and below 1.
        seed: of the resamples; the same values and seed give the same figures.
    Returns:
        value None for n = 0; no interval for one value or if all are equal.
    Raises:
        ValueError: a value is NaN or infinite.
    """
    return values_at(values, seed)(_alpha(confidence))


def values_at(values: ArrayLike, seed: int) -> Callable[[float], Interval]:
    """The intervals of `mean_interval` as a function of alpha = 1 - confidence, for `p_of`: resampled once."""
    x = np.sort(np.asarray(values, dtype=np.float64).ravel())
    n = len(x)
    if not np.isfinite(x).all():
        raise ValueError("values hold NaN or an infinity; leave them out first")
    if n == 0:
        return lambda alpha: Interval(None, None, None, 0, None, "no values")
    if n == 1 or x[0] == x[-1]:
        return lambda alpha: _point(n, float(x[0]))
    with np.errstate(over="ignore", invalid="ignore"):
        mean = float(x.mean())
        centred = x - mean
        std = math.sqrt(float(centred @ centred) / (n - 1))
    if not 0 < std < math.inf:
        return lambda alpha: Interval(mean, None, None, n, None, "values too small or too large to square")
    if n > MOST_RESAMPLED:
        skewness = float(((centred / std) ** 3).mean())
        return lambda alpha: _hall(n, mean, std, skewness, alpha)
    return Resampled(n, mean, std / math.sqrt(n), _t_of_resamples(centred / std, seed)).interval


def _t_of_resamples(x: Floats, seed: int) -> Floats:
    """t* of the resamples, sorted.

    A resample of equal values has no spread: its t* is as far off as can be, +inf or -inf, unless it sits on the mean.

    Args:
        x: (n,) values of mean 0 and standard deviation 1.
    """
    n = len(x)
    rng = np.random.default_rng([seed, RESAMPLES, n])
    found = np.empty(RESAMPLES)
    rows = max(1, CELLS // n)
    for start in range(0, RESAMPLES, rows):
        stop = min(start + rows, RESAMPLES)
        drawn = x[rng.integers(n, size=(stop - start, n), dtype=np.int32)]  # b n
        first = drawn[:, 0].copy()
        drawn -= first[:, None]  # so that equal values have a spread of 0 exactly
        means = drawn.mean(axis=1)
        drawn -= means[:, None]
        spread = np.sqrt(np.einsum("bn,bn->b", drawn, drawn) / (n - 1))
        means += first
        means[np.abs(means) < 1e-12] = 0.0  # rounding of a mean that is hit exactly is no side to be on
        with np.errstate(divide="ignore", invalid="ignore"):
            found[start:stop] = np.nan_to_num(means / spread * math.sqrt(n), nan=0.0, posinf=np.inf, neginf=-np.inf)
    return np.sort(found)


def of_moments(n: int, mean: float, std: float, skewness: float, confidence: float) -> Interval:
    """The interval of a mean from the moments of many values, as `mean_interval`.

    Hall's rather than Johnson's (1978) transformation, t + a t² / 3 + a / 6, which turns back at t = -1.5 / a, so that
    far-off means can lie inside. By simulation the two miss equally often on either side where γ² is much less than n.

    Args:
        n: how many values.
        mean: of them.
        std: their standard deviation, with n - 1.
        skewness: third central moment over the standard deviation cubed.
        confidence: of the interval.
    Returns:
        no interval where 1 + a (y - a / 6) ≤ 0 at an end: so skewed a mean hangs on about four values or fewer, and
        resamples that have none of them have no spread to speak of.
    Raises:
        ValueError: a moment is NaN.
    """
    return moments_at(n, mean, std, skewness)(_alpha(confidence))


def moments_at(n: int, mean: float, std: float, skewness: float) -> Callable[[float], Interval]:
    """The intervals of `of_moments` as a function of alpha = 1 - confidence, for `p_of`."""
    if n == 0:
        return lambda alpha: Interval(None, None, None, 0, None, "no values")
    if math.isnan(mean) or (n > 1 and (math.isnan(std) or (std > 0 and math.isnan(skewness)))):
        raise ValueError("a moment is NaN")
    return lambda alpha: _hall(n, mean, std, skewness, alpha)


def _hall(n: int, mean: float, std: float, skewness: float, alpha: float) -> Interval:
    from scipy import special

    if n == 1 or std == 0:
        return _point(n, mean)
    y = -float(special.stdtrit(n - 1, alpha / 2))
    error, a = std / math.sqrt(n), skewness / math.sqrt(n)
    low, high = _hall_inverse(-y, a), _hall_inverse(y, a)
    if low is None or high is None:
        return Interval(mean, None, None, n, None, "the mean hangs on too few of the values for an interval")
    return Interval(mean, mean - high * error, mean - low * error, n, "moments", None)


def _hall_inverse(y: float, a: float) -> float | None:
    """g⁻¹(y); None at and beyond the flat point of g."""
    if abs(a) < 1e-8:  # the limit, before the difference below loses its digits
        return y - a / 6 - a * y * y / 3
    cube = 1 + a * (y - a / 6)
    return 3 * (math.cbrt(cube) - 1) / a if cube > 0 else None


def rate_interval(k: int, n: int, confidence: float) -> Interval:
    """k of n as a rate, with Clopper and Pearson's interval.

    Returns:
        value None for n = 0. The interval is within [0, 1] and holds the rate in at least `confidence` of cases.
    """
    if not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is no rate")
    return _clopper_pearson(k, n, _alpha(confidence))


def _clopper_pearson(k: int, n: int, alpha: float) -> Interval:
    from scipy import special

    if n == 0:
        return Interval(None, None, None, 0, None, "no values")
    lo = float(special.betaincinv(k, n - k + 1, alpha / 2)) if k else 0.0
    hi = float(special.betainccinv(k + 1, n - k, alpha / 2)) if k < n else 1.0
    return Interval(k / n, lo, hi, n, "Clopper-Pearson", None)


def widened(interval: Interval, floor: float, confidence: float) -> Interval:
    """The interval with a noise floor in it: half-widths combined by the root of their squares, each side by itself.

    Args:
        interval: of this confidence.
        floor: half-width, at 95 %, of what repeats of the measurement differ by.
        confidence: of the interval. The floor is taken as normal and brought to it.
    """
    return _with_noise(interval, floor, _alpha(confidence))


def _with_noise(interval: Interval, floor: float, alpha: float) -> Interval:
    from scipy import special

    if not 0 <= floor < math.inf:
        raise ValueError(f"a noise floor is a finite half-width, got {floor}")
    x, lo, hi = interval.value, interval.lo, interval.hi
    if x is None or lo is None or hi is None or floor == 0:
        return interval
    noise = floor * float(special.ndtri(alpha / 2) / special.ndtri(0.025))
    # an end of the bootstrap-t may lie on the mean's other side, where there is nothing to combine with
    return replace(interval, lo=x - math.hypot(max(x - lo, 0.0), noise), hi=x + math.hypot(max(hi - x, 0.0), noise))


def p_value(values: ArrayLike, limit: float, *, floor: float = 0.0, seed: int = 0) -> float | None:
    """Two-sided p that the mean is `limit`: `p_of` the intervals of `mean_interval`.

    Up to `MOST_RESAMPLED` values it is a multiple of 2 / (RESAMPLES + 1), and no less than that.
    """
    return p_of(values_at(values, seed), limit, floor=floor)


def p_of_moments(n: int, mean: float, std: float, skewness: float, limit: float, *, floor: float = 0.0) -> float | None:
    """`p_of` the intervals of `of_moments`."""
    return p_of(moments_at(n, mean, std, skewness), limit, floor=floor)


def p_of_rate(k: int, n: int, limit: float) -> float | None:
    """Two-sided p that a rate is `limit`, dual to Clopper and Pearson's interval: twice the smaller binomial tail."""
    from scipy import special

    if not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is no rate")
    if n == 0:
        return None
    rate = min(max(limit, 0.0), 1.0)  # beyond them p is that of the nearest rate there is
    least = float(special.betainc(k, n - k + 1, rate)) if k else 1.0  # P(k or more)
    most = float(special.betaincc(k + 1, n - k, rate)) if k < n else 1.0  # P(k or fewer)
    return min(1.0, 2 * min(least, most))


def p_of(interval_at: Callable[[float], Interval], limit: float, *, floor: float = 0.0) -> float | None:
    """Two-sided p that a mean is `limit`, dual to its intervals: the least alpha whose interval leaves it outside.

    Args:
        interval_at: alpha -> interval of confidence 1 - alpha. Intervals shrink as alpha grows.
        limit: the mean asked about.
        floor: noise that the intervals are `widened` by.
    Returns:
        SMALLEST_P to 1; None where there is no interval.
    """

    def is_outside(alpha: float) -> bool:
        found = _with_noise(interval_at(alpha), floor, alpha)
        return found.lo is not None and found.hi is not None and not found.lo <= limit <= found.hi

    if math.isnan(limit):
        raise ValueError("the limit is NaN")
    inside, outside = SMALLEST_P, 1 - 1e-12
    if interval_at(outside).lo is None:
        return None
    if is_outside(inside):
        return inside
    if not is_outside(outside):
        return 1.0
    while outside / inside > 1 + 1e-12:
        middle = math.sqrt(inside) * math.sqrt(outside) if outside / inside > 2 else (inside + outside) / 2
        if is_outside(middle):
            outside = middle
        else:
            inside = middle
    return outside


def _alpha(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence is above 0 and below 1, got {confidence}")
    return 1 - confidence


def _point(n: int, value: float) -> Interval:
    return Interval(value, None, None, n, None, "one value" if n == 1 else "all values are equal")


def benjamini_hochberg(p: Sequence[float | None]) -> list[float | None]:
    """q-values of some tests (Benjamini and Hochberg 1995): q_(i) = min over j ≥ i of p_(j) m / j.

    Args:
        p: p-values; None, of a test that could not be made, stays None and is not counted in m.
    """
    known = sorted((i for i, value in enumerate(p) if value is not None), key=lambda i: p[i] or 0.0)
    q: list[float | None] = [None] * len(p)
    least = 1.0
    for rank in range(len(known), 0, -1):
        i = known[rank - 1]
        least = min(least, (p[i] or 0.0) * len(known) / rank)
        q[i] = least
    return q
