"""loss_curvature: mean over checkpoints of tr H with H = ∂² loss / ∂x², the loss's curvature in the input x.

For a network of ReLUs H does not contain the label, so at one checkpoint it only says how unsure the model is around x;
the mean over a run brings the label in. High marks long-tailed and mislabelled examples. The second derivative is
exact, or estimated by Hessian-vector products; finite differences do not estimate it.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import finite
from memdiag.tables import column

NEEDS = "gradients"
RANGE = "(-∞, ∞); [0, ∞) for ReLU networks"
MEMORIZED = "high"
SOURCE = "arXiv:2307.05831"
NULL = None
COLUMN = column(
    pa.float64(), "trace of the loss's Hessian in the input, mean over checkpoints; high: more memorized", nullable=True
)


def score(input_hessian_traces: NDArray[np.float64]) -> NDArray[np.float64]:
    """(1/c) Σ_c tr H_c.

    Args:
        input_hessian_traces: (c, b) tr H at each checkpoint.

    Returns:
        (b,) for ReLU networks in [0, ∞); NaN where a trace is not finite.
    """
    return np.asarray(finite(input_hessian_traces).mean(axis=0))
