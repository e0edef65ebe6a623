"""How `memdiag train` trains when it is not told, and what that would take."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch

from memdiag import device as devices
from memdiag import training
from memdiag.supervised import Run
from memdiag.train_inputs import Inputs, open_inputs
from memdiag.train_report import TrainOptions
from memdiag.training import Recipe

SGD_LR, ADAMW_LR = 0.1, 1e-3


@dataclass(frozen=True)
class Settled:
    """What holds where the user does not say."""

    epochs: int = 60
    batch_size: int = 64
    optimizer: str = "sgd"
    adamw_lr: float = ADAMW_LR
    weight_decay: float = 0.0
    clip: float = 0.0


FEATURES, TOKENS = Settled(), Settled(optimizer="adamw")
TRANSFORMER = Settled(optimizer="adamw", adamw_lr=0.01)  # ours divides its logits by its width
LANGUAGE = Settled(epochs=5, batch_size=32, optimizer="adamw", adamw_lr=2e-3, weight_decay=0.01, clip=1.0)


def settled(inputs: Inputs) -> Settled:
    """The settings for what is trained on what."""
    if inputs.language:
        return LANGUAGE
    if inputs.train.kind == "features":
        return FEATURES
    return TOKENS if inputs.config is None else TRANSFORMER


def recipe_of(inputs: Inputs, n: int | None = None) -> tuple[int, Recipe]:
    """How many passes, and the loop's settings; an update has no more examples than there are.

    The last update ends with the last pass, and may have fewer than the others.

    Args:
        n: examples of a pass; None: all there are.
    """
    options, usual, n = inputs.options, settled(inputs), n or len(inputs.examples)
    epochs, optimizer = options.epochs or usual.epochs, options.optimizer or usual.optimizer
    batch_size = min(options.batch_size or usual.batch_size, n)
    steps = -(-epochs * n // batch_size)
    warmup = min(100, steps // 20) if inputs.language else 0
    return epochs, Recipe(
        steps=steps,
        batch_size=batch_size,
        lr=options.lr or (SGD_LR if optimizer == "sgd" else usual.adamw_lr),
        schedule=options.schedule,
        warmup=warmup if options.warmup is None else options.warmup,
        optimizer=optimizer,
        weight_decay=usual.weight_decay if options.weight_decay is None else options.weight_decay,
        clip=usual.clip if options.clip is None else options.clip,
        seed=options.seed,
    )


def autocast_of(inputs: Inputs, device: torch.device) -> torch.dtype | None:
    """What the matrix products are done in: bfloat16 for a language model on a device made for it, unless told."""
    dtype = inputs.options.dtype
    if dtype == "auto":
        fits = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fits and inputs.language else None
    return torch.bfloat16 if dtype == "bfloat16" else None


def plan(options: TrainOptions) -> dict[str, object]:
    """What `run` would take, from a few timed updates; writes nothing."""
    inputs = open_inputs(options)
    target = devices.resolve(options.device)
    model = inputs.new(options.seed).to(target)
    epochs, recipe = recipe_of(inputs)
    at = training.begin(model, recipe)
    run = Run(at, recipe, inputs.examples, epochs, inputs.pad_id, autocast_of(inputs, target), inputs.name)
    times, began = [], time.perf_counter()
    for _ in training.train(at, dataclasses.replace(recipe, steps=min(5, recipe.steps)), run.backward):
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
    n_weights = sum(p.numel() for p in model.parameters())
    saves = epochs if options.save_every is None else -(-recipe.steps // options.save_every)
    n = len(inputs.examples)
    return {
        "model": inputs.name,
        "weights": n_weights,
        "data": inputs.train.name,
        "examples": n,
        "held_out": len(inputs.held_out) if inputs.held_out is not None else 0,
        "corrupted": None if inputs.corrupted is None else int(inputs.corrupted.sum()),
        "epochs": epochs,
        "updates": recipe.steps,
        "device": devices.describe(target),
        "seconds_expected": round(min(times) * recipe.steps, 1),
        "memory_expected_mb": round(devices.peak_memory() / 2**20),
        "disk_expected_kb": round((saves + 1) * n_weights * 4 / 1024 + epochs * n * 24 / 1024 + n_weights * 12 / 1024),
    }
