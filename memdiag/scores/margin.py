"""margin: z_y − max_{c≠y} z_c, how far the label's logit lies above the best other one, at one checkpoint.

Negative where the model predicts another class than the label. A low margin marks an example whose label the model
does not believe: often mislabelled. It has the logits' own scale, so compare it within a model only.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import finite
from memdiag.scores.loss import without
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "(-∞, ∞)"
MEMORIZED = "low"
SOURCE = "arXiv:2001.10528"
NULL = None
COLUMN = column(
    pa.float64(), "label's logit minus the best other logit; low: more memorized", unit="logit", nullable=True
)


def score(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """z_y − max_{c≠y} z_c.

    Args:
        logits: (b, k) z.
        labels: (b,) y in [0, k).

    Returns:
        (b,) NaN with one class, or where a logit is NaN.
    """
    return between(logits[np.arange(len(labels)), labels], without(logits, labels).max(axis=1))


def between(label_logit: NDArray[np.float64], other_logit: NDArray[np.float64]) -> NDArray[np.float64]:
    """The margin from the label's logit and the best other one, of any one shape; NaN where there is no other."""
    with np.errstate(invalid="ignore"):  # inf − inf of a diverged model is NaN
        return finite(label_logit - other_logit)
