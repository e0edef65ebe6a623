"""A multilayer perceptron. Axes: b example, i input feature, k output (a logit per class)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

MAX_LAYERS = 1000  # far above any real MLP; a damaged config must not build millions of modules


class Square(nn.Module):
    """x², the activation under which a two-layer network learns modular arithmetic (Gromov 2023, arXiv:2301.02679)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square()


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "square": Square,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True)
class MlpConfig:
    """Settings of an MLP; the field names are the keys of its config.json."""

    widths: tuple[int, ...]  # input features, hidden layers, outputs
    activation: str = "relu"
    bias: bool = True
    norm: str = "none"  # none, batch or layer, after the activation
    dropout: float = 0.0  # before the activation
    input_mean: float = 0.0  # of the training features: what comes in is shifted and scaled by them
    input_std: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= len(self.widths) <= MAX_LAYERS:
            raise ValueError(f"widths must be 2 to {MAX_LAYERS} numbers (inputs ... outputs), got {len(self.widths)}")
        if not all(type(width) is int and 0 < width < 2**30 for width in self.widths):  # a matrix's bytes fit int64
            raise ValueError(f"widths must be whole numbers > 0, got {str(list(self.widths))[:80]}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {str(self.activation)[:40]!r}")
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias must be true or false, got {str(self.bias)[:40]!r}")
        if self.norm not in ("none", *NORMS):
            raise ValueError(f"norm must be one of none, {', '.join(NORMS)}, got {str(self.norm)[:40]!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {str(self.dropout)[:40]}")
        check_scaling(self.input_mean, self.input_std)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> MlpConfig:
        """The settings found in a parsed config.json. Raises ValueError where they make no MLP."""
        widths, activation, norm = config.get("widths"), config.get("activation", "relu"), config.get("norm", "none")
        if not isinstance(widths, list) or not isinstance(activation, str) or not isinstance(norm, str):
            raise ValueError("its config must hold widths (a list of numbers), activation and norm (names)")
        scaling = {name: config[name] for name in ("input_mean", "input_std") if name in config}
        return cls(tuple(widths), activation, config.get("bias", True), norm, config.get("dropout", 0.0), **scaling)

    def to_json(self) -> dict[str, Any]:
        """What config.json holds, but for the task and the dtype; norm, dropout, scaling only where there are any."""
        return {
            "model_type": "memdiag-mlp",
            "widths": list(self.widths),
            "activation": self.activation,
            "bias": self.bias,
            **({"norm": self.norm} if self.norm != "none" else {}),
            **({"dropout": self.dropout} if self.dropout else {}),
            **scaling_to_json(self.input_mean, self.input_std),
        }


def check_scaling(mean: object, std: object) -> None:
    """Raise ValueError where a mean and a standard deviation of features are none."""
    if type(mean) not in (int, float) or not abs(mean) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"input_mean must be a finite number, got {str(mean)[:40]}")
    if type(std) not in (int, float) or not 0 < std < math.inf:  # type: ignore[operator]
        raise ValueError(f"input_std must be a finite number above 0, got {str(std)[:40]}")


def scaling_to_json(mean: float, std: float) -> dict[str, float]:
    """The two keys of a config.json, where they change anything."""
    return {} if (mean, std) == (0.0, 1.0) else {"input_mean": mean, "input_std": std}


def scaled(features: Tensor, mean: float, std: float) -> Tensor:
    """(features − mean) / std."""
    return features if (mean, std) == (0.0, 1.0) else (features - mean) / std


NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class MLP(nn.Module):
    """Linear layers with one activation between each two: linear_1, act_1, linear_2, ... linear_L.

    The activation is a module of its own, so that a hook on `act_l` sees the neurons of hidden layer l. Where the
    config asks for them, `drop_l` comes before it and `norm_l` after it.
    """

    def __init__(self, config: MlpConfig) -> None:
        super().__init__()
        self.config = config
        n_layers = len(config.widths) - 1
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for layer, (n_in, n_out) in enumerate(pairwise(config.widths), start=1):
            layers[f"linear_{layer}"] = nn.Linear(n_in, n_out, bias=config.bias)
            if layer == n_layers:
                break
            if config.dropout:
                layers[f"drop_{layer}"] = nn.Dropout(config.dropout)
            layers[f"act_{layer}"] = ACTIVATIONS[config.activation]()
            if config.norm != "none":
                layers[f"norm_{layer}"] = NORMS[config.norm](n_out)
        self.layers = nn.Sequential(layers)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, k) of features (b, ...), whose trailing axes are flattened to (b, i)."""
        features = scaled(features, self.config.input_mean, self.config.input_std)
        out: Tensor = self.layers(torch.flatten(features, start_dim=1))
        return out
