"""el2n: ‖softmax(z) − e_y‖₂, the length of the error vector (EL2N), at one checkpoint.

With q the softmax over the other classes only, EL2N = (1 − p_y) · √(1 + Σ_{c≠y} q_c²), so nothing cancels where p_y is
close to 1. Read it at an early checkpoint, where the clean examples are fitted and wrong labels are not; it then marks
hard and mislabelled examples. At initialisation it is noise, and at the end of training little more than the loss.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores.loss import log_odds_against, softplus, without
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "[0, √2]"
MEMORIZED = "high"
SOURCE = "arXiv:2107.07075"
NULL = None
COLUMN = column(pa.float64(), "2-norm of softmax minus one-hot label; high: more memorized", nullable=True)


def score(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """‖p − e_y‖₂ with p = softmax(z).

    Args:
        logits: (b, k) z.
        labels: (b,) y in [0, k).

    Returns:
        (b,) in [0, √2], between (1 − p_y)√(k / (k − 1)) and (1 − p_y)√2; 0 with one class; NaN where a logit is NaN.
    """
    wrong = np.exp(-softplus(-log_odds_against(logits, labels)))  # 1 − p_y
    others = without(logits, labels)
    top = others.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # an infinite logit gives NaN
        q = np.exp(others - np.where(np.isneginf(top), 0.0, top))  # (b, k), not yet divided by its sum
    share = (q**2).sum(axis=1) / np.maximum(q.sum(axis=1), 1.0) ** 2  # the largest q is 1, or there is no other class
    return np.asarray(wrong * np.sqrt(1.0 + share))
