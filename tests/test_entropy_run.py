"""Carrying out `memdiag entropy`: what is done again, what is not, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import memdiag
from memdiag import entropy_run, observe, tables
from memdiag.checkpoint import Checkpoint, open_checkpoints, tokenizer_fingerprint
from memdiag.errors import IncompleteError, InputError

LIMIT = 3


@pytest.fixture(scope="module")
def texts(fixtures):
    return str(fixtures / "texts.jsonl")


@pytest.fixture
def run(fixtures, tmp_path, monkeypatch):
    """A copy of three checkpoints of the run, in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoint-0", "checkpoint-50", "checkpoint-100"):
        shutil.copytree(fixtures / "run" / name, tmp_path / "run" / name)
    for file in (fixtures / "run").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "run")
    return Path("run")


@pytest.fixture
def loads(monkeypatch):
    """Names of the checkpoints loaded, in order."""
    names = []
    original = Checkpoint.load

    def load(self, **options):
        names.append(self.name)
        return original(self, **options)

    monkeypatch.setattr(Checkpoint, "load", load)
    return names


def fail_at(monkeypatch, name, error):
    """Let the measurement of one checkpoint fail, after what comes before it."""
    original = entropy_run.observe_all

    def observe_all(watched, stream, options, progress):
        if progress.at == name:
            raise error
        return original(watched, stream, options, progress)

    class Where:
        at = ""

        def start(self, what, total):
            self.at = what

        def advance(self, n):
            pass

    monkeypatch.setattr(entropy_run, "observe_all", observe_all)
    return Where()


def change(checkpoint):
    """Other weights under the same name."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.wte.weight"][5] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})


def measure(run, texts, out="e.parquet", **options):
    return memdiag.entropy(run, **({"data": texts, "limit": LIMIT, "out": out} | options))


def other_texts(texts):
    """One letter of one text changed."""
    Path("run/other.jsonl").write_text(Path(texts).read_text().replace("tide", "ride"))
    return "run/other.jsonl"


def files():
    return sorted(name for name in os.listdir() if name != "run")


def refused(match, *args, **options):
    with pytest.raises(InputError, match=match) as caught:
        measure(*args, **options)
    assert "\n" not in str(caught.value)


# -- again ---------------------------------------------------------------------------------------------------------


def test_the_same_again_says_so_and_touches_nothing(run, texts, loads, caplog):
    first = measure(run, texts)
    before, stat = first.path.read_bytes(), first.path.stat()
    assert loads == ["checkpoint-0", "checkpoint-50", "checkpoint-100"]
    with caplog.at_level(logging.INFO, "memdiag"):
        again = measure(run, texts)
    assert "e.parquet is already there, made from the same inputs; --force makes it again" in caplog.text
    assert len(loads) == 3
    assert (first.path.read_bytes(), first.path.stat().st_mtime_ns) == (before, stat.st_mtime_ns)
    assert again.table.equals(first.table)
    assert files() == ["e.parquet"]


def test_batch_size_and_where_the_inputs_lie_make_no_other_report(run, texts, fixtures, loads):
    measure(run, texts)
    run.rename("elsewhere")
    shutil.copy(fixtures / "texts.jsonl", "other.jsonl")
    measure("elsewhere", "other.jsonl", batch_size=1, device="cpu")
    assert len(loads) == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"alpha": 1.0}, r"differs in options\.alpha"),
        ({"limit": 2, "patch_size": 4}, r"differs in options\.limit, options\.patch_size"),
        ({"steps": "0,50"}, r"differs in checkpoints\.checkpoint-100, options\.steps"),
    ],
)
def test_another_report_in_the_way_is_refused_and_kept(run, texts, options, named):
    before = measure(run, texts).path.read_bytes()
    refused(f"e.parquet already holds another report .*{named}.*--force", run, texts, **options)
    assert Path("e.parquet").read_bytes() == before
    assert files() == ["e.parquet"]


def test_other_data_and_other_weights_are_noticed(run, texts):
    measure(run, texts)
    refused(r"differs in dataset\)", run, other_texts(texts))
    change(run / "checkpoint-50")
    refused(r"differs in checkpoints\.checkpoint-50\.weights\)", run, texts)


def test_force_replaces(run, texts, loads):
    before = measure(run, texts).path.read_bytes()
    assert measure(run, texts, force=True).path.read_bytes() == before
    assert len(loads) == 6
    assert measure(run, texts, force=True, alpha=1.0).meta["options"]["alpha"] == 1.0
    assert files() == ["e.parquet"]


def test_something_else_in_the_way(run, texts, loads):
    Path("e.parquet").write_text("my notes")
    refused("e.parquet is there and is no whole report", run, texts)
    assert Path("e.parquet").read_text() == "my notes"
    Path("d.parquet").mkdir()
    refused("d.parquet is a directory", run, texts, out="d.parquet")
    refused("d.parquet is a directory", run, texts, out="d.parquet", force=True)  # before anything is measured
    refused("cannot be written", run, texts, out="x" * 300 + ".parquet")
    refused("cannot be written", run, texts, out="e.parquet/x.parquet")
    assert loads == []
    assert files() == ["d.parquet", "e.parquet"]
    assert measure(run, texts, force=True).table.num_rows == 12


# -- going on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), MemoryError()])
def test_what_is_finished_is_not_measured_again(run, texts, loads, monkeypatch, error):
    whole = measure(run, texts, out="whole.parquet").path.read_bytes()
    loads.clear()
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        measure(run, texts, progress=fail_at(patch, "checkpoint-100", error))
    assert files() == [".e.parquet.parts", "whole.parquet"]
    parts = {path.name: path.stat().st_mtime_ns for path in Path(".e.parquet.parts").glob("*.parquet")}
    assert sorted(parts) == ["00000.parquet", "00001.parquet"]
    loads.clear()
    assert measure(run, texts).path.read_bytes() == whole
    assert loads == ["checkpoint-100"]
    assert files() == ["e.parquet", "whole.parquet"]


def test_going_on_while_the_error_is_still_at_hand(run, texts, monkeypatch):
    """As in a notebook, which keeps the last traceback and so whatever it holds on to."""
    with monkeypatch.context() as patch, pytest.raises(IncompleteError) as kept:
        measure(run, texts, progress=fail_at(patch, "checkpoint-50", IncompleteError("the disk is full")))
    assert measure(run, texts).table.num_rows == 12
    assert kept.tb is not None


def test_nothing_is_left_where_nothing_was_finished(run, texts, monkeypatch):
    with pytest.raises(RuntimeError):
        measure(run, texts, progress=fail_at(monkeypatch, "checkpoint-0", RuntimeError("a bug")))
    assert files() == []


def begun(run, texts, monkeypatch, **options):
    """A report with two of three checkpoints finished."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        measure(run, texts, progress=fail_at(patch, "checkpoint-100", RuntimeError("a bug")), **options)


def test_a_checkpoint_that_changed_meanwhile_is_refused(run, texts, monkeypatch, loads):
    begun(run, texts, monkeypatch)
    change(run / "checkpoint-50")
    loads.clear()
    refused(r"checkpoint-50 has changed since e\.parquet was begun; give --force", run, texts)
    assert loads == []
    assert measure(run, texts, force=True).meta["checkpoint"][1]["name"] == "checkpoint-50"


def test_a_checkpoint_that_was_renamed_meanwhile_does_not_keep_its_old_name(run, texts, monkeypatch):
    begun(run, texts, monkeypatch)
    (run / "checkpoint-50").rename(run / "checkpoint-60")
    refused("checkpoint-60 has changed since", run, texts)


def test_other_options_or_data_meanwhile_are_refused(run, texts, monkeypatch):
    begun(run, texts, monkeypatch)
    refused(r"e\.parquet was begun with other inputs \(differs in options\.alpha\)", run, texts, alpha=3.0)
    refused(r"e\.parquet was begun with other inputs \(differs in dataset\)", run, other_texts(texts))
    assert measure(run, texts, alpha=3.0, force=True).meta["options"]["alpha"] == 3.0
    assert files() == ["e.parquet"]


def test_checkpoints_that_were_saved_meanwhile_are_measured_too(run, texts, monkeypatch, fixtures, loads):
    begun(run, texts, monkeypatch)
    shutil.copytree(fixtures / "run" / "checkpoint-200", run / "checkpoint-200")
    loads.clear()
    report = measure(run, texts)
    assert loads == ["checkpoint-100", "checkpoint-200"]
    assert list(dict.fromkeys(report.table["step"].to_pylist())) == [0, 50, 100, 200]


def test_killed_between_the_report_and_the_removal_of_its_parts(run, texts, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tables.Parts, "remove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure(run, texts)
    assert files() == [".e.parquet.parts", "e.parquet"]
    measure(run, texts)
    assert files() == ["e.parquet"]


def test_parts_of_another_run_stay_where_a_report_is_there(run, texts, monkeypatch):
    measure(run, texts)
    begun(run, texts, monkeypatch, alpha=1.0, force=True)
    assert measure(run, texts).meta["options"]["alpha"] == 2.0
    assert files() == [".e.parquet.parts", "e.parquet"]


def test_two_at_once_on_one_report(run, texts):
    parts = tables.Parts(Path("e.parquet"), {"somebody": "else"}, force=False)
    refused(r"another process is writing e\.parquet", run, texts)
    refused(r"another process is writing e\.parquet", run, texts, force=True)
    parts.close()
    assert measure(run, texts).table.num_rows == 12


# -- gradients -----------------------------------------------------------------------------------------------------

GRADIENTS = {"gradients": True, "gradient_batches": 2, "gradient_batch_size": 2, "limit": 4}


def test_gradients_are_written_beside_the_report(run, texts):
    report = measure(run, texts, **GRADIENTS)
    assert files() == ["e.gradients.parquet", "e.parquet"]
    assert report.meta["gradients"] == "e.gradients.parquet"
    found = memdiag.read("e.gradients.parquet")
    assert found.meta | {"gradients": "e.gradients.parquet"} == report.meta | {"report": "entropy.gradients"}
    rows = found.table.to_pylist()
    kinds = [row["kind"] for row in rows]
    assert kinds == sorted(kinds)  # cosine rows come first
    cosines = [row for row in rows if row["kind"] == "cosine"]
    assert list(dict.fromkeys(row["checkpoint"] for row in cosines)) == [
        "checkpoint-0",
        "checkpoint-50",
        "checkpoint-100",
    ]
    assert {row["layer"] for row in cosines} >= {1, 2, 3}
    assert {row["objective_pair"] for row in cosines} == {"ce_mbe", "ce_ce"}
    assert all(-1 - 1e-6 <= row["cosine"] <= 1 + 1e-6 for row in cosines if row["cosine"] is not None)
    assert any(row["cosine"] is not None for row in cosines)
    assert all(row["n_points"] is None and row["std"] is None for row in cosines)


def test_oscillation_rows_sum_up_each_series_with_its_null_band(run, texts):
    measure(run, texts, **GRADIENTS)
    rows = memdiag.read("e.gradients.parquet").table.to_pylist()
    key = ("layer", "layer_name", "matrix", "objective_pair", "batches")
    series = {tuple(row[name] for name in key) for row in rows if row["kind"] == "cosine"}
    sums = [row for row in rows if row["kind"] == "oscillation"]
    assert {tuple(row[name] for name in key) for row in sums} == series
    assert len(sums) == len(series)
    for row in sums:
        assert row["checkpoint"] is row["step"] is row["cosine"] is None
        assert row["n_points"] == 3
        for name in ("std", "zero_crossings_per_100", "spectral_peak_over_mean"):
            low, high = row[f"{name}_null_lo"], row[f"{name}_null_hi"]
            assert (low is None) == (high is None)
            if low is not None:
                assert low <= high
    assert any(row["zero_crossings_per_100_null_hi"] is not None for row in sums)


def test_one_checkpoint_has_no_oscillation(run, texts):
    measure(run, texts, steps="50", **GRADIENTS)
    assert set(memdiag.read("e.gradients.parquet").table["kind"].to_pylist()) == {"cosine"}


def test_gradients_do_not_move_the_report(run, texts):
    plain = measure(run, texts, limit=4, out="plain.parquet").table
    assert measure(run, texts, **GRADIENTS).table.equals(plain)


def test_gradients_go_on_too(run, texts, monkeypatch, loads):
    measure(run, texts, out="whole.parquet", **GRADIENTS)
    begun(run, texts, monkeypatch, **GRADIENTS)
    loads.clear()
    measure(run, texts, **GRADIENTS)
    assert loads == ["checkpoint-100"]
    assert files() == ["e.gradients.parquet", "e.parquet", "whole.gradients.parquet", "whole.parquet"]
    whole = memdiag.read("whole.gradients.parquet")
    assert memdiag.read("e.gradients.parquet").table.equals(whole.table)


def test_a_second_report_that_is_not_ours_is_not_overwritten(run, texts, loads):
    Path("e.gradients.parquet").write_text("my notes")
    refused(r"e\.gradients\.parquet is there and is no whole report", run, texts, **GRADIENTS)
    assert loads == []
    measure(run, texts, force=True, **GRADIENTS)
    assert memdiag.read("e.gradients.parquet").meta["report"] == "entropy.gradients"


def test_a_lost_second_report_is_made_again(run, texts):
    measure(run, texts, **GRADIENTS)
    before = Path("e.gradients.parquet").read_bytes()
    Path("e.gradients.parquet").unlink()
    measure(run, texts, **GRADIENTS)
    assert Path("e.gradients.parquet").read_bytes() == before


@pytest.mark.parametrize("name", ["digits-mlp", "tiny-bert"])
def test_gradients_of_what_has_none_are_refused(fixtures, texts, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data = None if name == "digits-mlp" else texts
    refused("gradients|cross-entropy|predict|causal", fixtures / name, data, **GRADIENTS)
    assert files() == []


# -- parts of it ---------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_part_of_what_a_report_is_made_from(run, texts, fixtures):
    report = measure(run, texts)
    tokenizer = open_checkpoints(run)[0].tokenizer()
    digest = tokenizer_fingerprint(tokenizer)
    assert {about["tokenizer"] for about in report.meta["checkpoint"]} == {digest}
    assert tokenizer_fingerprint(None) is None
    text = json.loads((run / "tokenizer.json").read_text())
    text["model"]["merges"].pop()
    (run / "tokenizer.json").write_text(json.dumps(text))
    assert tokenizer_fingerprint(open_checkpoints(run)[0].tokenizer()) != digest
    refused("tokenizer", run, texts)


def test_oscillation_of_a_made_up_series():
    """A cosine that changes sign at every of 10 evenly spaced checkpoints, 100 steps apart."""
    empty = dict.fromkeys(entropy_run.GradientRow.__dataclass_fields__)
    about = {"kind": "cosine", "layer": 1, "layer_name": "h.0", "matrix": None}
    rows = [
        empty | about | {"objective_pair": "ce_mbe", "batches": "same", "step": 100 * i, "checkpoint": str(i)}
        | {"cosine": 0.5 * (-1) ** i, "cosine_se": 0.01, "n_pairs": 4}
        for i in range(10)
    ]  # fmt: skip
    table = tables.pa.Table.from_pylist(rows, schema=tables.schema_of(entropy_run.GradientRow))
    (row,) = entropy_run.oscillation_rows(table, seed=0)
    assert row["n_points"] == 10
    assert row["zero_crossings_per_100"] == pytest.approx(1.0)
    assert row["zero_crossings_per_100"] > row["zero_crossings_per_100_null_hi"]
    assert row["std"] > row["std_null_hi"]
    assert row["spectral_peak_over_mean"] > row["spectral_peak_over_mean_null_hi"]
    assert list(entropy_run.oscillation_rows(table, seed=0)) == [row]


def test_no_global_random_state_is_touched(run, texts):
    before = torch.random.get_rng_state()
    measure(run, texts, unit="all", **GRADIENTS)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("tiny-gpt2", {"layers": "0"}, "layers 1 and up; there are none"),
        ("tiny-gpt2", {"layers": "transformer.h.*.mlp"}, "layers 1 and up; there are none"),
        ("tiny-bert", {}, "predicts no next tokens"),
    ],
)
def test_gradients_that_cannot_be_are_refused_before_anything_is_measured(fixtures, monkeypatch, model, options, says):
    monkeypatch.setattr(entropy_run, "observe_all", lambda *_: pytest.fail("measured first"))
    with pytest.raises(InputError, match=says):
        memdiag.entropy(fixtures / model, data=fixtures / "texts.jsonl", limit=2, gradients=True, **options)


def test_layers_left_out_are_told_by_reason_without_those_the_user_left_out(caplog):
    with caplog.at_level(logging.INFO, "memdiag"):
        entropy_run._log_skipped([("a", observe.NOT_CHOSEN), *((f"b{i}", "why not") for i in range(5))])
    assert caplog.messages == ["left out, why not: b0, b1, b2 and 2 more"]


@pytest.mark.parametrize(
    ("model", "rows", "says"),
    [
        ("tiny-gpt2", '{"features": [0.5, 1.5]}\n', "reads tokens, but the dataset holds features"),
        ("tiny-vit", '{"input_ids": [1, 2, 3]}\n', "reads pixel_values, but the dataset holds text"),
    ],
)
def test_a_dataset_of_another_kind_than_the_model_is_refused(fixtures, tmp_path, model, rows, says):
    (tmp_path / "data.jsonl").write_text(rows)
    with pytest.raises(InputError, match=says):
        memdiag.entropy(fixtures / model, data=tmp_path / "data.jsonl")
