"""n_at_p90: samples needed until the suffix has come out with probability 9/10: ⌈log(1 − p) / log(1 − p_z)⌉.

As `n_at_p50`, for a patient adversary; about 3.3 times that number.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores.logp_suffix_top40 import score as logp
from memdiag.scores.n_at_p50 import tries
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "1, 2, ..."
MEMORIZED = "low"
SOURCE = "arXiv:2410.19482"
NULL = "least"
COLUMN = column(
    pa.float64(),
    "top-40 samples until the suffix came out with probability 0.9, null if never; low: more memorized",
    unit="sample",
    nullable=True,
)


def score(logp_top40: NDArray[np.float64], suffix: NDArray[np.bool_]) -> NDArray[np.float64]:
    """n such that 1 − (1 − p_z)ⁿ >= 9/10.

    Args:
        logp_top40: (b, t) log p of each token among the 40 most probable ones; −inf if it is none of them.
        suffix: (b, t) the tokens of the suffix; none for an example that is too short.

    Returns:
        (b,) whole numbers >= 1; NaN without a suffix, where p_z = 0, or beyond a double.
    """
    return tries(logp(logp_top40, suffix), 0.9)
