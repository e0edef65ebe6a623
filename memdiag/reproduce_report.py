"""`memdiag reproduce NAME`: does the paper hold here? Each claim beside the paper's figure and a control.

The rows of its reports, its options, and the Python API. What is trained and what is claimed stands in a module for
each paper. Importing this module does not import torch, so that `memdiag schema` need not wait for it.
"""

from __future__ import annotations

import dataclasses
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

GAPT = {"gapt-lm": "lm", "gapt-multiplication": "multiplication", "gapt-conflict": "conflict"}  # name -> its module
TAIL = "long-tail"
EXPERIMENTS = (*GAPT, TAIL)  # which have arms and effects; grok has claims
SEEDS = {"grok": "0,1,2", "gapt-conflict": "0,1,2,3,4,5,6,7", TAIL: "0,1,2,3,4,5"} | dict.fromkeys(
    ("gapt-lm", "gapt-multiplication"), "0,1,2,3,4"
)  # by default
PAPER_SEEDS = {TAIL: ",".join(map(str, range(20)))}  # by default of the preset paper, where they are others
NAMES = ("grok", *EXPERIMENTS)
PRESETS = ("smoke", "paper")
MOST_SEEDS = 1000


@dataclass(frozen=True)
class ClaimRow:
    """One row per claim, in the order in which the paper is read."""

    report: ClassVar[str] = "reproduce.claims"
    schema_version: ClassVar[int] = 1

    name: str = column(pa.string(), "what --only takes")
    statement: str = column(pa.string(), "what is claimed, in our words")
    setting: str = column(pa.string(), "the networks it is looked at in")
    measure: str = column(pa.string(), "what is measured")
    paper: float | None = column(pa.float64(), "the paper's figure; null if it gives none", nullable=True)
    paper_note: str = column(
        pa.string(), "where that figure stands: text, figure (read off), notebook (the authors' output), or not given"
    )
    ours: float | None = column(
        pa.float64(), "mean over seeds; null if it is undefined, or never happened, in one of them", nullable=True
    )
    ours_lo: float | None = column(
        pa.float64(), "lower end of its 95 % t interval over seeds; null for fewer than 3", nullable=True
    )
    ours_hi: float | None = column(pa.float64(), "upper end", nullable=True)
    n_seeds: int = column(pa.int32(), "networks of that setting, each with its own data")
    control: str | None = column(pa.string(), "what it is held against; null for none", nullable=True)
    control_value: float | None = column(
        pa.float64(), "the same measure of the control, mean over seeds", nullable=True
    )
    low: float | None = column(pa.float64(), "least value that counts as holding; null for no limit", nullable=True)
    high: float | None = column(pa.float64(), "largest value that counts as holding; null for no limit", nullable=True)
    band_from: str = column(
        pa.string(),
        "paper (its figure and a tolerance), reference (an earlier run of ours, where the paper gives no figure), "
        "definition (of a phase, or of an order), or none",
    )
    verdict: str = column(
        pa.string(), "holds (ours lies in the band), differs, or not_comparable (undefined, or without a band)"
    )


@dataclass(frozen=True)
class PhaseRow:
    """One row per network trained: those of the claims, setting by setting, then those of the phase map."""

    report: ClassVar[str] = "reproduce.phases"
    schema_version: ClassVar[int] = 1

    network: str = column(pa.string(), "name of the setting")
    in_map: bool = column(pa.bool_(), "it is a cell of the phase map")
    model: str = column(pa.string(), "mlp, with one hidden layer, or transformer")
    operation: str = column(pa.string(), "addition or multiplication")
    p: int = column(pa.int32(), "the modulus")
    width: int = column(pa.int32(), "hidden neurons; of a transformer, the width of its stream")
    train_fraction: float = column(pa.float64(), "share of all pairs trained on, alpha")
    corruption: float = column(pa.float64(), "share of training labels redrawn, xi")
    weight_decay: float = column(pa.float64(), "decoupled, as in AdamW")
    dropout: float = column(pa.float64(), "share dropped before the activation")
    norm: str = column(pa.string(), "after the activation: none, batch or layer")
    activation: str = column(pa.string(), "square or relu")
    lr: float = column(pa.float64(), "learning rate")
    train_batch_size: int | None = column(pa.int32(), "pairs in an update; null for all of them", nullable=True)
    steps: int = column(pa.int64(), "updates", unit="step")
    dtype: str = column(pa.string(), "of the matrix products in training")
    seed: int = column(pa.int64(), "of the network and its data")
    train_acc: float = column(pa.float64(), "agreement with the recorded labels of all training pairs")
    train_corrupted_acc: float | None = column(pa.float64(), "the same of those whose label was redrawn", nullable=True)
    train_clean_acc: float | None = column(pa.float64(), "the same of the others", nullable=True)
    test_acc: float | None = column(pa.float64(), "agreement on held-out pairs", nullable=True)
    mean_ipr: float | None = column(
        pa.float64(), "inverse participation ratio, mean over neurons that are not dead; null if all are", nullable=True
    )
    n_low: int = column(pa.int32(), "neurons that are not periodic, IPR below 0.1 or the null's 99.99 % point")
    n_high: int = column(pa.int32(), "periodic neurons, IPR of at least 0.5")
    phase: str = column(
        pa.string(),
        "coexistence, partial_inversion, full_inversion, memorization, forgetting or confusion, by corrupted agreement",
    )
    phase_paper_rule: str = column(
        pa.string(), "the same by the paper's rule, train accuracy, under which inversion cannot show at a small xi"
    )


@dataclass(frozen=True)
class EffectRow:
    """One row per effect x arm: the baseline, the treated arm, then each control."""

    report: ClassVar[str] = "reproduce.effects"
    schema_version: ClassVar[int] = 1

    name: str = column(pa.string(), "what --only takes")
    statement: str = column(pa.string(), "what the paper says, in our words")
    measure: str = column(pa.string(), "what is measured at the end of a run, as in runs.parquet")
    arm: str = column(pa.string(), "how it was trained")
    role: str = column(pa.string(), "baseline, treated (the paper's method) or control")
    paper: float | None = column(pa.float64(), "the paper's figure for this arm; null if it gives none", nullable=True)
    paper_note: str = column(pa.string(), "where that figure stands, and what to know about it")
    ours: float | None = column(pa.float64(), "mean over seeds; null if undefined in one of them", nullable=True)
    ours_lo: float | None = column(
        pa.float64(), "lower end of its 95 % t interval over seeds; null for fewer than 3", nullable=True
    )
    ours_hi: float | None = column(pa.float64(), "upper end", nullable=True)
    baseline: str | None = column(pa.string(), "the arm that the change is against; null for a baseline", nullable=True)
    paper_change: float | None = column(pa.float64(), "the paper's change; null if it gives none", nullable=True)
    change: float | None = column(
        pa.float64(), "mean over seeds of arm minus baseline, paired; a share of the baseline's mean if is_relative",
        nullable=True,
    )  # fmt: skip
    change_lo: float | None = column(
        pa.float64(), "lower end of its 95 % t interval; null for fewer than 3 seeds", nullable=True
    )
    change_hi: float | None = column(pa.float64(), "upper end", nullable=True)
    is_relative: bool = column(pa.bool_(), "changes are shares of the baseline's mean")
    beyond: float | None = column(
        pa.float64(), "of a control: the treated arm's change minus this arm's, paired; else null", nullable=True
    )
    beyond_lo: float | None = column(pa.float64(), "lower end of its 95 % t interval", nullable=True)
    beyond_hi: float | None = column(pa.float64(), "upper end", nullable=True)
    n_seeds: int = column(pa.int32(), "runs of each arm, each with its own data and initial weights")
    n_higher: int | None = column(
        pa.int32(), "seeds in which the arm is above its baseline; null for a baseline", nullable=True
    )
    verdict: str | None = column(
        pa.string(),
        "treated arm: agrees (the interval of the change lies on the paper's side of 0), disagrees, inconclusive",
        nullable=True,
    )


@dataclass(frozen=True)
class RunRow:
    """One row per arm x seed x measure."""

    report: ClassVar[str] = "reproduce.runs"
    schema_version: ClassVar[int] = 1

    arm: str = column(pa.string(), "how it was trained")
    seed: int = column(pa.int64(), "of its data and initial weights")
    measure: str = column(pa.string(), "what was measured at the end of the run")
    value: float | None = column(pa.float64(), "its value; null if undefined", nullable=True)


REPORTS: dict[str, type] = {"claims": ClaimRow, "phases": PhaseRow}
EFFECT_REPORTS: dict[str, type] = {"effects": EffectRow, "runs": RunRow}


@dataclass(frozen=True)
class ReproduceOptions:
    """Options of `memdiag reproduce`; the field names are the command's option names."""

    preset: str = "smoke"
    seeds: str | None = None
    only: str | None = None
    no_map: bool = False
    dtype: str = "float32"
    data: str | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise unknown("preset", self.preset, PRESETS)
        if self.dtype not in ("float32", "bfloat16"):
            raise unknown("dtype for training", self.dtype, ("float32", "bfloat16"))
        if self.seeds is not None:
            self.seed_list()

    def settled_for(self, name: str) -> ReproduceOptions:
        """With the seeds that this paper takes by default.

        Raises:
            InputError: a name or an option that does not go with it.
        """
        if name not in NAMES:
            raise unknown("paper to reproduce", name, NAMES)
        if name in EXPERIMENTS and (self.no_map or self.dtype != "float32"):
            raise InputError(f"--{'no-map' if self.no_map else 'dtype'} goes with grok, not with {name}; leave it out")
        if name != "gapt-lm" and self.data is not None:
            raise InputError(f"--data goes with gapt-lm; {name} makes its own data")
        if self.seeds is not None:
            return self
        own = PAPER_SEEDS if self.preset == "paper" else {}
        return dataclasses.replace(self, seeds=own.get(name, SEEDS[name]))

    def seed_list(self) -> list[int]:
        """The seeds as numbers.

        Raises:
            InputError: they cannot be read, are negative, or one comes twice.
        """
        texts = [text.strip() for text in (self.seeds or "").split(",")]
        if not all(text.isdecimal() and len(text) < 10 for text in texts) or len(set(map(int, texts))) < len(texts):
            raise InputError(f"--seeds {self.seeds!r}: wanted different whole numbers like 0,1,2")
        if len(texts) > MOST_SEEDS:
            raise InputError(f"--seeds are {len(texts)}; wanted at most {MOST_SEEDS}")
        return [int(text) for text in texts]

    def only_list(self) -> list[str] | None:
        """The claims asked for by name, as given; None for all."""
        if self.only is None:
            return None
        names = [text.strip() for text in self.only.split(",") if text.strip()]
        if not names:
            raise InputError(f"--only {self.only!r} names no claim; leave it out for all of them")
        return names


@dataclass(frozen=True)
class Reproduced:
    """What the command wrote."""

    claims: tables.Report
    phases: tables.Report
    path: Path | None  # the directory

    @property
    def table(self) -> pa.Table:
        """The rows of the claims report."""
        return self.claims.table

    @property
    def meta(self) -> dict[str, Any]:
        """How it was made."""
        return self.claims.meta

    def to_pandas(self) -> Any:
        """The claims report as a pandas DataFrame."""
        return self.claims.to_pandas()


@dataclass(frozen=True)
class ReproducedEffects:
    """What the command wrote of an experiment with arms."""

    effects: tables.Report
    runs: tables.Report
    path: Path | None  # the directory

    @property
    def table(self) -> pa.Table:
        """The rows of the effects report."""
        return self.effects.table

    @property
    def meta(self) -> dict[str, Any]:
        """How it was made."""
        return self.effects.meta

    def to_pandas(self) -> Any:
        """The effects report as a pandas DataFrame."""
        return self.effects.to_pandas()


def reproduce(
    name: str = "grok",
    *,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Reproduced | ReproducedEffects:
    """Train the networks of a paper, measure what it claims, and say where it holds.

    Args:
        name: the paper; grok: Doshi et al. 2023, "To grok or not to grok" (arXiv:2310.13061); gapt-lm,
            gapt-multiplication, gapt-conflict: the experiments of Yu 2025 (arXiv:2505.08727); long-tail: Feldman and
            Zhang 2020, "What neural networks memorize and why" (arXiv:2008.03703).
        out: the directory to write to; None keeps the reports in memory only.
        force: replace what stands at `out`.
        progress: shows how far it is.
        **options: the fields of ReproduceOptions, i.e. the options of `memdiag reproduce`; `seeds` and `only` may be
            lists.
    Returns:
        The reports, rows as ClaimRow and PhaseRow; of the experiments, as EffectRow and RunRow.
    Raises:
        InputError: the inputs are at fault.
        IncompleteError: it could not be finished; the same call goes on after the last finished network.
    """
    settings = options_from(ReproduceOptions, options)
    if out is not None:
        return measure(name, settings, out=Path(out), force=force, progress=progress)
    with tempfile.TemporaryDirectory() as directory:
        found = measure(name, settings, out=Path(directory) / f"reproduce-{name}", progress=progress)
        reports = {
            field.name: dataclasses.replace(getattr(found, field.name), path=None)
            for field in dataclasses.fields(found)
            if field.name != "path"
        }
        return dataclasses.replace(found, path=None, **reports)


def measure(
    name: str, options: ReproduceOptions, *, out: Path, force: bool = False, progress: Progress | None = None
) -> Reproduced | ReproducedEffects:
    """`reproduce` with its options as one value; writes to `out` and returns what it wrote."""
    from memdiag import reproduce_gapt_run, reproduce_run

    options = options.settled_for(name)
    carry_out = reproduce_gapt_run.run if name in EXPERIMENTS else reproduce_run.run
    return carry_out(name, options, out, force=force, progress=progress or Progress())


def plan(name: str, options: ReproduceOptions) -> dict[str, object]:
    """What `measure` would do, after trying a few steps: networks, steps, time, memory, disk."""
    from memdiag import reproduce_gapt_run, reproduce_run

    planned = reproduce_gapt_run.plan if name in EXPERIMENTS else reproduce_run.plan
    return planned(name, options.settled_for(name))


def options_of(report: tables.Report) -> tuple[str, ReproduceOptions]:
    """The paper and options that a report was made with.

    Raises:
        InputError: it was made by a version with other options.
    """
    recorded = dict(report.meta.get("options") or {})
    name = recorded.pop("name", None)
    try:
        return str(name), ReproduceOptions(**recorded)
    except (TypeError, AttributeError) as error:
        raise InputError(f"made by memdiag {report.meta.get('memdiag_version')} with other options: {error}") from None
