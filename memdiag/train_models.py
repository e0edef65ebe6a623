"""The model that `memdiag train` starts from: of --arch, made to fit the examples, or of --config or --model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from memdiag import checkpoint as checkpoints
from memdiag import observe, training
from memdiag.checkpoint import build
from memdiag.checkpoint.guard import refusing
from memdiag.errors import InputError
from memdiag.models.cnn import CNN, CnnConfig
from memdiag.models.mlp import MLP, MlpConfig
from memdiag.models.transformer import Transformer, TransformerConfig
from memdiag.packing import Corpus
from memdiag.reading import vocab_size
from memdiag.supervised import Examples
from memdiag.train_report import DEFAULT_CONFIG, TrainOptions

WIDTHS = {"mlp": 128, "cnn": 32, "transformer": 128}
DEPTH = 2
CHUNK = 4096  # examples looked at at once

New = Callable[[int], nn.Module]  # makes the model at update 0, of a seed always the same


def given_model(options: TrainOptions, *, language: bool) -> tuple[str, dict[str, Any] | None, New]:
    """Name, config and maker of the model that --model or --config names; the config is None for a factory's.

    Args:
        language: whether it is to predict the next token.
    Raises:
        InputError: there is no such factory or config, or it makes no model that can be trained.
    """
    if options.model is not None:
        return options.model, None, _of_factory(options.model, language)
    name = options.config or DEFAULT_CONFIG
    config = checkpoints.read_config(name)

    def new(seed: int) -> nn.Module:
        model = checkpoints.new_model(name, config, seed)
        _check_causal(name, model)
        return model

    return name, config, new


def _check_causal(name: str, model: nn.Module) -> None:
    with refusing(f"{name}: its model cannot run"):
        is_causal = observe.predicts_next_token(model.eval(), torch.arange(2)[None])
    if vocab_size(model) is None or not is_causal:
        raise InputError(f"{name}: is no causal language model: its logits at a token depend on later ones")


def _of_factory(factory: str, language: bool) -> New:
    make = build.imported(factory)

    def new(seed: int) -> nn.Module:
        with refusing(f"{factory} failed"), training.seeded(seed):
            model = make()
        if not isinstance(model, nn.Module) or next(model.parameters(), None) is None:
            raise InputError(f"{factory} returned a {type(model).__name__}; wanted a torch.nn.Module with weights")
        if language:
            _check_causal(factory, model)
        return model.float()

    return new


def fitting_model(
    where: str, examples: Examples, options: TrainOptions, n_tokens: int | None
) -> tuple[str, dict[str, Any], New]:
    """Name, config and maker of a classifier of --arch that fits the examples.

    Args:
        where: the dataset, for errors.
        n_tokens: of the tokenizer; None: as many as the examples need.
    Raises:
        InputError: it cannot be made for these examples.
    """
    inputs = examples.inputs
    assert examples.labels is not None
    classes = int(examples.labels.max()) + 1
    arch = options.arch or ("transformer" if isinstance(inputs, Corpus) else "mlp")
    width, depth = options.width or WIDTHS[arch], options.depth or DEPTH
    with _making(arch):
        if isinstance(inputs, Corpus):
            tokens, positions = n_tokens or int(inputs.tokens.max()) + 1, int(inputs.lengths.max())
            config = TransformerConfig(tokens=tokens, classes=classes, positions=positions, width=width)
            return arch, config.to_json(), lambda seed: Transformer(config, torch.Generator().manual_seed(seed))
        mean, std = _scaling(inputs) if options.standardize is not False else (0.0, 1.0)
        if arch == "cnn":
            widths = tuple(width * 2**i for i in range(depth))
            images = CnnConfig(_image_shape(where, inputs.shape[1:]), classes, widths, mean, std)
            return arch, images.to_json(), lambda seed: _seeded(lambda: CNN(images), seed)
        sizes = (int(np.prod(inputs.shape[1:])), *[width] * depth, classes)
        layers = MlpConfig(sizes, input_mean=mean, input_std=std)
        return arch, layers.to_json(), lambda seed: _seeded(lambda: MLP(layers), seed)


def digest(model: nn.Module) -> str:
    """sha256 (hex) of the name, dtype, shape and bytes of every tensor of a module."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return found.hexdigest()


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with training.seeded(seed):
        return make()


@contextmanager
def _making(arch: str) -> Iterator[None]:
    """A ValueError of a config as an InputError that names the architecture."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"--arch {arch}: {error}") from None


def _image_shape(where: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, height and width of features of that shape."""
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if len(shape) != 3:
        hint = "; task:digits has them with ?shape=image" if where.startswith("task:digits") else ""
        raise InputError(f"{where}: features have shape {list(shape)}; --arch cnn wants channels, height, width{hint}")
    if shape[2] <= 4 < shape[0]:
        raise InputError(f"{where}: features have shape {list(shape)}; --arch cnn wants the channels first")
    return shape[0], shape[1], shape[2]


def _scaling(features: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and standard deviation of all numbers; 1 for the latter where all are the same."""

    def total(of: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> float:
        parts = (features[i : i + CHUNK].astype(np.float64) for i in range(0, len(features), CHUNK))
        return sum(float(of(part).sum()) for part in parts)

    mean = total(lambda part: part) / features.size
    variance = total(lambda part: (part - mean) ** 2) / features.size
    return mean, variance**0.5 or 1.0
