"""`memdiag score --second-split`: which examples does a network forget soonest when it goes on to learn others?

The options, the columns and the Python API. The formulas are in `second_split`, training in `second_split_run`.
Importing this module does not import torch.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from memdiag import tables
from memdiag.errors import InputError
from memdiag.keywords import options_from
from memdiag.progress import Progress
from memdiag.score_report import KEY, OF_CLASSIFIER, TRUTH
from memdiag.tables import column
from memdiag.train_report import HIGHEST, MOST, TrainOptions

REPORT, VERSION = "score.second-split", 1
EPOCHS, SECOND_EPOCHS = 60, 20
# score -> the end that is more memorized
SCORES = {
    "second_split_forgetting": "low",
    "second_split_rank": "high",
    "stage2_accuracy": "low",
    "stage2_confidence": "low",
}
COLUMNS = {
    "half": column(
        pa.string(),
        "first: it was learned in stage 1 of direction 1; second: of direction 2. Of the first of --seeds; every seed "
        "splits anew",
    ),
    "learned": column(pa.float64(), "share of seeds in which it was right at the end of stage 1, in eval mode"),
    "second_split_forgetting": column(
        pa.float64(),
        "mean over seeds of the first epoch of stage 2, from 1, after which it is always wrong; never: "
        "--second-epochs + 1",
        unit="epoch",
    ),
    "n_censored": column(pa.int32(), "seeds in which it was never forgotten: right after the last epoch of stage 2"),
    "n_seeds": column(pa.int32(), "seeds; in each it was measured once"),
    "second_split_rank": column(
        pa.float64(),
        "mean over seeds of its rank within its half, from 0 to 1, ties shared; 1: forgotten soonest, most memorized",
    ),
    "stage2_accuracy": column(pa.float64(), "mean over seeds and epochs of stage 2 of whether it was right"),
    "stage2_confidence": column(pa.float64(), "likewise of the probability of its label"),
}


def row_of(*, truth: bool) -> type:
    """The row dataclass of a report with or without a truth."""
    columns = {**KEY, **OF_CLASSIFIER, **(TRUTH if truth else {}), **COLUMNS}
    return tables.row_class("SecondSplitRow", REPORT, VERSION, columns)


SecondSplitRow = row_of(truth=True)  # one row per example; `truth` only with --truth


@dataclass(frozen=True)
class SecondSplitOptions:
    """Options of `memdiag score --second-split`; the field names are the command's option names."""

    data: str | None = None
    columns: str | None = None
    truth: str | None = None
    limit: int | None = None
    # the network
    arch: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    max_length: int | None = None
    # the two stages
    epochs: int | None = None
    second_epochs: int | None = None
    lr: float | None = None
    second_lr: float | None = None
    batch_size: str = "auto"  # examples of an update
    seeds: str = "0,1,2"
    seed: int = 0  # of the intervals
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.second_epochs is not None and self.second_epochs < 1:
            raise InputError(f"--second-epochs must be at least 1, got {self.second_epochs}")
        if self.second_lr is not None and not 0 < self.second_lr < math.inf:
            raise InputError(f"--second-lr must be a finite number above 0, got {self.second_lr}")
        for name, most in (("second_epochs", MOST), ("second_lr", HIGHEST)):
            if (getattr(self, name) or 0) > most:
                raise InputError(f"--{name.replace('_', '-')} must be at most {most:g}, got {getattr(self, name)}")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise InputError(f"--batch-size must be auto or a number of examples above 0, got {self.batch_size!r}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must be at least 0 and less than 2^32, got {self.seed}")
        self.seed_list()
        self.training(0)

    def seed_list(self) -> list[int]:
        """The seeds, in the order given.

        Raises:
            InputError: they cannot be read, or one comes twice.
        """
        texts = [text.strip() for text in self.seeds.split(",")]
        if not all(text.isdecimal() and len(text) < 10 for text in texts) or len({int(t) for t in texts}) < len(texts):
            raise InputError(f"--seeds {self.seeds!r}: wanted different whole numbers like 0,1,2")
        return [int(text) for text in texts]

    def training(self, seed: int) -> TrainOptions:
        """Stage 1 as options of `memdiag train`.

        Raises:
            InputError: an option is out of its range.
        """
        roles = [self.columns] if self.columns else []
        roles += [f"truth={self.truth}"] if self.truth is not None else []
        return TrainOptions(
            data=self.data,
            columns=",".join(roles) or None,
            limit=self.limit,
            arch=self.arch,
            model=self.model,
            tokenizer=self.tokenizer,
            max_length=self.max_length,
            epochs=EPOCHS if self.epochs is None else self.epochs,
            batch_size=None if self.batch_size == "auto" else int(self.batch_size),
            lr=self.lr,
            dtype="float32",
            device=self.device,
            seed=seed,
        )

    def identity(self) -> dict[str, Any]:
        """The options that change numbers; paths do not, their contents are fingerprinted."""
        same_numbers = {"data", "tokenizer", "device"}
        found = {k: v for k, v in dataclasses.asdict(self).items() if k not in same_numbers}
        return found | {"seeds": self.seed_list()}


def second_split(
    data: str | Path,
    *,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> tables.Report:
    """Second-split forgetting times: train on one half, go on with the other, and see what is forgotten.

    Args:
        data: a path, or `task:NAME?key=value`, with labels.
        out: the report's path; None keeps it in memory only.
        force: replace what stands at `out`.
        progress: shows how far it is.
        **options: the fields of SecondSplitOptions; `columns` may be a dict, `seeds` a list, `batch_size` a number.
    Returns:
        The report, rows as SecondSplitRow. `meta["summary"]` is as that of `score`; `meta["networks"]` says of every
        network what it had learned after each stage.
    Raises:
        InputError: the inputs are at fault.
        IncompleteError: it could not be finished; the same call goes on from the last finished network.
    """
    options["data"] = data
    settings = options_from(SecondSplitOptions, options)
    if out is not None:
        return measure(settings, out=Path(out), force=force, progress=progress)
    with tempfile.TemporaryDirectory() as directory:
        report = measure(settings, out=Path(directory) / "score.parquet", progress=progress)
        return dataclasses.replace(report, path=None)


def measure(
    options: SecondSplitOptions, *, out: Path, force: bool = False, progress: Progress | None = None
) -> tables.Report:
    """`second_split` with its options as one value; writes to `out` and returns what it wrote."""
    from memdiag import second_split_run

    return second_split_run.run(options, out, force=force, progress=progress or Progress())


def plan(options: SecondSplitOptions) -> dict[str, object]:
    """What `measure` would do, after opening everything and trying a few updates: networks, updates, time."""
    from memdiag import second_split_run

    return second_split_run.plan(options)


def options_of(report: tables.Report) -> SecondSplitOptions:
    """The options that a report was made with.

    Raises:
        InputError: it was made by a version with other options.
    """
    try:
        return SecondSplitOptions(**dict(report.meta.get("options") or {}))
    except (TypeError, AttributeError) as error:
        raise InputError(f"made by memdiag {report.meta.get('memdiag_version')} with other options: {error}") from None
