"""last_layer_grand: ‖∂ loss / ∂θ_L‖₂ over the parameters of the last linear layer, at one checkpoint.

For an input h of that layer it is EL2N · √(‖h‖² + 1), the 1 for the bias. It orders examples nearly as `grand` does and
costs one forward pass. Read it where `grand` is read.
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
SOURCE = "arXiv:2107.07075"
NULL = None
COLUMN = column(
    pa.float64(), "2-norm of the loss's gradient in the last linear layer; high: more memorized", nullable=True
)


def score(last_layer_gradient_norm: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖g_i‖₂ of the example's own loss in the last linear layer's weight and bias.

    Args:
        last_layer_gradient_norm: (b,) >= 0.

    Returns:
        (b,) in [0, ∞); NaN where the gradient is not finite.
    """
    return finite(last_layer_gradient_norm)
