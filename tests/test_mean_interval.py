"""Intervals and p-values of means and rates: by hand, as loops, against scipy, by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from memdiag import mean_interval as m
from memdiag.mean_interval import (
    Interval,
    benjamini_hochberg,
    mean_interval,
    of_moments,
    p_of,
    p_of_moments,
    p_of_rate,
    p_value,
    rate_interval,
    widened,
)


def moments(x):
    return len(x), float(x.mean()), float(x.std(ddof=1)), float(stats.skew(x))


def test_the_bootstrap_of_three_values_is_all_27_resamples(monkeypatch):
    monkeypatch.setattr(m, "RESAMPLES", 199_999)
    x = np.array([0.0, 1.0, 5.0])
    t = []
    for drawn in itertools.product(x, repeat=3):
        d = np.array(drawn)
        spread = d.std(ddof=1)
        t.append((d.mean() - 2) / (spread / math.sqrt(3)) if spread else math.copysign(math.inf, d.mean() - 2))
    found = m._t_of_resamples((x[:, None] - 2) / x.std(ddof=1), 0)[:, 0]
    for value in sorted(set(np.round(t, 6))):
        share = np.mean(np.isclose(t, value) | (np.array(t) < value))
        seen = np.mean(np.isclose(found, value) | (found < value))
        assert abs(seen - share) < 5 * math.sqrt(0.25 / 199_999), value
    assert np.isneginf(t).sum() == 2  # of 0 and of 1 alone; 5 alone is the other side
    assert np.isposinf(t).sum() == 1


def test_the_bootstrap_is_its_definition_as_a_loop(monkeypatch):
    monkeypatch.setattr(m, "RESAMPLES", 199)
    monkeypatch.setattr(m, "CELLS", 40)  # several resamples at a time, not a divisor of them
    x = np.sort(np.random.default_rng(1).lognormal(size=13))
    rng, t = np.random.default_rng([5, 199, 13]), []
    for first in range(0, 199, 3):
        for drawn in rng.integers(13, size=(min(3, 199 - first), 13)):
            y = x[drawn]
            t.append((y.mean() - x.mean()) / (y.std(ddof=1) / math.sqrt(13)))
    t.sort()
    error = x.std(ddof=1) / math.sqrt(13)
    found = mean_interval(x, 0.9, seed=5)  # 0.05 * 200: the tenth from either end
    assert found.lo == pytest.approx(x.mean() - t[-10] * error, rel=1e-9)
    assert found.hi == pytest.approx(x.mean() - t[9] * error, rel=1e-9)
    assert (found.value, found.n, found.method, found.note) == (pytest.approx(x.mean()), 13, "bootstrap-t", None)


@pytest.mark.parametrize("n", [12, 6000])
def test_order_does_not_matter_and_shift_and_scale_pass_through(n):
    x = np.random.default_rng(2).exponential(size=n)
    found = mean_interval(x, 0.95)
    assert mean_interval(np.random.default_rng(3).permutation(x), 0.95) == found
    moved = mean_interval(3 * x - 7, 0.95)
    assert (moved.lo, moved.hi) == (pytest.approx(3 * found.lo - 7), pytest.approx(3 * found.hi - 7))
    assert p_value(3 * x - 7, 3 * 0.8 - 7) == pytest.approx(p_value(x, 0.8), rel=1e-6)
    if n > m.MOST_RESAMPLED:  # a resample is of places in the order of size, which a minus sign turns round
        turned = mean_interval(-x, 0.95)
        assert (turned.lo, turned.hi) == (pytest.approx(-found.hi), pytest.approx(-found.lo))


def test_the_seed_decides_the_resamples():
    x = np.random.default_rng(4).exponential(size=30)
    assert mean_interval(x, 0.95, seed=1) == mean_interval(x, 0.95, seed=1)
    one, other = mean_interval(x, 0.95, seed=1), mean_interval(x, 0.95, seed=2)
    assert one != other
    # an end is an order statistic of 9,999: its rank has a standard deviation of sqrt(9999 * .025 * .975) = 16
    assert abs(one.hi - other.hi) < 0.1 * (one.hi - one.lo)


def test_what_cannot_be_told_has_no_interval_and_says_why():
    assert mean_interval([], 0.95) == Interval(None, None, None, 0, None, "no values")
    assert mean_interval([2.0], 0.95) == Interval(2.0, None, None, 1, None, "one value")
    assert mean_interval([0.1] * 9, 0.95) == Interval(0.1, None, None, 9, None, "all values are equal")
    assert of_moments(0, math.nan, math.nan, math.nan, 0.95).value is None
    assert of_moments(1, 2.0, math.nan, math.nan, 0.95) == Interval(2.0, None, None, 1, None, "one value")
    assert of_moments(9, 2.0, 0.0, math.nan, 0.95).note == "all values are equal"
    assert p_value([], 0.0) is p_value([1.0], 0.0) is p_value([1.0, 1.0], 0.0) is None
    assert p_of_moments(0, 0.0, 0.0, 0.0, 0.0) is p_of_moments(5, 1.0, 0.0, 0.0, 0.0) is None
    for wrong in ([1.0, math.nan], [math.inf, 1.0]):
        with pytest.raises(ValueError, match="NaN or an infinity"):
            mean_interval(wrong, 0.95)
    with pytest.raises(ValueError, match="NaN"):
        of_moments(9, 1.0, 1.0, math.nan, 0.95)
    for confidence in (0.0, 1.0, 95.0, math.nan):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            mean_interval([1.0, 2.0], confidence)
    assert mean_interval(np.array([1e200, -1e200, 3e200]), 0.95).note == "values too small or too large to square"
    assert mean_interval(np.array([1e-300, 2e-300, 4e-300]), 0.95).note == "values too small or too large to square"


def test_few_different_values_have_no_interval_only_where_resamples_have_no_spread():
    # 1 of 20: 0.95^20 = 36 % of resamples hold no 1 at all; 8 of 20: 0.6^20 = 0.004 %
    rare = mean_interval([1.0] + [0.0] * 19, 0.95)
    assert (rare.lo, rare.hi, rare.method) == (None, None, None)
    assert rare.note == "too few different values for an interval"
    assert mean_interval([1.0] * 8 + [0.0] * 12, 0.95).lo is not None
    # the limit is at a share of alpha / 2: 3 of 20, 0.85^20 = 3.9 %; 4 of 20, 0.8^20 = 1.2 %
    assert mean_interval([1.0] * 3 + [0.0] * 17, 0.95).lo is None
    assert mean_interval([1.0] * 4 + [0.0] * 16, 0.95).lo is not None
    assert mean_interval([1.0] * 3 + [0.0] * 17, 0.9).lo is not None
    assert mean_interval([1.0] * 17 + [0.0] * 3, 0.95).lo is None  # the other side
    # p is that of the first interval there is, 2 * 0.85^20 of alpha, however far off the limit
    assert p_value([1.0] * 3 + [0.0] * 17, 9.0) == pytest.approx(2 * 0.85**20, rel=0.2)


def test_a_resample_that_sits_on_the_mean_is_on_neither_side():
    x = np.repeat([0.1, 0.2, 0.3], 1)  # 0.2 three times over has the mean 0.2 but for rounding
    t = m._t_of_resamples((x[:, None] - x.mean()) / x.std(ddof=1), 0)[:, 0]
    b = len(t)
    for found in (np.isneginf(t).mean(), np.isposinf(t).mean()):
        assert abs(found - 1 / 27) < 5 * math.sqrt(1 / 27 / b)


def test_normal_values_have_students_interval():
    x = np.random.default_rng(6).normal(3, 2, 400)
    expected = stats.t.interval(0.95, 399, x.mean(), x.std(ddof=1) / 20)
    found = mean_interval(x, 0.95)
    width = expected[1] - expected[0]
    assert (found.lo, found.hi) == pytest.approx(expected, abs=0.05 * width)
    assert of_moments(400, x.mean(), x.std(ddof=1), 0.0, 0.95).lo == pytest.approx(expected[0], rel=1e-12)
    assert of_moments(400, x.mean(), x.std(ddof=1), 1e-12, 0.95).hi == pytest.approx(expected[1], rel=1e-12)
    assert p_of_moments(400, x.mean(), x.std(ddof=1), 0.0, 3.1) == pytest.approx(
        stats.ttest_1samp(x, 3.1).pvalue, rel=1e-9
    )


def test_scipys_bootstraps_are_near_where_n_is_large():
    x = np.random.default_rng(7).exponential(size=800)
    found = mean_interval(x, 0.95)
    for method in ("percentile", "BCa"):
        other = stats.bootstrap((x,), np.mean, method=method, rng=np.random.default_rng(0), n_resamples=4999)
        low, high = other.confidence_interval
        assert (found.lo, found.hi) == pytest.approx((low, high), abs=0.06 * (high - low)), method


def test_halls_transformation_takes_out_the_skewness_and_comes_back():
    for a, t in itertools.product((-0.4, -1e-3, 1e-9, 0.02, 0.5), (-2.5, -1.0, 0.0, 1.3, 3.0)):
        g = t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6
        assert m._hall_inverse(g, a) == pytest.approx(t, abs=1e-7)
    assert m._hall_inverse(1e3, 9e-9) == pytest.approx(m._hall_inverse(1e3, 1.1e-8), abs=1e-3)
    assert m._hall_inverse(-3.0, 0.5) is None  # beyond the flat point of the cubic, t = -3 / a
    # by hand: n = 100, skewness 2, a = 0.2, y = 1.98422: cube 1 + 0.2 (1.98422 - 1/30) = 1.39018
    found = of_moments(100, 0.0, 10.0, 2.0, 0.95)
    assert found.lo == pytest.approx(-15 * (1.3901773 ** (1 / 3) - 1), abs=1e-5)
    assert found.hi == pytest.approx(-15 * (0.5964894 ** (1 / 3) - 1), abs=1e-5)


def test_a_mean_that_hangs_on_a_few_of_many_values_has_no_interval():
    def ones(k, n=100_000):  # k of n
        p = k / n
        return of_moments(n, p, math.sqrt(p * (1 - p)), (1 - 2 * p) / math.sqrt(p * (1 - p)), 0.95)

    assert ones(3).lo is None
    assert ones(3).note == "the mean hangs on too few of the values for an interval"
    assert ones(100_000 - 3).lo is None
    # of 30 it is Clopper and Pearson's but for the half that the discreteness adds
    exact = rate_interval(30, 100_000, 0.95)
    assert (ones(30).lo, ones(30).hi) == pytest.approx((exact.lo, exact.hi), abs=0.06 * (exact.hi - exact.lo))


def test_both_ways_agree_where_one_takes_over():
    n = m.MOST_RESAMPLED
    rng = np.random.default_rng(8)
    # an end of the bootstrap moves by 16 ranks of 9,999 from seed to seed: 0.03 standard errors; 5 of these. Over 60
    # seeds of each law the means of the differences are within 0.01, of the exponential and the normal as of the beta
    for x in (rng.normal(size=n), rng.exponential(size=n), rng.lognormal(0, 0.5, size=n), rng.beta(0.3, 0.3, n)):
        error = x.std(ddof=1) / math.sqrt(n)
        resampled, many = mean_interval(x, 0.95), of_moments(*moments(x), 0.95)
        assert (resampled.method, many.method) == ("bootstrap-t", "moments")
        assert (resampled.lo, resampled.hi) == pytest.approx((many.lo, many.hi), abs=0.14 * error)
    x = rng.lognormal(size=n + 1)
    found, expected = mean_interval(x, 0.95), of_moments(*moments(x), 0.95)
    assert found.method == "moments"
    assert (found.lo, found.hi) == pytest.approx((expected.lo, expected.hi), rel=1e-2)


def test_samples_resampled_together_are_as_each_by_itself():
    rng = np.random.default_rng(15)
    samples = [
        rng.exponential(size=30),
        [],
        rng.normal(5, 1e-3, 30),
        [1.0],
        rng.random(40),
        [2.0, 2.0],
        [1e200, -1e200],
    ]
    samples.append(rng.lognormal(size=m.MOST_RESAMPLED + 1))
    for values, at in zip(samples, m.all_values_at(samples, 3), strict=True):
        for confidence in (0.9, 0.99):
            alone, found = mean_interval(values, confidence, seed=3), at(1 - confidence)
            assert (found.value, found.n, found.method, found.note) == (alone.value, alone.n, alone.method, alone.note)
            if alone.lo is not None:
                assert (found.lo, found.hi) == (pytest.approx(alone.lo, rel=1e-12), pytest.approx(alone.hi, rel=1e-12))
    with pytest.raises(ValueError, match="NaN"):
        m.all_values_at([[1.0], [math.nan]], 0)


def test_students_t_is_scipys_as_far_out_as_that_goes_and_right_beyond():
    for df in (1, 2, 3, 7, 40, 999, 1000, 10**7):
        for alpha in (0.5, 0.05, m.TAIL, 0.9999 * m.TAIL, 1e-5, 1e-9, 1e-40):
            assert m._student(df, alpha) == pytest.approx(-stats.t.ppf(alpha / 2, df), rel=1e-9), (df, alpha)
    # by hand: of one degree t = cot(pi alpha / 2), of two t² = 2 (1 - alpha)² / (1 - (1 - alpha)²)
    assert m._student(1, 1e-100) == pytest.approx(2e100 / math.pi, rel=1e-12)
    assert m._student(2, 1e-200) == pytest.approx(1e100, rel=1e-12)
    assert m._student(1, 1e-300) == 1e150
    assert m._student(3, 1e-290) > m._student(3, 1e-289) > 1e90


def test_beyond_the_resamples_an_interval_goes_on_and_is_never_narrower_than_students():
    x = np.random.default_rng(16).exponential(size=60)
    n, mean, std, skewness = moments(x)
    error = std / math.sqrt(n)
    t = m._t_of_resamples((np.sort(x)[:, None] - mean) / std, 0)[:, 0]
    at = m.values_at(x, 0)
    for alpha in (1.9e-3, 1e-3, 2e-4, 1e-5, 1e-9, 1e-50):
        k = max(1, math.floor(alpha * 10_000 / 2 + 1e-9))
        y = -float(stats.t.ppf(alpha / 2, n - 1))
        low, high = m._hall_ends(y, skewness / math.sqrt(n))
        found = at(alpha)
        assert found.method == "bootstrap-t"
        assert found.lo == pytest.approx(mean - max(t[-k], high, y) * error, rel=1e-9), alpha
        assert found.hi == pytest.approx(mean - min(t[k - 1], low, -y) * error, rel=1e-9), alpha
    assert at(m.TAIL).hi == pytest.approx(mean - t[9] * error, rel=1e-9)  # ten are enough
    assert mean_interval(x, 1 - 1e-12).lo < mean_interval(x, 1 - 1e-9).lo  # also of whoever asks for such a confidence


@pytest.mark.parametrize("n", [12, 300, 1001, 5000])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 1.6])
def test_intervals_grow_with_their_confidence_without_a_gap(n, sigma):
    x = np.random.default_rng([17, n]).lognormal(0, sigma, size=n)
    at, alphas = m.values_at(x, 0), (*np.geomspace(0.5, 1e-12, 200).tolist(), 1e-40, 1e-150, 1e-300)
    found = [at(alpha) for alpha in alphas]
    known = [one.lo is not None for one in found]
    assert known == sorted(known, reverse=True)  # from where there is none on there is none, and not so in the tail
    assert len({is_known for is_known, alpha in zip(known, alphas) if 2e-4 <= alpha < m.TAIL}) == 1
    ends = [(one.lo, one.hi) for one in found if one.lo is not None]
    assert all(a[0] >= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(ends))
    assert all(math.isfinite(end) for pair in ends for end in pair)


def test_beyond_the_flat_point_of_halls_transformation_the_end_stays_till_students_is_farther():
    a = 0.5  # flat at t = -6, reached from y = a / 6 - 2 on
    assert m._hall_ends(1.9, a)[0] == pytest.approx(m._hall_inverse(-1.9, a))
    assert -6 < m._hall_ends(1.9, a)[0] < -3
    assert [m._hall_ends(y, a)[0] for y in (1.92, 4.0, 6.0, 7.0)] == [-6, -6, -6, -7]
    assert m._hall_ends(7.0, -a) == (pytest.approx(-m._hall_ends(7.0, a)[1]), 7)


def test_a_mean_far_off_its_limit_has_a_small_p_however_few_resamples_there_are():
    rng = np.random.default_rng(18)
    x = rng.normal(size=100)
    for far in (5.0, 8.0, 50.0):  # standard errors from the mean
        limit = float(x.mean() + far * x.std(ddof=1) / 10)
        of_t, of_hall = stats.ttest_1samp(x, limit).pvalue, p_of_moments(*moments(x), limit)
        assert p_value(x, limit) == pytest.approx(max(of_t, of_hall), rel=1e-6)
        assert of_t < 1e-5
    ps = [p_value(x, limit) for limit in np.linspace(x.mean(), x.mean() + 3, 40)]
    assert ps == sorted(ps, reverse=True)
    # skewed values of which more than are resampled, so that Hall's has no end from some confidence on
    y = rng.lognormal(0, 1.5, size=1500)
    assert mean_interval(y, 0.95).lo is not None
    assert p_value(y, 100 * float(y.mean())) < 1e-12
    assert p_value([1.0] * 3 + [0.0] * 17, 1e9) > 0.05  # where resamples have no spread, they end at no p


def test_rates_are_clopper_and_pearsons():
    for k, n in ((0, 1), (1, 1), (0, 10), (3, 20), (10, 10), (5, 10), (300, 1_000_000)):
        for confidence in (0.5, 0.95, 0.999):
            exact = stats.binomtest(k, n).proportion_ci(confidence)
            found = rate_interval(k, n, confidence)
            assert (found.lo, found.hi) == pytest.approx((exact.low, exact.high), rel=1e-9, abs=1e-15)
            assert (found.value, found.n, found.method) == (k / n, n, "Clopper-Pearson")
    assert rate_interval(0, 20, 0.95).hi == pytest.approx(1 - 0.025 ** (1 / 20))  # by hand: (1 - p)^20 = 0.025
    assert rate_interval(0, 0, 0.95).value is None
    for k, n in ((3, 2), (-1, 2)):
        for wrong in (lambda k=k, n=n: rate_interval(k, n, 0.95), lambda k=k, n=n: p_of_rate(k, n, 0.5)):
            with pytest.raises(ValueError, match="no rate"):
                wrong()


def test_p_of_a_rate_is_twice_the_smaller_tail_and_dual_to_its_interval():
    for k, n, limit in ((3, 20, 0.5), (0, 10, 0.1), (10, 10, 0.9), (5, 10, 0.5), (300, 10**7, 1e-5), (4, 9, 0.0)):
        tails = stats.binom.cdf(k, n, limit), stats.binom.sf(k - 1, n, limit)
        assert p_of_rate(k, n, limit) == pytest.approx(min(1, 2 * min(tails)), rel=1e-9)
    interval = rate_interval(3, 20, 0.9)
    for end, outwards in ((interval.lo, -1), (interval.hi, 1)):
        assert p_of_rate(3, 20, end + outwards * 1e-9) < 0.1 < p_of_rate(3, 20, end - outwards * 1e-9)
    assert p_of_rate(0, 0, 0.5) is None
    assert p_of_rate(0, 5, -0.1) == 1.0  # a rate of 0 is what was seen
    assert p_of_rate(2, 5, 1.2) == 0.0


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_p_is_below_alpha_just_where_the_interval_leaves_the_limit_out(floor):
    rng = np.random.default_rng(9)
    small, large = rng.lognormal(size=25), rng.lognormal(size=7000)
    for confidence in (0.8, 0.95, 0.99, 0.9995, 1 - 1e-7):
        for x in (small, large):
            found = widened(mean_interval(x, confidence), floor, confidence)
            p = [p_value(x, end + step, floor=floor) for end in (found.lo, found.hi) for step in (-1e-7, 1e-7)]
            alpha = 1 - confidence
            assert p[0] <= alpha * (1 + 1e-6) < p[1] * (1 + 2e-6), (confidence, len(x))
            assert p[3] <= alpha * (1 + 1e-6) < p[2] * (1 + 2e-6), (confidence, len(x))
    assert p_value(small, float(small.mean()), floor=floor) > 0.5
    assert p_value(small, 1e9) < 1e-100
    n, mean, std, skewness = moments(large)
    assert p_value(large, 1.6, floor=floor) == pytest.approx(
        p_of_moments(n, mean, std, skewness, 1.6, floor=floor), rel=1e-3
    )


def test_p_of_far_off_limits_keeps_its_digits():
    assert p_of_moments(10**7, 0.01, 1.0, 0.0, 0.0) == pytest.approx(2 * stats.t.sf(10**1.5, 10**7 - 1), rel=1e-9)
    assert p_of_moments(10**7, 1.0, 1.0, 0.0, 0.0) == m.SMALLEST_P
    assert p_of_moments(100, 1.0, 1.0, 0.0, 1.0) == 1.0
    with pytest.raises(ValueError, match="NaN"):
        p_of(lambda alpha: rate_interval(1, 2, 1 - alpha), math.nan)


def test_the_resamples_p_is_counted_as_a_loop_would():
    x = np.random.default_rng(10).exponential(size=15)
    t = m._t_of_resamples((np.sort(x)[:, None] - x.mean()) / x.std(ddof=1), 0)[:, 0]
    for limit in (0.5, 0.9, 1.0, 1.4, 2.0):
        t0 = (x.mean() - limit) / (x.std(ddof=1) / math.sqrt(15))
        counts = sum(1 for value in t if value >= t0), sum(1 for value in t if value <= t0)
        counted = min(1, 2 * (1 + min(counts)) / 10_000)
        assert counted > m.TAIL
        assert p_value(x, limit) == pytest.approx(counted, rel=1e-9)


def test_noise_widens_each_side_by_the_root_of_squares():
    found = widened(Interval(1.0, 0.6, 1.3, 9, "moments", None), 0.4, 0.95)
    assert (found.lo, found.hi) == (pytest.approx(1 - math.hypot(0.4, 0.4)), pytest.approx(1.5))
    assert (found.value, found.n, found.method) == (1.0, 9, "moments")
    # the floor is of 95 %; at 99 % it is as much wider as Student's t of 5 degrees, at 80 % as the normal
    assert widened(Interval(0.0, 0.0, 0.0, 9, "x", None), 1.0, 0.99).hi == pytest.approx(4.0321430 / 2.5705818)
    assert widened(Interval(0.0, 0.0, 0.0, 9, "x", None), 1.0, 0.8).hi == pytest.approx(1.2815516 / 1.9599640)
    for few in (2, 4, 20):  # which no Student's is narrower than
        assert stats.t.ppf(0.9, few) / stats.t.ppf(0.975, few) < 1.2815516 / 1.9599640
    assert widened(Interval(0.0, 0.2, 0.5, 9, "x", None), 0.3, 0.95).lo == pytest.approx(-0.3)  # no end beyond the mean
    same = Interval(1.0, 0.6, 1.3, 9, "moments", None)
    assert widened(same, 0.0, 0.95) == same
    nothing = mean_interval([1.0], 0.95)
    assert widened(nothing, 0.4, 0.95) == nothing
    for floor in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="noise floor"):
            widened(same, floor, 0.95)
    # two normals: the noise's error is 0.2, the mean's 0.1
    p = p_of_moments(10**6, 0.4, 100.0, 0.0, 0.0, floor=0.2 * 1.9599640)
    assert p == pytest.approx(2 * stats.norm.sf(0.4 / math.hypot(0.1, 0.2)), rel=1e-3)
    # and the noise alone, far off: Student's
    p = p_of_moments(10**6, 5.0, 1e-9, 0.0, 0.0, floor=1.0)
    assert p == pytest.approx(2 * stats.t.sf(5.0 * 2.5705818, 5), rel=1e-6)


def test_q_values_are_benjamini_and_hochbergs():
    # by hand, m = 4: 0.01 * 4 / 1, 0.02 * 4 / 2, 0.03 * 4 / 3 -> 0.04, and 0.5
    assert benjamini_hochberg([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.04, 0.04, 0.5, 0.04])
    rng = np.random.default_rng(11)
    for p in (rng.random(40), np.round(rng.random(40), 1), rng.random(1), rng.random(30) ** 4):
        assert benjamini_hochberg(list(p)) == pytest.approx(stats.false_discovery_control(p))
    assert benjamini_hochberg([None, 0.04, None, 0.5]) == [None, pytest.approx(0.08), None, 0.5]
    assert benjamini_hochberg([]) == []
    assert benjamini_hochberg([None]) == [None]
    assert benjamini_hochberg([0.9, 1.0]) == [1.0, 1.0]
    assert benjamini_hochberg([0.0, 1.0]) == [0.0, 1.0]


DRAWS = {  # mean 0 by construction
    "normal": lambda rng, size: rng.normal(size=size),
    "uniform": lambda rng, size: rng.random(size) - 0.5,
    "exponential": lambda rng, size: rng.exponential(size=size) - 1,
    "lognormal 0.5": lambda rng, size: rng.lognormal(0, 0.5, size) - math.exp(0.125),
    "beta": lambda rng, size: rng.beta(0.3, 0.3, size) - 0.5,
    "rate": lambda rng, size: (rng.random(size) < 0.4) - 0.4,
}


def missed(draw, n, runs, interval):
    rng = np.random.default_rng([12, n])
    found = [interval(x, seed) for seed, x in enumerate(draw(rng, (runs, n)))]
    return sum(not lo <= 0 <= hi for lo, hi in found) / runs


@pytest.mark.parametrize("name", DRAWS)
def test_intervals_hold_the_mean_as_often_as_they_say(name, monkeypatch):
    monkeypatch.setattr(m, "RESAMPLES", 999)
    n, runs = 50, 3000
    x = DRAWS[name](np.random.default_rng([12, n]), (runs, n))
    found = [at(0.05) for at in m.all_values_at(list(x), 0)]
    held = np.mean([one.lo <= 0 <= one.hi for one in found])
    slack = 3 * math.sqrt(0.05 * 0.95 / runs)  # the Monte Carlo error of the runs: three standard deviations
    assert 0.93 - slack <= held <= 0.97 + slack


@pytest.mark.parametrize("name", DRAWS)
def test_intervals_of_more_values_hold_the_mean_too(name):
    n, runs = m.MOST_RESAMPLED + 1, 3000
    x = DRAWS[name](np.random.default_rng([19, n]), (runs, n))
    figures = zip(x.mean(1).tolist(), x.std(1, ddof=1).tolist(), stats.skew(x, axis=1).tolist())
    found = [of_moments(n, *of, 0.95) for of in figures]
    held = np.mean([one.lo <= 0 <= one.hi for one in found])
    slack = 3 * math.sqrt(0.05 * 0.95 / runs)
    assert 0.94 - slack <= held <= 0.96 + slack


def test_the_normal_interval_of_ten_skewed_values_fails_the_same_test():
    def normal(x, seed):
        half = 1.96 * x.std(ddof=1) / math.sqrt(len(x))
        return x.mean() - half, x.mean() + half

    def skewed(rng, size):
        return rng.lognormal(size=size) - math.exp(0.5)

    runs = 500
    slack = 3 * math.sqrt(0.05 * 0.95 / runs)
    assert missed(skewed, 10, runs, normal) > 0.07 + slack


def test_halls_interval_holds_the_mean_on_both_sides_and_the_normal_one_does_not():
    rng, n, runs = np.random.default_rng(13), 200, 4000
    x = rng.lognormal(size=(runs, n)) - math.exp(0.5)
    mean, std = x.mean(1), x.std(1, ddof=1)
    skewness = stats.skew(x, axis=1)
    found = [of_moments(n, *row, 0.95) for row in zip(mean.tolist(), std.tolist(), skewness.tolist())]
    known = [f for f in found if f.lo is not None]
    assert len(known) > 0.9 * runs
    sd = math.sqrt(0.025 * 0.975 / runs)
    below, above = np.mean([f.lo > 0 for f in known]), np.mean([f.hi < 0 for f in known])
    assert 0.015 - 3 * sd < below < 0.035 + 3 * sd
    assert 0.015 - 3 * sd < above < 0.035 + 3 * sd
    half = 1.96 * std / math.sqrt(n)
    assert np.mean(mean + half < 0) > 0.035 + 3 * sd  # the control: too often on the side of the long tail
