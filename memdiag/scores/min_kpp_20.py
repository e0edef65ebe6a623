"""min_kpp_20: mean of the lowest 20 % of z_t = (log p_t − μ_t) / σ_t (Min-K%++ with k = 0.2).

μ_t and σ_t are the mean and the standard deviation of log p over the vocabulary, under p. Made to tell seen text from
unseen, where high is seen. NOT a degree of memorization: as p_t goes to 1, z_t goes to 0, so a text known by heart
scores lower than one half known.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores.min_k_20 import mean_of_lowest
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "about [-30, 5]"
MEMORIZED = "high"
SOURCE = "arXiv:2404.02936"
NULL = None
COLUMN = column(
    pa.float64(),
    "mean of the lowest 20 % standardised log p; high: more likely seen, but not a degree of memorization",
    nullable=True,
)


def score(z: NDArray[np.float64], scored: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean of the m = max(1, ⌊0.2 T⌋) smallest z.

    Args:
        z: (b, t) standardised log p of each token, with σ² >= 1e-6 and 0 where numerator and σ are both 0.
        scored: (b, t) the tokens that are predicted.

    Returns:
        (b,) about −30 to 5; NaN without a predicted token.
    """
    return mean_of_lowest(z, scored, 0.2)
