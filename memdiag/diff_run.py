"""Two reports compared: whether they fit together, the rules judged, the reports of it written. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memdiag import judging, tables
from memdiag.check_report import check_fit, check_place, digest_of, written
from memdiag.diff_columns import OTHER, Column, Compared, compared
from memdiag.diff_movers import movers
from memdiag.diff_report import COLUMNS, MOVERS, RULES, Diffed, DiffOptions, RuleRow
from memdiag.diff_rows import ColumnRow, MoverRow
from memdiag.diff_view import shown
from memdiag.errors import InputError, unknown
from memdiag.mean_interval import benjamini_hochberg
from memdiag.pairing import Pairing, paired_by, quoted
from memdiag.report_sql import Session, opened
from memdiag.rules import Change, Rule
from memdiag.verdicts import Outcome, Verdict

# What may differ between the reports without a word: the checkpoints, and which of a run, are what is compared, and
# where they were read changes no number.
MAY_DIFFER = ("checkpoint", "checkpoints", "steps", "trajectory", "device", "way")


def run(base: Path, new: Path, options: DiffOptions, out: Path | None, *, force: bool) -> Diffed:
    """Compare, judge, write; arguments and errors as `diff_report.diff`."""
    if out is not None:
        _check_directory(out, force=force)
    allowed = {"allow_partial": options.allow_partial, "any_version": options.any_version}
    metas = check_fit(base, **allowed), check_fit(new, **allowed)
    notes = _notes(base, new, metas, anyway=options.anyway)
    limits = {"time_limit": options.time_limit, "memory_limit": options.memory_limit}
    with opened({"base": base, "new": new}, **limits) as session:  # type: ignore[arg-type]
        pairing = paired_by(session, str(metas[0]["report"]), options.on)
        noise = [_floors(meta) for meta in metas]
        schemas = tables.read_schema(base), tables.read_schema(new)
        found = compared(session, pairing, *schemas, noise=noise, top=options.top)
        verdicts = _verdicts(session, pairing, found, options)
        moved = movers(session, pairing, found)
    notes += _more_notes(pairing, found)
    rows = [found_column.row(options.confidence) for found_column in found.columns]
    figures = {
        "report": metas[0]["report"],
        "keys": list(pairing.keys),
        "rows": {"base": pairing.base_rows, "new": pairing.new_rows},
        "paired": found.paired,
        "added": found.added,
        "removed": found.removed,
        "changed": {found_column.name: found_column.changed for found_column in found.columns},
    }
    outcome = Outcome(
        "diff",
        f"{base} and {new}",
        str(new),
        str(out or ""),
        tuple(verdicts),
        options.inconclusive,
        tables=shown(rows, moved, options.rules),
        notes=tuple(notes),
        figures=figures | {"columns": rows},
    )
    about = {
        "options": {"base": str(base), "new": str(new), **options.resolved()},
        "identity": {
            "report": "diff",
            "base": digest_of(metas[0]),
            "new": digest_of(metas[1]),
            "options": options.resolved(),
        },
        "of": figures,
        "passed": not outcome.failed,
        "notes": notes,
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    place = {name: out / name if out is not None else None for name in (COLUMNS, MOVERS, RULES)}
    judged = [
        {field.name: getattr(verdict, field.name) for field in dataclasses.fields(RuleRow)} for verdict in verdicts
    ]
    return Diffed(
        movers=written(MoverRow, moved, about, place[MOVERS]),
        rules=written(RuleRow, judged, about, place[RULES]),
        columns=written(ColumnRow, rows, about, place[COLUMNS]),
        outcome=outcome,
        path=out,
    )


def _check_directory(out: Path, *, force: bool) -> None:
    """Refuse a place where something else stands than an earlier diff."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a directory to --out")
    for name, row in ((COLUMNS, ColumnRow), (MOVERS, MoverRow), (RULES, RuleRow)):
        check_place(out / name, row.report, force=force)
    if (
        not force
        and out.is_dir()
        and any(out.iterdir())
        and not any((out / n).exists() for n in (COLUMNS, MOVERS, RULES))
    ):
        raise InputError(f"{out} is not empty and holds no report of diff; choose another --out")


def _notes(base: Path, new: Path, metas: Sequence[Mapping[str, Any]], *, anyway: bool) -> list[str]:
    """What the reader must know of two reports before their numbers.

    Raises:
        InputError: they are not of one kind, or not of the same data and options.
    """
    kinds = [meta["report"] for meta in metas]
    if kinds[0] != kinds[1]:
        raise InputError(f"{base} is a report {kinds[0]!r} and {new} is a report {kinds[1]!r}; give two of one kind")
    notes = [
        f"{path} is partial: its run has not finished" for path, meta in zip((base, new), metas) if meta.get("partial")
    ]
    identities = [meta.get("identity") for meta in metas]
    mine, theirs = map(_of_data_and_options, identities)
    differing = tables.differing_fields(mine, theirs)
    if differing:
        said = f"the reports are of different data or options (they differ in {differing})"
        if not anyway:
            raise InputError(f"{said}; make both alike, or compare them with --anyway")
        notes.append(f"{said}: a change may come from that")
    return notes


def _of_data_and_options(identity: Any) -> dict[str, Any]:
    """What of a report's identity must be the same; nothing if it does not state one."""
    if not isinstance(identity, dict):
        return {}
    kept = {key: value for key, value in identity.items() if key not in MAY_DIFFER}
    if isinstance(kept.get("options"), dict):
        kept["options"] = {key: value for key, value in kept["options"].items() if key not in MAY_DIFFER}
    return kept


def _more_notes(pairing: Pairing, found: Compared) -> list[str]:
    notes = []
    for count, what in ((found.added, "only in the new report"), (found.removed, "only in the base report")):
        if count:
            notes.append(f"{count:,} rows are {what}, and in no mean")
    for names, what in ((found.base_only, "base"), (found.new_only, "new")):
        if names:
            notes.append(f"only the {what} report has {', '.join(names)}")
    if pairing.left_out:
        notes.append(f"paired without {', '.join(pairing.left_out)}, of which each report has one")
    return notes


def _floors(meta: Mapping[str, Any]) -> dict[str, float]:
    """Half-widths at 95 % of what repeats of a measurement move the mean of a column by, as a report states them."""
    stated = meta.get("noise_floor")
    if not isinstance(stated, dict):
        return {}
    return {
        str(name): float(value)
        for name, value in stated.items()
        if isinstance(value, int | float) and 0 <= value < 1e300
    }


def _verdicts(session: Session, pairing: Pairing, found: Compared, options: DiffOptions) -> list[Verdict]:
    """Every rule judged, with Benjamini and Hochberg's allowance for there being several."""
    columns = {one.name: one for one in found.columns}
    sql = [dataclasses.replace(rule, confidence=options.confidence) for rule in options.rules if isinstance(rule, Rule)]
    by_sql = iter(judging.judge(session, sql, _pairs(pairing), seed=options.seed, with_p=True) if sql else [])
    verdicts = [
        _of_change(rule, columns, options.confidence) if isinstance(rule, Change) else next(by_sql)
        for rule in options.rules
    ]
    alpha = 1 - options.confidence
    out = []
    for verdict, q in zip(verdicts, benjamini_hochberg([verdict.p for verdict in verdicts])):
        sure = q is None or q <= alpha
        note = verdict.note
        if not sure and verdict.verdict != "inconclusive":
            note = f"its own interval says {verdict.verdict}; {len(verdicts)} rules together do not (q)"
        out.append(dataclasses.replace(verdict, q=q, verdict=verdict.verdict if sure else "inconclusive", note=note))
    return out


def _pairs(pairing: Pairing) -> str:
    """The rows of `base` and `new` that belong together, as SQL after FROM."""
    if pairing.in_order:
        return "base POSITIONAL JOIN new"
    same = (f"base.{quoted(name)} IS NOT DISTINCT FROM new.{quoted(name)}" for name in pairing.keys)
    return f"base JOIN new ON {' AND '.join(same)}"


def _of_change(rule: Change, columns: Mapping[str, Column], confidence: float) -> Verdict:
    """A rule of how far a mean may move, judged by the interval of the mean difference.

    Raises:
        InputError: there is no such column, or it has no mean.
    """
    known = [name for name, one in columns.items() if one.kind != OTHER]
    if rule.column not in known:
        if rule.column in columns:
            raise InputError(f"rule {rule.sql!r}: column {rule.column!r} is no number, so it has no mean")
        raise InputError(f"rule {rule.sql!r}: {unknown('column', rule.column, known)}")
    one = columns[rule.column]
    interval = one.interval(confidence)
    limits = [limit for limit in (rule.least, rule.most) if limit is not None]
    comparison = "between" if len(limits) == 2 else "<=" if rule.most is not None else ">="
    nearest = judging.nearest(limits, one.difference)
    note, p = interval.note, None
    if one.difference is None:
        verdict, note = "fail", "undefined: no pair has a value on both sides"
    elif not one.min and not one.max:  # nothing moved, so there is nothing to be unsure of
        verdict, note = "pass", "no pair changed"
    else:
        verdict = judging.judged(comparison, limits, interval)
        p = None if nearest is None else one.p(nearest)
    return Verdict(
        rule=rule.title,
        sql=rule.sql,
        verdict=verdict,
        observed=judging.rounded(one.difference),
        lo=judging.rounded(interval.lo),
        hi=judging.rounded(interval.hi),
        limit=limits[-1],
        comparison="±" if len(limits) == 2 else comparison,
        n=one.n,
        confidence=confidence if interval.lo is not None else None,
        method=interval.method,
        p=p,
        q=None,
        note=note,
    )
