"""A small convolutional network that classifies images: 3 x 3 convolutions, halved in size between two of them.

Axes: b example, c channel, h height, w width, k class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memdiag.models.mlp import check_scaling, scaled, scaling_to_json

MAX_LAYERS = 100  # far above what can be halved in size; a damaged config must not build millions of modules
MAX_WIDTH, MAX_SIDE = 2**16, 2**14


@dataclass(frozen=True)
class CnnConfig:
    """Settings of a CNN; the field names are the keys of its config.json."""

    shape: tuple[int, int, int]  # of an image: c, h, w
    classes: int
    widths: tuple[int, ...] = (32, 64)  # channels of each convolution
    input_mean: float = 0.0  # of the training features: what comes in is shifted and scaled by them
    input_std: float = 1.0

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or not all(type(n) is int and 0 < n <= MAX_SIDE for n in self.shape):
            raise ValueError(f"shape must be channels, height and width, 1 to {MAX_SIDE}, got {str(self.shape)[:40]}")
        if not 1 <= len(self.widths) <= MAX_LAYERS:
            raise ValueError(f"widths must be 1 to {MAX_LAYERS} numbers, got {len(self.widths)}")
        if not all(type(n) is int and 0 < n <= MAX_WIDTH for n in (*self.widths, self.classes)):
            raise ValueError(f"widths and classes must be whole numbers from 1 to {MAX_WIDTH}")
        check_scaling(self.input_mean, self.input_std)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> CnnConfig:
        """The settings found in a parsed config.json. Raises ValueError where they make no CNN."""
        shape, widths, classes = config.get("shape"), config.get("widths"), config.get("classes")
        if not isinstance(shape, list) or not isinstance(widths, list) or type(classes) is not int:
            raise ValueError("its config must hold shape and widths (lists of numbers) and classes (a number)")
        scaling = {name: config[name] for name in ("input_mean", "input_std") if name in config}
        return cls(tuple(shape), classes, tuple(widths), **scaling)

    def to_json(self) -> dict[str, Any]:
        """What config.json holds, but for the task and the dtype; scaling only where there is any."""
        return {
            "model_type": "memdiag-cnn",
            "shape": list(self.shape),
            "classes": self.classes,
            "widths": list(self.widths),
            **scaling_to_json(self.input_mean, self.input_std),
        }


class CNN(nn.Module):
    """conv_1, act_1, pool_1, conv_2, act_2, ..., and a linear read-out of all positions, `linear`.

    The activation is a module of its own, so that a hook on `act_l` sees the neurons of layer l. Images are halved by
    `pool_l` (the largest of 2 x 2) between two convolutions, while both sides have at least two pixels.
    """

    def __init__(self, config: CnnConfig) -> None:
        super().__init__()
        self.config = config
        n_in, height, width = config.shape
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for layer, n_out in enumerate(config.widths, start=1):
            layers[f"conv_{layer}"] = nn.Conv2d(n_in, n_out, 3, padding=1)
            layers[f"act_{layer}"] = nn.ReLU()
            if layer < len(config.widths) and min(height, width) >= 2:
                layers[f"pool_{layer}"] = nn.MaxPool2d(2)
                height, width = height // 2, width // 2
            n_in = n_out
        layers["flatten"] = nn.Flatten()
        layers["linear"] = nn.Linear(n_in * height * width, config.classes)
        self.layers = nn.Sequential(layers)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, k) of images (b, c, h, w); those of one channel may come as (b, h, w)."""
        if features.ndim == 3:
            features = features[:, None]
        if features.shape[1:] != torch.Size(self.config.shape):
            raise ValueError(f"takes images of shape {list(self.config.shape)}, got {list(features.shape[1:])}")
        out: Tensor = self.layers(scaled(features, self.config.input_mean, self.config.input_std))
        return out
