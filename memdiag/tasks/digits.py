"""task:digits: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, ten classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from memdiag.errors import InputError, unknown


def rows(
    *, split: str = "all", seed: int = 0, test_fraction: float = 0.2, shape: str = "flat", corruption: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Yield {id, features, label, true_label, corrupted}; the id is the digit's number in the whole set.

    Args:
        split: all, or the train or test part of a split drawn by `seed`.
        seed: of the split and of the corruption.
        test_fraction: share of the digits that are test, rounded to whole digits; 0 < test_fraction < 1.
        corruption: int(corruption · n_train) training digits get a label drawn from the nine wrong ones.
        shape: flat gives features (64,), image (1, 8, 8); float32 in [0, 1] either way.
    Raises:
        InputError: another value, or scikit-learn is not installed.
    """
    _check(split, seed, test_fraction, shape, corruption)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError('task:digits needs scikit-learn, which is not installed: pip install "scikit-learn"') from None
    pixels, labels = load_digits(return_X_y=True)  # (n, 64) in 0..16, (n,)
    images = (pixels / 16).astype(np.float32).reshape(-1, *((64,) if shape == "flat" else (1, 8, 8)))
    n, rng = len(labels), np.random.default_rng(seed)
    order = rng.permutation(n)
    in_test, corrupted = np.zeros(n, dtype=np.bool_), np.zeros(n, dtype=np.bool_)
    n_test = round(test_fraction * n)
    in_test[order[:n_test]] = True
    corrupted[order[n_test : n_test + int(corruption * (n - n_test))]] = True
    recorded = np.where(corrupted, (labels + rng.integers(1, 10, size=n)) % 10, labels)
    for i in range(n):
        if split == "all" or in_test[i] == (split == "test"):
            yield {
                "id": str(i),
                "features": images[i],
                "label": int(recorded[i]),
                "true_label": int(labels[i]),
                "corrupted": bool(corrupted[i]),
            }


def _check(split: str, seed: int, test_fraction: float, shape: str, corruption: float) -> None:
    if split not in ("all", "train", "test"):
        raise unknown("split of task:digits", split, ["all", "train", "test"])
    if shape not in ("flat", "image"):
        raise unknown("shape of task:digits", shape, ["flat", "image"])
    if seed < 0:
        raise InputError(f"task:digits: seed is {seed}; wanted at least 0")
    if not 0 < test_fraction < 1:
        raise InputError(f"task:digits: test_fraction is {test_fraction}; wanted more than 0 and less than 1")
    if not 0 <= corruption < 1:
        raise InputError(f"task:digits: corruption is {corruption}; wanted at least 0 and less than 1")
