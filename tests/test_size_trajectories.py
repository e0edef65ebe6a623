"""Shapes of memorization over model size: by hand, as loops over scipy's isotonic fits, planted shapes, chance."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import optimize, stats

from memdiag.size_trajectories import SHAPES, _rising, classify, false_call_rate, standard_errors

PLANTED = {
    "constant": [0.3, 0.3, 0.3, 0.3, 0.3],
    "rising": [0.1, 0.25, 0.4, 0.6, 0.8],
    "falling": [0.9, 0.6, 0.45, 0.2, 0.0],
    "cap": [0.1, 0.4, 0.7, 0.4, 0.1],
    "valley": [0.7, 0.4, 0.1, 0.3, 0.6],
    "zigzag": [0.1, 0.6, 0.1, 0.6, 0.1],
}


def shape_of(*curve: float, se: float = 0.05, n_se: float = 2.0) -> str | None:
    """What one curve is called."""
    m = np.array(curve)[:, None]
    return classify(m, np.full_like(m, se), n_se=n_se).shape[0]


def share(shapes: np.ndarray, shape: str) -> float:
    return float((shapes == shape).mean())


def mixed(n: int, n_sizes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Curves of all kinds, some of them noise, with standard errors of their own."""
    rng = np.random.default_rng(seed)
    se = rng.uniform(0.05, 0.4, (n_sizes, n))
    return rng.normal(size=(n_sizes, n)) * rng.choice([0.1, 0.5], n), se


# -- standard errors -----------------------------------------------------------------------------------------------


def test_standard_errors_by_hand():
    # 7 of 8 right with the example, 1 of 2 without: (7 + 1) / 10 and (1 + 1) / 4
    found = standard_errors(np.array([7 / 8]), np.array([8]), np.array([0.5]), np.array([2]))
    assert found[0] == pytest.approx(math.sqrt(0.8 * 0.2 / 10 + 0.5 * 0.5 / 4), rel=1e-12)


def test_standard_errors_are_not_zero_at_shares_of_0_and_1_and_unknown_without_a_model():
    p_in, n_in = np.array([[1.0, 1.0, 0.5, 0.5]]), np.array([[70, 70, 0, 3]])
    p_out, n_out = np.array([[0.0, np.nan, 0.5, np.nan]]), np.array([[30, 0, 30, 4]])
    found = standard_errors(p_in, n_in, p_out, n_out)
    assert found[0, 0] == pytest.approx(math.sqrt(71 / 72**3 + 31 / 32**3), rel=1e-12)
    assert np.isnan(found[0, 1:]).all()
    with pytest.raises(ValueError, match="shares"):
        standard_errors(np.array([1.1]), np.array([3]), np.array([0.5]), np.array([3]))
    with pytest.raises(ValueError, match="counts"):
        standard_errors(np.array([1.0]), np.array([3]), np.array([0.5]), np.array([-1]))


def test_standard_errors_do_not_care_which_arm_or_outcome_is_which():
    rng = np.random.default_rng(0)
    n_in, n_out = rng.integers(1, 90, (2, 40))
    p_in, p_out = rng.integers(0, n_in + 1) / n_in, rng.integers(0, n_out + 1) / n_out
    found = standard_errors(p_in, n_in, p_out, n_out)
    np.testing.assert_allclose(standard_errors(p_out, n_out, p_in, n_in), found)
    np.testing.assert_allclose(standard_errors(1 - p_in, n_in, 1 - p_out, n_out), found)


def test_differences_of_shares_exceed_two_standard_errors_about_as_often_as_normal_ones():
    """Two sizes alike, 100 models: by enumeration at most 5.8 % of differences (normal numbers: 4.6 %)."""
    rng, n = np.random.default_rng(1), 20000
    n_in, n_out = np.full((2, n), 70), np.full((2, n), 30)
    for p_in, p_out in ((1.0, 0.05), (0.99, 0.5), (0.9, 0.1), (0.6, 0.4)):
        a, b = rng.binomial(n_in, p_in) / n_in, rng.binomial(n_out, p_out) / n_out
        found = classify(a - b, standard_errors(a, n_in, b, n_out))
        assert (found.contrast > 2).mean() <= 0.058 + 4 * math.sqrt(0.058 / n)


# -- shapes --------------------------------------------------------------------------------------------------------


def test_contrast_and_shapes_by_hand():
    found = classify(np.array([[0.1], [0.5], [0.2]]), np.array([[0.03], [0.04], [0.12]]))
    assert found.contrast[0] == pytest.approx(0.4 / 0.05)
    assert shape_of(0.1, 0.5, 0.2) == "cap"
    assert shape_of(0.5, 0.1, 0.4) == "other"
    assert shape_of(0.1, 0.2, 0.9) == "rising"
    assert shape_of(0.9, 0.8, 0.1) == "falling"
    assert shape_of(0.3, 0.35, 0.25) == "constant"
    assert shape_of(0.1, 0.8, 0.8, 0.8) == "rising"
    assert shape_of(0.1, 0.1, 0.1, 0.8) == "rising"
    assert shape_of(0.1, 0.5, 0.1, 0.5) == "other"
    assert shape_of(0.5, 0.1, 0.5, 0.1) == "other"


def test_two_standard_errors_of_a_difference_are_still_noise():
    at = 2 * math.hypot(0.3, 0.4)  # exactly 1
    se = np.array([[0.3], [0.4]])
    assert classify(np.array([[0.0], [at]]), se).shape[0] == "constant"
    assert classify(np.array([[0.0], [np.nextafter(at, 2)]]), se).shape[0] == "rising"
    assert classify(np.array([[0.0], [-np.nextafter(at, 2)]]), se).shape[0] == "falling"
    assert classify(np.array([[0.0], [1.4]]), se, n_se=3).shape[0] == "constant"


def test_a_cap_needs_a_clear_rise_and_a_clear_fall():
    # 0.14 is two standard errors of a difference
    assert shape_of(0.1, 0.5, 0.45) == "rising"
    assert shape_of(0.1, 0.5, 0.34) == "cap"
    assert shape_of(0.45, 0.5, 0.1) == "falling"
    assert shape_of(0.34, 0.5, 0.1) == "cap"
    assert shape_of(0.1, 0.5, 0.45, 0.4, 0.34) == "cap"  # no step of the fall is clear, the fall is
    assert shape_of(0.5, 0.1, 0.15) == "falling"
    assert shape_of(0.5, 0.1, 0.26) == "other"
    assert shape_of(0.1, 0.5, 0.38, 0.9) == "rising"  # a dip on the way that noise explains


def test_a_zigzag_is_what_no_shape_fits_beyond_noise():
    """The rising fit of 0, d, 0, d is 0, d/2, d/2, d: it leaves d² / 2 in units of the variance."""
    most = stats.chi2.isf(2 * stats.norm.sf(2), 3)  # 3 = s - 1
    for factor, wanted in ((0.999, "rising"), (1.001, "other")):
        d = factor * math.sqrt(2 * most)
        assert shape_of(0, d, 0, d, se=1) == wanted
        assert shape_of(d, 0, d, 0, se=1) == {"rising": "falling", "other": "other"}[wanted]


def best_cap(m: np.ndarray, w: np.ndarray) -> tuple[float, int]:
    """Residual and peak of the best cap: for every peak, scipy's fits of both sides with the peak as high as needed."""
    found = []
    for p in range(len(m) - 1):
        up = optimize.isotonic_regression(m[: p + 1], weights=w[: p + 1]).x
        down = optimize.isotonic_regression(m[p + 1 :], weights=w[p + 1 :], increasing=False).x
        fit = np.concatenate([up, down])
        found.append((float((w * (m - fit) ** 2).sum()), p if up[-1] >= down[0] else p + 1))
    return min(found, key=lambda f: f[0])


def shape_by_loops(m: np.ndarray, e: np.ndarray, n_se: float) -> str:
    """The definition, one curve at a time."""
    s, w = len(m), 1 / e**2
    z = {(j, k): (m[k] - m[j]) / math.sqrt(e[j] ** 2 + e[k] ** 2) for j in range(s) for k in range(j + 1, s)}
    if all(abs(v) <= n_se for v in z.values()):
        return "constant"
    fits = []
    for name, up in (("rising", True), ("falling", False)):
        fit = optimize.isotonic_regression(m, weights=w, increasing=up).x
        fits.append((float((w * (m - fit) ** 2).sum()), name))
    for name, sign in (("cap", 1), ("other", -1)):
        if s < 3:
            continue
        residual, peak = best_cap(sign * m, w)
        before = any(sign * v > n_se for (j, k), v in z.items() if k <= peak)
        after = any(-sign * v > n_se for (j, k), v in z.items() if j >= peak)
        if before and after:
            fits.append((residual, name))
    least = min(f[0] for f in fits)
    if least > stats.chi2.isf(2 * stats.norm.sf(n_se), s - 1):
        return "other"
    return next(name for residual, name in fits if residual <= least + 1e-9 * (1 + least))


@pytest.mark.parametrize("n_sizes", [2, 3, 4, 6])
def test_shapes_are_those_of_the_definition_as_a_loop(n_sizes):
    m, se = mixed(400, n_sizes)
    for n_se in (2.0, 1.2):
        found = classify(m, se, n_se=n_se).shape
        wanted = [shape_by_loops(m[:, i], se[:, i], n_se) for i in range(400)]
        assert found.tolist() == wanted
        assert set(wanted) == (set(SHAPES) if n_sizes > 2 else {"constant", "rising", "falling"})


def test_rising_fits_are_scipys_isotonic_regressions():
    m, se = mixed(60, 7)
    last, residual = _rising(m, se)
    for p in range(7):
        for i in range(60):
            w = se[: p + 1, i] ** -2.0
            fit = optimize.isotonic_regression(m[: p + 1, i], weights=w).x
            assert last[p, i] == pytest.approx(fit[-1], abs=1e-9)
            assert residual[p, i] == pytest.approx((w * (m[: p + 1, i] - fit) ** 2).sum(), abs=1e-8)


def test_the_best_cap_is_no_worse_than_any_curve_that_rises_and_falls():
    rng = np.random.default_rng(2)
    m, w = rng.normal(size=5), rng.uniform(1, 4, 5)
    residual, _ = best_cap(m, w)
    for _ in range(3000):
        values, peak = np.sort(m + rng.normal(size=5)), rng.integers(5)
        order = rng.permutation(4)
        curve = np.concatenate([np.sort(values[order[:peak]]), values[4:], np.sort(values[order[peak:]])[::-1]])
        assert (w * (m - curve) ** 2).sum() >= residual


# -- invariance ----------------------------------------------------------------------------------------------------


def test_the_order_of_examples_and_their_company_change_nothing():
    m, se = mixed(20000)
    found = classify(m, se)
    order = np.random.default_rng(3).permutation(20000)
    np.testing.assert_array_equal(classify(m[:, order], se[:, order]).shape, found.shape[order])
    np.testing.assert_array_equal(classify(m[:, :7], se[:, :7]).shape, found.shape[:7])
    np.testing.assert_allclose(classify(m[:, order], se[:, order]).contrast, found.contrast[order])


def test_sizes_from_the_largest_swap_rising_and_falling_alone():
    m, se = mixed(3000)
    found, turned = classify(m, se), classify(m[::-1], se[::-1])
    swapped = {"rising": "falling", "falling": "rising"}
    assert turned.shape.tolist() == [swapped.get(shape, shape) for shape in found.shape]
    np.testing.assert_allclose(turned.contrast, found.contrast)


def test_the_unit_and_the_level_of_curves_change_nothing():
    m, se = mixed(3000)
    found = classify(m, se).shape
    np.testing.assert_array_equal(classify(1000 * m, 1000 * se).shape, found)
    np.testing.assert_array_equal(classify(m + 0.5, se).shape, found)
    upside_down = classify(-m, se).shape
    swapped = {"rising": "falling", "falling": "rising", "constant": "constant"}
    for name, turned in swapped.items():
        np.testing.assert_array_equal(upside_down == turned, found == name)


# -- planted shapes and chance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_shapes_are_found(planted):
    """Where all that matters differs by 5 standard errors of a difference or more, 2 miss one of 1000."""
    rng, n = np.random.default_rng(4), 5000
    m = np.array(PLANTED[planted])[:, None] + 0.02 * rng.normal(size=(5, n))
    found = classify(m, np.full((5, n), 0.02)).shape
    if planted == "constant":
        expected = stats.studentized_range.cdf(2 * math.sqrt(2), 5, np.inf)
        assert abs(share(found, "constant") - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
        # by symmetry
        assert abs(share(found, "rising") - share(found, "falling")) < 4 * math.sqrt(0.25 / n)
    else:
        assert share(found, planted if planted in SHAPES else "other") >= 0.999


def test_a_difference_of_two_sizes_is_found_as_often_as_the_normal_distribution_says():
    rng, n, se = np.random.default_rng(5), 20000, 0.05
    for d in (0.0, 0.1, 0.2):
        m = np.array([0.2, 0.2 + d])[:, None] + se * rng.normal(size=(2, n))
        found = classify(m, np.full((2, n), se)).shape
        for shape, z in (("rising", d / (se * math.sqrt(2))), ("falling", -d / (se * math.sqrt(2)))):
            expected = stats.norm.sf(2 - z)
            assert abs(share(found, shape) - expected) < 4 * math.sqrt(expected * (1 - expected) / n) + 1e-9


def test_curves_that_do_have_a_shape_are_seldom_zigzags():
    """At most 4.6 % are, by the χ² of s - 1 degrees of freedom; a valley is none of these shapes."""
    rng, n = np.random.default_rng(6), 20000
    for curve in ([0, 3, 6, 9, 12], [0, 0, 0, 0, 9], [0, 9, 9, 9, 9], [0, 6, 12, 6, 0], [12, 9, 5, 2, 0]):
        found = classify(np.array(curve)[:, None] + rng.normal(size=(5, n)), np.ones((5, n))).shape
        rising_then_flat = curve in ([0, 9, 9, 9, 9], [0, 0, 0, 0, 9])
        if not rising_then_flat:
            assert share(found, "other") <= 0.0455 + 4 * math.sqrt(0.0455 / n)
        else:  # the four equal sizes may also look like another turn, as 18.8 % of constant curves do
            assert share(found, "rising") >= 1 - 0.188 - 0.0455


def test_false_calls_are_those_of_the_range_of_normal_numbers():
    for n_sizes in (2, 3, 5, 8):
        for n_se in (2.0, 3.0):
            expected = stats.studentized_range.sf(n_se * math.sqrt(2), n_sizes, np.inf)
            found = false_call_rate(np.full((n_sizes, 5000), 0.07), 0, n_se=n_se, repeats=4)
            assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / 20000)


def test_false_calls_of_unequal_errors_are_no_more_than_all_pairs_together_make():
    se = np.random.default_rng(7).uniform(0.01, 0.2, (4, 5000))
    assert 0.0455 < false_call_rate(se, 0) < 6 * 0.0455
    assert false_call_rate(se, 0) == false_call_rate(se, 0)
    assert false_call_rate(se, 0) != false_call_rate(se, 1)


def test_false_calls_leave_out_examples_without_a_standard_error():
    se = np.full((3, 4000), 0.1)
    se[0, ::2] = np.nan
    expected = stats.studentized_range.sf(2 * math.sqrt(2), 3, np.inf)
    assert abs(false_call_rate(se, 0, repeats=5) - expected) < 4 * math.sqrt(expected * (1 - expected) / 10000)
    assert 0 < false_call_rate(np.full((3, 1), 0.1), 0, repeats=200) < 0.3  # 0.11
    assert false_call_rate(np.full((3, 5), np.nan), 0) is None
    assert false_call_rate(np.empty((3, 0)), 0) is None


# -- edges ---------------------------------------------------------------------------------------------------------


def test_a_size_without_a_value_or_a_standard_error_leaves_the_curve_unnamed():
    m, se = np.tile([[0.1], [0.5], [0.9]], 4), np.full((3, 4), 0.05)
    m[1, 1], se[2, 2] = np.nan, np.nan
    found = classify(m, se)
    assert found.shape.tolist() == ["rising", None, None, "rising"]
    np.testing.assert_array_equal(np.isnan(found.contrast), [False, True, True, False])


def test_no_example_one_example_and_one_size():
    none = classify(np.empty((3, 0)), np.empty((3, 0)))
    assert none.shape.shape == none.contrast.shape == (0,)
    assert shape_of(0.5, 0.5, 0.5) == "constant"
    assert classify(np.full((3, 2), 0.5), np.full((3, 2), 0.1)).contrast.tolist() == [0, 0]
    assert shape_of(0.4) == "constant"
    assert classify(np.array([[0.4]]), np.array([[0.1]])).contrast.tolist() == [0]


def test_what_is_no_curve_is_refused():
    good = np.full((3, 2), 0.1)
    with pytest.raises(ValueError, match=r"wanted \(sizes, examples\)"):
        classify(good, good[:2])
    with pytest.raises(ValueError, match=r"wanted \(sizes, examples\)"):
        classify(np.empty((0, 2)), np.empty((0, 2)))
    for m, se in ((good, 0 * good), (good, -good), (np.full((3, 2), np.inf), good)):
        with pytest.raises(ValueError, match="standard errors above 0"):
            classify(m, se)
    for n_se in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="n_se"):
            classify(good, good, n_se=n_se)


def test_fifty_thousand_curves_that_all_move_take_seconds_at_most():
    rng = np.random.default_rng(8)
    m, se = rng.normal(size=(5, 50000)), np.full((5, 50000), 0.02)
    began = time.perf_counter()
    found = classify(m, se)
    assert time.perf_counter() - began < 5  # 0.2 s; a loop over scipy's fits takes 20
    assert share(found.shape, "constant") < 0.01
