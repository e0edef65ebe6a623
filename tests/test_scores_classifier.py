"""Scores of a classifier at one checkpoint: by hand, against the definition, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from memdiag import scores

# logits and labels of the four rows whose scores were worked out by hand; the second and the fourth label are wrong
BY_HAND = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0], [0.0, 5.0, 0.0]]), np.array([0, 1, 0, 0])


def score(name, *arrays):
    return scores.load(name).score(*arrays)


def random_logits(seed=0, b=40, k=6, scale=4.0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, scale, (b, k)), rng.integers(0, k, b)


def softmax(z):
    """The definition, as a loop."""
    powers = [math.exp(value) for value in z]
    return [power / sum(powers) for power in powers]


def test_el2n_by_hand():
    np.testing.assert_allclose(score("el2n", *BY_HAND), [0.424336, 0.816497, 0.016285, 1.400134], atol=5e-7)


def test_loss_by_hand():
    np.testing.assert_allclose(score("loss", *BY_HAND)[[0, 3]], [0.407606, 5.013386], atol=5e-7)
    assert score("loss", *BY_HAND)[1] == pytest.approx(math.log(3), rel=1e-15)


def test_confidence_and_margin_by_hand():
    np.testing.assert_allclose(score("confidence", *BY_HAND)[[1, 0]], [1 / 3, 0.6652409557748219], rtol=1e-14)
    np.testing.assert_array_equal(score("margin", *BY_HAND), [1, 0, 5, -5])


def test_the_gradient_of_a_linear_classifier_by_hand():
    x = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, -1.0], [1.0, 1.0]])
    norm = score("el2n", *BY_HAND) * np.sqrt((x**2).sum(1) + 1)  # what `last_layer_grand` must be, and here `grand`
    np.testing.assert_allclose(norm, [1.039407, 1.154701, 0.054011, 2.425103], atol=2e-6)
    for i, (z, y) in enumerate(zip(*BY_HAND)):
        error = np.array(softmax(z)) - np.eye(3)[y]
        gradient = np.append(np.outer(error, x[i]), error)  # of weight and bias
        assert norm[i] == pytest.approx(np.linalg.norm(gradient), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 10])
def test_agree_with_the_definitions(k):
    logits, labels = random_logits(k=k)
    loss, confidence, el2n, margin = (score(name, logits, labels) for name in ("loss", "confidence", "el2n", "margin"))
    for i, (z, y) in enumerate(zip(logits, labels)):
        p = softmax(z)
        assert confidence[i] == pytest.approx(p[y], rel=1e-12)
        assert loss[i] == pytest.approx(-math.log(p[y]), rel=1e-10, abs=1e-15)
        squared = sum((p[c] - (c == y)) ** 2 for c in range(k))
        assert el2n[i] == pytest.approx(math.sqrt(squared), rel=1e-9, abs=1e-15)
        others = [z[c] for c in range(k) if c != y]
        assert margin[i] == pytest.approx(z[y] - max(others), nan_ok=True) if others else math.isnan(margin[i])


def test_el2n_lies_between_its_bounds_for_every_row():
    for k in (2, 3, 10):
        for scale in (0.1, 4.0, 300.0):
            logits, labels = random_logits(seed=k, b=500, k=k, scale=scale)
            el2n, wrong = score("el2n", logits, labels), -np.expm1(-score("loss", logits, labels))
            assert (el2n >= wrong * math.sqrt(k / (k - 1)) * (1 - 1e-12)).all()
            assert (el2n <= wrong * math.sqrt(2) * (1 + 1e-12)).all()
            assert (el2n <= math.sqrt(2) * (1 + 1e-15)).all()
            if k == 2:
                np.testing.assert_allclose(el2n, math.sqrt(2) * wrong, rtol=1e-12)


def test_nothing_cancels_where_the_model_is_sure():
    logits, labels = np.array([[0.0, -50.0, -50.0], [0.0, -400.0, -600.0]]), np.array([0, 0])
    e50 = math.exp(-50)  # p_y = 1 - 2 e50 is 1 in float64
    np.testing.assert_allclose(score("loss", logits, labels), [2 * e50, math.exp(-400)], rtol=1e-12)
    np.testing.assert_allclose(
        score("el2n", logits, labels), [math.sqrt(6) * e50, math.sqrt(2) * math.exp(-400)], rtol=1e-12
    )
    np.testing.assert_array_equal(score("confidence", logits, labels), [1, 1])


def test_nothing_overflows_where_the_model_is_surely_wrong():
    logits, labels = np.array([[0.0, 5000.0, 0.0]]), np.array([0])
    np.testing.assert_allclose(score("loss", logits, labels), [5000])
    np.testing.assert_allclose(score("el2n", logits, labels), [math.sqrt(2)])
    np.testing.assert_array_equal(score("confidence", logits, labels), [0])


@pytest.mark.parametrize("name", ["loss", "margin", "confidence", "el2n"])
def test_a_constant_added_to_all_logits_changes_nothing(name):
    logits, labels = random_logits()
    for constant in (-1000.0, 0.5, 1e4):
        np.testing.assert_allclose(score(name, logits + constant, labels), score(name, logits, labels), rtol=1e-9)


@pytest.mark.parametrize("name", ["loss", "margin", "confidence", "el2n"])
def test_the_names_of_the_classes_do_not_matter(name):
    logits, labels = random_logits()
    new = np.random.default_rng(1).permutation(6)  # class c is called new[c]
    renamed = np.empty_like(logits)
    renamed[:, new] = logits
    np.testing.assert_allclose(score(name, renamed, new[labels]), score(name, logits, labels), rtol=1e-12)


@pytest.mark.parametrize("name", ["loss", "margin", "confidence", "el2n"])
def test_a_class_that_the_model_rules_out_does_not_count(name):
    logits, labels = random_logits()
    wider = np.column_stack([logits, np.full(40, -np.inf)])
    np.testing.assert_allclose(score(name, wider, labels), score(name, logits, labels), rtol=1e-12)


def test_with_one_class_there_is_nothing_to_get_wrong():
    logits, labels = np.array([[3.0], [-900.0]]), np.array([0, 0])
    np.testing.assert_array_equal(score("loss", logits, labels), [0, 0])
    np.testing.assert_array_equal(score("confidence", logits, labels), [1, 1])
    np.testing.assert_array_equal(score("el2n", logits, labels), [0, 0])
    assert np.isnan(score("margin", logits, labels)).all()


def test_a_label_that_the_model_rules_out_has_an_undefined_loss_and_no_confidence():
    logits, labels = np.array([[0.0, 1.0, -np.inf]]), np.array([2])
    assert np.isnan(score("loss", logits, labels)).all()
    assert np.isnan(score("margin", logits, labels)).all()
    np.testing.assert_array_equal(score("confidence", logits, labels), [0])
    p = np.array(softmax([0.0, 1.0]))
    np.testing.assert_allclose(score("el2n", logits, labels), [math.sqrt(1 + (p**2).sum())], rtol=1e-12)


def test_loss_confidence_and_el2n_agree_on_who_comes_first_with_two_classes():
    logits, labels = random_logits(k=2)
    order = np.argsort(score("loss", logits, labels))
    np.testing.assert_array_equal(np.argsort(-score("confidence", logits, labels)), order)
    np.testing.assert_array_equal(np.argsort(score("el2n", logits, labels)), order)
    np.testing.assert_array_equal(np.argsort(-score("margin", logits, labels)), order)


@pytest.mark.parametrize("name", ["grand", "last_layer_grand", "input_grad_norm"])
def test_gradient_norms_are_passed_on_and_undefined_where_not_finite(name):
    norms = np.array([0.0, 1.5, np.inf, np.nan])
    np.testing.assert_array_equal(score(name, norms), [0.0, 1.5, np.nan, np.nan])


def test_prediction_depth_by_hand():
    probes = np.array([[1, 1, 0, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 1, 1, 0, 0]])  # 4 probes of 5 examples
    np.testing.assert_array_equal(score("prediction_depth", probes, np.array([1, 1, 1, 1, 1])), [0, 2, 2, 4, 4])


def test_prediction_depth_agrees_with_the_definition():
    rng = np.random.default_rng(0)
    probes, predicted = rng.integers(0, 2, (5, 60)), rng.integers(0, 2, 60)
    depth = score("prediction_depth", probes, predicted)
    for i in range(60):
        wanted = next(d for d in range(6) if all(probes[layer, i] == predicted[i] for layer in range(d, 5)))
        assert depth[i] == wanted
    assert set(depth) == {0, 1, 2, 3, 4, 5}


def test_prediction_depth_does_not_depend_on_what_the_classes_are_called():
    rng = np.random.default_rng(1)
    probes, predicted, new = rng.integers(0, 3, (4, 30)), rng.integers(0, 3, 30), np.array([7, -1, 4])
    np.testing.assert_array_equal(
        score("prediction_depth", new[probes], new[predicted]), score("prediction_depth", probes, predicted)
    )


def test_loss_curvature_by_hand():
    w, x = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]]), np.array([0.3, -0.2])
    p = np.array(softmax(w @ x))
    trace = np.trace(w.T @ (np.diag(p) - np.outer(p, p)) @ w)
    assert trace == pytest.approx(1.366887398, abs=1e-8)
    np.testing.assert_allclose(
        score("loss_curvature", np.array([[trace], [0.5]])), [(1.366887398 + 0.5) / 2], atol=1e-8
    )


def test_loss_curvature_agrees_with_the_definition_and_the_order_of_checkpoints_does_not_matter():
    traces = np.random.default_rng(0).normal(size=(4, 9))
    curvature = score("loss_curvature", traces)
    for i in range(9):
        assert curvature[i] == pytest.approx(sum(traces[c, i] for c in range(4)) / 4, rel=1e-12)
    np.testing.assert_allclose(score("loss_curvature", traces[::-1]), curvature, rtol=1e-12)
    np.testing.assert_array_equal(score("loss_curvature", traces[:1]), traces[0])
