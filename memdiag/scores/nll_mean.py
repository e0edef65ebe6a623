"""nll_mean: −(1/T) Σ_t log p_t, the mean loss of the example's T predicted tokens.

Low means that the model expects the text. That is memory or ease: common, repetitive text is expected without having
been seen. `ref_delta` and `min_k_20` correct for ease in part.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import mean
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "[0, ∞)"
MEMORIZED = "low"
SOURCE = "arXiv:1709.01604"
NULL = None
COLUMN = column(pa.float64(), "mean loss per predicted token; low: more memorized", unit="nat", nullable=True)


def score(logp: NDArray[np.float64], scored: NDArray[np.bool_]) -> NDArray[np.float64]:
    """−mean log p over the predicted tokens.

    Args:
        logp: (b, t) log p of each token given those before it.
        scored: (b, t) the tokens that are predicted.

    Returns:
        (b,) in [0, ∞); NaN without a predicted token.
    """
    return 0.0 - mean(logp, scored)  # not -x: 0 stays 0
