"""Keyword arguments as options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from memdiag.errors import InputError
from memdiag.keywords import options_from


@dataclass(frozen=True)
class Options:
    data: str | None = None
    columns: str | None = None
    seeds: str = "0"
    batch_size: str = "auto"
    steps: int = 1
    ranks: bool = False


def test_what_python_has_becomes_what_the_command_line_says():
    given = {
        "data": Path("a/b"), "columns": {"text": "body", "id": ""}, "seeds": [1, 2], "batch_size": 8, "steps": 3,
        "ranks": True,
    }  # fmt: skip
    assert options_from(Options, given) == Options("a/b", "text=body,id=", "1,2", "8", 3, True)
    assert options_from(Options, {}) == Options()
    assert options_from(Options, {"columns": None}).columns is None


def test_an_unknown_name_is_told_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'seeds'"):
        options_from(Options, {"seds": 1})
