"""What `memdiag counterfactual` found, for people: a summary, a table, a histogram. Needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from memdiag.counterfactual_report import FEWEST, MEMORIZED, Counterfactual
from memdiag.drawing import number, savefig
from memdiag.tables import Report

BAR = 40  # characters of the longest bar
CALLS = ("constant", "falling", "rising", "cap", "other")
STYLE: dict[Any, Any] = {  # of a plot in a file
    "axes.prop_cycle": "cycler(color=['#1f4e79', '#b03a2e', '#999999', '#c98a00', '#555555'])",
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


def summary(found: Counterfactual) -> dict[str, Any]:
    """What --json prints: paths and the summary."""
    paths = {
        name: str(report.path)
        for name in ("report", "influence", "models")
        if (report := getattr(found, name)) is not None
    }
    return {"directory": str(found.path), **paths, "summary": found.summary}


def print_table(found: Counterfactual) -> None:
    """The headline figures."""
    console = Console(width=None if sys.stdout.isatty() else 120, emoji=False, highlight=False)
    kind = found.meta["report"]
    if kind == "counterfactual.sizes":
        _print_sizes(console, found.summary)
    elif kind == "counterfactual.turn-over-dropout":
        _print_turn_over(console, found.summary)
    else:
        _print_main(console, found.summary)
    for warning in found.summary["warnings"]:
        console.print("[yellow]note:[/] ", end="")
        console.print(warning, markup=False)
    console.print("[dim]directory:[/] ", end="")
    console.print(str(found.path), markup=False, soft_wrap=True)


def _print_main(console: Console, about: dict[str, Any]) -> None:
    unit = "token accuracy" if about["language"] else "accuracy"
    console.print(
        f"[bold]{_plain(about['model'])}[/]  {about['models']:,} models, each on {about['subset_ratio']:.0%} of "
        f"{about['examples']:,} examples ({about['groups']:,} coins)"
    )
    for name, title in (
        ("accuracy_in", f"{unit} on what a model was trained on"),
        ("accuracy_out", f"{unit} on what it was not"),
        ("test_accuracy", f"{unit}, held out"),
        ("memorization", "memorization, mean over examples"),
        ("memorization_soft", "the same of log-probability" if about["language"] else "the same of probability"),
    ):
        if about[name] is not None:
            console.print(f"  {title:46} {_interval(about[name])}")
    share = about["memorized"] / max(1, about["examples"])
    console.print(f"  {f'examples with memorization >= {MEMORIZED}':46} {about['memorized']:,} ({share:.1%})")
    truth = about["truth"]
    if truth is not None:
        console.print(
            f"  {'suspects among the others, AUC':46} {_interval(truth['auc'])}  ({truth['n_true']:,} of them)"
        )
        console.print(
            f"  {'memorization of suspects / others':46} {number(truth['memorization_true'])} / "
            f"{number(truth['memorization_other'])}"
        )
    if about["stability"] is not None:
        half = about["stability"]
        rank = half["spearman"]["value"]
        # of few models the plug-in errors are too small, and would be told as wrong
        told = f" (told by the standard errors {number(half['rms_se'], 4)})" if about["models"] >= FEWEST else ""
        console.print(
            f"  {'half of the models against the other half':46} Spearman {number(rank)}, error "
            f"{number(half['rmse'], 4)}{told}"
        )
    pairs = about["influence"]
    if pairs is not None:
        console.print(
            f"  {'influence on held-out examples':46} {pairs['significant']:,} of {pairs['pairs']:,} pairs; "
            f"about {pairs['significant_if_shuffled']:,} by chance"
        )
    _print_more(console, about)
    _print_histogram(console, about["histogram"])
    _print_top(console, about["top"])


def _print_more(console: Console, about: dict[str, Any]) -> None:
    """How many more models for narrower intervals."""
    wanted, needed = about["width_wanted"], about["models_for_width"]
    if needed is None:
        return
    more = needed - about["models"]
    about_how = "at least" if about["models"] < FEWEST else "about"  # rates of 0 in few models are not 0 yet
    text = f"{about_how} {more:,} more models make it {wanted:g}" if more > 0 else f"which is the {wanted:g} asked for"
    console.print(f"  {'median width of an interval':46} {about['median_width']:.3f}; {text}")


def _print_histogram(console: Console, counts: list[int]) -> None:
    edges = np.linspace(-1, 1, len(counts) + 1)
    some = [i for i, count in enumerate(counts) if count]
    if not some:
        return
    console.print("[dim]memorization, examples[/]")
    for i in range(some[0], some[-1] + 1):
        # a rare bin is the one to see: never less than a sliver
        size = max(1, round(BAR * counts[i] / max(counts))) if counts[i] else 0
        console.print(f"  {edges[i]:5.1f} to {edges[i + 1]:4.1f}  {'█' * size:{BAR}} {counts[i]:,}")


def _print_top(console: Console, top: list[dict[str, Any]]) -> None:
    if not top:
        return
    table = Table(box=None, pad_edge=False, header_style="dim", title_justify="left")
    table.add_column("most memorized", overflow="fold")
    for name in ("label", "memorization", "95 % interval", "in", "out", "models"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in top:
        label = "–" if row["label"] is None else str(row["label"])
        interval = "–" if row["lo"] is None else f"{row['lo']:.2f} … {row['hi']:.2f}"
        table.add_row(
            _plain(row["example_id"]), f"{label} *" if row["truth"] else label, number(row["memorization"]), interval,
            number(row["p_in"], 2), number(row["p_out"], 2), f"{row['n_in']} + {row['n_out']}",
        )  # fmt: skip
    console.print(table)
    if any(row["truth"] for row in top):
        console.print("[dim]* suspect[/]")


def _print_sizes(console: Console, about: dict[str, Any]) -> None:
    console.print(
        f"[bold]{_plain(about['model'])}[/]  widths {', '.join(map(str, about['widths']))}, "
        f"{about['models']:,} models each, {about['examples']:,} examples"
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("width", "accuracy in", "out", "held out", "memorization", ">= 0.25"):
        table.add_column(name, justify="right")
    for row in about["of_width"]:
        table.add_row(
            str(row["width"]), number(row["accuracy_in"]), number(row["accuracy_out"]), number(row["test_accuracy"]),
            number(row["memorization"]), f"{row['memorized']:,}",
        )  # fmt: skip
    console.print(table)
    console.print("[dim]memorization as the model grows (called beyond 2 standard errors), examples[/]")
    counts = about["trajectories"]
    for name in CALLS:
        share = counts[name] / max(1, about["examples"])
        console.print(f"  {name:10} {'█' * round(BAR * share):{BAR}} {counts[name]:,}")
    if about["called_by_chance"] is not None:
        console.print(f"  [dim]of constant ones, called otherwise by chance:[/] {about['called_by_chance']:.1%}")


def _print_turn_over(console: Console, about: dict[str, Any]) -> None:
    count = f"{about['networks']} network{'s' if about['networks'] > 1 else ''}"
    console.print(f"[bold]turn-over dropout[/]  {count}, {about['examples']:,} examples")
    for name, title in (
        ("own_accuracy", "accuracy with the units that saw the example"),
        ("flipped_accuracy", "with the units that did not"),
        ("self_influence", "self-influence (nats), mean over examples"),
    ):
        console.print(f"  {title:46} {number(about[name])}")
    if about["truth"] is not None:
        console.print(f"  {'suspects among the others, AUC':46} {_interval(about['truth']['auc'])}")
    for row in about["top"]:
        console.print(f"  [dim]{_plain(row['example_id'])}[/]  label {row['label']}  {row['self_influence']:.2f}")


def _interval(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "–"
    if estimate["lo"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f}  ({estimate['lo']:.3f} to {estimate['hi']:.3f})"


def _plain(text: str) -> str:
    """An id that cannot colour the terminal."""
    from rich.markup import escape

    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return escape(shown if len(shown) <= 60 else shown[:59] + "…")


def _drawable(text: str) -> str:
    """A name in letters that the font of a figure has."""
    return "".join(letter if letter.isprintable() and ord(letter) < 0x250 else "?" for letter in text)


def plot(found: Counterfactual, path: Path) -> None:
    """Draw the report."""
    if found.meta["report"] == "counterfactual":
        plot_report(found.report, path)
    elif found.meta["report"] == "counterfactual.sizes":
        plot_sizes(found, path)
    else:
        plot_turn_over(found.report, path)


def plot_report(report: Report, path: Path) -> None:
    """Histogram of memorization, and accuracy in against out."""
    import matplotlib
    from matplotlib.figure import Figure

    table = report.table
    mem, p_in, p_out = (
        table[name].to_numpy(zero_copy_only=False).astype(float) for name in ("memorization", "p_in", "p_out")
    )
    known = ~np.isnan(mem)
    truth = table["truth"].to_pylist()
    suspect = np.array([value is True for value in truth])
    canvas = Figure(figsize=(9, 4), layout="constrained", dpi=150)
    edges = edges_of(float(mem[known].min()) if known.any() else 0.0)
    groups = [mem[known & ~suspect], mem[known & suspect]] if suspect.any() else [mem[known]]
    with matplotlib.rc_context(STYLE):
        left, right = canvas.subplots(1, 2)
        draw_counts(left, edges, [np.histogram(group, edges)[0] for group in groups])
        left.set(xlabel="memorization: p in − p out")
        draw_in_out(right, p_in[known], p_out[known], suspect[known])
        meta = report.meta
        title = f"{meta['model']} on {meta['dataset']['name']}, {meta['n_models']} models"
        canvas.suptitle(_drawable(title), fontsize=9, x=0.01, ha="left", parse_math=False)  # a $ in a name is a $
        savefig(canvas, path)


def edges_of(lowest: float) -> NDArray[np.float64]:
    """(31,) edges of a histogram of memorization whose lowest value this is."""
    return np.linspace(min(0.0, float(np.floor(10 * lowest) / 10)), 1.0, 31)


def draw_counts(axis: Any, edges: NDArray[np.float64], groups: Sequence[NDArray[np.int64]]) -> None:
    """Examples in each bin on a log scale; of two groups the others, and before them the suspects.

    Args:
        axis: to draw on.
        edges: (b + 1,) of the bins.
        groups: one or two of (b,) counts.
    """
    from matplotlib.ticker import NullFormatter

    middles = (edges[:-1] + edges[1:]) / 2
    names = ["others", "suspects"] if len(groups) > 1 else ["examples"]
    some = any(group.any() for group in groups)
    # over each other and not stacked: on a log scale the upper part of a stack has no meaning; the outline shows where
    # one lies behind the other
    for group, name, colour in zip(groups, names, ("C0", "C1")):
        for kind, alpha, label in (("stepfilled", 0.45, name), ("step", 1.0, None)):
            axis.hist(
                middles, bins=edges.tolist(), weights=group, color=colour, histtype=kind, alpha=alpha, label=label,
                log=some, linewidth=0.0 if label else 1.2,
            )  # fmt: skip
    if some:
        axis.set_ylim(bottom=0.5)  # so that a single example is a bar
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    if len(groups) > 1:
        axis.legend(loc="upper center")
    axis.set_ylabel("examples (log scale)")


def draw_in_out(
    axis: Any,
    p_in: NDArray[np.float64],
    p_out: NDArray[np.float64],
    suspect: NDArray[np.bool_],
    *,
    rasterized: bool = True,
) -> None:
    """Examples by how often models with and without them are right; all are (n,)."""
    # many examples lie on the same few rates: a little noise shows how many
    jitter = np.random.default_rng(0).normal(0, 0.006, size=(2, len(p_in)))
    for chosen, colour, label in ((~suspect, "C0", "others"), (suspect, "C1", "suspects")):
        if chosen.any():
            axis.plot(
                (p_out + jitter[0])[chosen], (p_in + jitter[1])[chosen], ".", color=colour, markersize=3, alpha=0.4,
                label=label, rasterized=rasterized,
            )  # fmt: skip
    label_in_out(axis)
    if suspect.any():
        axis.legend(loc="lower right", markerscale=3)


def label_in_out(axis: Any) -> None:
    """Axes of p out and p in, and the diagonal on which nothing is memorized."""
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    axis.annotate("memorization 0", (0.62, 0.58), fontsize="small", rotation=45, rotation_mode="anchor")
    axis.set(xlabel="right without it (p out)", ylabel="right with it (p in)", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))


def plot_sizes(found: Counterfactual, path: Path) -> None:
    """How many examples rise, fall, ..., and the mean curve of each kind."""
    import matplotlib
    from matplotlib.figure import Figure

    table, about = found.report.table, found.summary
    widths = about["widths"]
    mem = table["memorization"].to_numpy(zero_copy_only=False).astype(float).reshape(-1, len(widths))
    calls = np.array([str(call) for call in table["trajectory"].to_pylist()])[:: len(widths)]
    canvas = Figure(figsize=(6, 4), layout="constrained", dpi=150)
    curves = {
        call: (int((calls == call).sum()), np.nanmean(mem[calls == call], axis=0))
        for call in CALLS
        if (calls == call).any()
    }
    with matplotlib.rc_context(STYLE):
        draw_sizes(canvas.subplots(), widths, curves)
        savefig(canvas, path)


def draw_sizes(axis: Any, widths: Sequence[int], curves: Mapping[str, tuple[int, NDArray[np.float64]]]) -> None:
    """Mean memorization at every width of the examples that rise, fall, ...

    Args:
        axis: to draw on.
        widths: (s,).
        curves: one of CALLS -> how many examples, and (s,) their means.
    """
    colours = dict(zip(CALLS, ("C2", "C0", "C1", "C3", "C4")))
    for call, (n, means) in curves.items():
        axis.plot(widths, means, "o-", color=colours[call], label=f"{call}: {n:,}")
    axis.set_xscale("log")
    axis.set_xticks(widths, labels=[str(width) for width in widths])
    axis.minorticks_off()
    axis.set(xlabel="width", ylabel="memorization, mean of the examples", ylim=(min(-0.05, axis.get_ylim()[0]), 1.05))
    if axis.lines:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def plot_turn_over(report: Report, path: Path) -> None:
    """Histogram of the self-influence."""
    import matplotlib
    from matplotlib.figure import Figure

    table = report.table
    values = table["self_influence"].to_numpy()
    suspect = np.array([value is True for value in table["truth"].to_pylist()])
    canvas = Figure(figsize=(6, 4), layout="constrained", dpi=150)
    groups = [values[~suspect], values[suspect]] if suspect.any() else [values]
    edges = np.histogram_bin_edges(values, bins=25)
    with matplotlib.rc_context(STYLE):
        axis = canvas.subplots()
        draw_counts(axis, edges, [np.histogram(group, edges)[0] for group in groups])
        axis.set(xlabel="self-influence (nats)")
        savefig(canvas, path)
