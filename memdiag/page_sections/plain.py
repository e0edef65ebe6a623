"""Any report: its rows, and the distribution and mean of every column of numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa

from memdiag import tables
from memdiag.mean_interval import Interval, mean_interval, of_moments, rate_interval
from memdiag.page_sections import shown
from memdiag.page_sections.building import Building, quoted
from memdiag.page_sections.panels import distributions

CONFIDENCE = 0.95
FEW = 1_000  # values whose mean is resampled; beyond, its interval is of the moments
MOST_COLUMNS = 24
ROWS_SHOWN = 10
NAMES = ("row", "step", "seed", "epoch", "layer", "model", "group", "content", "label", "true_label")  # no quantities


def rows(page: Building) -> None:
    """Rows, means with intervals, distributions, and the first rows as they stand."""
    with page.part("the number of rows"):
        page.figure("Rows", page.count())
    names = _quantities(page)
    if len(names) > MOST_COLUMNS:
        page.note(f"of {len(names)} columns of numbers the first {MOST_COLUMNS} are shown")
        names = names[:MOST_COLUMNS]
    with page.part("the means"):
        means(page, names)
    with page.part("the distributions"):
        distributions(page, names)
    with page.part("the first rows"):
        first_rows(page)


def _quantities(page: Building) -> list[str]:
    """Columns of numbers and truth values that are no names."""
    found = []
    for field in tables.read_schema(page.path):
        is_number = (
            pa.types.is_floating(field.type) or pa.types.is_integer(field.type) or pa.types.is_boolean(field.type)
        )
        if is_number and field.name not in NAMES:
            found.append(field.name)
    return found


def _rates(page: Building) -> list[str]:
    """Columns of truth values."""
    return [field.name for field in tables.read_schema(page.path) if pa.types.is_boolean(field.type)]


def means(page: Building, names: list[str]) -> None:
    """A table of means over the rows, and those of the first few columns as headline figures."""
    docs = {name: (unit, doc) for name, _, unit, _, doc in tables.described(tables.read_schema(page.path))}
    cells: list[list[object]] = []
    for name in names:
        found, nulls, low, high = mean_of(page, name)
        unit = docs[name][0]
        places = shown.places_of(found.lo, found.hi)
        value = shown.number(found.value, places)
        cells.append(
            [name, unit, value, shown.interval(found.lo, found.hi) or shown.NOTHING, low, high, found.n, nulls]
        )
        if len(page.figures) < 5 and found.value is not None:
            what = "Share" if name in _rates(page) else "Mean"
            page.figure(
                f"{what} {shown.words(name)}",
                found.value,
                found.lo,
                found.hi,
                f"n = {found.n:,} rows",
                unit=_plural(unit),
            )
        if found.value is None:
            page.note(f"{name} has no value in any row")
    header = ("column", "unit", "mean", "95 % interval", "lowest", "highest", "values", "null")
    page.table("Means over the rows; the intervals take rows as independent", header, cells)


def mean_of(page: Building, name: str) -> tuple[Interval, int, float | None, float | None]:
    """Mean, nulls, lowest and highest of a column; what is not finite counts as null."""
    column = f"CAST({quoted(name)} AS DOUBLE)"
    known = f"FROM report WHERE {quoted(name)} IS NOT NULL AND isfinite({column})"
    n, mean, low, high, spread = page.one(
        f"SELECT count(*), avg({column}), min({column}), max({column}), stddev_samp({column}) {known}"
    )
    nulls = page.count() - n
    if name in _rates(page):
        return rate_interval(round(n * mean) if n else 0, n, CONFIDENCE), nulls, low, high
    if 0 < n <= FEW and page.session is not None:
        values = np.sort(page.session.column(f"SELECT {column} {known}", of=page.name))
        return mean_interval(values, CONFIDENCE), nulls, low, high
    skewness = 0.0
    if spread and math.isfinite(spread):
        # of what is standardized: cubes of large numbers lose their digits
        (skewness,) = page.one(f"SELECT avg((({column} - ?) / ?) ** 3) {known}", (mean, spread))
    return of_moments(n, mean or 0.0, spread or 0.0, skewness, CONFIDENCE), nulls, low, high


def first_rows(page: Building) -> None:
    """The first rows as they stand; lists and long texts are cut."""
    found = page.first(ROWS_SHOWN, page.columns[:10]).table
    page.notes = [note for note in page.notes if "rows the first" not in note]  # the caption says it
    cells = [[_cell(value) for value in row.values()] for row in found.to_pylist()]
    more = f", {len(page.columns) - 10} more columns" if len(page.columns) > 10 else ""
    page.table(f"The first {len(cells)} of {page.count():,} rows{more}", found.column_names, cells)


def _cell(value: Any) -> object:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)[:100]


def _plural(unit: str) -> str:
    return f"{unit}s" if unit in ("nat", "token", "step", "example", "epoch", "neuron") else unit
