"""Reports of `memdiag counterfactual --sizes` and `--turn-over-dropout`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdiag import counterfactual_view, page_svg
from memdiag.counterfactual_report import MEMORIZED
from memdiag.mean_interval import rate_interval
from memdiag.page_sections import shown
from memdiag.page_sections.building import Building
from memdiag.page_sections.counterfactual import TOP, grouped, say_warnings, summary_of
from memdiag.page_sections.plain import CONFIDENCE, mean_of


def sizes(page: Building) -> None:
    """How many examples rise, fall, ... as the model grows, and the figures of every width."""
    found = summary_of(page)
    say_warnings(page, found)
    with page.part("headline figures"):
        counts = dict(page.sql("SELECT trajectory, count(DISTINCT row) FROM report GROUP BY 1"))
        total = sum(counts.values())
        for call in counterfactual_view.CALLS:
            n = counts.get(call, 0)
            rate = rate_interval(n, total, CONFIDENCE)
            if call != "other":
                page.figure(f"Memorization is {call}", rate.value, rate.lo, rate.hi, f"{n:,} of {total:,} examples")
        page.figure("Examples", total, note=f"at widths {_widths(page)}")
        if found and found.get("called_by_chance") is not None:
            page.note(
                f"of examples whose memorization is constant {found['called_by_chance']:.1%} would be called "
                "otherwise by "
                "chance: read the shares beside it"
            )
    with page.part("the curves over sizes"):
        _draw_sizes(page)
    with page.part("the table of widths"):
        header = ("width", "accuracy in", "accuracy out", "memorization, mean", f"examples ≥ {MEMORIZED:g}")
        rows = page.sql(
            "SELECT width, avg(p_in), avg(p_out), avg(memorization), count(*) FILTER (WHERE memorization >= ?) "
            "FROM report "
            "GROUP BY 1 ORDER BY 1",
            (MEMORIZED,),
        )
        page.table("Means over the examples at every width", header, rows)


def _widths(page: Building) -> str:
    return shown.listed([str(width) for (width,) in page.sql("SELECT DISTINCT width FROM report ORDER BY 1")], 8)


def _draw_sizes(page: Building) -> None:
    widths = [width for (width,) in page.sql("SELECT DISTINCT width FROM report ORDER BY 1")]
    curves: dict[str, tuple[int, NDArray[np.float64]]] = {}
    for call in counterfactual_view.CALLS:
        rows = page.sql(
            "SELECT width, avg(memorization), count(*) FROM report WHERE trajectory = ? GROUP BY 1 ORDER BY 1", (call,)
        )
        if rows:
            means = {width: mean for width, mean, _ in rows}
            curves[call] = (max(n for *_, n in rows), np.array([means.get(width) or math.nan for width in widths]))
    if not curves:
        page.note("no example has a value at every width")
        return
    canvas = page_svg.new_figure(7.2, 3.4)
    counterfactual_view.draw_sizes(canvas.subplots(), widths, curves)
    told = "; ".join(
        f"{call}, {shown.counted(n, 'example')}, from {shown.number(float(of[0]))} to {shown.number(float(of[-1]))}"
        for call, (n, of) in curves.items()
    )
    page.plot(
        canvas,
        f"Mean memorization over {len(widths)} widths: {told}.",
        "Mean memorization of the examples of each kind of curve, by width (log scale).",
    )


def turn_over(page: Building) -> None:
    """Self-influence: its mean, its histogram, and who has most."""
    n = page.count()
    found = summary_of(page, examples=n)
    say_warnings(page, found)
    with page.part("headline figures"):
        mean = mean_of(page, "self_influence")[0]
        page.figure("Self-influence, mean", mean.value, mean.lo, mean.hi, f"n = {n:,} examples", unit="nats")
        truth: Mapping[str, Any] = (found or {}).get("truth") or {}
        page.estimate("AUC of suspects among the others", truth.get("auc"), "examples")
        for name, label in (("own_correct", "Right with its own units"), ("flipped_correct", "Right with the others")):
            of = mean_of(page, name)[0]
            page.figure(label, of.value, of.lo, of.hi, f"n = {n:,} examples")
    with page.part("the histogram of self-influence"):
        low, high = page.one("SELECT min(self_influence), max(self_influence) FROM report")
        edges = np.histogram_bin_edges(np.array([low, high]), bins=25)
        canvas = page_svg.new_figure(7.2, 2.8)
        axis = canvas.subplots()
        counterfactual_view.draw_counts(axis, edges, grouped(page, "self_influence", edges))
        axis.set_xlabel("self-influence (nats)")
        alt = (
            f"Histogram of the self-influence of {n:,} examples, from {shown.number(low)} to {shown.number(high)} nats."
        )
        page.plot(
            canvas, alt, "Self-influence: loss with the units that never saw the example, less that with its own."
        )
    with page.part("who has the most self-influence"):
        rows = page.sql(
            "SELECT example_id, CAST(label AS VARCHAR), truth, self_influence, own_loss, flipped_loss FROM report "
            f"ORDER BY self_influence DESC, row LIMIT {TOP}"
        )
        header = ("example", "label", "suspect", "self-influence (nats)", "own loss", "flipped loss")
        page.table("Most self-influence", header, rows)
