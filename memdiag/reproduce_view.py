"""What was reproduced, for people: a table of claims, the phase map as text and as a plot. Needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdiag.drawing import number, savefig
from memdiag.errors import InputError
from memdiag.reproduce_report import Reproduced, ReproduceOptions

if TYPE_CHECKING:
    from rich.console import Console

Row = dict[str, Any]
PHASES = {  # phase -> letter, colour
    "memorization": ("M", "#f5b7b1"),
    "coexistence": ("C", "#fad7a0"),
    "partial_inversion": ("P", "#d5f5e3"),
    "full_inversion": ("F", "#58d68d"),
    "forgetting": ("X", "#d2b4de"),
    "confusion": ("?", "#d5d8dc"),
}
STYLES = {"holds": "green", "differs": "bold red", "not_comparable": "dim"}


def summary(found: Reproduced) -> dict[str, Any]:
    """Paths, how many claims hold, and every claim's verdict with its figures."""
    rows = found.claims.table.to_pylist()
    shown = ("name", "paper", "ours", "ours_lo", "ours_hi", "control_value", "low", "high", "verdict")
    return {
        "directory": str(found.path),
        "claims_report": str(found.claims.path),
        "phases_report": str(found.phases.path),
        "preset": found.meta["options"]["preset"],
        **{verdict: sum(row["verdict"] == verdict for row in rows) for verdict in STYLES},
        "claims": [{name: row[name] for name in shown} for row in rows],
    }


def print_table(found: Reproduced) -> None:
    """Claim by claim: the paper's figure, ours, the band, the control, the verdict; then what differs; then the map."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, emoji=False)
    rows = found.claims.table.to_pylist()
    _print_claims(console, rows)
    counts = ", ".join(f"{n} {verdict.replace('_', ' ')}" for verdict in STYLES for n in [_count(rows, verdict)] if n)
    seeds = max((row["n_seeds"] for row in rows), default=0)
    console.print(f"{len(rows)} claims: {counts}; ours: mean over {seeds} seeds ± 95 %", highlight=False)
    for row in rows:
        if row["verdict"] == "differs":
            _print_detail(console, row)
    cells = [row for row in found.phases.table.to_pylist() if row["in_map"]]
    if cells:
        _print_map(console, cells)
    console.print("[dim]directory:[/] ", end="")
    console.print(str(found.path), markup=False, highlight=False, soft_wrap=True)


def _count(rows: Sequence[Row], verdict: str) -> int:
    return sum(row["verdict"] == verdict for row in rows)


def _print_claims(console: Console, rows: Sequence[Row]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("claim", "paper", "ours", "holds if", "control", "verdict"):
        table.add_column(heading, justify="left" if heading in ("claim", "verdict") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"],
            "–" if row["paper"] is None else f"{row['paper']:.8g}",
            ours(row),
            band(row),
            number(row["control_value"], digits(row)),
            f"[{STYLES[row['verdict']]}]{row['verdict'].replace('_', ' ')}[/]",
        )
    console.print(table)


def _print_detail(console: Console, row: Row) -> None:
    from rich.markup import escape

    console.print(f"[bold red]{row['name']}[/]: {escape(row['statement'])}", highlight=False)
    control = f"; control: {row['control']}, {number(row['control_value'], digits(row))}" if row["control"] else ""
    about = f"{row['measure']}; {row['setting']}{control}; paper: {row['paper_note']}; band: {row['band_from']}"
    console.print(f"  [dim]{escape(about)}[/]", highlight=False)


def digits(row: Row) -> int:
    """Places behind the point that say something: 1 for counts, 7 in a narrow band, else 4."""
    limits = [abs(row[name]) for name in ("ours", "low", "high") if row[name] is not None]
    if max(limits, default=0) >= 10:
        return 1
    narrow = row["low"] is not None and row["high"] is not None and row["high"] - row["low"] < 1e-4
    return 7 if narrow else 4


def ours(row: Row) -> str:
    """The mean, and ± half its interval."""
    places = digits(row)
    if row["ours_lo"] is None:
        return number(row["ours"], places)
    return f"{number(row['ours'], places)} ± {(row['ours_hi'] - row['ours_lo']) / 2:.{places}f}"


def band(row: Row) -> str:
    """The values that count as holding."""
    low, high = (None if row[name] is None else f"{row[name]:.7g}" for name in ("low", "high"))
    if low is None and high is None:
        return "–"
    if high is None:
        return f">= {low}"
    return f"<= {high}" if low is None else f"{low} – {high}"


def panels(cells: Sequence[Row]) -> dict[float, dict[float, dict[float, Row]]]:
    """Cells of the map by weight decay, then ξ (from large to small), then α."""
    found: dict[float, dict[float, dict[float, Row]]] = {}
    for row in sorted(cells, key=lambda row: (row["weight_decay"], -row["corruption"], row["train_fraction"])):
        found.setdefault(row["weight_decay"], {}).setdefault(row["corruption"], {})[row["train_fraction"]] = row
    return found


def _print_map(console: Console, cells: Sequence[Row]) -> None:
    console.print("\nphase and agreement with corrupted labels; down xi, across alpha", highlight=False)
    for decay, by_xi in panels(cells).items():
        alphas = list(next(iter(by_xi.values())))
        console.print(f"[bold]weight decay {decay:g}[/]", highlight=False)
        console.print("        " + "".join(f"{alpha:<8g}" for alpha in alphas), style="dim", highlight=False)
        for xi, by_alpha in by_xi.items():
            shown = (
                f"[black on {PHASES[row['phase']][1]}] {PHASES[row['phase']][0]} {_short(row)} [/]"
                for row in by_alpha.values()
            )
            console.print(f"[dim]{xi:<8g}[/]" + " ".join(shown), highlight=False)
    legend = "   ".join(f"{letter} {phase.replace('_', ' ')}" for phase, (letter, _) in PHASES.items())
    console.print(f"[dim]{legend}[/]", highlight=False)


def _short(row: Row) -> str:
    value = row["train_corrupted_acc"]
    return " – " if value is None else f"{value:.2f}".removeprefix("0") if value < 0.995 else "1.0"


def check_map(options: ReproduceOptions) -> None:
    """Refuse to plot a map that is not made.

    Raises:
        InputError: --plot goes with --no-map.
    """
    if options.no_map:
        raise InputError("--plot draws the phase map; leave out --no-map")


def plot(found: Reproduced, path: Path) -> None:
    """Draw the phase map, a panel for each weight decay: colour is the phase, the number corrupted agreement.

    Raises:
        InputError: no cell of the map was trained.
    """
    from matplotlib.figure import Figure

    cells = [row for row in found.phases.table.to_pylist() if row["in_map"]]
    if not cells:
        raise InputError(f"--plot draws the phase map, and --only {found.meta['options']['only']} leaves it out")
    by_decay = panels(cells)
    canvas = Figure(figsize=(3.6 * len(by_decay) + 1.8, 3.6), layout="constrained", dpi=150)
    axes = canvas.subplots(1, len(by_decay), squeeze=False)[0]
    for axis, (decay, by_xi) in zip(axes, by_decay.items()):
        draw_panel(axis, by_xi)
        axis.set_title(f"weight decay {decay:g}", fontsize=10, loc="left")
    axes[0].set_ylabel("ξ, share of labels corrupted")
    draw_legend(canvas, sorted({row["phase"] for row in cells}, key=list(PHASES).index))
    savefig(canvas, path)


def draw_panel(axis: Any, by_xi: dict[float, dict[float, Row]]) -> None:
    """The map of one weight decay, as `panels` sorts it."""
    alphas = list(next(iter(by_xi.values())))
    for y, by_alpha in enumerate(by_xi.values()):
        for x, row in enumerate(by_alpha.values()):
            axis.fill_between([x - 0.5, x + 0.5], y - 0.5, y + 0.5, color=PHASES[row["phase"]][1], linewidth=0)
            axis.text(x, y, _short(row), ha="center", va="center", fontsize="small", color="#111111")
    axis.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axis.set_yticks(range(len(by_xi)), [f"{xi:g}" for xi in by_xi])
    axis.set(xlim=(-0.5, len(alphas) - 0.5), ylim=(len(by_xi) - 0.5, -0.5), xlabel="α, share of pairs trained on")
    axis.spines[:].set_visible(False)


def draw_legend(canvas: Any, phases: Sequence[str]) -> None:
    """The phases and their colours, beside the panels."""
    from matplotlib.patches import Patch

    handles = [Patch(color=PHASES[phase][1], label=phase.replace("_", " ")) for phase in phases]
    canvas.legend(
        handles=handles,
        loc="outside right upper",
        fontsize="small",
        frameon=False,
        title="number: corrupted\nlabels agreed",
        title_fontsize="small",
    )
