"""What one update of `memdiag train` is computed from: a classifier's examples, or a language model's sequences.

    classifier       loss_i = −ln p(y_i | x_i)                     the update's loss is the mean over its examples
    language model   loss_i = mean_t −ln p(x_t | x_<t)             the update's loss is the mean over its tokens

Beside the gradient an update leaves what its trajectory keeps of every example (see `trajectory`), from the same
forward pass: in train mode, before the weights move.

Axes: b example of an update, t token, k class or vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from memdiag import observe, training, trajectory
from memdiag.checkpoint.guard import refusing
from memdiag.errors import InputError
from memdiag.packing import Corpus
from memdiag.training import Recipe, Training

EVALUATED = 512  # examples evaluated at once, at most; sequences: as many as an update has
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples to learn from, any of which can be had at any time. Features may lie on the disk."""

    rows: Ints  # (n,) of the dataset, ascending
    ids: Sequence[str]  # (n,)
    inputs: NDArray[np.float32] | Corpus  # features (n, ...), or the tokens of n sequences
    labels: Ints | None  # (n,); None: a language model's

    def __len__(self) -> int:
        return len(self.rows)

    def labelled(self, labels: Ints) -> Examples:
        """The same with other labels."""
        return dataclasses.replace(self, labels=labels)

    def batch(self, at: Ints, pad_id: int, device: torch.device) -> observe.Inputs:
        """Some examples on the device; tokens are padded on the right."""
        labels = None if self.labels is None else torch.from_numpy(self.labels[at]).to(device)
        if isinstance(self.inputs, Corpus):
            ids, mask = self.inputs.batch(at, pad_id=pad_id)
            return observe.Inputs(ids.to(device), mask.to(device), None, labels)
        return observe.Inputs(None, None, torch.from_numpy(self.inputs[at]).to(device), labels)


@dataclass(frozen=True, eq=False)
class Seen:
    """What one update presented, in the order of the data: an update may end one epoch and begin the next."""

    epochs: Ints  # (b,) which pass each is of, from 0
    at: Ints  # (b,) places in the examples
    values: NDArray[np.float32]  # (4, b) as `trajectory.presented`


@dataclass
class Run:
    """A model in training on examples, and everything an update needs."""

    training: Training
    recipe: Recipe
    examples: Examples
    epochs: int
    pad_id: int = 0
    autocast: torch.dtype | None = None
    name: str = "the model"  # for errors

    def __post_init__(self) -> None:
        self._device = next(self.training.model.parameters()).device
        labels = self.examples.labels
        self._top = -1 if labels is None else int(labels.max())

    def at(self, step: int) -> Seen:
        """The examples of update `step` (from 0), nothing seen yet; the last update ends with the last epoch."""
        n = len(self.examples)
        at = training.rows_of_update(step, n, self.recipe.batch_size, self.recipe.seed)
        first = step * self.recipe.batch_size
        at = at[: self.epochs * n - first]
        return Seen((first + np.arange(len(at))) // n, at, np.empty((4, 0), dtype=np.float32))

    def backward(self, step: int) -> tuple[float, Seen]:
        """Leave the gradient of update `step` in `.grad`."""
        seen = self.at(step)
        inputs = self.examples.batch(seen.at, self.pad_id, self._device)
        loss, values = of_update(self._logits(inputs), inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach()), dataclasses.replace(seen, values=values)

    def evaluate(self, examples: Examples) -> tuple[float, float]:
        """Mean loss of the examples, in nats, and the share that is right; in eval mode, without a gradient."""
        total, right = 0.0, 0.0
        size = EVALUATED if self.examples.labels is not None else self.recipe.batch_size
        self.training.model.eval()
        try:
            for start in range(0, len(examples), size):
                at = np.arange(start, min(start + size, len(examples)))
                inputs = examples.batch(at, self.pad_id, self._device)
                with torch.no_grad():
                    _, values = of_update(self._logits(inputs), inputs)
                total += float(loss_of(values).sum())
                right += float(values[3].sum(dtype=np.float64))
        finally:
            self.training.model.train()
        return total / len(examples), right / len(examples)

    def _logits(self, inputs: observe.Inputs) -> Tensor:
        products = torch.autocast(self._device.type, dtype=self.autocast, enabled=self.autocast is not None)
        with products:
            return logits_of(self.training.runs, inputs, name=self.name, top=self._top)


def logits_of(model: nn.Module, inputs: observe.Inputs, *, name: str, top: int) -> Tensor:
    """The model's logits, (b, k) of a classifier, (b, t, k) of a language model.

    Args:
        name: of the model, for errors.
        top: the highest label of a classifier.
    Raises:
        InputError: the model cannot be run on these examples, or has no such logits.
    """
    with refusing(f"{name}: cannot be run on these examples"):
        logits = observe.call(model, _padded_only(inputs))
    wanted = 2 if inputs.labels is not None else 3
    if logits is None or logits.ndim != wanted or len(logits) != inputs.n_examples:
        shape = "nothing" if logits is None else f"shape {list(logits.shape)}"
        axes = "(examples, classes)" if wanted == 2 else "(examples, tokens, vocabulary)"
        raise InputError(f"{name}: its logits have {shape}; wanted {axes}")
    if wanted == 2 and logits.shape[1] <= top:
        raise InputError(
            f"{name}: has {logits.shape[1]} outputs, and there is a label {top}; wanted an output for every class, "
            "0 to the highest label"
        )
    return logits


def _padded_only(inputs: observe.Inputs) -> observe.Inputs:
    """Without a mask where nothing is padded, which is faster."""
    if inputs.mask is not None and bool(inputs.mask.all()):
        return dataclasses.replace(inputs, mask=None)
    return inputs


def of_update(logits: Tensor, inputs: observe.Inputs) -> tuple[Tensor, NDArray[np.float32]]:
    """The loss of an update, differentiable, and what its trajectory keeps (4, b).

    Args:
        logits: (b, k) of a classifier, (b, t, k) of a language model.
        inputs: with labels (b,), or with tokens and mask (b, t).
    """
    if inputs.labels is not None:
        loss = F.cross_entropy(logits.float(), inputs.labels)
        return loss, trajectory.presented(logits, inputs.labels).cpu().numpy()
    assert inputs.tokens is not None
    mask = torch.ones_like(inputs.tokens, dtype=torch.bool) if inputs.mask is None else inputs.mask
    return of_tokens(logits[:, :-1], inputs.tokens[:, 1:], mask[:, 1:])


def of_tokens(logits: Tensor, targets: Tensor, counts: Tensor) -> tuple[Tensor, NDArray[np.float32]]:
    """The mean loss over tokens, differentiable, and what the trajectory keeps of every sequence (4, b).

    Args:
        logits: (b, t, k) of the tokens to predict.
        targets: (b, t) these tokens.
        counts: (b, t) bool, which of them count; what stands elsewhere is not read.
    """
    kept = counts.flatten()
    flat, wanted = logits.flatten(0, 1)[kept], targets.flatten()[kept]
    loss = F.cross_entropy(flat.float(), wanted)
    values = trajectory.presented(flat, wanted).cpu().numpy()
    return loss, means_of_tokens(values, counts.sum(1).cpu().numpy())


def means_of_tokens(values: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
    """(4, b) of the tokens' (4, Σ lengths): means of the first three, whether all are right; NaN without a token."""
    found = np.full((4, len(lengths)), np.nan, dtype=np.float32)
    some = lengths > 0
    if some.any():
        starts = (np.cumsum(lengths) - lengths)[some]
        found[:3, some] = np.add.reduceat(values[:3].astype(np.float64), starts, axis=1) / lengths[some]
        found[3, some] = np.minimum.reduceat(values[3], starts)
    return found


def loss_of(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """(b,) losses in nats: logsumexp − label_logit."""
    found: NDArray[np.float64] = values[2].astype(np.float64) - values[0]
    return found
