"""suffix_nll_mean: −(1/S) Σ_t log p_t over the S tokens of the suffix, given all tokens before.

Low means that the model goes on from the prefix as the text does: memory, or a continuation that anyone would guess.
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
SOURCE = "arXiv:2202.07646"
NULL = None
COLUMN = column(pa.float64(), "mean loss per token of the suffix; low: more memorized", unit="nat", nullable=True)


def score(logp: NDArray[np.float64], suffix: NDArray[np.bool_]) -> NDArray[np.float64]:
    """−mean log p over the suffix.

    Args:
        logp: (b, t) log p of each token given those before it.
        suffix: (b, t) the tokens of the suffix; none for an example that is too short.

    Returns:
        (b,) in [0, ∞); NaN without a suffix.
    """
    return 0.0 - mean(logp, suffix)  # not -x: 0 stays 0
