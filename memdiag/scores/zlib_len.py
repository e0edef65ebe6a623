"""zlib_len: length of the scored text after zlib compression at level 6, in bytes.

Says how repetitive the text is, whatever the model; no degree of memorization. The length depends a little on the zlib
that Python was built with, which the report's metadata name.
"""

from __future__ import annotations

import zlib

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "8, 9, ..."
MEMORIZED = None
SOURCE = "arXiv:2012.07805"
NULL = None
COLUMN = column(
    pa.int32(),
    "bytes of the scored text after zlib; says nothing about memorization by itself",
    unit="byte",
    nullable=True,
)


def score(zlib_bytes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The lengths as they were observed.

    Args:
        zlib_bytes: (b,) `compressed` of the text that was scored; NaN where there is no text.

    Returns:
        (b,) whole numbers >= 8; NaN without text.
    """
    return zlib_bytes.astype(np.float64)


def compressed(text: str) -> int:
    """Bytes of the text's UTF-8 after zlib at level 6, header and checksum included."""
    return len(zlib.compress(text.encode("utf-8", "surrogatepass"), 6))
