"""`memdiag counterfactual`: what would the model do without this example? Its reports, its options, the Python API.

Formulas are in `memorization`, `influence`, `size_trajectories` and `turnover_dropout`, the coins in `subsets`, the
training of many models in `ensemble`. Importing this module does not import torch.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from memdiag import tables
from memdiag.engine import Engine
from memdiag.errors import InputError
from memdiag.keywords import options_from
from memdiag.progress import Progress
from memdiag.subsets import Design
from memdiag.train_report import TrainOptions

MODELS, FEWEST, MOST = 100, 50, 10**6  # FEWEST: below it a figure of an example says little
INTERPOLATES = 0.99  # accuracy on what was trained on, below which memorization misses what was not learned
MEMORIZED = 0.25  # what Feldman and Zhang count as memorized
_OF_SUBSETS = (
    "test", "test_fraction", "group_by", "first_model", "subset_ratio", "design", "until_width", "max_models",
    "min_influence", "top", "engine", "ray_address", "ray_gpus", "chunk",
)  # fmt: skip


@dataclass(frozen=True)
class CounterfactualOptions:
    """Options of `memdiag counterfactual`; the field names are the option names. None: see the command's help."""

    data: str | None = None
    test: str | None = None
    test_fraction: float | None = None
    columns: str | None = None
    limit: int | None = None
    corruption: float = 0.0
    group_by: str | None = None
    truth: str | None = None
    # the design
    models: int | None = None
    first_model: int = 0
    subset_ratio: float = 0.7
    design: str = "balanced"
    until_width: float | None = None
    max_models: int = 1000
    min_influence: float = 0.15
    top: int = 3
    sizes: str | None = None
    turn_over_dropout: bool = False
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
    optimizer: str | None = None
    lr: float | None = None
    schedule: str = "cosine"
    warmup: int | None = None
    weight_decay: float | None = None
    clip: float | None = None
    # the machine
    engine: str = "inline"
    ray_address: str | None = None
    ray_gpus: float = 0.0
    chunk: int | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.training(), self.how(), self.dispatcher(), self.widths()  # which check what is theirs
        for name, least in (("models", 1), ("max_models", 1), ("first_model", 0), ("top", 0), ("chunk", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value <= MOST:
                raise InputError(f"--{name.replace('_', '-')} must be {least} to {MOST}, got {value}")
        if not 0 <= self.min_influence <= 1:
            raise InputError(f"--min-influence must be 0 to 1, got {self.min_influence}")
        if self.until_width is not None and not 0 < self.until_width < math.inf:
            raise InputError(f"--until-width must be a finite number above 0, got {self.until_width}")
        if self.until_width is not None and self.first_model:
            raise InputError("--until-width counts the models from 0; leave --first-model out")
        if self.sizes is not None and self.turn_over_dropout:
            raise InputError("--sizes and --turn-over-dropout are two ways to measure; give one of them")
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _OF_SUBSETS if self.turn_over_dropout else ():
            if getattr(self, name) != usual[name]:
                told = f"--{name.replace('_', '-')} is about models on subsets"
                raise InputError(f"{told}, and --turn-over-dropout has none; leave it out")
        if self.turn_over_dropout and (self.model or self.config or self.arch not in (None, "mlp")):
            raise InputError("--turn-over-dropout trains an MLP on features; leave --model, --config and --arch out")
        for name in ("width", "until_width") if self.sizes is not None else ():
            if getattr(self, name) is not None:
                raise InputError(f"--sizes and --{name.replace('_', '-')} do not go together; give one of them")
        if self.sizes is not None and (self.model or self.config):
            raise InputError("--sizes are widths of --arch mlp, cnn or transformer; leave --model and --config out")

    def training(self) -> TrainOptions:
        """How a model is made and trained."""
        names = {field.name for field in dataclasses.fields(TrainOptions)}
        own = {name: value for name, value in dataclasses.asdict(self).items() if name in names}
        more = [
            f"{role}={name}" for role, name in (("group", self.group_by), ("truth", self.truth)) if name is not None
        ]
        columns = ",".join([*([self.columns] if self.columns else []), *more]) or None
        return TrainOptions(**own | {"columns": columns, "dtype": "float32"})

    def how(self) -> Design:
        """How the coins fall."""
        return Design(self.subset_ratio, self.design, self.seed)

    def dispatcher(self) -> Engine:
        """Where the models are trained."""
        return Engine(self.engine, self.ray_address, self.ray_gpus)

    def widths(self) -> list[int]:
        """Of --sizes, in order; none without it."""
        try:
            found = [int(text) for text in self.sizes.split(",")] if self.sizes is not None else []
        except ValueError:
            raise InputError(f"--sizes {self.sizes}: wanted widths like 64,128,256") from None
        if self.sizes is not None and (len(found) < 2 or found != sorted(set(found)) or found[0] < 1):
            raise InputError(f"--sizes {self.sizes}: wanted at least two widths, each above the one before")
        return found

    def items(self, models: int | None = None) -> range:
        """The numbers of the models: as many as asked for, or `models`."""
        asked = self.models or MODELS
        if self.until_width is not None:
            asked = min(asked, self.max_models)
        return range(self.first_model, self.first_model + (models or asked))

    def identity(self) -> dict[str, Any]:
        """The options that change what a model makes of an example; how many there are, and who trains them, do not."""
        same = {
            "data", "test", "tokenizer", "config", "device", "models", "first_model", "until_width", "max_models",
            "min_influence", "top", "sizes", "turn_over_dropout", "engine", "ray_address", "ray_gpus", "chunk",
        }  # fmt: skip
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in same}

    def analysis(self) -> dict[str, Any]:
        """The other options that change a report's rows."""
        names = ("models", "first_model", "until_width", "max_models", "min_influence", "top")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Counterfactual:
    """What the command wrote: `report` is counterfactual.parquet, or what --sizes or --turn-over-dropout give."""

    report: tables.Report
    summary: dict[str, Any]
    path: Path | None  # the directory
    influence: tables.Report | None = None  # None: nothing is held out
    models: tables.Report | None = None

    @property
    def table(self) -> pa.Table:
        """The report's rows."""
        return self.report.table

    @property
    def meta(self) -> dict[str, Any]:
        """How it was made."""
        return self.report.meta

    def to_pandas(self) -> Any:
        """The report's rows as a pandas DataFrame."""
        return self.report.to_pandas()


def counterfactual(
    data: str | Path | None = None,
    *,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Counterfactual:
    """Train many models on random subsets, and tell what each example changes: memorization and influence.

    Args:
        data: a path, or `task:NAME?key=value`.
        out: the directory to write to; None keeps the reports in memory only.
        force: replace what stands at `out`.
        progress: shows how far it is.
        **options: the fields of CounterfactualOptions, i.e. the options of `memdiag counterfactual`; `columns` may be a
            dict, `sizes` a list.
    Returns:
        The reports, rows as CounterfactualRow, InfluenceRow and ModelRow, and a summary.
    Raises:
        InputError: the inputs are at fault.
        IncompleteError: models that could not be trained; the others are kept.
    """
    options["data"] = data
    return _written(options_from(CounterfactualOptions, options), None, out, force, progress)


def merge_counterfactual(
    directories: Sequence[str | Path], *, out: str | Path | None = None, force: bool = False
) -> Counterfactual:  # fmt: skip
    """Join runs of `counterfactual` that differ in their models only.

    Args:
        directories: at least two, e.g. of --models 100, and of --first-model 100 --models 100 on another machine.
        out, force: as `counterfactual`.
    Raises:
        InputError: one is no such run, or they are of other data, models or options.
    """
    return _written(None, [Path(path) for path in directories], out, force, None)


def _written(
    settings: CounterfactualOptions | None,
    directories: Sequence[Path] | None,
    out: str | Path | None,
    force: bool,
    progress: Progress | None,
) -> Counterfactual:
    def write(place: Path) -> Counterfactual:
        if settings is None:
            return merge(directories or [], out=place, force=force)
        return measure(settings, out=place, force=force, progress=progress)

    if out is not None:
        return write(Path(out))
    with tempfile.TemporaryDirectory() as directory:
        found = write(Path(directory) / "counterfactual")
        kept = {
            name: dataclasses.replace(report, path=None)
            for name in ("report", "influence", "models")
            if (report := getattr(found, name)) is not None
        }
        return dataclasses.replace(found, path=None, **kept)


def measure(
    options: CounterfactualOptions, *, out: Path, force: bool = False, progress: Progress | None = None
) -> Counterfactual:  # fmt: skip
    """`counterfactual` with its options as one value; writes to `out` and returns what it wrote."""
    from memdiag import counterfactual_run

    return counterfactual_run.run(options, out, force=force, progress=progress or Progress())


def merge(directories: Sequence[Path], *, out: Path, force: bool = False) -> Counterfactual:
    """`merge_counterfactual`; writes to `out` and returns what it wrote."""
    from memdiag import counterfactual_merge

    return counterfactual_merge.merge(directories, out, force=force)


def plan(options: CounterfactualOptions) -> dict[str, object]:
    """What `measure` would do, after opening everything and trying a few updates: time, disk."""
    from memdiag import counterfactual_run

    return counterfactual_run.plan(options)


def options_of(report: tables.Report) -> CounterfactualOptions:
    """The options that a report was made with.

    Raises:
        InputError: it was made by a version with other options.
    """
    try:
        return CounterfactualOptions(**dict(report.meta.get("options") or {}))
    except (TypeError, AttributeError) as error:
        raise InputError(f"made by memdiag {report.meta.get('memdiag_version')} with other options: {error}") from None
