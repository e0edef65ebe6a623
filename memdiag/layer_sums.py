"""What is kept of the hidden states of a layer: sums from which the rows of an entropy report follow.

Sums of different batches, or of different processes, are joined by adding them.

Axes: b example, t position, d dimension, u unit, k one of mbe.MEASURES.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from memdiag import mbe, spectrum
from memdiag.checkpoint import Checkpoint
from memdiag.entropy_report import EntropyOptions

Array = NDArray[np.float64]
CONFIDENCE = 0.95


@dataclass
class UnitSums:
    """Sums over units from which means and standard errors follow; adding two is joining what they saw."""

    values: Array = field(default_factory=lambda: np.zeros((2, len(mbe.MEASURES))))  # Σ x and number of defined x
    clusters: Array = field(default_factory=lambda: np.zeros(4))  # over examples i: 1, Σ s_i², Σ s_i n_i, Σ n_i²
    n_units: int = 0
    n_tokens: int = 0

    def add(self, measures: Array, examples: NDArray[np.int64], n_tokens: int) -> None:
        """Take in units: measures (u, k), and which example (u,) each unit is of."""
        self.values[0] += np.nansum(measures, 0)
        self.values[1] += (~np.isnan(measures)).sum(0)
        self.n_units += len(measures)
        self.n_tokens += n_tokens
        defined = ~np.isnan(measures[:, 0])
        if defined.any():
            s = np.bincount(examples[defined], measures[defined, 0])
            n = np.bincount(examples[defined]).astype(np.float64)
            s, n = s[n > 0], n[n > 0]
            self.clusters += np.array([len(n), s @ s, s @ n, n @ n])

    def merge(self, other: UnitSums) -> None:
        self.values += other.values
        self.clusters += other.clusters
        self.n_units += other.n_units
        self.n_tokens += other.n_tokens

    def means(self) -> Array:
        total, n = self.values
        means: Array = np.divide(total, n, out=np.full_like(total, np.nan), where=n > 0)
        return means

    def standard_error(self) -> tuple[float, float]:
        """Of the mean of the first measure over units that come in examples, and the half width of its interval.

        Units of one example go together, so that examples are what is resampled (the cluster-robust formula):
        se² = m / (m − 1) · Σ_i (s_i − mean · n_i)² / (Σ n_i)², with s_i the sum over the n_i units of example i.
        """
        m, ss, sn, nn_ = self.clusters
        if m < 2:
            return math.nan, math.nan
        mean = self.values[0, 0] / self.values[1, 0]
        residual = max(ss - 2 * mean * sn + mean * mean * nn_, 0.0)
        se = math.sqrt(m / (m - 1) * residual) / self.values[1, 0]
        return se, se * float(stats.t.ppf((1 + CONFIDENCE) / 2, m - 1))


@dataclass
class LayerSums:
    """What was seen of one layer."""

    n_dims: int = 0
    n_tokens: int = 0  # all real tokens, in units or not
    patch: UnitSums = field(default_factory=UnitSums)
    sequence: UnitSums = field(default_factory=UnitSums)
    mean: mbe.Moments = field(default_factory=mbe.Moments)
    last: mbe.Moments = field(default_factory=mbe.Moments)

    def merge(self, other: LayerSums) -> None:
        self.n_dims = self.n_dims or other.n_dims
        self.n_tokens += other.n_tokens
        self.patch.merge(other.patch)
        self.sequence.merge(other.sequence)
        self.mean.merge(other.mean)
        self.last.merge(other.last)


@dataclass
class Sums:
    """What was seen of one checkpoint."""

    layers: list[LayerSums]
    n_examples: int = 0
    truncated: int = 0
    nll: float = 0.0
    n_predictions: int = 0

    def merge(self, other: Sums) -> None:
        if not self.layers:
            self.layers = [LayerSums() for _ in other.layers]
        for mine, theirs in zip(self.layers, other.layers):
            mine.merge(theirs)
        self.n_examples += other.n_examples
        self.truncated += other.truncated
        self.nll += other.nll
        self.n_predictions += other.n_predictions


@torch.inference_mode()
def observe_layer(hidden: Tensor, mask: Tensor, options: EntropyOptions) -> LayerSums:
    """Reduce one layer's hidden states (b, t, d) with mask (b, t) to what the rows need."""
    if hidden.device.type == "mps":  # has no float64
        hidden, mask = hidden.cpu(), mask.cpu()
    b, _, d = hidden.shape
    lengths = mask.sum(1)
    sums = LayerSums(n_dims=d, n_tokens=int(lengths.sum()))
    if "patch" in options.units:
        patches, of_example = mbe.split_patches(hidden, mask, options.patch_size)
        full = torch.full((len(patches),), options.patch_size, device=hidden.device)
        measures = mbe.unit_measures(patches, full, alpha=options.alpha, spectra=True)
        sums.patch.add(measures, of_example.cpu().numpy(), patches.shape[0] * patches.shape[1])
    if "sequence" in options.units:
        measures = mbe.unit_measures(hidden, lengths, alpha=options.alpha, spectra=options.spectra)
        sums.sequence.add(measures, np.arange(b), sums.n_tokens)
    if "dataset" in options.units:
        states = hidden.double().masked_fill(~mask[..., None], 0.0)
        sums.mean.add((states.sum(1) / lengths[:, None]).cpu().numpy())
        sums.last.add(states[torch.arange(b, device=states.device), lengths - 1].cpu().numpy())
    return sums


def rows_of(
    sums: Sums, layers: Sequence[tuple[int, str]], checkpoint: Checkpoint, options: EntropyOptions
) -> Iterator[dict[str, Any]]:
    """The rows of one checkpoint: layer by layer, unit by unit."""
    for (index, layer_name), seen in zip(layers, sums.layers):
        shared = {
            "checkpoint": checkpoint.name,
            "step": checkpoint.step,
            "layer": index,
            "layer_name": layer_name,
            "alpha": options.alpha,
            "n_examples": sums.n_examples,
            "truncated": sums.truncated,
            "n_dims": seen.n_dims,
            "cross_entropy": sums.nll / sums.n_predictions if sums.n_predictions else None,
        }
        for unit, units in (("patch", seen.patch), ("sequence", seen.sequence)):
            if unit in options.units:
                yield shared | _averaged(unit, units, seen.n_tokens, options)
        if "dataset" in options.units:
            yield shared | _pooled("mean", seen.mean, seen.n_tokens, 0, options)
            if seen.n_tokens > seen.last.n:  # of one token an example, the last is the mean
                yield shared | _pooled("last", seen.last, seen.last.n, seen.n_tokens - seen.last.n, options)


def _averaged(unit: str, units: UnitSums, n_tokens: int, options: EntropyOptions) -> dict[str, Any]:
    means = dict(zip(mbe.MEASURES, units.means().tolist()))
    se, half = units.standard_error()
    return means | {
        "unit": unit,
        "pooling": None,
        "patch_size": options.patch_size if unit == "patch" else None,
        "n_units": units.n_units,
        "n_undefined": units.n_units - int(units.values[1, 0]),
        "n_tokens": units.n_tokens,
        "n_tokens_dropped": n_tokens - units.n_tokens,
        "mbe_se": se,
        "mbe_lo": means["mbe"] - half,
        "mbe_hi": means["mbe"] + half,
        "alpha_req": None,
        "alpha_req_r2": None,
        "n_limited": None,
        "isotropy": None,
    }


def _pooled(pooling: str, moments: mbe.Moments, n_tokens: int, dropped: int, options: EntropyOptions) -> dict[str, Any]:
    measures, spread = moments.measures(alpha=options.alpha)
    alpha_req, r2 = spectrum.alpha_req(spread)
    return dict(zip(mbe.MEASURES, measures.tolist())) | {
        "unit": "dataset",
        "pooling": pooling,
        "patch_size": None,
        "n_units": 1,
        "n_undefined": int(np.isnan(measures[0])),
        "n_tokens": n_tokens,
        "n_tokens_dropped": dropped,
        "mbe_se": None,
        "mbe_lo": None,
        "mbe_hi": None,
        "alpha_req": float(alpha_req),
        "alpha_req_r2": float(r2),
        "n_limited": moments.n < 2 * len(spread),
        "isotropy": float(spectrum.isotropy(spread)),
    }
