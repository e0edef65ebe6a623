"""A page of reports: what is on it, as HTML and as Markdown. Needs no torch.

Every string is untrusted: examples, paths and options come from files that somebody sent. Whatever they hold, the page
stays below LIMIT bytes and the summary below MARKDOWN_LIMIT; what is left out is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from memdiag.page_text import as_code, as_shell, cut, in_markdown, plain, shown

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

LIMIT = 2_000_000  # bytes of a page
MARKDOWN_LIMIT = 60_000  # bytes of a summary: a comment on GitHub ends at 65,536 characters
PLOT_LIMIT = 400_000  # bytes of one plot
CELL, LABEL, VALUE, LINE, LINES = 300, 120, 60, 600, 4000  # characters of a text, by where it stands
PAPER, SMALLEST, LARGEST = 490.0, 5.0, 8.0  # points: the width of A4 less its margins and a border; sizes of type
LETTER_EM, CELL_EM, LONG_EMS = 0.62, 1.1, 15.0  # a letter, the room around a cell, a cell that is broken into lines
SHORT_CELL = 28  # characters of a cell that is not broken into lines
FIGURES, PLOTS, TABLES, ROWS, COLUMNS, NOTES, PROVENANCE = 24, 12, 12, 200, 24, 40, 60  # of a section, at most


@dataclass(frozen=True)
class Figure:
    """A headline figure, ready to show."""

    label: str
    value: str  # "0.172"
    interval: str = ""  # "0.161 to 0.183"
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawing."""

    svg: str  # from `page_svg.inline`
    alt: str  # what is seen, in one or two sentences with numbers
    caption: str
    dense: bool = False  # too much to be shrunk to a phone: it keeps a width there and scrolls


@dataclass(frozen=True)
class Table:
    """A table of text."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...] = ()  # which columns are numbers


@dataclass(frozen=True)
class Section:
    """One report."""

    kind: str
    name: str  # its path as given, or relative to the directory given
    question: str  # what it answers, in one line
    figures: tuple[Figure, ...] = ()
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: tuple[tuple[str, str], ...] = ()  # label, value
    reproduce: str = ""  # shell lines


@dataclass(frozen=True)
class _Level:
    """How much of a section is shown."""

    plots: int = 0
    tables: int = 0
    rows: int = 0


FULL, SHORT, BARE = _Level(PLOTS, TABLES, ROWS), _Level(2, 2, 10), _Level()


def html(sections: Sequence[Section], *, title: str, notes: Sequence[str] = ()) -> str:
    """The page: one file without scripts that loads nothing; the same input gives the same bytes.

    Args:
        sections: in the order to show them. The first get their plots and tables if not all fit.
        title: of the page.
        notes: about the page as a whole.
    """
    from markupsafe import Markup

    macros: Any = _template().module

    def rendered(i: int, level: _Level) -> tuple[str, str]:
        view = _view(sections[i], i + 1, level)
        return str(macros.entry(view)), str(macros.section(view))

    def page(parts: Sequence[tuple[str, str]], notes: Sequence[str]) -> str:
        text: str = macros.page(
            title=plain(title, LABEL),
            heading=shown(title, LABEL),
            version=_version(),
            n=len(sections),
            notes=_lines(notes, NOTES),
            entries=[Markup(entry) for entry, _ in parts],
            sections=[Markup(section) for _, section in parts],
        )
        return str(text)

    room = LIMIT - len(page([], notes).encode()) - 2000  # what the page says of those left out
    parts: list[tuple[str, str]] = []
    for i in range(len(sections)):
        part = rendered(i, BARE)
        if _size(part) > room:
            break
        parts.append(part)
        room -= _size(part)
    for i, bare in enumerate(parts):
        for level in (FULL, SHORT):
            # an SVG shrinks by a few per cent for its place: those that cannot fit are not even tried
            if sum(min(len(plot.svg), PLOT_LIMIT) for plot in sections[i].plots[: level.plots]) > 1.25 * room:
                continue
            part = rendered(i, level)
            if _size(part) - _size(bare) <= room:
                parts[i] = part
                room -= _size(part) - _size(bare)
                break
    if len(parts) < len(sections):
        notes = [*notes[: NOTES - 1], f"{len(sections) - len(parts):,} more reports do not fit; give them a page each."]
    return page(parts, notes)


def _size(part: tuple[str, str]) -> int:
    return sum(len(piece.encode()) for piece in part) + 2


@cache
def _template() -> jinja2.Template:
    from importlib.resources import files

    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(files("memdiag").joinpath("page.html.jinja").read_text(encoding="utf-8"))


def _version() -> str:
    from memdiag import __version__

    return __version__


@dataclass(frozen=True)
class _View:
    """A section as the template takes it: all text cut, and escaped where it is Markup."""

    number: int
    entry: Markup  # its name in the overview
    name: Markup
    kind: Markup
    question: Markup
    figures: list[dict[str, Any]]
    plots: list[dict[str, Any]]
    tables: list[dict[str, Any]]
    notes: list[Markup]
    provenance: list[tuple[Markup, Markup]]
    reproduce: list[Markup] = field(default_factory=list)


def _view(section: Section, number: int, level: _Level) -> _View:
    from markupsafe import Markup

    from memdiag.page_svg import placed

    plots = []
    too_large = 0
    for i, plot in enumerate(section.plots[: level.plots], 1):
        if len(plot.svg.encode()) > PLOT_LIMIT:
            too_large += 1
            continue
        name = f"Figure {number}.{i}"
        svg, width = placed(plot.svg, prefix=f"figure-{number}-{i}", title=name, description=plain(plot.alt, 2 * LINE))
        caption = shown(plot.caption, LINE)
        plots.append({"name": name, "svg": Markup(svg), "width": width, "caption": caption, "dense": plot.dense})
    tables = [
        _table(table, f"Table {number}.{i}", level.rows) for i, table in enumerate(section.tables[: level.tables], 1)
    ]
    left_out = [
        f"{count} {name}{'s' if count > 1 else ''}"
        for count, name in (
            (len(section.plots) - len(plots), "plot"),
            (len(section.tables) - len(tables), "table"),
            (len(section.figures) - FIGURES, "figure"),
            (len(section.notes) - NOTES, "note"),
        )
        if count > 0
    ]
    notes = _lines(section.notes, NOTES)
    if left_out:
        notes.append(Markup("Left out, for the size of the page: {}.").format(" and ".join(left_out)))
    return _View(
        number=number,
        entry=shown(section.name, LABEL),
        name=shown(section.name, CELL),
        kind=shown(section.kind, VALUE),
        question=shown(section.question, LINE),
        figures=[
            {
                "label": shown(figure.label, LABEL),
                "value": shown(figure.value or "–", VALUE),
                "interval": shown(figure.interval, VALUE) if figure.interval else "",
                "note": shown(figure.note, CELL) if figure.note else "",
            }
            for figure in section.figures[:FIGURES]
        ],
        plots=plots,
        tables=tables,
        notes=notes,
        provenance=[(shown(label, LABEL), shown(value, LINE)) for label, value in section.provenance[:PROVENANCE]],
        reproduce=[shown(line, LINES) for line in _commands(section)],
    )


def _table(table: Table, name: str, rows: int) -> dict[str, Any]:
    n = min(len(table.header), COLUMNS)
    numeric = [i < len(table.numeric) and table.numeric[i] for i in range(n)]
    texts = [[*row[:n], *[""] * (n - len(row))] for row in table.rows[:rows]]
    in_print, size = _on_paper(table.header[:n], texts, numeric)
    left_out = []
    if len(table.rows) > rows:
        left_out.append(f"the first {rows:,} of {len(table.rows):,} rows")
    if len(table.header) > n:
        left_out.append(f"the first {n} of {len(table.header):,} columns")
    return {
        "name": name,
        "caption": shown(table.caption, CELL),
        "label": f"{name}: {plain(table.caption, LABEL)}",
        "left_out": ", ".join(left_out),
        "in_print": f"the first {in_print} of {n} columns, as wide as paper is" if in_print < n else "",
        "size": f"{size:.2f}",
        "header": [
            {
                "text": shown(text, LABEL) if text.strip() else "",
                "numeric": numeric[i],
                "long": _is_long(text, numeric[i]),
                "off": i >= in_print,
            }
            for i, text in enumerate(table.header[:n])
        ],
        "rows": [
            [
                {
                    "text": shown(text, CELL) if text else "",
                    "numeric": numeric[i],
                    "long": len(text) > SHORT_CELL,
                    "head": i == 0 and not numeric[0] and bool(text.strip()),
                    "off": i >= in_print,
                }
                for i, text in enumerate(row)
            ]
            for row in texts
        ],
    }


def _on_paper(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> tuple[int, float]:
    """How many of the columns fit the width of paper, and the size of type (pt) in which they do.

    A number is not broken, words are only at spaces, and a long cell takes LONG_EMS whatever it holds.
    """
    ends, wide = [], 0.0
    for i, heading in enumerate(header):
        words = LONG_EMS if _is_long(heading, numeric[i]) else LETTER_EM * max(map(len, heading.split()), default=0)
        widest = max(words, *(_unbroken(row[i], numeric[i]) for row in rows), 0.0)
        wide += widest + CELL_EM
        ends.append(wide)
    size = min(LARGEST, max(SMALLEST, PAPER / max(wide, 1.0)))
    fit = sum(end * size <= PAPER for end in ends)
    return (len(header), size) if fit == len(header) else (max(1, fit), size)


def _is_long(heading: str, is_number: bool) -> bool:
    """Whether a heading has the width of a long cell; over numbers only where it cannot be broken at spaces."""
    return len(heading) > SHORT_CELL and (not is_number or max(map(len, heading.split()), default=0) > SHORT_CELL)


def _unbroken(text: str, is_number: bool) -> float:
    """The least width of a cell (em)."""
    if len(text) > SHORT_CELL:
        return LONG_EMS
    return LETTER_EM * (len(text) if is_number else max(map(len, text.split()), default=0))


def _commands(section: Section) -> list[str]:
    """Cut as a whole; its line breaks are breaks, and nothing else is."""
    return [line for line in cut(section.reproduce.strip(), LINES).split("\n") if line.strip()]


def _lines(texts: Sequence[str], limit: int) -> list[Markup]:
    return [shown(text, LINE) for text in texts[:limit]]


def markdown(sections: Sequence[Section], *, title: str, notes: Sequence[str] = ()) -> str:
    """The page as a summary for a pull request: headline figures, notes, how to reproduce; no plots, no tables.

    Args: as `html`.
    """
    head = "\n".join(
        [
            f"<!-- memdiag {_version()} -->",
            f"## {in_markdown(title, LABEL)}",
            "",
            *(f"> {in_markdown(note, LINE)}\n>" for note in notes[:NOTES]),
            "",
        ]
    )
    room = MARKDOWN_LIMIT - len(head.encode()) - 200
    parts: list[str] = []
    for section in sections:
        part = _part(section)
        if len(part.encode()) > room:
            break
        parts.append(part)
        room -= len(part.encode())
    if len(parts) < len(sections):
        left = len(sections) - len(parts)
        parts.append(f"\n{left:,} of {len(sections):,} reports are left out: a comment on GitHub would be too long.\n")
    if not sections:
        parts.append("\nNo reports.\n")
    return head + "".join(parts)


def _part(section: Section) -> str:
    lines = ["", f"### {as_code(section.name, LABEL)}", "", in_markdown(section.question, LINE)]
    if section.figures:
        lines += ["", f"| {in_markdown(section.kind, VALUE)} | value | interval | |", "| :-- | --: | :-- | :-- |"]
    for figure in section.figures[:FIGURES]:
        cells = (
            in_markdown(figure.label, LABEL),
            f"**{in_markdown(figure.value or '–', VALUE)}**",
            in_markdown(figure.interval, VALUE),
            in_markdown(figure.note, LABEL),
        )
        lines.append(f"| {' | '.join(cells)} |")
    if section.notes:
        lines += ["", *(f"- {in_markdown(note, CELL)}" for note in section.notes[:FIGURES])]
    left_out = [
        f"{count} {name}{'s' if count > 1 else ''}"
        for count, name in (
            (len(section.figures) - FIGURES, "more figure"),
            (len(section.notes) - FIGURES, "more note"),
            (len(section.plots), "plot"),
            (len(section.tables), "table"),
        )
        if count > 0
    ]
    if left_out:
        lines += ["", f"Only on the page: {', '.join(left_out)}."]
    if section.reproduce.strip():
        lines += ["", "<details><summary>How to reproduce</summary>", ""]
        lines += [as_shell(_commands(section), LINES), "", "</details>"]
    return "\n".join(lines) + "\n"
