"""logp_suffix_t1: log p_z, the log probability that one sample at temperature 1 from the prefix is the suffix.

High means that the suffix comes out when people sample. It falls with every token, so compare suffixes of one length
only; in log space nothing is too improbable to be told from 0.
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
NULL = None
COLUMN = column(
    pa.float64(),
    "log probability that a sample at temperature 1 is the suffix; high: more memorized",
    unit="nat",
    nullable=True,
)


def score(logp: NDArray[np.float64], suffix: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Σ_t log p_t over the suffix.

    Args:
        logp: (b, t) log p of each token given those before it.
        suffix: (b, t) the tokens of the suffix; none for an example that is too short.

    Returns:
        (b,) in (-∞, 0]; NaN without a suffix.
    """
    return total(logp, suffix)
