"""How memorization changes with the size of the model: constant, rising, falling or cap-shaped (Lukasik et al.,
arXiv:2310.05337).

With m_k the memorization of an example in models of size k and e_k its standard error, a curve is constant unless two
sizes j < k differ by more than their noise:

    |m_k - m_j| > n_se sqrt(e_j² + e_k²)

A curve that is not constant is fitted by weighted least squares, with weights 1 / e², three or four times, and takes
the shape that leaves the least residual χ² = Σ_k ((m_k - fit_k) / e_k)², the simpler of equal ones:

    rising     never falls
    falling    never rises
    cap        rises to a peak, then falls; only if some two sizes up to the peak differ by more than their noise, and
               some two from the peak on
    valley     the same upside down; it is called "other"

Where even the least residual is more than noise leaves, the curve is a zigzag, also "other": of curves that truly have
a shape, its fit leaves so much of at most 2 (1 - Φ(n_se)), by the χ² of s - 1 degrees of freedom.

With n_se = 2 noise alone makes a difference of a given pair in 4.6 % of constant curves, and there are s (s - 1) / 2
pairs. With equal standard errors 4.6, 11.2, 18.8, 26.6, 34.2, 41.5 and 48.2 % of constant curves are called something
else for s = 2 … 8 sizes (for n_se = 3: 0.3, 0.8, 1.4, 2.3, 3.2, 4.3 and 5.5 %), and a curve that rises and then stays
where it is has as many pairs to be mistaken for a cap. `false_call_rate` says how many of given constant curves; shares
of shapes are worth reading only beside it.

Once p_in is 1 memorization falls only as p_out rises: show p_in and p_out beside a curve. Models of two sizes that
were trained on the same subsets have errors in common, with which their difference is surer than it is taken to be
here.

Axes: s size, ascending, n example. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

SHAPES = ("constant", "rising", "falling", "cap", "other")
N_SE = 2.0
NOISE = 5  # key of the draw beside the seed
BLOCK = 8192  # curves fitted at once
TIE = 1e-9  # residuals this close, relative to 1 + the residual, differ by rounding

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Curves and what they were called.

    Attributes:
        shape: (n,) objects, one of `SHAPES`; None where any size has no value or no standard error.
        contrast: (n,) ≥ 0, the largest |m_k - m_j| / sqrt(e_j² + e_k²) of any two sizes; NaN where shape is None, 0 for
            one size. A curve is constant where it is at most n_se.
    """

    shape: NDArray[np.object_]
    contrast: Floats


def standard_errors(p_in: Floats, n_in: NDArray[Any], p_out: Floats, n_out: NDArray[Any]) -> Floats:
    """Standard error of p_in - p_out, with one success and one failure added to each arm (Agresti and Caffo 2000).

        a = (p n + 1) / (n + 2)          e² = a_in (1 - a_in) / (n_in + 2) + a_out (1 - a_out) / (n_out + 2)

    It is not 0 where both shares are 0 or 1, as the plug-in one is. Of two sizes alike, p_in - p_out differs by more
    than 2 sqrt(e² + e²) in at most 4.9 % for 400 models of which 0.7 have the example, 5.8 % for 100 and 6.9 % for 50,
    and in far fewer where the shares are near 0 and 1 (normal numbers: 4.6 %).

    Args:
        p_in, p_out: shares of the models with and without the example that are right, any one shape.
        n_in, n_out: how many models those are, ≥ 0, of the same shape.
    Returns:
        The same shape, > 0; NaN where an arm has no model or a share is NaN.
    Raises:
        ValueError: a share outside [0, 1], or a negative count.
    """
    variance = np.zeros(np.shape(p_in))
    for p, n in ((p_in, n_in), (p_out, n_out)):
        share, count = np.asarray(p, dtype=np.float64), np.asarray(n, dtype=np.float64)
        if ((share < 0) | (share > 1)).any() or (count < 0).any():
            raise ValueError("wanted shares in [0, 1] and counts of at least 0")
        a = (share * count + 1) / (count + 2)
        variance = variance + np.where(count > 0, a * (1 - a) / (count + 2), np.nan)
    return np.sqrt(variance)


def classify(memorization: Floats, se: Floats, *, n_se: float = N_SE) -> Trajectories:
    """The shape of every curve.

    Args:
        memorization: (s, n), sizes ascending, s ≥ 1; NaN for no value.
        se: (s, n) > 0, of `standard_errors`; NaN for none.
        n_se: standard errors of a difference that are noise, > 0.
    Raises:
        ValueError: shapes that do not match, an infinity, a standard error that is not above 0, or another n_se.
    """
    if memorization.ndim != 2 or not len(memorization) or memorization.shape != se.shape:
        raise ValueError(f"memorization is {memorization.shape}, se {se.shape}; wanted (sizes, examples) of both")
    if np.isinf(memorization).any() or np.isinf(se).any() or (se <= 0).any():
        raise ValueError("wanted finite memorization and standard errors above 0, or NaN for no value")
    if not n_se > 0:
        raise ValueError(f"n_se is {n_se}; wanted more than 0")
    n = memorization.shape[1]
    shape = np.full(n, None, dtype=np.object_)
    contrast = np.full(n, np.nan)
    known = np.flatnonzero(~np.isnan(memorization + se).any(axis=0))
    for start in range(0, len(known), BLOCK):
        at = known[start : start + BLOCK]
        m, e = memorization[:, at].astype(np.float64), se[:, at].astype(np.float64)
        contrast[at] = np.abs(_contrasts(m, e)).max(axis=(0, 1))
        moved = contrast[at] > n_se
        shape[at[~moved]] = "constant"
        shape[at[moved]] = _of_moved(m[:, moved], e[:, moved], n_se)
    return Trajectories(shape, contrast)


def false_call_rate(se: Floats, seed: int, *, n_se: float = N_SE, repeats: int = 1) -> float | None:
    """The control: the share of curves called other than constant, of curves that are constant but for normal noise.

    Args:
        se: (s, n) > 0, the standard errors of the curves that were classified.
        seed: of the noise.
        repeats: curves drawn for every example, ≥ 1; the rate's own standard error is at most
            0.5 / sqrt(n repeats).
    Returns:
        In [0, 1]; None if no example has all its standard errors.
    Raises:
        ValueError: as `classify`.
    """
    rng = np.random.default_rng([seed, NOISE])
    called = n_known = 0
    for _ in range(repeats):
        found = classify(rng.normal(size=se.shape) * se, se, n_se=n_se)
        called += int((found.contrast > n_se).sum())
        n_known += int((~np.isnan(found.contrast)).sum())
    return called / n_known if n_known else None


def _contrasts(m: Floats, e: Floats) -> Floats:
    """(s, s, n) of sizes j, k: (m_k - m_j) / sqrt(e_j² + e_k²)."""
    found: Floats = (m[None] - m[:, None]) / np.hypot(e[:, None], e[None])
    return found


def _of_moved(m: Floats, e: Floats, n_se: float) -> NDArray[np.object_]:
    """(n,) shapes of curves (s, n) that are not constant."""
    residual = _rising(m, e)[1][-1]
    shape = np.full(m.shape[1], "rising", dtype=np.object_)
    candidates = (("falling", _rising(-m, e)[1][-1]), ("cap", _cap(m, e, n_se)), ("other", _cap(-m, e, n_se)))
    for name, others in candidates:  # from the simplest
        less = others < residual - TIE * (1 + residual)
        residual[less], shape[less] = others[less], name
    most = special.chdtri(max(len(m) - 1, 1), 2 * special.ndtr(-n_se))
    shape[residual > most] = "other"
    return shape


def _rising(m: Floats, e: Floats) -> tuple[Floats, Floats]:
    """The weighted least squares fits that never fall, of sizes 0 … p for every p.

    fit_k = max over i ≤ k of the min over k ≤ j ≤ p of the weighted mean of sizes i … j (Robertson et al. 1988), which
    costs the same for all curves at once.

    Returns:
        Values fit_p at the last size of each, and residuals, both (s, n).
    """
    n_sizes, weight = len(m), e**-2.0
    means = np.full((n_sizes, *m.shape), np.inf)  # (i, k, n) means of sizes i … k
    least = np.full((n_sizes, *m.shape), np.inf)  # (i, k, n) least mean of sizes i … j for k ≤ j ≤ p
    for i in range(n_sizes):
        means[i, i:] = np.cumsum(weight[i:] * m[i:], axis=0) / np.cumsum(weight[i:], axis=0)
    last, residual = np.empty_like(m), np.empty_like(m)
    for p in range(n_sizes):
        fit = np.empty_like(m[: p + 1])
        for k in range(p + 1):
            np.minimum(least[: k + 1, k], means[: k + 1, p], out=least[: k + 1, k])
            fit[k] = least[: k + 1, k].max(axis=0)
        last[p], residual[p] = fit[p], (weight[: p + 1] * (m[: p + 1] - fit) ** 2).sum(axis=0)
    return last, residual


def _cap(m: Floats, e: Floats, n_se: float) -> Floats:
    """(n,) residuals of the best fits that rise to a peak and then fall; infinite where one side is no more than noise.

    A fit of sizes 0 … p that never falls and one of the others that never rises make a cap with its peak at p or p + 1,
    whichever is higher, and every cap is made of two such fits.
    """
    n_sizes, n = m.shape
    if n_sizes < 3:
        return np.full(n, np.inf)
    left, right = _rising(m, e), _rising(m[::-1], e[::-1])
    top = left[0][:-1], right[0][-2::-1]  # (s - 1, n) at p and at p + 1, by p
    residual = left[1][:-1] + right[1][-2::-1]
    p, curve = residual.argmin(axis=0), np.arange(n)
    peak = p + (top[1][p, curve] > top[0][p, curve])
    z = _contrasts(m, e)
    rises = np.stack([(z[:k, k] > n_se).any(axis=0) for k in range(n_sizes)])  # (k, n) to size k, from a smaller
    falls = np.stack([(z[j, j + 1 :] < -n_se).any(axis=0) for j in range(n_sizes)])  # (j, n) from size j
    rises = np.logical_or.accumulate(rises)
    falls = np.logical_or.accumulate(falls[::-1])[::-1]
    return np.where(rises[peak, curve] & falls[peak, curve], residual[p, curve], np.inf)
