"""The paired interval of two rates: by hand, symmetric, by simulation against the bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from memdiag.mean_interval import mean_interval, p_of
from memdiag.paired_rates import of_counts


def test_the_interval_by_hand():
    # 50 pairs: 20 on both sides, 12 lost, 2 won, 16 on neither: rates 0.64 and 0.44
    found = of_counts(20, 12, 2, 16, 0.05)
    w1, w2 = (stats.binomtest(k, 50).proportion_ci(0.95, method="wilson") for k in (32, 22))
    phi = (20 * 16 - 12 * 2 - 25) / math.sqrt(32 * 18 * 22 * 28)
    x, y = 0.44 - w2.low, w1.high - 0.64
    assert found.lo == pytest.approx(-0.2 - math.sqrt(x * x - 2 * phi * x * y + y * y), rel=1e-9)
    x, y = w2.high - 0.44, 0.64 - w1.low
    assert found.hi == pytest.approx(-0.2 + math.sqrt(x * x - 2 * phi * x * y + y * y), rel=1e-9)
    assert (found.value, found.n, found.method) == (pytest.approx(-0.2), 50, "Newcombe, paired")
    assert (found.lo, found.hi) == (pytest.approx(-0.3292, abs=1e-4), pytest.approx(-0.0562, abs=1e-4))


def test_the_correction_stops_at_0_and_leaves_a_negative_correlation_alone():
    def phi_of(a, b, c, d):
        """The correlation that the interval was made with, from its lower end."""
        n, found = a + b + c + d, of_counts(a, b, c, d, 0.05)
        w1, w2 = (stats.binomtest(k, n).proportion_ci(0.95, method="wilson") for k in (a + b, a + c))
        x, y = (a + c) / n - w2.low, w1.high - (a + b) / n
        return (x * x + y * y - (found.value - found.lo) ** 2) / (2 * x * y)

    assert phi_of(3, 3, 2, 3) == pytest.approx(0, abs=1e-9)  # 9 - 6 is less than 11 / 2
    assert phi_of(2, 5, 4, 1) == pytest.approx((2 - 20) / math.sqrt(7 * 5 * 6 * 6))
    assert phi_of(9, 1, 1, 9) == pytest.approx((81 - 1 - 10) / 100)
    assert phi_of(4, 0, 1, 0) == pytest.approx(0, abs=1e-9)


def test_swapped_sides_and_swapped_values_turn_the_interval_round():
    found, swapped, inverted = of_counts(5, 7, 1, 9, 0.1), of_counts(5, 1, 7, 9, 0.1), of_counts(9, 1, 7, 5, 0.1)
    for other in (swapped, inverted):
        assert (other.lo, other.hi) == (pytest.approx(-found.hi), pytest.approx(-found.lo))


def test_the_ends_of_what_there_can_be():
    assert of_counts(0, 0, 0, 0, 0.05).value is None
    unchanged = of_counts(0, 0, 0, 30, 0.05)
    assert unchanged.value == 0
    assert -unchanged.lo == unchanged.hi == pytest.approx(1.96**2 / (30 + 1.96**2), rel=1e-3)  # Wilson's of 0 of 30
    assert of_counts(0, 0, 1, 0, 0.05).hi == 1.0
    assert of_counts(0, 1, 0, 0, 0.05).lo == -1.0
    with pytest.raises(ValueError, match="at least 0"):
        of_counts(1, -1, 0, 0, 0.05)
    big = of_counts(10**6, 2 * 10**5, 10**5, 9 * 10**6, 0.05)  # the normal interval, when n is large
    n = 10**6 + 3 * 10**5 + 9 * 10**6
    half = 1.959964 * math.sqrt(3 * 10**5 - 10**10 / n) / n
    assert big.hi - big.lo == pytest.approx(2 * half, rel=1e-3)


def test_p_is_small_where_many_were_lost():
    assert p_of(lambda alpha: of_counts(20, 12, 2, 16, alpha), 0.0) < 0.05
    assert p_of(lambda alpha: of_counts(20, 5, 5, 16, alpha), 0.0) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("down", "up", "both"), [(0.05, 0.02, 0.4), (0.3, 0.1, 0.3), (0.05, 0.02, 0.0)])
def test_it_holds_the_difference_as_often_as_it_says(down, up, both):
    runs, missed = 3000, []
    for n in (20, 50, 200):
        counts = np.random.default_rng([1, n]).multinomial(n, [both, down, up, 1 - both - down - up], size=runs)
        found = [of_counts(*row.tolist(), 0.05) for row in counts]
        missed.append(np.mean([not f.lo <= up - down <= f.hi for f in found]))
    # 95 % less 2 points, and three standard deviations of the runs; with few changes it is on the safe side
    slack = 3 * math.sqrt(0.05 * 0.95 / runs)
    assert max(missed) <= 0.07 + slack
    assert missed[-1] >= 0.03 - slack  # with some changes it is no wider than need be


def test_the_bootstrap_of_few_changes_mostly_has_no_interval():
    rng, runs = np.random.default_rng(2), 200
    found = []
    for seed in range(runs):
        u = rng.random(20)
        found.append(mean_interval(np.select([u < 0.05, u < 0.07], [-1.0, 1.0], 0.0), 0.95, seed=seed))
    # it takes 4 changes of 20 that each come with 0.07, or two ways of changing: 85 of 100 by another simulation
    assert np.mean([f.lo is None for f in found]) > 0.85 - 3 * math.sqrt(0.85 * 0.15 / runs)
