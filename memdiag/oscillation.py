"""Does a series over a training run swing more than chance makes it swing?

A cosine measured at a few checkpoints changes sign by chance alone, so what chance gives stands beside every number.

Axes: k checkpoint of a run, r draw of the null.
Source: Yu, arXiv:2505.08727, figure 4, which prints no null. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Oscillation:
    """How much a series over a run swings, and between which values chance puts 90 % of such series.

    `*_null_lo` and `*_null_hi` are the 5 % and 95 % points of the null: for crossings and peak the same values in
    random order, for std sampling noise around a constant. Undefined is NaN.
    """

    n_points: int  # defined values
    std: float
    std_null_lo: float
    std_null_hi: float
    zero_crossings_per_100: float
    zero_crossings_per_100_null_lo: float
    zero_crossings_per_100_null_hi: float
    spectral_peak_over_mean: float
    spectral_peak_over_mean_null_lo: float
    spectral_peak_over_mean_null_hi: float


def oscillation(
    steps: Sequence[int] | NDArray[np.int64],
    values: ArrayLike,
    *,
    standard_errors: ArrayLike | None = None,
    permutations: int = 300,
    seed: int = 0,
) -> Oscillation:
    """Std, sign changes and spectral peak of a series over training steps, each with its null band.

    Points whose value is NaN are left out first. A permutation does not change the std, so its null is what the
    measurement's own noise gives: the std of series drawn from Normal(constant, standard error of each point).

    Args:
        steps: (k,) rising.
        values: (k,), for example a cosine at each checkpoint.
        standard_errors: (k,), >= 0, of the values; without them, or with one NaN, the std has no null.
        permutations: series drawn for each null.
        seed: of the draws; the generator is local.

    Returns:
        std: with k - 1, NaN for fewer than 2 points.
        zero_crossings_per_100: sign changes in 100 steps; an exact 0 carries the sign before it; NaN for < 2 points.
        spectral_peak_over_mean: the largest of |rFFT(values - mean)|^2 over their mean, without the constant term;
            at least 1; NaN for fewer than 4 points, points not equally spaced, or equal values.

    Raises:
        ValueError: shapes that differ, steps that do not rise, a negative or infinite number, no permutations.

    Source: figure 4 of arXiv:2505.08727, which gives no null; white noise alone gives values like its own.
    """
    t, c = np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64)
    se = np.full(c.shape, np.nan) if standard_errors is None else np.asarray(standard_errors, dtype=np.float64)
    if t.ndim != 1 or not t.shape == c.shape == se.shape:
        raise ValueError(f"want steps, values and errors (k,), got shapes {t.shape}, {c.shape} and {se.shape}")
    if (np.diff(t) <= 0).any() or np.isinf(c).any() or np.isinf(se).any() or (se < 0).any() or permutations < 1:
        raise ValueError("want rising steps, finite values, errors >= 0 and at least 1 permutation")
    defined = ~np.isnan(c)
    t, c, se = t[defined], c[defined], se[defined]
    rng = np.random.default_rng(seed)
    shuffled = rng.permuted(np.broadcast_to(c, (permutations, len(c))), axis=1)  # (r, k)
    noise = se * rng.standard_normal((permutations, len(c)))  # (r, k); the constant does not change a std
    return Oscillation(
        len(c),
        *_with_band(_std(c), _std(noise)),
        *_with_band(_crossings_per_100(t, c), _crossings_per_100(t, shuffled)),
        *_with_band(_peak_over_mean(t, c), _peak_over_mean(t, shuffled)),
    )


def _with_band(value: Float64, null: Float64) -> tuple[float, float, float]:
    low, high = np.quantile(null, (0.05, 0.95))
    return float(value), float(low), float(high)


def _std(series: Float64) -> Float64:
    """(..., k) -> (...), with k - 1."""
    if series.shape[-1] < 2:
        return np.full(series.shape[:-1], np.nan)
    return np.asarray(series.std(-1, ddof=1))


def _crossings_per_100(steps: NDArray[np.int64], series: Float64) -> Float64:
    """(..., k) -> (...): sign changes in 100 steps."""
    k = series.shape[-1]
    if k < 2:
        return np.full(series.shape[:-1], np.nan)
    sign = np.sign(series)
    last_nonzero = np.maximum.accumulate(np.where(sign != 0, np.arange(k), 0), axis=-1)
    carried = np.take_along_axis(sign, last_nonzero, axis=-1)  # zeros before the first sign stay 0
    changes = (carried[..., 1:] * carried[..., :-1] < 0).sum(-1)
    return np.asarray(100.0 * changes / (steps[-1] - steps[0]))


def _peak_over_mean(steps: NDArray[np.int64], series: Float64) -> Float64:
    """(..., k) -> (...): largest over mean power, of the frequencies above 0."""
    undefined = np.full(series.shape[:-1], np.nan)
    if series.shape[-1] < 4 or np.ptp(np.diff(steps)) != 0:
        return undefined
    flat = np.ptp(series, axis=-1) == 0  # asked of the values: their rounded mean leaves a spectrum of rounding
    power = np.abs(np.fft.rfft(series - series.mean(-1, keepdims=True))[..., 1:]) ** 2
    return np.asarray(np.divide(power.max(-1), power.mean(-1), out=undefined, where=~flat))
