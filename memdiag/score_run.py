"""Carry out `memdiag score`: piece by piece of the dataset, checkpoint by checkpoint, on any number of processes.

A piece is some consecutive rows; what a checkpoint shows of it is a file of its own, so that an interrupted run goes on
and processes need not wait for each other. At the end the pieces of all checkpoints are put side by side.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers

import memdiag
from memdiag import device as devices
from memdiag import ranks, tables, trajectory
from memdiag.progress import Progress
from memdiag.score_inputs import Inputs, open_inputs
from memdiag.score_job import Job, job_of, job_of_trajectory, probe_of
from memdiag.score_joining import joined, reads_epochs, values_of
from memdiag.score_looking import coherence_of, look, looker_of
from memdiag.score_report import RANK, REPORT, VERSION, ScoreOptions, ScoreRow
from memdiag.score_summary import summary_of
from memdiag.scoring import SERIES

log = logging.getLogger("memdiag")


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
        job = job_of_trajectory(inputs)
    else:
        target = devices.resolve(inputs.options.device)
        first = inputs.one.load(dtype=inputs.options.dtype, device=str(target))
        job = job_of(inputs, first)
        about = {"dtype": str(next(first.parameters()).dtype).removeprefix("torch.")}
        for index in job.visited:
            model = first
            if index != inputs.focus:
                model = inputs.checkpoints[index].load(dtype=inputs.options.dtype, device=str(target))
            look(job, index, model, directory, progress)
        ranks.gather(None)  # every process has written its pieces
        if {"grand", "gradnorm"} & set(job.names):
            about["coherence"] = coherence_of(job, first, directory, progress)
    if parts is None:
        return
    whole = parts.directory / "whole.parquet"
    plain = job.row(ranked=False)
    tables.write(
        whole, plain, (tables.from_columns(plain, found) for found in joined(job, directory)), {"report": REPORT}
    )
    _finish(job, source, whole, out, shared, about)


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
    epochs = inputs.epochs is not None and (not inputs.checkpoints or reads_epochs(job))
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
            columns = {name: values_of(table[name]) for name in table.column_names}
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
        job = job_of_trajectory(inputs)
        return {"scores": ", ".join(job.names), "epochs": len(trajectory.epochs(inputs.epochs or ""))}
    assert inputs.dataset is not None
    target = devices.resolve(options.device)
    model = inputs.one.load(dtype=options.dtype, device=str(target))
    job = job_of(inputs, model)
    without_depth = dataclasses.replace(job, at_one=tuple(n for n in job.at_one if n != "prediction_depth"))
    looker = looker_of(without_depth, inputs.focus, model)
    probe = probe_of(inputs, model, 512)
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
