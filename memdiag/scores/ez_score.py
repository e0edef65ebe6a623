"""ez_score: log((P + 1) / (N + 1)) at the tokens that the model misses (error zone).

With Δ_t = log p − log p_ref over the tokens whose argmax is wrong, P = Σ max(Δ, 0) and N = Σ max(−Δ, 0). High means
that even where the model errs it leans towards the text more than the reference does. Null where nothing is missed,
see `ez_no_error`; in a ranking that is the most memorized. As repeats grow the errors die out, so it orders members
against non-members, not degrees.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import counted
from memdiag.tables import column

NEEDS = "reference"
RANGE = "(-∞, ∞)"
MEMORIZED = "high"
SOURCE = "arXiv:2601.12104"
NULL = "most"
COLUMN = column(
    pa.float64(),
    "log ratio of upward to downward shifts of log p at errors, null without errors; high: more memorized",
    nullable=True,
)


def score(
    logp: NDArray[np.float64], reference_logp: NDArray[np.float64], hit: NDArray[np.bool_], scored: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Upward against downward shifts of log p at the errors.

    Args:
        logp: (b, t) log p of each token given those before it.
        reference_logp: (b, t) log p of the same tokens under the reference model.
        hit: (b, t) whether the most probable token, given the true ones before, is the true one.
        scored: (b, t) the tokens that are predicted.

    Returns:
        (b,) NaN without a predicted token or without an error.
    """
    missed = scored & ~hit
    delta = counted(logp, missed) - counted(reference_logp, missed)  # 0 where there is no error
    up, down = np.maximum(delta, 0.0).sum(axis=1), np.maximum(-delta, 0.0).sum(axis=1)
    return np.where(missed.any(axis=1), np.log((up + 1.0) / (down + 1.0)), np.nan)
