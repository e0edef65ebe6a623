"""Reports of `memdiag score`: distributions, agreement, how well scores find the truth, who scores highest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memdiag import page_svg, score_view, scores
from memdiag.page_sections import shown
from memdiag.page_sections.building import Building, quoted
from memdiag.page_sections.panels import distributions
from memdiag.page_sections.plain import means

MOST_SCORES = 24  # panels
LONGEST_NAME = 24  # letters of a column's name in a legend
ALL_CELLS = 12  # names up to which a matrix has all its numbers, and not half of them


def examples(page: Building) -> None:
    """Distributions, agreement, and how well the scores find the truth if it is known."""
    names, found = names_of(page), page.meta.get("summary")
    truth = "truth" if "truth" in page.columns else None
    if not isinstance(found, Mapping) or not isinstance(found.get("scores"), Mapping):
        page.note("the metadata has no summary: agreement and areas under the curve are left out")
        found = None
    elif other := of_other_rows(page):
        page.note(
            f"{other}: agreement and areas under the curve are left out, the means are of the rows that there are"
        )
        found = None
    if found is None:
        with page.part("the means"):
            means(page, names)
    else:
        with page.part("headline figures"):
            _headlines(page, names, found)
    with page.part("the number of examples"):
        page.figure("Examples", page.count(), note=f"{len(names)} scores")
    with page.part("distributions"):
        if len(names) > MOST_SCORES:
            page.note(f"of {len(names)} scores the distributions of {MOST_SCORES} are drawn")
        distributions(page, names[:MOST_SCORES], truth, "Distribution of each score", marked(page))
    if found is None:
        return
    with page.part("areas under the curve"):
        _draw_auc(page, names, found)
    with page.part("the agreement matrix"):
        _draw_agreement(page, names, found)
    with page.part("the table of scores"):
        _table(page, names, found)
    with page.part("the examples that score highest"):
        _top(page, names, found)


def names_of(page: Building) -> list[str]:
    """The scores of a report, by its metadata or by its columns."""
    told = page.meta.get("scores")
    names = [str(name) for name in told] if isinstance(told, Sequence) and not isinstance(told, str) else scores.NAMES
    found = [name for name in names if name in page.columns]
    if told is None:
        page.note("the metadata does not name the scores; they are taken by their columns")
    elif len(found) < len(names):
        page.note(f"the report lacks the columns of {shown.listed([n for n in names if n not in found])}")
    return found


def marked(page: Building) -> str:
    """What an example is whose truth is true: the column of --truth as its name, "suspect" where nobody says.

    A true value says that the example is corrupted or suspect; "true" would be read as a correct label.
    """
    options = page.meta.get("options")
    name = options.get("truth") if isinstance(options, Mapping) else None
    return name if isinstance(name, str) and name.strip() and len(name) <= LONGEST_NAME else "suspect"


def of_other_rows(page: Building) -> str:
    """How the summary in the metadata is not of the rows of the report, since somebody changed them; "" if it is."""
    found = page.meta.get("summary")
    if not isinstance(found, Mapping):
        return ""
    n, rows = found.get("n"), page.count()
    if isinstance(n, int) and n != rows:
        return f"the summary in the metadata is of {n:,} examples, and the report has {rows:,}"
    truth = found.get("truth")
    if isinstance(truth, Mapping) and isinstance(truth.get("n_true"), int) and "truth" in page.columns:
        (here,) = page.one("SELECT count(*) FILTER (WHERE truth) FROM report")
        if here != truth["n_true"]:
            told = f"{truth['n_true']:,} examples marked {marked(page)}"
            return f"the summary in the metadata tells of {told}, and the report has {here:,}"
    return ""


def memorized(page: Building, name: str) -> str:
    """The end of a score's range that is more memorized, "high" or "low"; "" for neither."""
    foreign, own = page.meta.get("foreign"), page.meta.get("memorized")
    if isinstance(foreign, Mapping) and isinstance(foreign.get(name), Mapping):
        return str(foreign[name].get("memorized") or "")
    if isinstance(own, Mapping) and name in own:
        return str(own[name])
    return str(scores.load(name).MEMORIZED or "") if name in scores.NAMES else ""


def _headlines(page: Building, names: Sequence[str], found: Mapping[str, Any]) -> None:
    of, truth = found["scores"], found.get("truth")
    if truth:
        known = [name for name in names if (of.get(name, {}).get("auc") or {}).get("value") is not None]
        known.sort(key=lambda name: -of[name]["auc"]["value"])
        for name in known[:1]:
            chosen = f"highest of {len(known)} scores, chosen after the fact" if len(known) > 1 else ""
            page.estimate(f"AUC of {name}, {marked(page)} against others", of[name]["auc"], "examples", chosen)
            top = f"{marked(page).capitalize()} among its top {shown.number(truth.get('n_true'))}"
            page.estimate(top, of[name].get("found_in_top"), "examples")
        page.figure(f"Examples marked {marked(page)}", truth.get("n_true"), note=f"of {shown.number(truth.get('n'))}")
    else:
        shown_first = list(dict.fromkeys(name for name in (*score_view.HEADLINES, *names) if name in names))
        for name in shown_first[:3]:
            page.estimate(f"Mean {name}", of.get(name, {}).get("mean"), "examples", _turned(page, name))
    coherence = found.get("coherence")
    if coherence and coherence.get("overall") is not None:
        page.figure(
            "m-coherence of the gradients",
            coherence["overall"],
            note=f"n = {shown.number(coherence.get('m'))} examples, no interval; 1: unrelated, 0: they cancel",
        )
    if (n := found.get("n_sample")) is not None and n < found.get("n", n):
        page.note(f"means, agreement and AUC are of {n:,} of {found['n']:,} examples, drawn by seed")


def _turned(page: Building, name: str) -> str:
    end = memorized(page, name)
    return f"{end} is memorized" if end else ""


def _draw_auc(page: Building, names: Sequence[str], found: Mapping[str, Any]) -> None:
    known = [(name, found["scores"].get(name, {}).get("auc") or {}) for name in names]
    known = sorted((pair for pair in known if pair[1].get("value") is not None), key=lambda pair: pair[1]["value"])
    if not known:
        return
    canvas = page_svg.new_figure(7.2, 0.8 + 0.24 * len(known))
    axis = canvas.subplots()
    for y, (_, auc) in enumerate(known):
        if auc.get("lo") is not None:
            axis.plot([auc["lo"], auc["hi"]], [y, y], color=page_svg.COLOURS[0], linewidth=2.2, solid_capstyle="butt")
        axis.plot(auc["value"], y, "o", color=page_svg.COLOURS[0], markersize=4.5)
    axis.axvline(0.5, color=page_svg.MUTED, linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(known)), [name for name, _ in known])
    axis.set(xlabel="AUC", ylim=(-0.7, len(known) - 0.3), xlim=(min(0.48, known[0][1].get("lo") or 1) - 0.02, 1.01))
    axis.grid(axis="x")
    (worst, least), (best, most) = known[0], known[-1]
    alt = (
        f"AUC of {len(known)} scores, {marked(page)} examples against the others: highest {best}, "
        f"{shown.with_interval(most['value'], most.get('lo'), most.get('hi'))}; lowest {worst}, "
        f"{shown.with_interval(least['value'], least.get('lo'), least.get('hi'))}."
    )
    drawn = " with 95 % DeLong interval" if any(auc.get("lo") is not None for _, auc in known) else ""
    page.plot(canvas, alt, f"How well each score finds examples marked {marked(page)}: AUC{drawn}, dashed: chance.")


def _draw_agreement(page: Building, names: Sequence[str], found: Mapping[str, Any]) -> None:
    pairs = [p for p in found["agreement"] if p.get("a") in names and p.get("b") in names]
    known = [pair for pair in pairs if pair.get("value") is not None]
    if not known:
        page.note("no two scores can be compared: agreement is undefined")
        return
    some = [name for name in names if any(name in (pair["a"], pair["b"]) for pair in known)]
    matrix = score_view.agreement_matrix(some, [pair for pair in known if {pair["a"], pair["b"]} <= set(some)])
    size = min(6.0, 1.9 + 0.36 * len(some))
    canvas = page_svg.new_figure(7.2, size)
    axis = canvas.subplots()
    image = score_view.draw_agreement(axis, some, matrix)
    axis.tick_params(labelsize=8 if len(some) <= 16 else 7, length=0)
    axis.spines[:].set_visible(False)
    for i in range(len(some)):
        for j in range(len(some)):
            if i != j and np.isfinite(matrix[i, j]) and (len(some) <= ALL_CELLS or j < i):
                colour = page_svg.on(image.cmap(image.norm(matrix[i, j])))
                text = f"{matrix[i, j]:.2f}".replace("0.", ".").replace("-", "−")
                axis.text(j, i, text, ha="center", va="center", fontsize=7 if len(some) <= 16 else 5.5, color=colour)
    canvas.colorbar(image, ax=axis, shrink=0.7, label="Spearman's ρ")
    high, low = max(known, key=lambda p: p["value"]), min(known, key=lambda p: p["value"])
    alt = (
        f"Matrix of rank correlations of {len(some)} scores. Highest: {high['a']} and {high['b']}, "
        f"{shown.with_interval(high['value'], high.get('lo'), high.get('hi'))}; lowest: {low['a']} and {low['b']}, "
        f"{shown.with_interval(low['value'], low.get('lo'), low.get('hi'))}."
    )
    page.plot(canvas, alt, "Agreement: Spearman's ρ of the scores, turned so that high is more memorized.", dense=True)
    if left := [name for name in names if name not in some]:
        page.note(f"without agreement, since they are the same or null everywhere: {shown.listed(left)}")


def _table(page: Building, names: Sequence[str], found: Mapping[str, Any]) -> None:
    truth = found.get("truth")
    header = ["score", "memorized", "mean", "95 % interval"]
    header += ["AUC", "95 % interval", f"in top {truth.get('n_true')}", "95 % interval"] if truth else []
    cells = []
    for name in names:
        of = found["scores"].get(name) or {}
        line: list[object] = [name, memorized(page, name) or None]
        for key in ("mean", "auc", "found_in_top") if truth else ("mean",):
            own = of.get(key) or {}
            lo, hi = own.get("lo"), own.get("hi")
            line += [shown.number(own.get("value"), shown.places_of(lo, hi)), shown.interval(lo, hi) or None]
        cells.append([*line, of.get("n_null", 0)])
    page.table("The scores", [*header, "null"], cells)


def _top(page: Building, names: Sequence[str], found: Mapping[str, Any]) -> None:
    """Who scores highest, by the scores that find the truth best, or else by the first ones."""
    of = found["scores"]
    some = [name for name in (*score_view.HEADLINES, *names) if name in names and of.get(name, {}).get("top")]
    some = list(dict.fromkeys(some))
    if found.get("truth"):
        some.sort(key=lambda name: -((of[name].get("auc") or {}).get("value") or 0))
    some = some[: score_view.MOST_TOP]
    ids = sorted({str(example["example_id"]) for name in some for example in of[name]["top"]})
    if not ids:
        return
    wanted = ", ".join(f"CAST({quoted(name)} AS DOUBLE)" for name in some)
    marks = ", ".join("?" * len(ids))
    values = {
        row[0]: dict(zip(some, row[1:]))
        for row in page.sql(f"SELECT example_id, {wanted} FROM report WHERE example_id IN ({marks})", ids)
    }
    for name in some:
        top = of[name]["top"]
        extra = [key for key in ("label", "truth", "text") if any(example.get(key) is not None for example in top)]
        others = [other for other in some if other != name]
        header = ["example", name, *others, *(marked(page) if key == "truth" else key for key in extra)]
        cells: list[list[object]] = []
        for example in top:
            own = values.get(str(example["example_id"]), {})
            cells.append(
                [
                    str(example["example_id"]),
                    own.get(name),
                    *(own.get(o) for o in others),
                    *(_of(example, k) for k in extra),
                ]
            )
        end = memorized(page, name)
        page.table(f"Most memorized by {name}" + (f" ({end} is memorized)" if end else ""), header, cells)


def _of(example: Mapping[str, Any], key: str) -> object:
    value = example.get(key)
    return str(value) if key == "label" and value is not None else value
