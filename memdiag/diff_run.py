"""Two reports compared: whether they fit together, the rules judged, the reports of it written. Needs no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from memdiag import judging, tables
from memdiag.check_report import as_row, check_fit, check_place, digest_of, noise_floors, written
from memdiag.diff_columns import BOOLEAN, DIGITS, OTHER, Column, Compared, compared
from memdiag.diff_movers import movers
from memdiag.diff_report import COLUMNS, MOVERS, RULES, Diffed, DiffOptions, RuleRow
from memdiag.diff_rows import ColumnRow, MoverRow
from memdiag.diff_view import shown
from memdiag.errors import InputError, unknown
from memdiag.mean_interval import benjamini_hochberg, p_of_rate
from memdiag.pairing import Pairing, paired_by, quoted
from memdiag.report_sql import Session, opened
from memdiag.rule_sql import Mean, parse
from memdiag.rules import Change, Rule
from memdiag.verdicts import Outcome, Verdict

# What may differ between the reports without a word: the checkpoints, and which of a run, are what is compared, and
# where they were read changes no number.
MAY_DIFFER = ("checkpoint", "checkpoints", "steps", "trajectory", "device", "way")


def run(
    base: Path, new: Path, options: DiffOptions, out: Path | None, *, force: bool, own_process: bool = False
) -> Diffed:
    """Compare, judge, write; arguments and errors as `diff_report.diff`."""
    if out is not None:
        _check_directory(out, (base, new), force=force)
    allowed = {"allow_partial": options.allow_partial, "any_version": options.any_version}
    metas = check_fit(base, **allowed), check_fit(new, **allowed)
    notes = _notes(base, new, metas, anyway=options.anyway)
    limits = {"time_limit": options.time_limit, "memory_limit": options.memory_limit, "own_process": own_process}
    with opened({"base": base, "new": new}, **limits) as session:  # type: ignore[arg-type]
        pairing = paired_by(session, str(metas[0]["report"]), options.on)
        noise = [noise_floors(meta) for meta in metas]
        schemas = tables.read_schema(base), tables.read_schema(new)
        found = compared(session, pairing, *schemas, noise=noise, top=options.top, seed=options.seed)
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
    judged = [as_row(verdict, None) | {"p": verdict.p, "q": verdict.q} for verdict in verdicts]
    return Diffed(
        movers=written(MoverRow, moved, about, place[MOVERS]),
        rules=written(RuleRow, judged, about, place[RULES]),
        columns=written(ColumnRow, rows, about, place[COLUMNS]),
        outcome=outcome,
        path=out,
    )


def _check_directory(out: Path, compared: Sequence[Path], *, force: bool) -> None:
    """Refuse a place where something else stands than an earlier diff, or one of the reports to compare."""
    for place in (out / name for name in (COLUMNS, MOVERS, RULES)):
        for path in compared:
            if place.exists() and path.exists() and place.samefile(path):
                raise InputError(f"{place} is {path}, which is compared; choose another --out")
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


def _verdicts(session: Session, pairing: Pairing, found: Compared, options: DiffOptions) -> list[Verdict]:
    """Every rule judged, with Benjamini and Hochberg's allowance for there being several."""
    columns = {one.name: one for one in found.columns}
    floors = {one.name: one.noise_floor for one in found.columns if one.noise_floor}
    sql = [dataclasses.replace(rule, confidence=options.confidence) for rule in options.rules if isinstance(rule, Rule)]
    known = _known_floors(session, sql, floors)
    by_value = {values: floor for values, floor in known if values is not None}
    how = {"seed": options.seed, "with_p": True, "floors": by_value}
    judged = judging.judge(session, sql, _pairs(pairing), **how) if sql else []  # type: ignore[arg-type]
    by_sql = (_noted(_without_vain_p(verdict), floors, values) for verdict, (values, _) in zip(judged, known))
    verdicts = [
        _of_change(rule, columns, options.confidence) if isinstance(rule, Change) else next(by_sql)
        for rule in options.rules
    ]
    alpha = 1 - options.confidence
    out = []
    p = [None if verdict.p is None else float(f"{verdict.p:.{DIGITS}g}") for verdict in verdicts]
    for verdict, mine, q in zip(verdicts, p, benjamini_hochberg(p)):
        q = None if q is None else float(f"{q:.{DIGITS}g}")
        sure = q is None or q <= alpha
        note = verdict.note
        if not sure and verdict.verdict != "inconclusive":
            note = _joined(f"its own interval says {verdict.verdict}; {len(verdicts)} rules together do not (q)", note)
        final = verdict.verdict if sure else "inconclusive"
        out.append(dataclasses.replace(verdict, p=mine, q=q, verdict=final, note=note))
    return out


def _known_floors(
    session: Session, rules: Sequence[Rule], floors: Mapping[str, float]
) -> list[tuple[str | None, float]]:
    """Of each rule the SQL of the values that it averages, with their noise floor; None if they have none."""
    if not floors:
        return [(None, 0.0)] * len(rules)

    def values(text: str) -> str | None:
        statistic = parse(session, text, of=f"rule {text!r}").statistic
        return statistic.values if isinstance(statistic, Mean) else None

    spelled = {}  # as DuckDB writes the difference of a column, either way round; names in it are alike in any case
    for name, floor in floors.items():
        for one, other in (("new", "base"), ("base", "new")):
            sql = values(f"avg({one}.{quoted(name)} - {other}.{quoted(name)}) < 0")
            spelled[(sql or "").casefold()] = floor
    found = [values(rule.sql) for rule in rules]
    return [(one, spelled[one.casefold()]) if one and one.casefold() in spelled else (None, 0.0) for one in found]


def _noted(verdict: Verdict, floors: Mapping[str, float], values: str | None) -> Verdict:
    """The verdict; if its SQL is about a column with a noise floor that is not in its interval, with a note of that."""
    about = [name for name in floors if re.search(rf'\.\s*"?{re.escape(name)}\b', verdict.sql, re.IGNORECASE)]
    if not about or (values is not None and verdict.lo is not None):
        return verdict
    told = f"the noise floor of {', '.join(about)} is not in it; write {about[0]}: ±x"
    return dataclasses.replace(verdict, note=_joined(verdict.note, told))


def _without_vain_p(verdict: Verdict) -> Verdict:
    """The verdict of a rate that passes, with a p of those limits alone that a rate can break; None if it can none."""
    if verdict.verdict != "pass" or verdict.method != "Clopper-Pearson" or not verdict.n or verdict.limit is None:
        return verdict
    value, limits = verdict.observed or 0.0, [verdict.limit]
    if verdict.comparison == "between" and verdict.least is not None:
        limits = [verdict.least, verdict.limit]
    strict = verdict.comparison in ("<", ">")
    real = [one for one in limits if 0 < one < 1 or (strict and one in (0, 1))]
    if real == limits:
        return verdict
    p = partial(p_of_rate, round(value * verdict.n), verdict.n)
    return dataclasses.replace(verdict, p=judging.p_of_limits(p, real, value))


def _joined(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None


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
    value: float | None = one.difference
    p: float | None = None
    notes = [interval.note, None]
    if one.one_sided:
        notes[1] = f"{one.one_sided:,} {'pair has' if one.one_sided == 1 else 'pairs have'} a value on one side only"
    if one.odd:
        pairs, were = ("pair", "was") if one.odd == 1 else ("pairs", "were")
        verdict, notes[0] = "fail", f"undefined: {one.odd:,} {pairs} became NaN or infinite, or {were}"
        value, interval = None, dataclasses.replace(interval, lo=None, hi=None, method=None)
    elif value is None:
        verdict = "fail"
        notes[0] = "undefined: " + ("no pair has a value on both sides" if not one.n else "values too large to average")
    elif not one.changed:  # nothing moved, so there is nothing to be unsure of
        verdict, notes[0] = "pass", "no pair changed"
    elif interval.lo is None:  # nothing can be shown, but what does not hold as it stands must not pass
        holds = (rule.least is None or value >= rule.least) and (rule.most is None or value <= rule.most)
        verdict = "inconclusive" if holds else "fail"
    else:
        verdict = judging.judged(comparison, limits, interval)
        # a difference of rates is within -1 and 1: a limit out there is none
        real = [limit for limit in limits if one.kind != BOOLEAN or abs(limit) < 1]
        p = judging.p_of_limits(one.p, real, value)
    return Verdict(
        rule=rule.title,
        sql=rule.sql,
        verdict=verdict,
        observed=one.rounded(value),
        lo=one.rounded(interval.lo),
        hi=one.rounded(interval.hi),
        limit=limits[-1],
        comparison="±" if len(limits) == 2 else comparison,
        n=one.n,
        confidence=confidence,
        method=interval.method,
        p=p,
        q=None,
        note=_joined(*notes),
        least=limits[0] if len(limits) == 2 else None,
    )
