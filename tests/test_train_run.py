"""memdiag train as people run it: what is written, resume, trajectories, divergence, refusals."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import memdiag
from memdiag import (
    IncompleteError,
    InputError,
    checkpoint,
    tables,
    train_report,
    train_run,
    train_view,
    training,
    trajectory,
)
from memdiag.supervised import Run
from memdiag.train_report import TrainOptions, train

TIMED = "examples_per_s"  # the one column that no second run repeats
FACTORY = (
    "from torch import nn\n"
    "def net():\n"
    "    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3))\n"
    "def outputs_two():\n"
    "    return nn.Linear(6, 2)\n"
    "def nothing():\n"
    "    return nn.Identity()\n"
    "def fails():\n"
    "    raise RuntimeError('no weather today')\n"
)


def fill(folder):
    """Data, and a module whose factory makes a network with dropout and batch norm."""
    rng = np.random.default_rng(0)
    rows = [{"id": f"e{i}", "x": rng.normal(size=6).round(3).tolist(), "y": int(rng.integers(0, 3))} for i in range(50)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = np.random.default_rng(1).normal(size=(30, 1, 6, 6)).astype(np.float32)
    np.savez(folder / "images.npz", x=images, y=np.arange(30) % 3)
    texts = [{"text": f"Row {i} says that {i} plus 3 is {i + 3}. " * (1 + i % 3)} for i in range(30)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    small = {"model_type": "gpt2", "vocab_size": 300, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (folder / "gpt.json").write_text(json.dumps(small | dropout | {"bos_token_id": 0, "eos_token_id": 0}))
    (folder / "nets_of_test.py").write_text(FACTORY)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with data and a module."""
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("nets_of_test", None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted runs, by name: a directory each."""
    folder = tmp_path_factory.mktemp("whole")
    fill(folder)
    made = {}

    def run(name):
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.syspath_prepend(str(folder))
                train(out=name, **RUNS[name])
                sys.modules.pop("nets_of_test", None)
            made[name] = folder / name
        return made[name]

    return run


# 50 examples in updates of 8: an epoch ends within an update
RUNS = {
    "factory": {"data": "data.jsonl", "model": "nets_of_test:net", "epochs": 3, "batch_size": 8, "corruption": 0.2,
                "test_fraction": 0.1, "save_every": 4, "seed": 3},
    "cnn": {"data": "images.npz", "arch": "cnn", "width": 4, "epochs": 3, "batch_size": 7, "optimizer": "adamw"},
    "gpt2": {"data": "texts.jsonl", "config": "gpt.json", "epochs": 3, "batch_size": 7, "save_every": 3,
             "test_fraction": 0.1},
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
        else:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


# -- what is written -----------------------------------------------------------------------------------------------


def test_what_is_written_is_what_the_docs_say(here):
    found = train("data.jsonl", out="run", test_fraction=0.2, corruption=0.1, epochs=3, batch_size=16)
    assert sorted(path.name for path in (here / "run").iterdir()) == [
        "checkpoint-0", "checkpoint-3", "checkpoint-5", "checkpoint-8",
        "examples.parquet", "history.parquet", "history.png", "summary.json", "trajectory",
    ]  # fmt: skip
    assert files_of(here / "run" / "trajectory") == [f"epoch=000{e}.parquet" for e in range(3)]
    assert not list(here.glob(".run*"))
    assert [(row["epoch"], row["step"]) for row in rows_of(found.history)] == [(0, 3), (1, 5), (2, 8)]  # 120 / 16 = 7.5
    examples = found.examples.to_pandas()
    assert len(examples) == 40
    assert list(examples["row"]) == sorted(examples["row"])
    assert (examples["example_id"] == [f"e{row}" for row in examples["row"]]).all()
    assert examples["corrupted"].sum() == 4
    assert ((examples["label"] != examples["true_label"]) == examples["corrupted"]).all()
    for report in (found.history, found.examples, *map(tables.read, trajectory.epochs(here / "run"))):
        assert report.meta["n_examples"] == 40
        assert report.meta["dataset"]["fingerprint"] == found.meta["dataset"]["fingerprint"]
        assert {"memdiag_version", "options", "seed", "identity", "torch", "device", "dtype"} <= set(report.meta)
    assert found.meta["settled"]["lr"] == 0.1
    assert found.summary["corrupted"] == 4


def test_without_out_the_reports_come_back_and_nothing_is_written(here):
    before = files_of(here)
    found = train("data.jsonl", epochs=2)
    assert (found.table.num_rows, found.examples.table.num_rows, found.path) == (2, 50, None)
    assert files_of(here) == before


def test_an_epoch_presents_every_example_once_with_the_weights_before_its_update(here):
    """The whole run again by hand, with plain PyTorch."""
    train("data.jsonl", out="run", epochs=2, batch_size=16, width=8, lr=0.05)
    labels = np.array([json.loads(line)["y"] for line in (here / "data.jsonl").read_text().splitlines()])
    x = torch.tensor([json.loads(line)["x"] for line in (here / "data.jsonl").read_text().splitlines()])
    model = checkpoint.open_checkpoints(here / "run" / "checkpoint-0")[0].load().train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = np.concatenate([np.random.default_rng([0, epoch]).permutation(50) for epoch in range(2)])
    seen = {}
    for step, start in enumerate(range(0, 100, 16)):
        at = order[start : start + 16]  # the last one has 4
        logits = model(x[at])
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[at]))
        for place, i in enumerate(at.tolist()):
            z, y = logits[place].tolist(), labels[i]
            others = [value for c, value in enumerate(z) if c != y]
            seen[(start + place) // 50, i] = (z[y], max(others), np.log(np.exp(z).sum()), z[y] > max(others))
        optimizer.param_groups[0]["lr"] = training.Recipe(7, 16, lr=0.05).lr_at(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for epoch, path in enumerate(trajectory.epochs(here / "run")):
        table = tables.read(path).table.to_pylist()
        assert [row["row"] for row in table] == list(range(50))
        assert {row["epoch"] for row in table} == {epoch}
        for row in table:
            z, other, lse, right = seen[epoch, row["row"]]
            found = (row["label_logit"], row["other_logit"], row["logsumexp"])
            assert found == pytest.approx((z, other, lse), rel=1e-4, abs=1e-5)
            assert (row["correct"], row["label"]) == (right, labels[row["row"]])
    last = checkpoint.open_checkpoints(here / "run" / "checkpoint-7")[0].load()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(last.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_language_models_figures_are_means_over_its_tokens(here):
    train(out="run", **(RUNS["gpt2"] | {"save_every": 1, "epochs": 1, "batch_size": 5}))
    plain = json.loads((here / "gpt.json").read_text()) | {"resid_pdrop": 0.0}
    (here / "plain.json").write_text(json.dumps(plain))
    train("texts.jsonl", out="plain", config="plain.json", epochs=1, batch_size=5)
    model = checkpoint.open_checkpoints(here / "plain" / "checkpoint-0")[0]
    net, tokenizer = model.load(), model.tokenizer()
    table = tables.read(trajectory.path_of(here / "plain" / "trajectory", 0)).table.to_pylist()
    first = np.random.default_rng([0, 0]).permutation(30)[:5]  # of the first update, whose weights are those of step 0
    texts = [json.loads(line)["text"] for line in (here / "texts.jsonl").read_text().splitlines()]
    for row in first.tolist():
        ids = torch.tensor(tokenizer(texts[row])["input_ids"][:32])
        logits = net(ids[None]).logits[0, :-1].double()
        own = logits.gather(1, ids[1:, None])[:, 0]
        rest = logits.scatter(1, ids[1:, None], -torch.inf).amax(1)
        found = [table[row][name] for name in ("label_logit", "other_logit", "logsumexp")]
        wanted = [float(v.mean()) for v in (own, rest, logits.logsumexp(1))]
        assert found == pytest.approx(wanted, abs=1e-5)
        assert table[row]["correct"] is False
        assert table[row]["label"] is None


def test_the_history_adds_up_what_the_trajectory_holds(here):
    found = train(out="run", **RUNS["factory"])
    corrupted = found.examples.table["corrupted"].to_numpy()
    for row, path in zip(rows_of(found.history), trajectory.epochs("run")):
        table = tables.read(path).table
        loss = table["logsumexp"].to_numpy().astype(np.float64) - table["label_logit"].to_numpy()
        right = table["correct"].to_numpy(zero_copy_only=False)
        assert row["train_loss"] == pytest.approx(loss.mean(), rel=1e-12)
        assert row["train_accuracy"] == pytest.approx(right.mean())
        assert row["corrupted_accuracy"] == pytest.approx(right[corrupted].mean())
        assert row["clean_accuracy"] == pytest.approx(right[~corrupted].mean())


def test_held_out_figures_are_those_of_the_saved_checkpoint(here):
    found = train("data.jsonl", out="run", test="data.jsonl", epochs=2, batch_size=16)
    row = rows_of(found.history)[-1]
    model = checkpoint.open_checkpoints("run/checkpoint-7")[0].load()
    lines = [json.loads(line) for line in (here / "data.jsonl").read_text().splitlines()]
    logits = model(torch.tensor([line["x"] for line in lines]))
    labels = torch.tensor([line["y"] for line in lines])
    assert row["test_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert row["test_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def test_the_scaling_of_the_features_is_part_of_the_checkpoint(here):
    found = train("task:digits?split=train&shape=image", out="run", arch="cnn", width=2, depth=1, epochs=1)
    config = json.loads((here / "run" / "checkpoint-0" / "config.json").read_text())
    pixels = np.stack([row["features"] for row in memdiag_rows("task:digits?split=train&shape=image")])
    assert config["input_mean"] == pytest.approx(pixels.mean(dtype=np.float64))
    assert config["input_std"] == pytest.approx(pixels.std(dtype=np.float64))
    assert config["memdiag_task"] == found.meta["dataset"]["name"]
    train("data.jsonl", out="plain", epochs=1, standardize=False)
    assert "input_mean" not in json.loads((here / "plain" / "checkpoint-0" / "config.json").read_text())


def memdiag_rows(name):
    from memdiag import tasks

    return list(tasks.load(name).rows())


def test_every_checkpoint_of_the_run_opens(here):
    for name, options in RUNS.items():
        train(out=name, **options)
        for one in checkpoint.open_checkpoints(name, model=options.get("model")):
            one.load()


def test_tokens_with_labels_train_a_transformer(here):
    rows = [{"input_ids": [i % 5, i % 7, i % 3][: 1 + i % 3], "label": i % 3} for i in range(40)]
    (here / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = train("pairs.jsonl", out="run", epochs=30, width=16, test="pairs.jsonl")
    assert found.meta["config"]["model_type"] == "memdiag-transformer"
    assert found.table["train_loss"][-1].as_py() < 0.8 * found.table["train_loss"][0].as_py()
    assert found.examples.table.num_rows == 40  # those of one token, too


def test_an_example_of_one_token_has_nothing_to_predict_and_is_left_out(here):
    rows = [{"input_ids": [7, 8, 9, 1]}, {"input_ids": [5]}, {"input_ids": [1, 2]}]
    (here / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = train("ids.jsonl", out="run", config="gpt.json", epochs=2)
    assert found.examples.table["row"].to_pylist() == [0, 2]
    assert [tables.read(p).table["row"].to_pylist() for p in trajectory.epochs("run")] == [[0, 2], [0, 2]]


def test_more_than_there_are_is_not_presented_at_once(here):
    found = train("data.jsonl", out="run", epochs=3, batch_size=1000)
    assert found.meta["settled"]["batch_size"] == 50
    assert found.table["step"].to_pylist() == [1, 2, 3]


@pytest.mark.parametrize("labels", [[0], [0, 0, 0]])
def test_one_class_or_one_example_has_no_other_logit(here, labels):
    np.savez("one.npz", x=np.ones((len(labels), 4), dtype=np.float32), y=np.array(labels))
    found = train("one.npz", out="run", epochs=2)
    (first, _) = (tables.read(path).table for path in trajectory.epochs("run"))
    assert first["other_logit"].to_pylist() == [None] * len(labels)
    assert found.table["train_accuracy"].to_pylist() == [1.0, 1.0]
    assert found.table["train_loss"].to_pylist() == [0.0, 0.0]


# -- labels --------------------------------------------------------------------------------------------------------


def test_corrupted_labels_are_others_and_uniform_over_them():
    from memdiag.train_inputs import corrupt

    labels = np.arange(40_000) % 4
    found, replaced = corrupt(labels, 0.5, 0)
    assert replaced.sum() == 20_000
    assert ((found != labels) == replaced).all()
    counts = np.bincount((found - labels)[replaced] % 4, minlength=4)
    assert counts[0] == 0
    assert counts[1:] == pytest.approx([20_000 / 3] * 3, rel=0.05)
    more, also = corrupt(labels, 0.6, 0)
    assert also[replaced].all()
    assert (more[replaced] == found[replaced]).all()
    assert corrupt(labels, 0.00001, 0)[1].sum() == 0
    assert not np.array_equal(corrupt(labels, 0.5, 1)[1], replaced)


def test_classes_that_do_not_occur_are_not_put_in_anyones_place():
    from memdiag.train_inputs import corrupt

    found, _ = corrupt(np.array([0, 5] * 50), 1.0, 0)
    assert found.tolist() == [5, 0] * 50


def test_a_task_is_believed_which_labels_are_wrong(here):
    found = train("task:digits?split=train&corruption=0.1", epochs=1, width=4)
    examples = found.examples.to_pandas()
    assert examples["corrupted"].sum() == 143
    assert ((examples["label"] != examples["true_label"]) == examples["corrupted"]).all()
    with pytest.raises(InputError, match="143 of its labels are wrong already; leave --corruption out"):
        train("task:digits?split=train&corruption=0.1", epochs=1, corruption=0.1)


def test_what_is_not_known_of_the_labels_is_null(here):
    found = train("data.jsonl", epochs=1)
    assert found.examples.table["corrupted"].null_count == found.examples.table["true_label"].null_count == 50
    assert found.table["corrupted_accuracy"].null_count == found.table["clean_accuracy"].null_count == 1


# -- resume --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


PLACES = [
    ("memdiag.training.save_state", 0), ("memdiag.training.save_state", 2), ("memdiag.checkpoint.save", 0),
    ("memdiag.checkpoint.save", 2), ("memdiag.tables.write", 0), ("memdiag.tables.write", 1),
    ("memdiag.tables.write", 4), ("memdiag.tables.write", 6), ("memdiag.tables.write", 8), ("memdiag.tables.join", 0),
    ("memdiag.train_view.plot_history", 0),
]  # fmt: skip


@pytest.mark.parametrize(("place", "after"), PLACES)
@pytest.mark.parametrize("late", [False, True])
def test_ended_anywhere_and_begun_again_is_the_same_run(here, whole, monkeypatch, place, after, late):
    expected = whole("factory")
    module, name = place.rsplit(".", 1)
    original = getattr(sys.modules[module], name)
    calls = itertools.count()

    def ends(*args, **kwargs):
        if next(calls) < after:
            return original(*args, **kwargs)
        if late:
            original(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules[module], name, ends)
        with pytest.raises(Killed):
            train(out="cut", **RUNS["factory"])
    train(out="cut", **RUNS["factory"])
    assert_same_run(expected, here / "cut")


SCRIPT = (
    "import json, os, signal, sys\n"
    "import torch\n"
    "from memdiag import training\n"
    "from memdiag.train_report import train\n"
    "torch.set_num_threads(1)\n"
    "settings, stop = json.loads(sys.argv[1]), int(sys.argv[2])\n"
    "original = training.train\n"
    "def until(*args):\n"
    "    for update in original(*args):\n"
    "        if update.step == stop:\n"
    "            os.kill(os.getpid(), signal.SIGKILL)\n"
    "        yield update\n"
    "training.train = until\n"
    "train(out='cut', **settings)\n"
)


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_updates_and_begun_again_is_the_same_run(here, whole, name):
    """Two real kill -9, the second of a run that was begun again; others on every day that it is run."""
    expected = whole(name)
    last = json.loads((expected / "summary.json").read_text())["updates"]
    first, second = sorted(np.random.default_rng().choice(np.arange(1, last), 2, replace=False).tolist())
    (here / "script.py").write_text(SCRIPT)
    for stop in (first, second):
        command = [sys.executable, "script.py", json.dumps(RUNS[name]), str(stop)]
        paths = os.pathsep.join([str(here), str(tables.Path(memdiag.__file__).parents[1])])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        done = subprocess.run(command, capture_output=True, check=False, env=environment, cwd=here)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    train(out="cut", **RUNS[name])
    print("killed at", first, second)
    assert_same_run(expected, here / "cut")


def test_stopped_after_every_single_update_is_the_same_run(here, monkeypatch):
    """Weights, moments and buffers, too: the last state is looked at just before it is removed."""
    states = {}

    def keep(self):
        (directory,) = self.directory.glob("state-*")
        states[self.out.name] = load_file(next(directory.glob("*.safetensors"))), (directory / "state.json").read_text()
        shutil.rmtree(self.directory)

    settings = RUNS["factory"] | {"save_every": 1, "epochs": 2}
    monkeypatch.setattr(tables.Parts, "remove", keep)
    train(out="whole", **settings)
    original = train_run.Work._save

    def saves_and_ends(self):
        original(self)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(train_run.Work, "_save", saves_and_ends)
        for _ in range(12):
            with pytest.raises(Killed):
                train(out="cut", **settings)
    train(out="cut", **settings)
    assert_same_run(here / "whole", here / "cut")
    (whole, extra), (cut, other) = states["whole"], states["cut"]
    assert extra == other
    assert whole.keys() == cut.keys()
    assert any("momentum" in name for name in whole)
    assert any("running_mean" in name for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name


def test_what_is_newer_than_the_newest_state_is_gone_when_a_run_is_taken_up(here, monkeypatch):
    def ends(self, step):
        raise Killed

    with monkeypatch.context() as patched:
        original = Run.backward
        patched.setattr(Run, "backward", lambda self, step: ends(self, step) if step == 7 else original(self, step))
        with pytest.raises(Killed):
            train(out="run", **RUNS["factory"])  # the state is that of update 4, epoch 0 ends with update 6
    assert list(trajectory.written(here / "run" / "trajectory")) == [0]
    with monkeypatch.context() as patched:
        patched.setattr(Run, "backward", ends)
        with pytest.raises(Killed):
            train(out="run", **RUNS["factory"])
    assert not trajectory.written(here / "run" / "trajectory")


def test_the_same_command_again_leaves_everything_as_it_is(here):
    first = train(out="run", **RUNS["factory"])
    before = {name: (here / "run" / name).stat().st_mtime_ns for name in files_of(here / "run")}
    again = train(out="run", **RUNS["factory"])
    assert again.table.equals(first.table)
    assert before == {name: (here / "run" / name).stat().st_mtime_ns for name in files_of(here / "run")}


def test_force_makes_it_again_and_leaves_nothing_of_the_old_run(here):
    train(out="run", **RUNS["factory"])
    train("data.jsonl", out="run", force=True, epochs=1, batch_size=25)
    assert checkpoint.inner_steps(here / "run") == [0, 2]
    assert len(trajectory.epochs("run")) == 1


def test_other_options_or_another_model_do_not_go_on_with_a_run(here, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(train_view, "plot_history", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(out="run", **RUNS["factory"])
    with pytest.raises(InputError, match=r"was begun with other inputs .differs in options.lr"):
        train(out="run", **(RUNS["factory"] | {"lr": 0.2}))
    (here / "nets_of_test.py").write_text(FACTORY.replace("Dropout(0.3)", "Identity()").replace("6, 16", "6, 17"))
    (here / "nets_of_test.py").write_text(FACTORY.replace("16", "17"))
    sys.modules.pop("nets_of_test")
    with pytest.raises(InputError, match=r"was begun with other inputs .differs in weights"):
        train(out="run", **RUNS["factory"])


def test_a_run_repeats_from_its_seed_alone(here):
    torch.rand(3)  # what was drawn before does not matter
    one = train(**RUNS["factory"])
    torch.rand(5)
    assert rows_of(one.history) == rows_of(train(**RUNS["factory"]).history)
    assert rows_of(one.history) != rows_of(train(**(RUNS["factory"] | {"seed": 4})).history)


@pytest.mark.parametrize("name", RUNS)
def test_the_weights_that_a_run_begins_with_depend_on_the_seed(here, name):
    found = []
    for seed in (0, 0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "backward", lambda self, step: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                train(out="run", force=True, **(RUNS[name] | {"seed": seed}))
        stored = load_file("run/checkpoint-0/model.safetensors")
        found.append(stored[max(stored, key=lambda key: stored[key].numel())])
        shutil.rmtree("run")
        shutil.rmtree(".run.parts", ignore_errors=True)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# -- divergence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "good", "epochs"), [(6, 4, [0]), (13, 12, [0, 1])])
def test_a_loss_that_is_no_number_stops_and_keeps_what_is_good(here, whole, monkeypatch, step, good, epochs):
    """Epoch 0 ends with update 6, which is no save: its row is not lost, and not there twice later."""
    original = Run.backward

    def breaks(self, at):
        loss, seen = original(self, at)
        return (float("nan") if at == step else loss), seen

    with monkeypatch.context() as patched:
        patched.setattr(Run, "backward", breaks)
        told = rf"the loss of update {step + 1} is not finite; .*checkpoint-{good};"
        with pytest.raises(IncompleteError, match=told):
            train(out="run", **RUNS["factory"])
    history = tables.read("run/history.parquet")
    assert history.meta["partial"] is True
    assert history.table["epoch"].to_pylist() == epochs
    train(out="run", **RUNS["factory"])  # say, a memory error that does not come back
    assert_same_run(whole("factory"), here / "run")


def test_a_gradient_that_is_no_number_saves_the_weights_before_it(here, monkeypatch):
    original = Run.backward

    def breaks(self, step):
        loss, seen = original(self, step)
        if step == 13:
            next(self.training.model.parameters()).grad[0, 0] = float("inf")
        return loss, seen

    monkeypatch.setattr(Run, "backward", breaks)
    with pytest.raises(IncompleteError, match=r"the gradient of update 14 is not finite; .*checkpoint-13"):
        train(out="run", **RUNS["factory"])
    assert checkpoint.inner_steps(here / "run") == [0, 4, 8, 12, 13]


def test_an_absurd_learning_rate_ends_with_exit_3_and_one_line(here):
    command = [sys.executable, "-m", "memdiag", "train", "data.jsonl", "--lr", "1e30", "--out", "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert (
        "is not finite; last good checkpoint: run/checkpoint-0; history.parquet has the epochs before it" in done.stderr
    )


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, "nothing to train on; give a task or a file"),
        ({"arch": "mpl"}, "no arch 'mpl'; .*did you mean 'mlp'"),
        ({"arch": "mlp", "config": "gpt2-tiny"}, "--arch and --config each say what model it is"),
        ({"model": "nets_of_test:net", "width": 3}, "--width is for --arch; with --model the model is what that says"),
        ({"model": "nets_of_test:fails"}, "nets_of_test:fails failed: RuntimeError: no weather today"),
        ({"model": "nets_of_test:nothing"}, "nets_of_test:nothing returned a Identity; wanted"),
        ({"model": "nets_of_test:outputs_two"}, "nets_of_test:outputs_two: has 2 outputs, and there is a label 2"),
        ({"model": "nets_of_test:net", "data": "images.npz"}, "nets_of_test:net: cannot be run on these examples"),
        ({"arch": "transformer"}, "data.jsonl: holds features; --arch transformer reads tokens"),
        ({"arch": "cnn"}, r"data.jsonl: features have shape \[6\]; --arch cnn wants channels, height, width"),
        ({"config": "gpt2-tiny"}, "data.jsonl: holds features; --config is for a language model"),
        ({"data": "texts.jsonl", "arch": "mlp"}, "texts.jsonl: holds text without labels; --arch mlp needs labels"),
        ({"data": "texts.jsonl", "corruption": 0.1}, "--corruption replaces labels, and there are none"),
        ({"data": "texts.jsonl", "width": 8}, "--width, --depth and --standardize are for classifiers"),
        ({"data": "texts.jsonl", "max_length": 129}, "--max-length 129 is more than the 128 positions"),
        ({"columns": "label="}, "data.jsonl: has no column of labels to train on; name it with --columns label=NAME"),
        ({"corruption": 1.1}, "--corruption is a share of the labels, 0 to 1; got 1.1"),
        ({"corruption": float("nan")}, "--corruption is a share of the labels, 0 to 1; got nan"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"lr": 0.0}, "--lr must be a finite number above 0, got 0.0"),
        ({"lr": float("inf")}, "--lr must be a finite number above 0, got inf"),
        ({"optimizer": "adam"}, "no optimizer 'adam'; .*did you mean 'adamw'"),
        ({"schedule": "cos"}, "no schedule 'cos'; .*did you mean 'cosine'"),
        ({"dtype": "float16"}, "no dtype for training 'float16'"),
        ({"test": "data.jsonl", "test_fraction": 0.1}, "--test and --test-fraction both say what is held out"),
        ({"test_fraction": 1.0}, "--test-fraction must be more than 0 and less than 1, got 1.0"),
        ({"test_fraction": 0.001}, "--test-fraction 0.001: of 50 examples 0 would be held out"),
        ({"test": "images.npz"}, r"images.npz: features have shape \[1, 6, 6\], and data.jsonl's \[6\]"),
        ({"test": "texts.jsonl"}, "--test texts.jsonl holds text, and data.jsonl features"),
        ({"seed": -1}, "--seed must be at least 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(here, options, message):
    with pytest.raises(InputError, match=message) as refused:
        train(out="run", **({"data": "data.jsonl"} | options))
    assert "\n" not in str(refused.value)
    assert checkpoint.inner_steps(here / "run") in ([], [0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1, 2], "row 1: label is -1; wanted classes 0, 1, 2"),
        ([0, 1, 10**9], "row 2: label is 1000000000, among 3"),
    ],
)
def test_labels_that_are_no_classes_are_refused(here, labels, message):
    np.savez("odd.npz", x=np.eye(3, dtype=np.float32), y=np.array(labels))
    with pytest.raises(InputError, match=message):
        train("odd.npz", out="run")


def test_a_held_out_label_that_was_not_trained_on_is_refused(here):
    np.savez("odd.npz", x=np.ones((2, 6), dtype=np.float32), y=np.array([0, 3]))
    with pytest.raises(InputError, match=r"odd.npz: row 1: the held-out label 3 is none of those trained on, 0 to 2"):
        train("data.jsonl", test="odd.npz")


def test_one_class_cannot_be_corrupted(here):
    np.savez("one.npz", x=np.ones((4, 2), dtype=np.float32), y=np.zeros(4, dtype=np.int64))
    with pytest.raises(InputError, match="all labels are 0: --corruption has no other class to replace them by"):
        train("one.npz", corruption=0.5)


def test_many_processes_are_refused(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="memdiag train runs in one process; start it without torchrun"):
        train("data.jsonl")


def test_a_place_that_is_taken_is_left_alone(here):
    (here / "run").mkdir()
    (here / "run" / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError, match="is not empty and holds no report of train"):
            train("data.jsonl", out="run", force=force)


def test_the_plan_writes_nothing(here):
    before = files_of(here)
    plan = train_report.plan(TrainOptions(data="data.jsonl", epochs=3, corruption=0.1))
    assert (plan["examples"], plan["corrupted"], plan["updates"]) == (50, 5, 3)
    assert plan["seconds_expected"] >= 0
    assert files_of(here) == before


def test_the_options_of_a_report_make_it_again(here):
    found = train(**RUNS["factory"])
    again = train_report.measure(train_report.options_of(found.history), out=here / "again")
    assert tables.differing(found.history, again.history) == []


def test_an_option_that_does_not_exist_names_the_nearest(here):
    with pytest.raises(InputError, match=r"no option 'epcohs'.*did you mean 'epochs'"):
        train("data.jsonl", epcohs=2)


def test_the_command_prints_a_table_and_one_json_object(here):
    command = [sys.executable, "-m", "memdiag", "train", "data.jsonl", "--epochs", "2", "--corruption", "0.1"]
    command += ["--test-fraction", "0.1", "--out", "run", "--plot", "run.svg"]
    shown = subprocess.run([*command, "--show"], capture_output=True, text=True, check=True).stdout
    assert "mlp  45 examples, 4 of them with a wrong label  2 epochs" in shown
    assert "wrong label learned" in shown
    told = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert told["epochs"] == 2
    assert (here / "run.svg").exists()
