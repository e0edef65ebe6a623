"""Strange options and damaged directories given to `memdiag counterfactual`: the right report, or one line."""

from __future__ import annotations

import json
import os
import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_fuzz_cli import DAMAGE, SEEDS, WORDS
from test_fuzz_cli import run as run  # a fixture

from memdiag import counterfactual_run, counterfactual_view, tables
from memdiag.counterfactual_report import counterfactual

OPTIONS = [
    "--test", "--test-fraction", "--models", "--subset-ratio", "--design", "--until-width", "--max-models",
    "--first-model", "--group-by", "--truth", "--min-influence", "--top", "--sizes", "--corruption", "--arch",
    "--config", "--width", "--depth", "--epochs", "--batch-size", "--optimizer", "--lr", "--schedule", "--warmup",
    "--weight-decay", "--clip", "--columns", "--tokenizer", "--max-length", "--limit", "--engine", "--ray-gpus",
    "--chunk", "--seed", "--device", "--plot", "--data",
]  # fmt: skip
FLAGS = ["--turn-over-dropout", "--no-standardize", "--dry-run", "--json"]
BASE = ["--epochs", "1", "--width", "4", "--batch-size", "8", "--chunk", "4", "--models", "3"]
REPORTS = ("counterfactual.parquet", "influence.parquet", "models.parquet")


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """In this process, and without drawings."""
    monkeypatch.setattr(counterfactual_run, "_takes_all", lambda job: True)
    for name in ("plot_report", "plot_sizes", "plot_turn_over"):
        monkeypatch.setattr(counterfactual_view, name, lambda found, path: path.write_bytes(b"drawn"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Data; a run of 3 models, one of 2 more, and the 5 at once."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    for name, n in (("data", 16), ("test", 4)):
        rows = [
            {"id": f"{name}{i}", "x": rng.normal(size=3).tolist(), "y": i % 2, "w": i % 5 == 0, "g": i // 2}
            for i in range(n)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"epochs": 1, "width": 4, "batch_size": 8, "chunk": 4, "test": str(folder / "test.jsonl"), "truth": "w"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counterfactual_run, "_takes_all", lambda job: True)
        patch.setattr(counterfactual_view, "plot_report", lambda found, path: path.write_bytes(b"drawn"))
        for name, first, models in (("a", 0, 3), ("b", 3, 2), ("all", 0, 5)):
            counterfactual(folder / "data.jsonl", out=folder / name, first_model=first, models=models, **options)
        options["epochs"] = 2
        counterfactual(folder / "data.jsonl", out=folder / "other", models=3, **options)
    return folder


def judge(found, what):
    """0; or one line, and exit 2 or 3."""
    code, stdout, stderr = found
    case = f"{what}: exit {code}, {stderr}"
    assert code in (0, 2, 3), case
    assert "Traceback" not in stderr, case
    if code:
        lines = [line for line in stderr.splitlines() if line.startswith("memdiag: ")]
        assert lines, case
        assert all(line.isprintable() and len(line) < 1500 for line in lines), case
        assert not [line for line in stderr.splitlines() if "Warning" in line], case
        assert stdout == "", case
    return code


def test_strange_values_of_options(run, small, tmp_path):
    values = [*WORDS, "1", "2", "8", "0.3", "30", "1e30", "balanced", "bernoulli", "g", "w", "ray", "-1", "2,4", "mlp",
              "cnn", "transformer", "gpt2-tiny", "constant", "adamw", "0.999999",
              str(small / "test.jsonl")]  # fmt: skip
    seen = []
    for seed in range(50 * SEEDS):
        rng = random.Random(seed)
        folder = tmp_path / f"case-{seed}"
        folder.mkdir()
        given = [word for option in rng.sample(OPTIONS, rng.choice([1, 1, 2])) for word in (option, rng.choice(values))]
        given += rng.sample(FLAGS, rng.choice([0, 0, 0, 1]))
        most = ["--max-models", "20"]
        args = ["counterfactual", small / "data.jsonl", *BASE, *most, *given, "-q", "-o", folder / "out"]
        code = judge(run(*args), f"{seed} {given}")
        if code == 2:
            left = [path for path in folder.rglob("*") if path.is_file()]
            assert not [path for path in left if path.name.endswith(".partial")], given
        seen.append(code)
        shutil.rmtree(folder)
    assert {0, 2} <= set(seen)


# -- damage --------------------------------------------------------------------------------------------------------


def without_values(data, rng):
    """A good Parquet file whose numbers are all NaN or null."""
    table = pq.read_table(pa.BufferReader(data))
    columns = []
    for field in table.schema:
        kept = not pa.types.is_floating(field.type) or rng.random() < 0.5
        columns.append(table[field.name] if kept else pa.array([float("nan")] * len(table), type=field.type))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=table.schema), sink)
    return sink.getvalue().to_pybytes()


def without_rows(data, rng):
    sink = pa.BufferOutputStream()
    pq.write_table(pq.read_table(pa.BufferReader(data)).slice(0, rng.choice([0, 0, 1])), sink)
    return sink.getvalue().to_pybytes()


def of_another_type(data, rng):
    """A good Parquet file with a column that is text, or not there, or doubled in name."""
    table = pq.read_table(pa.BufferReader(data))
    at = rng.randrange(table.num_columns)
    name, values = table.column_names[at], pa.array(["x"] * len(table))
    table = rng.choice(
        [table.drop_columns([name]), table.set_column(at, name, values), table.append_column(name, values)]
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def of_other_words(data, rng):
    """A good Parquet file that says something else of itself."""
    table = pq.read_table(pa.BufferReader(data))
    about = json.loads(table.schema.metadata[b"memdiag"])
    key = rng.choice(sorted(about))
    about[key] = rng.choice([None, -1, [], {}, "x", 2**70, 1e300, True, {"a": "b"}, [[]]])
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({b"memdiag": json.dumps(about).encode()}), sink)
    return sink.getvalue().to_pybytes()


def damage(folder, small, rng):
    """One file of a run damaged, gone, a directory, or another's; what was done."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    top = ("examples.parquet", "summary.json", "counterfactual.parquet", "models.parquet")
    name = rng.choice([*names, *(name for name in top if name in names)])
    path = folder / name
    good = [without_values, without_rows, of_another_type, of_other_words]
    kind = rng.choice(["damage", "damage", "good", "good", "foreign", "remove", "directory"])
    if kind == "good" and name.endswith(".parquet"):
        change = rng.choice(good)
        path.write_bytes(change(path.read_bytes(), rng))
        return name, change.__name__
    if kind == "foreign":
        other = rng.choice([found for found in (small / "other").rglob("*") if found.is_file()])
        path.write_bytes(other.read_bytes())
        return name, f"as {other.name} of another run"
    if kind in ("remove", "directory"):
        path.unlink()
        if kind == "directory":
            path.mkdir()
        return name, kind
    change = rng.choice(DAMAGE)
    path.write_bytes(change(path.read_bytes(), rng) if path.stat().st_size else b"?")
    return name, change.__name__


def assert_right(found, wanted, case):
    for name in REPORTS:
        skipped = {"seconds", "engine"}  # what a clock said may be lost
        different = tables.differing(tables.read(found / name), tables.read(wanted / name))
        assert set(different) <= skipped, f"{case}: {name} differs in {different}"


def test_damaged_directories(run, small, tmp_path):
    """Topped up they are right; asked for again, or for other pairs, they are what they were or told to be damaged."""
    seen = []
    for seed in range(45 * SEEDS):
        rng = random.Random(f"directory {seed}")
        folder = tmp_path / f"case-{seed}"
        shutil.copytree(small / "a", folder / "out")
        what = [damage(folder / "out", small, rng) for _ in range(rng.choice([1, 1, 2]))]
        args = ["counterfactual", small / "data.jsonl", *BASE, "--test", small / "test.jsonl", "--truth", "w"]
        more = rng.choice([["--models", "5"], ["--models", "5"], ["--top", "2"], []])
        code = judge(run(*args, *more, "-q", "-o", folder / "out"), f"{seed} {what} {more}")
        if code == 0 and more == ["--models", "5"]:
            assert_right(folder / "out", small / "all", f"{seed} {what}")
        seen.append(code)
        shutil.rmtree(folder)
    assert {0, 2} <= set(seen)
    assert seen.count(0) > len(seen) / 4


def test_damaged_runs_are_not_merged(run, small, tmp_path):
    seen = []
    for seed in range(30 * SEEDS):
        rng = random.Random(f"merge {seed}")
        folder = tmp_path / f"case-{seed}"
        for name in ("a", "b"):
            shutil.copytree(small / name, folder / name)
        what = damage(folder / rng.choice("ab"), small, rng)
        out = folder / "ab"
        code = judge(run("counterfactual", "merge", folder / "a", folder / "b", "-q", "-o", out), f"{seed} {what}")
        if code == 0:
            assert_right(out, small / "all", f"{seed} {what}")
        else:
            assert not (out / "counterfactual.parquet").exists(), f"{seed} {what}"
        seen.append(code)
        shutil.rmtree(folder)
    assert {0, 2} <= set(seen)


def test_what_was_begun_and_damaged(run, small, tmp_path):
    """Shards and the parts of a run that never ended."""
    seen = []
    for seed in range(12 * SEEDS):
        rng = random.Random(f"begun {seed}")
        folder = tmp_path / f"case-{seed}"
        shutil.copytree(small / "a", folder / "out")
        for name in (*REPORTS, "summary.json"):
            (folder / "out" / name).unlink()
        parts = folder / ".out.parts"
        parts.mkdir()
        shutil.copy(folder / "out" / "examples.parquet", parts)
        identity = tables.read_meta(small / "a" / "counterfactual.parquet")["identity"]
        (parts / "identity.json").write_text(json.dumps(identity))
        what = damage(rng.choice([parts, folder / "out" / "shards"]), small, rng) if seed else "nothing"
        args = ["counterfactual", small / "data.jsonl", *BASE, "--test", small / "test.jsonl", "--truth", "w"]
        code = judge(run(*args, "--models", "5", "-q", "-o", folder / "out"), f"{seed} {what}")
        if code == 0:
            assert_right(folder / "out", small / "all", f"{seed} {what}")
            assert sorted(os.listdir(folder)) == ["out"], f"{seed} {what}"
        seen.append(code)
        shutil.rmtree(folder)
    assert seen[0] == 0
