"""The headline figures: their intervals, by hand and by simulation."""

import math

import numpy as np
import pytest

from memdiag.counterfactual_summary import _mean_of, _over_models, noise_floor

T2 = 4.302652729911275  # Student's t, two degrees of freedom, 97.5 %
Z = 1.959963984540054


def models(inside, outside):
    return [{"accuracy_in": a, "accuracy_out": b} for a, b in zip(inside, outside)]


def test_a_mean_over_models_by_hand():
    found = _over_models(models([0.9, 0.8, 0.7], [None] * 3), "accuracy_in")
    half = T2 * 0.1 / math.sqrt(3)
    assert (found.value, found.lo, found.hi, found.n) == pytest.approx((0.8, 0.8 - half, 0.8 + half, 3))


def test_one_model_and_none_have_no_interval():
    one = _over_models(models([0.9], [None]), "accuracy_in")
    assert (one.value, one.lo, one.hi, one.n) == (0.9, None, None, 1)
    assert _over_models(models([0.9], [None]), "accuracy_out").value is None
    assert _mean_of(np.array([0.5, 0.7]), models([0.9], [0.1])).lo is None
    assert _mean_of(np.array([np.nan]), models([0.9, 0.8], [0.1, 0.2])).value is None


def test_what_other_models_would_move_a_mean_by():
    found = noise_floor(models([0.9, 0.8, 0.7], [0.1, 0.1, 0.4]))
    spread = [0.8, 0.7, 0.3]
    assert found == pytest.approx(
        {
            "memorization": T2 * np.std(spread, ddof=1) / math.sqrt(3),
            "p_in": T2 * 0.1 / math.sqrt(3),
            "p_out": T2 * np.std([0.1, 0.1, 0.4], ddof=1) / math.sqrt(3),
        }
    )
    assert noise_floor(models([0.9], [0.1])) == {}
    assert set(noise_floor(models([0.9, 0.8], [None, 0.1]))) == {"p_in"}


def test_a_mean_over_examples_and_models_by_hand():
    mem = np.array([0.0, 1.0, np.nan, 0.5])
    found = _mean_of(mem, models([0.9, 0.8, 0.7], [0.1, 0.1, 0.1]))
    half = math.hypot(Z * 0.5 / math.sqrt(3), T2 * 0.1 / math.sqrt(3))
    assert (found.value, found.lo, found.hi, found.n) == pytest.approx((0.5, 0.5 - half, 0.5 + half, 3))


@pytest.mark.parametrize(("n_models", "spread"), [(8, 0.03), (40, 0.01)])
def test_many_examples_do_not_make_up_for_few_models(n_models, spread):
    """The models differ in how much they learn, all examples with them; the truth is a mean over models of .7."""
    rng = np.random.default_rng(n_models)
    n, covered, without = 2000, 0, 0
    for _ in range(400):
        learned = 0.7 + spread * rng.normal(size=n_models)
        mem = learned.mean() + 0.02 * rng.normal(size=n)
        found = _mean_of(mem, models(learned + 0.1, np.full(n_models, 0.1)))
        covered += found.lo <= 0.7 <= found.hi
        half = Z * mem.std(ddof=1) / math.sqrt(n)  # the control: examples alone
        without += abs(mem.mean() - 0.7) <= half
    assert covered / 400 >= 0.93
    assert without / 400 < 0.5
