"""Do examples pull the parameters in one direction? m-coherence |Σ g|² / Σ |g|² of per-example gradients g, streamed.

m for m equal gradients, 1 for orthogonal ones, 0 where they cancel: the range is [0, m]. g is the gradient of an
example's own loss, as in gradients.py. Gradients that have vanished add to m but to neither sum.
Source: Chatterjee and Zielinski, arXiv:2008.01217; per example, since averages within a minibatch would inflate it.

Axes: b example, k class.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memdiag.observe import Inputs
from memdiag.observe.losses import check_labels, losses, parameters_of, row_squares, rows_of, run, wanting_gradients
from memdiag.observe.probing import evaluating

MOST_BYTES = 2**29  # of the classes' float32 sums; with more, only the overall sum is kept
OVERALL = -1  # stands for a class where classes are not told apart


def m_coherence(sum_vector: Tensor, sum_of_squares: float) -> float:
    """|Σ g|² / Σ |g|², from 0 to m; NaN where all gradients vanish, or one is not finite.

    Args:
        sum_vector: Σ g, of any shape.
        sum_of_squares: Σ |g|².
    """
    return _ratio(float(row_squares(sum_vector[None]).sum()), sum_of_squares)


def _ratio(square_of_sum: float, sum_of_squares: float) -> float:
    value = square_of_sum / sum_of_squares if sum_of_squares > 0 else math.nan
    return value if math.isfinite(value) else math.nan


class Values(TypedDict):
    """m-coherence with the number of examples behind it; None is undefined: no gradient that is not zero."""

    overall: float | None
    m: int
    per_class: dict[int, float | None]  # empty for a language model, and where the classes' sums take too much memory
    m_per_class: dict[int, int]


@dataclass
class _Sum:
    vectors: list[Tensor]  # Σ g, one for each parameter, float32 or the parameter's dtype if that is better
    squares: float = 0.0  # Σ |g|²
    m: int = 0

    def value(self) -> float | None:
        square = sum(float(row_squares(v[None]).sum()) for v in self.vectors)
        value = _ratio(square, self.squares)
        return None if math.isnan(value) else value


@dataclass
class Coherence:
    """Sums over batches, and over processes by `merge`; n_parameters · (classes + 1) floats, whatever m is.

    Args:
        n_classes: k of a classifier; None for a language model, or to keep the overall sum alone.
    """

    n_classes: int | None = None
    _sums: dict[int, _Sum] = field(default_factory=dict)  # by class; OVERALL where classes are not kept
    _by_class: bool | None = None  # unknown before the first batch

    def add(self, model: nn.Module, inputs: Inputs, norms_squared: NDArray[np.float64]) -> None:
        """Takes a batch in. One forward and one backward per class in it, of that class's examples alone.

        Args:
            model: the same at every call.
            inputs: the batch; with labels if n_classes is not None.
            norms_squared: (b,) |g|² of its examples (GradientNorms.whole²); those with NaN are left out.
        Raises:
            InputError: labels are missing or no classes of the model.
        """
        check_labels(inputs, self.n_classes)
        norms = np.asarray(norms_squared, dtype=np.float64)
        if norms.shape != (inputs.n_examples,):
            raise ValueError(f"want one squared norm for each of {inputs.n_examples} examples, got {norms.shape}")
        parameters = list(parameters_of(model).values())
        if self._by_class is None:
            n = sum(p.numel() for p in parameters)
            self._by_class = self.n_classes is not None and self.n_classes * n * 4 <= MOST_BYTES
        groups: dict[int, list[int]] = defaultdict(list)
        labels = inputs.labels.tolist() if self._by_class and inputs.labels is not None else None
        for row in np.flatnonzero(~np.isnan(norms)).tolist():
            groups[OVERALL if labels is None else labels[row]].append(row)
        with evaluating(model):
            for group, rows in groups.items():
                total = self._sums.get(group)
                if total is None:
                    total = self._sums[group] = _Sum([_zeros_like(p) for p in parameters])
                for vector, slope in zip(
                    total.vectors, _summed(model, parameters, rows_of(inputs, torch.tensor(rows)))
                ):
                    if slope is not None:
                        vector += slope
                total.squares += float(norms[rows].sum())
                total.m += len(rows)

    def merge(self, other: Coherence) -> None:
        """Takes in what another process has added up for the same model; `other` is left as it is."""
        if self.n_classes != other.n_classes:
            raise ValueError(f"want the coherence of {self.n_classes} classes, got that of {other.n_classes}")
        self._by_class = other._by_class if self._by_class is None else self._by_class
        for group, theirs in other._sums.items():
            mine = self._sums.get(group)
            if mine is None:
                mine = self._sums[group] = _Sum([torch.zeros_like(v) for v in theirs.vectors])
            for vector, more in zip(mine.vectors, theirs.vectors):
                vector += more.to(vector.device)
            mine.squares += theirs.squares
            mine.m += theirs.m

    def values(self) -> Values:
        """m-coherence of all examples, and of each class of which there was one."""
        sums = [self._sums[group] for group in sorted(self._sums)]
        whole = _Sum([functools.reduce(torch.add, parts) for parts in zip(*(s.vectors for s in sums))])
        whole.squares, whole.m = math.fsum(s.squares for s in sums), sum(s.m for s in sums)
        classes = {group: self._sums[group] for group in sorted(self._sums) if group != OVERALL}
        return {
            "overall": whole.value(),
            "m": whole.m,
            "per_class": {group: s.value() for group, s in classes.items()},
            "m_per_class": {group: s.m for group, s in classes.items()},
        }


def _zeros_like(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


def _summed(model: nn.Module, parameters: list[Tensor], inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Σ g over the examples, one tensor for each parameter; None where it is zero all over."""
    with wanting_gradients(parameters):
        return torch.autograd.grad(losses(run(model, inputs), inputs).sum(), parameters, allow_unused=True)
