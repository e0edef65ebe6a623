"""An example's own loss, which per-example gradients and curvature are derivatives of, and sums of their squares.

Axes: b example, t token, k class, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memdiag.errors import InputError
from memdiag.observe import Inputs, call, predicts_next_token
from memdiag.observe.probing import evaluating

_CHUNK = 2**22  # elements turned into float64 at a time


def losses(logits: Tensor, inputs: Inputs) -> Tensor:
    """(b,) each example's own loss in nats, differentiable.

    Logits (b, k): −ln p(label), in float64, since in float32 p − 1 loses all digits of what a model is sure of.
    Logits (b, t, v): mean over an example's next tokens; NaN for an example of one token.
    """
    if logits.ndim == 2:
        assert inputs.labels is not None
        return F.cross_entropy(logits.double(), inputs.labels, reduction="none")
    assert inputs.tokens is not None
    assert inputs.mask is not None
    z = logits[:, :-1].transpose(1, 2)
    keep = inputs.mask[:, 1:]
    nll = F.cross_entropy(z if z.dtype == torch.float64 else z.float(), inputs.tokens[:, 1:], reduction="none")
    return torch.where(keep, nll, torch.zeros_like(nll)).sum(1) / keep.sum(1)


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    """The logits, from a copy of the features: a model may change its input in place, and a leaf must not be."""
    features = None if inputs.features is None else inputs.features.clone()
    logits = call(model, Inputs(inputs.tokens, inputs.mask, features, inputs.labels))
    if logits is None:
        raise InputError("gradients need the logits of a classifier or of a causal language model; this has none")
    return logits


def n_classes_of(model: nn.Module, inputs: Inputs) -> int | None:
    """k of a classifier, None of a causal language model: which of the two losses the model has.

    Raises:
        InputError: it gives no logits that have a loss.
    """
    with evaluating(model), torch.no_grad():
        logits = run(model, inputs)
    if logits.ndim == 2 and len(logits) == inputs.n_examples:
        return logits.shape[1]
    if logits.ndim != 3 or inputs.tokens is None:
        raise InputError(
            "gradients need the logits of a classifier or of a causal language model; "
            f"this has an output of shape {tuple(logits.shape)}"
        )
    if inputs.tokens.shape[1] > 1 and not predicts_next_token(model, inputs.tokens):
        raise InputError("gradients need a causal language model; the logits of this one look ahead")
    return None


def check_labels(inputs: Inputs, n_classes: int | None) -> None:
    """Raises InputError where a classifier's batch has no labels, or one that is no class."""
    if n_classes is None:
        return
    if inputs.labels is None:
        raise InputError("gradients of a classifier's loss need labels; the data has none (--columns label=NAME)")
    wrong = inputs.labels[(inputs.labels < 0) | (inputs.labels >= n_classes)]
    if len(wrong):
        raise InputError(f"label {int(wrong[0])} does not fit a model of {n_classes} classes (0 to {n_classes - 1})")


def has_loss(inputs: Inputs, n_classes: int | None) -> Tensor:
    """(b,) bool: all but examples of one token in a language model."""
    if n_classes is None:
        assert inputs.mask is not None
        return inputs.mask.sum(1) > 1
    return torch.ones(inputs.n_examples, dtype=torch.bool)


def rows_of(inputs: Inputs, rows: Tensor) -> Inputs:
    """A copy of some examples, without columns that are padding for all of them."""
    tokens, mask, features, labels = (
        None if x is None else x[rows.to(x.device)]
        for x in (inputs.tokens, inputs.mask, inputs.features, inputs.labels)
    )
    if tokens is not None and mask is not None and len(mask):
        width = max(1, int(mask.sum(1).max()))
        tokens, mask = tokens[:, :width], mask[:, :width]
    return Inputs(tokens, mask, features, labels)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """θ: the floating-point parameters by name, tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.is_floating_point()}


@contextmanager
def wanting_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, these want gradients; afterwards what they wanted before."""
    before = [tensor.requires_grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.requires_grad_()
        yield
    finally:
        for tensor, wanted in zip(tensors, before):
            tensor.requires_grad_(wanted)


def row_squares(x: Tensor) -> Tensor:
    """(b,) float64: Σ x² over all but the first axis, without a float64 copy of the whole."""
    x = x.detach().flatten(1) if x.ndim > 1 else x.detach()[:, None]
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    step = max(1, _CHUNK // max(1, len(x)))
    for start in range(0, x.shape[1], step):
        total += torch.linalg.vector_norm(x[:, start : start + step], dim=1, dtype=torch.float64).square_()
    return total
