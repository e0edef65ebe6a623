"""`memdiag report`: the reports in a directory as one page for people. Needs no torch.

Importing this module imports neither matplotlib nor jinja2.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memdiag import page, tables
from memdiag.errors import InputError, one_line
from memdiag.page import Section

# Reports of which there are hundreds, a model or an epoch each, and which another report sums up
SHARDS = {"counterfactual.shard": "models", "train.trajectory": "epochs"}
_OURS = re.compile(r'<meta name="generator" content="memdiag [^"]*">|\A<!-- memdiag [^>]*-->')
_HEAD = 4096  # characters in which a page says what made it


@dataclass(frozen=True, repr=False)
class Page:
    """The reports as a page, and as a summary of it for a pull request."""

    html: str
    markdown: str
    sections: tuple[Section, ...]
    notes: tuple[str, ...]  # about the page as a whole: what was found and is not on it


def report(
    *paths: str | os.PathLike[str],
    html: str | os.PathLike[str] | None = None,
    markdown: str | os.PathLike[str] | None = None,
    title: str | None = None,
    force: bool = False,
) -> Page:
    """Reports as one self-contained page.

    Args:
        *paths: reports, or directories that are searched for reports.
        html: write the page there.
        markdown: write the summary for a pull request there.
        title: of the page; by default the name of the one directory or report given.
        force: replace what stands there, even if it is no page of memdiag.
    Raises:
        InputError: no report is found, one that was named is none, or a place holds something else.
        IncompleteError: the disk is full.
    """
    inputs = [Path(path) for path in paths]
    targets = [Path(target) for target in (html, markdown) if target is not None]
    if len(targets) == 2 and targets[0].resolve() == targets[1].resolve():
        raise InputError(f"{targets[0]} cannot hold both the page and its summary; give two names")
    for target in targets:
        _check_target(target, force=force)
    made = build(inputs, title=title, not_over=targets)
    for option, to, text in (("--html", html, made.html), ("--markdown", markdown, made.markdown)):
        if to is not None:
            with tables.replacing(Path(to), option=option) as file:
                file.write(text.encode())
    return made


def build(paths: Sequence[Path], *, title: str | None = None, not_over: Sequence[Path] = ()) -> Page:
    """The page of some reports; arguments and errors as `report`. None of them may be at a place in `not_over`."""
    from memdiag import page_svg
    from memdiag.page_sections import section_of

    found = _search(paths)
    for target in not_over:
        if any(path.resolve() == target.resolve() for path, _ in found.reports):
            raise InputError(f"{target} is one of the reports to show; give another name for the page")
    with page_svg.styled():
        sections = tuple(section_of(path, name) for path, name in found.reports)
    title = title or f"memdiag: {_title(paths, len(sections))}"
    return Page(
        html=page.html(sections, title=title, notes=found.notes),
        markdown=page.markdown(sections, title=title, notes=found.notes),
        sections=sections,
        notes=found.notes,
    )


@dataclass(frozen=True)
class _Found:
    reports: tuple[tuple[Path, str], ...]  # path, and its name on the page
    notes: tuple[str, ...]


def _search(paths: Sequence[Path]) -> _Found:
    """The reports that a page of these paths shows, in its order.

    Files stand as given; directories are searched, their reports sorted. Hidden files and directories are passed over,
    and so are `SHARDS`.

    Raises:
        InputError: none is found, or a file that was named is no report.
    """
    reports: dict[Path, tuple[Path, str]] = {}  # by the real path: a report given twice is one
    shards: Counter[str] = Counter()
    notes: list[str] = []
    if not paths:
        raise InputError("no report was given; give reports of memdiag or a directory of them")
    for given in paths:
        if not given.is_dir():
            tables.read_meta(given)  # refuses what is no report
            reports.setdefault(given.resolve(), (given, str(given)))
            continue
        for path in _parquet_files(given, notes):
            name = str(path.relative_to(given)) if len(paths) == 1 else str(path)
            try:
                kind = str(tables.read_meta(path)["report"])
            except InputError as error:
                notes.append(f"not shown: {one_line(error)}")
                continue
            if kind in SHARDS:
                shards[kind] += path.resolve() not in reports
            else:
                reports.setdefault(path.resolve(), (path, name))
    for kind, count in sorted(shards.items()):
        are = "report {} ({}) is" if count == 1 else "reports {} ({}) are"
        notes.append(f"{count:,} {are.format(kind, SHARDS[kind])} not shown one by one")
    if not reports:
        where = ", ".join(map(str, paths[:3])) + (", …" if len(paths) > 3 else "")
        why = f" ({notes[0]})" if notes else ""
        raise InputError(f"no report of memdiag in {where}{why}; give reports or a directory that holds them")
    return _Found(tuple(reports.values()), tuple(notes))


def _parquet_files(directory: Path, notes: list[str]) -> Iterator[Path]:
    """In the order of their names, a directory's own files before those of the directories in it."""

    def unreadable(error: OSError) -> None:
        notes.append(f"not searched: {error.filename} ({one_line(error.strerror or error)})")

    for folder, folders, files in os.walk(directory, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.endswith(".parts"))
        for name in sorted(files):
            path = Path(folder, name)
            if name.endswith(".parquet") and not name.startswith(".") and path.is_file():
                yield path


def _title(paths: Sequence[Path], n: int) -> str:
    if len(paths) > 1:
        return f"{n:,} report{'s' if n > 1 else ''}"
    return paths[0].name or paths[0].resolve().name


def _check_target(target: Path, *, force: bool) -> None:
    """Refuse a place that holds anything but an earlier page, before anything is computed.

    Raises:
        InputError: it does.
    """
    if target.is_dir():
        raise InputError(f"{target} is a directory; give a file name")
    if str(target) == "-":
        raise InputError("- is no name for a file; --markdown - prints the summary, and --html wants a file")
    tables.check_regular(target, option="name")
    if force or not target.exists():
        return
    try:
        with open(target, encoding="utf-8", errors="replace") as file:
            ours = _OURS.search(file.read(_HEAD)) is not None
    except OSError as error:
        raise InputError(f"{target} cannot be read ({one_line(error.strerror or error)}); give another name") from None
    if not ours:
        raise InputError(f"{target} is there and is no page of memdiag; --force or another name")
