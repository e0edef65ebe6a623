"""memdiag counterfactual as people run it: reports against plain loops, topping up, merging, kill -9, refusals."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_fuzz_cli import run as run  # a fixture

import memdiag
from memdiag import (
    IncompleteError,
    InputError,
    counterfactual_report,
    counterfactual_run,
    counterfactual_shards,
    counterfactual_turnover,
    counterfactual_view,
    size_trajectories,
    tables,
    training,
    turnover_dropout,
)
from memdiag.counterfactual_report import CounterfactualOptions, counterfactual, merge_counterfactual
from memdiag.subsets import Design

REPORTS = ("counterfactual.parquet", "influence.parquet", "models.parquet")
GPT = {
    "model_type": "gpt2", "vocab_size": 30, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SMALL = {"epochs": 3, "width": 16, "batch_size": 8, "chunk": 5, "test": "test.jsonl", "models": 10}


def fill(folder):
    """Forty examples of three classes, some copied, some owned by the same person; and what is held out."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        x = rng.normal(size=6).round(3).tolist()
        wrong = i % 8 == 0
        rows.append(
            {"id": f"e{i}", "x": x, "y": (int(np.argmax(x[:3])) + wrong) % 3, "who": f"w{i // 4}", "wrong": wrong}
        )
    for i in (5, 6, 7):  # copies of the first
        rows[i] |= {name: rows[4][name] for name in ("x", "y")}
    rows[9] |= {"x": rows[4]["x"], "y": (rows[4]["y"] + 1) % 3}  # no copy: it has another label
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [
        {"id": f"t{i}", "x": (x := rng.normal(size=6).round(3).tolist()), "y": int(np.argmax(x[:3]))} for i in range(9)
    ]
    held[0] |= {name: rows[8][name] for name in ("x", "y")}  # which only those know that have seen it
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    (folder / "less.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:38]))
    (folder / "same.jsonl").write_text("".join(json.dumps({"x": [1.0, 2.0], "y": 1}) + "\n" for _ in range(3)))
    tokens = [{"id": f"s{i}", "input_ids": rng.integers(1, 30, size=8 if i % 3 else 5).tolist()} for i in range(16)]
    tokens[3] |= {"input_ids": tokens[2]["input_ids"]}
    (folder / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tokens))
    more = [{"id": "u0", "input_ids": tokens[0]["input_ids"]}, {"id": "u1", "input_ids": [4, 5, 6]}]
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    labelled = [{**row, "label": i % 2} for i, row in enumerate(tokens)]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    (folder / "gpt.json").write_text(json.dumps(GPT))
    np.savez(folder / "images.npz", x=rng.normal(size=(12, 1, 4, 4)).astype(np.float32), y=np.arange(12) % 3)


@pytest.fixture
def fast(monkeypatch):
    """Models are trained in this process and nothing is drawn; other tests see to both."""
    monkeypatch.setattr(counterfactual_run, "_takes_all", lambda job: True)
    for name in ("plot_report", "plot_sizes", "plot_turn_over"):
        monkeypatch.setattr(counterfactual_view, name, lambda found, path: path.write_bytes(b"drawn"))


@pytest.fixture
def here(tmp_path, monkeypatch, fast):
    """A working directory with data."""
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """The directory of a run of ten models; not to be changed."""
    folder = tmp_path_factory.mktemp("ten")
    fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counterfactual_run, "_takes_all", lambda job: True)
        patch.setattr(counterfactual_view, "plot_report", lambda found, path: path.write_bytes(b"drawn"))
        patch.chdir(folder)
        counterfactual("data.jsonl", out="run", truth="wrong", **SMALL)
    return folder / "run"


@pytest.fixture
def mine(here, ten):
    """A copy of it in the working directory."""
    shutil.copytree(ten, here / "run")
    return here / "run"


def again(**options):
    return counterfactual("data.jsonl", **{"out": "run", "truth": "wrong"} | SMALL | options)


def shards_of(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").glob("*.parquet"))}


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_same_run(a, b):
    """Shards bit for bit, reports but for what a clock says, and no other files."""
    assert shards_of(a) == shards_of(b)
    for name in REPORTS:
        assert tables.differing(tables.read(a / name), tables.read(b / name)) == [], name
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (a, b))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert files_of(a) == files_of(b)


def read_by_hand(folder):
    """[(included, accuracy, soft)] of every model, plain lists, NaN for null."""
    found = []
    for path in sorted((folder / "shards").glob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        own = [row for row in rows if not row["held_out"]]
        found.append(
            ([row["included"] for row in own], [row["accuracy"] for row in rows], [row["soft"] for row in rows])
        )
    return found


def wilson(p, n, z=1.959963984540054):
    middle, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def mean(values):
    return sum(values) / len(values)


def assert_close(found, wanted):
    assert (found is None) == (wanted is None), (found, wanted)
    if wanted is not None:
        assert found == pytest.approx(wanted, abs=1e-6)


# -- what the reports say ------------------------------------------------------------------------------------------


def test_memorization_is_what_a_plain_loop_over_the_shards_says(ten):
    models = read_by_hand(ten)
    rows = tables.read(ten / "counterfactual.parquet").table.to_pylist()
    assert (len(models), len(rows)) == (10, 40)
    for i, row in enumerate(rows):
        seen = [acc[i] for coins, acc, _ in models if coins[i]]
        unseen = [acc[i] for coins, acc, _ in models if not coins[i]]
        assert (row["n_in"], row["n_out"]) == (len(seen), len(unseen)) == (7, 3)
        p_in, p_out = mean(seen), mean(unseen)
        assert (row["p_in"], row["p_out"]) == pytest.approx((p_in, p_out), abs=1e-12)
        assert row["memorization"] == pytest.approx(p_in - p_out, abs=1e-12)
        assert row["simplicity"] == pytest.approx(p_in + p_out, abs=1e-12)
        assert row["se"] == pytest.approx(math.sqrt(p_in * (1 - p_in) / 7 + p_out * (1 - p_out) / 3), abs=1e-12)
        (l_in, u_in), (l_out, u_out) = wilson(p_in, 7), wilson(p_out, 3)
        assert row["lo"] == pytest.approx(p_in - p_out - math.hypot(p_in - l_in, u_out - p_out), abs=1e-9)
        assert row["hi"] == pytest.approx(p_in - p_out + math.hypot(u_in - p_in, p_out - l_out), abs=1e-9)
        soft_in = mean([soft[i] for coins, _, soft in models if coins[i]])
        soft_out = mean([soft[i] for coins, _, soft in models if not coins[i]])
        assert (row["soft_in"], row["soft_out"]) == pytest.approx((soft_in, soft_out), abs=1e-6)
        assert row["memorization_soft"] == pytest.approx(soft_in - soft_out, abs=1e-6)
        assert row["lo_soft"] <= row["memorization_soft"] <= row["hi_soft"]
    about = json.loads((ten / "summary.json").read_text())
    assert about["memorization"]["value"] == pytest.approx(mean([row["memorization"] for row in rows]))
    assert about["memorized"] == sum(row["memorization"] >= 0.25 for row in rows)
    assert sum(about["histogram"]) == 40
    assert len({row["memorization"] for row in rows}) > 3  # or the loop would not see much


def test_influence_rows_are_what_a_plain_double_loop_says(mine):
    """All pairs, their ranks, and which of them are told."""
    models = read_by_hand(mine)
    examples = [row for row in tables.read(mine / "examples.parquet").table.to_pylist() if not row["held_out"]]
    first = {}
    for i, row in enumerate(examples):
        first.setdefault(row["group"], i)
    for min_influence, top in ((0.15, 3), (0.5, 1), (0.0, 0)):
        expected = []
        for t in range(9):
            all_of_it = []
            for group, i in first.items():
                seen = [acc[40 + t] for coins, acc, _ in models if coins[i]]
                unseen = [acc[40 + t] for coins, acc, _ in models if not coins[i]]
                variance = 0.0
                for arm in (seen, unseen):
                    a, q = (sum(arm) + 1) / (len(arm) + 2), (sum(c * c for c in arm) + 1) / (len(arm) + 2)
                    variance += (q - a * a) / len(arm)
                all_of_it.append((mean(seen) - mean(unseen), math.sqrt(variance), group))
            all_of_it.sort(key=lambda pair: (-round(abs(pair[0]), 6), pair[2]))
            for rank, (value, se, group) in enumerate(all_of_it, 1):
                significant = abs(value) >= min_influence - 1e-9 and abs(value) >= 3 * se
                if abs(value) > 1e-12 and (significant or rank <= top):
                    ids = examples[first[group]]
                    expected.append((ids["example_id"], ids["group_id"], f"t{t}", value, se, significant, rank, 7, 3))
        found = again(min_influence=min_influence, top=top)
        rows = [tuple(row.values()) for row in found.influence.table.to_pylist()]
        assert [row[:3] + row[5:] for row in rows] == [row[:3] + row[5:] for row in expected]
        for row, wanted in zip(rows, expected):
            assert row[3:5] == pytest.approx(wanted[3:5], abs=1e-12)
        about = found.summary["influence"]
        assert (about["pairs"], about["listed"]) == (37 * 9, len(rows))
        assert about["significant"] == sum(row[5] for row in rows)
        if top == 3:
            assert len(rows) > 9


def test_models_are_what_their_shards_say(ten):
    rows = tables.read(ten / "models.parquet").table.to_pylist()
    assert [row["model"] for row in rows] == list(range(10))
    assert len({row["seed"] for row in rows}) == len({row["weights"] for row in rows}) == 10
    for row, (coins, accuracy, _) in zip(rows, read_by_hand(ten)):
        meta = tables.read_meta(ten / "shards" / f"model-{row['model']:05d}.parquet")
        assert {name: meta[name] for name in ("seed", "subset", "weights")} == {
            name: row[name] for name in ("seed", "subset", "weights")
        }
        assert row["examples"] == sum(coins)
        assert row["accuracy_in"] == pytest.approx(mean([a for a, c in zip(accuracy, coins) if c]))
        assert row["accuracy_out"] == pytest.approx(mean([a for a, c in zip(accuracy, coins) if not c]))
        assert row["test_accuracy"] == pytest.approx(mean(accuracy[40:]))
        assert row["seconds"] > 0
        assert row["engine"] == "inline"


def test_the_coins_in_the_shards_are_those_of_the_design(ten):
    groups = tables.read(ten / "examples.parquet").table["group"].to_pylist()[:40]
    for k, (coins, _, _) in enumerate(read_by_hand(ten)):
        assert coins == Design(0.7).coins(k, 37)[groups].tolist()


def test_a_model_is_trained_on_its_subset_alone(here):
    """The whole of model 3 again with plain PyTorch: its examples, its order, its batches."""
    counterfactual("data.jsonl", out="run", **SMALL | {"models": 4, "epochs": 5, "lr": 0.05})
    job = counterfactual_run.opened(CounterfactualOptions(data="data.jsonl", **SMALL | {"epochs": 5, "lr": 0.05}))
    member = job.member(3)
    rows = [json.loads(line) for line in (here / "data.jsonl").read_text().splitlines()]
    x, y = torch.tensor([row["x"] for row in rows]), torch.tensor([row["y"] for row in rows])
    model = job.inputs.new(member.seed).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = np.concatenate([np.random.default_rng([member.seed, epoch]).permutation(40) for epoch in range(9)])
    order = order[member.included[order]]
    assert job.recipe.steps == math.ceil(5 * 28 / 8)
    for step in range(job.recipe.steps):
        at = order[8 * step : 8 * step + 8]
        optimizer.param_groups[0]["lr"] = training.Recipe(job.recipe.steps, 8, lr=0.05).lr_at(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[at]), y[at]).backward()
        optimizer.step()
    chosen = torch.softmax(model.eval()(x), 1)
    shard = counterfactual_shards.read_shard(here / "run" / "shards", 3)
    assert shard.soft[:40] == pytest.approx(chosen[torch.arange(40), y].detach().numpy(), abs=1e-4)
    assert shard.accuracy[:40].tolist() == (chosen.argmax(1) == y).float().tolist()


def test_wrong_labels_are_memorized_and_others_are_not(here):
    """Two clouds far apart with some labels wrong: a model that saw one of these gets it right, no other does."""
    rng = np.random.default_rng(3)
    y = np.arange(40) % 2
    x = rng.normal(size=(40, 8)) + 6 * y[:, None] * np.eye(8)[0]
    wrong = np.isin(np.arange(40), rng.permutation(40)[:6])
    rows = [{"id": f"e{i}", "x": x[i].tolist(), "y": int(y[i] ^ wrong[i]), "wrong": bool(wrong[i])} for i in range(40)]
    (here / "clouds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = counterfactual("clouds.jsonl", truth="wrong", models=20, width=64, epochs=80, batch_size=8, chunk=20)
    about = found.summary
    assert about["truth"]["n_true"] == 6
    assert about["truth"]["auc"]["value"] > 0.95
    frame = found.to_pandas()
    assert frame[frame.truth].memorization.mean() > 0.7
    assert abs(frame[~frame.truth].memorization.mean()) < 0.25
    assert about["accuracy_in"]["value"] > 0.97


def test_what_no_model_was_trained_without_has_no_value(here):
    found = again(models=1)
    table = found.table
    for name in (
        "memorization", "se", "lo", "hi", "simplicity", "memorization_soft", "se_soft", "lo_soft", "hi_soft",
        "memorization_copies",
    ):  # fmt: skip
        assert table[name].null_count == 40, name
    assert {(row["n_in"], row["n_out"]) for row in table.to_pylist()} == {(0, 1), (1, 0)}
    for row in table.to_pylist():
        assert (row["p_in"] is None) == (row["n_in"] == 0)
        assert (row["p_out"] is None) == (row["n_out"] == 0)
    about = found.summary
    assert about["without_value"] == 40
    assert about["memorization"]["value"] is None
    assert (about["median_width"], about["models_for_width"], about["stability"], about["top"]) == (
        None,
        None,
        None,
        [],
    )
    assert sum(about["histogram"]) == 0
    assert "40 examples have no value" in " ".join(about["warnings"])
    assert found.influence.table.num_rows == 0
    assert (about["influence"]["listed"], about["influence"]["significant"]) == (0, 0)
    assert about["truth"]["auc"]["value"] is None
    assert json.loads(json.dumps(about, allow_nan=False)) == about


def test_independent_coins_leave_some_examples_without_a_value(here):
    found = again(design="bernoulli", models=3, subset_ratio=0.6)
    rows = found.table.to_pylist()
    nothing = [row for row in rows if 0 in (row["n_in"], row["n_out"])]
    assert 0 < len(nothing) < 40
    assert found.summary["without_value"] == len(nothing)
    for row in rows:
        known = row not in nothing
        assert all((row[name] is not None) == known for name in ("memorization", "lo", "hi", "memorization_soft"))
    assert {row["example_id"] for row in found.influence.table.to_pylist()} <= {
        row["example_id"] for row in rows if row not in nothing
    }


# -- whose coin ----------------------------------------------------------------------------------------------------


def test_exact_copies_share_a_coin(ten):
    rows = tables.read(ten / "counterfactual.parquet").table.to_pylist()
    assert [row["copies"] for row in rows] == [4 if 4 <= i <= 7 else 1 for i in range(40)]
    assert [row["group_id"] for row in rows] == ["e4" if 4 <= i <= 7 else f"e{i}" for i in range(40)]
    for coins, _, _ in read_by_hand(ten):
        assert len(set(coins[4:8])) == 1
    assert any(coins[4] != coins[9] for coins, _, _ in read_by_hand(ten))
    for row in rows:
        assert row["memorization_copies"] == row["memorization"]
        assert row["n_without_copies"] == row["n_out"]


def test_copies_with_a_coin_each_are_told_of_together_as_well(here):
    found = again(columns={"group": "id"})
    assert found.table["group_id"].to_pylist() == [f"e{i}" for i in range(40)]
    assert found.table["copies"].to_pylist()[4:8] == [4] * 4
    models = read_by_hand(here / "run")
    assert any(len(set(coins[4:8])) == 2 for coins, _, _ in models)
    some = [acc[4] for coins, acc, _ in models if any(coins[4:8])]
    none = [acc[4] for coins, acc, _ in models if not any(coins[4:8])]
    for row in found.table.to_pylist()[4:8]:
        assert row["n_without_copies"] == len(none)
        assert_close(row["memorization_copies"], mean(some) - mean(none) if none else None)


def test_a_column_says_who_belongs_together(here):
    found = again(group_by="who", columns={"label": "y"})
    assert found.table["group_id"].to_pylist() == [f"w{i // 4}" for i in range(40)]
    assert found.summary["groups"] == 10
    for coins, _, _ in read_by_hand(here / "run"):
        assert all(len(set(coins[4 * g : 4 * g + 4])) == 1 for g in range(10))
        assert sum(coins) % 4 == 0
    assert {row["group_id"] for row in found.influence.table.to_pylist()} <= {f"w{g}" for g in range(10)}
    assert {row["example_id"] for row in found.influence.table.to_pylist()} <= {f"e{4 * g}" for g in range(10)}


def test_copies_in_two_groups_are_known_from_each_other(here):
    """memorization_copies follows the content, whatever the groups are."""
    rows = [json.loads(line) for line in (here / "data.jsonl").read_text().splitlines()]
    rows[20] |= {name: rows[4][name] for name in ("x", "y")}
    (here / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = again(group_by="who")
    models = read_by_hand(here / "run")
    none = [acc[20] for coins, acc, _ in models if not (coins[4] or coins[20])]
    row = found.table.to_pylist()[20]
    assert row["copies"] == 5
    assert row["n_without_copies"] == len(none) < row["n_out"]


# -- language models and tokens ------------------------------------------------------------------------------------


def test_a_language_model_is_measured_by_its_tokens(here):
    options = {"config": "gpt.json", "epochs": 8, "batch_size": 8, "models": 4, "subset_ratio": 0.5, "chunk": 4}
    found = counterfactual("tokens.jsonl", out="run", test="more.jsonl", **options)
    assert found.summary["language"]
    models = read_by_hand(here / "run")
    job = counterfactual_run.opened(CounterfactualOptions(data="tokens.jsonl", test="more.jsonl", **options))
    (model,) = [
        model.eval()
        for model in counterfactual_run.ensemble.train(
            [job.member(2)], job.inputs.new, job.data, job.recipe, way=job.way
        )
    ]
    lines = [line for name in ("tokens", "more") for line in (here / f"{name}.jsonl").read_text().splitlines()]
    texts = [json.loads(line)["input_ids"] for line in lines]
    for i, text in enumerate(texts):  # by hand, one text at a time, without padding
        ids = torch.tensor([text])
        with torch.no_grad():
            logp = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=1)
        own = logp.gather(1, ids[0, 1:, None])[:, 0]
        assert models[2][2][i] == pytest.approx(float(own.mean()), abs=1e-4)
        assert models[2][1][i] == pytest.approx(float((logp.argmax(1) == ids[0, 1:]).double().mean()), abs=1e-6)
    for i, row in enumerate(found.table.to_pylist()):
        assert row["label"] is None
        for name, which in (("memorization", 1), ("memorization_soft", 2)):
            seen = [model[which][i] for model in models if model[0][i]]
            unseen = [model[which][i] for model in models if not model[0][i]]
            assert row[name] == pytest.approx(mean(seen) - mean(unseen), abs=1e-6)
        assert row["soft_in"] < 0
    assert found.table["copies"].to_pylist()[2:4] == [2, 2]
    assert set(found.influence.table["test_id"].to_pylist()) <= {"u0", "u1"}


def test_a_transformer_on_tokens_with_labels(here):
    found = counterfactual("labelled.jsonl", test_fraction=0.25, epochs=2, width=16, depth=1, models=4, chunk=4)
    assert found.meta["config"]["model_type"] == "memdiag-transformer"
    assert (found.table.num_rows, found.summary["held_out"]) == (12, 4)
    for row in found.table.to_pylist():
        assert row["n_in"] + row["n_out"] == 4
        assert row["n_in"] == 0 or row["p_in"] * row["n_in"] in (0.0, 1.0, 2.0, 3.0, 4.0)


def test_a_cnn_on_images(here):
    found = counterfactual("images.npz", arch="cnn", width=2, depth=1, epochs=1, models=2, subset_ratio=0.5, chunk=2)
    assert found.table.num_rows == 12
    assert found.influence is None
    assert found.summary["test_accuracy"] is None
    assert found.models.table["test_accuracy"].to_pylist() == [None, None]
    assert found.table["memorization"].null_count == 0


def test_a_task_says_which_labels_are_wrong(here):
    options = {"limit": 120, "epochs": 3, "width": 16, "models": 4, "test_fraction": 0.2, "chunk": 4}
    found = counterfactual("task:digits?split=train&corruption=0.1", **options)
    assert found.table.num_rows == 96
    assert 2 <= found.summary["truth"]["n_true"] <= 20
    assert sum(found.table["truth"].to_pylist()) == found.summary["truth"]["n_true"]


# -- more models, and the same again -------------------------------------------------------------------------------


def test_more_models_are_added_to_those_that_are_there(here, ten):
    again(models=4)
    before = shards_of(here / "run")
    assert len(before) == 4
    again(models=10)
    assert_same_run(here / "run", ten)
    assert {name: shards_of(ten)[name] for name in before} == before


def test_fewer_again_are_a_report_of_fewer_and_no_shard_is_lost(mine):
    times = {path: path.stat().st_mtime_ns for path in mine.glob("shards/*")}
    found = again(models=4)
    assert found.summary["models"] == 4
    assert set(found.table["n_in"].to_pylist()) <= set(range(5))
    assert found.models.table.num_rows == 4
    assert {path: path.stat().st_mtime_ns for path in mine.glob("shards/*")} == times
    alone = again(models=4, out="alone")
    for name in ("report", "influence"):
        assert tables.differing(getattr(found, name), getattr(alone, name)) == []


def test_the_same_command_again_touches_nothing(mine, caplog):
    times = {path: path.stat().st_mtime_ns for path in mine.rglob("*")}
    with caplog.at_level("INFO", logger="memdiag"):
        found = again()
    assert {path: path.stat().st_mtime_ns for path in mine.rglob("*")} == times
    assert "already there" in caplog.text
    assert found.table.num_rows == 40
    assert (found.influence.meta["report"], found.models.table.num_rows) == ("counterfactual.influence", 10)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"epochs": 4}, "options.epochs"),
        ({"seed": 1}, "options.seed"),
        ({"subset_ratio": 0.5}, "options.subset_ratio"),
        ({"design": "bernoulli"}, "options.design"),
        ({"truth": None}, "options.truth"),
        ({"corruption": 0.1, "truth": None}, "options.corruption"),
        ({"width": 8}, "options.width"),
        ({"group_by": "who"}, "options.group_by"),
        ({"test": None, "test_fraction": 0.2}, "options.test_fraction"),
        ({"test": None}, "test"),
        ({"data": "less.jsonl"}, "dataset"),
    ],
)
def test_another_option_is_another_run(mine, options, named):
    with pytest.raises(InputError, match=f"differs in [^;]*{named}") as error:
        counterfactual(**{"data": "data.jsonl", "out": "run", "truth": "wrong"} | SMALL | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"min_influence": 0.5}, {"top": 1}, {"models": 9, "first_model": 1}])
def test_what_changes_a_report_alone_trains_nothing(mine, options, monkeypatch):
    monkeypatch.setattr(counterfactual_run, "train_chunk", None)
    assert again(**options).meta["analysis"] | options == again(**options).meta["analysis"]


@pytest.mark.parametrize("options", [{"chunk": 1}, {"chunk": 3}, {"chunk": None}])
def test_how_many_are_trained_at_once_does_not_matter(here, ten, options):
    again(**options)
    assert_same_run(here / "run", ten)


def test_force_makes_it_again(mine):
    (mine / "shards" / "model-00099.parquet").write_bytes(b"old")
    found = again(epochs=4, models=4, force=True)
    assert found.meta["settled"]["epochs"] == 4
    assert sorted(shards_of(mine)) == [f"model-0000{k}.parquet" for k in range(4)]


def test_no_report_is_written_over_what_is_not_ours(here):
    (here / "file").write_text("mine")
    with pytest.raises(InputError, match="file is a file; give a directory to --out"):
        again(out="file")
    (here / "foreign").mkdir()
    (here / "foreign" / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match="foreign is not empty and holds no report of counterfactual"):
        again(out="foreign")
    assert files_of(here / "foreign") == ["diary.txt"]
    assert (here / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["models.parquet", "influence.parquet", "summary.json"])
@pytest.mark.parametrize("content", [None, b"", b"[1]"])
def test_a_lost_report_is_written_again_from_the_shards(mine, ten, monkeypatch, name, content):
    monkeypatch.setattr(counterfactual_run, "train_chunk", None)
    (mine / name).unlink() if content is None else (mine / name).write_bytes(content)
    again()
    assert_same_run(mine, ten)


# -- until the intervals are narrow --------------------------------------------------------------------------------


def test_models_are_added_in_whole_blocks_until_intervals_are_narrow(here, ten):
    width = json.loads((ten / "summary.json").read_text())["median_width"]
    found = again(until_width=0.9 * width, models=4)
    n = found.summary["models"]
    assert n % 10 == 0
    assert n > 10
    assert found.summary["median_width"] <= 0.9 * width == found.summary["width_wanted"]
    plain = again(models=n, out="plain")
    assert shards_of(here / "run") == shards_of(here / "plain")
    for name in ("report", "influence", "models"):
        assert tables.differing(getattr(found, name), getattr(plain, name)) == []
    fewer = again(models=n - 10, out="plain")
    assert fewer.summary["median_width"] > 0.9 * width  # or it would have stopped before


def test_models_are_not_added_beyond_the_most(here):
    found = again(until_width=0.01, models=4, max_models=13)
    assert found.summary["models"] == 13
    assert found.summary["median_width"] > 0.01


def test_narrow_enough_at_once_adds_none(mine):
    assert again(until_width=2.0).summary["models"] == 10


def test_a_run_whose_width_is_not_known_yet_goes_on(here):
    """One model has no interval at all."""
    found = again(until_width=1.9, models=1, subset_ratio=0.5)
    assert found.summary["models"] == 2


# -- several machines ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halves(tmp_path_factory, ten):
    """Models 0-4 and 5-9 of the run of ten, as two runs would have left them."""
    folder = tmp_path_factory.mktemp("halves")
    fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counterfactual_run, "_takes_all", lambda job: True)
        patch.setattr(counterfactual_view, "plot_report", lambda found, path: path.write_bytes(b"drawn"))
        patch.chdir(folder)
        counterfactual("data.jsonl", out="a", truth="wrong", **SMALL | {"models": 5})
        counterfactual("data.jsonl", out="b", truth="wrong", **SMALL | {"models": 5, "first_model": 5})
        counterfactual("data.jsonl", out="c", truth="wrong", **SMALL | {"models": 4, "first_model": 3})
        counterfactual("data.jsonl", out="other", truth="wrong", **SMALL | {"models": 2, "epochs": 4})
        counterfactual("less.jsonl", out="less", truth="wrong", **SMALL | {"models": 1})
    return folder


@pytest.fixture
def parts(here, halves):
    """Copies of them in the working directory."""
    for name in ("a", "b", "c", "other", "less"):
        shutil.copytree(halves / name, here / name)
    return here


def test_two_halves_merged_are_the_run_of_all(parts, ten):
    found = merge_counterfactual(["a", "b"], out="ab")
    assert_same_run(parts / "ab", ten)
    assert found.meta["n_models"] == 10
    assert found.summary["models"] == 10
    (parts / "ab").rename(parts / "run")
    before = {path: path.stat().st_mtime_ns for path in (parts / "run").rglob("*")}
    assert again().table.num_rows == 40  # the command that would have made it finds it there
    assert {path: path.stat().st_mtime_ns for path in (parts / "run").rglob("*")} == before


def test_the_order_of_the_runs_does_not_matter(parts, ten):
    merge_counterfactual(["b", "a"], out="ba")
    assert_same_run(parts / "ba", ten)


def test_runs_that_share_models_are_merged_once(parts, ten):
    merge_counterfactual(["a", "c", "b"], out="acb")
    assert_same_run(parts / "acb", ten)


def test_the_same_half_asked_for_in_a_merged_directory_is_a_report_of_the_half(parts):
    """The first run's own command must not be told that the report of ten is what it wants."""
    merge_counterfactual(["a", "b"], out="run")
    found = again(models=5)
    assert (found.summary["models"], found.models.table.num_rows) == (5, 5)


def test_a_merged_directory_is_topped_up(parts, ten):
    merge_counterfactual(["a", "c"], out="run")
    assert len(shards_of(parts / "run")) == 7
    again()
    assert_same_run(parts / "run", ten)


def test_a_merged_directory_with_a_gap_is_filled(parts, ten):
    shutil.rmtree(parts / "c")
    again(models=2, out="c")
    found = merge_counterfactual(["c", "b"], out="run")
    assert found.models.table["model"].to_pylist() == [0, 1, 5, 6, 7, 8, 9]
    assert found.meta["items"] == "0-1,5-9"
    assert again(models=7).models.table["model"].to_pylist() == list(range(7))
    again()
    assert_same_run(parts / "run", ten)


def test_runs_are_merged_into_what_is_there(parts, ten):
    merge_counterfactual(["a", "c"], out="run")
    merge_counterfactual(["c", "b"], out="run")
    assert_same_run(parts / "run", ten)


def test_a_merge_without_out_stays_in_memory(parts):
    before = files_of(parts)
    found = merge_counterfactual(["a", "b"])
    assert (found.path, found.report.path, found.summary["models"]) == (None, None, 10)
    assert files_of(parts) == before


def test_two_models_of_the_same_number_that_differ_are_refused(parts):
    shard = counterfactual_shards.read_shard(parts / "c" / "shards", 4)
    run_id = tables.read_meta(parts / "c" / "shards" / "model-00004.parquet")["run"]
    object.__setattr__(shard, "weights", "0" * 64)
    counterfactual_shards.write_shard(parts / "c" / "shards", shard, run_id)
    with pytest.raises(InputError, match=r"a/shards/model-00004.*c/shards/model-00004.*two models of the same number"):
        merge_counterfactual(["a", "c"], out="ac")
    assert not (parts / "ac").exists()


@pytest.mark.parametrize(("name", "field"), [("other", "options.epochs"), ("less", "dataset")])
def test_a_run_of_other_options_or_data_is_not_merged(parts, name, field):
    with pytest.raises(InputError, match=rf"{name} is of another run than a \(differs in [^)]*{field}"):
        merge_counterfactual(["a", name], out="out")
    assert not (parts / "out").exists()


def test_a_merge_into_another_run_is_refused(parts):
    before = shards_of(parts / "other")
    with pytest.raises(
        InputError, match=r"other/counterfactual\.parquet already holds another report \(differs in options"
    ):
        merge_counterfactual(["a", "b"], out="other")
    assert shards_of(parts / "other") == before


@pytest.mark.parametrize("force", [False, True])
def test_a_merge_into_one_of_its_runs_is_refused_by_whatever_name(parts, force):
    before = shards_of(parts / "a")
    (parts / "link").symlink_to(parts / "a")
    for out in ("a", "./a", "b/../a", str(parts / "a"), "link"):
        with pytest.raises(InputError, match="is one of the runs; choose another --out"):
            merge_counterfactual(["a", "b"], out=out, force=force)
    assert shards_of(parts / "a") == before


def test_a_missing_or_damaged_file_of_a_run_is_named(parts):
    shard = parts / "b" / "shards" / "model-00007.parquet"
    whole = shard.read_bytes()
    at = len(whole) - 300  # within the footer
    for content in (whole[:100], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], b"", None):
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(InputError, match="model-00007"):
            merge_counterfactual(["a", "b"], out="ab")
    shard.write_bytes(whole)
    for name in ("counterfactual.parquet", "examples.parquet", "models.parquet"):
        whole = (parts / "b" / name).read_bytes()
        for content in (whole[:50], shard.read_bytes(), None):
            (parts / "b" / name).unlink() if content is None else (parts / "b" / name).write_bytes(content)
            said = "b holds no finished run" if content is None and name == "counterfactual.parquet" else f"b/{name}"
            with pytest.raises(InputError, match=said):
                merge_counterfactual(["a", "b"], out="ab")
        (parts / "b" / name).write_bytes(whole)
    assert not (parts / "ab").exists()


def test_a_report_that_does_not_say_how_it_was_made_is_not_merged(parts):
    main = parts / "b" / "counterfactual.parquet"
    table, whole = pq.read_table(main), main.read_bytes()
    about = json.loads(table.schema.metadata[b"memdiag"])
    for change in ({"identity": None}, {"dataset": []}, {"identity": {}}, {"report": "score"}):
        text = json.dumps(about | change).encode()
        pq.write_table(table.replace_schema_metadata({b"memdiag": text}), main)
        with pytest.raises(InputError, match=r"b/counterfactual\.parquet .*give it back its own"):
            merge_counterfactual(["a", "b"], out="ab")
    main.write_bytes(whole)
    pq.write_table(
        pq.read_table(parts / "b" / "models.parquet").drop_columns(["model"]), parts / "b" / "models.parquet"
    )
    with pytest.raises(InputError, match=r"b/models\.parquet"):
        merge_counterfactual(["a", "b"], out="ab")


def test_a_shard_of_another_run_is_not_merged(parts):
    shutil.copy(parts / "other" / "shards" / "model-00001.parquet", parts / "b" / "shards")
    with pytest.raises(InputError, match=r"b/shards/model-00001.parquet is of another run or another model"):
        merge_counterfactual(["a", "b"], out="ab")


def test_examples_of_another_run_are_not_merged(parts):
    shutil.copy(parts / "less" / "examples.parquet", parts / "b")
    with pytest.raises(InputError, match=r"b/examples.parquet differs from a/examples.parquet"):
        merge_counterfactual(["a", "b"], out="ab")


@pytest.mark.parametrize("directories", [[], ["a"]])
def test_a_merge_wants_two_directories(parts, directories):
    with pytest.raises(InputError, match="merge wants at least two directories"):
        merge_counterfactual(directories, out="ab")
    with pytest.raises(InputError, match=r"nowhere holds no finished run of counterfactual"):
        merge_counterfactual(["a", "nowhere"], out="ab")


# -- damage and change ---------------------------------------------------------------------------------------------


def damages(ten, halves):
    whole = (ten / "shards" / "model-00003.parquet").read_bytes()
    middle = len(whole) // 3
    return {
        "flipped": whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :],
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "another model": (ten / "shards" / "model-00004.parquet").read_bytes(),
        "another run": (halves / "other" / "shards" / "model-00001.parquet").read_bytes(),
        "another report": (ten / "models.parquet").read_bytes(),
    }


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "another model", "another run", "another report"])
def test_a_damaged_shard_is_named_and_made_again(mine, ten, halves, caplog, how):
    number = 1 if how == "another run" else 3
    path = mine / "shards" / f"model-0000{number}.parquet"
    whole = path.read_bytes()
    path.write_bytes(damages(ten, halves)[how])
    with caplog.at_level("WARNING", logger="memdiag"):
        again(models=9)
    assert [record for record in caplog.records if f"model-0000{number}" in record.message], caplog.text
    assert all("model-0000" + str(number) in record.message for record in caplog.records)
    assert "trained again" in caplog.text
    assert path.read_bytes() == whole
    again()
    assert_same_run(mine, ten)


def test_a_damaged_shard_is_told_on_stderr(run, mine, ten):
    (mine / "shards" / "model-00003.parquet").write_bytes(b"no more")
    code, stdout, stderr = run("counterfactual", "data.jsonl", *words(), "--truth", "wrong", "-o", "run", "--top", "2")
    assert (code, stdout) == (0, "run\n")
    (line,) = [line for line in stderr.splitlines() if "model-00003.parquet" in line]
    assert line.endswith("it is trained again")
    assert shards_of(mine) == shards_of(ten)


def test_files_of_other_names_in_the_folder_are_nobodys(mine, ten):
    for name in ("model-3.parquet", "model-x.parquet", "model-².parquet", "notes.txt", "model-00077.json"):
        (mine / "shards" / name).write_bytes(b"?")
    (mine / "shards" / "model-00011.parquet").mkdir()
    again(models=9)
    again()
    for name in ("model-3.parquet", "model-x.parquet", "model-².parquet", "notes.txt", "model-00077.json"):
        (mine / "shards" / name).unlink()
    (mine / "shards" / "model-00011.parquet").rmdir()
    assert_same_run(mine, ten)


def test_what_a_clock_said_may_be_lost(mine):
    for k, text in enumerate(['{"seconds": "x"}', "[]", "", "{", '{"seconds": 1e999, "engine": "inline"}', "\udcff"]):
        (mine / "shards" / f"model-0000{k}.json").write_text(text, errors="surrogateescape")
    rows = again(top=1).models.table.to_pylist()
    assert [row["seconds"] for row in rows[:6]] == [None] * 6
    assert [row["engine"] for row in rows] == [None] * 6 + ["inline"] * 4


def test_data_that_changed_since_is_refused(mine):
    text = (mine.parent / "data.jsonl").read_text()
    (mine.parent / "data.jsonl").write_text(text.replace("0.126", "0.127", 1))
    assert (mine.parent / "data.jsonl").read_text() != text
    with pytest.raises(InputError, match="differs in dataset"):
        again(models=12)
    (mine.parent / "data.jsonl").write_text(text)
    lines = (mine.parent / "test.jsonl").read_text().splitlines()
    (mine.parent / "test.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(InputError, match=r"differs in test"):
        again(models=12)


def test_data_that_changes_while_it_runs_is_refused(here, monkeypatch):
    """A chunk opens the data itself, in whatever process."""
    job = counterfactual_run.opened(CounterfactualOptions(data="data.jsonl", **SMALL))
    identity = job.identity
    with (here / "data.jsonl").open("a") as file:
        file.write(json.dumps({"id": "new", "x": [0.0] * 6, "y": 0, "who": "w", "wrong": False}) + "\n")
    from memdiag import counterfactual_job

    counterfactual_job.job_of.cache_clear()
    with pytest.raises(InputError, match=r"data\.jsonl has changed since the run began, or is another here .*--force"):
        counterfactual_job.train_chunk(job.options, str(here), identity, "inline", (0,), lambda n: None)
    assert not list(here.glob("model-*"))


def test_weights_that_are_no_numbers_are_told_in_a_line(run, here):
    args = ["counterfactual", "data.jsonl", "--lr", "1e6", "--models", "2", "--epochs", "40", "--chunk", "2", "-q"]
    code, stdout, stderr = run(*args)
    assert (code, stdout) == (3, "")
    (line,) = stderr.splitlines()
    assert "weights are not finite" in line
    assert "try a smaller --lr" in line


@pytest.mark.parametrize("chunk", [1, 5])
def test_an_empty_subset_is_refused(here, chunk):
    options = {"data": "two.jsonl", "test": None, "subset_ratio": 0.1, "batch_size": None, "chunk": chunk}
    with pytest.raises(InputError, match=r"two\.jsonl: nothing is in the subset of model .*, of 2 groups"):
        again_with(**options)


def again_with(**options):
    return counterfactual(**{"data": "data.jsonl", "out": "run", "truth": "wrong"} | SMALL | options)


def test_examples_that_cannot_be_told_apart_are_refused(here):
    with pytest.raises(InputError, match="all examples are one group; wanted at least two"):
        again_with(data="same.jsonl", truth=None, test=None)


# -- kill -9 -------------------------------------------------------------------------------------------------------


def living(group):
    """Processes of a process group that are not dead."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_nothing(tmp_path, ten):
    """The real command with its worker processes: the leader alone, and the whole group."""
    fill(tmp_path)
    out, dice = tmp_path / "run", random.Random(4)
    options = {**SMALL, "truth": "wrong", "chunk": 1}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    args = [sys.executable, "-m", "memdiag", "counterfactual", "data.jsonl", *words, "--out", "run", "-q"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    kills, before = 0, {}
    for least in (0, 1, 4, 10):  # the last one while reports are written
        process = subprocess.Popen(
            args, cwd=tmp_path, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        until = time.monotonic() + 60
        while process.poll() is None and len(list(out.glob("shards/*.parquet"))) < least:
            assert time.monotonic() < until
            time.sleep(0.005)
        if not least:
            time.sleep(dice.uniform(0.5, 4.0))
        time.sleep(dice.uniform(0.0, 0.1))
        if process.poll() is not None:
            continue
        if kills % 2:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid, signal.SIGKILL)
        kills += 1
        process.communicate(timeout=60)
        until = time.monotonic() + 20
        while living(process.pid):  # whose parent is gone leaves
            assert time.monotonic() < until
            time.sleep(0.05)
        now = shards_of(out) if out.exists() else {}
        assert {name: now[name] for name in before} == before
        assert now.items() <= shards_of(ten).items()  # whole or not there
        before = now
    assert kills >= 4
    done = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "run\n", "")
    assert_same_run(out, ten)
    assert not list(tmp_path.glob(".run*"))


# -- sizes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """A run at three widths; not to be changed."""
    folder = tmp_path_factory.mktemp("sizes")
    fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counterfactual_run, "_takes_all", lambda job: True)
        for name in ("plot_report", "plot_sizes"):
            patch.setattr(counterfactual_view, name, lambda found, path: path.write_bytes(b"drawn"))
        patch.chdir(folder)
        counterfactual("data.jsonl", out="run", **SIZES)
    return folder / "run"


SIZES = {**SMALL, "width": None, "sizes": [2, 16, 64], "truth": "wrong"}


def test_sizes_are_what_each_width_alone_says(sizes, ten):
    table = tables.read(sizes / "sizes.parquet").table.to_pylist()
    assert [row["width"] for row in table] == [2, 16, 64] * 40
    for place, width in enumerate((2, 16, 64)):
        own = tables.read(sizes / f"width-{width}" / "counterfactual.parquet").table.to_pylist()
        assert len(own) == 40
        for row, wanted in zip(table[place::3], own):
            same = ("row", "example_id", "label", "truth", "memorization", "p_in", "p_out", "n_in", "n_out")
            assert {name: row[name] for name in same} == {name: wanted[name] for name in same}
            variance = 0.0
            for p, n in ((wanted["p_in"], wanted["n_in"]), (wanted["p_out"], wanted["n_out"])):
                a = (p * n + 1) / (n + 2)
                variance += a * (1 - a) / (n + 2)
            assert row["se"] == pytest.approx(math.sqrt(variance))
    assert_same_run(sizes / "width-16", ten)


def test_trajectories_are_those_of_the_classifier(sizes):
    table = tables.read(sizes / "sizes.parquet").table
    mem = np.array(table["memorization"].to_pylist()).reshape(40, 3).T
    se = np.array(table["se"].to_pylist()).reshape(40, 3).T
    calls = size_trajectories.classify(mem, se).shape.tolist()
    assert table["trajectory"].to_pylist() == [call for call in calls for _ in range(3)]
    about = json.loads((sizes / "summary.json").read_text())
    assert {name: n for name, n in about["trajectories"].items() if n} == {call: calls.count(call) for call in calls}
    assert [row["width"] for row in about["of_width"]] == about["widths"] == [2, 16, 64]
    assert about["of_width"][1]["memorized"] == int((mem[1] >= 0.25).sum())
    assert about["of_width"][2]["memorization"] == pytest.approx(mem[2].mean())


def test_the_same_subsets_at_every_width(sizes):
    subsets = [
        tables.read(sizes / f"width-{width}" / "models.parquet").table["subset"].to_pylist() for width in (2, 16, 64)
    ]
    assert subsets[0] == subsets[1] == subsets[2]


def test_an_interrupted_run_of_sizes_goes_on_with_the_next_width(here, sizes, monkeypatch):
    train_chunk, seen = counterfactual_run.train_chunk, []

    def cut(options, *rest):
        seen.append(options.width)
        if options.width == 64:
            raise KeyboardInterrupt
        train_chunk(options, *rest)

    monkeypatch.setattr(counterfactual_run, "train_chunk", cut)
    with pytest.raises(KeyboardInterrupt):
        counterfactual("data.jsonl", out="run", **SIZES)
    assert seen == [2, 2, 16, 16, 64]
    assert not (here / "run" / "sizes.parquet").exists()
    seen.clear()
    monkeypatch.setattr(
        counterfactual_run, "train_chunk", lambda *rest: [seen.append(rest[0].width), train_chunk(*rest)]
    )
    counterfactual("data.jsonl", out="run", **SIZES)
    assert seen == [64, 64]
    assert tables.differing(tables.read("run/sizes.parquet"), tables.read(sizes / "sizes.parquet")) == []
    assert files_of(here / "run") == files_of(sizes)
    before = {path: path.stat().st_mtime_ns for path in (here / "run").rglob("*")}
    counterfactual("data.jsonl", out="run", **SIZES)
    assert {path: path.stat().st_mtime_ns for path in (here / "run").rglob("*")} == before


def test_sizes_are_topped_up(here, sizes):
    shutil.copytree(sizes, here / "run")
    found = counterfactual("data.jsonl", out="run", **SIZES | {"models": 20})
    assert found.summary["models"] == 20
    assert {row["n_in"] for row in found.table.to_pylist()} == {14}
    with pytest.raises(InputError, match=r"differs in .*width-128"):
        counterfactual("data.jsonl", out="run", **SIZES | {"sizes": "2,16,128"})


def test_a_single_model_of_each_size_has_no_trajectory(here):
    found = counterfactual("data.jsonl", **SIZES | {"models": 1, "sizes": "2,4"})
    assert found.table["trajectory"].null_count == 80
    assert found.summary["called_by_chance"] is None
    assert set(found.summary["trajectories"].values()) == {0}
    counterfactual_view.print_table(found)


# -- turn-over dropout ---------------------------------------------------------------------------------------------

TURN = {"turn_over_dropout": True, "epochs": 4, "width": 16, "batch_size": 8, "models": 2, "truth": "wrong"}


def test_turn_over_dropout_is_what_the_method_says(here):
    found = counterfactual("data.jsonl", out="run", **TURN)
    options = CounterfactualOptions(data="data.jsonl", **TURN)
    inputs = counterfactual_turnover._open(options)
    _, recipe = counterfactual_turnover.recipe_of(inputs)
    sums = np.zeros((4, 40))
    for k in range(2):
        seed = int(np.random.SeedSequence([0, counterfactual_turnover.NETWORK_SEED, k]).generate_state(1)[0])
        network = turnover_dropout.fit(
            inputs.examples,
            counterfactual_turnover.MlpConfig.from_json(inputs.config),
            counterfactual_turnover.dataclasses.replace(recipe, seed=seed, steps=20),
            device=torch.device("cpu"),
        )
        one = turnover_dropout.self_influence(network, inputs.examples)
        sums += [getattr(one, name) for name in counterfactual_turnover.NAMES]
    for name, values in zip(counterfactual_turnover.NAMES, sums / 2):
        assert found.table[name].to_pylist() == pytest.approx(values.tolist())
    assert found.table["self_influence"].to_pylist() == pytest.approx(((sums[1] - sums[0]) / 2).tolist())
    assert found.table["truth"].to_pylist() == [i % 8 == 0 for i in range(40)]
    assert found.summary["networks"] == 2
    top = [row["self_influence"] for row in found.summary["top"]]
    assert top == sorted(found.table["self_influence"].to_pylist(), reverse=True)[:10]
    assert sorted(os.listdir("run")) == ["summary.json", "turn-over-dropout.parquet", "turn-over-dropout.png"]


def test_turn_over_dropout_goes_on_with_the_next_network(here, monkeypatch):
    whole = counterfactual("data.jsonl", out="whole", **TURN)
    fit, seen = turnover_dropout.fit, []

    def cut(*args, **options):
        seen.append(args[2].seed)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return fit(*args, **options)

    monkeypatch.setattr(turnover_dropout, "fit", cut)
    with pytest.raises(KeyboardInterrupt):
        counterfactual("data.jsonl", out="run", **TURN)
    found = counterfactual("data.jsonl", out="run", **TURN)
    assert seen[2:] == [seen[1]]
    assert tables.differing(found.report, whole.report) == []
    assert found.table.equals(whole.table)
    assert not list(here.glob(".run*"))
    counterfactual("data.jsonl", out="run", **TURN)
    assert len(seen) == 3  # nothing more to do
    with pytest.raises(InputError, match=r"differs in options\.networks"):
        counterfactual("data.jsonl", out="run", **TURN | {"models": 3})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"until_width": 0.1}, "--until-width is about models on subsets"),
        ({"group_by": "who"}, "--group-by is about models on subsets"),
        ({"arch": "transformer"}, "trains an MLP on features"),
        ({"config": "gpt.json", "width": None}, "trains an MLP on features"),
        ({"model": "pkg.module:net", "width": None}, "trains an MLP on features"),
        ({"sizes": "2,4", "width": None}, "two ways to measure"),
        ({"data": "tokens.jsonl", "truth": None, "width": None}, "--turn-over-dropout reads features"),
        ({"data": "labelled.jsonl", "truth": None}, "--turn-over-dropout reads features"),
    ],
)
def test_what_turn_over_dropout_cannot_do_is_said_in_one_line(here, options, said):
    with pytest.raises(InputError, match=said) as error:
        counterfactual(**{"data": "data.jsonl"} | TURN | options)
    assert "\n" not in str(error.value)


def test_turn_over_dropout_that_diverges_is_said_in_one_line(here):
    with pytest.raises(IncompleteError, match=r"network 0: .*; try a smaller --lr or --clip 1"):
        counterfactual("data.jsonl", **TURN | {"lr": 1e6, "epochs": 40})


@pytest.mark.parametrize("lr", [30.0, 1e4, 1e9, 1e18, 1e30])
def test_the_last_update_of_turn_over_dropout_may_be_the_one_that_diverges(run, here, lr):
    """A single epoch, after whose last update nobody has looked at the loss: a report of numbers, or a line."""
    words = ["--epochs", "1", "--width", "16", "--batch-size", "8", "--lr", str(lr), "-q", "-o", "run"]
    code, _, stderr = run("counterfactual", "data.jsonl", "--turn-over-dropout", *words)
    assert code in (0, 3), stderr
    if code == 3:
        (line,) = stderr.splitlines()
        assert "try a smaller --lr" in line
    else:
        assert tables.read("run/turn-over-dropout.parquet").table["self_influence"].null_count == 0


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": None}, "nothing to train on"),
        ({"models": 0}, "--models must be 1 to 1000000, got 0"),
        ({"first_model": -1}, "--first-model must be 0 to"),
        ({"max_models": 0}, "--max-models must be 1 to"),
        ({"top": -1}, "--top must be 0 to"),
        ({"chunk": 0}, "--chunk must be 1 to"),
        ({"min_influence": 1.1}, "--min-influence must be 0 to 1"),
        ({"min_influence": float("nan")}, "--min-influence must be 0 to 1"),
        ({"until_width": 0.0}, "--until-width must be a finite number above 0"),
        ({"until_width": float("inf")}, "--until-width must be a finite number above 0"),
        ({"until_width": 0.1, "first_model": 5}, "--until-width counts the models from 0"),
        ({"subset_ratio": 1.0}, "--subset-ratio must be more than 0"),
        ({"design": "balanse"}, "did you mean 'balanced'"),
        ({"engine": "inlin"}, "did you mean 'inline'"),
        ({"arch": "mpl"}, "did you mean 'mlp'"),
        ({"ray_gpus": 0.5}, "--ray-gpus needs --engine ray"),
        ({"sizes": "2,4", "width": 16}, "--sizes and --width do not go together"),
        ({"sizes": "4,2", "width": None}, "each above the one before"),
        ({"sizes": "4", "width": None}, "at least two widths"),
        ({"sizes": "0,4", "width": None}, "at least two widths"),
        ({"sizes": "a,b", "width": None}, "wanted widths like"),
        ({"sizes": "2,4", "width": None, "until_width": 0.1}, "--sizes and --until-width do not go together"),
        ({"sizes": "2,4", "width": None, "config": "gpt.json"}, "leave --model and --config out"),
        ({"group_by": "whom"}, "did you mean 'who'"),
        ({"truth": "wrongs"}, "did you mean 'wrong'"),
        ({"test": "tokens.jsonl"}, "holds"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(here, options, said):
    with pytest.raises(InputError, match=said) as error:
        again_with(**options)
    assert "\n" not in str(error.value)
    assert not (here / "run").exists()


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(InputError, match=r"no option 'subset_ration'.*did you mean 'subset_ratio'"):
        counterfactual("data.jsonl", subset_ration=0.5)


def test_the_options_come_back_from_the_report(mine):
    expected = CounterfactualOptions(data="data.jsonl", truth="wrong", **SMALL)
    for name in REPORTS:
        assert counterfactual_report.options_of(tables.read(mine / name)) == expected
    with pytest.raises(InputError, match="with other options"):
        counterfactual_report.options_of(tables.Report(None, {"options": {"half": 3}}))


# -- the API and the command ---------------------------------------------------------------------------------------


def test_without_out_the_reports_come_back_and_nothing_is_left(here, ten):
    before = files_of(here)
    found = again(out=None)
    assert files_of(here) == before
    assert found.path is None
    for name, file in zip(("report", "influence", "models"), REPORTS):
        report = getattr(found, name)
        assert report.path is None
        assert tables.differing(report, tables.read(ten / file)) == []
    assert found.to_pandas().shape == (40, found.table.num_columns)
    assert memdiag.counterfactual is counterfactual
    assert memdiag.merge_counterfactual is merge_counterfactual


@pytest.mark.parametrize("name", REPORTS)
def test_a_rerun_gives_the_same_rows(run, mine, name):
    code, stdout, stderr = run("rerun", f"run/{name}", "--json")
    assert (code, stderr) == (0, ""), stderr
    told = json.loads(stdout)
    assert (told["same"], told["differing"]) == (True, [])
    assert (mine.parent / "run.rerun" / name).exists()


def test_a_rerun_of_a_merged_report_has_all_its_models(run, parts):
    merge_counterfactual(["a", "b"], out="run")
    code, stdout, _ = run("rerun", "run/counterfactual.parquet", "--json")
    assert (code, json.loads(stdout)["same"]) == (0, True)


def test_a_rerun_of_a_shard_names_the_report(run, mine):
    for name in ("examples.parquet", "shards/model-00000.parquet"):
        code, _, stderr = run("rerun", f"run/{name}")
        assert code == 2
        assert "give the counterfactual.parquet of its directory" in stderr


def words():
    return [w for name, value in SMALL.items() for w in (f"--{name.replace('_', '-')}", str(value))]


def test_json_is_one_object(run, mine):
    code, stdout, stderr = run(
        "counterfactual", "data.jsonl", *words(), "--truth", "wrong", "-o", "run", "--json", "-q"
    )
    assert (code, stderr) == (0, "")
    told = json.loads(stdout)
    assert {"directory", "report", "influence", "models", "summary"} == set(told)
    assert told["summary"]["models"] == 10
    assert Path(told["report"]).exists()


def test_a_dry_run_writes_nothing(run, here):
    before = files_of(here)
    for more in ([], ["--json"], ["--sizes", "2,4"], ["--turn-over-dropout"]):
        chunk = [] if "--turn-over-dropout" in more else ["--chunk", str(SMALL["chunk"])]
        rest = ["--epochs", str(SMALL["epochs"]), "--models", str(SMALL["models"]), *chunk]
        code, stdout, stderr = run("counterfactual", "data.jsonl", *rest, "--dry-run", *more)
        assert (code, stderr) == (0, ""), stderr
        assert "examples" in stdout
    code, stdout, stderr = run("counterfactual", "--data", "data.jsonl", *words(), "--dry-run", "--json")
    told = json.loads(stdout)
    assert (told["models"], told["examples"], told["groups"], told["held_out"]) == (10, 40, 37, 9)
    assert (told["models_of_a_block"], told["updates_of_a_model"], told["at_once"]) == (10, 11, 5)
    assert files_of(here) == before


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_drawn_where_it_is_wanted(run, mine, monkeypatch, suffix):
    monkeypatch.undo()
    monkeypatch.chdir(mine.parent)
    args = ["counterfactual", "data.jsonl", *words(), "--truth", "wrong", "-o", "run", "--plot", f"p.{suffix}", "-q"]
    code, stdout, stderr = run(*args)
    assert (code, stdout, stderr) == (0, "run\n", "")
    assert (mine.parent / f"p.{suffix}").stat().st_size > 1000


def test_what_the_command_refuses(run, parts):
    cases = [
        (["merge", "-o", "x"], "merge wants at least two directories"),
        (["merge", "a", "-o", "x"], "merge wants at least two directories"),
        (["merge", "a", "b", "-o", "x", "--dry-run"], "leave --dry-run out"),
        (["merge", "a", "missing", "-o", "x"], "missing holds no finished run of counterfactual"),
        (["data.jsonl", "--data", "data.jsonl", "-o", "x"], "each say what to train on; give one of them"),
        (["data.jsonl", "two.jsonl", "-o", "x"], "each say what to train on; give one of them"),
        (["data.jsonl", "--plot", "x.pdf", "-o", "x"], "must end in .png or .svg"),
        (["data.jsonl", "--modles", "3", "-o", "x"], "--models"),
        (["task:digit", "-o", "x"], "digits"),
        (["merge_", "a", "-o", "x"], "each say what to train on"),
        (["-o", "x"], "nothing to train on"),
    ]
    for args, said in cases:
        code, stdout, stderr = run("counterfactual", *args, "-q")
        assert (code, stdout) == (2, ""), args
        (line,) = stderr.splitlines()
        assert said in line, args
    assert not (parts / "x").exists()


def test_merge_on_the_command_line(run, parts, ten):
    code, stdout, stderr = run("counterfactual", "merge", "a", "b", "--out", "ab", "--json")
    assert (code, stderr) == (0, "")
    assert json.loads(stdout)["summary"]["models"] == 10
    assert_same_run(parts / "ab", ten)


def test_a_run_under_torchrun_is_refused(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="is not run by torchrun; --engine ray uses several machines"):
        again()


def test_force_leaves_the_files_of_others_alone(here):
    """A folder of data is often called shards."""
    Path("mine/shards").mkdir(parents=True)
    Path("mine/shards/theirs.txt").write_text("theirs")
    counterfactual("data.jsonl", **SMALL, out="mine", force=True)
    assert Path("mine/shards/theirs.txt").read_text() == "theirs"
    before = Path("mine/shards/model-00000.parquet").stat().st_mtime_ns
    counterfactual("data.jsonl", **SMALL, out="mine", force=True)
    assert Path("mine/shards/theirs.txt").exists()
    assert Path("mine/shards/model-00000.parquet").stat().st_mtime_ns > before


@pytest.mark.parametrize("left", [None, b"", b"PAR1 and no more"])
def test_shards_without_a_whole_report_are_not_lost(here, caplog, left):
    whole = counterfactual("data.jsonl", **SMALL, out="run").report
    shards = {path: path.stat().st_mtime_ns for path in Path("run/shards").glob("*.parquet")}
    main = Path("run/counterfactual.parquet")
    main.unlink() if left is None else main.write_bytes(left)
    again = counterfactual("data.jsonl", **SMALL, out="run").report
    assert tables.differing(whole, again) == []
    assert {path: path.stat().st_mtime_ns for path in shards} == shards


def test_no_more_models_than_the_most_are_trained(here):
    found = counterfactual("data.jsonl", **SMALL | {"models": None, "until_width": 0.001, "max_models": 3}, out="few")
    assert found.summary["models"] == 3
    assert [text for text in found.summary["warnings"] if "--max-models came before" in text]


def test_the_most_memorized_are_told_once_for_each_group(here):
    found = counterfactual("data.jsonl", **SMALL, group_by="who", out="grouped")
    groups = dict(zip(found.table["example_id"].to_pylist(), found.table["group_id"].to_pylist()))
    told = [groups[row["example_id"]] for row in found.summary["top"]]
    assert len(told) == len(set(told))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or " " in sys.executable, reason="needs Ray, in a path without a space"
)
def test_ray_trains_the_same_models(here):
    inline = counterfactual("data.jsonl", **SMALL, out="inline")
    ray = counterfactual("data.jsonl", **SMALL | {"chunk": 3}, engine="ray", out="ray")
    assert inline.models.table["weights"].equals(ray.models.table["weights"])
    assert set(ray.models.table["engine"].to_pylist()) == {"ray"}
    assert tables.differing(inline.report, ray.report) == []
    for shard in Path("inline/shards").glob("*.parquet"):
        assert shard.read_bytes() == (Path("ray/shards") / shard.name).read_bytes()
