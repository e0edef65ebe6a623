"""Gradient alignment: cosines against a double precision loop of backward passes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from memdiag import alignment, observe
from memdiag.alignment import cosine, gradient_rows
from memdiag.dataset import Batch
from memdiag.errors import InputError

VOCABULARY = 40


# --- cosine --------------------------------------------------------------------------------------------------------


def test_cosine_by_hand() -> None:
    assert cosine(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])) == pytest.approx(24 / 25, abs=1e-15)
    assert cosine(torch.eye(2), -torch.eye(2)) == pytest.approx(-1, abs=1e-15)
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0])) == 0


def test_cosine_agrees_with_a_loop_and_does_not_see_scale() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 7, generator=g)
    x, y = a.flatten().tolist(), b.flatten().tolist()
    dot = math.fsum(p * q for p, q in zip(x, y, strict=True))
    expected = dot / math.sqrt(math.fsum(p * p for p in x) * math.fsum(q * q for q in y))
    assert cosine(a, b) == pytest.approx(expected, abs=1e-14)
    assert cosine(a * 1e-30, b * 1e30) == pytest.approx(expected, abs=1e-6)


def test_cosine_sums_in_float64_and_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.ones(5_001), torch.ones(5_001)
    a[0] = b[1] = 3e4  # float32 would lose the ones beside 9e8
    expected = (4_999 + 6e4) / (5_000 + 9e8)
    assert cosine(a, b) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(alignment, "_CHUNK", 64)
    assert cosine(a, b) == pytest.approx(expected, rel=1e-12)


def test_rounding_does_not_carry_a_cosine_past_one() -> None:
    g = torch.Generator().manual_seed(1)
    for n in range(1, 300):
        a = torch.randn(n, generator=g).double()
        assert 1 - 1e-12 < cosine(a, 3 * a) <= 1
        assert -1 <= cosine(a, -7 * a) < -1 + 1e-12


def test_cosine_of_nothing_is_undefined() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert math.isnan(cosine(zero, one))
    assert math.isnan(cosine(one, zero))
    assert math.isnan(cosine(torch.ones(0), torch.ones(0)))
    assert math.isnan(cosine(one, one * math.inf))
    with pytest.raises(ValueError, match="one shape"):
        cosine(one, torch.ones(4))
    with pytest.raises(ValueError, match="float32 or better"):
        cosine(one.bfloat16(), one.bfloat16())


# --- gradient_rows -------------------------------------------------------------------------------------------------


def _gpt2(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=24, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return _louder(GPT2LMHeadModel(config))


def _llama(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return _louder(LlamaForCausalLM(config))


def _louder(model: PreTrainedModel) -> PreTrainedModel:
    """Weights five times the usual random ones: otherwise every block hardly changes its input."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.mul_(5)
    return model.eval().requires_grad_(False)


def _batch(lengths: list[int], seed: int, fill: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ids = np.where(mask, rng.integers(1, VOCABULARY, mask.shape), fill)
    n = len(lengths)
    return Batch([str(i) for i in range(n)], np.arange(n), ids.astype(np.int64), mask, None, None, 0)


BATCHES = [_batch([20, 17, 9], 0), _batch([24, 8], 1), _batch([16, 16, 11], 2)]


def _reference(model: nn.Module, batches: list[Batch], patch_size: int) -> list[dict[str, dict[str, Tensor]]]:
    """Per batch: loss name -> parameter name -> gradient; one forward and one backward for each loss, float64."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    out = []
    for batch in batches:
        ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.mask)
        n_layers = len(observe.blocks(model))
        gradients = {}
        for loss_name in ["ce", *range(1, n_layers + 1), "mean"]:
            hidden: list[Tensor] = []
            hooks = [
                block.register_forward_hook(lambda _m, _a, o, h=hidden: h.append(o[0] if isinstance(o, tuple) else o))
                for _, block in observe.blocks(model)
            ]
            logits = model(ids, attention_mask=mask.long(), use_cache=False).logits
            for hook in hooks:
                hook.remove()
            if loss_name == "ce":
                nll = [
                    -logits[b, t].log_softmax(-1)[ids[b, t + 1]]
                    for b in range(len(ids))
                    for t in range(ids.shape[1] - 1)
                    if mask[b, t + 1]
                ]
                loss = torch.stack(nll).mean()
            else:
                wanted = range(n_layers) if loss_name == "mean" else [loss_name - 1]
                loss = torch.stack([_mbe_by_loop(hidden[i], mask, patch_size) for i in wanted]).mean()
            model.zero_grad(set_to_none=True)
            loss.backward()
            gradients[loss_name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        out.append(gradients)
    return out


def _mbe_by_loop(hidden: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    values = []
    for h, m in zip(hidden, mask, strict=True):
        for start in range(0, int(m.sum()) - patch_size + 1, patch_size):
            z = h[start : start + patch_size]
            p = torch.linalg.eigvalsh(z @ z.T)
            p = p / p.sum()
            values.append(-torch.log((p**2).sum()))
    return torch.stack(values).mean()


def _reference_row(reference, first: tuple, second: tuple, names: list[str]) -> float:
    """Mean over pairs of the cosine between the named gradients, concatenated."""
    (loss_a, batches_a), (loss_b, batches_b) = first, second
    found = []
    for i, j in zip(batches_a, batches_b, strict=True):
        a = torch.cat([reference[i][loss_a][n].flatten() for n in names])
        b = torch.cat([reference[j][loss_b][n].flatten() for n in names])
        found.append(float(a @ b / (a.norm() * b.norm())))
    return sum(found) / len(found)


def _pairs(n: int, which: tuple[str, str]) -> tuple[list[int], list[int]]:
    if which == ("ce_mbe", "same"):
        pairs = [(i, i) for i in range(n)]
    elif which == ("ce_mbe", "across"):
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    else:
        pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    return [i for i, _ in pairs], [j for _, j in pairs]


@pytest.mark.parametrize("make", [_gpt2, _llama])
@pytest.mark.parametrize("patch_size", [8, 5])
def test_every_row_agrees_with_a_double_precision_loop(make, patch_size: int) -> None:
    model = make()
    rows = gradient_rows(model, BATCHES, patch_size=patch_size)
    reference = _reference(model, BATCHES, patch_size)
    prefixes = [name for name, _ in observe.blocks(model)]
    assert len(rows) >= 3 * (3 * 5 + 1)
    seen = set()
    for row in rows:
        layer, matrix = row["layer"], row["matrix"]
        if layer is None:
            loss = "mean"
            names = [n for n in reference[0]["ce"] if n in reference[0]["mean"]]
        else:
            loss, prefix = layer, prefixes[layer - 1] + "."
            assert row["layer_name"] == prefixes[layer - 1]
            names = [n for n, g in reference[0]["ce"].items() if n.startswith(prefix) and g.ndim >= 2]
            names = [n for n in names if matrix in (None, n.removeprefix(prefix))]
        assert names
        left, right = _pairs(3, (row["objective_pair"], row["batches"]))
        other = loss if row["objective_pair"] == "ce_mbe" else "ce"
        expected = _reference_row(reference, ("ce", left), (other, right), names)
        assert row["cosine"] == pytest.approx(expected, abs=1e-5), row
        assert row["n_pairs"] == len(left)
        norm = np.mean([math.sqrt(sum(float((g["ce"][n] ** 2).sum()) for n in names)) for g in reference])
        assert row["ce_grad_norm"] == pytest.approx(norm, rel=1e-4)
        if row["objective_pair"] == "ce_mbe":
            norm = np.mean([math.sqrt(sum(float((g[loss][n] ** 2).sum()) for n in names)) for g in reference])
            assert row["mbe_grad_norm"] == pytest.approx(norm, rel=1e-4)
        else:
            assert math.isnan(row["mbe_grad_norm"])
        seen.add((layer, matrix, row["objective_pair"], row["batches"]))
    assert len(seen) == len(rows)


def test_every_matrix_of_every_block_has_its_three_rows_in_order() -> None:
    rows = gradient_rows(_gpt2(), BATCHES[:1])
    matrices = ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight", None]
    expected = [(layer, f"transformer.h.{layer - 1}", m) for layer in (1, 2, 3) for m in matrices]
    pairs = [("ce_mbe", "same"), ("ce_mbe", "across"), ("ce_ce", "across")]
    got = [(r["layer"], r["layer_name"], r["matrix"], r["objective_pair"], r["batches"]) for r in rows]
    assert got == [(*name, *pair) for name in [*expected, (None, None, None)] for pair in pairs]


def _only(rows: list[dict], layer: int | None, matrix: str | None, pair: str = "ce_mbe", batches: str = "same") -> dict:
    (row,) = [
        r
        for r in rows
        if (r["layer"], r["matrix"], r["objective_pair"], r["batches"]) == (layer, matrix, pair, batches)
    ]
    return row


def test_standard_errors_are_over_pairs() -> None:
    model = _gpt2()
    alone = [_only(gradient_rows(model, [b]), 2, "mlp.c_fc.weight")["cosine"] for b in BATCHES]
    row = _only(gradient_rows(model, BATCHES), 2, "mlp.c_fc.weight")
    assert row["cosine"] == pytest.approx(np.mean(alone), abs=1e-6)
    assert row["cosine_se"] == pytest.approx(np.std(alone, ddof=1) / math.sqrt(3), rel=1e-4)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_one_batch_has_no_pairs_across_and_no_standard_error() -> None:
    for row in gradient_rows(_gpt2(), BATCHES[:1]):
        if row["batches"] == "same":
            assert -1 <= row["cosine"] <= 1
            assert row["n_pairs"] == 1
        else:
            assert math.isnan(row["cosine"])
            assert row["n_pairs"] == 0
        assert math.isnan(row["cosine_se"])


def test_the_same_batch_twice_has_ce_cosine_one() -> None:
    rows = gradient_rows(_llama(), [BATCHES[0], BATCHES[0]])
    for row in rows:
        if row["objective_pair"] == "ce_ce":
            assert row["cosine"] == pytest.approx(1, abs=1e-6)


def test_layers_above_and_the_head_are_left_out_of_the_comparison() -> None:
    """MBE_l cannot depend on what is above l, so changing that changes no MBE gradient norm at l, nor is it counted."""
    model = _llama()  # its head is its own
    targets = alignment._targets(model, [1, 3])
    assert [t.layer for t in targets] == [1, 3, None]
    assert all(n in dict(observe.blocks(model)[0][1].named_parameters()) for n in targets[0].names)
    with alignment._differentiable(model):
        gradients = alignment._gradients(model, BATCHES[0], targets, 8)
    assert gradients is not None
    head = targets[-1].names.index("lm_head.weight")
    assert gradients.ce[-1][head] is not None
    assert gradients.mbe[-1][head] is None
    before = gradient_rows(model, BATCHES[:1])
    with torch.no_grad():
        model.lm_head.weight *= 3
        for p in model.model.layers[2].parameters():
            p *= 1.5
    after = gradient_rows(model, BATCHES[:1])
    for layer in (1, 2):
        assert _only(after, layer, None)["mbe_grad_norm"] == pytest.approx(_only(before, layer, None)["mbe_grad_norm"])
    assert _only(after, 3, None)["mbe_grad_norm"] != pytest.approx(_only(before, 3, None)["mbe_grad_norm"])


def test_a_dead_matrix_is_undefined_and_does_not_spoil_its_layer() -> None:
    model = _gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.zero_()
        model.transformer.h[1].mlp.c_fc.bias.fill_(-1e4)  # gelu gives exactly 0: nothing of the MLP is reached
    rows = gradient_rows(model, BATCHES)
    for matrix in ("mlp.c_fc.weight", "mlp.c_proj.weight"):
        for pair, batches in (("ce_mbe", "same"), ("ce_mbe", "across"), ("ce_ce", "across")):
            row = _only(rows, 2, matrix, pair, batches)
            assert math.isnan(row["cosine"])
            assert math.isnan(row["cosine_se"])
            assert row["n_pairs"] == 0
            assert row["ce_grad_norm"] == 0
    assert math.isfinite(_only(rows, 2, None)["cosine"])
    assert math.isfinite(_only(rows, None, None)["cosine"])


def test_a_matrix_that_no_loss_reaches_is_undefined_not_zero() -> None:
    model = _gpt2()
    model.transformer.h[0].unused = nn.Linear(3, 3).requires_grad_(False)
    rows = gradient_rows(model, BATCHES[:2])
    row = _only(rows, 1, "unused.weight")
    assert math.isnan(row["cosine"])
    assert math.isnan(row["ce_grad_norm"])
    plain = gradient_rows(_gpt2(), BATCHES[:2])
    for layer in (1, None):
        assert _only(rows, layer, None) == _only(plain, layer, None)


def test_a_chosen_layer_has_the_same_rows_as_among_all() -> None:
    model = _gpt2()
    every = gradient_rows(model, BATCHES)
    some = gradient_rows(model, BATCHES, layers=[0, 2])
    assert {r["layer"] for r in some} == {2, None}
    for row in some:
        again = _only(every, row["layer"], row["matrix"], row["objective_pair"], row["batches"])
        assert again["cosine"] == pytest.approx(row["cosine"], abs=1e-6)
    with pytest.raises(InputError, match=r"layer 4 .* blocks 1 to 3"):
        gradient_rows(model, BATCHES, layers=[1, 4])


def test_padding_is_never_read() -> None:
    model = _llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 50.0  # the pad id; no text uses it
    padded = Batch(
        ["0"],
        np.arange(1),
        np.pad(BATCHES[0].input_ids[:1], ((0, 0), (0, 11))),
        np.pad(BATCHES[0].mask[:1], ((0, 0), (0, 11))),
        None,
        None,
        0,
    )
    clean = Batch(["0"], np.arange(1), BATCHES[0].input_ids[:1], BATCHES[0].mask[:1], None, None, 0)
    a, b = gradient_rows(model, [clean]), gradient_rows(model, [padded])
    for x, y in zip(a, b, strict=True):
        assert x["cosine"] == pytest.approx(y["cosine"], abs=2e-5, nan_ok=True)


def test_batches_that_cannot_be_used_are_skipped_and_none_is_an_error() -> None:
    model = _gpt2()
    single, short = _batch([1, 1], 3), _batch([7, 5], 4)  # nothing to predict; no full patch
    rows = gradient_rows(model, [single, BATCHES[0], short, BATCHES[1]])
    assert rows == gradient_rows(model, BATCHES[:2])
    for found in (
        gradient_rows(model, [single, *BATCHES[:2]], patch_size=1),
        gradient_rows(model, BATCHES[:2], patch_size=1),
    ):
        row = _only(found, 1, None, "ce_ce", "across")
        assert row["n_pairs"] == 1
        assert row["ce_grad_norm"] == pytest.approx(_only(rows, 1, None)["ce_grad_norm"])
    for unusable in ([], [short], [single]):
        with pytest.raises(InputError, match="full patch of 8 tokens"):
            gradient_rows(model, unusable)


def test_no_more_batches_are_read_than_are_used() -> None:
    model, taken = _gpt2(), []

    def stream() -> Iterator[Batch]:
        for batch in BATCHES * 3:
            taken.append(batch)
            yield batch

    rows = gradient_rows(model, stream(), max_batches=2)
    assert len(taken) == 2
    assert _only(rows, 1, None)["n_pairs"] == 2
    taken.clear()
    rows = gradient_rows(model, stream())
    assert len(taken) == 4
    assert _only(rows, 1, None, "ce_mbe", "across")["n_pairs"] == 12
    assert _only(rows, 1, None, "ce_ce", "across")["n_pairs"] == 6
    with pytest.raises(ValueError, match="max_batches"):
        gradient_rows(model, BATCHES, max_batches=0)


def _state(model: nn.Module) -> dict:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: (id(t), t.data_ptr(), t.dtype, t.requires_grad, t.grad is None) for n, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_is_left_exactly_as_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _llama().to(dtype)
    model.model.norm.weight.requires_grad_(True)
    state, values = _state(model), copy.deepcopy(model.state_dict())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    gradient_rows(model, BATCHES)
    assert _state(model) == state
    with monkeypatch.context() as patch:
        patch.setattr(alignment.mbe, "patch_entropy", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gradient_rows(model, BATCHES)
    assert _state(model) == state
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_as_float32(dtype: torch.dtype) -> None:
    half = _gpt2().to(dtype)
    rows, expected = gradient_rows(half, BATCHES), gradient_rows(copy.deepcopy(half).float(), BATCHES)
    for row, other in zip(rows, expected, strict=True):
        assert row["cosine"] == pytest.approx(other["cosine"], abs=1e-6, nan_ok=True)


def test_the_callers_modes_do_not_matter() -> None:
    model = _gpt2()
    expected = gradient_rows(model, BATCHES)
    with torch.no_grad():
        assert gradient_rows(model, BATCHES) == expected
    with torch.inference_mode():
        assert gradient_rows(model, BATCHES) == expected
        half = gradient_rows(model.bfloat16(), BATCHES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gradient_rows(model, BATCHES) == half


def test_a_planted_relation_is_found() -> None:
    """With CE replaced by -3 MBE_2 the cosine at layer 2 is -1, and the layer above is not reached."""
    model = _gpt2()
    with pytest.MonkeyPatch.context() as patch:
        found = observe.forward_with_graph

        def planted(model, batch):
            graph = found(model, batch)
            entropy = alignment.mbe.patch_entropy(graph.hidden[2], graph.mask, patch_size=8).mean()
            return observe.Graph(graph.hidden, graph.mask, -3 * entropy)

        patch.setattr(observe, "forward_with_graph", planted)
        rows = gradient_rows(model, BATCHES)
    row = _only(rows, 2, None)
    assert row["cosine"] == pytest.approx(-1, abs=1e-6)
    assert row["ce_grad_norm"] == pytest.approx(3 * row["mbe_grad_norm"], rel=1e-5)
    assert math.isnan(_only(rows, 3, None)["cosine"])  # that loss does not reach the layer above
    assert abs(_only(rows, 1, None)["cosine"]) < 0.999


def test_it_needs_a_language_model() -> None:
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    with pytest.raises(InputError, match="stack of blocks"):
        gradient_rows(model, BATCHES)
