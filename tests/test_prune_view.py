"""What people see of a pruning experiment: summary, table, curves as characters, plot. Needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

import memdiag
from memdiag import drawing, prune_view
from memdiag.errors import InputError
from memdiag.prune_report import Pruned


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """Two small networks, filtered as well."""
    out = tmp_path_factory.mktemp("view") / "out"
    return memdiag.prune_memorizers(
        out=out, data="task:modular-addition?p=13", width=24, corruption=0.3, steps=60, seeds="0,1", n=5,
        filter_frequencies=True,
    )  # fmt: skip


@pytest.fixture
def printed(found: Pruned, capsys: pytest.CaptureFixture[str]) -> list[str]:
    prune_view.print_table(found)
    return capsys.readouterr().out.splitlines()


def test_the_table_has_before_after_and_controls(found: Pruned, printed: list[str]) -> None:
    networks = found.meta["networks"]
    heads = [i for i, line in enumerate(printed) if line.startswith("seed ")]
    assert len(heads) == 2
    assert "24 neurons" in printed[heads[0]]
    for head, network in zip(heads, networks):
        titles = printed[head + 1].split()
        assert titles[:5] == ["accuracy,", "loss", "before", "5", "pruned"]
        (row,) = [line for line in printed[head : head + 10] if line.startswith("clean ")]
        cells = row.split()
        assert cells[1] == f"{network['before']['train_clean_acc']:.3f}"
        assert cells[2] == f"{network['chosen']['train_clean_acc']:.3f}"
        assert cells[3] == f"{network['random']['train_clean_acc']['mean']:.3f}"
    assert any("--n 5" in line for line in printed)
    assert any(line.startswith("strongest frequency of each curve alone: corrupted") for line in printed)
    assert printed[-1] == f"directory: {found.path}"
    assert max(map(len, printed)) <= 100


def test_curves_are_heights_of_a_fixed_scale(printed: list[str]) -> None:
    curves = [line for line in printed if line.startswith(("     clean  ", " corrupted  ", "      test  "))]
    assert len(curves) == 6
    for line in curves:
        mine, control = line[12:].split("  random  ")
        assert len(mine) == len(control) == prune_view.SPARK_POINTS
        assert set(mine + control) <= set(drawing.SPARKS)
    arrow = next(line for line in printed if line.endswith("↑ 5"))
    assert arrow.index("↑") == 12 + round(5 / 24 * (prune_view.SPARK_POINTS - 1))


@pytest.mark.parametrize(
    ("shares", "expected"), [([0.0, 0.12, 0.13, 0.5, 0.99, 1.0], "▁▁▂▅██"), ([], ""), ([1.0], "█")]
)
def test_heights_by_hand(shares: list[float], expected: str) -> None:
    assert drawing.heights(shares) == expected


def test_values_along_a_curve_are_interpolated_and_averaged() -> None:
    def row(fraction: float, value: float, draw: int | None = None) -> dict[str, Any]:
        return {"fraction_pruned": fraction, "test_acc": value, "draw": draw}

    line = prune_view._along([row(0, 1.0), row(1, 0.0)], "test_acc")
    assert line is not None
    assert line[0] == 1.0
    assert line[-1] == 0.0
    assert line[1] == pytest.approx(1 - 1 / (prune_view.SPARK_POINTS - 1))
    mean = prune_view._along([row(0, 1.0, 0), row(1, 0.0, 0), row(0, 0.0, 1), row(1, 0.0, 1)], "test_acc")
    assert mean is not None
    assert mean[0] == 0.5
    assert prune_view._along([row(0, 1.0) | {"test_acc": None}], "test_acc") is None
    assert prune_view._along([], "test_acc") is None


def test_the_histogram_leaves_out_dead_neurons() -> None:
    bins = prune_view.ipr_histogram([{"ipr": x} for x in (0.0, 0.04, 0.05, 0.99, 1.0, None)])
    assert len(bins) == 20
    assert (bins[0], bins[1], bins[19], sum(bins)) == (2, 1, 2, 5)


def test_the_summary_is_json_with_the_figures(found: Pruned) -> None:
    summary = json.loads(json.dumps(prune_view.summary(found)))
    assert summary["directory"] == str(found.path)
    assert [network["seed"] for network in summary["networks"]] == [0, 1]
    assert {"pruning", "neurons", "dynamics", "filtration"} < set(summary)


def test_the_plot_is_an_image_of_every_network(found: Pruned, tmp_path: Path) -> None:
    for name in ("p.svg", "again.svg", "p.png"):
        prune_view.plot(found, tmp_path / name)
    assert (tmp_path / "p.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    text = " ".join(xml.etree.ElementTree.parse(tmp_path / "p.svg").getroot().itertext())
    assert "svg" in (tmp_path / "p.svg").read_text()
    assert text is not None
    with pytest.raises(InputError, match=r"must end in \.png or \.svg"):
        prune_view.plot(found, tmp_path / "p.pdf")


def test_a_checkpoint_has_curves_only(found: Pruned, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found.path is not None
    other = memdiag.prune_memorizers(found.path / "seed-0" / "trained", truth="corrupted", out=tmp_path / "out", n=2)
    prune_view.print_table(other)
    printed = capsys.readouterr().out
    assert printed.startswith("trained  24 neurons; examples: ")
    assert "IPR" not in printed
    prune_view.plot(other, tmp_path / "c.svg")
    assert (tmp_path / "c.svg").stat().st_size > 1000


def test_looking_at_a_report_needs_no_torch(found: Pruned) -> None:
    code = (
        "import sys\nfrom memdiag import prune_view, tables\nfrom memdiag.prune_report import Pruned\n"
        f"p, n = (tables.read({str(found.path)!r} + f'/{{x}}.parquet') for x in ('pruning', 'neurons'))\n"
        "prune_view.print_table(Pruned(p, n, None, None, None))\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
