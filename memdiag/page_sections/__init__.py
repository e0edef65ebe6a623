"""What a page says of a report: headline figures with their intervals, the plots that its kind deserves, its origin.

A file for each family of reports. Every kind has a section, and so has a report that is empty, damaged, of another
version or of a kind that nobody knows: what cannot be made becomes a note.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memdiag import tables
from memdiag.errors import InputError
from memdiag.page import Section
from memdiag.page_sections import provenance
from memdiag.page_sections.building import Building
from memdiag.report_sql import Session, opened

PLAIN = "plain:rows"
# kind -> what it answers, the function that builds it
KINDS = {
    "check": ("Does the report keep the rules that were set for it?", "verdicts:check"),
    "diff.columns": ("What changed between two reports, column by column?", "verdicts:columns"),
    "diff.movers": ("Which rows of two reports moved most?", "verdicts:movers"),
    "diff.rules": ("Do two reports differ by no more than the rules allow?", "verdicts:check"),
    "counterfactual": ("What would the model get wrong without this example?", "counterfactual:memorization"),
    "counterfactual.examples": ("Which examples is the run about?", PLAIN),
    "counterfactual.influence": ("Which training example helps which held-out example?", "influence:influence"),
    "counterfactual.models": (
        "How well does each of the models do, in and out of its subset?",
        "influence:models",
    ),
    "counterfactual.shard": ("What does one model make of every example?", PLAIN),
    "counterfactual.sizes": ("How does memorization change as the model grows?", "sizes:sizes"),
    "counterfactual.turn-over-dropout": (
        "What does a network make of an example with the units that never saw it?",
        "sizes:turn_over",
    ),
    "entropy": ("How compressed are the hidden states, layer by layer?", "entropy:layers"),
    "entropy.gradients": ("Does a cross-entropy step compress, or work against it?", "entropy:gradients"),
    "prune-memorizers.pruning": ("What happens when the neurons that memorize go?", "prune:pruning"),
    "prune-memorizers.neurons": ("Which neurons hold the corrupted labels?", "prune:neurons"),
    "prune-memorizers.dynamics": ("When did the network memorize, and when did it generalize?", "prune:dynamics"),
    "prune-memorizers.filtration": ("What do the strongest frequencies know, and what the rest?", "prune:filtration"),
    "reproduce.claims": ("Does the paper hold here, claim by claim?", "reproduce:claims"),
    "reproduce.phases": ("In which phase does each network end?", "reproduce:phases"),
    "reproduce.effects": ("Does the method do what the paper says, beyond its controls?", "reproduce:effects"),
    "reproduce.runs": ("What did each run end with?", "reproduce:runs"),
    "score": ("Which examples look memorized, and do the scores agree?", "score:examples"),
    "score.second-split": (
        "Which examples are forgotten soonest when others are learned?",
        "second_split:second_split",
    ),
    "train.history": ("How did training go?", "train:history"),
    "train.examples": ("What was trained on, and which labels were wrong?", "train:examples"),
    "train.trajectory": ("How did every example stand in one epoch?", PLAIN),
    "train-gapt.history": ("When did the run memorize, and when compress?", "gapt:history"),
    "train-gapt.compare": ("Does the gate do better than its controls?", "gapt:compare"),
}
PLAIN_TEXT: dict[Any, Any] = {"text.parse_math": False}  # a $ in a name is a $
UNKNOWN = "What is in this report?"


def section_of(path: Path, name: str) -> Section:
    """The section of a report.

    Args:
        path: of the report, as the user gave it; `memdiag rerun` is told with it.
        name: what it is called on the page.
    Raises:
        InputError: there is no such file, or it is no report of memdiag.
    """
    import matplotlib

    from memdiag import page_svg

    meta = tables.read_meta(path)
    kind = str(meta["report"])
    question, where = KINDS.get(kind, (UNKNOWN, PLAIN))
    module, _, build = where.partition(":")
    columns = tuple(tables.read_schema(path).names)
    with _readable(path) as (session, fault), page_svg.styled(), matplotlib.rc_context(PLAIN_TEXT):
        page = Building(path, name, kind, meta, columns, session)
        rows = _begin(page, fault)
        if rows != 0:
            with page.part("what this report is about"):
                getattr(importlib.import_module(f"{__name__}.{module}"), build)(page)
            if not (page.figures or page.plots or page.notes):
                page.note("none of the columns that this kind of report is told by has a value")
        with page.part("where the report is from"):
            if names := provenance.unknown_options(meta):
                page.note(f"made with options that this version does not have: {', '.join(names)}")
        found: tuple[tuple[str, str], ...] = ()
        lines = ""
        with page.part("where the report is from"):
            found = provenance.pairs(meta, rows=rows)
        with page.part("how to make the report again"):
            lines = provenance.shell_lines(meta, path)
    return Section(
        kind,
        name,
        question,
        tuple(page.figures),
        tuple(page.plots),
        tuple(page.tables),
        tuple(page.notes),
        found,
        lines,
    )


def _begin(page: Building, fault: str) -> int | None:
    """What is to be said before anything else; returns the number of rows, None if they cannot be read."""
    from memdiag.report_kinds import ROWS, row_of

    if page.kind not in KINDS:
        page.note(f"a report of a kind that this version does not know: {page.kind}")
    if page.meta.get("partial"):
        page.note("the run was not finished: the report has what there was until then")
    version = page.meta.get("schema_version")
    if page.kind in ROWS and version != (known := row_of(page.kind).__dict__["schema_version"]):
        told = "of no schema version" if version is None else f"of schema version {version}"
        page.note(f"{told}; this version of memdiag knows {known}: columns may be missing or mean something else")
    if page.session is None:
        page.note(f"its rows cannot be read: {fault}")
        return None
    try:
        rows = page.count()
    except InputError as error:
        page.session = None
        page.note(f"its rows cannot be read: {error}")
        return None
    if not rows:
        page.note("the report has no rows")
    return rows


@contextmanager
def _readable(path: Path) -> Iterator[tuple[Session | None, str]]:
    """SQL over the report, or None and why not."""
    manager: Any = opened({"report": path})
    try:
        session = manager.__enter__()
    except InputError as error:
        yield None, str(error)
        return
    try:
        yield session, ""
    finally:
        manager.__exit__(None, None, None)
