"""memdiag train-gapt as people run it: what is written, resume, many processes, divergence, refusals."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import memdiag
from memdiag import IncompleteError, InputError, checkpoint, tables, train_gapt_report, train_gapt_run, training
from memdiag.train_gapt_report import HistoryRow, TrainGaptOptions

TIMED = "tokens_per_s"  # the one column that no second run repeats


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A GPT-2 of three blocks and 24 dimensions with dropout, which draws random numbers in every update."""
    path = tmp_path_factory.mktemp("config") / "config.json"
    small = {"model_type": "gpt2", "vocab_size": 300, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 2}
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    path.write_text(json.dumps(small | dropout | {"bos_token_id": 0, "eos_token_id": 0}))
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [
        {"id": f"t{i}", "text": f"Row {i} says that {i} plus {i + 3} is {2 * i + 3}, and so on. " * 2}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(config, texts):
    """A run of 24 updates that switches several times."""
    return {
        "config": str(config), "data": str(texts), "steps": 24, "batch_size": 4, "save_every": 6, "ce_patience": 3,
        "mbe_patience": 2, "ce_delta": 0.2, "mbe_delta": 0.2, "smoothing": 0.0, "ratio_every": 4, "seed": 3,
    }  # fmt: skip


def rows_of(report):
    return [{k: v for k, v in row.items() if k != TIMED} for row in report.table.to_pylist()]


def files_of(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def assert_same_run(a, b):
    """Equal bit for bit: every file but for the timed column."""
    assert files_of(a) == files_of(b)
    for name in files_of(a):
        if name == "history.parquet":
            first, second = tables.read(a / name), tables.read(b / name)
            assert rows_of(first) == rows_of(second)
            assert first.meta == second.meta
        elif name != "history.png":
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_what_is_written_is_what_the_docs_say(tmp_path, settings):
    found = memdiag.train_gapt(out=tmp_path / "run", **settings)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint-12", "checkpoint-18", "checkpoint-24", "checkpoint-6",
        "history.parquet", "history.png", "summary.json",
    ]  # fmt: skip
    assert not list(tmp_path.glob(".*"))
    rows = found.table.to_pylist()
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert pq.read_schema(found.history.path).names == [f.name for f in tables.schema_of(HistoryRow)]
    assert [row["step"] for row in rows if row["val_ce"] is not None] == [6, 12, 18, 24]
    assert {row["phase"] for row in rows} == {"memorize", "compress"}
    for row, following in itertools.pairwise(rows):
        assert (row["switch_reason"] is not None) == (row["phase"] != following["phase"])
        assert len(row["mbe_layers"]) == 4
        assert row["mbe"] == pytest.approx(row["mbe_layers"][2], rel=1e-12)  # of three blocks the middle one is active
        measured = row["phase"] == "compress" and (row["step"] - 1) % 4 == 0
        assert (row["gradient_ratio"] is not None) == measured
    assert found.meta["settled"] == {
        "active_layers": [2], "lr": 2e-3, "warmup": 1, "ce_patience": 3, "mbe_patience": 2,
    }  # fmt: skip
    share = sum(row["phase"] == "compress" for row in rows) / 24
    assert found.summary["share_compress"] == share
    assert [save["step"] for save in found.summary["saves"]] == [6, 12, 18, 24]
    assert found.summary["saves"][-1]["val_ce"] == rows[-1]["val_ce"]


def test_a_checkpoint_loads_everywhere(tmp_path, settings):
    memdiag.train_gapt(out=tmp_path / "run", **settings)
    last = tmp_path / "run" / "checkpoint-24"
    model = AutoModelForCausalLM.from_pretrained(last)
    tokenizer = AutoTokenizer.from_pretrained(last)
    with torch.no_grad():
        logits = model(**tokenizer("Row 3 says", return_tensors="pt", return_token_type_ids=False)).logits
    assert logits.shape[-1] == 300
    report = memdiag.entropy(tmp_path / "run", data=settings["data"], max_length=32)
    assert sorted(set(report.table["step"].to_pylist())) == [6, 12, 18, 24]


def test_the_held_out_loss_is_that_of_the_saved_checkpoint(tmp_path, settings):
    found = memdiag.train_gapt(out=tmp_path / "run", documents=True, **settings)
    held_out = tmp_path / "val.jsonl"
    lines = Path(settings["data"]).read_text().splitlines()
    held_out.write_text("\n".join(lines[i] for i in range(9, len(lines), 10)) + "\n")
    entropy = memdiag.entropy(tmp_path / "run" / "checkpoint-24", data=held_out, max_length=32)
    row = entropy.table.to_pylist()[2]
    assert row["layer"] == 2
    assert row["cross_entropy"] == pytest.approx(found.table["val_ce"][-1].as_py(), rel=1e-5)


def test_the_same_command_again_leaves_everything_as_it_is(tmp_path, settings):
    first = memdiag.train_gapt(out=tmp_path / "run", **settings)
    before = {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in files_of(tmp_path / "run")}
    again = memdiag.train_gapt(out=tmp_path / "run", **settings)
    assert again.table.equals(first.table)
    assert before == {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in files_of(tmp_path / "run")}


def test_force_makes_it_again_and_removes_the_old_checkpoints(tmp_path, settings):
    memdiag.train_gapt(out=tmp_path / "run", **settings)
    memdiag.train_gapt(out=tmp_path / "run", force=True, **(settings | {"steps": 5, "save_every": 5}))
    assert checkpoint.inner_steps(tmp_path / "run") == [5]


class Killed(BaseException):
    pass


def ends_at(step):
    """In place of `_evaluate`, which comes before a save."""

    def evaluate(self):
        if self.run.training.step == step:
            raise Killed

    return evaluate


PLACES = [
    ("memdiag.training.save_state", 0), ("memdiag.training.save_state", 2), ("memdiag.checkpoint.save", 1),
    ("memdiag.tables.write", 1), ("memdiag.tables.join", 0), ("memdiag.train_gapt_view.plot_history", 0),
]  # fmt: skip


@pytest.mark.parametrize(("place", "after"), PLACES)
@pytest.mark.parametrize("late", [False, True])
def test_ended_anywhere_and_begun_again_is_the_same_run(tmp_path, settings, monkeypatch, place, after, late):
    memdiag.train_gapt(out=tmp_path / "whole", **settings)
    module, name = place.rsplit(".", 1)
    original = getattr(sys.modules[module], name)
    calls = itertools.count()

    def ends(*args, **kwargs):
        if next(calls) < after:
            return original(*args, **kwargs)
        if late:
            original(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(sys.modules[module], name, ends)
    with pytest.raises(Killed):
        memdiag.train_gapt(out=tmp_path / "cut", **settings)
    monkeypatch.undo()
    memdiag.train_gapt(out=tmp_path / "cut", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("updates", [1, 7, 13, 23])
def test_killed_at_an_update_and_begun_again_is_the_same_run(tmp_path, settings, updates):
    """A real kill -9, once the run has come as far as this."""
    memdiag.train_gapt(out=tmp_path / "whole", **settings)
    script = tmp_path / "run.py"
    script.write_text(
        "import json, os, signal, sys\n"
        "import memdiag, torch\n"
        "from memdiag import training\n"
        "torch.set_num_threads(1)\n"
        "settings, out, stop = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])\n"
        "original = training.train\n"
        "def train(*args):\n"
        "    for update in original(*args):\n"
        "        if update.step == stop:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield update\n"
        "training.train = train\n"
        "memdiag.train_gapt(out=out, **settings)\n"
    )
    command = [sys.executable, str(script), json.dumps(settings), str(tmp_path / "cut"), str(updates)]
    done = subprocess.run(command, capture_output=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    memdiag.train_gapt(out=tmp_path / "cut", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_weights_and_moments_after_a_resume_are_those_of_an_uninterrupted_run(tmp_path, settings, monkeypatch):
    """The last state, which is removed with the parts, is looked at just before."""
    states = {}

    def keep(self):
        (directory,) = self.directory.glob("state-*")
        states[self.out.name] = load_file(next(directory.glob("*.safetensors"))), (directory / "state.json").read_text()

    monkeypatch.setattr(tables.Parts, "remove", keep)
    memdiag.train_gapt(out=tmp_path / "whole", **settings)
    with monkeypatch.context() as patched:
        patched.setattr(train_gapt_run.Work, "_evaluate", ends_at(18))
        with pytest.raises(Killed):
            memdiag.train_gapt(out=tmp_path / "cut", **settings)
    memdiag.train_gapt(out=tmp_path / "cut", **settings)
    (whole, gate), (cut, other) = states["whole"], states["cut"]
    assert gate == other
    assert whole.keys() == cut.keys()
    assert any("exp_avg_sq" in name for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name


def test_parts_of_an_update_change_nothing_without_dropout(tmp_path, settings, config):
    plain = json.loads(config.read_text()) | {"resid_pdrop": 0.0}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    settings |= {"config": str(tmp_path / "plain.json")}
    one = memdiag.train_gapt(**settings).table.to_pylist()
    for n in (2, 3):
        parts = memdiag.train_gapt(accumulate=n, **settings).table.to_pylist()
        assert [row["phase"] for row in parts] == [row["phase"] for row in one]
        assert [row["ce"] for row in parts] == pytest.approx([row["ce"] for row in one], rel=1e-5)


@pytest.mark.parametrize("options", [[], ["--shard"]])
def test_two_processes_train_the_same_as_one(tmp_path, settings, config, torchrun, options):
    plain = json.loads(config.read_text()) | {"resid_pdrop": 0.0}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    settings |= {"config": str(tmp_path / "plain.json")}
    given = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    done = torchrun("-m", "memdiag", "train-gapt", *given, "--out", str(tmp_path / "two"), *options)
    assert done.returncode == 0, done.stderr
    one = memdiag.train_gapt(out=tmp_path / "one", **settings)
    two = train_gapt_run.read(tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert [row["phase"] for row in rows_of(two.history)] == [row["phase"] for row in rows_of(one.history)]
    for name in ("ce", "mbe", "val_ce", "gradient_ratio", "grad_norm"):
        mine, theirs = (run.table[name].drop_null().to_pylist() for run in (one, two))
        tolerance = 1e-5 if name in ("ce", "mbe", "val_ce") else 1e-3
        assert theirs == pytest.approx(mine, rel=tolerance, abs=1e-6), name  # compressed to 0.004, mbe is rounding
    a, b = (load_file(tmp_path / name / "checkpoint-24" / "model.safetensors") for name in ("one", "two"))
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-4, atol=1e-5)
    # the identity is the same, so one process finds the other's run finished
    again = memdiag.train_gapt(out=tmp_path / "two", **settings)
    assert again.table.equals(two.table)


def test_a_run_begun_by_two_processes_in_shards_goes_on_in_one(tmp_path, settings, config, torchrun):
    plain = json.loads(config.read_text()) | {"resid_pdrop": 0.0}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    settings |= {"config": str(tmp_path / "plain.json")}
    script = tmp_path / "begin.py"
    script.write_text(
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "from memdiag import train_gapt_report, train_gapt_run\n"
        "from memdiag.progress import Progress\n"
        "original = train_gapt_run.Work._save\n"
        "def save(self):\n"
        "    original(self)\n"
        "    if self.run.training.step == 12:\n"
        "        os._exit(0)\n"
        "train_gapt_run.Work._save = save\n"
        "options = train_gapt_report.TrainGaptOptions(**json.loads(sys.argv[1]))\n"
        "train_gapt_run.run(None, options, Path(sys.argv[2]), force=False, progress=Progress())\n"
    )
    torchrun(str(script), json.dumps(settings | {"shard": True}), str(tmp_path / "cut"))
    assert len(list((tmp_path / ".cut.parts" / "state-12").glob("*.safetensors"))) == 2
    found = memdiag.train_gapt(out=tmp_path / "cut", **settings)
    whole = memdiag.train_gapt(**settings)
    assert found.table["ce"].to_pylist() == pytest.approx(whole.table["ce"].to_pylist(), rel=1e-5)
    assert found.table["phase"].to_pylist() == whole.table["phase"].to_pylist()


# -- it goes on from a checkpoint ----------------------------------------------------------------------------------


def test_a_checkpoint_goes_on_training_with_its_own_tokenizer_and_task(tmp_path, fixtures):
    found = memdiag.train_gapt(fixtures / "run" / "checkpoint-800", out=tmp_path / "run", steps=3, batch_size=2)
    assert found.meta["dataset"]["name"] == "task:pydoc?chars=1000"
    assert found.meta["settled"]["lr"] == 5e-5
    assert found.table["ce"][0].as_py() < 4.0  # it is trained already; a new one begins at ln 512 = 6.2
    assert (tmp_path / "run" / "checkpoint-3" / "tokenizer.json").exists()


def test_input_ids_need_no_tokenizer(tmp_path, config):
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [(i + j) % 300 for j in range(40)]}) + "\n" for i in range(20)))
    found = memdiag.train_gapt(config=config, data=path, steps=2, batch_size=2)
    assert found.table.num_rows == 2


# -- divergence ----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_keeps_what_is_good(tmp_path, settings, monkeypatch):
    from memdiag.gapt_training import Run

    original = Run.backward

    def breaks(self, step):
        loss, seen = original(self, step)
        return (float("nan") if step == 15 else loss), seen

    monkeypatch.setattr(Run, "backward", breaks)
    with pytest.raises(IncompleteError, match=r"the loss of update 16 is not finite; .*: .*checkpoint-12;"):
        memdiag.train_gapt(out=tmp_path / "run", **settings)
    history = tables.read(tmp_path / "run" / "history.parquet")
    assert history.meta["partial"] is True
    assert history.table["step"].to_pylist() == list(range(1, 16))
    monkeypatch.undo()
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    with pytest.raises(InputError, match=r"moved.history.parquet already holds another report"):
        memdiag.train_gapt(out=tmp_path / "moved", **settings)
    assert (tmp_path / "moved" / "history.parquet").exists()  # its parts are elsewhere, so these rows are all there is
    memdiag.train_gapt(out=tmp_path / "run", **settings)  # say, a memory error that does not come back
    memdiag.train_gapt(out=tmp_path / "whole", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_gradient_that_is_no_number_saves_the_weights_before_it(tmp_path, settings, monkeypatch):
    from memdiag.gapt_training import Run

    original = Run.backward

    def breaks(self, step):
        loss, seen = original(self, step)
        if step == 15:
            next(self.training.model.parameters()).grad[0, 0] = float("inf")
        return loss, seen

    monkeypatch.setattr(Run, "backward", breaks)
    with pytest.raises(IncompleteError, match=r"the gradient of update 16 is not finite; .*checkpoint-15"):
        memdiag.train_gapt(out=tmp_path / "run", **settings)
    assert checkpoint.inner_steps(tmp_path / "run") == [6, 12, 15]
    checkpoint.open_checkpoints(tmp_path / "run" / "checkpoint-15")[0].load()


def test_an_absurd_learning_rate_ends_with_exit_3_and_one_line(tmp_path, settings, config, texts):
    command = [sys.executable, "-m", "memdiag", "train-gapt", "--config", str(config), "--data", str(texts)]
    command += ["--lr", "1e30", "--clip", "0", "--warmup", "0", "--steps", "9", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "the held-out loss of update 1 is not finite; last good checkpoint: none yet" in done.stderr


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 7}, "--max-length 7 is shorter than a patch of 8 tokens"),
        ({"max_length": 64}, "--max-length 64 is more than the 32 positions of this model"),
        ({"layers": "5"}, "--layers '5' is out of range: this model has layers 0 to 3"),
        ({"weight": -1.0}, "--weight must be a finite number >= 0, got -1.0"),
        ({"weight": float("nan")}, "--weight must be a finite number >= 0, got nan"),
        ({"ce_patience": 0}, "--ce-patience must be at least 1 update, got 0"),
        ({"mbe_patience": -3}, "--mbe-patience must be at least 1 update, got -3"),
        ({"gate": "papre"}, "no gate 'papre'; .*did you mean 'paper'"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"accumulate": 5, "batch_size": 4}, "--batch-size 4 cannot be shared by 1 processes in 5 parts"),
        ({"alternate": True}, "--alternate gives each part of an update one loss; it needs --accumulate of at least 2"),
        ({"compare": True, "gate": "none"}, "--compare puts a gate beside its controls; --gate none is one of them"),
        ({"seeds": "1,2"}, "--seeds goes with --compare"),
        ({"shard": True}, "--shard shares one model among processes; start them with torchrun"),
        ({"dtype": "float16"}, "no dtype for training 'float16'"),
        ({"schedule": "cos"}, "no schedule 'cos'; there are constant, cosine, linear; did you mean 'cosine'"),
        ({"patch_size": 33}, "sequences of 32 tokens are shorter than a patch of 33"),
        ({"config": "gpt2-tyni"}, "no config 'gpt2-tyni'; .*did you mean 'gpt2-tiny'"),
        ({"config": "there-is-no.json"}, "there-is-no.json: no such file"),
        ({"tokenizer": "nowhere"}, "nowhere: no tokenizer there"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(tmp_path, settings, options, message):
    with pytest.raises(InputError, match=message) as refused:
        memdiag.train_gapt(out=tmp_path / "run", **(settings | options))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(settings, fixtures):
    with pytest.raises(InputError, match="the tokenizer has 512 tokens and the model 300; give the tokenizer"):
        memdiag.train_gapt(tokenizer=fixtures / "run", **settings)


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-vit", "digits-mlp"])
def test_a_checkpoint_that_does_not_predict_the_next_token_is_refused(tmp_path, fixtures, settings, name):
    settings = {key: value for key, value in settings.items() if key != "config"}
    with pytest.raises(InputError, match=r"is no causal language model|has no tokenizer"):
        memdiag.train_gapt(fixtures / name, out=tmp_path / "run", **settings)


def test_a_config_whose_model_sees_the_next_token_is_refused(tmp_path, settings):
    config = {"model_type": "bert", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2}
    (tmp_path / "bert.json").write_text(json.dumps(config | {"num_attention_heads": 2, "intermediate_size": 32}))
    with pytest.raises(InputError, match=r"bert.json: is no causal language model: its logits at a token depend on"):
        memdiag.train_gapt(**(settings | {"config": str(tmp_path / "bert.json")}))


def test_held_out_texts_without_anything_to_predict_are_refused(tmp_path, settings):
    empty, single = tmp_path / "empty.jsonl", tmp_path / "single.jsonl"
    empty.write_text("")
    single.write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match=r"empty.jsonl: is empty"):
        memdiag.train_gapt(val=empty, **settings)
    with pytest.raises(InputError, match="has no text of two tokens to predict from"):
        memdiag.train_gapt(val=single, documents=True, **settings)


def test_too_little_text_is_refused(tmp_path, settings):
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "Hello."}\n')
    with pytest.raises(InputError, match=r"short.jsonl: has \d+ tokens to train on, which make no sequence of 32"):
        memdiag.train_gapt(**(settings | {"data": short}))
    with pytest.raises(InputError, match=r"make no example fills a patch|which make no"):
        memdiag.train_gapt(documents=True, **(settings | {"data": short}))


def test_a_place_that_is_taken_is_left_alone(tmp_path, settings):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError, match="is not empty and holds no report of train-gapt"):
            memdiag.train_gapt(out=tmp_path / "run", force=force, **settings)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file; give a directory"):
        memdiag.train_gapt(out=tmp_path / "file", **settings)


def test_the_checkpoint_to_begin_with_is_never_in_the_way(tmp_path, settings):
    memdiag.train_gapt(out=tmp_path / "run", **settings)
    with pytest.raises(InputError, match="lies in --out"):
        memdiag.train_gapt(tmp_path / "run" / "checkpoint-24", out=tmp_path / "run", steps=2, force=True)
    assert checkpoint.inner_steps(tmp_path / "run") == [6, 12, 18, 24]


def test_other_options_do_not_go_on_with_a_run_that_was_begun(tmp_path, settings, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(train_gapt_run.Work, "_evaluate", ends_at(12))
        with pytest.raises(Killed):
            memdiag.train_gapt(out=tmp_path / "run", **settings)
    with pytest.raises(InputError, match=r"was begun with other inputs .differs in options.weight"):
        memdiag.train_gapt(out=tmp_path / "run", **(settings | {"weight": 2.0}))


@pytest.mark.parametrize("harm", ["short tensors", "no tensors", "no json", "not json"])
def test_a_damaged_state_is_told_in_one_line(tmp_path, settings, monkeypatch, capfd, harm):
    with monkeypatch.context() as patched:
        patched.setattr(train_gapt_run.Work, "_evaluate", ends_at(12))
        with pytest.raises(Killed):
            memdiag.train_gapt(out=tmp_path / "run", **settings)
    (state,) = (tmp_path / ".run.parts").glob("state-6")
    (tensors,) = state.glob("*.safetensors")
    if harm == "short tensors":
        tensors.write_bytes(tensors.read_bytes()[:1000])
    elif harm == "no tensors":
        tensors.unlink()
    elif harm == "no json":
        (state / "state.json").unlink()
    else:
        (state / "state.json").write_text('{"step": ')
    with pytest.raises(InputError, match=r"state-6: is damaged .*; --force starts afresh"):
        memdiag.train_gapt(out=tmp_path / "run", **settings)
    assert "Traceback" not in capfd.readouterr().err
    memdiag.train_gapt(out=tmp_path / "run", force=True, **settings)
    assert checkpoint.inner_steps(tmp_path / "run") == [6, 12, 18, 24]


def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path, settings, monkeypatch):
    """What a file system says when there is no room for the state, which PyTorch wraps in an exception of its own."""
    from torch.distributed.checkpoint import hf_storage

    def full(self, *args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(hf_storage.HuggingFaceStorageWriter, "write_data", full)
        with pytest.raises(OSError, match="No space left"):
            memdiag.train_gapt(out=tmp_path / "run", **settings)
    memdiag.train_gapt(out=tmp_path / "run", **settings)
    memdiag.train_gapt(out=tmp_path / "whole", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_the_plan_writes_nothing(tmp_path, settings, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = train_gapt_report.plan(None, TrainGaptOptions(**settings))
    assert plan["updates"] == 24
    assert plan["weights"] > 10_000
    assert plan["seconds_expected"] > 0
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_does_not_exist_names_the_nearest(settings):
    with pytest.raises(InputError, match=r"no option 'wieght'.*did you mean 'weight'"):
        memdiag.train_gapt(wieght=2, **settings)


def test_held_out_examples_are_not_trained_on(tmp_path, settings):
    """Other text in every tenth example changes what is held out and nothing of the training."""
    one = memdiag.train_gapt(tokenizer=None, **settings)
    rows = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]
    for i in range(9, len(rows), 10):
        rows[i]["text"] = "zzz " * 40
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    two = memdiag.train_gapt(**(settings | {"data": other}))
    assert two.table["ce"].to_pylist() == one.table["ce"].to_pylist()
    assert two.table["val_ce"].to_pylist() != one.table["val_ce"].to_pylist()


def test_the_clock_is_all_that_differs_between_two_runs(settings):
    first, second = memdiag.train_gapt(**settings), memdiag.train_gapt(**settings)
    assert rows_of(first.history) == rows_of(second.history)
    assert time.monotonic() > 0
    assert training.Recipe(steps=1, batch_size=1).lr_at(0) == 1e-3
