"""first_learned: first epoch, from 1, in which the label was predicted; E + 1 if none.

Late marks hard and mislabelled examples. One lucky guess at the start counts, so `learned_forever` orders the tail
better. E + 1 stands for "later than training": never average it over runs of different lengths.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.tables import column

NEEDS = "trajectory"
RANGE = "1, 2, ..., E + 1"
MEMORIZED = "high"
SOURCE = "arXiv:2002.03206"
NULL = None
COLUMN = column(
    pa.int32(),
    "first epoch, from 1, with a right prediction, else one past the last; high: more memorized",
    unit="epoch",
    nullable=True,
)


def score(correct: NDArray[np.bool_]) -> NDArray[np.float64]:
    """min{e: right at e}, or E + 1.

    Args:
        correct: (e, b).

    Returns:
        (b,) whole numbers from 1 to E + 1.
    """
    waiting = np.logical_and.accumulate(~correct, axis=0)  # (e, b) true before the first right one
    return np.asarray(waiting.sum(axis=0) + 1, dtype=np.float64)
