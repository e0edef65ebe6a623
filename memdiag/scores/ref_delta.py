"""ref_delta: mean over tokens of log p − log p_ref: how much better the model does than one that did not see the text.

High means more than ease: what any model of the kind would predict cancels. A reference that saw the text as well hides
it, and at full memorization only the reference's own loss varies.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import mean
from memdiag.tables import column

NEEDS = "reference"
RANGE = "(-∞, ∞)"
MEMORIZED = "high"
SOURCE = "arXiv:2111.08440"
NULL = None
COLUMN = column(
    pa.float64(),
    "mean loss of the reference model minus mean loss, per token; high: more memorized",
    unit="nat",
    nullable=True,
)


def score(
    logp: NDArray[np.float64], reference_logp: NDArray[np.float64], scored: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """nll_ref − nll, per predicted token.

    Args:
        logp: (b, t) log p of each token given those before it.
        reference_logp: (b, t) log p of the same tokens under the reference model.
        scored: (b, t) the tokens that are predicted.

    Returns:
        (b,) NaN without a predicted token.
    """
    return mean(logp, scored) - mean(reference_logp, scored)
