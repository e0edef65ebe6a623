"""`memdiag check`: does a report keep the rules? Needs no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

import memdiag
from memdiag import judging, rules, tables
from memdiag.errors import InputError, unknown
from memdiag.report_kinds import ROWS, row_of
from memdiag.report_sql import MEMORY_LIMIT, TIME_LIMIT, opened
from memdiag.rules import Rule
from memdiag.tables import column
from memdiag.verdicts import Outcome, Verdict

COUNTS_AS = ("pass", "fail")


@dataclass(frozen=True)
class CheckRow:
    """One rule."""

    report = "check"
    schema_version = 1

    rule: str = column(pa.string(), "its name, or its SQL where it has none")
    sql: str = column(pa.string(), "the rule")
    condition: str | None = column(pa.string(), "of the rows it is about (--where); null: all rows", nullable=True)
    verdict: str = column(pa.string(), "pass, fail, or inconclusive: its interval holds the limit")
    observed: float | None = column(
        pa.float64(),
        "what the rule compares, to 12 digits; null: it compares nothing, or it is undefined",
        nullable=True,
    )
    lo: float | None = column(pa.float64(), "lower end of its interval; null: it has none", nullable=True)
    hi: float | None = column(pa.float64(), "upper end", nullable=True)
    limit: float | None = column(pa.float64(), "what it is compared with; of BETWEEN the upper end", nullable=True)
    least: float | None = column(pa.float64(), "the lower end of BETWEEN", nullable=True)
    comparison: str | None = column(
        pa.string(), "<, <=, >, >=, =, != or between; null: another expression", nullable=True
    )
    n: int | None = column(
        pa.int64(), "of a mean or a rate the rows with a value, else the rows that there are", nullable=True
    )
    confidence: float | None = column(pa.float64(), "of the interval; null: judged by its value", nullable=True)
    method: str | None = column(pa.string(), "of the interval: bootstrap-t, moments or Clopper-Pearson", nullable=True)
    note: str | None = column(pa.string(), "why it is undefined, or has no interval", nullable=True)


@dataclass(frozen=True)
class CheckOptions:
    """How rules are judged.

    Raises:
        InputError: an option is out of range.
    """

    rules: tuple[Rule, ...]
    inconclusive: str = "pass"
    allow_partial: bool = False
    any_version: bool = False
    time_limit: float = TIME_LIMIT
    memory_limit: str = MEMORY_LIMIT
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts_as(self.inconclusive)
        if self.seed < 0:
            raise InputError(f"--seed {self.seed} is negative; give 0 or more")

    def resolved(self) -> dict[str, Any]:
        """As a report holds them."""
        return dataclasses.asdict(self) | {"rules": [dataclasses.asdict(rule) for rule in self.rules]}


@dataclass(frozen=True)
class Checked:
    """A report that was checked: whether every rule passed, the verdicts, and what was written."""

    report: tables.Report
    outcome: Outcome

    @property
    def passed(self) -> bool:
        """Whether no rule failed; one that is inconclusive counts as `inconclusive` says."""
        return not self.outcome.failed

    @property
    def path(self) -> Path | None:
        """Where the verdicts are."""
        return self.report.path


def noise_floors(meta: Mapping[str, Any]) -> dict[str, float]:
    """Half-widths at 95 % of what repeats of a measurement move the mean of a column by, as a report states them."""
    stated = meta.get("noise_floor")
    if not isinstance(stated, dict):
        return {}
    return {
        str(name): float(value)
        for name, value in stated.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300
    }


def check_counts_as(value: str) -> None:
    """Raise InputError unless an inconclusive rule may count as this."""
    if value not in COUNTS_AS:
        raise InputError(f"--inconclusive {value!r}: it counts as {' or '.join(COUNTS_AS)}")


def check(
    report: str | Path,
    *rule: str,
    rules_file: str | Path | None = None,
    where: str | None = None,
    confidence: float | None = None,
    out: str | Path | None = None,
    force: bool = False,
    **options: Any,
) -> Checked:
    """Judge rules over a report.

    Args:
        report: its path.
        *rule: SQL such as "avg(mbe) < 1.2", or with a name: "compressed: avg(mbe) < 1.2".
        rules_file: a TOML file of more rules.
        where: SQL condition of the rows that count.
        confidence: a mean or rate holds only if its interval does, e.g. 0.95.
        out: where the verdicts go; None keeps them in memory only.
        force: replace what stands at `out`, whatever it is.
        **options: `inconclusive`, `allow_partial`, `any_version`, `time_limit`, `memory_limit`, `seed`.
    Returns:
        The verdicts: `.passed`, `.report` (rows as CheckRow).
    Raises:
        InputError: the report or a rule is at fault.
    """
    known = {field.name for field in dataclasses.fields(CheckOptions)} - {"rules"}
    for name in options:
        if name not in known:
            raise unknown("option", name, known)
    asked = rules.gathered(rule, Path(rules_file) if rules_file else None, where=where, confidence=confidence)
    return measure(Path(report), CheckOptions(asked, **options), out=Path(out) if out else None, force=force)


def measure(
    path: Path, options: CheckOptions, *, out: Path | None, force: bool = False, own_process: bool = False
) -> Checked:
    """`check` with its options as one value; `own_process` as of `report_sql.opened`."""
    if out is not None:
        check_place(out, "check", force=force, inputs=[path])
    meta = check_fit(path, allow_partial=options.allow_partial, any_version=options.any_version)
    limits = {"time_limit": options.time_limit, "memory_limit": options.memory_limit, "own_process": own_process}
    with opened({"report": path}, **limits) as session:  # type: ignore[arg-type]
        floors = {f"({name})": floor for name, floor in noise_floors(meta).items()}
        verdicts = judging.judge(session, options.rules, "report", seed=options.seed, floors=floors)
        (rows,) = session.rows("SELECT count(*) FROM report")[0]
    notes = _notes(verdicts, meta, rows)
    outcome = Outcome(
        "check",
        str(path),
        str(path),
        str(out or ""),
        tuple(verdicts),
        options.inconclusive,
        notes=tuple(notes),
        figures={"rows": rows, "report": meta["report"]},
    )
    about = {
        "options": {"report": str(path), **options.resolved()},
        "identity": {"report": CheckRow.report, "of": digest_of(meta), "options": options.resolved()},
        "of": {"report": meta["report"], "schema_version": meta.get("schema_version"), "rows": rows},
        "passed": not outcome.failed,
        "notes": notes,
    }
    return Checked(
        written(CheckRow, [as_row(verdict, rule.where) for verdict, rule in zip(verdicts, options.rules)], about, out),
        outcome,
    )


def as_row(verdict: Verdict, where: str | None) -> dict[str, Any]:
    """A verdict as a row of check.parquet."""
    told = (field.name for field in dataclasses.fields(CheckRow) if field.name != "condition")
    return {name: getattr(verdict, name) for name in told} | {"condition": where}


def written(row: Any, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], out: Path | None) -> tables.Report:
    """A small report from its rows, written if there is a place for it."""
    meta = {
        "report": row.report,
        "schema_version": row.schema_version,
        "memdiag_version": memdiag.__version__,
        **about,
    }
    batch = tables.to_small_batch(row, rows)
    if out is not None:
        tables.write(out, row, [batch], meta)
    return tables.Report(pa.Table.from_batches([batch]), meta, out)


def _notes(verdicts: Sequence[Verdict], meta: Mapping[str, Any], rows: int) -> list[str]:
    notes = []
    if meta.get("partial"):
        notes.append("the report is partial: the run that made it has not finished")
    if not rows:
        notes.append("the report has no rows")
    notes += [f"no row is left of rule {v.rule!r}" for v in verdicts if rows and v.n == 0]
    return notes


def check_fit(path: Path, *, allow_partial: bool, any_version: bool) -> dict[str, Any]:
    """The metadata of a report that is whole and of this version.

    Raises:
        InputError: it is not, and that is not allowed; or there is no report.
    """
    meta = tables.read_meta(path)
    if meta.get("partial") and not allow_partial:
        raise InputError(f"{path} is partial: its run has not finished; let it finish, or give --allow-partial")
    kind, version = meta["report"], meta.get("schema_version")
    if any_version:
        return meta
    if kind not in ROWS:
        raise InputError(f"{path} is a report {kind!r} that this version does not know; give --any-version to go on")
    ours = getattr(row_of(kind), "schema_version", None)
    if version != ours:
        raise InputError(
            f"{path} has schema_version {version} of report {kind!r}, and this version writes {ours}: names or "
            "meanings of columns may differ; give --any-version to go on"
        )
    return meta


def check_place(out: Path, report: str, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse to write over anything but an earlier report of the same kind: those are made again in a second.

    Raises:
        InputError: something else stands there, or what is to be read.
    """
    if any(path.exists() and out.exists() and os.path.samefile(path, out) for path in inputs):
        raise InputError(f"{out} is what is to be read; choose another --out")
    tables.check_place(out, dict, force=True)  # no directory, and a name that can be printed
    if force or not out.exists():
        return
    try:
        found = tables.read_meta(out)["report"]
    except InputError:
        found = None
    if found != report:
        what = "is no report of memdiag" if found is None else f"is a report {found!r}"
        raise InputError(f"{out} is there and {what}; --force or another --out")


def digest_of(meta: Mapping[str, Any]) -> str:
    """sha256 (hex) of a report's metadata: what it was made of and how, so what its rows are."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode(errors="backslashreplace")).hexdigest()


def options_of(found: tables.Report) -> tuple[Path, CheckOptions]:
    """The report and the options that a check.parquet was made of.

    Raises:
        InputError: its metadata does not say.
    """
    try:
        given = dict(found.meta["options"])
        path = Path(given.pop("report"))
        return path, CheckOptions(**given | {"rules": tuple(Rule(**rule) for rule in given["rules"])})
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{found.path}: its metadata does not say how it was made") from None
