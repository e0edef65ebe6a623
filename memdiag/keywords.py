"""The Python functions' keyword arguments as a command's options."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, TypeVar

from memdiag.errors import unknown

Options = TypeVar("Options")


def options_from(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """A command's options, from what a caller of its function gave.

    Args:
        kind: the dataclass of the options.
        given: by name; a dict stands for "role=column,…", a list for "a,b,c", a path for its text, and a number for its
            digits where the option is text.
    Raises:
        InputError: there is no option of a name, or its value is out of range.
    """
    types = {field.name: field.type for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in given:
        if name not in types:
            raise unknown("option", name, types)
    return kind(**{name: _as_option(value, types[name]) for name, value in given.items()})


def _as_option(value: Any, type_: Any) -> Any:
    if isinstance(value, Mapping):
        return ",".join(f"{role}={name}" for role, name in value.items())
    if isinstance(value, list | tuple):
        return ",".join(str(one) for one in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, int) and not isinstance(value, bool) and type_ == "str":
        return str(value)
    return value
