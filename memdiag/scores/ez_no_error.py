"""ez_no_error: whether the model ranks every predicted token first, so that `ez_score` has nothing to look at.

True is the most memorized; without this flag the null of `ez_score` could be taken for a text without tokens.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores.extractable import score as every
from memdiag.tables import column

NEEDS = "reference"
RANGE = "false, true"
MEMORIZED = "high"
SOURCE = "arXiv:2601.12104"
NULL = None
COLUMN = column(pa.bool_(), "whether no predicted token is missed; high (true): more memorized", nullable=True)


def score(hit: NDArray[np.bool_], scored: NDArray[np.bool_]) -> NDArray[np.float64]:
    """1 where no predicted token is missed, else 0.

    Args:
        hit: (b, t) whether the most probable token, given the true ones before, is the true one.
        scored: (b, t) the tokens that are predicted.

    Returns:
        (b,) 0 or 1; NaN without a predicted token.
    """
    return every(hit, scored)
