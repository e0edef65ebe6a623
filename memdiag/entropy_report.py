"""`memdiag entropy`: how compressed are the hidden states, layer by layer, over a run of checkpoints?

The rows of the report, and the way from a checkpoint and a dataset to them. The formulas are in `mbe` and `spectrum`.
Importing this module does not import torch, so that `memdiag schema` need not wait for it.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from memdiag import tables
from memdiag.errors import InputError, unknown
from memdiag.keywords import options_from
from memdiag.progress import Progress
from memdiag.tables import column

if TYPE_CHECKING:
    from memdiag.checkpoint import Checkpoint
    from memdiag.dataset import Dataset

log = logging.getLogger("memdiag")

UNITS = ("patch", "sequence", "dataset")


@dataclass(frozen=True)
class EntropyRow:
    """One row per checkpoint × layer × unit (the data set unit twice, by pooling), in that order."""

    report: ClassVar[str] = "entropy"
    schema_version: ClassVar[int] = 1

    checkpoint: str = column(pa.string(), "name of the checkpoint's directory or file")
    step: int | None = column(pa.int64(), "training step, from the checkpoint's name", unit="step", nullable=True)
    layer: int = column(pa.int32(), "0 is the embedding output, L the last block's output before the final norm")
    layer_name: str = column(pa.string(), "the module whose output (or, at layer 0, input) was taken")
    unit: str = column(pa.string(), "what one spectrum is of: patch, sequence or dataset")
    pooling: str | None = column(pa.string(), "dataset unit: one vector an example, mean or last token", nullable=True)
    patch_size: int | None = column(pa.int32(), "tokens in a patch; patch unit only", unit="token", nullable=True)
    alpha: float = column(pa.float64(), "order of the entropies mbe*")
    n_examples: int = column(pa.int64(), "examples seen", unit="example")
    truncated: int = column(pa.int64(), "of these, cut at --max-length", unit="example")
    n_units: int = column(pa.int64(), "spectra averaged over")
    n_undefined: int = column(pa.int64(), "units left out because they are all zero")
    n_tokens: int = column(pa.int64(), "tokens in the units", unit="token")
    n_tokens_dropped: int = column(pa.int64(), "tokens in no unit: tails that do not fill a patch", unit="token")
    n_dims: int = column(pa.int32(), "width of the hidden states, d")
    mbe: float | None = column(
        pa.float64(), "matrix-based entropy S_alpha of a unit, mean over units", unit="nat", nullable=True
    )
    mbe_se: float | None = column(
        pa.float64(),
        "standard error of mbe over examples (patches of one example are not independent); null for one example",
        unit="nat",
        nullable=True,
    )
    mbe_lo: float | None = column(pa.float64(), "lower end of mbe's 95 % t interval", unit="nat", nullable=True)
    mbe_hi: float | None = column(pa.float64(), "upper end of mbe's 95 % t interval", unit="nat", nullable=True)
    mbe_max: float | None = column(
        pa.float64(), "the most mbe can be: ln min(n, d) of a unit, mean over units", unit="nat", nullable=True
    )
    mbe_centred: float | None = column(
        pa.float64(),
        "as mbe, after subtracting the unit's mean vector; null if its rows are equal",
        unit="nat",
        nullable=True,
    )
    mbe_row_normalised: float | None = column(
        pa.float64(), "as mbe, with every row scaled to length 1", unit="nat", nullable=True
    )
    rankme: float | None = column(
        pa.float64(), "exp entropy of the singular values (RankMe); sequence unit: needs --spectra", nullable=True
    )
    effective_rank: float | None = column(
        pa.float64(), "exp S_1, entropy of the eigenvalues; sequence unit: needs --spectra", nullable=True
    )
    participation_ratio: float | None = column(pa.float64(), "exp S_2 = 1 / sum p^2, mean over units", nullable=True)
    alpha_req: float | None = column(
        pa.float64(), "decay exponent of the centred covariance's spectrum; dataset unit", nullable=True
    )
    alpha_req_r2: float | None = column(pa.float64(), "R2 of the alpha_req fit", nullable=True)
    n_limited: bool | None = column(
        pa.bool_(), "dataset unit: fewer than 2 d examples, alpha_req and isotropy reflect n, not d", nullable=True
    )
    isotropy: float | None = column(
        pa.float64(), "IsoScore of the centred covariance, 0 (a line) to 1 (a ball); dataset unit", nullable=True
    )
    mean_cosine: float | None = column(
        pa.float64(), "mean cosine of two different rows of a unit, mean over units", nullable=True
    )
    cross_entropy: float | None = column(
        pa.float64(),
        "the model's mean loss per predicted token (or per labelled example); null if it predicts no labels",
        unit="nat",
        nullable=True,
    )


@dataclass(frozen=True)
class GradientRow:
    """Two kinds of row: `cosine`, one per checkpoint × layer × matrix × pair of gradients; and, for a run,
    `oscillation`, which sums up each of these series over the checkpoints."""

    report: ClassVar[str] = "entropy.gradients"
    schema_version: ClassVar[int] = 1

    kind: str = column(pa.string(), "cosine (of one checkpoint) or oscillation (of a series over the run)")
    checkpoint: str | None = column(pa.string(), "name of the checkpoint; null in oscillation rows", nullable=True)
    step: int | None = column(pa.int64(), "training step; null in oscillation rows", unit="step", nullable=True)
    layer: int | None = column(pa.int32(), "l, 1 to L; null for the whole model", nullable=True)
    layer_name: str | None = column(pa.string(), "the block's path; null for the whole model", nullable=True)
    matrix: str | None = column(
        pa.string(), "the parameter's path in the block; null for all of the layer's matrices as one", nullable=True
    )
    objective_pair: str = column(pa.string(), "ce_mbe: cross-entropy and MBE_l; ce_ce: cross-entropy twice")
    batches: str = column(pa.string(), "same: both gradients on one batch; across: on two different ones")
    cosine: float | None = column(
        pa.float64(), "mean cosine; positive: a cross-entropy step also lowers MBE_l (compresses)", nullable=True
    )
    cosine_se: float | None = column(
        pa.float64(),
        "its standard error over pairs of batches; too small for across, whose pairs share batches",
        nullable=True,
    )
    n_pairs: int | None = column(pa.int32(), "pairs of batches averaged over", nullable=True)
    ce_grad_norm: float | None = column(pa.float64(), "norm of the cross-entropy gradient", nullable=True)
    mbe_grad_norm: float | None = column(pa.float64(), "norm of the MBE_l gradient", nullable=True)
    n_points: int | None = column(pa.int32(), "checkpoints in the series", nullable=True)
    std: float | None = column(pa.float64(), "standard deviation of the cosine over the run", nullable=True)
    std_null_lo: float | None = column(
        pa.float64(), "5 % point of std if only sampling noise (cosine_se) moved the cosine", nullable=True
    )
    std_null_hi: float | None = column(pa.float64(), "95 % point of the same", nullable=True)
    zero_crossings_per_100: float | None = column(
        pa.float64(), "sign changes of the cosine", unit="1/(100 step)", nullable=True
    )
    zero_crossings_per_100_null_lo: float | None = column(
        pa.float64(), "5 % point over 300 random orders of the same values", unit="1/(100 step)", nullable=True
    )
    zero_crossings_per_100_null_hi: float | None = column(
        pa.float64(), "95 % point of the same", unit="1/(100 step)", nullable=True
    )
    spectral_peak_over_mean: float | None = column(
        pa.float64(), "largest over mean power of the series; null unless steps are evenly spaced", nullable=True
    )
    spectral_peak_over_mean_null_lo: float | None = column(
        pa.float64(), "5 % point over 300 random orders of the same values", nullable=True
    )
    spectral_peak_over_mean_null_hi: float | None = column(pa.float64(), "95 % point of the same", nullable=True)


@dataclass(frozen=True)
class EntropyOptions:
    """Options of `memdiag entropy`; the field names are the command's option names."""

    data: str | None = None
    columns: str | None = None
    model: str | None = None
    steps: str | None = None
    layers: str | None = None
    tokenizer: str | None = None
    unit: str = "auto"
    patch_size: int = 8
    alpha: float = 2.0
    spectra: bool = False
    max_length: int | None = None
    limit: int | None = None
    gradients: bool = False
    gradient_batches: int = 4
    gradient_batch_size: int = 8
    dtype: str = "auto"
    seed: int = 0
    device: str = "auto"
    batch_size: str = "auto"

    def __post_init__(self) -> None:
        if self.unit not in ("auto", *UNITS, "all"):
            raise unknown("unit", self.unit, ("auto", *UNITS, "all"))
        if not 0 < self.alpha < float("inf"):
            raise InputError(f"--alpha must be a finite number above 0, got {self.alpha}")
        for name in ("patch_size", "max_length", "limit", "gradient_batches", "gradient_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise InputError(f"--batch-size must be auto or a number of examples above 0, got {self.batch_size!r}")

    @property
    def units(self) -> tuple[str, ...]:
        return UNITS if self.unit == "all" else (self.unit,)

    def identity(self) -> dict[str, Any]:
        """The options that change numbers; paths do not, their contents are fingerprinted."""
        same_numbers = {"data", "tokenizer", "device", "batch_size"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in same_numbers}


@dataclass(frozen=True)
class Inputs:
    """The opened checkpoints and dataset of one run of the command."""

    checkpoints: list[Checkpoint]
    dataset: Dataset
    options: EntropyOptions


def open_inputs(checkpoint: str | Path, options: EntropyOptions) -> Inputs:
    """Open everything the command will read; the options with `data` and `unit` filled in.

    Raises:
        InputError: anything that is not there, not readable or does not fit.
    """
    from memdiag.checkpoint import inner_steps, open_checkpoints
    from memdiag.dataset import open_dataset

    checkpoints = open_checkpoints(checkpoint, model=options.model, steps=options.steps)
    if len(checkpoints) == 1 and (inner := inner_steps(checkpoint)):
        log.info("%s holds %d checkpoints as well; --steps 0: measures the run", checkpoint, len(inner))
    if options.data is None:
        options = dataclasses.replace(options, data=_default_data(checkpoints[0]))
    assert options.data is not None
    dataset = open_dataset(options.data, columns=parse_columns(options.columns), limit=options.limit)
    if options.unit == "auto":
        has_tokens = dataset.kind != "features" or checkpoints[0].kind == "huggingface"
        options = dataclasses.replace(options, unit="patch" if has_tokens else "dataset")
    return Inputs(checkpoints, dataset, options)


def _default_data(checkpoint: Checkpoint) -> str:
    task = checkpoint.task
    if task is None and ("vocab_size" in checkpoint.config or "text_config" in checkpoint.config):
        task = "task:pydoc"
    if task is None:
        raise InputError(f"{checkpoint.name} is no text model and says no task of its own; give --data FILE")
    log.info("no --data: measuring on %s", task)
    return task


def parse_columns(text: str | None) -> dict[str, str] | None:
    """ "text=body,id=uid" as {"text": "body", "id": "uid"}; "id=" switches a role off."""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not sign or not role.strip() for role, sign, _ in pairs):
        raise InputError(f"--columns {text!r} is not of the form text=body,label=y")
    return {role.strip(): name.strip() for role, _, name in pairs}


def entropy(
    checkpoint: str | Path,
    *,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> tables.Report:
    """Measure the matrix-based entropy of every layer, of one checkpoint or of each one of a run.

    Args:
        checkpoint: path of a checkpoint or a run.
        out: the report's path; None keeps it in memory only.
        force: replace what stands at `out`.
        progress: shows how far it is.
        **options: the fields of EntropyOptions, i.e. the options of `memdiag entropy`; `columns` may be a dict.
    Returns:
        The report, rows as EntropyRow. With gradients=True a second one is written beside `out`, rows as
        GradientRow.
    Raises:
        InputError: the inputs are at fault.
        IncompleteError: it could not be finished; the same call goes on from the last finished checkpoint.
    """
    settings = options_from(EntropyOptions, options)
    if out is not None:
        return measure(checkpoint, settings, out=Path(out), force=force, progress=progress)
    with tempfile.TemporaryDirectory() as directory:
        report = measure(checkpoint, settings, out=Path(directory) / "entropy.parquet", progress=progress)
        return dataclasses.replace(report, path=None)


def measure(
    checkpoint: str | Path,
    options: EntropyOptions,
    *,
    out: Path,
    force: bool = False,
    progress: Progress | None = None,
) -> tables.Report:
    """`entropy` with its options as one value; writes to `out` and returns what it wrote."""
    from memdiag import entropy_run

    inputs = open_inputs(checkpoint, options)
    return entropy_run.run(inputs, str(checkpoint), out, force=force, progress=progress or Progress())


def plan(checkpoint: str | Path, options: EntropyOptions) -> dict[str, object]:
    """What `measure` would do, after opening everything and trying one batch: rows, time, memory, disk."""
    from memdiag import entropy_run

    return entropy_run.plan(open_inputs(checkpoint, options))


def options_of(report: tables.Report) -> tuple[str, EntropyOptions]:
    """The checkpoint and options that a report was made with.

    Raises:
        InputError: it is the report of another command, or of a version with other options.
    """
    recorded = dict(report.meta.get("options") or {})
    checkpoint = recorded.pop("checkpoint", None)
    if report.meta.get("report") != EntropyRow.report or not isinstance(checkpoint, str):
        raise InputError(
            f"a report {report.meta.get('report')!r} cannot be run again; give one of entropy or prune-memorizers"
        )
    try:
        return checkpoint, EntropyOptions(**recorded)
    except (TypeError, AttributeError) as error:
        raise InputError(f"made by memdiag {report.meta.get('memdiag_version')} with other options: {error}") from None
