"""Damaged files of every format: each gives examples or one line of InputError, never anything else."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save

from memdiag.dataset import Dataset, batches, open_dataset
from memdiag.errors import InputError

SEEDS = 48  # damaged files per format
N_ROWS = 40
WORDS = ["a short line", "naïve café, “quoted”", 'with "quotes", commas', "日本語のテキスト", "x" * 300]


class Letters:
    """A tokenizer of the Hugging Face kind: one token a byte."""

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode()) for text in texts]}


def _rows() -> list[dict[str, object]]:
    return [{"id": f"id-{i}", "text": WORDS[i % len(WORDS)], "label": i % 3} for i in range(N_ROWS)]


def _jsonl() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows()).encode()


def _csv() -> bytes:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, ["id", "text", "label"])
    writer.writeheader()
    writer.writerows(_rows())
    return sink.getvalue().encode()


def _parquet(**options: object) -> bytes:
    table = pa.table({
        "id": [f"id-{i}" for i in range(N_ROWS)],
        "input_ids": [list(range(1, 2 + i % 7)) for i in range(N_ROWS)],
        "attention_mask": [[1] * (1 + i % 7) for i in range(N_ROWS)],
        "label": [i % 3 for i in range(N_ROWS)],
    })  # fmt: skip
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=16, **options)
    return sink.getvalue()


def _parquet_text() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(_rows()), sink, compression="none", use_dictionary=False)
    return sink.getvalue()


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "features": rng.normal(size=(N_ROWS, 3, 4)).astype(np.float32),
        "label": np.arange(N_ROWS) % 3,
        "id": np.arange(N_ROWS),
    }


def _npz(pack: Callable[..., None] = np.savez) -> bytes:
    sink = io.BytesIO()
    pack(sink, **_arrays())
    return sink.getvalue()


GOOD: dict[str, tuple[str, Callable[[], bytes]]] = {
    "parquet": (".parquet", _parquet),
    "parquet-plain": (".parquet", _parquet_text),
    "parquet-checksums": (".parquet", lambda: _parquet(write_page_checksum=True, compression="gzip")),
    "jsonl": (".jsonl", _jsonl),
    "jsonl.gz": (".jsonl.gz", lambda: gzip.compress(_jsonl(), mtime=0)),
    "csv": (".csv", _csv),
    "npz": (".npz", _npz),
    "npz-compressed": (".npz", lambda: _npz(np.savez_compressed)),
    "safetensors": (".safetensors", lambda: save(_arrays())),
    "text": (".txt", lambda: "\n".join(WORDS).encode()),
}
SUFFIXES = sorted({suffix for suffix, _ in GOOD.values()})
HUGE = [struct.pack("<Q", 2**60), struct.pack("<I", 2**31 - 1), b"\xff" * 8, b"\x00" * 8]


def damage(data: bytes, rng: random.Random) -> bytes:
    """The data with one kind of damage, drawn by rng."""
    spot, size = rng.randrange(len(data)), rng.randrange(1, 64)
    near_end = max(0, len(data) - rng.randrange(1, 12))
    near_start = rng.randrange(min(12, len(data)))
    match rng.choice(["truncate", "flip", "flip", "flip", "noise", "cut", "double", "huge", "huge", "grow"]):
        case "truncate":
            return data[:spot]
        case "flip":
            flipped = bytearray(data)
            for _ in range(rng.choice([1, 1, 2, 8])):
                flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case "noise":
            return data[:spot] + rng.randbytes(size) + data[spot + size :]
        case "cut":
            return data[:spot] + data[spot + size :]
        case "double":
            return data[:spot] + data[max(0, spot - size) :]
        case "huge":
            place = rng.choice([near_start, near_end, spot])
            value = rng.choice(HUGE)
            return data[:place] + value + data[place + len(value) :]
        case _:
            return data + rng.randbytes(size)


def read_all(path: Path) -> int:
    """Examples read from the file, 0 for an InputError of one line."""
    try:
        dataset: Dataset = open_dataset(path)
        dataset.fingerprint()
        assert dataset.n_examples < 2**40
        examples = dataset.examples(tokenizer=Letters(), max_length=64, vocab_size=1000)
        return sum(len(batch.rows) for batch in batches(examples, tokens_per_batch=256))
    except InputError as error:
        message = str(error)
        assert "\n" not in message
        assert message.isprintable()
        assert len(message) < 1000
        assert path.name[:10] in message
        return 0


@pytest.mark.parametrize("kind", GOOD)
def test_undamaged_files_are_read(kind, tmp_path):
    suffix, make = GOOD[kind]
    path = tmp_path / f"good{suffix}"
    path.write_bytes(make())
    assert read_all(path) == (len(WORDS) if suffix == ".txt" else N_ROWS)


@pytest.mark.parametrize("kind", GOOD)
def test_damaged_files(kind, tmp_path):
    suffix, make = GOOD[kind]
    good = make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = []
    for seed in range(SEEDS):
        rng = random.Random(f"{kind}-{seed}")
        bad = damage(good, rng)
        path = tmp_path / f"{seed}{suffix}"
        path.write_bytes(bad)
        results.append(read_all(path))
    assert 0 in results  # some are refused, so the damage was felt
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300 * 1024, f"{grown} KiB"


@pytest.mark.parametrize("kind", GOOD)
def test_renamed_and_empty_files(kind, tmp_path):
    suffix, make = GOOD[kind]
    for other in SUFFIXES:
        path = tmp_path / f"renamed{other}"
        path.write_bytes(make())
        n = read_all(path)
        assert n == 0 or other == suffix or ".txt" in (suffix, other) or {".csv", ".jsonl"} == {suffix, other}
    empty = tmp_path / f"empty{suffix}"
    for nothing in (b"", b"\n\n", b"\0"):
        empty.write_bytes(nothing)
        assert read_all(empty) == 0 or suffix == ".txt"


def test_damaged_save_to_disk_directories(tmp_path):
    datasets = pytest.importorskip("datasets")
    good = tmp_path / "good"
    datasets.Dataset.from_list(_rows()).save_to_disk(good)
    assert read_all(good) == N_ROWS
    files = sorted(path.name for path in good.iterdir())
    results = []
    for seed in range(SEEDS):
        rng = random.Random(seed)
        bad = tmp_path / f"bad-{seed}"
        shutil.copytree(good, bad)
        file = bad / rng.choice([*files, next(name for name in files if name.endswith(".arrow"))])
        file.write_bytes(damage(file.read_bytes(), rng))
        results.append(read_all(bad))
    assert 0 in results
