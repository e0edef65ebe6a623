"""The training loop: a plain generator that yields update after update, and can be taken up again at any of them.

What an update is computed from stands in the caller's `backward`; here are the order of the examples, the learning
rate, clipping, the optimizer, and the state on the disk. Everything random is a function of (seed, update), so that
nothing but weights, moments and the number of updates has to be kept for the loop to go on bit for bit.

With several processes each has its own `Training`; see `distribute`.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from memdiag import observe
from memdiag.errors import InputError, one_line, unknown

Result = TypeVar("Result")
SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "sgd")
FINAL_LR = 0.1  # of cosine and linear, as a share of --lr
DAMAGED = ("is damaged", "--force starts afresh")  # what a state is, and what to do
CONSTANT_SHARE = 0.6  # of the updates, before a linear schedule begins to fall (modded-nanoGPT)


@dataclass(frozen=True)
class Recipe:
    """How the weights move; the field names are the commands' option names."""

    steps: int
    batch_size: int  # examples of an update, over all processes
    accumulate: int = 1  # parts that an update is computed in
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 0  # updates
    optimizer: str = "adamw"
    weight_decay: float = 0.1  # of matrices only; decoupled with adamw
    beta2: float = 0.95  # 0.9 is the first, and SGD's momentum
    clip: float = 1.0  # the longest gradient, 0 for any
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("steps", "warmup"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} must be at least 0, got {getattr(self, name)}")
        for name in ("batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.batch_size < self.accumulate:
            raise InputError(f"--accumulate {self.accumulate} parts cannot be made of --batch-size {self.batch_size}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"--lr must be a finite number above 0, got {self.lr}")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')} must be a finite number >= 0, got {getattr(self, name)}")
        if not 0 <= self.beta2 < 1:
            raise InputError(f"--beta2 must be at least 0 and less than 1, got {self.beta2}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must be at least 0 and less than 2^32, got {self.seed}")

    def lr_at(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)  # 0 … 1
        if self.schedule == "cosine":
            return self.lr * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * done)))
        if self.schedule == "linear":
            return self.lr * (1 - (1 - FINAL_LR) * max(0.0, (done - CONSTANT_SHARE) / (1 - CONSTANT_SHARE)))
        return self.lr


class Diverged(Exception):
    """The loss or its gradient is not a finite number; the weights are those before that update."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"the {what} of update {step + 1} is not finite")
        self.step, self.what = step, what


@dataclass(frozen=True)
class Update(Generic[Result]):
    """One update that was made."""

    step: int  # updates made so far
    lr: float
    grad_norm: float  # before clipping
    result: Result  # what `backward` returned


@dataclass
class Training:
    """A model in training. `runs` is what is called: the model itself, or what PyTorch wrapped around it."""

    model: nn.Module
    runs: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0  # updates made


# -- order and chance ----------------------------------------------------------------------------------------------


def rows_of_update(step: int, n: int, batch_size: int, seed: int) -> NDArray[np.int64]:
    """The examples of update `step` (from 0), (batch_size,): epoch after epoch, each a new permutation of all n."""
    first = step * batch_size
    at = np.arange(first, first + batch_size)
    epochs = at // n
    return np.concatenate([_permutation(n, seed, int(e))[at[epochs == e] % n] for e in np.unique(epochs)])


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(n)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """What layers draw inside the block (dropout, initial weights) depends on the key alone; nothing leaks out."""
    state = np.random.SeedSequence(key).generate_state(2)
    with torch.random.fork_rng():
        torch.random.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
        yield


# -- the loop ------------------------------------------------------------------------------------------------------


def train(
    training: Training, recipe: Recipe, backward: Callable[[int], tuple[float, Result]]
) -> Iterator[Update[Result]]:
    """Make the updates that are left, and yield each when it is made; stop whenever you like.

    Args:
        training: at any step; it is changed in place.
        backward: given the number of the update (from 0), leaves the gradient of its loss in `.grad` and returns the
            loss, and whatever the caller wants to hear again. The gradient must be the same on every process.
    Raises:
        Diverged: the loss or the gradient of an update is not finite. It was not made.
    """
    while training.step < recipe.steps:
        step, rank = training.step, dist.get_rank() if dist.is_initialized() else 0
        lr = recipe.lr_at(step)
        for group in training.optimizer.param_groups:
            group["lr"] = lr
        with seeded(recipe.seed, step, rank):
            loss, result = backward(step)
        if not math.isfinite(loss):
            training.optimizer.zero_grad(set_to_none=True)
            raise Diverged(step, "loss")
        total = nn.utils.clip_grad_norm_(training.model.parameters(), recipe.clip or math.inf)
        norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
        if not math.isfinite(norm):
            training.optimizer.zero_grad(set_to_none=True)
            raise Diverged(step, "gradient")
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)
        training.step += 1
        yield Update(training.step, lr, norm, result)


def begin(model: nn.Module, recipe: Recipe, *, shard: bool = False) -> Training:
    """The model at update 0, distributed over the processes there are.

    Args:
        shard: give each process a part of the weights, gradients and moments (FSDP2), block by block; otherwise
            each has all of them (DDP).
    """
    model = model.train().requires_grad_(True)
    if shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        kind = next(model.parameters()).device.type
        mesh = init_device_mesh(kind, (dist.get_world_size(),))
        for _, block in observe.blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, recipe.beta2), fused=not shard)
    runs: nn.Module = model
    if dist.is_initialized() and not shard:
        device = next(model.parameters()).device
        runs = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    return Training(model, runs, optimizer)


def sum_over_processes(values: Tensor) -> Tensor:
    """Σ over the processes, in float64 on the CPU; what a process alone has, if there is one."""
    total = values.detach().double().cpu()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


# -- state on the disk ---------------------------------------------------------------------------------------------


def save_state(directory: Path, training: Training, extra: Mapping[str, Any]) -> None:
    """Weights, moments and the number of updates, as safetensors and JSON, in one step; every process calls it.

    A sharded model is written in shards, and read back by any number of processes.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    first = not dist.is_initialized() or dist.get_rank() == 0
    partial = directory.with_name(f".{directory.name}.partial")
    if first:
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        partial.mkdir(parents=True)
        (partial / "state.json").write_text(json.dumps({"step": training.step, **extra}, sort_keys=True))
    _wait()
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    with _told(directory, "cannot be written", "choose another --out"):
        save(_tensors(training), storage_writer=writer, no_dist=not dist.is_initialized())
    _wait()
    if first:
        for file in partial.iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(partial, directory)
    _wait()


def load_state(directory: Path, training: Training) -> dict[str, Any]:
    """Put a state that was saved into `training`, and return what was saved with it."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict import set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        extra: dict[str, Any] = json.loads((directory / "state.json").read_text())
        step = extra.pop("step")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{directory}: {DAMAGED[0]} ({one_line(error, 120)}); {DAMAGED[1]}") from None
    tensors = _tensors(training)
    with _told(directory, *DAMAGED):
        reader = HuggingFaceStorageReader(str(directory))
        load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        model, optimizer = _state_dicts(training)
        for name, tensor in tensors.items():
            kind, _, key = name.partition(".")
            (model if kind == "model" else optimizer)[key] = tensor
        set_state_dict(
            training.model, training.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=_flat()
        )
    training.step = step
    return extra


def whole_weights(training: Training) -> dict[str, Tensor]:
    """The model's state dict, gathered on the first process (elsewhere it is empty); every process calls it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(training.model, options=options)
    return weights


def _tensors(training: Training) -> dict[str, Tensor]:
    """Weights and moments by name; tied weights once."""
    model, optimizer = _state_dicts(training)
    seen: set[int] = set()
    tied = set()
    for name, parameter in training.model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            tied.add(name)
        seen.add(id(parameter))
    found = {f"model.{k}": v for k, v in model.items() if k not in tied}
    return found | {f"optimizer.{k}": v for k, v in optimizer.items() if isinstance(v, Tensor)}


def _state_dicts(training: Training) -> tuple[dict[str, Any], dict[str, Any]]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    untouched = not training.optimizer.state
    model, optimizer = get_state_dict(training.model, training.optimizer, options=_flat())
    if untouched:  # PyTorch has made an update at rate 0 to have moments, which then hold the decay and count one
        for state in training.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
    return dict(model), dict(optimizer)


def _flat() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=True)


@contextmanager
def _told(directory: Path, what: str, todo: str) -> Iterator[None]:
    """What PyTorch says of its checkpoints as our own errors: its own is no Exception and holds a traceback."""
    from torch.distributed.checkpoint.api import CheckpointException

    log = logging.getLogger("torch.distributed.checkpoint")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process only
            yield
    except CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values()]
        for cause in causes:
            if isinstance(cause, OSError | KeyboardInterrupt | MemoryError):
                raise cause from None
        told = one_line(causes[0] if causes else error, 120)
        raise InputError(f"{directory}: {what} ({told}); {todo}") from None
    finally:
        log.setLevel(before)


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
