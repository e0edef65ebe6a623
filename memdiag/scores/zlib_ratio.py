"""zlib_ratio: nats that the model needs for the text, per byte that zlib needs: nll_sum / zlib_len.

Low means that the model knows more of the text than its repetitions explain. zlib sees repeats within the text only,
not that words are common, so easy text scores low as well.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores.nll_sum import score as nll
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "[0, ∞)"
MEMORIZED = "low"
SOURCE = "arXiv:2012.07805"
NULL = None
COLUMN = column(pa.float64(), "nll_sum divided by zlib_len; low: more memorized", unit="nat/byte", nullable=True)


def score(logp: NDArray[np.float64], scored: NDArray[np.bool_], zlib_bytes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Σ −log p divided by the compressed length.

    Args:
        logp: (b, t) log p of each token given those before it.
        scored: (b, t) the tokens that are predicted.
        zlib_bytes: (b,) bytes after zlib, > 0; NaN where there is no text.

    Returns:
        (b,) in [0, ∞); NaN without a predicted token or without text.
    """
    return nll(logp, scored) / zlib_bytes
