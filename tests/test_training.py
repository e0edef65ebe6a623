"""The training loop: rates, order and updates by hand, and going on at any update as if it had never stopped."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from memdiag import training
from memdiag.checkpoint import new_model, read_config
from memdiag.errors import InputError
from memdiag.training import Diverged, Recipe, Training, rows_of_update, seeded

N = 11  # sequences
IDS = torch.randint(32, (N, 16), generator=torch.Generator().manual_seed(5))


def tiny(seed: int = 0, *, dropout: float = 0.0, tied: bool = True) -> nn.Module:
    sizes = {"vocab_size": 32, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "tie_word_embeddings": tied}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return new_model("tiny", read_config("gpt2-tiny") | sizes | drops, seed)


def loss_of(model: nn.Module, rows: Any) -> Tensor:
    loss: Tensor = model(IDS[rows], labels=IDS[rows]).loss
    return loss


def learn(at: Training, recipe: Recipe) -> Callable[[int], tuple[float, int]]:
    """The plainest backward: the mean cross-entropy of the rows."""

    def backward(step: int) -> tuple[float, int]:
        loss = loss_of(at.runs, rows_of_update(step, N, recipe.batch_size, recipe.seed))
        loss.backward()
        return float(loss.detach()), step

    return backward


def everything(at: Training) -> dict[str, Tensor]:
    """Weights and moments, copied."""
    found = {f"weights {name}": p.detach().clone() for name, p in at.model.named_parameters()}
    for name, p in at.model.named_parameters():
        moments = at.optimizer.state.get(p, {})
        found |= {f"{key} {name}": torch.as_tensor(value).clone() for key, value in moments.items()}
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# --- the recipe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 1, 5: 1, 9: 1}),
        # 0.1 + 0.45 (1 + cos(π done))
        ("cosine", {0: 1, 2: 0.1 + 0.45 * (1 + math.cos(math.pi / 5)), 5: 0.55, 8: 0.1859423525312737, 10: 0.1}),
        # 1 for six tenths, then a straight line to 0.1
        ("linear", {0: 1, 5: 1, 6: 1, 7: 0.775, 8: 0.55, 9: 0.325, 10: 0.1}),
    ],
)
def test_learning_rate_by_hand(schedule: str, expected: dict[int, float]) -> None:
    plain, warm = Recipe(10, 1, lr=3, schedule=schedule), Recipe(14, 1, lr=3, schedule=schedule, warmup=4)
    for step, share in expected.items():
        assert plain.lr_at(step) == pytest.approx(3 * share, rel=1e-12)
        assert warm.lr_at(4 + step) == pytest.approx(3 * share, rel=1e-12)
    assert [warm.lr_at(step) for step in range(4)] == pytest.approx([0.75, 1.5, 2.25, 3])


def test_a_warm_up_longer_than_the_training_is_cut_off() -> None:
    recipe = Recipe(2, 1, lr=1, warmup=4)
    assert [recipe.lr_at(step) for step in range(2)] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "cosin"}, "no schedule 'cosin'; there are constant, cosine, linear; did you mean 'cosine'?"),
        ({"optimizer": "adam"}, "no optimizer 'adam'; there are adamw, sgd; did you mean 'adamw'?"),
        ({"steps": -1}, "--steps must be at least 0, got -1"),
        ({"warmup": -1}, "--warmup must be at least 0, got -1"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"accumulate": 0}, "--accumulate must be at least 1, got 0"),
        ({"accumulate": 5}, "--accumulate 5 parts cannot be made of --batch-size 4"),
        ({"lr": 0}, "--lr must be a finite number above 0, got 0"),
        ({"lr": math.nan}, "--lr must be a finite number above 0, got nan"),
        ({"lr": math.inf}, "--lr must be a finite number above 0, got inf"),
        ({"weight_decay": -1}, "--weight-decay must be a finite number >= 0, got -1"),
        ({"weight_decay": math.nan}, "--weight-decay must be a finite number >= 0, got nan"),
        ({"clip": -0.5}, "--clip must be a finite number >= 0, got -0.5"),
        ({"clip": math.inf}, "--clip must be a finite number >= 0, got inf"),
        ({"beta2": 1}, "--beta2 must be at least 0 and less than 1, got 1"),
        ({"beta2": math.nan}, "--beta2 must be at least 0 and less than 1, got nan"),
        ({"seed": -1}, "--seed must be at least 0 and less than 2^32, got -1"),
        ({"seed": 2**32}, "--seed must be at least 0 and less than 2^32, got 4294967296"),
    ],
)
def test_a_recipe_out_of_range_is_refused_in_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        Recipe(**({"steps": 1, "batch_size": 4} | wrong))
    assert str(error.value) == message


# --- order and chance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch"), [(11, 4), (12, 4), (3, 8), (1, 5), (7, 7), (100, 1)])
def test_rows_are_one_permutation_after_another(n: int, batch: int) -> None:
    stream: list[int] = []
    for epoch in range(6 * max(batch, n) // n + 1):
        stream += np.random.default_rng([3, epoch]).permutation(n).tolist()
    updates = 5 * max(batch, n) // batch
    found = [rows_of_update(step, n, batch, 3) for step in range(updates)]
    assert [rows.shape for rows in found] == [(batch,)] * updates
    assert np.concatenate(found).tolist() == stream[: updates * batch]
    for epoch in range(updates * batch // n):
        assert sorted(np.concatenate(found)[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    again = [rows_of_update(step, n, batch, 3).tolist() for step in reversed(range(updates))]
    assert again[::-1] == [rows.tolist() for rows in found]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second, other = rows_of_update(0, 50, 50, 0), rows_of_update(1, 50, 50, 0), rows_of_update(0, 50, 50, 1)
    assert first.tolist() != second.tolist() != other.tolist() != first.tolist()


def test_seeded_draws_depend_on_the_key_alone_and_nothing_leaks() -> None:
    drawn = {}
    with torch.random.fork_rng():
        torch.random.manual_seed(1)
        before = torch.random.get_rng_state()
        for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**32 - 1, 10**6, 7)):
            with seeded(*key):
                drawn[key] = torch.rand(4)
            torch.rand(3)  # whatever comes between
            with seeded(*key):
                assert torch.equal(torch.rand(4), drawn[key])
        torch.random.set_rng_state(before)
        with pytest.raises(RuntimeError, match="shape"), seeded(0):
            torch.rand(1).reshape(2)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert len({tuple(values.tolist()) for values in drawn.values()}) == len(drawn)


# --- the loop ------------------------------------------------------------------------------------------------------


def test_training_is_a_plain_loop_bit_for_bit() -> None:
    recipe = Recipe(7, 4, lr=1e-2, warmup=2, schedule="linear", weight_decay=0.3, beta2=0.9, clip=0.5, seed=9)
    at = training.begin(tiny(), recipe)
    updates = list(training.train(at, recipe, learn(at, recipe)))

    model = tiny()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.9), fused=True)
    norms = []
    for step in range(7):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        optimizer.zero_grad()
        loss_of(model, rows_of_update(step, N, 4, 9)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
    assert_same(everything(at), everything(Training(model, model, optimizer)))
    assert [update.step for update in updates] == [1, 2, 3, 4, 5, 6, 7]
    assert at.step == 7
    assert [update.lr for update in updates] == [recipe.lr_at(step) for step in range(7)]
    assert [update.grad_norm for update in updates] == norms
    assert min(norms) > 0.5  # each was cut
    assert [update.result for update in updates] == list(range(7))


def test_adamw_by_its_formula() -> None:
    recipe = Recipe(4, 4, lr=1e-2, schedule="constant", weight_decay=0.3, beta2=0.7, clip=0)
    at = training.begin(tiny(), recipe)
    gradients = []

    def backward(step: int) -> tuple[float, None]:
        found = learn(at, recipe)(step)[0]
        gradients.append([p.grad.double() for p in at.model.parameters()])
        return found, None

    expected = [p.detach().double().clone() for p in at.model.parameters()]
    for _ in training.train(at, recipe, backward):
        pass
    for i, p in enumerate(expected):
        m = v = torch.zeros_like(p)
        for k in range(4):
            g = gradients[k][i]
            m, v = 0.9 * m + 0.1 * g, 0.7 * v + 0.3 * g * g
            p = p * (1 - 1e-2 * (0.3 if p.ndim == 2 else 0))
            p = p - 1e-2 * (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.7 ** (k + 1))).sqrt() + 1e-8)
        torch.testing.assert_close(list(at.model.parameters())[i].double(), p, rtol=1e-4, atol=1e-6)


def test_sgd_by_its_formula() -> None:
    recipe = Recipe(4, 4, lr=0.1, schedule="constant", optimizer="sgd", weight_decay=0, clip=0)
    at = training.begin(tiny(), recipe)
    gradients = []

    def backward(step: int) -> tuple[float, None]:
        found = learn(at, recipe)(step)[0]
        gradients.append([p.grad.double() for p in at.model.parameters()])
        return found, None

    expected = [p.detach().double().clone() for p in at.model.parameters()]
    for _ in training.train(at, recipe, backward):
        pass
    for i, p in enumerate(expected):
        velocity = torch.zeros_like(p)
        for k in range(4):
            velocity = 0.9 * velocity + gradients[k][i]
            p = p - 0.1 * velocity
        torch.testing.assert_close(list(at.model.parameters())[i].double(), p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_only_matrices_decay(optimizer: str) -> None:
    """Without a gradient an update is the decay alone."""
    recipe = Recipe(1, 1, lr=0.1, schedule="constant", optimizer=optimizer, weight_decay=0.5)
    model = tiny()
    for p in model.parameters():
        nn.init.ones_(p)
    at = training.begin(model, recipe)

    def backward(step: int) -> tuple[float, None]:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return 0.0, None

    for _ in training.train(at, recipe, backward):
        pass
    for p in model.parameters():
        torch.testing.assert_close(p.detach(), torch.full_like(p, 0.95 if p.ndim == 2 else 1.0))


@pytest.mark.parametrize("clip", [0, 0.01, 1e6])
def test_a_gradient_longer_than_clip_is_cut_to_it(clip: float) -> None:
    recipe = Recipe(1, 4, lr=0.5, schedule="constant", optimizer="sgd", weight_decay=0, clip=clip)
    at = training.begin(tiny(), recipe)
    before = everything(at)
    (update,) = training.train(at, recipe, learn(at, recipe))
    after = everything(at)
    moved = math.sqrt(sum(float((after[k] - before[k]).double().square().sum()) for k in before))
    loss_of(model := tiny(), rows_of_update(0, N, 4, 0)).backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    assert update.grad_norm == pytest.approx(norm, rel=1e-5)
    assert moved == pytest.approx(0.5 * (min(norm, clip) if clip else norm), rel=1e-4)


def test_every_weight_is_trained_even_if_it_came_frozen_and_in_eval_mode() -> None:
    model = tiny().eval().requires_grad_(False)
    recipe = Recipe(1, 4, lr=0.1)
    at = training.begin(model, recipe)
    assert model.training
    assert at.runs is model
    before = everything(at)
    list(training.train(at, recipe, learn(at, recipe)))
    assert [k for k, v in before.items() if torch.equal(v, dict(model.named_parameters())[k[8:]])] == []


def test_the_loop_can_be_left_and_taken_up_at_any_update() -> None:
    recipe = Recipe(6, 4, lr=1e-2)
    whole, pieces = (training.begin(tiny(dropout=0.2), recipe) for _ in range(2))
    list(training.train(whole, recipe, learn(whole, recipe)))
    while pieces.step < 6:
        next(training.train(pieces, recipe, learn(pieces, recipe)))
    assert_same(everything(pieces), everything(whole))
    assert list(training.train(pieces, recipe, learn(pieces, recipe))) == []


def test_training_draws_from_the_seed_and_leaves_the_global_generator_alone() -> None:
    ends = []
    with torch.random.fork_rng():
        for seed in (0, 0, 1):
            torch.rand(len(ends) + 1)
            before = torch.random.get_rng_state()
            recipe = Recipe(2, N, seed=seed)
            at = training.begin(tiny(dropout=0.3), recipe)
            list(training.train(at, recipe, learn(at, recipe)))
            assert torch.equal(torch.random.get_rng_state(), before)
            ends.append(everything(at))
    assert_same(ends[0], ends[1])
    assert any(not torch.equal(ends[0][k], ends[2][k]) for k in ends[0])


def test_every_update_draws_from_seed_update_and_process() -> None:
    recipe = Recipe(3, 4, seed=5)
    at = training.begin(tiny(), recipe)
    drawn = [update.result for update in training.train(at, recipe, lambda step: (0.0, torch.rand(3).tolist()))]
    expected = []
    for step in range(3):
        with seeded(5, step, 0):
            expected.append(torch.rand(3).tolist())
    assert drawn == expected


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_not_made(what: str, value: float) -> None:
    recipe = Recipe(5, 4)
    at = training.begin(tiny(), recipe)

    def backward(step: int) -> tuple[float, None]:
        loss = learn(at, recipe)(step)[0]
        if step == 2 and what == "gradient":
            next(at.model.parameters()).grad[0, 0] = value
        return value if step == 2 and what == "loss" else loss, None

    going = training.train(at, recipe, backward)
    assert [next(going).step, next(going).step] == [1, 2]
    before = everything(at)
    with pytest.raises(Diverged, match=f"^the {what} of update 3 is not finite$") as error:
        next(going)
    assert (error.value.step, error.value.what, at.step) == (2, what, 2)
    assert_same(everything(at), before)
    assert all(p.grad is None for p in at.model.parameters())


def test_sums_over_one_process_are_its_own() -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    total = training.sum_over_processes(values)
    assert (total.dtype, total.requires_grad, total.tolist()) == (torch.float64, False, [1, 2])


# --- the state -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stop", range(5))
def test_stopping_and_going_on_leaves_no_trace(tmp_path: Path, stop: int, tied: bool, optimizer: str) -> None:
    recipe = Recipe(5, 4, lr=1e-2, optimizer=optimizer, seed=3)
    whole, stopped = (training.begin(tiny(dropout=0.2, tied=tied), recipe) for _ in range(2))
    list(training.train(whole, recipe, learn(whole, recipe)))
    going = training.train(stopped, recipe, learn(stopped, recipe))
    for _ in range(stop):
        next(going)
    training.save_state(tmp_path / "state", stopped, {"gate": {"best": None, "seen": stop}})
    list(going)
    assert_same(everything(stopped), everything(whole))  # saving changes nothing

    again = training.begin(tiny(seed=8, dropout=0.2, tied=tied), recipe)
    assert training.load_state(tmp_path / "state", again) == {"gate": {"best": None, "seen": stop}}
    assert again.step == stop
    list(training.train(again, recipe, learn(again, recipe)))
    assert_same(everything(again), everything(whole))
    output, embedding = again.model.get_output_embeddings().weight, again.model.get_input_embeddings().weight
    assert (output is embedding) is tied


def test_a_state_replaces_what_the_training_had(tmp_path: Path) -> None:
    """Also moments that are there already."""
    recipe = Recipe(6, 4, lr=1e-2)
    at = training.begin(tiny(), recipe)
    list(training.train(at, Recipe(3, 4, lr=1e-2), learn(at, recipe)))
    before = everything(at)
    training.save_state(tmp_path / "state", at, {})
    list(training.train(at, recipe, learn(at, recipe)))
    assert training.load_state(tmp_path / "state", at) == {}
    assert_same(everything(at), before)


def test_a_state_is_safetensors_and_json_and_holds_tied_weights_once(tmp_path: Path) -> None:
    recipe = Recipe(1, 4)
    at = training.begin(tiny(), recipe)
    list(training.train(at, recipe, learn(at, recipe)))
    training.save_state(tmp_path / "state", at, {})
    files = sorted((tmp_path / "state").iterdir())
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    stored: dict[str, Tensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            stored |= load_file(path)
    expected = everything(at)
    weights = {name: tensor for name, tensor in stored.items() if name.startswith("model.")}
    assert sum(t.numel() for t in weights.values()) == sum(p.numel() for p in at.model.parameters())
    assert len(stored) == len(expected)
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[f"weights {name.removeprefix('model.')}"])


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_an_interrupted_save_left_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: BaseException
) -> None:
    recipe = Recipe(2, 4)
    at = training.begin(tiny(), recipe)
    going = training.train(at, recipe, learn(at, recipe))
    next(going)
    training.save_state(tmp_path / "state", at, {"n": 1})
    first = everything(at)
    next(going)

    def killed(stream: Any) -> None:
        raise reason

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(type(reason)):
            training.save_state(tmp_path / "state", at, {"n": 2})
    again = training.begin(tiny(seed=1), recipe)
    assert training.load_state(tmp_path / "state", again) == {"n": 1}
    assert_same(everything(again), first)

    (partial,) = (path for path in tmp_path.iterdir() if path.name != "state")
    (partial / "shard-of-another-run.safetensors").write_bytes(b"cut off")
    training.save_state(tmp_path / "state", at, {"n": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert training.load_state(tmp_path / "state", again) == {"n": 2}
    assert_same(everything(again), everything(at))


def test_whole_weights_of_one_process_are_its_state_dict() -> None:
    at = training.begin(tiny(), Recipe(1, 4))
    found, expected = training.whole_weights(at), at.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
