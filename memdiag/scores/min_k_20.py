"""min_k_20: mean log p of the least probable 20 % of the predicted tokens (Min-K% with k = 0.2).

High means that not even the worst tokens surprise the model: a text it has seen. It is less confounded by easy passages
than `nll_mean`, yet a single-model likelihood all the same.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import mean
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "(-∞, 0]"
MEMORIZED = "high"
SOURCE = "arXiv:2310.16789"
NULL = None
COLUMN = column(
    pa.float64(),
    "mean log p of the least probable 20 % of the predicted tokens; high: more memorized",
    unit="nat",
    nullable=True,
)


def score(logp: NDArray[np.float64], scored: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean of the m = max(1, ⌊0.2 T⌋) smallest log p.

    Args:
        logp: (b, t) log p of each token given those before it.
        scored: (b, t) the tokens that are predicted.

    Returns:
        (b,) in (-∞, 0]; NaN without a predicted token.
    """
    return mean_of_lowest(logp, scored, 0.2)


def mean_of_lowest(values: NDArray[np.float64], where: NDArray[np.bool_], share: float) -> NDArray[np.float64]:
    """(b,) mean of the lowest `share` of the (b, t) values that count, at least one; NaN for a row without any."""
    used = np.where(where, values, np.inf)
    m = np.maximum(np.floor(share * where.sum(axis=1)), 1.0)  # (b,) where nothing counts, of one inf: NaN
    lowest = np.arange(used.shape[1]) < m[:, None]
    bad = (np.isnan(values) & where).any(axis=1)  # they would sort behind everything and be passed over
    return np.where(bad, np.nan, mean(np.sort(used, axis=1), lowest))
