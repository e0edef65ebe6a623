"""nll_sum: −Σ_t log p_t, the whole text's code length under the model, without its first token.

Low means that the model expects the text, or that the text is short: compare examples of one length only, or take
`nll_mean` or `zlib_ratio`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import total
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "[0, ∞)"
MEMORIZED = "low"
SOURCE = "arXiv:2012.07805"
NULL = None
COLUMN = column(pa.float64(), "loss summed over the predicted tokens; low: more memorized", unit="nat", nullable=True)


def score(logp: NDArray[np.float64], scored: NDArray[np.bool_]) -> NDArray[np.float64]:
    """−Σ log p over the predicted tokens.

    Args:
        logp: (b, t) log p of each token given those before it.
        scored: (b, t) the tokens that are predicted.

    Returns:
        (b,) in [0, ∞); NaN without a predicted token.
    """
    return 0.0 - total(logp, scored)  # not -x: 0 stays 0
