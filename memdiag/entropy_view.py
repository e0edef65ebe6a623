"""An entropy report for people: a summary, tables for the terminal, a plot. Needs no torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdiag.drawing import bar, number, savefig, sparkline
from memdiag.tables import Report

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Row = dict[str, Any]
MOST_TABLES = 6
STYLE: dict[Any, Any] = {  # of a plot in a file
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 7,
    "legend.frameon": False,
}


def grouped(report: Report) -> dict[tuple[str, str | None], dict[str, list[Row]]]:
    """Rows by (unit, pooling), then by checkpoint in the report's order."""
    out: dict[tuple[str, str | None], dict[str, list[Row]]] = {}
    for row in report.table.to_pylist():
        out.setdefault((row["unit"], row["pooling"]), {}).setdefault(row["checkpoint"], []).append(row)
    return out


def summary(report: Report) -> dict[str, Any]:
    """The report's path and headline figures: of the last checkpoint, the mean over layers of each unit's MBE."""
    groups = grouped(report)
    last = next(reversed(next(iter(groups.values())).values()))
    figures: Row = {
        "report": str(report.path),
        "checkpoints": len(report.meta["checkpoint"]),
        "layers": len(last),
        "examples": last[0]["n_examples"],
        "truncated": last[0]["truncated"],
        "last_checkpoint": last[0]["checkpoint"],
        "cross_entropy": last[0]["cross_entropy"],
    }
    for (unit, pooling), checkpoints in groups.items():
        values = [row["mbe"] for row in next(reversed(checkpoints.values())) if row["mbe"] is not None]
        figures[f"mbe_{unit}" + (f"_{pooling}" if pooling else "")] = sum(values) / len(values) if values else None
    if "gradients" in report.meta:
        figures["gradients"] = report.meta["gradients"]
    return figures


def print_table(report: Report) -> None:
    """A table per checkpoint, layers down; over a run also a trend per layer."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 100, emoji=False)
    for (unit, pooling), checkpoints in grouped(report).items():
        names = list(checkpoints)
        shown = names if len(names) <= MOST_TABLES else [names[0], names[-1]]
        for name in shown:
            _print_checkpoint(console, unit, pooling, checkpoints[name])
        if len(shown) < len(names):
            console.print(f"[dim]{len(names) - len(shown)} checkpoints between them are in the report[/]")
        if len(names) > 1:
            _print_trend(console, unit, pooling, list(checkpoints.values()))
    console.print("[dim]report:[/] ", end="")
    console.print(str(report.path), markup=False, highlight=False, soft_wrap=True)


def title_of(unit: str, pooling: str | None, rows: list[Row]) -> str:
    first = rows[0]
    pooled = "one vector an example"
    if first["n_tokens"] + first["n_tokens_dropped"] > first["n_examples"]:
        pooled += ", its last token" if pooling == "last" else ", the mean of its tokens"
    what = {"patch": f"patches of {first['patch_size']} tokens", "sequence": "whole sequences"}.get(unit, pooled)
    return f"MBE of {what}, α = {first['alpha']:g}"


def _table(*names: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(name, justify="left" if name in ("", "trend") else "right", no_wrap=True)
    return table


def _print_checkpoint(console: Console, unit: str, pooling: str | None, rows: list[Row]) -> None:
    from rich.markup import escape

    first = rows[0]
    loss = f", cross-entropy {first['cross_entropy']:.3f} nats" if first["cross_entropy"] is not None else ""
    console.print(f"[bold]{escape(first['checkpoint'])}[/]  {title_of(unit, pooling, rows)}{loss}", highlight=False)
    table = _table("layer", "mbe (nats)", "95 % interval", "mbe/max", "", "centred", "row-norm.", "eff.rank", "cosine")
    for row in rows:
        share = row["mbe"] / row["mbe_max"] if row["mbe"] is not None and row["mbe_max"] else None
        table.add_row(
            str(row["layer"]),
            number(row["mbe"]),
            f"{row['mbe_lo']:.3f} – {row['mbe_hi']:.3f}" if row["mbe_lo"] is not None else "–",
            "–" if share is None else f"{share:.0%}",
            f"[cyan]{bar(share)}[/]",
            number(row["mbe_centred"]),
            number(row["mbe_row_normalised"]),
            number(row["effective_rank"], 2),
            number(row["mean_cosine"], 2),
        )
    console.print(table)
    notes = [f"{first['n_examples']} examples, {first['n_tokens']} tokens in {first['n_units']} units"]
    notes += [f"{first['n_tokens_dropped']} tokens in no unit"] if first["n_tokens_dropped"] and unit == "patch" else []
    notes += [f"{first['truncated']} examples truncated"] if first["truncated"] else []
    notes += ["fewer than 2 d examples: limited by n"] if first["n_limited"] else []
    console.print(f"[dim]{'; '.join(notes)}[/]\n", highlight=False)


def _print_trend(console: Console, unit: str, pooling: str | None, checkpoints: list[list[Row]]) -> None:
    title = f"[bold]over {len(checkpoints)} checkpoints[/]  {title_of(unit, pooling, checkpoints[0])}"
    console.print(title, highlight=False)
    table = _table("layer", "first", "trend", "last", "change")
    losses = [rows[0]["cross_entropy"] for rows in checkpoints]
    series = [(str(rows[0]["layer"]), [row["mbe"] for row in rows]) for rows in zip(*checkpoints)]
    for name, values in [*series, *([("loss", losses)] if any(v is not None for v in losses) else [])]:
        first, last = values[0], values[-1]
        change = f"{last - first:+.3f}" if first is not None and last is not None else "–"
        table.add_row(name, number(first), f"[cyan]{sparkline(values)}[/]", number(last), change)
    console.print(table, "")


def plot(report: Report, path: Path) -> None:
    """Draw layer × step for a run, MBE by layer for a single checkpoint; one row of panels per unit.

    Errors as `savefig`.
    """
    import matplotlib
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    groups = grouped(report)
    is_run = len(report.meta["checkpoint"]) > 1
    figure = Figure(figsize=(11 if is_run else 6.5, 3.8 * len(groups)), layout="constrained", dpi=150)
    with matplotlib.rc_context(STYLE):
        axes = figure.subplots(len(groups), 2 if is_run else 1, squeeze=False)
        for row_of_axes, ((unit, pooling), checkpoints) in zip(axes, groups.items()):
            rows = list(checkpoints.values())
            if is_run:
                colours = [colormaps["viridis"](0.9 * i / max(1, len(rows[0]) - 1)) for i in range(len(rows[0]))]
                draw_lines(row_of_axes[0], rows, colours)
                draw_map(figure, row_of_axes[1], rows)
                row_of_axes[0].set_title(title_of(unit, pooling, rows[0]))
                row_of_axes[1].set_title("layer × step")
            else:
                draw_profile(row_of_axes[0], rows[0])
                row_of_axes[0].set_title(f"{rows[0][0]['checkpoint']}: {title_of(unit, pooling, rows[0])}")
        savefig(figure, path)


def _floats(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _positions(rows: list[list[Row]]) -> tuple[list[int], list[str]]:
    """Checkpoints evenly spaced, as saved, with their steps as labels: steps often grow geometrically."""
    labels = [str(r[0]["checkpoint"] if r[0]["step"] is None else r[0]["step"]) for r in rows]
    return list(range(len(rows))), labels


def label_steps(axis: Any, rows: list[list[Row]]) -> None:
    """Ticks of draw_lines and draw_map; of many checkpoints at some."""
    at, labels = _positions(rows)
    every = max(1, math.ceil(len(at) / 12))
    axis.set_xticks(at[::every], labels[::every], rotation=0 if len(at) <= 8 else 45)
    axis.set_xlabel("training step")


def draw_lines(axis: Any, rows: list[list[Row]], colours: Sequence[Any]) -> None:
    """MBE over the checkpoints, a line with its interval for each layer.

    Args:
        axis: to draw on.
        rows: by checkpoint, then by layer.
        colours: of the layers.
    """
    at, _ = _positions(rows)
    by_layer = list(zip(*rows))
    for i, series in enumerate(by_layer):
        colour = colours[i]
        values = _floats([row["mbe"] for row in series])
        axis.plot(at, values, marker="o", markersize=3, color=colour, label=f"layer {series[0]['layer']}")
        low, high = (_floats([row[end] for row in series]) for end in ("mbe_lo", "mbe_hi"))
        axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    ceiling = by_layer[0][-1]["mbe_max"]
    if ceiling is not None:
        axis.axhline(ceiling, color="0.6", linestyle="--", linewidth=0.8)
        axis.annotate("maximum", (0, ceiling), (0, -3), textcoords="offset points", va="top", fontsize="small")
    axis.set_ylim(bottom=0)
    has_interval = any(row["mbe_lo"] is not None for series in by_layer for row in series)
    axis.set_ylabel("MBE (nats), with 95 % interval" if has_interval else "MBE (nats)")
    if len(by_layer) <= 13:
        axis.legend(ncols=2)
    label_steps(axis, rows)


def draw_map(figure: Any, axis: Any, rows: list[list[Row]]) -> None:
    """MBE as colour, layers up and checkpoints across; the figures stand in the cells if there is room."""
    by_layer = list(zip(*rows))
    values = [_floats([row["mbe"] for row in series]) for series in by_layer]
    image = axis.imshow(values, aspect="auto", origin="lower", cmap="viridis", vmin=0)
    if len(by_layer) * len(rows) <= 80:
        top = max((v for series in values for v in series if not math.isnan(v)), default=1.0) or 1.0
        for y, series in enumerate(values):
            for x, value in enumerate(series):
                if not math.isnan(value):
                    ink = "#111111" if value > 0.6 * top else "#ffffff"
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize="small", color=ink)
    every = max(1, math.ceil(len(by_layer) / 24))
    names = [str(series[0]["layer"]) for series in by_layer]
    axis.set_yticks(range(0, len(by_layer), every), names[::every])
    axis.set_ylabel("layer")
    figure.colorbar(image, ax=axis, label="MBE (nats)", fraction=0.05)
    label_steps(axis, rows)


def draw_profile(axis: Any, rows: list[Row]) -> None:
    """MBE by layer of one checkpoint, with its interval, beside its variants and the most that it can be."""
    layers = [row["layer"] for row in rows]
    for name, label, style in (
        ("mbe", "MBE", "-"),
        ("mbe_centred", "centred", "--"),
        ("mbe_row_normalised", "row-normalised", ":"),
    ):
        axis.plot(layers, _floats([row[name] for row in rows]), style, marker="o", markersize=3, label=label)
    axis.fill_between(
        layers, *(_floats([row[end] for row in rows]) for end in ("mbe_lo", "mbe_hi")), alpha=0.2, linewidth=0
    )
    axis.plot(layers, _floats([row["mbe_max"] for row in rows]), color="0.6", linewidth=0.8, label="maximum")
    axis.set_ylim(bottom=0)
    axis.locator_params(axis="x", integer=True)
    axis.set_xlabel("layer")
    axis.set_ylabel("nats")
    axis.legend(bbox_to_anchor=(1.0, 1.0), loc="upper left")
