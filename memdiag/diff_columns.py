"""What changed between two reports, column by column, over the pairs of their rows.

The pairs are the sample: a mean difference has an interval over them, by `mean_interval` for numbers and by
`paired_rates` for booleans. Two kinds of noise are told apart from a change, where the reports know of them:

    a value with a standard error    a pair moved beyond noise if |new - base| > z sqrt(se_base² + se_new²)
    a mean with a noise floor f      half-widths h become sqrt(h² + f_base² + f_new²), because noise that all rows
                                     share, e.g. that of training, does not get less with more rows

Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag import mean_interval, paired_rates, tables
from memdiag.errors import InputError
from memdiag.mean_interval import MOST_RESAMPLED, Interval
from memdiag.pairing import HERE, Pairing, example_key, quoted
from memdiag.report_sql import Session

NUMBER, BOOLEAN, OTHER = "number", "boolean", "other"
NUMBERING = frozenset({"row", "step"})  # says where a row stands, not what it holds; a key it is compared by
# Whole numbers that are names: they change, but their difference means nothing.
NAMES = frozenset({"label", "true_label", "seed", "model", "group", "content", "draw"})
SE_OF = {"memorization": "se", "influence": "se", "memorization_soft": "se_soft"}  # those not called NAME_se
NOISE_CONFIDENCE = 0.95
TOGETHER = 20  # columns of one query: the time to plan it grows with their square
DIGITS = 9  # of figures: sums taken in another order by more threads differ beyond them
_SHIFTED = 10  # standard deviations that differences are off 0 when sums of powers lose too many digits
_MIXED = "mixed"  # OTHER of two types, compared as text
_ABOUT = "comparing the reports"


@dataclass(frozen=True)
class Column:
    """A column of two reports, over the pairs with a finite value on both sides; fields as `diff_rows.ColumnRow`."""

    name: str
    kind: str
    unit: str
    changed: int
    sql: str  # of new - base in a row of the pairing; "" for kind OTHER
    n: int | None = None
    base: float | None = None
    new: float | None = None
    difference: float | None = None
    std: float | None = None
    skewness: float | None = None
    min: float | None = None
    max: float | None = None
    reach: float | None = None  # |difference| of the `Compared.top`-th pair by size, or of the last of fewer
    beyond_noise: int | None = None
    noise_floor: float | None = None
    one_sided: int = 0  # pairs with a value on one side and a null on the other
    odd: int = 0  # pairs with values on both sides of which one is NaN or infinite, or their difference is
    values: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)  # (n,) differences, if few
    resampled: Callable[[float], Interval] | None = field(default=None, repr=False, compare=False)  # of `values`

    @cached_property
    def intervals(self) -> Callable[[float], Interval]:
        """alpha -> interval of the mean difference, without the noise floor.

        Raises:
            ValueError: it has no difference, see `kind`.
        """
        if self.kind == OTHER:
            raise ValueError(f"column {self.name} has no difference")
        n, mean = self.n or 0, self.difference
        if n and self.kind == BOOLEAN:
            counts = _counts(n, self.base or 0.0, mean or 0.0, self.std or 0.0)
            return lambda alpha: paired_rates.of_counts(*counts, alpha)
        if self.resampled is not None:
            return self.resampled
        if n > 1 and (mean is None or self.std is None or (self.std and self.skewness is None)):
            return lambda alpha: Interval(mean, None, None, n, None, "values too large to square")
        return mean_interval.moments_at(n, mean or 0.0, self.std or 0.0, self.skewness or 0.0)

    def interval(self, confidence: float) -> Interval:
        """The mean difference and its interval, widened by the noise floor; errors as `intervals`."""
        return mean_interval.widened(self.intervals(1 - confidence), self.noise_floor or 0.0, confidence)

    def p(self, limit: float) -> float | None:
        """Two-sided p that the mean difference is `limit`, dual to `interval`, None where it has none; errors too."""
        return mean_interval.p_of(self.intervals, limit, floor=self.noise_floor or 0.0)

    def rounded(self, difference: float | None) -> float | None:
        """A mean difference, or an end of its interval, to `DIGITS`; near 0 of its standard error."""
        return _to_digits(difference, (self.std or 0.0) / math.sqrt(self.n or 1))

    def row(self, confidence: float) -> dict[str, Any]:
        """As a row of ColumnRow."""
        names = (
            "kind",
            "unit",
            "changed",
            "one_sided",
            "n",
            "base",
            "new",
            "difference",
            "std",
            "skewness",
            "min",
            "max",
        )
        found = Interval(None, None, None, 0, None, None) if self.kind == OTHER else self.interval(confidence)
        return {
            "column": self.name,
            **{name: getattr(self, name) for name in (*names, "beyond_noise", "noise_floor")},
            "lo": self.rounded(found.lo),
            "hi": self.rounded(found.hi),
            "confidence": None if found.lo is None else confidence,
            "method": found.method,
            "note": found.note,
        }


@dataclass(frozen=True)
class Compared:
    """Two reports compared: how many rows pair, and every column that both have."""

    paired: int
    added: int
    removed: int
    columns: tuple[Column, ...]
    base_only: tuple[str, ...]  # columns
    new_only: tuple[str, ...]
    not_compared: tuple[str, ...]  # clocks and numbering
    top: int


def compared(
    session: Session,
    pairing: Pairing,
    base: pa.Schema,
    new: pa.Schema,
    *,
    noise: Sequence[Mapping[str, float]] = ({}, {}),
    top: int = 10,
    seed: int = 0,
) -> Compared:
    """The columns of two reports, over the pairs of their rows. One pass over these for `TOGETHER` columns.

    Args:
        session: with the views `base` and `new`.
        pairing: of their rows.
        base: the columns of the base report, with units.
        new: those of the new one.
        noise: noise floors of the means of each, half-widths at 95 % by column; a column counts if both have one.
        top: how many pairs `diff_movers.movers` will show of each column.
        seed: of resamples.
    Raises:
        InputError: no row of one has a partner in the other.
    """
    units = {name: unit for name, _, unit, *_ in tables.described(new)}
    units |= {name: unit or units.get(name, "") for name, _, unit, *_ in tables.described(base)}
    rest = [name for name in base.names if name in new.names and name not in (*pairing.keys, *pairing.left_out)]
    unlike = [name for name in rest if name in NUMBERING or units[name] == "s" or units[name].endswith("/s")]
    kinds = {name: _kind(name, base.field(name).type, new.field(name).type) for name in rest if name not in unlike}

    sides = [_count(f'b."{HERE}" AND n."{HERE}"'), _count(f'b."{HERE}" IS NULL'), _count(f'n."{HERE}" IS NULL')]
    asked = [_aggregates(name, kinds, pairing, top, guarded=False) for name in kinds]
    told: list[Any] = []
    for start in range(0, max(len(asked), 1), TOGETHER):
        part = [*(sides if start == 0 else ()), *(sql for of in asked[start : start + TOGETHER] for sql in of)]
        told += session.rows(f"SELECT {', '.join(part)} FROM {pairing.joined}", of=_ABOUT)[0]
    figures = iter(told)
    paired, added, removed = (int(next(figures)) for _ in range(3))
    if not paired and pairing.base_rows and pairing.new_rows:
        raise InputError(
            "no row of the new report has a partner in the base report: the key of one is "
            f"{example_key(session, pairing, 'new')}, of the other {example_key(session, pairing, 'base')}; "
            "give --on with columns that pair them"
        )
    columns = [_filled(name, kinds, units[name], figures, guarded=False) for name in kinds]
    columns = [_finite(session, pairing, column, kinds, top) for column in columns]
    columns = [replace(column, noise_floor=_floor(column, noise)) for column in columns]
    return Compared(
        paired,
        added,
        removed,
        tuple(_with_values(session, pairing, [_steady(_centred(session, pairing, c)) for c in columns], seed)),
        tuple(name for name in base.names if name not in new.names),
        tuple(name for name in new.names if name not in base.names),
        tuple(unlike),
        top,
    )


def error_of(name: str, kinds: Mapping[str, str]) -> str | None:
    """The column of a number's standard errors, if there is one."""
    error = SE_OF.get(name, f"{name}_se")
    return error if kinds.get(name) == NUMBER and kinds.get(error) == NUMBER else None


def beyond_noise(difference: str, error: str) -> str:
    """SQL of whether a pair moved by more than the noise of its two values; null where that is not known."""
    z = NormalDist().inv_cdf((1 + NOISE_CONFIDENCE) / 2)
    b, n = f"CAST(b.{quoted(error)} AS DOUBLE)", f"CAST(n.{quoted(error)} AS DOUBLE)"
    return f"abs({difference}) > {z!r} * sqrt({b} * {b} + {n} * {n})"


def _kind(name: str, base: pa.DataType, new: pa.DataType) -> str:
    if pa.types.is_boolean(base) and pa.types.is_boolean(new):
        return BOOLEAN
    is_number = all(
        pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_) for type_ in (base, new)
    )
    if is_number and name not in NAMES:
        return NUMBER
    return OTHER if base == new or is_number else _MIXED


def _difference(name: str, kind: str, *, guarded: bool) -> str:
    """SQL of new - base; null where one is null, and if guarded where one is not finite."""
    if kind in (OTHER, _MIXED):
        return ""
    number = "TINYINT" if kind == BOOLEAN else "DOUBLE"
    b, n = f"CAST(b.{quoted(name)} AS {number})", f"CAST(n.{quoted(name)} AS {number})"
    return f"CASE WHEN isfinite({b}) AND isfinite({n}) THEN {n} - {b} END" if guarded else f"({n} - {b})"


def _count(condition: str) -> str:
    return f"count(*) FILTER (WHERE {condition})"  # count_if is null, not 0, where the condition is null throughout


def _aggregates(name: str, kinds: Mapping[str, str], pairing: Pairing, top: int, *, guarded: bool) -> list[str]:
    """SQL of the figures of a column, in the order that `_filled` takes them. Sums, which are fast in one pass."""
    c, d = quoted(name), _difference(name, kinds[name], guarded=guarded)
    is_paired = "" if pairing.in_order else f'b."{HERE}" AND n."{HERE}" AND '
    b, n = (f"CAST({side}.{c} AS VARCHAR)" if kinds[name] == _MIXED else f"{side}.{c}" for side in "bn")
    asked = [_count(f"{is_paired}{b} IS DISTINCT FROM {n}")]
    asked += [_count(f"{is_paired}(b.{c} IS NULL) <> (n.{c} IS NULL)")]
    if kinds[name] in (OTHER, _MIXED):
        return asked
    asked += [_count(f"NOT isfinite({d})") if kinds[name] == NUMBER else "0"]
    asked += [f"count({d})", f"sum(CASE WHEN ({d}) IS NOT NULL THEN CAST(b.{c} AS DOUBLE) END)"]
    asked += [f"sum({d})", f"sum({d} * {d})", f"sum({d} * {d} * {d})", f"min({d})", f"max({d})"]
    asked += [f"max(abs({d}), {top})" if top > 0 else "NULL"]
    if error := error_of(name, kinds):
        asked += [f"count({beyond_noise(d, error)})", _count(beyond_noise(d, error))]
    return asked


def _filled(name: str, kinds: Mapping[str, str], unit: str, figures: Iterator[Any], *, guarded: bool) -> Column:
    kind = OTHER if kinds[name] == _MIXED else kinds[name]
    changed, one_sided = int(next(figures)), int(next(figures))
    found = Column(name, kind, unit, changed, _difference(name, kind, guarded=guarded), one_sided=one_sided)
    if found.kind == OTHER:
        return found
    found = replace(found, odd=int(next(figures)))
    n, base, sum_1, sum_2, sum_3, least, most, far = (next(figures) for _ in range(8))
    known, beyond = (next(figures), next(figures)) if error_of(name, kinds) else (0, 0)
    if not n:
        return replace(found, n=0)
    mean = sum_1 / n
    spread = sum_2 / n - mean * mean
    if least == most:
        mean, spread = float(least), 0.0  # but for rounding
    spread = max(spread, 0.0) if math.isfinite(spread) else math.nan
    cubes = sum_3 / n - 3 * mean * sum_2 / n + 2 * mean * mean * mean
    return replace(
        found,
        n=n,
        base=_number(base / n),
        new=_number(base / n + mean),
        difference=_number(mean),
        std=_number(math.sqrt(spread * n / (n - 1))) if n > 1 else None,
        skewness=_number(cubes / spread**1.5) if spread > 1e-200 else None,
        min=_number(least),
        max=_number(most),
        reach=_number(far[-1]) if far else None,
        beyond_noise=beyond if known else None,
    )


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _finite(session: Session, pairing: Pairing, column: Column, kinds: Mapping[str, str], top: int) -> Column:
    """The column; if it holds NaN or infinities, once more without them. No report of ours does."""
    if column.kind != NUMBER or not column.n or column.difference is not None:
        return column
    asked = ", ".join(_aggregates(column.name, kinds, pairing, top, guarded=True))
    figures = session.rows(f"SELECT {asked} FROM {pairing.joined}", of=_ABOUT)[0]
    return replace(_filled(column.name, kinds, column.unit, iter(figures), guarded=True), odd=column.odd)


def _to_digits(value: float | None, scale: float) -> float | None:
    """Rounded to `DIGITS` of its own size or the scale's, whichever is larger."""
    size = max(abs(value or 0.0), abs(scale))
    if value is None or not 0 < size < math.inf:
        return value
    return round(value, DIGITS - 1 - math.floor(math.log10(size))) + 0.0  # and no -0


def _steady(column: Column) -> Column:
    """The column with its figures to `DIGITS`, so that they and all that comes of them are the same in every run."""
    if column.kind != NUMBER or not column.n:
        return column
    error = (column.std or 0.0) / math.sqrt(column.n)
    size = max(abs(column.base or 0.0), abs(column.new or 0.0), error)
    return replace(
        column,
        base=_to_digits(column.base, size),
        new=_to_digits(column.new, size),
        difference=_to_digits(column.difference, error),
        std=_to_digits(column.std, 0.0),
        skewness=_to_digits(column.skewness, 1.0),
    )


def _floor(column: Column, noise: Sequence[Mapping[str, float]]) -> float | None:
    base, new = (one.get(column.name) for one in noise)
    return None if column.kind == OTHER or base is None or new is None else math.hypot(base, new)


def _centred(session: Session, pairing: Pairing, column: Column) -> Column:
    """The column; if it moved by nearly a constant, with moments from centred differences."""
    n, mean, std = column.n or 0, column.difference, column.std
    if column.kind != NUMBER or n <= MOST_RESAMPLED or not mean or std is None or column.min == column.max:
        return column
    if abs(mean) <= _SHIFTED * std:
        return column
    x = f"SELECT {column.sql} - ({mean!r}) AS x FROM {pairing.joined}"
    off, square, cube = session.rows(f"SELECT avg(x), avg(x * x), avg(x * x * x) FROM ({x})", of=_ABOUT)[0]
    spread = square - off * off  # off is the rounding of the mean
    if not spread > 0:
        return replace(column, std=0.0, skewness=None)
    return replace(column, std=math.sqrt(spread * n / (n - 1)), skewness=_number(cube / spread**1.5))


def _with_values(session: Session, pairing: Pairing, columns: Sequence[Column], seed: int) -> list[Column]:
    """The columns; numbers of few pairs with their differences, resampled, and moments from these."""
    few = [c for c in columns if c.kind == NUMBER and c.n and c.n <= MOST_RESAMPLED and c.difference is not None]
    if not few:
        return list(columns)
    known = " OR ".join(f"({c.sql}) IS NOT NULL" for c in few)
    sql = f"SELECT {', '.join(c.sql for c in few)} FROM {pairing.joined} WHERE {known}"
    found = zip(*session.rows(sql, of=_ABOUT))
    values = [np.sort(np.array([x for x in of if x is not None], dtype=np.float64)) for of in found]
    resampled = mean_interval.all_values_at(values, seed)
    known_of = {c.name: _of_values(c, x, of) for c, x, of in zip(few, values, resampled)}
    return [known_of.get(c.name, c) for c in columns]


def _of_values(column: Column, x: NDArray[np.float64], resampled: Callable[[float], Interval]) -> Column:
    column = replace(column, values=x, resampled=resampled)
    if len(x) < 2 or x[0] == x[-1]:
        return column
    with np.errstate(all="ignore"):
        centred = x - x.mean()
        std = float(np.sqrt((centred**2).sum() / (len(x) - 1)))
        skewness = float((centred**3).mean() / (centred**2).mean() ** 1.5)
    return _steady(replace(column, difference=float(x.mean()), std=_number(std), skewness=_number(skewness)))


def _counts(n: int, base: float, difference: float, std: float) -> tuple[int, int, int, int]:
    """How many pairs are true on both sides, on the base side alone, on the new side alone and on neither."""
    change = round(difference * n)
    changed = round(std**2 * (n - 1) + n * difference**2)  # the sum of squares
    new_only = (changed + change) // 2
    base_only = changed - new_only
    both = round(base * n) - base_only
    return both, base_only, new_only, n - both - changed
