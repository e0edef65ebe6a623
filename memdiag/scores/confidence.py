"""confidence: p_y, the probability of the label that the example carries, at one checkpoint.

A low confidence marks an example that the model does not (yet) fit. It orders examples exactly as `loss` does, in the
other direction, and is as uninformative at the end of training. It is not the probability of the predicted class.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores.loss import log_odds_against, softplus
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "[0, 1]"
MEMORIZED = "low"
SOURCE = "arXiv:2009.10795"
NULL = None
COLUMN = column(pa.float64(), "p(label); low: more memorized", nullable=True)


def score(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """softmax(z)_y.

    Args:
        logits: (b, k) z.
        labels: (b,) y in [0, k).

    Returns:
        (b,) in [0, 1]; 1 with one class; NaN where a logit is NaN.
    """
    return np.exp(-softplus(log_odds_against(logits, labels)))
