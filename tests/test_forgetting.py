"""Second-split forgetting time: by hand, as a loop, what must not matter, and why ranks are within a half."""

from __future__ import annotations

import numpy as np
import pytest

from memdiag.forgetting import first_half, forgetting_time, within_half


def as_bools(*examples):
    """Correctness (e, b) from a string of epochs for each example: "1" right, "0" wrong."""
    return np.array([[c == "1" for c in text] for text in examples]).T


def test_forgetting_time_by_hand():
    # at once; after epoch 1; relearned and lost again after epoch 3; right at the end; right only at the end
    correct = as_bools("0000", "1000", "1010", "1111", "0001")
    assert forgetting_time(correct).tolist() == [1, 2, 4, 5, 5]


def test_forgetting_time_of_one_epoch():
    assert forgetting_time(as_bools("0", "1")).tolist() == [1, 2]


def test_forgetting_time_is_its_definition():
    correct = np.random.default_rng(0).random((7, 200)) < 0.4
    expected = []
    for column in correct.T:
        found = 8
        for epoch in range(1, 8):
            if not any(column[later - 1] for later in range(epoch, 8)):
                found = epoch
                break
        expected.append(found)
    assert set(expected) == set(range(1, 9))
    assert forgetting_time(correct).tolist() == expected


def test_forgetting_time_is_of_each_example_by_itself():
    correct = np.random.default_rng(1).random((6, 50)) < 0.5
    order = np.random.default_rng(2).permutation(50)
    assert (forgetting_time(correct[:, order]) == forgetting_time(correct)[order]).all()
    assert (forgetting_time(correct[:, :1]) == forgetting_time(correct)[:1]).all()


def test_what_was_before_the_last_right_epoch_does_not_matter():
    correct = np.random.default_rng(3).random((6, 50)) < 0.5
    earlier = correct.copy()
    for b, time in enumerate(forgetting_time(correct)):
        earlier[: max(0, time - 2), b] ^= True
    assert (forgetting_time(earlier) == forgetting_time(correct)).all()


def test_no_example_has_no_time_and_no_epoch_is_refused():
    assert forgetting_time(np.empty((3, 0), dtype=bool)).shape == (0,)
    with pytest.raises(ValueError, match="at least one epoch"):
        forgetting_time(np.empty((0, 4), dtype=bool))


def test_ranks_within_half_by_hand():
    times = np.array([1.0, 5.0, 3.0, 3.0, 2.0, 5.0, 4.0])
    half = np.array([True, True, True, True, False, False, False])
    censored = times == 5
    # first half: 1 is soonest, the two 3 share the middle, 5 is last; second: 2, 4, never
    assert within_half(times, censored, half).tolist() == pytest.approx([1, 0, 0.5, 0.5, 1, 0, 0.5])


def test_ranks_within_half_are_counts_of_those_forgotten_later():
    rng = np.random.default_rng(4)
    times, half = rng.integers(1, 6, 60).astype(float), rng.random(60) < 0.4
    found = within_half(times, times == 5, half)
    for i in range(60):
        others = [j for j in range(60) if half[j] == half[i] and j != i]
        later = sum((times[j] > times[i]) + 0.5 * (times[j] == times[i]) for j in others)
        assert found[i] == pytest.approx(later / len(others))


def test_ranks_do_not_depend_on_the_times_of_the_other_half():
    rng = np.random.default_rng(5)
    times, half = rng.integers(1, 9, 80).astype(float), rng.random(80) < 0.5
    censored = times == 8
    faster = np.where(half, times, times * 0.1)
    assert (within_half(faster, censored, half) == within_half(times, censored, half)).all()
    assert (within_half(times, censored, ~half) == within_half(times, censored, half)).all()


def test_an_empty_half_and_an_example_alone():
    none = np.zeros(0, dtype=bool)
    assert within_half(np.empty(0), none, none).shape == (0,)
    assert within_half(np.array([3.0]), np.array([False]), np.array([True])).tolist() == [0.5]


def published_like():
    """50,000 times as in the paper's released CIFAR-10 scores: means over five seeds, and the halves are censored at
    another value because the second stages were not equally long."""
    n, rng = 50_000, np.random.default_rng(6)
    half = first_half(n, 0)
    censored = rng.random(n) < 0.84
    at = np.where(half, 20.2, 19.8)
    # with other ends of the scale an uncensored time of the first half is a little later, too
    times = np.where(censored, at, np.round(rng.uniform(2.8, 19.6, n) * at / 19.8 * 5) / 5)
    return times, censored, half


def test_another_censoring_value_in_each_half_biases_times_and_not_ranks():
    times, censored, half = published_like()
    assert half[times > 20].mean() == 1.0  # a threshold at 20 flags one half only
    # of those never forgotten, the raw times put one half after the other
    assert np.median(times[half]) > np.median(times[~half])
    raw = np.argsort(times, kind="stable")[:5000]
    ranked = np.argsort(-within_half(times, censored, half), kind="stable")[:5000]
    assert half[raw].mean() < 0.495
    assert half[ranked].mean() == pytest.approx(0.5, abs=0.005)
    found = within_half(times, censored, half)
    assert len(np.unique(found[half & censored])) == len(np.unique(found[~half & censored])) == 1
    assert found[half].mean() == pytest.approx(0.5)
    assert found[~half].mean() == pytest.approx(0.5)


def test_censored_rows_tie_whatever_stands_in_their_times():
    times, censored, half = published_like()
    moved = np.where(censored, np.random.default_rng(7).uniform(0, 30, len(times)), times)
    assert (within_half(moved, censored, half) == within_half(times, censored, half)).all()


def test_halves_are_drawn_by_the_seed_and_as_equal_as_can_be():
    for n in (2, 3, 10, 101):
        assert first_half(n, 0).sum() == (n + 1) // 2
    assert (first_half(100, 1) == first_half(100, 1)).all()
    assert (first_half(100, 1) != first_half(100, 2)).any()
