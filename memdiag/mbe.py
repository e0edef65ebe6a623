"""Matrix-based entropy (MBE): over how many directions do a set of token vectors spread?

Axes: b example, t token position, u unit (one patch or one sequence), n row of a unit, d dimension.
Sources: Giraldo, Rao & Principe, arXiv:1211.2459 (the entropy); Yu, arXiv:2505.08727 (its use per layer, and
per patch of consecutive tokens, which is what that paper's figures are).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memdiag import spectrum

Array = NDArray[np.float64]

# A unit whose rows differ by less than this share of their energy is constant up to rounding: float32 hidden
# states carry (1.2e-7)^2 = 1.4e-14 of relative noise energy, so below it a centred spectrum would be noise.
CONSTANT = 1e-13

# The numbers of one unit, in this order, as `unit_measures` and `moment_measures` give them.
MEASURES = (
    "mbe",
    "mbe_max",
    "mbe_centred",
    "mbe_row_normalised",
    "rankme",
    "effective_rank",
    "participation_ratio",
    "mean_cosine",
)


def matrix_entropy(hidden: Tensor, *, alpha: float = 2.0) -> Tensor:
    """S_α(Z) = ln(Σ_i p_i^α) / (1 − α) with p = eig(Z Zᵀ) / tr(Z Zᵀ);  S_1 = −Σ_i p_i ln p_i.

    For α = 2 the closed form −ln ‖G / tr G‖²_F on the smaller Gram matrix G (Z Zᵀ or ZᵀZ: same value), no
    eigenvalues, differentiable, in float32 for half precision input and in the input's own precision otherwise.
    For every other α through eigenvalues in float64. Neither centred nor rescaled: a common offset counts as a
    direction. No absolute epsilon and no clamp, so Z and 1e±6·Z have the same entropy.

    Args:
        hidden: (..., n, d) floats; rows that are zero do not count.
        alpha: order of the entropy, > 0.
    Returns:
        (...) nats, from 0 (one direction) to ln min(n, d) (all directions equal); NaN where Z is all zero
        (undefined) or not finite.
    Raises:
        ValueError: alpha not above 0, or fewer than two axes.
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a finite number > 0, got {alpha}")
    if hidden.ndim < 2:
        raise ValueError(f"hidden must be (..., n, d), got shape {tuple(hidden.shape)}")
    if 0 in hidden.shape[-2:]:
        return hidden.new_full(hidden.shape[:-2], math.nan, dtype=torch.float64)
    z = hidden if hidden.dtype == torch.float64 else hidden.float()  # bf16 products would lose 2-3 digits
    # S does not depend on the scale, so it needs no gradient; without it float32 squares overflow above 1e19.
    scale = z.detach().abs().amax((-2, -1), keepdim=True)  # (..., 1, 1)
    z = z / torch.where(scale > 0, scale, 1.0)
    if alpha != 2:
        z = z.double()
    n, d = z.shape[-2:]
    gram = z @ z.mT if n <= d else z.mT @ z  # (..., r, r)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)  # (...)
    zero = trace == 0
    p = gram / torch.where(zero, 1.0, trace)[..., None, None]  # eigenvalues sum to 1
    if alpha == 2:
        # torch.where on the argument, not only on the result: ln 0 would poison the gradient of every unit.
        energy = torch.where(zero, 1.0, p.square().sum((-2, -1)))
        return torch.where(zero, math.nan, -energy.log())
    finite = trace.isfinite()
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[..., None, None], p, 0.0))
    entropy = torch.from_numpy(np.asarray(spectrum.renyi_entropy(eigenvalues.detach().cpu().numpy(), alpha)))
    return torch.where(zero | ~finite, math.nan, entropy.to(z.device))


def split_patches(hidden: Tensor, mask: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Consecutive patches of `patch_size` tokens of each example, none of which touches padding.

    Args:
        hidden: (b, t, d).
        mask: (b, t) bool, real tokens first (right padding).
        patch_size: tokens in a patch, ≥ 1.
    Returns:
        (u, patch_size, d) the patches, example by example, and (u,) int64 the example each came from. The tail
        tokens of an example that do not fill a patch are in none.
    """
    n_patches = mask.sum(1) // patch_size  # (b,)
    most = mask.shape[1] // patch_size
    whole = hidden[:, : most * patch_size].reshape(len(hidden), most, patch_size, hidden.shape[-1])  # (b, k, ..., d)
    keep = torch.arange(most, device=mask.device) < n_patches[:, None]  # (b, k)
    examples = torch.arange(mask.shape[0], device=mask.device)[:, None].expand_as(keep)
    if bool(keep.all()):  # spares a copy of the hidden states where every example is equally long
        return whole.flatten(0, 1), examples.flatten()
    return whole[keep], examples[keep]


def patch_entropy(hidden: Tensor, mask: Tensor, *, patch_size: int = 8) -> Tensor:
    """S_2 of every patch of consecutive tokens that lies wholly inside its example; differentiable.

    Args:
        hidden: (b, t, d) floats.
        mask: (b, t) bool, True for real tokens, which come first (right padding).
        patch_size: tokens in a patch, ≥ 1.
    Returns:
        (u,) nats in [0, ln min(patch_size, d)], float32 or better, example by example; empty if no example
        fills a patch.
    Source: arXiv:2505.08727 uses patches of 8 (its author's code; the paper does not mention them).
    """
    patches, _ = split_patches(hidden, mask, patch_size)
    return matrix_entropy(patches, alpha=2.0)


def unit_measures(z: Tensor, lengths: Tensor, *, alpha: float, spectra: bool) -> Array:
    """The MEASURES of every unit, through its Gram matrix on the smaller side, in float64.

    float64, because the centred Gram is a difference: with hidden states whose common offset is 1000 × their
    spread, float32 would leave no correct digit of it.

    Args:
        z: (u, n, d) floats; rows from lengths[u] on are ignored (they may hold anything, NaN too).
        lengths: (u,) int64, rows that count, 0 … n.
        alpha: order of the entropies, > 0.
        spectra: also rankme and effective_rank, which need eigenvalues (else NaN).
    Returns:
        (u, len(MEASURES)) float64, NaN where undefined.
    Raises:
        ValueError: a NaN or an infinity in a row that counts.
    """
    u, n, d = z.shape
    real = torch.arange(n, device=z.device) < lengths[:, None]  # (u, n)
    z = z.double()
    if not bool(real.all()):
        z = z.masked_fill(~real[..., None], 0.0)
    gram, centred, cosines, cosine_sum, norms = _row_grams(z, real, lengths) if n <= d else _column_grams(z, lengths)
    if not bool(norms.isfinite().all()):
        raise ValueError("hidden states hold a NaN or an infinity")
    spread = centred.diagonal(dim1=-2, dim2=-1).sum(-1)
    constant = spread <= CONSTANT * norms.sum(-1)
    n_nonzero = (norms > 0).sum(1).double()
    pairs = torch.where(n_nonzero > 1, n_nonzero * (n_nonzero - 1), math.nan)

    out = np.full((u, len(MEASURES)), np.nan)
    entropy, eigenvalues = _gram_entropy(gram, alpha, spectra)
    rows = np.minimum(lengths.cpu().numpy(), d).astype(np.float64)
    out[:, 0] = entropy
    out[:, 1] = np.log(rows, out=np.full(u, np.nan), where=rows > 0)
    out[:, 2] = np.where(constant.cpu().numpy(), np.nan, _gram_entropy(centred, alpha, False)[0])
    out[:, 3] = _gram_entropy(cosines, alpha, False)[0]
    if spectra and eigenvalues is not None:
        out[:, 4] = spectrum.rankme(eigenvalues)
        out[:, 5] = spectrum.effective_rank(eigenvalues)
    out[:, 6] = np.exp(entropy if alpha == 2 else _gram_entropy(gram, 2.0, False)[0])
    out[:, 7] = ((cosine_sum - n_nonzero) / pairs).cpu().numpy()
    return out


def _row_grams(z: Tensor, real: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """Of units (u, n, d) the (u, n, n) Gram matrices raw, centred and of unit rows; Σ cosines (u,); ‖z‖² (u, n)."""
    gram = z @ z.mT
    norms = gram.diagonal(dim1=-2, dim2=-1)  # (u, n)
    inverse = torch.where(norms > 0, norms.rsqrt(), 0.0)
    cosines = gram * inverse[:, :, None] * inverse[:, None, :]
    count = lengths.double()[:, None]
    row_mean = gram.sum(-1) / count  # (u, n); of no rows: NaN
    grand = row_mean.sum(-1) / count[:, 0]
    centred = gram - row_mean[:, :, None] - row_mean[:, None, :] + grand[:, None, None]
    centred = torch.where(real[:, :, None] & real[:, None, :], centred, 0.0)  # also of no rows: no NaN is left
    return gram, centred, cosines, cosines.sum((-2, -1)), norms


def _column_grams(z: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """The same as `_row_grams` with the smaller (u, d, d) matrices of units that are longer than wide."""
    norms = z.square().sum(-1)  # (u, n)
    unit = z * torch.where(norms > 0, norms.rsqrt(), 0.0)[..., None]
    gram = z.mT @ z
    total = z.sum(1)  # (u, d)
    centred = gram - total[:, :, None] * total[:, None, :] / lengths.double().clamp(min=1)[:, None, None]
    return gram, centred, unit.mT @ unit, unit.sum(1).square().sum(-1), norms


def _gram_entropy(gram: Tensor, alpha: float, spectra: bool) -> tuple[Array, Array | None]:
    """S_α of Gram matrices (u, n, n), and their eigenvalues (u, n) where they were needed or asked for."""
    eigenvalues = None
    if spectra or alpha != 2:
        eigenvalues = torch.linalg.eigvalsh(gram).cpu().numpy()
    if alpha != 2:
        assert eigenvalues is not None
        return np.asarray(spectrum.renyi_entropy(eigenvalues, alpha)), eigenvalues
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    entropy = 2 * trace.log() - gram.square().sum((-2, -1)).log()  # all zero: −inf + inf = NaN, undefined
    return np.maximum(entropy.cpu().numpy(), 0.0), eigenvalues  # rank one comes out as ±1e-16


class Moments:
    """The spectrum of ever more vectors in memory that does not grow: Σh, Σhhᵀ and the same of h/‖h‖, in float64.

    Up to d vectors are kept as they are (smaller, and their Gram matrix is cheaper); from then on they are folded
    into two d × d matrices. For the data set unit, whose vectors come a few at a time.
    """

    def __init__(self) -> None:
        self.n = 0
        self._held = np.empty((0, 0))  # the vectors kept so far, with room for more
        self._n_held = 0
        self._sums: list[Array] | None = None  # Σh (d), Σhhᵀ (d, d), Σĥ (d), Σĥĥᵀ (d, d), number of ĥ

    def add(self, rows: Array) -> None:
        """Take in vectors, (n, d) float64, as they are: centring them first would hide what they share.

        Raises:
            ValueError: a NaN or an infinity.
        """
        if not np.isfinite(rows).all():
            raise ValueError("hidden states hold a NaN or an infinity")
        if not len(rows):
            return
        self.n += len(rows)
        self._hold(rows)
        if self._sums is not None or self.n > rows.shape[1]:
            self._fold()

    def _hold(self, rows: Array) -> None:
        n = self._n_held + len(rows)
        if n > len(self._held):
            # Twice the room in one block: small arrays kept between large ones that come and go would leave the heap
            # in pieces, and its size would grow with every batch.
            grown = np.empty((max(n, 2 * len(self._held)), rows.shape[1]))
            if self._n_held:
                grown[: self._n_held] = self._rows
            self._held = grown
        self._held[self._n_held : n] = rows
        self._n_held = n

    @property
    def _rows(self) -> Array:
        return self._held[: self._n_held]

    def merge(self, other: Moments) -> None:
        """Take in what another process saw."""
        self.add(other._rows)
        if other._sums is not None:
            self._fold()
            if self._sums is None:
                self._sums = [part.copy() for part in other._sums]  # ours grow in place, so they are not shared
            else:
                for total, part in zip(self._sums, other._sums):
                    total += part
            self.n += other.n - other._n_held

    def _fold(self) -> None:
        if not self._n_held:
            return
        h = self._rows
        self._held, self._n_held = np.empty((0, 0)), 0
        norms = np.linalg.norm(h, axis=1, keepdims=True)
        unit = np.divide(h, norms, out=np.zeros_like(h), where=norms > 0)
        new = [h.sum(0), h.T @ h, unit.sum(0), unit.T @ unit, np.array((norms > 0).sum(), dtype=np.float64)]
        if self._sums is None:
            self._sums = new
        else:
            for total, part in zip(self._sums, new):
                total += part  # in place: a second d × d matrix a batch would double the memory

    def measures(self, *, alpha: float) -> tuple[Array, Array]:
        """The MEASURES of all vectors as one unit, (len(MEASURES),), and the eigenvalues of their centred
        covariance, (d,), descending, zeros included (all NaN for fewer than two vectors)."""
        if self._sums is None:
            return self._measures_of_rows(alpha)
        total, scatter, unit_total, unit_scatter, n_nonzero = self._sums
        d = len(total)
        centred = scatter - np.outer(total, total) / self.n
        raw, spread = np.linalg.eigvalsh(scatter), np.linalg.eigvalsh(centred)
        if np.trace(centred) <= CONSTANT * np.trace(scatter):
            spread = np.zeros(d)
        out = np.array(
            [
                spectrum.renyi_entropy(raw, alpha),
                math.log(min(self.n, d)),
                spectrum.renyi_entropy(spread, alpha),
                spectrum.renyi_entropy(np.linalg.eigvalsh(unit_scatter), alpha),
                spectrum.rankme(raw),
                spectrum.effective_rank(raw),
                spectrum.participation_ratio(raw),
                (unit_total @ unit_total - n_nonzero) / (n_nonzero * (n_nonzero - 1)) if n_nonzero > 1 else math.nan,
            ]
        )
        return out, np.maximum(spread, 0.0)[::-1] / self.n

    def _measures_of_rows(self, alpha: float) -> tuple[Array, Array]:
        if not self._n_held:
            return np.full(len(MEASURES), np.nan), np.array([])
        h = self._rows
        n, d = h.shape
        out = unit_measures(torch.from_numpy(h)[None], torch.tensor([n]), alpha=alpha, spectra=True)[0]
        spread = np.zeros(d)
        if n > 1 and not np.isnan(out[2]):  # equal vectors would have a spectrum of rounding
            spread[: min(n, d)] = np.linalg.svd(h - h.mean(0), compute_uv=False) ** 2 / n
        return out, spread if n > 1 else np.full(d, np.nan)
