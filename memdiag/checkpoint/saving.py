"""Writing a checkpoint, in one step: a reader finds all of it or nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdiag.checkpoint.weights import SINGLE
from memdiag.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn


def save(
    path: str | Path,
    model: nn.Module,
    *,
    tokenizer: Any = None,
    task: str | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint directory: config.json, safetensors and, if given, the tokenizer.

    Args:
        model: a transformers model or one of memdiag.models; of any other module only the weights are written,
            to be opened with its factory.
        task: the task it was trained on, kept in config.json as `memdiag_task`.
        weights: of a transformers model, the state dict to write instead of its own, which may be in shards.
    Raises:
        InputError: the path is taken. An empty directory is not in the way.
    """
    target = Path(path).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{path}: exists and is not an empty directory; choose another path or remove it")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir(parents=True)
    try:
        _write(partial, model, tokenizer, task, weights)
        _flush(partial)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(
    directory: Path, model: nn.Module, tokenizer: Any, task: str | None, weights: dict[str, Tensor] | None
) -> None:
    from transformers import PreTrainedModel

    from memdiag.checkpoint.guard import quiet
    from memdiag.models.cnn import CNN
    from memdiag.models.mlp import MLP
    from memdiag.models.transformer import Transformer

    config_file = directory / "config.json"
    if isinstance(model, PreTrainedModel):
        with quiet():
            model.save_pretrained(directory, state_dict=weights)
        config = json.loads(config_file.read_text())
    else:
        stored = _write_weights(directory, model)
        dtype = str(next(iter(stored.values())).dtype).removeprefix("torch.")
        config = model.config.to_json() | {"dtype": dtype} if isinstance(model, CNN | MLP | Transformer) else None
    if config is not None:
        config |= {} if task is None else {"memdiag_task": task}
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _write_weights(directory: Path, model: nn.Module) -> dict[str, Tensor]:
    """The state dict as one safetensors file, tied parameters once, which is how they are read back."""
    from safetensors.torch import save_file

    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            stored.pop(name, None)
        seen.add(id(parameter))
    save_file(stored, directory / SINGLE, metadata={"format": "pt"})
    return stored


def _flush(directory: Path) -> None:
    """Have the bytes on the disk before the rename is, and readable as other files are."""
    umask = os.umask(0)
    os.umask(umask)
    for file in directory.iterdir():
        if file.is_file():
            file.chmod(0o666 & ~umask)  # safetensors writes 0600
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
