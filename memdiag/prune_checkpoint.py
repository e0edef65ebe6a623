"""Any classifier or causal language model: attribute its neurons, prune them beside the controls, write what is left.

Axes: i example, k neuron of all layers together, q class.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memdiag import attribution, fourier, observe, pruning
from memdiag import device as devices
from memdiag.dataset import Batch
from memdiag.errors import InputError
from memdiag.observe import neurons
from memdiag.progress import Progress
from memdiag.prune_curves import MOST_POINTS, RANDOM_POINTS, Cut, Found, headline, neuron_rows, run_arms, with_intervals
from memdiag.prune_inputs import Inputs
from memdiag.prune_subject import Subject, check_labels, figures, load, masks_of
from memdiag.pruning import GROUPS, Examples, Readout, Row
from memdiag.reading import in_halves

log = logging.getLogger("memdiag")

POINTS, RANDOM_SHARE = 24, 3  # forward passes over the data for a curve; a random one has a third of them
CLOSED_BYTES = 2**31  # activations of a linear read-out are kept while they are smaller than this


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
    if inputs.suspects is not None and (missing := len(inputs.suspects) - int(sums.n[0]) - sums.n_undefined) > 0:
        log.warning("%d of %d suspects are not among the training examples", missing, len(inputs.suspects))
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


def readout_of(subject: Subject) -> Readout | None:
    """The activations of all examples, if the one layer of neurons is read by the model's last linear layer."""
    if subject.predicts or len(subject.sites) != 1:
        return None
    site = subject.sites[0]
    n = subject.inputs.train.n_examples + (subject.inputs.test.n_examples if subject.inputs.test else 0)
    if n * site.width * 4 > CLOSED_BYTES:
        return None

    def run(batch: Batch) -> Tensor | None:
        return neurons.readout_activations(subject.model, observe.to_inputs(batch, subject.model), site)

    found: list[tuple[Tensor, NDArray[np.int8], Batch]] = []
    for passes, held_out in ((subject.train, False), (subject.test, True)):
        for batch, a in in_halves(passes or (), run, subject.device):
            if a is None:
                return None
            found.append((a.float().cpu(), subject.groups_of(batch, held_out=held_out), batch))
    assert isinstance(site.reader, nn.Linear)
    truth = None
    if all(b.true_labels is not None or (g == 2).all() for _, g, b in found):
        truth = np.concatenate([b.labels if b.true_labels is None else b.true_labels for _, _, b in found])
    labels = np.concatenate([b.labels for _, _, b in found if b.labels is not None])
    weights = site.reader.weight.detach().float().cpu()
    check_labels(labels, len(weights), "the dataset")
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


def of_checkpoint(inputs: Inputs, progress: Progress) -> Found:
    """Attribute and prune.

    Raises:
        InputError: the model does not go with the data, has nothing to prune, or gives numbers that are none.
    """
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
        "dtype": str(next(subject.model.parameters()).dtype).removeprefix("torch."),
        "rule": arms.rule,
        **headline(rows, options.rank_by, cut.agreement),
    }
    layers = [(site.name, site.width) for site in subject.sites]
    found = Found(neuron_rows(layers, scores, arms), rows, [], [], about, {})
    _log_skipped(subject.skipped)
    if arms.chosen is not None:
        keep = masks_of(subject.sites, arms.order[: arms.chosen], torch.device("cpu"))
        neurons.zero_(subject.model, subject.sites, [mask == 0 for mask in keep])
        found.models["pruned"] = subject.model
    return found


def _log_skipped(skipped: Sequence[observe.Skipped]) -> None:
    """One line; the report's metadata has every name and reason."""
    others = [s for s in skipped if s.why != observe.NOT_CHOSEN]
    if others:
        layers = "1 other layer," if len(others) == 1 else f"{len(others)} other layers, e.g."
        log.info("no neurons are read by %s %s: %s", layers, others[0].name, others[0].why)


def _cut(subject: Subject, readout: Readout | None) -> Cut:
    options = subject.inputs.options
    points = options.points or (MOST_POINTS if readout is not None else POINTS)
    if subject.predicts:
        chance, agreement = 0.0, "train_corrupted_exact"
    else:
        chance, agreement = 1 / subject.n_classes, "train_corrupted_acc"
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


def plan(inputs: Inputs) -> dict[str, object]:
    """What `of_checkpoint` would take, from one timed pass over the first batch; writes nothing."""
    subject = load(inputs)

    def run(batch: Batch) -> float:
        piece = observe.to_inputs(batch, subject.model)
        neurons.margin_contributions(
            subject.model, piece, subject.sites, prefix=subject.prefix
        )  # what takes most memory
        with torch.inference_mode():
            observe.call(subject.model, piece)
            began = time.perf_counter()
            observe.call(subject.model, piece)
            return (time.perf_counter() - began) / len(batch.example_ids)

    _, per_example = next(in_halves([next(iter(subject.train))], run, subject.device))
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
