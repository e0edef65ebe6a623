"""What a run of `memdiag train` did, for people: a summary, a table, loss and accuracy over the epochs. No torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memdiag.drawing import heights, number, savefig, sparkline
from memdiag.tables import Report
from memdiag.train_report import Trained

if TYPE_CHECKING:
    from numpy.typing import NDArray

POINTS = 48  # characters of a curve, so that a line fits into 80
STYLE: dict[Any, Any] = {  # of a plot in a file
    "axes.prop_cycle": "cycler(color=['#1f4e79', '#b03a2e', '#7fa8c9', '#111111'])",
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8,
    "legend.frameon": False,
}
CURVES = {
    "train_accuracy": "right when presented",
    "clean_accuracy": "of these, clean",
    "corrupted_accuracy": "wrong label learned",
    "test_accuracy": "right, held out",
}


def summary_of(history: Report, corrupted: NDArray[np.bool_] | None) -> dict[str, Any]:
    """The headline figures of a run; `corrupted` says which of its examples are."""
    table, meta = history.table, history.meta
    last = table.slice(table.num_rows - 1).to_pylist()[0]
    learned = table["corrupted_accuracy"].to_pylist()
    half = [epoch for epoch, share in enumerate(learned) if share is not None and share >= 0.5]
    return {
        "model": meta["model"],
        "data": meta["dataset"]["name"],
        "examples": meta["n_examples"],
        "corrupted": None if corrupted is None else int(corrupted.sum()),
        "epochs": table.num_rows,
        "updates": last["step"],
        "seed": meta["seed"],
        **{name: last[name] for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy")},
        "clean_accuracy": last["clean_accuracy"],
        "corrupted_accuracy": last["corrupted_accuracy"],
        "epoch_half_of_corrupted": half[0] if half else None,
    }


def summary(found: Trained) -> dict[str, Any]:
    """What --json prints: paths and the summary."""
    return {"directory": str(found.path), "report": str(found.history.path), **found.summary}


def print_table(found: Trained) -> None:
    """How the run went."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, emoji=False, highlight=False)
    about, table = found.summary, found.history.table
    wrong = f", {about['corrupted']:,} of them with a wrong label" if about["corrupted"] else ""
    console.print(
        f"[bold]{about['model']}[/]  {about['examples']:,} examples{wrong}  {about['epochs']} epochs, "
        f"{about['updates']:,} updates"
    )
    loss = table["train_loss"].to_pylist()
    console.print(f"  {'loss when presented':20} {number(loss[0])}  {sparkline(_thinned(loss))}  {number(loss[-1])}")
    for name, title in CURVES.items():
        known = [value for value in table[name].to_pylist() if value is not None]
        if known:
            shares = [value for value in _thinned(known) if value is not None]
            console.print(f"  {title:20} {known[0]:.3f}  {heights(shares)}  {known[-1]:.3f}")
    if about["test_loss"] is not None:
        console.print(f"[dim]held-out loss:[/] {about['test_loss']:.3f}")
    if about["epoch_half_of_corrupted"] is not None:
        console.print(f"[dim]half of the wrong labels learned in epoch:[/] {about['epoch_half_of_corrupted']}")
    console.print("[dim]directory:[/] ", end="")
    console.print(str(found.path), markup=False, soft_wrap=True)


def _thinned(values: list[float]) -> list[float | None]:
    """At most POINTS means of consecutive values."""
    return [float(part.mean()) for part in np.array_split(np.array(values), min(POINTS, len(values)))]


def plot(found: Trained, path: Path) -> None:
    """Draw the run."""
    plot_history(found.history, path)


def plot_history(history: Report, path: Path) -> None:
    """Loss above, accuracies below, over the epochs."""
    import matplotlib
    from matplotlib.figure import Figure

    meta = history.meta
    canvas = Figure(figsize=(8, 5), layout="constrained", dpi=150)
    with matplotlib.rc_context(STYLE):
        above, below = canvas.subplots(2, 1, sharex=True)
        draw_history(above, below, history.table.to_pylist())
        above.set_title(f"{meta['model']} on {meta['dataset']['name']}, seed {meta['seed']}")
        savefig(canvas, path)


def draw_history(above: Any, below: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Loss and accuracies over the epochs, on two axes; what is null everywhere is left out."""
    epochs = np.array([row["epoch"] for row in rows])
    mark = "o" if len(epochs) < 3 else ""
    for axis, name, label, colour, style in (
        (above, "train_loss", "when presented", "C0", "-"),
        (above, "test_loss", "held out", "C3", "--"),
        (below, "train_accuracy", CURVES["train_accuracy"], "C0", "-"),
        (below, "clean_accuracy", "of these, clean", "C2", "-"),
        (below, "corrupted_accuracy", CURVES["corrupted_accuracy"], "C1", "-"),
        (below, "test_accuracy", CURVES["test_accuracy"], "C3", "--"),
    ):
        values = np.array([row[name] for row in rows], dtype=float)
        if not np.isnan(values).all():
            axis.plot(epochs, values, style, marker=mark, color=colour, linewidth=1.2, label=label)
    above.set(ylabel="loss (nats)", ylim=(0, None))
    below.set(ylabel="share of examples", xlabel="epoch", ylim=(-0.02, 1.02))
    for axis in (above, below):
        if axis.lines:
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        axis.margins(x=0.01)
