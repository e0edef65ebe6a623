"""A score report for people: a summary, tables for the terminal, a plot. Needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memdiag import scores
from memdiag.drawing import bar, number, savefig
from memdiag.tables import Report

if TYPE_CHECKING:
    from rich.console import Console

MOST_PAIRS = 6  # of scores shown that agree most, and as many that agree least
BINS = 40  # of a distribution
MOST_TOP = 3  # scores whose highest examples are shown
HEADLINES = ("ref_delta", "logp_suffix_t1", "nll_mean", "csl", "aum_early", "grand", "loss")  # before others


def summary(report: Report) -> dict[str, Any]:
    """The report's path and the figures of its scores."""
    meta, found = report.meta, report.meta["summary"]
    figures = {
        name: {key: found["scores"][name].get(key) for key in ("mean", "n_null", "auc", "found_in_top")}
        for name in meta["scores"]
    }
    return {
        "report": str(report.path),
        "kind": meta["kind"],
        "examples": found["n"],
        "read_at": meta["read_at"],
        "scores": {name: {k: v for k, v in figure.items() if v is not None} for name, figure in figures.items()},
        "coherence": found.get("coherence"),
    }


def print_table(report: Report) -> None:
    """The scores with their means and, if the truth is known, how well they find it; who scores highest; agreement."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 100, emoji=False)
    meta, found = report.meta, report.meta["summary"]
    read = f" at {meta['read_at']}" if meta["read_at"] else ""
    about = f"{found['n']} examples, {len(meta['scores'])} scores{read}"
    if meta["trajectory"]:
        about += f", trajectory {meta['trajectory']}"
    console.print(about, markup=False, highlight=False)
    print_scores(console, meta["scores"], found, meta.get("foreign") or {})
    print_top(console, meta["scores"], found)
    print_agreement(console, found["agreement"])
    coherence = found.get("coherence")
    if coherence and coherence["overall"] is not None:
        console.print(
            f"m-coherence of the gradients: {coherence['overall']:.3g} of {coherence['m']} examples "
            "(1: they pull in unrelated directions, 0: they cancel)",
            highlight=False,
        )
    console.print("[dim]report:[/] ", end="")
    console.print(str(report.path), markup=False, highlight=False, soft_wrap=True)


def print_scores(console: Console, names: list[str], found: dict[str, Any], foreign: dict[str, Any]) -> None:
    from rich.table import Table

    truth = found.get("truth")
    table = Table(box=None, pad_edge=False, header_style="dim")
    headings = ["score", "memorized", "mean", "95 % interval"]
    if truth:
        headings = ["score", "memorized", "mean", "AUC", "95 % interval", f"in top {truth['n_true']}", ""]
    headings += ["null"] if any(found["scores"][name]["n_null"] for name in names) else []
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("score", "memorized", "") else "right", no_wrap=True)
    for name in names:
        figures = found["scores"][name]
        end = foreign[name]["memorized"] if name in foreign else scores.load(name).MEMORIZED
        row = [name, end or "–", _short(figures["mean"]["value"])]
        if truth:
            nothing = {"value": None, "lo": None, "hi": None}
            auc, share = figures.get("auc") or nothing, (figures.get("found_in_top") or nothing)["value"]
            row += [number(auc["value"]), _interval(auc), _percent(share), "" if share is None else bar(share)]
        else:
            row.append(_interval(figures["mean"]))
        if "null" in headings:
            row.append(str(figures["n_null"] or ""))
        table.add_row(*row)
    console.print(table, highlight=False)


def print_top(console: Console, names: list[str], found: dict[str, Any]) -> None:
    """Who scores highest, by the scores that find the truth best, or else by the first ones."""
    from rich.text import Text

    shown = [name for name in (*HEADLINES, *names) if name in names and found["scores"][name].get("top")]
    shown = list(dict.fromkeys(shown))
    if found.get("truth"):
        shown.sort(key=lambda name: -((found["scores"][name].get("auc") or {}).get("value") or 0))
    for name in shown[:MOST_TOP]:
        console.print(f"highest by {name}:", highlight=False)
        for example in found["scores"][name]["top"]:
            label = f"  label {example['label']}" if example.get("label") is not None else ""
            mark = "  (true)" if example.get("truth") else ""
            text = f"  {example['text']}" if example.get("text") else ""
            line = Text(f"  {_printable(example['example_id'])}{label}{mark}{_printable(text)}", overflow="ellipsis")
            console.print(line, no_wrap=True, highlight=False)


def print_agreement(console: Console, pairs: list[dict[str, Any]]) -> None:
    from rich.table import Table

    known = sorted((pair for pair in pairs if pair["value"] is not None), key=lambda pair: -pair["value"])
    if not known:
        return
    few = len(known) <= 2 * MOST_PAIRS
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("agreement (Spearman)", "", "rho", "95 % interval"):
        table.add_column(heading, justify="right" if heading in ("rho", "95 % interval") else "left", no_wrap=True)
    for pair in known if few else known[:MOST_PAIRS]:
        table.add_row(pair["a"], pair["b"], number(pair["value"]), _interval(pair))
    if not few:
        table.add_row("…", f"{len(known) - 2 * MOST_PAIRS} more in the report", "", "")
        for pair in known[-MOST_PAIRS:]:
            table.add_row(pair["a"], pair["b"], number(pair["value"]), _interval(pair))
    console.print(table, highlight=False)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _interval(estimate: dict[str, Any]) -> str:
    if estimate["lo"] is None:
        return "–"
    return f"{_short(estimate['lo'])} – {_short(estimate['hi'])}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def plot(report: Report, path: Path) -> None:
    """The distribution of each score, the true ones apart if they are known, and the agreement matrix.

    Raises:
        InputError: the name ends in neither .png nor .svg.
        IncompleteError: it cannot be written there.
    """
    from matplotlib.figure import Figure

    names = report.meta["scores"]
    wide = 5
    n_rows = -(-len(names) // wide)
    figure = Figure(figsize=(2.2 * wide, 1.7 * n_rows + 0.28 * len(names) + 2.2), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.7 * n_rows, 0.28 * len(names) + 2.2])
    top, bottom = halves
    axes = top.subplots(n_rows, wide, squeeze=False).ravel()
    colours = ("tab:blue", "tab:red")
    truth = report.table["truth"].to_numpy().astype(bool) if "truth" in report.table.column_names else None
    for axis, name in zip(axes, names):
        values = report.table[name].cast("float64").to_numpy()
        known = np.isfinite(values)
        edges = np.histogram_bin_edges(values[known], bins=BINS) if known.any() else np.linspace(0, 1, BINS + 1)
        groups = {"all": known} if truth is None else {"others": known & ~truth, "true": known & truth}
        counts = {label: np.histogram(values[which], edges)[0] for label, which in groups.items()}
        draw_distribution(axis, edges, counts, colours)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=6)
    for axis in axes[len(names) :]:
        axis.axis("off")
    if truth is not None:
        axes[0].legend(fontsize=6)
    axes[0].set_ylabel("share", fontsize=7)
    axis = bottom.subplots()
    image = draw_agreement(axis, names, agreement_matrix(names, report.meta["summary"]["agreement"]))
    axis.tick_params(labelsize=7)
    axis.set_title("agreement: Spearman's rho of the scores, turned so that high is more memorized", fontsize=8)
    bottom.colorbar(image, ax=axis, shrink=0.7)
    savefig(figure, path)


def draw_distribution(
    axis: Any, edges: NDArray[np.float64], counts: Mapping[str, NDArray[np.int64]], colours: Sequence[Any]
) -> None:
    """Shares of each group in each bin.

    Args:
        axis: to draw on.
        edges: (b + 1,) of the bins.
        counts: group -> (b,) examples.
        colours: of the groups.
    """
    for (label, found), colour in zip(counts.items(), colours):
        axis.stairs(found / max(1, int(found.sum())), edges, fill=True, color=colour, alpha=0.6, label=label)
    axis.ticklabel_format(useOffset=False)
    axis.set_ylim(bottom=0)


def agreement_matrix(names: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """The rank correlations of a summary's pairs, in the order of the names; NaN where there is none."""
    matrix = np.full((len(names), len(names)), np.nan)
    np.fill_diagonal(matrix, 1.0)
    for pair in pairs:
        if pair["value"] is not None:
            i, j = names.index(pair["a"]), names.index(pair["b"])
            matrix[i, j] = matrix[j, i] = pair["value"]
    return matrix


def draw_agreement(axis: Any, names: Sequence[str], matrix: NDArray[np.float64]) -> Any:
    """A matrix of rank correlations as colour; returns the image, for its scale."""
    image = axis.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), names)
    return image
