"""Strange rules and damaged reports given to `check`, `diff` and `report`: a verdict, or one line and exit 2."""

from __future__ import annotations

import json
import os
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reports import write_kind
from test_fuzz_cli import SEEDS, flip, flip_early, flip_late, noise, truncate
from test_fuzz_cli import run as run  # a fixture

KINDS = ["score", "entropy", "counterfactual", "counterfactual.influence", "train-gapt.history"]
KINDS += ["prune-memorizers.pruning"]
PIECES = [
    "avg(", "count(*)", "loss", "example_id", "'", '"', ")", "(", "<", ">=", "=", "1", "0.5", "-1e999", "NULL", "NaN",
    "FILTER (WHERE", "OVER ()", "CASE WHEN", "SELECT", "FROM report", ";", "--", "/*", "*", "::INT", "[1]",
    "{a: 1}", "$1", "?", "BETWEEN", "AND", "quantile_cont(", "read_csv('/etc/passwd')", "\\",
    "é", "\u202e", "\x00", "list(", "unnest(",
    "DISTINCT", "INTERVAL 1 DAY", "max(", "bool_and(", "base.loss", "new.loss", "+0.1", "loss: ", "±", "%", "x -> x",
]  # fmt: skip
WORDS = ["0", "-1", "nan", "1e309", "0.95", "junit", "json", "github", "fail", "pass", "é", "", "x" * 300, "4GB", "1KB"]
CHECK = ["--where", "--confidence", "--inconclusive", "--format", "--time-limit", "--memory-limit", "--seed", "--rules"]
DIFF = ["--on", "--confidence", "--top", "--inconclusive", "--format", "--time-limit", "--memory-limit", "--rules"]


def judge(run, args, what, made):
    """A verdict, or one line with nothing written. The exit code."""
    code, stdout, stderr = run(*args)
    case = f"{what}: exit {code}, {stderr[:500]}"
    assert code in (0, 1, 2), case
    assert "Traceback" not in stderr, case
    assert not [name for name in os.listdir() if name.endswith((".partial", ".parts"))], case
    if code == 2:
        (line,) = stderr.splitlines() or [""]
        assert line.startswith("memdiag: "), case
        assert line.isprintable(), case
        assert len(line) < 3000, case
        assert stdout == "", case
        assert not os.path.exists(made), case
    else:
        assert os.path.exists(made), case
        assert stdout, case
    return code


def test_strange_rules(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        write_kind(tmp_path / f"{i}.parquet", "train.history", seed=i)
    seen = []
    for seed in range(150 * SEEDS):
        rng = random.Random(f"rule {seed}")
        rule = " ".join(rng.choice(PIECES) for _ in range(rng.randint(1, 6))).replace("loss", "train_loss")
        command, made = (
            (["check", "0.parquet"], "check.parquet") if seed % 2 else (["diff", "0.parquet", "1.parquet"], "diff")
        )
        seen.append(
            judge(run, [*command, "--rule", rule, "--time-limit", "5", "-q"], f"{seed} {command[0]} {rule!r}", made)
        )
        shutil.rmtree(made) if os.path.isdir(made) else os.path.exists(made) and os.unlink(made)
    assert 2 in seen


@pytest.mark.parametrize(("command", "known"), [("check", CHECK), ("diff", DIFF)])
def test_strange_values_of_options(run, tmp_path, monkeypatch, command, known):
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        write_kind(tmp_path / f"{i}.parquet", "train.history", seed=i)
    seen = []
    for seed in range(60 * SEEDS):
        rng = random.Random(f"{command} {seed}")
        given = [word for name in rng.sample(known, rng.randint(1, 2)) for word in (name, rng.choice(WORDS))]
        about, made = (
            (["check", "0.parquet"], "check.parquet")
            if command == "check"
            else (["diff", "0.parquet", "1.parquet"], "diff")
        )
        seen.append(judge(run, [*about, "--rule", "count(*) < 3", *given], f"{seed} {given}", made))
        shutil.rmtree(made) if os.path.isdir(made) else os.path.exists(made) and os.unlink(made)
    assert {1, 2} <= set(seen)


# -- damaged reports -----------------------------------------------------------------------------------------------


def other_meta(path, rng):
    """The metadata with a value of another kind in one place, or with one place missing."""
    table = pq.read_table(path)
    meta = json.loads(table.schema.metadata[b"memdiag"])
    key = rng.choice([*meta, "summary", "identity", "partial", "noise_floor", "dataset", "checkpoint"])
    meta[key] = rng.choice(
        [None, -1, 2**70, 1e300, "x", [], {}, [[]], True, {"a": {"b": [None]}}, "\ud800", "<script>"]
    )
    if rng.random() < 0.2:
        del meta[key]
    text = json.dumps(meta).encode() if rng.random() < 0.9 else rng.randbytes(30)
    pq.write_table(table.replace_schema_metadata({b"memdiag": text}), path)


def other_column(path, rng):
    """A column of another type, of nulls, missing, or there twice."""
    table = pq.read_table(path)
    name, n = rng.choice(table.column_names), table.num_rows
    at = table.column_names.index(name)
    change = rng.choice(["type", "null", "drop", "rename", "nan"])
    if change == "drop":
        table = table.drop_columns([name])
    elif change == "rename":
        names = list(table.column_names)
        names[at] = rng.choice(["", "a b", 'q"', "é", "group", "x" * 300, "\u202ename"])
        table = table.rename_columns(names)
    else:
        new = {
            "type": rng.choice([["x"] * n, [True] * n, [[1, 2]] * n, [b"\xff"] * n, [{"a": 1}] * n, [-(2**63)] * n]),
            "null": [None] * n,
            "nan": [rng.choice([float("nan"), float("inf"), 1e308, -0.0]) for _ in range(n)],
        }[change]
        table = table.set_column(at, name, pa.array(new))
    pq.write_table(table, path)


def damaged(path, rng):
    change = rng.choice(
        [truncate, flip, flip_early, flip_late, noise, other_meta, other_meta, other_column, other_column]
    )
    if change in (other_meta, other_column):
        change(path, rng)
    else:
        path.write_bytes(change(path.read_bytes(), rng))
    return change.__name__


@pytest.mark.parametrize("command", ["check", "diff", "report"])
def test_damaged_reports(run, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    seen = []
    for seed in range({"check": 90, "diff": 90, "report": 25}[command] * SEEDS):
        rng = random.Random(f"{command} {seed}")
        kind = rng.choice(KINDS)
        folder = tmp_path / f"case-{seed}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        _, hurt = (write_kind(folder / f"{name}.parquet", kind, seed=seed) for name in ("whole", "hurt"))
        what = damaged(hurt, rng)
        begins = {
            "check": (["check", "hurt.parquet", "--rule", "count(*) = 6", "--confidence", "0.9"], "check.parquet"),
            "diff": (["diff", "whole.parquet", "hurt.parquet", "--anyway", "--rule", "count(*) = 6"], "diff"),
            "report": (["report", "hurt.parquet", "--html", "page.html"], "page.html"),
        }
        args, made = begins[command]
        seen.append(judge(run, args, f"{command} {seed} {kind} {what}", made))
        if command == "report" and seen[-1] == 0:
            assert "<script" not in (folder / made).read_text(encoding="utf-8").lower()
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder)
    assert {0, 2} <= set(seen)
