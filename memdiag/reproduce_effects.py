"""What a paper says a method changes, arm beside arm on the same seeds, and whether it does here. Needs no torch.

An arm is a way to train; a run is an arm with a seed, and gives a value for each measure. Differences are taken seed by
seed, so that what the seeds have in common cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memdiag.reproduce_claims import mean_of, t_interval

Runs = Mapping[str, Mapping[int, Mapping[str, float | None]]]  # arm -> seed -> measure -> value


@dataclass(frozen=True)
class Arm:
    """A way to train. One that `needs` another comes after it, and is told its measures for the same seed."""

    name: str
    needs: str | None = None


@dataclass(frozen=True)
class Control:
    """An arm that the treated one is held against; with a `baseline` of its own, change against change."""

    arm: str
    baseline: str | None = None


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One thing that a method is said to change; the fields that it shares with EffectRow mean the same."""

    name: str
    statement: str
    measure: str
    baseline: str
    treated: str
    controls: tuple[Control, ...] = ()
    paper: Mapping[str, float]  # arm -> its figure
    paper_note: str = "not given"
    direction: int  # +1 where the paper's method raises the measure, −1 where it lowers it
    relative: bool = False

    def arms(self) -> list[str]:
        """The arms that it takes, the baseline first, the treated one second."""
        others = [name for c in self.controls for name in (c.baseline, c.arm) if name is not None]
        return list(dict.fromkeys([self.baseline, self.treated, *others]))


def judge(effect: Effect, runs: Runs) -> list[dict[str, Any]]:
    """The effect's rows: baseline, treated arm, controls.

    Args:
        runs: of every arm that the effect takes, with the same seeds.
    Returns:
        a value for each column of EffectRow.
    """
    treated = changes(effect, runs, effect.treated, effect.baseline)
    rows = [
        _row(effect, runs, effect.baseline, "baseline", None, None),
        _row(effect, runs, effect.treated, "treated", effect.baseline, None),
    ]
    told = {effect.baseline, effect.treated}
    for control in effect.controls:
        baseline = control.baseline or effect.baseline
        if baseline not in told:
            rows.append(_row(effect, runs, baseline, "control", None, None))
            told.add(baseline)
        rows.append(_row(effect, runs, control.arm, "control", baseline, treated))
    return rows


def values(runs: Runs, arm: str, measure: str) -> list[float | None]:
    """The measure in every run of an arm, by seed."""
    return [runs[arm][seed][measure] for seed in sorted(runs[arm])]


def changes(effect: Effect, runs: Runs, arm: str, baseline: str) -> list[float | None]:
    """Arm minus baseline, seed by seed; of a relative effect as a share of the baseline's mean over seeds."""
    ours, base = (values(runs, name, effect.measure) for name in (arm, baseline))
    mean = mean_of(base) if effect.relative else 1.0
    if not mean:
        return [None] * len(ours)
    return [None if a is None or b is None else (a - b) / abs(mean) for a, b in zip(ours, base, strict=True)]


def _row(
    effect: Effect, runs: Runs, arm: str, role: str, baseline: str | None, treated: Sequence[float | None] | None
) -> dict[str, Any]:
    ours = values(runs, arm, effect.measure)
    change: list[float | None] = [] if baseline is None else changes(effect, runs, arm, baseline)
    beyond = [None if a is None or b is None else a - b for a, b in zip(treated, change)] if treated else []
    known = [value for value in change if value is not None]
    return {
        "name": effect.name,
        "statement": effect.statement,
        "measure": effect.measure,
        "arm": arm,
        "role": role,
        "paper": effect.paper.get(arm),
        "paper_note": effect.paper_note,
        "ours": mean_of(ours),
        **dict(zip(("ours_lo", "ours_hi"), t_interval(ours))),
        "baseline": baseline,
        "paper_change": _paper_change(effect, arm, baseline),
        "change": mean_of(change),
        **dict(zip(("change_lo", "change_hi"), t_interval(change))),
        "is_relative": effect.relative,
        "beyond": mean_of(beyond),
        **dict(zip(("beyond_lo", "beyond_hi"), t_interval(beyond))),
        "n_seeds": len(ours),
        "n_higher": sum(value > 0 for value in known) if baseline is not None and len(known) == len(change) else None,
        "verdict": verdict(change, effect.direction) if role == "treated" else None,
    }


def _paper_change(effect: Effect, arm: str, baseline: str | None) -> float | None:
    if baseline is None or arm not in effect.paper or baseline not in effect.paper:
        return None
    difference = effect.paper[arm] - effect.paper[baseline]
    return difference / abs(effect.paper[baseline]) if effect.relative else difference


def verdict(change: Sequence[float | None], direction: int) -> str:
    """agrees where the 95 % interval of the mean change lies on the paper's side of 0, disagrees on the other.

    inconclusive where it contains 0, or where there is none: fewer than 3 seeds, or an undefined value.
    """
    lo, hi = t_interval(change)
    if lo is None or hi is None or lo <= 0 <= hi:
        return "inconclusive"
    return "agrees" if (lo > 0) == (direction > 0) else "disagrees"
