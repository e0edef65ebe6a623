"""Weight files: which there are, what tensors they hold, and a digest that does not depend on how they are stored.

Tensor bytes are read in pieces straight from the file, so a digest of any model needs a few megabytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdiag.errors import InputError, one_line

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, SINGLE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SUFFIXES = (".safetensors", ".pt", ".bin", ".pth")

HEADER_LIMIT = 100_000_000  # bytes; the safetensors format's own limit
PIECE = 1 << 22  # bytes read at a time
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32}
BITS |= {"U64": 64, "I64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
WRAPPERS = ("state_dict", "model_state_dict", "model")  # what training scripts put a state dict under
PREFIXES = ("module.", "_orig_mod.")  # DataParallel's and torch.compile's


@dataclass(frozen=True)
class Entry:
    """One tensor as it is stored. `start` and `stop` are byte offsets into a safetensors file, else 0."""

    file: Path
    key: str  # its name in that file, a wrapper's prefix included
    dtype: str  # the safetensors name, e.g. "BF16"
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a directory's weights, safetensors before pickles, whole files before shards; or none."""
    for single, index in ((SINGLE, SINGLE_INDEX), (PICKLE, PICKLE_INDEX)):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return _shards(directory / index)
    return []


def _shards(index: Path) -> list[Path]:
    """The shard files named by an index, each checked to be there."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map (tensor name -> file); copy the index file again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # A path in an index could point anywhere on the disk.
        if Path(name).name != name or not name.endswith(SUFFIXES):
            raise InputError(f"{index}: {name[:80]!r} is not the name of a weight file beside it")
        if not (index.parent / name).is_file():
            there = sum((index.parent / other).is_file() for other in names)
            raise InputError(
                f"{index.parent}: shard {name} is missing ({there} of {len(names)} are there); copy it again"
            )
    return [index.parent / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or one_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({one_line(error, 120)}); it is damaged or was cut off") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, wanted a JSON object")
    return value


# -- what is in the files ------------------------------------------------------------------------------------------


def entries(files: list[Path]) -> dict[str, Entry]:
    """Every tensor of the files by name, in sorted order, read from headers where the format has them."""
    found: dict[str, Entry] = {}
    for file in files:
        for name, entry in (_header(file) if file.suffix == ".safetensors" else _unpickled_entries(file)).items():
            if name in found:
                raise InputError(f"{file}: tensor {name[:80]!r} is also in {found[name].file.name}")
            found[name] = entry
    if not found:
        raise InputError(f"{files[0]}: holds no tensors")
    return dict(sorted(strip_prefixes(found).items()))


def _unpickled_entries(file: Path) -> dict[str, Entry]:
    return {name: Entry(file, name, _dtype_name(t), tuple(t.shape)) for name, t in unpickled(file).items()}


def _header(file: Path) -> dict[str, Entry]:
    """The tensors a safetensors file says it holds, each checked against the bytes that are there."""
    raw, data_start, size = _raw_header(file)
    try:
        header = json.loads(raw)
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        found = {name: _entry(file, name, value, data_start) for name, value in tensors.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: its safetensors header is damaged ({one_line(error, 120)})") from None
    wanted = max((entry.stop for entry in found.values()), default=data_start)
    if wanted > size:
        raise InputError(
            f"{file}: cut off, {size:,} bytes found and {wanted:,} wanted by its header; copy or save it again"
        )
    if wanted < size:
        raise InputError(f"{file}: {size:,} bytes found, but its header accounts for {wanted:,}; copy or save it again")
    return found


def _raw_header(file: Path) -> tuple[bytes, int, int]:
    """(header bytes, where the tensor data begins, size of the file)."""
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8:
                raise InputError(f"{file}: {size} bytes, too short for a safetensors file; copy or save it again")
            if length > min(HEADER_LIMIT, size - 8):
                raise InputError(
                    f"{file}: its header claims {length:,} bytes of a file of {size:,}; not a safetensors file, "
                    "or damaged or cut off"
                )
            return stream.read(length), 8 + length, size
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or one_line(error)}") from None


def _entry(file: Path, name: str, value: dict[str, Any], data_start: int) -> Entry:
    dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"shape {shape} and offsets {[start, stop]} must be whole numbers")
    if (stop - start) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"shape {shape} of {dtype} does not fit its {stop - start} bytes")
    return Entry(file, name, dtype, tuple(shape), data_start + start, data_start + stop)


def strip_prefixes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same values without a wrapper's prefix that every name carries."""
    result = dict(tensors)
    while result:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in result)), None)
        if prefix is None:
            break
        result = {name.removeprefix(prefix): value for name, value in result.items()}
    return result


# -- tensors -------------------------------------------------------------------------------------------------------


def tensors(files: list[Path]) -> dict[str, Tensor]:
    """Every tensor by name, mapped from the files rather than copied, so untouched pages cost no memory."""
    found: dict[str, Tensor] = {}
    for file in files:
        found.update(_mapped(file) if file.suffix == ".safetensors" else unpickled(file))
    return strip_prefixes(found)


def _mapped(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _header(file)  # its messages say more than the library's
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({one_line(error, 160)})") from None


def unpickled(file: Path) -> dict[str, Tensor]:
    """The state dict of a .pt or .bin file: only tensors and plain containers are ever unpickled."""
    import torch

    try:
        with open(file, "rb") as stream:
            is_zip = stream.read(4) == b"PK\x03\x04"
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise _pickle_error(file, error) from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or one_line(error)}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise InputError(f"{file}: not a readable PyTorch file ({one_line(error, 160)})") from None
    return _state_dict(file, value)


def _pickle_error(file: Path, error: Exception) -> InputError:
    found = re.search(r"(?:GLOBAL|class|function) ([\w.]*\w)", str(error))
    if found is None:
        detail = str(error).rpartition("WeightsUnpickler error:")[2]  # the rest is advice to switch the check off
        return InputError(f"{file}: not a readable PyTorch file ({one_line(detail, 160)})")
    return InputError(
        f"{file}: holds pickled code ({found[1]}), which memdiag never runs; "
        "save the model's state_dict() as safetensors"
    )


def _state_dict(file: Path, value: object) -> dict[str, Tensor]:
    """The tensors by name, taken out of what a training script may have wrapped them in."""
    import torch

    for wrapper in WRAPPERS:
        if isinstance(value, Mapping) and isinstance(value.get(wrapper), Mapping):
            value = value[wrapper]
    if not isinstance(value, Mapping):
        raise InputError(f"{file}: holds a {type(value).__name__}, wanted a state dict (tensor name -> tensor)")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{file}: {str(name)[:80]!r} is a {type(tensor).__name__}, wanted a state dict of tensors only"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise InputError(f"{file}: {name[:80]!r} is not a plain dense tensor; save it dense")
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # a few bytes can pose as a tensor of any size
            raise InputError(f"{file}: {name[:80]!r} is an expanded view; save it with .contiguous()")
    return dict(value)


# -- digest --------------------------------------------------------------------------------------------------------


def digest(files: list[Path]) -> str:
    """sha256 (hex) of every tensor's name, dtype, shape and bytes in name order; not of how they are filed."""
    total = hashlib.sha256()
    for name, dtype, shape, pieces in _stored(files):
        content = hashlib.sha256()
        for piece in pieces:
            content.update(piece)
        total.update(json.dumps([name, dtype, shape, content.hexdigest()]).encode())
    return total.hexdigest()


def _stored(files: list[Path]) -> Iterator[tuple[str, str, tuple[int, ...], Iterator[Any]]]:
    found = entries(files)
    loaded = {file: unpickled(file) for file in files if file.suffix != ".safetensors"}
    for name, entry in found.items():
        pieces = _tensor_pieces(loaded[entry.file][entry.key]) if entry.file in loaded else _file_pieces(entry)
        yield name, entry.dtype, entry.shape, pieces


def _file_pieces(entry: Entry) -> Iterator[bytes]:
    with open(entry.file, "rb") as stream:
        stream.seek(entry.start)
        left = entry.stop - entry.start
        while left > 0 and (piece := stream.read(min(PIECE, left))):
            left -= len(piece)
            yield piece


def _tensor_pieces(tensor: Tensor) -> Iterator[Any]:
    import torch

    # A 0-d tensor cannot be viewed as bytes, and numpy has no bfloat16.
    yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _dtype_name(tensor: Tensor) -> str:
    names = {"float": "F", "bfloat": "BF", "int": "I", "uint": "U", "bool": "BOOL", "complex": "C"}
    kind, bits, rest = re.fullmatch(r"torch\.([a-z]+?)(\d*)((?:_\w+)?)", str(tensor.dtype)).groups()  # type: ignore[union-attr]
    return f"{names.get(kind, kind)}{bits}{rest.upper().removesuffix('FN').removesuffix('FNU')}"
