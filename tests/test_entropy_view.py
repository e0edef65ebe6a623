"""What people see of an entropy report: bars, tables, a summary, a plot. Reports here are made by hand."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree
from pathlib import Path

import pytest

from memdiag import drawing, entropy_view, tables
from memdiag.drawing import bar, sparkline
from memdiag.entropy_report import EntropyRow
from memdiag.errors import IncompleteError, InputError

NAMES = tables.schema_of(EntropyRow).names
PNG = b"\x89PNG\r\n\x1a\n"


def row(checkpoint="checkpoint-0", layer=0, unit="patch", pooling=None, **values):
    known = {
        "checkpoint": checkpoint,
        "step": int(checkpoint.rpartition("-")[2]) if "-" in checkpoint else None,
        "layer": layer,
        "layer_name": f"h.{layer}",
        "unit": unit,
        "pooling": pooling,
        "patch_size": 8 if unit == "patch" else None,
        "alpha": 2.0,
        "n_examples": 20,
        "truncated": 0,
        "n_units": 30,
        "n_undefined": 0,
        "n_tokens": 240,
        "n_tokens_dropped": 11,
        "n_dims": 32,
        "mbe": 1.0 + layer / 4,
        "mbe_se": 0.02,
        "mbe_lo": 0.9,
        "mbe_hi": 1.1,
        "mbe_max": math.log(8),
        "mbe_centred": 0.75,
        "mbe_row_normalised": 1.25,
        "effective_rank": 4.5,
        "mean_cosine": 0.125,
        "cross_entropy": 6.25,
    }
    return dict.fromkeys(NAMES) | known | values


def report(rows, path="out/e.parquet"):
    names = list(dict.fromkeys(r["checkpoint"] for r in rows))
    table = tables.pa.Table.from_batches([tables.to_batch(EntropyRow, rows)])
    return tables.Report(table, {"report": "entropy", "checkpoint": [{"name": n} for n in names]}, Path(path))


UNDEFINED = dict.fromkeys(
    [
        *("mbe", "mbe_se", "mbe_lo", "mbe_hi", "mbe_max", "mbe_centred", "mbe_row_normalised"),
        *("effective_rank", "mean_cosine", "cross_entropy"),
    ]
)
UNITS = (("patch", None), ("sequence", None), ("dataset", "mean"), ("dataset", "last"))
ONE = [row(layer=i) for i in range(3)]
RUN = [row(f"checkpoint-{step}", i, mbe=1 + step / 100 + i / 4) for step in (0, 50, 100) for i in range(3)]
ALL = [row("checkpoint-7", i, unit, pooling) for i in range(3) for unit, pooling in UNITS]
NULLS = [row("checkpoint-0", i, **UNDEFINED) for i in range(3)]
RUN_OF_NULLS = NULLS + [row("checkpoint-9", i, **UNDEFINED) for i in range(3)]
EVERY = {"one": ONE, "run": RUN, "all": ALL, "nulls": NULLS, "run of nulls": RUN_OF_NULLS, "mixed": NULLS + RUN[3:]}


# -- small drawings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, "    "),
        (1.0, "████"),
        (0.5, "██  "),
        (0.25 + 1 / 32, "█▏  "),
        (0.25 + 4 / 32, "█▌  "),
        (0.999, "████"),
        (-0.1, "    "),
        (1.0001, "████"),  # rounding may carry a share past its bound
        (None, "····"),
    ],
)
def test_bar(share, expected):
    assert bar(share, 4) == expected


def test_every_bar_is_equally_wide():
    assert {len(bar(i / 1000)) for i in range(1001)} == {10}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 7.0], "▁█"),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], "▁▂▃▄▅▆▇██"),
        ([3.0, 3.0, 3.0], "▁▁▁"),
        ([1.0, None, 2.0], "▁·█"),
        ([None, None], "··"),
        ([], ""),
        ([-2.0, -1.0], "▁█"),
    ],
)
def test_sparkline(values, expected):
    assert sparkline(values) == expected


def test_number():
    assert (drawing.number(1.23456), drawing.number(2.0, 1), drawing.number(None)) == (
        "1.235",
        "2.0",
        "–",
    )


# -- summary -------------------------------------------------------------------------------------------------------


def test_the_summary_is_of_the_last_checkpoint():
    figures = entropy_view.summary(report(RUN))
    assert figures == {
        "report": "out/e.parquet",
        "checkpoints": 3,
        "layers": 3,
        "examples": 20,
        "truncated": 0,
        "last_checkpoint": "checkpoint-100",
        "cross_entropy": 6.25,
        "mbe_patch": pytest.approx((2.0 + 2.25 + 2.5) / 3),
    }


def test_the_summary_names_every_unit():
    figures = entropy_view.summary(report(ALL))
    assert {name for name in figures if name.startswith("mbe")} == {
        "mbe_patch", "mbe_sequence", "mbe_dataset_mean", "mbe_dataset_last",
    }  # fmt: skip
    assert figures["layers"] == 3


def test_a_mean_leaves_out_what_is_undefined():
    rows = [row(layer=0, **UNDEFINED), row(layer=1, mbe=1.5)]
    assert entropy_view.summary(report(rows))["mbe_patch"] == 1.5
    assert entropy_view.summary(report(NULLS))["mbe_patch"] is None


def test_the_summary_says_where_gradients_are():
    found = report(ONE)
    found.meta["gradients"] = "e.gradients.parquet"
    assert entropy_view.summary(found)["gradients"] == "e.gradients.parquet"


@pytest.mark.parametrize("rows", EVERY.values(), ids=EVERY)
def test_the_summary_is_json(rows):
    figures = entropy_view.summary(report(rows))
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


# -- tables --------------------------------------------------------------------------------------------------------


@pytest.fixture
def printed(capsys, monkeypatch):
    """What print_table writes, 120 columns wide."""
    import rich.console

    monkeypatch.setattr(
        rich.console, "Console", lambda _of=rich.console.Console, **options: _of(**(options | {"width": 120}))
    )

    def of(rows, path="out/e.parquet"):
        entropy_view.print_table(report(rows, path))
        return capsys.readouterr().out

    return of


def test_a_table_has_the_figures_of_each_layer(printed):
    lines = printed(ONE).splitlines()
    assert lines[0] == "checkpoint-0  MBE of patches of 8 tokens, α = 2, cross-entropy 6.250 nats"
    assert lines[1].split("  ")[0] == "layer"
    assert " ".join(lines[3].split()) == "1 1.250 0.900 – 1.100 60% ██████ 0.750 1.250 4.50 0.12"
    assert "20 examples, 240 tokens in 30 units; 11 tokens in no unit" in lines
    assert lines[-1] == "report: out/e.parquet"
    assert not any("over" in line for line in lines)


def test_a_run_has_a_table_each_and_a_trend_per_layer(printed):
    text = printed(RUN)
    assert [line.split()[0] for line in text.splitlines() if "MBE of patches" in line] == [
        "checkpoint-0", "checkpoint-50", "checkpoint-100", "over",
    ]  # fmt: skip
    trend = text[text.index("over 3 checkpoints") :].splitlines()
    assert trend[3].split() == ["1", "1.250", "▁▅█", "2.250", "+1.000"]
    assert trend[5].split() == ["loss", "6.250", "▁▁▁", "6.250", "+0.000"]


def test_of_a_long_run_only_the_ends_are_shown(printed):
    text = printed([row(f"checkpoint-{step}", 0) for step in range(9)])
    assert "7 checkpoints between them are in the report" in text
    assert "checkpoint-8 " in text
    assert "checkpoint-4 " not in text


def test_notes_say_what_was_cut_and_what_is_limited(printed):
    text = printed([row(unit="dataset", pooling="last", truncated=3, n_limited=True)])
    assert "one vector an example, its last token" in text
    assert "3 examples truncated; fewer than 2 d examples: limited by n" in text
    assert "in no unit" not in text
    assert "whole sequences" in printed([row(unit="sequence")])
    assert "one vector an example, the mean of its tokens" in printed([row(unit="dataset", pooling="mean")])


def test_undefined_figures_are_dashes(printed):
    text = printed(RUN_OF_NULLS)
    assert text.splitlines()[2].split() == ["0", "–", "–", "–", "··········", "–", "–", "–", "–"]
    assert "nan" not in text.lower()
    assert "None" not in text
    assert "cross-entropy" not in text
    assert "loss" not in text


@pytest.mark.parametrize("name", ["a[/b]", "[red]x", "x\\", ":fire:", "a[b"])
def test_names_are_not_markup(printed, name):
    text = printed([row(name), row("other")], path=f"{name}/e.parquet")
    assert text.startswith(f"{name}  MBE")
    assert text.endswith(f"report: {name}/e.parquet\n")


@pytest.mark.parametrize("rows", EVERY.values(), ids=EVERY)
def test_tables_fit_in_100_columns_of_a_log(capsys, rows):
    entropy_view.print_table(report(rows))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines)


# -- plots ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", EVERY.values(), ids=EVERY)
def test_a_plot_is_drawn_of_everything(tmp_path, rows):
    entropy_view.plot(report(rows), tmp_path / "deep" / "e.svg")
    root = xml.etree.ElementTree.parse(tmp_path / "deep" / "e.svg").getroot()
    assert root.tag.endswith("svg")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["e.svg"]


def test_png_too(tmp_path):
    entropy_view.plot(report(RUN), tmp_path / "e.png")
    data = (tmp_path / "e.png").read_bytes()
    assert data.startswith(PNG)
    assert len(data) > 10_000
    entropy_view.plot(report(ONE), tmp_path / "E.PNG")
    assert (tmp_path / "E.PNG").read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", ["e.svg", "e.SVG", "e.png"])
def test_the_same_report_gives_the_same_bytes(tmp_path, name):
    for folder in ("a", "b"):
        entropy_view.plot(report(RUN), tmp_path / folder / name)
    data = (tmp_path / "a" / name).read_bytes()
    assert data == (tmp_path / "b" / name).read_bytes()
    assert b"<dc:date>" not in data


def test_a_plot_replaces_the_old_one(tmp_path):
    (tmp_path / "e.svg").write_text("old")
    entropy_view.plot(report(ONE), tmp_path / "e.svg")
    assert "old" not in (tmp_path / "e.svg").read_text()[:10]


@pytest.mark.parametrize("name", ["e.pdf", "e", "e.png.txt", "png", ".svg"])
def test_a_name_of_another_kind_is_refused(tmp_path, name):
    for use in (drawing.check_plot, lambda path: entropy_view.plot(report(ONE), path)):
        with pytest.raises(InputError, match=r"must end in \.png or \.svg") as caught:
            use(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_plot_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((InputError, IncompleteError), match="the report itself is done") as caught:
        entropy_view.plot(report(ONE), tmp_path / "file" / "e.png")
    assert "\n" not in str(caught.value)


def test_the_layers_and_steps_stand_on_the_axes(tmp_path):
    from matplotlib.figure import Figure

    seen = []

    class Kept(Figure):
        def savefig(self, *args, **options):
            seen.append(self)
            super().savefig(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure", Kept)
        entropy_view.plot(report(RUN), tmp_path / "e.svg")
    lines, image, *_ = seen[0].axes
    assert [label.get_text() for label in lines.get_xticklabels()] == ["0", "50", "100"]
    assert lines.get_legend_handles_labels()[1] == ["layer 0", "layer 1", "layer 2"]
    assert [list(line.get_ydata()) for line in lines.get_lines()[:1]] == [[1.0, 1.5, 2.0]]
    assert image.get_images()[0].get_array().tolist() == [[1.0, 1.5, 2.0], [1.25, 1.75, 2.25], [1.5, 2.0, 2.5]]
