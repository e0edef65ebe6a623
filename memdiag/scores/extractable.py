"""extractable: whether greedy decoding from the prefix emits the whole suffix.

True if and only if every token of the suffix is ranked first given the true ones before, so one forward pass decides.
False does not mean that the text is safe: sampling, or another prefix, may still bring it out.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "false, true"
MEMORIZED = "high"
SOURCE = "arXiv:2202.07646"
NULL = None
COLUMN = column(
    pa.bool_(), "whether greedy decoding of the prefix emits the suffix; high (true): more memorized", nullable=True
)


def score(hit: NDArray[np.bool_], suffix: NDArray[np.bool_]) -> NDArray[np.float64]:
    """1 where every token of the suffix is a hit, else 0.

    Args:
        hit: (b, t) whether the most probable token, given the true ones before, is the true one.
        suffix: (b, t) the tokens of the suffix; none for an example that is too short.

    Returns:
        (b,) 0 or 1; NaN without a suffix.
    """
    return np.where(suffix.any(axis=1), ~(suffix & ~hit).any(axis=1), np.nan)
