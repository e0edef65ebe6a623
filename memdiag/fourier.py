"""How periodic is a neuron? Inverse participation ratio (IPR) of the Fourier power of its weight curves.

A neuron of a two-layer network on pairs (m, n) modulo p has three curves over the p residues: its input weights for m
(U) and for n (V), and its read-out weights (W). Neurons that compute the modular operation are waves, IPR near 1;
neurons that look single examples up are noise, IPR near 2 / (number of frequencies).

Source: Gromov 2023 (arXiv:2301.02679), Doshi et al. 2023 (arXiv:2310.13061).

Axes: k neuron, m residue, j frequency.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

DEAD = 1e-3  # a neuron whose read-out, or whose whole input, has a smaller norm does nothing
HIGH = 0.5  # at least this much is periodic
LOW = 0.1  # less than this, or than the null's 99.99 % point, is not
ROUNDING = 1e-24  # of power, for float64
NULL_DRAWS, NULL_QUANTILE = 100_000, 0.9999


def power(curves: Tensor, *, keep_dc: bool) -> Tensor:
    """P_j = |rfft(x)_j|², one-sided.

    Args:
        curves: (..., m) real.
        keep_dc: whether j = 0, the square of the mean, counts. For any activation but the square it should not: a
            network of ReLUs has large means whether or not it is periodic.
    Returns:
        (..., j) float64, j = 0 … m/2 or 1 … m/2.
    """
    spectrum: Tensor = torch.fft.rfft(curves.double()).abs().square()
    return spectrum if keep_dc else spectrum[..., 1:]


def curve_ipr(curves: Tensor, *, keep_dc: bool = True) -> Tensor:
    """IPR(x) = Σ_j P_j² / (Σ_j P_j)² of each curve.

    Args:
        curves: (..., m).
    Returns:
        (...) float64, from 1 / (number of bins) for a flat spectrum to 1 for a single wave; NaN for a curve without
        power. This is the one-sided convention of the paper's code; with the full complex spectrum, in which the range
        in the paper's text is given, a wave has 1/2.
    """
    p = power(curves, keep_dc=True)
    if not keep_dc:  # what is left of a constant is rounding
        p = p[..., 1:].where(p[..., 1:].sum(-1, keepdim=True) > ROUNDING * p[..., :1], 0)
    return p.square().sum(-1) / p.sum(-1).square()


def ipr(u: Tensor, v: Tensor, w: Tensor, *, keep_dc: bool = True) -> Tensor:
    """IPR_k = (IPR(U_k) + IPR(V_k) + IPR(W_k)) / 3.

    Args:
        u, v, w: (k, m) each; w is the transpose of the read-out's (m, k).
    Returns:
        (k,) float64; NaN for a dead neuron.
    """
    mean = torch.stack([curve_ipr(x, keep_dc=keep_dc) for x in (u, v, w)]).mean(0)
    return mean.masked_fill(dead(torch.cat([u, v], 1), w), torch.nan)


def dead(incoming: Tensor, outgoing: Tensor) -> Tensor:
    """(k,) bool: the neuron's incoming (k, …) or outgoing (k, …) weights are shorter than DEAD."""
    lengths = [torch.linalg.vector_norm(w.flatten(1).double(), dim=1) for w in (incoming, outgoing)]
    return torch.stack(lengths).amin(0) < DEAD


def frequency(u: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """(k,) int64: the frequency j ≥ 1 that holds most of the normalised power of the three curves together."""
    shares = [p / p.sum(-1, keepdim=True) for p in (power(x, keep_dc=False) for x in (u, v, w))]
    return torch.stack(shares).nan_to_num().sum(0).argmax(-1) + 1


def null_quantile(length: int, *, keep_dc: bool = True) -> float:
    """The 99.99 % point of IPR_k if the three curves were white noise of this length.

    For 97 it is 0.064, and 0.061 without DC. 100,000 draws from a fixed seed.
    """
    return _null(length, keep_dc)


@cache
def _null(length: int, keep_dc: bool) -> float:
    generator = torch.Generator().manual_seed(0)
    draws = [
        curve_ipr(torch.randn(n, 3, length, generator=generator), keep_dc=keep_dc).mean(1)
        for n in [NULL_DRAWS // 20] * 20  # in pieces, to stay small
    ]
    return float(torch.cat(draws).quantile(NULL_QUANTILE))


def low_below(length: int, *, keep_dc: bool = True) -> float:
    """The IPR under which a neuron counts as not periodic."""
    return max(LOW, null_quantile(length, keep_dc=keep_dc))


def dominant(curves: Tensor) -> Tensor:
    """Each curve reduced to its strongest frequency j ≥ 1; what is left out is curves − dominant(curves).

    Args:
        curves: (..., m).
    Returns:
        (..., m) in the dtype of `curves`.
    Source: frequency filtration, Liu & Lu 2026 (arXiv:2605.18022).
    """
    z = torch.fft.rfft(curves.double())
    best = z[..., 1:].abs().argmax(-1, keepdim=True) + 1
    kept = torch.zeros_like(z).scatter(-1, best, z.gather(-1, best))
    wave: Tensor = torch.fft.irfft(kept, n=curves.shape[-1])
    return wave.to(curves.dtype)
