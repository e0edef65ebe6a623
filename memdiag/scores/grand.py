"""grand: ‖∂ loss / ∂θ‖₂ over all parameters θ, the length of the example's own gradient (GraNd), at one checkpoint.

Read it at an early checkpoint, as EL2N, whose ordering it shares; it then marks hard and mislabelled examples. At
initialisation it is little else than the size of the input: the claim that it prunes well there did not reproduce
(arXiv:2303.14753).
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
COLUMN = column(pa.float64(), "2-norm of the loss's gradient in all parameters; high: more memorized", nullable=True)


def score(gradient_norm: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖g_i‖₂ of the example's own loss, not of a batch mean.

    Args:
        gradient_norm: (b,) >= 0.

    Returns:
        (b,) in [0, ∞); NaN where the gradient is not finite.
    """
    return finite(gradient_norm)
