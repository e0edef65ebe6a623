"""cartography_variability: population standard deviation over epochs of p_y, the label's probability.

High is ambiguous, or learned in the course of training: a wrong label that is fitted at last swings from 0 to 1. If
training ends before, wrong labels have a low variability; so read it beside `cartography_confidence` C, which bounds
it by √(C(1 − C)) <= 1/2.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores.csl import losses
from memdiag.tables import column

NEEDS = "trajectory"
RANGE = "[0, 1/2]"
MEMORIZED = "high"
SOURCE = "arXiv:2009.10795"
NULL = None
COLUMN = column(
    pa.float64(), "population standard deviation of p(label) over all epochs; high: more memorized", nullable=True
)


def score(label_logit: NDArray[np.float64], logsumexp: NDArray[np.float64]) -> NDArray[np.float64]:
    """√((1/E) Σ_e (p_y,e − mean)²), with E and not E − 1.

    Args:
        label_logit: (e, b) z_y.
        logsumexp: (e, b) log Σ_c exp z_c.

    Returns:
        (b,) in [0, 1/2]; 0 of one epoch; NaN where a logit is not finite.
    """
    return np.asarray(np.exp(-losses(label_logit, logsumexp)).std(axis=0))
