"""Scores of a training run: by hand, against the definition, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from memdiag import scores

# correct bits of six epochs -> forgetting events, ever learned, first learned, learned forever
TRACES = {
    "111111": (0, 1, 1, 1),
    "001111": (0, 1, 3, 3),
    "010101": (2, 1, 2, 6),
    "000000": (0, 0, 7, 7),
    "111000": (1, 1, 1, 7),
    "100110": (2, 1, 1, 7),
    "000001": (0, 1, 6, 6),
}
FROM_BITS = ("forgetting_events", "ever_learned", "first_learned", "learned_forever", "correctness")


def score(name, *arrays):
    return scores.load(name).score(*arrays)


def bits(*traces):
    return np.array([[bit == "1" for bit in trace] for trace in traces]).T  # (e, b)


def random_run(seed=0, e=8, b=30, k=5):
    """(label_logit, other_logit, logsumexp, correct), each (e, b), of random logits with label 0."""
    z = np.random.default_rng(seed).normal(0, 2, (e, b, k))
    other = z[:, :, 1:].max(2) if k > 1 else np.full((e, b), -np.inf)
    return z[:, :, 0], other, np.log(np.exp(z).sum(2)), z.argmax(2) == 0


@pytest.mark.parametrize(("trace", "wanted"), TRACES.items())
def test_the_table_of_traces(trace, wanted):
    correct = bits(trace)
    events, ever, first, forever = (score(name, correct)[0] for name in FROM_BITS[:4])
    assert (events, ever, first, forever) == wanted
    assert score("correctness", correct)[0] == trace.count("1") / 6


def test_all_traces_at_once_are_the_same_as_one_by_one():
    for column, name in enumerate(FROM_BITS[:4]):
        np.testing.assert_array_equal(score(name, bits(*TRACES)), [wanted[column] for wanted in TRACES.values()])


def test_scores_of_bits_agree_with_the_definitions():
    correct = np.random.default_rng(0).random((7, 200)) < 0.5
    values = {name: score(name, correct) for name in FROM_BITS}
    for i in range(200):
        c = list(correct[:, i])
        assert values["forgetting_events"][i] == sum(c[e] and not c[e + 1] for e in range(6))
        assert values["ever_learned"][i] == (True in c)
        assert values["first_learned"][i] == (c.index(True) + 1 if True in c else 8)
        assert values["learned_forever"][i] == next(e for e in range(1, 9) if all(c[e - 1 :]))
        assert values["correctness"][i] == pytest.approx(sum(c) / 7)


def test_scores_of_bits_keep_their_order():
    correct = np.random.default_rng(1).random((6, 300)) < 0.6
    first, forever = score("first_learned", correct), score("learned_forever", correct)
    events, ever = score("forgetting_events", correct), score("ever_learned", correct)
    assert (first <= forever).all()
    assert (events <= 3).all()
    np.testing.assert_array_equal(ever == 0, first == 7)
    np.testing.assert_array_equal((events == 0) & (ever == 1) & correct[-1], (first == forever) & (ever == 1))
    np.testing.assert_array_equal(forever == 7, ~correct[-1])


def test_one_epoch_is_enough_for_scores_of_bits():
    correct = bits("1", "0")
    np.testing.assert_array_equal(score("forgetting_events", correct), [0, 0])
    np.testing.assert_array_equal(score("ever_learned", correct), [1, 0])
    np.testing.assert_array_equal(score("first_learned", correct), [1, 2])
    np.testing.assert_array_equal(score("learned_forever", correct), [1, 2])
    np.testing.assert_array_equal(score("correctness", correct), [1, 0])


def test_aum_by_hand():
    assert score("aum", np.array([[2.0]]), np.array([[3.0]])) == [-1]  # logits (1, 2, 3) with label 1
    label, other = np.array([[9.0, 0.0], [3.0, 1.0], [4.0, 0.0]]), np.array([[0.0, 9.0], [2.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(score("aum", label, other), [1, -2.5])  # margins 1 and 1; -1 and -4; not the first


def test_aum_equals_the_sums_of_a_plain_loop_exactly_and_a_batch_of_one_works():
    rng = np.random.default_rng(0)
    label, other = rng.integers(-800, 800, (2, 9, 50)) / 64  # exact in every order of summing
    aum, early = score("aum", label, other), score("aum_early", label, other)
    for i in range(50):
        total = 0.0
        for epoch in range(2, 10):
            total += label[epoch - 1, i] - other[epoch - 1, i]
        assert aum[i] == total / 8
        assert early[i] == sum(label[epoch - 1, i] - other[epoch - 1, i] for epoch in range(2, 6)) / 4  # ceil(9 / 2)
        assert score("aum", label[:, [i]], other[:, [i]]) == [aum[i]]


@pytest.mark.parametrize(
    ("epochs", "used"), [(1, [1]), (2, [1]), (3, [2]), (4, [2]), (5, [2, 3]), (6, [2, 3]), (7, [2, 3, 4])]
)
def test_the_early_window_ends_at_half_of_the_epochs(epochs, used):
    label, zero = 10.0 ** np.arange(epochs)[:, None], np.zeros((epochs, 1))
    assert score("aum_early", label, zero)[0] == pytest.approx(sum(10.0 ** (e - 1) for e in used) / len(used))


def test_the_first_epoch_counts_for_aum_only_if_it_is_the_only_one():
    label, other, *_ = random_run()
    changed = label.copy()
    changed[0] = 1e6
    np.testing.assert_array_equal(score("aum", changed, other), score("aum", label, other))
    np.testing.assert_array_equal(score("aum_early", changed, other), score("aum_early", label, other))
    np.testing.assert_array_equal(score("aum", label[:1], other[:1]), (label - other)[0])


def test_what_comes_after_half_of_the_run_does_not_change_the_early_window():
    label, other, *_ = random_run(e=8)
    late = label.copy()
    late[4:] = np.nan
    np.testing.assert_array_equal(score("aum_early", late, other), score("aum_early", label, other))
    assert np.isnan(score("aum", late, other)).all()


@pytest.mark.parametrize("nothing", [-np.inf, np.nan])
def test_with_one_class_there_is_no_margin_and_no_loss(nothing):
    label = np.array([[1.0, -2.0], [3.0, 4.0]])
    other = np.full((2, 2), nothing)
    assert np.isnan(score("aum", label, other)).all()
    assert np.isnan(score("aum_early", label, other)).all()
    np.testing.assert_array_equal(score("csl", label, label), [0, 0])
    np.testing.assert_array_equal(score("cartography_confidence", label, label), [1, 1])
    np.testing.assert_array_equal(score("cartography_variability", label, label), [0, 0])


def test_cartography_by_hand():
    p = np.array([[0.2], [0.5], [0.9], [0.8]])
    assert score("cartography_confidence", np.log(p), np.zeros((4, 1)))[0] == pytest.approx(0.6, rel=1e-12)
    assert score("cartography_variability", np.log(p), np.zeros((4, 1)))[0] == pytest.approx(0.273861, abs=5e-7)
    assert score("csl", np.log(p), np.zeros((4, 1)))[0] == pytest.approx(-math.log(0.2 * 0.5 * 0.9 * 0.8), rel=1e-12)


def test_scores_of_probabilities_agree_with_the_definitions():
    label, _, logsumexp, _ = random_run()
    mean, std, csl = (score(n, label, logsumexp) for n in ("cartography_confidence", "cartography_variability", "csl"))
    for i in range(30):
        p = [math.exp(label[e, i] - logsumexp[e, i]) for e in range(8)]
        assert mean[i] == pytest.approx(sum(p) / 8, rel=1e-12)
        assert std[i] == pytest.approx(math.sqrt(sum((x - sum(p) / 8) ** 2 for x in p) / 8), rel=1e-10)
        assert csl[i] == pytest.approx(sum(-math.log(x) for x in p), rel=1e-12)


def test_variability_stays_below_its_bound():
    rng = np.random.default_rng(0)
    p = np.where(rng.random((6, 2000)) < 0.5, rng.random((6, 2000)), rng.random((6, 2000)) < 0.5)
    with np.errstate(divide="ignore"):
        label = np.maximum(np.log(p), -700.0)
    mean = score("cartography_confidence", label, np.zeros(p.shape))
    std = score("cartography_variability", label, np.zeros(p.shape))
    assert (std <= np.sqrt(mean * (1 - mean)) + 1e-12).all()
    assert std.max() <= 0.5 + 1e-12
    assert std.max() > 0.49  # the bound is reached by p of 0 and 1


def test_variability_of_one_epoch_is_zero():
    np.testing.assert_array_equal(score("cartography_variability", np.array([[-1.0]]), np.array([[0.5]])), [0])


@pytest.mark.parametrize("name", ["csl", "cartography_confidence", "cartography_variability"])
def test_a_constant_added_to_an_epochs_logits_changes_nothing(name):
    label, _, logsumexp, _ = random_run()
    shift = np.random.default_rng(1).normal(0, 100, (8, 1))
    np.testing.assert_allclose(score(name, label + shift, logsumexp + shift), score(name, label, logsumexp), rtol=1e-9)


@pytest.mark.parametrize("name", ["csl", "cartography_confidence", "cartography_variability"])
def test_the_order_of_epochs_does_not_matter_for_sums(name):
    label, _, logsumexp, _ = random_run()
    np.testing.assert_allclose(score(name, label[::-1], logsumexp[::-1]), score(name, label, logsumexp), rtol=1e-12)


def test_two_roundings_to_float32_make_no_negative_loss():
    label = np.array([[12.000001], [1.0]])
    assert score("csl", label, np.array([[12.0], [1.5]]))[0] == 0.5
    assert score("cartography_confidence", label, np.array([[12.0], [12.0]]))[0] <= 1.0


def test_gradient_sums_by_hand():
    norms = np.array([[1.0, 2.0], [3.0, 0.0]])
    np.testing.assert_array_equal(score("csg", norms), [10, 4])
    np.testing.assert_array_equal(score("tracin_self", np.array([0.5, 0.1]), norms), [0.5 + 0.9, 2.0])


def test_gradient_sums_agree_with_the_definitions():
    rng = np.random.default_rng(0)
    rates, norms = rng.random(5), rng.gamma(2.0, size=(5, 20))
    csg, tracin = score("csg", norms), score("tracin_self", rates, norms)
    for i in range(20):
        assert csg[i] == pytest.approx(sum(norms[c, i] ** 2 for c in range(5)), rel=1e-12)
        assert tracin[i] == pytest.approx(sum(rates[c] * norms[c, i] ** 2 for c in range(5)), rel=1e-12)


def test_gradient_sums_do_not_depend_on_the_order_of_checkpoints_and_one_is_enough():
    rng = np.random.default_rng(1)
    rates, norms, order = rng.random(4), rng.gamma(2.0, size=(4, 9)), np.array([2, 0, 3, 1])
    np.testing.assert_allclose(score("csg", norms[order]), score("csg", norms), rtol=1e-12)
    tracin = score("tracin_self", rates, norms)
    np.testing.assert_allclose(score("tracin_self", rates[order], norms[order]), tracin, rtol=1e-12)
    np.testing.assert_allclose(score("tracin_self", np.ones(4), norms), score("csg", norms), rtol=1e-12)
    np.testing.assert_allclose(score("csg", norms[:1]), norms[0] ** 2)
