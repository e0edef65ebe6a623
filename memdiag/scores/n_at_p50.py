"""n_at_p50: samples needed until the suffix has come out with probability 1/2: ⌈log(1 − p) / log(1 − p_z)⌉.

p_z is the probability that one sample among the 40 best tokens is the suffix (`logp_suffix_top40`). Low means easy to
extract. Compare a large number with held-out text: given enough samples, text comes out that was never seen. Null
where p_z is 0 or the number does not fit a double; in a ranking that is the least memorized.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag.scores._rows import finite
from memdiag.scores.logp_suffix_top40 import score as logp
from memdiag.tables import column

NEEDS = "checkpoint"
RANGE = "1, 2, ..."
MEMORIZED = "low"
SOURCE = "arXiv:2410.19482"
NULL = "least"
COLUMN = column(
    pa.float64(),
    "top-40 samples until the suffix came out with probability 0.5, null if never; low: more memorized",
    unit="sample",
    nullable=True,
)

_NORMAL = -700.0  # below this log p, exp loses digits and then all of them


def score(logp_top40: NDArray[np.float64], suffix: NDArray[np.bool_]) -> NDArray[np.float64]:
    """n such that 1 − (1 − p_z)ⁿ >= 1/2.

    Args:
        logp_top40: (b, t) log p of each token among the 40 most probable ones; −inf if it is none of them.
        suffix: (b, t) the tokens of the suffix; none for an example that is too short.

    Returns:
        (b,) whole numbers >= 1; NaN without a suffix, where p_z = 0, or beyond a double.
    """
    return tries(logp(logp_top40, suffix), 0.5)


def tries(log_p: NDArray[np.float64], p: float) -> NDArray[np.float64]:
    """Samples until an event of log probability `log_p` has happened with probability `p`.

    Args:
        log_p: (b,) <= 0; what rounding lifts above 0 counts as 0.
        p: in (0, 1).

    Returns:
        (b,) ⌈log(1 − p) / log(1 − p_z)⌉, at least 1; NaN where log_p is, or beyond a double.
    """
    log_p = np.minimum(log_p, 0.0)
    wanted = -np.log1p(-p)
    with np.errstate(divide="ignore", over="ignore"):  # p_z = 1: one sample; beyond a double: undefined
        n = wanted / -np.log1p(-np.exp(np.maximum(log_p, _NORMAL)))
        n = finite(np.where(log_p < _NORMAL, np.exp(np.log(wanted) - log_p), n))
    whole = np.rint(n)
    n = np.where(np.abs(n - whole) <= 1e-12 * n, whole, np.ceil(n))  # rounding shall not cost one more sample
    return np.maximum(n, 1.0)
