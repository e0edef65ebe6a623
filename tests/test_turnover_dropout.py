"""Turn-over dropout: by hand, as matrices of one example, what its gradient moves, planted wrong labels, controls."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from memdiag import InputError, agreement, training
from memdiag.models.mlp import MLP, MlpConfig
from memdiag.packing import Corpus
from memdiag.supervised import Examples
from memdiag.train_inputs import open_inputs
from memdiag.train_report import TrainOptions
from memdiag.training import Recipe
from memdiag.turnover_dropout import Network, draw_bits, fit, influence, logits, n_units, self_influence

CPU = torch.device("cpu")
DEEP = MlpConfig((4, 7, 5, 3), activation="tanh", input_mean=0.3, input_std=1.7)


def some(n: int, seed: int = 0, classes: int = 3) -> Examples:
    """n examples of 4 features."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(n, 4)).astype(np.float32)
    return Examples(np.arange(n), [f"e{i}" for i in range(n)], inputs, rng.integers(0, classes, n))


def taken(examples: Examples, at: np.ndarray) -> Examples:
    """Some of the examples, in another order."""
    ids = [examples.ids[i] for i in at]
    return Examples(examples.rows[at], ids, examples.inputs[at], examples.labels[at])


def new(config: MlpConfig, n: int, seed: int = 0) -> Network:
    """A network that has learned nothing yet."""
    with training.seeded(seed):
        return Network(MLP(config), draw_bits(n, n_units(config), seed))


def recipe(**how: object) -> Recipe:
    """SGD as `memdiag train` uses it for features."""
    usual = {"steps": 20, "batch_size": 8, "lr": 0.1, "optimizer": "sgd", "weight_decay": 0.0, "clip": 0.0}
    return Recipe(**usual | how)


@pytest.fixture(scope="module")
def digits():
    """Digits with a tenth of the labels wrong, and how `memdiag train` would learn them."""
    inputs = open_inputs(TrainOptions(data="task:digits?split=train&corruption=0.1", device="cpu"))
    return inputs.examples, inputs.corrupted, MlpConfig.from_json(inputs.config)


def of_digits(digits, seed: int, *, epochs: int = 30, redrawn: bool = False) -> Network:
    examples, _, config = digits
    how = recipe(steps=-(-epochs * len(examples) // 64), batch_size=64, seed=seed)
    return fit(examples, config, how, device=CPU, redrawn=redrawn)


@pytest.fixture(scope="module")
def learned(digits):
    """A network that has learned digits."""
    return of_digits(digits, 0)


# -- the number ----------------------------------------------------------------------------------------------------


def test_self_influence_by_hand():
    """Two hidden units; the example has the first, which says class 0, and the flipped network the second."""
    network = new(MlpConfig((1, 2, 2)), 1)
    weights = {
        "layers.linear_1.weight": [[1.0], [2.0]],
        "layers.linear_1.bias": [0.0, 1.0],
        "layers.linear_2.weight": [[1.0, 0.0], [0.0, 1.0]],
        "layers.linear_2.bias": [0.5, 0.0],
    }
    network.mlp.load_state_dict({name: torch.tensor(values) for name, values in weights.items()})
    network = Network(network.mlp, np.array([[0b10000000]], dtype=np.uint8))
    found = self_influence(network, Examples(np.arange(1), ["a"], np.ones((1, 1), np.float32), np.array([0])))
    # own: hidden (1, 0) / 0.5, logits (2.5, 0); flipped: hidden (0, 3) / 0.5, logits (0.5, 6)
    assert found.own_loss[0] == pytest.approx(math.log(1 + math.exp(-2.5)), rel=1e-6)
    assert found.flipped_loss[0] == pytest.approx(math.log(1 + math.exp(5.5)), rel=1e-6)
    assert found.influence[0] == pytest.approx(math.log(1 + math.exp(5.5)) - math.log(1 + math.exp(-2.5)), rel=1e-6)
    assert found.own_correct.tolist() == [True]
    assert found.flipped_correct.tolist() == [False]


def by_matrices(network: Network, features: np.ndarray, label: int, mask: np.ndarray) -> tuple[float, bool]:
    """Loss and correctness of one example from the definition, in float64."""
    w = {name: p.detach().double().numpy() for name, p in network.mlp.named_parameters()}
    h = (features.astype(np.float64) - DEEP.input_mean) / DEEP.input_std
    h = np.diag(mask[:7] / 0.5) @ np.tanh(w["layers.linear_1.weight"] @ h + w["layers.linear_1.bias"])
    h = np.diag(mask[7:] / 0.5) @ np.tanh(w["layers.linear_2.weight"] @ h + w["layers.linear_2.bias"])
    z = w["layers.linear_3.weight"] @ h + w["layers.linear_3.bias"]
    return float(np.log(np.exp(z).sum()) - z[label]), int(z.argmax()) == label


def test_losses_are_those_of_one_example_at_a_time_through_matrices():
    examples, network = some(9), new(DEEP, 9)
    found = self_influence(network, examples, batch_size=4)
    for i in range(9):
        mask = np.array([network.bits[i, j // 8] >> (7 - j % 8) & 1 for j in range(12)])
        own = by_matrices(network, examples.inputs[i], int(examples.labels[i]), mask)
        flipped = by_matrices(network, examples.inputs[i], int(examples.labels[i]), 1 - mask)
        assert (found.own_loss[i], found.flipped_loss[i]) == pytest.approx((own[0], flipped[0]), rel=1e-5)
        assert (found.own_correct[i], found.flipped_correct[i]) == (own[1], flipped[1])


def test_influence_is_that_of_one_pair_at_a_time_and_on_itself_is_self_influence():
    examples, test, network = some(6), some(5, seed=1), new(DEEP, 6)
    at = np.array([4, 0])
    found = influence(network, examples, test, at, batch_size=2)
    assert found.shape == (2, 5)
    for r, i in enumerate(at):
        mask = network.masks(np.array([i]))[0].astype(int)
        for t in range(5):
            losses = [by_matrices(network, test.inputs[t], int(test.labels[t]), m)[0] for m in (1 - mask, mask)]
            assert found[r, t] == pytest.approx(losses[0] - losses[1], abs=1e-5)
    square = influence(network, examples, examples, np.arange(6))
    np.testing.assert_allclose(np.diag(square), self_influence(network, examples).influence, atol=1e-6)


def test_flipping_all_masks_changes_the_sign():
    examples, network = some(20), new(DEEP, 20)
    flipped = Network(network.mlp, ~network.bits)
    found, other = (self_influence(net, examples) for net in (network, flipped))
    np.testing.assert_array_equal(found.influence, -other.influence)
    np.testing.assert_array_equal(found.own_correct, other.flipped_correct)


def test_the_size_of_a_batch_and_the_order_of_the_examples_change_nothing():
    examples, network = some(50), new(DEEP, 50)
    whole = self_influence(network, examples)
    for batch_size in (1, 7, 50, 1000):
        np.testing.assert_allclose(self_influence(network, examples, batch_size=batch_size).influence, whole.influence,
                                   atol=1e-5)  # fmt: skip
    order = np.random.default_rng(0).permutation(50)
    mixed = self_influence(Network(network.mlp, network.bits[order]), taken(examples, order))
    np.testing.assert_allclose(mixed.influence, whole.influence[order], atol=1e-5)
    assert np.abs(whole.influence).min() > 0


def test_images_are_flattened():
    examples, network = some(6), new(DEEP, 6)
    square = dataclasses.replace(examples, inputs=examples.inputs.reshape(6, 2, 2))
    np.testing.assert_array_equal(
        self_influence(network, square).influence, self_influence(network, examples).influence
    )


# -- masks ---------------------------------------------------------------------------------------------------------


def test_every_unit_is_on_for_half_of_the_examples_and_no_two_units_agree_more():
    n, units = 4000, 61
    masks = Network(MLP(MlpConfig((4, 40, 21, 3))), draw_bits(n, units, 3)).masks(np.arange(n))
    assert masks.shape == (n, units)
    assert abs(masks.mean() - 0.5) < 4 * 0.5 / math.sqrt(n * units)
    assert np.abs(masks.mean(axis=0) - 0.5).max() < 4.5 * 0.5 / math.sqrt(n)  # 61 units
    assert np.abs(masks.mean(axis=1) - 0.5).max() < 5 * 0.5 / math.sqrt(units)  # 4000 examples
    agree = np.corrcoef(masks, rowvar=False)[np.triu_indices(units, 1)]
    assert np.abs(agree).max() < 5 / math.sqrt(n)  # 1830 pairs
    assert len(np.unique(masks, axis=0)) == n


def test_masks_are_drawn_by_seed_and_place_alone():
    np.testing.assert_array_equal(draw_bits(9, 21, 5), draw_bits(200, 21, 5)[:9])
    assert (draw_bits(9, 21, 5) != draw_bits(9, 21, 6)).any()
    assert draw_bits(9, 21, 5).shape == (9, 3)
    assert (draw_bits(500, 21, 5)[:, -1] & 0b111 == 0).all()
    assert draw_bits(0, 21, 5).shape == (0, 3)
    assert draw_bits(1, 8, 0).tolist() == [[124]]  # a report made again must find the same masks


def test_the_masked_network_is_the_mean_of_all_masks_where_nothing_bends():
    """h · m / p keeps the mean: over all masks of a linear network the logits are those without a mask."""
    config = MlpConfig((4, 3, 2), activation="identity")
    network, x = new(config, 1), torch.from_numpy(some(5).inputs)
    masks = [torch.tensor([[bool(m >> j & 1) for j in range(3)]]) for m in range(8)]
    average = torch.stack([logits(network.mlp, x, mask) for mask in masks]).mean(0)
    torch.testing.assert_close(average, network.mlp(x))


# -- training ------------------------------------------------------------------------------------------------------


def test_an_example_moves_nothing_of_its_flipped_network_but_the_biases_of_the_output():
    one, start = some(1), new(DEEP, 1)
    network = fit(one, DEEP, recipe(steps=5, batch_size=1), device=CPU)
    mask = network.masks(np.array([0]))[0]
    assert mask.any()
    assert not mask.all()
    layers = [np.ones(4, dtype=bool), mask[:7], mask[7:], np.ones(3, dtype=bool)]
    before, after = (dict(net.mlp.named_parameters()) for net in (start, network))
    for k in (1, 2, 3):
        moved = (before[f"layers.linear_{k}.weight"] != after[f"layers.linear_{k}.weight"]).numpy()
        np.testing.assert_array_equal(moved, np.outer(layers[k], layers[k - 1]))
        moved = (before[f"layers.linear_{k}.bias"] != after[f"layers.linear_{k}.bias"]).numpy()
        np.testing.assert_array_equal(moved, layers[k])


def test_masks_that_are_drawn_anew_let_an_example_move_everything():
    """Of 40 masks a unit is off in all, or a pair of units never on together, with probability (3/4)^40 = 1e-5."""
    start, network = new(DEEP, 1), fit(some(1), DEEP, recipe(steps=40, batch_size=1), device=CPU, redrawn=True)
    for before, after in zip(start.mlp.parameters(), network.mlp.parameters()):
        assert (before != after).all()


def test_training_is_gradient_descent_on_the_own_networks():
    """Three updates from the definition: every example alone through its own mask, gradients averaged."""
    examples, how = some(12), recipe(steps=3, batch_size=5, schedule="constant", seed=4)
    found = fit(examples, DEEP, how, device=CPU)
    network = new(DEEP, 12, seed=4)
    optimizer = torch.optim.SGD(network.mlp.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        rows = training.rows_of_update(step, 12, 5, 4)
        loss = torch.zeros(())
        for i in rows:
            x, mask = torch.from_numpy(examples.inputs[i : i + 1]), torch.from_numpy(network.masks(np.array([i])))
            z = logits(network.mlp, x, mask)[0]
            loss = loss + (torch.logsumexp(z, 0) - z[int(examples.labels[i])]) / 5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for a, b in zip(network.mlp.parameters(), found.mlp.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_seed_decides_everything_and_nothing_else_does():
    examples = some(30)
    first = self_influence(fit(examples, DEEP, recipe(), device=CPU), examples).influence
    torch.rand(3)
    again = self_influence(fit(examples, DEEP, recipe(), device=CPU), examples).influence
    np.testing.assert_array_equal(first, again)
    other = self_influence(fit(examples, DEEP, recipe(seed=1), device=CPU), examples).influence
    assert (first != other).all()


def test_progress_hears_of_every_update_and_the_network_is_left_in_eval_mode():
    heard = []

    class Listening:
        def advance(self, n: int, note: str = "") -> None:
            heard.append(n)

    network = fit(some(10), DEEP, recipe(steps=7), device=CPU, progress=Listening())
    assert heard == [1] * 7
    assert not network.mlp.training


def test_what_is_not_finite_ends_the_training():
    with pytest.raises(training.Diverged):
        fit(some(30), dataclasses.replace(DEEP, activation="square"), recipe(steps=200, lr=1e6), device=CPU)


# -- planted wrong labels ------------------------------------------------------------------------------------------


def test_wrong_labels_have_the_most_self_influence(digits, learned):
    examples, wrong, _ = digits
    found = self_influence(learned, examples)
    assert found.own_correct.mean() >= 0.97  # own networks learn wrong labels, too
    assert found.own_correct[wrong].mean() >= 0.9
    assert found.flipped_correct[wrong].mean() <= 0.1  # chance
    assert found.flipped_correct[~wrong].mean() >= 0.6
    assert agreement.auc(found.influence, wrong).value >= 0.95  # one run: 0.96


def test_the_mean_of_three_networks_finds_wrong_labels_better_than_one(digits, learned):
    examples, wrong, _ = digits
    networks = [learned, *(of_digits(digits, seed) for seed in (1, 2))]
    runs = [self_influence(network, examples).influence for network in networks]
    single = np.mean([agreement.auc(run, wrong).value for run in runs])
    mean = agreement.auc(np.mean(runs, axis=0), wrong).value
    assert single >= 0.96
    assert mean >= 0.98
    assert mean > single


def test_masks_that_are_drawn_anew_for_every_update_find_nothing(digits):
    examples, wrong, _ = digits
    found = self_influence(of_digits(digits, 0, redrawn=True), examples)
    assert 0.4 <= agreement.auc(found.influence, wrong).value <= 0.6
    assert abs(found.influence.mean()) < 4 * found.influence.std() / math.sqrt(len(examples))


def test_masks_of_other_examples_find_nothing(digits, learned):
    examples, wrong, _ = digits
    others = Network(learned.mlp, np.roll(learned.bits, 1, axis=0))
    assert 0.4 <= agreement.auc(self_influence(others, examples).influence, wrong).value <= 0.6


def test_a_network_that_has_learned_nothing_finds_nothing(digits):
    examples, wrong, config = digits
    found = self_influence(new(config, len(examples)), examples)
    assert 0.4 <= agreement.auc(found.influence, wrong).value <= 0.6


# -- edges and refusals --------------------------------------------------------------------------------------------


def test_one_example_and_features_that_are_all_the_same():
    constant = Examples(np.arange(4), list("abcd"), np.ones((4, 4), np.float32), np.array([0, 1, 2, 0]))
    for examples in (some(1), constant):
        found = self_influence(fit(examples, DEEP, recipe(), device=CPU), examples)
        assert np.isfinite(found.influence).all()
        assert found.influence.shape == (len(examples),)


def test_features_without_a_number_end_the_training():
    examples = some(8)
    examples.inputs[3, 0] = np.nan
    with pytest.raises(training.Diverged):
        fit(examples, DEEP, recipe(), device=CPU)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MlpConfig((4, 3)), "no hidden layer"),
        (MlpConfig((4, 8, 3), norm="batch"), "norm batch"),
        (MlpConfig((4, 8, 3), dropout=0.1), "dropout 0.1"),
        (MlpConfig((4, 8, 2)), "2 outputs"),
    ],
)
def test_a_network_that_cannot_be_masked_is_refused(config, said):
    examples = some(20)
    with pytest.raises(InputError, match=said):
        fit(examples, config, recipe(), device=CPU)


def test_examples_that_are_no_features_with_labels_are_refused():
    texts = Corpus(np.zeros(4, dtype=np.uint16), np.array([0, 2]), np.array([2, 2]), 2, 0)
    of_texts = Examples(np.arange(2), ["a", "b"], texts, np.array([0, 1]))
    for examples in (dataclasses.replace(some(3), labels=None), of_texts):
        with pytest.raises(InputError, match="features with labels"):
            fit(examples, DEEP, recipe(), device=CPU)
    with pytest.raises(InputError, match="no example"):
        fit(some(0), DEEP, recipe(), device=CPU)


def test_other_examples_than_those_it_was_trained_on_are_refused():
    network = new(DEEP, 6)
    with pytest.raises(InputError, match=r"5 examples.*masks of 6"):
        self_influence(network, some(5))
    with pytest.raises(InputError, match=r"5 examples.*masks of 6"):
        influence(network, some(5), some(6), np.array([0]))
