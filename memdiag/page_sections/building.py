"""A section in the making: what is read of a report, and what is said of it.

A part of a section that cannot be made, since the report is damaged, empty or of another version, becomes a note; the
other parts stay. Whole columns are never read: of large reports there are counts and sums by SQL, and the first rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.errors import InputError, one_line
from memdiag.page import Figure, Plot, Table
from memdiag.page_sections import shown
from memdiag.report_sql import Session
from memdiag.tables import Report, read_schema, stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Row = dict[str, Any]
MOST_ROWS = 20_000  # that are read one by one
MOST_POINTS = 2_000  # that a plot draws one by one
MOST_MARKS = 800  # of these, markers, which each take an element
MOST_SHOWN = 50  # rows of a table
MOST_SVG = 150_000  # bytes of a plot
NAMES = ("example", "training example", "held-out example", "label", "network")  # columns that only look like numbers
BROKEN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    StopIteration,
    TypeError,
    ValueError,
)  # what foreign metadata leads to


@dataclass(eq=False)
class Building:
    """One report, and the parts of its section so far."""

    path: Path
    name: str
    kind: str
    meta: dict[str, Any]
    columns: tuple[str, ...]
    session: Session | None  # None: its rows cannot be read
    figures: list[Figure] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    # -- what is said ----------------------------------------------------------------------------------------------

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """A part of the section; one that cannot be made is a note that names it."""
        try:
            yield
        except InputError as error:
            self.note(f"{what} left out: {error}")
        except BROKEN as error:
            self.note(f"{what} left out: the report lacks what this is made of ({_about(error)})")

    def note(self, text: str) -> None:
        """Something that a reader must know; the same is said once."""
        if text not in self.notes:
            self.notes.append(text)

    def figure(
        self,
        label: str,
        value: object,
        lo: float | None = None,
        hi: float | None = None,
        note: str = "",
        unit: str = "",
    ) -> None:
        """A headline figure with its 95 % interval; one that is null is left out."""
        places = shown.places_of(lo, hi) if isinstance(value, float) else None
        text = shown.number(value, places)
        if text == shown.NOTHING:
            return
        self.figures.append(Figure(label, f"{text} {unit}".strip(), shown.interval(lo, hi), note))

    def estimate(self, label: str, found: Mapping[str, Any] | None, what: str = "", note: str = "") -> None:
        """A headline figure from an estimate's value, lo, hi and n; `what` the n are."""
        if not found or found.get("value") is None:
            return
        n = found.get("n")
        about = f"n = {shown.number(n)} {what}".strip() if n is not None else ""
        self.figure(label, found["value"], found.get("lo"), found.get("hi"), "; ".join(t for t in (about, note) if t))

    def plot(self, canvas: Canvas, alt: str, caption: str, *, dense: bool = False) -> None:
        """A plot, unless it is too large for a page; a dense one keeps a width on a phone, and scrolls there."""
        from memdiag import page_svg

        svg = page_svg.inline(canvas, name=f"{self.name} {self.kind} {len(self.plots)}")
        if len(svg.encode(errors="replace")) > MOST_SVG:
            self.note(f"a plot takes {len(svg) // 1000} kB and is left out: {caption}")
            return
        self.plots.append(Plot(svg, alt, caption, dense))

    def table(self, caption: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table; a column is numeric where all that it shows are numbers or intervals. The first rows of many."""
        if not rows:
            return
        cut = f" (the first {MOST_SHOWN} of {len(rows):,})" if len(rows) > MOST_SHOWN else ""
        cells = tuple(tuple(shown.number(cell) for cell in row) for row in rows[:MOST_SHOWN])
        numeric = tuple(
            heading not in NAMES and all(shown.is_number(row[i]) for row in cells) for i, heading in enumerate(header)
        )
        self.tables.append(Table(caption + cut, tuple(header), cells, numeric))

    # -- what is read ----------------------------------------------------------------------------------------------

    def sql(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of a query over `report`.

        Raises:
            InputError: the rows cannot be read.
        """
        if self.session is None:
            raise InputError("its rows cannot be read")
        return self.session.rows(statement, parameters, of=self.name)

    def one(self, statement: str, parameters: Sequence[Any] = ()) -> tuple[Any, ...]:
        """The only row of a query."""
        return self.sql(statement, parameters)[0]

    def count(self) -> int:
        """Rows of the report."""
        return int(self.one("SELECT count(*) FROM report")[0])

    def first(self, most: int = MOST_ROWS, columns: Sequence[str] | None = None) -> Report:
        """The report's first rows, in its order; where there are more, a note says so."""
        wanted = None if columns is None else [name for name in columns if name in self.columns]
        parts, n = [], 0
        for part in stream(self.path, wanted):
            parts.append(part.slice(0, most + 1 - n))
            n += parts[-1].num_rows
            if n > most:
                self.note(f"of {self.count():,} rows the first {most:,} are shown")
                break
        empty = read_schema(self.path)
        if wanted is not None:
            empty = pa.schema([empty.field(name) for name in wanted])
        table = pa.concat_tables(parts).slice(0, most) if parts else empty.empty_table()
        return Report(table, self.meta, self.path)

    def records(self, most: int = MOST_ROWS, columns: Sequence[str] | None = None) -> list[Row]:
        """`first` as dicts; a column that the report lacks is null in all of them."""
        found: list[Row] = self.first(most, columns).table.to_pylist()
        missing = dict.fromkeys(name for name in columns or () if name not in self.columns)
        return [missing | row for row in found] if missing else found

    def histogram(
        self, column: str, edges: NDArray[np.float64], by: str | None = None
    ) -> dict[object, NDArray[np.int64]]:
        """Rows in each bin, as np.histogram counts them; what lies outside counts in the outermost bins.

        Args:
            column: of numbers or truth values; null and what is not finite are left out.
            edges: (b + 1,) evenly spaced.
            by: a column whose values are counted apart.
        Returns:
            value of `by` (None without it) -> (b,).
        """
        bins, lo, step = len(edges) - 1, float(edges[0]), float(edges[-1] - edges[0]) / (len(edges) - 1)
        found = self.sql(
            f"WITH x AS (SELECT {quoted(by) if by else 'NULL'} AS own, CAST({quoted(column)} AS DOUBLE) AS v "
            "FROM report), "
            "y AS (SELECT own, v, CAST(least(greatest(floor((v - ?) / ?), 0), ?) AS INTEGER) AS i FROM x WHERE "
            "isfinite(v)) "
            # by the edges themselves, since the quotient is rounded
            "SELECT own, i - CAST(i > 0 AND v < ?[i + 1] AS INTEGER) + CAST(i < ? AND v >= ?[i + 2] AS INTEGER) "
            "AS bin, "
            "count(*) FROM y GROUP BY 1, 2",
            (lo, step, bins - 1, edges.tolist(), bins - 1, edges.tolist()),
        )
        counts: dict[object, NDArray[np.int64]] = {}
        for own, i, n in found:
            counts.setdefault(own, np.zeros(bins, dtype=np.int64))[i] += n
        return counts

    def beside(self, file: str) -> Path:
        """Another file of the report's directory."""
        return self.path.with_name(file)

    def summary_beside(self, **same: object) -> Row:
        """summary.json of the report's directory, if it is of the same run: `same` are entries that must agree.

        Raises:
            InputError: it is missing, damaged, or of another run.
        """
        path = self.beside("summary.json")
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            raise InputError("summary.json beside the report is missing or damaged") from None
        if not isinstance(found, dict):
            raise InputError("summary.json beside the report is damaged")
        for key, value in same.items():
            if found.get(key) != value:
                raise InputError(f"summary.json beside the report is of another run ({key}: {found.get(key)!r})")
        return found


def quoted(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def floats(rows: Sequence[Row], name: str) -> NDArray[np.float64]:
    """A column of some rows, NaN for null."""
    return np.array([math.nan if row[name] is None else float(row[name]) for row in rows])


def thinned(n: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 to n - 1, evenly spaced, the first and the last among them."""
    return list(range(n)) if n <= most else sorted(set(np.linspace(0, n - 1, most).round().astype(int).tolist()))


def _about(error: Exception) -> str:
    text = one_line(error, 80)
    return f"no {text}" if isinstance(error, KeyError) else text
