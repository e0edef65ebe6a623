"""Rules run over rows and judged: by their value, or by the interval of the mean or rate that they are about.

Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memdiag.errors import InputError
from memdiag.mean_interval import (
    MOST_RESAMPLED,
    Interval,
    mean_interval,
    of_moments,
    p_of_moments,
    p_of_rate,
    p_value,
    rate_interval,
)
from memdiag.report_sql import Session
from memdiag.rule_sql import Mean, Parsed, Rate, expression, parse
from memdiag.rules import Rule
from memdiag.verdicts import Verdict


def judge(
    session: Session, rules: Sequence[Rule], source: str, *, seed: int = 0, with_p: bool = False
) -> list[Verdict]:
    """Judge rules over the rows of a source, those about the same rows in one pass.

    Args:
        session: holds what the source names.
        rules: to judge.
        source: what stands after FROM, without a condition.
        seed: of resamples.
        with_p: also how likely it is that what has an interval is the limit.
    Raises:
        InputError: a rule is no boolean expression about all rows, names what is not there, or must have an interval
            and cannot.
    """
    found: dict[int, Verdict] = {}
    for where in dict.fromkeys(rule.where for rule in rules):
        of = f"--where {where!r}"
        kept = f"{source} WHERE {'true' if where is None else expression(session, where, of=of)}"
        session.types(f"SELECT 1 FROM {kept}", of=of)
        mine = [i for i, rule in enumerate(rules) if rule.where == where]
        for i, verdict in zip(mine, _judged_together(session, [rules[i] for i in mine], kept, seed, with_p)):
            found[i] = verdict
    return [found[i] for i in range(len(rules))]


@dataclass(frozen=True)
class _Asked:
    """A rule with the columns of the one query that answers it."""

    rule: Rule
    parsed: Parsed
    statistic: Mean | Rate | None
    columns: tuple[str, ...]


def _judged_together(session: Session, rules: Sequence[Rule], source: str, seed: int, with_p: bool) -> list[Verdict]:
    asked = [_ask(session, rule, source) for rule in rules]
    columns = ["count(*)", *(column for one in asked for column in one.columns)]
    of = _named(rules[0]) if len(rules) == 1 else f"one of {len(rules)} rules"
    (row,) = session.rows(f"SELECT {', '.join(columns)} FROM {source}", of=of)
    rows, at, out = int(row[0]), 1, []
    for one in asked:
        values = row[at : at + len(one.columns)]
        at += len(one.columns)
        out.append(_verdict(session, one, values, rows, source, seed, with_p))
    return out


def _named(rule: Rule) -> str:
    text = rule.title if len(rule.title) <= 80 else rule.title[:79] + "…"
    return f"rule {text!r}"


def _ask(session: Session, rule: Rule, source: str) -> _Asked:
    of = _named(rule)
    parsed = parse(session, rule.sql, of=of)
    _check_boolean(session, parsed, source, of)
    columns = [parsed.sql]
    for side in (parsed.observed, *parsed.limits):
        columns.append("NULL" if side is None else f"TRY_CAST({side} AS DOUBLE)")
    statistic = None
    if rule.confidence is not None:
        statistic = parsed.statistic if parsed.comparison in ("<", "<=", ">", ">=", "between") else None
        if statistic is None and rule.must:
            raise InputError(
                f"{of} has a confidence, but no interval: only avg(…) and shares of counts compared with a number by "
                "<, <=, >, >= or BETWEEN have one; leave its confidence out"
            )
    if isinstance(statistic, Rate):
        columns += [
            f"count(*) FILTER (WHERE {statistic.hit})",
            f"count(*) FILTER (WHERE {statistic.among})",
            f"count(*) FILTER (WHERE {statistic.hit} AND NOT coalesce({statistic.among}, false))",
        ]
    elif isinstance(statistic, Mean):
        (kind,) = session.types(f"SELECT {statistic.values} FROM {source}", of=of)
        value, only = f"CAST({statistic.values} AS DOUBLE)", f"FILTER (WHERE {statistic.among})"
        finite = f"CASE WHEN isfinite({value}) THEN {value} END"
        # from the limit on, so that the third power does not lose its digits far from 0
        shift = f"CAST({parsed.limits[0]} AS DOUBLE)"
        columns += [
            f"count({value}) {only}",
            f"avg({finite}) {only}",
            f"stddev_samp({finite}) {only}",
            f"skewness({finite} - {shift}) {only}",
            f"count(*) FILTER (WHERE {statistic.among} AND {value} = 1)",
            f"count(*) FILTER (WHERE {statistic.among} AND {value} NOT IN (0, 1))",
            f"count(*) FILTER (WHERE {statistic.among} AND NOT isfinite({value}))",
            "false" if kind in ("DOUBLE", "FLOAT") else "true",
        ]
    return _Asked(rule, parsed, statistic, tuple(columns))


def _check_boolean(session: Session, parsed: Parsed, source: str, of: str) -> None:
    """Raise InputError unless the rule gives one truth value for all rows."""
    try:
        (type_,) = session.types(f"SELECT {parsed.sql} FROM {source} GROUP BY ()", of=of)
    except InputError as error:
        if "must appear in the GROUP BY clause" in str(error):
            raise InputError(
                f"{of} is about one row; say what of all rows: avg(…), max(…), count(*) FILTER (WHERE …), or "
                "bool_and(…) for every row"
            ) from None
        if "avg(BOOLEAN)" in str(error) or "mean(BOOLEAN)" in str(error):
            raise InputError(f"{of} takes the mean of truth values; make them numbers: avg(…::INT)") from None
        raise
    if type_ != "BOOLEAN":
        raise InputError(f"{of} gives {type_.lower()}, not true or false; compare it with a limit")


def _verdict(
    session: Session, one: _Asked, values: Sequence[Any], rows: int, source: str, seed: int, with_p: bool
) -> Verdict:
    rule, parsed = one.rule, one.parsed
    holds, observed, *limits = values[: 2 + max(1, len(parsed.limits))]
    numbers = tuple(rounded(limit) for limit in limits) if parsed.comparison else (None,)
    rest = values[2 + max(1, len(parsed.limits)) :] if parsed.limits else values[2:]
    note = p = None
    interval = Interval(rounded(observed), None, None, rows, None, None)
    if one.statistic is not None:
        limit = nearest(numbers, interval.value) if with_p else None
        found, p = _interval(session, one.statistic, rest, rule, source, seed, limit)
        interval = Interval(interval.value, found.lo, found.hi, found.n, found.method, found.note)
        note = found.note
    elif rule.confidence is not None:
        note = "no mean or rate compared with a number: judged by its value"
    sides = [side for side in (observed, *limits) if side is not None]
    if holds is None:
        verdict, note = "fail", "undefined: no row has a value"
    elif not all(map(math.isfinite, sides)):  # SQL calls NaN greater than every number
        verdict, note = "fail", f"undefined: it compares {' with '.join(f'{side:g}' for side in sides)}"
    elif one.statistic is not None:
        verdict = judged(parsed.comparison or "", numbers, interval)
    else:
        verdict = "pass" if holds else "fail"
    return Verdict(
        rule=rule.title,
        sql=rule.sql,
        verdict=verdict,
        observed=interval.value,
        lo=rounded(interval.lo),
        hi=rounded(interval.hi),
        limit=numbers[-1],
        comparison=parsed.comparison,
        n=interval.n,
        confidence=rule.confidence if interval.lo is not None or one.statistic is not None else None,
        method=interval.method,
        p=p,
        q=None,
        note=note,
    )


def nearest(limits: Sequence[float | None], value: float | None) -> float | None:
    """The limit that a value is nearest to."""
    known = [limit for limit in limits if limit is not None]
    return min(known, key=lambda limit: abs(limit - value)) if value is not None and known else None


def _interval(
    session: Session,
    statistic: Mean | Rate,
    values: Sequence[Any],
    rule: Rule,
    source: str,
    seed: int,
    limit: float | None,
) -> tuple[Interval, float | None]:
    """The interval, and p that the figure is the limit if there is one."""
    confidence = rule.confidence or 0.0
    if isinstance(statistic, Rate):
        hits, n, outside = values
        if outside:
            note = f"{outside:,} of the rows counted above are not among those below: no share, so no interval"
            return Interval(None, None, None, n, None, note), None
        return rate_interval(hits, n, confidence), None if limit is None else p_of_rate(hits, n, limit)
    n, mean, std, skewness, ones, others, infinite, whole = values
    if infinite:
        return Interval(None, None, None, n, None, None), None  # nor has the mean itself a value
    if whole and not others:  # truth values as numbers: their mean is a rate
        return rate_interval(ones, n, confidence), None if limit is None else p_of_rate(ones, n, limit)
    if n > MOST_RESAMPLED:
        moments = (n, mean, std, skewness)
        return of_moments(*moments, confidence), None if limit is None else p_of_moments(*moments, limit)
    kept = f"SELECT CAST({statistic.values} AS DOUBLE) AS value FROM {source} AND {statistic.among}"
    column = session.column(f"SELECT value FROM ({kept}) WHERE value IS NOT NULL", of=_named(rule))
    found = np.asarray(column, dtype=np.float64)
    p = None if limit is None else p_value(found, limit, seed=seed)
    return mean_interval(found, confidence, seed=seed), p


def judged(comparison: str, limits: Sequence[float | None], interval: Interval) -> str:
    """Whether a rule holds for all of an interval, for none of it, or cannot be told.

    Args:
        comparison: "<", "<=", ">", ">=" or "between".
        limits: one, or the two ends of between.
        interval: of what is compared.
    """
    lo, hi = interval.lo, interval.hi
    if lo is None or hi is None or any(limit is None or math.isnan(limit) for limit in limits):
        return "inconclusive"
    low = float(limits[0] or 0.0)
    high = float(limits[-1] or 0.0)
    holds, fails = {
        "<": (hi < high, lo >= high),
        "<=": (hi <= high, lo > high),
        ">": (lo > low, hi <= low),
        ">=": (lo >= low, hi < low),
        "between": (lo >= low and hi <= high, hi < low or lo > high),
    }[comparison]
    return "pass" if holds else "fail" if fails else "inconclusive"


def rounded(value: Any) -> float | None:
    """A figure to twelve digits: sums taken in another order by more threads differ beyond them."""
    if value is None or not math.isfinite(float(value)):
        return None
    return float(f"{float(value):.12g}")
