"""Gate of GAPT: worked traces, Algorithm 1 and the author's later step as plain loops, invariances, checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memdiag import gapt
from memdiag.errors import InputError
from memdiag.gapt import COMPRESS, MEMORIZE, Gate, Rule

INF, NAN = math.inf, math.nan
NUMBER = {MEMORIZE: 1, COMPRESS: 2}  # φ
Updates = Sequence[tuple[float, Sequence[float]]]
both = pytest.mark.parametrize("name", ["paper", "relative"])


def _run(rule: Rule, updates: Iterable[tuple[float, Sequence[float]]]) -> list[Gate]:
    """The gates after each update."""
    gates = itertools.accumulate(updates, lambda gate, update: gate.advance(*update), initial=gapt.start(rule))
    return list(gates)[1:]


def _phases(gates: Iterable[Gate]) -> list[int]:
    return [NUMBER[gate.phase] for gate in gates]


# --- by hand -----------------------------------------------------------------------------------------------------

TRACE = [  # CE, MBE | paper: φ s_m s_c E M | relative: φ s_m s_a
    (5.00, 1.00, (1, 0, 0, 5.00, INF), (1, 1, 0)),
    (4.50, 1.02, (1, 0, 0, 4.50, INF), (1, 0, 0)),
    (4.49, 1.03, (1, 1, 0, 4.49, INF), (1, 1, 0)),
    (4.48, 1.03, (1, 2, 0, 4.48, INF), (1, 2, 0)),
    (4.47, 1.04, (2, 3, 0, INF, INF), (2, 0, 0)),
    (4.50, 0.90, (2, 3, 0, 4.50, 0.90), (2, 0, 0)),
    (4.52, 0.80, (2, 3, 0, 4.50, 0.80), (2, 0, 0)),
    (4.53, 0.795, (2, 3, 1, 4.50, 0.795), (2, 0, 1)),
    (4.55, 0.794, (2, 3, 2, 4.50, 0.794), (2, 0, 2)),
    (4.56, 0.7935, (1, 0, 3, 4.50, 0.7935), (1, 0, 0)),
    (4.30, 0.80, (1, 0, 3, 4.30, 0.7935), (1, 0, 0)),
    (4.10, 0.82, (1, 0, 3, 4.10, 0.7935), (1, 0, 0)),
    (4.09, 0.83, (1, 1, 3, 4.09, 0.7935), (1, 1, 0)),
    (4.085, 0.83, (1, 2, 3, 4.085, 0.7935), (1, 2, 0)),
    (4.08, 0.84, (2, 3, 0, INF, INF), (2, 0, 0)),
    (4.20, 0.60, (2, 3, 0, 4.20, 0.60), (2, 0, 0)),
    (4.70, 0.40, (1, 0, 0, 4.20, 0.60), (1, 0, 0)),
    (4.10, 0.50, (1, 0, 0, 4.10, 0.60), (1, 1, 0)),
    (4.00, 0.55, (1, 0, 0, 4.00, 0.60), (1, 0, 0)),
]
SWITCHES = {5: "ce_plateau", 10: "mbe_plateau", 15: "ce_plateau", 17: "ce_spike"}


def _traced(name: str, **changes: Any) -> list[Gate]:
    delta = {"paper": 0.05, "relative": 0.01}[name]
    values = {"ce_delta": delta, "mbe_delta": delta, "ce_patience": 3, "mbe_patience": 3, "spike": 0.1}
    rule = Rule(gate=name, smoothing=0, **{**values, **changes})
    return _run(rule, [(ce, [mbe]) for ce, mbe, *_ in TRACE])


def test_trace_of_algorithm_1_by_hand() -> None:
    for t, (gate, (*_, expected, _)) in enumerate(zip(_traced("paper"), TRACE), start=1):
        best_mbe = INF if gate.best_mbe is None else gate.best_mbe[0]
        assert (NUMBER[gate.phase], gate.ce_stalled, gate.mbe_stalled, gate.best_ce, best_mbe) == expected, t


def test_trace_of_the_authors_later_rule_by_hand() -> None:
    for t, (gate, (*_, expected)) in enumerate(zip(_traced("relative"), TRACE), start=1):
        assert (NUMBER[gate.phase], gate.ce_stalled, gate.mbe_stalled) == expected, t


@both
def test_every_switch_of_the_trace_has_its_reason(name: str) -> None:
    gates = _traced(name)
    assert {gate.seen: gate.reason for gate in gates if gate.reason} == SWITCHES
    assert [gate.seen for gate in gates] == list(range(1, 20))
    assert not any(gate.skipped for gate in gates)


def test_a_best_mbe_of_zero_leaves_no_share_to_gain() -> None:
    rule = Rule(gate="relative", ce_patience=2, mbe_patience=2, smoothing=0)
    gates = _run(rule, [(1, [mbe]) for mbe in (0, 0, 0.5, 0.4, 0.3, 0.2)])
    assert _phases(gates) == [1, 2, 2, 1, 1, 2]


def test_slow_steady_progress_is_a_plateau() -> None:
    rule = Rule(ce_delta=0.01, mbe_delta=0.01, ce_patience=3, mbe_patience=2, smoothing=0)
    gates = _run(rule, [(2 - 0.009 * t, [1 - 0.009 * t]) for t in range(8)])
    assert _phases(gates) == [1, 1, 1, 2, 2, 2, 1, 1]
    assert [gate.reason for gate in gates if gate.reason] == ["ce_plateau", "mbe_plateau"]


@pytest.mark.parametrize(("name", "phase"), [("none", MEMORIZE), ("constant", COMPRESS)])
def test_gates_without_transitions_keep_their_phase_for_ever(name: str, phase: str) -> None:
    rule = Rule(gate=name, ce_patience=1, mbe_patience=1)
    gates = [gapt.start(rule), *_run(rule, [(1, [1]), (1, [1]), (9, [0]), (1, [1]), (1, [1])])]
    assert {gate.phase for gate in gates} == {phase}
    assert not any(gate.reason for gate in gates)
    assert [gate.seen for gate in gates] == list(range(6))


@both
def test_the_gate_starts_by_memorizing_with_nothing_seen(name: str) -> None:
    assert gapt.start(Rule(gate=name)) == Gate(Rule(gate=name))
    assert gapt.start(Rule(gate=name)).phase == MEMORIZE


# --- the definitions as plain loops ------------------------------------------------------------------------------


def _algorithm_1(rule: Rule, updates: Updates) -> Iterator[tuple[Any, ...]]:
    """φ, s_m, s_c, E, M after every update."""
    phi, s_m, s_c, best = 1, 0, 0, INF
    layers = [INF] * len(updates[0][1])
    for ce, mbe in updates:
        d_ce = best - ce
        if ce < best:
            best = ce
        if phi == 1:
            s_m += 1
            if d_ce > rule.ce_delta:
                s_m = 0
            if s_m >= rule.ce_patience:
                phi, s_c = 2, 0
                if rule.reset_on_enter is not False:
                    best, layers = INF, [INF] * len(mbe)
        elif ce > best * (1 + rule.spike):
            phi, s_m = 1, 0
            if rule.reset_on_exit:
                layers = [INF] * len(mbe)
        else:
            improved = False
            for i, value in enumerate(mbe):
                improved |= layers[i] - value > rule.mbe_delta
                if value < layers[i]:
                    layers[i] = value
            s_c += 1
            if improved:
                s_c = 0
            if s_c >= rule.mbe_patience:
                phi, s_m = 1, 0
                if rule.reset_on_exit:
                    layers = [INF] * len(mbe)
        yield phi, s_m, s_c, best, list(layers)


def _later_step(rule: Rule, updates: Updates) -> Iterator[tuple[Any, ...]]:
    """φ, s_m, s_a, and the minima of CE and of the mean MBE after every update."""

    def gain(value: float, best: float) -> float:
        if best == INF or abs(best) < 1e-9:
            return 0
        return (best - value) / max(abs(best), 1e-6)

    phi, s_m, s_a, min_m, min_a = 1, 0, 0, INF, INF
    for ce, mbe in updates:
        aux = sum(mbe) / len(mbe)
        g_m, g_a = gain(ce, min_m), gain(aux, min_a)
        min_m, min_a = min(min_m, ce), min(min_a, aux)
        if phi == 1:
            s_m = 0 if g_m > rule.ce_delta else s_m + 1
            if s_m >= rule.ce_patience:
                phi, s_m = 2, 0
                if rule.reset_on_enter:
                    min_m = min_a = INF
        else:
            s_a = 0 if g_a > rule.mbe_delta else s_a + 1
            if g_m < -rule.spike or s_a >= rule.mbe_patience:
                phi, s_a = 1, 0
                if rule.reset_on_exit:
                    min_a = INF
        yield phi, s_m, s_a, min_m, min_a


DELTAS = st.sampled_from([0.0, 0.0625, 0.25])  # of the values' grid, so that gains equal to a threshold occur
RULES = {
    "ce_delta": DELTAS,
    "mbe_delta": DELTAS,
    "ce_patience": st.integers(1, 4),
    "mbe_patience": st.integers(1, 4),
    "spike": st.sampled_from([0.0, 0.125, 0.5, 20.0]),
    "reset_on_enter": st.sampled_from([None, True, False]),
    "reset_on_exit": st.booleans(),
}
GRID = st.integers(0, 48).map(lambda n: n / 16)


def _rules(*names: str, smoothing: float = 0) -> st.SearchStrategy[Rule]:
    return st.builds(Rule, gate=st.sampled_from(names), smoothing=st.just(smoothing), **RULES)


def _updates(
    values: st.SearchStrategy[float] = GRID, layers: tuple[int, int] = (1, 4), most: int = 40
) -> st.SearchStrategy[list[tuple[float, list[float]]]]:
    """CE and the MBE of every layer of some updates."""

    def of(n: int) -> st.SearchStrategy[list[tuple[float, list[float]]]]:
        return st.lists(st.tuples(values, st.lists(values, min_size=n, max_size=n)), min_size=1, max_size=most)

    return st.integers(*layers).flatmap(of)


SOME = settings(max_examples=150, deadline=None, derandomize=True)
FLOATS = st.floats(0, 4)


@SOME
@given(rule=_rules("paper"), updates=st.one_of(_updates(), _updates(FLOATS)))
def test_paper_is_algorithm_1_as_a_plain_loop(rule: Rule, updates: Updates) -> None:
    for gate, expected in zip(_run(rule, updates), _algorithm_1(rule, updates), strict=True):
        best = [INF] * len(updates[0][1]) if gate.best_mbe is None else list(gate.best_mbe)
        assert (NUMBER[gate.phase], gate.ce_stalled, gate.mbe_stalled, gate.best_ce, best) == expected


@SOME
@given(rule=_rules("relative"), updates=st.one_of(_updates(), _updates(FLOATS)))
def test_relative_is_the_authors_later_step_as_a_plain_loop(rule: Rule, updates: Updates) -> None:
    for gate, expected in zip(_run(rule, updates), _later_step(rule, updates), strict=True):
        best = INF if gate.best_mbe is None else gate.best_mbe[0]
        assert (NUMBER[gate.phase], gate.ce_stalled, gate.mbe_stalled, gate.best_ce, best) == expected


@SOME
@given(rule=_rules("paper", "relative"), updates=_updates())
def test_a_reason_is_given_at_switches_alone_and_fits_the_phase_that_ends(rule: Rule, updates: Updates) -> None:
    gates = [gapt.start(rule), *_run(rule, updates)]
    for before, after in itertools.pairwise(gates):
        if before.phase == after.phase:
            assert after.reason is None
        else:
            assert after.reason in (("ce_plateau",) if before.phase == MEMORIZE else ("mbe_plateau", "ce_spike"))


# --- invariances -------------------------------------------------------------------------------------------------


def _decisions(gate: Gate) -> tuple[Any, ...]:
    return gate.phase, gate.reason, gate.ce_stalled, gate.mbe_stalled


@SOME
@given(rule=_rules("paper", "relative", smoothing=0.5), updates=_updates(most=20), data=st.data())
def test_the_order_of_layers_does_not_matter(rule: Rule, updates: Updates, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(updates[0][1]))))
    permuted = [(ce, [mbe[i] for i in order]) for ce, mbe in updates]
    assert list(map(_decisions, _run(rule, permuted))) == list(map(_decisions, _run(rule, updates)))


@SOME
@given(
    rule=_rules("relative", smoothing=0.9),
    updates=_updates(st.integers(1, 48).map(lambda n: n / 16)),
    powers=st.tuples(st.integers(-8, 8), st.integers(-8, 8)),
)
def test_relative_is_the_same_when_ce_and_mbe_are_multiplied(
    rule: Rule, updates: Updates, powers: tuple[int, int]
) -> None:
    a, b = (2.0**power for power in powers)  # of two: products are exact
    scaled = [(a * ce, [b * value for value in mbe]) for ce, mbe in updates]
    assert list(map(_decisions, _run(rule, scaled))) == list(map(_decisions, _run(rule, updates)))


@SOME
@given(rule=_rules("paper", "relative", smoothing=0.9), updates=_updates(FLOATS))
def test_smoothing_is_a_running_mean_that_starts_at_the_first_value(rule: Rule, updates: Updates) -> None:
    means, mean_ce, mean_mbe = [], *updates[0]
    for t, (ce, mbe) in enumerate(updates):
        if t:
            mean_ce = 0.9 * mean_ce + (1 - 0.9) * ce
            mean_mbe = [0.9 * old + (1 - 0.9) * new for old, new in zip(mean_mbe, mbe)]
        means.append((mean_ce, mean_mbe))
    plain = _run(dataclasses.replace(rule, smoothing=0), means)
    assert [dataclasses.replace(gate, rule=rule) for gate in plain] == _run(rule, updates)


@SOME
@given(rule=_rules("paper"), updates=_updates(), data=st.data())
def test_a_layer_that_never_improves_changes_nothing_in_paper(
    rule: Rule, updates: Updates, data: st.DataObject
) -> None:
    n, place = len(updates), data.draw(st.integers(0, len(updates[0][1])))
    rising = itertools.accumulate(data.draw(st.lists(GRID, min_size=n, max_size=n)))
    more = [(ce, [*mbe[:place], value, *mbe[place:]]) for (ce, mbe), value in zip(updates, rising)]
    for with_it, without in zip(_run(rule, more), _run(rule, updates)):
        assert _decisions(with_it) == _decisions(without)
        assert with_it.best_ce == without.best_ce
        if without.best_mbe is None:
            assert with_it.best_mbe is None
        else:
            assert with_it.best_mbe is not None
            assert with_it.best_mbe[:place] + with_it.best_mbe[place + 1 :] == without.best_mbe


# --- values that are not finite ----------------------------------------------------------------------------------


def test_an_update_without_a_finite_value_does_not_count_towards_patience() -> None:
    relative = _run(Rule(gate="relative", ce_patience=2, smoothing=0), [(1, [1]), (NAN, [1]), (1, [1])])
    assert _phases(relative) == [1, 1, 2]
    assert [gate.skipped for gate in relative] == [0, 1, 1]
    paper = _run(Rule(gate="paper", ce_patience=2, smoothing=0), [(1, [1]), (1, [1]), (1, [NAN]), (1, [1])])
    assert _phases(paper) == [1, 1, 1, 2]


@SOME
@given(
    rule=_rules("paper", "relative", "none", "constant", smoothing=0.5),
    updates=_updates(layers=(2, 2), most=12),
    bad=st.sampled_from([(NAN, [1, 1]), (INF, [1, 1]), (-INF, [1, 1]), (1, [1, NAN]), (1, [INF, 1])]),
    data=st.data(),
)
def test_an_update_without_a_finite_value_is_counted_and_changes_nothing_else(
    rule: Rule, updates: Updates, bad: tuple[float, list[float]], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(updates)))
    before, *after = [gapt.start(rule), *_run(rule, updates)][at:]
    skipping = before.advance(*bad)
    assert skipping == dataclasses.replace(before, seen=at + 1, skipped=1, reason=None)
    for update, gate in zip(updates[at:], after, strict=True):
        skipping = skipping.advance(*update)
        assert skipping == dataclasses.replace(gate, seen=gate.seen + 1, skipped=1)


# --- checkpoints -------------------------------------------------------------------------------------------------


@SOME
@given(
    rule=_rules(*gapt.GATES, smoothing=0.9),
    updates=_updates(st.one_of(FLOATS, st.sampled_from([NAN, INF, 1.0]))),
)
def test_a_gate_read_from_a_checkpoint_goes_on_as_the_one_written(rule: Rule, updates: Updates) -> None:
    rule = dataclasses.replace(rule, steps=len(updates) if rule.gate == "random" else 0)
    gate = read = gapt.start(rule)
    for update in updates:
        written = json.dumps(read.to_json(), allow_nan=False)
        read = Gate.from_json(rule, json.loads(written))
        assert read == gate
        gate, read = gate.advance(*update), read.advance(*update)
    assert Gate.from_json(rule, json.loads(json.dumps(gate.to_json(), allow_nan=False))) == read


def test_a_checkpoint_has_the_state_without_the_rule_and_no_infinities() -> None:
    assert gapt.start(Rule()).to_json() == {
        **dict.fromkeys(["reason", "best_ce", "best_mbe", "mean_ce", "mean_mbe"]),
        **dict.fromkeys(["seen", "skipped", "ce_stalled", "mbe_stalled"], 0),
        "phase": "memorize",
    }


# --- resets ------------------------------------------------------------------------------------------------------


def test_paper_alone_forgets_its_best_values_on_enter_by_default() -> None:
    assert {name: Rule(gate=name).forgets_on_enter for name in ("paper", "relative")} == {
        "paper": True,
        "relative": False,
    }
    for forgets in (False, True):
        assert {Rule(gate=name, reset_on_enter=forgets).forgets_on_enter for name in gapt.GATES} == {forgets}


@pytest.mark.parametrize(
    ("name", "forgets", "kept"),
    [
        ("paper", None, None),
        ("paper", True, None),
        ("paper", False, (4.08, (0.7935,))),
        ("relative", None, (4.08, (0.7935,))),
        ("relative", True, None),
        ("relative", False, (4.08, (0.7935,))),
    ],
)
def test_reset_on_enter_forgets_both_best_values(name: str, forgets: bool | None, kept: Any) -> None:
    gate = _traced(name, reset_on_enter=forgets)[14]  # the second time that compression begins
    assert (gate.phase, gate.reason) == (COMPRESS, "ce_plateau")
    assert (gate.best_ce, gate.best_mbe) == (kept or (INF, None))


@both
@pytest.mark.parametrize("update", [10, 17], ids=["plateau", "spike"])
def test_reset_on_exit_forgets_the_best_mbe_alone(name: str, update: int) -> None:
    keeps, forgets = (_traced(name, reset_on_exit=value)[:update][-1] for value in (False, True))
    assert keeps.phase == MEMORIZE
    assert keeps.reason in ("mbe_plateau", "ce_spike")
    assert keeps.best_mbe is not None
    assert forgets == dataclasses.replace(keeps, best_mbe=None, rule=forgets.rule)


def test_the_best_mbe_is_not_updated_on_a_spike_in_paper() -> None:
    spiked = (4.70, [0.40, 0.55])
    for name, best in (("paper", (0.60, 0.50)), ("relative", (0.475,))):
        rule = Rule(gate=name, ce_patience=1, mbe_patience=9, smoothing=0)
        gates = _run(rule, [(4.2, [1, 1]), (4.2, [1, 1]), (4.2, [0.60, 0.50]), spiked])
        assert gates[-1].reason == "ce_spike"
        assert gates[-1].best_mbe == pytest.approx(best, abs=1e-12)


def test_the_best_ce_of_compression_is_carried_over_on_return() -> None:
    rule = Rule(ce_delta=0.05, ce_patience=1, mbe_patience=1, smoothing=0)
    *_, left, next_one = _run(rule, [(4, [1]), (4, [1]), (4.2, [0.9]), (4.3, [0.9]), (4.19, [0.9])])
    assert (left.phase, left.reason, left.best_ce) == (MEMORIZE, "mbe_plateau", 4.2)
    assert (next_one.ce_stalled, next_one.phase) == (1, COMPRESS)  # 0.01 less than 4.2 is no progress


def test_a_spike_is_measured_against_the_best_ce_since_the_last_reset() -> None:
    updates = [(4, [1]), (4, [1]), (4.45, [0.5])]  # 11 % above the best CE of memorization
    values = {"ce_patience": 1, "mbe_patience": 9, "spike": 0.1, "smoothing": 0}
    assert _run(Rule(**values), updates)[-1].phase == COMPRESS
    assert _run(Rule(**values, reset_on_enter=False), updates)[-1].reason == "ce_spike"


# --- the random schedule -----------------------------------------------------------------------------------------

SCHEDULES = {
    "steps": st.integers(0, 120),
    "share": st.floats(0, 1),
    "length": st.integers(1, 20),
    "seed": st.integers(0, 2**32 - 1),
}


@SOME
@given(**SCHEDULES)
def test_the_random_schedule_has_the_exact_share_in_stretches_of_the_length(
    steps: int, share: float, length: int, seed: int
) -> None:
    schedule = gapt.random_schedule(steps, share, length, seed)
    assert len(schedule) == steps
    assert sum(schedule) == round(share * steps)
    for kind in (True, False):
        runs = [len(list(run)) for value, run in itertools.groupby(schedule) if value is kind]
        shorter = [run % length for run in runs if run % length]
        rest = schedule.count(kind) % length
        assert shorter == ([rest] if rest else [])


def test_the_random_schedule_is_by_seed() -> None:
    by_seed = []
    for _ in range(2):
        gapt.random_schedule.cache_clear()
        by_seed.append([gapt.random_schedule(40, 0.5, 5, seed) for seed in range(10)])
    assert by_seed[0] == by_seed[1]
    assert len(set(by_seed[0])) > 5
    assert len({schedule[0] for schedule in by_seed[0]}) == 2  # either kind may come first


@pytest.mark.parametrize("length", [1, 3, 100])
def test_the_random_schedule_at_its_ends(length: int) -> None:
    assert gapt.random_schedule(7, 0.0, length, 0) == (False,) * 7
    assert gapt.random_schedule(7, 1.0, length, 0) == (True,) * 7
    assert gapt.random_schedule(0, 0.5, length, 0) == ()


@SOME
@given(**SCHEDULES, values=_updates(st.one_of(FLOATS, st.just(NAN)), most=8))
def test_the_random_gate_follows_its_schedule_whatever_the_values(
    steps: int, share: float, length: int, seed: int, values: Updates
) -> None:
    rule = Rule(gate="random", steps=steps, share=share, mbe_patience=length, seed=seed, ce_patience=1)
    schedule = gapt.random_schedule(steps, share, length, seed)
    gates = [gapt.start(rule), *_run(rule, itertools.islice(itertools.cycle(values), steps))]
    assert [gate.phase == COMPRESS for gate in gates[:steps]] == list(schedule)
    assert gates[0].reason is None
    for before, after in itertools.pairwise(gates):
        assert after.reason == (None if before.phase == after.phase else "schedule")
    assert gates[-1].phase == (gates[-2].phase if steps else MEMORIZE)  # there is no update to come


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *((f"{kind}_patience", n, f"--{kind}-patience must be") for kind in ("ce", "mbe") for n in (0, -5)),
        *((f"{kind}_delta", x, f"--{kind}-delta must be") for kind in ("ce", "mbe") for x in (-0.01, NAN, INF)),
        *(("spike", x, "--spike must be") for x in (-0.01, NAN, INF)),
        *(("smoothing", x, "--smoothing must be") for x in (1, 1.5, -0.1, NAN)),
        *(("share", x, "--share must be") for x in (-0.1, 1.1, NAN)),
    ],
)
def test_a_rule_out_of_range_names_its_option_and_the_value(field: str, value: float, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message} .*, got {value}$"):
        Rule(**{field: value})


def test_a_rule_at_the_ends_of_its_ranges_is_taken() -> None:
    for share in (0, 1):
        Rule(ce_patience=1, mbe_patience=1, ce_delta=0, mbe_delta=0, spike=0, smoothing=0, share=share)


def test_an_unknown_gate_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"^no gate 'relativ'; there are constant, .*; did you mean 'relative'\?$"):
        Rule(gate="relativ")


@both
@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_layers_is_refused_also_after_a_checkpoint(name: str, layers: int) -> None:
    rule = Rule(gate=name, smoothing=0)
    gate = gapt.start(rule).advance(1, [1, 1])
    for same in (gate, Gate.from_json(rule, gate.to_json())):
        with pytest.raises(ValueError, match=f"mbe is of {layers} layers; it was of 2"):
            same.advance(1, [1] * layers)


# --- values, saving, chance ---------------------------------------------------------------------------------------


@both
def test_a_gate_that_looks_at_layers_refuses_none(name: str) -> None:
    for gate in (gapt.start(Rule(gate=name)), gapt.start(Rule(gate=name)).advance(4, [1])):
        with pytest.raises(ValueError, match=r"^mbe is of no layer$"):
            gate.advance(4, [])


@pytest.mark.parametrize("name", ["none", "constant", "random"])
def test_the_controls_need_no_layers(name: str) -> None:
    assert gapt.start(Rule(gate=name)).advance(4, []).seen == 1


@pytest.mark.parametrize("name", gapt.GATES)
def test_every_gate_counts_updates_without_a_finite_value(name: str) -> None:
    gate = gapt.start(Rule(gate=name, steps=4))
    for ce, mbe in ((1, [1]), (NAN, [1]), (1, [NAN]), (1, [1])):
        gate = gate.advance(ce, mbe)
    assert (gate.seen, gate.skipped) == (4, 2)


@both
def test_numbers_of_any_kind_can_be_saved(name: str) -> None:
    gate = gapt.start(Rule(gate=name)).advance(np.float32(4), np.ones(2, np.float32))
    assert Gate.from_json(gate.rule, json.loads(json.dumps(gate.to_json(), allow_nan=False))) == gate


def test_a_best_value_near_zero_counts_as_a_millionth() -> None:
    rule = Rule(gate="relative", ce_delta=0.25, ce_patience=9, smoothing=0)
    for best, stalled in ((5e-7, 2), (2e-6, 0)):  # a gain of 40 % of the best value
        gate = gapt.start(rule).advance(best, [1]).advance(0.6 * best, [1])
        assert gate.ce_stalled == stalled


def test_a_schedule_leaves_the_global_generator_alone() -> None:
    gapt.random_schedule.cache_clear()
    before = random.getstate()
    gapt.random_schedule(40, 0.5, 5, 0)
    assert random.getstate() == before


def test_another_process_makes_the_same_schedule_without_torch() -> None:
    source = "import sys; from memdiag import gapt; print(gapt.random_schedule(99, .3, 4, 7), 'torch' in sys.modules)"
    command, env = [sys.executable, "-c", source], os.environ | {"PYTHONHASHSEED": "5"}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert ran.stdout.strip() == f"{gapt.random_schedule(99, 0.3, 4, 7)} False"


@both
def test_advancing_leaves_a_gate_as_it_was(name: str) -> None:
    gate = gapt.start(Rule(gate=name)).advance(4, [1])
    before = dataclasses.asdict(gate)
    assert gate.advance(1, [0.1]) == gate.advance(1, [0.1])
    assert dataclasses.asdict(gate) == before


@pytest.mark.parametrize("given", [{"ce_patience": NAN}, {"mbe_patience": 1.5}, {"steps": -1}])
def test_updates_are_counted_in_whole_numbers(given: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"must be at least"):
        Rule(**given)  # type: ignore[arg-type]
