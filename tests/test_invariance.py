"""What a report must not depend on: batch size, order, padding, the number of processes, how rows are left out."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import memdiag
from memdiag import checkpoint, reading, tasks
from memdiag.dataset import Batch, Example

Same = Callable[..., None]
Torchrun = Callable[..., subprocess.CompletedProcess[str]]
TEXT = ("tiny-gpt2", "tiny-llama", "tiny-bert")
ALL = (*TEXT, "tiny-vit", "digits-mlp")
CLOSE = {"rel": 1e-5, "abs": 1e-5}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 passages of 4 to 250 characters: shorter than a patch, and longer than the models are wide."""
    lengths = np.geomspace(4, 250, 24).astype(int)[np.random.default_rng(0).permutation(24)]
    passages = [row["text"] for row in tasks.load("task:pydoc").rows()]
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    write(path, [{"id": f"t{i}", "text": passages[5 * i][:n]} for i, n in enumerate(lengths.tolist())])
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def data_of(name: str, texts: Path) -> dict[str, Any]:
    return {"data": str(texts)} if name in TEXT else {"limit": 24}  # the others were trained on task:digits


def measure(path: Path, **options: Any) -> list[dict[str, Any]]:
    defaults = {"unit": "all", "spectra": True, "dtype": "float32", "patch_size": 4}
    rows: list[dict[str, Any]] = memdiag.entropy(path, **(defaults | options)).table.to_pylist()
    return rows


def poisoned(path: Path, out: Path) -> tuple[Path, int]:
    """A copy of a checkpoint whose padding token has a huge embedding, and that token."""
    (opened,) = checkpoint.open_checkpoints(path)
    model, tokenizer = opened.load(dtype="float32"), opened.tokenizer()
    pad = checkpoint.pad_id(model, tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight[pad] = 1e4
    checkpoint.save(out, model, tokenizer=tokenizer)
    return out, pad


def padded(monkeypatch: pytest.MonkeyPatch, pad: int, extra: int) -> list[Batch]:
    """From now on every batch has `extra` more columns of padding; returns the batches that were made."""
    plain, made = reading.batches, []

    def wider(examples: Iterator[Example], *, pad_id: int, **settings: Any) -> Iterator[Batch]:
        assert pad_id == pad
        for batch in plain(examples, pad_id=pad_id, **settings):
            assert batch.input_ids is not None
            assert batch.mask is not None
            more = [(0, 0), (0, extra)]
            ids = np.pad(batch.input_ids, more, constant_values=pad_id)
            made.append(dataclasses.replace(batch, input_ids=ids, mask=np.pad(batch.mask, more)))
            yield made[-1]

    monkeypatch.setattr(reading, "batches", wider)
    return made


# --- in one process ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_batch_size(fixtures: Path, texts: Path, assert_same_rows: Same, name: str) -> None:
    expected = measure(fixtures / name, batch_size="1", **data_of(name, texts))
    assert {row["unit"] for row in expected} == {"patch", "sequence", "dataset"}
    assert {row["n_examples"] for row in expected} == {24}
    for batch_size in ("16", "auto"):
        found = measure(fixtures / name, batch_size=batch_size, **data_of(name, texts))
        assert_same_rows(found, expected, **CLOSE)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("spectra", [False, True])
def test_batch_size_for_every_kind_of_entropy(
    fixtures: Path, texts: Path, assert_same_rows: Same, alpha: float, spectra: bool
) -> None:
    options = {"data": str(texts), "alpha": alpha, "spectra": spectra}
    one, sixteen = (measure(fixtures / "tiny-gpt2", batch_size=size, **options) for size in ("1", "16"))
    assert_same_rows(sixteen, one, **CLOSE)
    sequences = [row for row in one if row["unit"] == "sequence"]
    assert all((row["rankme"] is None) == (not spectra) for row in sequences)


@pytest.mark.parametrize("name", TEXT)
def test_order_of_the_dataset(fixtures: Path, texts: Path, tmp_path: Path, assert_same_rows: Same, name: str) -> None:
    rows = read(texts)
    shuffled = write(tmp_path / "other.jsonl", [rows[i] for i in np.random.default_rng(3).permutation(len(rows))])
    expected = measure(fixtures / name, data=str(texts))
    for batch_size in ("auto", "5"):
        assert_same_rows(measure(fixtures / name, data=str(shuffled), batch_size=batch_size), expected, **CLOSE)


def test_order_of_features(fixtures: Path, tmp_path: Path, assert_same_rows: Same) -> None:
    rows = [row for row, _ in zip(tasks.load("task:digits").rows(), range(24))]
    order = np.random.default_rng(3).permutation(24)
    for path, chosen in ((tmp_path / "a.npz", range(24)), (tmp_path / "b.npz", order)):
        np.savez(
            path,
            features=np.stack([rows[i]["features"] for i in chosen]),
            label=np.array([rows[i]["label"] for i in chosen]),
        )
    one, other = (measure(fixtures / "digits-mlp", data=str(tmp_path / f"{x}.npz")) for x in "ab")
    assert_same_rows(other, one, **CLOSE)
    assert one[0]["cross_entropy"] is not None


@pytest.mark.parametrize("name", TEXT)
def test_padding_with_a_poisoned_embedding(
    fixtures: Path, texts: Path, tmp_path: Path, assert_same_rows: Same, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options = {"data": str(texts), "max_length": 110}  # with the padding within the positions there are
    clean = measure(fixtures / name, batch_size="1", **options)
    path, pad = poisoned(fixtures / name, tmp_path / name)
    alone = measure(path, batch_size="1", **options)
    made = padded(monkeypatch, pad, extra=9)
    found = measure(path, batch_size="16", **options)
    assert all((batch.input_ids[~batch.mask] == pad).all() for batch in made)
    assert all((~batch.mask).sum(1).min() >= 9 for batch in made)
    assert not any((batch.input_ids[batch.mask] == pad).any() for batch in made)
    assert_same_rows(found, alone, **CLOSE)
    for rows in (found, clean):
        for row in rows:
            del row["cross_entropy"]  # with tied weights the poison is also an output weight
    assert_same_rows(found, clean, **CLOSE)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-vit"])
@pytest.mark.parametrize("limit", [1, 7])
def test_limit_is_the_dataset_cut_by_hand(
    fixtures: Path, texts: Path, tmp_path: Path, assert_same_rows: Same, name: str, limit: int
) -> None:
    if name in TEXT:
        data, cut = texts, write(tmp_path / "cut.jsonl", read(texts)[:limit])
    else:
        data, cut = tmp_path / "digits.npz", tmp_path / "cut.npz"
        rows = [row["features"] for row, _ in zip(tasks.load("task:digits?shape=image").rows(), range(12))]
        np.savez(data, features=np.stack(rows))
        np.savez(cut, features=np.stack(rows[:limit]))
    found = measure(fixtures / name, data=str(data), limit=limit)
    assert found[0]["n_examples"] == limit
    assert_same_rows(found, measure(fixtures / name, data=str(cut)), rel=1e-12)


def test_units_and_layers_asked_for_alone(fixtures: Path, texts: Path, assert_same_rows: Same) -> None:
    every = measure(fixtures / "tiny-llama", data=str(texts))
    for unit in ("patch", "sequence", "dataset"):
        wanted = [row for row in every if row["unit"] == unit]
        assert_same_rows(measure(fixtures / "tiny-llama", data=str(texts), unit=unit), wanted, rel=1e-12)
    wanted = [row for row in every if row["layer"] in (0, 2)]
    assert_same_rows(measure(fixtures / "tiny-llama", data=str(texts), layers="0,-1"), wanted, rel=1e-12)


def test_checkpoints_of_a_run_are_each_as_they_are_alone(fixtures: Path, texts: Path, assert_same_rows: Same) -> None:
    run = measure(fixtures / "run", data=str(texts), steps="0,100")
    assert [row["step"] for row in run] == [0] * (len(run) // 2) + [100] * (len(run) // 2)
    for step in (0, 100):
        wanted = [row for row in run if row["step"] == step]
        assert_same_rows(measure(fixtures / "run" / f"checkpoint-{step}", data=str(texts)), wanted, rel=1e-12)


def test_sharding_of_the_weights(fixtures: Path, texts: Path, tmp_path: Path, assert_same_rows: Same) -> None:
    source = fixtures / "tiny-llama"
    (opened,) = checkpoint.open_checkpoints(source)
    checkpoint.save(tmp_path / "tiny-llama", opened.load(), tokenizer=opened.tokenizer())
    shutil.copy(source / "config.json", tmp_path / "tiny-llama" / "config.json")
    assert len(list(source.glob("*.safetensors"))) > len(list((tmp_path / "tiny-llama").glob("*.safetensors"))) == 1
    assert_same_rows(
        measure(tmp_path / "tiny-llama", data=str(texts), dtype="auto"),
        measure(source, data=str(texts), dtype="auto"),
        rel=0.0,
    )


# --- on two processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 1])  # of one example, the second process has nothing to do
def test_two_processes_write_the_report_of_one(
    fixtures: Path, texts: Path, tmp_path: Path, assert_same_rows: Same, torchrun: Torchrun, limit: int | None
) -> None:
    out = tmp_path / "two.parquet"
    arguments = ["entropy", str(fixtures / "tiny-gpt2"), "--data", str(texts), "--out", str(out)]
    arguments += ["--unit", "all", "--patch-size", "4", "--spectra", "--batch-size", "1"]
    arguments += [] if limit is None else ["--limit", str(limit)]
    done = torchrun("-m", "memdiag", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(out)]  # of one process only
    found = memdiag.read(out)
    expected = memdiag.entropy(
        fixtures / "tiny-gpt2",
        data=str(texts),
        unit="all",
        patch_size=4,
        spectra=True,
        batch_size="1",
        limit=limit,
        out=tmp_path / "one.parquet",
    )
    assert_same_rows(found.table.to_pylist(), expected.table.to_pylist(), rel=1e-9)
    assert found.table.schema.equals(expected.table.schema, check_metadata=False)
    assert found.meta["identity"] == expected.meta["identity"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.parquet", "two.parquet"]
