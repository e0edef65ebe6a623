"""Runs: directories whose children are checkpoints with a step in their names."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from memdiag.checkpoint.weights import SUFFIXES
from memdiag.errors import InputError

# checkpoint-500, step_500, step500, step-500, checkpoint-step-500, global_step500, 500
STEP_NAME = re.compile(r"(?:(?:checkpoint|ckpt|global|step|iter)[-_]?)*(\d{1,18})", re.ASCII | re.IGNORECASE)


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint directory or weight file, or None."""
    found = STEP_NAME.fullmatch(path.stem if path.suffix in SUFFIXES else path.name)
    return int(found[1]) if found else None


def children(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every child whose name has a step in it, in step order; files only if they hold weights."""
    found = []
    for child in sorted(directory.iterdir()):
        step = step_of(child)
        if step is not None and (child.is_dir() or child.suffix in SUFFIXES):
            found.append((step, child))
    return sorted(found, key=lambda pair: pair[0])


def inner_steps(path: str | Path) -> list[int]:
    """The steps of the checkpoints inside a directory, in order; of a checkpoint that has its run inside it, too."""
    return [step for step, _ in children(Path(path))] if Path(path).is_dir() else []


def choose(found: list[tuple[int, Path]], steps: str | None, run: Path) -> list[tuple[int, Path]]:
    """The children that `steps` names, each step once.

    Args:
        steps: None for all; else a comma-separated list of steps and of start:stop:stride ranges, in which stop is
            included and any part may be left out. They are step numbers, never positions.
    Raises:
        InputError: it cannot be read, names a step that is not there, or chooses none; or two children share a step.
    """
    have = [step for step, _ in found]
    wanted = set(have) if steps is None else _wanted(steps, have, run)
    chosen = [(step, child) for step, child in found if step in wanted]
    for (step, first), (other, second) in itertools.pairwise(chosen):
        if step == other:
            raise InputError(f"{run}: {first.name} and {second.name} are both step {step}; move one away")
    return chosen


def _wanted(steps: str, have: list[int], run: Path) -> set[int]:
    wanted: set[int] = set()
    for part in steps.split(","):
        numbers = [_number(text, steps) for text in part.split(":")]
        if len(numbers) == 1 and numbers[0] is not None:
            if numbers[0] not in have:
                raise InputError(f"{run}: no step {numbers[0]}; there are {listed(have)}")
            wanted.add(numbers[0])
        elif len(numbers) in (2, 3):
            start, stop, stride = (*numbers, None)[:3]
            if stride == 0:
                raise InputError(f"steps {steps!r}: the stride must be at least 1")
            wanted |= {step for step in have if _in_range(step, start or 0, stop, stride or 1)}
        else:
            raise _unreadable(steps)
    if not wanted:
        raise InputError(f"{run}: steps {steps!r} choose none; there are {listed(have)}")
    return wanted


def _in_range(step: int, start: int, stop: int | None, stride: int) -> bool:
    return start <= step and (stop is None or step <= stop) and (step - start) % stride == 0


def _number(text: str, steps: str) -> int | None:
    if not text.strip():
        return None
    if not re.fullmatch(r"\s*\d{1,18}\s*", text, re.ASCII):
        raise _unreadable(steps)
    return int(text)


def _unreadable(steps: str) -> InputError:
    return InputError(f"steps {steps[:80]!r}: wanted a list like 0,500 or a range start:stop:stride like 0:1000:100")


def listed(steps: list[int], most: int = 12) -> str:
    """Steps for a message, the middle left out where there are many."""
    names = [str(step) for step in dict.fromkeys(steps)]
    if len(names) > most:
        names = [*names[: most - 2], "…", names[-1]]
    return ", ".join(names) if names else "none"
