"""A pruning experiment for people: a summary, tables for the terminal, a plot. Needs no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memdiag.drawing import SPARKS, heights, number, savefig
from memdiag.prune_report import Pruned

if TYPE_CHECKING:
    from rich.console import Console

Row = dict[str, Any]
SHOWN = {
    "train_corrupted_acc": "corrupted, as trained",
    "train_corrupted_exact": "corrupted, reproduced",
    "corrupted_true_acc": "corrupted, true label",
    "train_clean_acc": "clean",
    "test_acc": "test",
    "train_corrupted_loss": "loss, corrupted",
    "train_clean_loss": "loss, clean",
    "test_loss": "loss, test",
}
COLOURS = {"train_corrupted_acc": "C0", "train_clean_acc": "C1", "test_acc": "C2"}  # of STYLE's, or of who draws
LABELS = {"train_corrupted_acc": "corrupted", "train_clean_acc": "clean", "test_acc": "test"}
STYLE: dict[Any, Any] = {  # of a plot in a file
    "axes.prop_cycle": "cycler(color=['#c0392b', '#2471a3', '#1e8449'])",
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 7,
    "legend.frameon": False,
}
SPARK_POINTS = 32
IPR_BINS = 20


def summary(found: Pruned) -> dict[str, Any]:
    """Paths and headline figures: before, at the chosen cut, and for as many random neurons."""
    networks = found.meta["networks"]
    return {
        "directory": str(found.path),
        "pruning": str(found.pruning.path),
        "neurons": str(found.neurons.path),
        **({"dynamics": str(found.dynamics.path)} if found.dynamics else {}),
        **({"filtration": str(found.filtration.path)} if found.filtration else {}),
        "networks": networks,
    }


def print_table(found: Pruned) -> None:
    """For each network: what it does before, after and under random pruning, the curves, and the IPR histogram."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 100, emoji=False)
    by_seed = _by_seed(found.pruning.table.to_pylist())
    neurons = _by_seed(found.neurons.table.to_pylist())
    for network in found.meta["networks"]:
        seed = network.get("seed")
        _print_network(console, network, by_seed[seed], found.meta["options"]["rank_by"])
        if any(row["ipr"] is not None for row in neurons[seed]):
            _print_ipr(console, network, neurons[seed])
        if found.filtration is not None:
            _print_filtration(console, [r for r in found.filtration.table.to_pylist() if r["seed"] == seed])
        console.print()
    console.print("[dim]directory:[/] ", end="")
    console.print(str(found.path), markup=False, highlight=False, soft_wrap=True)


def _by_seed(rows: list[Row]) -> dict[int | None, list[Row]]:
    found: dict[int | None, list[Row]] = {}
    for row in rows:
        found.setdefault(row["seed"], []).append(row)
    return found


def _print_network(console: Console, network: Row, rows: list[Row], rank_by: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    name = f"seed {network['seed']}" if "seed" in network else str(network["name"])
    counts = ", ".join(f"{n} {group}" for group, n in network["examples"].items() if n)
    phase = f"  {network['phase'].replace('_', ' ')}" if "phase" in network else ""
    console.print(
        f"[bold]{escape(name)}[/]{phase}  {network['n_neurons']} neurons; examples: {counts}", highlight=False
    )
    cut = network.get("chosen")
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("accuracy, loss", no_wrap=True)
    headings = ["before"]
    if cut is not None:
        headings += [f"{cut['n_pruned']} pruned", f"{cut['n_pruned']} random", "5 – 95 %"]
        matched = network["random_matched"]
        headings += [f"{matched['n_pruned']} random"] if matched else []
        headings += ["by norms"] if "norm_product" in network else []
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for key, label in SHOWN.items():
        if key not in network["before"]:
            continue
        digits = 4 if key.endswith("loss") else 3
        cells = [number(network["before"][key], digits)]
        if cut is not None:
            random = network["random"][key]
            cells += [number(cut[key], digits), number(random["mean"], digits)]
            cells += [f"{random['lo']:.{digits}f} – {random['hi']:.{digits}f}"]
            cells += [number(matched[key], digits)] if matched else []
            cells += [number(network["norm_product"][key], digits)] if "norm_product" in network else []
        table.add_row(label, *cells)
    console.print(table)
    if cut is not None:
        console.print(_effect(network), highlight=False)
    n_draws = len({row["draw"] for row in rows if row["order"] == "random"})
    controls = ""
    if cut is not None:
        controls = f"; random: mean of {n_draws} orders, of as many neurons"
        controls += " and of as many as leave no more of the corrupted" if network["random_matched"] else ""
    console.print(f"[dim]by {rank_by}; cut: {escape(network['rule'])}{controls}[/]", highlight=False)
    _print_curves(console, rows, rank_by)


def _effect(network: Row) -> str:
    """What the ranking takes beyond as many random neurons, with the 5 to 95 % band of these."""
    told = []
    for key, label in {**LABELS, "train_corrupted_exact": "reproduced"}.items():
        band = network["beyond_random"].get(key)
        if band is not None:
            told.append(f"{label} {-band['mean']:+.3f} ({-band['hi']:+.3f} – {-band['lo']:+.3f})")
    return "beyond random: " + ", ".join(told)


def _print_curves(console: Console, rows: list[Row], rank_by: str) -> None:
    main = [row for row in rows if row["order"] == rank_by]
    console.print("[dim]accuracy from no neuron pruned to all of them, height 0 to 1[/]")
    for key, label in LABELS.items():
        values = _along(main, key)
        if values is not None:
            random = _along([row for row in rows if row["order"] == "random"], key)
            console.print(
                f"{label:>10}  [cyan]{heights(values)}[/]  random  [dim]{heights(random or [])}[/]", highlight=False
            )
    cut = next((row for row in main if row["chosen"]), None)
    if cut is not None:
        at = round(cut["fraction_pruned"] * (SPARK_POINTS - 1))
        console.print(f"{'':>10}  {' ' * at}[bold]↑[/] {cut['n_pruned']}", highlight=False)


def _along(rows: list[Row], key: str) -> list[float] | None:
    """Values at evenly spaced fractions, the mean over draws."""
    if not rows or rows[0][key] is None:
        return None
    at = np.linspace(0, 1, SPARK_POINTS)
    by_draw: dict[int | None, list[Row]] = {}
    for row in rows:
        by_draw.setdefault(row["draw"], []).append(row)
    found = [
        np.interp(at, [row["fraction_pruned"] for row in draw], [row[key] for row in draw]) for draw in by_draw.values()
    ]
    mean: list[float] = np.mean(found, axis=0).tolist()
    return mean


def ipr_histogram(rows: list[Row]) -> list[int]:
    """Neurons in each of twenty bins of IPR from 0 to 1; dead ones are left out."""
    values = [row["ipr"] for row in rows if row["ipr"] is not None]
    counts: list[int] = np.histogram(values, bins=IPR_BINS, range=(0, 1))[0].tolist()
    return counts


def _print_ipr(console: Console, network: Row, rows: list[Row]) -> None:
    bins = ipr_histogram(rows)
    top = max(bins) or 1
    bars = "".join(" " if n == 0 else SPARKS[min(7, int(8 * (n / top) ** 0.5))] for n in bins)
    low, middle, high = network["ipr_low_mid_high"]
    dead = f", {network['n_dead']} dead" if network["n_dead"] else ""
    console.print(
        f"{'IPR':>10}  0 [cyan]{bars}[/] 1  {low} low, {middle} between, {high} periodic{dead}", highlight=False
    )


def _print_filtration(console: Console, rows: list[Row]) -> None:
    for row in rows[1:]:
        figures = ", ".join(f"{LABELS[name]} {number(row[name])}" for name in LABELS if row[name] is not None)
        what = "strongest frequency of each curve alone" if row["part"] == "dominant" else "all the other frequencies"
        console.print(f"{what}: {figures}", highlight=False)


def plot(found: Pruned, path: Path) -> None:
    """Draw three accuracies against the share pruned with the random band, and what else there is of each network."""
    import matplotlib
    from matplotlib.figure import Figure

    networks = found.meta["networks"]
    rows, neurons = _by_seed(found.pruning.table.to_pylist()), _by_seed(found.neurons.table.to_pylist())
    dynamics = _by_seed(found.dynamics.table.to_pylist()) if found.dynamics is not None else {}
    columns = 3 if dynamics else 1
    figure = Figure(figsize=(5.2 * columns, 3.6 * len(networks)), layout="constrained", dpi=150)
    with matplotlib.rc_context(STYLE):
        for axes, network in zip(figure.subplots(len(networks), columns, squeeze=False), networks):
            seed = network.get("seed")
            draw_curves(axes[0], rows[seed], found.meta["options"]["rank_by"], network["n_neurons"])
            axes[0].set_title(title_of(network))
            if dynamics:
                draw_ipr(axes[1], neurons[seed])
                draw_dynamics(axes[2], dynamics[seed])
        savefig(figure, path)


def draw_curves(axis: Any, rows: list[Row], rank_by: str, n_neurons: int) -> None:
    """Accuracies of one network against the share pruned, beside the random orders' mean and 5 to 95 % band."""
    main = [row for row in rows if row["order"] == rank_by]
    random = [row for row in rows if row["order"] == "random"]
    counts = sorted({row["n_pruned"] for row in random})
    for key, colour in COLOURS.items():
        if main[0][key] is None:
            continue
        axis.plot([r["fraction_pruned"] for r in main], [r[key] for r in main], color=colour, label=LABELS[key])
        at = {n: [r[key] for r in random if r["n_pruned"] == n] for n in counts}
        low, high = ([float(np.quantile(at[n], q)) for n in counts] for q in (0.05, 0.95))
        x = [n / n_neurons for n in counts]
        axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axis.plot(x, [float(np.mean(at[n])) for n in counts], color=colour, linewidth=0.7, linestyle=":")
    cut = next((row for row in main if row["chosen"]), None)
    if cut is not None:
        axis.axvline(cut["fraction_pruned"], color="0.5", linewidth=0.8, linestyle="--")
        axis.annotate(f" {cut['n_pruned']}", (cut["fraction_pruned"], 0.5), fontsize="small")
    axis.plot([], [], color="0.5", linewidth=0.7, linestyle=":", label="random order, 5–95 %")
    axis.set(xlabel=f"share of neurons pruned, {rank_by} first", ylabel="accuracy", ylim=(-0.02, 1.02), xlim=(0, 1))
    axis.legend()


def title_of(network: Row) -> str:
    """A network's name: its seed and phase, or its checkpoint."""
    if "seed" in network:
        return f"seed {network['seed']}: {network['phase'].replace('_', ' ')}"
    return str(network["name"])


def draw_ipr(axis: Any, rows: list[Row]) -> None:
    """How periodic one network's neurons are, those that the chosen cut takes away apart."""
    values = [row["ipr"] for row in rows if row["ipr"] is not None]
    taken = [row["ipr"] for row in rows if row["ipr"] is not None and row["is_memorizer"]]
    axis.hist(values, bins=2 * IPR_BINS, range=(0, 1), color="0.75", label="all neurons")
    if taken:
        axis.hist(taken, bins=2 * IPR_BINS, range=(0, 1), color=COLOURS["train_corrupted_acc"], label="pruned")
    axis.set(xlabel="inverse participation ratio", ylabel="neurons")
    axis.legend()


def draw_dynamics(axis: Any, rows: list[Row]) -> None:
    """One network's accuracies and mean IPR while it trained."""
    steps = [row["step"] for row in rows]
    for key, colour in COLOURS.items():
        if rows[0][key] is not None:
            axis.plot(steps, [row[key] for row in rows], color=colour, label=LABELS[key])
    axis.plot(steps, [row["mean_ipr"] or np.nan for row in rows], color="0.5", linestyle="--", label="mean IPR")
    axis.set(xlabel="training step", ylim=(-0.02, 1.02))
    axis.legend()
