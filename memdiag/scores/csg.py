"""csg: Σ_c ‖∂ loss_c / ∂x‖₂² over the checkpoints c of a run (cumulative sample gradient).

High marks examples that the model fits by steep slopes in the input. In our measurements the best single correlate of
the memorization score of Feldman and Zhang. It has the squared scale of the inputs and grows with the number of
checkpoints; the gradient is that of the example's own loss, not of a batch mean.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import finite
from memdiag.tables import column

NEEDS = "checkpoints"
RANGE = "[0, ∞)"
MEMORIZED = "high"
SOURCE = "openreview:jeTiBeW3iZ"
NULL = None
COLUMN = column(
    pa.float64(), "sum over checkpoints of the squared input gradient norm; high: more memorized", nullable=True
)


def score(input_gradient_norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Σ_c ‖∂ loss_c / ∂x‖₂².

    Args:
        input_gradient_norms: (c, b) >= 0, not squared.

    Returns:
        (b,) in [0, ∞); NaN where a gradient is not finite.
    """
    with np.errstate(over="ignore"):  # what does not fit a double is undefined
        return finite((input_gradient_norms**2).sum(axis=0))
