"""What is looked at in a trained network beyond accuracy: pruning curves, attribution, frequencies, gains.

Axes: k neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from memdiag import fourier, grokking, prune_modular, pruning
from memdiag.models.mlp import MLP
from memdiag.modular import Pairs
from memdiag.prune_curves import order_by
from memdiag.pruning import Examples, Readout, Row

FORGOTTEN = 0.05  # less agreement than this with the corrupted labels, and they are gone
KEPT = 0.99
DRAWS = 20  # random orders
POINTS = 100  # of a pruning curve: every fifth of 500 neurons
PERCENTS = (10, 20, 30, 50, 83)  # shares pruned that claims are about
UP_TO = 83  # per cent of the neurons: so many are said to be dispensable


def pruning_curves(model: MLP, pairs: Pairs) -> dict[str, float | None]:
    """Figures of pruning by IPR from either end, by three contrasts, without contrast, and by the norm baseline."""
    scores, examples = prune_modular.attribute(model, pairs)
    orders = {
        "ipr": order_by(scores, "ipr"),
        "ipr_reversed": order_by(scores, "ipr")[::-1],
        "margin": order_by(scores, "memorization"),
        "ablation": order_by(scores, "ablation"),
        "direct_logit": order_by(scores, "direct_logit"),
        "ablation_corrupted": order_by(scores, "ablation_corrupted"),
        "norm": order_by(scores, "norm_product"),
    }
    readout, found = _readout(model, pairs, examples), dict[str, float | None]()
    for name, order in orders.items():
        for key, value in along(_curve(readout, order)).items():
            found[f"{name}_{key}"] = value
    return found


def random_curves(model: MLP, pairs: Pairs) -> dict[str, float | None]:
    """The same of random orders, the mean over DRAWS of them: the control, which the paper lacks."""
    readout = _readout(model, pairs, prune_modular.attribute(model, pairs)[1])
    orders = pruning.random_orders(model.config.widths[1], DRAWS, seed=0)
    found = [along(_curve(readout, order)) for order in orders]
    return {f"random_{key}": float(np.mean([draw[key] for draw in found])) for key in found[0]}


def _readout(model: MLP, pairs: Pairs, examples: Examples) -> Readout:
    return Readout(grokking.activations(model, pairs.operands), grokking.weights_of(model)[1], None, examples)


def _curve(readout: Readout, order: NDArray[np.int64]) -> list[Row]:
    n = len(order)
    counts = pruning.counts_of(n, POINTS, also=[round(n * percent / 100) for percent in PERCENTS])
    return pruning.curve(readout, order, counts)


def along(rows: Sequence[Row]) -> dict[str, float]:
    """What claims say about one pruning curve.

    Returns:
        needs: the fewest neurons without which agreement with the corrupted labels is below FORGOTTEN, and share, of
        all; test_at_20, corrupted_at_20, …: at PERCENTS; worst_test: the least test accuracy up to UP_TO per cent;
        best_test; kept: the most neurons that can go, of those looked at, with a test accuracy of KEPT.
    """
    n = rows[-1]["n_pruned"]
    gone = [row["n_pruned"] for row in rows if row["train_corrupted_acc"] < FORGOTTEN]
    needs = gone[0] if gone else n
    found = {"needs": float(needs), "share": needs / n}
    for percent in PERCENTS:
        at = next(row for row in rows if row["n_pruned"] == round(n * percent / 100))
        found[f"test_at_{percent}"] = at["test_acc"]
        found[f"corrupted_at_{percent}"] = at["train_corrupted_acc"]
    found["worst_test"] = min(row["test_acc"] for row in rows if row["n_pruned"] <= round(n * UP_TO / 100))
    found["best_test"] = max(row["test_acc"] for row in rows)
    found["kept"] = float(max((row["n_pruned"] for row in rows if row["test_acc"] >= KEPT), default=0))
    return found


def attribution_aucs(model: MLP, pairs: Pairs) -> dict[str, float | None]:
    """How well each score tells neurons that are not periodic (IPR < 0.5) from those that are; dead ones left out."""
    scores, _ = prune_modular.attribute(model, pairs)
    alive = ~np.isnan(scores["ipr"])
    is_memorizer = scores["ipr"][alive] < fourier.HIGH
    n_corrupted = int(pairs.corrupted[: pairs.n_train].sum())
    share = n_corrupted / pairs.n_train
    in_train = share * scores["ablation_corrupted"] + (1 - share) * scores["ablation_clean"]
    rivals = {
        "margin": scores["memorization"],
        "direct_logit": scores["direct_logit"],
        "ablation": scores["ablation"],
        "ablation_heldout": in_train - scores["ablation_heldout"],
        "grad_act": scores["grad_act"],
        "grad_act_corrupted": scores["grad_act_corrupted"],
        "ablation_corrupted": scores["ablation_corrupted"],
        "activation_norm": scores["activation_norm"],
        "norm_product": -scores["norm_product"],
    }
    return {f"auc_{name}": auc(score[alive], is_memorizer) for name, score in rivals.items()}


def auc(score: NDArray[np.float64], positive: NDArray[np.bool_]) -> float | None:
    """P(score of a positive > score of a negative) + ½ P(equal); None where there are not both.

    Args:
        score: (k,); positive: (k,).
    """
    n, m = int(positive.sum()), int((~positive).sum())
    if n == 0 or m == 0:
        return None
    return float((stats.rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * m))


def filtration(model: MLP, pairs: Pairs) -> dict[str, float | None]:
    """Accuracies of the strongest frequencies alone, and of what they leave."""
    _, examples = prune_modular.attribute(model, pairs)
    rows = prune_modular.filter_frequencies(model, pairs, examples)
    return {f"{row['part']}_{name}": value for row in rows for name, value in row.items() if name != "part"}


def gain(model: MLP, pairs: Pairs) -> dict[str, float | None]:
    """Does the gain of the norm after the activation, |γ_k|, tell periodic neurons from the others?"""
    gamma = model.get_parameter("layers.norm_1.weight").detach().double().abs().numpy()
    ipr = fourier.ipr(*grokking.curves(model, pairs.operation)).numpy()
    alive = ~np.isnan(ipr)
    gamma, ipr = gamma[alive], ipr[alive]
    high, low = ipr >= fourier.HIGH, ipr < fourier.low_below(pairs.p)
    known = bool(high.any() and low.any())
    return {
        "gain_pearson": float(np.corrcoef(ipr, gamma)[0, 1]) if known else None,
        "gain_ratio": float(np.median(gamma[high]) / np.median(gamma[low])) if known else None,
        "gain_auc": auc(gamma, high),
    }


def natural_order(model: MLP, pairs: Pairs) -> dict[str, float | None]:
    """Mean IPR with the residues in their natural order, in which a product is not periodic."""
    return {"natural_ipr": grokking.mean_ipr(model, "addition")}


LOOKS: dict[str, Callable[[MLP, Pairs], dict[str, float | None]]] = {
    "pruning": pruning_curves,
    "random": random_curves,
    "attribution": attribution_aucs,
    "filtration": filtration,
    "gain": gain,
    "natural_order": natural_order,
}
