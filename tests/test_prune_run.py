"""memdiag prune-memorizers, carried out: files, identity, resuming, seeds side by side, refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import memdiag
from memdiag import cli, grokking, prune_report, prune_run, tables
from memdiag.checkpoint import open_checkpoints
from memdiag.dataset import open_dataset
from memdiag.errors import InputError

QUICK: dict[str, Any] = {
    "data": "task:modular-addition?p=13", "width": 24, "corruption": 0.3, "steps": 40, "eval_every": 10,
}  # fmt: skip
WORDS = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command in tmp_path: its exit code, stdout and stderr."""

    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.run(["prune-memorizers", *args, "--out", str(tmp_path / "out")])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def test_the_directory_holds_what_the_docs_say(tmp_path: Path) -> None:
    found = memdiag.prune_memorizers(out=tmp_path / "out", filter_frequencies=True, n=5, **QUICK)
    assert sorted(files(tmp_path / "out")) == [
        "dynamics.parquet", "filtration.parquet", "neurons.parquet", "pruning.parquet",
        "seed-0/pruned/config.json", "seed-0/pruned/model.safetensors",
        "seed-0/trained/config.json", "seed-0/trained/model.safetensors",
    ]  # fmt: skip
    assert os.listdir(tmp_path) == ["out"]
    assert found.path == tmp_path / "out"
    assert found.table.equals(tables.read(tmp_path / "out" / "pruning.parquet").table)
    for name, row in prune_report.REPORTS.items():
        report = getattr(found, name)
        assert report.table.schema.equals(tables.schema_of(row))
        assert report.meta["report"] == f"prune-memorizers.{name}"
        assert report.meta["identity"]["setting"]["p"] == 13
        assert report.meta["corrupted_label"] == "drawn from all classes, may be the true one"
    assert len(found.to_pandas()) == found.table.num_rows


def test_in_memory_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = memdiag.prune_memorizers(**QUICK)
    assert os.listdir(tmp_path) == []
    assert found.path is None
    assert found.pruning.path is None
    assert found.dynamics is not None
    assert found.filtration is None


def test_the_checkpoints_are_checkpoints(tmp_path: Path) -> None:
    found = memdiag.prune_memorizers(out=tmp_path / "out", n=5, **QUICK)
    trained, pruned = (open_checkpoints(tmp_path / "out" / "seed-0" / kind)[0] for kind in ("trained", "pruned"))
    assert trained.task == found.meta["task"][0]
    dataset = open_dataset(str(trained.task))
    assert (
        dataset.n_examples
        == found.meta["networks"][0]["examples"]["corrupted"] + (found.meta["networks"][0]["examples"]["clean"])
    )
    _, last = grokking.weights_of(pruned.load())  # type: ignore[arg-type]
    assert int((last == 0).all(0).sum()) == 5
    report = memdiag.entropy(tmp_path / "out" / "seed-0" / "trained")  # its own task is its data
    assert report.table.num_rows > 0


def test_the_same_again_gives_the_same_bytes(tmp_path: Path) -> None:
    memdiag.prune_memorizers(out=tmp_path / "out", **QUICK)
    before = files(tmp_path / "out")
    stamp = (tmp_path / "out" / "pruning.parquet").stat().st_mtime_ns
    memdiag.prune_memorizers(out=tmp_path / "out", **QUICK)  # it is there
    assert (tmp_path / "out" / "pruning.parquet").stat().st_mtime_ns == stamp
    memdiag.prune_memorizers(out=tmp_path / "out", force=True, **QUICK)
    assert (tmp_path / "out" / "pruning.parquet").stat().st_mtime_ns != stamp
    assert files(tmp_path / "out") == before


def test_seeds_side_by_side_are_those_trained_alone(tmp_path: Path) -> None:
    memdiag.prune_memorizers(out=tmp_path / "both", seeds=[3, 1], **QUICK)
    for seed in (1, 3):
        memdiag.prune_memorizers(out=tmp_path / str(seed), seeds=str(seed), **QUICK)
        assert files(tmp_path / "both" / f"seed-{seed}") == files(tmp_path / str(seed) / f"seed-{seed}")
    both = tables.read(tmp_path / "both" / "neurons.parquet").table
    assert both["seed"].unique().to_pylist() == [3, 1]  # as asked for
    for seed in (1, 3):
        alone = tables.read(tmp_path / str(seed) / "neurons.parquet").table
        assert both.filter([s == seed for s in both["seed"].to_pylist()]).equals(alone)
    assert len(tables.read_meta(tmp_path / "both" / "pruning.parquet")["networks"]) == 2


@pytest.mark.parametrize("moment", ["save", "write", "assemble", "join"])
def test_going_on_after_any_end_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # in this process, where it can be stopped
    memdiag.prune_memorizers(out=tmp_path / "whole", seeds="0,1", n=3, **QUICK)
    place = {
        "save": (prune_run.checkpoints, "save"),
        "write": (tables, "write"),
        "assemble": (prune_run.os, "replace"),
        "join": (tables, "join"),
    }[moment]
    original, n = getattr(*place), 0

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal n
        n += 1
        if n == {"save": 3, "write": 6, "assemble": 2, "join": 2}[moment] and moment != "assemble":
            raise KeyboardInterrupt
        if moment == "assemble" and str(args[1]).endswith("seed-1"):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(*place, stopping)
        with pytest.raises(KeyboardInterrupt):
            memdiag.prune_memorizers(out=tmp_path / "out", seeds="0,1", n=3, **QUICK)
    trained: list[int] = []
    train = grokking.train
    monkeypatch.setattr(grokking, "train", lambda *a, seed, **k: trained.append(seed) or train(*a, seed=seed, **k))
    memdiag.prune_memorizers(out=tmp_path / "out", seeds="0,1", n=3, **QUICK)
    assert trained == ([1] if moment in ("save", "write") else [])  # what was finished is not done again
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


@pytest.mark.slow
def test_kill_9_at_any_step_that_touches_a_file(tmp_path: Path) -> None:
    """The n-th change of the output is the last; then the same command again."""
    code = (
        "import os, signal, sys\n"
        "import memdiag.prune_run\n"
        "n, where = int(sys.argv[1]), sys.argv[2]\n"
        "seen = [0]\n"
        "def hook(event, args):\n"
        "    if event in ('os.mkdir', 'open', 'os.rename', 'os.remove', 'os.rmdir') and args:\n"
        "        if where in os.path.abspath(os.fsdecode(args[0] or '')):\n"
        "            seen[0] += 1\n"
        "            if seen[0] == n:\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(hook)\n"
        "from memdiag import cli\n"
        "cli.run(sys.argv[3:])\n"
    )
    words = ["prune-memorizers", *WORDS, "--n", "3"]
    memdiag.prune_memorizers(out=tmp_path / "whole" / "out", n=3, **QUICK)
    expected = files(tmp_path / "whole" / "out")
    kills = 0
    for n in (1, 2, 4, 7, 11, 16, 22, 29, 37, 46, 56, 67, 80, 100):
        where = tmp_path / f"k{n}"
        where.mkdir()
        command = [sys.executable, "-c", code, str(n), str(where), *words, "--out", str(where / "out")]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        kills += 1
        with pytest.raises(SystemExit) as ended:
            cli.run([*words, "--out", str(where / "out"), "--quiet"])
        assert ended.value.code == 0
        assert files(where / "out") == expected, n
        assert os.listdir(where) == ["out"]
        shutil.rmtree(where)
    assert kills >= 5


def test_another_run_in_the_same_place_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    memdiag.prune_memorizers(out=out, **QUICK)
    before = files(out)
    with pytest.raises(InputError, match=r"differs in options.corruption, setting.corruption"):
        memdiag.prune_memorizers(out=out, **{**QUICK, "corruption": 0.4})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="is not empty and holds no report"):
        memdiag.prune_memorizers(out=tmp_path / "mine", **QUICK)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; give a directory"):
        memdiag.prune_memorizers(out=tmp_path / "file", **QUICK)
    assert files(out) == before
    memdiag.prune_memorizers(out=tmp_path / "mine", force=True, **QUICK)
    assert (tmp_path / "mine" / "thesis.tex").exists()  # --force replaces what is ours


def test_rerun_says_that_it_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memdiag.prune_memorizers(out=tmp_path / "out", **QUICK)
    for name in ("neurons", "pruning"):
        with pytest.raises(SystemExit) as ended:
            cli.run(["rerun", str(tmp_path / "out" / f"{name}.parquet"), "--json"])
        assert ended.value.code == 0
        assert json.loads(capsys.readouterr().out)["same"] is True
    assert sorted(files(tmp_path / "out.rerun")) == sorted(files(tmp_path / "out"))


def test_what_the_command_prints(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = run(*WORDS)
    assert (code, out) == (0, f"{tmp_path}/out\n")
    assert err == ""
    code, out, _ = run(*WORDS, "--json", "--plot", str(tmp_path / "p.svg"))
    summary = json.loads(out)
    assert summary["directory"] == f"{tmp_path}/out"
    assert summary["plot"] == str(tmp_path / "p.svg")
    assert summary["networks"][0]["before"]["train_clean_acc"] > 0
    assert "<svg" in (tmp_path / "p.svg").read_text()
    code, out, _ = run(*WORDS, "--show")
    assert "corrupted, as trained" in out
    assert "IPR" in out


def test_a_dry_run_writes_nothing(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, _ = run(*WORDS, "--dry-run", "--json", "--seeds", "0,1,2")
    assert code == 0
    plan = json.loads(out)
    assert (plan["seeds"], plan["neurons"], plan["training_pairs"], plan["corrupted_pairs"]) == (3, 24, 84, 25)
    assert plan["seconds_expected"] >= 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--corruption 1", "less than 1"),
        ("--corruption nan", "corruption is nan"),
        ("--corruption 0", "leaves no corrupted ones"),
        ("--width 0", "--width must be at least 1, got 0"),
        ("--seeds 0,0", "different whole numbers"),
        ("--seeds x", "different whole numbers"),
        ("--draws 19", "at least 20"),
        ("--truth corrupted", "--truth goes with a checkpoint"),
        ("--test x.csv", "--test goes with a checkpoint"),
        ("--rank-by iprs", "did you mean 'ipr'"),
        ("--keep-clean 0", "--keep-clean must be above 0"),
        ("--n 3 --fraction 0.1", "give one of them"),
        ("--fraction 1.5", "a share from 0 to 1"),
        ("--n -1", "at least 0"),
        ("--seed -1", "at least 0"),
        ("--norm group", "no norm 'group'"),
        ("--activation gelu", "no activation 'gelu'"),
        ("--weight-decay 1000", "must lie between 0 and 1"),
        ("--lr inf", "finite number above 0"),
        ("--dropout 1", "less than 1"),
        ("--steps -1", "at least 0"),
        ("--train-batch-size 0", "at least 1"),
        ("--corruption-law wrongly", "did you mean 'wrong'?"),
        ("--train-fraction 0", "a share between 0 and 1"),
        ("--plot curve.pdf", "must end in .png or .svg"),
        ("no/such/checkpoint", "no such path"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, words: str, says: str
) -> None:
    code, out, err = run(*words.split())
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("memdiag: ")
    assert says in line
    assert os.listdir(tmp_path) == []


def test_names_that_are_not_options_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'corruption'"):
        memdiag.prune_memorizers(coruption=0.3)
