"""`memdiag train`: train a small model on any dataset, with the trajectory of every example.

The rows of its reports, its options, and the Python API. The trajectory's rows are in `trajectory`, what an update is
computed from in `supervised`, the loop in `training`. Importing this module does not import torch, so that
`memdiag schema` need not wait for it.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from memdiag import tables
from memdiag.errors import InputError, unknown
from memdiag.keywords import options_from
from memdiag.progress import Progress
from memdiag.tables import column

ARCHS = ("mlp", "cnn", "transformer")
SCHEDULES, OPTIMIZERS = ("cosine", "linear", "constant"), ("sgd", "adamw")
DTYPES = ("auto", "float32", "bfloat16")
MOST, DEEPEST = 10**9, 1000  # of whole numbers but the limit; hidden layers
HIGHEST = 1e30  # of rates: beyond 3e38 torch cannot multiply float32 by them
DEFAULT_CONFIG = "gpt2-tiny"


@dataclass(frozen=True)
class ExampleRow:
    """One row per example that was trained on."""

    report: ClassVar[str] = "train.examples"
    schema_version: ClassVar[int] = 1

    row: int = column(pa.int64(), "row of the example in the dataset, from 0")
    example_id: str = column(pa.string(), "the example's id, as in every report")
    label: int | None = column(pa.int64(), "label trained on; null for a language model", nullable=True)
    true_label: int | None = column(
        pa.int64(), "the dataset's true_label, or its label before --corruption; null: not known", nullable=True
    )
    corrupted: bool | None = column(
        pa.bool_(), "the label was replaced by a wrong one, here or by the dataset's word; null: not known",
        nullable=True,
    )  # fmt: skip


@dataclass(frozen=True)
class HistoryRow:
    """One row per epoch. Training figures are those of its presentations, each before the update that it is part of."""

    report: ClassVar[str] = "train.history"
    schema_version: ClassVar[int] = 1

    epoch: int = column(pa.int32(), "pass over the data, from 0")
    step: int = column(pa.int64(), "updates made when its last example had been used", unit="step")
    lr: float = column(pa.float64(), "learning rate of the last of them")
    train_loss: float = column(
        pa.float64(), "mean over examples of the loss; language model: of the mean over tokens", unit="nat"
    )
    train_accuracy: float = column(
        pa.float64(), "share of examples that are right; language model: at every token"
    )  # fmt: skip
    test_loss: float | None = column(
        pa.float64(), "the same held out, in eval mode, at the last save of this epoch; null: there was none",
        unit="nat", nullable=True,
    )  # fmt: skip
    test_accuracy: float | None = column(pa.float64(), "likewise", nullable=True)
    corrupted_accuracy: float | None = column(
        pa.float64(), "share of corrupted examples whose wrong label is predicted; null: none is known", nullable=True
    )
    clean_accuracy: float | None = column(
        pa.float64(), "share of the other examples that are right; null: none is known", nullable=True
    )
    examples_per_s: float = column(
        pa.float64(), "speed; the one column that another run does not repeat", unit="example/s"
    )


@dataclass(frozen=True)
class TrainOptions:
    """Options of `memdiag train`; the field names are the command's option names. None: see the command's help."""

    data: str | None = None
    test: str | None = None
    test_fraction: float | None = None
    columns: str | None = None
    limit: int | None = None
    corruption: float = 0.0
    # the model
    arch: str | None = None
    model: str | None = None
    config: str | None = None
    width: int | None = None
    depth: int | None = None
    standardize: bool | None = None
    tokenizer: str | None = None
    max_length: int | None = None
    # the loop
    epochs: int | None = None
    batch_size: int | None = None
    save_every: int | None = None
    optimizer: str | None = None
    lr: float | None = None
    schedule: str = "cosine"
    warmup: int | None = None
    weight_decay: float | None = None
    clip: float | None = None
    # the machine
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("arch", ARCHS), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) is not None and getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if self.dtype not in DTYPES:
            raise unknown("dtype for training", self.dtype, DTYPES)
        given = [f"--{name}" for name in ("arch", "model", "config") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} each say what model it is; give one of them")
        if self.arch is None and given:
            for name in ("width", "depth", "standardize"):
                if getattr(self, name) is not None:
                    raise InputError(f"--{name} is for --arch; with {given[0]} the model is what that says")
        for name in ("epochs", "batch_size", "save_every", "limit", "width", "depth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("epochs", "batch_size", "save_every", "warmup", "width", "depth"):
            most = DEEPEST if name == "depth" else MOST
            if (getattr(self, name) or 0) > most:
                raise InputError(f"--{name.replace('_', '-')} must be at most {most}, got {getattr(self, name)}")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"--max-length must be at least 2, got {self.max_length}")
        if self.warmup is not None and self.warmup < 0:
            raise InputError(f"--warmup must be at least 0, got {self.warmup}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InputError(f"--lr must be a finite number above 0, got {self.lr}")
        for name in ("weight_decay", "clip"):
            if not 0 <= (getattr(self, name) or 0.0) < math.inf:
                raise InputError(f"--{name.replace('_', '-')} must be a finite number >= 0, got {getattr(self, name)}")
        for name in ("lr", "weight_decay"):
            if (getattr(self, name) or 0.0) > HIGHEST:
                raise InputError(f"--{name.replace('_', '-')} must be at most {HIGHEST:g}, got {getattr(self, name)}")
        if not 0 <= self.corruption <= 1:
            raise InputError(f"--corruption is a share of the labels, 0 to 1; got {self.corruption}")
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise InputError(f"--test-fraction must be more than 0 and less than 1, got {self.test_fraction}")
        if self.test is not None and self.test_fraction is not None:
            raise InputError("--test and --test-fraction both say what is held out; give one of them")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must be at least 0 and less than 2^32, got {self.seed}")

    def identity(self) -> dict[str, Any]:
        """The options that change numbers; paths do not, their contents are fingerprinted."""
        same_numbers = {"data", "test", "tokenizer", "config", "device"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in same_numbers}


@dataclass(frozen=True)
class Trained:
    """What the command wrote."""

    history: tables.Report
    examples: tables.Report
    summary: dict[str, Any]
    path: Path | None  # the directory

    @property
    def report(self) -> tables.Report:
        """The history."""
        return self.history

    @property
    def table(self) -> pa.Table:
        """The history's rows."""
        return self.history.table

    @property
    def meta(self) -> dict[str, Any]:
        """How it was made."""
        return self.history.meta

    def to_pandas(self) -> Any:
        """The history's rows as a pandas DataFrame."""
        return self.history.to_pandas()


REPORTS: dict[str, type] = {"history": HistoryRow, "examples": ExampleRow}


def train(
    data: str | Path | None = None,
    *,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Trained:
    """Train a classifier or a small language model, and record the trajectory of every example.

    Args:
        data: a path, or `task:NAME?key=value`.
        out: the directory to write to; None keeps the two reports in memory only, and neither checkpoints nor the
            trajectory.
        force: replace what stands at `out`.
        progress: shows how far it is.
        **options: the fields of TrainOptions, i.e. the options of `memdiag train`; `columns` may be a dict.
    Returns:
        The history, rows as HistoryRow, the examples, rows as ExampleRow, and a summary.
    Raises:
        InputError: the inputs are at fault.
        IncompleteError: it could not be finished: no space is left, or the loss is not a number any more.
    """
    options["data"] = data
    settings = options_from(TrainOptions, options)
    if out is not None:
        return measure(settings, out=Path(out), force=force, progress=progress)
    with tempfile.TemporaryDirectory() as directory:
        found = measure(settings, out=Path(directory) / "train", progress=progress)
        history, examples = (dataclasses.replace(r, path=None) for r in (found.history, found.examples))
        return Trained(history, examples, found.summary, path=None)


def measure(
    options: TrainOptions, *, out: Path, force: bool = False, progress: Progress | None = None
) -> Trained:  # fmt: skip
    """`train` with its options as one value; writes to `out` and returns what it wrote."""
    from memdiag import train_run

    found: Trained = train_run.run(options, out, force=force, progress=progress or Progress())
    return found


def plan(options: TrainOptions) -> dict[str, object]:
    """What `measure` would do, after opening everything and trying a few updates: time, memory, disk."""
    from memdiag import train_plan

    found: dict[str, object] = train_plan.plan(options)
    return found


def options_of(report: tables.Report) -> TrainOptions:
    """The options that a report was made with.

    Raises:
        InputError: it was made by a version with other options.
    """
    try:
        return TrainOptions(**dict(report.meta.get("options") or {}))
    except (TypeError, AttributeError) as error:
        raise InputError(f"made by memdiag {report.meta.get('memdiag_version')} with other options: {error}") from None
