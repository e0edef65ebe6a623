"""`memdiag score`: which examples did it memorize? One row per example, one column per score.

The options, the columns, and the way from a checkpoint, a run or a trajectory to the report. The formulas are in
`scores`, one file each. Importing this module does not import torch, so that `memdiag schema` need not wait for it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from memdiag import scores, tables
from memdiag.errors import InputError, unknown
from memdiag.keywords import options_from
from memdiag.progress import Progress
from memdiag.tables import column

REPORT, VERSION = "score", 1
RANK = "_rank"  # ends the name of a column of ranks

KEY = {
    "example_id": column(pa.string(), "the dataset's id of the example, else its row number"),
    "row": column(pa.int64(), "row of the example in the dataset, from 0"),
}
OF_CLASSIFIER = {
    "label": column(pa.int64(), "the label that the scores are of; in a run of memdiag train the one trained on"),
}
OF_LANGUAGE = {
    "n_tokens": column(pa.int64(), "tokens read of the example", unit="token"),
    "n_scored": column(pa.int64(), "of these, those that are predicted: all but the first", unit="token"),
    "n_suffix": column(
        pa.int64(), "tokens of the suffix, --suffix-tokens; 0: the example is too short and has none", unit="token"
    ),
    "truncated": column(pa.bool_(), "whether it was cut at --max-length"),
}
TRUTH = {"truth": column(pa.bool_(), "the column of --truth: whether the example is corrupted or suspect")}


def rank_column(name: str) -> Any:
    """The column of a score's ranks."""
    return column(
        pa.float64(),
        f"rank of {name} in this report from 0 to 1, ties shared; 1: most memorized (of zlib_len: longest)",
        nullable=True,
    )


def columns_of(names: tuple[str, ...], *, classifier: bool, language: bool, truth: bool, ranks: bool) -> dict[str, Any]:
    """The report's columns for some scores, in order."""
    return {
        **KEY,
        **(OF_CLASSIFIER if classifier else {}),
        **(OF_LANGUAGE if language else {}),
        **(TRUTH if truth else {}),
        **scores.columns(names),
        **({f"{name}{RANK}": rank_column(name) for name in names} if ranks else {}),
    }


def row_of(names: tuple[str, ...], **which: bool) -> type:
    """The row dataclass of a report; `which` as `columns_of`."""
    return tables.row_class("ScoreRow", REPORT, VERSION, columns_of(names, **which))


# Every column that the report can have; a report holds those that its input allows and --scores asks for.
ScoreRow = row_of(scores.NAMES, classifier=True, language=True, truth=True, ranks=False)


@dataclass(frozen=True)
class ScoreOptions:
    """Options of `memdiag score`; the field names are the command's option names."""

    data: str | None = None
    columns: str | None = None
    scores: str | None = None
    ranks: bool = False
    truth: str | None = None
    reference: str | None = None
    model: str | None = None
    steps: str | None = None
    at: int | None = None
    tokenizer: str | None = None
    prefix_tokens: int = 32
    suffix_tokens: int = 32
    max_length: int | None = None
    limit: int | None = None
    dtype: str = "auto"
    seed: int = 0
    device: str = "auto"
    batch_size: str = "auto"

    def __post_init__(self) -> None:
        for name in ("prefix_tokens", "suffix_tokens", "max_length", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise InputError(f"--batch-size must be auto or a number of examples above 0, got {self.batch_size!r}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must be at least 0 and less than 2^32, got {self.seed}")
        self.names()

    def names(self) -> tuple[str, ...] | None:
        """The scores asked for, in the report's order; None: all that the input allows.

        Raises:
            InputError: there is no score of that name.
        """
        if self.scores is None:
            return None
        asked = [name.strip() for name in self.scores.split(",")]
        for name in asked:
            if name not in scores.NAMES:
                raise unknown("score", name, scores.NAMES)
        return tuple(name for name in scores.NAMES if name in asked)

    def identity(self) -> dict[str, Any]:
        """The options that change numbers; paths do not, their contents are fingerprinted."""
        same_numbers = {"data", "tokenizer", "reference", "device", "batch_size"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in same_numbers}


def score(
    source: str | Path,
    *,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> tables.Report:
    """Score every example: how much does it look memorized?

    Args:
        source: path of a checkpoint, of a run of checkpoints, or of a trajectory.
        out: the report's path; None keeps it in memory only.
        force: replace what stands at `out`.
        progress: shows how far it is.
        **options: the fields of ScoreOptions, i.e. the options of `memdiag score`; `columns` may be a dict, `scores`
            a list of names.
    Returns:
        The report: one row per example, the columns of ScoreRow that the input allows. `meta["summary"]` has means,
        agreement between the scores, and the examples that score highest.
    Raises:
        InputError: the inputs are at fault.
        IncompleteError: it could not be finished; the same call goes on from the last finished piece.
    """
    settings = options_from(ScoreOptions, options)
    if out is not None:
        return measure(source, settings, out=Path(out), force=force, progress=progress)
    with tempfile.TemporaryDirectory() as directory:
        report = measure(source, settings, out=Path(directory) / "score.parquet", progress=progress)
        return dataclasses.replace(report, path=None)


def measure(
    source: str | Path,
    options: ScoreOptions,
    *,
    out: Path,
    force: bool = False,
    progress: Progress | None = None,
) -> tables.Report:
    """`score` with its options as one value; writes to `out` and returns what it wrote."""
    from memdiag import score_run

    return score_run.run(str(source), options, out, force=force, progress=progress or Progress())


def plan(source: str | Path, options: ScoreOptions) -> dict[str, object]:
    """What `measure` would do, after opening everything and trying one piece: rows, scores, time."""
    from memdiag import score_run

    return score_run.plan(str(source), options)


def options_of(report: tables.Report) -> tuple[str, ScoreOptions]:
    """What was scored, and the options that a report was made with.

    Raises:
        InputError: it was made by a version with other options.
    """
    recorded = dict(report.meta.get("options") or {})
    source = recorded.pop("source", None)
    try:
        return str(source), ScoreOptions(**recorded)
    except (TypeError, AttributeError) as error:
        raise InputError(f"made by memdiag {report.meta.get('memdiag_version')} with other options: {error}") from None
