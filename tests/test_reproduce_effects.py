"""Arm beside arm: paired changes, what is left beyond a control, and the verdict."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from memdiag import tables
from memdiag.reproduce_effects import Arm, Control, Effect, changes, judge, verdict
from memdiag.reproduce_report import EffectRow


def effect(**given):
    settings = {
        "name": "e", "statement": "it falls", "measure": "m", "baseline": "base", "treated": "method", "direction": -1,
        "paper": {"base": 4.0, "method": 3.0}, "controls": (Control("other"), Control("mixed_method", "mixed")),
    }  # fmt: skip
    return Effect(**(settings | given))


def runs(**arms):
    """arm -> the measure `m` by seed."""
    return {arm: {seed: {"m": value} for seed, value in enumerate(values)} for arm, values in arms.items()}


HAND = runs(
    base=[2.0, 4.0, 6.0], method=[1.0, 3.5, 4.5], other=[2.0, 3.0, 7.0], mixed=[1.0] * 3, mixed_method=[1.0, 2.0, 1.5]
)
ARMS = ("base", "method", "other", "mixed", "mixed_method")


def test_rows_by_hand():
    base, method, other, mixed, mixed_method = judge(effect(), HAND)
    roles = [row["role"] for row in (base, method, other, mixed, mixed_method)]
    assert roles == ["baseline", "treated", "control", "control", "control"]
    assert base["ours"] == 4.0
    assert {base[name] for name in ("change", "baseline", "verdict", "n_higher", "beyond")} == {None}
    # -1, -.5, -1.5: mean -1, s .5, t(2; .975) = 4.302653, half width 4.302653 * .5 / sqrt 3 = 1.242070
    assert method["change"] == -1.0
    assert (method["change_lo"], method["change_hi"]) == pytest.approx((-2.242070, 0.242070), abs=1e-5)
    assert (method["paper_change"], method["n_higher"], method["verdict"]) == (-1.0, 0, "inconclusive")
    assert method["beyond"] is None
    # other: 0, -1, 1; method - other: -1, .5, -2.5
    assert (other["change"], other["n_higher"], other["beyond"], other["verdict"]) == (0.0, 1, -1.0, None)
    # a control with a baseline of its own: 0, 1, .5, and change against change: -1, -1.5, -2
    assert (mixed_method["baseline"], mixed_method["change"], mixed_method["beyond"]) == ("mixed", 0.5, -1.5)
    assert (mixed["change"], mixed["paper"], mixed_method["paper_change"]) == (None, None, None)


def test_a_relative_change_is_a_share_of_the_baselines_mean():
    _, method, *_ = judge(effect(relative=True), HAND)
    assert method["change"] == -0.25
    assert method["paper_change"] == -0.25
    assert method["is_relative"] is True


def test_rows_are_the_definition_as_a_plain_loop():
    rng = np.random.default_rng(0)
    found = runs(**{arm: rng.normal(5, 2, size=7).tolist() for arm in ARMS})
    for row in judge(effect(relative=True), found):
        ours = [found[row["arm"]][seed]["m"] for seed in range(7)]
        assert row["ours"] == pytest.approx(sum(ours) / 7)
        lo, hi = stats.t.interval(0.95, 6, loc=np.mean(ours), scale=stats.sem(ours))
        assert (row["ours_lo"], row["ours_hi"]) == pytest.approx((lo, hi))
        if row["baseline"] is None:
            continue
        base = [found[row["baseline"]][seed]["m"] for seed in range(7)]
        change = [(a - b) / (sum(base) / 7) for a, b in zip(ours, base)]
        assert row["change"] == pytest.approx(sum(change) / 7)
        assert row["n_higher"] == sum(a > b for a, b in zip(ours, base))


def test_pairs_go_by_seed_whatever_the_order_in_which_they_came():
    shuffled = {arm: dict(reversed(by_seed.items())) for arm, by_seed in HAND.items()}
    assert judge(effect(), shuffled) == judge(effect(), HAND)


def test_a_relative_change_does_not_depend_on_the_unit():
    scaled = {arm: {s: {"m": 1000 * v["m"]} for s, v in by_seed.items()} for arm, by_seed in HAND.items()}
    for a, b in zip(judge(effect(relative=True), HAND), judge(effect(relative=True), scaled)):
        assert b["change"] == pytest.approx(a["change"])
        assert b["beyond"] == pytest.approx(a["beyond"])
        assert b["verdict"] == a["verdict"]


def test_the_verdict_says_on_which_side_of_zero_the_interval_lies():
    assert verdict([-1.0, -1.1, -0.9], -1) == "agrees"
    assert verdict([-1.0, -1.1, -0.9], +1) == "disagrees"
    assert verdict([1.0, 1.1, 0.9], +1) == "agrees"
    assert verdict([1.0, 1.1, 0.9], -1) == "disagrees"
    assert verdict([-1.0, 1.1, 0.9], -1) == "inconclusive"
    assert verdict([-1.0, -1.0], -1) == "inconclusive"  # two seeds have no interval
    assert verdict([-1.0, None, -1.0, -1.0], -1) == "inconclusive"
    assert verdict([0.0, 0.0, 0.0], -1) == "inconclusive"
    assert verdict([], 1) == "inconclusive"


def test_a_planted_effect_is_found_and_an_absent_one_is_not():
    """Five seeds that differ by 3, an effect of .2 with noise of .05 in each pair; 400 worlds."""
    rng = np.random.default_rng(1)
    found = {"agrees": 0, "disagrees": 0, "inconclusive": 0}
    absent = dict(found)
    for _ in range(400):
        seeds = rng.normal(10, 3, size=5)
        base, noise = seeds + rng.normal(0, 0.05, size=5), rng.normal(0, 0.05, size=5)
        arms = {"base": base.tolist(), "other": base.tolist(), "mixed": base.tolist(), "mixed_method": base.tolist()}
        for truth, count in ((-0.2, found), (0.0, absent)):
            _, method, *_ = judge(effect(), runs(method=(base + truth + noise).tolist(), **arms))
            count[method["verdict"]] += 1
    assert found["agrees"] > 390
    assert found["disagrees"] == 0
    assert 0.92 < absent["inconclusive"] / 400 < 0.98  # one in twenty by chance


def test_undefined_values_are_null_and_never_a_selection():
    given = {"method": [1.0, None, 4.5], "other": [1.0] * 3, "mixed": [0.0] * 3, "mixed_method": [1.0] * 3}
    broken = runs(base=[2.0, 4.0, 6.0], **given)
    _, method, other, _, mixed_method = judge(effect(relative=True), broken)
    for name in ("ours", "ours_lo", "change", "change_lo", "n_higher"):
        assert method[name] is None, name
    assert other["beyond"] is None
    assert mixed_method["change"] is None  # a share of 0


def test_no_change_of_a_relative_effect_without_a_baseline():
    assert changes(effect(relative=True), runs(base=[0.0, 0.0], method=[1.0, 2.0]), "method", "base") == [None, None]
    assert changes(effect(), runs(base=[0.0, 0.0], method=[1.0, 2.0]), "method", "base") == [1.0, 2.0]


def test_arms_come_once_each_the_baseline_first():
    assert effect().arms() == ["base", "method", "other", "mixed", "mixed_method"]
    assert effect(controls=(Control("base"), Control("other"), Control("other"))).arms() == ["base", "method", "other"]
    assert Arm("a").needs is None


def test_the_rows_fit_the_report():
    batch = tables.to_batch(EffectRow, judge(effect(), HAND))
    assert batch.num_rows == 5
    assert pa.types.is_float64(batch.schema.field("beyond").type)
    assert all(math.isfinite(v) for v in batch["ours"].to_pylist())
