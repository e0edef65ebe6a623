"""gradnorm: ‖∂ nll / ∂θ‖₂ over all parameters θ of a language model, nll the mean over the example's next tokens.

Text that the model knows by heart pulls at its weights no more: a low norm means memorized, or easy in the first place.
Mind the direction: a classifier's `grand` is read early in training, where a high norm marks what will be memorized.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import finite
from memdiag.tables import column

NEEDS = "gradients"
RANGE = "[0, ∞)"
MEMORIZED = "low"
SOURCE = "arXiv:2402.07841"
NULL = None
COLUMN = column(pa.float64(), "2-norm of the mean nll's gradient in all parameters; low: more memorized", nullable=True)


def score(gradient_norm: NDArray[np.float64]) -> NDArray[np.float64]:
    """The global 2-norm of the example's own gradient, in evaluation mode.

    Args:
        gradient_norm: (b,) >= 0.

    Returns:
        (b,) in [0, ∞); NaN where the gradient is not finite.
    """
    return finite(gradient_norm)
