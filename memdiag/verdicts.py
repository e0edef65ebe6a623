"""Verdicts: what a rule over a report came to, and what several of them come to together. Needs nothing but Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """One rule, judged."""

    rule: str  # its name, or its SQL where it has none
    sql: str  # the rule as given
    verdict: str  # "pass" | "fail" | "inconclusive"
    observed: float | None
    lo: float | None
    hi: float | None
    limit: float | None
    comparison: str | None  # "<", "<=", ">", ">=", "=", "!=", "between" or None (no comparison with a constant)
    n: int | None  # rows (or pairs) behind it
    confidence: float | None  # of lo..hi; None: judged by the value alone
    method: str | None  # "bootstrap-t", "moments", "Clopper-Pearson", ...
    p: float | None  # diff only: two-sided p that the difference is the limit
    q: float | None  # diff only: p after Benjamini-Hochberg over the rules
    note: str | None  # one line: why undefined, why inconclusive
    least: float | None = None  # the lower limit, where there are two


@dataclass(frozen=True)
class Table:
    """A table to show below the verdicts; its cells are untrusted text."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Outcome:
    """What a command found: its rules, judged, and whatever belongs to them."""

    command: str  # "check" | "diff"
    subject: str  # "score.parquet", or "base.parquet and new.parquet"
    file: str  # the file an annotation points to
    report: str  # what was written
    verdicts: tuple[Verdict, ...]
    inconclusive: str  # what an inconclusive rule counts as: "pass" | "fail"
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # the command's own, for JSON

    @property
    def failed(self) -> bool:
        """Whether any rule failed, or is inconclusive where that counts as failed."""
        bad = {"fail", "inconclusive"} if self.inconclusive == "fail" else {"fail"}
        return any(verdict.verdict in bad for verdict in self.verdicts)
