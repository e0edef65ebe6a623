"""forgetting_events: #{e: right at epoch e, wrong at epoch e + 1}, how often the example was forgotten.

High marks examples that are learned against the rest of the data. 0 is either learned and kept or never learned, and
`ever_learned` says which: a count is never made up for what was not learned.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.tables import column

NEEDS = "trajectory"
RANGE = "0, 1, ..., ⌊E/2⌋"
MEMORIZED = "high"
SOURCE = "arXiv:1812.05159"
NULL = None
COLUMN = column(
    pa.int32(), "falls from right to wrong between epochs, 0 if never learned; high: more memorized", nullable=True
)


def score(correct: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Falls from right to wrong between presentations.

    Args:
        correct: (e, b).

    Returns:
        (b,) whole numbers from 0 to ⌊E/2⌋.
    """
    return np.asarray((correct[:-1] & ~correct[1:]).sum(axis=0), dtype=np.float64)
