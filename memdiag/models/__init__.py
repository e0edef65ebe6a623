"""The small models that the tasks train, and how one is built again from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from memdiag.errors import InputError, unknown
from memdiag.models.cnn import CNN, CnnConfig
from memdiag.models.mlp import MLP, MlpConfig
from memdiag.models.transformer import Transformer, TransformerConfig

MODEL_TYPES = ("memdiag-cnn", "memdiag-mlp", "memdiag-transformer")


def build(config: Mapping[str, Any]) -> nn.Module:
    """The module that a memdiag config.json describes, with fresh weights.

    Args:
        config: the parsed file; `model_type` says which model, its other keys are that model's settings, and
            keys that are no settings (`memdiag_task`, `dtype`) are passed over. Nothing in it is ever executed.
    Raises:
        InputError: an unknown model_type, a missing setting, or a value that makes no model.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise unknown("model_type", str(model_type), MODEL_TYPES)
    try:
        if model_type == "memdiag-mlp":
            return MLP(MlpConfig.from_json(config))
        if model_type == "memdiag-cnn":
            return CNN(CnnConfig.from_json(config))
        return Transformer(TransformerConfig.from_json(config))
    except ValueError as error:
        raise InputError(f"{model_type}: {error}") from None
