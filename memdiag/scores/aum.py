"""aum: mean over epochs 2 … E of the margin z_y − max_{c≠y} z_c at presentation (area under the margin).

Low, mostly negative, means that the rest of the data speaks for another class than the label: mislabelled or ambiguous.
Once wrong labels are fitted their margins turn positive, so over a long training `aum_early` separates better. Logits
have no common scale: compare within a run only.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores.margin import between
from memdiag.tables import column

NEEDS = "trajectory"
RANGE = "(-∞, ∞)"
MEMORIZED = "low"
SOURCE = "arXiv:2001.10528"
NULL = None
COLUMN = column(pa.float64(), "mean margin over epochs 2 to the last; low: more memorized", unit="logit", nullable=True)


def score(label_logit: NDArray[np.float64], other_logit: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean margin. The first epoch, when the model knows nothing, is left out unless it is the only one.

    Args:
        label_logit: (e, b) z_y.
        other_logit: (e, b) max_{c≠y} z_c; −inf or NaN if there is no other class.

    Returns:
        (b,) NaN with one class, or where a logit is not finite.
    """
    margins = between(label_logit, other_logit)  # (e, b)
    return np.asarray((margins[1:] if len(margins) > 1 else margins).mean(axis=0))
