"""logp_suffix_top40: log p_z, the log probability that one sample among the 40 best tokens is the suffix.

The same as `logp_suffix_t1` for the sampling that people use; never below it, but null where a token of the suffix is
not among the 40 best, so that such a sample cannot give the suffix at all. In a ranking that null is the least
memorized.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import total
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "(-∞, 0]"
MEMORIZED = "high"
SOURCE = "arXiv:2410.19482"
NULL = "least"
COLUMN = column(
    pa.float64(),
    "log probability that a top-40 sample is the suffix, null if impossible; high: more memorized",
    unit="nat",
    nullable=True,
)


def score(logp_top40: NDArray[np.float64], suffix: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Σ_t log q_t over the suffix, q the distribution over the 40 most probable tokens.

    Args:
        logp_top40: (b, t) log p of each token among the 40 most probable ones; −inf if it is none of them.
        suffix: (b, t) the tokens of the suffix; none for an example that is too short.

    Returns:
        (b,) in (-∞, 0]; NaN without a suffix, or where the sum is −inf.
    """
    return total(logp_top40, suffix)
