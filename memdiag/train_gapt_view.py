"""What a GAPT run did, for people: a summary, a table, and cross-entropy and entropy over the updates. No torch."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memdiag.drawing import number, savefig, sparkline
from memdiag.gapt import COMPRESS
from memdiag.tables import Report
from memdiag.train_gapt_report import TrainedGapt

if TYPE_CHECKING:
    from rich.console import Console

POINTS = 48  # characters of a curve, so that a line fits into 80
SHADE = "#d9a441"
STYLE: dict[Any, Any] = {  # of a plot in a file
    "axes.prop_cycle": "cycler(color=['#1f4e79', '#b03a2e', '#111111'])",
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


def summary_of(history: Report, val_layers: Mapping[int, Sequence[float | None] | None]) -> dict[str, Any]:
    """The headline figures of a run; `val_layers` has the held-out entropy of every layer at every save."""
    table, meta = history.table, history.meta
    phases, reasons = table["phase"].to_pylist(), table["switch_reason"].to_pylist()
    ce, mbe = table["ce"].to_pylist(), table["mbe"].to_pylist()
    tail = max(1, len(ce) // 10)
    known = [value for value in mbe[-tail:] if value is not None]
    saves = [
        {"step": step, "val_ce": val_ce, "val_mbe": val_mbe, "val_mbe_layers": val_layers.get(step)}
        for step, val_ce, val_mbe in zip(*(table[name].to_pylist() for name in ("step", "val_ce", "val_mbe")))
        if step in val_layers
    ]
    ratios = [value for value in table["gradient_ratio"].to_pylist() if value is not None]
    return {
        "gate": meta["options"]["gate"],
        "weight": meta["options"]["weight"],
        "seed": meta["options"]["seed"],
        "updates": len(ce),
        "tokens": table["tokens"][-1].as_py(),
        "active_layers": meta["settled"]["active_layers"],
        "skipped": mbe.count(None),
        "share_compress": phases.count(COMPRESS) / len(phases),
        "switches": {reason: reasons.count(reason) for reason in sorted({r for r in reasons if r is not None})},
        "train_ce": sum(ce[-tail:]) / tail,
        "train_mbe": sum(known) / len(known) if known else None,
        "gradient_ratio": sorted(ratios)[len(ratios) // 2] if ratios else None,
        "saves": saves,
    }


def summary(found: TrainedGapt) -> dict[str, Any]:
    """What --json prints: paths and the summary, or the comparison."""
    if found.compare is not None:
        return {"directory": str(found.path), "report": str(found.compare.path), **found.summary}
    assert found.history is not None
    return {"directory": str(found.path), "report": str(found.history.path), **found.summary}


def print_table(found: TrainedGapt) -> None:
    """How the run went, or how the arms compare."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, emoji=False, highlight=False)
    if found.compare is not None:
        _print_compare(console, found)
    else:
        _print_run(console, found)
    console.print("[dim]directory:[/] ", end="")
    console.print(str(found.path), markup=False, soft_wrap=True)


# -- one run -------------------------------------------------------------------------------------------------------


def _print_run(console: Console, found: TrainedGapt) -> None:
    assert found.history is not None
    about, table = found.summary, found.history.table
    active = about["active_layers"]
    console.print(
        f"[bold]gate {about['gate']}[/]  w {about['weight']:g} on layers {_ranges(active)}  "
        f"{about['updates']} updates, {about['tokens']:,} tokens"
    )
    ce, mbe = (table[name].to_pylist() for name in ("ce", "mbe"))
    compress = [phase == COMPRESS for phase in table["phase"].to_pylist()]
    console.print(f"  CE     {number(ce[0])}  {sparkline(_thinned(ce))}  {number(ce[-1])}")
    console.print(f"  MBE    {number(mbe[0])}  {sparkline(_thinned(mbe))}  {number(mbe[-1])}")
    marks = "".join("█" if share and share >= 0.5 else "▁" for share in _thinned([float(c) for c in compress]))
    console.print(f"  phase         {marks}  {about['share_compress']:.0%} compress")
    console.print(f"[dim]switches:[/] {_switches(about['switches'])}")
    if about["skipped"]:
        console.print(f"[dim]updates without a whole patch, which the gate skipped:[/] {about['skipped']}")
    if about["gradient_ratio"] is not None:
        console.print(f"[dim]median of |w g_MBE| / |g_CE| while compressing:[/] {about['gradient_ratio']:.3g}")
    _print_saves(console, about["saves"])


def _print_saves(console: Console, saves: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    if not saves or saves[-1]["val_ce"] is None:
        console.print("[dim]nothing was held out[/]")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("checkpoint", "val CE", "val MBE"):
        table.add_column(heading, justify="right")
    table.add_column("val MBE by layer, 0 to L", no_wrap=True)
    for save in saves:
        layers = save["val_mbe_layers"] or []
        shown = " ".join(number(value, 2) for value in layers) if len(layers) <= 13 else sparkline(list(layers))
        table.add_row(str(save["step"]), number(save["val_ce"]), number(save["val_mbe"]), shown)
    console.print(table)


def _thinned(values: Sequence[float | None]) -> list[float | None]:
    """At most POINTS means of consecutive values."""
    cuts = np.linspace(0, len(values), min(POINTS, len(values)) + 1).astype(int)
    means: list[float | None] = []
    for start, stop in itertools.pairwise(cuts.tolist()):
        known = [value for value in values[start:stop] if value is not None]
        means.append(sum(known) / len(known) if known else None)
    return means


def _switches(switches: Mapping[str, int]) -> str:
    return ", ".join(f"{n} by {reason.replace('_', ' ')}" for reason, n in switches.items()) or "none"


def _ranges(layers: Sequence[int]) -> str:
    """[2, 3, 4, 7] as 2-4,7."""
    shown = []
    for _, group in itertools.groupby(enumerate(layers), lambda pair: pair[1] - pair[0]):
        run = [layer for _, layer in group]
        shown.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(shown)


def plot(found: TrainedGapt, path: Path) -> None:
    """Draw the run, or the comparison."""
    if found.compare is not None:
        plot_compare(found.compare, path)
    else:
        plot_history(found.report, path)


def plot_history(history: Report, path: Path) -> None:
    """Cross-entropy and entropy over the updates, the phases that compress shaded."""
    import matplotlib
    from matplotlib.figure import Figure

    table, options = history.table, history.meta["options"]
    steps = np.array(table["step"].to_pylist())
    ce, mbe = (np.array(table[name].to_pylist(), dtype=float) for name in ("ce", "mbe"))
    layers = np.array(table["mbe_layers"].to_pylist(), dtype=float)  # (steps, layers)
    val = [(s, v) for s, v in zip(steps.tolist(), table["val_ce"].to_pylist()) if v is not None]
    shaded = [(int(steps[a]), int(steps[b])) for a, b in _stretches(table["phase"].to_pylist())]
    canvas = Figure(figsize=(9, 5), layout="constrained", dpi=150)
    with matplotlib.rc_context(STYLE):
        above, below = canvas.subplots(2, 1, sharex=True)
        draw_history(above, below, steps, ce, mbe, layers, val, shaded, history.meta["settled"]["active_layers"])
        above.set_title(f"gate {options['gate']}, w {options['weight']:g}, seed {options['seed']}")
        savefig(canvas, path)


def draw_history(
    above: Any,
    below: Any,
    steps: NDArray[Any],
    ce: NDArray[np.float64],
    mbe: NDArray[np.float64],
    layers: NDArray[np.float64],
    val: Sequence[tuple[int, float]],
    shaded: Sequence[tuple[int, int]],
    active: Sequence[int],
) -> None:
    """Cross-entropy and entropy over the updates, the phases that compress shaded.

    Args:
        above, below: to draw on.
        steps, ce, mbe: (u,) of updates.
        layers: (u, L + 1) entropy of every layer.
        val: (update, held-out cross-entropy).
        shaded: first and last update of every phase that compresses.
        active: the layers that mbe is the mean of.
    """
    above.plot(steps, ce, color="C0", linewidth=0.8, label="training")
    if val:
        above.plot(*zip(*val), "o", color="C2", markersize=4, label="held out")
    above.set_ylabel("cross-entropy (nats)")
    for layer in range(layers.shape[1]):
        if layer not in active:
            below.plot(
                steps,
                layers[:, layer],
                color="#9aa0a6",
                linewidth=0.6,
                label="each other layer" if layer == 0 else None,
            )
    below.plot(steps, mbe, color="C1", linewidth=1.0, label="active layers, mean")
    below.set(ylabel="entropy of patches (nats)", xlabel="update", ylim=(0, None))
    for axis in (above, below):
        for start, stop in shaded:
            axis.axvspan(start - 0.5, stop + 0.5, color=SHADE, alpha=0.3, linewidth=0, zorder=0)
        axis.margins(x=0.01)
    if shaded:
        above.fill_between([], [], color=SHADE, alpha=0.3, label="compress")
    for axis in (above, below):
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _stretches(phases: Sequence[str]) -> list[tuple[int, int]]:
    """First and last index of every stretch that compresses."""
    found, start = [], 0
    for phase, group in itertools.groupby(phases):
        length = len(list(group))
        if phase == COMPRESS:
            found.append((start, start + length - 1))
        start += length
    return found


# -- the comparison ------------------------------------------------------------------------------------------------

MEASURES = {
    "val_ce": "held-out CE",
    "val_mbe": "held-out MBE, active layers",
    "val_mbe_other": "held-out MBE, other layers",
    "train_ce": "training CE",
}


def _print_compare(console: Console, found: TrainedGapt) -> None:
    from rich.table import Table

    assert found.compare is not None
    rows = found.compare.table.to_pylist()
    for measure, title in MEASURES.items():
        mine = [row for row in rows if row["measure"] == measure]
        table = Table(
            box=None, pad_edge=False, header_style="dim", title=title, title_justify="left", title_style="bold"
        )
        for heading in (
            "arm",
            "w",
            "compress",
            "nats",
            "95 % interval",
            f"{mine[0]['arm']} minus this",
            "95 % interval",
            "lower in",
        ):
            table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
        for row in mine:
            own = row["difference"] is None
            table.add_row(
                row["arm"], f"{row['weight']:.3g}", f"{row['share_compress']:.0%}", number(row["mean"]),
                _interval(row["lo"], row["hi"]), number(row["difference"]),
                _interval(row["difference_lo"], row["difference_hi"]),
                "" if own else f"{row['n_lower']} of {row['n_seeds']}",
            )  # fmt: skip
        console.print(table)


def _interval(lo: float | None, hi: float | None) -> str:
    return "–" if lo is None else f"{number(lo)} – {number(hi)}"


def plot_compare(compare: Report, path: Path) -> None:
    """The arms side by side: mean and 95 % interval over seeds of every measure."""
    import matplotlib
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(3.0 * len(MEASURES), 3.2), layout="constrained", dpi=150)
    with matplotlib.rc_context(STYLE | {"axes.titlesize": 9}):
        draw_compare(canvas.subplots(1, len(MEASURES)), compare.table.to_pylist())
        savefig(canvas, path)


def draw_compare(axes: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Every measure of MEASURES on an axis of its own: mean and 95 % interval of each arm."""
    for axis, (measure, title) in zip(axes, MEASURES.items()):
        mine = [row for row in rows if row["measure"] == measure and row["mean"] is not None]
        for x, row in enumerate(mine):
            colour = "C1" if row["difference"] is None else "C0"
            axis.plot(x, row["mean"], "o", color=colour)
            if row["lo"] is not None:
                axis.plot([x, x], [row["lo"], row["hi"]], color=colour, linewidth=2)
        axis.set_xticks(range(len(mine)), [row["arm"] for row in mine], rotation=30, ha="right")
        axis.set_title(title)
        axis.set_ylabel("nats")
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.margins(x=0.2)
