import math

import pytest
import torch

from memdiag import models
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


def test_config_round_trip():
    config = MlpConfig((4, 3, 2), activation="square", bias=False)
    assert MlpConfig.from_json(config.to_json() | {"memdiag_task": "task:digits"}) == config
    assert isinstance(models.build(config.to_json()), MLP)


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
        ({"model_type": "memdiag-mlp", "widths": [4, 2], "bias": 1}, "bias"),
    ],
)
def test_configs_that_make_no_model_are_refused(config, says):
    with pytest.raises(InputError, match=says) as caught:
        models.build(config)
    assert "\n" not in str(caught.value)
