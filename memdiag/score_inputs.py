"""What `memdiag score` reads: checkpoints, a trajectory or both, the dataset, and the labels that were trained on."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag import scores, tables, trajectory
from memdiag.checkpoint import Checkpoint, inner_steps, open_checkpoints, tokenizer_fingerprint
from memdiag.dataset import Batch, Dataset, Example, open_dataset
from memdiag.entropy_report import parse_columns
from memdiag.errors import InputError
from memdiag.score_report import ScoreOptions
from memdiag.train_report import ExampleRow, HistoryRow

log = logging.getLogger("memdiag")
EXAMPLES, HISTORY = "examples.parquet", "history.parquet"  # of a run of memdiag train


@dataclass(frozen=True, eq=False)
class Trained:
    """What a run of `memdiag train` was trained on."""

    dataset: dict[str, Any]  # name, fingerprint, columns
    rows: NDArray[np.int64]  # (n,) ascending
    labels: NDArray[np.int64] | None  # (n,) as trained on; None for a language model
    corrupted: NDArray[np.bool_] | None  # (n,) None: not known
    lr: dict[int, float]  # by the number of updates made

    def at(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where some rows of the dataset are among those trained on; -1 for one that is not."""
        where = np.searchsorted(self.rows, rows).clip(max=len(self.rows) - 1)
        return np.where(self.rows[where] == rows, where, -1)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything that was opened."""

    checkpoints: list[Checkpoint]  # of the run, in step order; one; or none for a trajectory alone
    focus: int  # the one that scores of a single checkpoint are read from
    epochs: Path | None  # the folder of a trajectory of this dataset
    dataset: Dataset | None  # none for a trajectory alone
    trained: Trained | None  # if it is of this dataset
    reference: Checkpoint | None
    options: ScoreOptions
    only_trained: bool = False  # of the dataset, the rows that were trained on

    @property
    def one(self) -> Checkpoint:
        """The checkpoint that scores of a single one are read from."""
        return self.checkpoints[self.focus]

    def learning_rates(self) -> NDArray[np.float64] | None:
        """(c,) of the last update before each checkpoint; None where they are not known."""
        if self.trained is None or any(c.step is None for c in self.checkpoints):
            return None
        known = self.trained.lr
        steps = sorted(known)
        if not steps:
            return None
        found = [known[next((s for s in steps if s >= (c.step or 0)), steps[-1])] for c in self.checkpoints]
        return np.array(found, dtype=np.float64)

    def with_labels(self, batch: Batch) -> Batch:
        """The batch with the labels that were trained on, and the truth that goes with them."""
        if self.trained is None:
            return batch
        at = self.trained.at(batch.rows)
        found = batch
        if self.trained.labels is not None and batch.labels is not None:
            found = dataclasses.replace(found, labels=np.where(at < 0, batch.labels, self.trained.labels[at]))
        if self.truth_of_run:
            assert self.trained.corrupted is not None
            found = dataclasses.replace(found, truth=np.where(at < 0, False, self.trained.corrupted[at]))
        return found

    @property
    def truth_of_run(self) -> bool:
        """Whether --truth corrupted means what `memdiag train --corruption` did."""
        return self.options.truth == "corrupted" and self.trained is not None and self.trained.corrupted is not None

    def examples(self, *, keep: Callable[[int], bool] | None = None, **how: Any) -> Iterator[Example]:
        """The examples to be scored; arguments as Dataset.examples."""
        assert self.dataset is not None
        if not self.only_trained or self.trained is None:
            return self.dataset.examples(keep=keep, **how)
        there = np.zeros(self.dataset.n_examples, dtype=bool)
        there[self.trained.rows[self.trained.rows < len(there)]] = True
        return self.dataset.examples(keep=lambda row: bool(there[row]) and (keep is None or keep(row)), **how)

    def identity(self) -> dict[str, Any]:
        """What decides the numbers."""
        used = self.checkpoints if self.uses_all else self.checkpoints[self.focus : self.focus + 1]
        found: dict[str, Any] = {
            "checkpoints": {c.name: _identity(c, self.options) for c in used},
            "dataset": None if self.dataset is None else self.dataset.fingerprint(),
        }
        if self.reference is not None:
            found["reference"] = self.reference.fingerprint()
        if self.epochs is not None:
            found["trajectory"] = [_digest(path) for path in trajectory.epochs(self.epochs)]
        return found

    @property
    def uses_all(self) -> bool:
        """Whether a score is read from every checkpoint of the run."""
        asked = self.options.names()
        if len(self.checkpoints) < 2:
            return False
        return (
            asked is None
            or any(scores.load(name).NEEDS in ("checkpoints", "trajectory") for name in asked)
            or ("loss_curvature" in asked)
        )


def _identity(checkpoint: Checkpoint, options: ScoreOptions) -> dict[str, str | None]:
    tokenizer = checkpoint.tokenizer(options.tokenizer)
    return {"weights": checkpoint.fingerprint(), "tokenizer": tokenizer_fingerprint(tokenizer)}


def _digest(path: Path) -> str:
    import hashlib

    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_inputs(source: str, options: ScoreOptions) -> Inputs:
    """Open everything the command will read.

    Raises:
        InputError: anything that is not there, not readable or does not fit.
    """
    root = Path(source)
    if _is_trajectory(root):
        return _open_trajectory(root, options)
    checkpoints = open_checkpoints(source, model=options.model, steps=options.steps)
    focus = _focus(checkpoints, options)
    run = root if (root / EXAMPLES).is_file() else root.absolute().parent
    trained = _trained(run) if (run / EXAMPLES).is_file() else None
    name = options.data or (trained and trained.dataset.get("name")) or _default_data(checkpoints[focus])
    if options.data is None:
        log.info("no --data: scoring %s", name)
    limit = options.limit
    if options.data is None and trained is not None:  # what was trained on, and no more
        limit = min(limit or sys.maxsize, int(trained.rows[-1]) + 1)
    dataset = open_dataset(name, columns=_roles(options, trained, name), limit=limit)
    same = trained is not None and trained.dataset.get("fingerprint") == dataset.fingerprint()
    if trained is not None and not same:
        log.info("%s was trained on other data than %s: labels and trajectory are not those of the run", run, name)
    epochs = run / trajectory.FOLDER
    with_epochs = same and len(checkpoints) > 1 and bool(trajectory.written(epochs))
    reference = None
    if options.reference is not None:
        found = open_checkpoints(options.reference)
        if len(found) > 1:
            raise InputError(f"--reference {options.reference} is a run of {len(found)} checkpoints; give one of them")
        reference = found[0]
    return Inputs(
        checkpoints,
        focus,
        epochs if with_epochs else None,
        dataset,
        trained if same else None,
        reference,
        dataclasses.replace(options, data=str(name)),
        only_trained=same and options.data is None,
    )


def _is_trajectory(root: Path) -> bool:
    if not root.is_dir():
        return False
    inside = bool(trajectory.written(root)) or (
        bool(trajectory.written(root / trajectory.FOLDER)) and not inner_steps(root)
    )
    return inside


def _open_trajectory(root: Path, options: ScoreOptions) -> Inputs:
    """Nothing but a trajectory; --data is opened only to see whether it belongs to it, and for its truth."""
    folder = root if trajectory.written(root) else root / trajectory.FOLDER
    paths = trajectory.epochs(folder)
    meta = tables.read_meta(paths[0])
    recorded = meta.get("dataset")
    told: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    dataset = None
    run = folder.absolute().parent
    trained = _trained(run) if (run / EXAMPLES).is_file() else None
    if trained is not None and trained.dataset.get("fingerprint") != told.get("fingerprint"):
        log.info("%s is of other data than %s: it is left aside", run / EXAMPLES, folder)
        trained = None
    if options.data is not None:
        dataset = open_dataset(options.data, columns=_roles(options, trained, options.data), limit=options.limit)
        fingerprint = told.get("fingerprint")
        if fingerprint is not None and fingerprint != dataset.fingerprint():
            raise InputError(
                f"{folder}: is the trajectory of {told.get('name')}, not of --data {options.data} (their fingerprints "
                "differ); give the data that was trained on, or leave --data out"
            )
    if options.reference is not None:
        raise InputError("--reference needs a checkpoint of a language model to compare with; this is a trajectory")
    return Inputs([], 0, folder, dataset, trained, None, options)


def _focus(checkpoints: list[Checkpoint], options: ScoreOptions) -> int:
    if options.at is None:
        return len(checkpoints) - 1
    steps = [c.step for c in checkpoints]
    if options.at not in steps:
        near = min((s for s in steps if s is not None), key=lambda s: abs(s - (options.at or 0)), default=None)
        hint = f"; the nearest is {near}" if near is not None else ""
        raise InputError(f"--at {options.at}: there is no checkpoint of that step{hint}")
    return steps.index(options.at)


def _roles(options: ScoreOptions, trained: Trained | None, name: str) -> dict[str, str]:
    """The columns as the user says, and the column of --truth unless it is the run's own."""
    roles = parse_columns(options.columns) or {}
    if options.columns is None and trained is not None and trained.dataset.get("name") == name:
        roles = {role: found for role, found in dict(trained.dataset.get("columns") or {}).items() if role != "truth"}
    own = options.truth == "corrupted" and trained is not None and trained.corrupted is not None
    if options.truth is not None and not own:
        roles = roles | {"truth": options.truth}
    return roles


def _default_data(checkpoint: Checkpoint) -> str:
    if checkpoint.task is not None:
        return checkpoint.task
    if "vocab_size" in checkpoint.config or "text_config" in checkpoint.config:
        return "task:pydoc"
    raise InputError(f"{checkpoint.name} is no text model and says no task of its own; give --data FILE")


def _trained(run: Path) -> Trained:
    """What stands in the reports of `memdiag train`.

    Raises:
        InputError: they are damaged.
    """
    examples = _read(run / EXAMPLES, ExampleRow)
    table, recorded = examples.table, examples.meta.get("dataset")
    if not isinstance(recorded, dict):
        raise InputError(f"{run / EXAMPLES} is damaged: it does not say of which dataset it is; make it again")
    rows = table["row"].to_numpy()
    if not len(rows) or not (np.diff(rows, prepend=-1) > 0).all():
        raise InputError(f"{run / EXAMPLES} is damaged: it has no rows, or they do not ascend; make it again")
    labels = _all_or_none(run / EXAMPLES, table["label"])
    corrupted = _all_or_none(run / EXAMPLES, table["corrupted"])
    lr: dict[int, float] = {}
    if (run / HISTORY).is_file():
        history = _read(run / HISTORY, HistoryRow).table
        lr = dict(zip(history["step"].to_pylist(), history["lr"].to_pylist()))
        if not np.isfinite(list(lr.values())).all():
            raise InputError(f"{run / HISTORY} is damaged: a learning rate is not finite; make it again")
    return Trained(recorded, rows, labels, corrupted, lr)


def _read(path: Path, row: type) -> tables.Report:
    """A report of `memdiag train` with the columns that it should have."""
    found, wanted = tables.read(path), row.report  # type: ignore[attr-defined]
    if found.meta["report"] != wanted:
        raise InputError(f"{path}: is a report of {found.meta['report']}, wanted {wanted}; move it elsewhere")
    trajectory.check_columns(path, found.table.schema, row)
    trajectory.check_nulls(path, found.table, row)
    return found


def _all_or_none(path: Path, column: pa.ChunkedArray) -> NDArray[Any] | None:
    """A column that is known of every row or of none."""
    if column.null_count == len(column):
        return None
    if column.null_count:
        raise InputError(f"{path} is damaged: a column has gaps; make it again")
    found: NDArray[Any] = column.to_numpy()
    return found
