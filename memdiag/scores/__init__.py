"""Scores: one number per example, one file per score; the file's name is the score's name.

A score is a module of this package with

    NEEDS      what must be at hand: "checkpoint" (one is enough, forward passes), "gradients" (one is enough, backward
               passes), "checkpoints" (several of a run), "trajectory" (logits of every epoch), "reference" (two models)
    RANGE      in words
    MEMORIZED  the end of the range that is more memorized: "high", "low", or None where there is none
    SOURCE     the paper
    NULL       "most" or "least": how a null ranks that is the limit of the formula and not a lack of data; else None
    COLUMN     the report's column, made by `tables.column`
    score      a pure function of NumPy arrays -> (b,) float64, NaN where undefined, never infinite

The names of `score`'s parameters say what has to be observed. All are float64 unless said.

    one checkpoint   logits (b, k), labels (b,) int64; gradient_norm, last_layer_gradient_norm and input_gradient_norm
                     (b,); probes (l, b) int64: the class that the probe of each layer predicts; predicted (b,) int64
    checkpoints      learning_rates (c,), gradient_norms, input_gradient_norms, input_hessian_traces (c, b)
    trajectory       label_logit, other_logit, logsumexp (e, b), correct (e, b) bool
    language model   logp, logp_top40, z, reference_logp (b, t), hit, scored, suffix (b, t) bool, zlib_bytes (b,)

There is at least one class, checkpoint and epoch; there may be no example (b = 0) and no token (t = 0). Entries that
`scored` and `suffix` leave out are never read. Every example is scored by itself: its neighbours do not matter.

Axes: b example, k class, l layer, c checkpoint, e epoch, t token. Needs no torch.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import Field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdiag import errors

CLASSIFIER = (
    "loss",
    "margin",
    "confidence",
    "el2n",
    "grand",
    "last_layer_grand",
    "input_grad_norm",
    "prediction_depth",
    "loss_curvature",
)
TRAJECTORY = (
    "aum",
    "aum_early",
    "cartography_confidence",
    "cartography_variability",
    "correctness",
    "csl",
    "csg",
    "tracin_self",
    "forgetting_events",
    "ever_learned",
    "first_learned",
    "learned_forever",
)
LANGUAGE = (
    "nll_mean",
    "nll_sum",
    "suffix_nll_mean",
    "em_full",
    "em_suffix",
    "extraction_strength",
    "extraction_strength_suffix",
    "match_prefix_len",
    "extractable",
    "logp_suffix_t1",
    "logp_suffix_top40",
    "n_at_p50",
    "n_at_p90",
    "min_k_20",
    "min_kpp_20",
    "zlib_len",
    "zlib_ratio",
    "gradnorm",
)
REFERENCE = ("ref_delta", "ez_score", "ez_no_error")
NAMES = CLASSIFIER + TRAJECTORY + LANGUAGE + REFERENCE


def load(name: str) -> ModuleType:
    """The module of a score.

    Raises:
        InputError: there is no score of this name.
    """
    if name not in NAMES:
        raise errors.unknown("score", name, NAMES)
    return importlib.import_module(f"{__name__}.{name}")


def columns(names: Iterable[str]) -> dict[str, Field[Any]]:
    """The report's columns by the scores' names, in the order given; errors as `load`."""
    return {name: load(name).COLUMN for name in names}


def needs(names: Iterable[str]) -> set[str]:
    """The names of the arrays that these scores are computed from; errors as `load`."""
    return {array for name in names for array in inspect.signature(load(name).score).parameters}


def oriented(name: str, values: NDArray[np.float64], defined: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The values turned so that higher is more memorized, for ranks.

    Args:
        name: a score.
        values: (b,) as `score` returns them.
        defined: (b,) whether the example has what the score is about, for example a suffix.

    Returns:
        (b,) the sign is turned where "low" is memorized. A NaN of an example that has what the score is about is
        +inf or -inf where the score's NULL says "most" or "least"; every other NaN stays. Of a score without
        orientation the values as they are.

    Raises:
        InputError: as `load`.
    """
    module = load(name)
    if module.MEMORIZED is None:
        return values
    turned = -values if module.MEMORIZED == "low" else values
    if module.NULL is None:
        return turned
    limit = np.inf if module.NULL == "most" else -np.inf
    return np.where(np.isnan(values) & defined, limit, turned)
