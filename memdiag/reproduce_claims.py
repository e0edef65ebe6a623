"""What a paper claims, as something that can be measured, and whether it holds. Needs no torch.

A figure is named `network.key`: what was measured under that key on the networks of that name, one for each seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy import stats

CONFIDENCE = 0.95
FEWEST = 3  # seeds for an interval
Figures = Mapping[str, Mapping[int, Mapping[str, float | None]]]  # network -> seed -> key -> value


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim; the fields that it shares with ClaimRow mean the same."""

    name: str
    statement: str
    setting: str
    measure: str
    ours: str  # network.key
    less: str | None = None  # what is subtracted from it, seed by seed
    paper: float | None = None
    paper_note: str = "not given"
    control: str | None = None
    control_ours: str | None = None  # network.key
    control_less: str | None = None
    low: float | None = None
    high: float | None = None
    band_from: str = "reference"
    is_event: bool = False  # a step: null means that it never came, which is not what was claimed

    def networks(self) -> set[str]:
        """The names of the networks that it is measured on."""
        figures = (self.ours, self.less, self.control_ours, self.control_less)
        return {figure.partition(".")[0] for figure in figures if figure is not None}


def judge(claim: Claim, figures: Figures) -> dict[str, Any]:
    """The claim's row: the mean over seeds beside the paper's figure and the control.

    Args:
        figures: of every network that the claim is measured on.
    Returns:
        a value for each column of ClaimRow.
    """
    ours = values(figures, claim.ours, claim.less)
    control = values(figures, claim.control_ours, claim.control_less) if claim.control_ours is not None else [None]
    lo, hi = t_interval(ours)
    mean = mean_of(ours)
    return {
        "name": claim.name,
        "statement": claim.statement,
        "setting": claim.setting,
        "measure": claim.measure,
        "paper": claim.paper,
        "paper_note": claim.paper_note,
        "ours": mean,
        "ours_lo": lo,
        "ours_hi": hi,
        "n_seeds": len(ours),
        "control": claim.control,
        "control_value": mean_of(control),
        "low": claim.low,
        "high": claim.high,
        "band_from": claim.band_from,
        "verdict": verdict(mean, claim.low, claim.high, is_event=claim.is_event),
    }


def values(figures: Figures, of: str, less: str | None = None) -> list[float | None]:
    """The figure of every seed, minus another one of the same seed; None where either is undefined."""
    network, _, key = of.partition(".")
    found = [(seed, at[key]) for seed, at in figures[network].items()]
    if less is None:
        return [value for _, value in found]
    other, _, other_key = less.partition(".")
    pairs = [(value, figures[other][seed][other_key]) for seed, value in found]
    return [None if a is None or b is None else a - b for a, b in pairs]


def mean_of(numbers: Sequence[float | None]) -> float | None:
    """The mean; None for none, or where one is undefined, as the others alone would be a selection."""
    known = [x for x in numbers if x is not None]
    return fmean(known) if known and len(known) == len(numbers) else None


def t_interval(numbers: Sequence[float | None]) -> tuple[float | None, float | None]:
    """mean ± t s / √n, the 95 % interval of the mean; (None, None) for fewer than FEWEST, or where one is undefined."""
    known = [x for x in numbers if x is not None]
    if len(known) < max(FEWEST, len(numbers)):
        return None, None
    mean, n = fmean(known), len(known)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(known) / math.sqrt(n)
    return mean - half, mean + half


def verdict(value: float | None, low: float | None, high: float | None, *, is_event: bool = False) -> str:
    """holds where the value lies in the band, its ends among it; differs where not; not_comparable without either.

    Args:
        is_event: an undefined value is a step that never came.
    """
    if low is None and high is None:
        return "not_comparable"
    if value is None:
        return "differs" if is_event else "not_comparable"
    above = low is None or value >= low
    below = high is None or value <= high
    return "holds" if above and below else "differs"
