"""Curves of pruning: the same as zeroed weights, planted truth, the cut, the orders, the intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import planted
from scipy.stats import binomtest
from torch.nn import functional as F

from memdiag import grokking, prune_modular, pruning
from memdiag.pruning import Examples, Readout, choose, counts_of, curve, figures, interval, partial_logits, ranking


def network(n: int = 40, k: int = 23, q: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g), torch.randn(q, k, generator=g), torch.randn(q, generator=g)


def three_groups(n: int = 40, q: int = 5, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    labels, truth = rng.integers(0, q, n), rng.integers(0, q, n)
    return Examples(labels, truth, rng.integers(0, 3, n).astype(np.int8))


def test_figures_by_hand() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 3.0], [0.0, 1.0]], dtype=np.float32)
    examples = Examples(np.array([1, 1, 1, 0]), np.array([0, 0, 1, 0]), np.array([0, 0, 1, 2], dtype=np.int8))
    found = figures(logits, examples)
    assert found["train_corrupted_acc"] == 0.5
    assert found["corrupted_true_acc"] == 0.5
    assert found["train_clean_acc"] == 1.0
    assert found["test_acc"] == 0.0
    assert found["train_corrupted_loss"] == pytest.approx(((4 + 1) / 2 + 0) / 2)
    assert found["train_clean_loss"] == pytest.approx((1 + 4) / 2)
    assert found["test_loss"] == pytest.approx((1 + 1) / 2)
    assert examples.counts() == {"corrupted": 2, "clean": 1, "test": 1}


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_losses_are_those_of_torch(loss: str) -> None:
    logits, examples = torch.randn(40, 5, generator=torch.Generator().manual_seed(1)), three_groups()
    found = figures(logits.numpy(), examples, loss=loss)  # type: ignore[arg-type]
    labels = torch.from_numpy(examples.labels)
    for g, name in enumerate(("train_corrupted_loss", "train_clean_loss", "test_loss")):
        at = torch.from_numpy(examples.group == g)
        if loss == "mse":
            expected = F.mse_loss(logits[at], F.one_hot(labels[at], 5).float())
        else:
            expected = F.cross_entropy(logits[at], labels[at])
        assert found[name] == pytest.approx(expected.item(), rel=1e-5)


def test_an_empty_group_and_an_unknown_truth_are_null() -> None:
    examples = Examples(np.array([0, 1]), None, np.array([1, 1], dtype=np.int8))
    found = figures(np.eye(2, dtype=np.float32), examples)
    assert found["train_clean_acc"] == 1.0
    assert [name for name, value in found.items() if value is None] == [
        "train_corrupted_acc", "corrupted_true_acc", "test_acc", "train_corrupted_loss", "test_loss",
    ]  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("most", [1, 7, 23, 500])
def test_a_curve_is_what_zeroed_weights_give(bias: bool, most: int) -> None:
    a, weights, offset = network()
    order, counts = np.random.default_rng(2).permutation(23), counts_of(23, most)
    found = partial_logits(a.T[order].contiguous(), weights.T[order].contiguous(), offset if bias else None, counts)
    for n, logits in zip(counts, found, strict=True):
        zeroed = weights.clone()
        zeroed[:, order[:n]] = 0
        expected = a @ zeroed.T + (offset if bias else 0)
        np.testing.assert_allclose(logits.T, expected.numpy(), atol=1e-5)
    np.testing.assert_array_equal(logits.T, np.tile((offset if bias else torch.zeros(5)).numpy(), (40, 1)))  # none left


def test_a_curve_of_a_trained_network_agrees_exactly() -> None:
    """Acceptance check G: not one prediction differs from that of a network whose weights are zeroed."""
    case = planted(width=236)
    a = grokking.activations(case.model, case.pairs.operands)
    weights = case.model.layers.linear_2.weight
    scores, examples = prune_modular.attribute(case.model, case.pairs)
    order = ranking(scores["memorization"], first="high")
    counts = counts_of(len(order), 40)
    for n, row in zip(counts, curve(Readout(a, weights, None, examples), order, counts)):
        zeroed = weights.clone()
        zeroed[:, order[:n]] = 0
        expected = figures((a @ zeroed.T).numpy(), examples)
        assert {k: v for k, v in row.items() if k.endswith("acc")} == {
            k: v for k, v in expected.items() if k.endswith("acc")
        }


@pytest.mark.parametrize("tile", [7, 4096])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_curves_are_figures_of_zeroed_weights(
    monkeypatch: pytest.MonkeyPatch, loss: pruning.Loss, bias: bool, tile: int
) -> None:
    monkeypatch.setattr(pruning, "TILE", tile)
    a, weights, offset = network()
    examples, order = three_groups(), np.random.default_rng(2).permutation(23)
    readout = Readout(a, weights, offset if bias else None, examples, loss)
    for row in curve(readout, order, counts_of(23, 500)):
        zeroed = weights.clone()
        zeroed[:, order[: row["n_pruned"]]] = 0
        logits = a @ zeroed.T + (offset if bias else 0)
        expected = figures(logits.numpy(), examples, loss=loss)
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, row["n_pruned"])


def agrees(readout: Readout, order: np.ndarray, counts: list[int]) -> None:
    """Not one prediction differs from that of zeroed weights, of which argmax takes the first among equals."""
    for row in curve(readout, order, counts):
        zeroed = readout.weights.clone()
        zeroed[:, order[: row["n_pruned"]]] = 0
        logits = readout.a @ zeroed.T + (0 if readout.offset is None else readout.offset)
        expected = figures(logits.numpy(), readout.examples)
        for name in ("train_corrupted_acc", "corrupted_true_acc", "train_clean_acc", "test_acc"):
            assert row[name] == expected[name], (name, row["n_pruned"])


@pytest.mark.parametrize("bias", [False, True])
def test_examples_at_which_no_neuron_is_active_have_the_class_of_the_bias(bias: bool) -> None:
    a, weights, offset = network(n=300, k=60)
    a = (a - 1.2).relu()  # most neurons are silent, and rounding must not choose in their place
    a[:20] = 0
    order = np.random.default_rng(3).permutation(60)
    agrees(Readout(a, weights, offset if bias else None, three_groups(300)), order, list(range(61)))


def test_classes_that_are_the_same_tie_as_argmax_does() -> None:
    a, weights, _ = network(n=300, k=60)
    weights[3] = weights[1]
    order = np.random.default_rng(3).permutation(60)
    agrees(Readout(a, weights, None, three_groups(300)), order, list(range(61)))


def test_few_neurons_of_few_classes_tie_as_argmax_does() -> None:
    """Look-ups: what is left has no weight for most classes."""
    case = planted(width=118)
    a, weights = grokking.activations(case.model, case.pairs.operands), case.model.layers.linear_2.weight
    _, examples = prune_modular.attribute(case.model, case.pairs)
    order = ranking(case.is_lookup.astype(np.float64), first="low")
    agrees(Readout(a, weights, None, examples), order, list(range(len(order) - 15, len(order) + 1)))


def test_planted_look_ups_go_and_the_rule_stays() -> None:
    """Acceptance check F: without the planted set nothing corrupted is left; without half of it, half."""
    case = planted()
    a, weights = grokking.activations(case.model, case.pairs.operands), case.model.layers.linear_2.weight
    _, examples = prune_modular.attribute(case.model, case.pairs)
    order = ranking(case.is_lookup.astype(np.float64), first="high")
    n = int(case.is_lookup.sum())
    start, half, none = curve(Readout(a, weights, None, examples), order, [0, n // 2, n])
    assert start["train_corrupted_acc"] == 1.0
    assert half["train_corrupted_acc"] == pytest.approx(0.5, abs=0.02)
    assert none["train_corrupted_acc"] == 0.0
    assert none["corrupted_true_acc"] == 1.0
    assert none["test_acc"] == 1.0
    control = curve(Readout(a, weights, None, examples), pruning.random_orders(len(order), 1, seed=0)[0], [0, n])[1]
    assert control["train_corrupted_acc"] > 0.8


def test_counts() -> None:
    assert counts_of(3, 500) == [0, 1, 2, 3]
    assert counts_of(100, 4) == [0, 6, 25, 56, 100]  # (j / 4)² of them
    assert counts_of(100, 2, also=[7, 25]) == [0, 7, 25, 100]
    assert counts_of(500, 500) == list(range(501))
    assert counts_of(5000, 500)[-1] == 5000
    assert counts_of(1, 500) == [0, 1]


def test_rankings() -> None:
    score = np.array([0.5, np.nan, 2.0, -1.0, 0.5])
    assert ranking(score, first="high").tolist() == [2, 0, 4, 3, 1]
    assert ranking(score, first="low").tolist() == [3, 0, 4, 2, 1]


def test_random_orders_know_nothing_and_repeat() -> None:
    few, many = pruning.random_orders(50, 3, seed=1), pruning.random_orders(50, 20, seed=1)
    assert all((a == b).all() for a, b in zip(few, many))
    assert all(sorted(order) == list(range(50)) for order in many)
    assert len({tuple(order) for order in many}) == 20
    assert pruning.random_orders(50, 1, seed=2)[0].tolist() != few[0].tolist()
    first = np.mean([order.tolist().index(0) for order in pruning.random_orders(50, 400, seed=3)])
    assert abs(first - 24.5) < 4 * 14.43 / 20  # uniform over places


def rows(corrupted: list[float], clean: list[float]) -> list[dict[str, float]]:
    return [
        {"n_pruned": n, "train_corrupted_acc": c, "train_clean_acc": k}
        for n, (c, k) in enumerate(zip(corrupted, clean))
    ]


@pytest.mark.parametrize(
    ("corrupted", "clean", "keep", "expected"),
    [
        ([0.9, 0.5, 0.13, 0.1], [1.0, 1.0, 1.0, 1.0], 0.99, (2, True)),  # the fewest, though more would do better
        ([0.9, 0.14, 0.05], [1.0, 0.98, 0.98], 0.99, (0, False)),
        ([0.9, 0.14, 0.05], [1.0, 0.98, 0.98], 0.98, (1, True)),
        ([0.9, 0.2, 0.141, 0.1], [1.0, 1.0, 1.0, 0.5], 0.99, (2, False)),  # as far as clean accuracy allows
        ([0.9, 0.2, 0.2], [1.0, 1.0, 1.0], 0.99, (1, False)),
        ([0.05, 0.0], [1.0, 1.0], 0.99, (0, True)),  # nothing to be done
        ([0.9, 0.1], [0.7, 0.69], 0.99, (1, True)),  # measured from the start, wherever that is
    ],
)
def test_the_cut_by_hand(corrupted: list[float], clean: list[float], keep: float, expected: tuple[int, bool]) -> None:
    found = choose(rows(corrupted, clean), agreement="train_corrupted_acc", chance=0.1, keep_clean=keep)
    assert found == expected


def test_the_cut_never_looks_at_the_test_set() -> None:
    base = rows([0.9, 0.1], [1.0, 1.0])
    for test in (0.0, 1.0):
        found = choose(
            [row | {"test_acc": test} for row in base], agreement="train_corrupted_acc", chance=0.1, keep_clean=0.99
        )
        assert found == (1, True)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 10), (941, 1000), (1, 1)])
def test_intervals_are_scipys(k: int, n: int) -> None:
    expected = binomtest(k, n).proportion_ci(method="exact")
    assert interval(k / n, n) == pytest.approx((expected.low, expected.high))


def test_no_examples_have_no_interval() -> None:
    assert interval(None, 5) == (None, None)
    assert interval(0.5, 0) == (None, None)
