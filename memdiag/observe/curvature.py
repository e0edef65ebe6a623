"""How curved is the loss around an example? tr H and tr H² with H = ∂² loss / ∂x², x the example's features.

Piecewise linear networks (ReLU and the like): almost everywhere H = Jᵀ S J with J = ∂z/∂x, S = diag p − p pᵀ, so

    tr H = Σ_c p_c |J_c − Σ p J|²        tr H² = tr (S G)², G = J Jᵀ

exactly, from k backward passes. The label is not in it. Every other network: Hutchinson's estimate, mean over n
vectors v of ±1 of vᵀ H v and of |H v|², with H v by differentiating twice. Never by finite differences, which a kink
next to x turns into another quantity (its mean grows as the step shrinks).
Source: Garg et al., arXiv:2307.05831, and Ravikumar et al., arXiv:2402.18726.

Axes: b example, k and c class, n probe vector, d feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from memdiag.errors import InputError, one_line
from memdiag.observe import Inputs
from memdiag.observe.losses import check_labels, losses, n_classes_of, rows_of, run
from memdiag.observe.probing import evaluating

Float64 = NDArray[np.float64]

GRAM_BYTES = 2**28  # of k gradients of some examples, kept at once for tr H²
PROBE_EXAMPLES, PROBE_VECTORS = 3, 2

# modules that are piecewise linear in evaluation mode
_PIECEWISE_LINEAR = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Identity, nn.Flatten, nn.Unflatten),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Threshold),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d),
)


@dataclass(frozen=True)
class Curvatures:
    """(b,) each, in units of 1 / feature² (tr H) and its square (tr H²)."""

    trace: Float64  # ≥ 0 for a piecewise linear network, any sign for others
    trace_of_square: Float64 | None  # Σ of H's squared entries, ≥ 0; None if not asked for


class Curvature:
    """Input curvature of one classifier's loss, example by example.

    Attributes:
        way: "exact", or "hutchinson" where the network is not known to be piecewise linear.
        why: why not exact; None if it is.
    """

    def __init__(
        self, model: nn.Module, probe: Inputs, *, n_probes: int = 10, seed: int = 0, squared: bool = False
    ) -> None:
        """Decides the way: every module must be known as piecewise linear, and vᵀ H v of both ways must agree.

        Args:
            model: any classifier of features; its requires_grad does not matter.
            probe: at least one example of the data; its labels are not used.
            n_probes: n; the estimate's error falls as 1/√n.
            seed: of the vectors; those of an example follow from it and the example's row alone.
            squared: tr H² too.
        Raises:
            InputError: a model of texts, or one whose loss cannot be differentiated twice.
        """
        if probe.features is None:
            raise InputError("loss curvature needs features; token ids have no neighbourhood to be curved in")
        if not probe.n_examples:
            raise InputError("loss curvature needs at least one example to find out how to take it; the data has none")
        if n_probes < 1:
            raise InputError(f"loss curvature needs at least 1 probe vector, got {n_probes}")
        self.model, self.n_probes, self.seed, self.squared = model, n_probes, seed, squared
        few = rows_of(probe, torch.arange(min(PROBE_EXAMPLES, probe.n_examples)))
        self.n_classes = n_classes_of(model, few) or 0
        self.why = _unknown_module(model)
        with evaluating(model), sdpa_kernel(SDPBackend.MATH):
            self.why = self.why or self._differs(few)
            self.way: Literal["exact", "hutchinson"] = "hutchinson" if self.why else "exact"
            if self.way == "hutchinson":
                try:
                    self._hutchinson(_labelled(model, few), np.arange(few.n_examples))
                except RuntimeError as error:
                    raise InputError(f"the model's loss has no second derivative: {one_line(error, 160)}") from None

    def __call__(self, inputs: Inputs, rows: NDArray[np.int64]) -> Curvatures:
        """tr H, and tr H² if asked for, of a batch.

        Args:
            rows: (b,) row numbers of the examples in their dataset, from which their vectors are drawn.
        Raises:
            InputError: the estimate depends on labels, and they are missing or no classes of the model.
        """
        if inputs.n_examples != len(rows):
            raise ValueError(f"want a row number for each of {inputs.n_examples} examples, got {len(rows)}")
        if not inputs.n_examples:
            return Curvatures(np.zeros(0), np.zeros(0) if self.squared else None)
        if self.way == "hutchinson":
            check_labels(inputs, self.n_classes)
        with evaluating(self.model), sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivative
            if self.way == "hutchinson":
                return self._hutchinson(inputs, np.asarray(rows))
            trace, square = self._exact(inputs)
        return Curvatures(_numpy(trace), _numpy(square) if square is not None else None)

    # -- exact ---------------------------------------------------------------------------------------------------------

    def _exact(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """(b,) tr H and tr H²; for the latter a few examples at a time, since k gradients of each are kept."""
        assert inputs.features is not None
        if not self.squared:
            p, slopes = _slopes(self.model, inputs)
            return _variance(p, slopes), None
        bytes_each = 8 * self.n_classes * (inputs.features[0].numel() + self.n_classes)
        size = max(1, GRAM_BYTES // bytes_each)
        traces, squares = [], []
        for start in range(0, inputs.n_examples, size):
            p, slopes = _slopes(self.model, rows_of(inputs, torch.arange(start, min(start + size, inputs.n_examples))))
            j = torch.stack(list(slopes), 1)  # (b, k, d) float64
            traces.append(_variance(p, iter(j.unbind(1))))
            s = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            sg = s @ (j @ j.transpose(1, 2))
            squares.append((sg * sg.transpose(1, 2)).sum((1, 2)))
        return torch.cat(traces), torch.cat(squares)

    def _differs(self, few: Inputs) -> str | None:
        """Why vᵀ Jᵀ S J v is not vᵀ H v for some v; None if it is, for the label that the model finds least likely.

        This holds for every v of a piecewise linear network, so it needs no average and no small input.
        """
        few = _labelled(self.model, few)
        try:
            product = self._products(few)
            for v in self._vectors(few, np.arange(few.n_examples), PROBE_VECTORS):
                p, slopes = _slopes(self.model, few)
                expected = _variance(p, ((j * v.flatten(1)).sum(1, keepdim=True) for j in slopes))
                found = (product(v).double() * v).flatten(1).sum(1)
                if not torch.allclose(found, expected, rtol=1e-2, atol=1e-3 * float(expected.max())):
                    return "its second derivative is not that of a piecewise linear network"
        except RuntimeError as error:
            return one_line(error, 160)
        return None

    # -- Hutchinson ----------------------------------------------------------------------------------------------------

    def _hutchinson(self, inputs: Inputs, rows: NDArray[np.int64]) -> Curvatures:
        product = self._products(inputs)
        trace = torch.zeros(inputs.n_examples, dtype=torch.float64)
        square = torch.zeros_like(trace)
        for v in self._vectors(inputs, rows, self.n_probes):
            hv = product(v).double().flatten(1)
            trace += (hv * v.flatten(1)).sum(1).cpu() / self.n_probes
            square += hv.square().sum(1).cpu() / self.n_probes
        return Curvatures(_numpy(trace), _numpy(square) if self.squared else None)

    def _products(self, inputs: Inputs) -> Callable[[Tensor], Tensor]:
        """v ↦ H v for all examples at once, (b, ...) each."""
        assert inputs.features is not None
        x = inputs.features.detach().clone().requires_grad_()
        logits = run(self.model, Inputs(None, None, x, None))
        (slope,) = torch.autograd.grad(losses(logits, inputs).sum(), x, create_graph=True)

        def product(v: Tensor) -> Tensor:
            if not slope.requires_grad:  # the loss is linear in x
                return torch.zeros_like(x)
            (hv,) = torch.autograd.grad(slope, x, v.to(slope), retain_graph=True, allow_unused=True)
            return torch.zeros_like(x) if hv is None else hv

        return product

    def _vectors(self, inputs: Inputs, rows: NDArray[np.int64], n: int) -> Iterator[Tensor]:
        """n times (b, ...) of ±1, float64; an example's own whatever batch it is in."""
        assert inputs.features is not None
        shape = inputs.features.shape
        generators = [np.random.default_rng(np.random.SeedSequence((self.seed, int(row)))) for row in rows]
        for _ in range(n):
            signs = np.stack([g.integers(0, 2, shape[1:].numel(), dtype=np.int8) for g in generators]) * 2 - 1
            yield torch.from_numpy(signs).reshape(shape).to(inputs.features.device).double()


def _unknown_module(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        if not list(module.children()) and type(module) not in _PIECEWISE_LINEAR:
            return f"{name or 'the model'} ({type(module).__name__}) is not known to be piecewise linear"
    return None


def _labelled(model: nn.Module, inputs: Inputs) -> Inputs:
    """With the labels that the model finds least likely, where a curved logit shows most."""
    with torch.no_grad():
        return Inputs(None, None, inputs.features, run(model, inputs).argmin(1))


def _slopes(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Iterator[Tensor]]:
    """p (b, k) and, class by class, J_c − J_top (b, d), float64; top is the likeliest class of each example.

    A constant difference does not change S J. Less it, nothing cancels in the variance where the model is sure.
    """
    assert inputs.features is not None
    x = inputs.features.detach().clone().requires_grad_()
    logits = run(model, Inputs(None, None, x, None))
    p = logits.detach().double().softmax(1)
    over = logits - logits.gather(1, p.argmax(1, keepdim=True))

    def slopes() -> Iterator[Tensor]:
        for c in range(over.shape[1]):
            (slope,) = torch.autograd.grad(over[:, c].sum(), x, retain_graph=True, allow_unused=True)
            yield (torch.zeros_like(x) if slope is None else slope).flatten(1).double()

    return p, slopes()


def _variance(p: Tensor, slopes: Iterator[Tensor]) -> Tensor:
    """(b,) Σ_c p_c |J_c − Σ p J|², holding one class at a time."""
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    for c, slope in enumerate(slopes):
        mean = mean + p[:, c, None] * slope
        squares = squares + p[:, c] * slope.square().sum(1)
    assert isinstance(mean, Tensor)
    assert isinstance(squares, Tensor)
    return (squares - mean.square().sum(1)).clamp(min=0)


def _numpy(x: Tensor) -> Float64:
    return np.asarray(x.cpu().numpy(), dtype=np.float64)
