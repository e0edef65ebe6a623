"""memdiag reproduce long-tail: which rows go, what a planted tail gives, what chance gives, and the command."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

import memdiag
from memdiag import reproduce_gapt_run, reproduce_report, reproduce_tail, tables, workers
from memdiag.cli import reports
from memdiag.cli.reproduce import reproduce
from memdiag.counterfactual_job import job_of
from memdiag.counterfactual_report import CounterfactualOptions
from memdiag.errors import IncompleteError, InputError
from memdiag.progress import Progress
from memdiag.reproduce_effects import judge
from memdiag.reproduce_report import ReproduceOptions
from memdiag.reproduce_tail import SIZES, Size, memorization_of, prepare, run, seed_of, settings, subject, subjects
from memdiag.reproduce_tail_arms import (
    ARMS,
    DRAWS,
    THRESHOLDS,
    WAYS,
    Way,
    at_random,
    by_class,
    effects,
    memorized,
    removed,
    wrong_first,
)

EFFECTS = {effect.name: effect for effect in effects("smoke")}
NAN = float("nan")


# -- effects -------------------------------------------------------------------------------------------------------


def _runs(effect, **values):
    """Accuracies of the arms named, seed by seed; 0.9 of all others."""
    n = len(next(iter(values.values())))
    return {arm: {s: {"test_acc": values.get(arm, [0.9] * n)[s]} for s in range(n)} for arm in effect.arms()}


def _treated(name, **values):
    (row,) = (row for row in judge(EFFECTS[name], _runs(EFFECTS[name], **values)) if row["role"] == "treated")
    return row


def test_the_cost_of_the_tail_by_hand():
    found = _treated("tail_25", random_25=[0.98, 0.97, 0.99], memorized_25=[0.97, 0.96, 0.97])
    half = 4.302652729911275 * 0.0057735026919 / 3**0.5  # t(0.975, 2) s / √n of -0.01, -0.01, -0.02
    assert found["change"] == pytest.approx(-0.04 / 3)
    assert (found["change_lo"], found["change_hi"]) == pytest.approx((-0.04 / 3 - half, -0.04 / 3 + half))
    assert (found["n_higher"], found["verdict"]) == (0, "inconclusive")  # the interval ends at +0.001


@pytest.mark.parametrize(
    ("cost", "expected"),
    [([0.01, 0.011, 0.012], "agrees"), ([-0.01, -0.011, -0.012], "disagrees"), ([0.0] * 3, "inconclusive")],
)
def test_the_tail_must_cost_more_than_random_rows(cost, expected):
    assert _treated("tail_25", random_25=[0.9] * 3, memorized_25=[0.9 - c for c in cost])["verdict"] == expected


def test_each_control_is_told_by_how_much_the_tail_is_beyond_it():
    runs = _runs(
        EFFECTS["tail_25"], random_25=[0.9] * 3, memorized_25=[0.87] * 3, by_class_25=[0.88] * 3, again_25=[0.91] * 3
    )
    beyond = {row["arm"]: row["beyond"] for row in judge(EFFECTS["tail_25"], runs) if row["role"] == "control"}
    assert beyond == pytest.approx({"by_class_25": -0.01, "again_25": -0.04, "all": -0.03})


def test_random_rows_against_random_rows_are_inconclusive_but_for_chance():
    """An interval of 95 % leaves 0 out in 5 % of experiments; within 3 standard errors of 1000."""
    rng = np.random.default_rng(0)
    wrong, n = 0, 1000
    for a, b in zip(rng.normal(0.98, 0.004, (n, 6)), rng.normal(0.98, 0.004, (n, 6))):
        wrong += _treated("random_25_again", random_25=a.tolist(), again_25=b.tolist())["verdict"] != "inconclusive"
    assert abs(wrong / n - 0.05) <= 3 * (0.05 * 0.95 / n) ** 0.5


def test_the_papers_figures_are_of_other_data_and_stand_beside_none_of_ours():
    for effect in EFFECTS.values():
        assert effect.paper == {}
        assert effect.paper_note.startswith(("of other data: ", "not given"))
        assert effect.direction == (1 if effect.name == "noisy_above_random" else -1)
    assert {f"tail_{round(100 * t)}" for t in THRESHOLDS} < set(EFFECTS)
    assert "2.54 ± 0.20" in EFFECTS["tail_25"].paper_note


# -- the rows that go ----------------------------------------------------------------------------------------------


def test_memorized_rows_by_hand():
    mem = np.array([0.25, 0.2, NAN, 1.0, -0.5, 0.25])
    assert memorized(mem, threshold=0.25).tolist() == [True, False, False, True, False, True]  # the threshold counts
    assert memorized(mem, most=2).tolist() == [True, False, False, True, False, False]  # of equal ones the first
    assert memorized(mem, most=6).tolist() == [True, True, False, True, True, True]  # never one that is not known
    assert not memorized(mem, most=0).any()
    assert not memorized(np.full(3, NAN), threshold=0.1).any()
    assert memorized(np.array([]), threshold=0.1).tolist() == []


@pytest.mark.parametrize("seed", range(3))
def test_rows_by_class_agree_with_the_definition(seed):
    rng = np.random.default_rng(seed)
    labels, like = rng.integers(0, 4, 60), rng.random(60) < 0.3
    found = by_class(labels, like, np.random.default_rng(seed))
    for label in range(4):
        wanted = sum(1 for i in range(60) if labels[i] == label and like[i])
        assert sum(1 for i in range(60) if labels[i] == label and found[i]) == wanted
    assert (found != like).any()
    assert (found != by_class(labels, like, np.random.default_rng(seed + 100))).any()


def test_rows_at_random_are_any_rows():
    """Each row goes in k of n draws, within 4 standard errors of 2000 draws."""
    n, k, draws = 12, 4, 2000
    found = np.array([at_random(n, k, np.random.default_rng([7, draw])) for draw in range(draws)])
    assert (found.sum(1) == k).all()
    assert np.abs(found.mean(0) - k / n).max() <= 4 * (k / n * (1 - k / n) / draws) ** 0.5
    assert not at_random(5, 0, np.random.default_rng(0)).any()


def test_wrong_rows_go_before_others():
    wrong = np.array([True, False, False, True, False, False])
    found = wrong_first(wrong, 4, np.random.default_rng(0))
    assert found[wrong].all()
    assert found.sum() == 4
    assert wrong_first(wrong, 1, np.random.default_rng(0)).tolist() == wrong.tolist()
    assert wrong.sum() == 2  # not written to


LABELS = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0, 1])
MEM = np.array([0.9, 0.3, 0.0, 0.0, 0.5, 0.0, 0.05, 0.0, 0.0, 0.1])
WRONG = np.array([True, True, False, False, False, False, False, False, False, False])


@pytest.mark.parametrize("name", WAYS)
def test_every_arm_leaves_out_as_many_rows_as_the_one_that_it_is_held_against(name):
    way = WAYS[name]
    out = removed(way, lambda: MEM, LABELS, WRONG, seed=5)
    assert len(out) == len(way.draws)
    n = {"nothing": 0, "wrong": 2}.get(way.removed, 2 if way.threshold is None else (way.threshold <= MEM).sum())
    assert [int(gone.sum()) for gone in out] == [n] * len(out)
    if way.removed == "memorized":
        assert MEM[out[0]].min() > MEM[~out[0]].max()
    if way.removed == "by_class":
        for gone in out:
            assert (
                np.bincount(LABELS[gone], minlength=2) == np.bincount(LABELS[way.threshold <= MEM], minlength=2)
            ).all()
    if way.removed in ("wrong", "wrong_and_random"):
        assert all(gone[WRONG].all() for gone in out)


def test_draws_are_of_the_seed_and_differ_from_one_another():
    labels, mem = np.zeros(300, dtype=np.int64), np.linspace(0, 1, 300)

    def drawn(name, seed):
        return [gone.tobytes() for gone in removed(WAYS[name], lambda: mem, labels, None, seed)]

    assert drawn("random_25", 0) == drawn("random_25", 0)
    sets = [*drawn("random_25", 0), *drawn("again_25", 0), *drawn("random_25", 1), *drawn("again_25", 1)]
    assert len(set(sets)) == 4 * DRAWS
    assert drawn("memorized_25", 0) == drawn("memorized_25", 1)


def test_what_needs_no_memorization_does_not_ask_for_it():
    def refused():
        raise AssertionError

    for name in ("all", "noisy_all", "noisy_wrong", "noisy_random"):
        assert removed(WAYS[name], refused, LABELS, WRONG, seed=0)
    with pytest.raises(AssertionError):
        removed(Way("clean", "random", 0.25), refused, LABELS, WRONG, seed=0)


# -- networks ------------------------------------------------------------------------------------------------------


def _quiet():
    return Progress(show=False)


@pytest.fixture(params=["shared"])
def planted(request, tmp_path, monkeypatch):
    """Six common kinds of rows, each with its label, and twelve kinds of which there is a row each.

    The labels of these twelve are those of the common kinds at random (shared), so that no other row tells them, or
    (own) each has another one. Of 240 test rows a quarter are of these twelve.
    """
    rng = np.random.default_rng(0)
    rare = rng.integers(0, 6, 12) if request.param == "shared" else np.arange(6, 18)
    kinds, labels = np.eye(18), np.concatenate([np.arange(6), rare])

    def write(name, which):
        rows = [
            {"id": str(i), "features": (kinds[k] + rng.normal(0, 0.05, 18)).tolist(), "label": int(labels[k])}
            for i, k in enumerate(which)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("train.jsonl", [*np.repeat(range(6), 18), *range(6, 18)])
    write("test.jsonl", [*np.repeat(range(6), 30), *np.repeat(range(6, 18), 5)])

    def own(data, seed, preset):
        return CounterfactualOptions(
            data=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"), models=40, epochs=60, device="cpu"
        )  # fmt: skip

    monkeypatch.setattr(reproduce_tail, "subject", own)
    monkeypatch.setattr(workers.os, "cpu_count", lambda: 1)
    job_of.cache_clear()
    place = tmp_path / "parts"
    place.mkdir()
    prepare([arm.name for arm in ARMS if not arm.name.startswith(("noisy", "split"))], [0], "smoke", place, _quiet())
    return place


def _planted_effect(planted):
    effect = EFFECTS["tail_25"]
    found = {
        arm: {seed: run(arm, seed, "smoke", None, lambda n: None, directory=planted) for seed in range(4)}
        for arm in effect.arms()
    }
    return found, {row["arm"]: row for row in judge(effect, found)}


def test_a_planted_tail_is_found_and_costs_what_it_must(planted):
    """Of the kinds left out, with six labels, luck tells one in six right; within 3 standard errors of 12 kinds."""
    job = job_of(reproduce_tail.subject("clean", 0, "smoke"))
    mem = memorization_of(planted / "clean", 40, job.digest)
    assert mem[:108].max() < 0.1 < 0.25 < np.median(mem[108:])
    found, rows = _planted_effect(planted)
    n = found["memorized_25"][0]["n_removed"]
    assert n == (mem[108:] >= 0.25).sum()
    assert {own["n_removed"] for arm in found if arm != "all" for own in found[arm].values()} == {n}
    assert {own["train_acc"] for own in found["random_25"].values()} == {1}
    assert (found["all"][0]["test_acc"], found["all"][0]["removed_acc"]) == (1, None)
    luck = n / 6 + 3 * (12 / 6 * 5 / 6) ** 0.5
    assert 1 - 0.25 * n / 12 <= rows["memorized_25"]["ours"] + 1e-9 <= 1 - 0.25 * (n - luck) / 12
    assert rows["memorized_25"]["verdict"] == "agrees"
    assert rows["by_class_25"]["beyond_hi"] < 0  # nor is it the classes
    assert rows["again_25"]["beyond_hi"] < 0
    assert found["memorized_25"][0]["removed_acc"] < 0.5 < found["random_25"][0]["removed_acc"]
    (null,) = (row for row in judge(EFFECTS["random_25_again"], found) if row["role"] == "treated")
    assert null["verdict"] == "inconclusive"  # the control has no such effect


@pytest.mark.parametrize("planted", ["own"], indirect=True)
def test_where_the_tail_is_its_classes_the_control_by_class_says_so(planted):
    """The rows of the rare labels are the memorized ones: all arms that match the classes leave out the same."""
    found, rows = _planted_effect(planted)
    assert found["memorized_25"][0]["n_removed"] == 12
    assert rows["memorized_25"]["ours"] == pytest.approx(0.75)  # nothing is told right with a label never seen
    assert rows["memorized_25"]["verdict"] == "agrees"
    assert rows["by_class_25"]["beyond"] == 0
    (row,) = (row for row in judge(EFFECTS["tail_25_by_class"], found) if row["role"] == "treated")
    assert row["verdict"] == "inconclusive"


def test_memorization_agrees_with_the_definition(planted):
    job = job_of(reproduce_tail.subject("clean", 0, "smoke"))
    found = memorization_of(planted / "clean", 40, job.digest)
    shards = [tables.read(planted / "clean" / f"model-{k:05d}.parquet").table.to_pylist() for k in range(40)]
    for i in range(120):
        seen = [shard[i]["accuracy"] for shard in shards if shard[i]["included"]]
        unseen = [shard[i]["accuracy"] for shard in shards if not shard[i]["included"]]
        assert len(seen) + len(unseen) == 40
        assert found[i] == pytest.approx(sum(seen) / len(seen) - sum(unseen) / len(unseen))
    fewer = memorization_of(planted / "clean", 20, job.digest)
    assert (fewer != found).any()
    with pytest.raises(InputError, match="another run"):
        memorization_of(planted / "clean", 40, "0" * 64)


def test_networks_that_are_there_are_not_trained_again(planted, monkeypatch):
    monkeypatch.setattr(reproduce_tail, "_train", lambda work, advance: pytest.fail("trained again"))
    prepare(["memorized_25"], [0], "smoke", planted, _quiet())
    gone = planted / "clean" / "model-00007.parquet"
    gone.unlink()
    waiting = []
    monkeypatch.setattr(reproduce_tail, "_train", lambda work, advance: waiting.append(work[2]))
    prepare(["memorized_25"], [0], "smoke", planted, _quiet())
    assert waiting == [(7,)]


def test_seeds_are_paired_and_no_network_judges_with_a_seed_of_memorization(planted, monkeypatch):
    seen, passes = [], []
    real = reproduce_tail.ensemble.train

    def train(members, *rest, **more):
        seen.append([member.seed for member in members])
        passes.append(rest[2].steps * rest[2].batch_size / members[0].included.sum())
        return real(members, *rest, **more)

    monkeypatch.setattr(reproduce_tail.ensemble, "train", train)
    for arm in ("all", "memorized_25", "random_25", "by_class_25"):
        run(arm, 3, "smoke", None, lambda n: None, directory=planted)
    assert [len(own) for own in seen] == [1, 1, DRAWS, DRAWS]
    assert {seed for own in seen for seed in own} == {seed_of(3)}
    assert all(60 <= found < 60 + 64 / 100 for found in passes)  # whatever is left out; the last update may go on
    job = job_of(reproduce_tail.subject("clean", 0, "smoke"))
    assert not {job.member(k).seed for k in range(400)} & {seed_of(s) for s in range(1000)}
    assert len({seed_of(s) for s in range(1000)}) == 1000


def test_nothing_left_to_train_on_is_told(planted, monkeypatch):
    monkeypatch.setattr(reproduce_tail, "memorization_of", lambda *_: np.ones(120))
    with pytest.raises(IncompleteError, match="memorized_25, seed 0: every row is memorized"):
        run("memorized_25", 0, "smoke", None, lambda n: None, directory=planted)


# -- data ----------------------------------------------------------------------------------------------------------


def test_every_split_has_its_own_rows_and_memorization():
    names = [arm.name for arm in ARMS]
    found = subjects(names, [0, 4], "paper")
    assert list(found) == ["clean", "noisy", "split-0", "split-4"]
    assert [options.models for options in found.values()] == [400, 400, 100, 100]
    assert found["clean"].data == "task:digits?split=train&seed=0"
    assert found["noisy"].data == "task:digits?split=train&seed=0&corruption=0.1"
    assert found["split-4"].test == "task:digits?split=test&seed=5"
    assert len({options.seed for options in found.values()}) == 3  # clean and noisy share a split
    assert list(subjects(["all", "random_25"], [0, 1], "smoke")) == ["clean"]
    assert subjects(["all"], [0, 1], "smoke") == {}


def test_the_digits_and_their_wrong_labels():
    """1,438 rows to train on and 359 held out; a tenth of the labels wrong in `noisy`, none of the held-out ones."""
    clean, noisy = (job_of(subject(data, 0, "smoke")).inputs for data in ("clean", "noisy"))
    assert (len(clean.examples), len(clean.held_out)) == (1438, 359)
    assert clean.corrupted.sum() == 0
    assert noisy.corrupted.sum() == 143
    assert (clean.examples.labels != noisy.examples.labels).tolist() == noisy.corrupted.tolist()
    assert (clean.held_out.labels == noisy.held_out.labels).all()


# -- the command ---------------------------------------------------------------------------------------------------

TINY = Size(10, 10, epochs=1)
QUICK = {"only": "tail_25", "seeds": "0,1,2"}


@pytest.fixture
def tiny(monkeypatch):
    """Networks that take no time, in this process."""
    monkeypatch.setitem(SIZES, "smoke", TINY)
    monkeypatch.setattr(workers.os, "cpu_count", lambda: 1)
    job_of.cache_clear()


def test_every_effect_from_end_to_end(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reproduce("long-tail", seeds="0,1,2", plot=tmp_path / "plot.png", as_json=True)
    about = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "reproduce-long-tail"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    out = tmp_path / "reproduce-long-tail"
    assert sorted(path.name for path in out.iterdir()) == ["effects.parquet", "runs.parquet"]
    effects_report, runs_report = tables.read(out / "effects.parquet"), tables.read(out / "runs.parquet")
    assert list(dict.fromkeys(row["name"] for row in about["effects"])) == list(EFFECTS)
    assert effects_report.table["name"].unique().to_pylist() == list(EFFECTS)
    assert effects_report.meta["options"] == {
        "name": "long-tail",
        **dataclasses.asdict(ReproduceOptions(seeds="0,1,2")),
    }
    assert "arXiv:2008.03703" in effects_report.meta["paper"]
    runs = {}
    for row in runs_report.table.to_pylist():
        runs.setdefault(row["arm"], {}).setdefault(row["seed"], {})[row["measure"]] = row["value"]
    assert set(runs) == {arm.name for arm in ARMS}
    assert effects_report.table.to_pylist() == [row for effect in EFFECTS.values() for row in judge(effect, runs)]
    assert {runs["noisy_wrong"][seed]["n_wrong_removed"] for seed in range(3)} == {143}
    for at in ("random", "by_class"):
        assert [own["n_removed"] for own in runs[f"split_{at}_25"].values()] == [
            own["n_removed"] for own in runs["split_memorized_25"].values()
        ]
    reproduce("long-tail", seeds="0,1,2", show=True)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 120
    assert re.search(r"^tail_25  (agrees|disagrees|inconclusive)  Without the rows of mem >= 0.25", shown, re.MULTILINE)
    assert "the paper's figure is of other data: on CIFAR-100" in shown


def test_a_report_can_be_made_again(tiny, tmp_path):
    found = memdiag.reproduce("long-tail", out=tmp_path / "out", **QUICK)
    reports.rerun(tmp_path / "out" / "effects.parquet", out=tmp_path / "again", quiet=True)
    assert tables.read(tmp_path / "again" / "effects.parquet").table.equals(found.table)


def test_killed_twice_and_begun_again_gives_the_same_bytes(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce_tail, "CHUNK", 5)
    memdiag.reproduce("long-tail", out=tmp_path / "whole", **QUICK)
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys\n"
        "import memdiag\n"
        "from memdiag import reproduce_tail, workers\n"
        "reproduce_tail.SIZES['smoke'] = reproduce_tail.Size(10, 10, epochs=1)\n"
        "reproduce_tail.CHUNK, calls = 5, [0]\n"
        "def each(function, jobs, progress, **options):\n"
        "    for job in jobs:\n"
        "        if calls[0] == int(sys.argv[2]):\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        calls[0] += 1\n"
        "        function(job, progress.advance)\n"
        "workers.each = each\n"
        "memdiag.reproduce('long-tail', out=sys.argv[1], only='tail_25', seeds='0,1,2')\n"
    )
    out, parts = tmp_path / "cut", tmp_path / ".cut.parts"
    kept = []
    for calls in ("1", "3"):  # amid the networks of memorization; then the rest of them, and two runs
        command = [sys.executable, str(script), str(out), calls]
        done = subprocess.run(
            command, capture_output=True, check=False, timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        shards = {path: path.stat().st_mtime_ns for path in (parts / "clean").glob("*.parquet")}
        runs = {path: path.stat().st_mtime_ns for path in parts.glob("*.seed-*.parquet")}
        kept.append((shards, runs))
    assert [(len(shards), len(runs)) for shards, runs in kept] == [(5, 0), (10, 2)]
    assert kept[0][0].items() <= kept[1][0].items()  # nothing was done twice
    done = []
    real = reproduce_gapt_run._one
    monkeypatch.setattr(reproduce_gapt_run, "_one", lambda job, advance: (done.append(job[1:3]), real(job, advance)))
    memdiag.reproduce("long-tail", out=out, **QUICK)
    assert len(done) == 5 * 3 - 2
    for name in ("effects.parquet", "runs.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not parts.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_map": True}, "--no-map goes with grok, not with long-tail"),
        ({"data": "x.jsonl"}, "--data goes with gapt-lm; long-tail makes its own data"),
        ({"only": "tail_52"}, "no effect of long-tail 'tail_52'; .*did you mean 'tail_25'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        memdiag.reproduce("long-tail", out=tmp_path / "out", **options)


def test_the_plan_counts_networks_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = reproduce_report.plan("long-tail", ReproduceOptions(only="tail_25"))
    assert (plan["effects"], plan["runs"], plan["memorization_networks"]) == (1, 5 * 6, 100)
    assert plan["networks"] == 6 * (2 + 3 * DRAWS)
    assert plan["seconds_expected"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_paper_preset_has_twenty_seeds_unless_told():
    assert len(ReproduceOptions(preset="paper").settled_for("long-tail").seed_list()) == 20
    assert len(ReproduceOptions().settled_for("long-tail").seed_list()) == 6
    assert ReproduceOptions(preset="paper", seeds="4").settled_for("long-tail").seed_list() == [4]
    assert ReproduceOptions(preset="paper").settled_for("gapt-conflict") == ReproduceOptions(
        preset="paper", seeds="0,1,2,3,4,5,6,7"
    )
    assert settings("smoke") != settings("paper")
    json.dumps(settings("smoke"))
