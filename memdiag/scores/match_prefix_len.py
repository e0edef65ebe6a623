"""match_prefix_len: number of the suffix's tokens that greedy decoding emits before its first slip.

Exact without generating anything: until the first slip, decoding sees the true tokens. What matches after a slip is
coincidence and does not count.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import total
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "0, 1, ..., S"
MEMORIZED = "high"
SOURCE = "arXiv:2202.07646"
NULL = None
COLUMN = column(
    pa.int32(),
    "tokens of the suffix before greedy decoding's first slip; high: more memorized",
    unit="token",
    nullable=True,
)


def score(hit: NDArray[np.bool_], suffix: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Hits before the suffix's first miss.

    Args:
        hit: (b, t) whether the most probable token, given the true ones before, is the true one.
        suffix: (b, t) the tokens of the suffix; none for an example that is too short.

    Returns:
        (b,) whole numbers from 0 to S; NaN without a suffix.
    """
    before = np.cumsum(suffix & ~hit, axis=1) == 0  # (b, t) no miss up to here
    return total(before, suffix)
