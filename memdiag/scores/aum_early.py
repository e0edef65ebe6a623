"""aum_early: AUM of the first half of training: mean margin over epochs 2 … ⌈E/2⌉.

Before the model fits wrong labels their margins are negative, which the second half of training undoes; so this finds
them better than `aum` does. Low is more suspicious. The half is a convention: the best end is where the accuracy on
clean examples saturates.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores.aum import score as area
from memdiag.tables import column

NEEDS = "trajectory"
RANGE = "(-∞, ∞)"
MEMORIZED = "low"
SOURCE = "arXiv:2001.10528"
NULL = None
COLUMN = column(
    pa.float64(), "mean margin over epochs 2 to half of all; low: more memorized", unit="logit", nullable=True
)


def score(label_logit: NDArray[np.float64], other_logit: NDArray[np.float64]) -> NDArray[np.float64]:
    """`aum` of the first ⌈E/2⌉ epochs as if they were all; so of up to two epochs the margin of the first.

    Args:
        label_logit: (e, b) z_y.
        other_logit: (e, b) max_{c≠y} z_c; −inf or NaN if there is no other class.

    Returns:
        (b,) NaN with one class, or where a logit is not finite.
    """
    half = (len(label_logit) + 1) // 2
    return area(label_logit[:half], other_logit[:half])
