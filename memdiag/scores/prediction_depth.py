"""prediction_depth: first layer from which on every k-NN probe agrees with the network's own prediction.

0 if all agree, the input's among them; the number of layers if not even the last does. Deep means that the example was
decided late in the network: hard or mislabelled. Few levels, so many ties; and where classes are clusters in input
space it finds wrong labels through the probes' neighbours rather than through the network.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "0, 1, ..., layers"
MEMORIZED = "high"
SOURCE = "arXiv:2106.09647"
NULL = None
COLUMN = column(
    pa.int32(),
    "first layer from which on all k-NN probes agree with the prediction; high: more memorized",
    unit="layer",
    nullable=True,
)


def score(probes: NDArray[np.int64], predicted: NDArray[np.int64]) -> NDArray[np.float64]:
    """The number of layers up to the last one whose probe disagrees.

    Args:
        probes: (l, b) class that the probe of each layer predicts: the input first, the softmax last.
        predicted: (b,) class that the network predicts.

    Returns:
        (b,) whole numbers from 0 to l.
    """
    agrees = probes == predicted  # (l, b)
    settled = np.logical_and.accumulate(agrees[::-1], axis=0)  # from the last layer down, until one disagrees
    return np.asarray(len(probes) - settled.sum(axis=0), dtype=np.float64)
