"""Checkpoints: open one or a run of them, fingerprint, load, save. The only place that loads weights.

A checkpoint is a Hugging Face directory, a memdiag directory (the same two files, config.json and safetensors), or a
state dict file together with the user's own `package.module:factory`. Nothing from a checkpoint is ever executed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memdiag.checkpoint import steps as _steps
from memdiag.checkpoint import weights as _weights
from memdiag.checkpoint.fresh import new_model, read_config
from memdiag.checkpoint.saving import save
from memdiag.checkpoint.steps import inner_steps
from memdiag.checkpoint.tokens import (
    open_tokenizer,
    pad_id,
    read_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from memdiag.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Checkpoint",
    "inner_steps",
    "new_model",
    "open_checkpoints",
    "pad_id",
    "read_config",
    "read_tokenizer",
    "save",
    "tokenizer_fingerprint",
    "train_tokenizer",
]

KNOWN = (
    "a directory with config.json and safetensors, a run of those (checkpoint-500, step_500, ...), "
    "or a .safetensors/.pt state dict with --model package.module:factory"
)
# Keys of config.json that say how a model was saved, not what it computes.
VOLATILE = {"transformers_version", "_name_or_path", "_commit_hash", "torch_dtype", "dtype"}


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, looked at but not yet loaded."""

    path: Path
    kind: Literal["huggingface", "memdiag", "state_dict"]
    config: dict[str, Any] = field(repr=False)  # of config.json; {} for a state dict
    model: str | None = None  # the user's package.module:factory

    @property
    def name(self) -> str:
        """The directory's or file's own name."""
        return Path(os.path.abspath(self.path)).name

    @property
    def step(self) -> int | None:
        """The training step in the name, if there is one."""
        return _steps.step_of(Path(self.name))

    @property
    def task(self) -> str | None:
        """The task it was trained on, e.g. "task:digits", if memdiag trained it."""
        task = self.config.get("memdiag_task")
        return task if isinstance(task, str) else None

    def files(self) -> list[Path]:
        """The files that hold its weights."""
        return _weights.weight_files(self.path) if self.path.is_dir() else [self.path]

    def fingerprint(self) -> str:
        """sha256 (hex) of the config and of every tensor's name, dtype, shape and bytes.

        It does not depend on path, time, file format or sharding. Reads the weights once, a piece at a time.
        Raises:
            InputError: a weight file is missing or damaged.
        """
        config = json.dumps(_stable(self.config), sort_keys=True)
        return hashlib.sha256(f"{config}\n{_weights.digest(self.files())}".encode()).hexdigest()

    def load(self, *, dtype: str = "auto", device: str = "cpu") -> nn.Module:
        """The model in eval mode, without gradients, checked to hold exactly its weights and no NaN.

        Args:
            dtype: auto (the one its weights are stored in), float16, bfloat16, float32 or float64.
            device: where to put it, as torch names it.
        Raises:
            InputError: weights or config are damaged, do not fit each other, need foreign code, or hold a NaN.
        """
        from memdiag.checkpoint import build, guard, huggingface

        files = self.files()
        stored = _weights.entries(files)
        wanted = build.torch_dtype(dtype, stored)
        tensors = _weights.tensors(files)
        if self.model is not None:
            model = build.factory_model(self.path, self.model, tensors, stored, wanted)
        elif self.kind == "memdiag":
            model = build.memdiag_model(self.path, self.config, tensors, stored, wanted)
        else:
            model = huggingface.load(self.path, self.config, tensors, stored, wanted)
        del tensors
        build.check_finite(self.path, model)
        with guard.refusing(f"{self.path}: cannot be put on device {device!r}"):
            return model.to(device).eval().requires_grad_(False)

    def tokenizer(self, path: str | None = None) -> PreTrainedTokenizerBase | None:
        """Its tokenizer, from the given directory, its own, or its run's; None when there is none.

        Raises:
            InputError: the tokenizer's files are damaged, need foreign code, or are not in the given directory.
        """
        return open_tokenizer(self.path, self.step, path)


def open_checkpoints(path: str | Path, *, model: str | None = None, steps: str | None = None) -> list[Checkpoint]:
    """The checkpoint at a path, or those of the run at it in step order.

    Args:
        model: package.module:factory, the user's own code: factory() returns the module that the weights go into.
        steps: of a run, which to open: "0:1000:100" (stop included), "100,500" or "500". A directory that is a
            checkpoint and has others inside it is the checkpoint, unless steps are given (see `inner_steps`).
    Raises:
        InputError: there is no checkpoint, or one of those chosen is not complete.
    """
    root = Path(path)
    if not root.exists():
        raise _no_such_path(root)
    if root.is_file():
        if steps is not None:
            raise InputError(f"{root}: is one file; steps {steps!r} can only be chosen from a run")
        return [_open_file(root, model)]
    inside = _steps.children(root)
    if _is_checkpoint(root, model) and not (steps is not None and inside):
        if steps is not None:
            raise InputError(f"{root}: is one checkpoint; steps {steps!r} can only be chosen from a run")
        return [_open_directory(root, model)]
    if not any(child.is_file() or _is_checkpoint(child, model) for _, child in inside):
        raise _not_a_checkpoint(root)
    return [_open_child(child, model) for _, child in _steps.choose(inside, steps, root)]


def _is_checkpoint(directory: Path, model: str | None) -> bool:
    return directory.is_dir() and ((directory / "config.json").is_file() or _has_weights(directory))


def _has_weights(directory: Path) -> bool:
    names = (_weights.SINGLE, _weights.SINGLE_INDEX, _weights.PICKLE, _weights.PICKLE_INDEX)
    return any((directory / name).is_file() for name in names)


def _open_child(child: Path, model: str | None) -> Checkpoint:
    try:
        return _open_file(child, model) if child.is_file() else _open_directory(child, model)
    except InputError as error:
        if child.is_file():
            raise
        raise InputError(f"{error}; or leave it out with --steps") from None


def _open_file(file: Path, model: str | None) -> Checkpoint:
    if file.suffix not in _weights.SUFFIXES:
        raise InputError(f"{file}: not a checkpoint; memdiag opens {KNOWN}")
    if model is None:
        hint = f", or open its directory {file.parent}" if (file.parent / "config.json").is_file() else ""
        raise InputError(f"{file}: a state dict needs its model: give --model package.module:factory{hint}")
    return Checkpoint(file, "state_dict", {}, model)


def _open_directory(directory: Path, model: str | None) -> Checkpoint:
    if not _is_checkpoint(directory, model):
        raise _not_a_checkpoint(directory)
    if not _has_weights(directory):
        raise _no_weights(directory)
    files = _weights.weight_files(directory)
    if files[0].suffix == ".safetensors":
        _weights.entries(files)  # headers are quick to read, and a damaged last checkpoint should show first
    if not (directory / "config.json").is_file():
        if model is None:
            raise InputError(
                f"{directory}: has weights but no config.json; copy it there or give --model package.module:factory"
            )
        return Checkpoint(directory, "state_dict", {}, model)
    config = _weights.read_json(directory / "config.json")
    own = str(config.get("model_type", "")).startswith("memdiag-")
    return Checkpoint(directory, "memdiag" if own else "huggingface", config, model)


def _no_weights(directory: Path) -> InputError:
    if (directory / "adapter_config.json").is_file():
        return InputError(f"{directory}: is an adapter; merge it into its base model and save that")
    return InputError(
        f"{directory}: has config.json but no weights (holds {_listing(directory)}; wanted {_weights.SINGLE}, "
        f"{_weights.SINGLE_INDEX} or {_weights.PICKLE}); was it cut off while saving?"
    )


def _not_a_checkpoint(directory: Path) -> InputError:
    if (directory / "adapter_config.json").is_file():
        return InputError(f"{directory}: is an adapter; merge it into its base model and save that")
    if not any(directory.iterdir()):
        return InputError(f"{directory}: is empty; memdiag opens {KNOWN}")
    return InputError(f"{directory}: not a checkpoint, holds {_listing(directory)}; memdiag opens {KNOWN}")


def _listing(directory: Path, most: int = 4) -> str:
    names = sorted(child.name for child in directory.iterdir())
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _no_such_path(path: Path) -> InputError:
    parent = path.absolute().parent
    if not parent.is_dir():
        return InputError(f"{path}: no such path (nor {parent}); memdiag opens local checkpoints only")
    near = difflib.get_close_matches(path.name, [child.name for child in parent.iterdir()], n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else "; memdiag opens local checkpoints only"
    return InputError(f"{path}: no such path{hint}")


def _stable(config: Any) -> Any:
    """A config without VOLATILE keys, at any depth."""
    if isinstance(config, dict):
        return {key: _stable(value) for key, value in config.items() if key not in VOLATILE}
    return [_stable(value) for value in config] if isinstance(config, list) else config
