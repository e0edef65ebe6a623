"""em_suffix: share of the suffix's tokens that the model ranks first, given the true tokens before (exact match).

1 exactly if greedy decoding from the prefix emits the suffix. Below 1 it is more than what free generation gets right,
since after a slip the truth is fed.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import mean
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "[0, 1]"
MEMORIZED = "high"
SOURCE = "arXiv:2205.10770"
NULL = None
COLUMN = column(pa.float64(), "share of the suffix's tokens that are ranked first; high: more memorized", nullable=True)


def score(hit: NDArray[np.bool_], suffix: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(1/S) Σ_t [argmax p_t = x_t] over the suffix.

    Args:
        hit: (b, t) whether the most probable token, given the true ones before, is the true one.
        suffix: (b, t) the tokens of the suffix; none for an example that is too short.

    Returns:
        (b,) in [0, 1]; NaN without a suffix.
    """
    return mean(hit, suffix)
