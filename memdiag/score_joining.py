"""Put what all checkpoints showed of a piece side by side, add the trajectory, and compute what is over both.

Axes: b example, c checkpoint, e epoch.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from memdiag import scores, scoring, tables, trajectory
from memdiag.errors import InputError
from memdiag.score_job import Job, path_of
from memdiag.scoring import OVER_CHECKPOINTS, SERIES, Arrays

log = logging.getLogger("memdiag")


def joined(job: Job, directory: Path) -> Iterator[dict[str, Any]]:
    """The report's columns, piece by piece, in the order of the rows."""
    inputs = job.inputs
    if not inputs.checkpoints:
        yield from _of_trajectory(job)
        return
    assert inputs.dataset is not None
    epochs = _Epochs(inputs.epochs) if inputs.epochs is not None and reads_epochs(job) else None
    eta = inputs.learning_rates()
    if eta is None and "tracin_self" in job.names:
        log.info("learning rates are not known: tracin_self takes 1 for every checkpoint")
    for piece in range(-(-inputs.dataset.n_examples // job.piece)):
        parts = [tables.read(path_of(directory, index, piece)).table for index in job.visited]
        one = parts[job.visited.index(inputs.focus)]
        columns = {name: values_of(one[name]) for name in (*job.keys(), *job.at_one) if name in one.column_names}
        rows = one["row"].to_numpy()
        arrays: Arrays = {
            many: np.stack([values_of(part[single]) for part in parts])
            for single, many in OVER_CHECKPOINTS.items()
            if single in job.over
        }
        arrays["learning_rates"] = np.ones(len(parts)) if eta is None else eta
        if set(SERIES) <= job.over:
            arrays |= {name: np.stack([values_of(part[name]) for part in parts]) for name in SERIES}
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


def values_of(column: Any) -> Any:
    """A column as an array, or as a list of names."""
    if pa.types.is_string(column.type):
        return column.to_pylist()
    return column.to_numpy()


def reads_epochs(job: Job) -> bool:
    """Whether a score is read from the trajectory, if there is one."""
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
        while self._held is not None and len(rows):
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
        if chunk["label"] is not None:
            columns["label"] = chunk["label"][keep]
        if truth is not None:
            unknown = [row for row in columns["row"].tolist() if row not in truth]
            if unknown:
                told = f"row {unknown[0]} of the trajectory is not among the examples that --truth is known of"
                raise InputError(f"{job.inputs.epochs}: {told}; give the data that was trained on with --data")
            columns["truth"] = np.array([truth[row] for row in columns["row"].tolist()], dtype=bool)
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
