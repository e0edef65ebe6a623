"""Reports of `memdiag train-gapt`: cross-entropy and entropy with the phases, and the gate beside its controls."""

from __future__ import annotations

from typing import Any

import numpy as np

from memdiag import page_svg, train_gapt_view
from memdiag.gapt import COMPRESS
from memdiag.page_sections import shown
from memdiag.page_sections.building import Building, Row, thinned

MOST_UPDATES = 400  # points of a curve
MOST_LAYERS = 3  # that are not active, drawn for comparison
MOST_PHASES = 300


def history(page: Building) -> None:
    """Share of the updates that compress, what is held out, and the curves with the phases shaded."""
    with page.part("headline figures"):
        _headlines(page)
    with page.part("the curves"):
        _draw(page)
    with page.part("what was held out"):
        rows = page.sql("SELECT step, val_ce, val_mbe FROM report WHERE val_ce IS NOT NULL ORDER BY 1")
        some = [rows[i] for i in thinned(len(rows), 20)]
        header = ("update", "held-out cross-entropy (nats)", "held-out MBE (nats)")
        page.table(
            "Held out, after some updates", header, [[s, shown.number(c, 3), shown.number(m, 3)] for s, c, m in some]
        )
        if not rows:
            page.note("nothing was held out")


def _headlines(page: Building) -> None:
    n, last, compress, tokens, switches = page.one(
        "SELECT count(*), max(step), count(*) FILTER (WHERE phase = ?), max(tokens), count(switch_reason) FROM report",
        (COMPRESS,),
    )
    about = f"of {n:,} updates; {shown.counted(switches, 'switch', 'switches')}"
    page.figure("Share of updates that compress", shown.share(compress, n), note=about)
    found = page.sql("SELECT step, val_ce, val_mbe FROM report WHERE val_ce IS NOT NULL ORDER BY 1 DESC LIMIT 1")
    for step, ce, mbe in found:
        page.figure("Held-out cross-entropy", ce, note=f"update {step:,}, no interval: one run", unit="nats")
        page.figure("Held-out MBE, active layers", mbe, note=f"update {step:,}, no interval: one run", unit="nats")
    tail = max(1, n // 10)
    (ce,) = page.one("SELECT avg(ce) FROM report WHERE step > ?", (last - tail,))
    page.figure("Training cross-entropy", ce, note=f"mean of the last {tail:,} updates", unit="nats")
    page.figure("Updates", n, note=f"{shown.number(tokens)} tokens")


def _draw(page: Building) -> None:
    n = page.count()
    size = -(-n // MOST_UPDATES)  # updates that a point is the mean of
    (depth,) = page.one("SELECT max(len(mbe_layers)) FROM report") if "mbe_layers" in page.columns else (0,)
    active = [int(layer) for layer in (page.meta.get("settled") or {}).get("active_layers") or []]
    others = [layer for layer in range(depth or 0) if layer not in active]
    others = [others[i] for i in thinned(len(others), MOST_LAYERS)]
    wanted = "".join(f", avg(mbe_layers[{layer + 1}])" for layer in others)
    found = page.sql(
        f"SELECT avg(step), avg(ce), avg(mbe){wanted} FROM "
        f"(SELECT *, (row_number() OVER (ORDER BY step) - 1) // {size} AS part FROM report) GROUP BY part ORDER BY 1"
    )
    values = np.array([[np.nan if v is None else v for v in row] for row in found], dtype=float)
    layers = np.full((len(values), max(others, default=-1) + 1), np.nan)
    for i, layer in enumerate(others):
        layers[:, layer] = values[:, 3 + i]
    val = page.sql("SELECT step, val_ce FROM report WHERE val_ce IS NOT NULL ORDER BY 1")
    val = [val[i] for i in thinned(len(val), 100)]
    shaded = _shaded(page)
    canvas = page_svg.new_figure(7.2, 4.6)
    above, below = canvas.subplots(2, 1, sharex=True)
    train_gapt_view.draw_history(
        above, below, values[:, 0], values[:, 1], values[:, 2], layers, val, shaded, [*active, *_left_out(layers)]
    )
    told = "; ".join(
        f"{name} from {shown.number(float(values[0, i]))} to {shown.number(float(values[-1, i]))} nats"
        for i, name in ((1, "cross-entropy"), (2, "MBE of the active layers"))
    )
    alt = f"Over {n:,} updates {told}; {shown.counted(len(shaded), 'phase')} of compression."
    more = f"; a point is the mean of {size:,} updates" if size > 1 else ""
    page.plot(
        canvas, alt, f"Cross-entropy and entropy (nats) over the updates; shaded: the phases that compress{more}."
    )


def _left_out(layers: Any) -> list[int]:
    return [i for i in range(layers.shape[1]) if np.isnan(layers[:, i]).all()]


def _shaded(page: Building) -> list[tuple[int, int]]:
    """First and last update of each phase that compresses."""
    found = page.sql(
        "SELECT step, phase FROM (SELECT step, phase, lag(phase) OVER (ORDER BY step) AS before FROM report) "
        "WHERE phase IS DISTINCT FROM before ORDER BY 1"
    )
    (end,) = page.one("SELECT max(step) FROM report")
    starts = [*(step for step, _ in found), end + 1]
    phases = [(start, stop - 1) for (start, phase), stop in zip(found, starts[1:]) if phase == COMPRESS]
    if len(phases) > MOST_PHASES:
        page.note(f"of {len(phases):,} phases that compress the first {MOST_PHASES} are shaded")
    return phases[:MOST_PHASES]


# -- compare -------------------------------------------------------------------------------------------------------


def compare(page: Building) -> None:
    """The gated arm against every control, paired by seed, and every measure of every arm."""
    names = ("measure", "arm", "mean", "lo", "hi", "difference", "difference_lo", "difference_hi", "n_seeds", "n_lower",
             "share_compress", "weight")  # fmt: skip
    # a t interval of few seeds may reach below 0, where no entropy and no cross-entropy is
    told = page.records(columns=names)
    is_cut = any(row["lo"] is not None and row["lo"] < 0 for row in told)
    rows = [row | {"lo": None if row["lo"] is None else max(row["lo"], 0.0)} for row in told]
    cut = "; intervals that reach below 0 are cut at 0: no entropy is negative" if is_cut else ""
    with page.part("headline figures"):
        _differences(page, rows)
    with page.part("the arms side by side"):
        _draw_compare(page, rows, cut)
    with page.part("the table of arms"):
        header = ("measure", "arm", "mean (nats)", "95 % interval", "gated minus this", "95 % interval", "lower in",
                  "compress", "w")  # fmt: skip
        cells = [
            [
                train_gapt_view.MEASURES.get(row["measure"], row["measure"]),
                row["arm"],
                shown.number(row["mean"], shown.places_of(row["lo"], row["hi"])),
                shown.interval(row["lo"], row["hi"]) or None,
                shown.number(row["difference"], shown.places_of(row["difference_lo"], row["difference_hi"])),
                shown.interval(row["difference_lo"], row["difference_hi"]) or None,
                None if row["n_lower"] is None else f"{row['n_lower']} of {row['n_seeds']}",
                None if row["share_compress"] is None else f"{row['share_compress']:.0%}",
                row["weight"],
            ]
            for row in rows
        ]
        page.table(f"The arms, means over seeds; differences are paired by seed{cut}", header, cells)


def _differences(page: Building, rows: list[Row]) -> None:
    seeds = max((row["n_seeds"] for row in rows if row["n_seeds"] is not None), default=0)
    for row in rows:
        if row["measure"] in ("val_ce", "val_mbe") and row["difference"] is not None:
            gated = next(
                (r["arm"] for r in rows if r["measure"] == row["measure"] and r["difference"] is None), "gated"
            )
            page.figure(
                f"{train_gapt_view.MEASURES[row['measure']]}: {gated} minus {row['arm']}",
                row["difference"],
                row["difference_lo"],
                row["difference_hi"],
                f"n = {row['n_seeds']} seeds, paired; lower in {row['n_lower']} of {row['n_seeds']}",
                unit="nats",
            )
    page.figure("Seeds of each arm", seeds)
    if seeds < 3:
        page.note("fewer than 3 seeds have no interval")


def _draw_compare(page: Building, rows: list[Row], cut: str) -> None:
    measures = [
        name for name in train_gapt_view.MEASURES if any(r["measure"] == name and r["mean"] is not None for r in rows)
    ]
    if not measures:
        return
    canvas = page_svg.new_figure(7.2, 5.0)
    axes = canvas.subplots(2, 2).ravel()
    train_gapt_view.draw_compare(axes, rows)
    told = []
    for measure in measures[:2]:
        mine = [row for row in rows if row["measure"] == measure and row["mean"] is not None]
        each = ", ".join(f"{row['arm']} {shown.with_interval(row['mean'], row['lo'], row['hi'])}" for row in mine)
        told.append(f"{train_gapt_view.MEASURES[measure]}: {each}")
    bars = " and 95 % t interval" if any(row["lo"] is not None for row in rows) else ""
    page.plot(canvas, f"{'; '.join(told)}.", f"Every measure of every arm (nats): mean{bars} over seeds{cut}.")
