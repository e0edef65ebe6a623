"""Strange options, damaged files given to `memdiag prune-memorizers`: a report, or one line and exit 2."""

from __future__ import annotations

import os
import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_fuzz_cli import DAMAGE, SEEDS, WORDS, damage_one
from test_fuzz_cli import run as run  # a fixture

from memdiag import tables
from memdiag.tables import column

SMALL = ["--data", "task:modular-addition?p=5", "--width", "6", "--steps", "3", "--corruption", "0.4"]
TRAINING = [
    "--corruption", "--corruption-law", "--train-fraction", "--width", "--activation", "--norm", "--dropout",
    "--weight-decay", "--lr", "--steps", "--train-batch-size", "--eval-every", "--seeds", "--rank-by", "--keep-clean",
    "--fraction", "--n", "--draws", "--plot", "--seed", "--dtype", "--data",
]  # fmt: skip
READING = [
    "--test", "--truth", "--suspects", "--columns", "--model", "--layers", "--tokenizer", "--prefix-tokens",
    "--max-length", "--limit", "--points", "--rank-by", "--keep-clean", "--fraction", "--n", "--draws", "--seed",
    "--dtype", "--device", "--batch-size",
]  # fmt: skip


def judge(run, out, args, what):
    """One line and exit 2, with nothing left; or a whole directory."""
    code, stdout, stderr = run("prune-memorizers", *args, "-q", "-o", out)
    case = f"{what}: exit {code}, {stderr}"
    assert code in (0, 2), case
    assert "Traceback" not in stderr, case
    left = sorted(os.listdir(out.parent)) if out.parent.exists() else []
    if code == 0:
        assert (stdout, stderr) == (f"{out}\n", ""), case
        assert tables.read(out / "pruning.parquet").table.num_rows > 20, case
        assert "out" in left, case
        assert not any(name.endswith((".parts", ".partial")) for name in left), case
        return True
    (line,) = stderr.splitlines() or [""]
    assert line.startswith("memdiag: "), case
    assert line.isprintable(), case
    assert len(line) < 1200, case
    assert stdout == "", case
    assert left == [], case
    return False


def words(rng, options):
    """One or two options, each with something."""
    values = [*WORDS, "1", "3", "0.3", "0.9", "30", "wrong", "norm_product", "float32"]
    return [w for option in rng.sample(options, rng.choice([1, 1, 2])) for w in (option, rng.choice(values))]


def test_strange_values_of_training_options(run, tmp_path):
    seen = []
    for seed in range(50 * SEEDS):
        rng = random.Random(seed)
        folder = tmp_path / f"case-{seed}"
        given = words(rng, TRAINING)
        if any(given[i] == "--steps" and len(given[i + 1]) > 9 for i in range(0, len(given), 2)):
            continue  # a number that is allowed, and a day's work
        seen.append(judge(run, folder / "out", [*SMALL, *given], f"{seed} {given}"))
        shutil.rmtree(folder, ignore_errors=True)
    assert set(seen) == {True, False}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset for the digits' network with a column of truth, and a score of its examples."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    features = [rng.normal(size=64).astype(np.float32) for _ in range(8)]
    columns = {"features": features, "label": [i % 10 for i in range(8)], "bad": [i % 3 == 0 for i in range(8)]}
    pq.write_table(pa.table(columns), folder / "data.parquet")

    from dataclasses import dataclass

    @dataclass(frozen=True)
    class ScoreRow:
        example_id: str = column(pa.string(), "id")
        score: float = column(pa.float64(), "high: suspect")

    rows = [{"example_id": str(i), "score": i / 8} for i in range(8)]
    tables.write(folder / "score.parquet", ScoreRow, [rows], {"report": "score"})
    return folder


def test_strange_values_of_reading_options(run, fixtures, tmp_path, data):
    seen = []
    for seed in range(50 * SEEDS):
        rng = random.Random(seed)
        folder = tmp_path / f"case-{seed}"
        given = words(rng, READING)
        args = [fixtures / "digits-mlp", "--data", data / "data.parquet", "--truth", "bad", "--points", "2", *given]
        seen.append(judge(run, folder / "out", args, f"{seed} {given}"))
        shutil.rmtree(folder, ignore_errors=True)
    assert set(seen) == {True, False}


@pytest.mark.parametrize("name", ["digits-mlp", "tiny-gpt2"])
def test_damaged_checkpoints(run, fixtures, tmp_path, data, name):
    text = ["--data", fixtures / "texts.jsonl", "--test", fixtures / "texts.jsonl", "--limit", "2", "--n", "1"]
    known = ["--data", data / "data.parquet", "--truth", "bad"]
    seen = []
    for seed in range(15 * SEEDS):
        rng = random.Random(f"{name} {seed}")
        folder = tmp_path / f"case-{seed}"
        shutil.copytree(fixtures / name, folder / "checkpoint")
        what = f"{name} {seed} " + damage_one(folder / "checkpoint", rng)
        (folder / "o").mkdir()
        args = [folder / "checkpoint", "--points", "1", *(text if name == "tiny-gpt2" else known)]
        seen.append(judge(run, folder / "o" / "out", args, what))
        shutil.rmtree(folder)
    assert set(seen) == {True, False}


def test_damaged_scores(run, fixtures, tmp_path, data):
    whole, seen = (data / "score.parquet").read_bytes(), []
    for seed in range(25 * SEEDS):
        rng = random.Random(seed)
        folder = tmp_path / f"case-{seed}"
        (folder / "o").mkdir(parents=True)
        change = rng.choice(DAMAGE) if seed else lambda data, rng: data
        (folder / "score.parquet").write_bytes(change(whole, rng))
        args = [fixtures / "digits-mlp", "--data", data / "data.parquet", "--points", "2"]
        args += ["--suspects", f"{folder}/score.parquet:score:0.3"]
        seen.append(judge(run, folder / "o" / "out", args, f"{seed} {getattr(change, '__name__', '')}"))
        shutil.rmtree(folder)
    assert seen[0]
    assert not all(seen)
