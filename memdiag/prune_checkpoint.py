"""Any classifier or causal language model: attribute its neurons, prune them beside the controls, write what is left.

Axes: b example of a batch, t token, k neuron of all layers together, i example, q class.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from memdiag import attribution, fourier, observe, pruning, tables, tasks
from memdiag import device as devices
from memdiag.checkpoint import Checkpoint, open_checkpoints, tokenizer_fingerprint
from memdiag.dataset import Batch, Dataset, open_dataset
from memdiag.entropy_report import parse_columns
from memdiag.errors import InputError, unknown
from memdiag.observe import neurons
from memdiag.progress import Progress
from memdiag.prune_curves import MOST_POINTS, RANDOM_POINTS, Arms, Cut, headline, run_arms, with_intervals
from memdiag.prune_modular import Found
from memdiag.prune_report import PruneOptions
from memdiag.pruning import GROUPS, Examples, Readout, Row
from memdiag.reading import Reading, check_kind, in_halves, stream_of

log = logging.getLogger("memdiag")

POINTS, RANDOM_SHARE = 24, 3  # forward passes over the data for a curve; a random one has a third of them
CACHED_BYTES = 2**29  # batches are kept for the next pass while they are smaller than this
CLOSED_BYTES = 2**31  # activations of a linear read-out are kept while they are smaller than this


# -- inputs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """The opened checkpoint and datasets of one run of the command."""

    checkpoint: Checkpoint
    train: Dataset
    test: Dataset | None
    suspects: frozenset[str] | None  # example ids, if a score named them
    options: PruneOptions

    @property
    def has_truth(self) -> bool:
        """Whether it is known which training examples are suspect."""
        return self.suspects is not None or "truth" in self.train.columns

    def reading(self, dataset: Dataset) -> Reading:
        """A dataset as the checkpoint reads it."""
        options = self.options
        return Reading(dataset, self.checkpoint, options.tokenizer, options.max_length, options.batch_size)

    def identity(self) -> dict[str, Any]:
        """What decides the numbers."""
        suspects = None if self.suspects is None else hashlib.sha256("\n".join(sorted(self.suspects)).encode())
        return {
            "checkpoint": self.checkpoint.fingerprint(),
            "tokenizer": tokenizer_fingerprint(self.checkpoint.tokenizer(self.options.tokenizer)),
            "dataset": self.train.fingerprint(),
            "test": None if self.test is None else self.test.fingerprint(),
            "suspects": suspects and suspects.hexdigest(),
        }

    def meta(self) -> dict[str, Any]:
        """What the report says of its inputs."""

        def told(dataset: Dataset) -> dict[str, Any]:
            return {"name": dataset.name, "fingerprint": dataset.fingerprint(), "columns": dataset.columns}

        return {
            "checkpoint": {"name": self.checkpoint.name, "weights": self.checkpoint.fingerprint()},
            "dataset": told(self.train),
            "test": None if self.test is None else told(self.test),
            "loss": "cross-entropy in nats: of the label, or mean over the predicted tokens",
            "device": devices.describe(devices.resolve(self.options.device)),
            "dtype": self.options.dtype,
        }


def open_inputs(name: str, options: PruneOptions) -> Inputs:
    """Open everything the command will read.

    Raises:
        InputError: anything that is not there, not readable or does not fit.
    """
    found = open_checkpoints(name, model=options.model)
    if len(found) > 1:
        raise InputError(f"{name} is a run of {len(found)} checkpoints; give one of them, e.g. {found[-1].path}")
    checkpoint = found[0]
    data, test = options.data or checkpoint.task, options.test
    if data is None:
        raise InputError(f"{checkpoint.name} says no task of its own; give the training data with --data FILE")
    if options.data is None:
        log.info("no --data: measuring on %s", data)
    if test is None and data.startswith(tasks.PREFIX) and (task := tasks.load(data)).values.get("split") == "train":
        test = task.name.replace("split=train", "split=test")
        log.info("no --test: held out is %s", test)
    if options.truth is not None and options.suspects is not None:
        raise InputError("--truth and --suspects both say which examples are suspect; give one of them")
    if options.truth is None and options.suspects is None and test is None:
        raise InputError(
            "nothing says which training examples are suspect: give --truth COLUMN or --suspects FILE:COLUMN:SHARE, "
            "or --test for the contrast of training and held-out data"
        )
    roles = parse_columns(options.columns) or {}
    train = _open_train(data, roles, options)
    held_out = None
    if test is not None:
        held_out = open_dataset(test, columns={r: c for r, c in roles.items() if r != "true_label"})
    suspects = None if options.suspects is None else read_suspects(options.suspects)
    return Inputs(checkpoint, train, held_out, suspects, options)


def _open_train(data: str, roles: dict[str, str], options: PruneOptions) -> Dataset:
    roles = roles | ({"truth": options.truth} if options.truth is not None else {})
    train = open_dataset(data, columns=roles, limit=options.limit)
    if "true_label" in train.source.columns and "true_label" not in roles:
        train = open_dataset(data, columns=roles | {"true_label": "true_label"}, limit=options.limit)
    return train


def read_suspects(text: str) -> frozenset[str]:
    """The example ids that FILE:COLUMN:SHARE means: the top share of a score, or with -COLUMN the bottom.

    Raises:
        InputError: it cannot be read, or the file is no report with example_id and that column.
    """
    parts = text.rsplit(":", 2)
    try:
        file, name, share = parts[0], parts[1], float(parts[2])
    except (IndexError, ValueError):
        raise InputError(f"--suspects {text!r} is not of the form score.parquet:csl:0.05") from None
    if not 0 < share < 1:
        raise InputError(f"--suspects {text!r}: the share is {share:g}; wanted more than 0 and less than 1")
    table = tables.read(file).table
    column = name.removeprefix("-")
    for wanted in ("example_id", column):
        if wanted not in table.column_names:
            raise unknown(f"column in {file}", wanted, table.column_names)
    kind = table.schema.field(column).type
    if str(kind) not in ("double", "float", "halffloat", "bool") and not str(kind).startswith(("int", "uint")):
        raise InputError(f"--suspects {text!r}: column {column!r} holds {kind}; wanted numbers")
    pairs = [
        (float(v), str(i)) for v, i in zip(table[column].to_pylist(), table["example_id"].to_pylist()) if v is not None
    ]
    if not pairs:
        raise InputError(f"--suspects {text!r}: the column is null in every row")
    pairs.sort(key=lambda pair: pair[0] if name.startswith("-") else -pair[0])  # stable: ties as they come
    return frozenset(i for _, i in pairs[: max(1, round(share * len(pairs)))])


# -- the model and its data ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Subject:
    """A loaded model, where its neurons are, and the batches of both datasets."""

    inputs: Inputs
    model: nn.Module
    device: torch.device
    sites: list[neurons.Site] = field(default_factory=list)
    skipped: list[observe.Skipped] = field(default_factory=list)
    predicts: bool = False  # a causal language model

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
    piece = observe.to_inputs(first, model)
    subject.predicts = piece.tokens is not None and observe.predicts_next_token(model, piece.tokens)
    try:
        with torch.inference_mode():
            logits = observe.call(model, piece)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if devices.is_out_of_memory(error):
            raise InputError("the first batch does not fit in memory; use --batch-size or --dtype bfloat16") from None
        raise InputError(f"the model cannot run on this data: {' '.join(str(error).split())[:160]}") from error
    if not subject.predicts:
        _check_classifier(inputs, logits)
    subject.sites, subject.skipped = neurons.sites_of(model, piece, inputs.options.layers)
    return subject


def _check_classifier(inputs: Inputs, logits: Tensor | None) -> None:
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


def _check_labels(labels: NDArray[np.int64] | None, n_classes: int, name: str) -> None:
    if labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < n_classes:
        bad = labels[(labels < 0) | (labels >= n_classes)][0]
        raise InputError(f"{name}: label {bad} does not fit a model of {n_classes} classes")


# -- attribution ---------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """Over the examples of each group: contributions of every neuron, (3, k) each."""

    n: NDArray[np.int64]
    margin: NDArray[np.float64]
    loss: NDArray[np.float64]
    activation: NDArray[np.float64]
    n_undefined: int = 0


def attribute(subject: Subject, progress: Progress) -> Sums:
    """One forward and one backward pass over the data.

    Raises:
        InputError: no suspect example, only suspect ones, or an activation that is no number.
    """
    k = sum(site.width for site in subject.sites)
    empty = [np.zeros((len(GROUPS), k)) for _ in range(3)]
    sums = Sums(np.zeros(len(GROUPS), dtype=np.int64), empty[0], empty[1], empty[2])

    def run(batch: Batch) -> neurons.Contributions:
        inputs = observe.to_inputs(batch, subject.model)
        return neurons.margin_contributions(subject.model, inputs, subject.sites, prefix=subject.prefix)

    for passes, held_out in ((subject.train, False), (subject.test, True)):
        for batch, found in in_halves(passes or (), run, subject.device):
            group = subject.groups_of(batch, held_out=held_out)
            sums.n_undefined += int((group < 0).sum())
            for g in range(len(GROUPS)):
                rows = torch.from_numpy(np.flatnonzero(group == g))
                sums.n[g] += len(rows)
                for name in ("margin", "loss", "activation"):
                    whole = torch.cat(getattr(found, name), dim=1).cpu()
                    getattr(sums, name)[g] += whole[rows].sum(0).numpy()
            progress.advance(len(batch.example_ids))
    _check_groups(subject.inputs, sums)
    return sums


def _check_groups(inputs: Inputs, sums: Sums) -> None:
    where = f"--truth {inputs.options.truth}" if inputs.options.truth is not None else "--suspects"
    for g, what in ((0, "no"), (1, "every")):
        if inputs.has_truth and sums.n[g] == 0:
            raise InputError(f"{where}: {what} example of {inputs.train.name} is suspect; wanted some of both kinds")
    if not inputs.has_truth and (sums.n[1] == 0 or sums.n[2] == 0):
        raise InputError("no example predicts anything: texts of one token, or a --prefix-tokens that is too long")


def scores_of(subject: Subject, sums: Sums) -> dict[str, NDArray[np.float64]]:
    """Every score of every neuron, (k,) each; NaN where undefined."""
    with np.errstate(invalid="ignore", divide="ignore"):
        n = sums.n[:, None]
        margin, loss = sums.margin / n, sums.loss / n
        activation = sums.activation[:2].sum(0) / sums.n[:2].sum()
    outgoing, incoming = (torch.cat(x).double().cpu().numpy() for x in neurons.norms(subject.model, subject.sites))
    contrast = (0, 1) if subject.inputs.has_truth else (1, 2)
    return {
        **{f"margin_{name}": margin[g] for g, name in enumerate(("corrupted", "clean", "heldout"))},
        **{f"grad_act_{name}": loss[g] for g, name in enumerate(("corrupted", "clean", "heldout"))},
        "memorization": margin[contrast[0]] - margin[contrast[1]],
        "grad_act": loss[contrast[0]] - loss[contrast[1]],
        "activation_norm": activation * outgoing,
        "norm_product": outgoing * incoming,
        "dead": ((outgoing < fourier.DEAD) | (incoming < fourier.DEAD)).astype(np.float64),
    }


# -- pruning -------------------------------------------------------------------------------------------------------


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
    _check_labels(batch.labels, logits.shape[1], "the dataset")
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


def readout_of(subject: Subject) -> Readout | None:
    """The activations of all examples, if the one layer of neurons is read by the model's last linear layer."""
    if subject.predicts or len(subject.sites) != 1:
        return None
    site = subject.sites[0]
    n = subject.inputs.train.n_examples + (subject.inputs.test.n_examples if subject.inputs.test else 0)
    if n * site.width * 4 > CLOSED_BYTES:
        return None
    found: list[tuple[Tensor, NDArray[np.int8], Batch]] = []
    for passes, held_out in ((subject.train, False), (subject.test, True)):
        for batch in passes or ():
            a = neurons.readout_activations(subject.model, observe.to_inputs(batch, subject.model), site)
            if a is None:
                return None
            found.append((a.float().cpu(), subject.groups_of(batch, held_out=held_out), batch))
    assert isinstance(site.reader, nn.Linear)
    truth = None
    if all(b.true_labels is not None or (g == 2).all() for _, g, b in found):
        truth = np.concatenate([b.labels if b.true_labels is None else b.true_labels for _, _, b in found])
    labels = np.concatenate([b.labels for _, _, b in found if b.labels is not None])
    weights = site.reader.weight.detach().float().cpu()
    _check_labels(labels, len(weights), "the dataset")
    bias = site.reader.bias
    return Readout(
        torch.cat([a for a, _, _ in found]),
        weights,
        None if bias is None else bias.detach().float().cpu(),
        Examples(labels, truth, np.concatenate([g for _, g, _ in found])),
        "cross_entropy",
    )


def closed_scores(readout: Readout) -> dict[str, NDArray[np.float64]]:
    """The exact ablations and, where the true labels are known, the direct logit attribution."""
    logits = readout.a @ readout.weights.T + (0 if readout.offset is None else readout.offset)
    labels = torch.from_numpy(readout.examples.labels)
    found = {}
    for g, name in enumerate(("corrupted", "clean", "heldout")):
        at = torch.from_numpy(readout.examples.group == g)
        if at.any():
            change = attribution.ablation(readout.a[at], readout.weights, logits[at], labels[at], loss="cross_entropy")
            found[f"ablation_{name}"] = change.numpy()
    if readout.examples.truth is not None:
        truth = torch.from_numpy(readout.examples.truth)
        wrong = torch.from_numpy(readout.examples.group == 0) & (labels != truth)
        direct = attribution.direct_logit(readout.a[wrong], readout.weights, labels[wrong], truth[wrong])
        found["direct_logit"] = direct.numpy()
    return found


def exact_ablation(subject: Subject, progress: Progress) -> dict[str, NDArray[np.float64]]:
    """The change of each group's mean loss without each neuron: a pass over the data for every one of them."""
    k = sum(site.width for site in subject.sites)
    before, names = figures(subject), ("train_corrupted_loss", "train_clean_loss", "test_loss")
    change = np.full((3, k), np.nan)
    progress.start("ablation", k, unit="neurons")
    for neuron in range(k):
        with neurons.masked(subject.sites, masks_of(subject.sites, np.array([neuron]), subject.device)):
            after = figures(subject)
        change[:, neuron] = [math.nan if after[x] is None else after[x] - before[x] for x in names]
        progress.advance(1)
    return {f"ablation_{name}": change[g] for g, name in enumerate(("corrupted", "clean", "heldout"))}


def of_checkpoint(inputs: Inputs, progress: Progress) -> tuple[Found, tuple[nn.Module, Any, str | None] | None]:
    """Attribute and prune; the pruned model with its tokenizer and task, or None if no cut was chosen."""
    subject, options = load(inputs), inputs.options
    n_examples = inputs.train.n_examples + (inputs.test.n_examples if inputs.test else 0)
    progress.start("attribution", n_examples)
    sums = attribute(subject, progress)
    scores = scores_of(subject, sums)
    readout = readout_of(subject)
    if readout is not None:
        scores |= closed_scores(readout)
    elif options.ablation:
        scores |= exact_ablation(subject, progress)
    pair = ("corrupted", "clean") if inputs.has_truth else ("clean", "heldout")
    if all(f"ablation_{name}" in scores for name in pair):
        scores["ablation"] = scores[f"ablation_{pair[0]}"] - scores[f"ablation_{pair[1]}"]
    cut = _cut(subject, readout)
    arms = run_arms(_curves(subject, readout, progress), scores, options.rank_by, cut)
    counts = dict(zip(GROUPS, map(int, sums.n)))
    rows = [{"seed": None, "train_corrupted_exact": None, **row} for row in arms.rows]
    rows = with_intervals(rows, counts if not subject.predicts else dict.fromkeys(GROUPS, 0))
    about = {
        "name": inputs.checkpoint.name,
        "examples": counts,
        "n_undefined": sums.n_undefined,
        "n_neurons": len(arms.order),
        "n_dead": int(scores["dead"].sum()),
        "layers": [[site.name, site.width] for site in subject.sites],
        "skipped": [[s.name, s.why] for s in subject.skipped],
        "closed_form": readout is not None,
        "rule": arms.rule,
        **headline(rows, options.rank_by, cut.agreement),
    }
    found = Found(_neuron_rows(subject.sites, scores, arms), rows, [], [], about, {})
    _log_skipped(subject.skipped)
    if arms.chosen is None:
        return found, None
    keep = masks_of(subject.sites, arms.order[: arms.chosen], torch.device("cpu"))
    neurons.zero_(subject.model, subject.sites, [mask == 0 for mask in keep])
    return found, (subject.model, inputs.checkpoint.tokenizer(options.tokenizer), inputs.checkpoint.task)


def _log_skipped(skipped: Sequence[observe.Skipped]) -> None:
    """One line; the report's metadata has every name and reason."""
    others = [s for s in skipped if s.why != observe.NOT_CHOSEN]
    if others:
        log.info("no neurons read by %d other layers, e.g. %s: %s", len(others), others[0].name, others[0].why)


def _cut(subject: Subject, readout: Readout | None) -> Cut:
    options = subject.inputs.options
    points = options.points or (MOST_POINTS if readout is not None else POINTS)
    if subject.predicts:
        chance, agreement = 0.0, "train_corrupted_exact"
    else:
        logits = observe.call(subject.model, observe.to_inputs(next(iter(subject.train)), subject.model))
        assert logits is not None
        chance, agreement = 1 / logits.shape[1], "train_corrupted_acc"
    return Cut(
        options.n,
        options.fraction,
        options.keep_clean,
        options.draws,
        options.seed,
        chance=chance,
        agreement=agreement,
        most_points=points,
        random_points=max(4, points // RANDOM_SHARE) if readout is None else RANDOM_POINTS,
    )


def _curves(subject: Subject, readout: Readout | None, progress: Progress) -> Callable[[Any, Any], list[Row]]:
    if readout is not None:
        return lambda order, counts: pruning.curve(readout, order, counts)

    def curve_of(order: Sequence[int], counts: Sequence[int]) -> list[Row]:
        rows = []
        for n in counts:
            gone = np.asarray(order)[:n]
            with neurons.masked(subject.sites, masks_of(subject.sites, gone, subject.device)):
                rows.append({"n_pruned": n, **figures(subject)})
            progress.advance(1)
        return rows

    points = subject.inputs.options.points or POINTS
    total = 3 * (points + 1) + subject.inputs.options.draws * (max(4, points // RANDOM_SHARE) + 2)
    progress.start("pruning", total, unit="passes over the data")
    return curve_of


def _neuron_rows(sites: Sequence[neurons.Site], scores: dict[str, NDArray[np.float64]], arms: Arms) -> list[Row]:
    columns = [
        "memorization", "margin_corrupted", "margin_clean", "margin_heldout", "ablation_corrupted", "ablation_clean",
        "ablation_heldout", "grad_act_corrupted", "grad_act_clean", "grad_act_heldout", "direct_logit",
        "activation_norm", "norm_product",
    ]  # fmt: skip
    place = np.empty(len(arms.order), dtype=np.int64)
    place[arms.order] = np.arange(1, len(place) + 1)
    rows: list[Row] = []
    for layer, site in enumerate(sites):
        for neuron in range(site.width):
            k = len(rows)
            rows.append(
                {
                    "seed": None,
                    "layer": layer,
                    "layer_name": site.name,
                    "neuron": neuron,
                    **{name: float(scores[name][k]) if name in scores else None for name in columns},
                    "ipr": None,
                    "frequency": None,
                    "dead": bool(scores["dead"][k]),
                    "pruned_at": int(place[k]),
                    "is_memorizer": None if arms.chosen is None else bool(place[k] <= arms.chosen),
                }
            )
    return rows


def plan(inputs: Inputs) -> dict[str, object]:
    """What `of_checkpoint` would take, from one timed pass over the first batch; writes nothing."""
    subject = load(inputs)
    first = next(iter(subject.train))
    piece = observe.to_inputs(first, subject.model)
    neurons.margin_contributions(subject.model, piece, subject.sites, prefix=subject.prefix)
    with torch.inference_mode():
        observe.call(subject.model, piece)
        began = time.perf_counter()
        observe.call(subject.model, piece)
        per_example = (time.perf_counter() - began) / len(first.example_ids)
    n = inputs.train.n_examples + (inputs.test.n_examples if inputs.test else 0)
    k = sum(site.width for site in subject.sites)
    is_closed = not subject.predicts and len(subject.sites) == 1
    points = inputs.options.points or POINTS
    passes = 4 if is_closed else 4 + 3 * (points + 1) + inputs.options.draws * (max(4, points // RANDOM_SHARE) + 2)
    passes += k if inputs.options.ablation and not is_closed else 0
    return {
        "layers": ", ".join(f"{site.name} ({site.width})" for site in subject.sites),
        "neurons": k,
        "skipped": len(subject.skipped),
        "data": inputs.train.name,
        "training_examples": inputs.train.n_examples,
        "held_out_examples": inputs.test.n_examples if inputs.test else 0,
        "passes_over_the_data": passes,
        "rows": k + passes,
        "device": devices.describe(subject.device),
        "seconds_expected": round(per_example * n * passes, 1),
        "memory_expected_mb": round(devices.peak_memory() / 2**20),
        "disk_expected_kb": round(k * 0.2 + passes * 0.2 + sum(p.nbytes for p in subject.model.parameters()) / 1024),
    }
