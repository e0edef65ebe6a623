"""Damaged checkpoints and datasets given to `memdiag entropy`: always a report, or one line and exit 2."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import random
import shutil
import signal
import struct
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save

import memdiag
from memdiag import cli

SEEDS = int(os.environ.get("MEMDIAG_FUZZ_SEEDS", "1"))  # times the number of cases

ROWS = [{"id": f"id-{i}", "text": f"the {i}th short line, naïve “café”", "label": i % 2} for i in range(6)]
TOKENS = {"id": [r["id"] for r in ROWS], "input_ids": [list(range(2, 4 + 5 * i)) for i in range(6)]}


def as_bytes(write, *args, **options):
    sink = io.BytesIO()
    write(*args, sink, **options)
    return sink.getvalue()


def arrays():
    rng = np.random.default_rng(0)
    return {"features": rng.normal(size=(6, 64)).astype(np.float32), "label": np.arange(6) % 10}


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = "".join(["id,text,label\n", *(f'{r["id"]},"{r["text"]}",{r["label"]}\n' for r in ROWS)]).encode()
DATA = {  # the suffix, a whole file, and the checkpoint that can read it
    "a.jsonl": (JSONL, "tiny-gpt2"),
    "a.jsonl.gz": (gzip.compress(JSONL, mtime=0), "tiny-gpt2"),
    "a.csv": (CSV, "tiny-gpt2"),
    "a.txt": ("\n".join(r["text"] for r in ROWS).encode(), "tiny-bert"),
    "text.parquet": (as_bytes(pq.write_table, pa.Table.from_pylist(ROWS)), "tiny-llama"),
    "ids.parquet": (as_bytes(pq.write_table, pa.table(TOKENS), compression="none"), "tiny-gpt2"),
    "a.npz": (as_bytes(lambda sink: np.savez(sink, **arrays())), "digits-mlp"),
    "a.safetensors": (save(arrays()), "digits-mlp"),
}  # fmt: skip
CHECKPOINTS = {"tiny-gpt2": "a.jsonl", "tiny-llama": "text.parquet", "tiny-bert": "a.txt", "digits-mlp": "a.npz"}


# -- damage --------------------------------------------------------------------------------------------------------


def truncate(data, rng):
    return data[: rng.randrange(len(data))]


def flip(data, rng):
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 40])):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_early(data, rng):
    """In the header of most formats."""
    out = bytearray(data)
    out[rng.randrange(min(200, len(out)))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_late(data, rng):
    """In the footer of Parquet and zip, in the weights of safetensors."""
    out = bytearray(data)
    out[-1 - rng.randrange(min(200, len(out)))] ^= 1 << rng.randrange(8)
    return bytes(out)


def empty(data, rng):
    return b""


def noise(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.randrange(1, 50)) + data[at:]


def huge_header(data, rng):
    return struct.pack("<Q", rng.choice([2**63 - 1, 2**40, len(data), 100_000_001])) + data[8:]


def other_digit(data, rng):
    at = [i for i, byte in enumerate(data) if byte in b"0123456789"]
    if not at:
        return flip(data, rng)
    i = rng.choice(at)
    return (
        data[:i]
        + rng.choice([b"9", b"-1", b"1e9", b"0", b'"x"', b"null", b"1.5", b"99999999999999999999"])
        + data[i + 1 :]
    )


def other_value(data, rng):
    """One value of a JSON object replaced by something of another kind."""
    try:
        value = json.loads(data)
        key = rng.choice(sorted(value))
        value[key] = rng.choice([None, -1, 0, 2**70, 1e300, "x", [], {}, [[]], True, "../../etc/passwd"])
    except (ValueError, TypeError, IndexError):
        return flip(data, rng)
    return json.dumps(value).encode()


DAMAGE = [truncate, truncate, flip, flip_early, flip_late, empty, noise, huge_header, other_digit, other_value]


def damage_one(folder, rng):
    """Damage, rename or remove one file of a checkpoint."""
    names = sorted(path.name for path in folder.iterdir())
    name = rng.choice([*names, "config.json"] if "config.json" in names else names)
    file = folder / name
    kind = rng.choice(["damage"] * 8 + ["rename", "remove"])
    if kind == "damage":
        change = rng.choice(DAMAGE)
        file.write_bytes(change(file.read_bytes(), rng))
        return f"{name}: {change.__name__}"
    if kind == "remove":
        file.unlink()
        return f"{name}: removed"
    new = rng.choice([*names, "weights.pt", "pytorch_model.bin", "a\nb.json", "é.safetensors"])
    file.replace(folder / new)
    return f"{name}: now {new!r}"


# -- what comes of it ----------------------------------------------------------------------------------------------


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """(exit code, stderr) of `memdiag entropy`, with Python's warnings shown as they are to a user."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def run(*args):
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("default")
            for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", hidden)
            with pytest.raises(SystemExit) as caught:
                cli.run([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return caught.value.code, out, err + "".join(f"{w.category.__name__}: {w.message}\n" for w in shown)

    yield run
    signal.signal(signal.SIGTERM, before)
    logging.getLogger("memdiag").handlers.clear()
    logging.getLogger("memdiag").setLevel(logging.NOTSET)


def judge(run, folder, checkpoint, data, what):
    """Run the command; True if there was a report. Everything else is one line on stderr and exit 2."""
    out = folder / "e.parquet"
    code, stdout, stderr = run("entropy", checkpoint, "-d", data, "--limit", 3, "--unit", "all", "-q", "-o", out)
    case = f"{what}: exit {code}, {stderr}"
    assert code in (0, 2), case
    assert "Traceback" not in stderr, case
    if code == 0:
        assert (stdout, stderr) == (f"{out}\n", ""), case
        rows = memdiag.read(out).table.to_pylist()
        assert rows, case
        for row in rows:
            assert row["mbe"] is None or 0 <= row["mbe"] <= row["mbe_max"] + 1e-6, case
        assert os.listdir(folder) == ["e.parquet"], case
        return True
    (line,) = stderr.splitlines() or [""]
    assert line.startswith("memdiag: "), case
    assert len(line) < 1200, case
    assert line.isprintable(), case
    assert stdout == "", case
    assert os.listdir(folder) == [], case
    return False


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_damaged_checkpoints(run, fixtures, tmp_path, name):
    data = tmp_path / CHECKPOINTS[name]
    data.write_bytes(DATA[CHECKPOINTS[name]][0])
    seen = []
    for seed in range(30 * SEEDS):
        rng = random.Random(f"{name} {seed}")
        folder = tmp_path / f"case-{seed}"
        (folder / "out").mkdir(parents=True)
        shutil.copytree(fixtures / name, folder / "checkpoint")
        what = f"{name} {seed} " + damage_one(folder / "checkpoint", rng)
        seen.append(judge(run, folder / "out", folder / "checkpoint", data, what))
        shutil.rmtree(folder)
    assert set(seen) == {True, False}  # some damage is harmless, or the cases are not worth much


@pytest.mark.parametrize("name", DATA)
def test_damaged_datasets(run, fixtures, tmp_path, name):
    whole, checkpoint = DATA[name]
    seen = []
    for seed in range(12 * SEEDS):
        rng = random.Random(f"{name} {seed}")
        folder = tmp_path / f"case-{seed}"
        (folder / "out").mkdir(parents=True)
        change = rng.choice(DAMAGE) if seed else lambda data, rng: data
        file = folder / (
            name if rng.random() < 0.8 or not seed else rng.choice(["a.jsonl", "b.csv", "b.npz", "b.parquet", "b"])
        )
        file.write_bytes(change(whole, rng))
        what = f"{name} {seed} as {file.name}: {getattr(change, '__name__', '')}"
        seen.append(judge(run, folder / "out", fixtures / checkpoint, file, what))
        shutil.rmtree(folder)
    assert seen[0]
    assert not all(seen)


def test_runs_with_a_damaged_checkpoint(run, fixtures, tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_bytes(JSONL)
    for seed in range(12 * SEEDS):
        rng = random.Random(seed)
        folder = tmp_path / f"case-{seed}"
        (folder / "out").mkdir(parents=True)
        for name in ("checkpoint-0", "checkpoint-50"):
            shutil.copytree(fixtures / "run" / name, folder / "run" / name)
        for file in (fixtures / "run").glob("tokenizer*"):
            shutil.copy(file, folder / "run")
        what = f"run {seed} " + damage_one(folder / "run" / "checkpoint-50", rng)
        code, _, stderr = run(
            "entropy", folder / "run", "-d", data, "--limit", 3, "-q", "-o", folder / "out" / "e.parquet"
        )
        assert code in (0, 2), f"{what}: exit {code}, {stderr}"
        assert len(stderr.splitlines()) == (code == 2), f"{what}: {stderr}"
        if code == 2:  # the first checkpoint may be finished; nothing may be half-written
            assert not list((folder / "out").rglob("*.partial"))
            assert not (folder / "out" / "e.parquet").exists()
        shutil.rmtree(folder)


WORDS = [
    *("0", "-1", "1e308", "nan", "", " ", "é", "²", "\n", "a,b", "0:", ":", "1:2:3:4", "x=y", "=", "*", "[", "task:"),
    *(
        "task:pydoc?",
        "task:digits?x=1",
        "auto",
        "all",
        "patch",
        "text=text",
        "-",
        "--",
        "/",
        "..",
        "~",
        "9" * 400,
        "\\",
    ),
]
OPTIONS = [
    *(
        "--unit",
        "--patch-size",
        "--alpha",
        "--columns",
        "--model",
        "--steps",
        "--layers",
        "--tokenizer",
        "--max-length",
    ),
    *("--limit", "--seed", "--dtype", "--device", "--batch-size", "--data", "--plot"),
]


def test_strange_values_of_options(run, fixtures, tmp_path):
    for seed in range(60 * SEEDS):
        rng = random.Random(seed)
        folder = tmp_path / f"case-{seed}"
        folder.mkdir()
        given = [word for option in rng.sample(OPTIONS, 2) for word in (option, rng.choice(WORDS))]
        args = ["-d", fixtures / "texts.jsonl", "--limit", 2, "-q", "-o", folder / "e.parquet"]
        code, _, stderr = run("entropy", fixtures / "tiny-gpt2", *args, *given)
        assert code in (0, 2), f"{given}: exit {code}, {stderr}"
        assert len(stderr.splitlines()) == (code == 2), f"{given}: {stderr}"
        assert set(os.listdir(folder)) <= {"e.parquet"}, given
