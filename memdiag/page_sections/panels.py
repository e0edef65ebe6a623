"""Small multiples: a panel for each column, and a line for each of some figures with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag import page_svg, score_view, tables
from memdiag.page_sections import shown
from memdiag.page_sections.building import Building, quoted
from memdiag.page_text import drawable

ACROSS = 4
BINS = score_view.BINS
TOLD = 3  # panels whose medians the text of a plot tells
TAIL = 0.005  # share at either end that a long tail is cut at


def distributions(
    page: Building, names: Sequence[str], truth: str | None = None, caption: str = "", marked: str = "suspect"
) -> None:
    """A histogram of each column, marked rows apart if the report says which are; long tails are cut.

    A column that is the same in every row is told in a note.

    Args:
        page: to add to.
        names: of columns of numbers or truth values.
        truth: a column of truth values.
        caption: what is said below; None: what they are.
        marked: what a row is whose truth is true.
    """
    found = {name: spread for name in names if (spread := edges_of(page, name)) is not None}
    same = [name for name, (edges, _) in found.items() if is_constant(page, name)]
    if same:
        page.note(f"the same in every row that has a value, so not drawn: {shown.listed(same)}")
    found = {name: spread for name, spread in found.items() if name not in same}
    if not found:
        return
    lines = -(-len(found) // ACROSS)
    canvas = page_svg.new_figure(7.2, 0.35 + 1.45 * lines)
    axes = canvas.subplots(lines, min(ACROSS, len(found)), squeeze=False).ravel()
    colours, cut = page_svg.COLOURS[:2], []
    for axis, (name, (edges, is_cut)) in zip(axes, found.items()):
        counts = page.histogram(name, edges, truth)
        groups: Mapping[str, NDArray[np.int64]] = {
            "all": sum(counts.values(), np.zeros(len(edges) - 1, dtype=np.int64))
        }
        if truth is not None:
            nothing = np.zeros(len(edges) - 1, dtype=np.int64)
            groups = {"others": counts.get(False, nothing), marked: counts.get(True, nothing)}
        score_view.draw_distribution(axis, edges, {drawable(label): of for label, of in groups.items()}, colours)
        axis.set_title(name, fontsize=8.5)
        axis.tick_params(labelsize=7.5)
        axis.set_yticks([])
        axis.locator_params(axis="x", nbins=3)
        cut += [name] * is_cut
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    if truth is not None:
        axes[0].legend(fontsize=7.5)
    what = f"shares of examples marked {marked} and of the others" if truth is not None else "shares of the rows"
    tails = f"; the outermost bars of {shown.listed(cut, 3)} hold all that lies beyond" if cut else ""
    told = [_seen(page, name, truth, marked) for name in list(found)[:TOLD]]
    more = f", and {len(found) - TOLD:,} more" if len(found) > TOLD else ""
    alt = f"{shown.counted(len(found), 'histogram')} of {page.count():,} rows; medians: {'; '.join(told)}{more}."
    page.plot(
        canvas,
        alt,
        f"{caption or 'Distributions'}: {what}, heights not comparable between panels{tails}.",
        dense=len(found) > 2,
    )


def edges_of(page: Building, name: str) -> tuple[NDArray[np.float64], bool] | None:
    """(BINS + 1,) edges for a column, and whether tails were cut off; None where it has no value."""
    column = f"CAST({quoted(name)} AS DOUBLE)"
    # exact quantiles: approximate ones depend on which thread is first, and the page with them
    low, high, ends = page.one(
        f"SELECT min({column}), max({column}), quantile_cont({column}, [{TAIL}, {1 - TAIL}]) FROM report "
        f"WHERE isfinite({column})"
    )
    if low is None:
        return None
    lower, upper = ends
    is_cut = 0 < upper - lower < (high - low) / 3
    start, stop = (lower, upper) if is_cut else (low, high)
    if not np.isfinite(stop - start):
        return None
    return np.histogram_bin_edges(np.array([start, stop]), bins=BINS), is_cut


def is_constant(page: Building, name: str) -> bool:
    """Whether all that a column has are one value."""
    column = f"CAST({quoted(name)} AS DOUBLE)"
    low, high = page.one(f"SELECT min({column}), max({column}) FROM report WHERE isfinite({column})")
    return bool(low == high)


def _seen(page: Building, name: str, truth: str | None, marked: str) -> str:
    """The median of a column, of truth values the share; of the marked rows and the others if it is known which."""
    column = f"CAST({quoted(name)} AS DOUBLE)"
    is_rate = pa.types.is_boolean(tables.read_schema(page.path).field(name).type)
    middle, name = (f"avg({column})", f"{name} (share)") if is_rate else (f"quantile_cont({column}, 0.5)", name)
    known = f"FROM report WHERE isfinite({column})"
    if truth is None:
        return f"{name} {shown.number(page.one(f'SELECT {middle} {known}')[0])}"
    own, others = page.one(
        f"SELECT {middle} FILTER (WHERE {quoted(truth)}), {middle} FILTER (WHERE NOT {quoted(truth)}) {known}"
    )
    return f"{name} {shown.number(own)} of {marked}, {shown.number(others)} of the others"


@dataclass(frozen=True)
class Strip:
    """One line of `strips`: a figure with its interval, and what it stands beside."""

    label: str
    value: float | None
    lo: float | None = None
    hi: float | None = None
    low: float | None = None  # the band that counts as holding; None: no limit on this side
    high: float | None = None
    paper: float | None = None
    control: float | None = None
    good: bool | None = None


def strips(found: Sequence[Strip], *, zero: bool = False) -> Any:
    """A line for each figure on a scale of its own, since they have different units; returns the figure.

    Args:
        found: at most some forty.
        zero: whether 0 is marked.
    """
    canvas = page_svg.new_figure(7.2, 0.5 + 0.42 * len(found))
    axes = canvas.subplots(len(found), 1, squeeze=False).ravel()
    blue, orange, green, *_ = page_svg.COLOURS
    for axis, strip in zip(axes, found):
        marks = (strip.value, strip.lo, strip.hi, strip.low, strip.high, strip.paper, strip.control)
        known = [mark for mark in (*marks, *([0.0] if zero else [])) if mark is not None and np.isfinite(mark)]
        if known:
            room = 0.08 * (max(known) - min(known)) or max(abs(known[0]) * 0.1, 0.1)
            axis.set_xlim(min(known) - room, max(known) + room)
        left, right = axis.get_xlim()
        if strip.low is not None or strip.high is not None:
            start = left if strip.low is None else strip.low
            stop = right if strip.high is None else strip.high
            axis.axvspan(start, max(stop, start + 0.004 * (right - left)), color=green, alpha=0.18, linewidth=0)
        if zero:
            axis.axvline(0, color=page_svg.MUTED, linewidth=0.8)
        if strip.paper is not None:
            axis.axvline(strip.paper, color=page_svg.INK, linewidth=1.2, linestyle=":")
        if strip.control is not None:
            axis.plot(strip.control, 0, "x", color=page_svg.MUTED, markersize=5)
        colour = orange if strip.good is False else blue
        if strip.lo is not None and strip.hi is not None:
            axis.plot([strip.lo, strip.hi], [0, 0], color=colour, linewidth=2.2, solid_capstyle="butt")
        if strip.value is not None:
            axis.plot(strip.value, 0, "o", color=colour, markersize=5)
        axis.set_ylim(-1, 1)
        axis.set_yticks([0], [strip.label if len(strip.label) <= 34 else f"{strip.label[:33]}…"])
        axis.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=page_svg.INK)
        axis.tick_params(axis="x", labelsize=7, length=2, pad=1)
        axis.locator_params(axis="x", nbins=5)
        axis.spines["left"].set_visible(False)
    return canvas


def draw_density(canvas: Any, axis: Any, counts: Any, extent: tuple[float, float, float, float]) -> None:
    """A two-dimensional histogram as a picture with its log scale beside it; empty cells (NaN) are left open."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.ticker import NullFormatter

    most = float(np.nanmax(counts)) if np.isfinite(counts).any() else 1.0
    norm = LogNorm(1, max(most, 2.0))
    colours = ListedColormap(colormaps["viridis"](np.linspace(0.3, 0.9, 64)))  # seen on white and on black
    image = axis.imshow(
        counts, origin="lower", aspect="auto", extent=extent, norm=norm, cmap=colours, interpolation="nearest"
    )
    scale = canvas.colorbar(image, ax=axis, label="examples", shrink=0.8, format="{x:,.0f}")
    scale.ax.yaxis.set_minor_formatter(NullFormatter())
