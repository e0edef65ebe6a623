"""Training on corrupted modular arithmetic: steps by hand and against autograd, the analytic network, phases."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import numpy as np
import planted
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memdiag import fourier, grokking
from memdiag.errors import InputError
from memdiag.grokking import (
    Design,
    Training,
    activations,
    curves,
    evaluate,
    groups,
    initial,
    loss_and_gradients,
    mean_ipr,
    phase,
    train,
)
from memdiag.models.mlp import MLP, MlpConfig
from memdiag.modular import Pairs, discrete_log_order, make_pairs

Gradients = tuple[Tensor, Tensor, Tensor]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(model: MLP) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def trained(pairs: Pairs, training: Training, seed: int = 0) -> MLP:
    *_, (_, model) = train(pairs, training, seed=seed)
    return model


def plainly(pairs: Pairs, onehot: Tensor, embed: Tensor, readout: Tensor, activation: str, keep: Any = 1) -> Tensor:
    """The loss as the paper writes it: one-hot pairs (i, e), every class of every example, mean of squares."""
    h = onehot @ embed * keep
    logits = (h**2 if activation == "square" else h.clamp(min=0)) @ readout.T
    targets = F.one_hot(torch.from_numpy(pairs.labels[: pairs.n_train]), pairs.p)
    return ((logits - targets) ** 2).mean()


def onehots(pairs: Pairs, n: int | None = None) -> Tensor:
    m, n_ = torch.from_numpy(pairs.operands[: pairs.n_train if n is None else n]).T
    return torch.cat([F.one_hot(m, pairs.p), F.one_hot(n_, pairs.p)], 1)


def design_of(pairs: Pairs, dtype: torch.dtype = torch.float32) -> Design:
    n = pairs.n_train
    return Design.of(torch.from_numpy(pairs.operands[:n]), torch.from_numpy(pairs.labels[:n]), pairs.p, dtype)


def by_autograd(
    pairs: Pairs, embed: Tensor, readout: Tensor, activation: str, keep: Tensor | None = None
) -> tuple[float, Tensor, Tensor]:
    e, w = embed.double().requires_grad_(), readout.double().requires_grad_()
    loss = plainly(pairs, onehots(pairs).double(), e, w, activation, 1 if keep is None else keep)
    d_e, d_w = torch.autograd.grad(loss, (e, w))
    return loss.item(), d_e, d_w


def far(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


# --- the gradient --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "keep", "loss", "at_pair", "d_readout"),
    [
        ("square", 1, (81 + 289) / 3, 172, (54, 0, 102)),  # h = 3, a = 9, r = (9, 0, 17), r W = 43
        ("relu", 1, 34 / 3, 26 / 3, (6, 0, 10)),  # a = 3, r = (3, 0, 5), r W = 13
        ("relu", 0, 1 / 3, 0, (0, 0, 0)),  # dropped: all logits are 0
        ("square", 2, (36**2 + 71**2) / 3, 2848, (24 * 36, 0, 24 * 71)),  # h = 6, a = 36, r = (36, 0, 71), r W = 178
    ],
)
def test_loss_and_gradients_by_hand(
    activation: str, keep: float, loss: float, at_pair: float, d_readout: tuple[float, ...]
) -> None:
    """One neuron, one pair (1, 1) modulo 3 with label 2, c = 2 / 3."""
    u, v = (1, 2, 0), (0, 1, -1)
    design = Design.of(torch.tensor([[1, 1]]), torch.tensor([2]), 3, torch.float32)
    found, d_embed, d_w = loss_and_gradients(
        torch.tensor([*u, *v], dtype=torch.float32)[:, None],
        torch.tensor([[1.0], [0.0], [2.0]]),
        design,
        activation=activation,
        keep=None if keep == 1 else torch.tensor([[float(keep)]]),
    )
    assert found.item() == pytest.approx(loss)
    assert d_embed[:, 0].tolist() == pytest.approx([0, at_pair, 0, 0, at_pair, 0])
    assert d_w[:, 0].tolist() == pytest.approx(d_readout)


@pytest.mark.parametrize("activation", grokking.ACTIVATIONS)
@pytest.mark.parametrize("dropout", [0, 0.4])
@pytest.mark.parametrize("p", [5, 23])
def test_gradients_are_those_of_autograd(activation: str, dropout: float, p: int) -> None:
    pairs = make_pairs("addition", p, train_fraction=0.3, corruption=0.4)
    embed, readout = 0.5 * gaussian(2 * p, 12), 0.5 * gaussian(p, 12, seed=1)
    keep = (torch.rand(pairs.n_train, 12, generator=torch.Generator().manual_seed(2)) >= dropout) / (1 - dropout)
    given = keep if dropout else None
    loss, d_embed, d_readout = loss_and_gradients(embed, readout, design_of(pairs), activation=activation, keep=given)
    expected = by_autograd(pairs, embed, readout, activation, given)
    assert loss.item() == pytest.approx(expected[0], rel=1e-6)
    assert far(d_embed, expected[1]) < 1e-6
    assert far(d_readout, expected[2]) < 1e-6
    assert d_embed.dtype == d_readout.dtype == torch.float32


def test_gradients_agree_with_a_loop_over_pairs_classes_and_neurons() -> None:
    p, width = 5, 3
    pairs = make_pairs("multiplication", p, train_fraction=0.3, corruption=0.5)
    embed, readout = gaussian(2 * p, width), gaussian(p, width, seed=1)
    d_embed, d_readout, loss = np.zeros((2 * p, width)), np.zeros((p, width)), 0.0
    n = pairs.n_train
    for (m, n_), label in zip(pairs.operands[:n].tolist(), pairs.labels[:n].tolist()):
        h = [float(embed[m, k] + embed[p + n_, k]) for k in range(width)]
        for q in range(p):
            error = sum(float(readout[q, k]) * h[k] ** 2 for k in range(width)) - (q == label)
            loss += error**2 / (n * p)
            for k in range(width):
                d_readout[q, k] += 2 * error * h[k] ** 2 / (n * p)
                for e in (m, p + n_):
                    d_embed[e, k] += 2 * error * float(readout[q, k]) * 2 * h[k] / (n * p)
    found = loss_and_gradients(embed, readout, design_of(pairs))
    assert found[0].item() == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(found[1], d_embed, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[2], d_readout, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", grokking.ACTIVATIONS)
def test_the_order_of_pairs_neurons_and_operands_does_not_matter(activation: str) -> None:
    p, width = 11, 6
    pairs = make_pairs("addition", p, corruption=0.3)
    embed, readout = gaussian(2 * p, width), gaussian(p, width, seed=1)

    def gradients(operands: np.ndarray, labels: np.ndarray, e: Tensor, w: Tensor) -> Gradients:
        design = Design.of(torch.from_numpy(operands), torch.from_numpy(labels), p, torch.float32)
        return loss_and_gradients(e, w, design, activation=activation)

    at, labels = pairs.operands[: pairs.n_train], pairs.labels[: pairs.n_train]
    loss, d_embed, d_readout = gradients(at, labels, embed, readout)
    rows, neurons = np.random.default_rng(0).permutation(pairs.n_train), torch.tensor([3, 5, 0, 1, 4, 2])
    shuffled = gradients(at[rows], labels[rows], embed, readout)
    permuted = gradients(at, labels, embed[:, neurons], readout[:, neurons])
    swapped = gradients(at[:, ::-1].copy(), labels, embed.roll(p, 0), readout)
    for other, e, w in (
        (shuffled, d_embed, d_readout),
        (permuted, d_embed[:, neurons], d_readout[:, neurons]),
        (swapped, d_embed.roll(p, 0), d_readout),
    ):
        torch.testing.assert_close(other, (loss, e, w), rtol=1e-4, atol=1e-5)


def test_the_square_does_not_see_the_sign_of_the_input_weights() -> None:
    pairs = make_pairs("addition", 7)
    embed, readout = gaussian(14, 4), gaussian(7, 4, seed=1)
    loss, d_embed, d_readout = loss_and_gradients(embed, readout, design_of(pairs))
    torch.testing.assert_close(loss_and_gradients(-embed, readout, design_of(pairs)), (loss, -d_embed, d_readout))


def test_an_operand_that_no_pair_holds_has_no_gradient() -> None:
    design = Design.of(torch.tensor([[4, 0], [4, 2]]), torch.tensor([4, 1]), 5, torch.float32)
    _, d_embed, _ = loss_and_gradients(gaussian(10, 3), gaussian(5, 3, seed=1), design)
    assert (d_embed != 0).any(1).tolist() == [False, False, False, False, True, True, False, True, False, False]


def test_nothing_is_written_into_the_weights_or_the_mask() -> None:
    pairs = make_pairs("addition", 7)
    given = gaussian(14, 4), gaussian(7, 4, seed=1), torch.ones(pairs.n_train, 4) * 2
    before = [tensor.clone() for tensor in given]
    for activation in grokking.ACTIVATIONS:
        loss_and_gradients(given[0], given[1], design_of(pairs), activation=activation, keep=given[2])
    assert all(torch.equal(a, b) for a, b in zip(given, before))


@pytest.mark.parametrize("activation", grokking.ACTIVATIONS)
@pytest.mark.parametrize("dropout", [0, 0.4])
def test_bfloat16_gradients_are_near_and_come_in_float32(activation: str, dropout: float) -> None:
    pairs = make_pairs("addition", 31, corruption=0.3)
    embed, readout = 0.3 * gaussian(62, 32), 0.3 * gaussian(31, 32, seed=1)
    keep = (torch.rand(pairs.n_train, 32, generator=torch.Generator().manual_seed(2)) >= dropout) / (1 - dropout)
    given = keep if dropout else None
    design = design_of(pairs, torch.bfloat16)
    loss, d_embed, d_readout = loss_and_gradients(embed, readout, design, activation=activation, keep=given)
    expected = by_autograd(pairs, embed, readout, activation, given)
    assert loss.item() == pytest.approx(expected[0], rel=0.02)
    assert far(d_embed, expected[1]) < 0.03
    assert far(d_readout, expected[2]) < 0.03
    assert d_embed.dtype == d_readout.dtype == loss.dtype == torch.float32


# --- the first weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", grokking.ACTIVATIONS)
def test_the_first_weights_are_the_papers(activation: str) -> None:
    pairs = make_pairs("addition", 97, corruption=0.35)
    model = initial(97, Training(activation=activation), seed=1)
    for linear in (model.layers.linear_1, model.layers.linear_2):
        assert linear.bias is None
        assert linear.weight.std().item() == pytest.approx(0.05, abs=0.0005)
        assert abs(linear.weight.mean().item()) < 0.001
    assert initial(97, Training(width=4000), seed=0).layers.linear_1.weight.std().item() == pytest.approx(
        0.025, rel=0.01
    )
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    if activation == "square":
        loss = evaluate(model, pairs)["train_loss"]
        assert loss == pytest.approx(1 / 97, rel=0.02)
        assert 0.01039 < loss < 0.01047


def test_the_authors_own_seeds_give_their_first_loss() -> None:
    """Their recipe for p 97, N 500, α 0.5: Python's shuffle by 420, torch's generator by 0 for labels, then weights."""
    p, width, order = 97, 500, list(range(97**2))
    random.Random(420).shuffle(order)
    operands = torch.tensor([divmod(i, p) for i in order])
    truth = operands.sum(1) % p
    n_train = 4704
    for corruption, expected in ((0.35, 0.0104137407), (0.0, 0.0104021514)):
        n_corrupted = int(corruption * n_train)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            redrawn = torch.randint(0, p, (n_corrupted,))
            first, second = torch.nn.Linear(2 * p, width, bias=False), torch.nn.Linear(width, p, bias=False)
            for linear in (first, second):
                torch.nn.init.normal_(linear.weight, std=0.5 / (2 * width) ** (1 / 3))
        labels = torch.cat([redrawn, truth[n_corrupted:]])
        if n_corrupted:
            found = [(*operands[i].tolist(), int(labels[i]), int(truth[i])) for i in range(4)]
            assert found == [(22, 70, 57, 92), (41, 62, 82, 6), (72, 43, 25, 18), (72, 83, 87, 58)]
            assert int((redrawn == truth[:n_corrupted]).sum()) == 17
        design = Design.of(operands[:n_train], labels[:n_train], p, torch.float32)
        loss, _, _ = loss_and_gradients(first.weight.detach().T.contiguous(), second.weight.detach(), design)
        assert loss.item() == pytest.approx(expected, abs=2e-8)


# --- steps ---------------------------------------------------------------------------------------------------------


def plain_steps(pairs: Pairs, training: Training, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights after training by the book: one-hot inputs, autograd, torch's plain AdamW."""
    model = initial(pairs.p, training, seed)
    e, w = (layer.weight.clone().to(dtype) for layer in (model.layers.linear_1, model.layers.linear_2))
    optimizer = torch.optim.AdamW(
        [e.requires_grad_(), w.requires_grad_()], lr=training.lr, betas=(0.9, 0.98), eps=1e-8,
        weight_decay=training.weight_decay, foreach=False, fused=False,
    )  # fmt: skip
    inputs = onehots(pairs).to(dtype)
    for _ in range(training.steps):
        optimizer.zero_grad()
        plainly(pairs, inputs, e.T, w, training.activation).backward()
        optimizer.step()
    return torch.cat([e.detach().flatten(), w.detach().flatten()]).double()


@pytest.mark.parametrize("activation", grokking.ACTIVATIONS)
def test_one_step_is_that_of_autograd_and_adamw(activation: str) -> None:
    pairs = make_pairs("addition", 97, corruption=0.35)
    training = Training(activation=activation, steps=1, weight_decay=15.0)
    found = weights(trained(pairs, training))
    assert (found - plain_steps(pairs, training, 0)).abs().max() < 1e-6
    assert (found - weights(initial(97, training, 0))).abs().max() > 5e-3  # it did move, by about lr


def test_twenty_steps_are_those_of_autograd_and_adamw() -> None:
    pairs = make_pairs("subtraction", 23, corruption=0.2)
    training = Training(width=32, steps=20, lr=0.003, weight_decay=3.0)
    expected = plain_steps(pairs, training, 4, torch.float64)
    assert (weights(trained(pairs, training, seed=4)) - expected).abs().max() < 1e-5


def test_two_steps_in_bfloat16_are_near() -> None:
    pairs = make_pairs("addition", 97, corruption=0.35)
    training = Training(steps=2)
    moved = weights(trained(pairs, dataclasses.replace(training, dtype="bfloat16")))
    assert 0 < (moved - weights(trained(pairs, training))).abs().max() < 5e-3


@pytest.mark.parametrize("activation", grokking.ACTIVATIONS)
def test_a_batch_of_all_pairs_is_the_closed_form(activation: str) -> None:
    pairs = make_pairs("addition", 23, corruption=0.2)
    whole = Training(width=32, activation=activation, steps=5, weight_decay=3.0)
    for size in (pairs.n_train, 10**6):
        batched = weights(trained(pairs, dataclasses.replace(whole, train_batch_size=size)))
        assert (batched - weights(trained(pairs, whole))).abs().max() < 1e-4


KINDS: list[dict[str, Any]] = [
    {},
    {"activation": "relu"},
    {"dropout": 0.3},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "dropout": 0.3},
    {"train_batch_size": 7},
    {"norm": "batch"},
    {"norm": "layer", "train_batch_size": 20, "dropout": 0.5, "activation": "relu"},
    {"norm": "batch", "train_batch_size": 20, "dropout": 0.2},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_seed_gives_the_same_bits_and_the_global_generator_is_left_alone(kind: dict[str, Any]) -> None:
    pairs = make_pairs("addition", 11, corruption=0.2)
    training = Training(width=16, steps=12, weight_decay=1.0, eval_every=5, **kind)
    before = torch.get_rng_state()
    first = weights(trained(pairs, training, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)  # what others draw does not matter
    again, other = (weights(trained(pairs, training, seed=seed)) for seed in (1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.isfinite().all()
    assert not torch.equal(first, weights(initial(11, training, seed=1)))


@pytest.mark.parametrize("kind", [{}, {"train_batch_size": 7}], ids=str)
def test_held_out_pairs_are_never_trained_on_and_recorded_labels_are(kind: dict[str, Any]) -> None:
    pairs = make_pairs("addition", 11, corruption=0.2, law="wrong")
    training = Training(width=16, steps=5, **kind)
    poisoned, mended = pairs.labels.copy(), pairs.truth
    poisoned[pairs.n_train :] = 0
    moved = pairs.operands.copy()
    moved[pairs.n_train :] = 1
    expected = weights(trained(pairs, training))
    held_out_spoilt = dataclasses.replace(pairs, labels=poisoned, operands=moved, truth=poisoned)
    assert torch.equal(weights(trained(held_out_spoilt, training)), expected)
    assert not torch.equal(weights(trained(dataclasses.replace(pairs, labels=mended), training)), expected)


@pytest.mark.parametrize("kind", [{}, {"norm": "batch"}, {"train_batch_size": 5, "dropout": 0.2}], ids=str)
def test_the_model_is_handed_out_at_the_start_now_and_then_and_at_the_end(kind: dict[str, Any]) -> None:
    pairs = make_pairs("addition", 7)
    training = Training(width=8, steps=7, eval_every=3, **kind)
    seen = {}
    for step, model in train(pairs, training, seed=2):
        assert not model.training
        seen[step] = weights(model)
        evaluate(model, pairs)  # looking changes nothing
    assert list(seen) == [0, 3, 6, 7]
    assert torch.equal(seen[0], weights(initial(7, training, 2)))
    for step in (3, 6):
        shorter = dataclasses.replace(training, steps=step, eval_every=100)
        assert torch.equal(seen[step], weights(trained(pairs, shorter, seed=2)))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [step for step, _ in train(pairs, dataclasses.replace(training, steps=0), seed=2)] == [0]
    assert [step for step, _ in train(pairs, dataclasses.replace(training, steps=6), seed=2)] == [0, 3, 6]


def test_batches_take_every_pair_at_most_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_pairs("addition", 7)  # 24 pairs, in batches of 7: three an epoch
    forward, batches = grokking._forward_in_training, []

    def spy(model: MLP, at: Tensor, *rest: Any) -> Tensor:
        batches.append([tuple(pair) for pair in at.tolist()])
        assert model.training
        return forward(model, at, *rest)

    monkeypatch.setattr(grokking, "_forward_in_training", spy)
    trained(pairs, Training(width=4, steps=12, train_batch_size=7))
    known = {(m, 7 + n) for m, n in pairs.operands[: pairs.n_train].tolist()}
    assert [len(batch) for batch in batches] == [7] * 12
    epochs = [batches[i] + batches[i + 1] + batches[i + 2] for i in range(0, 12, 3)]
    assert all(len(set(epoch)) == 21 and set(epoch) <= known for epoch in epochs)
    assert set().union(*epochs) == known  # what one epoch leaves out, another takes
    assert len({tuple(epoch) for epoch in epochs}) == 4
    first, batches[:] = list(batches), []
    trained(pairs, Training(width=4, steps=12, train_batch_size=7), seed=1)
    assert not any(a == b for a, b in zip(first, batches))  # another seed takes others


@pytest.mark.parametrize("kind", [{}, {"norm": "layer"}], ids=str)
def test_dropout_drops_its_share_anew_every_step(monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]) -> None:
    pairs = make_pairs("addition", 23)
    drawn: list[Tensor] = []
    closed, rand = grokking.loss_and_gradients, torch.rand

    def spy(*args: Any, keep: Tensor, **options: Any) -> Gradients:
        drawn.append(keep)
        return closed(*args, keep=keep, **options)

    def spying_rand(*args: Any, **options: Any) -> Tensor:
        found = rand(*args, **options)
        if kind:
            drawn.append((found >= 0.3) / (1 - 0.3))
        return found

    monkeypatch.setattr(grokking, "loss_and_gradients", spy)
    monkeypatch.setattr(torch, "rand", spying_rand)
    trained(pairs, Training(width=64, steps=3, dropout=0.3, **kind))
    assert len(drawn) == 3
    for keep in drawn:
        assert keep.shape == (pairs.n_train, 64)
        assert keep.unique().tolist() == pytest.approx([0, 1 / 0.7])
        assert (keep == 0).double().mean().item() == pytest.approx(0.3, abs=0.02)  # 8 σ
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("activation", grokking.ACTIVATIONS)
def test_the_forward_pass_in_training_is_the_models_own(norm: str, activation: str) -> None:
    pairs = make_pairs("addition", 11)
    model = initial(11, Training(width=16, norm=norm, activation=activation), seed=0).train()
    at = torch.from_numpy(pairs.operands) + torch.tensor([0, 11])
    found = grokking._forward_in_training(model, at, 0.0, torch.Generator())
    torch.testing.assert_close(found, model(onehots(pairs, 121).float()))


def test_what_dropout_keeps_in_training_is_scaled_before_the_activation() -> None:
    model = initial(11, Training(width=11), seed=0)
    model.layers.linear_2.weight.copy_(torch.eye(11))  # logits are activations
    at = torch.arange(11)[:, None] + torch.tensor([0, 11])
    found = grokking._forward_in_training(model, at, 0.5, torch.Generator().manual_seed(0))
    kept = found != 0
    torch.testing.assert_close(found[kept], 4 * activations(model, at - torch.tensor([0, 11]))[kept])
    assert 0.3 < kept.double().mean() < 0.7


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"activation": "tanh"}, "no activation 'tanh'; there are relu, square"),
        ({"norm": "bach"}, "no norm 'bach'; there are batch, layer, none; did you mean 'batch'?"),
        ({"dtype": "float64"}, "no dtype for training 'float64'; there are bfloat16, float32"),
        ({"width": 0}, "--width must be at least 1, got 0"),
        ({"width": 2**16 + 1}, "--width must be at most 65536, got 65537"),
        ({"eval_every": 0}, "--eval-every must be at least 1, got 0"),
        ({"train_batch_size": 0}, "--train-batch-size must be at least 1, got 0"),
        ({"steps": -1}, "--steps must be at least 0, got -1"),
        ({"lr": 0.0}, "--lr must be a finite number above 0, got 0.0"),
        ({"lr": math.inf}, "--lr must be a finite number above 0, got inf"),
        ({"lr": math.nan}, "--lr must be a finite number above 0, got nan"),
        ({"weight_decay": -1.0}, "--weight-decay -1.0 times --lr 0.01 must lie between 0 and 1"),
        ({"weight_decay": 101.0}, "--weight-decay 101.0 times --lr 0.01 must lie between 0 and 1"),
        ({"weight_decay": math.nan}, "--weight-decay nan times --lr 0.01 must lie"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and less than 1, got 1.0"),
        ({"dropout": -0.1}, "--dropout must be at least 0 and less than 1, got -0.1"),
        ({"dtype": "bfloat16", "norm": "batch"}, "--dtype bfloat16 trains on all pairs at once, without --norm;"),
        ({"dtype": "bfloat16", "train_batch_size": 64}, "trains on all pairs at once, without --norm; leave one of"),
    ],
)  # fmt: skip
def test_settings_that_make_no_training_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        Training(**options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_ends_of_the_ranges_are_in_them() -> None:
    Training(width=2**16, steps=0, weight_decay=100.0, dropout=0.0, train_batch_size=1, eval_every=1)


@pytest.mark.parametrize("kind", [{}, {"norm": "layer", "train_batch_size": 7}], ids=str)
def test_weights_that_leave_the_numbers_are_told(kind: dict[str, Any]) -> None:
    pairs = make_pairs("addition", 7)
    with pytest.raises(
        InputError, match=r"training left the numbers at step 4 \(NaN or infinite weights\); lower --lr"
    ):
        trained(pairs, Training(width=8, lr=1e25, steps=10, eval_every=4, **kind))


def test_one_thread_is_given_back_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: calls[-1])
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    with pytest.raises(KeyError), grokking.one_thread():
        raise KeyError(calls[-1])
    assert calls == [3, 1, 3]


# --- what a network does -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("activation", grokking.ACTIVATIONS)
def test_activations_and_readout_are_the_forward_pass_of_one_hots(norm: str, activation: str) -> None:
    pairs = make_pairs("addition", 11, corruption=0.2)
    training = Training(width=16, norm=norm, activation=activation, dropout=0.3, steps=4, train_batch_size=20)
    model = trained(pairs, training)
    features = onehots(pairs, 121).float()
    a = activations(model, pairs.operands)
    assert a.shape == (121, 16)
    torch.testing.assert_close(a @ model.layers.linear_2.weight.T, model(features))
    torch.testing.assert_close(activations(model, torch.from_numpy(pairs.operands)), a)
    torch.testing.assert_close(activations(model, pairs.operands[3:4]), a[3:4])
    assert not torch.allclose(model.train()(features), model.eval()(features))  # dropout, in training only
    assert torch.equal(model(features), model(features))


def test_activations_by_hand() -> None:
    model = MLP(MlpConfig((6, 2, 3), "square", bias=False)).requires_grad_(False)
    model.layers.linear_1.weight.copy_(torch.tensor([[1, 2, 3, 10, 20, 30], [0, 0, -1, 0, 1, 0]]))
    assert activations(model, np.array([[0, 2], [2, 1]])).tolist() == [[31**2, 0], [23**2, 0]]


def test_groups_by_hand() -> None:
    pairs = make_pairs("addition", 3, train_fraction=0.5, corruption=0.5)  # 4 of 9 are trained on, 2 of them corrupted
    masks = {name: mask.tolist() for name, mask in groups(pairs).items()}
    assert masks == {
        "train": [True] * 4 + [False] * 5,
        "corrupted": [True] * 2 + [False] * 7,
        "clean": [False] * 2 + [True] * 2 + [False] * 5,
        "test": [False] * 4 + [True] * 5,
    }


def evaluate_by_definition(model: MLP, pairs: Pairs) -> dict[str, float | None]:
    p, logits = pairs.p, model(onehots(pairs, pairs.p**2).float()).double()
    found: dict[str, list[float]] = {name: [] for name in evaluate(model, pairs) if name.endswith(("acc", "loss"))}
    for i in range(p * p):
        label, truth = int(pairs.labels[i]), int(pairs.truth[i])
        best = max(range(p), key=lambda q: logits[i, q].item())
        error = sum((logits[i, q].item() - (q == label)) ** 2 for q in range(p)) / p
        if i >= pairs.n_train:
            found["test_acc"].append(best == truth)
            found["test_loss"].append(error)
            continue
        found["train_acc"].append(best == label)
        found["train_loss"].append(error)
        if pairs.corrupted[i]:
            found["train_corrupted_acc"].append(best == label)
            found["corrupted_true_acc"].append(best == truth)
        else:
            found["train_clean_acc"].append(best == label)
    return {name: sum(values) / len(values) if values else None for name, values in found.items()}


@pytest.mark.parametrize("corruption", [0.0, 0.4])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_evaluate_agrees_with_a_loop_over_the_pairs(corruption: float, norm: str) -> None:
    pairs = make_pairs("addition", 11, corruption=corruption, law="uniform")
    model = trained(pairs, Training(width=64, norm=norm, steps=100))
    found = evaluate(model, pairs)
    expected = evaluate_by_definition(model, pairs)
    assert len(expected) == 7
    for name, value in expected.items():
        assert found[name] == (None if value is None else pytest.approx(value, rel=1e-5)), name
    assert (expected["train_corrupted_acc"] is None) == (corruption == 0)
    assert found["weight_norm"] == pytest.approx(math.sqrt(sum(float((w**2).sum()) for w in model.parameters())))
    assert found["mean_ipr"] == mean_ipr(model, "addition")


def test_evaluate_by_hand() -> None:
    """A network that is certain of class 0 whatever the pair."""
    model = MLP(MlpConfig((6, 1, 3), "square", bias=False)).requires_grad_(False)
    model.layers.linear_1.weight.fill_(0.5)  # h = 1
    model.layers.linear_2.weight.copy_(torch.tensor([[1.0], [0.0], [0.0]]))
    pairs = Pairs(
        p=3,
        operation="addition",
        operands=np.array([[0, 0], [0, 1], [1, 1], [1, 2]]),
        truth=np.array([0, 1, 2, 0]),
        labels=np.array([1, 0, 2, 0]),
        corrupted=np.array([True, True, False, False]),
        n_train=3,
    )
    found = evaluate(model, pairs)
    # predicted right as recorded: no, yes, no | yes; a wrong one costs (1 + 1) / 3
    assert found == pytest.approx(
        {
            "train_acc": 1 / 3, "train_corrupted_acc": 1 / 2, "corrupted_true_acc": 1 / 2, "train_clean_acc": 0,
            "test_acc": 1, "train_loss": 4 / 9, "test_loss": 0, "mean_ipr": 2 / 3 + 1 / 6,
            "weight_norm": math.sqrt(6 / 4 + 1),
        }
    )  # fmt: skip


def test_curves_are_the_weights_of_each_neuron() -> None:
    model = MLP(MlpConfig((10, 3, 5), "square", bias=False)).requires_grad_(False)
    model.layers.linear_1.weight.copy_(torch.arange(30).reshape(3, 10))
    model.layers.linear_2.weight.copy_(100 + torch.arange(15).reshape(5, 3))
    u, v, w = curves(model, "addition")
    assert (u[1].tolist(), v[1].tolist(), w[1].tolist()) == (
        [10, 11, 12, 13, 14],
        [15, 16, 17, 18, 19],
        [101, 104, 107, 110, 113],
    )
    assert [torch.equal(a, b) for a, b in zip(curves(model, "subtraction"), (u, v, w))] == [True] * 3
    u, v, w = curves(model, "multiplication")  # residues 1, 2, 4, 3
    assert (u[1].tolist(), v[1].tolist(), w[1].tolist()) == (
        [11, 12, 14, 13],
        [16, 17, 19, 18],
        [104, 107, 113, 110],
    )


def test_the_mean_ipr_leaves_dead_neurons_out_and_the_mean_of_relus() -> None:
    model = initial(31, Training(width=8, activation="relu"), seed=0)
    model.layers.linear_1.weight += 1
    model.layers.linear_2.weight[:, :3] = 0
    u, v, w = curves(model, "addition")
    alive = [sum(fourier.curve_ipr(curve[k], keep_dc=False).item() for curve in (u, v, w)) / 3 for k in range(3, 8)]
    assert mean_ipr(model, "addition") == pytest.approx(sum(alive) / 5)
    squares = MLP(dataclasses.replace(model.config, activation="square")).requires_grad_(False)
    squares.load_state_dict(model.state_dict())
    assert mean_ipr(squares, "addition") > 0.6  # here the mean counts, and is nearly all there is
    model.layers.linear_2.weight.zero_()
    assert mean_ipr(model, "addition") is None
    assert evaluate(model, make_pairs("addition", 31))["mean_ipr"] is None


@pytest.mark.parametrize(
    ("test", "train_acc", "corrupted", "grokked", "expected"),
    [
        (0.98, 0.98, 0.94, True, "coexistence"),
        (0.9, 0.98, 0.9, True, "coexistence"),  # both ends are in
        (0.98, 1.0, None, True, "coexistence"),  # nothing was corrupted
        (1.0, 0.78, 0.37, True, "partial_inversion"),
        (1.0, 0.97, 0.8999, True, "partial_inversion"),
        (1.0, 0.67, 1 / 97 + 0.0401, True, "partial_inversion"),
        (1.0, 0.6536, 1 / 97 + 0.04, True, "full_inversion"),
        (1.0, 0.6536, 0.01, True, "full_inversion"),
        (1.0, 1 - 0.1 * 96 / 97, 0.01, True, "full_inversion"),  # ξ = 0.1: by the paper's rule, 0.901, coexistence
        (1.0, 0.6536, 0.0, False, "full_inversion"),
        (0.01, 1.0, 1.0, False, "memorization"),
        (0.8999, 0.9, 1.0, True, "memorization"),
        (0.2, 0.15, 0.01, True, "forgetting"),
        (0.2, 0.8999, 0.01, False, "confusion"),
        (None, 0.95, 0.9, False, "memorization"),  # nothing was held out
        (None, 0.5, None, False, "confusion"),
    ],
)
def test_phases(test: float | None, train_acc: float, corrupted: float | None, grokked: bool, expected: str) -> None:
    at = {"test_acc": test, "train_acc": train_acc, "train_corrupted_acc": corrupted}
    assert phase(at, 97, grokked=grokked) == expected


def test_chance_depends_on_the_number_of_classes() -> None:
    at = {"test_acc": 1.0, "train_acc": 0.8, "train_corrupted_acc": 0.2}
    assert phase(at, 5, grokked=True) == "full_inversion"
    assert phase(at, 7, grokked=True) == "partial_inversion"


# --- the analytic network ------------------------------------------------------------------------------------------


def analytic(p: int, width: int, **options: Any) -> MLP:
    model = MLP(MlpConfig((2 * p, width, p), "square", bias=False)).eval().requires_grad_(False)
    u, v, w = planted.analytic(p, width, **options)
    model.layers.linear_1.weight.copy_(torch.cat([u, v], 1))
    model.layers.linear_2.weight.copy_(w.T)
    return model


def mean_target(model: MLP, pairs: Pairs) -> float:
    logits = activations(model, pairs.operands) @ model.layers.linear_2.weight.T
    return logits.gather(1, torch.from_numpy(pairs.truth)[:, None]).mean().item()


@pytest.mark.parametrize(("p", "width"), [(97, 194), (59, 236), (59, 295), (59, 590)])
def test_the_analytic_network_adds(p: int, width: int) -> None:
    model, pairs = analytic(p, width), make_pairs("addition", p, corruption=0.2, law="wrong")
    at = evaluate(model, pairs)
    assert (at["test_acc"], at["train_clean_acc"], at["corrupted_true_acc"]) == (1, 1, 1)
    assert at["train_corrupted_acc"] == 0
    assert phase(at, p, grokked=True) == "full_inversion"
    assert mean_target(model, pairs) == pytest.approx(1, abs=0.05)
    if width >= 5 * p:
        assert 3.3 < at["test_loss"] * width < 5
    values = fourier.ipr(*curves(model, "addition"))
    assert (values - 1).abs().max() < 1e-4
    assert at["mean_ipr"] == pytest.approx(1, abs=1e-4)


def test_every_neuron_of_the_analytic_network_has_its_frequency() -> None:
    p, width = 59, 118
    sigma = np.random.default_rng(0).permutation(width) % p
    found = fourier.frequency(*curves(analytic(p, width), "addition"))
    assert [int(j) for j, s in zip(found, sigma) if s] == [min(s, p - s) for s in sigma if s]


def test_the_analytic_network_does_not_subtract_unless_the_other_operand_is_mirrored() -> None:
    p = 59
    model, pairs = analytic(p, 236), make_pairs("subtraction", p)
    assert evaluate(model, pairs)["test_acc"] < 0.1
    v = model.layers.linear_1.weight[:, p:]
    v.copy_(v[:, -torch.arange(p) % p].clone())
    assert evaluate(model, pairs)["test_acc"] == 1
    assert mean_ipr(model, "subtraction") == pytest.approx(1, abs=1e-4)


def test_the_analytic_network_multiplies_in_the_order_of_logarithms() -> None:
    p = 59
    order = discrete_log_order(p)
    adding = analytic(p - 1, 4 * (p - 1))
    model = MLP(MlpConfig((2 * p, adding.config.widths[1], p), "square", bias=False)).eval().requires_grad_(False)
    first, second = model.layers.linear_1.weight.zero_(), model.layers.linear_2.weight.zero_()
    first[:, order], first[:, p + order] = adding.layers.linear_1.weight.chunk(2, dim=1)
    second[order] = adding.layers.linear_2.weight
    assert mean_ipr(model, "multiplication") == pytest.approx(1, abs=1e-4)
    assert mean_ipr(model, "addition") < 0.15
    pairs = make_pairs("multiplication", p)
    nonzero = (pairs.operands > 0).all(1)
    predicted = (activations(model, pairs.operands) @ second.T).argmax(1).numpy()
    assert (predicted == pairs.truth)[nonzero].mean() > 0.99


def test_the_exponent_that_is_printed_in_the_paper_is_wrong() -> None:
    """With −1/3 the classes come out the same, but a logit is (N / 2)² instead of 1."""
    p, width = 59, 295
    pairs = make_pairs("addition", p)
    printed = analytic(p, width, exponent=-1 / 3)
    assert mean_target(printed, pairs) == pytest.approx(
        (width / 2) ** 2 * mean_target(analytic(p, width), pairs), rel=1e-4
    )
    assert mean_target(printed, pairs) > 10_000
    assert evaluate(printed, pairs)["test_loss"] > 1e6


# --- trained networks ----------------------------------------------------------------------------------------------


def run(seed: int, operation: str = "addition", **options: Any) -> tuple[dict[str, float | None], Tensor, MLP]:
    pairs = make_pairs(operation, 59, corruption=0.2, seed=seed)
    model = trained(pairs, Training(width=256, eval_every=10_000, **options), seed)
    keep_dc = model.config.activation == "square"
    return evaluate(model, pairs), fourier.ipr(*curves(model, operation), keep_dc=keep_dc), model


def test_without_decay_rule_and_corrupted_labels_live_side_by_side() -> None:
    at, ipr, _ = run(0, steps=1000)
    assert at["train_acc"] >= 0.99
    assert at["train_corrupted_acc"] >= 0.97
    assert at["train_clean_acc"] >= 0.999
    assert at["test_acc"] == pytest.approx(0.974, abs=0.015)
    assert int((ipr >= fourier.HIGH).sum()) == pytest.approx(89, abs=8)
    assert int((ipr < fourier.low_below(59)).sum()) == pytest.approx(119, abs=20)
    assert phase(at, 59, grokked=True) == "coexistence"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_decay_the_corrupted_labels_are_given_up(dtype: str) -> None:
    at, ipr, _ = run(1, steps=800, weight_decay=10.0, dtype=dtype)
    assert at["train_corrupted_acc"] <= 0.04
    assert at["corrupted_true_acc"] >= 0.99
    assert at["test_acc"] >= 0.999
    assert at["train_acc"] == pytest.approx(1 - 0.2 * 58 / 59, abs=0.005)
    assert int((ipr < fourier.LOW).sum()) <= 3
    assert int((ipr >= fourier.HIGH).sum()) == pytest.approx(251, abs=5)
    assert phase(at, 59, grokked=True) == "full_inversion"


def test_multiplication_is_periodic_in_the_order_of_logarithms_only() -> None:
    at, ipr, model = run(0, "multiplication", steps=600, weight_decay=10.0)
    assert at["test_acc"] >= 0.99
    assert ipr.nanmean() >= 0.55
    assert mean_ipr(model, "addition") <= 0.08
