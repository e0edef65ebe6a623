"""The small convolutional network, and the scaling of inputs that it shares with the MLP."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memdiag import InputError, checkpoint, models
from memdiag.models.cnn import CNN, CnnConfig
from memdiag.models.mlp import MLP, MlpConfig
from memdiag.training import seeded


def made(config):
    with seeded(0):
        return CNN(config)


def test_it_is_what_its_docstring_says():
    model = made(CnnConfig((3, 9, 8), 5, (4, 6, 8)))
    names = [name for name, _ in model.layers.named_children()]
    assert names == [
        "conv_1", "act_1", "pool_1", "conv_2", "act_2", "pool_2", "conv_3", "act_3", "flatten", "linear",
    ]  # fmt: skip
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    out, layers = x, model.layers
    for i in (1, 2, 3):
        conv = getattr(layers, f"conv_{i}")
        out = F.relu(F.conv2d(out, conv.weight, conv.bias, padding=1))
        out = F.max_pool2d(out, 2) if i < 3 else out
    torch.testing.assert_close(model(x), F.linear(out.flatten(1), layers.linear.weight, layers.linear.bias))
    assert model(x).shape == (2, 5)


def test_images_too_small_to_halve_are_not_halved():
    model = made(CnnConfig((1, 2, 3), 2, (2, 2, 2)))
    assert [name for name, m in model.layers.named_children() if isinstance(m, nn.MaxPool2d)] == ["pool_1"]
    assert model(torch.zeros(1, 1, 2, 3)).shape == (1, 2)


def test_one_channel_may_be_left_out():
    model = made(CnnConfig((1, 4, 4), 3, (2,)))
    x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), model(x[:, None]))
    with pytest.raises(ValueError, match=r"takes images of shape \[1, 4, 4\], got \[1, 5, 4\]"):
        model(torch.zeros(2, 5, 4))


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_scaled_inputs_are_as_if_they_had_been_scaled_before(kind):
    x = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    plain = CNN(CnnConfig((1, 3, 3), 2, (2,))) if kind == "cnn" else MLP(MlpConfig((9, 4, 2)))
    scaled = (
        CNN(CnnConfig((1, 3, 3), 2, (2,), 2.0, 5.0))
        if kind == "cnn"
        else MLP(MlpConfig((9, 4, 2), input_mean=2.0, input_std=5.0))
    )
    scaled.load_state_dict(plain.state_dict())
    torch.testing.assert_close(scaled(x), plain((x - 2.0) / 5.0))


@pytest.mark.parametrize(
    "model",
    [CNN(CnnConfig((1, 4, 4), 3, (2, 3), 0.25, 1.5)), MLP(MlpConfig((4, 3, 2), input_mean=-0.5, input_std=0.1))],
    ids=["cnn", "mlp"],
)
def test_a_saved_checkpoint_is_the_same_model(tmp_path, model):
    checkpoint.save(tmp_path / "c", model, task="task:digits")
    (found,) = checkpoint.open_checkpoints(tmp_path / "c")
    again = found.load()
    assert again.config == model.config
    assert found.task == "task:digits"
    x = (
        torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        if isinstance(model, CNN)
        else torch.ones(3, 4)
    )
    assert torch.equal(again(x), model.eval()(x))


def test_no_scaling_leaves_no_trace_in_the_config():
    for config in (CnnConfig((1, 4, 4), 3), MlpConfig((4, 3, 2))):
        assert not {"input_mean", "input_std"} & set(config.to_json())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [1, 4]}, "shape must be channels, height and width"),
        ({"shape": [1, 4, 10**9]}, "shape must be channels, height and width"),
        ({"shape": "big"}, "must hold shape and widths"),
        ({"classes": None}, "must hold shape and widths"),
        ({"widths": []}, "widths must be 1 to 100 numbers"),
        ({"widths": [0]}, "widths and classes must be whole numbers"),
        ({"classes": 0}, "widths and classes must be whole numbers"),
        ({"input_mean": "0"}, "input_mean must be a finite number"),
        ({"input_mean": float("nan")}, "input_mean must be a finite number"),
        ({"input_std": 0}, "input_std must be a finite number above 0"),
        ({"input_std": True}, "input_std must be a finite number above 0"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path, change, message):
    config = CnnConfig((1, 4, 4), 3).to_json() | change
    with pytest.raises(InputError, match=message):
        models.build(config)
    checkpoint.save(tmp_path / "c", made(CnnConfig((1, 4, 4), 3)))
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        checkpoint.open_checkpoints(tmp_path / "c")[0].load()


def test_a_damaged_scaling_of_an_mlp_is_refused():
    for std in (0, -1, float("inf"), None, "1"):
        with pytest.raises(InputError, match="input_std must be a finite number above 0"):
            models.build(MlpConfig((4, 2)).to_json() | {"input_std": std})
