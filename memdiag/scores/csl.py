"""csl: Σ_e loss_e, the loss of the example at presentation, summed over all epochs (cumulative sample loss).

High means learned late and with trouble. The best free stand-in for the memorization score of Feldman and Zhang on a
whole data set; it is not that score, and grows with the number of epochs.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import finite
from memdiag.tables import column

NEEDS = "trajectory"
RANGE = "[0, ∞)"
MEMORIZED = "high"
SOURCE = "openreview:KZlQEoEtiu"
NULL = None
COLUMN = column(pa.float64(), "sum of the loss over all epochs; high: more memorized", unit="nat", nullable=True)


def score(label_logit: NDArray[np.float64], logsumexp: NDArray[np.float64]) -> NDArray[np.float64]:
    """Σ_e (logsumexp_e − z_y,e).

    Args:
        label_logit: (e, b) z_y.
        logsumexp: (e, b) log Σ_c exp z_c.

    Returns:
        (b,) in [0, ∞); NaN where a logit is not finite.
    """
    return np.asarray(losses(label_logit, logsumexp).sum(axis=0))


def losses(label_logit: NDArray[np.float64], logsumexp: NDArray[np.float64]) -> NDArray[np.float64]:
    """(e, b) −log p_y >= 0: of two numbers that were rounded to float32 the difference may fall below 0."""
    with np.errstate(invalid="ignore"):  # inf − inf of a diverged run is NaN
        return np.maximum(finite(logsumexp - label_logit), 0.0)
