"""Strange options, damaged configs, data and checkpoints given to `memdiag train-gapt`: a run, or one line."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
from test_fuzz_cli import DAMAGE, SEEDS, WORDS, damage_one
from test_fuzz_cli import run as run  # a fixture

from memdiag import tables

CONFIG = {
    "model_type": "gpt2", "vocab_size": 260, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
OPTIONS = [
    "--config", "--val", "--save-every", "--gate", "--weight", "--layers", "--patch-size", "--ce-patience",
    "--mbe-patience", "--ce-delta", "--mbe-delta", "--spike", "--smoothing", "--share", "--ratio-every", "--batch-size",
    "--accumulate", "--max-length", "--lr", "--schedule", "--warmup", "--weight-decay", "--beta2", "--clip",
    "--columns", "--tokenizer", "--limit", "--seed", "--dtype", "--device", "--plot", "--seeds",
]  # fmt: skip
FLAGS = ["--alternate", "--documents", "--reset-on-enter", "--keep-on-enter", "--reset-on-exit", "--shard"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A config and texts for runs of a tenth of a second."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    texts = [{"id": f"t{i}", "text": f"a short line of text, number {i}"} for i in range(20)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def judge(run, out, args, what):
    """A whole directory; or one line, exit 2 with nothing left, or exit 3 where training diverged."""
    code, stdout, stderr = run("train-gapt", *args, "-q", "-o", out)
    case = f"{what}: exit {code}, {stderr}"
    assert code in (0, 2, 3), case
    assert "Traceback" not in stderr, case
    if code == 0:
        assert (stdout, stderr) == (f"{out}\n", ""), case
        assert tables.read(out / "history.parquet").table.num_rows == 3, case
        assert (out / "checkpoint-3" / "model.safetensors").exists(), case
        assert not any(name.endswith((".parts", ".partial")) for name in os.listdir(out.parent)), case
        return 0
    (line,) = stderr.splitlines() or [""]
    assert line.startswith("memdiag: "), case
    assert line.isprintable(), case
    assert len(line) < 1200, case
    assert stdout == "", case
    if code == 3:
        assert "is not finite" in line, case
    else:
        left = [
            name
            for name in os.listdir(out.parent)
            if not (out.parent / name).is_dir() or any((out.parent / name).iterdir())
        ]
        assert left == [], case
    return code


def test_strange_values_of_options(run, small, tmp_path):
    values = [*WORDS, "1", "2", "8", "0.3", "30", "1e30", "random", "constant", "linear", "bfloat16", "1-2", "-1"]
    seen = []
    for seed in range(60 * SEEDS):
        rng = random.Random(seed)
        folder = tmp_path / f"case-{seed}"
        folder.mkdir()
        given = [w for option in rng.sample(OPTIONS, rng.choice([1, 1, 2])) for w in (option, rng.choice(values))]
        given += rng.sample(FLAGS, rng.choice([0, 0, 1]))
        args = ["--config", small / "config.json", "--data", small / "texts.jsonl", "--steps", "3", "--batch-size", "2"]
        seen.append(judge(run, folder / "out", [*args, *given], f"{seed} {given}"))
        shutil.rmtree(folder, ignore_errors=True)
    assert {0, 2} <= set(seen)


@pytest.mark.parametrize("name", ["config.json", "texts.jsonl"])
def test_damaged_files(run, small, tmp_path, name):
    whole, seen = (small / name).read_bytes(), []
    for seed in range(25 * SEEDS):
        rng = random.Random(f"{name} {seed}")
        folder = tmp_path / f"case-{seed}"
        (folder / "o").mkdir(parents=True)
        change = rng.choice(DAMAGE)
        (folder / name).write_bytes(change(whole, rng))
        at = {other: small / other for other in ("config.json", "texts.jsonl")} | {name: folder / name}
        args = ["--config", at["config.json"], "--data", at["texts.jsonl"], "--steps", "3", "--batch-size", "2"]
        seen.append(judge(run, folder / "o" / "out", args, f"{name} {seed} {change.__name__}"))
        shutil.rmtree(folder)
    assert {0, 2} <= set(seen)


def test_damaged_checkpoints(run, fixtures, small, tmp_path):
    seen = []
    for seed in range(20 * SEEDS):
        rng = random.Random(seed)
        folder = tmp_path / f"case-{seed}"
        shutil.copytree(fixtures / "tiny-gpt2", folder / "checkpoint")
        what = f"{seed} " + damage_one(folder / "checkpoint", rng)
        (folder / "o").mkdir()
        args = [folder / "checkpoint", "--data", small / "texts.jsonl", "--steps", "3", "--batch-size", "2"]
        seen.append(judge(run, folder / "o" / "out", [*args, "--max-length", "16"], what))
        shutil.rmtree(folder)
    assert {0, 2} <= set(seen)
