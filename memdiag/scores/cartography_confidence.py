"""cartography_confidence: mean over epochs of p_y, the label's probability at presentation (dataset cartography).

High is easy to learn. Low together with a low `cartography_variability` is hard to learn: there most wrong labels lie.
It falls with every epoch spent before the example was learned, so compare within a run only.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores.csl import losses
from memdiag.tables import column

NEEDS = "trajectory"
RANGE = "[0, 1]"
MEMORIZED = "low"
SOURCE = "arXiv:2009.10795"
NULL = None
COLUMN = column(pa.float64(), "mean p(label) over all epochs; low: more memorized", nullable=True)


def score(label_logit: NDArray[np.float64], logsumexp: NDArray[np.float64]) -> NDArray[np.float64]:
    """(1/E) Σ_e p_y,e with p_y = exp(z_y − logsumexp).

    Args:
        label_logit: (e, b) z_y.
        logsumexp: (e, b) log Σ_c exp z_c.

    Returns:
        (b,) in [0, 1]; NaN where a logit is not finite.
    """
    return np.asarray(np.exp(-losses(label_logit, logsumexp)).mean(axis=0))
