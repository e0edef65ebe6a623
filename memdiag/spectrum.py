"""How many directions a set of vectors uses, and how evenly: functions of one spectrum.

Axes: ... any batch, r eigenvalue.

Every function takes eigenvalues (..., r) of a Gram or covariance matrix, in any order, and returns
(...) float64 (a numpy scalar for one spectrum). λ are the eigenvalues, p = λ / Σ λ, and π are the
singular values √λ divided by their sum. Values below r · 2.2e-16 · max λ, tiny negatives among them,
are rounding and count as 0, so decompose in float64: float32 noise lies far above that line. A
spectrum that is all zero, or holds a NaN or an infinity, has no p: every measure of it is NaN.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]

_NEAR_ONE = 1e-3  # closer to alpha = 1 than this, log Σ p^α / (1 - α) would divide rounding by almost nothing


def renyi_entropy(eigenvalues: ArrayLike, alpha: float) -> Float64:
    """S_α = ln(Σ p^α) / (1 - α);  S_1 = -Σ p ln p;  S_∞ = -ln max p.

    Args:
        eigenvalues: (..., r) of a Gram or covariance matrix.
        alpha: order of the entropy, > 0, infinity included.

    Returns:
        (...) nats, from 0 (one direction) to ln r (all equal), never rising with alpha.

    Raises:
        ValueError: any other alpha, or no eigenvalues at all.

    Source: Giraldo, Rao & Principe, arXiv:1211.2459; at alpha = 2 the MBE of arXiv:2505.08727.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    return _entropy(_normalised(_cleaned(eigenvalues)), alpha)


def effective_rank(eigenvalues: ArrayLike) -> Float64:
    """exp S_1, of the eigenvalues.

    Args:
        eigenvalues: (..., r) of a Gram or covariance matrix.

    Returns:
        (...) from 1 to the rank. Some papers call this RankMe: see `rankme`.

    Source: Roy & Vetterli, EUSIPCO 2007, there with singular values in the place of eigenvalues;
        with eigenvalue ratios, as here, arXiv:2509.23024.
    """
    return np.exp(renyi_entropy(eigenvalues, 1.0))


def participation_ratio(eigenvalues: ArrayLike) -> Float64:
    """1 / Σ p² = (Σ λ)² / Σ λ² = exp S_2.

    Args:
        eigenvalues: (..., r) of a Gram or covariance matrix.

    Returns:
        (...) from 1 to the rank, at most `effective_rank`.

    Source: exp of the α = 2 matrix-based entropy of arXiv:1211.2459.
    """
    p = _normalised(_cleaned(eigenvalues))  # (..., r)
    return _scalar(1.0 / np.square(p).sum(-1))


def rankme(eigenvalues: ArrayLike) -> Float64:
    """exp(-Σ π ln π), of the singular values √λ.

    Args:
        eigenvalues: (..., r) of a Gram or covariance matrix (not its singular values).

    Returns:
        (...) from 1 to the rank, at least `effective_rank`.

    Source: Garrido et al., arXiv:2210.02885. Their ε = 1e-7, which keeps float32 logarithms finite,
        is left out: 0 ln 0 is exactly 0 here, and ε would count directions that are not there.
    """
    return np.exp(_entropy(_normalised(np.sqrt(_cleaned(eigenvalues))), 1.0))


def alpha_req(eigenvalues: ArrayLike, *, first: int = 12, last: int = 100) -> tuple[Float64, Float64]:
    """α of the power law λ_n ∝ n^(-α): a straight line through ln λ against ln n, weights 1 / n.

    Args:
        eigenvalues: (..., r) of a covariance matrix.
        first, last: the ranks fitted, 1-based and inclusive; ranks past r and zeros are not usable.

    Returns:
        (α, R²), each (...): α ≥ 0, larger for a steeper fall; R² in [0, 1], weighted like the fit and NaN
        when the fitted values are all equal. Both NaN with fewer than 3 usable ranks.

    Raises:
        ValueError: first < 1 or last < first.

    Source: Agrawal, Mondal, Ghosh & Richards, α-ReQ, NeurIPS 2022; window and weights of arXiv:2509.23024.
    """
    if not 1 <= first <= last:
        raise ValueError(f"want ranks 1 <= first <= last, got {first} to {last}")
    falling = np.flip(np.sort(_cleaned(eigenvalues), axis=-1), axis=-1)
    window = falling[..., first - 1 : last]  # (..., m)
    usable = window > 0
    rank = np.arange(first, first + window.shape[-1], dtype=np.float64)
    weight = usable / rank
    x, y = np.log(rank), np.log(np.where(usable, window, 1.0))
    y = np.where(usable, y - y[..., :1], 0.0)  # from the window's first, so that equal values give exactly 0
    with np.errstate(invalid="ignore", divide="ignore"):
        total = weight.sum(-1, keepdims=True)
        dx = x - (weight * x).sum(-1, keepdims=True) / total
        dy = y - (weight * y).sum(-1, keepdims=True) / total
        sxx, sxy, syy = ((weight * a).sum(-1) for a in (dx * dx, dx * dy, dy * dy))
        enough = usable.sum(-1) >= 3
        slope = np.where(enough, sxy / sxx, np.nan)
        r2 = np.where(enough, sxy**2 / (sxx * syy), np.nan)
    return _scalar(0.0 - slope), _scalar(np.minimum(r2, 1.0))


def isotropy(eigenvalues: ArrayLike, *, dims: int | None = None) -> Float64:
    """IsoScore: how evenly the variance fills all d dimensions.

    With v̂ = √d λ / ‖λ‖, δ = ‖v̂ - 1‖ / √(2(d - √d)) and φ = (d - δ²(d - √d))² / d², the score is
    (d φ - 1) / (d - 1). Written out, d φ is (Σ λ)² / Σ λ²: the score is the participation ratio, moved to [0, 1].

    Args:
        eigenvalues: (..., r) of the covariance of centred vectors.
        dims: d, the number of dimensions; r when not given. Give it when r < d, as for the n x n Gram matrix.

    Returns:
        (...) from 0 (all on a line) to 1 (the same variance in all d); NaN for d = 1.

    Raises:
        ValueError: dims below r.

    Source: Rudman et al., arXiv:2108.07344.
    """
    used = participation_ratio(eigenvalues)
    r = np.shape(eigenvalues)[-1]
    d = r if dims is None else dims
    if d < r:
        raise ValueError(f"dims must be at least the {r} eigenvalues given, got {dims}")
    return _scalar((used - 1.0) / (d - 1.0)) if d > 1 else _scalar(np.full_like(used, np.nan))


def _cleaned(eigenvalues: ArrayLike) -> Float64:
    """(..., r) λ / max λ with rounding set to 0; NaN throughout where λ is all zero or not finite."""
    lam = np.asarray(eigenvalues, dtype=np.float64)
    if lam.ndim == 0 or lam.shape[-1] == 0:
        raise ValueError(f"eigenvalues must be (..., r) with r >= 1, got shape {lam.shape}")
    top = lam.max(-1, keepdims=True)
    defined = np.isfinite(lam).all(-1, keepdims=True) & (top > 0)
    lam = lam / np.where(defined, top, np.nan)  # by the largest first: a sum or a square cannot overflow
    return np.where(lam < lam.shape[-1] * np.finfo(np.float64).eps, 0.0, lam)


def _normalised(weights: Float64) -> Float64:
    """(..., r) divided by their sum; NaN stays NaN."""
    normalised: Float64 = weights / weights.sum(-1, keepdims=True)
    return normalised


def _entropy(p: Float64, alpha: float) -> Float64:
    """S_α of p (..., r), which sums to 1; stable for large alpha and for alpha next to 1."""
    log_p = np.log(np.where(p > 0, p, 1.0))  # 0 ln 0 = 0
    if alpha == 1:
        nats = -(p * log_p).sum(-1)
    elif abs(alpha - 1) < _NEAR_ONE:  # Σ p^α = 1 + Σ p (p^(α - 1) - 1)
        nats = np.log1p((p * np.expm1((alpha - 1) * log_p)).sum(-1)) / (1 - alpha)
    elif math.isinf(alpha):
        nats = -np.log(p.max(-1))
    else:  # the largest is taken out, because a high power of every p would be 0
        top = p.max(-1, keepdims=True)
        nats = (alpha * np.log(top[..., 0]) + np.log(((p / top) ** alpha).sum(-1))) / (1 - alpha)
    return _scalar(np.maximum(nats, 0.0))


def _scalar(values: Float64) -> Float64:
    """A 0-d array as a numpy scalar, what numpy's own reductions return; anything else as it is."""
    scalar: Float64 = values[()] if isinstance(values, np.ndarray) else values
    return scalar
