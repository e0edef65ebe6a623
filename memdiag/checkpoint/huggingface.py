"""From a Hugging Face config and tensors to a transformers model, without running or fetching anything of theirs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdiag.checkpoint.guard import mismatches, quiet, refusing, some
from memdiag.checkpoint.weights import Entry
from memdiag.errors import InputError, one_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SIZE = re.compile(r"^(num|n|max)_|_(size|dim|sizes|dims|width)$|layers?$")  # keys that count or measure something
DEPTH = re.compile(r"(?<!window_)layers?$")  # keys that count layers, each of which has a tensor at least

# Settings by which a config.json could make transformers fetch kernels, swap layers or read other files.
NOT_OURS = {
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    *("auto_map", "custom_pipelines", "transformers_weights", "fusion_config", "distributed_config", "kernel_config"),
    *("dtype", "torch_dtype", "name_or_path", "_name_or_path", "_commit_hash"),
}


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse, from the config alone, what memdiag cannot or will not open. Imports transformers."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{path}: config.json has no model_type, so there is no telling what model it is")
    if model_type not in CONFIG_MAPPING:
        import transformers

        if config.get("auto_map"):
            raise InputError(
                f"{path}: its model (model_type {model_type[:60]!r}) is code shipped with the checkpoint, which "
                "memdiag never runs; give --model package.module:factory with your own copy of the code"
            )
        raise InputError(
            f"{path}: config.json has model_type {model_type[:60]!r}, which transformers "
            f"{transformers.__version__} does not know; is it a newer model, or is the file damaged?"
        )
    if config.get("quantization_config"):
        raise InputError(f"{path}: its weights are quantized; save a dequantized copy and open that")


def load(
    path: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], stored: Mapping[str, Entry], dtype: torch.dtype
) -> nn.Module:
    """The transformers model of a config, holding exactly the given tensors.

    Raises:
        InputError: the config makes no model, or model and tensors do not fit; the tensors at fault are named.
    """
    check_config(path, config)
    with quiet(), refusing(f"{path}: config.json makes no model"):
        _check_sizes(path, config, stored)
        settings = settings_of(path, config)
        model_class = _model_class(path, config, settings)
        _check_skeleton(path, model_class, settings, stored)
    with quiet(), refusing(f"{path}: transformers cannot load it"):
        model, info = model_class.from_pretrained(
            None,
            config=settings,
            state_dict=tensors,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_loading_info(path, info)
    module: nn.Module = model
    return module


def _without(config: Any) -> Any:
    """The config without the settings of NOT_OURS, at any depth."""
    if isinstance(config, dict):
        return {key: _without(value) for key, value in config.items() if key not in NOT_OURS}
    return [_without(value) for value in config] if isinstance(config, list) else config


def settings_of(path: Path, config: Mapping[str, Any]) -> Any:
    """The transformers config, without what would fetch or run something."""
    from transformers import CONFIG_MAPPING

    settings = CONFIG_MAPPING[config["model_type"]].from_dict(_without(config))
    if getattr(settings, "is_encoder_decoder", False):
        name = config["model_type"]
        raise InputError(f"{path}: {name} is an encoder-decoder model; memdiag measures one stack of layers")
    return settings


def _model_class(path: Path, config: Mapping[str, Any], settings: Any) -> Any:
    """The class named first in `architectures`, if it is transformers' own and of this config; else AutoModel's."""
    import transformers
    from transformers import MODEL_MAPPING, PreTrainedModel

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if isinstance(name, str) and name.isidentifier() and not name.startswith("_"):
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            config_class = getattr(found, "config_class", None)
            if config_class is not None and isinstance(settings, config_class):
                return found
            raise InputError(f"{path}: architecture {name[:80]!r} does not go with model_type {config['model_type']!r}")
    if type(settings) not in MODEL_MAPPING:
        raise InputError(f"{path}: transformers has no model for architecture {str(name)[:80]!r}")
    return MODEL_MAPPING[type(settings)]


def _check_sizes(path: Path, config: Any, stored: Mapping[str, Entry]) -> None:
    """No count or width of a model exceeds its number of weights: refuse one that does before anything is built."""
    numel = sum(entry.numel for entry in stored.values())
    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(path, value, stored)
        for number in value if isinstance(value, list) else [value]:
            limit = len(stored) + 1000 if DEPTH.search(key) else max(numel, 2**22)
            if type(number) is int and SIZE.search(key) and number > limit:
                raise InputError(
                    f"{path}: config.json has {key[:60]} {number:.3g}, but its weights are {len(stored)} tensors of "
                    f"{numel:,} numbers in all; config and weights are of different models"
                )


def _check_skeleton(path: Path, model_class: Any, settings: Any, stored: Mapping[str, Entry]) -> None:
    """Refuse a model far larger than its weights, whose missing tensors would otherwise be allocated and filled."""
    import torch

    with torch.device("meta"):
        skeleton = model_class._from_config(settings)
    shapes = {name: tuple(t.shape) for name, t in skeleton.named_parameters()}
    wrong = mismatches(shapes, stored)
    have, want = sum(e.numel for e in stored.values()), sum(p.numel() for p in skeleton.parameters())
    if want > 2 * have + 2**24:  # what is short of that is named by _check_loading_info
        missing = [name for name in shapes if name not in stored]
        why = f"; {wrong}" if wrong else f"; not in the file: {some(missing)}"
        raise InputError(f"{path}: config.json asks for {want:,} weights and the file has {have:,}{why}")


def _check_loading_info(path: Path, info: Mapping[str, Any]) -> None:
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        name, found, wanted = wrong[0]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(
            f"{path}: tensor {name[:120]!r} has shape {list(found)}, config.json wants {list(wanted)}{more}; "
            "config and weights are of different models"
        )
    if info["missing_keys"]:
        raise InputError(f"{path}: the weights lack {some(info['missing_keys'])}, which config.json's model needs")
    if info.get("error_msgs"):
        raise InputError(f"{path}: {one_line(str(info['error_msgs'][0]))}")
    if info["unexpected_keys"]:
        warnings.warn(f"{path}: weights not used by the model: {some(info['unexpected_keys'])}", stacklevel=2)
