"""loss: −log p_y of the label that the example carries, at one checkpoint, in nats.

With x = log Σ_{c≠y} exp z_c − z_y, the log odds against the label, loss = log(1 + eˣ). So nothing cancels where p_y
is close to 1. A high loss marks an example that the model does not (yet) fit: atypical, mislabelled, or learned late.
At the end of training, when everything is fitted, it says little.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import finite
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "[0, ∞)"
MEMORIZED = "high"
SOURCE = "arXiv:1709.01604"
NULL = None
COLUMN = column(pa.float64(), "-log p(label); high: more memorized", unit="nat", nullable=True)


def score(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """−log softmax(z)_y.

    Args:
        logits: (b, k) z.
        labels: (b,) y in [0, k).

    Returns:
        (b,) in [0, ∞); 0 with one class; NaN for a logit that is NaN or a label's logit of −inf.
    """
    return finite(softplus(log_odds_against(logits, labels)))


def log_odds_against(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """(b,) log((1 − p_y) / p_y) = log Σ_{c≠y} exp z_c − z_y; −inf with one class."""
    others = without(logits, labels)
    top = others.max(axis=1, keepdims=True)  # (b, 1)
    top = np.where(np.isneginf(top), 0.0, top)  # no other class: the sum below is 0
    with np.errstate(divide="ignore", invalid="ignore"):  # log 0 = −inf is meant; inf − inf is NaN
        against = np.log(np.exp(others - top).sum(axis=1)) + top[:, 0]
        log_odds: NDArray[np.float64] = against - logits[np.arange(len(labels)), labels]
    return log_odds


def softplus(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(1 + eˣ): −log p_y of the log odds against the label, and −log(1 − p_y) of minus these."""
    with np.errstate(invalid="ignore"):  # NaN stays NaN, silently
        return np.logaddexp(0.0, x)


def without(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """(b, k) the logits with −inf in the label's place."""
    others = logits.copy()
    others[np.arange(len(labels)), labels] = -np.inf
    return others
