"""The headline figures of `memdiag counterfactual`, and what a reader must be warned of. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdiag import agreement
from memdiag import memorization as method
from memdiag.counterfactual_report import FEWEST, INTERPOLATES, MEMORIZED
from memdiag.memorization import Memorization

WIDTH = 0.1  # of an interval, that more models are counted for unless the user names one
TOP = 10
BINS = np.linspace(-1.0, 1.0, 21)

Floats = NDArray[np.float64]


def summary_of(
    hard: Memorization,
    soft: Memorization,
    halves: tuple[Memorization, Memorization] | None,
    models: Sequence[Mapping[str, Any]],
    truth: NDArray[np.bool_] | None,
    ids: Sequence[str],
    labels: Sequence[int | None],
    influence: Mapping[str, Any] | None,
    *,
    width: float | None,
    seed: int,
    subset_ratio: float,
    meta: Mapping[str, Any],
    n_groups: int,
    n_held_out: int,
) -> dict[str, Any]:
    """Everything that the screen shows, as plain values.

    Args:
        hard: of correctness, or of token accuracy.
        soft: of the soft measure.
        halves: of two halves of the models; None: there is one block only.
        models: rows of models.parquet.
        truth: (n,) whether an example is suspect; None: not known.
        ids, labels: (n,).
        influence: counts of pairs; None: nothing is held out.
        width: wanted of the intervals; None: WIDTH.
        seed: of resamples.
    """
    mem = hard.memorization
    known = np.flatnonzero(~np.isnan(mem))
    # among those that every model knows or none, the soft measure tells
    order = known[np.lexsort((-soft.memorization[known], -mem[known]))][:TOP]
    aim = width or WIDTH
    found: dict[str, Any] = {
        "model": meta["model"],
        "data": meta["dataset"]["name"],
        "language": hard.kind != "binary",
        "models": len(models),
        "examples": len(mem),
        "groups": n_groups,
        "held_out": n_held_out,
        "subset_ratio": subset_ratio,
        "way": meta["identity"]["way"],
        "accuracy_in": _over_models(models, "accuracy_in", seed),
        "accuracy_out": _over_models(models, "accuracy_out", seed),
        "test_accuracy": _over_models(models, "test_accuracy", seed) if n_held_out else None,
        "memorization": asdict(agreement.mean(mem, seed=seed)),
        "memorization_soft": asdict(agreement.mean(soft.memorization, seed=seed)),
        "memorized": int((mem[known] >= MEMORIZED).sum()),
        "without_value": len(mem) - len(known),
        "median_width": method.median_width(hard),
        "width_wanted": aim,
        "models_for_width": method.models_needed(hard, len(models), aim),
        "stability": None if halves is None else asdict(method.split_half(*halves)),
        "histogram": np.histogram(np.clip(mem[known], -1, 1), BINS)[0].tolist(),
        "influence": influence,
        "truth": None if truth is None or not truth.any() or truth.all() else _against(truth, hard, soft),
        "seconds": sum(row["seconds"] or 0.0 for row in models),
        "top": [_told(hard, int(i), ids, labels) for i in order],
    }
    found["warnings"] = _warnings(found, hard, truth)
    return found


def _over_models(models: Sequence[Mapping[str, Any]], name: str, seed: int) -> dict[str, Any]:
    values = np.array([np.nan if row[name] is None else row[name] for row in models], dtype=np.float64)
    return asdict(agreement.mean(values, seed=seed))


def _against(truth: NDArray[np.bool_], hard: Memorization, soft: Memorization) -> dict[str, Any]:
    """How well suspects are found, beside what the models make of them."""

    def mean(values: Floats, of: NDArray[np.bool_]) -> float | None:
        kept = values[of & ~np.isnan(values)]
        return float(kept.mean()) if len(kept) else None

    return {
        "n_true": int(truth.sum()),
        "auc": asdict(agreement.auc(hard.memorization, truth)),
        "auc_soft": asdict(agreement.auc(soft.memorization, truth)),
        "auc_p_out": asdict(agreement.auc(-hard.p_out, truth)),
        "found_in_top": asdict(agreement.found_in_top(hard.memorization, truth)),
        "memorization_true": mean(hard.memorization, truth),
        "memorization_other": mean(hard.memorization, ~truth),
        "p_in_true": mean(hard.p_in, truth),
        "p_in_other": mean(hard.p_in, ~truth),
    }


def _told(hard: Memorization, i: int, ids: Sequence[str], labels: Sequence[int | None]) -> dict[str, Any]:
    def value(of: Floats) -> float | None:
        return None if np.isnan(of[i]) else float(of[i])

    return {
        "example_id": ids[i],
        "label": labels[i],
        **{name: value(getattr(hard, name)) for name in ("memorization", "lo", "hi", "p_in", "p_out")},
        "n_in": int(hard.n_in[i]),
        "n_out": int(hard.n_out[i]),
    }


def _warnings(found: Mapping[str, Any], hard: Memorization, truth: NDArray[np.bool_] | None) -> list[str]:
    """One line each."""
    said = []
    known = found["accuracy_in"]["value"]
    suspects = (found["truth"] or {}).get("p_in_true")
    if known is not None and known < INTERPOLATES:
        more = "" if suspects is None else f", {suspects:.0%} of the suspects"
        said.append(
            f"the models have learned {known:.1%} of what they were trained on{more}: memorization is of what was "
            "learned, so a wrong label that was not learned has none; more --epochs or a larger --width learn more"
        )
    if found["models"] < FEWEST:
        said.append(f"{found['models']} models: an example's figure is rough below {FEWEST}; look at the intervals")
    if found["without_value"]:
        said.append(
            f"{found['without_value']} examples have no value, since no model has seen them, or every model has; "
            "more --models give them one"
        )
    return said
