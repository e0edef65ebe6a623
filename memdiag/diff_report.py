"""`memdiag diff`: what changed from one report to another, row by row. Needs no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from memdiag import tables
from memdiag.check_report import CheckRow, check_counts_as
from memdiag.errors import InputError, unknown
from memdiag.report_sql import MEMORY_LIMIT, TIME_LIMIT
from memdiag.rules import Change, Rule, confidence_of, gathered_changes
from memdiag.tables import column
from memdiag.verdicts import Outcome

MOST_SHOWN = 100_000  # --top; DuckDB sorts no more than a million at once
COLUMNS, MOVERS, RULES = "columns.parquet", "movers.parquet", "rules.parquet"


@dataclass(frozen=True)
class RuleRow(CheckRow):
    """One rule; as of `check`, and how likely its figure is the limit."""

    report = "diff.rules"
    schema_version = 1

    p: float | None = column(
        pa.float64(), "two-sided, that what the rule is about is the limit; null: judged by its value", nullable=True
    )
    q: float | None = column(
        pa.float64(), "the same after Benjamini and Hochberg, over the rules with a p", nullable=True
    )


@dataclass(frozen=True)
class DiffOptions:
    """How two reports are compared.

    Raises:
        InputError: an option is out of range.
    """

    rules: tuple[Rule | Change, ...] = ()
    on: str | None = None
    confidence: float = 0.95
    top: int = 10
    inconclusive: str = "pass"
    anyway: bool = False
    allow_partial: bool = False
    any_version: bool = False
    time_limit: float = TIME_LIMIT
    memory_limit: str = MEMORY_LIMIT
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts_as(self.inconclusive)
        confidence_of(self.confidence)
        if self.top < 0:
            raise InputError(f"--top {self.top} is negative; give 0 or more")
        if self.top > MOST_SHOWN:
            raise InputError(f"--top {self.top} is too many; give {MOST_SHOWN:,} or fewer")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed} is negative; give 0 or more")

    def resolved(self) -> dict[str, Any]:
        """As a report holds them."""
        return dataclasses.asdict(self) | {"rules": [dataclasses.asdict(rule) for rule in self.rules]}


@dataclass(frozen=True)
class Diffed:
    """Two reports compared: the reports of it, and whether the rules passed."""

    columns: tables.Report
    movers: tables.Report
    rules: tables.Report
    outcome: Outcome
    path: Path | None = None

    @property
    def passed(self) -> bool:
        """Whether no rule failed; one that is inconclusive counts as `inconclusive` says."""
        return not self.outcome.failed


def diff(
    base: str | Path,
    new: str | Path,
    *rule: str,
    rules_file: str | Path | None = None,
    out: str | Path | None = None,
    force: bool = False,
    **options: Any,
) -> Diffed:
    """Compare two reports of one kind, paired by their key.

    Args:
        base: path of the report before.
        new: path of the report after.
        *rule: "loss: +0.01", the mean may rise by no more; "loss: -0.01", "loss: ±0.01"; or SQL over pairs of rows of
            `base` and `new`, "avg(new.loss - base.loss) < 0.01", perhaps with a name before it.
        rules_file: a TOML file of more rules.
        out: a directory for the reports; None keeps them in memory only.
        force: replace what stands there.
        **options: the fields of DiffOptions.
    Returns:
        `.columns` (rows as ColumnRow), `.movers` (MoverRow), `.rules` (RuleRow), `.passed`.
    Raises:
        InputError: the reports do not fit together, or a rule is at fault.
    """
    known = {field.name for field in dataclasses.fields(DiffOptions)} - {"rules"}
    for name in options:
        if name not in known:
            raise unknown("option", name, known)
    asked = gathered_changes(rule, Path(rules_file) if rules_file else None)
    settings = DiffOptions(rules=asked, **options)
    return measure(Path(base), Path(new), settings, out=Path(out) if out else None, force=force)


def measure(
    base: Path, new: Path, options: DiffOptions, *, out: Path | None, force: bool = False, own_process: bool = False
) -> Diffed:
    """`diff` with its options as one value; `own_process` as of `report_sql.opened`."""
    from memdiag import diff_run

    return diff_run.run(base, new, options, out, force=force, own_process=own_process)


def options_of(found: tables.Report) -> tuple[Path, Path, DiffOptions]:
    """The reports and the options that a diff was made of.

    Raises:
        InputError: its metadata does not say.
    """
    try:
        given = dict(found.meta["options"])
        base, new = Path(given.pop("base")), Path(given.pop("new"))
        rules = tuple(Change(**rule) if "column" in rule else Rule(**rule) for rule in given["rules"])
        return base, new, DiffOptions(**given | {"rules": rules})
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{found.path}: its metadata does not say how it was made") from None
