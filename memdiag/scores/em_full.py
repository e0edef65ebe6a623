"""em_full: share of the predicted tokens that the model ranks first, given the true tokens before (exact match).

High means that the model could say the text, with a helping hand after every slip. Ordinary text reaches a third; it
is not the share that comes out in free generation, which is far lower.
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
COLUMN = column(
    pa.float64(), "share of the predicted tokens that are ranked first; high: more memorized", nullable=True
)


def score(hit: NDArray[np.bool_], scored: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(1/T) Σ_t [argmax p_t = x_t].

    Args:
        hit: (b, t) whether the most probable token, given the true ones before, is the true one.
        scored: (b, t) the tokens that are predicted.

    Returns:
        (b,) in [0, 1]; NaN without a predicted token.
    """
    return mean(hit, scored)
