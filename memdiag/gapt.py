"""Gated phase transition (GAPT): when does training compress, and when does it go back to memorizing?

The gate of Yu, "Memorization-Compression Cycles Improve Generalization" (arXiv:2505.08727), Algorithm 1, with cross-
entropy L, the entropy MBE_i of every active layer i, the best values E and M_i since they were last reset (at first ∞),
thresholds δ, patiences p and a tolerance τ:

    memorize:  ΔE = E − L;  E ← min(E, L);  s ← 0 if ΔE > δ_CE else s + 1
               s ≥ p_CE:        compress;  s' ← 0;  E ← ∞;  M_i ← ∞
    compress:  E ← min(E, L)
               L > E (1 + τ):   memorize;  s ← 0                         (a spike; M_i stays as it was)
               ΔM = max_i (M_i − MBE_i);  M_i ← min(M_i, MBE_i);  s' ← 0 if ΔM > δ_MBE else s' + 1
               s' ≥ p_MBE:      memorize;  s ← 0

Patience counts updates in a row of which none beats the best value so far by more than δ: slow steady progress is a
plateau too. `relative` is the author's later rule: gains as shares of the best values, which are never reset, and the
mean of the layers instead of each. `none`, `constant` and `random` are the controls.

No torch: a gate is a value, and `advance` gives the next one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memdiag.errors import InputError, unknown

GATES = ("paper", "relative", "none", "constant", "random")
MEMORIZE, COMPRESS = "memorize", "compress"
CE_PLATEAU, MBE_PLATEAU, CE_SPIKE, SCHEDULE = "ce_plateau", "mbe_plateau", "ce_spike", "schedule"


@dataclass(frozen=True)
class Rule:
    """When a gate switches. Thresholds of `relative` are shares, those of `paper` nats."""

    gate: str = "paper"
    ce_delta: float = 0.01
    mbe_delta: float = 0.01
    ce_patience: int = 125  # updates
    mbe_patience: int = 75
    spike: float = 0.1  # τ, a share
    smoothing: float = 0.9  # of the running means that the gate sees; 0: it sees every update as it is
    reset_on_enter: bool | None = None  # forget the best values when compression begins; None: as the gate's source
    reset_on_exit: bool = False  # forget the best MBE when it ends
    # the random schedule
    steps: int = 0
    share: float = 0.5  # of updates that compress
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise unknown("gate", self.gate, GATES)
        for name in ("ce_patience", "mbe_patience"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise InputError(f"--{name.replace('_', '-')} must be at least 1 update, got {getattr(self, name)}")
        if self.steps < 0:
            raise InputError(f"--steps must be at least 0, got {self.steps}")
        for name in ("ce_delta", "mbe_delta", "spike"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')} must be a finite number >= 0, got {getattr(self, name)}")
        if not 0 <= self.smoothing < 1:
            raise InputError(f"--smoothing must be at least 0 and less than 1, got {self.smoothing}")
        if not 0 <= self.share <= 1:
            raise InputError(f"--share must be a share from 0 to 1, got {self.share}")

    @property
    def forgets_on_enter(self) -> bool:
        """Whether the best values are reset when compression begins: by default in `paper` only."""
        return self.gate == "paper" if self.reset_on_enter is None else self.reset_on_enter


@dataclass(frozen=True)
class Gate:
    """The state after some updates; `phase` is that of the update to come."""

    rule: Rule
    phase: str = MEMORIZE
    reason: str | None = None  # why the last update switched the phase; None: it did not
    seen: int = 0  # updates
    skipped: int = 0  # updates without a finite value, which changed nothing else
    ce_stalled: int = 0  # s, updates
    mbe_stalled: int = 0
    best_ce: float = math.inf  # E
    best_mbe: tuple[float, ...] | None = None  # M_i; None: ∞
    mean_ce: float | None = None  # running means
    mean_mbe: tuple[float, ...] | None = None

    def advance(self, ce: float, mbe: Sequence[float]) -> Gate:
        """The gate after one optimizer update, whose values are of all its examples on all devices.

        Args:
            ce: cross-entropy in nats (or another loss, ≥ 0).
            mbe: entropy of each active layer in nats, always of the same layers.
        Raises:
            ValueError: of a gate that looks at them, another number of layers than before, or none.
        """
        ce, mbe = float(ce), tuple(map(float, mbe))
        is_finite = math.isfinite(ce) and all(map(math.isfinite, mbe))
        seen = dataclasses.replace(self, seen=self.seen + 1, skipped=self.skipped + (not is_finite), reason=None)
        if self.rule.gate == "random":
            return _scheduled(seen)
        if self.rule.gate in ("none", "constant") or not is_finite:
            return seen
        smoothed = seen._smooth(ce, mbe)
        return _relative(smoothed) if self.rule.gate == "relative" else _paper(smoothed)

    def _smooth(self, ce: float, mbe: tuple[float, ...]) -> Gate:
        beta = self.rule.smoothing
        if not mbe:
            raise ValueError("mbe is of no layer")
        if self.mean_ce is None or self.mean_mbe is None:
            return dataclasses.replace(self, mean_ce=ce, mean_mbe=mbe)
        if len(mbe) != len(self.mean_mbe):
            raise ValueError(f"mbe is of {len(mbe)} layers; it was of {len(self.mean_mbe)}")
        layers = tuple(beta * old + (1 - beta) * new for old, new in zip(self.mean_mbe, mbe))
        return dataclasses.replace(self, mean_ce=beta * self.mean_ce + (1 - beta) * ce, mean_mbe=layers)

    def to_json(self) -> dict[str, Any]:
        """The state without its rule, for a checkpoint; infinities are null."""
        state = {k: v for k, v in dataclasses.asdict(self).items() if k != "rule"}
        return state | {"best_ce": None if math.isinf(self.best_ce) else self.best_ce}

    @classmethod
    def from_json(cls, rule: Rule, state: Mapping[str, Any]) -> Gate:
        """What `to_json` gave, under the same rule."""
        layers = {name: None if (v := state[name]) is None else tuple(v) for name in ("best_mbe", "mean_mbe")}
        best = math.inf if state["best_ce"] is None else state["best_ce"]
        return cls(rule=rule, **{**state, **layers, "best_ce": best})


def start(rule: Rule) -> Gate:
    """The gate before the first update."""
    if rule.gate == "random":
        return _scheduled(Gate(rule))
    return Gate(rule, phase=COMPRESS if rule.gate == "constant" else MEMORIZE)


def _paper(gate: Gate) -> Gate:
    rule, ce, mbe = gate.rule, gate.mean_ce, gate.mean_mbe
    assert ce is not None
    assert mbe is not None
    gained, best_ce = gate.best_ce - ce, min(gate.best_ce, ce)
    gate = dataclasses.replace(gate, best_ce=best_ce)
    if gate.phase == MEMORIZE:
        stalled = 0 if gained > rule.ce_delta else gate.ce_stalled + 1
        gate = dataclasses.replace(gate, ce_stalled=stalled)
        return _enter(gate, CE_PLATEAU) if stalled >= rule.ce_patience else gate
    if ce > best_ce * (1 + rule.spike):
        return _leave(gate, CE_SPIKE)
    old = gate.best_mbe or (math.inf,) * len(mbe)
    gained = max(a - b for a, b in zip(old, mbe))
    stalled = 0 if gained > rule.mbe_delta else gate.mbe_stalled + 1
    gate = dataclasses.replace(gate, best_mbe=tuple(map(min, old, mbe)), mbe_stalled=stalled)
    return _leave(gate, MBE_PLATEAU) if stalled >= rule.mbe_patience else gate


def _relative(gate: Gate) -> Gate:
    """Author's code: mod_gpt, class GAPT. Both gains are measured, and both minima kept, in either phase."""
    rule, ce, mbe = gate.rule, gate.mean_ce, gate.mean_mbe
    assert ce is not None
    assert mbe is not None
    mean = sum(mbe) / len(mbe)
    best_mbe = gate.best_mbe[0] if gate.best_mbe else math.inf
    ce_gain, mbe_gain = _share_gained(ce, gate.best_ce), _share_gained(mean, best_mbe)
    gate = dataclasses.replace(gate, best_ce=min(gate.best_ce, ce), best_mbe=(min(best_mbe, mean),))
    if gate.phase == MEMORIZE:
        stalled = 0 if ce_gain > rule.ce_delta else gate.ce_stalled + 1
        if stalled < rule.ce_patience:
            return dataclasses.replace(gate, ce_stalled=stalled)
        return _enter(dataclasses.replace(gate, ce_stalled=0), CE_PLATEAU)
    if ce_gain < -rule.spike:
        return _leave(dataclasses.replace(gate, mbe_stalled=0), CE_SPIKE, ce_stalled=gate.ce_stalled)
    stalled = 0 if mbe_gain > rule.mbe_delta else gate.mbe_stalled + 1
    if stalled < rule.mbe_patience:
        return dataclasses.replace(gate, mbe_stalled=stalled)
    return _leave(dataclasses.replace(gate, mbe_stalled=0), MBE_PLATEAU, ce_stalled=gate.ce_stalled)


def _share_gained(value: float, best: float) -> float:
    """(best − value) / best; 0 where there is no best yet, or it is 0."""
    return 0.0 if math.isinf(best) or abs(best) < 1e-9 else (best - value) / max(abs(best), 1e-6)


def _enter(gate: Gate, reason: str) -> Gate:
    gate = dataclasses.replace(gate, phase=COMPRESS, reason=reason, mbe_stalled=0)
    return dataclasses.replace(gate, best_ce=math.inf, best_mbe=None) if gate.rule.forgets_on_enter else gate


def _leave(gate: Gate, reason: str, ce_stalled: int = 0) -> Gate:
    gate = dataclasses.replace(gate, phase=MEMORIZE, reason=reason, ce_stalled=ce_stalled)
    return dataclasses.replace(gate, best_mbe=None) if gate.rule.reset_on_exit else gate


def _scheduled(gate: Gate) -> Gate:
    schedule = random_schedule(gate.rule.steps, gate.rule.share, gate.rule.mbe_patience, gate.rule.seed)
    if gate.seen >= len(schedule):
        return gate
    phase = COMPRESS if schedule[gate.seen] else MEMORIZE
    return dataclasses.replace(gate, phase=phase, reason=SCHEDULE if gate.seen and phase != gate.phase else None)


@functools.lru_cache(maxsize=8)
def random_schedule(steps: int, share: float, length: int, seed: int) -> tuple[bool, ...]:
    """Which of `steps` updates compress: round(share · steps) of them, in stretches of `length` at random places.

    Both kinds of updates are cut into stretches of `length` (the last of each may be shorter), and the stretches are
    shuffled, so that the share is exact and its phases are about as long as those of a gate with that patience.
    """
    n = round(share * steps)
    stretches = [
        [kind] * min(length, total - start)
        for kind, total in ((True, n), (False, steps - n))
        for start in range(0, total, length)
    ]
    random.Random(seed).shuffle(stretches)
    return tuple(kind for stretch in stretches for kind in stretch)
