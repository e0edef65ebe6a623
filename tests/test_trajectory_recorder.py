"""memdiag.TrajectoryRecorder in a loop of one's own and in the Trainer of transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memdiag import InputError, tables, trajectory
from memdiag.dataset import open_dataset
from memdiag.train_report import train
from memdiag.training import Recipe, rows_of_update, seeded
from memdiag.trajectory_recorder import TrajectoryRecorder

N = 24


@pytest.fixture
def data(tmp_path):
    """(path, features, labels) of 24 examples with ids of their own."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(N, 5)).round(3).astype(np.float32), rng.integers(0, 3, N)
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"id": f"e{i}", "x": x[i].tolist(), "y": int(y[i])}) + "\n" for i in range(N)))
    return path, torch.from_numpy(x), torch.from_numpy(y)


def rows_of(directory):
    return [tables.read(path).table.to_pylist() for path in trajectory.epochs(directory)]


def logits_of(n, k=3, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def test_a_plain_loop_records_what_memdiag_train_records(tmp_path, data):
    path, x, y = data
    train(path, out=tmp_path / "run", epochs=2, batch_size=8, width=8, standardize=False, schedule="constant")
    from memdiag.checkpoint import open_checkpoints

    model = open_checkpoints(tmp_path / "run" / "checkpoint-0")[0].load().train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recorder = TrajectoryRecorder(tmp_path / "mine", dataset=path)
    for epoch in range(2):
        for step in range(3):
            at = rows_of_update(3 * epoch + step, N, 8, 0)
            logits = model(x[at])
            recorder.record([f"e{i}" for i in at], logits, y[at])
            F.cross_entropy(logits, y[at]).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert recorder.end_epoch().name == f"epoch=000{epoch}.parquet"
    assert Recipe(steps=6, batch_size=8, lr=0.1, schedule="constant").lr_at(5) == 0.1
    mine, theirs = rows_of(tmp_path / "mine"), rows_of(tmp_path / "run")
    for own, other in zip(mine, theirs, strict=True):
        for a, b in zip(own, other, strict=True):
            assert {k: v for k, v in a.items() if not isinstance(v, float)} == {
                k: v for k, v in b.items() if not isinstance(v, float)
            }
            for name in trajectory.VALUES:
                assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6)
    meta = tables.read_meta(trajectory.epochs(tmp_path / "mine")[0])
    assert meta["dataset"]["fingerprint"] == open_dataset(path).fingerprint()
    assert meta["n_examples"] == N


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_integer_ids_are_rows_in_any_form(tmp_path, kind):
    recorder = TrajectoryRecorder(tmp_path)
    recorder.record(kind([7, 3]), logits_of(2), torch.tensor([0, 1]))
    recorder.record(kind([2**40]), logits_of(1), torch.tensor([2]))
    recorder.end_epoch()
    ((first, second, third),) = rows_of(tmp_path)
    assert [row["row"] for row in (first, second, third)] == [3, 7, 2**40]
    assert [row["example_id"] for row in (first, second, third)] == ["3", "7", str(2**40)]
    assert [row["label"] for row in (first, second, third)] == [1, 0, 2]


def test_texts_without_a_dataset_are_numbered_in_alphabetical_order(tmp_path):
    recorder = TrajectoryRecorder(tmp_path)
    for order in (["b", "c", "a"], ["c", "a", "b"]):
        recorder.record(order, logits_of(3), torch.zeros(3, dtype=torch.long))
        recorder.end_epoch()
    for epoch in rows_of(tmp_path):
        assert [(row["row"], row["example_id"]) for row in epoch] == [(0, "a"), (1, "b"), (2, "c")]
    again = TrajectoryRecorder(tmp_path, start=2)
    again.record(["a", "c", "b"], logits_of(3), torch.zeros(3, dtype=torch.long))
    again.end_epoch()
    assert [row["example_id"] for row in rows_of(tmp_path)[2]] == ["a", "b", "c"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_dtype_are_read_in_float32(tmp_path, dtype):
    logits = logits_of(5).to(dtype).requires_grad_(True)
    recorder = TrajectoryRecorder(tmp_path)
    recorder.record(range(5), logits, torch.tensor([0, 1, 2, 0, 1]))
    recorder.end_epoch()
    expected = logits.detach().float().logsumexp(1)
    assert [row["logsumexp"] for row in rows_of(tmp_path)[0]] == pytest.approx(expected.tolist(), rel=1e-6)
    assert logits.grad is None


def test_one_transfer_to_the_host_for_a_call(tmp_path, monkeypatch):
    """Each would make the device wait; on this machine they are counted, not timed."""
    calls = []
    for name in ("cpu", "item", "tolist", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    recorder = TrajectoryRecorder(tmp_path)
    recorder.record(torch.arange(100), logits_of(100), torch.zeros(100, dtype=torch.long))
    assert calls == ["cpu", "numpy"]
    calls.clear()
    recorder = TrajectoryRecorder(tmp_path / "lm")
    recorder.record(torch.arange(4), torch.randn(4, 6, 9), torch.ones(4, 6, dtype=torch.long))
    assert calls == ["cpu", "numpy"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_logits_on_a_gpu_give_what_those_on_the_cpu_give(tmp_path):
    logits, labels = logits_of(50, 10), torch.arange(50) % 10
    for name, device in (("cpu", "cpu"), ("gpu", "cuda")):
        recorder = TrajectoryRecorder(tmp_path / name)
        recorder.record(torch.arange(50, device=device), logits.to(device), labels)
        recorder.end_epoch()
    for a, b in zip(rows_of(tmp_path / "cpu")[0], rows_of(tmp_path / "gpu")[0], strict=True):
        assert a == pytest.approx(b, rel=1e-6)


# -- language models -----------------------------------------------------------------------------------------------


def test_a_sequences_figures_are_means_over_the_tokens_that_count(tmp_path):
    logits = logits_of(2 * 5, 4).reshape(2, 5, 4).double()
    labels = torch.tensor([[0, 1, 2, 3, 0], [3, -100, 1, -100, -100]])
    poisoned = logits.clone()
    poisoned[1, 3:] = torch.nan  # where nothing counts, nothing is read
    poisoned[:, -1] = torch.nan
    recorder = TrajectoryRecorder(tmp_path)
    recorder.record([0, 1], poisoned, labels)
    recorder.end_epoch()
    for i, row in enumerate(rows_of(tmp_path)[0]):
        own, other, total, right = [], [], [], []
        for t in range(4):
            target = int(labels[i, t + 1])
            if target == -100:
                continue
            z = logits[i, t].tolist()
            rest = max(value for c, value in enumerate(z) if c != target)
            own.append(z[target])
            other.append(rest)
            total.append(float(np.log(np.exp(z).sum())))
            right.append(z[target] > rest)
        found = [row["label_logit"], row["other_logit"], row["logsumexp"]]
        assert found == pytest.approx([np.mean(own), np.mean(other), np.mean(total)], rel=1e-5)
        assert row["correct"] == all(right)
        assert row["label"] is None


# -- what is refused -----------------------------------------------------------------------------------------------


def test_an_example_that_comes_twice_is_refused(tmp_path):
    recorder = TrajectoryRecorder(tmp_path)
    recorder.record([0, 1, 0], logits_of(3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(InputError, match="epoch 0 presents example '0' twice; let each come once"):
        recorder.end_epoch()


def test_an_example_that_is_missing_in_a_later_epoch_is_refused(tmp_path):
    recorder = TrajectoryRecorder(tmp_path)
    recorder.record([0, 1, 2], logits_of(3), torch.zeros(3, dtype=torch.long))
    recorder.end_epoch()
    recorder.record([0, 2], logits_of(2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(
        InputError, match=r"epoch 1 has other examples .* not example '1' of epoch 0; .*drop_last=False"
    ):
        recorder.end_epoch()


def test_a_pass_that_was_not_ended_shows_at_once(tmp_path):
    recorder = TrajectoryRecorder(tmp_path)
    labels = torch.zeros(3, dtype=torch.long)
    recorder.record([0, 1, 2], logits_of(3), labels)
    recorder.end_epoch()
    recorder.record([2, 1, 0], logits_of(3), labels)
    with pytest.raises(InputError, match=r"epoch 1 presents more than the 3 examples of the first; call end_epoch\(\)"):
        recorder.record([2, 1, 0], logits_of(3), labels)


@pytest.mark.parametrize(
    ("ids", "logits", "labels", "message"),
    [
        ([0], logits_of(2), torch.zeros(2), r"record got 1 ids, logits \[2, 3\], labels \[2\]; wanted"),
        ([0, 1], logits_of(2), torch.tensor([0, 3]), "record got labels 0 to 3 for 3 classes"),
        ([0, 1], logits_of(2), torch.tensor([-100, 0]), "record got labels -100 to 0 for 3 classes"),
        ([0, 1], torch.tensor([[0.0, 1], [torch.nan, 0]]), torch.tensor([0, 0]), "no numbers, of example 1"),
        ([0], torch.zeros(1, 3, 4), torch.tensor([[0, -100, -100]]), "a sequence without a token to predict"),
        ([0], torch.zeros(1, 3, 4), torch.tensor([[0, 4, 0]]), "record got tokens 0 to 4 for 4 of the vocabulary"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, ids, logits, labels, message):
    with pytest.raises(InputError, match=message) as refused:
        TrajectoryRecorder(tmp_path).record(ids, logits, labels)
    assert "\n" not in str(refused.value)


def test_ids_that_are_not_the_datasets_are_refused(tmp_path, data):
    recorder = TrajectoryRecorder(tmp_path / "t", dataset=data[0])
    recorder.record(["e1", "f7"], logits_of(2), torch.tensor([0, 0]))
    with pytest.raises(InputError, match=r"example 'f7' is not among .*data.jsonl; give the ids"):
        recorder.end_epoch()
    recorder = TrajectoryRecorder(tmp_path / "t", dataset=data[0], columns={"id": ""})
    recorder.record([0, N], logits_of(2), torch.tensor([0, 0]))
    with pytest.raises(InputError, match=rf"example {N} is no row of .*data.jsonl"):
        recorder.end_epoch()


def test_a_trajectory_that_is_there_is_not_overwritten_but_gone_on_with(tmp_path, data):
    labels = torch.zeros(2, dtype=torch.long)
    recorder = TrajectoryRecorder(tmp_path / "t", dataset=data[0])
    for _ in range(3):
        recorder.record(["e1", "e0"], logits_of(2), labels)
        recorder.end_epoch()
    with pytest.raises(InputError, match="holds 3 epochs already; give another directory, or start=N"):
        TrajectoryRecorder(tmp_path / "t", dataset=data[0])
    with pytest.raises(InputError, match="start=5, but epoch 3 is not there"):
        TrajectoryRecorder(tmp_path / "t", dataset=data[0], start=5)
    with pytest.raises(InputError, match="its epochs are of another dataset"):
        TrajectoryRecorder(tmp_path / "t", start=1)
    again = TrajectoryRecorder(tmp_path / "t", dataset=data[0], start=1)
    assert len(trajectory.epochs(tmp_path / "t")) == 1
    again.record(["e0", "e1"], logits_of(2), labels)
    again.end_epoch()
    assert len(trajectory.epochs(tmp_path / "t")) == 2


def test_an_epoch_without_an_example_is_refused(tmp_path):
    with pytest.raises(InputError, match="epoch 0 ends without an example"):
        TrajectoryRecorder(tmp_path).end_epoch()


# -- the Trainer of transformers -----------------------------------------------------------------------------------


class Net(nn.Module):
    """A classifier as the Trainer wants it; one that knows nothing of example_id."""

    def __init__(self):
        super().__init__()
        with seeded(0):
            self.linear = nn.Linear(5, 3)

    def forward(self, x, labels=None):
        logits = self.linear(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trainer_of(tmp_path, model, dataset, callback, **options):
    from transformers import Trainer, TrainingArguments

    settings = {"per_device_train_batch_size": 7, "num_train_epochs": 2, "learning_rate": 0.05, "optim": "sgd"}
    settings |= {"remove_unused_columns": False, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    settings |= {"disable_tqdm": True, "lr_scheduler_type": "constant"}
    arguments = TrainingArguments(str(tmp_path / "hf"), **(settings | options))
    return Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset, callbacks=[callback])


def test_the_trainer_records_every_epoch(tmp_path, data):
    path, x, y = data
    items = [{"x": x[i].tolist(), "labels": int(y[i]), "example_id": i} for i in range(N)]
    recorder = TrajectoryRecorder(tmp_path / "t", dataset=path, columns={"id": ""})
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trainer_of(tmp_path, model, items, recorder.callback(), eval_strategy="epoch")
    trainer.train()
    first, second = rows_of(tmp_path / "t")
    assert [row["row"] for row in first] == [row["row"] for row in second] == list(range(N))
    assert [row["label"] for row in first] == y.tolist()
    # the first update's examples saw the weights that the model began with
    start = F.linear(x, before["linear.weight"], before["linear.bias"]).double()
    untouched = sum(
        abs(row["logsumexp"] - float(start[i].logsumexp(0))) < 1e-5
        and abs(row["label_logit"] - float(start[i, y[i]])) < 1e-5
        for i, row in enumerate(first)
    )
    assert 7 <= untouched < N
    assert sum(row["logsumexp"] - row["label_logit"] for row in second) < sum(
        row["logsumexp"] - row["label_logit"] for row in first
    )
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_parts_of_an_update_are_recorded_too(tmp_path, data):
    _, x, y = data
    items = [{"x": x[i].tolist(), "labels": int(y[i]), "example_id": i} for i in range(N)]
    recorder = TrajectoryRecorder(tmp_path / "t")
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 5}
    trainer_of(tmp_path, Net(), items, recorder.callback(), **options).train()
    assert [len(epoch) for epoch in rows_of(tmp_path / "t")] == [N, N]


def test_an_epoch_that_max_steps_cuts_short_is_left_out(tmp_path, data):
    _, x, y = data
    items = [{"x": x[i].tolist(), "labels": int(y[i]), "example_id": i} for i in range(N)]
    recorder = TrajectoryRecorder(tmp_path / "t")
    trainer_of(tmp_path, Net(), items, recorder.callback(), max_steps=6).train()  # 4 updates an epoch
    assert len(trajectory.epochs(tmp_path / "t")) == 1


def test_batches_without_ids_are_refused(tmp_path, data):
    _, x, y = data
    items = [{"x": x[i].tolist(), "labels": int(y[i])} for i in range(N)]
    recorder = TrajectoryRecorder(tmp_path / "t")
    with pytest.raises(InputError, match=r"no example_id reached the model.*remove_unused_columns=False"):
        trainer_of(tmp_path, Net(), items, recorder.callback()).train()


def test_a_language_model_in_the_trainer(tmp_path):
    from memdiag.checkpoint import new_model

    config = {"model_type": "gpt2", "vocab_size": 30, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = new_model("test", config | {"bos_token_id": 0, "eos_token_id": 0}, seed=0)
    tokens = [[(3 * i + t) % 30 for t in range(6)] for i in range(12)]
    # the Trainer divides by all labels, the first among them, which nothing predicts: here it does not count
    items = [{"input_ids": ids, "labels": [-100, *ids[1:]], "example_id": i} for i, ids in enumerate(tokens)]
    recorder = TrajectoryRecorder(tmp_path / "t")
    trainer = trainer_of(tmp_path, model, items, recorder.callback(), per_device_train_batch_size=12)
    history = trainer.train()
    first, second = rows_of(tmp_path / "t")
    loss = [np.mean([row["logsumexp"] - row["label_logit"] for row in epoch]) for epoch in (first, second)]
    assert np.mean(loss) == pytest.approx(history.training_loss, rel=1e-3)
    assert first[0]["label"] is None
