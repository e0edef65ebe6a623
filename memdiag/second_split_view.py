"""A second-split report for people: a summary, tables for the terminal, a plot. Needs no torch."""

from __future__ import annotations

import sys
from typing import Any

from memdiag import score_view
from memdiag.tables import Report

plot = score_view.plot  # its scores are drawn as all others


def summary(report: Report) -> dict[str, Any]:
    """The report's path, the figures of its scores, and what the networks had learned."""
    meta, found = report.meta, report.meta["summary"]
    keys = ("mean", "n_null", "auc", "found_in_top")
    return {
        "report": str(report.path),
        "kind": meta["kind"],
        "examples": found["n"],
        "scores": {
            name: {k: found["scores"][name][k] for k in keys if k in found["scores"][name]} for name in meta["scores"]
        },
        "networks": meta["networks"],
    }


def print_table(report: Report) -> None:
    """How the networks were trained and what they kept, then the scores, who scores highest, and agreement."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 100, emoji=False)
    meta, found = report.meta, report.meta["summary"]
    one, two = meta["settled"]
    networks = meta["networks"]
    console.print(
        f"{found['n']} examples, {len(networks)} networks {meta['model']}: {one['epochs']} epochs on one half, then "
        f"{two['epochs']} on the other",
        markup=False,
        highlight=False,
    )
    learned, kept = (sum(n[key] for n in networks) / len(networks) for key in ("learned", "kept"))
    console.print(
        f"right after stage 1: {learned:.1%}; of these halves still right after stage 2: {kept:.1%}", highlight=False
    )
    score_view.print_scores(
        console, meta["scores"], found, {k: {"memorized": end} for k, end in meta["memorized"].items()}
    )
    score_view.print_top(console, meta["scores"], found)
    score_view.print_agreement(console, found["agreement"])
    console.print("[dim]report:[/] ", end="")
    console.print(str(report.path), markup=False, highlight=False, soft_wrap=True)
