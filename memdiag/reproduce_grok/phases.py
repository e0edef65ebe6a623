"""Phases by the paper's rule, and what the phase map gives as a whole. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
EARLIER_ALPHAS = (0.2, 0.35, 0.5, 0.65, 0.8)
LETTERS = {"M": "memorization", "C": "coexistence", "P": "partial_inversion", "F": "full_inversion"}
# An earlier run of ours at p = 97, phases by the paper's rule; for each decay and xi a letter for each of these alphas.
EARLIER_MAP = {
    0.0: {0.7: "MMMMM", 0.55: "MMMMP", 0.4: "MMCCP", 0.25: "MMCPP", 0.1: "MCCCC"},
    5.0: {0.55: "MMMCP", 0.4: "MMCFF", 0.25: "MCFFF"},
    15.0: {0.55: "MMMPF", 0.4: "MMFFF", 0.25: "MFFFF"},
}


def phase_by_paper(at: Row, corruption: float, *, grokked: bool) -> str:
    """The paper's own rule, by train accuracy: full inversion below 1.05 − ξ, coexistence from 0.9.

    A fully inverted network agrees with 1 − ξ (1 − 1/p) of its training labels, which for ξ ≤ 0.1 is above 0.9.

    Args:
        at: with train_acc and test_acc.
        corruption: ξ.
        grokked: whether test accuracy has ever reached 0.9.
    """
    train, test = at["train_acc"], at["test_acc"]
    if test >= 0.9:
        if train >= 0.9:
            return "coexistence"
        return "partial_inversion" if train >= 1.05 - corruption else "full_inversion"
    if train >= 0.9:
        return "memorization"
    return "forgetting" if grokked else "confusion"


def map_figures(rows: Sequence[Row]) -> dict[str, float | None]:
    """What claims say about the phase map.

    Args:
        rows: of PhaseRow, cells of the map.
    Returns:
        full_inversion_5, …: cells in that phase at that decay; like_earlier: the share of the cells of EARLIER_MAP
        that have the same phase by the paper's rule, None where there are none.
    """
    found: dict[str, float | None] = {
        f"{phase}_{decay:g}": float(sum(row["phase"] == phase and row["weight_decay"] == decay for row in rows))
        for phase in LETTERS.values()
        for decay in sorted({row["weight_decay"] for row in rows})
    }
    earlier = [(row, EARLIER_MAP.get(row["weight_decay"], {}).get(row["corruption"])) for row in rows if row["p"] == 97]
    same = [
        LETTERS[letters[EARLIER_ALPHAS.index(row["train_fraction"])]] == row["phase_paper_rule"]
        for row, letters in earlier
        if letters is not None
    ]
    return found | {"like_earlier": sum(same) / len(same) if same else None}
