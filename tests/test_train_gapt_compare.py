"""memdiag train-gapt --compare: the arms, the pairs, the intervals; and what people are shown."""

from __future__ import annotations

import json
import math
import re

import pytest

import memdiag
from memdiag import InputError, tables, train_gapt_compare, train_gapt_view
from memdiag.train_gapt_compare import compare_rows


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A comparison of seconds."""
    folder = tmp_path_factory.mktemp("inputs")
    small = {"model_type": "gpt2", "vocab_size": 270, "n_positions": 16, "n_embd": 16, "n_layer": 3, "n_head": 2}
    (folder / "config.json").write_text(json.dumps(small | {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}))
    texts = [{"text": f"The answer to {i} times two is {2 * i}. " * 3} for i in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return {
        "config": str(folder / "config.json"), "data": str(folder / "texts.jsonl"), "steps": 20, "batch_size": 2,
        "ce_patience": 2, "mbe_patience": 4, "ce_delta": 0.3, "mbe_delta": 0.3, "smoothing": 0.0, "save_every": 20,
    }  # fmt: skip


@pytest.fixture(scope="module")
def compared(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    return memdiag.train_gapt(compare=True, seeds=[0, 4, 7], out=out, **settings)


def summary(**values):
    last = {"val_ce": 3.0, "val_mbe": 1.0, "val_mbe_layers": [9.0, 1.0, 2.0, 3.0]} | values
    return {"saves": [last], "train_ce": 2.5, "active_layers": [2], "share_compress": 0.25, "weight": 1.0}


def val_ce_of_none(summaries):
    (row,) = [r for r in compare_rows(summaries) if (r["measure"], r["arm"]) == ("val_ce", "none")]
    return row


def test_differences_are_paired_by_seed():
    """The gated arm is always .1 lower, while seeds differ by 1: only pairs can tell."""
    gated = [summary(val_ce=3.0 + seed) for seed in range(4)]
    plain = [summary(val_ce=3.1 + seed) for seed in range(4)]
    row = next(
        r for r in compare_rows({"paper": gated, "none": plain}) if r["measure"] == "val_ce" and r["arm"] == "none"
    )
    assert row["difference"] == pytest.approx(-0.1)
    assert (row["difference_lo"], row["difference_hi"]) == pytest.approx((-0.1, -0.1))
    assert (row["n_lower"], row["n_seeds"]) == (4, 4)
    swapped = val_ce_of_none({"paper": gated, "none": plain[::-1]})
    assert swapped["difference_hi"] - swapped["difference_lo"] > 1


def test_other_layers_are_the_blocks_that_are_not_active():
    rows = compare_rows({"paper": [summary()], "none": [summary()]})
    (other,) = {row["mean"] for row in rows if row["measure"] == "val_mbe_other"}
    assert other == (1.0 + 3.0) / 2  # layers 1 and 3: 0 is the embedding, 2 is active


def test_nothing_held_out_is_null():
    rows = compare_rows({"paper": [summary(val_ce=None, val_mbe=None, val_mbe_layers=None)], "none": [summary()]})
    mine = {row["measure"]: row for row in rows if row["arm"] == "none"}
    assert mine["val_ce"]["difference"] is None
    assert mine["val_mbe_other"]["difference"] is None
    assert mine["train_ce"]["difference"] == 0.0


def test_the_controls_match_the_gate(compared):
    for seed in (0, 4, 7):
        arms = {
            arm: tables.read(compared.path / arm / f"seed-{seed}" / "history.parquet")
            for arm in ("paper", "none", "constant", "random")
        }
        n = {arm: report.table["phase"].to_pylist().count("compress") for arm, report in arms.items()}
        assert 0 < n["paper"] < 20
        assert n == {"paper": n["paper"], "none": 0, "constant": 20, "random": n["paper"]}
        weights = {arm: report.meta["options"]["weight"] for arm, report in arms.items()}
        assert weights == {"paper": 1.0, "none": 1.0, "constant": n["paper"] / 20, "random": 1.0}
        first = {arm: report.table["ce"][0].as_py() for arm, report in arms.items()}
        assert len(set(first.values())) == 1  # the same initial weights and the same first sequences
        assert arms["paper"].meta["identity"]["dataset"] == arms["none"].meta["identity"]["dataset"]


def test_the_rows_are_those_of_the_runs(compared):
    rows = {(row["measure"], row["arm"]): row for row in compared.table.to_pylist()}
    assert len(rows) == 4 * 4
    values = [
        json.loads((compared.path / arm / f"seed-{seed}" / "summary.json").read_text())["saves"][-1]["val_ce"]
        for arm in ("paper", "none")
        for seed in (0, 4, 7)
    ]
    assert rows["val_ce", "paper"]["mean"] == pytest.approx(sum(values[:3]) / 3, rel=1e-12)
    difference = sum(a - b for a, b in zip(values[:3], values[3:])) / 3
    assert rows["val_ce", "none"]["difference"] == pytest.approx(difference, rel=1e-9)
    assert rows["val_ce", "none"]["share_compress"] == 0.0
    assert all(math.isfinite(row["mean"]) for row in rows.values())


def test_the_same_comparison_again_is_there_already(compared, settings):
    before = {path: path.stat().st_mtime_ns for path in compared.path.rglob("*.parquet")}
    again = memdiag.train_gapt(compare=True, seeds="0,4,7", out=compared.path, **settings)
    assert again.table.equals(compared.table)
    assert before == {path: path.stat().st_mtime_ns for path in compared.path.rglob("*.parquet")}


def test_a_comparison_that_was_cut_off_trains_only_what_is_missing(compared, settings, tmp_path, monkeypatch):
    out = tmp_path / "cut"
    original = train_gapt_compare.workers.each

    def each(function, jobs, progress, **options):
        original(function, jobs[:2], progress, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_gapt_compare.workers, "each", each)
    with pytest.raises(KeyboardInterrupt):
        memdiag.train_gapt(compare=True, seeds="0,4,7", out=out, **settings)
    monkeypatch.undo()
    (first,) = out.glob("paper/seed-0/history.parquet")
    written = first.stat().st_mtime_ns
    found = memdiag.train_gapt(compare=True, seeds="0,4,7", out=out, **settings)
    assert found.table.equals(compared.table)
    assert first.stat().st_mtime_ns == written


def test_a_folder_with_something_else_in_it_is_left_alone(settings, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes.txt, which is not of this comparison"):
        memdiag.train_gapt(compare=True, out=tmp_path, **settings)


# -- what people are shown -----------------------------------------------------------------------------------------


def test_the_table_shows_every_arm_of_every_measure(compared, capsys):
    train_gapt_view.print_table(compared)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    for title in train_gapt_view.MEASURES.values():
        assert title in out
    assert len(re.findall(r"^(?:paper|none|constant|random) ", out, re.MULTILINE)) == 16
    assert re.search(r"^none +1 +0% +\d\.\d{3} ", out, re.MULTILINE)


def test_the_table_of_a_run_shows_its_curves_and_saves(compared, capsys):
    from memdiag import train_gapt_run

    found = train_gapt_run.read(compared.path / "paper" / "seed-0")
    train_gapt_view.print_table(found)
    out = capsys.readouterr().out
    share = found.summary["share_compress"]
    assert "gate paper  w 1 on layers 2  20 updates, 600 tokens" in out
    assert f"{share:.0%} compress" in out
    marks = re.search(r"phase +([█▁]+)", out)[1]
    assert marks.count("█") == round(20 * share)
    assert re.search(r"^ +20 +\d\.\d{3} ", out, re.MULTILINE)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plots_are_written(compared, tmp_path, suffix):
    from memdiag import train_gapt_run

    for found in (compared, train_gapt_run.read(compared.path / "random" / "seed-4")):
        path = tmp_path / f"plot.{suffix}"
        train_gapt_view.plot(found, path)
        assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm")
        assert path.stat().st_size > 5000


def test_ranges_and_stretches():
    assert train_gapt_view._ranges([2, 3, 4, 7, 9, 10]) == "2-4,7,9-10"
    assert train_gapt_view._stretches(["memorize", "compress", "compress", "memorize", "compress"]) == [(1, 2), (4, 4)]
    assert train_gapt_view._thinned([1.0, None, 3.0]) == [1.0, None, 3.0]
    long = train_gapt_view._thinned([float(i) for i in range(480)])
    assert long == [10 * i + 4.5 for i in range(48)]


def test_summary_is_json(compared):
    found = train_gapt_view.summary(compared)
    assert json.loads(json.dumps(found, allow_nan=False))["directory"] == str(compared.path)
    assert len(found["rows"]) == 16
