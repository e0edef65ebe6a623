"""How sure is a mean, or a rate? Intervals and p-values that allow for skewed values.

The bootstrap-t of a mean (Efron; Hall, The Bootstrap and Edgeworth Expansion, 1992): with values x of mean x̄ and
standard error s / √n, each resample x* of n of them gives

    t* = (x̄* - x̄) √n / s*                     and the interval  [x̄ - t*_(1 - α/2) s / √n,  x̄ - t*_(α/2) s / √n]

For more values than are resampled, what the bootstrap comes to: Hall's transformation of t, which takes out the
skewness γ, with a = γ / √n,

    g(t) = t + a t² / 3 + a² t³ / 27 + a / 6     g⁻¹(y) = 3 ((1 + a (y - a / 6))^(1/3) - 1) / a

    [x̄ - g⁻¹(y_(1 - α/2)) s / √n,  x̄ - g⁻¹(y_(α/2)) s / √n]       y: Student's t with n - 1 degrees of freedom

An end beyond which fewer than 10 resamples lie is not read off: it is the farther of theirs, Hall's and Student's, so
that a mean far off its limit has a p as small as it should. Beyond the flat point of g, t = -3 / a, Hall's end stays
there until Student's is farther. So intervals grow with their confidence, without a gap.

Rates have Clopper and Pearson's interval, which holds at every n.

There is no interval, and `note` says why, where the values cannot tell it: a single one, all equal, so few different
ones that resamples often have no spread at all, or a mean that hangs on a handful among thousands.

Axes: n values, b resamples. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 9_999
MOST_RESAMPLED = 1_000  # from here on Hall's interval holds as often: by simulation of eight laws, 94 to 96 of 100
CELLS = 200_000  # values resampled at once, 24 bytes each
FEWEST_BEYOND = 10  # resamples beyond an end that is read off: of fewer, it moves by a third of them and more
TAIL = 2 * FEWEST_BEYOND / (RESAMPLES + 1)  # alpha below which that is so
SMALLEST_P = 1e-300
FREEDOM_OF_NOISE = 5  # degrees of freedom that a noise floor is brought to more than 95 % with

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

    mean, error (x̄ and s / √n), skewness; t (b,) sorted, with infinities where a resample has no spread.
    """

    n: int
    mean: float
    error: float
    skewness: float
    t: Floats

    def interval(self, alpha: float) -> Interval:
        """The interval of confidence 1 - alpha."""
        b = len(self.t)
        # the k-th from either end, so that a mean lies outside in 2 k / (b + 1) of cases; rounded down: wider
        k = math.floor((b + 1) * alpha / 2 + 1e-9)
        at = max(k, 1)
        low, high = float(self.t[at - 1]), float(self.t[b - at])
        if math.isinf(low) or math.isinf(high):
            return Interval(self.mean, None, None, self.n, None, "too few different values for an interval")
        if k < FEWEST_BEYOND:
            y = _student(self.n - 1, alpha)
            least, most = _hall_ends(y, self.skewness / math.sqrt(self.n))
            low, high = min(low, least, -y), max(high, most, y)
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
    return all_values_at([values], seed)[0]


def all_values_at(samples: Sequence[ArrayLike], seed: int) -> list[Callable[[float], Interval]]:
    """`values_at` of several samples; those of one size are resampled together, each as it would be by itself."""
    found: dict[int, Callable[[float], Interval]] = {}
    by_size: dict[int, list[tuple[int, float, float, Floats]]] = {}
    for i, values in enumerate(samples):
        x = np.sort(np.asarray(values, dtype=np.float64).ravel())
        n = len(x)
        if not np.isfinite(x).all():
            raise ValueError("values hold NaN or an infinity; leave them out first")
        if n < 2 or x[0] == x[-1]:
            found[i] = partial(_of, _point(n, float(x[0]) if n else None))
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(x.mean())
            centred = x - mean
            std = math.sqrt(float(centred @ centred) / (n - 1))
        if not 0 < std < math.inf:
            found[i] = partial(_of, Interval(mean, None, None, n, None, "values too small or too large to square"))
        elif n > MOST_RESAMPLED:
            found[i] = partial(_hall, n, mean, std, float(((centred / std) ** 3).mean()))
        else:
            by_size.setdefault(n, []).append((i, mean, std, centred / std))
    for n, alike in by_size.items():
        t = _t_of_resamples(np.column_stack([x for *_, x in alike]), seed)
        for (i, mean, std, x), of in zip(alike, t.T):
            skewness = float((x**3).mean()) * (n / (n - 1)) ** 1.5  # x is of the standard deviation with n - 1
            found[i] = Resampled(n, mean, std / math.sqrt(n), skewness, np.ascontiguousarray(of)).interval
    return [found[i] for i in range(len(samples))]


def _of(found: Interval, alpha: float) -> Interval:
    return found


def _t_of_resamples(x: Floats, seed: int) -> Floats:
    """t* of the resamples, sorted; (b, k).

    A resample of equal values has no spread: its t* is as far off as can be, +inf or -inf, unless it sits on the mean.

    Args:
        x: (n, k) of k samples, each in order, of mean 0 and standard deviation 1. All have the same places drawn.
    """
    n, k = x.shape
    rng = np.random.default_rng([seed, RESAMPLES, n])
    powers = np.hstack([x, x * x])  # n 2k
    found = np.empty((RESAMPLES, k))
    rows = max(1, CELLS // n)
    for start in range(0, RESAMPLES, rows):
        stop = min(start + rows, RESAMPLES)
        drawn = rng.integers(n, size=(stop - start, n))  # b n: places
        drawn += n * np.arange(stop - start)[:, None]
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        sums = times.astype(np.float64) @ powers / n
        means, squares = sums[:, :k], sums[:, k:]
        variance = squares - means * means
        variance[variance < 1e-12 * squares] = 0.0  # what is left of equal values by rounding
        means[np.abs(means) < 1e-12] = 0.0  # nor is a mean that is hit exactly on a side
        with np.errstate(divide="ignore", invalid="ignore"):
            t = means / np.sqrt(variance) * math.sqrt(n - 1)
        found[start:stop] = np.nan_to_num(t, nan=0.0, posinf=np.inf, neginf=-np.inf)
    return np.sort(found, axis=0)


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
        no interval where 1 + a (y - a / 6) ≤ 0 at an end, at 99.8 % if more is asked for: so skewed a mean hangs on
        about four values or fewer, and resamples that have none of them have no spread to speak of.
    Raises:
        ValueError: a moment is NaN.
    """
    return moments_at(n, mean, std, skewness)(_alpha(confidence))


def moments_at(n: int, mean: float, std: float, skewness: float) -> Callable[[float], Interval]:
    """The intervals of `of_moments` as a function of alpha = 1 - confidence, for `p_of`."""
    if n == 0:
        return partial(_of, _point(0, None))
    if math.isnan(mean) or (n > 1 and (math.isnan(std) or (std > 0 and math.isnan(skewness)))):
        raise ValueError("a moment is NaN")
    return partial(_hall, n, mean, std, skewness)


def _hall(n: int, mean: float, std: float, skewness: float, alpha: float) -> Interval:
    if n == 1 or std == 0:
        return _point(n, mean)
    error, a = std / math.sqrt(n), skewness / math.sqrt(n)
    y = _student(n - 1, max(alpha, TAIL))
    if _hall_inverse(-y, a) is None or _hall_inverse(y, a) is None:
        return Interval(mean, None, None, n, None, "the mean hangs on too few of the values for an interval")
    low, high = _hall_ends(_student(n - 1, alpha), a)
    return Interval(mean, mean - high * error, mean - low * error, n, "moments", None)


def _hall_ends(y: float, a: float) -> tuple[float, float]:
    """g⁻¹(-y) and g⁻¹(y); where there is none, the flat point of g or y, whichever is farther off."""
    low, high = _hall_inverse(-y, a), _hall_inverse(y, a)
    return -max(3 / abs(a), y) if low is None else low, max(3 / abs(a), y) if high is None else high


def _student(df: int, alpha: float) -> float:
    """Student's t with a probability of alpha beyond it, both sides together; 1e150 if that is beyond it."""
    if df >= MOST_RESAMPLED or alpha >= TAIL:
        from scipy import special  # which takes as long to import as to resample ten columns

        return min(-float(special.stdtrit(df, alpha / 2)), 1e150)
    # Newton's steps in log t; the log of the probability is concave in it, so that they cannot go astray
    log_t = math.log(-NormalDist().inv_cdf(alpha / 2))
    for _ in range(100):
        if log_t > 150 * math.log(10):
            return 1e150
        log_p, slope = _log_beyond(df, math.exp(log_t))
        step = (log_p - math.log(alpha)) / slope
        log_t += step
        if abs(step) < 1e-14:
            break
    return math.exp(log_t)


def _log_beyond(df: int, t: float) -> tuple[float, float]:
    """Log of P(|T| > t), the incomplete beta function I_x(df / 2, 1 / 2) at x = df / (df + t²); and -1 times its slope.

    The slope is that in log t.

    By its continued fraction (Lentz's way, as in Numerical Recipes), which converges where t is beyond 1 or so.
    """
    a, x = df / 2, df / (df + t * t)
    fraction, c, d = 1.0, 1.0, 0.0
    for i in range(1, 10_000):
        m = i // 2
        if i % 2:
            term = -(a + m) * (a + 0.5 + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (0.5 - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + term * d)
        c = 1 + term / c
        fraction /= c * d
        if abs(c * d - 1) < 1e-15:
            break
    log_front = math.lgamma(a + 0.5) - math.lgamma(a) - math.lgamma(0.5)
    log_front += -a * math.log1p(t * t / df) - 0.5 * math.log1p(df / (t * t))
    return log_front + math.log(fraction / a), 2 * a / fraction


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
        confidence: of the interval. The floor is brought to it: below 95 % as if normal, which shrinks it less than
            any Student's t would; above as Student's t with `FREEDOM_OF_NOISE`, of six repeats. Of fewer it is wider
            still, so that only at 95 % it is exact.
    """
    return _with_noise(interval, floor, _alpha(confidence))


def _with_noise(interval: Interval, floor: float, alpha: float) -> Interval:
    if not 0 <= floor < math.inf:
        raise ValueError(f"a noise floor is a finite half-width, got {floor}")
    x, lo, hi = interval.value, interval.lo, interval.hi
    if x is None or lo is None or hi is None or floor == 0:
        return interval
    noise = floor * _times(alpha)
    # an end of the bootstrap-t may lie on the mean's other side, where there is nothing to combine with
    return replace(interval, lo=x - math.hypot(max(x - lo, 0.0), noise), hi=x + math.hypot(max(hi - x, 0.0), noise))


def _times(alpha: float) -> float:
    """How many times as wide as at 95 % a noise floor is."""
    from scipy import special

    if alpha < 0.05:
        return _student(FREEDOM_OF_NOISE, alpha) / _student(FREEDOM_OF_NOISE, 0.05)
    return float(special.ndtri(alpha / 2) / special.ndtri(0.025))


def p_value(values: ArrayLike, limit: float, *, floor: float = 0.0, seed: int = 0) -> float | None:
    """Two-sided p that the mean is `limit`: `p_of` the intervals of `mean_interval`.

    Up to `MOST_RESAMPLED` values it is a multiple of 2 / (RESAMPLES + 1), down to `TAIL`.
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


def _point(n: int, value: float | None) -> Interval:
    note = ("no values", "one value")[n] if n < 2 else "all values are equal"
    return Interval(value, None, None, n, None, note)


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
