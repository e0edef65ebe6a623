"""The entropy report: its rows, its metadata, its options, and the ways to it."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil

import pytest
import torch
import transformers

import memdiag
from memdiag import entropy_report, tables
from memdiag.checkpoint import open_checkpoints
from memdiag.dataset import open_dataset
from memdiag.entropy_report import EntropyOptions, EntropyRow, GradientRow
from memdiag.errors import InputError

LIMIT = 6


@pytest.fixture(scope="module")
def texts(fixtures):
    return str(fixtures / "texts.jsonl")


@pytest.fixture(scope="module")
def of_run(fixtures, texts):
    """The report of the run, all units."""
    return memdiag.entropy(fixtures / "run", data=texts, limit=LIMIT, unit="all")


@pytest.fixture(scope="module")
def of_gpt2(fixtures, texts, tmp_path_factory):
    """The report of one checkpoint, in a file."""
    out = tmp_path_factory.mktemp("gpt2") / "entropy.parquet"
    return memdiag.entropy(fixtures / "tiny-gpt2", data=texts, limit=LIMIT, out=out)


def says(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- rows ----------------------------------------------------------------------------------------------------------


def test_rows_of_a_run_go_by_step_then_layer_then_unit(fixtures, of_run):
    checkpoints = open_checkpoints(fixtures / "run")
    assert len(checkpoints) >= 4
    units = [("patch", None), ("sequence", None), ("dataset", "mean"), ("dataset", "last")]
    wanted = [
        (checkpoint.name, checkpoint.step, layer, *unit)
        for checkpoint in checkpoints
        for layer in range(checkpoints[0].config["n_layer"] + 1)
        for unit in units
    ]
    rows = of_run.table.to_pylist()
    assert [tuple(row[c] for c in ("checkpoint", "step", "layer", "unit", "pooling")) for row in rows] == wanted
    steps = [checkpoint.step for checkpoint in checkpoints]
    assert steps == sorted(steps)
    assert of_run.table.schema.equals(tables.schema_of(EntropyRow), check_metadata=False)


def test_rows_of_one_checkpoint(of_gpt2):
    rows = of_gpt2.table.to_pylist()
    assert [(row["layer"], row["unit"], row["step"]) for row in rows] == [(i, "patch", None) for i in range(3)]
    assert [row["layer_name"] for row in rows] == ["transformer.h.0 (input)", "transformer.h.0", "transformer.h.1"]
    assert {row["n_dims"] for row in rows} == {32}
    assert {row["patch_size"] for row in rows} == {8}


def test_every_token_is_in_a_unit_or_counted_as_dropped(fixtures, texts, of_run):
    dataset = open_dataset(texts, limit=LIMIT)
    tokenizer = open_checkpoints(fixtures / "run")[0].tokenizer()
    lengths = [len(example.input_ids) for example in dataset.examples(tokenizer=tokenizer)]
    patches = [length // 8 for length in lengths]
    assert any(length % 8 for length in lengths)  # else nothing would be dropped
    expected = {
        "patch": (sum(patches), 8 * sum(patches)),
        "sequence": (LIMIT, sum(lengths)),
        "mean": (1, sum(lengths)),
        "last": (1, LIMIT),
    }
    for row in of_run.table.to_pylist():
        n_units, n_tokens = expected[row["pooling"] or row["unit"]]
        assert (row["n_units"], row["n_tokens"], row["n_examples"]) == (n_units, n_tokens, LIMIT)
        assert row["n_tokens"] + row["n_tokens_dropped"] == sum(lengths)
        assert (row["truncated"], row["n_undefined"]) == (0, 0)


def test_figures_are_within_their_bounds(of_run):
    for row in of_run.table.to_pylist():
        assert 0 <= row["mbe"] <= row["mbe_max"] + 1e-6
        assert 0 <= row["mbe_centred"] <= row["mbe_max"] + 1e-6
        assert row["mbe_row_normalised"] <= row["mbe_max"] + 1e-6
        assert row["participation_ratio"] >= 1
        assert -1 <= row["mean_cosine"] <= 1
        assert row["cross_entropy"] > 0
        if row["unit"] == "dataset":
            assert row["mbe_se"] is row["mbe_lo"] is row["mbe_hi"] is None
            assert row["n_limited"] is True  # a handful of examples in 32 dimensions
            assert row["mbe_max"] == pytest.approx(math.log(LIMIT))
            assert 0 <= row["isotropy"] <= 1
        else:
            assert row["mbe_lo"] < row["mbe"] < row["mbe_hi"]
            assert row["alpha_req"] is row["isotropy"] is row["n_limited"] is None
        if row["unit"] == "patch":
            assert row["mbe_max"] == pytest.approx(math.log(8))
            assert 1 <= row["effective_rank"] <= 8 + 1e-6
        if row["unit"] == "sequence":
            assert row["rankme"] is row["effective_rank"] is None  # asked for with spectra


def test_training_lowers_the_cross_entropy(of_run):
    losses = [row["cross_entropy"] for row in of_run.table.to_pylist() if row["layer"] == 0 and row["unit"] == "patch"]
    assert losses[0] == pytest.approx(math.log(512), abs=0.3)  # untrained: every one of 512 tokens alike
    assert losses[-1] < losses[0] - 1


def test_truncation_is_counted(fixtures, texts):
    whole = memdiag.entropy(fixtures / "tiny-gpt2", data=texts, limit=LIMIT, unit="sequence")
    cut = memdiag.entropy(fixtures / "tiny-gpt2", data=texts, limit=LIMIT, unit="sequence", max_length=8)
    assert whole.table["truncated"].to_pylist() == [0, 0, 0]
    assert cut.table["truncated"].to_pylist() == [LIMIT] * 3
    assert cut.table["n_tokens"].to_pylist() == [8 * LIMIT] * 3


def test_a_model_without_tokens_is_measured_by_dataset(fixtures):
    report = memdiag.entropy(fixtures / "digits-mlp", limit=40)
    rows = report.table.to_pylist()
    assert {(row["unit"], row["pooling"]) for row in rows} == {("dataset", "mean")}
    assert {row["n_examples"] for row in rows} == {40}
    assert rows[0]["cross_entropy"] < 0.5  # it was trained on these digits


# -- metadata ------------------------------------------------------------------------------------------------------


def test_the_metadata_says_what_it_was_made_from(of_run, texts, fixtures):
    meta = of_run.meta
    wanted = "report schema_version memdiag_version options seed checkpoint dataset torch transformers device dtype"
    assert set(meta) == {*wanted.split(), "identity"}
    assert (meta["report"], meta["schema_version"]) == ("entropy", EntropyRow.schema_version)
    assert meta["memdiag_version"] == memdiag.__version__
    assert (meta["torch"], meta["transformers"]) == (torch.__version__, transformers.__version__)
    assert (meta["device"], meta["dtype"], meta["seed"]) == ("cpu", "float32", 0)
    for about, checkpoint in zip(meta["checkpoint"], open_checkpoints(fixtures / "run"), strict=True):
        assert (about["name"], about["step"]) == (checkpoint.name, checkpoint.step)
        assert about["weights"] == checkpoint.fingerprint()
        assert len(about["tokenizer"]) == 64
        assert (about["dtype"], about["skipped"]) == ("float32", [])
    assert meta["dataset"] == {
        "name": meta["dataset"]["name"],
        "fingerprint": open_dataset(texts, limit=LIMIT).fingerprint(),
        "n_examples": LIMIT,
        "columns": {"text": "text", "label": "label", "id": "id"},
    }


def test_the_metadata_holds_every_option_resolved(of_run, fixtures):
    options = of_run.meta["options"]
    assert set(options) == {"checkpoint", *(field.name for field in dataclasses.fields(EntropyOptions))}
    assert options["checkpoint"] == str(fixtures / "run")
    assert (options["unit"], options["alpha"], options["limit"], options["dtype"]) == ("all", 2.0, LIMIT, "auto")


def test_auto_is_resolved_where_the_result_depends_on_it(of_gpt2, texts):
    assert of_gpt2.meta["options"]["unit"] == "patch"
    assert of_gpt2.meta["options"]["data"] == texts


def test_no_time_stamp_and_no_place_of_this_machine_beyond_the_inputs(of_gpt2, tmp_path):
    text = json.dumps(of_gpt2.meta)
    assert str(of_gpt2.path.parent) not in text
    assert not {"time", "date", "host", "user"} & set(of_gpt2.meta)


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"unit": "patches"}, "no unit 'patches'; there are all, auto, dataset, patch, sequence; did you mean 'patch'"),
        ({"alpha": 0.0}, "--alpha must be a finite number above 0, got 0.0"),
        ({"alpha": -1.0}, "--alpha"),
        ({"alpha": math.inf}, "--alpha"),
        ({"alpha": math.nan}, "--alpha"),
        ({"patch_size": 0}, "--patch-size must be at least 1, got 0"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"max_length": -3}, "--max-length must be at least 1"),
        ({"gradient_batches": 0}, "--gradient-batches must be at least 1"),
        ({"gradient_batch_size": 0}, "--gradient-batch-size must be at least 1"),
        ({"batch_size": "0"}, "--batch-size must be auto or a number"),
        ({"batch_size": "many"}, "--batch-size must be auto or a number"),
        ({"batch_size": "²"}, "--batch-size must be auto or a number"),
        ({"batch_size": "-1"}, "--batch-size must be auto or a number"),
    ],
)
def test_options_out_of_range_are_refused(options, match):
    with pytest.raises(InputError, match=match) as caught:
        EntropyOptions(**options)
    says(caught)


def test_an_unknown_option_names_the_nearest(fixtures):
    with pytest.raises(InputError, match=r"no option 'alhpa'; there are .*; did you mean 'alpha'") as caught:
        memdiag.entropy(fixtures / "tiny-gpt2", alhpa=1.0)
    says(caught)


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"layers": "7"}, "7"),
        ({"layers": "transformer.k.*"}, "transformer.k"),
        ({"dtype": "floot32"}, "did you mean 'float32'"),
        ({"device": "cupboard"}, "device 'cupboard' cannot be used"),
        ({"columns": "text=txt"}, "did you mean 'text'"),
        ({"columns": "text"}, "is not of the form text=body"),
        ({"columns": "=body,id=id"}, "is not of the form text=body"),
        ({"columns": "txt=text"}, "txt"),
        ({"data": "task:digit"}, "did you mean 'digits'"),
        ({"data": "task:pydoc?chrs=3"}, "did you mean 'chars'"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"tokenizer": "nowhere"}, "nowhere"),
        ({"steps": "0:10"}, "steps '0:10'"),
    ],
)
def test_names_that_do_not_exist_are_refused(fixtures, texts, option, match):
    with pytest.raises(InputError, match=match) as caught:
        memdiag.entropy(fixtures / "tiny-gpt2", **({"data": texts, "limit": 2} | option))
    says(caught)


def test_identity_leaves_out_what_changes_no_number():
    same = EntropyOptions(data="a", tokenizer="t", device="cuda", batch_size="3").identity()
    assert same == EntropyOptions().identity()
    for change in ({"alpha": 1.0}, {"limit": 3}, {"unit": "all"}, {"dtype": "float64"}, {"layers": "0"}, {"seed": 1}):
        assert EntropyOptions(**change).identity() != same


def test_columns_are_parsed():
    assert entropy_report.parse_columns(None) is None
    assert entropy_report.parse_columns("text=body, id = uid") == {"text": "body", "id": "uid"}
    assert entropy_report.parse_columns("text=a=b") == {"text": "a=b"}


def test_steps_choose_from_a_run(fixtures, texts):
    report = memdiag.entropy(fixtures / "run", data=texts, limit=2, steps="50:200:50")
    assert list(dict.fromkeys(report.table["step"].to_pylist())) == [50, 100, 200]


def test_layers_are_chosen(fixtures, texts, of_gpt2):
    report = memdiag.entropy(fixtures / "tiny-gpt2", data=texts, limit=LIMIT, layers="-1")
    assert report.table.to_pylist() == of_gpt2.table.to_pylist()[-1:]


# -- default data --------------------------------------------------------------------------------------------------


def test_a_text_model_without_data_uses_pydoc_and_says_so(fixtures, caplog):
    with caplog.at_level(logging.INFO, "memdiag"):
        inputs = entropy_report.open_inputs(fixtures / "tiny-gpt2", EntropyOptions(limit=2))
    assert [record.getMessage() for record in caplog.records] == ["no --data: measuring on task:pydoc"]
    assert inputs.options.data == "task:pydoc"


@pytest.mark.parametrize(
    ("name", "task", "unit"),
    [("digits-mlp", "task:digits", "dataset"), ("tiny-vit", "task:digits?shape=image", "patch")],
)
def test_a_memdiag_checkpoint_uses_the_task_it_was_trained_on(fixtures, caplog, name, task, unit):
    with caplog.at_level(logging.INFO, "memdiag"):
        inputs = entropy_report.open_inputs(fixtures / name, EntropyOptions(limit=2))
    assert f"no --data: measuring on {task}" in caplog.text
    assert (inputs.options.data, inputs.options.unit) == (task, unit)


def test_a_model_of_anything_else_needs_data(fixtures, tmp_path):
    shutil.copytree(fixtures / "tiny-vit", tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    del config["memdiag_task"]
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"vit is no text model .* give --data FILE") as caught:
        entropy_report.open_inputs(tmp_path / "vit", EntropyOptions())
    says(caught)


# -- the ways to it ------------------------------------------------------------------------------------------------


def test_in_memory_is_what_the_file_holds(fixtures, texts, of_gpt2):
    in_memory = memdiag.entropy(str(fixtures / "tiny-gpt2"), data=texts, limit=LIMIT)
    assert in_memory.path is None
    assert in_memory.table.equals(of_gpt2.table, check_metadata=True)
    assert in_memory.meta == of_gpt2.meta
    frame = in_memory.to_pandas()
    assert frame["mbe"].tolist() == in_memory.table["mbe"].to_pylist()
    assert frame["alpha_req"].isna().all()


def test_options_may_be_paths_and_numbers(fixtures, texts, of_gpt2):
    report = memdiag.entropy(fixtures / "tiny-gpt2", data=fixtures / "texts.jsonl", limit=LIMIT, batch_size=2)
    assert report.meta["options"] == of_gpt2.meta["options"] | {"batch_size": "2"}
    assert report.table["mbe"].to_pylist() == pytest.approx(of_gpt2.table["mbe"].to_pylist(), rel=1e-5)


def test_memdiag_read_gives_the_same(of_gpt2):
    again = memdiag.read(of_gpt2.path)
    assert again.table.equals(of_gpt2.table)
    assert again.meta == of_gpt2.meta


def test_options_can_be_had_back_from_a_report(of_gpt2, fixtures, texts):
    checkpoint, options = entropy_report.options_of(of_gpt2)
    assert checkpoint == str(fixtures / "tiny-gpt2")
    assert options == EntropyOptions(data=texts, limit=LIMIT, unit="patch")


@pytest.mark.parametrize(
    ("meta", "match"),
    [
        ({"report": "score", "options": {"checkpoint": "x"}}, "a report 'score' cannot be run again"),
        ({"report": "entropy", "options": {}}, "cannot be run again"),
        ({"report": "entropy"}, "cannot be run again"),
        ({"report": "entropy", "options": None}, "cannot be run again"),
        ({"report": "entropy", "memdiag_version": "9.9", "options": {"checkpoint": "x", "beta": 1}}, "by memdiag 9.9"),
        ({"report": "entropy", "options": {"checkpoint": "x", "alpha": "2"}}, "with other options"),
        ({"report": "entropy", "options": {"checkpoint": "x", "batch_size": 3}}, "with other options"),
    ],
)
def test_options_of_what_cannot_be_run_again(meta, match):
    empty = tables.schema_of(EntropyRow).empty_table()
    with pytest.raises(InputError, match=match) as caught:
        entropy_report.options_of(tables.Report(empty, meta))
    says(caught)


def test_a_plan_says_what_it_would_take(fixtures, texts, of_run, of_gpt2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = entropy_report.plan(fixtures / "run", EntropyOptions(data=texts, limit=LIMIT, unit="all"))
    assert plan["rows"] == of_run.table.num_rows
    assert plan["checkpoints"] == len(of_run.meta["checkpoint"])
    assert (plan["layers"], plan["examples"], plan["data"], plan["device"]) == (4, LIMIT, texts, "cpu")
    assert 0 <= plan["seconds_expected"] < 60
    assert plan["memory_expected_mb"] > 0
    size = of_gpt2.path.stat().st_size / 1024
    one = entropy_report.plan(fixtures / "tiny-gpt2", EntropyOptions(data=texts, limit=LIMIT))
    assert size / 3 < one["disk_expected_kb"] < 3 * size
    assert one["rows"] == 3
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_features_counts_the_rows_that_come(fixtures):
    plan = entropy_report.plan(fixtures / "digits-mlp", EntropyOptions(limit=40))
    assert plan["rows"] == memdiag.entropy(fixtures / "digits-mlp", limit=40).table.num_rows


def test_every_column_says_what_it_means():
    for row in (EntropyRow, GradientRow):
        names = [field.name for field in dataclasses.fields(row)]
        assert len(names) == len(set(names))
        for field in dataclasses.fields(row):
            assert field.metadata["doc"], field.name
    nats = {field.name for field in dataclasses.fields(EntropyRow) if field.metadata["unit"] == "nat"}
    assert nats == {
        "mbe", "mbe_se", "mbe_lo", "mbe_hi", "mbe_max", "mbe_centred", "mbe_row_normalised", "cross_entropy",
    }  # fmt: skip


def test_columns_of_the_api_may_be_a_dict(fixtures, texts):
    as_text, as_dict = (
        memdiag.entropy(fixtures / "tiny-gpt2", data=texts, limit=2, columns=columns)
        for columns in ("text=text,label=", {"text": "text", "label": ""})
    )
    assert as_dict.table.equals(as_text.table)
    assert as_dict.meta["identity"] == as_text.meta["identity"]


def test_a_text_classifier_has_the_loss_of_its_labels(fixtures, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    rows = [{"input_ids": [5, 6, 7, 8, 9], "label": 2}, {"input_ids": [3, 4], "label": 0}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    report = memdiag.entropy(tmp_path / "model", data=tmp_path / "data.jsonl")

    with torch.no_grad():
        losses = [
            model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["label"]])).loss.item() for row in rows
        ]
    assert report.table["cross_entropy"].to_pylist() == pytest.approx([sum(losses) / 2] * 2, rel=1e-6)
    (tmp_path / "other.jsonl").write_text('{"input_ids": [5, 6, 7], "label": 3}\n')
    with pytest.raises(InputError, match="label 3 does not fit a model of 3 classes"):
        memdiag.entropy(tmp_path / "model", data=tmp_path / "other.jsonl")
