"""Sums and means over the entries of a row that count; NaN, never infinity, where they are undefined.

What a mask leaves out is never read, so padding may hold anything. Axes: b example, t token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]


def finite(values: Float64) -> Float64:
    """The values with NaN for every infinity: a report knows numbers and nulls only."""
    return np.where(np.isinf(values), np.nan, values)


def counted(values: Float64 | Bool, where: Bool) -> Float64:
    """(b, t) the values where they count and 0 elsewhere; an infinity that counts is NaN."""
    return finite(np.where(where, values, 0.0))


def total(values: Float64 | Bool, where: Bool) -> Float64:
    """(b,) sums of (b, t) over the entries that count; NaN for a row without any."""
    return np.where(where.any(axis=1), counted(values, where).sum(axis=1), np.nan)


def mean(values: Float64 | Bool, where: Bool) -> Float64:
    """(b,) means of (b, t) over the entries that count; NaN for a row without any."""
    means: Float64 = total(values, where) / np.maximum(where.sum(axis=1), 1)
    return means
