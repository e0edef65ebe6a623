"""Second-split forgetting time (Maini et al., arXiv:2210.15031): how soon is an example forgotten when training goes on
without it?

The data are split at random into halves A and B. A network learns A; then the same network learns B, and A is looked
at after every epoch 1 … E of that second stage. With c_e(i) = 1 if example i of A is right after epoch e:

    SSFT(i) = min { e : c_e'(i) = 0 for all e' ≥ e }        E + 1 if there is none: never forgotten, censored

Wrong labels are forgotten at once; what other examples say as well is kept. The halves then change places, which gives
a second network and the times of B.

Times of two networks do not compare: one may forget faster, and where the second stages differ in length so does the
value of the censored ones. Ranks within each network's half do.

Axes: e epoch of the second stage, b example. Needs no torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memdiag import agreement

HALVES = 3  # key of the draw beside the seed

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def first_half(n: int, seed: int) -> Bools:
    """Which of n rows are in half A: (n + 1) // 2 of them, drawn by the seed.

    Returns:
        (n,) bool; the others are half B.
    """
    found = np.zeros(n, dtype=np.bool_)
    found[np.random.default_rng([seed, HALVES]).permutation(n)[: (n + 1) // 2]] = True
    return found


def forgetting_time(correct: Bools) -> Ints:
    """SSFT: the first epoch, counted from 1, after which an example is always wrong.

    Args:
        correct: (e, b) bool, whether it was right after each epoch of the second stage; e ≥ 1, b may be 0.
    Returns:
        (b,) 1 … e, or e + 1 for an example that is right after the last epoch. One that was never right in the second
        stage has 1, whether it was learned before or not.
    Raises:
        ValueError: there is no epoch.
    """
    if correct.ndim != 2 or not len(correct):
        raise ValueError(f"correct has shape {correct.shape}; wanted (epochs, examples) with at least one epoch")
    n_epochs = len(correct)
    from_the_end = correct[::-1].argmax(axis=0)  # epochs since it was last right
    return np.where(correct.any(axis=0), n_epochs - from_the_end + 1, 1).astype(np.int64)


def within_half(times: Floats, censored: Bools, half: Bools) -> Floats:
    """Oriented ranks of forgetting times, within each half by itself.

    Args:
        times: (b,) forgetting times.
        censored: (b,) which were never forgotten. They tie, whatever stands in `times`.
        half: (b,) which half each example is in.
    Returns:
        (b,) from 0 to 1; 1: forgotten soonest, the most memorized. Ties share their mean rank, so that the mean over
        a half is 0.5; 0.5 for an example alone in its half.
    """
    late = np.where(censored, np.inf, times)
    found = np.empty(len(times), dtype=np.float64)
    for mine in (half, ~half):
        found[mine] = agreement.ranks(-late[mine])
    return found
