"""memdiag score --second-split as people run it: planted wrong labels, resume, eval mode, refusals."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from memdiag import (
    IncompleteError,
    InputError,
    agreement,
    second_split_report,
    second_split_run,
    second_split_view,
    supervised,
    tables,
    training,
)
from memdiag.forgetting import first_half, forgetting_time, within_half
from memdiag.progress import Progress
from memdiag.second_split_report import SCORES, SecondSplitOptions, second_split

FACTORY = (
    "from torch import nn\n"
    "def net():\n"
    "    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))\n"
    "def outputs_two():\n"
    "    return nn.Linear(4, 2)\n"
)


class Cut(Exception):
    """What ends a run in the middle."""


SMALL = {"epochs": 4, "second_epochs": 3, "batch_size": 8, "seeds": "0,1"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with data and a module."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(45):
        x = rng.normal(size=4).round(3)
        y = int(x[:3].argmax())
        wrong = i % 9 == 0
        rows.append({"id": f"e{i}", "x": x.tolist(), "y": (y + wrong) % 3, "wrong": wrong})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    (tmp_path / "nolabel.jsonl").write_text("".join(json.dumps({"x": row["x"]}) + "\n" for row in rows))
    texts = [{"text": f"{'good' if i % 2 else 'bad'} day number {i}", "label": i % 2} for i in range(16)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": text["text"]}) + "\n" for text in texts))
    (tmp_path / "nets_of_second_split.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("nets_of_second_split", None)


@pytest.fixture(scope="module")
def digits():
    """Two seeds on digits with a tenth of the labels wrong; one seed finds them with an AUC of 0.94 to 0.96."""
    return second_split("task:digits?corruption=0.1&split=train", truth="corrupted", seeds="0,1")


# -- what it finds -------------------------------------------------------------------------------------------------


def test_planted_wrong_labels_are_forgotten_soonest(digits):
    scores = digits.meta["summary"]["scores"]
    assert scores["second_split_rank"]["auc"]["value"] >= 0.96
    assert scores["stage2_accuracy"]["auc"]["value"] >= 0.97
    assert scores["second_split_rank"]["found_in_top"]["value"] >= 0.7
    frame = digits.to_pandas()
    assert frame[frame.truth].second_split_forgetting.median() <= 4
    assert frame[~frame.truth].n_censored.mean() / 2 >= 0.9
    assert frame[frame.truth].n_censored.mean() / 2 <= 0.25
    assert frame.learned.mean() >= 0.99


def test_examples_drawn_at_random_are_not_found(digits):
    frame, rng = digits.to_pandas(), np.random.default_rng(0)
    for _ in range(3):
        truth = rng.permutation(frame.truth.to_numpy())
        for name, end in SCORES.items():
            values = frame[name].to_numpy() * (1 if end == "high" else -1)
            assert 0.4 <= agreement.auc(values, truth).value <= 0.6


def test_neither_half_is_favoured(here):
    frame = second_split("data.jsonl", **SMALL | {"seeds": "0"}).to_pandas()
    assert frame.half.value_counts().to_dict() == {"first": 23, "second": 22}
    assert frame.groupby("half").second_split_rank.mean().tolist() == pytest.approx([0.5, 0.5])


# -- what is written -----------------------------------------------------------------------------------------------


def test_the_columns_are_what_the_parts_say(here):
    """The report from its definition: two networks a seed, trained by hand."""
    report = second_split("data.jsonl", truth="wrong", **SMALL)
    options = SecondSplitOptions(data="data.jsonl", truth="wrong", **SMALL | {"batch_size": "8"})
    inputs = second_split_run._open(options)
    times, ranks, learned, accuracy, confidence = (np.zeros((2, 45)) for _ in range(5))
    for seed in (0, 1):
        in_first = first_half(45, seed)
        for mine, direction in ((in_first, 1), (~in_first, 2)):
            one, two = second_split_run.stages_of(inputs, options, seed, direction)
            assert one.examples.rows.tolist() == mine.nonzero()[0].tolist()
            assert two.examples.rows.tolist() == (~mine).nonzero()[0].tolist()
            assert (one.epochs, two.epochs) == (4, 3)
            assert (one.recipe.lr, two.recipe.lr, two.recipe.schedule) == (0.1, 0.05, "constant")
            model = inputs.new(seed)
            features, labels = torch.tensor(one.examples.inputs), torch.tensor(one.examples.labels)

            def look(model=model, features=features, labels=labels):
                with torch.no_grad():
                    p = model(features).softmax(1)
                return (p.argmax(1) == labels).numpy(), p.gather(1, labels[:, None])[:, 0].numpy()

            run = supervised.Run(training.begin(model, one.recipe), one.recipe, one.examples, 4)
            list(training.train(run.training, one.recipe, run.backward))
            learned[seed, mine] = look()[0]
            run = supervised.Run(training.begin(model, two.recipe), two.recipe, two.examples, 3)
            seen, epoch = [], 0
            for update in training.train(run.training, two.recipe, run.backward):
                if update.step * 8 // len(two.examples) > epoch or update.step == two.recipe.steps:
                    epoch += 1
                    seen.append(look())
            assert len(seen) == 3
            correct = np.stack([right for right, _ in seen])
            times[seed, mine] = forgetting_time(correct)
            accuracy[seed, mine] = correct.mean(0)
            confidence[seed, mine] = np.mean([p for _, p in seen], axis=0)
        ranks[seed] = within_half(times[seed], times[seed] == 4, in_first)
    frame = report.to_pandas()
    assert 0 < (times == 4).mean() < 1
    assert frame.second_split_forgetting.to_numpy() == pytest.approx(times.mean(0))
    assert frame.n_censored.tolist() == (times == 4).sum(0).tolist()
    assert frame.second_split_rank.to_numpy() == pytest.approx(ranks.mean(0))
    assert frame.learned.to_numpy() == pytest.approx(learned.mean(0))
    assert frame.stage2_accuracy.to_numpy() == pytest.approx(accuracy.mean(0))
    assert frame.stage2_confidence.to_numpy() == pytest.approx(confidence.mean(0), abs=1e-6)
    assert (frame.half == "first").tolist() == first_half(45, 0).tolist()
    assert set(frame.n_seeds) == {2}
    assert frame.example_id.tolist() == [f"e{i}" for i in range(45)]
    assert frame.truth.tolist() == [i % 9 == 0 for i in range(45)]


def test_what_was_never_learned_is_marked(here):
    # too small a step to learn anything
    report = second_split("data.jsonl", lr=1e-6, second_lr=1e-6, **SMALL)
    frame = report.to_pandas()
    assert frame.learned.mean() < 0.8
    never = frame[frame.learned == 0]
    assert (never.second_split_forgetting == 1).all()
    assert (never.n_censored == 0).all()


def test_what_was_not_learned_is_said(here, caplog):
    second_split("data.jsonl", lr=1e-6, **SMALL)
    assert "of its half after stage 1" in caplog.text


def test_without_a_truth_there_is_no_such_column(here):
    report = second_split("data.jsonl", **SMALL)
    assert report.table.column_names == [
        "example_id", "row", "label", "half", "learned", "second_split_forgetting", "n_censored", "n_seeds",
        "second_split_rank", "stage2_accuracy", "stage2_confidence",
    ]  # fmt: skip
    assert "auc" not in report.meta["summary"]["scores"]["second_split_rank"]


def test_texts_are_classified_too(here):
    report = second_split("texts.jsonl", **SMALL)
    assert report.table.num_rows == 16
    assert report.meta["summary"]["scores"]["second_split_rank"]["top"][0]["text"]


def test_two_examples_are_enough_and_one_is_not(here):
    frame = second_split("two.jsonl", **SMALL).to_pandas()
    assert frame.second_split_rank.tolist() == [0.5, 0.5]
    with pytest.raises(InputError, match="two halves need at least 2"):
        second_split("one.jsonl", **SMALL)


# -- eval mode -----------------------------------------------------------------------------------------------------


def test_batch_norm_is_looked_at_in_eval_mode(here, monkeypatch):
    """Scores do not depend on which examples are looked at together, and looking does not change the network."""
    how = SMALL | {"model": "nets_of_second_split:net"}
    whole = second_split("data.jsonl", **how)
    looked = []
    values = second_split_run.LookedAt.values

    def noting(self, examples):
        before = {name: tensor.clone() for name, tensor in self.training.model.state_dict().items()}
        found = values(self, examples)
        assert all(torch.equal(tensor, before[name]) for name, tensor in self.training.model.state_dict().items())
        assert self.training.model.training
        looked.append(len(examples))
        return found

    monkeypatch.setattr(second_split_run.LookedAt, "values", noting)
    monkeypatch.setattr(supervised, "EVALUATED", 1)  # a batch of one has no variance of its own
    one_by_one = second_split("data.jsonl", **how)
    assert len(looked) == 2 * 2 * (1 + 3 + 1)
    for name in whole.table.column_names:
        if name == "stage2_confidence":
            a, b = whole.table[name].to_numpy(), one_by_one.table[name].to_numpy()
            assert a == pytest.approx(b, abs=1e-6)
        else:
            assert whole.table[name].equals(one_by_one.table[name]), name


def test_no_example_is_learned_in_the_stage_that_measures_it(here):
    """Each stage has one half, and the directions change them over."""
    options = SecondSplitOptions(data="data.jsonl", **SMALL | {"batch_size": "8"})
    inputs = second_split_run._open(options)
    one, two = second_split_run.stages_of(inputs, options, 0, 1)
    assert not set(one.examples.rows) & set(two.examples.rows)
    assert sorted([*one.examples.rows, *two.examples.rows]) == list(range(45))
    back = second_split_run.stages_of(inputs, options, 0, 2)
    assert [s.examples.rows.tolist() for s in back] == [two.examples.rows.tolist(), one.examples.rows.tolist()]


# -- resume --------------------------------------------------------------------------------------------------------


def test_a_run_that_was_cut_off_gives_the_same_bytes(here, monkeypatch):
    how = SMALL | {"model": "nets_of_second_split:net", "truth": "wrong"}
    second_split("data.jsonl", out="whole.parquet", **how)
    done = []
    two_stages = second_split_run.two_stages

    def cut(*args):
        if len(done) == 2:
            raise Cut
        done.append(1)
        return two_stages(*args)

    monkeypatch.setattr(second_split_run, "two_stages", cut)
    with pytest.raises(Cut):
        second_split("data.jsonl", out="cut.parquet", **how)
    assert not (here / "cut.parquet").exists()
    parts = sorted(path.name for path in (here / ".cut.parquet.parts").glob("*.parquet"))
    assert parts == ["seed-0-direction-1.parquet", "seed-0-direction-2.parquet"]
    with pytest.raises(InputError, match=r"begun with other inputs \(differs in options.second_epochs\)"):
        second_split("data.jsonl", out="cut.parquet", **how | {"second_epochs": 2})
    done[:] = []
    second_split("data.jsonl", out="cut.parquet", **how)
    assert len(done) == 2
    assert (here / "cut.parquet").read_bytes() == (here / "whole.parquet").read_bytes()
    assert not (here / ".cut.parquet.parts").exists()


def test_a_finished_report_is_not_made_again_or_overwritten(here, monkeypatch):
    second_split("data.jsonl", out="a.parquet", **SMALL)
    monkeypatch.setattr(second_split_run, "two_stages", lambda *args: pytest.fail("it trains again"))
    second_split("data.jsonl", out="a.parquet", **SMALL | {"seeds": [0, 1]})
    with pytest.raises(InputError, match="already holds another report"):
        second_split("data.jsonl", out="a.parquet", **SMALL | {"second_lr": 0.01})


def test_a_seed_gives_the_same_whichever_seeds_are_beside_it(here):
    alone = {seed: second_split("data.jsonl", **SMALL | {"seeds": seed}).to_pandas() for seed in ("0", "1")}
    both = second_split("data.jsonl", **SMALL).to_pandas()
    for name in SCORES:
        assert both[name].to_numpy() == pytest.approx((alone["0"][name] + alone["1"][name]).to_numpy() / 2)
    assert (alone["0"].half != alone["1"].half).any()


# -- refusals, options, view ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": "nolabel.jsonl"}, "has no column of labels"),
        ({"data": "plain.jsonl"}, "has no column of labels, and --second-split is for classifiers"),
        ({"truth": "wrogn"}, "wrogn"),
        ({"seeds": "0,0"}, "wanted different whole numbers"),
        ({"seeds": "a"}, "wanted different whole numbers"),
        ({"second_epochs": 0}, "--second-epochs must be at least 1"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"second_lr": 0.0}, "--second-lr must be a finite number above 0"),
        ({"lr": float("inf")}, "--lr must be a finite number above 0"),
        ({"batch_size": "none"}, "--batch-size must be auto"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"arch": "rnn"}, "rnn"),
        ({"arch": "mlp", "model": "nets_of_second_split:net"}, "each say what model it is"),
        ({"model": "nets_of_second_split:outputs_two"}, "has 2 outputs, and there is a label 2"),
        ({"second_epoch": 3}, "second_epochs"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(here, options, said):
    with pytest.raises(InputError, match=said) as error:
        second_split(**{"data": "data.jsonl"} | SMALL | options)
    assert "\n" not in str(error.value)


def test_no_data_is_said():
    with pytest.raises(InputError, match="say with --data on what"):
        second_split_report.measure(SecondSplitOptions(), out=None)


def test_training_that_diverges_names_the_network(here):
    with pytest.raises(IncompleteError, match=r"seed 0, direction 1: the .* is not finite; try a smaller --lr"):
        second_split("data.jsonl", arch="mlp", lr=1e30, **SMALL)


def test_the_options_come_back_from_the_report(here):
    report = second_split("data.jsonl", truth="wrong", columns={"label": "y"}, **SMALL)
    expected = SecondSplitOptions(
        data="data.jsonl", truth="wrong", columns="label=y", **SMALL | {"batch_size": "8"}
    )  # fmt: skip
    assert second_split_report.options_of(report) == expected
    with pytest.raises(InputError, match="with other options"):
        second_split_report.options_of(tables.Report(report.table, {"options": {"halves": 3}}))


def test_a_plan_writes_nothing(here):
    before = sorted(here.iterdir())
    found = second_split_report.plan(SecondSplitOptions(data="data.jsonl", seeds="0,1,2"))
    assert found["networks"] == 6
    assert found["examples"] == 45
    assert [path for path in sorted(here.iterdir()) if path.name != "__pycache__"] == before


def test_the_view_shows_scores_and_networks(here, capsys):
    report = second_split("data.jsonl", truth="wrong", out="a.parquet", **SMALL)
    second_split_view.print_table(report)
    shown = capsys.readouterr().out
    for part in (*SCORES, "AUC", "4 networks", "still right after stage 2", "a.parquet"):
        assert part in shown
    found = json.loads(json.dumps(second_split_view.summary(report)))
    assert set(found["scores"]) == set(SCORES)
    assert len(found["networks"]) == 4
    second_split_view.plot(report, here / "a.png")
    assert (here / "a.png").stat().st_size > 1000


def test_progress_counts_every_update(here):
    class Counting(Progress):
        total = done = 0

        def start(self, what, total, *, unit="examples"):
            self.total += total

        def advance(self, n, note=""):
            self.done += n

    progress = Counting()
    second_split("data.jsonl", progress=progress, **SMALL)
    assert progress.done == progress.total > 0
