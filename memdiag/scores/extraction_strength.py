"""extraction_strength: share of the text that greedy decoding emits from the shortest prefix that suffices.

1 − k/T with k the smallest number of tokens from which on all the rest come out: the run of hits at the end, divided by
T. One slip at the last token makes it 0, so on text with a free ending it is close to 0 however much was memorized:
read it beside `em_full`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import mean
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "[0, 1]"
MEMORIZED = "high"
SOURCE = "arXiv:2406.09179"
NULL = None
COLUMN = column(
    pa.float64(), "run of hits at the end divided by the predicted tokens; high: more memorized", nullable=True
)


def score(hit: NDArray[np.bool_], scored: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Length of the run of hits at the end, divided by the number of predicted tokens.

    Args:
        hit: (b, t) whether the most probable token, given the true ones before, is the true one.
        scored: (b, t) the tokens that are predicted.

    Returns:
        (b,) in [0, 1]; NaN without a predicted token.
    """
    missed = scored & ~hit
    after = np.cumsum(missed[:, ::-1], axis=1)[:, ::-1] == 0  # (b, t) no miss from here to the end
    return mean(after, scored)
