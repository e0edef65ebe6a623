"""task:modular-addition: all pairs (m, n), labelled m + n modulo p, with part of the training labels redrawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memdiag.modular import examples


def rows(
    *,
    p: int = 97,
    split: str = "train",
    train_fraction: float = 0.5,
    corruption: float = 0.0,
    corruption_law: str = "uniform",
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield {id, features, label, true_label, corrupted} as `memdiag.modular.examples` says."""
    return examples("addition", p, split, train_fraction, corruption, corruption_law, seed)
