"""What people see of a score report."""

from __future__ import annotations

import numpy as np
import pytest

import memdiag
from memdiag import score_report, score_summary, score_view, tables
from memdiag.checkpoint import save
from memdiag.models.mlp import MLP, MlpConfig


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    where = tmp_path_factory.mktemp("view") / "net"
    save(where, MLP(MlpConfig((64, 8, 10))))
    return where


def test_the_table_fits_100_columns_and_names_the_truth(net, tmp_path, capsys):
    how = {"data": "task:digits?corruption=0.3", "limit": 40, "truth": "corrupted"}
    report = memdiag.score(net, out=tmp_path / "s.parquet", **how)
    score_view.print_table(report)
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()[:-1]) <= 100
    assert "AUC" in out
    assert "highest by" in out
    assert "m-coherence" in out
    assert str(tmp_path / "s.parquet") in out


def test_without_truth_there_are_intervals_of_means_and_no_auc(net, tmp_path, capsys):
    report = memdiag.score(net, out=tmp_path / "s.parquet", data="task:digits", limit=40)
    score_view.print_table(report)
    out = capsys.readouterr().out
    assert "95 % interval" in out
    assert "AUC" not in out
    assert set(score_view.summary(report)["scores"]) == set(report.meta["scores"])


def test_what_texts_hold_cannot_steer_the_terminal(fixtures, tmp_path, capsys):
    import json

    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "\x1b[31mred", "text": "\x1b]0;title\x07 [bold]x[/bold] " * 9}))
    report = memdiag.score(fixtures / "tiny-gpt2", out=tmp_path / "s.parquet", data=tmp_path / "t.jsonl")
    score_view.print_table(report)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[bold]x[/bold]" in out


def test_the_plot_is_the_same_twice(net, tmp_path):
    report = memdiag.score(net, out=tmp_path / "s.parquet", data="task:digits", limit=40)
    for name in ("a.svg", "b.svg"):
        score_view.plot(report, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.svg").stat().st_size > 10_000


def test_the_summary_of_a_large_report_is_of_a_sample_and_the_highest_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(score_summary, "MOST", 100)
    row = score_report.row_of(("loss", "margin"), classifier=True, language=False, truth=False, ranks=False)
    n = 1000
    values = np.random.default_rng(0).permutation(n).astype(float)
    columns = {
        "example_id": [str(i) for i in range(n)], "row": np.arange(n), "label": np.zeros(n, dtype=np.int64),
        "loss": values, "margin": -values,
    }  # fmt: skip
    tables.write(tmp_path / "s.parquet", row, [tables.from_columns(row, columns)], {"report": "score"})
    found, ranks = score_summary.summary_of(tmp_path / "s.parquet", ("loss", "margin"), truth=False, ranks=True, seed=0)
    assert (found["n"], found["n_sample"]) == (1000, 100)
    best = [int(example["example_id"]) for example in found["scores"]["loss"]["top"]]
    assert values[best].tolist() == [999, 998, 997, 996, 995]
    assert found["agreement"][0]["value"] == pytest.approx(1)  # low margin is memorized
    assert ranks["margin"][best[0]] == 1
