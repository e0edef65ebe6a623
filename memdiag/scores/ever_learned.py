"""ever_learned: whether the label was predicted in any epoch.

False is more suspicious: in all of training the model did not come to believe the label. It says nothing about what the
last weights predict, since an example is judged when it is presented.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.tables import column

NEEDS = "trajectory"
RANGE = "false, true"
MEMORIZED = "low"
SOURCE = "arXiv:1812.05159"
NULL = None
COLUMN = column(pa.bool_(), "whether any epoch predicted the label; low (false): more memorized", nullable=True)


def score(correct: NDArray[np.bool_]) -> NDArray[np.float64]:
    """1 where any epoch is right, else 0.

    Args:
        correct: (e, b).

    Returns:
        (b,) 0 or 1.
    """
    return np.asarray(correct.any(axis=0), dtype=np.float64)
