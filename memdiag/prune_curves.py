"""The arms of a pruning experiment: the order in question, its controls, and the cut that is chosen.

Axes: k neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from memdiag.errors import InputError
from memdiag.prune_report import RANKINGS
from memdiag.pruning import Row, choose, counts_of, interval, random_orders, ranking

RANDOM_POINTS = 100  # of each random order; the others are followed neuron by neuron up to MOST_POINTS
MOST_POINTS = 500
SCORES = (
    "memorization", "margin_corrupted", "margin_clean", "margin_heldout", "ablation_corrupted", "ablation_clean",
    "ablation_heldout", "grad_act_corrupted", "grad_act_clean", "grad_act_heldout", "direct_logit", "activation_norm",
    "norm_product", "ipr",
)  # fmt: skip
CurveOf = Callable[[NDArray[np.int64], Sequence[int]], list[Row]]  # (order, counts) -> figures with n_pruned


@dataclass(frozen=True)
class Cut:
    """How many neurons go: the user's own number or share, or what the training data say."""

    n: int | None
    fraction: float | None
    keep_clean: float
    draws: int
    seed: int
    chance: float  # agreement with the corrupted labels where nothing is remembered: 1 / classes
    agreement: str = "train_corrupted_acc"
    most_points: int = MOST_POINTS
    random_points: int = RANDOM_POINTS


@dataclass(frozen=True)
class Arms:
    """Every arm's rows, and the order and cut in question."""

    rows: list[Row]
    order: NDArray[np.int64]  # (k,) the neurons as they go
    chosen: int | None
    rule: str  # how it was chosen


@dataclass(frozen=True, eq=False)
class Found:
    """What one network gave."""

    neurons: list[Row]
    pruning: list[Row]
    dynamics: list[Row]
    filtration: list[Row]
    about: dict[str, Any]  # headline figures, for the metadata
    models: dict[str, Any]  # those to be written: trained, if it was trained here, and, if a cut was chosen, pruned


def run_arms(curve_of: CurveOf, scores: Mapping[str, NDArray[np.float64]], rank_by: str, cut: Cut) -> Arms:
    """Prune along the order in question, then along the controls.

    Args:
        curve_of: figures along an order at some counts.
        scores: name -> (k,), NaN where undefined; `rank_by` and `norm_product` must be there, `ipr` may.
        rank_by: one of RANKINGS.
        cut: how many go.
    Raises:
        InputError: the ranking is undefined for these data, or there are fewer neurons than are to go.
    """
    order = order_by(scores, rank_by)
    n = len(order)
    forced = cut.n if cut.n is not None else None if cut.fraction is None else round(cut.fraction * n)
    if forced is not None and forced > n:
        raise InputError(f"--n is {forced}, but there are {n} neurons to prune")
    main = curve_of(order, counts_of(n, cut.most_points, also=[] if forced is None else [forced]))
    chosen, rule = _chosen(main, forced, cut)
    also = [] if chosen is None else [chosen]
    rows = [_row(row, rank_by, None, n, chosen=row["n_pruned"] == chosen) for row in main]

    controls = {"reversed": order[::-1]}
    controls |= {name: order_by(scores, name) for name in ("norm_product", "ipr") if _is_defined(scores, name)}
    controls.pop(rank_by, None)
    for name, control in controls.items():
        found = curve_of(control, counts_of(n, cut.most_points, also=also))
        rows += [_row(row, name, None, n) for row in found]
    for draw, control in enumerate(random_orders(n, cut.draws, seed=cut.seed)):
        found = curve_of(control, counts_of(n, cut.random_points, also=also))
        rows += [_row(row, "random", draw, n) for row in found]
    return Arms(rows, order, chosen, rule)


def order_by(scores: Mapping[str, NDArray[np.float64]], name: str) -> NDArray[np.int64]:
    """(k,) the neurons in the order in which they go by this score."""
    if not _is_defined(scores, name):
        raise InputError(f"--rank-by {name} is undefined here; the rankings that are not: {', '.join(defined(scores))}")
    return ranking(scores[name], first=cast(Literal["high", "low"], RANKINGS[name]))


def defined(scores: Mapping[str, NDArray[np.float64]]) -> list[str]:
    """The rankings that these scores allow."""
    return [name for name in RANKINGS if _is_defined(scores, name)]


def _is_defined(scores: Mapping[str, NDArray[np.float64]], name: str) -> bool:
    return name in scores and not bool(np.isnan(scores[name]).all())


def _chosen(main: list[Row], forced: int | None, cut: Cut) -> tuple[int | None, str]:
    if forced is not None:
        return forced, f"--n {cut.n}" if cut.n is not None else f"--fraction {cut.fraction}"
    if main[0][cut.agreement] is None or main[0]["train_clean_acc"] is None:
        return None, "none: without a set of corrupted and one of clean examples give --n or --fraction"
    n, at_chance = choose(main, agreement=cut.agreement, chance=cut.chance, keep_clean=cut.keep_clean)
    kept = f"with clean accuracy kept (--keep-clean {cut.keep_clean})"
    if at_chance:
        return n, f"the fewest neurons that leave the corrupted at chance, {kept}"
    if n == 0:
        return None, f"none: no cut leaves less of the corrupted {kept}; lower it, or give --n or --fraction"
    return n, f"not at chance: the least of the corrupted that can be left, {kept}"


def _row(found: Row, order: str, draw: int | None, n_neurons: int, *, chosen: bool = False) -> Row:
    return {
        "order": order,
        "draw": draw,
        "fraction_pruned": found["n_pruned"] / n_neurons,
        "chosen": chosen,
        **found,
    }


def with_intervals(rows: list[Row], counts: Mapping[str, int]) -> list[Row]:
    """The rows with the 95 % intervals of their three accuracies, whose examples `counts` tells."""
    cache: dict[tuple[str, Any], tuple[float | None, float | None]] = {}
    names = {"train_corrupted_acc": "corrupted", "train_clean_acc": "clean", "test_acc": "test"}
    for row in rows:
        for name, group in names.items():
            key = (group, row[name])
            if key not in cache:
                cache[key] = interval(row[name], counts[group])
            row[f"{name}_lo"], row[f"{name}_hi"] = cache[key]
    return rows


def _matched(rows: Sequence[Row], cut: Row, agreement: str, names: Sequence[str]) -> Row | None:
    """The fewest random neurons that leave as little of the corrupted as the cut, and what they cost: means over draws.

    None if it cannot be told, or nothing was taken away.
    """
    if cut.get(agreement) is None or cut["n_pruned"] == 0:
        return None
    random = [row for row in rows if row["order"] == "random"]
    for n in sorted({row["n_pruned"] for row in random}):
        at = [row for row in random if row["n_pruned"] == n]
        if float(np.mean([row[agreement] for row in at])) <= cut[agreement]:
            return {"n_pruned": n, **{name: float(np.mean([row[name] for row in at])) for name in names}}
    return None


def headline(rows: Sequence[Row], rank_by: str, agreement: str = "train_corrupted_acc") -> dict[str, Any]:
    """Before, at the chosen cut, and at the same number of random neurons (mean, 5 % and 95 % of the draws).

    Empty but for `before` where no cut was chosen.
    """
    shown = [
        "train_corrupted_acc", "train_corrupted_exact", "corrupted_true_acc", "train_clean_acc", "test_acc",
        "train_corrupted_loss", "train_clean_loss", "test_loss",
    ]  # fmt: skip
    main = [row for row in rows if row["order"] == rank_by]
    before = {name: main[0][name] for name in shown if main[0].get(name) is not None}
    found: dict[str, Any] = {"before": before}
    cut = next((row for row in main if row["chosen"]), None)
    if cut is None:
        return found
    found["chosen"] = {"n_pruned": cut["n_pruned"], "fraction_pruned": cut["fraction_pruned"]}
    found["chosen"] |= {name: cut[name] for name in before}
    for name in ("norm_product", "reversed"):
        rival = next((r for r in rows if r["order"] == name and r["n_pruned"] == cut["n_pruned"]), None)
        if rival is not None:
            found[name] = {key: rival[key] for key in before}
    found["random_matched"] = _matched(rows, cut, agreement, list(before))
    draws = [row for row in rows if row["order"] == "random" and row["n_pruned"] == cut["n_pruned"]]
    found["random"] = {
        name: dict(zip(("mean", "lo", "hi"), (float(np.mean(v)), *map(float, np.quantile(v, [0.05, 0.95])))))
        for name in before
        for v in [[row[name] for row in draws]]
    }
    found["beyond_random"] = {  # how far the random orders stand above the cut: the effect that is the ranking's own
        name: {key: band[key] - cut[name] for key in ("mean", "lo", "hi")} for name, band in found["random"].items()
    }
    return found


def neuron_rows(
    layers: Sequence[tuple[str, int]], scores: Mapping[str, NDArray[np.float64]], arms: Arms
) -> list[dict[str, Any]]:
    """A row for every neuron but for its seed.

    Args:
        layers: (name of the module that reads them, number of neurons), in the order of the scores.
        scores: name -> (k,), NaN where undefined; null where there is no such score.
        arms: the order and the cut.
    """
    place = np.empty(len(arms.order), dtype=np.int64)
    place[arms.order] = np.arange(1, len(place) + 1)
    rows: list[dict[str, Any]] = []
    for layer, (name, width) in enumerate(layers):
        for neuron in range(width):
            k = len(rows)
            values = {score: float(scores[score][k]) if score in scores else None for score in SCORES}
            is_periodic = values["ipr"] is not None and not np.isnan(values["ipr"])
            rows.append(
                {
                    "seed": None,
                    "layer": layer,
                    "layer_name": name,
                    "neuron": neuron,
                    **values,
                    "frequency": int(scores["frequency"][k]) if is_periodic else None,
                    "dead": bool(scores["dead"][k]),
                    "pruned_at": int(place[k]),
                    "is_memorizer": None if arms.chosen is None else bool(place[k] <= arms.chosen),
                }
            )
    return rows
