"""The command line as a user meets it: exit codes, what goes to stdout and stderr, help, environment variables."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

import memdiag
from memdiag import cli, entropy_report
from memdiag.errors import IncompleteError, InputError

BROKEN = sorted(path.name for path in (Path(__file__).parent.parent / "fixtures" / "broken").iterdir())
COMMANDS = [
    "entropy", "score", "counterfactual", "prune-memorizers", "train", "train-gapt", "reproduce", "import",
    "check", "diff", "report", "schema", "rerun",
]  # fmt: skip
INSTALLED = "import sys; sys.argv[0] = 'memdiag'; from memdiag.cli import run; run()"  # as the script `memdiag` does it


class Done(NamedTuple):
    code: int | None
    out: str
    err: str


@pytest.fixture
def memdiag_(capfd, monkeypatch, tmp_path):
    """The command line in this process, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # to be put back
    before = signal.getsignal(signal.SIGTERM)

    def run(*args):
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.run([str(arg) for arg in args])
        return Done(caught.value.code, *capfd.readouterr())

    yield run
    signal.signal(signal.SIGTERM, before)
    logging.getLogger("memdiag").handlers.clear()
    logging.getLogger("memdiag").setLevel(logging.NOTSET)


@pytest.fixture
def entropy(memdiag_, fixtures):
    """`memdiag entropy` of three examples on a checkpoint, by name."""

    def run(*args, checkpoint="tiny-gpt2", data="texts.jsonl"):
        return memdiag_("entropy", fixtures / checkpoint, "--data", fixtures / data, "--limit", 3, *args)

    return run


def process(*args, code=("-m", "memdiag"), **options):
    """The command line in a process of its own."""
    options.setdefault("stdout", subprocess.PIPE)
    return subprocess.run([sys.executable, *code, *map(str, args)], stderr=subprocess.PIPE, text=True, **options)


def one_line(done, code=2):
    """The one line that a failing command says."""
    assert done.code == code, done
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("memdiag: ")
    return line


def left(path="."):
    return sorted(os.listdir(path))


# -- help and version ----------------------------------------------------------------------------------------------


def test_version(memdiag_):
    assert memdiag_("--version") == Done(0, f"memdiag {memdiag.__version__}\n", "")


def test_python_m_memdiag():
    done = process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"memdiag {memdiag.__version__}\n", "")


def test_without_arguments_it_shows_its_help(memdiag_, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["memdiag"])
    done = memdiag_()
    assert (done.code, done.err) == (0, "")
    assert done.out == memdiag_("--help").out == memdiag_("-h").out
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", done.out, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(memdiag_, name):
    done = memdiag_(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"Example: memdiag {name}" in done.out
    assert "\x1b" not in done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_every_option_of_entropy_is_an_option_of_the_report():
    import inspect

    from memdiag.cli.measure import entropy

    fields = {field.name for field in dataclasses.fields(entropy_report.EntropyOptions)}
    assert fields <= set(inspect.signature(entropy).parameters)
    for field in dataclasses.fields(entropy_report.EntropyOptions):
        assert inspect.signature(entropy).parameters[field.name].default == field.default


HELP = """
import sys
from memdiag.cli import run
try:
    run(sys.argv[1:])
except SystemExit as error:
    assert error.code == 0
slow = {"torch", "transformers", "pyarrow", "pandas", "numpy", "matplotlib", "scipy", "rich"} & set(sys.modules)
assert not slow, slow
"""


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in COMMANDS), ["--version"]])
def test_help_imports_nothing_slow(args):
    done = process(*args, code=("-c", HELP))
    assert (done.returncode, done.stderr) == (0, "")


def seconds(*args):
    """(wall, processor) seconds of a process, the least of five."""
    walls, cpus = [], []
    for _ in range(5):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, *args], stdout=subprocess.DEVNULL, check=True)
        walls.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(walls), min(cpus)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_quick(name):
    wall, cpu = seconds("-m", "memdiag", name, "--help")
    if cpu > 0.3 and seconds("-c", "pass")[0] > 0.1:
        pytest.skip("this machine is slow or busy")
    assert cpu < 0.3
    if os.getloadavg()[0] < os.cpu_count():  # otherwise the clock measures whoever else is at work
        assert wall < 0.3


# -- completion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("memdiag en", ["entropy"]),
        ("memdiag ", COMMANDS),
        ("memdiag entropy --al", ["--alpha"]),
        ("memdiag schema --js", ["--json"]),
    ],
)
def test_the_shell_completes(words, expected):
    environment = {"_MEMDIAG_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = process(code=("-c", INSTALLED), env=os.environ | environment)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, expected, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown_for_a_shell(shell):
    # typer asks the process tree which shell it is in; here the shell is named instead
    named = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = process("--show-completion", shell, code=("-c", INSTALLED), env=named)
    assert done.returncode == 0
    assert "_MEMDIAG_COMPLETE" in done.stdout


# -- stdout --------------------------------------------------------------------------------------------------------


def test_stdout_is_the_path_when_it_is_no_terminal(entropy):
    assert entropy() == Done(0, "entropy.parquet\n", "")
    assert left() == ["entropy.parquet"]
    assert entropy("-o", "deep/x.parquet") == Done(0, "deep/x.parquet\n", "")


def test_quiet_is_the_path_and_nothing_else(entropy, memdiag_, fixtures):
    assert entropy("--quiet", "--show") == Done(0, "entropy.parquet\n", "")
    assert entropy("-q").err == ""  # it is already there: a note, which quiet leaves out
    done = memdiag_("entropy", fixtures / "tiny-gpt2", "--limit", 2, "-q", "-o", "pydoc.parquet")
    assert done == Done(0, "pydoc.parquet\n", "")


def test_json_is_one_object_with_the_headline_figures(entropy):
    done = entropy("--json", "--unit", "all", "--plot", "e.svg")
    assert (done.code, done.err) == (0, "")
    (line,) = done.out.splitlines()
    figures = json.loads(line)
    assert (figures["report"], figures["plot"], figures["layers"]) == ("entropy.parquet", "e.svg", 3)
    means = memdiag.read("entropy.parquet").to_pandas().groupby("unit")["mbe"].mean()
    assert figures["mbe_patch"] == pytest.approx(means["patch"])
    assert left() == ["e.svg", "entropy.parquet"]


def test_show_prints_the_table(entropy):
    done = entropy("--show")
    assert done.code == 0
    assert done.out.startswith("tiny-gpt2  MBE of patches of 8 tokens")
    assert done.out.endswith("report: entropy.parquet\n")
    assert "\x1b" not in done.out


def test_notes_go_to_stderr(entropy, memdiag_, fixtures):
    entropy()
    note = "memdiag: entropy.parquet is already there, made from the same inputs; --force makes it again\n"
    assert entropy() == Done(0, "entropy.parquet\n", note)
    done = memdiag_("entropy", fixtures / "tiny-gpt2", "--limit", 2, "-o", "pydoc.parquet")
    assert done == Done(0, "pydoc.parquet\n", "memdiag: no --data: measuring on task:pydoc\n")


def test_on_a_terminal_the_table_comes_by_itself(fixtures, tmp_path):
    main, side = pty.openpty()
    command = ["entropy", fixtures / "tiny-gpt2", "-d", fixtures / "texts.jsonl", "--limit", 3]
    done = process(*command, stdout=side, cwd=tmp_path, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"})
    os.close(side)
    shown = os.read(main, 100_000).decode()
    os.close(main)
    assert (done.returncode, done.stderr) == (0, "")
    assert "MBE of patches of 8 tokens" in shown
    assert "report:" in shown


@pytest.mark.parametrize("args", [["schema"], ["schema", "entropy"], ["schema", "entropy", "--json"], ["--help"]])
def test_nobody_reading_stdout_is_no_fault(args):
    reader, writer = os.pipe()
    os.close(reader)
    done = process(*args, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_stdout_is_no_fault():
    assert process("schema", preexec_fn=lambda: os.close(1)).returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_said():
    with open("/dev/full", "w") as full:
        done = process("schema", stdout=full)
    assert done.returncode == 3
    assert re.fullmatch(r"memdiag: the disk is full .*\n", done.stderr)


def test_a_stdout_without_greek_letters_gets_a_table(fixtures, tmp_path):
    args = ["entropy", fixtures / "tiny-gpt2", "-d", fixtures / "texts.jsonl", "--limit", 3, "--show"]
    done = process(*args, cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "MBE of patches of 8 tokens, ? = 2" in done.stdout


def test_what_a_library_prints_is_not_mixed_into_stdout(entropy, fixtures, tmp_path):
    """tokenizers (Rust) prints what it does not know to the process's own stdout."""
    shutil.copytree(fixtures / "tiny-gpt2", tmp_path / "model")
    tokenizer = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["of_a_later_version"] = True
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert entropy(checkpoint=tmp_path / "model") == Done(0, "entropy.parquet\n", "")


def test_a_path_that_is_not_utf8(entropy, fixtures):
    data = Path.cwd() / os.fsdecode(b"\xfe.jsonl")
    shutil.copy(fixtures / "texts.jsonl", data)
    assert entropy(data=data) == Done(0, "entropy.parquet\n", "")
    assert memdiag.read("entropy.parquet").meta["options"]["data"] == str(data)
    assert "cannot be printed" in one_line(entropy("-o", os.fsdecode(b"\xff.parquet"), data=data))
    assert "cannot be printed" in one_line(entropy("-o", "a\nb.parquet", data=data))


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["entropi"], "No such command 'entropi'. Did you mean 'entropy'?"),
        (["entropy", "x", "--alhpa", "1"], "No such option: --alhpa"),
        (["entropy", "x", "--alhpa", "1"], "--alpha"),
        (["entropy"], "Missing argument 'CKPT'"),
        (["entropy", "x", "--alpha"], "--alpha"),
        (["entropy", "x", "--alpha", "two"], "Invalid value for '--alpha'"),
        (["entropy", "x", "--limit", "1.5"], "Invalid value for '--limit'"),
        (["entropy", "x", "y"], "unexpected extra argument"),
        (["entropy", "nowhere"], "nowhere: no such path"),
        (["entropy", "nowhere", "--unit", "patches"], "did you mean 'patch'"),
        (["entropy", "nowhere", "--alpha", "-1"], "--alpha must be a finite number above 0, got -1.0"),
        (["entropy", "nowhere", "--alpha", "nan"], "--alpha must be a finite number above 0"),
        (["entropy", "nowhere", "--patch-size", "0"], "--patch-size must be at least 1"),
        (["entropy", "nowhere", "--batch-size", "big"], "--batch-size must be auto or a number"),
        (["entropy", "nowhere", "--plot", "x.pdf"], "must end in .png or .svg"),
        (["schema", "entropi"], "did you mean 'entropy'"),
        (["schema", "nowhere.parquet"], "no such report: nowhere.parquet"),
        (["schema", "."], "is not a Parquet file"),
        (["rerun", "nowhere.parquet"], "no such report: nowhere.parquet"),
        (["rerun"], "Missing argument 'REPORT'"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(memdiag_, args, says):
    assert says in one_line(memdiag_(*args))
    assert left() == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--layers", "7"], "7"),
        (["--layers", "transformer.g.*"], "transformer.g"),
        (["--columns", "text=txet"], "no column 'txet'; there are id, label, text; did you mean 'text'?"),
        (["--columns", "txet=text"], "did you mean 'text'"),
        (["--columns", "text"], "is not of the form text=body"),
        (["--data", "task:pidoc"], "did you mean 'pydoc'?"),
        (["--data", "task:pydoc?char=5"], "did you mean 'chars'?"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--dtype", "float31"], "did you mean 'float32'?"),
        (["--device", "toaster"], "device 'toaster' cannot be used"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["--steps", "5"], "is one checkpoint"),
        (["--model", "nowhere:factory"], "nowhere"),
        (["-o", "."], "is a directory; give a file name to --out"),
        (["-o", "x" * 300], "cannot be written"),
    ],
)
def test_wrong_names_are_one_line_and_exit_2(entropy, args, says):
    assert says in one_line(entropy(*args))
    assert left() == []


@pytest.mark.parametrize("name", BROKEN)
def test_every_broken_checkpoint_is_one_line_and_exit_2(entropy, name):
    line = one_line(entropy(checkpoint=f"broken/{name}"))
    assert name in line
    assert left() == []


def test_no_checkpoint_at_all(entropy, tmp_path, fixtures):
    (tmp_path / "empty").mkdir()
    assert "is empty" in one_line(entropy(checkpoint=tmp_path / "empty"))
    assert "did you mean" in one_line(entropy(checkpoint="tiny-gpt"))
    assert "--model package.module:factory" in one_line(entropy(checkpoint="tiny-gpt2/model.safetensors"))
    assert "not a checkpoint" in one_line(entropy(checkpoint="texts.jsonl"))
    assert "File name too long" in one_line(entropy(checkpoint=tmp_path / ("x" * 300)))


def test_data_in_the_way_of_the_model(entropy, memdiag_, fixtures):
    assert "holds text" in one_line(entropy(checkpoint="digits-mlp"))
    assert one_line(entropy(checkpoint="tiny-vit"))
    done = memdiag_("entropy", fixtures / "tiny-gpt2", "--data", "task:digits", "--limit", 3)
    assert one_line(done)
    assert left() == []


def test_other_options_for_a_report_that_is_there(entropy):
    entropy()
    line = one_line(entropy("--alpha", 1))
    assert "entropy.parquet already holds another report (differs in options.alpha)" in line
    assert entropy("--alpha", 1, "--force").code == 0


def fail(monkeypatch, error):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(entropy_report, "measure", failing)


def test_what_can_go_on_is_exit_3(entropy, monkeypatch):
    fail(monkeypatch, IncompleteError("entropy.parquet: the disk is full"))
    assert one_line(entropy(), code=3) == "memdiag: entropy.parquet: the disk is full"


def test_a_full_disk_anywhere_is_exit_3(entropy, monkeypatch):
    fail(monkeypatch, OSError(28, "No space left on device", "/tmp/x"))
    assert "the disk is full" in one_line(entropy(), code=3)


def test_a_bug_is_exit_70_in_one_line(entropy, monkeypatch):
    fail(monkeypatch, RuntimeError("list index\nout of range"))
    line = one_line(entropy(), code=70)
    assert line.startswith("memdiag: a bug of memdiag, please report it: RuntimeError: list index out of range ")
    assert "MEMDIAG_DEBUG=1" in line


def test_an_error_cannot_steer_the_terminal(entropy, monkeypatch):
    fail(monkeypatch, InputError("token '\x1b]0;owned\x07' is unknown"))
    assert one_line(entropy()) == "memdiag: token '\\x1b]0;owned\\x07' is unknown"


def test_debug_shows_the_traceback_of_a_bug_but_no_locals(entropy, monkeypatch):
    monkeypatch.setenv("MEMDIAG_DEBUG", "1")
    secret = "s3cret"
    fail(monkeypatch, RuntimeError(f"{len(secret)} letters"))
    done = entropy()
    assert done.code == 70
    assert done.err.startswith("Traceback (most recent call last):\n")
    assert "in failing" in done.err
    assert "s3cret" not in done.err
    assert done.err.splitlines()[-1].startswith("memdiag: a bug of memdiag")


def test_an_interruption_is_exit_130(entropy, monkeypatch):
    fail(monkeypatch, KeyboardInterrupt())
    done = entropy()
    assert done.code == 130
    assert "Traceback" not in done.err


def test_an_interruption_before_a_command_is_exit_130(memdiag_, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.typer.main, "get_command", interrupted)
    assert memdiag_("schema") == Done(130, "", "")


def test_nothing_ends_with_1_but_a_check(memdiag_, monkeypatch):
    """1 is how typer and rich end when stdout is closed."""
    monkeypatch.setattr(cli.typer.main, "get_command", lambda _: lambda **__: sys.exit(1))
    assert memdiag_("schema").code == 0


# -- environment ---------------------------------------------------------------------------------------------------


def options_of(path="entropy.parquet"):
    return memdiag.read(path).meta["options"]


def test_every_option_has_an_environment_variable_and_the_command_line_wins(entropy, monkeypatch):
    monkeypatch.setenv("MEMDIAG_ENTROPY_ALPHA", "3")
    monkeypatch.setenv("MEMDIAG_ENTROPY_UNIT", "all")
    monkeypatch.setenv("MEMDIAG_ENTROPY_PATCH_SIZE", "4")
    monkeypatch.setenv("MEMDIAG_ENTROPY_SPECTRA", "1")
    monkeypatch.setenv("MEMDIAG_ENTROPY_OUT", "env.parquet")
    assert entropy("--unit", "sequence").out == "env.parquet\n"
    options = options_of("env.parquet")
    assert (options["alpha"], options["unit"], options["patch_size"], options["spectra"]) == (3.0, "sequence", 4, True)
    entropy("--alpha", 1, "-o", "line.parquet")
    assert options_of("line.parquet")["alpha"] == 1.0


def test_a_wrong_environment_variable_is_one_line(entropy, monkeypatch):
    monkeypatch.setenv("MEMDIAG_ENTROPY_ALPHA", "two")
    assert "Invalid value for '--alpha'" in one_line(entropy())


def test_the_network_is_off_unless_asked_for(entropy, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    entropy("--dry-run", "--online")
    assert "HF_HUB_OFFLINE" not in os.environ
    entropy("--dry-run")
    assert os.environ["HF_HUB_OFFLINE"] == "1"


# -- dry run -------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(entropy):
    done = entropy("--dry-run")
    assert (done.code, done.err) == (0, "")
    shown = dict(re.split(r":\s+", line, maxsplit=1) for line in done.out.splitlines())
    assert (shown["rows"], shown["layers"], shown["examples"], shown["device"]) == ("3", "3", "3", "cpu")
    assert {"seconds expected", "memory expected mb", "disk expected kb"} <= set(shown)
    assert left() == []
    plan = json.loads(entropy("--dry-run", "--json").out)
    assert (plan["rows"], plan["layers_skipped"]) == (3, 0)
    assert left() == []


def test_a_dry_run_refuses_what_a_run_would(entropy):
    assert one_line(entropy("--dry-run", checkpoint="broken/nan"))
    assert one_line(entropy("--dry-run", "--layers", "9"))
    assert left() == []


# -- schema and rerun ----------------------------------------------------------------------------------------------


def test_schema_lists_the_reports(memdiag_):
    reports = [
        "check", "counterfactual", "counterfactual.examples", "counterfactual.influence", "counterfactual.models",
        "counterfactual.shard", "counterfactual.sizes", "counterfactual.turn-over-dropout", "diff.columns",
        "diff.movers", "diff.rules", "entropy", "entropy.gradients",
        "prune-memorizers.dynamics", "prune-memorizers.filtration",
        "prune-memorizers.neurons", "prune-memorizers.pruning", "reproduce.claims", "reproduce.effects",
        "reproduce.phases", "reproduce.runs", "score", "score.second-split",
        "train-gapt.compare", "train-gapt.history", "train.examples", "train.history", "train.trajectory",
    ]  # fmt: skip
    assert memdiag_("schema") == Done(0, "".join(f"{name}\n" for name in reports), "")
    assert json.loads(memdiag_("schema", "--json").out) == reports


@pytest.mark.parametrize(("name", "row"), [("entropy", "EntropyRow"), ("entropy.gradients", "GradientRow")])
def test_schema_of_a_name(memdiag_, monkeypatch, name, row):
    fields = dataclasses.fields(getattr(entropy_report, row))
    found = json.loads(memdiag_("schema", name, "--json").out)
    assert [column["name"] for column in found["columns"]] == [field.name for field in fields]
    assert [column["doc"] for column in found["columns"]] == [field.metadata["doc"] for field in fields]
    assert "meta" not in found
    shown = memdiag_("schema", name).out
    for field in fields:
        assert re.search(rf"^{field.name} +{field.metadata['type']} ", shown, re.MULTILINE), field.name


def test_schema_of_a_file_shows_how_it_was_made(entropy, memdiag_):
    entropy()
    found = json.loads(memdiag_("schema", "entropy.parquet", "--json").out)
    assert found["meta"] == memdiag.read("entropy.parquet").meta
    assert found["columns"] == json.loads(memdiag_("schema", "entropy", "--json").out)["columns"]
    shown = memdiag_("schema", "entropy.parquet").out
    assert "report: entropy" in shown
    assert f"torch: {found['meta']['torch']}" in shown


def test_a_file_named_like_a_report_does_not_hide_it(memdiag_):
    Path("entropy").write_text("no report")
    assert memdiag_("schema", "entropy").code == 0
    assert "is not a Parquet file" in one_line(memdiag_("schema", "./entropy"))


def test_schema_does_not_need_torch(fixtures, tmp_path):
    report = tmp_path / "e.parquet"
    memdiag.entropy(fixtures / "tiny-gpt2", data=str(fixtures / "texts.jsonl"), limit=2, out=report)
    check = (
        "import sys\nfrom memdiag.cli import run\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"  # as if they were not installed
        "run(sys.argv[1:])"
    )
    for args in ([], ["entropy"], [report], [report, "--json"]):
        done = process("schema", *args, code=("-c", check))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


def test_rerun_says_the_same(entropy, memdiag_):
    entropy("--unit", "all", "-o", "first.parquet")
    done = memdiag_("rerun", "first.parquet")
    assert done == Done(0, "first.rerun.parquet\nthe same rows\n", "")
    assert Path("first.rerun.parquet").read_bytes() == Path("first.parquet").read_bytes()
    assert memdiag_("rerun", "first.parquet", "-q", "-o", "b.parquet") == Done(0, "b.parquet\n", "")
    done = memdiag_("rerun", "first.parquet", "--json", "-o", "c.parquet")
    assert json.loads(done.out) == {"report": "c.parquet", "same": True, "differing": []}


def test_rerun_says_what_differs(entropy, memdiag_, fixtures, tmp_path):
    shutil.copytree(fixtures / "tiny-gpt2", tmp_path / "model")
    entropy(checkpoint=tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    assert "model: no such path" in one_line(memdiag_("rerun", "entropy.parquet"))
    shutil.copytree(fixtures / "run" / "checkpoint-50", tmp_path / "model")
    for file in (fixtures / "tiny-gpt2").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    done = memdiag_("rerun", "entropy.parquet")
    assert done.code == 0
    assert done.out.startswith("entropy.rerun.parquet\ndiffers in ")
    assert "mbe" in done.out
    found = json.loads(memdiag_("rerun", "entropy.parquet", "--json", "--force").out)
    assert found["same"] is False
    assert "mbe" in found["differing"]


def test_rerun_of_something_else(memdiag_, fixtures):
    assert "no report of memdiag" in one_line(memdiag_("rerun", fixtures / "texts.parquet"))
    assert "is not a Parquet file" in one_line(memdiag_("rerun", fixtures / "texts.jsonl"))
