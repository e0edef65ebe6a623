"""`memdiag reproduce`: the arithmetic of claims, what is looked at in a network, and the command as a whole."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from statistics import fmean

import numpy as np
import pytest
from scipy import stats

import memdiag
from memdiag import grokking, reproduce_grok, reproduce_report, reproduce_run, reproduce_view, tables, workers
from memdiag.errors import InputError
from memdiag.reproduce_claims import Claim, judge, mean_of, t_interval, values, verdict
from memdiag.reproduce_grok import looks, networks, phases
from memdiag.reproduce_grok.claims import claims
from memdiag.reproduce_report import ClaimRow, PhaseRow, ReproduceOptions

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# -- arithmetic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.5, 0.4, 0.6, "holds"),
        (0.4, 0.4, 0.6, "holds"),  # the ends count
        (0.6, 0.4, 0.6, "holds"),
        (0.39, 0.4, 0.6, "differs"),
        (0.61, 0.4, 0.6, "differs"),
        (1e9, 0.4, None, "holds"),
        (-1e9, None, 0.6, "holds"),
        (0.7, None, 0.6, "differs"),
        (0.3, 0.4, None, "differs"),
        (0.5, None, None, "not_comparable"),
        (None, 0.4, 0.6, "not_comparable"),
        (None, None, None, "not_comparable"),
        (0.0, 0.0, None, "holds"),
    ],
)
def test_verdict(value, low, high, expected):
    assert verdict(value, low, high) == expected


def test_a_step_that_never_came_differs():
    assert verdict(None, 1, 5, is_event=True) == "differs"
    assert verdict(None, None, None, is_event=True) == "not_comparable"


def test_interval_by_hand():
    lo, hi = t_interval([1.0, 2.0, 3.0])  # s = 1, t(0.975, 2) = 4.302653
    assert lo == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert hi == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
    assert t_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


@pytest.mark.parametrize("n", [3, 4, 10])
def test_interval_agrees_with_the_definition(n):
    numbers = np.random.default_rng(n).normal(size=n).tolist()
    mean = sum(numbers) / n
    total = 0.0
    for x in numbers:
        total += (x - mean) ** 2
    se = math.sqrt(total / (n - 1)) / math.sqrt(n)
    assert t_interval(numbers) == pytest.approx(stats.t.interval(0.95, n - 1, loc=mean, scale=se), abs=1e-12)
    moved = t_interval([2 * x + 5 for x in numbers])
    assert moved == pytest.approx([2 * x + 5 for x in t_interval(numbers)], abs=1e-12)


@pytest.mark.parametrize(
    "numbers", [[], [1.0], [1.0, 2.0], [1.0, 2.0, None], [None, None, None], [1.0, 2.0, 3.0, None]]
)
def test_no_interval_where_there_is_none(numbers):
    assert t_interval(numbers) == (None, None)


def test_mean_of_what_is_undefined_in_one_seed_is_undefined():
    assert mean_of([1.0, 3.0]) == 2.0
    assert mean_of([1.0, None]) is None
    assert mean_of([]) is None


FIGURES = {
    "net": {0: {"acc": 0.9, "step": 50.0}, 1: {"acc": 0.8, "step": None}},
    "other": {0: {"acc": 0.5, "step": 20.0}, 1: {"acc": 0.1, "step": 20.0}},
}


def test_differences_are_taken_seed_by_seed():
    assert values(FIGURES, "net.acc", "other.acc") == pytest.approx([0.4, 0.7])
    assert values(FIGURES, "net.step", "other.step") == [30.0, None]
    assert values(FIGURES, "net.acc") == [0.9, 0.8]


def _claim(**more):
    return Claim(**({"name": "n", "statement": "s", "setting": "t", "measure": "m", "ours": "net.acc"} | more))


def test_judging_fills_every_column():
    claim = _claim(low=0.8, high=0.9, paper=0.85, control="the other", control_ours="other.acc")
    row = judge(claim, FIGURES)
    assert set(row) == {field.name for field in dataclasses.fields(ClaimRow)}
    assert row["ours"] == pytest.approx(0.85)
    assert row["control_value"] == pytest.approx(0.3)
    assert (row["ours_lo"], row["n_seeds"], row["verdict"]) == (None, 2, "holds")
    assert claim.networks() == {"net", "other"}


def test_judging_what_never_happened():
    assert judge(_claim(ours="net.step", high=60, is_event=True), FIGURES)["verdict"] == "differs"
    assert judge(_claim(ours="net.step", high=60), FIGURES)["verdict"] == "not_comparable"


# -- what is looked at ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test", "corruption", "grokked", "expected"),
    [
        (0.98, 0.98, 0.35, True, "coexistence"),
        (0.78, 1.0, 0.35, True, "partial_inversion"),
        (0.71, 1.0, 0.35, True, "partial_inversion"),
        (0.65, 1.0, 0.35, True, "full_inversion"),
        (0.901, 1.0, 0.1, True, "coexistence"),  # fully inverted, but the rule cannot see it
        (1.0, 0.3, 0.35, False, "memorization"),
        (0.01, 0.01, 0.35, True, "forgetting"),
        (0.69, 0.07, 0.35, False, "confusion"),
    ],
)
def test_the_papers_rule(train, test, corruption, grokked, expected):
    at = {"train_acc": train, "test_acc": test}
    assert phases.phase_by_paper(at, corruption, grokked=grokked) == expected


def test_the_rules_agree_where_noise_is_large():
    for corrupted in (0.95, 0.5, 0.01):
        at = {"train_corrupted_acc": corrupted, "test_acc": 1.0, "train_acc": 0.65 + 0.35 * corrupted}
        by_paper = phases.phase_by_paper(at, 0.35, grokked=True)
        assert by_paper == grokking.phase(at, 97, grokked=True)


def test_events():
    rows = [
        {"step": step, "train_acc": train, "test_acc": test, "train_corrupted_acc": corrupted}
        for step, train, test, corrupted in [
            (0, 0.01, 0.01, 0.01),  # little agreement at the start is not unlearning
            (10, 0.6, 0.01, 0.7),
            (20, 0.995, 0.02, 0.99),
            (30, 0.9, 0.991, 0.3),
            (40, 0.7, 1.0, 0.04),
            (50, 0.7, 1.0, 0.01),
        ]
    ]
    assert reproduce_grok.events(rows) == {"step_train": 20, "step_test": 30, "step_unlearned": 40}
    assert reproduce_grok.events(rows[:3]) == {"step_train": 20, "step_test": None, "step_unlearned": None}
    assert reproduce_grok.events(rows[:1]) == {"step_train": None, "step_test": None, "step_unlearned": None}


def test_along_a_curve():
    rows = [
        {
            "n_pruned": n,
            "train_corrupted_acc": max(0.0, 0.9 - n / 10),
            "test_acc": 1.0 if n in (2, 3) else 0.98 - n / 20,
        }
        for n in range(11)
    ]
    found = looks.along(rows)
    assert (found["needs"], found["share"]) == (9, 0.9)
    assert found["corrupted_at_30"] == pytest.approx(0.6)
    assert found["test_at_50"] == pytest.approx(0.73)
    assert (found["best_test"], found["kept"]) == (1.0, 3)
    assert found["worst_test"] == pytest.approx(0.98 - 8 / 20)  # up to 83 per cent


def test_auc_by_hand_and_by_counting_pairs():
    assert looks.auc(np.array([1.0, 2.0, 3.0]), np.array([False, False, True])) == 1.0
    assert looks.auc(np.array([1.0, 1.0]), np.array([False, True])) == 0.5
    assert looks.auc(np.array([1.0, 2.0]), np.array([True, True])) is None
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 5, 30).astype(float), rng.random(30) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert looks.auc(score, positive) == pytest.approx(fmean(pairs))
    assert looks.auc(-score, positive) == pytest.approx(1 - fmean(pairs))


def test_figures_of_the_map():
    cell = {"p": 97, "weight_decay": 15.0, "corruption": 0.4, "phase": "full_inversion"}
    rows = [
        cell | {"train_fraction": 0.5, "phase_paper_rule": "full_inversion"},  # F in the earlier map
        cell | {"train_fraction": 0.2, "phase_paper_rule": "coexistence"},  # M there
        cell | {"train_fraction": 0.2, "phase_paper_rule": "memorization", "corruption": 0.7},  # not there
    ]
    found = phases.map_figures(rows)
    assert (found["full_inversion_15"], found["memorization_15"], found["like_earlier"]) == (3, 0, 0.5)
    assert phases.map_figures([row | {"p": 59} for row in rows])["like_earlier"] is None


def _small(network, **training):
    """The same network in a fraction of a second."""
    training = {"width": 16, "steps": 20, "eval_every": 10, **training}
    settled = dataclasses.replace(network.setting.training, **training)
    return dataclasses.replace(network, setting=dataclasses.replace(network.setting, p=11, training=settled))


@pytest.mark.parametrize("preset", reproduce_report.PRESETS)
def test_every_claim_names_what_is_measured(preset):
    figures, cells = {}, []
    small = [_small(network) for network in networks.networks(preset, "float32")]
    for network in small:
        row, found = reproduce_grok.measured(network, 0, lambda n: None)
        assert set(row) == {field.name for field in dataclasses.fields(PhaseRow)}
        figures[network.name] = {0: found}
        cells += [row] if network.in_map else []
    figures["map"] = {0: phases.map_figures(cells)}
    rows = [judge(claim, figures) for claim in claims(preset)]
    assert len({row["name"] for row in rows}) == len(rows)
    used = set().union(*(claim.networks() for claim in claims(preset)))
    assert {network.name for network in small if not network.in_map} == used - {"map"}
    tables.to_batch(ClaimRow, rows)  # fits its declaration


@pytest.mark.parametrize("preset", reproduce_report.PRESETS)
def test_claims_are_whole(preset):
    for claim in claims(preset):
        assert claim.band_from in ("paper", "reference", "definition", "none")
        assert (claim.band_from == "none") == (claim.low is None and claim.high is None)
        assert (claim.control is None) == (claim.control_ours is None)
        assert claim.low is None or claim.high is None or claim.low <= claim.high
        assert claim.paper is None or not claim.paper_note.startswith("not given")
        if claim.band_from == "paper":
            assert claim.paper is not None
            assert verdict(claim.paper, claim.low, claim.high) == "holds"


def test_bfloat16_is_for_closed_forms_only():
    dtypes = {n.name: n.setting.training.dtype for n in networks.networks("paper", "bfloat16")}
    assert {name for name, dtype in dtypes.items() if dtype == "float32"} == {
        "no_norm", "batch_norm", "batch_norm_long", "layer_norm", "transformer_0", "transformer_2", "transformer_10",
    }  # fmt: skip


# -- the whole -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """The smoke preset with networks that take no time, in this process."""
    made = [_small(network) for network in networks._smoke()]
    monkeypatch.setattr(networks, "_smoke", lambda: made)
    monkeypatch.setattr(workers.os, "cpu_count", lambda: 1)


def _run(*arguments, **more):
    command = [sys.executable, "-m", "memdiag", "reproduce", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **more)


def _bytes(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_the_reports(tiny, tmp_path):
    found = memdiag.reproduce("grok", out=tmp_path / "out", seeds=[0, 1, 2])
    assert sorted(_bytes(tmp_path / "out")) == ["claims.parquet", "phases.parquet"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no parts are left
    rows = found.phases.table.to_pylist()
    cells = [row for row in rows if row["in_map"]]
    assert len(cells) == 3 * 3 * 2
    assert {row["seed"] for row in cells} == {0}
    assert len(rows) - len(cells) == 6 * 3
    assert found.table.num_rows == len(claims("smoke"))
    assert found.to_pandas()["n_seeds"].isin([1, 3]).all()
    for report, row in ((found.claims, ClaimRow), (found.phases, PhaseRow)):
        assert report.table.schema.remove_metadata().equals(tables.schema_of(row).remove_metadata())
        assert report.meta["report"] == row.report
        assert report.meta["options"] == {"name": "grok", **dataclasses.asdict(ReproduceOptions(seeds="0,1,2"))}
        assert report.meta["seed"] == [0, 1, 2]
        assert {"schema_version", "memdiag_version", "identity", "torch", "device", "dtype"} <= set(report.meta)
        assert reproduce_report.options_of(report) == ("grok", ReproduceOptions(seeds="0,1,2"))


def test_in_memory(tiny):
    found = memdiag.reproduce("grok", only=["inverted_test"], seeds=[3])
    assert found.path is None
    assert found.claims.path is None
    assert found.table["name"].to_pylist() == ["inverted_test"]
    assert {row["network"] for row in found.phases.table.to_pylist()} == {"inverted", "coexistence"}


def test_one_seed_has_no_interval(tiny, tmp_path):
    row = memdiag.reproduce(out=tmp_path / "out", only="inverted_test", seeds="0").table.to_pylist()[0]
    assert row["ours"] is not None
    assert (row["ours_lo"], row["ours_hi"], row["n_seeds"]) == (None, None, 1)


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tiny, tmp_path, monkeypatch):
    options = {"only": "inverted_test,map_inversion", "seeds": "0,1,2"}
    memdiag.reproduce(out=tmp_path / "whole", **options)
    trained, real, stops = [], reproduce_run._one, [4, 9]

    def falls_over(job, advance):
        if stops and len(trained) == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        trained.append(job[0].name)
        real(job, advance)

    monkeypatch.setattr(reproduce_run, "_one", falls_over)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            memdiag.reproduce(out=tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    memdiag.reproduce(out=tmp_path / "out", **options)
    assert len(trained) == 2 * 3 + 18  # nothing was done twice
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_what_was_begun_serves_other_claims_and_seeds(tiny, tmp_path, monkeypatch):
    real = reproduce_run._assemble
    monkeypatch.setattr(reproduce_run, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        memdiag.reproduce(out=tmp_path / "out", only="inverted_test", seeds="0")
    monkeypatch.setattr(reproduce_run, "_assemble", real)
    with pytest.raises(InputError, match="differs in dtype"):
        memdiag.reproduce(out=tmp_path / "out", only="inverted_test", dtype="bfloat16")
    trained, one = [], reproduce_run._one
    monkeypatch.setattr(reproduce_run, "_one", lambda job, advance: (trained.append(job[:2]), one(job, advance)))
    memdiag.reproduce(out=tmp_path / "out", only="inverted_test,partial_corrupted", seeds="0,1")
    assert [(network.name, seed) for network, seed in trained] == [
        ("coexistence", 1), ("partial", 0), ("partial", 1), ("inverted", 1),
    ]  # fmt: skip


def test_there_already(tiny, tmp_path, monkeypatch):
    first = memdiag.reproduce(out=tmp_path / "out", only="inverted_test")
    monkeypatch.setattr(reproduce_run, "_one", None)  # nothing may be trained
    assert memdiag.reproduce(out=tmp_path / "out", only="inverted_test").table.equals(first.table)
    with pytest.raises(InputError, match=r"differs in options\.seeds"):
        memdiag.reproduce(out=tmp_path / "out", only="inverted_test", seeds="5")


def test_force(tiny, tmp_path):
    memdiag.reproduce(out=tmp_path / "out", only="inverted_test")
    before = _bytes(tmp_path / "out")
    found = memdiag.reproduce(out=tmp_path / "out", only="inverted_test", seeds="5,6,7", force=True)
    assert found.meta["seed"] == [5, 6, 7]
    assert _bytes(tmp_path / "out") != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "gork"},
            "no paper to reproduce 'gork'; there are gapt-conflict, .*; did you mean 'grok'",
        ),
        ({"preset": "papre"}, "no preset 'papre'; there are paper, smoke; did you mean 'paper'"),
        ({"only": "inverted_tset"}, "no claim of the preset smoke 'inverted_tset'; .*did you mean 'inverted_test'"),
        ({"only": " , "}, "names no claim"),
        ({"seeds": "0,0"}, "wanted different whole numbers"),
        ({"seeds": "0,-1"}, "wanted different whole numbers"),
        ({"seeds": ""}, "wanted different whole numbers"),
        ({"dtype": "float16"}, "no dtype for training 'float16'"),
        ({"only": "map_inversion", "no_map": True}, "--only map_inversion is about the phase map; leave out --no-map"),
        ({"steps": 3}, "no option 'steps'"),
    ],
)
def test_bad_input(tiny, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        memdiag.reproduce(options.pop("name", "grok"), out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_place(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; give a directory"):
        memdiag.reproduce(out=tmp_path / "file", only="inverted_test")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="is not empty and holds no report"):
        memdiag.reproduce(out=tmp_path / "mine", only="inverted_test")


def test_without_the_map(tiny, tmp_path):
    found = memdiag.reproduce(out=tmp_path / "out", no_map=True, seeds="0")
    assert "map_inversion" not in found.table["name"].to_pylist()
    assert found.table.num_rows == len(claims("smoke")) - 1
    assert not any(found.phases.table["in_map"].to_pylist())
    with pytest.raises(InputError, match="leaves it out"):
        reproduce_view.plot(memdiag.reproduce(only="inverted_test", seeds="0"), tmp_path / "map.png")


def test_on_screen(tiny, tmp_path, capsys):
    found = memdiag.reproduce(out=tmp_path / "out")
    reproduce_view.print_table(found)
    shown = capsys.readouterr().out
    rows = found.table.to_pylist()
    for row in rows:
        assert f"\n{row['name']} " in f"\n{shown}"
        assert (f"\n{row['name']}: " in shown) == (row["verdict"] == "differs")  # its details
    assert f"{len(rows)} claims: " in shown
    assert shown.index("weight decay 0\n") < shown.index("weight decay 10\n") < shown.index("M memorization")
    assert str(tmp_path / "out") in shown
    head = reproduce_view.summary(found)
    assert head["holds"] + head["differs"] + head["not_comparable"] == len(rows)
    json.dumps(head, allow_nan=False)


def test_plot(tiny, tmp_path):
    found = memdiag.reproduce(seeds="0", only="map_inversion")
    for name in ("map.png", "map.svg"):
        reproduce_view.plot(found, tmp_path / name)
        first = (tmp_path / name).read_bytes()
        reproduce_view.plot(found, tmp_path / name)
        assert (tmp_path / name).read_bytes() == first
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"ours": 0.9834, "ours_lo": 0.97, "ours_hi": 0.99, "low": 0.97, "high": None},
            ("0.9834 ± 0.0100", ">= 0.97"),
        ),
        ({"ours": 255.4, "ours_lo": None, "ours_hi": None, "low": 250, "high": 260}, ("255.4", "250 – 260")),
        ({"ours": None, "ours_lo": None, "ours_hi": None, "low": None, "high": None}, ("–", "–")),
        (
            {"ours": 1 / 97, "ours_lo": None, "ours_hi": None, "low": 1 / 97 - 1e-6, "high": 1 / 97 + 1e-6},
            ("0.0103093", "0.01030828 – 0.01031028"),
        ),
    ],
)
def test_how_figures_are_shown(row, expected):
    assert (reproduce_view.ours(row), reproduce_view.band(row)) == expected


def test_plan(tiny):
    plan = reproduce_report.plan("grok", ReproduceOptions(only="inverted_test"))
    assert (plan["claims"], plan["networks"], plan["steps"]) == (1, 6, 120)
    assert plan["seconds_expected"] < 5
    assert min(plan["processes"], plan["memory_expected_mb"], plan["disk_expected_kb"]) > 0


# -- the command ---------------------------------------------------------------------------------------------------


def test_dry_run_writes_nothing(tmp_path):
    done = _run("grok", "--only", "product_natural", "--dry-run", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["networks"] == 3
    assert list(tmp_path.iterdir()) == []


def test_bad_input_of_the_command(tmp_path):
    done = _run("grok", "--no-map", "--plot", "map.png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "memdiag: --plot draws the phase map; leave out --no-map\n")
    done = _run("grok", "--plot", "map.gif", cwd=tmp_path)
    assert done.returncode == 2
    assert "must end in .png or .svg" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_claim_of_the_smoke_preset_from_end_to_end_and_after_kill(tmp_path):
    arguments = ["grok", "--only", "product_natural", "--seeds", "0,1", "--json"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "memdiag", "reproduce", *arguments, "--out", "killed"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    parts = tmp_path / ".killed.parts"
    while killed.poll() is None and not list(parts.glob("*.parquet")):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for name in ("killed", "whole"):
        done = _run(*arguments, "--out", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        claim = json.loads(done.stdout)["claims"][0]
        assert claim["verdict"] == "holds"
        assert claim["ours"] < 0.1 < 0.4 < claim["control_value"]
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")
