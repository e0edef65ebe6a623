"""What `memdiag diff` found, as tables of text for people. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memdiag.rules import Change, Rule
from memdiag.verdict_words import number
from memdiag.verdicts import Table

MOST = 3  # columns whose movers are shown if no rule names any


def shown(
    rows: Sequence[Mapping[str, Any]], moved: Sequence[Mapping[str, Any]], rules: Sequence[Rule | Change]
) -> tuple[Table, ...]:
    """The columns that changed, and of those that rules are about the rows that moved most, as tables of text."""
    changed = [row for row in rows if row["changed"] and not _is_about_another(row["column"], rows)]
    cells = [
        (
            row["column"],
            number(row["base"], 4),
            number(row["new"], 4),
            number(row["difference"], 4),
            "" if row["lo"] is None else f"{number(row['lo'], 4)} to {number(row['hi'], 4)}",
            number(row["n"]),
            f"{row['changed']:,}",
        )
        for row in changed
    ]
    header = ("column", "base", "new", "difference", "interval", "n", "changed")
    found = [Table("columns that changed, means over pairs", header, tuple(cells))] if cells else []
    asked = {rule.column for rule in rules if isinstance(rule, Change)}
    surest = sorted((row for row in changed if row["std"]), key=lambda row: -abs(row["difference"]) / row["std"])
    for name in [row["column"] for row in changed if row["column"] in asked] or [
        row["column"] for row in surest[:MOST]
    ]:
        largest = [row for row in moved if row["column"] == name]
        told = ((row["key"], *(number(row[of], 4) for of in ("base", "new", "difference"))) for row in largest)
        found.append(Table(f"{name}: rows that moved most", ("row", "base", "new", "difference"), tuple(told)))
    for change in ("added", "removed"):
        keys = tuple((row["key"],) for row in moved if row["change"] == change)
        if keys:
            found.append(Table(f"rows {change}, the first {len(keys)}", ("row",), keys))
    return tuple(found)


def _is_about_another(name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a column is the standard error or the end of an interval of another."""
    named = {row["column"] for row in rows}
    return name in ("se", "lo", "hi") or any(
        name.endswith(end) and name.removesuffix(end) in named for end in ("_se", "_lo", "_hi")
    )
