"""`memdiag train-gapt`: train a causal language model that memorizes and compresses in turns, beside its controls.

The rows of its reports, its options, and the Python API. The gate is in `gapt`, the loss in `regulariser`, the loop in
`training`. Importing this module does not import torch, so that `memdiag schema` need not wait for it.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from memdiag import gapt, tables
from memdiag.errors import InputError, unknown
from memdiag.keywords import options_from
from memdiag.progress import Progress
from memdiag.tables import column

DEFAULT_DATA, DEFAULT_CONFIG = "task:pydoc", "gpt2-tiny"
DTYPES = ("auto", "float32", "bfloat16")
HOLD_OUT_EVERY = 10  # without --val, the example before every tenth is held out
COMPARE_SEEDS = "0,1,2,3,4"


@dataclass(frozen=True)
class HistoryRow:
    """One row per update: what it saw before the weights moved, and what was held out after some."""

    report: ClassVar[str] = "train-gapt.history"
    schema_version: ClassVar[int] = 1

    step: int = column(pa.int64(), "updates made, this one included", unit="step")
    tokens: int = column(pa.int64(), "tokens predicted so far, over all processes", unit="token")
    phase: str = column(pa.string(), "memorize (the loss is the cross-entropy) or compress (and w times the entropy)")
    switch_reason: str | None = column(
        pa.string(),
        "why the phase switches after this update: ce_plateau, mbe_plateau, ce_spike, or schedule; null: it does not",
        nullable=True,
    )
    ce: float = column(pa.float64(), "cross-entropy, mean over the tokens predicted", unit="nat")
    mbe: float | None = column(
        pa.float64(), "entropy of patches, mean over the active layers; null: no patch", unit="nat", nullable=True
    )
    mbe_layers: tuple[float | None, ...] = column(
        pa.list_(pa.float64()), "the same of every layer, 0 (embedding) to L; the metadata names the active ones",
        unit="nat",
    )  # fmt: skip
    gradient_ratio: float | None = column(
        pa.float64(),
        "|w g_MBE| / |g_CE|, while compressing, every --ratio-every updates; else null",
        nullable=True,
    )
    lr: float = column(pa.float64(), "learning rate")
    grad_norm: float = column(pa.float64(), "length of the gradient before clipping")
    val_ce: float | None = column(
        pa.float64(), "held out cross-entropy after this update; null: not measured", unit="nat", nullable=True
    )
    val_mbe: float | None = column(
        pa.float64(), "held out entropy, mean over the active layers; null: not measured", unit="nat", nullable=True
    )
    tokens_per_s: float = column(
        pa.float64(), "speed of this update; the one column that another run does not repeat", unit="token/s"
    )


@dataclass(frozen=True)
class CompareRow:
    """--compare: one row per measure x arm. Every arm is trained on the same seeds, so differences are paired."""

    report: ClassVar[str] = "train-gapt.compare"
    schema_version: ClassVar[int] = 1

    measure: str = column(
        pa.string(), "val_ce, val_mbe, train_ce (last tenth of the updates), val_mbe_other (layers that are not active)"
    )
    arm: str = column(pa.string(), "the gate: paper or relative, and its controls none, constant, random")
    mean: float | None = column(pa.float64(), "mean over seeds, at the last update", unit="nat", nullable=True)
    lo: float | None = column(
        pa.float64(), "lower end of its 95 % t interval over seeds; null for fewer than 3", unit="nat", nullable=True
    )
    hi: float | None = column(pa.float64(), "upper end", unit="nat", nullable=True)
    difference: float | None = column(
        pa.float64(), "gated arm minus this arm, mean of the paired differences; null in its own row", unit="nat",
        nullable=True,
    )  # fmt: skip
    difference_lo: float | None = column(
        pa.float64(), "lower end of its 95 % t interval; null for fewer than 3 seeds", unit="nat", nullable=True
    )
    difference_hi: float | None = column(pa.float64(), "upper end", unit="nat", nullable=True)
    n_seeds: int = column(pa.int32(), "seeds of each arm")
    n_lower: int | None = column(
        pa.int32(), "seeds in which the gated arm is lower; null in its own row", nullable=True
    )
    share_compress: float = column(pa.float64(), "share of the updates that compressed, mean over seeds")
    weight: float = column(pa.float64(), "w, mean over seeds; of constant, the gated arm's w times its share")


@dataclass(frozen=True)
class TrainGaptOptions:
    """Options of `memdiag train-gapt`; the field names are the command's option names."""

    config: str | None = None
    data: str | None = None
    val: str | None = None
    columns: str | None = None
    limit: int | None = None
    tokenizer: str | None = None
    max_length: int | None = None
    documents: bool = False
    # the loop
    steps: int = 1000
    save_every: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    lr: float | None = None
    schedule: str = "cosine"
    warmup: int | None = None
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip: float = 1.0
    # the method
    gate: str = "paper"
    weight: float = 1.0
    layers: str | None = None
    patch_size: int = 8
    alternate: bool = False
    ce_patience: int | None = None
    mbe_patience: int | None = None
    ce_delta: float = 0.01
    mbe_delta: float = 0.01
    spike: float = 0.1
    smoothing: float = 0.9
    reset_on_enter: bool | None = None
    reset_on_exit: bool = False
    share: float = 0.5
    ratio_every: int = 50
    # the controls
    compare: bool = False
    seeds: str | None = None
    # the machine
    shard: bool = False
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        self.rule()
        if self.dtype not in DTYPES:
            raise unknown("dtype for training", self.dtype, DTYPES)
        if not 0 <= self.weight < math.inf:
            raise InputError(f"--weight must be a finite number >= 0, got {self.weight}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InputError(f"--lr must be a finite number above 0, got {self.lr}")
        for name in ("patch_size", "batch_size", "accumulate", "save_every", "limit", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.ratio_every < 0 or (self.warmup or 0) < 0:
            raise InputError("--ratio-every and --warmup must be at least 0")
        if self.max_length is not None and self.max_length < max(2, self.patch_size):
            raise InputError(
                f"--max-length {self.max_length} is shorter than a patch of {self.patch_size} tokens; use longer "
                "sequences or a smaller --patch-size"
            )
        if self.alternate and self.accumulate < 2:
            raise InputError("--alternate gives each part of an update one loss; it needs --accumulate of at least 2")
        if self.compare and self.gate not in ("paper", "relative"):
            raise InputError(f"--compare puts a gate beside its controls; --gate {self.gate} is one of them")
        if self.seeds is not None and not self.compare:
            raise InputError("--seeds goes with --compare; for one run give --seed")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must be at least 0 and less than 2^32, got {self.seed}")
        self.seed_list()

    def rule(self) -> gapt.Rule:
        """When the phase switches."""
        same = {field.name for field in dataclasses.fields(gapt.Rule)} & set(self.__dataclass_fields__)
        given = {name: getattr(self, name) for name in same}
        for name, most, share in (("ce_patience", 125, 20), ("mbe_patience", 75, 33)):
            if given[name] is None:  # a short run would be over before it switches
                given[name] = max(1, min(most, self.steps // share))
        return gapt.Rule(**given)

    def seed_list(self) -> list[int]:
        """The seeds of --compare.

        Raises:
            InputError: they cannot be read, or one comes twice.
        """
        texts = [text.strip() for text in (self.seeds or COMPARE_SEEDS).split(",")]
        if not all(text.isdecimal() and len(text) < 10 for text in texts) or len(set(map(int, texts))) < len(texts):
            raise InputError(f"--seeds {self.seeds!r}: wanted different whole numbers like 0,1,2")
        return [int(text) for text in texts]

    def identity(self) -> dict[str, Any]:
        """The options that change numbers; paths do not, their contents are fingerprinted."""
        same_numbers = {"data", "val", "tokenizer", "config", "device", "shard"}
        if not self.alternate:
            same_numbers.add("accumulate")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in same_numbers}


@dataclass(frozen=True)
class TrainedGapt:
    """What the command wrote."""

    history: tables.Report | None  # null with compare, where every arm has its own
    compare: tables.Report | None
    summary: dict[str, Any]
    path: Path | None  # the directory

    @property
    def report(self) -> tables.Report:
        """The report of the run, or of the comparison."""
        found = self.history or self.compare
        assert found is not None
        return found

    @property
    def table(self) -> pa.Table:
        """Its rows."""
        return self.report.table

    @property
    def meta(self) -> dict[str, Any]:
        """How it was made."""
        return self.report.meta

    def to_pandas(self) -> Any:
        """Its rows as a pandas DataFrame."""
        return self.report.to_pandas()


REPORTS: dict[str, type] = {"history": HistoryRow, "compare": CompareRow}


def train_gapt(
    checkpoint: str | Path | None = None,
    *,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> TrainedGapt:
    """Train a causal language model with gated phase transitions (GAPT, arXiv:2505.08727).

    Args:
        checkpoint: the model to go on training; None draws new weights for `config`.
        out: the directory to write to; None keeps the report in memory only, and no checkpoint is written.
        force: replace what stands at `out`.
        progress: shows how far it is.
        **options: the fields of TrainGaptOptions, i.e. the options of `memdiag train-gapt`; `columns` may be a dict,
            `seeds` a list.
    Returns:
        The report, rows as HistoryRow (with compare: CompareRow), and a summary.
    Raises:
        InputError: the inputs are at fault.
        IncompleteError: it could not be finished: no space is left, or the loss is not a number any more.
    """
    settings = options_from(TrainGaptOptions, options)
    given = None if checkpoint is None else str(checkpoint)
    if out is not None:
        return measure(given, settings, out=Path(out), force=force, progress=progress)
    with tempfile.TemporaryDirectory() as directory:
        found = measure(given, settings, out=Path(directory) / "train-gapt", progress=progress)
        history, compare = (r and dataclasses.replace(r, path=None) for r in (found.history, found.compare))
        return TrainedGapt(history, compare, found.summary, path=None)


def measure(
    checkpoint: str | None,
    options: TrainGaptOptions,
    *,
    out: Path,
    force: bool = False,
    progress: Progress | None = None,
) -> TrainedGapt:
    """`train_gapt` with its options as one value; writes to `out` and returns what it wrote."""
    from memdiag import train_gapt_compare, train_gapt_run

    carry_out = train_gapt_compare.run if options.compare else train_gapt_run.run
    return carry_out(checkpoint, options, out, force=force, progress=progress or Progress())


def plan(checkpoint: str | None, options: TrainGaptOptions) -> dict[str, object]:
    """What `measure` would do, after opening everything and trying a few updates: time, memory, disk."""
    from memdiag import train_gapt_compare, train_gapt_run

    return (train_gapt_compare.plan if options.compare else train_gapt_run.plan)(checkpoint, options)


def options_of(report: tables.Report) -> tuple[str | None, TrainGaptOptions]:
    """The checkpoint (None: new weights) and options that a report was made with.

    Raises:
        InputError: it was made by a version with other options.
    """
    recorded = dict(report.meta.get("options") or {})
    checkpoint = recorded.pop("checkpoint", None)
    try:
        return checkpoint, TrainGaptOptions(**recorded)
    except (TypeError, AttributeError) as error:
        raise InputError(f"made by memdiag {report.meta.get('memdiag_version')} with other options: {error}") from None
