"""extraction_strength_suffix: share of the suffix that greedy decoding emits from the shortest start that suffices.

As `extraction_strength`, within the suffix: 1 exactly if the suffix is extractable from the prefix, 0 if its last token
is missed.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores.extraction_strength import score as strength
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "[0, 1]"
MEMORIZED = "high"
SOURCE = "arXiv:2406.09179"
NULL = None
COLUMN = column(
    pa.float64(), "run of hits at the suffix's end divided by its length; high: more memorized", nullable=True
)


def score(hit: NDArray[np.bool_], suffix: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Length of the run of hits at the suffix's end, divided by its length.

    Args:
        hit: (b, t) whether the most probable token, given the true ones before, is the true one.
        suffix: (b, t) the tokens of the suffix; none for an example that is too short.

    Returns:
        (b,) in [0, 1]; NaN without a suffix.
    """
    return strength(hit, suffix)
