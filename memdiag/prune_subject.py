"""A model whose neurons are to be pruned, its data pass after pass, and how well it does with some of them gone.

Axes: b example of a batch, t token, q class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from memdiag import device as devices
from memdiag import observe
from memdiag.dataset import Batch, Dataset
from memdiag.errors import InputError
from memdiag.observe import neurons
from memdiag.prune_inputs import Inputs
from memdiag.pruning import GROUPS, Row
from memdiag.reading import check_kind, in_halves, rows_of_batch, stream_of

PIECE = 4  # examples on which it is tried out what the model is
CACHED_BYTES = 2**29  # batches are kept for the next pass while they are smaller than this


@dataclass(eq=False)
class Subject:
    """A loaded model, where its neurons are, and the batches of both datasets."""

    inputs: Inputs
    model: nn.Module
    device: torch.device
    sites: list[neurons.Site] = field(default_factory=list)
    skipped: list[observe.Skipped] = field(default_factory=list)
    predicts: bool = False  # a causal language model
    n_classes: int = 0  # of a classifier

    @property
    def prefix(self) -> int:
        """Tokens that are given; the next ones count."""
        return max(1, self.inputs.options.prefix_tokens or 1)

    @cached_property
    def train(self) -> Passes:
        """The training data, as often as needed."""
        return Passes(self, self.inputs.train)

    @cached_property
    def test(self) -> Passes | None:
        """The held-out data."""
        return None if self.inputs.test is None else Passes(self, self.inputs.test)

    def groups_of(self, batch: Batch, *, held_out: bool) -> NDArray[np.int8]:
        """(b,) index into GROUPS; −1 for an example that predicts nothing."""
        if held_out:
            group = np.full(len(batch.example_ids), 2, dtype=np.int8)
        elif self.inputs.suspects is not None:
            group = np.array([0 if i in self.inputs.suspects else 1 for i in batch.example_ids], dtype=np.int8)
        elif batch.truth is not None:
            group = np.where(batch.truth, 0, 1).astype(np.int8)
        else:
            group = np.ones(len(batch.example_ids), dtype=np.int8)
        if self.predicts and batch.mask is not None:
            group[batch.mask.sum(1) <= self.prefix] = -1
        return group


class Passes:
    """A dataset's batches, again and again; kept in memory if they are small."""

    def __init__(self, subject: Subject, dataset: Dataset) -> None:
        self._subject, self._dataset = subject, dataset
        self._kept: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Batch] | None = []
        size = 0
        subject = self._subject
        for batch in stream_of(subject.inputs.reading(self._dataset), subject.model, subject.device):
            size += sum(x.nbytes for x in (batch.input_ids, batch.mask, batch.features) if x is not None)
            if kept is not None:
                kept.append(batch)
            if size > CACHED_BYTES:
                kept = None
            yield batch
        self._kept = kept


def load(inputs: Inputs) -> Subject:
    """The model on its device, and where its neurons are.

    Raises:
        InputError: it does not go with the data, gives no logits, or has nothing to prune.
    """
    device = devices.resolve(inputs.options.device)
    model = inputs.checkpoint.load(dtype=inputs.options.dtype, device=str(device))
    subject = Subject(inputs, model, device)
    first = next(iter(subject.train))
    check_kind(model, first)
    piece = observe.to_inputs(rows_of_batch(first, slice(0, PIECE)), model)
    subject.predicts = piece.tokens is not None and observe.predicts_next_token(model, piece.tokens)
    try:
        with torch.inference_mode():
            logits = observe.call(model, piece)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if devices.is_out_of_memory(error):
            raise InputError(f"{PIECE} examples do not fit in memory; use --dtype bfloat16 or --max-length") from None
        raise InputError(f"the model cannot run on this data: {' '.join(str(error).split())[:160]}") from error
    if not subject.predicts:
        subject.n_classes = _classes(inputs, logits)
    subject.sites, subject.skipped = neurons.sites_of(model, piece, inputs.options.layers)
    return subject


def _classes(inputs: Inputs, logits: Tensor | None) -> int:
    """The number of classes of a classifier whose data have labels; anything else is refused."""
    if logits is None or logits.ndim != 2:
        raise InputError(
            "the model is neither a classifier (logits of shape example × class) nor a causal language model; "
            "its margins are undefined"
        )
    if inputs.options.prefix_tokens is not None:
        raise InputError("--prefix-tokens is about language models; this model is a classifier")
    if logits.shape[1] < 2:
        raise InputError("the model has a single output; wanted a logit for each of at least 2 classes")
    for dataset in (inputs.train, inputs.test):
        if dataset is not None and not dataset.has_labels:
            raise InputError(f"{dataset.name}: a classifier needs labels; name the column with --columns label=y")
    return logits.shape[1]


def check_labels(labels: NDArray[np.int64] | None, n_classes: int, name: str) -> None:
    if labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < n_classes:
        bad = labels[(labels < 0) | (labels >= n_classes)][0]
        raise InputError(f"{name}: label {bad} does not fit a model of {n_classes} classes")


def masks_of(sites: Sequence[neurons.Site], gone: NDArray[np.int64], device: torch.device) -> list[Tensor]:
    """Multipliers of each site's neurons: 0 where gone, by number over all sites."""
    keep = np.ones(sum(site.width for site in sites), dtype=np.float32)
    keep[gone] = 0
    return list(torch.split(torch.from_numpy(keep).to(device), [site.width for site in sites]))


def figures(subject: Subject) -> Row:
    """Accuracy and loss of each group with the model as it is (or as `neurons.masked` makes it)."""
    totals = np.zeros((len(GROUPS), 4))  # right, loss, predictions, true
    exact, n = np.zeros(len(GROUPS)), np.zeros(len(GROUPS))
    has_true = False

    def run(batch: Batch) -> tuple[NDArray[np.float64], ...]:
        with torch.inference_mode():
            inputs = observe.to_inputs(batch, subject.model)
            logits = observe.call(subject.model, inputs)
            assert logits is not None
            found = _of_tokens(logits, inputs, subject.prefix) if subject.predicts else _of_labels(logits, batch)
        return tuple(x.double().cpu().numpy() for x in found)

    for passes, held_out in ((subject.train, False), (subject.test, True)):
        for batch, (right, loss, count, true) in in_halves(passes or (), run, subject.device):
            group = subject.groups_of(batch, held_out=held_out)
            has_true = has_true or (batch.true_labels is not None and not held_out)
            for g in range(len(GROUPS)):
                at = group == g
                totals[g] += [x[at].sum() for x in (right, loss, count, true)]
                exact[g] += (right[at] == count[at]).sum()
                n[g] += at.sum()

    def ratio(a: float, b: float) -> float | None:
        return float(a / b) if b else None

    return {
        "train_corrupted_acc": ratio(totals[0, 0], totals[0, 2]),
        "train_corrupted_exact": ratio(exact[0], n[0]) if subject.predicts else None,
        "corrupted_true_acc": ratio(totals[0, 3], totals[0, 2]) if has_true and not subject.predicts else None,
        "train_clean_acc": ratio(totals[1, 0], totals[1, 2]),
        "test_acc": ratio(totals[2, 0], totals[2, 2]),
        "train_corrupted_loss": ratio(totals[0, 1], totals[0, 2]),
        "train_clean_loss": ratio(totals[1, 1], totals[1, 2]),
        "test_loss": ratio(totals[2, 1], totals[2, 2]),
    }


def _of_labels(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(b,) each: right, loss, 1, and agreement with the true label."""
    assert batch.labels is not None
    check_labels(batch.labels, logits.shape[1], "the dataset")
    labels = torch.from_numpy(batch.labels).to(logits.device)
    predicted = logits.argmax(1)
    true = labels if batch.true_labels is None else torch.from_numpy(batch.true_labels).to(logits.device)
    loss = F.cross_entropy(logits.float(), labels, reduction="none")
    return predicted == labels, loss, torch.ones_like(loss), predicted == true


def _of_tokens(logits: Tensor, inputs: observe.Inputs, prefix: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(b,) each: tokens right, summed loss, tokens predicted after the prefix, zeros.

    Greedy decoding from the true prefix gives the true text exactly where every token is the likeliest after the true
    ones before it, so that one teacher-forced pass tells.
    """
    assert inputs.tokens is not None
    assert inputs.mask is not None
    targets, counts = inputs.tokens[:, prefix:], inputs.mask[:, prefix:]
    z = logits[:, prefix - 1 : -1]
    right = (z.argmax(-1) == targets) & counts
    where = counts.nonzero()
    nll = F.cross_entropy(z[where[:, 0], where[:, 1]].float(), targets[counts], reduction="none")
    loss = torch.zeros(len(z), dtype=torch.float64, device=z.device).index_add_(0, where[:, 0], nll.double())
    return right.sum(1), loss, counts.sum(1), torch.zeros_like(loss)
