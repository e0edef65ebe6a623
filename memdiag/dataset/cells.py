"""One cell of a dataset to one checked value. The functions say what is wrong; the caller knows where.

A cell is what a reader yields for one row and column: a Python value, a numpy scalar or array, or,
for an Arrow list, the Arrow array of its items. Every function raises ValueError, and its message reads on
after "row 17: text ".
"""

from __future__ import annotations

import json
import numbers
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

INT64 = np.iinfo(np.int64)


def cell(column: Any, index: int) -> Any:
    """The cell at `index` of a list, a numpy array (n, ...) or an Arrow array."""
    if not isinstance(column, pa.Array):
        return column[index]
    if isinstance(column, pa.FixedShapeTensorArray):
        return column[index].to_numpy()
    scalar = column.storage[index] if isinstance(column, pa.ExtensionArray) else column[index]
    return scalar.values if isinstance(scalar, pa.ListScalar) else scalar.as_py()


def from_text(role: str, value: str) -> Any:
    """A CSV cell as the value its role wants: `3`, `[1, 2]` or `1 2`; an empty one is null.

    What does not parse stays text, for the role's own check to complain about.
    """
    if role in ("text", "id"):
        return value if value or role == "text" else None
    if not value.strip():
        return None
    if role == "truth":
        return {"true": True, "false": False}.get(value.strip().lower(), value)
    try:
        if role in ("label", "true_label") or value.lstrip().startswith("["):
            return int(value) if value.strip().isdigit() else json.loads(value)
        return [json.loads(item) for item in value.split()]
    except (ValueError, RecursionError):
        return value


def as_text(value: Any) -> str:
    """A string that can be encoded as UTF-8."""
    if value is None:
        raise ValueError("is null")
    if isinstance(value, bytes):
        value = value.decode()
    if not isinstance(value, str):
        raise ValueError(f"is {found(value)}; wanted a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair, which is not Unicode text") from None
    return str(value)


def as_id(value: Any) -> str:
    """A non-empty string, or an integer's digits."""
    if value is None or value == "" or value == b"":
        raise ValueError("is null or empty; every example needs an id")
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, str | bytes):
        raise ValueError(f"is {found(value)}; wanted a string or an integer")
    return as_text(value)


def as_label(value: Any) -> int:
    """An int64; true and false are 1 and 0."""
    if value is None:
        raise ValueError("is null; wanted an integer")
    if not isinstance(value, numbers.Integral | np.bool_):
        raise ValueError(f"is {found(value)}; wanted an integer")
    if not INT64.min <= int(value) <= INT64.max:
        raise ValueError("does not fit into 64 bits")
    return int(value)


def as_truth(value: Any) -> bool:
    """True or False; numbers are refused, since 2 could be either."""
    if value is None:
        raise ValueError("is null; wanted true or false")
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"is {found(value)}; wanted true or false")
    return bool(value)


def as_input_ids(value: Any, vocab_size: int | None = None) -> NDArray[np.int64]:
    """(t,) token ids, 0 <= id < vocab_size, at least one."""
    ids = _vector(value)
    if ids.size == 0:
        raise ValueError("is empty; wanted at least one token")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"holds {_kind(ids)}; wanted integers")
    if ids.min() < 0:
        raise ValueError(f"holds {ids.min()}; token ids are not negative")
    top = INT64.max if vocab_size is None else vocab_size - 1
    if ids.max() > top:
        raise ValueError(f"holds token {ids.max()}, but the model's largest is {top}; is it another tokenizer's?")
    return np.array(ids, dtype=np.int64)


def as_mask(value: Any, length: int) -> NDArray[np.bool_]:
    """(length,) True where a 0/1 mask has 1."""
    mask = _vector(value)
    if len(mask) != length:
        raise ValueError(f"has {len(mask)} items, but input_ids has {length}")
    if mask.dtype.kind not in "iub" or not np.isin(mask, (0, 1)).all():
        raise ValueError(f"holds {_kind(mask)}; wanted integers 0 and 1")
    return np.array(mask, dtype=np.bool_)


def as_features(value: Any, shape: tuple[int, ...] | None = None) -> NDArray[np.float32]:
    """Finite float32 of any shape but (), equal to `shape` if given; integers keep their scale."""
    array = _array(value)
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"has shape {array.shape}; wanted at least one number in a list")
    if array.dtype.kind not in "iufb":
        raise ValueError(f"holds {_kind(array)}; wanted numbers")
    if shape is not None and array.shape != shape:
        raise ValueError(f"has shape {array.shape}, but row 0 has {shape}")
    with np.errstate(over="ignore", invalid="ignore"):  # too large for float32: found just below
        result = np.array(array, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(result))
    if bad.size:
        raise ValueError(f"holds {array.flat[bad[0]]} at position {bad[0]}; wanted finite float32 numbers")
    return result


def found(value: Any) -> str:
    """What a value is, in a few words, for an error."""
    if isinstance(value, str | bytes):
        return f"the text {value[:20]!r}"
    if isinstance(value, bool | numbers.Number | np.bool_):
        return f"the {type(value).__name__} {value!s:.20}"
    if isinstance(value, np.ndarray | pa.Array | list | tuple):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"


def _vector(value: Any) -> NDArray[Any]:
    array = _array(value)
    if array.ndim != 1:
        raise ValueError(f"has shape {array.shape}; wanted a flat list")
    return array


def _array(value: Any) -> NDArray[Any]:
    if value is None:
        raise ValueError("is null")
    if isinstance(value, pa.Array):
        return _dense(value)
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, list | tuple):
        raise ValueError(f"is {found(value)}; wanted a list of numbers")
    try:
        return np.asarray(value)
    except ValueError:
        raise ValueError("is ragged: its inner lists differ in length") from None


def _dense(items: Any) -> NDArray[Any]:
    """An Arrow array of numbers, or of equally long lists of them, as a numpy array."""
    if items.null_count:
        raise ValueError("holds a null")
    kind = items.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _dense(items.flatten())
        width = len(inner) // max(1, len(items))
        if not pa.types.is_fixed_size_list(kind) and (items.value_lengths().to_numpy() != width).any():
            raise ValueError("is ragged: its inner lists differ in length")
        return inner.reshape(len(items), width, *inner.shape[1:])
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"holds {kind}; wanted numbers")
    result: NDArray[Any] = items.to_numpy(zero_copy_only=False)
    return result


def _kind(array: NDArray[Any]) -> str:
    names = {"f": "floats", "b": "booleans", "U": "text", "S": "bytes", "i": "integers", "u": "integers"}
    return names.get(array.dtype.kind, "nulls or values that are not numbers")
