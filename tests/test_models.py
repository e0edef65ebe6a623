import json
import math

import pytest
import torch
from torch import nn

from memdiag import models
from memdiag.checkpoint import open_checkpoints, save
from memdiag.errors import InputError
from memdiag.models.mlp import ACTIVATIONS, MLP, MlpConfig


def test_by_hand():
    model = MLP(MlpConfig((2, 2, 1)))
    with torch.no_grad():
        model.layers.linear_1.weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
        model.layers.linear_1.bias.copy_(torch.tensor([0.5, 0.0]))
        model.layers.linear_2.weight.copy_(torch.tensor([[3.0, 10.0]]))
        model.layers.linear_2.bias.copy_(torch.tensor([-1.0]))
    # relu(1 + 4 + 0.5, -1) = (5.5, 0); 3 * 5.5 - 1
    assert model(torch.tensor([[1.0, 2.0]])).item() == pytest.approx(15.5)


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("square", lambda x: x * x),
        ("relu", lambda x: max(x, 0.0)),
        ("tanh", math.tanh),
        ("identity", lambda x: x),
        ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
    ],
)
def test_activations_are_their_formulas(activation, formula):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    found = ACTIVATIONS[activation]()(x)
    torch.testing.assert_close(found, torch.tensor([formula(v) for v in x.tolist()], dtype=torch.float64))


def test_agrees_with_a_plain_loop():
    torch.manual_seed(0)
    model = MLP(MlpConfig((5, 4, 3, 2), activation="square", bias=False)).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    out = x
    for layer in (1, 2, 3):
        out = out @ model.state_dict()[f"layers.linear_{layer}.weight"].T
        out = out * out if layer < 3 else out
    torch.testing.assert_close(model(x), out)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_images_are_flattened_and_any_batch_goes(n):
    model = MLP(MlpConfig((64, 8, 10)))
    images = torch.rand(n, 1, 8, 8)
    assert model(images).shape == (n, 10)
    torch.testing.assert_close(model(images), model(images.reshape(n, 64)))


def test_neurons_can_be_hooked_after_their_activation():
    model = MLP(MlpConfig((3, 4, 5, 2)))
    assert [name for name, _ in model.layers.named_children()] == ["linear_1", "act_1", "linear_2", "act_2", "linear_3"]


def test_dropout_comes_before_the_activation_and_the_norm_after_it():
    model = MLP(MlpConfig((3, 4, 5, 2), norm="batch", dropout=0.5))
    assert [name for name, _ in model.layers.named_children()] == [
        "linear_1", "drop_1", "act_1", "norm_1", "linear_2", "drop_2", "act_2", "norm_2", "linear_3",
    ]  # fmt: skip
    assert [type(model.layers.norm_1), model.layers.norm_1.num_features] == [nn.BatchNorm1d, 4]
    layer = MLP(MlpConfig((3, 4, 2), norm="layer")).layers
    assert [type(layer.norm_1), layer.norm_1.normalized_shape] == [nn.LayerNorm, (4,)]


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_norms_by_hand(norm):
    model = MLP(MlpConfig((1, 2, 1), activation="square", bias=False, norm=norm)).double()
    with torch.no_grad():
        model.layers.linear_1.weight.copy_(torch.tensor([[1.0], [2.0]]))
        model.layers.linear_2.weight.copy_(torch.tensor([[10.0, 1.0]]))
        model.layers.norm_1.weight.copy_(torch.tensor([3.0, 5.0]))
        model.layers.norm_1.bias.copy_(torch.tensor([0.0, 7.0]))
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    # activations (1, 4) and (9, 36): over the batch z = ∓1 in both, over the layer z = (−1, 1) in both
    first = (-3 * 10 - 5 + 7, 3 * 10 + 5 + 7) if norm == "batch" else (-3 * 10 + 5 + 7,) * 2
    assert model(x).flatten().tolist() == pytest.approx(first, rel=1e-4)
    if norm == "batch":  # in eval mode the running mean and variance, of which one step of 0.1 is taken
        mean, var = torch.tensor([0.5, 2.0]), torch.tensor([0.9 + 0.1 * 32, 0.9 + 0.1 * 512])
        z = (torch.tensor([[1.0, 4.0], [9.0, 36.0]]) - mean) / (var + 1e-5).sqrt()
        expected = 10 * 3 * z[:, 0] + 5 * z[:, 1] + 7
        torch.testing.assert_close(model.eval()(x).flatten(), expected.double())
    else:
        torch.testing.assert_close(model.eval()(x), model.train()(x))


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_no_dropout_in_eval_mode(norm):
    model = MLP(MlpConfig((4, 32, 2), norm=norm, dropout=0.5)).eval()
    without = MLP(MlpConfig((4, 32, 2), norm=norm)).eval()
    without.load_state_dict(model.state_dict())
    x = torch.rand(5, 4)
    assert torch.equal(model(x), without(x))
    assert not torch.allclose(model.train()(x), without.train()(x))


def test_a_dropped_square_is_larger_on_average_by_what_is_kept():
    """E[(x m / (1 − p))²] = x² / (1 − p): the square comes after the dropout, so evaluation has smaller logits."""
    torch.manual_seed(0)
    model = MLP(MlpConfig((1, 40_000, 1), activation="square", bias=False, dropout=0.2))
    with torch.no_grad():
        model.layers.linear_1.weight.fill_(3)
        model.layers.linear_2.weight.fill_(1 / 40_000)
    assert model.eval()(torch.ones(1, 1)).item() == pytest.approx(9, rel=1e-4)
    assert model.train()(torch.ones(1, 1)).item() == pytest.approx(9 / 0.8, rel=0.02)  # 8 σ


@pytest.mark.parametrize(
    "config",
    [
        MlpConfig((4, 3, 2), activation="square", bias=False),
        MlpConfig((4, 3, 2), norm="batch", dropout=0.25),
        MlpConfig((4, 3, 2), norm="layer"),
    ],
)
def test_config_round_trip(config):
    assert MlpConfig.from_json(config.to_json() | {"memdiag_task": "task:digits"}) == config
    assert MlpConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    built = models.build(config.to_json())
    assert isinstance(built, MLP)
    assert built.config == config


def test_a_config_from_before_norm_and_dropout_has_none():
    assert MlpConfig.from_json({"widths": [4, 3, 2], "activation": "relu", "bias": True}) == MlpConfig((4, 3, 2))
    assert MlpConfig.from_json({"widths": [4, 2]}) == MlpConfig((4, 2))


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_checkpoint_round_trip(tmp_path, norm):
    model = MLP(MlpConfig((4, 8, 2), activation="square", bias=False, norm=norm, dropout=0.3))
    model.train()(torch.rand(6, 4))  # moves the running statistics
    save(tmp_path / "mlp", model)
    loaded = open_checkpoints(tmp_path / "mlp")[0].load()
    x = torch.rand(5, 4)
    assert torch.equal(loaded(x), model.eval()(x))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "no model_type 'None'"),
        ({"model_type": "memdiag-mpl"}, "did you mean 'memdiag-mlp'"),
        ({"model_type": "memdiag-mlp"}, "widths"),
        ({"model_type": "memdiag-mlp", "widths": "64"}, "widths"),
        ({"model_type": "memdiag-mlp", "widths": [64]}, "2 to 1000"),
        ({"model_type": "memdiag-mlp", "widths": [4] * 5000}, "2 to 1000"),
        ({"model_type": "memdiag-mlp", "widths": [4, "a"]}, "whole numbers"),
        ({"model_type": "memdiag-mlp", "widths": [4, True]}, "whole numbers"),
        ({"model_type": "memdiag-mlp", "widths": [4, -1]}, "whole numbers"),
        ({"model_type": "memdiag-mlp", "widths": [4, 2**40]}, "whole numbers"),
        ({"model_type": "memdiag-mlp", "widths": [4, 2], "activation": "sigmoidal"}, "gelu, identity, relu"),
        ({"model_type": "memdiag-mlp", "widths": [4, 2], "activation": ["relu"]}, "activation"),
        ({"model_type": "memdiag-mlp", "widths": [2**30, 2**30]}, "whole numbers"),
        ({"model_type": "memdiag-mlp", "widths": [4, 2], "bias": 1}, "bias"),
        ({"model_type": "memdiag-mlp", "widths": [4, 2], "norm": "bath"}, "none, batch, layer, got 'bath'"),
        ({"model_type": "memdiag-mlp", "widths": [4, 2], "norm": None}, "norm"),
        ({"model_type": "memdiag-mlp", "widths": [4, 2], "norm": ["batch"]}, "norm"),
        ({"model_type": "memdiag-mlp", "widths": [4, 2], "dropout": 1}, "less than 1, got 1"),
        ({"model_type": "memdiag-mlp", "widths": [4, 2], "dropout": -0.5}, "at least 0"),
        ({"model_type": "memdiag-mlp", "widths": [4, 2], "dropout": math.nan}, "at least 0"),
        ({"model_type": "memdiag-mlp", "widths": [4, 2], "dropout": "0.5"}, "dropout"),
        ({"model_type": "memdiag-mlp", "widths": [4, 2], "dropout": True}, "dropout"),
    ],
)
def test_configs_that_make_no_model_are_refused(config, says):
    with pytest.raises(InputError, match=says) as caught:
        models.build(config)
    assert "\n" not in str(caught.value)


def test_the_largest_config_takes_no_memory_until_it_is_known_to_fit():
    with torch.device("meta"):
        model = models.build({"model_type": "memdiag-mlp", "widths": [2**30 - 1] * 3})
    assert model.layers.linear_1.weight.shape == (2**30 - 1, 2**30 - 1)
