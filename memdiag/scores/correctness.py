"""correctness: share of the epochs in which the label was predicted when the example was presented.

Low means learned late, forgotten in between, or never learned; `forgetting_events` and `first_learned` tell these
apart. Few epochs give few levels and many ties.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.tables import column

NEEDS = "trajectory"
RANGE = "[0, 1]"
MEMORIZED = "low"
SOURCE = "arXiv:2009.10795"
NULL = None
COLUMN = column(pa.float64(), "share of the epochs with a right prediction; low: more memorized", nullable=True)


def score(correct: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(1/E) Σ_e [argmax z_e = y].

    Args:
        correct: (e, b).

    Returns:
        (b,) in [0, 1].
    """
    return np.asarray(correct.mean(axis=0))
