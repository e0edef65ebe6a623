"""Reports of `memdiag reproduce`: claims beside the paper's figures, effects beside their controls, phases, runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from memdiag import page_svg, reproduce_gapt_view, reproduce_view, tables
from memdiag.errors import InputError
from memdiag.page_sections import shown
from memdiag.page_sections.building import Building, Row
from memdiag.page_sections.panels import Strip, strips

MOST_STRIPS = 24
MOST_PANELS = 9


def _verdicts(page: Building, rows: Sequence[Row], names: Sequence[str], what: str) -> None:
    """How many came to each verdict."""
    for verdict in names:
        some = [str(row["name"]) for row in rows if row["verdict"] == verdict]
        told = shown.listed(some) if verdict != names[0] else ""
        page.figure(f"{what.capitalize()}: {shown.words(verdict)}", len(some), note=told)
    seeds = max((row["n_seeds"] for row in rows if row["n_seeds"] is not None), default=None)
    page.figure(
        "Seeds", seeds, note="intervals are 95 % t intervals over seeds" if (seeds or 0) > 2 else "no intervals"
    )


def claims(page: Building) -> None:
    """Every claim: the paper's figure, ours with its interval, what counts as holding, the control, the verdict."""
    names = ("name", "statement", "measure", "paper", "paper_note", "ours", "ours_lo", "ours_hi", "n_seeds", "control",
             "control_value", "low", "high", "band_from", "verdict")  # fmt: skip
    rows = page.records(columns=names)
    with page.part("headline figures"):
        _verdicts(page, rows, ("holds", "differs", "not_comparable"), "claims")
    with page.part("the claims side by side"):
        known = [row for row in rows if row["ours"] is not None]
        if len(known) > MOST_STRIPS:
            page.note(f"of {len(known)} claims the first {MOST_STRIPS} are drawn")
        found = [
            Strip(row["name"], row["ours"], row["ours_lo"], row["ours_hi"], row["low"], row["high"], row["paper"],
                  row["control_value"], None if row["verdict"] == "not_comparable" else row["verdict"] == "holds")
            for row in known[:MOST_STRIPS]
        ]  # fmt: skip
        if found:
            held = sum(strip.good is True for strip in found)
            alt = f"{len(found)} claims, each on its own scale: {held} lie in the band that counts as holding"
            away = [strip.label for strip in found if strip.good is False]
            alt += f"; outside: {shown.listed(away)}." if away else "."
            page.plot(strips(found), alt, _drawn(found))
    with page.part("the table of claims"):
        header = ("claim", "statement", "paper", "ours", "95 % interval", "holds if", "control", "verdict")
        cells = [
            [
                row["name"],
                row["statement"],
                shown.number(row["paper"]),
                shown.number(row["ours"], shown.places_of(row["ours_lo"], row["ours_hi"])),
                shown.interval(row["ours_lo"], row["ours_hi"]) or None,
                reproduce_view.band(row),
                shown.number(row["control_value"]) if row["control"] else None,
                shown.words(str(row["verdict"])),
            ]
            for row in rows
        ]
        page.table("Claim by claim", header, cells)


def _drawn(found: Sequence[Strip]) -> str:
    """What the strips show, and nothing that none of them has."""
    ours = "Ours with its 95 % interval (dot, bar)" if any(s.lo is not None for s in found) else "Ours (dot)"
    parts = [ours]
    parts += ["what counts as holding (shaded)"] * any(s.low is not None or s.high is not None for s in found)
    parts += ["the paper's figure (dotted)"] * any(s.paper is not None for s in found)
    parts += ["the control (×)"] * any(s.control is not None for s in found)
    few = "" if any(s.lo is not None for s in found) else "; fewer than 3 seeds have no interval"
    return f"{', '.join(parts)}; every line has its own scale{few}."


def phases(page: Building) -> None:
    """The phase map if there is one, and how the networks ended."""
    rows = page.records()
    cells = [row for row in rows if row.get("in_map")]
    with page.part("headline figures"):
        page.figure("Networks", page.count())
        count = {name: sum(row["phase"] == name for row in rows) for name in reproduce_view.PHASES}
        for name, n in count.items():
            page.figure(shown.words(name).capitalize(), n or None, note=f"of {len(rows):,} networks")
    if cells:
        with page.part("the phase map"):
            _draw_map(page, cells)
    with page.part("the table of networks"):
        names = ("network", "seed", "train_fraction", "corruption", "weight_decay", "train_corrupted_acc", "test_acc",
                 "mean_ipr", "phase")  # fmt: skip
        header = [shown.words(name) for name in names]
        page.table(
            "The networks",
            header,
            [[*(row.get(n) for n in names[:-1]), shown.words(str(row.get("phase")))] for row in rows],
        )


def _draw_map(page: Building, cells: Sequence[Row]) -> None:
    by_decay = reproduce_view.panels(cells)
    canvas = page_svg.new_figure(7.2, 3.2)
    axes = canvas.subplots(1, len(by_decay), squeeze=False)[0]
    for axis, (decay, by_xi) in zip(axes, by_decay.items()):
        reproduce_view.draw_panel(axis, by_xi)
        axis.set_title(f"weight decay {decay:g}")
    axes[0].set_ylabel("ξ, share of labels corrupted")
    found = sorted({row["phase"] for row in cells}, key=list(reproduce_view.PHASES).index)
    reproduce_view.draw_legend(canvas, found)
    told = ", ".join(f"{sum(row['phase'] == phase for row in cells)} {shown.words(phase)}" for phase in found)
    alt = (
        f"Map of {len(cells)} networks by share trained on and share corrupted, for {len(by_decay)} weight decays: "
        f"{told}."
    )
    page.plot(
        canvas,
        alt,
        "The phase that each network ends in; the number is its agreement with corrupted labels.",
        dense=True,
    )


def effects(page: Building) -> None:
    """Every effect: what each arm gave, the paired change, and what is left beyond the controls."""
    names = ("name", "statement", "measure", "arm", "role", "paper", "paper_note", "ours", "ours_lo", "ours_hi",
             "paper_change", "change", "change_lo", "change_hi", "is_relative", "beyond", "beyond_lo", "beyond_hi",
             "n_seeds", "n_higher", "verdict")  # fmt: skip
    rows = page.records(columns=names)
    treated = [row for row in rows if row["role"] == "treated"]
    with page.part("headline figures"):
        _verdicts(page, treated, ("agrees", "disagrees", "inconclusive"), "effects")
        for row in treated[:6]:
            scale = 100.0 if row["is_relative"] else 1.0
            change, lo, hi = (None if row[n] is None else scale * row[n] for n in ("change", "change_lo", "change_hi"))
            paper = row["paper_change"]
            told = (
                f"; the paper's: {reproduce_gapt_view.signed(paper, bool(row['is_relative']))}"
                if paper is not None
                else ""
            )
            page.figure(
                f"Change, {row['name']}",
                change,
                lo,
                hi,
                f"n = {row['n_seeds']} seeds, paired{told}; {row['verdict']}",
                unit="%" if row["is_relative"] else "",
            )
    with page.part("runs and means of each arm"):
        _draw_effects(page, rows)
    with page.part("the table of effects"):
        header = ("effect", "arm", "paper", "ours", "95 % interval", "change", "paper's change", "higher in",
                  "method beyond it", "verdict")  # fmt: skip
        page.table("Effect by effect; changes are paired by seed", header, [_effect(row) for row in rows])
    for row in rows:
        if str(row["paper_note"] or "").startswith(reproduce_gapt_view.OTHER_DATA):
            page.note(f"the paper's figure is {row['paper_note']}")


def _effect(row: Row) -> list[object]:
    return [
        row["name"],
        row["arm"],
        shown.number(row["paper"]),
        shown.number(row["ours"], shown.places_of(row["ours_lo"], row["ours_hi"])),
        shown.interval(row["ours_lo"], row["ours_hi"]) or None,
        reproduce_gapt_view.interval(row, "change"),
        reproduce_gapt_view.signed(row["paper_change"], bool(row["is_relative"])),
        None if row["n_higher"] is None else f"{row['n_higher']} of {row['n_seeds']}",
        reproduce_gapt_view.interval(row, "beyond"),
        row["verdict"],
    ]


def _draw_effects(page: Building, rows: Sequence[Row]) -> None:
    found = [(str(name), list(group)) for name, group in itertools.groupby(rows, lambda row: row["name"])]
    if len(found) > MOST_PANELS:
        page.note(f"of {len(found)} effects the first {MOST_PANELS} are drawn")
        found = found[:MOST_PANELS]
    runs: list[Row] = []
    try:
        beside = tables.read(page.beside("runs.parquet"))
        runs = beside.table.slice(0, 2000).to_pylist() if beside.meta.get("report") == "reproduce.runs" else []
    except InputError:
        page.note("runs.parquet is not beside the report: means are drawn without the runs that they are of")
    across = min(2, len(found))
    lines = -(-len(found) // across)
    canvas = page_svg.new_figure(7.2, 2.9 * lines)
    reproduce_gapt_view.draw_effects(list(canvas.subplots(lines, across, squeeze=False).flat), found, runs)
    told = "; ".join(
        f"{name}: "
        + ", ".join(f"{r['arm']} {shown.with_interval(r['ours'], r['ours_lo'], r['ours_hi'])}" for r in group)
        for name, group in found[:3]
    )
    drawn = [row for _, group in found for row in group]
    means = "mean and 95 % interval over seeds" if any(row["ours_lo"] is not None for row in drawn) else "mean"
    dots = f"Dots: runs; beside them {means}" if runs else means.capitalize()
    paper = "; dotted: the paper's figure" if any(row["paper"] is not None for row in drawn) else ""
    page.plot(canvas, f"{told}.", f"{dots}{paper}.")


def runs(page: Building) -> None:
    """Every measure on an axis of its own, a dot for each run."""
    from memdiag.reproduce_claims import mean_of, t_interval

    rows = page.records(columns=("arm", "seed", "measure", "value"))
    arms, measures = (list(dict.fromkeys(str(row[name]) for row in rows)) for name in ("arm", "measure"))
    page.figure(
        "Runs", len({(row["arm"], row["seed"]) for row in rows}), note=f"{len(arms)} arms: {shown.listed(arms)}"
    )
    page.figure("Measures", len(measures))
    cells: list[list[object]] = []
    by: dict[tuple[str, str], list[float | None]] = {}
    for row in rows:
        by.setdefault((row["measure"], row["arm"]), []).append(row["value"])
    for (measure, arm), values in by.items():
        lo, hi = t_interval(values)
        mean = mean_of(values)
        cells.append(
            [measure, arm, shown.number(mean, shown.places_of(lo, hi)), shown.interval(lo, hi) or None, len(values)]
        )
    with page.part("the runs"):
        some = measures[:MOST_PANELS]
        if len(measures) > len(some):
            page.note(f"of {len(measures)} measures the first {len(some)} are drawn")
        across = min(3, len(some))
        lines = math.ceil(len(some) / across)
        canvas = page_svg.new_figure(7.2, 0.4 + 2.2 * lines)
        axes = canvas.subplots(lines, across, squeeze=False).ravel()
        for axis in axes[len(some) :]:
            axis.set_axis_off()
        for axis, measure in zip(axes, some):
            for x, arm in enumerate(arms):
                known = [value for value in by.get((measure, arm), []) if value is not None][:200]
                axis.plot([x] * len(known), known, "o", color=f"C{x % 8}", alpha=0.5, markersize=4)
            axis.set_xticks(range(len(arms)), arms, rotation=40, ha="right", fontsize=7.5)
            axis.set_title(measure, fontsize=8.5)
            axis.tick_params(axis="y", labelsize=7.5)
            axis.margins(x=0.15)
        first = [cell for cell in cells if cell[0] == some[0]]
        told = ", ".join(f"{cell[1]} {cell[2]}" + (f" ({cell[3]})" if cell[3] else "") for cell in first)
        page.plot(
            canvas,
            f"Dots of every run for {len(some)} measures. {some[0]}: {told}.",
            "A dot for each run; every panel has its own scale.",
            dense=across > 2,
        )
    told = "Means over the runs" + (", 95 % t intervals" if any(cell[3] for cell in cells) else "")
    page.table(told, ("measure", "arm", "mean", "95 % interval", "runs"), cells)
