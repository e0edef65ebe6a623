"""The loss that GAPT adds: against plain loops, in your own training loop, and in transformers' Trainer."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from memdiag import gapt, mbe
from memdiag.checkpoint import new_model, read_config
from memdiag.errors import InputError
from memdiag.regulariser import IGNORED, Gapt, active_layers, cross_entropy_sum, entropies

IDS = torch.randint(32, (12, 20), generator=torch.Generator().manual_seed(3))
HASTY = {"smoothing": 0.0, "ce_patience": 2, "mbe_patience": 3, "ce_delta": 100.0, "mbe_delta": 100.0}


def tiny(layers: int = 3, seed: int = 0) -> nn.Module:
    sizes = {"vocab_size": 32, "n_positions": 24, "n_embd": 16, "n_layer": layers, "n_head": 2}
    return new_model("tiny", read_config("gpt2-tiny") | sizes, seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_entropy(rows: Tensor) -> Tensor:
    """S_2 of one patch, by its definition."""
    gram = rows @ rows.T
    return 2 * gram.trace().log() - gram.square().sum().log()


def plain_mbe(hidden: Tensor, lengths: list[int], patch_size: int = 8) -> Tensor:
    """The mean over all patches that lie in the real tokens, one after the other."""
    found = []
    for states, length in zip(hidden, lengths):
        for start in range(0, length - patch_size + 1, patch_size):
            found.append(plain_entropy(states[start : start + patch_size]))
    return torch.stack(found).mean()


def masked(lengths: list[int], width: int = 20) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=depth)
        self.stack = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(depth))


# --- which layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        *((1, [1]), (2, [1, 2]), (3, [2]), (4, [2, 3]), (5, [3]), (6, [3, 4]), (7, [3, 4, 5]), (8, [3, 4, 5, 6])),
        *((9, [3, 4, 5, 6, 7]), (10, [*range(3, 9)]), (11, [*range(3, 10)]), (12, [*range(3, 11)])),
    ],
)
def test_by_default_the_outer_two_layers_on_either_side_are_left_alone(depth: int, expected: list[int]) -> None:
    assert active_layers(Stack(depth)) == expected


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("0", [0]), ("1-3", [1, 2, 3]), ("-1", [4]), ("4,0,2-3", [0, 2, 3, 4]), ("2,2", [2]), (" 1 , -2 ", [1, 3])],
)
def test_layers_are_chosen_by_index_and_range(wanted: str, expected: list[int]) -> None:
    assert active_layers(Stack(4), wanted) == expected


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("5", "--layers '5' is out of range: this model has layers 0 to 4"),
        ("-6", "--layers '-6' is out of range: this model has layers 0 to 4"),
        ("3-1", "--layers '3-1' is out of range: this model has layers 0 to 4"),
        ("stack.0.*", "--layers 'stack.0.*': wanted indices and ranges of layers 0 to 4"),
    ],
)
def test_layers_that_are_not_there_are_refused(wanted: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        active_layers(Stack(4), wanted)
    assert str(error.value) == message


def test_a_model_without_a_stack_is_refused() -> None:
    with pytest.raises(InputError, match="needs a transformer with a stack of blocks"):
        active_layers(nn.Sequential(nn.Linear(2, 2)))


# --- the entropies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [1, 4, 8, 20])
def test_entropies_are_sums_over_patches_of_every_layer(patch_size: int) -> None:
    lengths = [20, 8, 7, 19]
    hidden = [gaussian(4, 20, 16, seed=seed) for seed in range(3)]
    sums, counts = entropies(hidden, masked(lengths), active=[1], patch_size=patch_size)
    n = sum(length // patch_size for length in lengths)
    assert counts.tolist() == [n] * 3
    assert sums.dtype == counts.dtype == torch.float32
    for layer in range(3):
        expected = plain_mbe(hidden[layer].double(), lengths, patch_size)
        assert float(sums[layer] / n) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)
        assert float(sums[layer]) == pytest.approx(
            float(mbe.patch_entropy(hidden[layer], masked(lengths), patch_size=patch_size).sum()), rel=1e-6
        )


def test_only_active_layers_have_gradients() -> None:
    hidden = [gaussian(2, 20, 16, seed=seed).requires_grad_() for seed in range(4)]
    sums, _ = entropies(hidden, masked([20, 16]), active=[1, 3])
    sums.sum().backward()
    assert [states.grad is not None for states in hidden] == [False, True, False, True]
    again = [states.detach().double().requires_grad_() for states in hidden]
    (4 * plain_mbe(again[1], [20, 16])).backward()
    torch.testing.assert_close(hidden[1].grad.double(), again[1].grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert not entropies(hidden, masked([20, 16]), active=[1])[0].requires_grad


def test_entropies_are_float32_whatever_the_model_computes_in() -> None:
    """bfloat16 products would be off in the third digit."""
    hidden, mask = gaussian(4, 16, 32), masked([16] * 4, 16)
    expected, _ = entropies([hidden], mask, active=[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = entropies([hidden], mask, active=[0])
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found, expected)
    halves = hidden.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = entropies([halves], mask, active=[0])
    assert torch.equal(found, entropies([halves.float()], mask, active=[0])[0])
    exact = 8 * float(plain_mbe(halves.double(), [16] * 4))
    assert float(found) == pytest.approx(exact, rel=1e-6)


def test_patches_of_zeros_do_not_count_and_have_no_gradient() -> None:
    hidden = gaussian(2, 16, 16)
    hidden[0, :8] = 0
    hidden.requires_grad_()
    sums, counts = entropies([hidden, torch.zeros(2, 16, 16)], masked([16, 16], 16), active=[0])
    assert counts.tolist() == [3, 0]
    rest = plain_entropy(hidden[0, 8:]) + plain_entropy(hidden[1, :8]) + plain_entropy(hidden[1, 8:])
    assert sums.tolist() == pytest.approx([float(rest.detach()), 0], rel=1e-5)
    sums.sum().backward()
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[0, :8].any()
    assert hidden.grad[0, 8:].any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e9])
def test_what_stands_in_the_padding_has_no_influence(poison: float) -> None:
    lengths = [20, 13, 5, 16]
    mask = masked(lengths)
    clean = [gaussian(4, 20, 16, seed=seed) for seed in range(2)]
    found, gradients = [], []
    for value in (0.0, poison):
        hidden = [states.masked_fill(~mask[..., None], value).requires_grad_() for states in clean]
        sums, counts = entropies(hidden, mask, active=[0, 1])
        sums.sum().backward()
        found.append((sums.detach(), counts))
        gradients.append([states.grad for states in hidden])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert not gradients[1][0][~mask].any()


# --- the cross-entropy ---------------------------------------------------------------------------------------------


def test_cross_entropy_is_a_plain_loop_over_the_real_tokens() -> None:
    lengths, logits = [20, 7, 2, 1], gaussian(4, 20, 32)
    mask = masked(lengths)
    expected = 0.0
    for row, length in enumerate(lengths):
        for at in range(1, length):
            expected -= float(logits[row, at - 1].double().log_softmax(0)[IDS[row, at]])
    assert float(cross_entropy_sum(logits, IDS[:4], mask)) == pytest.approx(expected, rel=1e-6)
    poisoned = logits.masked_fill(~mask[..., None], math.nan)  # also those of the last token predict nothing
    ids = IDS[:4].masked_fill(~mask, 10**6)
    assert float(cross_entropy_sum(poisoned, ids, mask)) == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_is_that_of_transformers() -> None:
    model, lengths = tiny(), [20, 9, 13]
    mask = masked(lengths)
    output = model(IDS[:3], attention_mask=mask.long(), labels=IDS[:3].masked_fill(~mask, IGNORED))
    mine = cross_entropy_sum(output.logits, IDS[:3], mask) / (sum(lengths) - 3)
    torch.testing.assert_close(mine, output.loss)
    one, other = (
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in (mine, output.loss)
    )
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_cross_entropy_of_half_precision_logits_is_summed_in_float32() -> None:
    logits, mask = gaussian(4, 20, 32).bfloat16(), masked([20] * 4)
    found = cross_entropy_sum(logits, IDS[:4], mask)
    assert found.dtype == torch.float32
    assert torch.equal(found, cross_entropy_sum(logits.float(), IDS[:4], mask))


# --- your own training loop ----------------------------------------------------------------------------------------


def plain_loss(model: nn.Module, ids: Tensor, weight: float, active: list[int]) -> tuple[Tensor, Tensor, list[float]]:
    """The formula with what transformers gives out; the last layer, which it gives normed, must not be active."""
    output = model(ids, labels=ids, output_hidden_states=True)
    layers = [plain_mbe(output.hidden_states[layer], [ids.shape[1]] * len(ids)) for layer in active]
    loss = output.loss + weight * torch.stack(layers).mean()
    return loss, output.loss, [float(layer.detach()) for layer in layers]


@pytest.mark.parametrize(("layers", "active"), [(None, [2]), ("0-2", [0, 1, 2])])
def test_three_lines_are_the_formula_and_the_gate_fed_by_hand(layers: str | None, active: list[int]) -> None:
    mine, plain = tiny(), tiny()
    watch = Gapt(mine, weight=0.5, layers=layers, **HASTY)
    assert watch.active == active
    gate = gapt.start(gapt.Rule(**HASTY))
    phases = []
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (mine, plain)]
    for step in range(12):
        ids = IDS[step : step + 1].roll(step, 1).repeat(2, 1)
        assert watch.phase == gate.phase
        phases.append(gate.phase)
        loss = watch.loss(mine(ids, labels=ids).loss)
        with_entropy, ce, values = plain_loss(plain, ids, 0.5, active)
        expected = with_entropy if gate.phase == gapt.COMPRESS else ce
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
        gate = gate.advance(float(ce.detach()), values)
        for optimizer, value in zip(optimizers, (loss, expected)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        assert watch.step() == gate.phase
    # one more update where there is nothing yet to be compared with
    memorize, compress = [gapt.MEMORIZE], [gapt.COMPRESS]
    assert phases == 3 * memorize + 4 * compress + 2 * memorize + 3 * compress
    assert (watch.gate.seen, watch.gate.skipped) == (12, 0)
    for a, b in zip(mine.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_in_the_phase_memorize_the_loss_is_the_cross_entropy_itself() -> None:
    model = tiny()
    watch = Gapt(model)
    ce = model(IDS, labels=IDS).loss
    assert watch.loss(ce) is ce
    constant = Gapt(model, gate="constant", weight=0)
    ce = model(IDS, labels=IDS).loss
    assert float(constant.loss(ce).detach()) == float(ce.detach())


def test_micro_batches_make_the_same_update_as_one_batch() -> None:
    found = []
    for parts in (1, 3):
        model = tiny()
        watch = Gapt(model, gate="constant", weight=0.7, layers="1-2")
        for ids in IDS.chunk(parts):
            watch.loss(model(ids, labels=ids).loss / parts, scale=1 / parts).backward()
        watch.gate = gapt.start(gapt.Rule(smoothing=0))
        watch.step()
        found.append(([p.grad for p in model.parameters()], watch.gate))
    (whole, once), (parted, thrice) = found
    for a, b in zip(parted, whole):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert thrice.seen == once.seen == 1
    assert thrice.mean_ce == pytest.approx(once.mean_ce, rel=1e-6)
    assert len(once.mean_mbe) == 2
    assert thrice.mean_mbe == pytest.approx(once.mean_mbe, rel=1e-6)


def test_a_mask_leaves_padding_out() -> None:
    model, lengths = tiny(), [20, 9, 3, 16]
    mask = masked(lengths)
    watch = Gapt(model, gate="constant", layers="1")
    output = model(IDS[:4], attention_mask=mask.long(), output_hidden_states=True)
    expected = plain_mbe(output.hidden_states[1], lengths)
    for given in (mask, mask.long()):
        model(IDS[:4], attention_mask=mask.long())
        loss = watch.loss(torch.zeros(()), given)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_gate_goes_through_a_checkpoint_as_json() -> None:
    model = tiny()
    first = Gapt(model, **HASTY)
    phases: dict[str, list[str]] = {"through": [], "again": []}
    for step in range(9):
        if step == 4:
            state = json.loads(json.dumps(first.state_dict()))
            again = Gapt(model, **HASTY)
            again.load_state_dict(state)
            assert again.gate == first.gate
        ids = IDS[step : step + 2]
        ce = model(ids, labels=ids).loss
        first.loss(ce)
        phases["through"].append(first.step())
        if step >= 4:
            again.loss(ce)
            phases["again"].append(again.step())
            assert again.state_dict() == first.state_dict()
    assert phases["again"] == phases["through"][4:]
    assert len(set(phases["again"])) == 2


def test_calls_out_of_order_are_refused() -> None:
    model = tiny()
    watch = Gapt(model)
    with pytest.raises(ValueError, match="step without a loss"):
        watch.step()
    with pytest.raises(ValueError, match="no forward pass with gradients"):
        watch.loss(torch.zeros(()))
    with torch.no_grad():
        ce = model(IDS, labels=IDS).loss
    with pytest.raises(ValueError, match="no forward pass with gradients"):
        watch.loss(ce)
    watch.loss(model(IDS, labels=IDS).loss)
    with pytest.raises(ValueError, match="no forward pass with gradients"):
        watch.loss(ce)  # that pass has been used
    watch.step()
    with pytest.raises(ValueError, match="step without a loss"):
        watch.step()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": -1}, "weight must be a finite number >= 0, got -1"),
        ({"weight": math.nan}, "weight must be a finite number >= 0, got nan"),
        ({"weight": math.inf}, "weight must be a finite number >= 0, got inf"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"layers": "4"}, "--layers '4' is out of range: this model has layers 0 to 3"),
        ({"gate": "papper"}, "no gate 'papper'; .* did you mean 'paper'"),
        ({"ce_patience": 0}, "--ce-patience must be at least 1 update, got 0"),
    ],
)
def test_values_out_of_range_are_refused_and_leave_no_hook(wrong: dict[str, Any], message: str) -> None:
    model = tiny()
    with pytest.raises(InputError, match=message):
        Gapt(model, **wrong)
    assert hooks(model) == 0


def test_sequences_shorter_than_a_patch_are_refused() -> None:
    model = tiny()
    watch = Gapt(model)
    with pytest.raises(InputError, match="no sequence fills a patch of 8 tokens; use longer ones"):
        watch.loss(model(IDS[:, :7], labels=IDS[:, :7]).loss)


@pytest.mark.parametrize("gate", ["none", "constant"])
def test_a_model_that_diverged_gives_a_loss_that_is_no_number_and_not_a_refusal(gate: str) -> None:
    model = tiny()
    watch = Gapt(model, gate=gate)
    nn.init.constant_(model.transformer.h[0].ln_1.weight, math.nan)
    assert watch.loss(model(IDS, labels=IDS).loss).isnan()
    watch.step()
    assert (watch.gate.seen, watch.gate.skipped) == (1, 1)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_close_takes_the_hooks_off() -> None:
    model = tiny()
    watch, other = Gapt(model), Gapt(model)
    n = hooks(model)
    watch.close()
    assert hooks(model) == n // 2
    other.loss(model(IDS, labels=IDS).loss)  # untouched
    with pytest.raises(ValueError, match="no forward pass with gradients"):
        watch.loss(torch.zeros(()))
    other.close()
    assert hooks(model) == 0


def test_evaluating_between_updates_is_not_seen() -> None:
    ends = []
    for evaluates in (False, True):
        model = tiny()
        watch = Gapt(model, layers="1-2", **HASTY)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(6):
            if evaluates:
                model.eval()
                with torch.no_grad() if step % 2 else torch.inference_mode():
                    model(IDS[:5, :9], labels=IDS[:5, :9])
                model.train()
            ids = IDS[step : step + 2]
            watch.loss(model(ids, labels=ids).loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.step()
        ends.append(watch.state_dict())
    assert ends[0] == ends[1]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_what_ddp_wraps_around_a_model_may_be_given() -> None:
    bare = tiny()
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(bare))
    found = []
    for model in (bare, wrapped):
        watch = Gapt(model, **HASTY)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(6):
            ids = IDS[step : step + 2]
            watch.loss(model(input_ids=ids, labels=ids).loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.step()
        found.append((watch.state_dict(), [p.detach() for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


# --- transformers' Trainer -----------------------------------------------------------------------------------------


def rows_with_padding() -> list[dict[str, Tensor]]:
    rows = []
    for i in range(24):
        length = [20, 9, 16, 11][i % 4]
        real = torch.arange(20) < length
        ids = IDS[i % 12].roll(i)
        rows.append({"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, IGNORED)})
    return rows


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("WANDB_DISABLED", "true")

    def make(model: nn.Module, **settings: Any) -> Any:
        plain = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0, "lr_scheduler_type": "constant"}
        plain |= {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
        plain |= {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0}
        arguments = transformers.TrainingArguments(str(tmp_path / "trainer"), **(plain | settings.pop("arguments", {})))
        return transformers.Trainer(model, arguments, train_dataset=rows_with_padding(), **settings)

    return make


def test_the_trainer_takes_the_loss_and_steps_the_gate(trainer: Callable[..., Any]) -> None:
    """24 rows, batches of 2, two of them an update: 6 updates in an epoch, and an evaluation after every other."""
    model, plain = tiny(), tiny()
    watch = Gapt(model, weight=0.5, layers="1-2", **HASTY)
    seen: list[tuple[Tensor, int, float]] = []
    phases, gates = [], []
    evaluated = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        found = watch.compute_loss(outputs, labels, num_items_in_batch)
        if torch.is_grad_enabled():
            phases.append(watch.phase)
            gates.append(watch.gate)
            seen.append((labels.clone(), int(num_items_in_batch), float(found.detach())))
        else:
            ce = cross_entropy_sum(outputs.logits, labels.clamp(min=0), labels != IGNORED)
            evaluated.append((float(found), float(ce / num_items_in_batch)))
        return found

    run = trainer(
        model,
        compute_loss_func=loss,
        callbacks=[watch.callback()],
        eval_dataset=rows_with_padding()[:9],
        arguments={"gradient_accumulation_steps": 2, "num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 2},
    )
    run.train()
    assert (run.state.global_step, watch.gate.seen, watch.gate.skipped) == (12, 12, 0)
    assert len(seen) == 24
    assert len(evaluated) == 12  # nine rows in batches of eight
    assert [found for found, _ in evaluated] == pytest.approx([ce for _, ce in evaluated], rel=1e-5)

    optimizer, gate = torch.optim.SGD(plain.parameters(), lr=1e-2), gapt.start(gapt.Rule(**HASTY))
    for step in range(12):
        assert phases[2 * step : 2 * step + 2] == [gate.phase] * 2
        assert gates[2 * step] == gates[2 * step + 1]
        parts = seen[2 * step : 2 * step + 2]
        optimizer.zero_grad()
        ce, n_targets, layers, n_patches = 0.0, 0, np.zeros(2), 0
        for labels, n, found in parts:  # n: as the Trainer counts them
            real = labels != IGNORED
            lengths = real.sum(1).tolist()
            output = plain(labels.clamp(min=0), attention_mask=real.long(), labels=labels, output_hidden_states=True)
            values = torch.stack([plain_mbe(output.hidden_states[layer], lengths) for layer in (1, 2)])
            targets = sum(lengths) - len(lengths)
            expected = output.loss * targets / n
            if gate.phase == gapt.COMPRESS:
                expected = expected + 0.5 * values.mean() * targets / n
            assert found == pytest.approx(float(expected.detach()), rel=1e-4)
            expected.backward()
            ce, n_targets = ce + float(output.loss.detach()) * targets, n_targets + targets
            patches = sum(length // 8 for length in lengths)
            layers, n_patches = layers + values.detach().numpy() * patches, n_patches + patches
        optimizer.step()
        gate = gate.advance(ce / n_targets, (layers / n_patches).tolist())
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert (watch.gate.phase, watch.gate.mbe_stalled) == (gate.phase, gate.mbe_stalled)
    assert watch.gate.mean_mbe == pytest.approx(gate.mean_mbe, rel=1e-4)
    assert watch.gate.mean_ce == pytest.approx(gate.mean_ce, rel=1e-5)  # of the update's tokens, whatever its parts
