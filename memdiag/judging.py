"""Rules run over rows and judged: by their value, or by the interval of the mean or rate that they are about.

Needs no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    widened,
)
from memdiag.report_sql import Session
from memdiag.rule_sql import Mean, Parsed, Rate, expression, parse
from memdiag.rules import Rule
from memdiag.verdicts import Verdict


def judge(
    session: Session,
    rules: Sequence[Rule],
    source: str,
    *,
    seed: int = 0,
    with_p: bool = False,
    floors: Mapping[str, float] | None = None,
) -> list[Verdict]:
    """Judge rules over the rows of a source, those about the same rows in one pass.

    Args:
        session: holds what the source names.
        rules: to judge.
        source: what stands after FROM, without a condition.
        seed: of resamples.
        with_p: of two reports: also how likely it is that what has an interval is the limit; and without a row there
            is nothing to pass.
        floors: half-widths at 95 % of what repeats of the measurement move a mean by, by the SQL of its values.
    Raises:
        InputError: a rule is no boolean expression about all rows, names what is not there, or must have an interval
            and cannot.
    """
    found: dict[int, Verdict] = {}
    how = _How(seed, with_p, floors or {})
    for where in dict.fromkeys(rule.where for rule in rules):
        of = f"--where {where!r}"
        kept = f"{source} WHERE {'true' if where is None else expression(session, where, of=of)}"
        session.types(f"SELECT 1 FROM {kept}", of=of)
        mine = [i for i, rule in enumerate(rules) if rule.where == where]
        for i, verdict in zip(mine, _judged_together(session, [rules[i] for i in mine], kept, how)):
            found[i] = verdict
    return [found[i] for i in range(len(rules))]


@dataclass(frozen=True)
class _How:
    seed: int
    with_p: bool
    floors: Mapping[str, float]


@dataclass(frozen=True)
class _Asked:
    """A rule with the columns of the one query that answers it."""

    rule: Rule
    parsed: Parsed
    statistic: Mean | Rate | None
    columns: tuple[str, ...]


def _judged_together(session: Session, rules: Sequence[Rule], source: str, how: _How) -> list[Verdict]:
    asked = [_ask(session, rule, source) for rule in rules]
    columns = ["count(*)", *(column for one in asked for column in one.columns)]
    of = _named(rules[0]) if len(rules) == 1 else f"one of {len(rules)} rules"
    found = session.rows(f"SELECT {', '.join(columns)} FROM {source}", of=of)
    if len(found) != 1:
        raise InputError(f"{of} gives {len(found):,} values; a rule is one, true or false")
    rows, at, out = int(found[0][0]), 1, []
    for one in asked:
        out.append(_verdict(session, one, found[0][at : at + len(one.columns)], rows, source, how))
        at += len(one.columns)
    return out


def _named(rule: Rule) -> str:
    text = rule.title if len(rule.title) <= 80 else rule.title[:79] + "…"
    return f"rule {text!r}"


def _ask(session: Session, rule: Rule, source: str) -> _Asked:
    of = _named(rule)
    parsed = parse(session, rule.sql, of=of)
    _check_boolean(session, parsed, source, of)
    compared = [*([parsed.observed] if parsed.observed else []), *parsed.limits, *parsed.sides]
    types = session.types(f"SELECT {', '.join(compared)} FROM {source} GROUP BY ()", of=of) if compared else []
    is_text = bool(types) and set(types) == {"VARCHAR"}  # compared as text, and no figure
    columns = [parsed.sql, *("NULL" if is_text else f"TRY_CAST({side} AS DOUBLE)" for side in compared)]
    statistic = parsed.statistic if parsed.comparison in ("<", "<=", ">", ">=", "between") else None
    if statistic is None and rule.confidence is not None and rule.must:
        raise InputError(
            f"{of} has a confidence, but no interval: only avg(…) and shares of counts compared with a number by "
            "<, <=, >, >= or BETWEEN have one; leave its confidence out"
        )
    truth = statistic.truth if isinstance(statistic, Mean) else None
    if isinstance(statistic, Mean) and truth is not None:
        (kind,) = session.types(f"SELECT {truth} FROM {source}", of=of)
        if kind == "BOOLEAN":
            statistic = Rate(f"({statistic.values} = 1)", f"({statistic.among} AND {statistic.values} IS NOT NULL)")
    return _Asked(rule, parsed, statistic, (*columns, *_columns(statistic, with_interval=rule.confidence is not None)))


def _columns(statistic: Mean | Rate | None, *, with_interval: bool) -> list[str]:
    """What must be known of the rows that a statistic is of: how many, and for its interval more."""
    if isinstance(statistic, Rate):
        counted = f"count(*) FILTER (WHERE {statistic.among})"
        return (
            [counted]
            if not with_interval
            else [
                counted,
                f"count(*) FILTER (WHERE {statistic.hit} AND {statistic.among})",
                f"count(*) FILTER (WHERE {statistic.hit} AND NOT coalesce({statistic.among}, false))",
            ]
        )
    if isinstance(statistic, Mean):
        value, only = f"CAST({statistic.values} AS DOUBLE)", f"FILTER (WHERE {statistic.among})"
        finite = f"CASE WHEN isfinite({value}) THEN {value} END"
        counted = f"count({value}) {only}"
        return (
            [counted]
            if not with_interval
            else [
                counted,
                f"avg({finite}) {only}",
                f"stddev_samp({finite}) {only}",
                f"skewness({finite}) {only}",
                f"count(*) FILTER (WHERE {statistic.among} AND NOT isfinite({value}))",
            ]
        )
    return []


def _check_boolean(session: Session, parsed: Parsed, source: str, of: str) -> None:
    """Raise InputError unless the rule gives one truth value for all rows."""
    try:
        types = session.types(f"SELECT {parsed.sql} FROM {source} GROUP BY ()", of=of)
    except InputError as error:
        if "must appear in the GROUP BY clause" in str(error):
            raise InputError(
                f"{of} is about one row; say what of all rows: avg(…), max(…), count(*) FILTER (WHERE …), or "
                "bool_and(…) for every row"
            ) from None
        if "avg(BOOLEAN)" in str(error) or "mean(BOOLEAN)" in str(error):
            raise InputError(f"{of} takes the mean of truth values; make them numbers: avg(…::INT)") from None
        raise
    if types != ["BOOLEAN"]:
        gives = types[0].lower() if len(types) == 1 else f"{len(types)} values"
        raise InputError(f"{of} gives {gives}, not true or false; compare it with a limit")


def _verdict(session: Session, one: _Asked, values: Sequence[Any], rows: int, source: str, how: _How) -> Verdict:
    rule, parsed = one.rule, one.parsed
    known = 1 + (parsed.observed is not None) + len(parsed.limits) + len(parsed.sides)
    holds, *sides = values[:known]
    observed, *limits = sides if parsed.comparison else (None,)
    numbers = [rounded(limit) for limit in limits]
    interval, p, note = Interval(rounded(observed), None, None, rows, None, None), None, None
    if one.statistic is not None:
        interval = dataclasses.replace(interval, n=int(values[known]))
        if rule.confidence is not None:
            interval, p = _interval(session, one, values[known:], numbers, interval, source, how)
            note = interval.note
    elif rule.confidence is not None:
        note = "no mean or rate compared with a number: judged by its value"
    with_interval = one.statistic is not None and rule.confidence is not None
    undefined = _undefined(parsed, holds, sides, rows, how)
    if undefined is not None:  # and so is its interval
        verdict, note, p = "fail", f"undefined: {undefined}", None
        interval = dataclasses.replace(interval, lo=None, hi=None, method=None)
    elif not with_interval:
        verdict = "pass" if holds else "fail"
    else:
        verdict = judged(parsed.comparison or "", numbers, interval)
        if interval.lo is None and not holds:  # nothing can be shown; but what does not hold as it stands must not pass
            verdict = "fail"
    return Verdict(
        rule=rule.title,
        sql=rule.sql,
        verdict=verdict,
        observed=interval.value,
        lo=rounded(interval.lo),
        hi=rounded(interval.hi),
        limit=numbers[-1] if numbers else None,
        comparison=parsed.comparison,
        n=interval.n,
        confidence=rule.confidence if with_interval else None,
        method=interval.method,
        p=p,
        q=None,
        note=note,
        least=numbers[0] if len(numbers) == 2 else None,
    )


def _undefined(parsed: Parsed, holds: bool | None, sides: Sequence[Any], rows: int, how: _How) -> str | None:
    """Why a rule has no truth value, if it has none: it fails then, whatever SQL makes of it."""
    if not rows and how.with_p:
        return "no row of the one report has a partner in the other"
    figures = [side for side in sides if side is not None]
    if not all(map(math.isfinite, figures)):  # SQL calls NaN greater than every number
        told = figures if parsed.comparison else [side for side in figures if not math.isfinite(side)]
        return f"it compares {' with '.join(f'{side:g}' for side in told)}"
    if holds is None:
        return "its limit is null" if parsed.comparison and sides[0] is not None else "no row has a value"
    return None


def _interval(
    session: Session,
    one: _Asked,
    values: Sequence[Any],
    limits: Sequence[float | None],
    observed: Interval,
    source: str,
    how: _How,
) -> tuple[Interval, float | None]:
    """The interval of what a rule is about, and p that it is the limit if that is asked for."""
    confidence, statistic = one.rule.confidence or 0.0, one.statistic
    p_of: Callable[[float], float | None]
    if isinstance(statistic, Rate):
        n, hits, outside = (int(value) for value in values)
        if outside:
            note = f"{outside:,} of the rows counted above are not among those below: no share, so no interval"
            return dataclasses.replace(observed, note=note), None
        found, p_of = rate_interval(hits, n, confidence), partial(p_of_rate, hits, n)
    else:
        assert isinstance(statistic, Mean)
        n, mean, std, skewness, infinite = values
        floor = how.floors.get(statistic.values, 0.0)
        if infinite:
            return observed, None  # nor has the mean itself a value
        if n > MOST_RESAMPLED:
            found = of_moments(n, mean, std, skewness, confidence)
            p_of = partial(p_of_moments, n, mean, std, skewness, floor=floor)
        else:
            kept = f"SELECT CAST({statistic.values} AS DOUBLE) AS value FROM {source} AND {statistic.among}"
            column = session.column(f"SELECT value FROM ({kept}) WHERE value IS NOT NULL", of=_named(one.rule))
            x = np.asarray(column, dtype=np.float64)
            found = mean_interval(x, confidence, seed=how.seed)
            p_of = partial(p_value, x, floor=floor, seed=how.seed)
        found = widened(found, floor, confidence) if floor else found
    p = p_of_limits(p_of, limits, observed.value) if how.with_p else None
    return dataclasses.replace(found, value=observed.value), p


def p_of_limits(
    p_of: Callable[[float], float | None], limits: Sequence[float | None], value: float | None
) -> float | None:
    """p that a figure is beyond its limits, or within them, by chance.

    Of one limit, or outside of two, that of the limit it is nearest to. Between two limits the greater of both: it has
    to be told from each.
    """
    known = [limit for limit in limits if limit is not None]
    if value is None or not known:
        return None
    if len(known) == 2 and known[0] <= value <= known[1]:
        both = [p_of(limit) for limit in known]
        return None if None in both else max(p for p in both if p is not None)
    return p_of(min(known, key=lambda limit: abs(limit - value)))


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
