from __future__ import annotations

import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import memdiag.dataset as module
from memdiag.dataset import Example, batches, open_dataset
from memdiag.errors import InputError


def letters(texts: list[str], **options: object) -> dict[str, list[list[int]]]:
    """A tokenizer of the Hugging Face kind: one token a letter, its place in the alphabet."""
    assert options["truncation"] is False
    return {"input_ids": [[ord(c) - 96 for c in text if c.isalpha()] for text in texts]}


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids_of(path: str | Path, **options: object) -> list[str]:
    return [e.example_id for e in open_dataset(path, **options).examples(tokenizer=letters)]


def fault_of(path: str | Path, columns: dict[str, str] | None = None, **options: object) -> str:
    """The one line that opening and reading the dataset ends in."""
    with pytest.raises(InputError) as error:
        list(open_dataset(path, columns=columns).examples(**{"tokenizer": letters, **options}))
    assert str(error.value).isprintable()
    return str(error.value)


# --- formats

TEXTS = ["alpha", 'be, "ta"', "gamma", "delta"]


def write_text_rows(path: Path) -> Path:
    rows = [{"id": f"r{i}", "text": text, "label": i} for i, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match "".join(path.suffixes):
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
        case ".jsonl":
            path.write_text("\ufeff" + lines.replace("\n", "\r\n\n"))
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case ".csv":
            path.write_text('id,text,label\nr0,alpha,0\nr1,"be, ""ta""",1\n\nr2,gamma,2\nr3,delta,3\n')
        case ".npz":
            np.savez(path, id=[f"r{i}" for i in range(4)], text=TEXTS, label=np.arange(4))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz", ".csv", ".npz", ".PARQUET", ".CSV"])
def test_every_format_gives_the_same_examples(suffix, tmp_path):
    small = write_text_rows(tmp_path / f"rows{suffix.lower()}")
    path = small.rename(tmp_path / f"Rows 1{suffix}")
    dataset = open_dataset(path)
    assert (dataset.kind, dataset.n_examples, dataset.has_labels) == ("text", 4, True)
    examples = list(dataset.examples(tokenizer=letters))
    assert [e.example_id for e in examples] == ["r0", "r1", "r2", "r3"]
    assert [e.label for e in examples] == [e.row for e in examples] == [0, 1, 2, 3]
    assert examples[1].input_ids is not None
    assert examples[1].input_ids.tolist() == [2, 5, 20, 1]
    assert examples[1].input_ids.dtype == np.int64
    assert dataset.fingerprint() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_save_to_disk_directories(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2, 3]})
    data.save_to_disk(tmp_path / "one", num_shards=2)
    data.shuffle(seed=1).select(range(2)).save_to_disk(tmp_path / "shuffled")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "split")
    dataset = open_dataset(tmp_path / "one")
    assert dataset.n_examples == 4
    assert [e.label for e in dataset.examples(tokenizer=letters)] == [0, 1, 2, 3]
    assert open_dataset(tmp_path / "shuffled").n_examples == 2
    fault = fault_of(tmp_path / "split")
    assert "split/train" in fault
    assert "split/test" in fault
    assert open_dataset(tmp_path / "split" / "train").n_examples == 4
    (tmp_path / "one").rename(tmp_path / "moved")
    assert open_dataset(tmp_path / "moved").fingerprint() == dataset_fingerprint_of(tmp_path / "moved")


def dataset_fingerprint_of(path: Path) -> str:
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in sorted(path.glob("*.arrow"))]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def test_without_the_library_datasets_says_what_to_install(tmp_path, monkeypatch):
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert "is no readable save_to_disk" in fault_of(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "memdiag[hf]"' in fault_of(tmp_path)


def test_text_files_have_an_example_per_line_that_is_not_blank(tmp_path):
    path = tmp_path / "notes.md"
    path.write_bytes("\ufeffalpha\r\n\n   \nbeta\ngamma".encode())
    examples = list(open_dataset(path).examples(tokenizer=letters))
    assert [(e.row, e.example_id, e.n_tokens) for e in examples] == [(0, "0", 5), (1, "1", 4), (2, "2", 5)]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "uint8", "bool", ">f4"])
def test_arrays_of_any_number_type_become_float32(dtype, tmp_path):
    array = (np.arange(24).reshape(4, 2, 3) % 2).astype(dtype)
    np.savez(tmp_path / "a.npz", X=array, y=np.arange(4), other=np.zeros(7))
    np.savez_compressed(tmp_path / "fortran.npz", X=np.asfortranarray(array), y=np.arange(4))
    files = ["a.npz", "fortran.npz"]
    if dtype[0] != ">":
        save_file({"X": array, "y": np.arange(4)}, tmp_path / "a.safetensors")
        files.append("a.safetensors")
    for file in files:
        examples = list(open_dataset(tmp_path / file).examples())
        features = np.stack([e.features for e in examples if e.features is not None])
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, array.astype(np.float32))
        assert [e.label for e in examples] == [0, 1, 2, 3]


def test_bfloat16_safetensors(tmp_path):
    values = np.array([[1.0, -2.5], [0.15625, 3e38]], dtype=np.float32)
    data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    rows = [e.features for e in open_dataset(tmp_path / "b.safetensors").examples()]
    np.testing.assert_allclose(np.stack([row for row in rows if row is not None]), values, rtol=1 / 128)
    assert rows[0] is not None
    assert rows[0].tolist() == [1.0, -2.5]


@pytest.mark.parametrize("make", [
    lambda a: pa.array(list(a), pa.list_(pa.float32())),
    lambda a: pa.array(list(a), pa.large_list(pa.float64())),
    lambda a: pa.FixedSizeListArray.from_arrays(a.ravel(), 6),
    lambda a: pa.array(a.reshape(-1, 2, 3).tolist(), pa.list_(pa.list_(pa.float16()))),
    lambda a: pa.FixedShapeTensorArray.from_numpy_ndarray(a.reshape(-1, 2, 3)),
])  # fmt: skip
def test_arrow_lists_of_every_kind(make, tmp_path):
    array = np.arange(3000 * 6, dtype=np.float32).reshape(3000, 6) % 100
    pq.write_table(pa.table({"features": make(array)}), tmp_path / "a.parquet", row_group_size=700)
    rows = [e.features for e in open_dataset(tmp_path / "a.parquet").examples()]
    np.testing.assert_array_equal(np.stack([row.ravel() for row in rows if row is not None]), array)


def test_csv_cells_hold_lists(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('input_ids,attention_mask,label\n"[1, 2, 3]",1 1 0,true\n4 5,"[1,1]",007\n')
    examples = list(open_dataset(path).examples())
    assert [(e.input_ids.tolist(), e.label) for e in examples if e.input_ids is not None] == [([1, 2], 1), ([4, 5], 7)]


def test_a_long_csv_cell_and_a_long_line(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "a" * 300_000 + "\n")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * 10_000_000}])
    for file, length in (("a.csv", 300_000), ("a.jsonl", 10_000_000)):
        (example,) = open_dataset(tmp_path / file).examples(tokenizer=letters, max_length=10)
        assert example.truncated
        assert example.n_tokens == 10
        (example,) = open_dataset(tmp_path / file).examples(tokenizer=letters)
        assert example.n_tokens == length


# --- which column plays which role


def test_roles_are_guessed_and_settable(tmp_path):
    rows = [{"body": "ab", "y2": 1, "text": "cd", "label": 0, "uid": "u", "key": 7, "input_ids": [5]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)

    def read(**columns: str) -> Example:
        return next(open_dataset(path, columns=columns).examples(tokenizer=letters))

    def seen(**columns: str) -> tuple[list[int] | None, int | None, str]:
        e = read(**columns)
        return None if e.input_ids is None else e.input_ids.tolist(), e.label, e.example_id

    assert seen() == ([3, 4], 0, "u")  # text before input_ids
    assert seen(text="body", label="y2", id="key") == ([1, 2], 1, "7")
    assert seen(input_ids="input_ids") == ([5], 0, "u")
    assert seen(text="") == ([5], 0, "u")
    assert seen(text="body", input_ids="input_ids") == ([5], 0, "u")
    assert seen(label="", id="") == ([3, 4], None, "0")
    assert open_dataset(path, columns={"text": "body"}).columns == {"text": "body", "label": "label", "id": "uid"}


def test_a_guessed_label_of_text_or_lists_is_passed_over(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1, 2], "label": "yes", "labels": [1, 2], "target": 3}])
    assert open_dataset(path).columns == {"input_ids": "input_ids", "label": "target"}
    assert "row 0: label is the text 'yes'; wanted an integer" in fault_of(path, {"label": "label"})
    assert "row 0: label (column 'labels') is a list of 2" in fault_of(path, {"label": "labels"})


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"txet": "text"}, "no role 'txet'; there are attention_mask, features, group, id, input_ids, label, text"),
        ({"text": "boby"}, "no column 'boby'; there are body, v; did you mean 'body'?"),
        ({}, "no column to read examples from; found body, v; name one as text, input_ids or features"),
        ({"text": "body", "features": "v"}, "wanted one of them"),
        ({"text": "body", "attention_mask": "v"}, "goes with input_ids"),
    ],
)
def test_columns_that_cannot_be(columns, wanted, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "v": [1]}])
    assert wanted in fault_of(path, columns)


# --- faults of rows

ROW_FAULTS: list[tuple[list[object], str]] = [
    ([{"text": "a"}, {"text": None}], "row 1: text is null"),
    ([{"text": "a"}, {"txt": "b"}], "row 1: text is null"),
    ([{"text": 3}], "row 0: text is the int 3; wanted a string"),
    ([{"text": "a"}, {"text": "123"}], "row 1: text the text '123' gives no token"),
    ([{"text": "a"}, {"text": ""}], "row 1: text the text '' gives no token"),
    ([{"text": "a\ud800"}], "row 0: text holds half a surrogate pair"),
    ([{"input_ids": [1]}, {"input_ids": []}], "row 1: input_ids is empty"),
    ([{"input_ids": [1]}, {"input_ids": [1.0]}], "row 1: input_ids holds floats; wanted integers"),
    ([{"input_ids": "1 2"}], "row 0: input_ids is the text '1 2'; wanted a list of numbers"),
    ([{"input_ids": ["a"]}], "row 0: input_ids holds text"),
    ([{"input_ids": [True]}], "row 0: input_ids holds booleans"),
    ([{"input_ids": [1, None]}], "row 0: input_ids holds nulls"),
    ([{"input_ids": [[1]]}], "row 0: input_ids has shape (1, 1); wanted a flat list"),
    ([{"input_ids": [[1], [2, 3]]}], "row 0: input_ids is ragged"),
    ([{"input_ids": [1, -2]}], "row 0: input_ids holds -2"),
    ([{"input_ids": [2**63]}], "row 0: input_ids holds token 9223372036854775808"),
    ([{"input_ids": [1, 99]}, {"input_ids": [1, 100]}], "row 1: input_ids holds token 100, but the"),
    ([{"input_ids": [1], "attention_mask": [1, 1]}], "row 0: attention_mask has 2 items, but input_ids has 1"),
    ([{"input_ids": [1], "attention_mask": [2]}], "row 0: attention_mask holds integers; wanted integers 0 and 1"),
    ([{"input_ids": [1], "attention_mask": [1.0]}], "row 0: attention_mask holds floats; wanted integers 0 and 1"),
    ([{"input_ids": [1], "attention_mask": [0]}], "row 0: attention_mask is all 0"),
    ([{"features": [1, 2]}, {"features": [1, 2, 3]}], "row 1: features has shape (3,), but row 0 has (2,)"),
    ([{"features": [1, 2]}, {"features": [1, float("nan")]}], "row 1: features holds nan at position 1"),
    ([{"features": [1e39]}], "row 0: features holds 1e+39 at position 0; wanted finite float32"),
    ([{"features": [1.5, 10**400]}], "row 0: features holds nulls or values that are not numbers"),
    ([{"features": ["a"]}], "row 0: features holds text; wanted numbers"),
    ([{"features": 3}], "row 0: features is the int 3; wanted a list of numbers"),
    ([{"features": []}], "row 0: features has shape (0,)"),
    ([{"features": [1], "label": 0}, {"features": [1], "label": 1.5}], "row 1: label is the float 1.5; wanted"),
    ([{"features": [1], "label": 0}, {"features": [1]}], "wanted an integer; to go without: --columns label="),
    ([{"features": [1], "label": 2**64}], "row 0: label does not fit into 64 bits"),
    ([{"features": [1], "id": "a"}, {"features": [1], "id": None}], "row 1: id is null or empty"),
    ([{"features": [1], "id": "a"}, {"features": [1], "id": ""}], "row 1: id is null or empty"),
    ([{"features": [1], "id": 1.5}], "row 0: id is the float 1.5; wanted a string or an integer"),
    ([{"text": "a", "id": "x"}, {"text": "b", "id": "y"}, {"text": "c", "id": "x"}], "rows 0 and 2 have the same"),
    ([{"text": "a", "id": 1}, {"text": "b", "id": "1"}], "rows 0 and 1 have the same id '1'"),
    ([{"text": "a"}, ["b"]], "line 2 is list; wanted one JSON object per line"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "wanted"), ROW_FAULTS)
def test_faults_name_their_row(rows, wanted, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    fault = fault_of(path, vocab_size=100)
    assert fault.startswith(str(path))
    assert wanted in fault


@pytest.mark.parametrize(
    ("column", "wanted"),
    [
        ({"text": pa.array([1, 2])}, "row 0: text is the int 1"),
        ({"text": pa.array(["a", None])}, "row 1: text is null"),
        ({"text": pa.array([b"a", b"\xff"]).view(pa.string())}, "row 1: text is not UTF-8"),
        ({"text": pa.array([b"a", b"\xff"])}, "row 1: text is not UTF-8"),
        ({"input_ids": pa.array([[1], [2, None]])}, "row 1: input_ids holds a null"),
        ({"input_ids": pa.array([[1], None])}, "row 1: input_ids is null"),
        ({"input_ids": pa.array([["a"]])}, "row 0: input_ids holds string; wanted numbers"),
        ({"features": pa.array([[[1, 2], [3]]])}, "row 0: features is ragged"),
        ({"features": pa.array([{"bytes": b"x"}])}, "row 0: features is a dict; wanted a list of numbers"),
        ({"features": pa.array([1.0])}, "row 0: features is the float 1.0"),
        ({"text": pa.array([], pa.string())}, "is empty: no rows"),
        ({"text": pa.array(["a"]), "label": pa.array([1.0])}, "row 0: label is the float 1.0"),
    ],
)
def test_faults_of_parquet_rows(column, wanted, tmp_path):
    pq.write_table(pa.table(column), tmp_path / "a.parquet")
    assert wanted in fault_of(tmp_path / "a.parquet")


def test_a_tokenizer_is_asked_for_at_once_and_its_failure_is_told(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match="wanted a tokenizer"):
        open_dataset(path).examples()

    def broken(texts: list[str], **_: object) -> None:
        raise TypeError("no\nway")

    assert "rows 0 to 0: the tokenizer fails on the text: no way" in fault_of(path, tokenizer=broken)
    assert "row 0: input_ids (column 'text') holds token 1, but the model's largest is 0" in fault_of(
        path, vocab_size=1
    )


def test_same_hash_is_not_yet_the_same_id(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "id": i % 7 + i} for i in range(7)])
    monkeypatch.setattr(module, "_hash", lambda example_id: 0)
    assert len(ids_of(path)) == 7
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": "a", "id": i % 6} for i in range(7)])
    assert "rows 0 and 6 have the same id '0'" in fault_of(path)
    assert ids_of(path, limit=6) == ["0", "1", "2", "3", "4", "5"]
    assert ids_of(path, columns={"id": ""}) == [str(i) for i in range(7)]


# --- faults of files

FILE_FAULTS: dict[str, tuple[bytes, str]] = {
    "none.jsonl": (b"", "is empty: 0 bytes"),
    "blank.jsonl": (b"\n\n", "is empty: no rows"),
    "header.csv": (b"text,label\n", "is empty: no rows"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "latin.jsonl": (b'{"text": "a"}\n\n{"text": "\xe9"}\n', "line 3: byte 11 is not UTF-8"),
    "latin.txt": (b"a\nb\xe9\n", "line 2: byte 2 is not UTF-8"),
    "latin.csv": (b"text\nb\xe9\n", "line 2: byte 2 is not UTF-8"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is not JSON"),
    "digits.jsonl": (b'{"text": 1' + b"0" * 5000 + b"}", "line 1 is not JSON"),
    "short.csv": (b"text,label\na,1\nb\n", "row 1 has 1 cells, but the header names 2"),
    "open.csv": (b'text,label\n"a,1\n', "is no readable CSV file"),
    "twins.csv": (b"text,text\na,b\n", "more than one column 'text'"),
    "nameless.csv": (b",\na,b\n", "names no column"),
    "json.parquet": (b'{"text": "a"}\n', "is no readable Parquet file"),
    "huge.parquet": (b"PAR1" + b"\0" * 60 + struct.pack("<I", 2**31 - 1) + b"PAR1", "is no readable Parquet file"),
    "text.npz": (b"hello", "is no readable npz file"),
    "huge.safetensors": (struct.pack("<Q", 2**60) + b"{}", "is no readable safetensors file"),
    "text.jsonl.gz": (b"hello", "is no readable gzip file"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "is no readable gzip file"),
    "table.xlsx": (b"PK", "wanted one of .parquet .jsonl .jsonl.gz .csv .npz .safetensors .txt .md"),
    "bare": (b"a", "unknown suffix ''"),
    "line\nbreak.jsonl": (b"{", "line break.jsonl: line 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILE_FAULTS)
def test_faults_of_files(name, tmp_path):
    data, wanted = FILE_FAULTS[name]
    (tmp_path / name).write_bytes(data)
    assert wanted in fault_of(tmp_path / name)


def test_what_is_not_a_file(tmp_path):
    assert "cannot be opened: No such file or directory" in fault_of(tmp_path / "none.jsonl")
    assert "it is empty" in fault_of(tmp_path)
    (tmp_path / "config.json").touch()
    assert "it holds config.json, which looks like a checkpoint" in fault_of(tmp_path)
    assert "is no readable path" in fault_of("a\0b.jsonl")
    assert "File name too long" in fault_of("a" * 5000 + ".jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "is a pipe, socket or device" in fault_of(tmp_path / "pipe.jsonl")
    assert "is a pipe, socket or device" in fault_of("/dev/null")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    assert "loop.jsonl" in fault_of(tmp_path / "loop.jsonl")


def test_a_file_without_permission(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read anything, so the mode bits would not do
    assert "a.jsonl: cannot be opened: Permission denied" in fault_of(path)


def test_npz_faults(tmp_path):
    np.savez(tmp_path / "pickle.npz", x=np.array([{}], dtype=object))
    np.savez(tmp_path / "unequal.npz", x=np.ones((3, 2)), y=np.arange(4))
    np.savez(tmp_path / "scalar.npz", x=np.float32(1))
    np.savez(tmp_path / "zero.npz", x=np.ones((0, 2)))
    np.savez(tmp_path / "empty.npz")
    assert "holds pickled objects, which are never loaded" in fault_of(tmp_path / "pickle.npz")
    assert "no common first axis: x (3, 2), y (4,)" in fault_of(tmp_path / "unequal.npz")
    assert len(ids_of(tmp_path / "unequal.npz", columns={"label": ""})) == 3
    assert "no common first axis" in fault_of(tmp_path / "scalar.npz")
    assert "is empty" in fault_of(tmp_path / "zero.npz")
    assert "is empty" in fault_of(tmp_path / "empty.npz")


# --- lengths, limits, ranks


def test_masked_tokens_are_removed_before_the_cut(tmp_path):
    rows = [
        {"input_ids": [0, 0, 7, 8, 9], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": [1], "attention_mask": [1]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)

    def read(max_length: int | None) -> list[tuple[list[int], bool]]:
        examples = open_dataset(path).examples(max_length=max_length)
        return [(e.input_ids.tolist(), e.truncated) for e in examples if e.input_ids is not None]

    assert read(None) == [([7, 8, 9], False), ([1], False)]
    assert read(3) == [([7, 8, 9], False), ([1], False)]
    assert read(2) == [([7, 8], True), ([1], False)]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".npz"])
@pytest.mark.parametrize("limit", [None, 1, 3, 4, 99])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_the_rows(suffix, limit, world_size, tmp_path):
    dataset = open_dataset(write_text_rows(tmp_path / f"a{suffix}"), limit=limit)
    n = min(limit or 4, 4)
    assert dataset.n_examples == n
    shares = [
        [e.row for e in dataset.examples(tokenizer=letters, rank=rank, world_size=world_size)]
        for rank in range(world_size)
    ]
    assert shares == [list(range(rank, n, world_size)) for rank in range(world_size)]


def test_ranks_share_many_chunks(tmp_path):
    pq.write_table(pa.table({"features": [[i] for i in range(5000)]}), tmp_path / "a.parquet", row_group_size=999)
    dataset = open_dataset(tmp_path / "a.parquet", limit=4500)
    for rank in range(3):
        examples = list(dataset.examples(rank=rank, world_size=3))
        assert [e.row for e in examples] == list(range(rank, 4500, 3))
        assert all(e.features is not None and e.features.tolist() == [e.row] for e in examples)


def test_numbers_that_cannot_be(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match="limit is 0; wanted at least 1"):
        open_dataset(path, limit=0)
    with pytest.raises(InputError, match="max_length is 0"):
        open_dataset(path).examples(tokenizer=letters, max_length=0)
    with pytest.raises(ValueError, match="rank must be"):
        open_dataset(path).examples(tokenizer=letters, rank=2, world_size=2)
    with pytest.raises(InputError, match="tokens_per_batch is 0"):
        batches([], tokens_per_batch=0)


def test_tasks_are_datasets():
    pydoc = open_dataset("task:pydoc?chars=500", limit=5)
    assert (pydoc.name, pydoc.kind, pydoc.n_examples, pydoc.has_labels) == ("task:pydoc?chars=500", "text", 5, False)
    digits = open_dataset("task:digits?shape=image")
    assert (digits.kind, digits.n_examples, digits.has_labels) == ("features", 1797, True)
    first = next(digits.examples())
    assert first.features is not None
    assert first.features.shape == (1, 8, 8)
    prints = {open_dataset(f"task:digits?{q}").fingerprint() for q in ("shape=image", "", "seed=1", "split=train")}
    assert len(prints) == 4
    assert open_dataset("task:pydoc").fingerprint() == open_dataset("task:pydoc?chars=1000").fingerprint()
    with pytest.raises(InputError, match="no task 'nope'"):
        open_dataset("task:nope")


def test_fingerprints_follow_content_only(tmp_path):
    one, two = (write_jsonl(tmp_path / name, [{"text": "a"}]) for name in ("one.jsonl", "two.jsonl"))
    os.utime(two, (0, 0))
    assert open_dataset(one).fingerprint() == open_dataset(two).fingerprint()
    two.write_text(two.read_text().replace("a", "b"))
    assert open_dataset(one).fingerprint() != hashlib.sha256(two.read_bytes()).hexdigest()


def test_a_hugging_face_tokenizer(tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[S]": 0, "a": 1, "b": 2, "[U]": 3}, unk_token="[U]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="[S] $A", special_tokens=[("[S]", 0)])
    words.enable_truncation(2)  # a saved tokenizer may come with truncation and padding switched on
    words.enable_padding(length=9)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=3, unk_token="[U]")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a b a b a b"}, {"text": "b c"}])
    examples = list(open_dataset(path).examples(tokenizer=tokenizer))
    assert [e.input_ids.tolist() for e in examples if e.input_ids is not None] == [[0, 1, 2, 1, 2, 1, 2], [0, 2, 3]]
    cut = list(open_dataset(path).examples(tokenizer=tokenizer, max_length=3))
    assert [e.truncated for e in cut] == [True, False]
    assert "sequence" not in caplog.text


# --- batches


def example(row: int, length: int, **other: object) -> Example:
    given = {"features": None, "label": None, "truncated": False, **other}
    return Example(row=row, example_id=f"e{row}", input_ids=np.full(length, row + 1), **given)  # type: ignore[arg-type]


def test_batches_by_hand():
    made = list(batches([example(i, n) for i, n in enumerate([2, 5, 2, 1, 4])], tokens_per_batch=8, pad_id=-7))
    assert [b.example_ids for b in made] == [["e1"], ["e4", "e0"], ["e2", "e3"]]
    last = made[-1]
    assert last.input_ids is not None
    assert last.mask is not None
    assert last.input_ids.tolist() == [[3, 3], [4, -7]]
    assert last.mask.tolist() == [[True, True], [True, False]]
    assert last.rows.tolist() == [2, 3]
    assert last.labels is None
    assert last.features is None


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), max_size=50),
    tokens=st.integers(1, 64),
    most=st.none() | st.integers(1, 5),
    window=st.integers(1, 60),
)
def test_batches_hold_every_example_once_within_the_budget(lengths, tokens, most, window):
    given_examples = [example(i, n, label=i, truncated=i % 2 == 0) for i, n in enumerate(lengths)]
    made = list(batches(given_examples, tokens_per_batch=tokens, examples_per_batch=most, window=window))
    rows = [row for batch in made for row in batch.rows.tolist()]
    assert sorted(rows) == list(range(len(lengths)))
    for batch in made:
        assert batch.input_ids is not None
        assert batch.mask is not None
        assert batch.labels is not None
        b, t = batch.input_ids.shape
        assert b == 1 or b * t <= tokens
        assert b <= (most or tokens)
        assert t == max(lengths[row] for row in batch.rows)
        assert batch.labels.tolist() == batch.rows.tolist()
        assert batch.truncated == sum(row % 2 == 0 for row in batch.rows.tolist())
        for ids, mask, row in zip(batch.input_ids, batch.mask, batch.rows):
            assert mask.tolist() == [True] * lengths[row] + [False] * (t - lengths[row])
            assert (ids[mask] == row + 1).all()
        assert len({row // window for row in batch.rows.tolist()}) == 1


def test_batches_stream(monkeypatch):
    taken = []

    def source():
        for i in range(100):
            taken.append(i)
            yield example(i, 10)

    next(batches(source(), tokens_per_batch=10, window=8))
    assert len(taken) == 8
    monkeypatch.setattr(module.batching, "WINDOW_TOKENS", 30)
    taken.clear()
    next(batches(source(), tokens_per_batch=10, window=8))
    assert len(taken) == 3


@pytest.mark.parametrize(("shape", "b"), [((6,), 7), ((7, 5), 1), ((2, 5), 3), ((2, 2, 5), 1), ((8, 5), 1)])
def test_features_count_a_token_per_vector(shape, b):
    given_examples = [
        Example(i, str(i), None, np.full(shape, i, dtype=np.float32), i, False) for i in range(9)
    ]  # fmt: skip
    made = list(batches(given_examples, tokens_per_batch=7))
    assert [len(batch.rows) for batch in made[:-1]] == [b] * (len(made) - 1)
    assert made[0].features is not None
    assert made[0].features.shape == (b, *shape)
    assert made[0].input_ids is None
    assert made[0].mask is None
    assert [row for batch in made for row in batch.rows.tolist()] == list(range(9))


# --- memory and imports

PEAK = """
import re, resource, sys
from pathlib import Path
from typing import Any
from memdiag.dataset import batches, open_dataset
n = sum(len(b.rows) for b in batches(open_dataset(sys.argv[1]).examples(), tokens_per_batch=8192))
status = Path("/proc/self/status")  # where there is one: ru_maxrss begins at the peak of the parent
peak = re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1] if status.exists() else None
print(n, peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_ids(path: Path, n: int, *, length: int = 512) -> None:
    values = np.random.default_rng(0).integers(0, 2**15, n * length, dtype=np.int32)
    column = pa.ListArray.from_arrays(np.arange(0, n * length + 1, length, dtype=np.int32), values)
    pq.write_table(pa.table({"input_ids": column}), path, row_group_size=n, use_dictionary=False)


def test_memory_stays_flat_however_large_the_row_group(tmp_path):
    """8 MB and 64 MB of tokens, each in one row group: the larger must not need more than a few MB more."""
    peaks = []
    for n in (4_000, 32_000):
        write_ids(tmp_path / f"{n}.parquet", n)
        count, peak = map(int, run_python(PEAK, str(tmp_path / f"{n}.parquet")).split())
        assert count == n
        peaks.append(peak)
    assert peaks[1] < 1.15 * peaks[0], peaks


def test_the_ids_are_checked_with_8_bytes_each(tmp_path):
    import tracemalloc

    n = 50_000
    pq.write_table(pa.table({"id": [f"{i:064d}" for i in range(n)], "x": [[1]] * n}), tmp_path / "a.parquet")
    open_dataset(tmp_path / "a.parquet", limit=2)
    tracemalloc.start()
    open_dataset(tmp_path / "a.parquet")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * n  # the ids themselves are 113 bytes each


def test_importing_needs_no_torch():
    heavy = ("torch", "transformers", "pandas", "datasets", "sklearn")
    code = f"import sys, memdiag.dataset, memdiag.tasks; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code).strip() == "[]"
    code = """
        import sys
        from memdiag.dataset import batches, open_dataset
        list(batches(open_dataset("task:digits", limit=3).examples(), tokens_per_batch=8))
        print([m for m in ("torch", "transformers") if m in sys.modules])
    """
    assert run_python(code).strip() == "[]"


def closing_tokenizer() -> Any:
    """A real fast tokenizer that opens every text with 1 and closes it with 2 3."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[END]": 3, **{letter: i for i, letter in enumerate("abcdef", 4)}}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP] [END]", special_tokens=[("[CLS]", 1), ("[SEP]", 2), ("[END]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def test_a_truncated_text_still_ends_with_its_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a b c d e f\na b\n")
    long, short = open_dataset(tmp_path / "t.txt").examples(tokenizer=closing_tokenizer(), max_length=6)
    assert long.input_ids is not None
    assert short.input_ids is not None
    assert long.input_ids.tolist() == [1, 4, 5, 6, 2, 3]
    assert long.truncated
    assert short.input_ids.tolist() == [1, 4, 5, 2, 3]
    assert not short.truncated


def test_special_tokens_alone_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": "  "}\n')
    with pytest.raises(InputError, match=r"row 1: .*gives no token"):
        list(open_dataset(tmp_path / "t.jsonl").examples(tokenizer=closing_tokenizer()))
