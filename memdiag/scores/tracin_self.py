"""tracin_self: Σ_c η_c ‖g_c‖₂², the example's influence on its own loss over the checkpoints c (TracIn).

By how much the example's own updates lower its own loss, to first order; η is the learning rate. High marks examples
that nothing else teaches: atypical or mislabelled. It grows with the number of checkpoints.
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
SOURCE = "arXiv:2002.08484"
NULL = None
COLUMN = column(
    pa.float64(),
    "sum over checkpoints of learning rate times squared gradient norm; high: more memorized",
    nullable=True,
)


def score(learning_rates: NDArray[np.float64], gradient_norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Σ_c η_c ‖∂ loss_c / ∂θ‖₂².

    Args:
        learning_rates: (c,) η at each checkpoint, >= 0.
        gradient_norms: (c, b) >= 0, over all parameters, not squared.

    Returns:
        (b,) in [0, ∞); NaN where a gradient is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit a double is undefined
        return finite((learning_rates[:, None] * gradient_norms**2).sum(axis=0))
