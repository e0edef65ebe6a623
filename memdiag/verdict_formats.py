"""An outcome in the formats that people and CI systems read: table, JSON, Markdown, JUnit, GitHub's commands.

Rule names, file names and cells are untrusted: none of them can leave its place in a format, turn text around, notify
anybody, or be taken for a command by the program that reads the log of a job. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memdiag import __version__
from memdiag.errors import one_line
from memdiag.verdict_markdown import to_markdown
from memdiag.verdict_words import (
    apart,
    counts,
    cut,
    digits_of,
    escape,
    figures,
    interval,
    limit,
    number,
    plain,
    sentence,
    visible,
)
from memdiag.verdicts import Outcome, Table, Verdict

FORMATS = ("table", "json", "markdown", "junit", "github")
STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}
LEAST_RULE = 12  # columns
MOST_CELL = 120  # characters of a rule or cell in the table
MOST_NAME = 1000  # characters of a rule in JUnit and in GitHub's commands
MOST_TITLE = 255  # GitHub's own limit
MOST_SUMMARY = 1024 * 1024  # bytes: GitHub drops a longer one
MOST_ANNOTATIONS = 10  # that GitHub shows of a kind in a step


def show(outcome: Outcome, format: str) -> None:
    """Print to stdout in one of `FORMATS`.

    Raises:
        ValueError: there is no such format.
    """
    if format == "table":
        print_table(outcome)
    else:
        print(text_of(outcome, format))


def text_of(outcome: Outcome, format: str) -> str:
    """The outcome as JSON, Markdown, JUnit or GitHub's commands, without a last newline."""
    writers: dict[str, Callable[[Outcome], str]] = {
        "json": to_json,
        "markdown": to_markdown,
        "junit": to_junit,
        "github": to_github,
    }
    if format not in writers:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return writers[format](outcome)


# -- table ---------------------------------------------------------------------------------------------------------


def print_table(outcome: Outcome, *, width: int | None = None) -> None:
    """Print the verdicts, the tables, the notes and what was written, to stdout.

    Args:
        width: in columns. Default: the terminal's, or 100.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(width=width or (None if sys.stdout.isatty() else 100), emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(Text(f"{outcome.command} {plain(outcome.subject, MOST_NAME)}"))
        _print_verdicts(console, outcome.verdicts)
        for verdict in outcome.verdicts:
            if verdict.note:
                name = plain(verdict.rule, 60)
                console.print(Text.assemble((f"{name}: ", STYLES[verdict.verdict]), plain(verdict.note, MOST_NAME)))
        for table in outcome.tables:
            console.print(Text(f"\n{plain(table.caption, MOST_NAME)}", style="bold"))
            _print_cells(console, table)
        for note in outcome.notes:
            console.print(Text.assemble(("note: ", "dim"), plain(note, MOST_NAME)))
        console.print(Text(sentence(outcome), style=STYLES["fail" if outcome.failed else "pass"]))
        console.print(Text.assemble(("report: ", "dim"), plain(outcome.report, MOST_NAME)), soft_wrap=True)
    print(inert(captured.get()), end="")


def _print_verdicts(console: Any, verdicts: Sequence[Verdict]) -> None:
    from rich.table import Table as Grid
    from rich.text import Text

    levels = {v.confidence for v in verdicts if interval(v)}
    told = f"{number(100 * level)} % interval" if len(levels) == 1 and (level := next(iter(levels))) else "interval"
    columns: list[tuple[str, list[str]]] = [
        ("observed", [number(v.observed, digits_of(v)) for v in verdicts]),
        (told, [interval(v) for v in verdicts]),
        ("wanted", [limit(v) for v in verdicts]),
        ("n", [number(v.n) if v.n is not None else "" for v in verdicts]),
        ("q", [number(v.q, 3) if v.q is not None else "" for v in verdicts]),
    ]
    columns = [(heading, cells) for heading, cells in columns if any(cells)]
    # fixed widths, the interval's on one line or on two: rich would cut figures short, or leave columns out
    widths = {heading: max(map(len, [heading, *cells])) for heading, cells in columns}
    room = console.width - len("inconclusive") - 2 - sum(2 + width for width in widths.values())
    if room < LEAST_RULE and told in widths:
        longest = max(map(len, " ".join([told, *dict(columns)[told]]).split()))
        room, widths[told] = room + widths[told] - longest, longest
    if room < LEAST_RULE:
        for v in verdicts:
            console.print(Text.assemble((v.verdict, STYLES[v.verdict]), f"  {plain(v.rule, MOST_CELL)}"))
            console.print(Text(f"    {figures(dataclasses.replace(v, note=None))}"))
        return
    grid = Grid(box=None, pad_edge=False, header_style="dim")
    grid.add_column("verdict", width=len("inconclusive"))
    grid.add_column("rule", overflow="fold", max_width=room)
    for heading, width in widths.items():
        grid.add_column(heading, justify="right", width=width)
    for i, verdict in enumerate(verdicts):
        word = Text(verdict.verdict, style=STYLES[verdict.verdict])
        grid.add_row(word, Text(plain(verdict.rule, MOST_CELL)), *(Text(cells[i]) for _, cells in columns))
    console.print(grid)


def _print_cells(console: Any, table: Table) -> None:
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=None, pad_edge=False, header_style="dim")
    for heading in table.header:
        grid.add_column(Text(plain(heading, MOST_CELL)), overflow="fold")
    for row in table.rows:
        grid.add_row(*(Text(plain(cell, MOST_CELL)) for cell in row))
    console.print(grid)


def inert(text: str) -> str:
    """Text of which no line is a command to a runner: GitHub's begin with ::, others' hold ##[ or ##vso[."""
    text = re.sub(r"^((?:[\s\u200c\u200d]|\x1b\[[\d;]*m)*:)(?=[\u200c\u200d]*:)", r"\1 ", text, flags=re.MULTILINE)
    return apart(text)


# -- JSON ----------------------------------------------------------------------------------------------------------


def to_json(outcome: Outcome) -> str:
    """One object; docs/verdicts.schema.json says what is in it. ASCII, and no NaN."""
    rules = [_rule(verdict) for verdict in outcome.verdicts]
    metrics: dict[str, float | None] = {}
    for rule in rules:
        name, again = rule["rule"], 1
        while name in metrics:  # a flat object cannot hold two of a name
            again += 1
            name = f"{rule['rule']} ({again})"
        metrics[name] = rule["observed"]
    found = {
        "memdiag_version": __version__,
        "command": outcome.command,
        "subject": outcome.subject,
        "report": outcome.report,
        "verdict": "fail" if outcome.failed else "pass",
        "inconclusive": outcome.inconclusive,
        "counts": counts(outcome),
        "rules": rules,
        "metrics": metrics,
        "figures": _jsonable(outcome.figures),
        "notes": list(outcome.notes),
    }
    # a ## can only stand in a string; some runners take it for the beginning of a command
    return json.dumps(found, indent=2, allow_nan=False).replace("##", "#\\u0023")


def _rule(verdict: Verdict) -> dict[str, Any]:
    """Every field; figures rounded, so that the last bit of a float changes no file, but never onto the limit."""
    digits = digits_of(verdict)
    fields = dataclasses.asdict(verdict)
    for name in ("observed", "lo", "hi", "limit", "least", "confidence", "p", "q"):
        fields[name] = _rounded(fields[name], digits)
    return fields


def _rounded(value: float | None, digits: int) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    text = number(value, digits)
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(one) for one in value]
    value = value.item() if hasattr(value, "item") else value  # a number of NumPy's
    if isinstance(value, float):
        return value + 0.0 if math.isfinite(value) else None
    return value


def append_summary(outcome: Outcome, path: str | Path) -> str | None:
    """Append the Markdown to the file that `GITHUB_STEP_SUMMARY` names.

    Returns:
        None, or one line that says why it could not be: the verdict does not depend on it.
    """
    text = (to_markdown(outcome) + "\n\n").encode()
    try:
        with open(path, "ab") as file:
            if file.tell() + len(text) > MOST_SUMMARY:
                return f"no step summary: {path} would become longer than GitHub takes"
            file.write(text)
    except (OSError, ValueError) as error:
        return f"no step summary: {plain(str(path), MOST_NAME)} cannot be written ({one_line(error, 120)})"
    return None


# -- JUnit ---------------------------------------------------------------------------------------------------------


def to_junit(outcome: Outcome) -> str:
    """JUnit's XML: a test case per rule; inconclusive is skipped, or failed where it counts as fail. No time stamp."""
    from xml.etree import ElementTree

    skipped = counts(outcome)["inconclusive"] if outcome.inconclusive == "pass" else 0
    failures = counts(outcome)["fail"] + counts(outcome)["inconclusive"] - skipped
    totals = {"tests": len(outcome.verdicts), "failures": failures, "errors": 0, "skipped": skipped}
    attributes = {name: str(total) for name, total in totals.items()} | {"time": "0"}
    root = ElementTree.Element("testsuites", {"name": f"memdiag {outcome.command}", **attributes})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(outcome.subject), **attributes})
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in (("memdiag_version", __version__), ("report", outcome.report)):
        ElementTree.SubElement(properties, "property", {"name": name, "value": _xml(value)})
    for verdict in outcome.verdicts:
        about = {"name": _xml(cut(verdict.rule, MOST_NAME)), "classname": f"memdiag.{outcome.command}"}
        case = ElementTree.SubElement(suite, "testcase", about | {"file": _xml(outcome.file), "time": "0"})
        said = _xml(figures(verdict))
        if verdict.verdict == "fail" or (verdict.verdict == "inconclusive" and outcome.inconclusive == "fail"):
            wrong = ElementTree.SubElement(case, "failure", {"message": said, "type": verdict.verdict})
            wrong.text = _xml(f"{said}\nrule: {plain(verdict.sql, len(verdict.sql) + 1)}")
        elif verdict.verdict == "inconclusive":
            ElementTree.SubElement(case, "skipped", {"message": f"inconclusive: {said}"})
        else:
            ElementTree.SubElement(case, "system-out").text = said
    if outcome.notes:
        notes = "\n".join(f"- {plain(note, len(note) + 1)}" for note in outcome.notes)
        ElementTree.SubElement(suite, "system-out").text = _xml(notes)
    ElementTree.indent(root)
    # us-ascii: whatever stdout can hold, all else is a character reference. A ## can only stand in a string.
    text: bytes = ElementTree.tostring(root, encoding="us-ascii", xml_declaration=True)
    return text.decode("ascii").replace("##", "#&#35;")


def _xml(text: str) -> str:
    """Characters that XML 1.0 cannot hold, and those that turn text around, as escapes like `\\x1b`."""
    turning = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
    kept = f"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[{turning}]"
    return re.sub(kept, lambda found: escape(found[0]), text)


# -- GitHub --------------------------------------------------------------------------------------------------------


def to_github(outcome: Outcome) -> str:
    """Workflow commands: a line per rule that failed or is inconclusive, and a notice of the whole."""
    unsure = "error" if outcome.inconclusive == "fail" else "warning"
    kinds = {"fail": "error", "inconclusive": unsure}
    found = [(kinds[v.verdict], v) for v in outcome.verdicts if v.verdict in kinds]
    lines, seen = [], {"error": 0, "warning": 0}
    for kind, verdict in found:
        seen[kind] += 1
        more = sum(other == kind for other, _ in found) - MOST_ANNOTATIONS
        said = f"{verdict.verdict}: {cut(verdict.rule, MOST_NAME)}: {figures(verdict)}"
        if seen[kind] == MOST_ANNOTATIONS and more > 0:  # the last that is shown; the log has them all
            said += f" (and {more} more in the log)"
        lines.append(_command(kind, outcome.file, verdict.rule, said))
    title = f"memdiag {outcome.command}"
    return "\n".join([*lines, _command("notice", outcome.file, title, f"{outcome.subject}: {sentence(outcome)}")])


def _command(kind: str, file: str, title: str, message: str) -> str:
    known = {"file": file, "title": cut(visible(title, keep="\r\n"), MOST_TITLE)}
    properties = ",".join(f"{name}={_property(value)}" for name, value in known.items())
    return f"::{kind} {properties}::{_data(message)}"


def _data(text: str) -> str:
    return visible(text, keep="\r\n").replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
