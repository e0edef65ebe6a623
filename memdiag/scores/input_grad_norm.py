"""input_grad_norm: ‖∂ loss / ∂x‖₂, how much the loss moves with the input x, at one checkpoint.

One term of `csg` before it is squared. A high value marks an example that the model fits, or misses, by a steep slope.
It has the scale of the inputs, and one checkpoint says much less than the sum over a run.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import finite
from memdiag.tables import column

NEEDS = "gradients"
RANGE = "[0, ∞)"
MEMORIZED = "high"
SOURCE = "openreview:jeTiBeW3iZ"
NULL = None
COLUMN = column(pa.float64(), "2-norm of the loss's gradient in the input; high: more memorized", nullable=True)


def score(input_gradient_norm: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖∂ loss_i / ∂x_i‖₂ of the example's own loss, not of a batch mean.

    Args:
        input_gradient_norm: (b,) >= 0.

    Returns:
        (b,) in [0, ∞); NaN where the gradient is not finite.
    """
    return finite(input_gradient_norm)
