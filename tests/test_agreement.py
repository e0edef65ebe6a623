"""Means, rank correlations and areas under the curve: by hand, as loops, by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from memdiag import agreement
from memdiag.agreement import auc, found_in_top, mean, ranks, spearman


def test_auc_by_hand():
    truth = np.array([True, True, False, False])
    assert auc(np.array([3.0, 1.0, 2.0, 0.0]), truth).value == 0.75
    assert auc(np.array([1.0, 1.0, 1.0, 1.0]), truth).value == 0.5
    assert auc(np.array([3.0, 2.0, 1.0, 0.0]), truth).value == 1.0


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[truth] for b in scores[~truth]]
    found = auc(scores, truth)
    assert found.value == pytest.approx(np.mean(pairs), abs=1e-12)
    matrix = np.array(pairs).reshape(truth.sum(), -1)
    se = math.sqrt(matrix.mean(1).var(ddof=1) / len(matrix) + matrix.mean(0).var(ddof=1) / matrix.shape[1])
    assert found.hi - found.lo == pytest.approx(2 * 1.959963985 * se, rel=1e-6)


def test_auc_depends_on_order_alone_and_turns_round_with_the_sign():
    rng = np.random.default_rng(1)
    scores, truth = rng.normal(size=40), rng.random(40) < 0.5
    assert auc(np.exp(scores), truth) == auc(scores, truth)
    assert auc(-scores, truth).value == pytest.approx(1 - auc(scores, truth).value)


def test_auc_leaves_out_what_has_no_score_and_takes_infinities():
    truth = np.array([True, False, True, False])
    assert auc(np.array([np.nan, 0.0, 1.0, np.nan]), truth).n == 2
    assert auc(np.array([np.inf, 0.0, np.inf, -np.inf]), truth).value == 1.0
    assert auc(np.array([1.0, 2.0, 3.0, 4.0]), np.ones(4, dtype=bool)).value is None


@pytest.mark.slow
def test_intervals_cover_what_they_should():
    rng, hits, correlated, means = np.random.default_rng(2), 0, 0, 0
    truth = np.arange(120) < 40
    true_auc, rho = stats.norm.cdf(1 / math.sqrt(2)), 0.6
    for _ in range(500):
        found = auc(rng.normal(size=120) + truth, truth)
        hits += found.lo <= true_auc <= found.hi
        a, b = rng.normal(size=(2, 80))
        found = spearman(a, rho * a + math.sqrt(1 - rho**2) * b)
        correlated += found.lo <= 6 / math.pi * math.asin(rho / 2) <= found.hi
        found = mean(rng.normal(3, 1, 60), seed=int(rng.integers(2**31)))
        means += found.lo <= 3 <= found.hi
    assert 0.92 <= hits / 500 <= 0.98
    assert 0.92 <= correlated / 500 <= 0.98
    assert 0.91 <= means / 500 <= 0.98


def test_spearman_is_scipys_and_leaves_out_gaps():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 9, 50).astype(float), rng.integers(0, 9, 50).astype(float)
    assert spearman(a, b).value == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    a[:10] = np.nan
    assert spearman(a, b).value == pytest.approx(stats.spearmanr(a[10:], b[10:]).statistic, abs=1e-12)
    assert spearman(a, b).n == 40
    found = spearman(a, b)
    half = 1.959963985 * math.sqrt((1 + found.value**2 / 2) / 37)
    assert found.hi == pytest.approx(math.tanh(math.atanh(found.value) + half), rel=1e-9)
    assert found.lo == pytest.approx(math.tanh(math.atanh(found.value) - half), rel=1e-9)
    assert spearman(np.ones(5), np.arange(5.0)).value is None
    assert spearman(np.arange(5.0), np.exp(np.arange(5.0))).value == pytest.approx(1)
    assert spearman(np.array([1.0]), np.array([1.0])).value is None


def test_mean_says_how_sure_it_is_and_nothing_of_one_example():
    assert mean(np.array([2.0])) == agreement.Estimate(2.0, None, None, 1)
    assert mean(np.array([np.nan])).value is None
    found = mean(np.array([1.0, 2.0, 3.0, np.nan]))
    assert (found.value, found.n) == (2.0, 3)
    assert found.lo < 2.0 < found.hi
    assert mean(np.array([1.0, 2.0, 3.0]), seed=4) == mean(np.array([1.0, 2.0, 3.0]), seed=4)


def test_the_mean_of_many_has_the_interval_that_the_bootstrap_comes_to(monkeypatch):
    values = np.random.default_rng(5).exponential(size=4000)
    boot = mean(values)
    monkeypatch.setattr(agreement, "MOST_RESAMPLED", 100)
    normal = mean(values)
    assert normal.value == boot.value
    assert normal.hi - normal.lo == pytest.approx(boot.hi - boot.lo, rel=0.1)
    assert normal.hi - normal.value == pytest.approx(1.959963985 * values.std(ddof=1) / math.sqrt(4000), rel=1e-9)


def test_found_in_top_by_hand_and_with_ties():
    truth = np.array([True, True, False, False, False])
    assert found_in_top(np.array([5.0, 1.0, 4.0, 0.0, 0.0]), truth).value == 0.5
    assert found_in_top(np.array([5.0, 4.0, 1.0, 0.0, 0.0]), truth).value == 1.0
    assert found_in_top(np.zeros(5), truth).value == pytest.approx(2 / 5)  # two of five places, at random
    assert found_in_top(np.array([np.nan, 1.0, 0.0, -1.0, -2.0]), truth).value == 0.5
    assert found_in_top(np.zeros(5), np.zeros(5, dtype=bool)).value is None


def test_ranks_run_from_0_to_1_with_ties_shared():
    np.testing.assert_allclose(ranks(np.array([10.0, 30.0, 20.0])), [0, 1, 0.5])
    np.testing.assert_allclose(ranks(np.array([1.0, 1.0, np.nan, 2.0])), [0.25, 0.25, np.nan, 1])
    np.testing.assert_allclose(ranks(np.array([7.0])), [0.5])
    np.testing.assert_allclose(ranks(np.array([-np.inf, np.inf, 0.0])), [0, 1, 0.5])
    assert len(ranks(np.empty(0))) == 0
