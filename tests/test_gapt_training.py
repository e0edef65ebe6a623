"""Training with GAPT: an update against its formula, however it is cut, measured or shared among processes."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from memdiag import gapt, training
from memdiag.checkpoint import new_model, read_config
from memdiag.dataset import Example
from memdiag.errors import InputError
from memdiag.gapt import COMPRESS, MEMORIZE, Rule
from memdiag.gapt_training import Method, Run, Seen
from memdiag.packing import Corpus, documents, pack
from memdiag.training import Recipe, Update, rows_of_update

HASTY = Rule(smoothing=0.5, ce_patience=4, mbe_patience=3, ce_delta=0.03, mbe_delta=0.03)


def tiny(seed: int = 0, *, dropout: float = 0.0) -> nn.Module:
    sizes = {"vocab_size": 32, "n_positions": 24, "n_embd": 16, "n_layer": 3, "n_head": 2}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return new_model("tiny", read_config("gpt2-tiny") | sizes | drops, seed)


def corpus_of(kind: str, n: int = 23, seed: int = 0) -> Corpus:
    """Texts that can be learned: mostly, a token is one more than the last."""
    draw = np.random.default_rng(seed)
    examples = []
    for i in range(n):
        steps = np.where(draw.random(draw.integers(9, 25)) < 0.8, 1, draw.integers(1, 32))
        ids = (draw.integers(32) + np.cumsum(steps)) % 32
        examples.append(Example(i, str(i), ids.astype(np.int64), None, None, False))
    return documents(examples) if kind == "documents" else pack(examples, 20, end=None)


def run_of(recipe: Recipe, method: Method, corpus: Corpus, **settings: Any) -> Run:
    model = tiny(dropout=settings.pop("dropout", 0.0))
    return Run(training.begin(model, recipe), recipe, method, corpus, **settings)


def updates(run: Run) -> list[Update[Seen]]:
    return list(training.train(run.training, run.recipe, run.backward))


def weights(run: Run) -> list[Tensor]:
    return [p.detach().clone() for p in run.training.model.parameters()]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.detach().clone() for p in model.parameters()]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """To 1e-5 of the largest number of each."""
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()) + 1e-9)


def length_of(gradient: list[Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradient))


def plain(
    model: nn.Module, corpus: Corpus, rows: Any, *, layers: list[int], patch_size: int = 8
) -> tuple[Tensor, list[Tensor]]:
    """CE and the MBE of some layers (not the last, which transformers gives normed), sequence by sequence."""
    nll, n_targets = torch.zeros(()), 0
    found: list[list[Tensor]] = [[] for _ in layers]
    for row in rows:
        start, length = int(corpus.starts[row]), int(corpus.lengths[row])
        ids = torch.tensor(corpus.tokens[start : start + length].tolist())
        output = model(ids[None], output_hidden_states=True)
        log_p = output.logits[0].log_softmax(-1)
        for at in range(1, length):
            nll, n_targets = nll - log_p[at - 1, ids[at]], n_targets + 1
        for values, layer in zip(found, layers):
            states = output.hidden_states[layer][0]
            for at in range(0, length - patch_size + 1, patch_size):
                gram = states[at : at + patch_size] @ states[at : at + patch_size].T
                values.append(2 * gram.trace().log() - gram.square().sum().log())
    return nll / n_targets, [torch.stack(values).mean() for values in found]


# --- one update ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["packed", "documents"])
@pytest.mark.parametrize(("layers", "active"), [(None, [2]), ("0-2", [0, 1, 2])])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gradient_of_an_update_is_that_of_the_formula(
    kind: str, layers: str | None, active: list[int], accumulate: int
) -> None:
    corpus, recipe = corpus_of(kind), Recipe(1, 7, accumulate, seed=4)
    run = run_of(recipe, Method(Rule(gate="constant"), weight=0.7, layers=layers, ratio_every=0), corpus)
    assert run.active == active
    loss, seen = run.backward(2)
    model = tiny()
    ce, mbe = plain(model, corpus, rows_of_update(2, len(corpus), 7, 4), layers=[0, 1, 2])
    expected = ce + 0.7 * torch.stack([mbe[layer] for layer in active]).mean()
    expected.backward()
    assert_close(gradients(run.training.model), gradients(model))
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert seen.ce == pytest.approx(float(ce.detach()), rel=1e-5)
    assert len(seen.mbe_layers) == 4
    assert seen.mbe_layers[:3] == pytest.approx([float(value.detach()) for value in mbe], rel=1e-5)
    assert seen.mbe == pytest.approx(sum(float(mbe[layer].detach()) for layer in active) / len(active), rel=1e-5)
    assert (seen.phase, seen.reason, seen.ratio) == (COMPRESS, None, None)


def test_patches_may_have_another_size() -> None:
    corpus, recipe = corpus_of("documents"), Recipe(1, 5)
    run = run_of(recipe, Method(Rule(gate="constant"), weight=2.0, patch_size=3, ratio_every=0), corpus)
    run.backward(0)
    model = tiny()
    ce, (mbe,) = plain(model, corpus, rows_of_update(0, len(corpus), 5, 0), layers=[2], patch_size=3)
    (ce + 2 * mbe).backward()
    assert_close(gradients(run.training.model), gradients(model))


@pytest.mark.parametrize("kind", ["packed", "documents"])
def test_an_update_that_memorizes_is_one_of_plain_cross_entropy_bit_for_bit(kind: str) -> None:
    corpus, recipe = corpus_of(kind), Recipe(3, 6, lr=1e-2, seed=1)
    run = run_of(recipe, Method(Rule(ce_patience=100)), corpus)
    assert {update.result.phase for update in updates(run)} == {MEMORIZE}
    at = training.begin(tiny(), recipe)

    def backward(step: int) -> tuple[float, None]:
        rows = rows_of_update(step, len(corpus), 6, 1)
        ids, mask = corpus.batch(rows)
        logits = at.model(ids, attention_mask=None if mask.all() else mask.long(), use_cache=False).logits
        labels = torch.cat([ids.masked_fill(~mask, -100)[:, 1:], torch.full((6, 1), -100)], 1)
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = nll / corpus.n_targets(rows)
        loss.backward()
        return float(loss.detach()), None

    list(training.train(at, recipe, backward))
    assert same(weights(run), list(at.model.parameters()))


def test_a_weight_of_zero_is_no_regulariser() -> None:
    ends = []
    for rule in (Rule(gate="constant"), Rule(gate="none")):
        run = run_of(Recipe(4, 6, lr=1e-2), Method(rule, weight=0.0), corpus_of("documents"))
        updates(run)
        ends.append(weights(run))
    assert same(*ends)


@pytest.mark.parametrize("gate", ["paper", "relative"])
def test_cutting_an_update_into_parts_changes_neither_losses_nor_phases(gate: str) -> None:
    """Parts of unequal size, of documents of unequal length."""
    rule = dataclasses.replace(HASTY, gate=gate)
    found = []
    for accumulate in (1, 3, 4):
        run = run_of(Recipe(64, 7, accumulate, lr=2e-3, warmup=4), Method(rule, weight=0.3), corpus_of("documents"))
        found.append([update.result for update in updates(run)])
    whole, *others = found
    switches = [seen.reason for seen in whole if seen.reason]
    assert len(switches) >= 8
    assert {seen.phase for seen in whole} == {MEMORIZE, COMPRESS}
    for parts in others:
        assert [(seen.phase, seen.reason) for seen in parts] == [(seen.phase, seen.reason) for seen in whole]
        assert [seen.ce for seen in parts] == pytest.approx([seen.ce for seen in whole], rel=1e-5)
        assert [seen.mbe for seen in parts] == pytest.approx([seen.mbe for seen in whole], rel=1e-4)
        assert [seen.ratio is None for seen in parts] == [seen.ratio is None for seen in whole]


def test_what_pads_a_batch_and_the_order_of_its_rows_have_no_influence(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for pad_id, order in ((0, 1), (31, 1), (0, -1)):
        run = run_of(Recipe(6, 7, lr=2e-3), Method(Rule(gate="constant")), corpus_of("documents"), pad_id=pad_id)
        with monkeypatch.context() as patch:
            patch.setattr(training, "rows_of_update", lambda *args, order=order: rows_of_update(*args)[::order])
            found.append(([update.result for update in updates(run)], weights(run)))
    for seen, end in found[1:]:
        assert [x.ce for x in seen] == pytest.approx([x.ce for x in found[0][0]], rel=1e-5)
        assert [x.mbe for x in seen] == pytest.approx([x.mbe for x in found[0][0]], rel=1e-5)
        for a, b in zip(end, found[0][1]):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_an_update_in_which_nothing_fills_a_patch_is_one_of_cross_entropy() -> None:
    examples = [Example(i, str(i), np.arange(i, i + 5), None, None, False) for i in range(4)]
    ends = []
    for rule in (Rule(gate="constant"), Rule(gate="none")):
        run = run_of(Recipe(3, 4, lr=1e-2), Method(rule, ratio_every=1), documents(examples))
        for update in updates(run):
            assert update.result.mbe is None
            assert update.result.mbe_layers == [None] * 4
            assert math.isfinite(update.result.ce)
        ends.append(weights(run))
        assert run.gate.seen == run.gate.skipped == 3
    assert same(*ends)


def test_bfloat16_products_stay_close_to_float32() -> None:
    found = []
    for autocast in (None, torch.bfloat16):
        run = run_of(Recipe(3, 7), Method(Rule(gate="constant")), corpus_of("documents"), autocast=autocast)
        found.append([(update.result.ce, update.result.mbe) for update in updates(run)])
        assert {p.dtype for p in run.training.model.parameters()} == {torch.float32}
    assert found[0] != found[1]
    assert np.allclose(found[0], found[1], rtol=0.02)


# --- the gates -----------------------------------------------------------------------------------------------------


def test_the_controls_none_constant_and_random() -> None:
    phases = {}
    for gate in ("none", "constant", "random"):
        rule = Rule(gate=gate, steps=12, share=0.5, mbe_patience=2, seed=3)
        run = run_of(Recipe(12, 4), Method(rule), corpus_of("packed"))
        phases[gate] = [update.result.phase for update in updates(run)]
    assert phases["none"] == [MEMORIZE] * 12
    assert phases["constant"] == [COMPRESS] * 12
    schedule = gapt.random_schedule(12, 0.5, 2, 3)
    assert phases["random"] == [COMPRESS if compresses else MEMORIZE for compresses in schedule]
    assert phases["random"].count(COMPRESS) == 6


@pytest.mark.parametrize("gate", ["paper", "relative"])
def test_the_gate_sees_every_update_once(gate: str) -> None:
    run = run_of(Recipe(40, 7, 2, lr=2e-3), Method(dataclasses.replace(HASTY, gate=gate)), corpus_of("documents"))
    by_hand, n_switches = run.gate, 0
    for update in training.train(run.training, run.recipe, run.backward):
        seen = update.result
        assert seen.phase == by_hand.phase
        by_hand = by_hand.advance(seen.ce, [seen.mbe_layers[layer] for layer in run.active])
        assert seen.reason == by_hand.reason
        assert run.gate == by_hand
        n_switches += seen.reason is not None
    assert n_switches >= 2


# --- one loss at a time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [2, 3, 4])
@pytest.mark.parametrize("step", [0, 1, 5])
def test_alternating_parts_have_one_loss_each(accumulate: int, step: int) -> None:
    """From the last part backwards cross-entropy and one layer's entropy take turns; the layer is the next by turns."""
    corpus, recipe = corpus_of("documents"), Recipe(9, 7, accumulate)
    method = Method(Rule(gate="constant"), weight=0.7, layers="0-2", alternate=True, ratio_every=0)
    run = run_of(recipe, method, corpus)
    run.backward(step)
    model, layer = tiny(), step % 3
    rows = rows_of_update(step, len(corpus), 7, 0)
    parts = np.array_split(rows, accumulate)
    for i, part in enumerate(parts):
        ce, (mbe,) = plain(model, corpus, part, layers=[layer])
        if (accumulate - 1 - i) % 2 == 0:
            (ce * corpus.n_targets(part) / corpus.n_targets(rows)).backward()
        else:
            (0.7 * mbe * corpus.n_patches(part, 8) / corpus.n_patches(rows, 8)).backward()
    assert_close(gradients(run.training.model), gradients(model))


def test_alternating_is_of_the_phase_compress_only() -> None:
    ends = []
    for alternate in (True, False):
        run = run_of(Recipe(3, 7, 2, lr=1e-2), Method(Rule(gate="none"), alternate=alternate), corpus_of("documents"))
        updates(run)
        ends.append(weights(run))
    assert same(*ends)


# --- the gradients' ratio ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_ratio_is_that_of_two_gradients_taken_apart(accumulate: int) -> None:
    corpus = corpus_of("documents")
    method = Method(Rule(gate="constant"), weight=3.0, layers="1-2", ratio_every=1)
    run = run_of(Recipe(1, 7, accumulate), method, corpus)
    _, seen = run.backward(0)
    model = tiny()
    ce, mbe = plain(model, corpus, rows_of_update(0, len(corpus), 7, 0), layers=[1, 2])
    parameters = list(model.parameters())
    ce_gradient = torch.autograd.grad(ce, parameters, retain_graph=True)
    entropic = torch.autograd.grad(3 * (mbe[0] + mbe[1]) / 2, parameters, allow_unused=True)
    expected = length_of([g for g in entropic if g is not None]) / length_of(list(ce_gradient))
    assert seen.ratio == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("alternate", [False, True])
def test_measuring_the_ratio_changes_nothing(dropout: float, alternate: bool) -> None:
    found = []
    for every in (0, 1, 2):
        run = run_of(
            Recipe(6, 7, 2, lr=1e-2),
            Method(Rule(gate="constant"), ratio_every=every, alternate=alternate),
            corpus_of("documents"),
            dropout=dropout,
        )
        seen = [update.result for update in updates(run)]
        measured = [step for step in range(6) if seen[step].ratio is not None]
        assert measured == [step for step in range(6) if every and step % every == 0]
        found.append(([dataclasses.replace(x, ratio=None) for x in seen], weights(run)))
    for seen, end in found[1:]:
        assert seen == found[0][0]
        assert same(end, found[0][1])


def test_there_is_no_ratio_while_memorizing() -> None:
    run = run_of(Recipe(2, 7), Method(Rule(gate="none"), ratio_every=1), corpus_of("packed"))
    assert [update.result.ratio for update in updates(run)] == [None, None]


# --- held out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["packed", "documents"])
def test_evaluation_is_a_plain_loop_whatever_the_batch_size(kind: str) -> None:
    held_out = corpus_of(kind, n=9, seed=7)
    run = run_of(Recipe(1, 4), Method(Rule()), corpus_of("packed"), dropout=0.5)
    model = tiny(dropout=0.5).eval()
    with torch.no_grad():
        ce, mbe = plain(model, held_out, range(len(held_out)), layers=[0, 1, 2])
    for batch_size in (1, 2, 5, 100):
        found_ce, found_mbe = run.evaluate(held_out, batch_size)
        assert found_ce == pytest.approx(float(ce), rel=1e-5)
        assert found_mbe[:3] == pytest.approx([float(value) for value in mbe], rel=1e-5)
        assert len(found_mbe) == 4
    assert run.training.model.training


def test_evaluation_without_a_patch_has_no_entropy() -> None:
    short = documents([Example(0, "0", np.arange(7), None, None, False)])
    run = run_of(Recipe(1, 4), Method(Rule()), corpus_of("packed"))
    assert run.evaluate(short, 4)[1] == [None] * 4


def test_evaluating_changes_nothing() -> None:
    found = []
    for evaluates in (False, True):
        run = run_of(Recipe(5, 7, lr=1e-2), Method(Rule(gate="constant")), corpus_of("documents"), dropout=0.2)
        seen = []
        for update in training.train(run.training, run.recipe, run.backward):
            seen.append(update.result)
            if evaluates:
                gate = run.gate
                run.evaluate(corpus_of("documents", n=7, seed=2), 3)
                assert run.gate is gate
        found.append((seen, weights(run), run.gate))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


# --- the model's side ----------------------------------------------------------------------------------------------


def test_close_takes_the_hooks_off() -> None:
    run = run_of(Recipe(1, 4), Method(Rule()), corpus_of("packed"))
    run.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.training.model.modules())


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(InputError, match="--layers '7' is out of range: this model has layers 0 to 3"):
        run_of(Recipe(1, 4), Method(Rule(), layers="7"), corpus_of("packed"))


def test_going_on_from_a_state_gives_the_same_updates(tmp_path: Path) -> None:
    """Bit for bit, gate and dropout included."""
    method, recipe = Method(HASTY, weight=0.3, ratio_every=3), Recipe(32, 7, 2, lr=2e-3)
    whole = run_of(recipe, method, corpus_of("documents"), dropout=0.1)
    expected = []
    for update in training.train(whole.training, recipe, whole.backward):
        expected.append(update)
        if update.step == 11:
            training.save_state(tmp_path / "state", whole.training, {"gate": whole.gate.to_json()})
    again = run_of(recipe, method, corpus_of("documents"), dropout=0.1)
    extra = training.load_state(tmp_path / "state", again.training)
    again.gate = gapt.Gate.from_json(method.rule, extra["gate"])
    assert updates(again) == expected[11:]
    assert {update.result.phase for update in expected[11:]} == {MEMORIZE, COMPRESS}
    assert same(weights(again), weights(whole))


# --- several processes ---------------------------------------------------------------------------------------------

WORKER = """
import dataclasses, json, sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, sys.argv[1])
import test_gapt_training as here
from memdiag import ranks, training
from memdiag.gapt_training import Run
from safetensors.torch import save_file

torch.set_num_threads(1)
rank, _ = ranks.start()
out = Path(sys.argv[2])
for name in ("ddp", "shard", "alternate"):
    method = here.SHARED[name == "alternate"]
    at = training.begin(here.tiny(), here.RECIPE, shard=name == "shard")
    run = Run(at, here.RECIPE, method, here.corpus_of("documents"))
    rows = []
    for update in training.train(at, here.RECIPE, run.backward):
        rows.append({"grad_norm": update.grad_norm, **dataclasses.asdict(update.result)})
        if update.step == here.STOP:
            between = run.evaluate(here.corpus_of("documents", n=7, seed=2), 3)
            training.save_state(out / f"state-{name}", at, {"gate": run.gate.to_json()})
    after = run.evaluate(here.corpus_of("documents", n=7, seed=2), 3)
    local = [p.to_local() if hasattr(p, "to_local") else p for p in at.model.parameters()]
    whole = training.whole_weights(at)
    found = {"rows": rows, "between": between, "after": after, "n_local": sum(p.numel() for p in local)}
    (out / f"{name}-{rank}.json").write_text(json.dumps(found | {"names": sorted(whole)}))
    if rank == 0:
        save_file({k: v.clone() for k, v in whole.items()}, out / f"{name}.safetensors")
    run.close()
    if name != "alternate":
        again = training.begin(here.tiny(1), here.RECIPE, shard=name == "ddp")  # the other way round
        training.load_state(out / f"state-{name}", again)
        here.check_same(training.whole_weights(again), out / f"state-{name}")

at = training.begin(here.tiny(), here.RECIPE, shard=True)
run = Run(at, here.RECIPE, here.SHARED[False], here.corpus_of("documents"))
run.evaluate(here.corpus_of("documents", n=7, seed=2), 3)
try:
    norms = [update.grad_norm for update in training.train(at, here.RECIPE, run.backward)]
except RuntimeError as error:
    norms = [str(error)]
(out / f"evaluated-first-{rank}.json").write_text(json.dumps(norms))

at = training.begin(here.tiny(), here.RECIPE)
drawn = [update.result for update in training.train(at, here.RECIPE, lambda step: (0.0, float(torch.rand(()))))]
(out / f"drawn-{rank}.json").write_text(json.dumps(drawn))
"""
RECIPE, STOP = Recipe(26, 7, 2, lr=2e-3, warmup=2), 13
SHARED = {
    False: Method(HASTY, weight=0.3, ratio_every=2),
    True: Method(Rule(gate="constant"), weight=0.3, layers="1-2", alternate=True, ratio_every=2),
}


def check_same(found: dict[str, Tensor], state: Path) -> None:
    """Weights on the first process against those of a state, which one process reads."""
    if found:
        stored: dict[str, Tensor] = {}
        for path in sorted(state.glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                stored[name] = torch.cat([stored[name], tensor]) if name in stored and tensor.ndim else tensor
        assert stored.keys() > {f"model.{name}" for name in found if name != "lm_head.weight"}
        for name, tensor in found.items():
            if name != "lm_head.weight":
                assert torch.equal(tensor, stored[f"model.{name}"]), name


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, torchrun: Callable[..., subprocess.CompletedProcess[str]]) -> Path:
    """What two processes found."""
    out = tmp_path_factory.mktemp("shared")
    script = out / "worker.py"
    script.write_text(WORKER)
    done = torchrun(str(script), str(Path(__file__).parent), str(out))
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def one_process() -> dict[bool, tuple[Run, dict[str, Any]]]:
    """The same, alone."""
    found = {}
    for alternate, method in SHARED.items():
        run = run_of(RECIPE, method, corpus_of("documents"))
        rows = []
        for update in training.train(run.training, RECIPE, run.backward):
            rows.append({"grad_norm": update.grad_norm, **dataclasses.asdict(update.result)})
            if update.step == STOP:
                between = run.evaluate(corpus_of("documents", n=7, seed=2), 3)
        after = run.evaluate(corpus_of("documents", n=7, seed=2), 3)
        found[alternate] = (run, {"rows": rows, "between": between, "after": after})
    return found


def assert_same_updates(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [(row["phase"], row["reason"]) for row in found] == [(row["phase"], row["reason"]) for row in expected]
    for name, rel in (("ce", 1e-5), ("mbe", 1e-4), ("mbe_layers", 1e-4), ("grad_norm", 1e-3)):
        for row, wanted in zip(found, expected):
            assert row[name] == pytest.approx(wanted[name], rel=rel), name
    assert [row["ratio"] is None for row in found] == [row["ratio"] is None for row in expected]
    ratios = [[row["ratio"] for row in rows if row["ratio"] is not None] for rows in (found, expected)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-3)


@pytest.mark.parametrize("name", ["ddp", "shard", "alternate"])
def test_two_processes_make_the_updates_of_one(
    shared: Path, one_process: dict[bool, tuple[Run, dict[str, Any]]], name: str
) -> None:
    run, expected = one_process[name == "alternate"]
    both = [json.loads((shared / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    for found in both:
        assert len(found["rows"]) == 26
        assert_same_updates(found["rows"], expected["rows"])
        for when in ("between", "after"):
            assert found[when][0] == pytest.approx(expected[when][0], rel=1e-5)
            assert found[when][1] == pytest.approx(expected[when][1], rel=1e-4)
    assert both[0]["rows"] == both[1]["rows"]
    if name != "alternate":
        assert {row["phase"] for row in expected["rows"]} == {MEMORIZE, COMPRESS}
    n = sum(p.numel() for p in run.training.model.parameters())
    assert [found["n_local"] < 0.6 * n for found in both] == [name == "shard"] * 2


def test_every_process_draws_for_itself(shared: Path) -> None:
    """Dropout would otherwise leave out the same units in all shares of a batch."""
    for rank in (0, 1):
        expected = []
        for step in range(26):
            with training.seeded(RECIPE.seed, step, rank):
                expected.append(float(torch.rand(())))
        assert json.loads((shared / f"drawn-{rank}.json").read_text()) == expected


def test_a_sharded_model_may_be_evaluated_before_its_first_update(
    shared: Path, one_process: dict[bool, tuple[Run, dict[str, Any]]]
) -> None:
    for rank in (0, 1):
        norms = json.loads((shared / f"evaluated-first-{rank}.json").read_text())
        assert norms == pytest.approx([row["grad_norm"] for row in one_process[False][1]["rows"]], rel=1e-3)


@pytest.mark.parametrize("name", ["ddp", "shard", "alternate"])
def test_whole_weights_are_those_of_one_process_and_on_the_first_only(
    shared: Path, one_process: dict[bool, tuple[Run, dict[str, Any]]], name: str
) -> None:
    expected = one_process[name == "alternate"][0].training.model.state_dict()
    found = load_file(shared / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-5)
    names = [json.loads((shared / f"{name}-{rank}.json").read_text())["names"] for rank in (0, 1)]
    assert names[0] == sorted(expected)
    if name == "shard":
        assert names[1] == []


@pytest.mark.parametrize("name", ["ddp", "shard"])
def test_one_process_goes_on_from_what_two_saved(
    shared: Path, one_process: dict[bool, tuple[Run, dict[str, Any]]], name: str
) -> None:
    state = shared / f"state-{name}"
    assert {path.suffix for path in state.iterdir()} == {".safetensors", ".json"}
    run = run_of(RECIPE, SHARED[False], corpus_of("documents"))
    extra = training.load_state(state, run.training)
    assert run.training.step == STOP
    run.gate = gapt.Gate.from_json(HASTY, extra["gate"])
    rows = [{"grad_norm": u.grad_norm, **dataclasses.asdict(u.result)} for u in updates(run)]
    assert_same_updates(rows, one_process[False][1]["rows"][STOP:])


@pytest.mark.parametrize("ratio_every", [0, 1])
def test_an_update_of_documents_shorter_than_a_patch_is_plain_and_the_gate_skips_it(ratio_every: int) -> None:
    short = [Example(i, str(i), np.arange(3 + i, dtype=np.int64), None, None, False) for i in range(4)]
    recipe = Recipe(steps=6, batch_size=2, lr=1e-3)
    run = run_of(recipe, Method(Rule(gate="constant"), ratio_every=ratio_every), documents(short))
    found = updates(run)
    assert len(found) == 6
    assert all(update.result.mbe is None and math.isfinite(update.result.ce) for update in found)
    assert run.gate.skipped == 6
    plainly = run_of(recipe, Method(Rule(gate="none")), documents(short))
    assert [update.result.ce for update in updates(plainly)] == [update.result.ce for update in found]
