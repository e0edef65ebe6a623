"""An outcome as GitHub's Markdown, for a pull request. Needs no torch.

Names of rules and cells are untrusted: none leaves its cell, links anything or notifies anybody.
"""

from __future__ import annotations

import html
import re

from memdiag.verdict_words import apart, digits_of, interval, limit, number, plain, sentence
from memdiag.verdicts import Outcome, Table, Verdict

MARKS = {"pass": "✓ pass", "fail": "✗ **fail**", "inconclusive": "? inconclusive"}  # text, no emoji
MOST_MARKDOWN_CELL = 300
MOST_NOTES = 20
MOST_MARKDOWN = 60_000  # characters: a comment on GitHub ends at 65,536


def to_markdown(outcome: Outcome) -> str:
    """A summary for a pull request, of at most `MOST_MARKDOWN` characters; it says what it leaves out."""
    named = [(v.rule, v.sql) for v in outcome.verdicts if v.sql != v.rule]
    tables = [*outcome.tables, *([Table("The rules as SQL", ("rule", "SQL"), tuple(named))] if named else [])]
    rows = {i: _markdown_row(verdict) for i, verdict in enumerate(outcome.verdicts)}
    head = [f"### memdiag {outcome.command} of {code(outcome.subject)}", "", f"**{sentence(outcome)}**", ""]
    notes = [f"- {prose(note)}" for note in outcome.notes[:MOST_NOTES]]
    if len(outcome.notes) > MOST_NOTES:
        notes.append(f"- {len(outcome.notes) - MOST_NOTES} more notes are in the JSON.")
    room = MOST_MARKDOWN - sum(len(line) + 1 for line in (*head, *notes, *rows.values())) - 1000
    for i in sorted(rows, key=lambda i: (outcome.verdicts[i].verdict != "pass", -i)):  # passes go first, the last first
        if room >= 0:
            break
        room += len(rows.pop(i)) + 1
    lines = [*head, *_markdown_head("verdict", "rule", "observed", "interval", "wanted", "n", "note"), *rows.values()]
    if len(rows) < len(outcome.verdicts):
        notes.append(f"- {len(outcome.verdicts) - len(rows)} more rules are in {code(outcome.report)}.")
    details: list[str] = []
    for table in tables:
        text = _markdown_details(table)
        room -= len(text) + 2
        if room < 0:
            notes.append(f"- Too long to show: {prose(table.caption)}.")
        else:
            details += ["", text]
    lines += ["", *notes] if notes else []
    return "\n".join([*lines, *details, "", f"Report: {code(outcome.report)}"])


def _markdown_row(v: Verdict) -> str:
    span, digits = interval(v), digits_of(v)
    span += f" ({number(100 * v.confidence)} %)" if span and v.confidence is not None else ""
    note = prose(v.note) if v.note else ""
    q = [f"q = {number(v.q, 3)}"] if v.q is not None else []
    cells = [MARKS[v.verdict], cell(v.rule), number(v.observed, digits), span, _cell_code(limit(v)) if limit(v) else ""]
    return f"| {' | '.join([*cells, number(v.n), '; '.join(part for part in (*q, note) if part)])} |"


def _markdown_head(*headings: str) -> list[str]:
    return [f"| {' | '.join(headings)} |", f"|{' --- |' * len(headings)}"]


def _markdown_details(table: Table) -> str:
    caption = html.escape(_unlinked(plain(table.caption, MOST_MARKDOWN_CELL)), quote=False).replace("#", "&#35;")
    rows = [f"| {' | '.join(cell(one) for one in row)} |" for row in table.rows]
    lines = [*_markdown_head(*(prose(heading) for heading in table.header)), *rows]
    return "\n".join(["<details>", f"<summary>{caption}</summary>", "", *lines, "", "</details>"])


def cell(text: str) -> str:
    """Untrusted text in a cell: words and numbers as they are, all else as code, where nothing has a meaning."""
    text = plain(text, MOST_MARKDOWN_CELL)
    number_or_word = r"(?:[a-z]+|[-+−]?\d[\d.,]*(?:e[-+]?\d+)?|[–%…])"
    return text if re.fullmatch(f"{number_or_word}(?: {number_or_word})*", text) else _cell_code(text)


def _cell_code(text: str) -> str:
    """Code in a table: | is escaped, which the table's syntax undoes even in code."""
    text = re.sub(r"\\(?=\|)", r"\\ ", text)  # readers differ on \\|: no backslash may come to stand before \|
    return code(text).replace("|", r"\|")


def code(text: str) -> str:
    """Untrusted text as code: in longer quotes than any in it, and no command to the runner that prints it."""
    text = apart(plain(text, MOST_MARKDOWN_CELL))
    quotes = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return quotes + pad + text + pad + quotes


def prose(text: str) -> str:
    """Untrusted text in a sentence: what Markdown would read is escaped, what GitHub would link is broken up."""
    text = _unlinked(plain(text, MOST_MARKDOWN_CELL))
    escaped = re.sub(r"[\\`*_{}\[\]<>&|~$!#]", lambda found: f"&#{ord(found[0])};", text)
    return re.sub(r"^([-+]|\d+(?=[.)]))", "\u200b\\1", escaped)  # no list in a list


def _unlinked(text: str) -> str:
    """@name, #1, GH-1, ://, www. with a zero-width space inside: GitHub links them however they are escaped."""
    return re.sub(r"@|#(?=\d)|\bGH-(?=\d)|:(?=//)|www(?=\.)", "\\g<0>\u200b", text, flags=re.IGNORECASE)
