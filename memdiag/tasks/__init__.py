"""The built-in datasets: `task:NAME?key=value&key=value`.

A task is a file here with one function, `rows`: its keyword arguments are the task's keys, their defaults
give the types, and it yields rows as plain dicts (column -> value), the same rows on every call. A task's name is
its file's, with hyphens.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from memdiag.errors import InputError, unknown

PREFIX = "task:"


@dataclass(frozen=True)
class Task:
    """A task with all its keys settled."""

    name: str  # canonical: every key, sorted, e.g. task:pydoc?chars=1000
    values: dict[str, Any]  # key -> value
    given: frozenset[str]  # the keys that were named; the others have their defaults
    rows: Callable[[], Iterator[dict[str, Any]]]


def names() -> list[str]:
    """The tasks there are: the files of this folder."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def load(spec: str) -> Task:
    """The task that `task:NAME?key=value&key=value` means.

    Raises:
        InputError: an unknown task or key, a key given twice, or a value of another type than the default's.
    """
    name, _, query = spec.removeprefix(PREFIX).partition("?")
    if name not in names():
        raise unknown("task", name, names())
    function = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").rows
    values = {key: parameter.default for key, parameter in inspect.signature(function).parameters.items()}
    given = _given(name, query, values)
    values |= given
    canonical = "&".join(f"{key}={_written(values[key])}" for key in sorted(values))
    full = f"{PREFIX}{name}" + (f"?{canonical}" if canonical else "")
    return Task(full, values, frozenset(given), lambda: function(**values))


def _given(name: str, query: str, defaults: dict[str, Any]) -> dict[str, Any]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise InputError(f"task:{name}: cannot read {query!r}; wanted key=value&key=value") from None
    given: dict[str, Any] = {}
    for key, text in pairs:
        if key not in defaults:
            raise unknown(f"key of task:{name}", key, defaults)
        if key in given:
            raise InputError(f"task:{name}: key {key!r} is given twice")
        given[key] = _parse(f"task:{name}: {key}", text, type(defaults[key]))
    return given


def _parse(where: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise InputError(f"{where} is {text!r}; wanted true or false")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{where} is {text[:40]!r}; wanted {kind.__name__}, e.g. {kind(1)}") from None


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
