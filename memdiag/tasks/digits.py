"""task:digits: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, ten classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from memdiag.errors import InputError, unknown


def rows(
    *, split: str = "all", seed: int = 0, test_fraction: float = 0.2, shape: str = "flat"
) -> Iterator[dict[str, Any]]:
    """Yield {id, features, label}; the id is the digit's number in the whole set, whatever the split.

    Args:
        split: all, or the train or test part of a split drawn by `seed`.
        seed: of the split.
        test_fraction: share of the digits that are test, rounded to whole digits; 0 < test_fraction < 1.
        shape: flat gives features (64,), image (1, 8, 8); float32 in [0, 1] either way.
    Raises:
        InputError: another value, or scikit-learn is not installed.
    """
    _check(split, seed, test_fraction, shape)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError('task:digits needs scikit-learn, which is not installed: pip install "scikit-learn"') from None
    pixels, labels = load_digits(return_X_y=True)  # (n, 64) in 0..16, (n,)
    images = (pixels / 16).astype(np.float32).reshape(-1, *((64,) if shape == "flat" else (1, 8, 8)))
    in_test = np.zeros(len(labels), dtype=np.bool_)
    in_test[np.random.default_rng(seed).permutation(len(labels))[: round(test_fraction * len(labels))]] = True
    for i in range(len(labels)):
        if split == "all" or in_test[i] == (split == "test"):
            yield {"id": str(i), "features": images[i], "label": int(labels[i])}


def _check(split: str, seed: int, test_fraction: float, shape: str) -> None:
    if split not in ("all", "train", "test"):
        raise unknown("split of task:digits", split, ["all", "train", "test"])
    if shape not in ("flat", "image"):
        raise unknown("shape of task:digits", shape, ["flat", "image"])
    if seed < 0:
        raise InputError(f"task:digits: seed is {seed}; wanted at least 0")
    if not 0 < test_fraction < 1:
        raise InputError(f"task:digits: test_fraction is {test_fraction}; wanted more than 0 and less than 1")
