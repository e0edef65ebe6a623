"""memdiag reproduce gapt-*: runs and rounds, resume, what is shown, what is refused. On the experiment of seconds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest

import memdiag
from memdiag import InputError, reproduce_gapt_run, reproduce_gapt_view, reproduce_report, tables
from memdiag.reproduce_effects import judge
from memdiag.reproduce_gapt import experiment
from memdiag.reproduce_report import GAPT, SEEDS, ReproduceOptions

QUICK = {"only": "order_forgets_pos", "seeds": "0,1,2"}  # five arms, fifteen runs


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return memdiag.reproduce("gapt-conflict", out=tmp_path_factory.mktemp("reproduce") / "out", **QUICK)


def test_the_reports_are_there_with_how_they_were_made(found):
    assert sorted(path.name for path in found.path.iterdir()) == ["effects.parquet", "runs.parquet"]
    assert not list(found.path.parent.glob(".*"))
    for report in (found.effects, found.runs):
        assert report.meta["options"]["name"] == "gapt-conflict"
        assert report.meta["seed"] == [0, 1, 2]
        assert "2505.08727" in report.meta["paper"]
    assert found.table["name"].unique().to_pylist() == ["order_forgets_pos"]


def test_the_effects_are_judged_by_the_runs(found):
    runs = {}
    for row in found.runs.table.to_pylist():
        runs.setdefault(row["arm"], {}).setdefault(row["seed"], {})[row["measure"]] = row["value"]
    (effect,) = [e for e in experiment("gapt-conflict").effects("smoke") if e.name == "order_forgets_pos"]
    assert set(runs) == set(effect.arms())
    assert found.table.to_pylist() == judge(effect, runs)


def test_an_arm_that_needs_another_is_told_its_measures(tmp_path):
    """random compresses in as many updates as the gate of the same seed."""
    found = memdiag.reproduce("gapt-conflict", out=tmp_path / "out", only="separation", seeds="3")
    share = {
        row["arm"]: row["value"] for row in found.runs.table.to_pylist() if row["measure"].startswith("share")
    }  # fmt: skip
    assert 0 < share["gapt_w10"] < 1
    assert share["random"] == pytest.approx(share["gapt_w10"], abs=1e-3)
    assert share["mixed"] == 0
    verdicts = [row["verdict"] for row in found.table.to_pylist() if row["role"] == "treated"]
    assert verdicts == ["inconclusive"]  # one seed has no interval


def test_killed_and_begun_again_gives_the_same_bytes(found, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys\n"
        "import memdiag\n"
        "from memdiag import reproduce_gapt_run, workers\n"
        "def each(function, jobs, progress, **options):\n"
        "    for job in jobs[:2]:\n"
        "        function(job, progress.advance)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "workers.each = each\n"
        "memdiag.reproduce('gapt-conflict', out=sys.argv[1], only='order_forgets_pos', seeds='0,1,2')\n"
    )
    out = tmp_path / "cut"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), str(out)], capture_output=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / ".cut.parts").glob("*.parquet")}
    assert len(parts) == 2
    memdiag.reproduce("gapt-conflict", out=out, **QUICK)
    for name in ("effects.parquet", "runs.parquet"):
        assert (out / name).read_bytes() == (found.path / name).read_bytes()


def test_the_same_command_again_leaves_it_as_it_is(found):
    before = (found.path / "effects.parquet").stat().st_mtime_ns
    memdiag.reproduce("gapt-conflict", out=found.path, **QUICK)
    assert (found.path / "effects.parquet").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"already holds another report .differs in options.seeds"):
        memdiag.reproduce("gapt-conflict", out=found.path, only="order_forgets_pos", seeds="5")


def test_the_table_and_the_plot(found, tmp_path, capsys):
    reproduce_gapt_view.print_table(found)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    assert re.search(r"^order_forgets_pos  (agrees|disagrees|inconclusive)  ", out, re.MULTILINE)
    for row in found.table.to_pylist():
        assert re.search(rf"^{row['arm']} ", out, re.MULTILINE)
    for suffix in ("png", "svg"):
        reproduce_gapt_view.plot(found, tmp_path / f"plot.{suffix}")
        assert (tmp_path / f"plot.{suffix}").stat().st_size > 5000


def test_the_summary_is_json(found):
    about = json.loads(json.dumps(reproduce_gapt_view.summary(found), allow_nan=False))
    assert about["agrees"] + about["disagrees"] + about["inconclusive"] == 1
    assert about["directory"] == str(found.path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gapt-conflict", {"no_map": True}, "--no-map goes with grok, not with gapt-conflict"),
        ("gapt-conflict", {"dtype": "bfloat16"}, "--dtype goes with grok, not with gapt-conflict"),
        ("gapt-conflict", {"data": "x.jsonl"}, "--data goes with gapt-lm; gapt-conflict makes its own data"),
        ("grok", {"data": "x.jsonl"}, "--data goes with gapt-lm; grok makes its own data"),
        ("gapt-lm", {"only": "held_out_cee"}, "no effect of gapt-lm 'held_out_cee'; .*did you mean 'held_out_ce'"),
        ("gapt-ml", {}, "no paper to reproduce 'gapt-ml'; .*did you mean 'gapt-lm'"),
        (
            "gapt-lm",
            {"preset": "paper", "only": "train_ce", "seeds": "0"},
            "gapt-lm --preset paper trains a model of 124",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, name, options, message):
    with pytest.raises(InputError, match=message):
        memdiag.reproduce(name, out=tmp_path / "out", **options)


def test_every_experiment_has_what_an_experiment_has():
    for name in GAPT:
        module = experiment(name)
        names = [arm.name for arm in module.ARMS]
        assert len(names) == len(set(names))
        assert len(SEEDS[name].split(",")) >= 5
        for preset in reproduce_report.PRESETS:
            effects = module.effects(preset)
            assert len({effect.name for effect in effects}) == len(effects) > 0
            for effect in effects:
                assert set(effect.arms()) <= set(names)
                assert effect.direction in (-1, 1)
            assert all(module.steps(preset, arm) > 0 for arm in names)
        assert all(arm.needs is None or arm.needs in names for arm in module.ARMS)


def test_rounds_put_what_is_needed_first():
    work = reproduce_gapt_run.work_of("gapt-lm", ReproduceOptions(only="held_out_ce", seeds="0,1"))
    first, second = work.rounds()
    assert first == [("none", 0), ("gapt", 0), ("none", 1), ("gapt", 1)]
    assert second == [("constant", 0), ("random", 0), ("constant", 1), ("random", 1)]


def test_the_plan_counts_runs_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = reproduce_report.plan("gapt-lm", ReproduceOptions())
    assert (plan["runs"], plan["updates"]) == (20, 20 * 600)
    assert list(tmp_path.iterdir()) == []


def test_language_modelling_is_train_gapt(monkeypatch):
    """The same arms, weights and shares as `memdiag train-gapt --compare`."""
    from memdiag import train_gapt_run
    from memdiag.reproduce_gapt import lm

    seen = []

    class Stopped(Exception):
        pass

    def run(checkpoint, options, out, *, force, progress):
        seen.append(options)
        raise Stopped

    monkeypatch.setattr(train_gapt_run, "run", run)
    given = {"share_compress": 0.25}
    for arm in lm.ARMS:
        with pytest.raises(Stopped):
            lm.run(arm.name, 7, "smoke", given if arm.needs else None, lambda n: None)
    assert [options.gate for options in seen] == ["none", "paper", "constant", "random"]
    assert [options.weight for options in seen] == [1.0, 1.0, 0.25, 1.0]
    assert seen[3].share == 0.25
    assert {options.seed for options in seen} == {7}


def test_a_report_can_be_made_again(found, tmp_path, capsys):
    from memdiag.cli import reports

    reports.rerun(found.path / "effects.parquet", out=tmp_path / "again", quiet=True)
    assert tables.read(tmp_path / "again" / "effects.parquet").table.equals(found.table)
