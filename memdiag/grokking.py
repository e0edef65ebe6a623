"""Train a two-layer network on modular arithmetic with corrupted labels, and follow what it generalizes and memorizes.

    f_q(m, n) = Σ_k W_qk φ(U_km + V_kn)        no biases; φ(h) = h², or ReLU

Mean squared error against one-hot labels, over examples and classes, full batch, AdamW with decoupled decay. Every
weight starts as N(0, (16 N)^(−2/3)). Doshi et al. 2023, "To grok or not to grok" (arXiv:2310.13061).

Axes: i pair, k neuron (N of them), q class (p of them), e operand: m, then p + n (2 p of them).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memdiag import fourier
from memdiag.errors import InputError, unknown
from memdiag.models.mlp import MLP, MlpConfig
from memdiag.modular import Pairs, discrete_log_order

BETAS, EPS = (0.9, 0.98), 1e-8
CHANCE_MARGIN = 0.04  # agreement with redrawn labels of up to 1/p + this is chance
ACTIVATIONS = ("square", "relu")
TILE = {
    torch.float32: 588,
    torch.bfloat16: 2352,
}  # pairs: of 500 neurons, one to two megabytes for each of h, a and d_h
ORDER_SEED = 2**32  # added to the seed for batches and dropout, so that they are no copy of the initial weights


@dataclass(frozen=True)
class Training:
    """How the network is made and trained; the field names are the command's option names."""

    width: int = 500
    activation: str = "square"
    norm: str = "none"
    dropout: float = 0.0
    weight_decay: float = 0.0
    lr: float = 0.01
    steps: int = 1000
    train_batch_size: int | None = None  # None: all training pairs at once
    eval_every: int = 20
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        if self.norm not in ("none", "batch", "layer"):
            raise unknown("norm", self.norm, ("none", "batch", "layer"))
        if self.dtype not in ("float32", "bfloat16"):
            raise unknown("dtype for training", self.dtype, ("float32", "bfloat16"))
        for name in ("width", "eval_every", "train_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.width > 2**16:
            raise InputError(f"--width must be at most {2**16}, got {self.width}")
        if self.steps < 0:
            raise InputError(f"--steps must be at least 0, got {self.steps}")
        if not 0 < self.lr < float("inf"):
            raise InputError(f"--lr must be a finite number above 0, got {self.lr}")
        if not 0 <= self.weight_decay * self.lr <= 1:
            raise InputError(f"--weight-decay {self.weight_decay} times --lr {self.lr} must lie between 0 and 1")
        if not 0 <= self.dropout < 1:
            raise InputError(f"--dropout must be at least 0 and less than 1, got {self.dropout}")
        if self.norm == "batch" and self.train_batch_size == 1:
            raise InputError("--norm batch needs at least 2 pairs in a batch; --train-batch-size is 1")
        if self.dtype == "bfloat16" and not self._is_closed_form:
            raise InputError("--dtype bfloat16 trains on all pairs at once, without --norm; leave one of them out")

    @property
    def _is_closed_form(self) -> bool:
        return self.norm == "none" and self.train_batch_size is None


# -- one step ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tile:
    """Some of the training pairs, as the step wants them."""

    operands: Tensor  # (i, 2) int64: m and p + n
    at_label: Tensor  # (i,) int64: where the label's logit is in (i, q), flattened
    of_operand: Tensor  # (2 i,) int64: the pairs that hold operand 0, those that hold operand 1, …
    starts: Tensor  # (e,) int64: where each operand's pairs begin
    onehot: Tensor | None  # (i, e) bfloat16: S, two ones a row
    onehot_t: Tensor | None  # (e, i) its transpose, in memory of its own: products read along rows


@dataclass(frozen=True, eq=False)
class Design:
    """The training pairs in tiles, each small enough that what is computed for it stays in the cache."""

    tiles: list[Tile]
    n: int

    @classmethod
    def of(cls, operands: Tensor, labels: Tensor, p: int, dtype: torch.dtype) -> Design:
        """From operands (i, 2) in [0, p) and labels (i,); in bfloat16, products are matrix products."""
        at, size = operands + torch.tensor([0, p]), TILE[dtype]
        tiles = [_tile(at[i : i + size], labels[i : i + size], p, dtype) for i in range(0, len(at), size)]
        return cls(tiles, len(at))


def _tile(at: Tensor, labels: Tensor, p: int, dtype: torch.dtype) -> Tile:
    of_operand = torch.argsort(at.T.flatten(), stable=True) % len(at)
    starts = torch.bincount(at.flatten(), minlength=2 * p).cumsum(0).roll(1)
    starts[0] = 0
    at_label = torch.arange(len(at)) * p + labels
    if dtype != torch.bfloat16:
        return Tile(at, at_label, of_operand, starts, None, None)
    onehot = F.one_hot(at, 2 * p).sum(1).to(dtype)  # on matrix units, zeros cost less than fetching rows
    return Tile(at, at_label, of_operand, starts, onehot, onehot.T.contiguous())


def loss_and_gradients(
    embed: Tensor, readout: Tensor, design: Design, *, activation: str = "square", keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean squared error and its gradients in closed form.

    With S the one-hot operands, h = S E, a = φ(h), r = a Wᵀ − onehot and c = 2 / (i q):

        dW = c rᵀ a        dE = Sᵀ (c (r W) φ'(h))

    Args:
        embed: (e, k), the rows of U and then of V, transposed.
        readout: (q, k).
        design: the pairs; with one-hots, the products are done in bfloat16 and summed in float32.
        keep: (i, k) what h is multiplied with before φ: 0 where dropped, else 1 / (1 − dropout).
    Returns:
        the loss (), dE (e, k) and dW (q, k), in float32.
    """
    loss, d_embed, d_readout = torch.zeros(()), torch.zeros_like(embed), torch.zeros_like(readout)
    if design.tiles[0].onehot is not None:
        embed, readout = embed.bfloat16(), readout.bfloat16()
    # φ' of the square has a factor 2, which costs less on the columns of r, and is taken back from dW
    factor = 2 if activation == "square" else 1
    c, start = 2 / (design.n * len(readout)), 0
    for tile in design.tiles:
        h = F.embedding_bag(tile.operands, embed, mode="sum") if tile.onehot is None else tile.onehot @ embed  # (i, k)
        if keep is not None:
            kept = keep[start : start + len(h)].to(h.dtype)
            h, start = h * kept, start + len(h)
        a = h.square() if activation == "square" else h.relu()
        r = a @ readout.T  # (i, q)
        r.view(-1)[tile.at_label] -= 1
        loss += torch.dot(flat := r.float().flatten(), flat)
        r *= factor * c
        if tile.onehot is None:
            d_readout.addmm_(r.T, a)
        else:
            d_readout += r.T.contiguous() @ a
        d_h = r @ readout  # (i, k)
        d_h *= h if activation == "square" else h > 0
        if keep is not None:
            d_h *= kept
        if tile.onehot_t is not None:
            d_embed += tile.onehot_t @ d_h
        else:  # row e is the sum of d_h over the pairs that hold operand e
            d_embed += F.embedding_bag(tile.of_operand, d_h, tile.starts, mode="sum")
    return loss * c / 2, d_embed, d_readout / factor


# -- training ------------------------------------------------------------------------------------------------------


@contextmanager
def one_thread() -> Iterator[None]:
    """The same sums in the same order on every machine and however many networks train side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def weights_of(model: MLP) -> tuple[Tensor, Tensor]:
    """The input weights (k, e) and the read-out's (q, k): the parameters themselves."""
    return model.get_parameter("layers.linear_1.weight").data, model.get_parameter("layers.linear_2.weight").data


def initial(p: int, training: Training, seed: int) -> MLP:
    """The network before its first step: every weight N(0, (16 N)^(−2/3))."""
    config = MlpConfig((2 * p, training.width, p), training.activation, False, training.norm, training.dropout)
    with torch.random.fork_rng(devices=[]):  # layers draw from the global generator when they are made
        model = MLP(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for weight in weights_of(model):
        weight.normal_(std=(16 * training.width) ** (-1 / 3), generator=generator)
    return model


def train(pairs: Pairs, training: Training, *, seed: int) -> Iterator[tuple[int, MLP]]:
    """Yield (step, model) at step 0, after every `eval_every` updates, and after the last.

    The model is the caller's to look at, in eval mode; it is updated further when the caller goes on.

    Args:
        pairs: the first n_train of them are trained on, with their recorded labels.
        seed: of the initial weights, the batches and the dropout.
    """
    model = initial(pairs.p, training, seed)
    generator = torch.Generator().manual_seed(seed + ORDER_SEED)
    updates = _updates if training._is_closed_form else _updates_by_autograd
    yield 0, model
    for step in updates(model, pairs, training, generator):
        if step % training.eval_every == 0 or step == training.steps:
            if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
                raise InputError(f"training left the numbers at step {step} (NaN or infinite weights); lower --lr")
            yield step, model


def _adamw(parameters: Any, training: Training) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=training.lr, betas=BETAS, eps=EPS, weight_decay=training.weight_decay, fused=True
    )


def _trained_on(pairs: Pairs) -> tuple[Tensor, Tensor]:
    n = pairs.n_train
    return torch.from_numpy(pairs.operands[:n]), torch.from_numpy(pairs.labels[:n])


def _updates(model: MLP, pairs: Pairs, training: Training, generator: torch.Generator) -> Iterator[int]:
    """Full batch and closed form: gathers and matrix products, no graph."""
    design = Design.of(*_trained_on(pairs), pairs.p, getattr(torch, training.dtype))
    first, last = weights_of(model)
    embed, readout = first.T.contiguous(), last.clone()  # rows of `embed` are fetched, so they must lie together
    optimizer = _adamw([embed, readout], training)
    keep = None
    for step in range(1, training.steps + 1):
        if training.dropout:
            shape = (pairs.n_train, training.width)
            keep = (torch.rand(shape, generator=generator) >= training.dropout) / (1 - training.dropout)
        _, embed.grad, readout.grad = loss_and_gradients(
            embed, readout, design, activation=training.activation, keep=keep
        )
        optimizer.step()
        if step % training.eval_every == 0 or step == training.steps:
            first.copy_(embed.T)
            last.copy_(readout)
        yield step


def _updates_by_autograd(model: MLP, pairs: Pairs, training: Training, generator: torch.Generator) -> Iterator[int]:
    """Batches, batch norm and layer norm."""
    operands, labels = _trained_on(pairs)
    at, n = operands + torch.tensor([0, pairs.p]), pairs.n_train
    size = min(training.train_batch_size or n, n)
    optimizer = _adamw(list(model.requires_grad_(True).parameters()), training)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, training.steps + 1):
        if len(order) < size:  # an epoch's rest that fills no batch is left out, as every size must be the same
            order = torch.randperm(n, generator=generator)
        rows, order = order[:size], order[size:]
        logits = _forward_in_training(model.train(), at[rows], training.dropout, generator)
        loss = F.mse_loss(logits, F.one_hot(labels[rows], pairs.p).float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        model.eval()
        yield step
    model.requires_grad_(False)


def _forward_in_training(model: MLP, at: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """As the model's own forward, but with dropout from a local generator."""
    h = F.embedding_bag(at, model.get_parameter("layers.linear_1.weight").T, mode="sum")
    if dropout:
        h = h * (torch.rand(h.shape, generator=generator) >= dropout) / (1 - dropout)
    return _after_activation(model, h) @ model.get_parameter("layers.linear_2.weight").T


def _after_activation(model: MLP, h: Tensor) -> Tensor:
    a: Tensor = model.get_submodule("layers.act_1")(h)
    return a if model.config.norm == "none" else model.get_submodule("layers.norm_1")(a)


# -- what a network does -------------------------------------------------------------------------------------------


@torch.no_grad()
def activations(model: MLP, operands: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """What the read-out reads, (i, k), for operands (i, 2) in [0, p); the same as the forward pass of one-hots."""
    p = model.config.widths[0] // 2
    at = torch.as_tensor(operands) + torch.tensor([0, p])
    return _after_activation(model, F.embedding_bag(at, weights_of(model)[0].T.contiguous(), mode="sum"))


def groups(pairs: Pairs) -> dict[str, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Masks (i,) of the sets that are told apart: train, corrupted and clean (which make up train), and test."""
    in_train = np.arange(len(pairs.labels)) < pairs.n_train
    return {
        "train": in_train,
        "corrupted": in_train & pairs.corrupted,
        "clean": in_train & ~pairs.corrupted,
        "test": ~in_train,
    }


def curves(model: MLP, operation: str) -> tuple[Tensor, Tensor, Tensor]:
    """U, V and W of every neuron as curves (k, m) over the residues, in the order in which the task is periodic.

    For multiplication that is the order of discrete logarithms, p − 1 long.
    """
    p = model.config.widths[0] // 2
    first, last = weights_of(model)
    found = (first[:, :p], first[:, p:], last.T)
    if operation != "multiplication":
        return found
    order = torch.from_numpy(discrete_log_order(p))
    u, v, w = (curve[:, order] for curve in found)
    return u, v, w


def mean_ipr(model: MLP, operation: str) -> float | None:
    """Mean IPR over the neurons that are not dead; None if all are."""
    values = fourier.ipr(*curves(model, operation), keep_dc=model.config.activation == "square")
    alive = values[~values.isnan()]
    return float(alive.mean()) if len(alive) else None


def evaluate(model: MLP, pairs: Pairs) -> dict[str, float | None]:
    """Accuracies, mean squared errors, mean IPR and the norm of the weights."""
    logits = (activations(model, pairs.operands) @ weights_of(model)[1].T).numpy()
    predicted = logits.argmax(1)
    squared = np.square(logits.astype(np.float64)).sum(1) - 2 * logits[np.arange(len(logits)), pairs.labels] + 1
    error = squared / pairs.p  # per pair, mean over classes

    masks = groups(pairs)

    def mean(values: np.ndarray[Any, Any], group: str) -> float | None:
        return float(values[masks[group]].mean()) if masks[group].any() else None

    right, true = predicted == pairs.labels, predicted == pairs.truth
    return {
        "train_acc": mean(right, "train"),
        "train_corrupted_acc": mean(right, "corrupted"),
        "corrupted_true_acc": mean(true, "corrupted"),
        "train_clean_acc": mean(right, "clean"),
        "test_acc": mean(right, "test"),
        "train_loss": mean(error, "train"),
        "test_loss": mean(error, "test"),
        "mean_ipr": mean_ipr(model, pairs.operation),
        "weight_norm": float(sum(w.detach().double().square().sum() for w in model.parameters()) ** 0.5),
    }


def phase(at: dict[str, Any], p: int, *, grokked: bool) -> str:
    """The phase of a network, called by its agreement with the corrupted labels.

    The paper's rule, by train accuracy, calls full inversion coexistence for ξ ≤ 0.15.

    Args:
        at: as `evaluate` gives it.
        p: classes.
        grokked: whether test accuracy has ever reached 0.9.
    Returns:
        coexistence, partial_inversion, full_inversion (test accuracy of at least 0.9); memorization, forgetting or
        confusion (less).
    """
    test, train_acc, corrupted = at["test_acc"], at["train_acc"], at["train_corrupted_acc"]
    if test is not None and test >= 0.9:
        if corrupted is None or corrupted >= 0.9:
            return "coexistence"
        return "full_inversion" if corrupted <= 1 / p + CHANCE_MARGIN else "partial_inversion"
    if train_acc >= 0.9:
        return "memorization"
    return "forgetting" if grokked else "confusion"
