"""Writes the generated parts of README.md and docs/: what stands between these two lines is made from the code.

    <!-- generated: NAME -->
    <!-- end -->

    python docs/generate.py            # write
    python docs/generate.py --check    # change nothing; name every stale file and exit 1

The text is the same on every terminal and machine. Needs no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PART = re.compile(r"(<!-- generated: (?P<name>[\w.-]+) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)


def schema(report: str) -> str:
    """The columns of a report as a Markdown table."""
    from memdiag import tables
    from memdiag.report_kinds import row_of

    return tables.markdown(tables.schema_of(row_of(report)))


def help_of(*command: str) -> str:
    """What `memdiag COMMAND --help` prints, 80 columns wide."""
    import typer

    from memdiag.cli import app

    printed = io.StringIO()
    settings = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            typer.main.get_command(app).main([*command, "--help"], prog_name="memdiag", standalone_mode=False)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    lines = [line.rstrip() for line in printed.getvalue().strip().splitlines()]
    return "\n".join(["```text", *lines, "```"])


def dataset_roles() -> str:
    """Which column names are guessed for which role."""
    from memdiag.dataset.columns import ROLES

    rows = [f"| `{role}` | {', '.join(f'`{name}`' for name in names) or 'none'} |" for role, names in ROLES.items()]
    return "\n".join(["| role | columns guessed, the first that is there |", "| --- | --- |", *rows])


def task_keys() -> str:
    """Every task with its keys and their defaults."""
    import importlib

    from memdiag import tasks

    rows = ["| task | keys and defaults |", "| --- | --- |"]
    for name in tasks.names():
        keys = inspect.signature(
            importlib.import_module("memdiag.tasks." + name.replace("-", "_")).rows
        ).parameters.values()
        rows.append(f"| `task:{name}` | {', '.join(f'`{key.name}={key.default}`' for key in keys)} |")
    return "\n".join(rows)


def reports() -> str:
    """Every report with its key and columns, and the page that explains them."""
    from memdiag import tables
    from memdiag.pairing import KEYS
    from memdiag.report_kinds import ROWS, row_of

    rows = ["| report | version | key | columns |", "| --- | --- | --- | --- |"]
    for name in sorted(ROWS):
        mark = f"<!-- generated: schema-{name} -->"
        (page,) = (page.name for page in pages() if mark in page.read_text(encoding="utf-8"))
        row: Any = row_of(name)
        columns = ", ".join(f"`{column}` {type_}" for column, type_, *_ in tables.described(tables.schema_of(row)))
        key = ", ".join(f"`{column}`" for column in KEYS[name])
        rows.append(f"| [{name}]({page}) | {row.schema_version} | {key} | {columns} |")
    return "\n".join(rows)


def parts() -> dict[str, Callable[[], str]]:
    """Every generated part by its name."""
    from memdiag.report_kinds import ROWS

    made: dict[str, Callable[[], str]] = {
        "dataset-roles": dataset_roles,
        "task-keys": task_keys,
        "reports": reports,
        "help": help_of,
    }
    made |= {f"schema-{report}": lambda report=report: schema(report) for report in ROWS}
    made |= {f"help-{command}": lambda command=command: help_of(command) for command in commands()}
    return made


def commands() -> list[str]:
    """The commands there are."""
    import typer

    from memdiag.cli import app

    return sorted(typer.main.get_command(app).commands)


def pages() -> list[Path]:
    """The files that may hold generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def renewed(page: str, made: dict[str, Callable[[], str]], where: str) -> str:
    """The page with its generated parts made afresh."""

    def part(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in made:
            sys.exit(f"{where}: no generated part {name!r}; there are {', '.join(sorted(made))}")
        return f"{found[1]}{made[name]()}\n{found[4]}"

    return PART.sub(part, page)


def main() -> int:
    parser = argparse.ArgumentParser(description="write the generated parts of README.md and docs/")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file is stale")
    check = parser.parse_args().check
    made, stale = parts(), 0
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = renewed(old, made, page.name)
        if new == old:
            continue
        stale += 1
        if check:
            print(f"{page.relative_to(ROOT)} is stale: run make docs")
        else:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
