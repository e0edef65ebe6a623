"""What does each neuron contribute? Scores of the neurons that a linear read-out reads, in closed form.

A contrast finds memorizers: a neuron that serves corrupted examples more than clean ones. Importance for the corrupted
examples alone finds the neurons that everything depends on.

Every function takes the examples of one set (corrupted, clean, held out) and returns a mean over them. Matrix products
take the place of loops over neurons; only `ablation` under cross-entropy goes through the neurons, in blocks.

Axes: i example, k neuron, q class. f_i = W a_i + b.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Literal["mse", "cross_entropy"]
BLOCK = 2**24  # numbers held at once by `ablation`


def runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """(i,) int64: the class with the largest logit but for the label.

    Args:
        logits: (i, q) with q ≥ 2.
        labels: (i,) int64 in [0, q).
    """
    if logits.shape[1] < 2:
        raise ValueError(f"a runner-up needs at least 2 classes, got {logits.shape[1]}")
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def _between(weights: Tensor, a: Tensor, plus: Tensor, minus: Tensor) -> Tensor:
    """mean_i a_ik (W_plus,k − W_minus,k) as one product: Σ_q W_qk (Σ_i (onehot(plus) − onehot(minus))_iq a_ik)."""
    total = torch.zeros(len(weights), a.shape[1], dtype=torch.float64)
    total.index_add_(0, plus, a.double())
    total.index_add_(0, minus, a.double(), alpha=-1)
    return (total * weights.double()).sum(0) / len(a)


def margin(a: Tensor, weights: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """M_k = mean_i a_ik (W_label,k − W_runner-up,k): what the neuron adds to the margin of the label.

    Args:
        a: (i, k) activations.
        weights: (q, k) of the read-out.
        logits: (i, q).
        labels: (i,) int64.
    Returns:
        (k,) float64, in units of the logits; NaN for no examples. Exact as long as the runner-up stays the same.
    """
    return _between(weights, a, labels, runner_up(logits, labels))


def direct_logit(a: Tensor, weights: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
    """mean_i a_ik (W_label,k − W_truth,k): what the neuron adds to the wrong label over the true one.

    Args:
        a: (i, k); weights: (q, k); labels and truth: (i,) int64.
    Returns:
        (k,) float64; NaN for no examples.
    """
    return _between(weights, a, labels, truth)


def ablation(a: Tensor, weights: Tensor, logits: Tensor, labels: Tensor, *, loss: Loss = "mse") -> Tensor:
    """The exact change of the mean loss when the neuron's activation is set to 0.

    Squared error, r = f − onehot:  mean_i (−2 a_ik (r_i · W_k) + a_ik² ‖W_k‖²) / q.
    Cross-entropy:                  mean_i [ln Σ_q exp(f_iq − a_ik W_qk) − ln Σ_q exp f_iq + a_ik W_label,k].

    Args:
        a: (i, k); weights: (q, k); logits: (i, q); labels: (i,) int64.
        loss: mse, the mean over classes too, or cross_entropy, in nats.
    Returns:
        (k,) float64, positive where the loss rises without the neuron; NaN for no examples.
    """
    if loss == "mse":
        r = logits - F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        first = (a * (r @ weights)).double().sum(0)
        second = a.double().square().sum(0) * weights.double().square().sum(0)
        return (second - 2 * first) / (len(a) * logits.shape[1])
    z, w = logits.double(), weights.double()
    before = z.logsumexp(1) - z.gather(1, labels[:, None])[:, 0]  # (i,)
    step = max(1, BLOCK // max(1, logits.numel()))
    change = []
    for at in range(0, a.shape[1], step):
        effect = a[:, None, at : at + step].double() * w[None, :, at : at + step]  # (i, q, block)
        without = z[:, :, None] - effect
        label = without.gather(1, labels[:, None, None].expand(-1, 1, without.shape[2]))[:, 0]
        change.append((without.logsumexp(1) - label - before[:, None]).mean(0))
    return torch.cat(change)


def grad_act(a: Tensor, weights: Tensor, logits: Tensor, labels: Tensor, *, loss: Loss = "mse") -> Tensor:
    """−mean_i a_ik ∂loss_i/∂a_ik, the first-order estimate of `ablation`.

    Unsafe where the examples are fitted: under squared error its sign is that of the residual, which is as often
    negative as positive, and under cross-entropy it vanishes.

    Args and Returns as `ablation`.
    """
    onehot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    r = (logits - onehot) * (2 / logits.shape[1]) if loss == "mse" else logits.softmax(1) - onehot
    return -(a * (r @ weights)).double().sum(0) / len(a)


def activation_norm(a: Tensor, weights: Tensor) -> Tensor:
    """mean_i |a_ik| · ‖W_k‖: how much the neuron says, to whom it may concern. (k,) float64."""
    lengths: Tensor = torch.linalg.vector_norm(weights.double(), dim=0)
    return a.double().abs().mean(0) * lengths


def norm_product(incoming: list[Tensor], weights: Tensor, *, degree: int = 1) -> Tensor:
    """‖W_k‖ (Σ ‖incoming_k‖)^degree: no data, no labels; what every method must beat.

    Args:
        incoming: (k, …) input weights, e.g. U and V.
        weights: (q, k) of the read-out.
        degree: of the activation: 2 for the square, 1 for ReLU.
    Returns:
        (k,) float64, ≥ 0. In a two-layer network on a modular task small values are memorizers.
    """
    lengths = torch.stack([torch.linalg.vector_norm(w.double().flatten(1), dim=1) for w in incoming]).sum(0)
    outgoing: Tensor = torch.linalg.vector_norm(weights.double(), dim=0)
    return outgoing * lengths.pow(degree)
