"""Reports of `memdiag entropy`: MBE by layer and step, and the alignment of its gradient with cross-entropy's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from memdiag import entropy_view, page_svg
from memdiag.page_sections import shown
from memdiag.page_sections.building import Building, Row, floats, thinned

MOST_LAYERS = 12  # lines of a plot
MOST_UNITS = 6  # kinds of unit; the command knows four
MOST_STEPS = 80  # checkpoints of a plot
CONFIDENCE = 0.95
FIELDS = (
    "checkpoint", "step", "layer", "unit", "pooling", "patch_size", "alpha", "n_examples", "n_units", "n_tokens",
    "n_tokens_dropped", "truncated", "mbe", "mbe_lo", "mbe_hi", "mbe_max", "mbe_centred", "mbe_row_normalised",
    "effective_rank", "mean_cosine", "cross_entropy",
)  # fmt: skip


# -- entropy -------------------------------------------------------------------------------------------------------


def layers(page: Building) -> None:
    """For every unit: the most compressed layer, layer × step or the profile, and the last checkpoint as a table."""
    report = page.first(columns=FIELDS)
    missing = [name for name in FIELDS if name not in page.columns]
    if missing:
        page.note(f"the report lacks {shown.listed(missing)}")
    table = report.table
    for name in missing:
        table = table.append_column(name, [[None] * table.num_rows])
    groups = entropy_view.grouped(type(report)(table, report.meta, report.path))
    if len(groups) > MOST_UNITS:
        page.note(f"of {len(groups)} kinds of unit the first {MOST_UNITS} are shown")
    for (unit, pooling), checkpoints in list(groups.items())[:MOST_UNITS]:
        what = unit + (f", {pooling}" if pooling else "")
        rows = list(checkpoints.values())
        with page.part(f"figures of the unit {what}"):
            _headlines(page, what, rows)
        with page.part(f"plots of the unit {what}"):
            _draw(page, unit, pooling, rows)
        with page.part(f"the table of the unit {what}"):
            _table(page, what, rows[-1])
    with page.part("cross-entropy"):
        _cross_entropy(page, [rows[0] for rows in next(iter(groups.values())).values()])


def _headlines(page: Building, what: str, rows: Sequence[Sequence[Row]]) -> None:
    last = [row for row in rows[-1] if row["mbe"] is not None]
    if not last:
        page.note(f"{what}: no layer of {rows[-1][0]['checkpoint']} has an MBE")
        return
    lowest = min(last, key=lambda row: row["mbe"])
    others = [
        str(row["layer"])
        for row in last
        if row is not lowest and None not in (row["mbe_lo"], lowest["mbe_hi"]) and row["mbe_lo"] <= lowest["mbe_hi"]
    ]
    close = f"; the intervals of {_layers(others)} reach it" if others else ""
    about = f"layer {lowest['layer']} of {lowest['checkpoint']}, n = {shown.number(lowest['n_examples'])} examples"
    page.figure(
        f"Most compressed layer, MBE ({what})",
        lowest["mbe"],
        lowest["mbe_lo"],
        lowest["mbe_hi"],
        f"{about}{close}",
        unit="nats",
    )
    end = last[-1]
    if end is not lowest:
        page.figure(
            f"Last layer, MBE ({what})",
            end["mbe"],
            end["mbe_lo"],
            end["mbe_hi"],
            f"layer {end['layer']}{_of_most(end)}",
            unit="nats",
        )


def _layers(names: list[str]) -> str:
    return f"layer {names[0]}" if len(names) == 1 else f"layers {shown.listed(names)}"


def _of_most(row: Row) -> str:
    return f", {shown.share(row['mbe'], row['mbe_max'])} of the most it can be" if row["mbe_max"] else ""


def _draw(page: Building, unit: str, pooling: str | None, rows: list[list[Row]]) -> None:
    title = entropy_view.title_of(unit, pooling, rows[0])
    if not np.isfinite(floats([row for of in rows for row in of], "mbe")).any():
        return
    if len(rows) == 1:
        _draw_one(page, title, rows[0])
        return
    widths = {len(of) for of in rows}
    if len(widths) > 1:
        page.note("the checkpoints have different numbers of layers: those that all have are drawn")
        rows = [of[: min(widths)] for of in rows]
    if len(rows) > MOST_STEPS:
        page.note(f"of {len(rows)} checkpoints {MOST_STEPS}, evenly spaced, are drawn")
        rows = [rows[i] for i in thinned(len(rows), MOST_STEPS)]
    canvas = page_svg.new_figure(7.2, min(6.5, 1.4 + 0.32 * len(rows[0])))
    entropy_view.draw_map(canvas, canvas.subplots(), rows)
    values = floats([row for of in rows for row in of], "mbe")
    flat = [row for of in rows for row in of]
    low, high = flat[int(np.nanargmin(values))], flat[int(np.nanargmax(values))]
    alt = (
        f"Heat map of {len(rows[0])} layers by {len(rows)} checkpoints. MBE is lowest, {low['mbe']:.2f} nats, in layer "
        f"{low['layer']} at {_at(low)}, and highest, {high['mbe']:.2f}, in layer {high['layer']} at {_at(high)}."
    )
    page.plot(canvas, alt, f"{title}: layer × step, nats.", dense=True)
    _draw_trend(page, title, rows)


def _draw_trend(page: Building, title: str, rows: list[list[Row]]) -> None:
    """MBE of every layer over the run, and below it the cross-entropy."""
    few = [[of[i] for i in thinned(len(of), MOST_LAYERS)] for of in rows]
    loss = floats([of[0] for of in rows], "cross_entropy")
    is_known = bool(np.isfinite(loss).any())
    canvas = page_svg.new_figure(7.2, 4.6 if is_known else 3.2)
    axes = canvas.subplots(2 if is_known else 1, 1, squeeze=False, sharex=True, height_ratios=[2, 1][: 1 + is_known])
    entropy_view.draw_lines(axes[0][0], few, _colours(len(few[0])))
    axes[0][0].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    if is_known:
        axes[0][0].set_xlabel("")
        axes[1][0].plot(range(len(rows)), loss, "o-", color=page_svg.INK, linewidth=1.2)
        axes[1][0].set_ylabel("cross-entropy\n(nats)")
        entropy_view.label_steps(axes[1][0], rows)
    first, last = rows[0][-1], rows[-1][-1]
    alt = (
        f"Lines of MBE over {len(rows)} checkpoints. The last layer goes from {shown.number(first['mbe'])} at "
        f"{_at(first)} "
        f"to {shown.number(last['mbe'])} nats at {_at(last)}"
    )
    alt += (
        f"; cross-entropy from {shown.number(float(loss[0]))} to {shown.number(float(loss[-1]))}." if is_known else "."
    )
    more = f"; {MOST_LAYERS} of {len(rows[0])} layers" if len(rows[0]) > MOST_LAYERS else ""
    page.plot(canvas, alt, f"{title} over the run, bands are 95 % intervals{more}; checkpoints evenly spaced.")


def _draw_one(page: Building, title: str, rows: list[Row]) -> None:
    canvas = page_svg.new_figure(7.2, 3.2)
    entropy_view.draw_profile(canvas.subplots(), rows)
    known = [row for row in rows if row["mbe"] is not None]
    low, high = min(known, key=lambda row: row["mbe"]), max(known, key=lambda row: row["mbe"])
    alt = (
        f"Profile of MBE over {len(rows)} layers: lowest in layer {low['layer']}, {low['mbe']:.2f} nats, highest "
        "in layer "
        f"{high['layer']}, {high['mbe']:.2f}."
    )
    page.plot(canvas, alt, f"{title} of {rows[0]['checkpoint']} by layer, nats; the band is the 95 % interval.")


def _colours(n: int) -> list[Any]:
    """Of n layers: series that are told apart, or a scale where there are too many for that."""
    from matplotlib import colormaps

    if n <= len(page_svg.COLOURS):
        return list(page_svg.COLOURS[:n])
    return [colormaps["viridis"](0.25 + 0.55 * i / (n - 1)) for i in range(n)]


def _at(row: Row) -> str:
    return str(row["checkpoint"]) if row["step"] is None else f"step {row['step']:,}"


def _table(page: Building, what: str, rows: list[Row]) -> None:
    header = ("layer", "MBE (nats)", "95 % interval", "share of most", "centred", "effective rank", "mean cosine")
    cells = [
        [
            row["layer"],
            shown.number(row["mbe"], 3),
            shown.interval(row["mbe_lo"], row["mbe_hi"]) or shown.NOTHING,
            shown.share(row["mbe"], row["mbe_max"]) if row["mbe"] is not None and row["mbe_max"] else None,
            shown.number(row["mbe_centred"], 3),
            shown.number(row["effective_rank"]),
            shown.number(row["mean_cosine"], 3),
        ]
        for row in rows
    ]
    page.table(f"{rows[0]['checkpoint']}, unit {what}, layer by layer", header, cells)
    first = rows[0]
    if first["truncated"]:
        page.note(f"{first['truncated']:,} of {first['n_examples']:,} examples were cut at --max-length")


def _cross_entropy(page: Building, rows: list[Row]) -> None:
    last = rows[-1]
    start = f"from {shown.number(rows[0]['cross_entropy'])} at {_at(rows[0])}" if len(rows) > 1 else ""
    page.figure("Cross-entropy", last["cross_entropy"], note="; ".join(t for t in (_at(last), start) if t), unit="nats")


# -- gradients -----------------------------------------------------------------------------------------------------


def gradients(page: Building) -> None:
    """Cosine of the cross-entropy's gradient and MBE's, by layer and step, on the same batch."""
    names = ("kind", "checkpoint", "step", "layer", "matrix", "objective_pair", "batches", "cosine", "cosine_se",
             "n_pairs", "n_points", "std", "std_null_lo", "std_null_hi")  # fmt: skip
    found = [row for row in page.records(200_000, names) if row["matrix"] is None and row["objective_pair"] == "ce_mbe"]
    same = [row for row in found if row["batches"] == "same"]
    cosines = [row for row in same if row["kind"] == "cosine"]
    for row in cosines:
        row["lo"], row["hi"] = t_ends(row["cosine"], row["cosine_se"], row["n_pairs"])
    by_step: dict[str, dict[int | None, Row]] = {}
    for row in cosines:
        by_step.setdefault(row["checkpoint"], {})[row["layer"]] = row
    if not by_step:
        page.note("the report has no cosine of cross-entropy and MBE on the same batch")
        return
    with page.part("figures of the last checkpoint"):
        _cosine_headlines(page, next(reversed(by_step.values())))
    with page.part("cosines by layer and step"):
        _draw_cosines(page, by_step)
    with page.part("the table of cosines"):
        _cosine_table(page, next(reversed(by_step.values())), [row for row in same if row["kind"] == "oscillation"])


def t_ends(mean: float | None, error: float | None, n: int | None) -> tuple[float | None, float | None]:
    """mean ± t se with n - 1 degrees of freedom, the 95 % interval of a mean over n pairs of batches."""
    from scipy import special

    if mean is None or error is None or n is None or n < 2:
        return None, None
    half = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    return mean - half, mean + half


def _cosine_headlines(page: Building, last: dict[int | None, Row]) -> None:
    whole, blocks = last.get(None), [row for layer, row in last.items() if layer is not None]
    for label, row in (
        ("Cosine of the gradients, whole model", whole),
        (
            "Most aligned layer",
            max((r for r in blocks if r["cosine"] is not None), key=lambda r: r["cosine"], default=None),
        ),
        (
            "Least aligned layer",
            min((r for r in blocks if r["cosine"] is not None), key=lambda r: r["cosine"], default=None),
        ),
    ):
        if row is not None:
            layer = "" if row["layer"] is None else f"layer {row['layer']}, "
            about = f"{layer}{_at(row)}, n = {shown.number(row['n_pairs'])} batches"
            about += f"; chosen of {len(blocks)} layers after the fact" if row["layer"] is not None else ""
            page.figure(label, row["cosine"], row["lo"], row["hi"], about)


def _draw_cosines(page: Building, by_step: dict[str, dict[int | None, Row]]) -> None:
    steps = [list(by_step.values())[i] for i in thinned(len(by_step), MOST_STEPS)]
    last = steps[-1]
    numbers = sorted(layer for layer in last if layer is not None)
    blocks = [last[layer] for layer in numbers]
    if blocks:
        canvas = page_svg.new_figure(7.2, 3.0)
        axis = canvas.subplots()
        values, lo, hi = (floats(blocks, name) for name in ("cosine", "lo", "hi"))
        axis.axhline(0, color=page_svg.MUTED, linewidth=0.8)
        axis.vlines(numbers, lo, hi, color=page_svg.COLOURS[0], linewidth=2)
        axis.plot(numbers, values, "o", color=page_svg.COLOURS[0], markersize=5)
        axis.set(xlabel="layer", ylabel="cosine")
        axis.locator_params(axis="x", integer=True)
        known = [row for row in blocks if row["lo"] is not None]
        above, below = sum(row["lo"] > 0 for row in known), sum(row["hi"] < 0 for row in known)
        alt = (
            f"Cosine of the two gradients by layer at {_at(blocks[0])}, from "
            f"{shown.number(float(np.nanmin(values)))} to "
            f"{shown.number(float(np.nanmax(values)))}; of {len(known)} intervals {above} lie above 0 and "
            f"{below} below."
        )
        page.plot(canvas, alt, "Cosine of the gradients of cross-entropy and MBE, 95 % t intervals over batches.")
    if len(steps) > 1 and numbers:
        _draw_cosine_map(page, steps, numbers)


def _draw_cosine_map(page: Building, steps: list[dict[int | None, Row]], numbers: list[int]) -> None:
    cells = [[of.get(layer, {"cosine": None}) for of in steps] for layer in numbers]
    values = np.array([floats(line, "cosine") for line in cells])
    most = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else math.nan
    if math.isnan(most):
        return
    canvas = page_svg.new_figure(7.2, min(6.5, 1.4 + 0.32 * len(numbers)))
    axis = canvas.subplots()
    image = axis.imshow(values, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-(most or 1), vmax=most or 1)
    every = max(1, math.ceil(len(numbers) / 24))
    axis.set_yticks(range(0, len(numbers), every), [str(layer) for layer in numbers[::every]])
    axis.set_ylabel("layer")
    canvas.colorbar(image, ax=axis, label="cosine", fraction=0.05)
    entropy_view.label_steps(axis, [[next(iter(of.values()))] for of in steps])
    alt = (
        f"Heat map of the cosine, {len(numbers)} layers by {len(steps)} checkpoints, from "
        f"{shown.number(float(np.nanmin(values)))} to {shown.number(float(np.nanmax(values)))}."
    )
    page.plot(canvas, alt, "Cosine by layer × step; above 0 a cross-entropy step compresses that layer.", dense=True)


def _cosine_table(page: Building, last: dict[int | None, Row], oscillation: list[Row]) -> None:
    swing = {row["layer"]: row for row in oscillation}
    header = ("layer", "cosine", "95 % interval", "batches", "std over the run", "std of noise alone, 5 to 95 %")
    cells: list[list[object]] = []
    for layer in sorted(last, key=lambda layer: (layer is None, layer or 0)):
        row, own = last[layer], swing.get(layer, {})
        noise = (own.get("std_null_lo"), own.get("std_null_hi"))
        cells.append(
            [
                "whole model" if layer is None else str(layer),
                shown.number(row["cosine"], 3),
                shown.interval(row["lo"], row["hi"]) or shown.NOTHING,
                row["n_pairs"],
                shown.number(own.get("std"), 3),
                shown.interval(*noise) or shown.NOTHING,
            ]
        )
    page.table(f"Cosine of the gradients at {_at(next(iter(last.values())))}", header, cells)
