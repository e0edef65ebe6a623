"""task:conflict: the targets by hand and by a loop, the laws of inputs, weights and shifts, the splits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from memdiag import tasks
from memdiag.dataset import open_dataset
from memdiag.errors import InputError
from memdiag.tasks.conflict import CHUNK, SHIFTS, WIDTHS, Weights, examples, rows, teacher


def drawn(**keys):
    keys = {"n": 1000, "split": "train", "sigma": 0.25, "seed": 0, **keys}
    return [np.concatenate(arrays) for arrays in zip(*examples(**keys))]


def zeros():
    return Weights(np.zeros((20, 10)), np.zeros(20), np.zeros((10, 20)), np.zeros(10))


def test_by_hand():
    f = Weights(np.array([[1.0, 2.0], [-1.0, 0.0]]), np.array([0.0, 0.5]), np.array([[3.0, 1.0]]), np.array([-1.0]))
    assert f(np.array([[1.0, 1.0], [-1.0, 0.0]])).tolist() == [[8.0], [0.5]]  # hidden (3, 0) and (0, 1.5)
    by = Weights(np.ones((2, 2)), np.ones(2), np.ones((1, 2)), np.ones(1))
    assert f.moved(by, -1).w1.tolist() == [[0.0, 1.0], [-2.0, -1.0]]
    assert f.moved(by, +1).b2.tolist() == [0.0]


def test_without_spread_the_inputs_are_the_two_centres():
    x, labels, _ = drawn(n=4, sigma=0.0)
    assert labels.tolist() == [0, 1, 0, 1]
    assert x.tolist() == [[1] * 5 + [0] * 5, [0] * 5 + [1] * 5] * 2


@pytest.mark.parametrize("seed", [0, 3])
def test_targets_as_a_loop_gives_them(seed):
    theta, delta = teacher(seed)
    for row in rows(n=20, seed=seed):
        sign = 1 if row["label"] == 0 else -1
        w1, b1, w2, b2 = (own + sign * shift for own, shift in zip(theta.parts(), delta.parts()))
        x = [float(value) for value in row["features"]]
        hidden = [max(0.0, sum(w1[j, i] * x[i] for i in range(10)) + b1[j]) for j in range(20)]
        wanted = [sum(w2[o, j] * hidden[j] for j in range(20)) + b2[o] for o in range(10)]
        assert row["target"] == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_it_is_a_network_of_pytorch():
    import torch
    from torch import nn

    theta, _ = teacher(1)
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10)).double()
    for parameter, value in zip(net.parameters(), theta.parts()):
        parameter.data = torch.from_numpy(value)
    x = np.random.default_rng(0).standard_normal((7, 10))
    np.testing.assert_allclose(net(torch.from_numpy(x)).detach().numpy(), theta(x), atol=1e-12)


# -- the laws


def test_inputs_are_gaussian_around_their_class():
    x, labels, _ = drawn(n=20_000, sigma=0.25)
    for label, centre in ((0, [1] * 5 + [0] * 5), (1, [0] * 5 + [1] * 5)):
        z = (x[labels == label] - centre) / 0.25
        assert stats.kstest(z.ravel(), "norm").pvalue > 0.001
        assert np.abs(np.corrcoef(z.T) - np.eye(10)).max() < 0.05


def test_sigma_only_stretches_the_noise():
    (one, _, _), (two, _, _) = drawn(n=50, sigma=0.1), drawn(n=50, sigma=0.2)
    (middle, _, _) = drawn(n=50, sigma=0.0)
    np.testing.assert_allclose(two - middle, 2 * (one - middle), atol=1e-6)


def test_weights_are_drawn_as_pytorch_draws_linear_layers():
    found = [teacher(seed)[0] for seed in range(50)]
    for part, inputs in zip(zip(*(weights.parts() for weights in found)), (10, 10, 20, 20)):
        scaled = np.concatenate([values.ravel() for values in part]) * inputs**0.5
        assert stats.kstest(scaled, "uniform", args=(-1, 2)).pvalue > 0.001


def test_shifts_have_their_rank_and_a_norm_that_is_uniform():
    ratios = []
    for seed in range(50):
        theta, delta = teacher(seed)
        assert np.linalg.matrix_rank(delta.w1) == np.linalg.matrix_rank(delta.w2) == 3
        ratios += [np.linalg.norm(d) / np.linalg.norm(t) for t, d in zip(theta.parts(), delta.parts())]
    low, high = SHIFTS
    assert low <= min(ratios) < 0.7
    assert 4.8 < max(ratios) <= high
    assert stats.kstest(ratios, "uniform", args=(low, high - low)).pvalue > 0.001


def test_without_a_shift_both_classes_have_one_teacher():
    theta, _ = teacher(0)
    x = np.random.default_rng(0).standard_normal((5, 10))
    assert (theta.moved(zeros(), +1)(x) == theta.moved(zeros(), -1)(x)).all()
    assert WIDTHS == (10, 20, 10)


# -- the splits


def test_splits_share_their_teacher_but_no_row():
    train, validation = drawn(), drawn(split="validation")
    assert not set(map(bytes, train[0])) & set(map(bytes, validation[0]))
    theta, delta = teacher(0)
    for x, labels, targets in (train, validation):
        for label, sign in ((0, +1), (1, -1)):
            wanted = theta.moved(delta, sign)(x[labels == label].astype(np.float64))
            np.testing.assert_allclose(targets[labels == label], wanted, rtol=1e-5, atol=1e-5)


def test_draws_depend_on_the_seed_alone():
    first, again, other = drawn(), drawn(), drawn(seed=1)
    assert all((a == b).all() for a, b in zip(first, again))
    assert (first[0] != other[0]).all()
    assert (teacher(0)[0].w1 != teacher(1)[0].w1).all()


def test_a_larger_n_only_adds_rows_at_the_end():
    few, many = drawn(n=7), drawn(n=CHUNK + 4)
    assert all((a == b[:7]).all() for a, b in zip(few, many))
    assert many[1][CHUNK:].tolist() == [0, 1, 0, 1]
    last = next(itertools.islice(rows(n=CHUNK + 1), CHUNK, None))
    assert last["id"] == str(CHUNK)
    assert (last["features"] == many[0][CHUNK]).all()


# -- as a dataset


def test_it_opens_as_features_and_labels():
    dataset = open_dataset("task:conflict?n=6&split=validation")
    assert dataset.name == "task:conflict?n=6&seed=0&sigma=0.25&split=validation"
    assert dataset.n_examples == 6
    found = list(dataset.examples())
    assert [example.label for example in found] == [0, 1, 0, 1, 0, 1]
    assert found[0].features.dtype == np.float32
    np.testing.assert_array_equal(np.stack([e.features for e in found]), drawn(n=6, split="validation")[0])


def test_the_default_is_as_much_as_the_paper_trains_on():
    assert tasks.load("task:conflict").name == "task:conflict?n=1000&seed=0&sigma=0.25&split=train"
    first = next(rows())
    assert (first["features"].shape, first["target"].shape, first["target"].dtype) == ((10,), (10,), np.float32)


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("n=0", "n is 0; wanted at least 1"),
        ("sigma=-0.1", "sigma is -0.1; wanted a finite number >= 0"),
        ("sigma=inf", "sigma is inf; wanted a finite number >= 0"),
        ("sigma=nan", "sigma is nan; wanted a finite number >= 0"),
        ("split=test", "no split of task:conflict 'test'; there are train, validation"),
        ("seed=-1", "seed is -1; wanted at least 0"),
        ("sigma=wide", "wanted float"),
    ],
)
def test_what_is_refused_in_one_line(query, wanted):
    with pytest.raises(InputError) as told:
        open_dataset(f"task:conflict?{query}")
    assert wanted in str(told.value)
    assert "\n" not in str(told.value)
