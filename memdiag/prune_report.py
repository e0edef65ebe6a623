"""`memdiag prune-memorizers`: which neurons hold the corrupted labels, and what happens when they go?

The rows of its reports, its options, and the Python API. The formulas are in `attribution`, `fourier` and `pruning`.
Importing this module does not import torch, so that `memdiag schema` need not wait for it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from memdiag import tables
from memdiag.errors import InputError, one_line, unknown
from memdiag.keywords import options_from
from memdiag.progress import Progress
from memdiag.tables import column

DEFAULT_TASK = "task:modular-addition"
TASKS = ("modular-addition", "modular-subtraction", "modular-multiplication")
# what neurons can be ordered by -> which end goes first
RANKINGS = {
    "memorization": "high",
    "ablation": "high",
    "grad_act": "high",
    "direct_logit": "high",
    "ipr": "low",
    "norm_product": "low",
    "activation_norm": "high",
    "margin_corrupted": "high",
    "ablation_corrupted": "high",
    "grad_act_corrupted": "high",
}


@dataclass(frozen=True)
class NeuronRow:
    """One row per neuron, in the order of the layers; with several seeds, seed by seed."""

    report: ClassVar[str] = "prune-memorizers.neurons"
    schema_version: ClassVar[int] = 1

    seed: int | None = column(pa.int64(), "of the network; null for a checkpoint", nullable=True)
    layer: int = column(pa.int32(), "0 for the first layer of neurons, counted along the forward pass")
    layer_name: str = column(pa.string(), "the module that reads the neurons, whose weights are their effect")
    neuron: int = column(pa.int32(), "its number in the layer, from 0")
    memorization: float | None = column(
        pa.float64(),
        "margin_corrupted - margin_clean; without truth margin_train - margin_heldout; high: a memorizer",
        unit="logit",
        nullable=True,
    )
    margin_corrupted: float | None = column(
        pa.float64(),
        "what it adds to the label's logit over the runner-up's, mean over corrupted training examples",
        unit="logit",
        nullable=True,
    )
    margin_clean: float | None = column(
        pa.float64(),
        "the same over the other training examples (without truth: over all of them)",
        unit="logit",
        nullable=True,
    )
    margin_heldout: float | None = column(pa.float64(), "the same over held-out examples", unit="logit", nullable=True)
    ablation_corrupted: float | None = column(
        pa.float64(),
        "exact rise of the mean loss over corrupted examples when it is set to 0",
        unit="loss",
        nullable=True,
    )
    ablation_clean: float | None = column(pa.float64(), "the same over clean examples", unit="loss", nullable=True)
    ablation_heldout: float | None = column(pa.float64(), "the same, held out", unit="loss", nullable=True)
    grad_act_corrupted: float | None = column(
        pa.float64(), "first-order estimate of ablation_corrupted; unsafe where examples are fitted", unit="loss",
        nullable=True,
    )  # fmt: skip
    grad_act_clean: float | None = column(pa.float64(), "the same over clean examples", unit="loss", nullable=True)
    grad_act_heldout: float | None = column(pa.float64(), "the same, held out", unit="loss", nullable=True)
    direct_logit: float | None = column(
        pa.float64(),
        "what it adds to the recorded label's logit over the true label's, mean over corrupted examples",
        unit="logit",
        nullable=True,
    )
    activation_norm: float | None = column(
        pa.float64(), "mean |activation| over training examples x norm of its outgoing weights", nullable=True
    )
    norm_product: float = column(
        pa.float64(), "norms of outgoing and incoming weights multiplied: the baseline that sees no data"
    )
    ipr: float | None = column(
        pa.float64(),
        "inverse participation ratio of its three curves, near 0 noise, 1 a wave; null unless periodic task, or dead",
        nullable=True,
    )
    frequency: int | None = column(
        pa.int32(), "its strongest frequency; null unless periodic task, or dead", nullable=True
    )
    dead: bool = column(pa.bool_(), "its incoming or outgoing weights are shorter than 0.001 (gated: the product)")
    pruned_at: int = column(pa.int32(), "its place in the order of pruning, 1 goes first")
    is_memorizer: bool | None = column(
        pa.bool_(), "it is among those that the chosen cut takes away; null if no cut was chosen", nullable=True
    )


@dataclass(frozen=True)
class PruningRow:
    """One row per order x number pruned (x draw of the random order). n_pruned = 0 is there for every order."""

    report: ClassVar[str] = "prune-memorizers.pruning"
    schema_version: ClassVar[int] = 1

    seed: int | None = column(pa.int64(), "of the network; null for a checkpoint", nullable=True)
    order: str = column(pa.string(), "memorization (or what --rank-by names), reversed, norm_product, ipr, or random")
    draw: int | None = column(pa.int32(), "number of the random order; null for the others", nullable=True)
    n_pruned: int = column(pa.int32(), "neurons taken away", unit="neuron")
    fraction_pruned: float = column(pa.float64(), "n_pruned / all neurons")
    train_corrupted_acc: float | None = column(
        pa.float64(),
        "agreement with the recorded labels of corrupted training examples (tokens, of a language model)",
        nullable=True,
    )
    train_corrupted_acc_lo: float | None = column(
        pa.float64(), "lower end of its 95 % Clopper-Pearson interval; null for tokens", nullable=True
    )
    train_corrupted_acc_hi: float | None = column(pa.float64(), "upper end", nullable=True)
    train_corrupted_exact: float | None = column(
        pa.float64(),
        "language model: share of suspect examples that greedy decoding reproduces to the last token",
        nullable=True,
    )
    corrupted_true_acc: float | None = column(
        pa.float64(), "agreement with the true labels of the same examples", nullable=True
    )
    train_clean_acc: float | None = column(
        pa.float64(), "agreement on the other training examples (without truth: on all)", nullable=True
    )
    train_clean_acc_lo: float | None = column(pa.float64(), "lower end of its interval", nullable=True)
    train_clean_acc_hi: float | None = column(pa.float64(), "upper end", nullable=True)
    test_acc: float | None = column(pa.float64(), "agreement on held-out examples", nullable=True)
    test_acc_lo: float | None = column(pa.float64(), "lower end of its interval", nullable=True)
    test_acc_hi: float | None = column(pa.float64(), "upper end", nullable=True)
    train_corrupted_loss: float | None = column(
        pa.float64(), "mean loss of the recorded labels; the metadata says which loss", unit="loss", nullable=True
    )
    train_clean_loss: float | None = column(pa.float64(), "the same, clean examples", unit="loss", nullable=True)
    test_loss: float | None = column(pa.float64(), "the same, held out", unit="loss", nullable=True)
    chosen: bool = column(pa.bool_(), "the cut that was chosen, on training data alone")


@dataclass(frozen=True)
class DynamicsRow:
    """One row per seed x step looked at while the network trained."""

    report: ClassVar[str] = "prune-memorizers.dynamics"
    schema_version: ClassVar[int] = 1

    seed: int = column(pa.int64(), "of the network")
    step: int = column(pa.int64(), "updates made", unit="step")
    train_acc: float = column(pa.float64(), "agreement with the recorded labels of all training pairs")
    train_corrupted_acc: float | None = column(pa.float64(), "the same of those whose label was redrawn", nullable=True)
    corrupted_true_acc: float | None = column(pa.float64(), "their agreement with the true label", nullable=True)
    train_clean_acc: float | None = column(pa.float64(), "agreement on the other training pairs", nullable=True)
    test_acc: float | None = column(pa.float64(), "agreement on held-out pairs", nullable=True)
    train_loss: float = column(pa.float64(), "mean squared error over pairs and classes", unit="loss")
    test_loss: float | None = column(pa.float64(), "the same, held out", unit="loss", nullable=True)
    mean_ipr: float | None = column(pa.float64(), "over neurons that are not dead", nullable=True)
    weight_norm: float = column(pa.float64(), "Euclidean norm of all weights")
    phase: str = column(
        pa.string(),
        "coexistence, partial_inversion, full_inversion, memorization, forgetting or confusion, by corrupted agreement",
    )


@dataclass(frozen=True)
class FiltrationRow:
    """--filter-frequencies: the network with only the strongest frequency of each curve, and with all but it."""

    report: ClassVar[str] = "prune-memorizers.filtration"
    schema_version: ClassVar[int] = 1

    seed: int = column(pa.int64(), "of the network")
    part: str = column(pa.string(), "whole, dominant (the strongest frequency of each curve) or remainder (the rest)")
    train_corrupted_acc: float | None = column(
        pa.float64(), "agreement with the recorded labels of corrupted pairs", nullable=True
    )
    corrupted_true_acc: float | None = column(pa.float64(), "with their true labels", nullable=True)
    train_clean_acc: float | None = column(pa.float64(), "on the other training pairs", nullable=True)
    test_acc: float | None = column(pa.float64(), "on held-out pairs", nullable=True)


@dataclass(frozen=True)
class PruneOptions:
    """Options of `memdiag prune-memorizers`; the field names are the command's option names."""

    data: str | None = None
    # with a checkpoint
    test: str | None = None
    truth: str | None = None
    suspects: str | None = None
    columns: str | None = None
    model: str | None = None
    layers: str | None = None
    tokenizer: str | None = None
    prefix_tokens: int | None = None
    max_length: int | None = None
    limit: int | None = None
    ablation: bool = False
    points: int | None = None
    batch_size: str = "auto"
    device: str = "auto"
    # without one
    corruption: float | None = None
    corruption_law: str | None = None
    train_fraction: float | None = None
    width: int | None = None
    activation: str | None = None
    norm: str | None = None
    dropout: float | None = None
    weight_decay: float | None = None
    lr: float | None = None
    steps: int | None = None
    train_batch_size: int | None = None
    eval_every: int | None = None
    seeds: str | None = None
    filter_frequencies: bool = False
    # both
    rank_by: str = "memorization"
    keep_clean: float = 0.99
    fraction: float | None = None
    n: int | None = None
    draws: int = 20
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank_by not in RANKINGS:
            raise unknown("ranking for --rank-by", self.rank_by, RANKINGS)
        if not 0 < self.keep_clean <= 1:
            raise InputError(f"--keep-clean must be above 0 and at most 1, got {self.keep_clean}")
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise InputError(f"--fraction must be a share from 0 to 1, got {self.fraction}")
        if self.n is not None and self.n < 0:
            raise InputError(f"--n must be at least 0, got {self.n}")
        if self.n is not None and self.fraction is not None:
            raise InputError("--n and --fraction both say how many neurons go; give one of them")
        if self.draws < 20:
            raise InputError(f"--draws must be at least 20, so that a 5 to 95 % band means something, got {self.draws}")
        for name in ("draws", "points"):
            value = getattr(self, name)
            if value is not None and value > 10_000:
                raise InputError(f"--{name} must be at most 10000, got {one_line(str(value), 40)}")
        for name in ("points", "max_length", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.prefix_tokens is not None and self.prefix_tokens < 0:
            raise InputError(f"--prefix-tokens must be at least 0, got {self.prefix_tokens}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must be at least 0 and less than 2^32, got {self.seed}")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise InputError(f"--batch-size must be auto or a number of examples above 0, got {self.batch_size!r}")

    def check_for(self, checkpoint: str | None) -> None:
        """Refuse options that go with a checkpoint where there is none, and the other way round."""
        names = [field.name for field in dataclasses.fields(self)]
        first, last = ("corruption", "rank_by") if checkpoint is not None else ("test", "corruption")
        for name in names[names.index(first) : names.index(last)]:
            default = PruneOptions.__dataclass_fields__[name].default
            if getattr(self, name) != default and name not in ("device",):
                option = f"--{name.replace('_', '-')}"
                if checkpoint is None:
                    raise InputError(f"{option} goes with a checkpoint; give one, or leave it out to train on a task")
                raise InputError(f"{option} is about training; leave it out, or give no checkpoint (got {checkpoint})")

    def identity(self) -> dict[str, Any]:
        """The options that change numbers; paths do not, their contents are fingerprinted."""
        same_numbers = {"data", "test", "tokenizer", "device", "batch_size", "suspects"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in same_numbers}


REPORTS: dict[str, type] = {
    "pruning": PruningRow,
    "neurons": NeuronRow,
    "dynamics": DynamicsRow,
    "filtration": FiltrationRow,
}


@dataclass(frozen=True)
class Pruned:
    """What the command wrote, report by report."""

    pruning: tables.Report
    neurons: tables.Report
    dynamics: tables.Report | None  # of networks trained here
    filtration: tables.Report | None  # with filter_frequencies
    path: Path | None  # the directory

    @property
    def table(self) -> pa.Table:
        """The rows of the pruning report."""
        return self.pruning.table

    @property
    def meta(self) -> dict[str, Any]:
        """How it was made, with the headline figures under `networks`."""
        return self.pruning.meta

    def to_pandas(self) -> Any:
        """The pruning report as a pandas DataFrame."""
        return self.pruning.to_pandas()


def prune_memorizers(
    checkpoint: str | Path | None = None,
    *,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Pruned:
    """Find the neurons that memorize, take them away one after the other, and see what is lost.

    Args:
        checkpoint: a classifier or causal language model; None trains a two-layer network on modular arithmetic with
            corrupted labels, where truth is known.
        out: the directory to write to; None keeps the reports in memory only, and no checkpoint is written.
        force: replace what stands at `out`.
        progress: shows how far it is.
        **options: the fields of PruneOptions, i.e. the options of `memdiag prune-memorizers`; `columns` may be a dict,
            `seeds` a list.
    Returns:
        The reports, rows as PruningRow, NeuronRow, DynamicsRow and FiltrationRow.
    Raises:
        InputError: the inputs are at fault.
        IncompleteError: it could not be finished; the same call goes on after the last finished network.
    """
    settings = options_from(PruneOptions, options)
    given = None if checkpoint is None else str(checkpoint)
    if out is not None:
        return measure(given, settings, out=Path(out), force=force, progress=progress)
    with tempfile.TemporaryDirectory() as directory:
        found = measure(given, settings, out=Path(directory) / "prune-memorizers", progress=progress)
        parts = {
            name: report and dataclasses.replace(report, path=None)
            for name in REPORTS
            for report in [getattr(found, name)]
        }
        return Pruned(**parts, path=None)


def measure(
    checkpoint: str | None,
    options: PruneOptions,
    *,
    out: Path,
    force: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """`prune_memorizers` with its options as one value; writes to `out` and returns what it wrote."""
    from memdiag import prune_run

    options.check_for(checkpoint)
    return prune_run.run(checkpoint, options, out, force=force, progress=progress or Progress())


def plan(checkpoint: str | None, options: PruneOptions) -> dict[str, object]:
    """What `measure` would do, after opening everything and trying a few steps: time, memory, disk."""
    from memdiag import prune_run

    options.check_for(checkpoint)
    return prune_run.plan(checkpoint, options)


def options_of(report: tables.Report) -> tuple[str | None, PruneOptions]:
    """The checkpoint (None: trained here) and options that a report was made with.

    Raises:
        InputError: it was made by a version with other options.
    """
    recorded = dict(report.meta.get("options") or {})
    checkpoint = recorded.pop("checkpoint", None)
    try:
        return checkpoint, PruneOptions(**recorded)
    except (TypeError, AttributeError) as error:
        raise InputError(f"made by memdiag {report.meta.get('memdiag_version')} with other options: {error}") from None
