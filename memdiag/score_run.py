"""Carry out `memdiag score`: piece by piece of the dataset, checkpoint by checkpoint, on any number of processes.

A piece is some consecutive rows; what a checkpoint shows of it is a file of its own, so that an interrupted run goes on
and processes need not wait for each other. At the end the pieces of all checkpoints are put side by side.

Axes: b example, c checkpoint, e epoch.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from torch import nn

import memdiag
from memdiag import device as devices
from memdiag import ranks, scores, scoring, tables, trajectory
from memdiag.checkpoint import pad_id, tokenizer_fingerprint
from memdiag.dataset import Batch, Example, batches
from memdiag.errors import InputError
from memdiag.observe import to_inputs
from memdiag.observe.coherence import Coherence
from memdiag.progress import Progress
from memdiag.reading import default_max_length, in_halves, vocab_size
from memdiag.score_inputs import Inputs, open_inputs
from memdiag.score_report import (
    KEY,
    OF_CLASSIFIER,
    OF_LANGUAGE,
    RANK,
    REPORT,
    TRUTH,
    VERSION,
    ScoreOptions,
    ScoreRow,
    row_of,
)
from memdiag.score_summary import summary_of
from memdiag.scoring import OVER_CHECKPOINTS, SERIES, Arrays, Kind, Looker
from memdiag.tables import column

log = logging.getLogger("memdiag")
PIECE, MOST_PIECES = 1024, 1000  # rows of a piece at least, and pieces of a dataset at most
PROBE = 4  # examples on which it is found out what a model is
NUMBER = column(pa.float64(), "observed", nullable=True)


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be done, once the first checkpoint has been looked at."""

    inputs: Inputs
    kind: Kind
    names: tuple[str, ...]  # the report's scores
    at_one: tuple[str, ...]  # of these, those of a single checkpoint
    over: frozenset[str]  # arrays that are wanted of every checkpoint
    piece: int  # rows

    @property
    def truth(self) -> bool:
        return self.inputs.options.truth is not None

    @property
    def visited(self) -> list[int]:
        """Indices of the checkpoints that are looked at."""
        return list(range(len(self.inputs.checkpoints))) if self.over else [self.inputs.focus]

    def row(self, *, ranked: bool) -> type:
        """The report's rows."""
        classifier, language = self.kind == "classifier", self.kind == "language model"
        language = language and bool(self.inputs.checkpoints)
        return row_of(self.names, classifier=classifier, language=language, truth=self.truth, ranks=ranked)

    def keys(self) -> dict[str, Any]:
        """The columns that are no scores."""
        own = OF_CLASSIFIER if self.kind == "classifier" else OF_LANGUAGE
        return {**KEY, **(own if self.inputs.checkpoints else {}), **(TRUTH if self.truth else {})}

    def part_row(self, index: int) -> type:
        """The rows of what checkpoint `index` shows of a piece."""
        more = [*self.over, *(self.at_one if index == self.inputs.focus else ())]
        return tables.row_class("PartRow", "score.part", VERSION, self.keys() | dict.fromkeys(more, NUMBER))


def run(source: str, options: ScoreOptions, out: Path, *, force: bool, progress: Progress) -> tables.Report:
    """Score every example and write the report; what an interrupted run has finished is not done again.

    Errors as `score_report.score`.
    """
    rank, _ = ranks.start()
    inputs = open_inputs(source, options)
    shared = {"report": REPORT, "schema_version": VERSION, "options": inputs.options.identity(), **inputs.identity()}
    if ranks.broadcast(rank == 0 and tables.check_place(out, lambda: shared, force=force)):
        log.info("%s is already there, made from the same inputs; --force makes it again", out)
        if rank == 0:
            tables.remove_leftovers(out, shared)
    else:
        parts = tables.Parts(out, shared, force=force) if rank == 0 else None
        ranks.broadcast(None)  # the directory is there
        try:
            _work(inputs, source, out, parts, shared, progress)
            if parts is not None:
                parts.remove()
        finally:
            if parts is not None:
                parts.close()
    ranks.broadcast(None)  # nobody leaves before the report is there
    return tables.read(out) if rank == 0 else tables.Report(tables.schema_of(ScoreRow).empty_table(), {})


def _work(
    inputs: Inputs, source: str, out: Path, parts: tables.Parts | None, shared: dict[str, Any], progress: Progress
) -> None:
    directory = out.with_name(f".{out.name}.parts")
    about: dict[str, Any] = {}
    if not inputs.checkpoints:
        job = _job_of_trajectory(inputs)
    else:
        target = devices.resolve(inputs.options.device)
        first = inputs.one.load(dtype=inputs.options.dtype, device=str(target))
        job = job_of(inputs, first)
        about = {"dtype": str(next(first.parameters()).dtype).removeprefix("torch.")}
        for index in job.visited:
            model = first
            if index != inputs.focus:
                model = inputs.checkpoints[index].load(dtype=inputs.options.dtype, device=str(target))
            _look(job, index, model, directory, progress)
        ranks.gather(None)  # every process has written its pieces
        if {"grand", "gradnorm"} & set(job.names):
            about["coherence"] = _coherence(job, first, directory, progress)
    if parts is None:
        return
    whole = parts.directory / "whole.parquet"
    plain = job.row(ranked=False)
    tables.write(
        whole, plain, (tables.from_columns(plain, found) for found in _joined(job, directory)), {"report": REPORT}
    )
    _finish(job, source, whole, out, shared, about)


# -- what is to be done --------------------------------------------------------------------------------------------


def job_of(inputs: Inputs, model: nn.Module) -> Job:
    """Which scores, and what they need of which checkpoint.

    Raises:
        InputError: a score that was asked for cannot be had from this input; the reason is said.
    """
    options, dataset = inputs.options, inputs.dataset
    assert dataset is not None
    kind = scoring.kind_of(model, _probe(inputs, model))
    reasons = scoring.possible(
        kind,
        features=dataset.kind == "features",
        several=len(inputs.checkpoints) > 1,
        trajectory=inputs.epochs is not None,
        reference=inputs.reference is not None,
    )
    names = _chosen(options, reasons)
    if inputs.reference is not None and kind == "classifier":
        raise InputError("--reference is for language models; this is a classifier")
    over: set[str] = set()
    at_one = []
    for name in names:
        needs = scores.needs([name])
        if needs & set(SERIES):
            over |= set() if inputs.epochs is not None else set(SERIES)
        elif needs & {"gradient_norms", "input_gradient_norms", "input_hessian_traces"}:
            over |= {one for one, many in OVER_CHECKPOINTS.items() if many in needs}
        else:
            at_one.append(name)
    if {"grand", "gradnorm"} & set(names):
        at_one.append("_gradient_norm")
    piece = max(PIECE, -(-dataset.n_examples // MOST_PIECES))
    return Job(inputs, kind, names, tuple(at_one), frozenset(over), piece)


def _chosen(options: ScoreOptions, reasons: dict[str, str | None]) -> tuple[str, ...]:
    asked = options.names()
    for name in asked or ():
        if reasons[name] is not None:
            raise InputError(f"--scores {name}: {reasons[name]}")
    return asked or tuple(name for name, reason in reasons.items() if reason is None)


def _job_of_trajectory(inputs: Inputs) -> Job:
    """The job of a trajectory alone."""
    reasons = {
        name: None if scores.load(name).NEEDS == "trajectory" else "it needs checkpoints, and this is a trajectory"
        for name in scores.NAMES
    }
    names = _chosen(inputs.options, reasons)
    return Job(inputs, "classifier", names, (), frozenset(), trajectory.GROUP)


def _probe(inputs: Inputs, model: nn.Module, n: int = PROBE) -> Batch:
    """The first examples."""
    stream = batches(itertools.islice(_examples(inputs, model), n), tokens_per_batch=2**12, pad_id=_pad(inputs, model))
    return inputs.with_labels(next(stream))


def _examples(inputs: Inputs, model: nn.Module, keep: Callable[[int], bool] | None = None) -> Iterator[Example]:
    return inputs.examples(
        tokenizer=inputs.one.tokenizer(inputs.options.tokenizer),
        max_length=inputs.options.max_length or default_max_length(model),
        vocab_size=vocab_size(model),
        keep=keep,
    )


def _pad(inputs: Inputs, model: nn.Module) -> int:
    return pad_id(getattr(model, "config", None), inputs.one.tokenizer(inputs.options.tokenizer))


# -- looking -------------------------------------------------------------------------------------------------------


def _path(directory: Path, index: int, piece: int) -> Path:
    return directory / f"seen-{index:05d}-{piece:05d}.parquet"


def _look(job: Job, index: int, model: nn.Module, directory: Path, progress: Progress) -> None:
    """Write what a checkpoint shows of this process's pieces, those that are not there yet."""
    inputs, options = job.inputs, job.inputs.options
    assert inputs.dataset is not None
    rank, world = ranks.start()
    n_pieces = -(-inputs.dataset.n_examples // job.piece)
    missing = {i for i in range(rank, n_pieces, world) if not _path(directory, index, i).exists()}
    name = inputs.checkpoints[index].name
    progress.start(name, -(-inputs.dataset.n_examples // world))
    progress.advance(min(job.piece * (len(range(rank, n_pieces, world)) - len(missing)), inputs.dataset.n_examples))
    if not missing:
        return
    wanted = frozenset(missing)
    looker = looker_of(job, index, model)
    stream = _examples(inputs, model, keep=lambda row: row // job.piece in wanted)
    device = next(model.parameters()).device
    row = job.part_row(index)

    def write(piece: int, columns: dict[str, Any]) -> None:
        meta = {"report": "score.part", "part": {"piece": piece, "checkpoint": name}}
        tables.write(_path(directory, index, piece), row, [tables.from_columns(row, columns)], meta)
        missing.discard(piece)

    names = [field.name for field in dataclasses.fields(row)]
    for piece, group in itertools.groupby(stream, key=lambda example: example.row // job.piece):
        pieces: list[tuple[Batch, Arrays]] = []
        lengths = batches(
            group,
            tokens_per_batch=devices.tokens_per_batch(device, vocab_size(model) or 1),
            pad_id=_pad(inputs, model),
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
            scoring.kind_of(reference, _probe(inputs, model))
        except InputError as error:
            raise InputError(f"--reference {inputs.reference.name}: {error}") from None
    found = scoring.look_at(
        model,
        job.kind,
        _probe(inputs, model),
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
    for example in _examples(inputs, model):
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


# -- putting together ----------------------------------------------------------------------------------------------


def _joined(job: Job, directory: Path) -> Iterator[dict[str, Any]]:
    """The report's columns, piece by piece, in the order of the rows."""
    inputs = job.inputs
    if not inputs.checkpoints:
        yield from _of_trajectory(job)
        return
    assert inputs.dataset is not None
    epochs = _Epochs(inputs.epochs) if inputs.epochs is not None and _from_epochs(job) else None
    eta = inputs.learning_rates()
    if eta is None and "tracin_self" in job.names:
        log.info("learning rates are not known: tracin_self takes 1 for every checkpoint")
    for piece in range(-(-inputs.dataset.n_examples // job.piece)):
        parts = [tables.read(_path(directory, index, piece)).table for index in job.visited]
        one = parts[job.visited.index(inputs.focus)]
        columns = {name: _values(one[name]) for name in (*job.keys(), *job.at_one) if name in one.column_names}
        rows = one["row"].to_numpy()
        arrays: Arrays = {
            many: np.stack([_values(part[single]) for part in parts])
            for single, many in OVER_CHECKPOINTS.items()
            if single in job.over
        }
        arrays["learning_rates"] = np.ones(len(parts)) if eta is None else eta
        if set(SERIES) <= job.over:
            arrays |= {name: np.stack([_values(part[name]) for part in parts]) for name in SERIES}
            arrays["correct"] = arrays["correct"] == 1
        there = np.ones(len(rows), dtype=bool)
        if epochs is not None:
            found, there = epochs.at(rows)
            arrays |= found
        for name in job.names:
            if name in columns:
                continue
            (values,) = scoring.scores_of([name], arrays).values()
            if scores.load(name).NEEDS == "trajectory" and epochs is not None:
                full = np.full(len(rows), np.nan)
                full[there] = values
                values = full
            columns[name] = values
        columns.pop("_gradient_norm", None)
        yield columns


def _values(column: Any) -> Any:
    """A column as an array, or as a list of names."""
    if pa.types.is_string(column.type):
        return column.to_pylist()
    return column.to_numpy()


def _from_epochs(job: Job) -> bool:
    return any(scores.load(name).NEEDS == "trajectory" for name in job.names)


class _Epochs:
    """A trajectory, asked for in the order of its rows."""

    def __init__(self, folder: Path) -> None:
        self._stream = trajectory.read_chunks(folder)
        self._held: dict[str, Any] | None = next(self._stream, None)

    def at(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Arrays, np.ndarray[Any, np.dtype[np.bool_]]]:
        """The arrays (e, b') of those of some ascending rows that are in it, and which (b,) these are."""
        pieces: list[Arrays] = []
        there = np.zeros(len(rows), dtype=bool)
        n_epochs = 1 if self._held is None else len(self._held["logsumexp"])
        while self._held is not None:
            wanted = np.isin(self._held["row"], rows)
            if wanted.any():
                pieces.append({name: self._held[name][:, wanted] for name in SERIES})
                there |= np.isin(rows, self._held["row"])
            if self._held["row"][-1] > rows[-1]:
                break
            self._held = next(self._stream, None)
        if not pieces:
            return {name: np.empty((n_epochs, 0)) for name in SERIES} | {
                "correct": np.empty((n_epochs, 0), dtype=bool)
            }, there
        found = {name: np.concatenate([piece[name] for piece in pieces], axis=1) for name in SERIES}
        return _as_floats(found), there


def _as_floats(found: Arrays) -> Arrays:
    return {name: found[name] if name == "correct" else found[name].astype(np.float64) for name in SERIES}


def _of_trajectory(job: Job) -> Iterator[dict[str, Any]]:
    """The columns of a trajectory alone."""
    assert job.inputs.epochs is not None
    truth = _truth_by_row(job)
    limit = job.inputs.options.limit
    for chunk in trajectory.read_chunks(job.inputs.epochs):
        keep = np.ones(len(chunk["row"]), dtype=bool) if limit is None else chunk["row"] < limit
        if not keep.any():
            return
        arrays = _as_floats({name: chunk[name][:, keep] for name in SERIES})
        columns: dict[str, Any] = {
            "row": chunk["row"][keep],
            "example_id": list(itertools.compress(chunk["example_id"], keep)),
        }
        if "label" in {field.name for field in dataclasses.fields(job.row(ranked=False))}:
            columns["label"] = np.zeros(0) if chunk["label"] is None else chunk["label"][keep]
        if truth is not None:
            columns["truth"] = np.array([truth.get(int(row), False) for row in columns["row"]])
        yield columns | scoring.scores_of(job.names, arrays)


def _truth_by_row(job: Job) -> dict[int, bool] | None:
    """--truth of a trajectory alone: from the run beside it, or from --data."""
    inputs = job.inputs
    if not job.truth:
        return None
    if inputs.truth_of_run:
        assert inputs.trained is not None
        assert inputs.trained.corrupted is not None
        return dict(zip(inputs.trained.rows.tolist(), inputs.trained.corrupted.tolist()))
    if inputs.dataset is None:
        raise InputError(f"--truth {inputs.options.truth}: a trajectory has no such column; give the data with --data")
    if inputs.dataset.kind == "text":
        raise InputError("--truth of a trajectory of texts: score the run that it belongs to")
    return {example.row: bool(example.truth) for example in inputs.dataset.examples()}


def _coherence(job: Job, model: nn.Module, directory: Path, progress: Progress) -> dict[str, Any] | None:
    """m-coherence of the gradients at the checkpoint in focus: one more backward pass over the data."""
    inputs = job.inputs
    assert inputs.dataset is not None
    rank, world = ranks.start()
    n_pieces = -(-inputs.dataset.n_examples // job.piece)
    progress.start("coherence", -(-inputs.dataset.n_examples // world))
    norms = {i: tables.read(_path(directory, inputs.focus, i)).table for i in range(rank, n_pieces, world)}
    squares = {i: dict(zip(t["row"].to_pylist(), np.square(t["_gradient_norm"].to_numpy()))) for i, t in norms.items()}
    n_classes = None
    if job.kind == "classifier":
        logits = scoring.look_at(model, job.kind, _probe(inputs, model), ["loss"])(_probe(inputs, model))["logits"]
        n_classes = logits.shape[1]
    total = Coherence(n_classes)
    stream = _examples(inputs, model, keep=lambda row: (row // job.piece) in squares)
    device = next(model.parameters()).device
    for batch in batches(
        stream,
        tokens_per_batch=devices.tokens_per_batch(device, vocab_size(model) or 1),
        pad_id=_pad(inputs, model),
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


def _finish(job: Job, source: str, whole: Path, out: Path, shared: dict[str, Any], about: dict[str, Any]) -> None:
    """The summary and, if asked for, the ranks; then the report in its place."""
    inputs, options = job.inputs, job.inputs.options
    texts = inputs.dataset if inputs.dataset is not None and inputs.dataset.kind == "text" else None
    summary, ranked = summary_of(whole, job.names, truth=job.truth, ranks=options.ranks, seed=options.seed, texts=texts)
    if about.get("coherence") is not None:
        summary["coherence"] = about.pop("coherence")
    checkpoints = [
        {"name": c.name, "step": c.step, **shared["checkpoints"].get(c.name, {})}
        for c in (inputs.checkpoints if inputs.uses_all else inputs.checkpoints[inputs.focus : inputs.focus + 1])
    ]
    epochs = inputs.epochs is not None and (not inputs.checkpoints or _from_epochs(job))
    meta = {
        "report": REPORT,
        "schema_version": VERSION,
        "memdiag_version": memdiag.__version__,
        "options": {"source": source, **dataclasses.asdict(options)},
        "seed": options.seed,
        "kind": job.kind,
        "scores": list(job.names),
        "checkpoint": checkpoints,
        "read_at": inputs.one.name if inputs.checkpoints else None,
        "trajectory": "at presentation time" if epochs else "at the checkpoints" if set(SERIES) <= job.over else None,
        "dataset": None
        if inputs.dataset is None
        else {
            "name": inputs.dataset.name,
            "fingerprint": shared["dataset"],
            "columns": inputs.dataset.columns,
            "n_examples": inputs.dataset.n_examples,
        },
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": devices.describe(devices.resolve(options.device)),
        "dtype": about.get("dtype"),
        "summary": summary,
        "identity": shared,
    }
    if "zlib_len" in job.names or "zlib_ratio" in job.names:
        import zlib

        meta["zlib"] = zlib.ZLIB_RUNTIME_VERSION
    row = job.row(ranked=options.ranks)

    def with_ranks() -> Iterator[pa.RecordBatch]:
        start = 0
        for table in tables.stream(whole):
            columns = {name: _values(table[name]) for name in table.column_names}
            part = slice(start, start + table.num_rows)
            columns |= {f"{name}{RANK}": ranked[name][part] for name in ranked}
            start += table.num_rows
            yield tables.from_columns(row, {k: _null_as_nan(v) for k, v in columns.items()})

    if options.ranks:
        tables.write(out, row, with_ranks(), meta)
    else:
        tables.join(out, row, [whole], meta)


def _null_as_nan(values: Any) -> Any:
    """Truth values with gaps come from Arrow as objects."""
    if isinstance(values, np.ndarray) and values.dtype == object:
        return np.array([np.nan if value is None else float(value) for value in values])
    return values


def plan(source: str, options: ScoreOptions) -> dict[str, object]:
    """What `run` would take, extrapolated from one timed batch; writes nothing."""
    inputs = open_inputs(source, options)
    if not inputs.checkpoints:
        job = _job_of_trajectory(inputs)
        return {"scores": ", ".join(job.names), "epochs": len(trajectory.epochs(inputs.epochs or ""))}
    assert inputs.dataset is not None
    target = devices.resolve(options.device)
    model = inputs.one.load(dtype=options.dtype, device=str(target))
    job = job_of(inputs, model)
    without_depth = dataclasses.replace(job, at_one=tuple(n for n in job.at_one if n != "prediction_depth"))
    looker = looker_of(without_depth, inputs.focus, model)
    probe = _probe(inputs, model, 512)
    looker(probe)  # the first call of everything is slow
    began = time.perf_counter()
    looker(probe)
    per_example = (time.perf_counter() - began) / len(probe.rows)
    n = inputs.dataset.n_examples
    return {
        "kind": job.kind,
        "scores": ", ".join(job.names),
        "checkpoints": len(job.visited),
        "read_at": inputs.one.name,
        "data": inputs.dataset.name,
        "rows": n,
        "device": devices.describe(target),
        "seconds_expected": round(per_example * n * len(job.visited), 1),
        "memory_expected_mb": round(devices.peak_memory() / 2**20),
        "disk_expected_kb": round(n * len(job.names) * 8 / 1024 + 20),
    }
