"""learned_forever: first epoch, from 1, from which on the label was always predicted; E + 1 if the last was wrong.

Late marks examples that are learned last: atypical or mislabelled. E + 1 stands for "later than training", whether the
example was never learned or forgotten at the end: never average it over runs of different lengths.
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
    "first epoch, from 1, after which every prediction is right, else one past the last; high: more memorized",
    unit="epoch",
    nullable=True,
)


def score(correct: NDArray[np.bool_]) -> NDArray[np.float64]:
    """min{e: right at e, e + 1, ..., E}, or E + 1.

    Args:
        correct: (e, b).

    Returns:
        (b,) whole numbers from 1 to E + 1.
    """
    kept = np.logical_and.accumulate(correct[::-1], axis=0)  # from the last epoch back, until one is wrong
    return np.asarray(len(correct) - kept.sum(axis=0) + 1, dtype=np.float64)
