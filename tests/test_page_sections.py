"""What a page says of each kind of report: figures against their definitions, and a section of whatever comes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

import memdiag
from memdiag import agreement, mean_interval, page_svg, score_view, tables
from memdiag.cli import app
from memdiag.errors import InputError
from memdiag.page import Section
from memdiag.page_sections import KINDS, building, panels, plain, provenance, section_of, shown
from memdiag.page_sections.building import Building
from memdiag.page_sections.entropy import t_ends
from memdiag.report_kinds import ROWS, row_of
from memdiag.report_sql import opened

LEFT_OUT = "left out"


# -- reports made by hand ------------------------------------------------------------------------------------------


def parquet(path, columns, meta, schema=None, row_group_size=None):
    """A report that any program may have written."""
    table = pa.table(columns, schema=schema) if schema is not None else pa.table(columns)
    table = table.replace_schema_metadata({tables.KEY: json.dumps(meta).encode()})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def values_of(type_, n, rng, *, nulls):
    if nulls:
        return [None] * n
    if pa.types.is_boolean(type_):
        return rng.integers(0, 2, n).astype(bool).tolist()
    if pa.types.is_integer(type_):
        return rng.integers(0, 5, n).tolist()
    if pa.types.is_floating(type_):
        return rng.random(n).tolist()
    if pa.types.is_list(type_):
        return [rng.random(3).tolist() for _ in range(n)]
    return rng.choice(["a", "<b>", "memorization", "random", "$x^2$", "treated", "compress"], n).tolist()


def random_report(path, kind, n, meta, *, seed=0, nulls=False):
    rng = np.random.default_rng([seed, n])
    schema = tables.schema_of(row_of(kind))
    fields = [pa.field(field.name, field.type) for field in schema]
    columns = {f.name: values_of(f.type, n, rng, nulls=nulls and schema.field(f.name).nullable) for f in fields}
    return parquet(path, columns, meta, pa.schema(fields))


def scores(path, n=200, *, truth=True, order=None, meta=None):
    """A score report with the metadata that the command writes."""
    rng = np.random.default_rng(1)
    loss, margin, true = rng.exponential(size=n), rng.normal(size=n), rng.random(n) < 0.2
    margin[true] -= 2
    columns = {
        "example_id": [f"e{i}" for i in range(n)], "row": np.arange(n), "label": rng.integers(0, 10, n), "loss": loss,
        "margin": margin, **({"truth": true} if truth else {}),
    }  # fmt: skip
    order = np.arange(n) if order is None else order
    columns = {name: np.asarray(values)[order] for name, values in columns.items()}
    about = {
        name: {
            "mean": dataclasses.asdict(agreement.mean(values)),
            "n_null": 0,
            **({"auc": dataclasses.asdict(agreement.auc(turned, true))} if truth else {}),
            **({"found_in_top": dataclasses.asdict(agreement.found_in_top(turned, true))} if truth else {}),
            "top": [{"example_id": f"e{i}", "label": 3} for i in np.argsort(-turned)[:5]],
        }
        for name, values, turned in (("loss", loss, loss), ("margin", margin, -margin))
    }
    pair = {"a": "loss", "b": "margin", **dataclasses.asdict(agreement.spearman(loss, -margin))}
    summary = {"n": n, "n_sample": n, "scores": about, "agreement": [pair]}
    summary |= {"truth": {"n_true": int(true.sum()), "n": n}} if truth else {}
    told = {"report": "score", "schema_version": 1, "scores": ["loss", "margin"], "summary": summary, "seed": 0}
    return parquet(path, columns, told | (meta or {})), summary, columns


def figures(section):
    return {figure.label: figure for figure in section.figures}


def page_of(path, session):
    return Building(path, path.name, "x", {}, tuple(tables.read_schema(path).names), session)


def check(section):
    """What every section keeps to."""
    assert isinstance(section, Section)
    texts = [section.kind, section.name, section.question, section.reproduce, *section.notes]
    texts += [t for f in section.figures for t in dataclasses.astuple(f)]
    texts += [t for pair in section.provenance for t in pair]
    texts += [t for table in section.tables for row in (table.header, *table.rows) for t in row]
    texts += [t for plot in section.plots for t in (plot.svg, plot.alt, plot.caption)]
    assert all(isinstance(text, str) for text in texts)
    assert section.question
    assert all(len(row) == len(table.header) == len(table.numeric) for table in section.tables for row in table.rows)
    for plot in section.plots:
        assert plot.alt.endswith(".")
        assert plot.caption.endswith(".")
        assert len(plot.svg) < building.MOST_SVG
        page_svg.placed(plot.svg, prefix="p", title="t", description=plot.alt)


# -- every kind, whatever it holds ---------------------------------------------------------------------------------


def test_every_kind_of_report_has_a_section_of_its_own():
    assert set(KINDS) == set(ROWS)
    for question, where in KINDS.values():
        module, _, name = where.partition(":")
        assert callable(getattr(importlib.import_module(f"memdiag.page_sections.{module}"), name))
        assert question.endswith("?")


@pytest.mark.parametrize("kind", sorted(ROWS))
@pytest.mark.parametrize(("n", "nulls"), [(0, False), (1, False), (1, True), (30, False)])
def test_rows_that_make_no_sense_still_have_a_section(tmp_path, kind, n, nulls):
    path = random_report(tmp_path / "r.parquet", kind, n, {"report": kind, "schema_version": 1}, nulls=nulls)
    section = section_of(path, "r.parquet")
    check(section)
    assert section.kind == kind
    assert ("the report has no rows" in section.notes) == (n == 0)
    assert bool(section.figures or section.notes)


@pytest.mark.parametrize("kind", sorted(ROWS))
@pytest.mark.parametrize("wrong", [5, [1], {"a": {"b": None}}])
def test_metadata_of_other_types_is_a_note_and_no_traceback(tmp_path, kind, wrong):
    names = ("summary", "options", "networks", "scores", "settled", "checkpoint", "dataset", "test", "val", "config",
             "paper", "schema_version", "seed", "seeds", "memdiag_version", "n_models", "foreign", "memorized", "of",
             "task", "n_examples", "partial", "model")  # fmt: skip
    path = random_report(tmp_path / "r.parquet", kind, 3, {"report": kind} | dict.fromkeys(names, wrong))
    check(section_of(path, "r.parquet"))


@pytest.mark.parametrize("kind", sorted(ROWS))
def test_columns_that_are_missing_are_no_traceback(tmp_path, kind):
    names = tables.schema_of(row_of(kind)).names[:2]
    path = random_report(tmp_path / "r.parquet", kind, 5, {"report": kind})
    parquet(path, pq.read_table(path, columns=names).to_pydict(), {"report": kind})
    section = section_of(path, "r.parquet")
    check(section)
    assert any("schema version" in note for note in section.notes)


def test_a_kind_that_nobody_knows_is_shown_as_it_is(tmp_path):
    path = parquet(tmp_path / "r.parquet", {"x": [1.0, 2.0, 6.0]}, {"report": "of tomorrow"})
    section = section_of(path, "r.parquet")
    assert figures(section)["Mean x"].value == "3.00"
    assert any("of tomorrow" in note for note in section.notes)
    assert section.reproduce == ""


def test_what_is_no_report_is_refused(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    for name in ("x.parquet", "none.parquet"):
        with pytest.raises(InputError):
            section_of(tmp_path / name, name)


def test_rows_that_cannot_be_read_leave_the_provenance(tmp_path):
    path, _, _ = scores(tmp_path / "s.parquet", 5000)
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4)
    path.write_bytes(bytes(data))
    section = section_of(path, "s.parquet")
    check(section)
    assert any("read" in note or LEFT_OUT in note for note in section.notes)
    assert dict(section.provenance)["Report"].startswith("score")


def test_an_unfinished_run_is_told(tmp_path):
    path = random_report(tmp_path / "h.parquet", "train.history", 3, {"report": "train.history", "partial": True})
    assert any("not finished" in note for note in section_of(path, "h.parquet").notes)


def test_names_that_are_formulas_or_control_characters_are_drawn_as_they_are(tmp_path):
    columns = {"arm": ["$\\frac$", "a\x1b[31m", "b\u202e"] * 2, "seed": [0, 0, 0, 1, 1, 1], "measure": ["$x"] * 6,
               "value": [1.0, 2.0, 3.0, 1.5, 2.5, 3.5]}  # fmt: skip
    path = parquet(tmp_path / "r.parquet", columns, {"report": "reproduce.runs", "schema_version": 1})
    section = section_of(path, "r.parquet")
    check(section)
    assert len(section.plots) == 1


# -- figures against their definitions -----------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(-5, 5), st.sampled_from([0.1, 0.2, 0.3, 0.7])), min_size=1, max_size=60),
    st.integers(2, 40),
    st.randoms(use_true_random=False),
)
def test_a_histogram_counts_as_numpy_does_whatever_the_order(values, bins, random):
    import tempfile

    edges = np.linspace(-3, 3, bins + 1)
    known = np.array([v for v in values if v is not None], dtype=float)
    expected = np.histogram(np.clip(known, -3, 3), edges)[0]
    shuffled = random.sample(values, len(values))
    for own in (values, shuffled):
        with tempfile.TemporaryDirectory() as folder:
            column = pa.array(own, pa.float64())
            path = parquet(Path(folder) / "r.parquet", {"v": column}, {"report": "x"})
            with opened({"report": path}) as session:
                found = page_of(path, session).histogram("v", edges)
        assert sum(found.values(), np.zeros(bins, dtype=int)).tolist() == expected.tolist()


@pytest.mark.parametrize("edges", [np.linspace(-0.3, 1, 31), np.linspace(0, 0.7, 8), np.linspace(-1, 1, 11)])
def test_a_value_on_an_edge_belongs_to_the_bin_above(tmp_path, edges):
    beside = [np.nextafter(edges[1:], -1), np.nextafter(edges[:-1], 2), edges]
    values = np.concatenate(beside)
    path = parquet(tmp_path / "r.parquet", {"v": values}, {"report": "x"})
    with opened({"report": path}) as session:
        found = page_of(path, session).histogram("v", edges)
    assert found[None].tolist() == np.histogram(values, edges)[0].tolist()


def test_a_histogram_by_truth_leaves_out_what_is_not_finite(tmp_path):
    columns = {"v": [0.0, 0.5, 1.0, math.nan, math.inf, None], "t": [True, False, True, True, True, False]}
    path = parquet(tmp_path / "r.parquet", columns, {"report": "x"})
    with opened({"report": path}) as session:
        found = page_of(path, session).histogram("v", np.array([0.0, 0.5, 1.0]), "t")
    assert {key: counts.tolist() for key, counts in found.items()} == {True: [1, 1], False: [0, 1]}


@pytest.mark.parametrize("n", [1, 2, 40, plain.FEW, plain.FEW + 1, 3000])
def test_means_have_the_interval_of_mean_interval(tmp_path, n):
    values = np.random.default_rng(n).exponential(size=n) + 1e6
    path = parquet(tmp_path / "r.parquet", {"v": [*values, None, math.nan]}, {"report": "x"})
    with opened({"report": path}) as session:
        found, nulls, low, high = plain.mean_of(page_of(path, session), "v")
    centred = values - values.mean()
    expected = mean_interval.mean_interval(np.sort(values), 0.95)
    if n > plain.FEW:
        skewness = (centred**3).mean() / values.std(ddof=1) ** 3
        expected = mean_interval.of_moments(n, values.mean(), values.std(ddof=1), skewness, 0.95)
    assert (nulls, low, high) == (2, values.min(), values.max())
    assert found.value == pytest.approx(expected.value, abs=1e-6)
    for end in ("lo", "hi"):
        mine, own = getattr(found, end), getattr(expected, end)
        assert (mine is None) == (own is None)
        assert mine is None or mine - values.mean() == pytest.approx(own - values.mean(), rel=1e-4)


def test_the_share_of_a_truth_value_has_clopper_and_pearsons_interval(tmp_path):
    path = parquet(tmp_path / "r.parquet", {"ok": [True] * 3 + [False] * 7 + [None]}, {"report": "x"})
    found = figures(section_of(path, "r.parquet"))["Share ok"]
    # scipy.stats.binomtest(3, 10).proportion_ci(0.95, "exact")
    assert (found.value, found.interval, found.note) == ("0.30", "0.07 to 0.65", "n = 10 rows")


def test_t_ends_by_hand():
    # t of 2 degrees of freedom at 97.5 % is 4.302653
    assert t_ends(0.5, 0.1, 3) == pytest.approx((0.5 - 0.4302653, 0.5 + 0.4302653), abs=1e-6)
    for unknown in ((None, 0.1, 3), (0.5, None, 3), (0.5, 0.1, None), (0.5, 0.1, 1)):
        assert t_ends(*unknown) == (None, None)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (math.nan, "–"), (0.0, "0"), (-0.0, "0"), (1234.5, "1,234"), (0.01234, "0.0123"), (-2.5, "−2.50"),
     (1e-9, "1.00e-09"), (True, "yes"), (12345, "12,345"), (math.inf, "∞"), ("text", "text"), (0.9999, "1.000")],
)  # fmt: skip
def test_numbers_as_text(value, text):
    assert shown.number(value) == text


def test_digits_come_from_the_interval():
    assert shown.with_interval(0.17234, 0.16111, 0.18333) == "0.172 (0.161 to 0.183)"
    assert shown.with_interval(1712.4, 1600.0, 1825.0) == "1,712 (1,600 to 1,825)"
    assert shown.with_interval(-0.00001, -0.02, 0.02) == "0.000 (−0.020 to 0.020)"
    assert shown.with_interval(0.5, None, None) == "0.500"
    assert shown.with_interval(None, 0.1, 0.2) == "–"
    assert shown.interval(0.25, None) == "at least 0.250"


def test_columns_of_numbers_and_intervals_are_numeric_and_names_are_not():
    numbers = ("0.172", "−2.50", "0.161 to 0.183", "–", "1.00e-09", "95.0%", "12,345", "at least 0.250")
    assert all(shown.is_number(text) for text in numbers)
    assert not any(shown.is_number(text) for text in ("loss", "e5", "layer 3", "1 of 2"))


# -- score ---------------------------------------------------------------------------------------------------------


def test_a_score_section_tells_the_summary_with_its_intervals(tmp_path):
    path, summary, columns = scores(tmp_path / "s.parquet")
    section = section_of(path, "s.parquet")
    check(section)
    assert not [note for note in section.notes if LEFT_OUT in note]
    best = max(("loss", "margin"), key=lambda name: summary["scores"][name]["auc"]["value"])
    auc = summary["scores"][best]["auc"]
    found = figures(section)[f"AUC of {best}, suspect against others"]
    assert float(found.value) == pytest.approx(auc["value"], abs=5e-3)
    assert found.interval == shown.interval(auc["lo"], auc["hi"])
    assert "n = 200 examples" in found.note
    assert "chosen after the fact" in found.note
    assert len(section.plots) == 3
    rho = summary["agreement"][0]["value"]
    matrix = next(plot for plot in section.plots if "Agreement" in plot.caption)
    assert f"{rho:.2f}".replace("0.", ".").replace("-", "−") in matrix.svg
    top = next(table for table in section.tables if table.caption.startswith("Most memorized by margin"))
    lowest = np.argsort(columns["margin"])[:5]
    assert [row[0] for row in top.rows] == [f"e{i}" for i in lowest]
    assert [row[1] for row in top.rows] == [shown.number(float(columns["margin"][i])) for i in lowest]


def test_the_agreement_matrix_has_each_pair_in_its_place(tmp_path, monkeypatch):
    names = ["csl", "loss", "margin"]
    pairs = [{"a": a, "b": b, "value": v, "lo": v, "hi": v, "n": 3}
             for a, b, v in (("csl", "loss", 0.1), ("csl", "margin", 0.2), ("loss", "margin", 0.3))]  # fmt: skip
    meta = {
        "report": "score",
        "schema_version": 1,
        "scores": names,
        "summary": {"n": 3, "scores": {}, "agreement": pairs},
    }
    path = parquet(tmp_path / "s.parquet", {name: [1.0, 2.0, 3.0] for name in names}, meta)
    drawn = []
    own = score_view.draw_agreement
    monkeypatch.setattr(score_view, "draw_agreement", lambda *given: drawn.append(given[1:]) or own(*given))
    section_of(path, "s.parquet")
    ((axis_names, matrix),) = drawn
    assert axis_names == names
    assert matrix.tolist() == [[1, 0.1, 0.2], [0.1, 1, 0.3], [0.2, 0.3, 1]]


@pytest.mark.parametrize(("censored", "told"), [(0, "half are forgotten by epoch 2, 0.0% never"), (
    3, "fewer than half are forgotten, 60.0% never")])  # fmt: skip
def test_who_is_never_forgotten_does_not_count_as_forgotten(tmp_path, censored, told):
    row = row_of("score.second-split")
    n = 5
    columns = {"example_id": list("abcde"), "row": np.arange(n), "label": [0] * n, "truth": [False] * n}
    columns |= {"half": ["first"] * n, "learned": [1.0] * n, "n_seeds": [3] * n, "second_split_rank": [0.5] * n}
    columns |= {"second_split_forgetting": [1.0, 1.0, 2.0, 9.0, 9.0] if not censored else [1.0, 2.0, 9.0, 9.0, 9.0]}
    columns |= {"n_censored": [0] * (n - censored) + [3] * censored}
    columns |= {"stage2_accuracy": [0.5] * n, "stage2_confidence": [0.5] * n}
    meta = {"report": "score.second-split", "schema_version": 1, "scores": ["second_split_rank"]}
    tables.write(tmp_path / "s.parquet", row, [tables.from_columns(row, columns)], meta)
    section = section_of(tmp_path / "s.parquet", "s.parquet")
    check(section)
    assert f"of the others, {told} are" in section.plots[0].alt


def test_the_order_of_the_rows_does_not_matter(tmp_path):
    order = np.random.default_rng(3).permutation(200)
    for name, own in (("a", None), ("b", order)):
        (tmp_path / name).mkdir()
        scores(tmp_path / name / "s.parquet", order=own)
    one, other = (section_of(tmp_path / name / "s.parquet", "s.parquet") for name in "ab")
    assert (one.figures, one.plots, one.notes) == (other.figures, other.plots, other.notes)
    assert one.tables == other.tables


def test_the_same_report_gives_the_same_section_twice(tmp_path):
    path, _, _ = scores(tmp_path / "s.parquet")
    assert section_of(path, "s.parquet") == section_of(path, "s.parquet")


def test_a_score_report_without_a_summary_has_distributions_and_says_so(tmp_path):
    path, _, _ = scores(tmp_path / "s.parquet", meta={"summary": None, "scores": None})
    section = section_of(path, "s.parquet")
    assert len(section.plots) == 1
    assert any("no summary" in note for note in section.notes)
    assert any("does not name the scores" in note for note in section.notes)


def test_without_truth_there_are_means_and_no_auc(tmp_path):
    path, summary, _ = scores(tmp_path / "s.parquet", truth=False)
    section = section_of(path, "s.parquet")
    mean = summary["scores"]["loss"]["mean"]
    assert figures(section)["Mean loss"].interval == shown.interval(mean["lo"], mean["hi"])
    assert not any("AUC" in figure.label for figure in section.figures)


def test_a_sample_is_told(tmp_path):
    path, summary, _ = scores(tmp_path / "s.parquet")
    meta = tables.read_meta(path) | {"summary": summary | {"n_sample": 100}}
    parquet(path, pq.read_table(path).to_pydict(), meta)
    assert any("100 of 200" in note for note in section_of(path, "s.parquet").notes)


@pytest.mark.parametrize(("options", "name"), [({"truth": "corrupted"}, "corrupted"), ({"truth": None}, "suspect"), (
    None, "suspect"), ({"truth": "x" * 99}, "suspect")])  # fmt: skip
def test_a_true_value_is_called_by_its_column_and_never_true(tmp_path, options, name):
    path, _, _ = scores(tmp_path / "s.parquet", meta={"options": options})
    section = section_of(path, "s.parquet")
    assert f"AUC of margin, {name} against others" in figures(section)
    assert f"Examples marked {name}" in figures(section)
    said = [section.plots[0].alt, *(f.label for f in section.figures), *(plot.caption for plot in section.plots)]
    assert not [text for text in said if "true" in text.lower()]
    assert f">{name}</text>" in section.plots[0].svg
    assert f"of {name}, " in section.plots[0].alt


@pytest.mark.parametrize("rows", [slice(0, 150), slice(0, 200)])
def test_a_summary_of_other_rows_is_not_shown_as_of_these(tmp_path, rows):
    path, summary, columns = scores(tmp_path / "s.parquet")
    some = {name: values[rows] for name, values in columns.items()}
    same = len(some["loss"]) == 200
    if same:
        some["truth"] = ~some["truth"]  # as many rows, and other marks
    parquet(path, some, tables.read_meta(path))
    section = section_of(path, "s.parquet")
    check(section)
    note = (
        f"tells of {summary['truth']['n_true']} examples marked"
        if same
        else "is of 200 examples, and the report has 150"
    )
    assert any(note in own for own in section.notes)
    assert len(section.plots) == 1
    assert not any("AUC" in figure.label for figure in section.figures)
    mean = mean_interval.mean_interval(np.sort(some["loss"]), 0.95)
    assert figures(section)["Mean loss"].interval == shown.interval(mean.lo, mean.hi)


def test_the_text_of_histograms_tells_how_many_and_the_medians(tmp_path):
    rng = np.random.default_rng(0)
    columns = {name: rng.random(9) for name in "abcde"} | {"same": [0.0] * 9, "ok": [True] * 3 + [False] * 6}
    section = section_of(parquet(tmp_path / "r.parquet", columns, {"report": "x"}), "r.parquet")
    told = "; ".join(f"{name} {shown.number(float(np.median(columns[name])))}" for name in "abc")
    assert section.plots[0].alt == f"6 histograms of 9 rows; medians: {told}, and 3 more."
    assert "the same in every row that has a value, so not drawn: same" in section.notes
    section = section_of(parquet(tmp_path / "o.parquet", {"ok": columns["ok"]}, {"report": "x"}), "o.parquet")
    assert section.plots[0].alt == "1 histogram of 9 rows; medians: ok (share) 0.333."


def test_what_is_counted_is_one_or_several():
    assert [shown.counted(n, "phase") for n in (0, 1, 2000)] == ["0 phases", "1 phase", "2,000 phases"]
    assert shown.counted(2, "switch", "switches") == "2 switches"


def test_two_groups_of_a_histogram_stand_in_the_same_bins():
    from matplotlib.figure import Figure

    from memdiag import counterfactual_view

    edges = np.linspace(0, 1, 5)
    groups = [np.array([100, 0, 3, 1]), np.array([5, 2, 0, 1])]
    axis = Figure().subplots()
    counterfactual_view.draw_counts(axis, edges, groups)
    assert axis.get_yscale() == "log"
    filled = [patch for patch in axis.patches if patch.get_fill()]
    assert [patch.get_label() for patch in filled] == ["others", "suspects"]
    for patch, counts in zip(filled, groups):
        corners = patch.get_xy()
        assert {round(x, 9) for x, _ in corners} <= set(edges.tolist())
        assert {y for _, y in corners if y >= 0.9} == {count for count in counts.tolist() if count}
        for left, count in zip(edges, counts):
            top = max(y for x, y in corners if x == left)
            assert top >= count
    axis = Figure().subplots()
    counterfactual_view.draw_counts(axis, edges, groups[:1])
    assert [patch.get_label() for patch in axis.patches if patch.get_fill()] == ["examples"]
    assert axis.get_legend() is None


def test_a_large_report_is_never_read_as_a_whole(tmp_path, monkeypatch):
    path, _, _ = scores(tmp_path / "s.parquet", 60_000)

    def refuse(*_, **__):
        raise AssertionError("read as a whole")

    monkeypatch.setattr(tables, "read", refuse)
    monkeypatch.setattr(building, "stream", refuse)
    section = section_of(path, "s.parquet")
    check(section)
    assert figures(section)["Examples"].value == "60,000"
    assert sum(len(plot.svg) for plot in section.plots) < 200_000


def test_long_tails_are_cut_and_that_is_said(tmp_path):
    values = np.concatenate([np.random.default_rng(0).normal(size=5000), [1e6]])
    path = parquet(tmp_path / "r.parquet", {"v": values}, {"report": "x"})
    with opened({"report": path}) as session:
        edges, is_cut = panels.edges_of(page_of(path, session), "v")
        assert is_cut
        assert edges[-1] < 10
    assert "outermost bars of v" in section_of(path, "r.parquet").plots[0].caption


def test_a_plot_that_is_too_large_becomes_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "MOST_SVG", 1000)
    path, _, _ = scores(tmp_path / "s.parquet")
    section = section_of(path, "s.parquet")
    assert section.plots == ()
    assert sum("kB and is left out" in note for note in section.notes) == 3


# -- counterfactual ------------------------------------------------------------------------------------------------


def memorized(folder, n=50, **summary):
    rng = np.random.default_rng(2)
    p_in, p_out = rng.integers(5, 11, n) / 10, rng.integers(0, 6, n) / 10
    p_in[0], p_out[0] = 0.75, 0.5  # at the limit
    row = row_of("counterfactual")
    columns = {field.name: [None] * n for field in dataclasses.fields(row)}
    columns |= {
        "row": np.arange(n),
        "example_id": [f"e{i}" for i in range(n)],
        "group_id": ["g"] * n,
        "copies": [1] * n,
    }
    columns |= {"memorization": p_in - p_out, "p_in": p_in, "p_out": p_out, "n_in": [7] * n, "n_out": [3] * n}
    columns |= {"n_without_copies": [3] * n, "truth": [i % 5 == 0 for i in range(n)]}
    folder.mkdir(exist_ok=True)
    path = folder / "counterfactual.parquet"
    meta = {"report": "counterfactual", "schema_version": 1, "n_models": 10}
    tables.write(path, row, [tables.from_columns(row, columns)], meta)
    if summary:
        (folder / "summary.json").write_text(json.dumps({"examples": n, "models": 10} | summary))
    return path, p_in - p_out


def test_counterfactual_figures_are_those_of_the_summary_beside_it(tmp_path):
    estimate = {"value": 0.4, "lo": 0.3, "hi": 0.5, "n": 50}
    path, mem = memorized(tmp_path / "c", memorization=estimate, warnings=["few models"])
    section = section_of(path, "c.parquet")
    check(section)
    found = figures(section)
    assert found["Memorization, mean over examples"].interval == "0.30 to 0.50"
    many = int((mem >= 0.25).sum())
    rate = mean_interval.rate_interval(many, 50, 0.95)
    assert found["Share with memorization of at least 0.25"].interval == shown.interval(rate.lo, rate.hi)
    assert f"{many} of 50" in found["Share with memorization of at least 0.25"].note
    assert "few models" in section.notes
    assert len(section.plots) == 2
    best = section.tables[0].rows[0]
    assert float(best[3]) == pytest.approx(mem.max(), abs=1e-3)


def test_a_summary_of_another_run_is_not_believed(tmp_path):
    estimate = {"value": 0.9, "lo": 0.8, "hi": 1.0, "n": 49}
    for wrong in ({"examples": 49}, {"models": 11}):
        path, mem = memorized(tmp_path / "c", memorization=estimate, **wrong)
        section = section_of(path, "c.parquet")
        found = figures(section)["Memorization, mean over examples"]
        assert float(found.value) == pytest.approx(mem.mean(), abs=5e-3)
        assert found.interval == ""
        assert any("another run" in note for note in section.notes)


def test_many_examples_are_drawn_as_density(tmp_path):
    few, many = (memorized(tmp_path / str(n), n)[0] for n in (50, 5000))
    svg = [section_of(path, path.name).plots[1].svg for path in (few, many)]
    assert "<image" not in svg[0]
    assert "<image" in svg[1]


# -- reports of the commands ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, fixtures):
    folder = tmp_path_factory.mktemp("run")
    memdiag.entropy(fixtures / "run", data=fixtures / "texts.jsonl", limit=8, steps="0,800", gradients=True,
                    gradient_batches=3, gradient_batch_size=2, out=folder / "e.parquet")  # fmt: skip
    return folder


def test_an_entropy_run_names_the_most_compressed_layer_with_its_interval(run):
    section = section_of(run / "e.parquet", "e.parquet")
    check(section)
    assert not [note for note in section.notes if LEFT_OUT in note]
    last = [row for row in tables.read(run / "e.parquet").table.to_pylist() if row["step"] == 800]
    lowest = min(last, key=lambda row: row["mbe"])
    found = figures(section)["Most compressed layer, MBE (patch)"]
    assert f"layer {lowest['layer']} of checkpoint-800" in found.note
    assert found.value == f"{shown.number(lowest['mbe'], shown.places_of(lowest['mbe_lo'], lowest['mbe_hi']))} nats"
    assert found.interval == shown.interval(lowest["mbe_lo"], lowest["mbe_hi"])
    assert [plot.caption.split(":")[-1].split(",")[0].strip() for plot in section.plots[:1]] == ["layer × step"]
    assert len(section.plots) == 2
    table = section.tables[0]
    assert len(table.rows) == len(last)
    assert table.numeric == (True,) * 7


def test_gradients_have_t_intervals_over_batches(run):
    section = section_of(run / "e.gradients.parquet", "g.parquet")
    check(section)
    rows = tables.read(run / "e.gradients.parquet").table.to_pylist()
    (whole,) = (
        row for row in rows
        if row["step"] == 800 and row["layer"] is None and (row["objective_pair"], row["batches"]) == ("ce_mbe", "same")
    )  # fmt: skip
    found = figures(section)["Cosine of the gradients, whole model"]
    assert found.interval == shown.interval(*t_ends(whole["cosine"], whole["cosine_se"], whole["n_pairs"]))
    assert f"n = {whole['n_pairs']} batches" in found.note


def test_training_and_its_examples(tmp_path):
    made = memdiag.train("task:digits?split=train", limit=120, epochs=3, width=8, corruption=0.2, out=tmp_path / "t")
    history = section_of(tmp_path / "t" / "history.parquet", "history.parquet")
    check(history)
    last = made.history.table.to_pylist()[-1]
    assert figures(history)["Right when presented"].value == shown.number(last["train_accuracy"])
    examples = section_of(tmp_path / "t" / "examples.parquet", "examples.parquet")
    check(examples)
    assert figures(examples)["With a wrong label"].value == str(made.summary["corrupted"])
    assert not [note for note in (*history.notes, *examples.notes) if LEFT_OUT in note]


def test_a_gapt_run_shades_the_phases_that_compress(tmp_path):
    n = 1000
    phase = ["compress" if 40 <= i % 100 < 60 else "memorize" for i in range(n)]
    columns = {"step": list(range(1, n + 1)), "tokens": list(range(n)), "phase": phase, "switch_reason": [None] * n,
               "ce": np.linspace(5, 1, n).tolist(), "mbe": [1.0] * n, "mbe_layers": [[2.0, 1.0, 1.0]] * n,
               "gradient_ratio": [None] * n, "lr": [0.1] * n, "grad_norm": [1.0] * n,
               "val_ce": [None] * (n - 1) + [0.5], "val_mbe": [None] * (n - 1) + [0.7],
               "tokens_per_s": [1.0] * n}  # fmt: skip
    row = row_of("train-gapt.history")
    meta = {"report": "train-gapt.history", "schema_version": 1, "settled": {"active_layers": [1, 2]}}
    tables.write(tmp_path / "h.parquet", row, [tables.from_columns(row, columns)], meta)
    section = section_of(tmp_path / "h.parquet", "h.parquet")
    check(section)
    assert (section.figures[0].label, section.figures[0].value) == ("Share of updates that compress", "20.0%")
    assert figures(section)["Held-out cross-entropy"].value == "0.500 nats"
    assert "10 phases of compression" in section.plots[0].alt
    assert "the mean of 3 updates" in section.plots[0].caption


def compared(measure, arm, **own):
    row = {field.name: "x" for field in dataclasses.fields(row_of("train-gapt.compare"))}
    row |= {"measure": measure, "arm": arm, "mean": 0.05, "lo": 0.01, "hi": 0.09, "difference": None, "weight": 1.0}
    row |= {"difference_lo": None, "difference_hi": None, "n_seeds": 3, "n_lower": None, "share_compress": 0.5}
    return row | own


@pytest.mark.parametrize("low", [-0.2, 0.01, None])
def test_an_entropy_has_no_interval_below_zero(tmp_path, low):
    gone = {"difference": -0.01, "difference_lo": -0.05, "difference_hi": 0.03, "n_lower": 2}
    rows = [compared("val_mbe", "paper"), compared("val_mbe", "none", lo=low, hi=None if low is None else 0.3, **gone)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    path = parquet(tmp_path / "c.parquet", columns, {"report": "train-gapt.compare", "schema_version": 1})
    section = section_of(path, "c.parquet")
    check(section)
    assert not [note for note in section.notes if LEFT_OUT in note]
    is_cut = low is not None and low < 0
    assert ("cut at 0" in section.plots[0].caption, "cut at 0" in section.tables[0].caption) == (is_cut, is_cut)
    assert section.tables[0].rows[1][3] == ("–" if low is None else shown.interval(max(low, 0.0), 0.3))
    assert ("none 0.05 (0.00 to 0.30)" in section.plots[0].alt) == is_cut
    (difference,) = (figure for figure in section.figures if "minus" in figure.label)
    assert difference.interval == "−0.050 to 0.030"  # a difference may be
    assert "lower in 2 of 3" in difference.note


@pytest.mark.parametrize("seeds", [1, 2])
def test_parts_of_networks_are_told_as_means_over_them(tmp_path, seeds):
    names = ("train_corrupted_acc", "corrupted_true_acc", "train_clean_acc", "test_acc")
    rows = [{"seed": seed, "part": part, **dict.fromkeys(names, value + 0.2 * seed)}
            for seed in range(seeds) for part, value in (("whole", 0.7), ("dominant", 0.1))]  # fmt: skip
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    path = parquet(tmp_path / "f.parquet", columns, {"report": "prune-memorizers.filtration", "schema_version": 1})
    section = section_of(path, "f.parquet")
    check(section)
    found = figures(section)["Test accuracy, whole"]
    assert found.value == ("0.700" if seeds == 1 else "0.800")
    assert found.note.startswith("one network" if seeds == 1 else "mean of n = 2 networks, from 0.700 to 0.900")
    assert f"whole: corrupted {found.value}, test {found.value}" in section.plots[0].alt
    assert ("dash: their mean" in section.plots[0].caption) == (seeds == 2)


def test_a_caption_promises_only_what_is_drawn(tmp_path):
    def caption(**own):
        rows = [claim(**{"ours_lo": None, "ours_hi": None, "n_seeds": 1} | own)]
        tables.write(tmp_path / "c.parquet", row_of("reproduce.claims"), [rows],
                     {"report": "reproduce.claims", "schema_version": 1})  # fmt: skip
        return section_of(tmp_path / "c.parquet", "c.parquet").plots[0].caption

    own = "every line has its own scale"
    assert caption() == f"Ours (dot); {own}; fewer than 3 seeds have no interval."
    full = caption(ours_lo=0.4, ours_hi=0.6, low=0.3, paper=0.5, control="c", control_value=0.1)
    assert full == (
        f"Ours with its 95 % interval (dot, bar), what counts as holding (shaded), the paper's figure (dotted), the "
        f"control (×); {own}."
    )


def test_a_rule_between_two_limits_tells_both(tmp_path):
    row = dict.fromkeys(field.name for field in dataclasses.fields(row_of("check")))
    row |= {"rule": "r", "sql": "avg(x) BETWEEN 1 AND 2", "verdict": "pass", "observed": 1.5, "limit": 2.0, "n": 3}
    row |= {"least": 1.0, "comparison": "between"}
    tables.write(tmp_path / "c.parquet", row_of("check"), [[row]], {"report": "check", "schema_version": 1})
    assert section_of(tmp_path / "c.parquet", "c.parquet").tables[0].rows[0][4] == "1.00 to 2.00"


def claim(**own):
    row = {field.name: "x" for field in dataclasses.fields(row_of("reproduce.claims"))}
    row |= dict.fromkeys(("paper", "control", "control_value", "low", "high"))
    return row | {"ours": 0.5, "ours_lo": 0.4, "ours_hi": 0.6, "n_seeds": 3, "verdict": "holds"} | own


def test_claims_stand_beside_the_papers_figures(tmp_path):
    rows = [claim(name="a", paper=0.55, low=0.3), claim(name="d"), claim(name="b", verdict="differs", low=0.9), claim(
        name="c", verdict="not_comparable", ours=None, ours_lo=None, ours_hi=None)]  # fmt: skip
    meta = {"report": "reproduce.claims", "schema_version": 1}
    tables.write(tmp_path / "c.parquet", row_of("reproduce.claims"), [rows], meta)
    section = section_of(tmp_path / "c.parquet", "c.parquet")
    check(section)
    found = figures(section)
    assert [found[f"Claims: {verdict}"].value for verdict in ("holds", "differs", "not comparable")] == ["2", "1", "1"]
    assert found["Claims: differs"].note == "b"
    assert section.tables[0].rows[0][2:6] == ("0.550", "0.50", "0.40 to 0.60", ">= 0.3")
    assert "2 lie in the band" in section.plots[0].alt
    assert "outside: b" in section.plots[0].alt


def test_rules_stand_with_their_verdicts(tmp_path):
    common = dict.fromkeys(field.name for field in dataclasses.fields(row_of("check")))
    common |= {"lo": None, "hi": None, "comparison": "<", "confidence": None, "method": None, "note": None, "n": 9}
    rows = [
        common | {"rule": "small <loss>", "sql": "avg(x) < 1", "verdict": "pass", "observed": 0.5, "limit": 1.0},
        common | {"rule": "r2", "sql": "avg(y) < 1", "verdict": "fail", "observed": 2.0, "limit": 1.0},
        common | {"rule": "r3", "sql": "bool_and(z)", "verdict": "inconclusive", "observed": None, "limit": None,
                  "comparison": None, "note": "no value"},
    ]  # fmt: skip
    meta = {"report": "check", "schema_version": 1, "of": {"rows": 9}, "options": {"report": "s.parquet"}}
    tables.write(tmp_path / "c.parquet", row_of("check"), [rows], meta)
    section = section_of(tmp_path / "c.parquet", "c.parquet")
    check(section)
    found = figures(section)
    assert [found[name].value for name in ("Rules", "Pass", "Fail", "Inconclusive")] == ["3", "1", "1", "1"]
    assert found["Rules"].note == "of s.parquet, 9 rows"
    assert [row[1] for row in section.tables[0].rows] == ["pass", "fail", "inconclusive"]
    assert section.plots[0].alt == "2 rules, each on its own scale: 1 pass; failed: r2."
    assert "r3: no value" in section.notes


# -- where it is from ----------------------------------------------------------------------------------------------

GIVEN = {
    "entropy": {"checkpoint": "runs/my model", "data": "a'b.jsonl", "unit": "all", "alpha": 1.5, "gradients": True},
    "score": {"source": "runs/x", "scores": "loss,margin", "ranks": True, "limit": 7, "columns": "text=a b"},
    "score.second-split": {"data": "d.parquet", "seeds": "3,4", "second_lr": 0.01, "truth": "is wrong"},
    "counterfactual": {"data": "task:digits?split=train&corruption=0.1", "models": 20, "standardize": False,
                       "until_width": 0.2, "top": 5},
    "counterfactual.sizes": {"data": "d.npz", "sizes": "8,32", "standardize": True},
    "prune-memorizers.pruning": {"checkpoint": None, "corruption": 0.3, "seeds": "0,1", "filter_frequencies": True},
    "prune-memorizers.neurons": {"checkpoint": "runs/$HOME", "data": "-d.parquet", "truth": "t", "ablation": True},
    "reproduce.claims": {"name": "grok", "seeds": "0", "no_map": True, "dtype": "bfloat16"},
    "reproduce.effects": {"name": "long-tail", "preset": "paper", "only": "a,b"},
    "train.history": {"data": "task:digits", "corruption": 0.1, "standardize": False, "epochs": 3},
    "train-gapt.history": {"checkpoint": "ck", "steps": 20, "reset_on_enter": False, "weight": 0.5, "shard": True},
    "train-gapt.compare": {"checkpoint": None, "compare": True, "seeds": "0,1,2", "reset_on_enter": True},
}  # fmt: skip


def parsed(words):
    """What the command line makes of the words after `memdiag`."""
    command = typer.main.get_command(app)
    with command.make_context("memdiag", list(words), resilient_parsing=False) as context:
        sub = command.get_command(context, words[0])
        with sub.make_context(words[0], list(words[1:]), parent=context) as own:
            return own.params


@pytest.mark.parametrize("kind", sorted(GIVEN))
def test_the_command_as_it_was_made_reads_back_the_same_options(kind):
    import shlex

    _, where, argument = provenance._command_of(kind)
    module, _, name = where.partition(":")
    options = getattr(importlib.import_module(module), name)
    given = {k: v for k, v in GIVEN[kind].items() if k != argument}
    full = dataclasses.asdict(options(**given)) | ({argument: GIVEN[kind][argument]} if argument else {})
    lines = provenance.shell_lines({"report": kind, "options": json.loads(json.dumps(full))}, Path("d/r.parquet"))
    rerun, _, made = lines.split("\n")
    assert shlex.split(rerun) == ["memdiag", "rerun", "d/r.parquet"]
    words = shlex.split(made)
    params = parsed(words[1:])
    for option, value in given.items():
        own = params.get(option)
        assert str(own) == str(value) if not isinstance(value, float) else own == value, option
    defaults = {f.name: f.default for f in dataclasses.fields(options)}
    for option in set(params) & set(defaults) - set(given):
        assert params[option] in (None, defaults[option]) or str(params[option]) == str(defaults[option]), option
    if argument and GIVEN[kind][argument] is not None:
        assert GIVEN[kind][argument] in words


def test_defaults_are_not_told_as_options():
    for kind, (_, where, _) in provenance.COMMANDS.items():
        module, _, name = where.partition(":")
        options = dataclasses.asdict(getattr(importlib.import_module(module), name)())
        assert provenance.options_of({"report": kind, "options": json.loads(json.dumps(options))}) == []


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_characters="\x00", exclude_categories=("Cs",)), max_size=20))
def test_a_word_is_read_by_a_shell_as_it_is(text):
    word = provenance.quoted(text)
    assert word.isprintable()
    read = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True).stdout
    assert read == text.encode()


def test_parts_of_a_run_are_made_again_by_their_whole():
    shard = provenance.shell_lines({"report": "counterfactual.shard"}, Path("c/shards/0.parquet"))
    assert shard == "memdiag rerun c/counterfactual.parquet"
    assert provenance.shell_lines({"report": "train.trajectory"}, Path("-t/trajectory/0.parquet")) == (
        "memdiag rerun ./-t/history.parquet"
    )


RULES = ("avg(loss) < 1.0", "none: count(*) FILTER (label = 'a b') = 0", '-avg("a b") >= -2', "x::DOUBLE > 1")
CHANGES = ("margin: +0.5", "loss: -1e-06", "aum: ±0.01", "named: avg(new.loss) < avg(base.loss)")


@pytest.mark.parametrize(
    "given", [{}, {"where": "label = 'a'", "confidence": 0.9}, {"inconclusive": "fail", "seed": 3}]
)
def test_the_command_of_a_check_reads_back_the_same_rules(given):
    import shlex

    from memdiag import rules
    from memdiag.check_report import CheckOptions

    same = {key: given.get(key) for key in ("where", "confidence")}
    asked = rules.gathered(RULES, None, **same)
    options = CheckOptions(asked, **{key: value for key, value in given.items() if key not in same}).resolved()
    meta = json.loads(json.dumps({"report": "check", "options": {"report": "-s x.parquet", **options}}))
    rerun, where, made = provenance.shell_lines(meta, Path("c.parquet")).split("\n")
    assert rerun == "memdiag rerun c.parquet"
    assert "run it in that directory" in where
    params = parsed(shlex.split(made)[1:])
    assert rules.gathered(params["rule"], None, where=params["where"], confidence=params["confidence"]) == asked
    assert str(params["report"]) == "-s x.parquet"
    assert [params[key] for key in ("inconclusive", "seed")] == [options[key] for key in ("inconclusive", "seed")]


@pytest.mark.parametrize("texts", [(), CHANGES])
def test_the_command_of_a_diff_reads_back_the_same_rules(texts):
    import shlex

    from memdiag import rules
    from memdiag.diff_report import DiffOptions

    asked = rules.gathered_changes(texts, None)
    options = {"base": "a.parquet", "new": "b.parquet", **DiffOptions(asked, anyway=True, confidence=0.9).resolved()}
    for kind in ("diff.rules", "diff.columns", "diff.movers"):
        meta = json.loads(json.dumps({"report": kind, "options": options}))
        params = parsed(shlex.split(provenance.shell_lines(meta, Path("c.parquet")).split("\n")[2])[1:])
        assert rules.gathered_changes(params["rule"] or (), None) == asked
        assert [str(params[key]) for key in ("base", "new", "anyway", "confidence", "top")] == [
            "a.parquet", "b.parquet", "True", "0.9", "10"]  # fmt: skip


SQL = {"name": None, "sql": "avg(x) < 1", "where": None, "confidence": None, "must": False}


@pytest.mark.parametrize(
    ("kind", "rules"),
    [
        ("check", []),
        ("check", [SQL, SQL | {"confidence": 0.9}]),
        ("check", [SQL, SQL | {"where": "y > 1"}]),
        ("check", [SQL | {"must": True, "confidence": 0.9}]),
        ("check", [SQL | {"name": "a: b"}]),
        ("check", [SQL | {"sql": "named: avg(x) < 1"}]),
        ("check", [SQL | {"where": ["x"]}]),
        ("check", ["avg(x) < 1"]),
        ("diff.rules", [{"column": "x", "least": None, "most": 0.1, "name": "a name of its own"}]),
        ("diff.rules", [{"column": "x", "least": -0.1, "most": 0.2, "name": None}]),
        ("diff.rules", [{"column": "x", "least": None, "most": 0.12345678, "name": None}]),
        ("diff.rules", [{"column": "x.(y)", "least": None, "most": 0.1, "name": None}]),
    ],
)
def test_what_no_option_tells_is_repeated_by_rerun_alone(kind, rules):
    options = {"report": "s.parquet", "base": "a", "new": "b", "rules": rules}
    assert provenance.shell_lines({"report": kind, "options": options}, Path("c")) == "memdiag rerun c"


def test_what_rules_said_is_repeated_by_rerun():
    for kind in ("check", "diff.rules", "diff.columns"):
        meta = {"report": kind, "options": {"report": "s.parquet", "rules": []}, "of": {"report": "score"}}
        assert provenance.shell_lines(meta, Path("c x.parquet")) == "memdiag rerun 'c x.parquet'"
        assert dict(provenance.pairs(meta))["Report checked"] == "s.parquet"
    assert provenance.shell_lines({"report": "of tomorrow", "options": {}}, Path("x")) == ""


def test_columns_that_differ_are_drawn_beside_zero(tmp_path):
    schema = row_of("diff.columns")
    nothing = {field.name: None for field in dataclasses.fields(schema)} | {"one_sided": 0}
    rows = [
        nothing
        | {
            "column": name,
            "kind": "number",
            "unit": "",
            "changed": changed,
            "n": 9,
            "difference": d,
            "lo": lo,
            "hi": hi,
        }
        for name, changed, d, lo, hi in (("a", 9, 0.5, 0.1, 0.9), ("b", 3, 0.1, -0.1, 0.3), ("c", 0, 0.0, None, None))
    ]
    meta = {"report": "diff.columns", "schema_version": 1, "notes": ["other data"], "of": {"paired": 9, "added": 1,
            "removed": 2}}  # fmt: skip
    tables.write(tmp_path / "d.parquet", schema, [rows], meta)
    section = section_of(tmp_path / "d.parquet", "d.parquet")
    check(section)
    found = figures(section)
    assert (found["Pairs of rows"].value, found["Pairs of rows"].note) == (
        "9", "1 rows only in the new report, 2 only in the base")  # fmt: skip
    assert (found["Mean differences whose interval leaves out 0"].value, found["New − base, a"].interval) == (
        "1", "0.10 to 0.90")  # fmt: skip
    assert "2 columns" in section.plots[0].alt
    assert "other data" in section.notes


def test_imported_columns_are_not_said_to_come_again():
    lines = provenance.shell_lines({"report": "score", "foreign": {"c": {}}, "options": {"source": "x"}}, Path("s"))
    assert "rerun" not in lines
    assert lines.split("\n") == [f"# as it was made; {provenance.WHERE}", "memdiag score x"]


def test_options_of_another_version_are_named(tmp_path):
    meta = {"report": "entropy", "options": {"checkpoint": "x", "colour": "red", "alpha": 1.0}}
    assert provenance.unknown_options(meta) == ["colour"]
    assert provenance.options_of(meta) == ["--alpha 1.0"]
    path = random_report(tmp_path / "e.parquet", "entropy", 3, meta)
    assert any("colour" in note for note in section_of(path, "e.parquet").notes)


def test_provenance_tells_what_there_is():
    checkpoints = [{"name": f"checkpoint-{i}", "weights": "abcdef" * 8} for i in range(3)]
    meta = {"report": "entropy", "schema_version": 1, "memdiag_version": "0.1.0", "torch": "2.13", "seed": 0,
            "checkpoint": checkpoints, "device": "cpu", "dtype": "float32",
            "dataset": {"name": "t.jsonl", "n_examples": 1234, "fingerprint": "0123456789abcdef"}}  # fmt: skip
    found = dict(provenance.pairs(meta, rows=5))
    assert found["Report"] == "entropy, schema version 1, 5 rows"
    assert found["Made by"] == "memdiag 0.1.0, torch 2.13"
    assert found["Checkpoints"] == "3: checkpoint-0 (weights abcdefabcdef) … checkpoint-2 (weights abcdefabcdef)"
    assert found["Data"] == "t.jsonl, 1,234 examples, fingerprint 0123456789ab"
    assert found["Seed"] == "0"
    assert "Paper" not in found
    assert dict(provenance.pairs({"report": "x" * 1000}))["Report"] == "x" * 299 + "…"
