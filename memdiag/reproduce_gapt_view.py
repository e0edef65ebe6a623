"""What an experiment's arms gave, for people: a table for each effect, and the paired changes as a plot. No torch."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from memdiag.drawing import number, savefig
from memdiag.reproduce_report import ReproducedEffects

Row = dict[str, Any]
STYLES = {"agrees": "green", "disagrees": "bold red", "inconclusive": "dim"}
OTHER_DATA = "of other data"  # how a note begins where the paper's figure cannot stand beside ours
COLOURS = {"baseline": "C2", "treated": "C1", "control": "C0"}  # of STYLE's, or of who draws
STYLE: dict[Any, Any] = {  # of a plot in a file
    "axes.prop_cycle": "cycler(color=['#1f4e79', '#b03a2e', '#9aa0a6'])",
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


def summary(found: ReproducedEffects) -> dict[str, Any]:
    """Paths, how many effects agree, and every effect's verdict with its figures."""
    rows = found.effects.table.to_pylist()
    shown = ("name", "arm", "role", "paper", "ours", "ours_lo", "ours_hi", "paper_change", "change", "change_lo",
             "change_hi", "beyond", "n_seeds", "n_higher", "verdict")  # fmt: skip
    return {
        "directory": str(found.path),
        "effects_report": str(found.effects.path),
        "runs_report": str(found.runs.path),
        "preset": found.meta["options"]["preset"],
        **{verdict: sum(row["verdict"] == verdict for row in rows) for verdict in STYLES},
        "effects": [{name: row[name] for name in shown} for row in rows],
    }


def print_table(found: ReproducedEffects) -> None:
    """Effect by effect: the paper's figure, ours, the paired change of every arm, what is left beyond a control."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, emoji=False, highlight=False)
    for name, rows in _by_effect(found):
        (treated,) = (row for row in rows if row["role"] == "treated")
        style = STYLES[treated["verdict"]]
        console.print(f"[bold]{name}[/]  [{style}]{treated['verdict']}[/]  {escape(treated['statement'])}")
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("arm", "paper", "ours", "paper's change", "change", "higher in", "method beyond it"):
            table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
        for row in rows:
            table.add_row(
                f"[bold]{row['arm']}[/]" if row["role"] == "treated" else row["arm"],
                "–" if row["paper"] is None else f"{row['paper']:.4g}",
                spread(row["ours"], row["ours_lo"], row["ours_hi"]),
                signed(row["paper_change"], row["is_relative"]),
                interval(row, "change"),
                "–" if row["n_higher"] is None else f"{row['n_higher']} of {row['n_seeds']}",
                interval(row, "beyond"),
            )
        console.print(table)
    rows = found.effects.table.to_pylist()
    counts = ", ".join(f"{n} {v}" for v in STYLES for n in [sum(row["verdict"] == v for row in rows)] if n)
    seeds = max((row["n_seeds"] for row in rows), default=0)
    console.print(f"{counts}; n = {seeds} seeds, ± and ranges are 95 % t intervals, changes are paired by seed")
    for note in dict.fromkeys(row["paper_note"] for row in rows if row["paper_note"].startswith(OTHER_DATA)):
        console.print(f"[dim]the paper's figure is[/] {escape(note)}")
    console.print("[dim]directory:[/] ", end="")
    console.print(str(found.path), markup=False, soft_wrap=True)


def _by_effect(found: ReproducedEffects) -> Iterator[tuple[str, list[Row]]]:
    for name, rows in itertools.groupby(found.effects.table.to_pylist(), lambda row: str(row["name"])):
        yield name, list(rows)


def spread(value: float | None, lo: float | None, hi: float | None) -> str:
    """A mean ± half its interval."""
    if value is None or lo is None or hi is None:
        return number(value)
    return f"{number(value)} ± {(hi - lo) / 2:.3f}"


def signed(value: float | None, is_relative: bool) -> str:
    """A change with its sign, in percent if it is a share."""
    if value is None:
        return "–"
    if is_relative:
        return f"{value:+.1%}" if abs(value) < 0.1 else f"{value:+.0%}"
    return f"{value:+.3f}"


def interval(row: Row, name: str) -> str:
    """A change and its interval."""
    value = signed(row[name], row["is_relative"])
    if row[f"{name}_lo"] is None:
        return value
    lo, hi = (signed(row[f"{name}_{end}"], row["is_relative"]) for end in ("lo", "hi"))
    return f"{value} ({lo} – {hi})"


def plot(found: ReproducedEffects, path: Path) -> None:
    """A panel for each effect: every run of every arm as a dot, mean and 95 % interval beside it."""
    import matplotlib
    from matplotlib.figure import Figure

    effects = list(_by_effect(found))
    columns = min(3, len(effects))
    lines = -(-len(effects) // columns)
    canvas = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained", dpi=150)
    with matplotlib.rc_context(STYLE):
        draw_effects(list(canvas.subplots(lines, columns, squeeze=False).flat), effects, found.runs.table.to_pylist())
        dotted = any(row["paper"] is not None for _, rows in effects for row in rows)
        more = "; dotted: the paper's figure" if dotted else ""
        canvas.supxlabel(f"dots: runs; beside them mean and 95 % interval{more}", fontsize=8)
        savefig(canvas, path)


def draw_effects(axes: Sequence[Any], effects: Sequence[tuple[str, list[Row]]], run_rows: Sequence[Row]) -> None:
    """Every effect on an axis of its own; axes that are left over are switched off.

    Args:
        axes: at least as many as effects.
        effects: name and rows of each.
        run_rows: rows of runs.parquet.
    """
    runs: dict[tuple[str, str], list[float]] = {}
    for run in run_rows:
        if run["value"] is not None:
            runs.setdefault((run["arm"], run["measure"]), []).append(run["value"])
    for axis in axes[len(effects) :]:
        axis.set_axis_off()
    for axis, (name, rows) in zip(axes, effects):
        for x, row in enumerate(rows):
            colour = COLOURS[row["role"]]
            dots = runs.get((row["arm"], row["measure"]), [])
            axis.plot([x - 0.15] * len(dots), dots, "o", color=colour, alpha=0.4, markersize=3)
            if row["ours"] is not None:
                axis.plot(x + 0.15, row["ours"], "o", color=colour, markersize=5)
            if row["ours_lo"] is not None:
                axis.plot([x + 0.15] * 2, [row["ours_lo"], row["ours_hi"]], color=colour, linewidth=2)
            if row["paper"] is not None:
                axis.plot([x - 0.4, x + 0.4], [row["paper"]] * 2, color="black", linewidth=1, linestyle=":")
        axis.set_xticks(range(len(rows)), [row["arm"] for row in rows], rotation=40, ha="right", fontsize="small")
        (verdict,) = (row["verdict"] for row in rows if row["role"] == "treated")
        axis.set_title(f"{name}: {verdict}")
        axis.set_ylabel(rows[0]["measure"], fontsize="small")
        axis.ticklabel_format(axis="y", useOffset=False)
