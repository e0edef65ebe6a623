"""The documentation holds: generated parts are current, examples run, commands parse, links lead somewhere.

How blocks of docs/*.md are read. The blocks of a page run in order, in an empty directory with a copy of the fixtures:
    python, sql       run; a name is there for the blocks below it; sql is DuckDB's and gives at least one row
    sql no-rows       run, and gives no row
    python no-run     compiled only
    console           lines `$ memdiag ...` must parse; other lines are output or other programs
    console run       the same, and they run. Exit 0, or what `# exit 2` says. The lines below a command are among those
                      that it prints, in order, numbers nearly and `...` for anything
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pytest
import typer

from memdiag.cli import app, run
from memdiag.report_kinds import ROWS, row_of
from memdiag.tables import schema_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "LOG.md", *PAGES]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = typer.main.get_command(app)
ids = [page.name for page in PAGES]


@dataclass
class Block:
    """A fenced block: its language, what is said of it, its text, where it begins."""

    language: str
    mark: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        language, _, mark = found["info"].strip().partition(" ")
        yield Block(language, mark, found["text"], text.count("\n", 0, found.start()) + 2)


def commands(block: Block) -> list[tuple[list[str], int, list[str]]]:
    """(arguments of memdiag, exit code wanted, lines printed) of a console block's `$ memdiag` lines."""
    found: list[tuple[list[str], int, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            typed, _, comment = line[2:].partition("    # exit ")
            words = shlex.split(typed)
            found.append((words, int(comment or 0), []))
        elif found and line.strip():
            found[-1][2].append(line)
    return [(words[1:], code, printed) for words, code, printed in found if words[0] == "memdiag"]


# -- what must be there --------------------------------------------------------------------------------------------


def test_generated_parts_are_current() -> None:
    found = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "173", "FORCE_COLOR": "1"},  # a terminal must not matter
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_stale_part_is_named(tmp_path: Path) -> None:
    copy = tmp_path / "project"
    shutil.copytree(ROOT / "docs", copy / "docs")
    shutil.copytree(ROOT / "memdiag", copy / "memdiag", ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "README.md").read_text(encoding="utf-8") + "\n<!-- generated: task-keys -->\nold\n<!-- end -->\n"
    (copy / "README.md").write_text(page, encoding="utf-8")
    command = [sys.executable, str(copy / "docs" / "generate.py")]
    first = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    assert (first.returncode, first.stdout) == (1, "README.md is stale: run make docs\n")
    assert (copy / "README.md").read_text(encoding="utf-8") == page
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert subprocess.run([*command, "--check"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(COMMAND.commands))
def test_every_command_has_an_example_and_a_page(name: str) -> None:
    assert f"Example: memdiag {name} " in COMMAND.commands[name].help
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert f"<!-- generated: help-{name} -->" in pages
    assert f"$ memdiag {name}" in pages


@pytest.mark.parametrize("name", sorted(COMMAND.commands))
def test_the_example_in_the_help_parses(name: str) -> None:
    example = re.search(r"Example: memdiag (.*)", COMMAND.commands[name].help)
    assert example is not None
    parse(shlex.split(example[1]))


@pytest.mark.parametrize("report", sorted(ROWS))
def test_every_column_is_in_the_docs(report: str) -> None:
    mark = f"<!-- generated: schema-{report} -->"
    (page,) = (text for page in PAGES if mark in (text := page.read_text(encoding="utf-8")))
    part = page[page.index(mark) :].split("<!-- end -->")[0]
    assert [name for name in schema_of(row_of(report)).names if f"| `{name}` |" not in part] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_the_index_names_every_page(page: Path) -> None:
    if page.name != "index.md":
        assert f"({page.name})" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made from the text."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=[page.name for page in TEXTS])
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://arxiv.org/abs/"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name}: {target}"
        assert file.is_relative_to(ROOT), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", TEXTS, ids=[page.name for page in TEXTS])
def test_block_marks_are_known(page: Path) -> None:
    known = {"python", "python no-run", "sql", "sql no-rows", "console", "console run", "text", "sh"}
    assert [b.line for b in blocks(page) if f"{b.language} {b.mark}".strip() not in known] == []


# -- commands parse ------------------------------------------------------------------------------------------------


def parse(args: list[str]) -> None:
    """Parse a command line without running it: its command, options and arguments exist."""
    with COMMAND.make_context("memdiag", list(args)) as context:
        name, command, rest = COMMAND.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        command.make_context(name, rest, parent=context).close()


@pytest.mark.parametrize("page", TEXTS, ids=[page.name for page in TEXTS])
def test_commands_parse(page: Path) -> None:
    for block in blocks(page):
        if block.language == "console":
            for args, _, _ in commands(block):
                parse(args)


def test_a_command_with_an_unknown_option_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["entropy", "runs/my-model", "--colour"])


# -- examples run --------------------------------------------------------------------------------------------------


def nearly(wanted: str, found: str) -> bool:
    """Whether two lines say the same: words equal, numbers to 1 %, `...` for anything. Bars are not compared."""
    if "..." in wanted:
        pattern = ".*".join(re.escape(part) for part in " ".join(wanted.split()).split("..."))
        return re.match(pattern, " ".join(found.split())) is not None
    words, others = ([w for w in line.split() if not set(w) <= set(" ▏▎▍▌▋▊▉█▁▂▃▄▅▆▇·")] for line in (wanted, found))
    return len(words) == len(others) and all(_same_word(a, b) for a, b in zip(words, others))


def _same_word(a: str, b: str) -> bool:
    try:
        wanted, found = float(a.rstrip("%")), float(b.rstrip("%"))
    except ValueError:
        return a == b
    return a == b or abs(wanted - found) <= 0.002 + 0.01 * abs(wanted)


def test_nearly() -> None:
    assert nearly("0  1.577 ███▋ 76%", "    0 1.578 ███▍  76%")
    assert nearly("memdiag: x; ...", "memdiag: x; and so on")
    assert not nearly("0 1.577", "0 1.677")
    assert not nearly("memdiag: x; ...", "memdiag: y; and so on")
    assert not nearly("a.parquet", "b.parquet")


def run_here(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Run a command in this process; its exit code and what it printed."""
    capsys.readouterr()
    log, on_term = logging.getLogger("memdiag"), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as exited:
            run(args)
    finally:  # what a process of its own would not leave behind
        log.handlers = []
        log.setLevel(logging.NOTSET)
        signal.signal(signal.SIGTERM, on_term)
    printed = capsys.readouterr()
    code = exited.value.code
    return code if isinstance(code, int) else 0, [*printed.err.splitlines(), *printed.out.splitlines()]


def check_console(block: Block, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    for args, code, wanted in commands(block):
        found_code, printed = run_here(args, capsys)
        assert found_code == code, f"{where}: memdiag {' '.join(args)}: exit {found_code}\n" + "\n".join(printed)
        rest = iter(printed)
        for line in wanted:
            assert any(nearly(line, other) for other in rest), f"{where}: {line!r} is not in\n" + "\n".join(printed)


def check_sql(block: Block, where: str) -> None:
    rows = duckdb.sql(block.text).fetchall()
    assert bool(rows) == (block.mark != "no-rows"), f"{where}: {rows}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=[*ids, "README.md"])
def test_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = list(blocks(page))
    if not any(block.language in ("python", "sql") or block.mark == "run" for block in found):
        pytest.skip("nothing to run")
    shutil.copytree(ROOT / "fixtures", tmp_path / "fixtures")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for block in found:
            where = f"{page.name}:{block.line}"
            if block.language == "python":
                code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
                if block.mark != "no-run":
                    exec(code, names)
            elif block.language == "sql":
                check_sql(block, where)
            elif block.mark == "run":
                check_console(block, where, capsys)
    finally:
        sys.modules.pop("my_models", None)  # the page's own file


# -- what the pages say in numbers ---------------------------------------------------------------------------------


def table_under(page: str, heading: str) -> dict[str, list[float]]:
    """The numbers of the first table below a heading, by the first cell of each row."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1]
    rows = [line.strip("| ").split(" | ") for line in text.split("\n\n| ", 1)[1].split("\n\n", 1)[0].splitlines()]
    return {row[0]: [float(cell.replace("−", "-")) for cell in row[1:]] for row in rows[2:]}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A part of what `make demo` measures: two checkpoints, every help text that is in the demo."""
    import memdiag

    frame = memdiag.entropy(ROOT / "fixtures" / "run", data="task:pydoc", steps="50,800").to_pandas()
    return frame.set_index(["step", "layer"])


def test_the_worked_example_says_what_is_measured(demo: Any) -> None:
    """Loosely: another version of Python has slightly other texts."""
    written = table_under("entropy.md", "A worked example")
    for layer in range(4):
        for column, step in ((1, 50), (5, 800)):
            assert demo.loc[(step, layer), "mbe"] == pytest.approx(written[str(layer)][column], abs=0.03)
    assert demo.loc[(50, 0), "cross_entropy"] == pytest.approx(written["cross-entropy"][1], abs=0.05)
    assert demo.loc[(50, 3), "mean_cosine"] == pytest.approx(0.83, abs=0.02)
    assert demo.loc[(50, 3), "mbe_centred"] == pytest.approx(0.49, abs=0.02)
    assert demo.loc[(50, 0), "mbe_row_normalised"] == pytest.approx(0.89, abs=0.02)


def test_the_readme_shows_what_the_demo_prints(demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines of the README's table have the form of today's output, and nearly its numbers."""
    (shown,) = (b.text for b in blocks(ROOT / "README.md") if b.text.startswith("checkpoint-800 "))
    args = [*f"--steps 50,800 --limit 20 --out {tmp_path}/x.parquet --data task:pydoc --show".split()]
    _, printed = run_here(["entropy", str(ROOT / "fixtures" / "run"), *args], capsys)
    assert shape(shown.splitlines()) <= shape([*printed, *(line.replace("2 check", "6 check") for line in printed)])
    rows = [line.split() for line in shown.split("\n\n")[0].splitlines()[2:6]]
    for layer, row in enumerate(rows):
        assert float(row[1]) == pytest.approx(demo.loc[(800, layer), "mbe"], abs=0.03)
        assert float(row[-1]) == pytest.approx(demo.loc[(800, layer), "mean_cosine"], abs=0.03)


def shape(lines: list[str]) -> set[str]:
    """Lines with every number and bar replaced, so that their words and order remain."""
    out = set()
    for line in lines:
        words = [re.sub(r"[\d.]+", "N", w) for w in line.split() if not set(w) <= set("▏▎▍▌▋▊▉█▁▂▃▄▅▆▇·")]
        out.add(" ".join(re.sub(r"^[-+]N$", "N", w) for w in words))
    return out


def test_the_json_that_is_shown_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = run_here(["schema", "entropy", "--json"], capsys)
    assert code == 0
    assert [c["name"] for c in json.loads(printed[0])["columns"]] == schema_of(row_of("entropy")).names
