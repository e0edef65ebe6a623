"""The rows of the reports of `memdiag diff`. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from memdiag import tables


@dataclass(frozen=True)
class ColumnRow:
    """One row per column that both reports have and that is compared."""

    report: ClassVar[str] = "diff.columns"
    schema_version: ClassVar[int] = 1

    column: str = tables.column(pa.string(), "its name")
    kind: str = tables.column(pa.string(), "number, boolean, or other: told apart, but without a difference")
    unit: str = tables.column(pa.string(), "of its values")
    changed: int = tables.column(
        pa.int64(), "pairs whose values are not the same, one null and the other not among them"
    )
    one_sided: int = tables.column(pa.int64(), "pairs with a value on one side and a null on the other")
    n: int | None = tables.column(
        pa.int64(), "pairs with a finite value on both sides; null: kind other", nullable=True
    )
    base: float | None = tables.column(pa.float64(), "mean of the base report over these pairs", nullable=True)
    new: float | None = tables.column(pa.float64(), "mean of the new report", nullable=True)
    difference: float | None = tables.column(pa.float64(), "mean of new - base; of booleans, of rates", nullable=True)
    lo: float | None = tables.column(
        pa.float64(), "lower end of its interval over pairs, the noise floor in it; null: it has none", nullable=True
    )
    hi: float | None = tables.column(pa.float64(), "upper end", nullable=True)
    confidence: float | None = tables.column(pa.float64(), "of the interval", nullable=True)
    method: str | None = tables.column(pa.string(), "bootstrap-t, moments, or Newcombe's for booleans", nullable=True)
    std: float | None = tables.column(pa.float64(), "standard deviation of the differences, with n - 1", nullable=True)
    skewness: float | None = tables.column(pa.float64(), "of the differences", nullable=True)
    min: float | None = tables.column(pa.float64(), "least difference", nullable=True)
    max: float | None = tables.column(pa.float64(), "greatest difference", nullable=True)
    beyond_noise: int | None = tables.column(
        pa.int64(), "pairs that moved by more than their standard errors tell; null: there are none", nullable=True
    )
    noise_floor: float | None = tables.column(
        pa.float64(), "half-width at 95 % of what repeats of both means differ by; null: not known", nullable=True
    )
    note: str | None = tables.column(pa.string(), "why there is no interval", nullable=True)


@dataclass(frozen=True)
class MoverRow:
    """The rows that moved most, column by column, and rows that only one report has."""

    report: ClassVar[str] = "diff.movers"
    schema_version: ClassVar[int] = 1

    change: str = tables.column(
        pa.string(), "moved, added (only in the new report) or removed (only in the base report)"
    )
    column: str | None = tables.column(pa.string(), "whose value moved; null: added or removed", nullable=True)
    rank: int = tables.column(pa.int32(), "by |difference|, ties by key; of added and removed by key; from 1")
    key: str = tables.column(pa.string(), "the row's key as JSON")
    base: float | None = tables.column(pa.float64(), "its value in the base report, true 1 and false 0", nullable=True)
    new: float | None = tables.column(pa.float64(), "its value in the new report", nullable=True)
    difference: float | None = tables.column(pa.float64(), "new - base", nullable=True)
    beyond_noise: bool | None = tables.column(
        pa.bool_(), "it moved by more than its standard errors tell; null: it has none", nullable=True
    )
