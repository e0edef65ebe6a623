"""Memorization from subsets: by hand, as plain loops, under what must not matter, and against learners whose
memorization is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from counterfactual_truth import (
    lookup_correct,
    nearest_neighbour_correct,
    nearest_neighbour_memorization,
    nearest_neighbour_rank_probabilities,
    neighbours,
    subsets,
    summed,
)
from scipy import stats

from memdiag.agreement import auc, spearman
from memdiag.memorization import (
    Memorization,
    Sums,
    any_included,
    at_least,
    estimate,
    median_width,
    models_needed,
    split_half,
)
from memdiag.tasks import digits

Z = 1.959963984540054


def bits(text: str) -> np.ndarray:
    return np.array([[c == "1" for c in row] for row in text.split()])


def some(seed: int, n_models: int = 30, n: int = 40, gaps: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    measure = rng.random((n_models, n))
    measure[rng.random((n_models, n)) < gaps] = np.nan
    return rng.random((n_models, n)) < rng.random(n), measure


def same(a: Memorization, b: Memorization, tolerance: float = 1e-12) -> None:
    for name in ("memorization", "se", "lo", "hi", "p_in", "p_out", "n_in", "n_out", "simplicity", "s_in", "s_out"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=tolerance, err_msg=name)


def covered(found: Memorization, truth: np.ndarray) -> np.ndarray:
    return (found.lo <= truth) & (truth <= found.hi)


def arms(n_in: int, n_out: int, n: int) -> np.ndarray:
    return np.tile((np.arange(n_in + n_out) < n_in)[:, None], (1, n))


# ---- by hand ----


def test_six_models_of_four_rows_by_hand():
    included, correct = bits("1101 1011 0111 1110 1011 0111"), bits("1101 1110 0111 1111 1011 1101").astype(float)
    found = estimate(summed(included, correct), kind="binary")
    np.testing.assert_allclose(found.p_in, [1, 1, 0.8, 0.8], atol=1e-15)
    np.testing.assert_allclose(found.p_out, [0.5, 0.5, 0, 1], atol=1e-15)
    np.testing.assert_allclose(found.memorization, [0.5, 0.5, 0.8, -0.2], atol=1e-15)
    np.testing.assert_allclose(found.se, [0.353553, 0.353553, 0.178885, 0.178885], atol=1e-6)
    np.testing.assert_allclose(found.simplicity, [1.5, 1.5, 0.8, 1.8], atol=1e-15)
    assert found.n_in.tolist() == [4, 4, 5, 5]
    assert found.n_out.tolist() == [2, 2, 1, 1]


def test_newcombes_published_interval():
    # Newcombe (1998), table II, method 10: 56/70 - 48/80 and 10/10 - 0/10
    included = arms(70, 80, 1)
    correct = np.concatenate([np.arange(70) < 56, np.arange(80) < 48])[:, None].astype(float)
    found = estimate(summed(included, correct), kind="binary")
    assert (found.lo[0], found.hi[0]) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    found = estimate(summed(arms(10, 10, 1), arms(10, 10, 1).astype(float)), kind="binary")
    assert (found.lo[0], found.hi[0]) == pytest.approx((0.6075, 1.0), abs=5e-5)
    assert found.se[0] == 0


def test_interval_of_a_mean_by_hand():
    included = np.array([[True], [True], [True], [False], [False]])
    measure = np.array([[0.9], [0.8], [0.7], [0.4], [0.2]])
    s_in, s_out, t2, t1 = 0.1, math.sqrt(0.02), 4.302652729911275, 12.706204736432095
    found = estimate(summed(included, measure), kind="real")
    assert found.memorization[0] == pytest.approx(0.5)
    assert found.se[0] == pytest.approx(math.sqrt(s_in**2 / 3 + s_out**2 / 2))
    half = math.hypot(t2 * s_in / math.sqrt(3), t1 * s_out / math.sqrt(2))
    assert (found.lo[0], found.hi[0]) == pytest.approx((0.5 - half, 0.5 + half))
    found = estimate(summed(included, measure), kind="bounded")  # both arms reach beyond [0, 1]
    z2 = stats.norm.ppf(0.975) ** 2
    low = (0.8 + z2 / 6 - math.sqrt(z2 * (0.8 * 0.2 / 3 + z2 / 36))) / (1 + z2 / 3)
    assert low < 0.8 - t2 * s_in / math.sqrt(3)  # so near to 1 the wider of the two holds
    assert found.lo[0] == pytest.approx(0.5 - math.hypot(0.8 - low, 1 - 0.3))
    assert found.hi[0] == pytest.approx(0.5 + math.hypot(1 - 0.8, 0.3))
    assert (found.s_in[0], found.s_out[0]) == pytest.approx((s_in, s_out))


def test_equal_values_of_a_bounded_measure_are_no_proof():
    included = np.array([[True], [True], [True], [False]])
    measure = np.array([[0.9], [0.9], [0.9], [0.25]])
    found = estimate(summed(included, measure), kind="bounded")

    def wilson(p: float, n: int) -> tuple[float, float]:
        middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return (middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n)

    (l_in, u_in), (l_out, u_out) = wilson(0.9, 3), wilson(0.25, 1)
    assert found.lo[0] == pytest.approx(0.65 - math.hypot(0.9 - l_in, u_out - 0.25))
    assert found.hi[0] == pytest.approx(min(1, 0.65 + math.hypot(u_in - 0.9, 0.25 - l_out)))
    assert np.isnan(found.se[0])  # one model out
    real = estimate(summed(included, measure), kind="real")
    assert np.isnan([real.lo[0], real.hi[0]]).all()
    assert real.memorization[0] == pytest.approx(0.65)


def test_rank_probabilities_by_hand_and_in_sum():
    np.testing.assert_allclose(nearest_neighbour_rank_probabilities(6, 4), [0.8, 0.2], atol=1e-12)
    for n, m in [(6, 4), (10, 9), (1437, 1005), (50_000, 35_000)]:
        assert nearest_neighbour_rank_probabilities(n, m).sum() == pytest.approx(1, abs=1e-9)


# ---- the definition as a plain loop ----


def bounded(arm, low: float, high: float) -> tuple[float, float]:
    """A t interval, cut to [0, 1], and widened to Wilson's where the mean is within 1 / n of 0 or 1."""
    n, p = len(arm), float(np.mean(arm))
    if min(p, 1 - p) * n < 1:
        middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        low = min(low, (middle - half) / (1 + Z**2 / n))
        high = max(high, (middle + half) / (1 + Z**2 / n))
    return max(low, 0), min(high, 1)


@pytest.mark.parametrize("kind", ["binary", "bounded", "real"])
def test_estimates_are_those_of_plain_loops(kind):
    included, measure = some(0, n_models=14)
    if kind == "binary":
        measure = np.where(np.isnan(measure), np.nan, np.rint(measure))
    found = estimate(summed(included, measure), kind=kind)
    for i in range(measure.shape[1]):
        there = [(k, v) for k, v in zip(included[:, i], measure[:, i]) if not math.isnan(v)]
        one, other = [v for k, v in there if k], [v for k, v in there if not k]
        assert (found.n_in[i], found.n_out[i]) == (len(one), len(other))
        if not one or not other:
            assert np.isnan([found.memorization[i], found.se[i], found.lo[i], found.hi[i], found.simplicity[i]]).all()
            continue
        assert found.memorization[i] == pytest.approx(np.mean(one) - np.mean(other), abs=1e-12)
        assert found.simplicity[i] == pytest.approx(np.mean(one) + np.mean(other), abs=1e-12)
        if kind == "binary":
            l_in, u_in = stats.binomtest(int(sum(one)), len(one)).proportion_ci(0.95, "wilson")
            l_out, u_out = stats.binomtest(int(sum(other)), len(other)).proportion_ci(0.95, "wilson")
            assert found.se[i] == pytest.approx(math.sqrt(np.var(one) / len(one) + np.var(other) / len(other)))
        elif len(one) < 2 or len(other) < 2:
            assert np.isnan(found.se[i])
            assert np.isnan(found.lo[i]) == (kind == "real")
            continue
        else:
            l_in, u_in = stats.t.interval(0.95, len(one) - 1, np.mean(one), stats.sem(one))
            l_out, u_out = stats.t.interval(0.95, len(other) - 1, np.mean(other), stats.sem(other))
            if kind == "bounded":
                (l_in, u_in), (l_out, u_out) = bounded(one, l_in, u_in), bounded(other, l_out, u_out)
            assert found.se[i] == pytest.approx(math.hypot(stats.sem(one), stats.sem(other)))
        d = np.mean(one) - np.mean(other)
        lo, hi = (
            d - math.hypot(np.mean(one) - l_in, u_out - np.mean(other)),
            d + math.hypot(u_in - np.mean(one), np.mean(other) - l_out),
        )
        if kind != "real":
            lo, hi = max(lo, -1), min(hi, 1)
        assert (found.lo[i], found.hi[i]) == pytest.approx((lo, hi), abs=1e-10)


def test_weights_times_measure_is_the_difference_of_means():
    included, measure = some(1, gaps=0)
    k_in = included.sum(axis=0)
    weight = np.where(included, 1 / np.maximum(k_in, 1), -1 / np.maximum(len(included) - k_in, 1))
    both = (k_in > 0) & (k_in < len(included))
    found = estimate(summed(included, measure), kind="bounded").memorization
    np.testing.assert_allclose(found[both], (weight * measure).sum(axis=0)[both], atol=1e-12)
    assert np.isnan(found[~both]).all()


def test_any_included_is_that_of_a_loop():
    rng = np.random.default_rng(2)
    included, groups = rng.random(50) < 0.2, rng.integers(-5, 15, 50) * 1000
    wanted = [any(included[j] for j in range(50) if groups[j] == groups[i]) for i in range(50)]
    assert any_included(included, groups).tolist() == wanted
    assert any_included(included, np.arange(50)).tolist() == included.tolist()
    assert any_included(included[:0], groups[:0]).shape == (0,)


# ---- what must not matter ----


@pytest.mark.parametrize("kind", ["bounded", "real"])
def test_order_of_models_and_examples_does_not_matter(kind):
    included, measure = some(3)
    rng = np.random.default_rng(4)
    models, examples = rng.permutation(len(included)), rng.permutation(included.shape[1])
    found = estimate(summed(included, measure), kind=kind)
    same(found, estimate(summed(included[models], measure[models]), kind=kind))
    moved = estimate(summed(included[:, examples], measure[:, examples]), kind=kind)
    np.testing.assert_array_equal(moved.hi, found.hi[examples])
    np.testing.assert_array_equal(moved.memorization, found.memorization[examples])


@pytest.mark.parametrize("cuts", [[0], [1], [7, 8], [0, 10, 30]])
def test_merged_sums_are_those_of_all_models_at_once(cuts):
    included, measure = some(5)
    parts = [summed(k, c) for k, c in zip(np.split(included, cuts), np.split(measure, cuts))]
    merged = Sums.empty(included.shape[1])
    for part in parts:
        merged = merged.merge(part)
    backwards = parts[-1]
    for part in parts[-2::-1]:
        backwards = backwards.merge(part)
    whole = summed(included, measure)
    for sums in (merged, backwards):
        np.testing.assert_array_equal(sums.count, whole.count)
        same(estimate(sums, kind="bounded"), estimate(whole, kind="bounded"))


def test_a_binary_measure_has_exact_shares_in_any_order():
    rng = np.random.default_rng(32)
    included, correct = rng.random((49, 200)) < 0.5, rng.integers(0, 2, (49, 200)).astype(float)
    for order in (np.arange(49), np.arange(49)[::-1], rng.permutation(49)):
        found = estimate(summed(included[order], correct[order]), kind="binary")
        np.testing.assert_array_equal(found.p_in, (correct * included).sum(axis=0) / included.sum(axis=0))


def test_turning_the_coins_round_turns_the_sign():
    included, measure = some(6)
    a = estimate(summed(included, measure), kind="bounded")
    b = estimate(summed(~included, measure), kind="bounded")
    np.testing.assert_allclose(b.memorization, -a.memorization, atol=1e-12)
    np.testing.assert_allclose(b.lo, -a.hi, atol=1e-12)


def test_a_real_measure_may_be_moved_and_scaled():
    included, measure = some(7)
    a = estimate(summed(included, measure), kind="real")
    b = estimate(summed(included, 3 * measure - 1000), kind="real")
    np.testing.assert_allclose(b.hi, 3 * a.hi, atol=1e-10)
    np.testing.assert_allclose(b.se, 3 * a.se, atol=1e-10)


def test_a_large_mean_does_not_drown_the_variance():
    included, measure = some(8, n_models=50, gaps=0)
    a = estimate(summed(included, measure), kind="real")
    b = estimate(summed(included, measure + 2.0**26), kind="real")  # sums of squares would keep nothing
    np.testing.assert_allclose(b.se, a.se, rtol=1e-6)


def test_single_precision_measures_are_summed_in_double():
    included, measure = some(9)
    single = measure.astype(np.float32)
    same(estimate(summed(included, single), kind="real"), estimate(summed(included, single.astype(float)), kind="real"))


# ---- edges ----


def test_no_models_no_examples_and_none_in_an_arm_are_null():
    for kind in ("binary", "bounded", "real"):
        nothing = estimate(Sums.empty(3), kind=kind)
        assert np.isnan([nothing.memorization, nothing.se, nothing.lo, nothing.hi, nothing.p_in]).all()
        assert estimate(Sums.empty(0), kind=kind).memorization.shape == (0,)
        assert median_width(nothing) is None
        assert models_needed(nothing, 5, 0.1) is None
        all_in = estimate(summed(np.ones((4, 1), dtype=bool), np.ones((4, 1))), kind=kind)
        assert all_in.p_in[0] == 1  # but no memorization: it was never held out
        assert np.isnan([all_in.memorization[0], all_in.se[0], all_in.lo[0], all_in.hi[0], all_in.p_out[0]]).all()


def test_a_missing_value_counts_in_neither_arm():
    included = np.array([[True], [True], [False], [False]])
    found = estimate(summed(included, np.array([[1.0], [np.nan], [0.0], [np.nan]])), kind="binary")
    assert (found.n_in[0], found.n_out[0], found.memorization[0]) == (1, 1, 1)


def test_an_interval_holds_its_estimate():
    rng = np.random.default_rng(10)
    for kind in ("binary", "bounded", "real"):
        included, measure = some(11, n_models=12, n=500)
        if kind == "binary":
            measure = (measure < rng.choice([0, 0.1, 0.9, 1], 500)).astype(float)
        found = estimate(summed(included, measure), kind=kind)
        known = ~np.isnan(found.lo)
        assert known.any()
        assert (found.lo <= found.memorization)[known].all()
        assert (found.memorization <= found.hi)[known].all()
        if kind != "real":
            assert found.lo[known].min() >= -1
            assert found.hi[known].max() <= 1


def test_measures_of_another_kind_are_refused():
    half = summed(np.array([[True], [False]]), np.array([[0.5], [1.0]]))
    with pytest.raises(ValueError, match="binary"):
        estimate(half, kind="binary")
    for beyond in (-0.5, 1.5):
        sums = summed(np.array([[True], [True], [False]]), np.array([[beyond], [0.5], [0.5]]))
        with pytest.raises(ValueError, match="bounded"):
            estimate(sums, kind="bounded")
        assert np.isfinite(estimate(sums, kind="real").memorization[0])
    with pytest.raises(ValueError, match="level"):
        estimate(half, kind="real", level=95)
    with pytest.raises(ValueError, match="infinite"):
        half.add(np.array([True]), np.array([-np.inf]))
    with pytest.raises(ValueError, match="wanted bool"):
        half.add(np.array([1]), np.array([0.5]))
    with pytest.raises(ValueError, match="wanted bool"):
        half.add(np.array([True]), np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="do not merge"):
        half.merge(Sums.empty(2))


def test_a_probability_that_rounds_above_one_is_taken():
    above = np.nextafter(np.float32(1), np.float32(2))
    included, measure = np.array([[True], [True], [False], [False]]), np.array([[above], [above], [0], [0]], np.float32)
    found = estimate(summed(included, measure), kind="bounded")
    assert found.memorization[0] == pytest.approx(1, abs=1e-6)
    assert 0 < found.lo[0] < found.hi[0] == 1


def test_a_higher_level_is_a_wider_interval():
    included, measure = some(12, gaps=0)
    widths = [median_width(estimate(summed(included, measure), kind="bounded", level=x)) for x in (0.5, 0.9, 0.99)]
    assert widths[0] < widths[1] < widths[2]


# ---- how many models ----


def repeated(found_from: tuple[np.ndarray, np.ndarray], times: int, kind: str) -> Memorization:
    included, measure = found_from
    return estimate(summed(np.tile(included, (times, 1)), np.tile(measure, (times, 1))), kind=kind)


def test_models_needed_of_a_binary_measure_are_where_the_same_rates_reach_the_width():
    included, measure = some(13, n_models=20, gaps=0)
    data = included, np.rint(measure)
    now = repeated(data, 1, "binary")
    for times in (2, 5, 9):
        needed = models_needed(now, 20, median_width(repeated(data, times, "binary")))
        assert needed == pytest.approx(20 * times, abs=1)  # the same models again have exactly the same rates
    assert models_needed(now, 20, 2.0) == 20
    assert median_width(now) > 0.1
    assert models_needed(now, 20, 0.1) > 20


def test_models_needed_is_the_least_number():
    _, measure = some(14, n_models=24, gaps=0)
    found = estimate(summed(arms(14, 10, 40), np.rint(measure)), kind="binary")

    def median_at(n: int) -> float:
        widths = []
        for p_in, p_out in zip(found.p_in, found.p_out):
            ends = []
            for p, k in ((p_in, n * 14 / 24), (p_out, n * 10 / 24)):
                half = Z * math.sqrt(p * (1 - p) / k + Z**2 / (4 * k**2))
                ends.append(
                    ((p + Z**2 / (2 * k) - half) / (1 + Z**2 / k), (p + Z**2 / (2 * k) + half) / (1 + Z**2 / k))
                )
            (l_in, u_in), (l_out, u_out) = ends
            lo = p_in - p_out - math.hypot(p_in - l_in, u_out - p_out)
            widths.append(min(1, p_in - p_out + math.hypot(u_in - p_in, p_out - l_out)) - max(-1, lo))
        return float(np.median(widths))

    for width in (0.5, 0.41, 0.33, 0.2, 0.17, 0.1, 0.05, 0.03):
        needed = models_needed(found, 24, width)
        assert median_at(needed) <= width < median_at(needed - 1)


def test_models_needed_of_a_real_measure_grow_with_the_inverse_square_of_the_width():
    found = estimate(summed(arms(200, 200, 40), some(15, n_models=400, gaps=0)[1]), kind="real")
    now = median_width(found)
    shrunk = (stats.t.ppf(0.975, 1779) / stats.t.ppf(0.975, 199)) ** 2  # t's quantile falls a little, too
    assert models_needed(found, 400, now / 3) == pytest.approx(400 * 9 * shrunk, abs=2)
    assert models_needed(found, 400, now) == 400
    with pytest.raises(ValueError, match="width"):
        models_needed(found, 400, 0.0)


def test_models_needed_where_an_arm_has_one_model():
    included = np.array([[True], [True], [False]])
    found = estimate(summed(included, np.array([[0.9], [0.8], [0.3]])), kind="bounded")
    assert models_needed(found, 3, 0.2) > 3
    real = estimate(summed(included, np.array([[0.9], [0.8], [0.3]])), kind="real")
    assert models_needed(real, 3, 0.2) is None


def test_models_needed_leave_out_examples_without_an_interval():
    included, (_, measure) = arms(10, 10, 9), some(33, n_models=20, n=9, gaps=0)
    measure[:, 4] = 0.5
    found = estimate(summed(included, measure), kind="real")
    assert np.flatnonzero(np.isnan(found.lo)).tolist() == [4]  # equal values: no interval, though the SE is 0
    assert (found.memorization[4], found.se[4]) == (0, 0)
    rest = np.arange(9) != 4
    others = estimate(summed(included[:, rest], measure[:, rest]), kind="real")
    assert median_width(found) == median_width(others)
    assert models_needed(found, 20, 0.1) == models_needed(others, 20, 0.1) > 20


def test_halves_agree_as_their_standard_errors_foretell():
    rng = np.random.default_rng(16)
    p_in, p_out = 0.5 + rng.random(3000) / 2, rng.random(3000)
    halves = []
    for _ in range(2):
        included = arms(70, 30, 3000)
        halves.append(
            estimate(summed(included, (rng.random((100, 3000)) < np.where(included, p_in, p_out)) * 1.0), kind="binary")
        )
    found = split_half(*halves)
    a, b = halves
    assert found.n == 3000
    assert found.spearman == spearman(a.memorization, b.memorization)
    assert found.rmse == pytest.approx(math.sqrt(np.mean((a.memorization - b.memorization) ** 2) / 2))
    assert found.rms_se == pytest.approx(math.sqrt((np.mean(a.se**2) + np.mean(b.se**2)) / 2))
    # an RMS over n normal values errs by 1 / sqrt(2 n) = 1.3 % (one SD); the plug-in loses 1 / (2 n_out) = 1.7 %
    assert found.rmse == pytest.approx(found.rms_se, rel=0.06)
    nothing = split_half(estimate(Sums.empty(4), kind="real"), estimate(Sums.empty(4), kind="real"))
    assert (nothing.n, nothing.rmse, nothing.rms_se, nothing.spearman.value) == (0, None, None, None)


def test_halves_are_compared_where_both_have_a_standard_error():
    included, measure = some(17, n_models=16)
    a = estimate(summed(included[:8], measure[:8]), kind="real")
    b = estimate(summed(included[8:], measure[8:]), kind="real")
    both = ~np.isnan(a.se + b.se)
    found = split_half(a, b)
    assert 0 < found.n == both.sum() < 40
    assert found.rmse == pytest.approx(math.sqrt(((a.memorization - b.memorization)[both] ** 2).mean() / 2))


# ---- planted truth ----


def test_a_lookup_learner_hides_copies_unless_they_share_a_coin():
    rng = np.random.default_rng(18)
    copies = np.repeat([1, 2, 4, 8], [100, 100, 96, 104])
    groups = np.concatenate([g // c + 1000 * c for c, g in ((c, np.arange((copies == c).sum())) for c in (1, 2, 4, 8))])
    coins = rng.random((200, 400)) < 0.5
    correct = lookup_correct(coins, groups)
    per_copy = estimate(summed(coins, correct), kind="binary").memorization
    grouped = estimate(summed(np.array([any_included(k, groups) for k in coins]), correct), kind="binary")
    _, place = np.unique(groups, return_inverse=True)
    shared = coins[:, place]
    together = estimate(summed(shared, lookup_correct(shared, groups)), kind="binary").memorization
    for c, wanted in ((1, 1.0), (2, 0.5), (4, 0.125), (8, 0.0078)):
        mine = copies == c
        assert per_copy[mine].mean() == pytest.approx(wanted, abs=0.02)
        assert together[mine].tolist() == [1.0] * mine.sum()
        known = grouped.memorization[mine]
        assert (known[~np.isnan(known)] == 1).all()
        # with 8 copies all of them are out of one model in 256: many groups have no such model, and no value
        assert (~np.isnan(known)).any()


def planted_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 1437 digits of the reference figures, 144 of their labels wrong: pixels (n, 64), labels, which are wrong."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    draw = torch.Generator().manual_seed(0)
    train = torch.randperm(len(y), generator=draw)[:1437].numpy()
    x, y, wrong = x[train], y[train], torch.randperm(1437, generator=draw)[:144].numpy()
    y[wrong] = (y[wrong] + torch.randint(1, 10, (144,), generator=draw).numpy()) % 10
    return x, y, np.isin(np.arange(1437), wrong)


def test_the_nearest_neighbour_on_digits_has_the_reference_figures():
    x, y, wrong = planted_digits()
    order = neighbours(x)
    mem = nearest_neighbour_memorization(order, y, 1005)
    assert mem.mean() == pytest.approx(0.1993, abs=1e-4)
    np.testing.assert_allclose(mem[:10], [0, 0, 0.0876, 0.7187, 0, 4e-5, 1, 0, 5e-4, 1], atol=5e-5)
    assert auc(mem, wrong).value == pytest.approx(0.9984, abs=1e-3)
    alone = (y[order[:, 0]] != y).astype(float)  # leave one out
    assert alone.mean() == pytest.approx(0.1976, abs=1e-3)
    assert auc(alone, wrong).value == pytest.approx(0.942, abs=2e-3)
    assert spearman(mem, alone).value == pytest.approx(0.69, abs=0.01)
    rng = np.random.default_rng(19)
    included = subsets(400, len(y), 1005, rng)
    found = estimate(summed(included, nearest_neighbour_correct(order, y, included)), kind="binary")
    error = found.memorization - mem
    assert 0.016 <= math.sqrt((error**2).mean()) <= 0.021
    assert math.sqrt((error**2).mean()) == pytest.approx(math.sqrt((mem * (1 - mem)).mean() / (0.3 * 400)), rel=0.1)
    assert abs(error.mean()) < 1e-3
    assert (found.p_in == 1).all()
    inside = found.se > 0
    assert (error[inside] / found.se[inside]).std() == pytest.approx(1.06, abs=0.15)


def test_our_own_digits_have_the_error_that_theory_says():
    rows = list(digits.rows(split="train", corruption=0.1))
    x = np.stack([row["features"] for row in rows]).astype(float) * 16
    y, wrong = np.array([row["label"] for row in rows]), np.array([row["corrupted"] for row in rows])
    order, m = neighbours(x), round(0.7 * len(y))
    mem = nearest_neighbour_memorization(order, y, m)
    assert auc(mem, wrong).value > 0.99
    included = subsets(200, len(y), m, np.random.default_rng(20))
    found = estimate(summed(included, nearest_neighbour_correct(order, y, included)), kind="binary")
    rmse = math.sqrt(np.mean((found.memorization - mem) ** 2))
    assert rmse == pytest.approx(math.sqrt((mem * (1 - mem)).mean() / (0.3 * 200)), rel=0.1)
    assert models_needed(found, 200, 0.1) >= 200


# ---- coverage: 95 % intervals must hold the truth 93 to 97 times in a hundred ----


@pytest.mark.parametrize(("n_in", "n_out"), [(20, 20), (70, 30)])
def test_binary_intervals_cover(n_in, n_out):
    rng = np.random.default_rng([21, n_in])
    p_in, p_out = rng.random((2, 4000))
    included = arms(n_in, n_out, 4000)
    correct = (rng.random(included.shape) < np.where(included, p_in, p_out)).astype(float)
    share = covered(estimate(summed(included, correct), kind="binary"), p_in - p_out).mean()
    assert 0.93 <= share <= 0.97


def test_intervals_cover_the_nearest_neighbours_exact_memorization():
    inside, everywhere = [], []
    for seed in range(12):
        rng = np.random.default_rng([22, seed])
        y = rng.integers(0, 3, 500)
        x = rng.normal(size=(500, 2)) + 3 * y[:, None]
        y = np.where(rng.random(500) < 0.3, (y + rng.integers(1, 3, 500)) % 3, y)
        order, included = neighbours(x), subsets(100, 500, 350, rng)
        truth = nearest_neighbour_memorization(order, y, 350)
        hit = covered(estimate(summed(included, nearest_neighbour_correct(order, y, included)), kind="binary"), truth)
        inside.append(hit[(truth > 0.02) & (truth < 0.98)])
        everywhere.append(hit)
    inside, everywhere = np.concatenate(inside), np.concatenate(everywhere)
    assert len(inside) >= 2000
    assert 0.93 <= inside.mean() <= 0.97
    assert everywhere.mean() >= 0.93


@pytest.mark.parametrize("n_models", [8, 40])
def test_bounded_intervals_cover(n_models):
    rng = np.random.default_rng([23, n_models])
    included = arms(n_models // 2, n_models // 2, 5000)
    measure = np.where(included, rng.beta(20, 2, included.shape), rng.beta(3, 3, included.shape))
    share = covered(estimate(summed(included, measure), kind="bounded"), np.full(5000, 20 / 22 - 0.5)).mean()
    assert 0.93 <= share <= (0.97 if n_models > 8 else 1.0)  # four models near 1 have the wider of two intervals


@pytest.mark.parametrize("n_models", [8, 16, 32])
def test_nearly_equal_values_near_the_end_do_not_hide_a_rare_failure(n_models):
    """Nine models in ten know the text but for a token now and then, the tenth does not: few models may not show it."""
    rng = np.random.default_rng(n_models)
    n = 4000
    included = rng.random((n_models, n)).argsort(axis=0) < n_models // 2
    learned = rng.random((n_models, n)) < 0.9
    inside = np.where(learned, 1 - rng.binomial(1, 0.3, (n_models, n)) / 32, 0.3)
    measure = np.where(included, inside, rng.binomial(32, 0.1, (n_models, n)) / 32)
    truth = 0.9 * (1 - 0.3 / 32) + 0.1 * 0.3 - 0.1
    assert covered(estimate(summed(included, measure), kind="bounded"), np.full(n, truth)).mean() >= 0.93
    # the control: Student's t alone
    alone = estimate(summed(included, measure), kind="real")
    known = ~np.isnan(alone.lo)
    assert covered(alone, np.full(n, truth))[known].mean() < 0.9


def test_a_threshold_is_reached_in_spite_of_rounding():
    assert at_least(np.array([1 - 0.9, 0.1, 0.0999, np.nan]), 0.1).tolist() == [True, True, False, False]


def test_the_plug_in_interval_would_not_cover():
    rng = np.random.default_rng(24)
    included = arms(10, 10, 4000)
    correct = (rng.random(included.shape) < np.where(included, 0.98, 0.9)).astype(float)
    found, truth = estimate(summed(included, correct), kind="binary"), np.full(4000, 0.08)
    assert (np.abs(found.memorization - truth) <= Z * found.se).mean() < 0.9
    assert covered(found, truth).mean() >= 0.93
