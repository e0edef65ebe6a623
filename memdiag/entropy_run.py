"""Carry out `memdiag entropy`: checkpoint by checkpoint, resumable, on any number of processes."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import transformers
from torch import nn

import memdiag
from memdiag import alignment, observe, ranks, tables
from memdiag import device as devices
from memdiag.checkpoint import Checkpoint, pad_id, tokenizer_fingerprint
from memdiag.dataset import collate
from memdiag.entropy_report import EntropyOptions, EntropyRow, GradientRow, Inputs
from memdiag.errors import InputError
from memdiag.layer_sums import Sums, rows_of
from memdiag.measuring import observe_all, observe_batch, watch
from memdiag.oscillation import oscillation
from memdiag.progress import Progress
from memdiag.reading import Reading, examples_of, stream_of

log = logging.getLogger("memdiag")


def run(inputs: Inputs, name: str, out: Path, *, force: bool, progress: Progress) -> tables.Report:
    """Measure every checkpoint and write the report; what an interrupted run has finished is not done again.

    Args:
        inputs: what was opened.
        name: the checkpoint or run as the user gave it, for the report's metadata.
        out: where the report goes.
        force: start afresh, whatever stands there.
        progress: shows how far it is.
    Errors as `entropy_report.entropy`.
    """
    rank, _ = ranks.start()
    options, dataset = inputs.options, inputs.dataset
    target = devices.resolve(options.device)
    shared = {
        "report": EntropyRow.report,
        "schema_version": EntropyRow.schema_version,
        "options": options.identity(),
        "dataset": dataset.fingerprint(),
    }

    def whole() -> dict[str, Any]:
        return shared | {"checkpoints": {c.name: _identity(c, options) for c in inputs.checkpoints}}

    if ranks.broadcast(rank == 0 and _is_there(out, whole, gradients=options.gradients, force=force)):
        log.info("%s is already there, made from the same inputs; --force makes it again", out)
        if rank == 0:
            tables.remove_leftovers(out, shared)
    else:
        parts = tables.Parts(out, shared, force=force) if rank == 0 else None
        try:
            for i, checkpoint in enumerate(inputs.checkpoints):
                part, identity = f"{i:05d}", {"name": checkpoint.name, **_identity(checkpoint, options)}
                if not ranks.broadcast(parts is not None and parts.has(part, checkpoint.name, identity)):
                    _measure(checkpoint, identity, inputs, target, parts.path(part) if parts else None, progress)
            if parts is not None:
                _join(parts, inputs, name, out, shared)
                parts.remove()
        finally:
            if parts is not None:
                parts.close()
    ranks.broadcast(None)  # nobody leaves before the report is there
    return tables.read(out) if rank == 0 else tables.Report(tables.schema_of(EntropyRow).empty_table(), {})


def _is_there(out: Path, whole: Callable[[], dict[str, Any]], *, gradients: bool, force: bool) -> bool:
    places = [out, _gradients_path(out)] if gradients else [out]
    there = [tables.check_place(place, whole, force=force) for place in places]  # each may refuse, so all are asked
    return all(there)


def _identity(checkpoint: Checkpoint, options: EntropyOptions) -> dict[str, str | None]:
    tokenizer = checkpoint.tokenizer(options.tokenizer)
    return {"weights": checkpoint.fingerprint(), "tokenizer": tokenizer_fingerprint(tokenizer)}


def _measure(
    checkpoint: Checkpoint,
    identity: dict[str, str | None],
    inputs: Inputs,
    target: torch.device,
    path: Path | None,
    progress: Progress,
) -> None:
    """Load one checkpoint, look at the whole dataset, and write its part of the report (on rank 0)."""
    options = inputs.options
    rank, world = ranks.start()
    model = checkpoint.load(dtype=options.dtype, device=str(target))
    progress.start(checkpoint.name, -(-inputs.dataset.n_examples // world))
    stream = stream_of(reading_of(inputs, checkpoint), model, target, rank, world)
    first = next(stream, None)
    watched = watch(model, first, options.layers) if first is not None else None
    if options.gradients and watched is not None:
        if not watched.predicts:
            raise InputError("--gradients needs a causal language model; this model predicts no next tokens")
        gradient_layers(model, options)
    sums = Sums([])
    if watched is not None and first is not None:
        sums = observe_all(watched, itertools.chain([first], stream), options, progress)
    sums_of_ranks = ranks.gather((sums, watched and watched.layers_seen()))
    if path is None:
        return
    total, layers = Sums([]), None
    for part, seen in sums_of_ranks:
        total.merge(part)
        layers = layers or seen
    assert layers is not None  # a dataset has at least one example
    if checkpoint is inputs.checkpoints[0]:
        _log_skipped(layers.skipped)
    about = {
        **identity,
        "step": checkpoint.step,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "skipped": layers.skipped,
    }
    meta = {"report": EntropyRow.report, "part": identity, "checkpoint": about}
    if options.gradients:  # first, so that a finished part means that both are there
        found = gradient_rows(inputs, checkpoint, model, target)
        tables.write(_gradients_path(path), GradientRow, [found], meta)
    tables.write(path, EntropyRow, [rows_of(total, layers.taken, checkpoint, options)], meta)


def reading_of(inputs: Inputs, checkpoint: Checkpoint) -> Reading:
    """The dataset as this checkpoint reads it."""
    options = inputs.options
    return Reading(inputs.dataset, checkpoint, options.tokenizer, options.max_length, options.batch_size)


def _log_skipped(skipped: list[tuple[str, str]]) -> None:
    """A line for each reason; the report's metadata has every name."""
    by_reason: dict[str, list[str]] = {}
    for name, why in skipped:
        if why != observe.NOT_CHOSEN:
            by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        log.info("left out, %s: %s%s", why, ", ".join(names[:3]), more)


def _gradients_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.gradients.parquet")


def gradient_rows(
    inputs: Inputs, checkpoint: Checkpoint, model: nn.Module, target: torch.device
) -> list[dict[str, Any]]:
    """The cosine rows of one checkpoint, on the first batches of the dataset in its own order.

    Raises:
        InputError: no batch can be used; and as `gradient_layers`.
    """
    options = inputs.options
    pad = pad_id(getattr(model, "config", None), checkpoint.tokenizer(options.tokenizer))
    examples = examples_of(reading_of(inputs, checkpoint), model)
    groups = iter(lambda: list(itertools.islice(examples, options.gradient_batch_size)), [])
    rows = alignment.gradient_rows(
        model,
        (collate(group, pad_id=pad) for group in groups),
        layers=gradient_layers(model, options),
        patch_size=options.patch_size,
        max_batches=options.gradient_batches,
    )
    empty = dict.fromkeys(field.name for field in dataclasses.fields(GradientRow))
    about = {"kind": "cosine", "checkpoint": checkpoint.name, "step": checkpoint.step}
    return [empty | row | about for row in rows]


def gradient_layers(model: nn.Module, options: EntropyOptions) -> list[int]:
    """The layers whose gradients are compared: those measured that are the output of a block.

    Raises:
        InputError: there is none.
    """
    layers, _ = observe.layers_of(model, options.layers)
    names = [name for name, _ in observe.blocks(model)]
    found = [names.index(layer.name) + 1 for layer in layers if layer.at == "output" and layer.name in names]
    if not found:
        raise InputError("--gradients compares the outputs of blocks, layers 1 and up; there are none among --layers")
    return found


def oscillation_rows(table: pa.Table, *, seed: int) -> Iterator[dict[str, Any]]:
    """One row per series of cosines over a run, with the null band of each figure; none without steps."""
    key = ("layer", "layer_name", "matrix", "objective_pair", "batches")
    series: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        if row["step"] is not None:
            series.setdefault(tuple(row[name] for name in key), []).append(row)
    empty = dict.fromkeys(field.name for field in dataclasses.fields(GradientRow))
    for name, rows in series.items():
        if len(rows) > 1:
            values, errors = ([math.nan if row[c] is None else row[c] for row in rows] for c in ("cosine", "cosine_se"))
            found = oscillation([row["step"] for row in rows], values, standard_errors=errors, seed=seed)
            yield empty | dict(zip(key, name)) | {"kind": "oscillation"} | dataclasses.asdict(found)


def _join(parts: tables.Parts, inputs: Inputs, name: str, out: Path, shared: dict[str, Any]) -> None:
    options, dataset = inputs.options, inputs.dataset
    paths = [parts.path(f"{i:05d}") for i in range(len(inputs.checkpoints))]
    checkpoints = [tables.read_meta(path)["checkpoint"] for path in paths]
    identity = shared | {
        "checkpoints": {c["name"]: {"weights": c["weights"], "tokenizer": c["tokenizer"]} for c in checkpoints}
    }
    meta = {
        "report": EntropyRow.report,
        "schema_version": EntropyRow.schema_version,
        "memdiag_version": memdiag.__version__,
        "options": {"checkpoint": name, **dataclasses.asdict(options)},
        "seed": options.seed,
        "checkpoint": checkpoints,
        "dataset": {
            "name": dataset.name,
            "fingerprint": shared["dataset"],
            "n_examples": dataset.n_examples,
            "columns": dataset.columns,
        },
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": devices.describe(devices.resolve(options.device)),
        "dtype": checkpoints[-1]["dtype"],
        "identity": identity,
    }
    if options.gradients:
        meta["gradients"] = _join_gradients(paths, out, meta)
    tables.join(out, EntropyRow, paths, meta)


def _join_gradients(paths: list[Path], out: Path, meta: dict[str, Any]) -> str:
    target = _gradients_path(out)
    cosines = pa.concat_tables([tables.read(_gradients_path(path)).table for path in paths])
    about = meta | {"report": GradientRow.report, "schema_version": GradientRow.schema_version}
    rows = [cosines.to_pylist(), list(oscillation_rows(cosines, seed=meta["seed"]))]
    tables.write(target, GradientRow, rows, about)
    return target.name


def plan(inputs: Inputs) -> dict[str, object]:
    """What `run` would take, extrapolated from one timed batch of the first checkpoint; writes nothing."""
    options, dataset = inputs.options, inputs.dataset
    target = devices.resolve(options.device)
    checkpoint = inputs.checkpoints[0]
    model = checkpoint.load(dtype=options.dtype, device=str(target))
    first = next(stream_of(reading_of(inputs, checkpoint), model, target))
    watched = watch(model, first, options.layers)
    observe_batch(watched, first, options)  # the first call of everything is slow
    began = time.perf_counter()
    sums = observe_batch(watched, first, options)
    per_example = (time.perf_counter() - began) / sums.n_examples
    rows = len(inputs.checkpoints) * len(list(rows_of(sums, watched.layers_seen().taken, checkpoint, options)))
    folded = sum(2 * 2 * 8 * layer.n_dims**2 for layer in sums.layers) if "dataset" in options.units else 0
    now = devices.peak_memory()  # with the model and one batch
    return {
        "checkpoints": len(inputs.checkpoints),
        "layers": len(watched.layers),
        "layers_skipped": len(watched.skipped),
        "data": options.data,
        "examples": dataset.n_examples,
        "rows": rows,
        "device": devices.describe(target),
        "seconds_expected": round(per_example * dataset.n_examples * len(inputs.checkpoints), 1),
        "memory_expected_mb": round((now + folded) / 2**20),
        "disk_expected_kb": round(rows * 0.2 + 20),
    }
