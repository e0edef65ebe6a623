"""The one-block transformer: by hand, against loops over positions and heads, invariances, checkpoints, its curves."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memdiag
from memdiag import fourier, mbe, models
from memdiag.checkpoint import open_checkpoints, save
from memdiag.errors import InputError
from memdiag.models.transformer import MAX_SIZE, Transformer, TransformerConfig, effective_curves

SMALL = TransformerConfig(tokens=5, classes=4, positions=3, width=6, heads=3)


def model_of(config: TransformerConfig = SMALL, seed: int = 0) -> Transformer:
    return Transformer(config, torch.Generator().manual_seed(seed)).eval().requires_grad_(False)


def tokens(*shape: int, below: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def by_hand() -> Transformer:
    """Two tokens, two dimensions, one head; what is not set is zero."""
    model = model_of(TransformerConfig(tokens=2, classes=2, width=2, heads=1))
    for parameter in model.parameters():
        parameter.zero_()
    block = model.blocks[0]
    model.token.weight.copy_(torch.eye(2))
    block.value.weight.copy_(2 * torch.eye(2))
    block.output.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    block.mlp_in.weight[:3] = torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, -1.0]])
    block.mlp_out.weight[:, :3] = torch.tensor([[1.0, 100.0, 100.0], [0.0, 100.0, 100.0]])
    model.unembed.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 10.0]]))
    return model


# --- the forward pass ----------------------------------------------------------------------------------------------


def test_even_attention_by_hand() -> None:
    # values 2 (1, 0) and 2 (0, 1), of which half each: (1, 1), swapped: the same; the residual (0, 1) makes it (1, 2);
    # units 3, −1, −2: + 3 (1, 0) = (4, 2); logits (4, 20) / 2
    assert by_hand()(torch.tensor([[0, 1]])).tolist() == [[2, 10]]
    # attention (2, 0) swapped (0, 2), residual (1, 0): (1, 2) again, by another way
    assert by_hand()(torch.tensor([[0, 0]])).tolist() == [[2, 10]]
    # attention (1, 1), residual (1, 0): (2, 1); units 3, 1, −1: + 3 (1, 0) + 100 (1, 1) = (105, 101)
    assert by_hand()(torch.tensor([[1, 0]])).tolist() == [[52.5, 505]]


def test_attention_logits_are_divided_by_the_width_of_a_head_by_hand() -> None:
    model = by_hand()
    model.blocks[0].query.weight.copy_(torch.tensor([[0.0, 2 * math.log(3)], [0.0, 0.0]]))  # (2 ln 3, 0) of token 1
    model.blocks[0].key.weight.copy_(torch.eye(2))
    # token 1 looks at token 0 with ln 3, at itself with 0: 3/4 and 1/4; values (1.5, 0.5), swapped (0.5, 1.5);
    # (0.5, 2.5) with the residual; units 3, −2, −2.5: (3.5, 2.5); logits (3.5, 25) / 2
    assert model(torch.tensor([[0, 1]])).flatten().tolist() == pytest.approx([1.75, 12.5])


def test_positions_are_added_by_hand() -> None:
    model = by_hand()
    model.position.weight.copy_(torch.tensor([[0.0, 2.0], [4.0, 0.0]]))
    # x = (1, 2), (4, 1); values' mean (5, 3), swapped (3, 5); (7, 6); units 13, 1, −6: + (13, 0) + 100 (1, 1)
    assert model(torch.tensor([[0, 1]])).tolist() == [[120 / 2, 10 * 106 / 2]]


def logits_by_definition(model: Transformer, ids: list[int]) -> list[float]:
    """One example, one number at a time."""
    config, block = model.config, model.blocks[0]
    d, c, t = config.width, config.width // config.heads, len(ids)

    def apply(linear: nn.Module, x: list[float]) -> list[float]:
        return [sum(weight * value for weight, value in zip(row, x)) for row in linear.weight.tolist()]

    xs = [[a + b for a, b in zip(model.token.weight[m].tolist(), model.position.weight[i].tolist())]
          for i, m in enumerate(ids)]  # fmt: skip
    q, k, v = ([apply(linear, x) for x in xs] for linear in (block.query, block.key, block.value))
    mixed = []
    for h in range(config.heads):
        dims = range(h * c, (h + 1) * c)
        powers = [math.exp(sum(q[t - 1][i] * k[s][i] for i in dims) / c) for s in range(t)]
        mixed += [sum(power * v[s][i] for s, power in enumerate(powers)) / sum(powers) for i in dims]
    x = [a + b for a, b in zip(xs[-1], apply(block.output, mixed))]
    units = [max(0.0, unit) for unit in apply(block.mlp_in, x)]
    x = [a + b for a, b in zip(x, apply(block.mlp_out, units))]
    return [logit / d for logit in apply(model.unembed, x)]


@pytest.mark.parametrize("t", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 3, 6])
def test_agrees_with_loops_over_positions_and_heads(t: int, heads: int) -> None:
    model = model_of(dataclasses.replace(SMALL, heads=heads)).double()
    ids = tokens(4, t)
    expected = torch.tensor([logits_by_definition(model, row) for row in ids.tolist()], dtype=torch.float64)
    torch.testing.assert_close(model(ids), expected)


def test_the_batch_does_not_matter() -> None:
    model, ids = model_of(), tokens(7, 3)
    together = model(ids)
    assert together.shape == (7, 4)
    torch.testing.assert_close(torch.cat([model(row[None]) for row in ids]), together)
    torch.testing.assert_close(model(ids.flip(0)), together.flip(0))
    assert model(ids[:0]).shape == (0, 4)


def test_padding_is_never_read() -> None:
    model = model_of()
    short, mask = tokens(4, 2), torch.tensor([[1, 1, 0]] * 4)
    for poison in range(5):
        padded = torch.cat([short, torch.full((4, 1), poison)], 1)
        torch.testing.assert_close(model(padded, mask), model(short))
        assert torch.equal(model(padded, attention_mask=mask.bool()), model(padded, mask))
        assert not torch.allclose(model(padded), model(short))
    both = torch.tensor([[1, 1, 0], [1, 1, 1]])
    rows = tokens(2, 3)
    torch.testing.assert_close(model(rows, both)[0], model(rows[:1, :2])[0])
    torch.testing.assert_close(model(rows, both)[1], model(rows[1:])[0])


def test_without_positions_the_order_before_the_last_does_not_matter() -> None:
    model, ids = model_of(), tokens(20, 3)
    swapped = ids[:, [1, 0, 2]]
    assert not torch.allclose(model(swapped), model(ids))
    model.position.weight.zero_()
    torch.testing.assert_close(model(swapped), model(ids))
    assert not torch.allclose(model(ids[:, [0, 2, 1]]), model(ids))  # the last is read out


def test_heads_and_units_can_be_reordered() -> None:
    model, ids = model_of(), tokens(9, 3)
    expected = model(ids)
    block, dims, units = model.blocks[0], torch.tensor([4, 5, 0, 1, 2, 3]), torch.arange(24).flip(0)
    for linear in (block.query, block.key, block.value):
        linear.weight.copy_(linear.weight[dims].clone())
    block.output.weight.copy_(block.output.weight[:, dims].clone())
    block.mlp_in.weight.copy_(block.mlp_in.weight[units].clone())
    block.mlp_out.weight.copy_(block.mlp_out.weight[:, units].clone())
    torch.testing.assert_close(model(ids), expected)


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="takes 3 tokens at most, got 4"):
        model_of()(tokens(2, 4))


# --- weights -------------------------------------------------------------------------------------------------------


def test_its_parameters() -> None:
    model = Transformer(TransformerConfig(tokens=59, classes=31))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "token.weight": (59, 128), "position.weight": (2, 128),
        "blocks.0.query.weight": (128, 128), "blocks.0.key.weight": (128, 128),
        "blocks.0.value.weight": (128, 128), "blocks.0.output.weight": (128, 128),
        "blocks.0.mlp_in.weight": (512, 128), "blocks.0.mlp_out.weight": (128, 512),
        "unembed.weight": (31, 128),
    }  # fmt: skip
    assert model.blocks[0].heads == 4
    assert isinstance(model.blocks[0].act, nn.ReLU)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.get_input_embeddings() is model.token


def test_weights_are_drawn_by_fan_in() -> None:
    model = model_of(TransformerConfig(tokens=500, classes=500, positions=100, width=96))
    for name, parameter in model.named_parameters():
        std = 1.0 if name in ("token.weight", "position.weight") else parameter.shape[1] ** -0.5
        error = 5 / math.sqrt(2 * parameter.numel())  # 5 σ of a standard deviation
        assert parameter.std().item() == pytest.approx(std, rel=error), name
        assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name
    same_shape = [getattr(model.blocks[0], name).weight for name in ("query", "key", "value", "output")]
    assert not any(torch.equal(a, b) for i, a in enumerate(same_shape) for b in same_shape[:i])


def test_the_generator_alone_decides() -> None:
    before = torch.get_rng_state()
    first, again, other, default = model_of(seed=3), model_of(seed=3), model_of(seed=4), Transformer(SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])
        assert torch.equal(default.state_dict()[name], model_of(seed=0).state_dict()[name])


# --- config and checkpoint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, TransformerConfig(tokens=97, classes=97)])
def test_config_round_trip(config: TransformerConfig) -> None:
    stored = json.loads(json.dumps(config.to_json() | {"memdiag_task": "task:x", "dtype": "float32"}))
    assert stored["model_type"] == "memdiag-transformer"
    assert TransformerConfig.from_json(stored) == config
    built = models.build(stored)
    assert isinstance(built, Transformer)
    assert built.config == config
    assert (config.num_hidden_layers, config.max_position_embeddings) == (1, config.positions)


def test_what_a_config_leaves_out_has_its_default() -> None:
    config = TransformerConfig.from_json({"tokens": 7, "classes": 3})
    assert dataclasses.asdict(config) == {"tokens": 7, "classes": 3, "positions": 2, "width": 128, "heads": 4}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": None}, "tokens must be a whole number from 1 to 1048576, got None"),
        ({"tokens": 0}, "tokens must be a whole number from 1"),
        ({"classes": 2.0}, "classes must be a whole number"),
        ({"classes": True}, "classes must be a whole number"),
        ({"positions": -1}, "positions must be a whole number"),
        ({"width": "128"}, "width must be a whole number"),
        ({"width": MAX_SIZE + 1}, "width must be a whole number from 1 to 1048576, got 1048577"),
        ({"heads": [4]}, "heads must be a whole number"),
        ({"heads": 2**64}, "heads must be a whole number"),
        ({"heads": "4" * 500}, "heads must be a whole number"),
        ({"width": 30}, "width must be a multiple of heads, got 30 and 4"),
    ],
)
def test_configs_that_make_no_model_are_refused(change: dict[str, Any], says: str) -> None:
    config = TransformerConfig(tokens=5, classes=5).to_json() | change
    with pytest.raises(InputError) as caught:
        models.build(config)
    assert str(caught.value).startswith("memdiag-transformer: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("keys", "says"),
    [(["tokens"], "hold tokens$"), (["classes"], "hold classes$"), (["tokens", "classes"], "hold tokens and classes$")],
)
def test_what_a_config_must_hold_is_told(keys: list[str], says: str) -> None:
    config = {key: value for key, value in SMALL.to_json().items() if key not in keys}
    with pytest.raises(InputError, match=says):
        models.build(config)


def test_the_largest_config_takes_no_memory_until_it_is_known_to_fit() -> None:
    with torch.device("meta"):
        model = models.build(TransformerConfig(*[MAX_SIZE] * 5).to_json())
    assert model.blocks[0].mlp_in.weight.shape == (4 * MAX_SIZE, MAX_SIZE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoint_round_trip(tmp_path: Path, dtype: str) -> None:
    model = model_of().to(getattr(torch, dtype))
    save(tmp_path / "small", model, task="task:modular-addition?p=5")
    checkpoint = open_checkpoints(tmp_path / "small")[0]
    loaded = checkpoint.load()
    assert (checkpoint.kind, checkpoint.task) == ("memdiag", "task:modular-addition?p=5")
    assert checkpoint.config["dtype"] == dtype
    assert loaded.config == SMALL
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(tokens(9, 3)), model(tokens(9, 3)))
    assert not loaded.training


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"width": 12}, "shape"),
        ({"tokens": 6}, "token.weight"),
        ({"classes": 0}, "classes"),
        ({"heads": 4}, "multiple"),
    ],
)
def test_weights_of_another_config_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    save(tmp_path / "small", model_of())
    (tmp_path / "small" / "config.json").write_text(json.dumps(SMALL.to_json() | change))
    with pytest.raises(InputError, match=says):
        open_checkpoints(tmp_path / "small")[0].load()


def pairs_file(path: Path, *, ragged: bool = False) -> Path:
    rows = [{"id": str(i), "input_ids": list(divmod(i, 5))[: 1 + (i % 3 > 0) if ragged else 2], "label": i % 4}
            for i in range(25)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_entropy_measures_the_block_and_the_loss(tmp_path: Path) -> None:
    model = model_of()
    save(tmp_path / "small", model)
    data = pairs_file(tmp_path / "pairs.jsonl")
    rows = memdiag.entropy(tmp_path / "small", data=str(data), unit="dataset").table.to_pylist()
    last = [row for row in rows if row["pooling"] == "last"]
    assert [(row["layer"], row["layer_name"]) for row in last] == [(0, "blocks.0 (input)"), (1, "blocks.0")]
    ids = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    loss = nn.functional.cross_entropy(model(ids), torch.arange(25) % 4).item()
    embedded = model.token(ids) + model.position.weight[:2]
    block = model.blocks[0](embedded, torch.ones_like(ids, dtype=torch.bool))
    for row, hidden in zip(last, (embedded, block)):
        assert row["cross_entropy"] == pytest.approx(loss, rel=1e-5)
        assert row["mbe"] == pytest.approx(mbe.matrix_entropy(hidden[:, -1], alpha=2.0).item(), rel=1e-5)


def test_entropy_does_not_depend_on_the_batch_where_examples_differ_in_length(
    tmp_path: Path, assert_same_rows: Any
) -> None:
    save(tmp_path / "small", model_of())
    data = pairs_file(tmp_path / "pairs.jsonl", ragged=True)
    found = [
        memdiag.entropy(tmp_path / "small", data=str(data), unit="dataset", batch_size=size).table.to_pylist()
        for size in ("1", "7", "25")
    ]
    assert_same_rows(found[1], found[0], rel=1e-5)
    assert_same_rows(found[2], found[0], rel=1e-5)


def test_data_that_it_cannot_read_is_told(tmp_path: Path) -> None:
    save(tmp_path / "small", model_of())
    (tmp_path / "far.jsonl").write_text('{"input_ids": [0, 5]}\n')
    with pytest.raises(InputError, match="token 5, but the model's largest is 4"):
        memdiag.entropy(tmp_path / "small", data=str(tmp_path / "far.jsonl"))
    with pytest.raises(InputError, match="the model reads tokens"):
        memdiag.entropy(tmp_path / "small", data="task:modular-addition?p=5")
    with pytest.raises(InputError, match="give --data"):
        memdiag.entropy(tmp_path / "small")


# --- effective curves ----------------------------------------------------------------------------------------------


def test_effective_curves_by_hand() -> None:
    u, v, w = effective_curves(by_hand())
    assert (u.shape, v.shape, w.shape) == ((8, 2), (8, 2), (8, 2))
    # tokens are swapped by the output, doubled by the value and halved by attention; then (1, 1), (1, −1), (0, −1)
    assert u[:3].tolist() == [[1, 1], [-1, 1], [-1, 0]]
    assert v[:3].tolist() == [[2, 2], [0, 0], [-1, -1]]
    assert w[:3].tolist() == [[1, 0], [100, 1000], [100, 1000]]
    assert (u[3:] == 0).all()


def test_effective_curves_agree_with_a_loop_over_heads() -> None:
    model = model_of()
    block, u, v, w = model.blocks[0], *effective_curves(model)
    for k in (0, 7, 23):
        for m in range(5):
            embedding = model.token.weight[m]
            through = 0.0
            for h in range(3):
                value = block.value.weight[2 * h : 2 * h + 2] @ embedding
                through += float(block.mlp_in.weight[k] @ (block.output.weight[:, 2 * h : 2 * h + 2] @ value)) / 3
            assert u[k, m].item() == pytest.approx(through, abs=1e-5)
            assert v[k, m].item() == pytest.approx(through + float(block.mlp_in.weight[k] @ embedding), abs=1e-5)
        for q in range(4):
            assert w[k, q].item() == pytest.approx(
                sum(float(model.unembed.weight[q, i] * block.mlp_out.weight[i, k]) for i in range(6)), abs=1e-5
            )
    assert w.shape == (24, 4)


def test_with_even_attention_the_units_are_the_sum_of_their_curves() -> None:
    model, ids = model_of(), tokens(20, 3)
    model.blocks[0].query.weight.zero_()
    seen: list[Tensor] = []
    model.blocks[0].mlp_in.register_forward_hook(lambda module, args, output: seen.append(output))
    model.blocks[0].act.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(ids)
    u, v, w = effective_curves(model)
    before = seen[0][:, -1] - (u[:, ids[:, 0]] + u[:, ids[:, 1]] + v[:, ids[:, 2]]).T  # what the positions add
    torch.testing.assert_close(before, before[:1].expand_as(before), atol=1e-5, rtol=1e-5)
    silent = model_of()
    silent.load_state_dict(model.state_dict())
    silent.blocks[0].mlp_out.weight.zero_()
    torch.testing.assert_close(logits - silent(ids), seen[1][:, -1] @ w / 6, atol=1e-6, rtol=1e-5)


def test_units_that_read_waves_are_periodic_and_others_are_not() -> None:
    p = 31
    model = model_of(TransformerConfig(tokens=p, classes=p, width=8, heads=2))
    for embedding in (model.token, model.unembed):
        angle = 2 * math.pi * 4 * torch.arange(p) / p
        embedding.weight[:, 0::2], embedding.weight[:, 1::2] = angle.cos()[:, None], angle.sin()[:, None]
    curves = effective_curves(model)
    torch.testing.assert_close(fourier.ipr(*curves), torch.ones(32, dtype=torch.float64))
    assert (fourier.frequency(*curves) == 4).all()
    noise = fourier.ipr(*effective_curves(model_of(TransformerConfig(tokens=p, classes=p, width=8, heads=2))))
    assert (noise < fourier.HIGH).all()
