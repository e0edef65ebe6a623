"""The headline figures of `memdiag counterfactual`, and what a reader must be warned of. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from memdiag import agreement
from memdiag import memorization as method
from memdiag.agreement import Estimate
from memdiag.counterfactual_report import FEWEST, INTERPOLATES, MEMORIZED, CounterfactualOptions
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
    groups: NDArray[np.int64],
    influence: Mapping[str, Any] | None,
    *,
    n_held_out: int,
    options: CounterfactualOptions,
    meta: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that the screen shows, as plain values.

    Args:
        hard: of correctness, or of token accuracy.
        soft: of the soft measure.
        halves: of two halves of the models; None: there is one block only.
        models: rows of models.parquet.
        truth: (n,) whether an example is suspect; None: not known.
        ids, labels: (n,).
        groups: (n,) whom each shares its coin with, numbered from 0; the most memorized are told once for each.
        influence: counts of pairs; None: nothing is held out.
        options, meta: of the run.
    """
    mem = hard.memorization
    known = np.flatnonzero(~np.isnan(mem))
    # among those that every model knows or none, the soft measure tells
    order = known[np.lexsort((-soft.memorization[known], -mem[known]))]
    order = order[np.sort(np.unique(groups[order], return_index=True)[1])][:TOP]
    aim = options.until_width or WIDTH
    found: dict[str, Any] = {
        "model": meta["model"],
        "data": meta["dataset"]["name"],
        "language": hard.kind != "binary",
        "models": len(models),
        "examples": len(mem),
        "groups": int(groups.max()) + 1,
        "held_out": n_held_out,
        "subset_ratio": options.subset_ratio,
        "way": meta["identity"]["way"],
        "accuracy_in": asdict(_over_models(models, "accuracy_in")),
        "accuracy_out": asdict(_over_models(models, "accuracy_out")),
        "test_accuracy": asdict(_over_models(models, "test_accuracy")) if n_held_out else None,
        "memorization": asdict(_mean_of(mem, models)),
        "memorization_soft": asdict(_plain_mean(soft.memorization[known])),
        "memorized": int(method.at_least(mem, MEMORIZED).sum()),
        "without_value": len(mem) - len(known),
        "median_width": method.median_width(hard),
        "until_width": options.until_width,
        "width_wanted": aim,
        "models_for_width": method.models_needed(hard, len(models), aim),
        "stability": None if halves is None else asdict(method.split_half(*halves)),
        "histogram": np.histogram(np.clip(mem[known], -1, 1), BINS)[0].tolist(),
        "influence": influence,
        "truth": None if truth is None or not truth.any() or truth.all() else _against(truth, hard, soft),
        "seconds": sum(row["seconds"] or 0.0 for row in models),
        "top": [_told(hard, int(i), ids, labels, truth) for i in order],
    }
    found["warnings"] = _warnings(found, hard, truth)
    return found


def noise_floor(models: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What other models of the same run would move the mean of a column by: half-widths at 95 %, which `diff` respects.

    Args:
        models: rows of models.parquet; of fewer than two nothing can be told.
    """
    sides = [(row["accuracy_in"], row["accuracy_out"]) for row in models]
    both = [(a, b) for a, b in sides if a is not None and b is not None]
    values = {
        "memorization": [a - b for a, b in both],
        "p_in": [a for a, _ in sides if a is not None],
        "p_out": [b for _, b in sides if b is not None],
    }
    halves = {name: _half(np.array(found, dtype=np.float64)) for name, found in values.items()}
    return {name: half for name, half in halves.items() if half is not None}


def _over_models(models: Sequence[Mapping[str, Any]], name: str) -> Estimate:
    """The mean over models, with Student's t interval: there may be few."""
    values = np.array([row[name] for row in models if row[name] is not None], dtype=np.float64)
    if not len(values):
        return agreement.UNKNOWN
    value, half = float(values.mean()), _half(values)
    return Estimate(value, None, None, 1) if half is None else Estimate(value, value - half, value + half, len(values))


def _mean_of(mem: Floats, models: Sequence[Mapping[str, Any]]) -> Estimate:
    """Mean memorization, with an interval for other examples and other models.

    The models are the same for all examples, so that more examples do not make up for few models: to the variance of
    a mean over examples comes that of a mean over models of what each knows better in than out.
    """
    known = mem[~np.isnan(mem)]
    sides = [(row["accuracy_in"], row["accuracy_out"]) for row in models]
    apart = np.array([a - b for a, b in sides if a is not None and b is not None], dtype=np.float64)
    if not len(known):
        return agreement.UNKNOWN
    value, of_models = float(known.mean()), _half(apart)
    if len(known) < 2 or of_models is None:
        return Estimate(value, None, None, len(known))
    z = float(stats.norm.ppf((1 + agreement.LEVEL) / 2))
    half = math.hypot(z * float(known.std(ddof=1)) / math.sqrt(len(known)), of_models)
    return Estimate(value, value - half, value + half, len(known))


def _plain_mean(values: Floats) -> Estimate:
    return Estimate(float(values.mean()), None, None, len(values)) if len(values) else agreement.UNKNOWN


def _half(values: Floats) -> float | None:
    """Half of Student's t interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    t = float(stats.t.ppf((1 + agreement.LEVEL) / 2, len(values) - 1))
    return t * float(values.std(ddof=1)) / math.sqrt(len(values))


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


def _told(
    hard: Memorization, i: int, ids: Sequence[str], labels: Sequence[int | None], truth: NDArray[np.bool_] | None
) -> dict[str, Any]:
    def value(of: Floats) -> float | None:
        return None if np.isnan(of[i]) else float(of[i])

    return {
        "example_id": ids[i],
        "label": labels[i],
        "truth": None if truth is None else bool(truth[i]),
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
            f"the models predict {known:.1%} of the tokens that they were trained on: memorization is of what was "
            "learned, and grows with --epochs"
            if found["language"]
            else f"the models have learned {known:.1%} of what they were trained on{more}: memorization is of what was "
            "learned, so a wrong label that was not learned has none; more --epochs, a larger --width, or features of "
            "one scale learn more"
        )
    if found["models"] < FEWEST:
        said.append(f"{found['models']} models: an example's figure is rough below {FEWEST}; look at the intervals")
    if (width := found["until_width"]) is not None and not (found["median_width"] or math.inf) <= width:
        said.append(f"--max-models came before intervals of --until-width {width:g}; more of them go on from here")
    if found["without_value"]:
        said.append(
            f"{found['without_value']} examples have no value, since no model has seen them, or every model has; "
            "more --models give them one"
        )
    return said
