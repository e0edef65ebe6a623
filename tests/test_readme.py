"""The README holds: its commands exist, and its tree is the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))


def listed() -> list[str]:
    """The paths of the tree in `What is where`, folders with their slash."""
    (tree,) = re.findall(r"## What is where\n\n```text\n(.*?)```", README, re.DOTALL)
    paths: list[str] = []
    folders: list[str] = []
    for line in tree.splitlines():
        name = line.split()[0]
        del folders[(len(line) - len(line.lstrip())) // 2 :]
        paths.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_the_tree_is_the_tree() -> None:
    paths = listed()
    assert [path for path in paths if not (ROOT / path).exists()] == []
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "memdiag").rglob("*.py")}
    assert {path for path in paths if path.startswith("memdiag/") and path.endswith(".py")} == modules
    assert len(set(paths)) == len(paths)


def test_every_line_of_the_tree_says_something() -> None:
    (tree,) = re.findall(r"## What is where\n\n```text\n(.*?)```", README, re.DOTALL)
    silent = [line for line in tree.splitlines() if len(line.split()) == 1 and not line.endswith("/")]
    assert silent == []
    assert max(map(len, tree.splitlines())) <= 100


def test_every_make_command_is_a_target() -> None:
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)\s", " ".join(re.findall(r"`(make [^`]*)`", README)) + " "))
    named |= set(re.findall(r"^make ([a-z][a-z-]*)", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= TARGETS


def test_the_two_commands_are_the_two_commands() -> None:
    block = re.search(r"## Try it\n.*?```sh\n(.*?)```", README, re.DOTALL)
    assert block is not None
    assert [line.split("#")[0].split() for line in block[1].splitlines()] == [["make", "demo"], ["make", "test"]]


def test_ci_runs_what_the_readme_says() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert {"make demo", "make test", "make lint", "make check-docs"} <= set(ci.splitlines())


@pytest.fixture
def spaced(tmp_path: Path) -> Path:
    """The project's root files in a folder whose path has a space."""
    copy = tmp_path / "a clone" / "mem diag"
    copy.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, copy)
    return copy


def make(directory: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run make there, as if from a fresh shell: this test may itself run under make."""
    fresh = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *args], cwd=directory, capture_output=True, text=True, check=False, env=fresh)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_works_where_the_path_has_a_space(spaced: Path, target: str) -> None:
    found = make(spaced, "-n", target)
    assert (found.returncode, found.stderr) == (0, "")
    assert "pip install" in found.stdout
    assert "constraints.txt" in found.stdout
    assert {"demo": "entropy fixtures/run", "test": "-m pytest"}[target] in found.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_shell_lines_hold_where_the_path_has_a_space(spaced: Path) -> None:
    """`make -n` runs nothing; `make help` runs a recipe there."""
    found = make(spaced, "help")
    assert (found.returncode, found.stderr) == (0, "")
    assert {line.split()[0] for line in found.stdout.splitlines()} >= {"demo", "test", "lint", "docs"}


def test_python_and_constraints_agree_with_pyproject() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.11"' in project
    assert "Python 3.11" in README
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    for extra in re.findall(r'"\.\[(\w+)\]"', README):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_nothing_is_named_that_is_not_there() -> None:
    """Functions and options of the API example exist."""
    import memdiag

    for name in set(re.findall(r"\bmemdiag\.(\w+)\(", README)):
        assert name in memdiag.__all__
