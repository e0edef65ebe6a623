"""Who helps whom, and how the models do: the other reports of a run of `memdiag counterfactual`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memdiag import page_svg
from memdiag.page_sections import shown
from memdiag.page_sections.building import Building, Row
from memdiag.page_sections.counterfactual import TOP, summary_of


def influence(page: Building) -> None:
    """How many pairs, how large, and the strongest."""
    found = summary_of(page, models=page.meta.get("n_models"))
    told = (found or {}).get("influence") or {}
    with page.part("headline figures"):
        (many,) = page.one("SELECT count(*) FROM report WHERE significant")
        chance = told.get("significant_if_shuffled")
        beside = f"about {shown.number(chance)} of {shown.number(told.get('pairs'))} pairs would be by chance"
        page.figure(
            "Pairs beyond --min-influence and 3 standard errors", many, note=beside if chance is not None else ""
        )
        page.figure("Pairs listed", page.count(), note="the strongest few of every held-out example among them")
        for word, label in (("example_id", "Training examples in them"), ("test_id", "Held-out examples in them")):
            page.figure(label, page.one(f"SELECT count(DISTINCT {word}) FROM report WHERE significant")[0])
    with page.part("the histogram of influence"):
        _draw_influence(page)
    with page.part("the strongest pairs"):
        rows = page.sql(
            "SELECT example_id, test_id, influence, se, significant, n_in, n_out FROM report "
            f"ORDER BY abs(influence) DESC, example_id, test_id LIMIT {TOP}"
        )
        cells = [[a, b, shown.number(v, 3), shown.number(se, 3), ok, f"{i} + {o}"] for a, b, v, se, ok, i, o in rows]
        header = (
            "training example",
            "held-out example",
            "influence",
            "standard error",
            "significant",
            "models in + out",
        )
        page.table("The strongest pairs", header, cells)


def _draw_influence(page: Building) -> None:
    low, high = page.one("SELECT min(influence), max(influence) FROM report")
    edges = np.histogram_bin_edges(np.array([low, high]), bins=40)
    counts = page.histogram("influence", edges, "significant")
    canvas = page_svg.new_figure(7.2, 2.8)
    axis = canvas.subplots()
    middles = (edges[:-1] + edges[1:]) / 2
    for key, label, colour in ((False, "listed only", "C6"), (True, "significant", "C0")):
        if key in counts:
            axis.hist(middles, bins=edges.tolist(), weights=counts[key], color=colour, alpha=0.75, label=label)
    axis.set(xlabel="influence: accuracy with the example in, less that without", ylabel="pairs")
    axis.legend()
    helps, hurts = page.one(
        "SELECT count(*) FILTER (WHERE significant AND influence > 0), count(*) FILTER (WHERE significant AND "
        "influence < 0) "
        "FROM report"
    )
    alt = (
        f"Histogram of the influence of {page.count():,} listed pairs, from {shown.number(low)} to "
        f"{shown.number(high)}: "
        f"{helps:,} significant "
        f"ones help, {hurts:,} harm."
    )
    page.plot(canvas, alt, "Influence of the listed pairs; pairs that are not listed are weaker.")


def models(page: Building) -> None:
    """Accuracy in, out and held out over the models, each with the t interval of its mean."""
    from memdiag.reproduce_claims import t_interval

    names = {"accuracy_in": "trained on", "accuracy_out": "not trained on", "test_accuracy": "held out"}
    rows = page.records(columns=("model", "examples", *names))
    page.figure("Models", page.count(), note=f"each trained on about {_about(rows)} examples")
    canvas = page_svg.new_figure(7.2, 2.6)
    axis = canvas.subplots()
    told = []
    for y, (name, label) in enumerate(names.items()):
        values = [float(row[name]) for row in rows if row[name] is not None]
        if not values:
            continue
        mean, (lo, hi) = float(np.mean(values)), t_interval(values)
        page.figure(f"Accuracy, {label}", mean, lo, hi, f"mean of n = {len(values):,} models")
        told.append(f"{label} {shown.with_interval(mean, lo, hi)}")
        some = [values[i] for i in np.linspace(0, len(values) - 1, min(len(values), 200)).astype(int)]
        jitter = np.random.default_rng(0).uniform(-0.18, 0.18, len(some))
        axis.plot(some, y + jitter, ".", color=f"C{y}", alpha=0.45, markersize=4)
        if lo is not None and hi is not None:
            axis.plot([lo, hi], [y + 0.32] * 2, color=f"C{y}", linewidth=2.4, solid_capstyle="butt")
        axis.plot(mean, y + 0.32, "o", color=f"C{y}")
    axis.set_yticks(range(len(names)), list(names.values()))
    axis.set(xlabel="accuracy", ylim=(-0.5, len(names) - 0.3))
    if told:
        page.plot(
            canvas,
            f"Accuracy of the models: {'; '.join(told)}.",
            "A dot for each model; above it mean and 95 % t interval.",
        )


def _about(rows: Sequence[Row]) -> str:
    known = [row["examples"] for row in rows if row["examples"] is not None]
    return shown.number(round(sum(known) / len(known))) if known else shown.NOTHING
