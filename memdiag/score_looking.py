"""Look at a checkpoint, piece by piece of the data; what it shows of a piece is a file of its own."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from memdiag import device as devices
from memdiag import ranks, scores, scoring, tables
from memdiag.checkpoint import tokenizer_fingerprint
from memdiag.dataset import Batch, Example, batches
from memdiag.errors import InputError
from memdiag.observe import to_inputs
from memdiag.observe.coherence import Coherence
from memdiag.progress import Progress
from memdiag.reading import default_max_length, in_halves, vocab_size
from memdiag.score_inputs import Inputs
from memdiag.score_job import Job, examples_of, pad_of, path_of, probe_of
from memdiag.scoring import Arrays, Looker

log = logging.getLogger("memdiag")


def look(job: Job, index: int, model: nn.Module, directory: Path, progress: Progress) -> None:
    """Write what a checkpoint shows of this process's pieces, those that are not there yet."""
    inputs, options = job.inputs, job.inputs.options
    assert inputs.dataset is not None
    rank, world = ranks.start()
    n_pieces = -(-inputs.dataset.n_examples // job.piece)
    missing = {i for i in range(rank, n_pieces, world) if not path_of(directory, index, i).exists()}
    name = inputs.checkpoints[index].name
    progress.start(name, -(-inputs.dataset.n_examples // world))
    progress.advance(min(job.piece * (len(range(rank, n_pieces, world)) - len(missing)), inputs.dataset.n_examples))
    if not missing:
        return
    wanted = frozenset(missing)
    looker = looker_of(job, index, model)
    stream = examples_of(inputs, model, keep=lambda row: row // job.piece in wanted)
    device = next(model.parameters()).device
    row = job.part_row(index)

    def write(piece: int, columns: dict[str, Any]) -> None:
        meta = {"report": "score.part", "part": {"piece": piece, "checkpoint": name}}
        tables.write(path_of(directory, index, piece), row, [tables.from_columns(row, columns)], meta)
        missing.discard(piece)

    names = [field.name for field in dataclasses.fields(row)]
    for piece, group in itertools.groupby(stream, key=lambda example: example.row // job.piece):
        pieces: list[tuple[Batch, Arrays]] = []
        lengths = batches(
            group,
            tokens_per_batch=devices.tokens_per_batch(device, vocab_size(model) or 1),
            pad_id=pad_of(inputs, model),
            examples_per_batch=None if options.batch_size == "auto" else int(options.batch_size),
        )
        marked = ((batch, dict(zip(batch.rows.tolist(), _cut(batch, job, model)))) for batch in lengths)
        for batch, cut in marked:
            for part, found in in_halves([inputs.with_labels(batch)], lambda b: _seen(job, index, looker, b), device):
                found["truncated"] = np.array([cut[r] for r in part.rows.tolist()])
                pieces.append((part, found))
                progress.advance(len(part.rows))
        write(piece, _side_by_side(pieces, names))
    for piece in sorted(missing):  # none of its rows was trained on
        write(piece, {column: [] for column in names})


def _cut(batch: Batch, job: Job, model: nn.Module) -> list[bool]:
    """Which examples of a batch were cut: those as long as the longest that is read, if any was."""
    if batch.mask is None:
        return [False] * len(batch.rows)
    most = job.inputs.options.max_length or default_max_length(model)
    return [bool(batch.truncated) and int(n) == most for n in batch.mask.sum(1)]


def looker_of(job: Job, index: int, model: nn.Module) -> Looker:
    """Ready to look at a checkpoint."""
    inputs, options = job.inputs, job.inputs.options
    mine = index == inputs.focus
    names = [name for name in job.at_one if mine and name in scores.NAMES]
    also = set(job.over) | ({"gradient_norm"} if mine and "_gradient_norm" in job.at_one else set())
    reference = None
    tokenizer = inputs.one.tokenizer(options.tokenizer)
    if inputs.reference is not None and any(name in scores.REFERENCE for name in names):
        reference = inputs.reference.load(dtype=options.dtype, device=str(next(model.parameters()).device))
        other = inputs.reference.tokenizer()
        if vocab_size(reference) != vocab_size(model) or (
            other is not None and tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
        ):
            raise InputError(
                f"--reference {inputs.reference.name} has another tokenizer or vocabulary than {inputs.one.name}; "
                "log-probabilities of tokens compare only where the tokens are the same"
            )
        try:
            scoring.kind_of(reference, probe_of(inputs, model))
        except InputError as error:
            raise InputError(f"--reference {inputs.reference.name}: {error}") from None
    found = scoring.look_at(
        model,
        job.kind,
        probe_of(inputs, model),
        names,
        prefix_tokens=options.prefix_tokens,
        suffix_tokens=options.suffix_tokens,
        seed=options.seed,
        tokenizer=tokenizer,
        reference=reference,
        examples=lambda: _trained_examples(inputs, model),
        also=frozenset(also),
    )
    if found.normer is not None and mine:
        if found.normer.way == "one by one":
            log.info("gradients are taken one example at a time, which is slow: this model allows nothing quicker")
        if found.normer.no_last_layer and "last_layer_grand" in names:
            log.info("last_layer_grand is null: %s", found.normer.no_last_layer)
    return found


def _trained_examples(inputs: Inputs, model: nn.Module) -> Iterator[Example]:
    """All examples, with the labels that were trained on."""
    trained = inputs.trained
    for example in examples_of(inputs, model):
        if trained is not None and trained.labels is not None:
            at = int(trained.at(np.array([example.row]))[0])
            if at >= 0:
                example = dataclasses.replace(example, label=int(trained.labels[at]))
        yield example


def _seen(job: Job, index: int, looker: Looker, batch: Batch) -> Arrays:
    """The columns of a part, but for what the batch says itself."""
    found = looker(batch)
    columns: Arrays = {name: found[name].astype(np.float64) for name in job.over}
    for key in ("n_tokens", "n_scored", "n_suffix"):
        if key in found:
            columns[key] = found[key]
    if index == job.inputs.focus:
        columns |= scoring.scores_of([name for name in job.at_one if name in scores.NAMES], found)
        if "_gradient_norm" in job.at_one:
            columns["_gradient_norm"] = found["gradient_norm"]
    return columns


def _side_by_side(pieces: list[tuple[Batch, Arrays]], names: list[str]) -> dict[str, Any]:
    """The columns of a piece in the order of its rows."""
    rows = np.concatenate([batch.rows for batch, _ in pieces])
    order = np.argsort(rows)
    ids = [example_id for batch, _ in pieces for example_id in batch.example_ids]
    columns: dict[str, Any] = {"row": rows[order], "example_id": [ids[i] for i in order]}
    for name in names:
        if name in columns:
            continue
        own: dict[str, list[Any]] = {"label": [b.labels for b, _ in pieces], "truth": [b.truth for b, _ in pieces]}
        parts = own[name] if name in own else [found[name] for _, found in pieces]
        columns[name] = np.concatenate(parts)[order]
    return columns


def coherence_of(job: Job, model: nn.Module, directory: Path, progress: Progress) -> dict[str, Any] | None:
    """m-coherence of the gradients at the checkpoint in focus: one more backward pass over the data."""
    inputs = job.inputs
    assert inputs.dataset is not None
    rank, world = ranks.start()
    n_pieces = -(-inputs.dataset.n_examples // job.piece)
    progress.start("coherence", -(-inputs.dataset.n_examples // world))
    norms = {i: tables.read(path_of(directory, inputs.focus, i)).table for i in range(rank, n_pieces, world)}
    squares = {i: dict(zip(t["row"].to_pylist(), np.square(t["_gradient_norm"].to_numpy()))) for i, t in norms.items()}
    n_classes = None
    if job.kind == "classifier":
        logits = scoring.look_at(model, job.kind, probe_of(inputs, model), ["loss"])(probe_of(inputs, model))["logits"]
        n_classes = logits.shape[1]
    total = Coherence(n_classes)
    stream = examples_of(inputs, model, keep=lambda row: (row // job.piece) in squares)
    device = next(model.parameters()).device
    for batch in batches(
        stream,
        tokens_per_batch=devices.tokens_per_batch(device, vocab_size(model) or 1),
        pad_id=pad_of(inputs, model),
        examples_per_batch=None if inputs.options.batch_size == "auto" else int(inputs.options.batch_size),
    ):
        marked = inputs.with_labels(batch)
        found = np.array([squares[int(row) // job.piece][int(row)] for row in marked.rows])
        total.add(model, to_inputs(marked, model), found)
        progress.advance(len(marked.rows))
    gathered = ranks.gather(total)
    if not gathered:
        return None
    first = gathered[0]
    for other in gathered[1:]:
        first.merge(other)
    return dict(first.values())
