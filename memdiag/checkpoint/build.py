"""From tensors to a module in memory, by memdiag.models or by the user's own factory; dtypes; a last look for NaN."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdiag.checkpoint.guard import mismatches, refusing, some
from memdiag.checkpoint.weights import PREFIXES, Entry
from memdiag.errors import InputError, one_line, unknown

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DTYPES = ("float16", "bfloat16", "float32", "float64")
STORED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

# -- dtype ---------------------------------------------------------------------------------------------------------


def torch_dtype(dtype: str, stored: Mapping[str, Entry]) -> torch.dtype:
    """The dtype to load in; "auto" is the one that most of the stored floating-point numbers have."""
    import torch

    if dtype == "auto":
        counts = dict.fromkeys(STORED, 0)
        for entry in stored.values():
            if entry.dtype in counts:
                counts[entry.dtype] += entry.numel
        dtype = STORED[max(counts, key=lambda name: counts[name])] if any(counts.values()) else "float32"
    elif dtype not in DTYPES:
        raise unknown("dtype", dtype, ("auto", *DTYPES))
    found: torch.dtype = getattr(torch, dtype)
    return found


# -- memdiag's models and the user's own ---------------------------------------------------------------------------


def memdiag_model(
    path: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], stored: Mapping[str, Entry], dtype: torch.dtype
) -> nn.Module:
    """The module of memdiag.models that a config describes, holding exactly the given tensors."""
    import torch

    from memdiag import models

    try:
        with torch.device("meta"):  # nothing is allocated until the shapes are known to fit
            model = models.build(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    _check_names(path, model, stored)
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    model.load_state_dict(cast, strict=True, assign=True)
    return model


def factory_model(
    path: Path, factory: str, tensors: dict[str, Tensor], stored: Mapping[str, Entry], dtype: torch.dtype
) -> nn.Module:
    """What the user's factory() returns, holding exactly the given tensors."""
    from torch import nn

    make = imported(factory)
    try:
        model = make()
    except (MemoryError, InputError):
        raise
    except Exception as error:
        raise InputError(f"{factory} failed: {type(error).__name__}: {one_line(error)}") from None
    if not isinstance(model, nn.Module):
        raise InputError(f"{factory} returned a {type(model).__name__}, wanted a torch.nn.Module")
    tensors, stored = _with_prefix(model, tensors), _with_prefix(model, stored)
    _check_names(path, model, stored)
    _check_tied(path, model, tensors)
    with refusing(f"{path}: its weights do not go into {factory}'s model"):
        model.to(dtype)
        model.load_state_dict(tensors, strict=False)
    return model


def imported(factory: str) -> Any:
    module_name, _, attribute = factory.partition(":")
    if not module_name or not attribute:
        raise InputError(f"model {factory!r}: wanted package.module:factory")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the user's code is where the command was typed
    try:
        made = getattr(importlib.import_module(module_name), attribute)
    except (MemoryError, InputError):
        raise
    except Exception as error:
        raise InputError(f"model {factory}: cannot be imported: {type(error).__name__}: {one_line(error)}") from None
    if not callable(made):
        raise InputError(f"model {factory}: is a {type(made).__name__}, wanted a function that returns a module")
    return made


def _with_prefix(model: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by the module's own names, if it is itself wrapped, as torch.compile wraps it."""
    own = list(model.state_dict())
    prefix = next((p for p in PREFIXES if own and all(name.startswith(p) for name in own)), "")
    return {prefix + name: value for name, value in values.items()}


def _check_names(path: Path, model: nn.Module, stored: Mapping[str, Entry]) -> None:
    """The module's tensors and the stored ones must be the same names and shapes; tied ones may be stored once."""
    own = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if wrong := mismatches(shapes, stored):
        raise InputError(f"{path}: {wrong}")
    tied = {name for names in _tied(model) if any(n in stored for n in names) for name in names}
    missing = [name for name in own if name not in stored and name not in tied]
    unexpected = [name for name in stored if name not in own]
    parts = [f"missing: {some(missing)}"] * bool(missing) + [f"unexpected: {some(unexpected)}"] * bool(unexpected)
    if parts:
        raise InputError(f"{path}: its tensors are not those of the model; {'; '.join(parts)}")


def _tied(model: nn.Module) -> list[list[str]]:
    """Names of one and the same parameter, for every parameter that has several."""
    same: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        same.setdefault(id(tensor), []).append(name)
    return [names for names in same.values() if len(names) > 1]


def _check_tied(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for names in _tied(model):
        first, *others = [name for name in names if name in tensors] or [""]
        for other in others:
            if not tensors[first].equal(tensors[other]):
                raise InputError(f"{path}: {first!r} and {other!r} are one parameter in the model but differ here")


def check_finite(path: Path, model: nn.Module) -> None:
    """Refuse a model with a NaN or an infinity among its weights, one tensor at a time."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        if tensor.isnan().any():
            count = int(tensor.isnan().sum())
            raise InputError(f"{path}: tensor {name!r} holds {count:,} NaN among its {tensor.numel():,} numbers")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.isinf().any():
            raise InputError(f"{path}: tensor {name!r} holds an infinity (as {str(parameter.dtype)[6:]})")
