"""The main report of `memdiag counterfactual`: who is memorized. What the other reports of a run share is here, too."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memdiag import counterfactual_view, page_svg
from memdiag.counterfactual_report import MEMORIZED
from memdiag.mean_interval import rate_interval
from memdiag.page_sections import shown
from memdiag.page_sections.building import MOST_MARKS, Building, Row
from memdiag.page_sections.panels import draw_density
from memdiag.page_sections.plain import CONFIDENCE, mean_of

TOP = 20
CELLS = 40  # along each side of a density


def summary_of(page: Building, **same: object) -> Row | None:
    """summary.json of the run; a note if there is none."""
    found: Row | None = None
    with page.part("figures that need the models"):
        found = page.summary_beside(**same)
    return found


def say_warnings(page: Building, found: Row | None) -> None:
    """What a reader must be warned of; said with the main report of a run."""
    with page.part("warnings"):
        for text in (found or {}).get("warnings") or []:
            page.note(str(text))


def _has_truth(page: Building) -> bool:
    """Whether some examples are suspects and some are not."""
    return (
        "truth" in page.columns and page.one("SELECT count(DISTINCT truth) FROM report WHERE truth IS NOT NULL")[0] > 1
    )


def memorization(page: Building) -> None:
    """How many are memorized, the histogram, in against out, who is memorized most."""
    n = page.count()
    found = summary_of(page, examples=n, **({"models": page.meta["n_models"]} if "n_models" in page.meta else {}))
    say_warnings(page, found)
    with page.part("headline figures"):
        _memorization_figures(page, n, found)
    with page.part("the histogram of memorization"):
        _draw_histogram(page)
    with page.part("accuracy in against out"):
        _draw_in_out(page)
    with page.part("the most memorized examples"):
        _most_memorized(page)


def _memorization_figures(page: Building, n: int, found: Row | None) -> None:
    known, many = page.one(
        "SELECT count(memorization), count(*) FILTER (WHERE memorization >= ?) FROM report", (MEMORIZED,)
    )
    about = f"n = {n:,} examples, {shown.number(page.meta.get('n_models'))} models"
    if found is not None:
        page.estimate(
            "Memorization, mean over examples",
            found.get("memorization"),
            "examples",
            "95 % for other examples and other models",
        )
    else:
        page.figure(
            "Memorization, mean over examples", mean_of(page, "memorization")[0].value, note=f"{about}; no interval"
        )
    share = rate_interval(many, known, CONFIDENCE)
    page.figure(
        f"Share with memorization of at least {MEMORIZED:g}",
        share.value,
        share.lo,
        share.hi,
        f"{many:,} of {known:,}; interval for other examples, not other models",
    )
    if found is not None:
        page.estimate("Accuracy on what a model was trained on", found.get("accuracy_in"), "models")
        page.estimate("Accuracy on what it was not", found.get("accuracy_out"), "models")
        truth = found.get("truth")
        if truth:
            suspects = f"{shown.number(truth.get('n_true'))} suspects"
            page.estimate("AUC of suspects among the others", truth.get("auc"), "examples", suspects)
        if found.get("median_width") is not None:
            wanted, needed = found.get("width_wanted"), found.get("models_for_width")
            more = f"{shown.number(needed)} models would make it {shown.number(wanted)}" if needed and wanted else ""
            page.figure("Median width of an example's interval", found["median_width"], note=more)
        half = (found.get("stability") or {}).get("spearman")
        page.estimate("Half of the models against the other half, Spearman", half, "examples")
    if known < n:
        page.note(f"{n - known:,} of {n:,} examples have no value: no model has seen them, or every model has")


def grouped(page: Building, column: str, edges: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """Counts of all, or of the others and the suspects."""
    nothing = np.zeros(len(edges) - 1, dtype=np.int64)
    if not _has_truth(page):
        return [sum(page.histogram(column, edges).values(), nothing)]
    counts = page.histogram(column, edges, "truth")
    return [counts.get(False, nothing) + counts.get(None, nothing), counts.get(True, nothing)]


def _draw_histogram(page: Building) -> None:
    low, high = page.one("SELECT min(memorization), max(memorization) FROM report WHERE isfinite(memorization)")
    if low is None:
        page.note("no example has a value of memorization")
        return
    edges = counterfactual_view.edges_of(low)
    groups = grouped(page, "memorization", edges)
    canvas = page_svg.new_figure(7.2, 3.0)
    axis = canvas.subplots()
    counterfactual_view.draw_counts(axis, edges, groups)
    axis.set_xlabel("memorization: p in − p out")
    total = sum(int(group.sum()) for group in groups)
    (many,) = page.one("SELECT count(*) FILTER (WHERE memorization >= ?) FROM report", (MEMORIZED,))
    apart = f", {int(groups[1].sum()):,} suspects apart" if len(groups) > 1 else ""
    alt = (
        f"Histogram of memorization of {total:,} examples{apart}, from {shown.number(low)} to {shown.number(high)}, "
        "most of them in "
        f"the bar at {shown.number(float(edges[int(np.argmax(sum(groups)))]))}; {many:,} are at {MEMORIZED:g} or above."
    )
    both = "; suspects before the others" if len(groups) > 1 else ""
    page.plot(canvas, alt, f"Memorization of the examples, log scale{both}.")


def _draw_in_out(page: Building) -> None:
    (n,) = page.one("SELECT count(*) FROM report WHERE isfinite(p_in) AND isfinite(p_out)")
    if not n:
        return
    truth = "coalesce(truth, false)" if _has_truth(page) else "false"
    canvas = page_svg.new_figure(7.2, 3.9)
    axis = canvas.subplots()
    if n <= MOST_MARKS:
        found = page.sql(
            f"SELECT p_in, p_out, {truth} FROM report WHERE isfinite(p_in) AND isfinite(p_out) ORDER BY 1, 2, 3"
        )
        p_in, p_out, suspect = (np.array(values) for values in zip(*found))
        counterfactual_view.draw_in_out(axis, p_in, p_out, suspect.astype(bool), rasterized=False)
    else:
        counts = np.full((CELLS, CELLS), np.nan)
        for x, y, size in page.sql(
            f"SELECT least(floor(p_out * {CELLS}), {CELLS - 1}), least(floor(p_in * {CELLS}), {CELLS - 1}), count(*) "
            "FROM report WHERE p_in BETWEEN 0 AND 1 AND p_out BETWEEN 0 AND 1 GROUP BY 1, 2"
        ):
            counts[int(y), int(x)] = size
        draw_density(canvas, axis, counts, (0.0, 1.0, 0.0, 1.0))
        counterfactual_view.label_in_out(axis)
    axis.set_aspect("equal")
    below, surely = page.one(
        "SELECT count(*) FILTER (WHERE p_in < p_out), count(*) FILTER (WHERE p_in >= 0.75 AND p_out <= 0.25) "
        "FROM report"
    )
    left, under = shown.counted(surely, "example"), shown.counted(below, "example")
    way = "Points" if n <= MOST_MARKS else "Density"
    alt = (
        f"{way} of {n:,} examples, right with it against right without it. Top left, "
        f"right in three of four models with it and wrong in three of four without: {left}; below the "
        f"diagonal: {under}."
    )
    noise = "; a little noise shows how many" if n <= MOST_MARKS else ""
    page.plot(canvas, alt, f"Share of models that are right, in against out; memorized examples are top left{noise}.")


def _most_memorized(page: Building) -> None:
    names = ("example_id", "label", "truth", "memorization", "lo", "hi", "p_in", "p_out", "n_in", "n_out")
    present = [name for name in names if name in page.columns]
    soft = ", memorization_soft DESC" if "memorization_soft" in page.columns else ""
    found = page.sql(
        f"SELECT {', '.join(present)} FROM report WHERE memorization IS NOT NULL ORDER BY memorization DESC{soft}, row "
        f"LIMIT {TOP}"
    )
    rows = [dict.fromkeys(names) | dict(zip(present, row)) for row in found]
    header = (
        "example",
        "label",
        "suspect",
        "memorization",
        "95 % interval",
        "right in",
        "right out",
        "models in + out",
    )
    cells = [
        [
            row["example_id"],
            None if row["label"] is None else str(row["label"]),
            row["truth"],
            shown.number(row["memorization"], 3),
            shown.interval(row["lo"], row["hi"]) or None,
            shown.number(row["p_in"], 2),
            shown.number(row["p_out"], 2),
            f"{row['n_in']} + {row['n_out']}",
        ]
        for row in rows
    ]
    page.table("Most memorized", header, cells)
