"""Reports of `memdiag prune-memorizers`: curves beside their random control, neurons, dynamics, filtration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from memdiag import page_svg, prune_view
from memdiag.page_sections import shown
from memdiag.page_sections.building import MOST_MARKS, MOST_ROWS, Building, Row, floats, quoted, thinned

COLOURS = (page_svg.COLOURS[1], page_svg.COLOURS[0], *page_svg.COLOURS[2:])  # corrupted labels as on every plot
MOST_NETWORKS = 4
MOST_COUNTS = 60  # points of a curve
ACCURACIES = ("train_corrupted_acc", "train_clean_acc", "test_acc")


@contextmanager
def _coloured() -> Iterator[None]:
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context({"axes.prop_cycle": cycler(color=COLOURS)}):
        yield


def _networks(page: Building) -> dict[int | None, Mapping[str, Any]]:
    """What the metadata tells of each network, by seed; None for a checkpoint."""
    told = page.meta.get("networks")
    if not isinstance(told, Sequence) or not told:
        page.note("the metadata does not tell of the networks: cuts and controls are taken from the rows alone")
        return {}
    return {network.get("seed"): network for network in told if isinstance(network, Mapping)}


def _seeds(page: Building) -> list[int | None]:
    """Networks of the report, the first few."""
    found = [seed for (seed,) in page.sql("SELECT DISTINCT seed FROM report ORDER BY 1")]
    if len(found) > MOST_NETWORKS:
        page.note(f"of {len(found)} networks the first {MOST_NETWORKS} are shown")
    return found[:MOST_NETWORKS]


def _name(seed: int | None, networks: Mapping[int | None, Mapping[str, Any]]) -> str:
    network = networks.get(seed, {})
    if seed is None:
        return str(network.get("name", "the checkpoint"))
    phase = network.get("phase")
    return f"seed {seed}" + (f", {shown.words(str(phase))}" if phase else "")


def _where(seed: int | None) -> str:
    return "seed IS NULL" if seed is None else f"seed = {int(seed)}"


# -- pruning -------------------------------------------------------------------------------------------------------


def pruning(page: Building) -> None:
    """For each network: what the chosen cut does beside as many random neurons, and the curves."""
    networks = _networks(page)
    options = page.meta.get("options")
    rank_by = str(options["rank_by"]) if isinstance(options, Mapping) and "rank_by" in options else "memorization"
    cells: list[list[object]] = []
    for seed in _seeds(page):
        name, network = _name(seed, networks), networks.get(seed, {})
        with page.part(f"figures of {name}"):
            cells += _cut(page, seed, name, network, rank_by)
        with page.part(f"curves of {name}"), _coloured():
            _draw_curves(page, seed, name, rank_by)
    header = ("network", "accuracy, loss", "before", "at the cut", "95 % interval", "as many random", "5 to 95 %")
    page.table("At the chosen cut, beside random orders", header, cells)


def _cut(
    page: Building, seed: int | None, name: str, network: Mapping[str, Any], rank_by: str
) -> list[list[object]]:  # fmt: skip
    """Headline figures of the chosen cut; returns lines of a table."""
    chosen = page.sql(f"SELECT n_pruned, fraction_pruned FROM report WHERE {_where(seed)} AND chosen LIMIT 1")
    if not chosen:
        page.note(f"{name}: no cut was chosen" + (f" ({network['rule']})" if network.get("rule") else ""))
        return []
    (n, fraction), random = chosen[0], network.get("random") or {}
    lines: list[list[object]] = []
    for key, label in prune_view.SHOWN.items():
        if key not in page.columns:
            continue
        ends = f"{quoted(f'{key}_lo')}, {quoted(f'{key}_hi')}" if f"{key}_lo" in page.columns else "NULL, NULL"
        found = page.sql(
            f"SELECT {quoted(key)}, {ends} FROM report WHERE {_where(seed)} AND chosen LIMIT 1"
        )  # fmt: skip
        before = page.sql(
            f'SELECT {quoted(key)} FROM report WHERE {_where(seed)} AND n_pruned = 0 AND "order" = ? LIMIT 1',
            (rank_by,),
        )
        value, lo, hi = found[0]
        if value is None:
            continue
        band = random.get(key) or {}
        start = before[0][0] if before else None
        if key in ACCURACIES:
            around = shown.interval(band.get("lo"), band.get("hi"))
            control = f"; random orders: {shown.number(band.get('mean'), 3)}, 5 to 95 %: {around}" if band else ""
            n_of = (network.get("examples") or {}).get(prune_view.LABELS[key])
            about = f"before {shown.number(start, 3)}{control}" + (f"; n = {n_of:,} examples" if n_of else "")
            page.figure(f"Accuracy at the cut, {prune_view.LABELS[key]}, {name}", float(value), lo, hi, about)
        lines.append(
            [
                name,
                label,
                shown.number(start, 3),
                shown.number(value, 3),
                shown.interval(lo, hi) or None,
                shown.number(band.get("mean"), 3),
                shown.interval(band.get("lo"), band.get("hi")) or None,
            ]
        )
    page.figure(
        f"Neurons pruned, {name}", int(n), note=f"{fraction:.1%} of them; {network.get('rule', 'the chosen cut')}"
    )
    return lines


def _draw_curves(page: Building, seed: int | None, name: str, rank_by: str) -> None:
    where = f"FROM report WHERE {_where(seed)} AND \"order\" IN (?, 'random')"
    counts = [n for (n,) in page.sql(f"SELECT DISTINCT n_pruned {where} ORDER BY 1", (rank_by,))]
    kept = {counts[i] for i in thinned(len(counts), MOST_COUNTS)}
    kept |= {n for (n,) in page.sql(f"SELECT n_pruned FROM report WHERE {_where(seed)} AND chosen")}
    names = ("order", "draw", "n_pruned", "fraction_pruned", *ACCURACIES, "chosen")
    wanted = ", ".join(quoted(column) for column in names)
    found = page.sql(
        f"SELECT {wanted} {where} AND n_pruned IN ({', '.join(map(str, kept))}) ORDER BY n_pruned", (rank_by,)
    )
    rows = [dict(zip(names, row)) for row in found]
    main = [row for row in rows if row["order"] == rank_by]
    if not main:
        page.note(f"{name}: no row has the order {rank_by}")
        return
    n_neurons = round(max(row["n_pruned"] for row in rows) / max(max(row["fraction_pruned"] for row in rows), 1e-12))
    canvas = page_svg.new_figure(7.2, 3.5)
    prune_view.draw_curves(canvas.subplots(), rows, rank_by, n_neurons)
    cut, told = next((row for row in main if row["chosen"]), None), []
    for key, label in prune_view.LABELS.items():
        if main[0][key] is not None:
            end = f" to {cut[key]:.2f}" if cut is not None and cut[key] is not None else ""
            told.append(f"{label} from {main[0][key]:.2f}{end}")
    at = f" at the cut of {cut['n_pruned']} of {n_neurons} neurons" if cut is not None else ""
    alt = (
        f"Accuracy against the share of neurons pruned{at}: {', '.join(told)}; the bands of random orders beside them."
    )
    page.plot(
        canvas, alt, f"{name}: accuracy as neurons go, {rank_by} first; dotted with band: random orders, 5 to 95 %."
    )


# -- neurons -------------------------------------------------------------------------------------------------------


def neurons(page: Building) -> None:
    """How many memorize, where they lie, how periodic they are, and which go first."""
    networks = _networks(page)
    for seed in _seeds(page):
        name = _name(seed, networks)
        with page.part(f"figures of {name}"):
            n, known, many, dead = page.one(
                "SELECT count(*), count(is_memorizer), count(*) FILTER (WHERE is_memorizer), count(*) FILTER "
                "(WHERE dead) "
                f"FROM report WHERE {_where(seed)}"
            )
            about = f"{shown.share(many, n)} of {n:,}" + (f", {dead:,} dead" if dead else "")
            page.figure(f"Memorizers, {name}", many if known else None, note=about)
            if not known:
                page.note(f"{name}: no cut was chosen, so that no neuron counts as a memorizer")
        with page.part(f"plots of {name}"), _coloured():
            _draw_neurons(page, seed, name)
    with page.part("memorizers by layer"):
        rows = page.sql(
            "SELECT seed, layer, any_value(layer_name), count(*), count(*) FILTER (WHERE is_memorizer), "
            "avg(memorization) "
            "FROM report GROUP BY 1, 2 ORDER BY 1, 2"
        )
        header = ("network", "layer", "its reader", "neurons", "memorizers", "memorization, mean (logits)")
        page.table("Memorizers by layer", header, [[_name(s, networks), *rest] for s, *rest in rows])
    with page.part("the neurons that go first"):
        names = ("seed", "pruned_at", "layer", "neuron", "memorization", "margin_corrupted", "margin_clean", "ipr")
        found = page.sql(f"SELECT {', '.join(names)} FROM report WHERE pruned_at <= 12 ORDER BY 1, 2")
        heads = ("network", "goes", "layer", "neuron", "memorization", "margin, corrupted", "margin, clean", "IPR")
        page.table("The neurons that go first", heads, [[_name(s, networks), *rest] for s, *rest in found])


def _draw_neurons(page: Building, seed: int | None, name: str) -> None:
    """IPR of a periodic task, and memorization in the order of pruning."""
    found = page.sql(
        f"SELECT pruned_at, memorization, ipr, is_memorizer FROM report WHERE {_where(seed)} "
        "AND memorization IS NOT NULL ORDER BY 1"
    )
    if not found:
        page.note(f"{name}: no neuron has a value of memorization")
        return
    some = [found[i] for i in thinned(len(found), MOST_MARKS)]
    (has_ipr,) = page.one(f"SELECT count(ipr) FROM report WHERE {_where(seed)}")
    canvas = page_svg.new_figure(7.2, 2.9)
    axes = canvas.subplots(1, 2 if has_ipr else 1, squeeze=False)[0]
    for which, label, colour in ((True, "pruned", "C0"), (False, "kept", "C1"), (None, "neurons", "C1")):
        mine = [(at, value) for at, value, _, memorizes in some if memorizes is which]
        if mine:
            axes[0].plot(*zip(*mine), ".", color=colour, label=label)
    axes[0].axhline(0, color=page_svg.MUTED, linewidth=0.8)
    axes[0].set(xlabel="place in the order of pruning", ylabel="memorization (logits)")
    axes[0].legend(markerscale=2)
    if has_ipr:
        rows = page.sql(
            f"SELECT ipr, is_memorizer FROM report WHERE {_where(seed)} ORDER BY hash(layer, neuron), layer, neuron "
            f"LIMIT {MOST_ROWS}"
        )
        if len(found) > MOST_ROWS:
            page.note(f"{name}: the histogram is of {MOST_ROWS:,} of {len(found):,} neurons")
        prune_view.draw_ipr(axes[1], [dict(zip(("ipr", "is_memorizer"), row)) for row in rows])
    values = [value for _, value, *_ in found]
    alt = (
        f"Memorization of {len(found):,} neurons in the order of pruning, from {shown.number(max(values))} to "
        f"{shown.number(min(values))} logits"
    )
    if has_ipr:
        high, low = page.one(f"SELECT count(*) FILTER (WHERE ipr >= 0.5), count(ipr) FROM report WHERE {_where(seed)}")
        alt += f"; histogram of the inverse participation ratio, {high:,} of {low:,} at 0.5 or above"
    page.plot(
        canvas, f"{alt}.", f"{name}: how much each neuron memorizes" + (", and how periodic it is." if has_ipr else ".")
    )


# -- dynamics and filtration ---------------------------------------------------------------------------------------


def dynamics(page: Building) -> None:
    """Accuracies and mean IPR of each network while it trained."""
    networks = _networks(page)
    names = ("seed", "step", *ACCURACIES, "mean_ipr", "phase", "train_loss", "weight_norm")
    cells: list[list[object]] = []
    for seed in _seeds(page):
        name = f"seed {seed}"
        with page.part(f"the curves of {name}"), _coloured():
            wanted = ", ".join(quoted(column) for column in names)
            rows: list[Row] = [
                dict(zip(names, row))
                for row in page.sql(f"SELECT {wanted} FROM report WHERE {_where(seed)} ORDER BY step")
            ]
            last = rows[-1]
            cells.append(
                [name, last["step"], *(last[key] for key in ACCURACIES), last["mean_ipr"], shown.words(last["phase"])]
            )
            page.figure(f"Phase at the end, {name}", shown.words(last["phase"]), note=f"step {last['step']:,}")
            canvas = page_svg.new_figure(7.2, 3.2)
            prune_view.draw_dynamics(canvas.subplots(), [rows[i] for i in thinned(len(rows), 300)])
            told = ", ".join(
                f"{label} {rows[0][key]:.2f} to {last[key]:.2f}"
                for key, label in prune_view.LABELS.items()
                if last[key] is not None and rows[0][key] is not None
            )
            alt = f"Accuracies over {last['step']:,} steps: {told}; the network ends in {shown.words(last['phase'])}."
            page.plot(canvas, alt, f"{_name(seed, networks)}: agreement with the recorded labels while training.")
    header = ("network", "step", "corrupted", "clean", "test", "mean IPR", "phase")
    page.table("At the end of training", header, cells)


def filtration(page: Building) -> None:
    """What the strongest frequencies do alone, and what the rest does."""
    names = ("seed", "part", "train_corrupted_acc", "corrupted_true_acc", "train_clean_acc", "test_acc")
    rows = page.records(columns=names)
    what = {"whole": "whole", "dominant": "strongest frequency alone", "remainder": "all the others"}
    labels = {"train_corrupted_acc": "corrupted", "corrupted_true_acc": "corrupted, true label",
              "train_clean_acc": "clean", "test_acc": "test"}  # fmt: skip
    if not any(row[key] is not None for row in rows for key in labels):
        page.note("no part of a network has an accuracy")
        return
    parts = list(dict.fromkeys(row["part"] for row in rows))
    for part in parts:
        known = floats([row for row in rows if row["part"] == part and row["test_acc"] is not None], "test_acc")
        if len(known) > 1:
            around = f"mean of n = {len(known)} networks, from {known.min():.3f} to {known.max():.3f}; no interval"
            page.figure(f"Test accuracy, {what.get(part, part)}", float(known.mean()), note=around)
        elif len(known):
            page.figure(f"Test accuracy, {what.get(part, part)}", float(known[0]), note="one network, no interval")
    canvas = page_svg.new_figure(7.2, 2.8)
    axis = canvas.subplots()
    for i, (key, label) in enumerate(labels.items()):
        for j, part in enumerate(parts):
            values = floats([row for row in rows if row["part"] == part], key)
            at = j + (i - 1.5) * 0.17
            axis.plot(
                [at] * len(values), values, "o", color=f"C{i}", alpha=0.5, markersize=4, label=label if j == 0 else None
            )
            if np.isfinite(values).any():
                axis.plot([at - 0.06, at + 0.06], [np.nanmean(values)] * 2, color=f"C{i}", linewidth=2)
    axis.set_xticks(range(len(parts)), [what.get(part, part) for part in parts])
    axis.set(ylabel="accuracy", ylim=(-0.03, 1.03))
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    told = "; ".join(
        f"{what.get(part, part)}: "
        + ", ".join(f"{label} {_mean(rows, part, key)}" for label, key in (("corrupted", "train_corrupted_acc"),
                                                                          ("test", "test_acc")))
        for part in parts
    )  # fmt: skip
    n = len({row["seed"] for row in rows})
    many = f"{n} networks, dash: their mean" if n > 1 else "one network"
    over = f"mean over {n} networks" if n > 1 else "one network"
    page.plot(canvas, f"Accuracy of parts, {over}: {told}.", f"Accuracy of parts of the network; dots: {many}.")
    header = ("network", "part", *labels.values())
    page.table(
        "Accuracy of parts",
        header,
        [[f"seed {r['seed']}", what.get(r["part"], r["part"]), *(r[k] for k in labels)] for r in rows],
    )


def _mean(rows: Sequence[Row], part: object, key: str) -> str:
    """Over the networks that have a value; – if none has."""
    known = [row[key] for row in rows if row["part"] == part and row[key] is not None]
    return shown.number(sum(known) / len(known)) if known else shown.NOTHING
