"""`memdiag diff`: which reports fit together, verdicts, what is written and printed, every kind of report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from reports import write_columns, write_kind
from scipy import stats
from test_cli import memdiag_ as memdiag_  # a fixture
from test_cli import one_line

import memdiag
from memdiag import tables
from memdiag.errors import InputError
from memdiag.mean_interval import mean_interval, p_value
from memdiag.pairing import KEYS
from memdiag.report_kinds import ROWS

N = 300
OF_ONE_DATA = {"identity": {"report": "score", "dataset": "d1", "options": {"limit": None}, "checkpoints": {"a": 1}}}


def pair(folder, rise=0.1, n=N, seed=0, **meta):
    """Two score reports in which `loss` has risen by about `rise`, `margin` has not moved."""
    rng = np.random.default_rng(seed)
    ids, loss, margin = [f"e{i}" for i in range(n)], rng.gamma(2.0, size=n), rng.normal(size=n)
    base = {"example_id": ids, "loss": loss, "margin": margin, "truth": loss > 2}
    new = {"example_id": ids, "loss": loss + rng.normal(rise, 0.2, size=n), "margin": margin, "truth": loss > 2.2}
    about = OF_ONE_DATA | meta
    other = about | {"identity": about["identity"] | {"checkpoints": {"b": 2}}}
    return write_columns(folder / "base.parquet", base, **about), write_columns(folder / "new.parquet", new, **other)


@pytest.fixture
def two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, new = pair(tmp_path)
    return base.relative_to(tmp_path), new.relative_to(tmp_path)


# -- verdicts ------------------------------------------------------------------------------------------------------


def test_exit_1_if_the_mean_has_risen_too_far(memdiag_, two):
    done = memdiag_("diff", *two, "--rule", "loss: +0.01")
    assert (done.code, done.out) == (1, "diff\n")
    assert done.err.startswith("memdiag: fail: loss: +0.01: observed 0.0")
    assert memdiag_("diff", *two, "--rule", "loss: +0.3", "-q") == (0, "diff\n", "")
    assert memdiag_("diff", *two, "--rule", "loss: -0.01").code == 0  # it may rise as it likes
    assert memdiag_("diff", *reversed(two), "--rule", "loss: -0.01").code == 1
    assert memdiag_("diff", *two, "--rule", "loss: ±0.01").code == 1
    assert memdiag_("diff", *two).code == 0  # no rule, no verdict


def test_a_change_that_cannot_be_told_is_inconclusive(memdiag_, two):
    observed = memdiag.diff(*two, "loss: +1").outcome.verdicts[0].observed
    done = memdiag_("diff", *two, "--rule", f"loss: +{observed}")
    assert (done.code, "inconclusive" in done.err) == (0, True)
    assert memdiag_("diff", *two, "--rule", f"loss: +{observed}", "--inconclusive", "fail").code == 1


def test_figures_are_those_of_the_paired_differences(two):
    base, new = (memdiag.read(path).to_pandas().set_index("example_id")["loss"] for path in two)
    difference = (new - base).to_numpy()
    (verdict,) = memdiag.diff(*two, "loss: +0.05", confidence=0.9).outcome.verdicts
    expected = mean_interval(difference, 0.9)
    got = [verdict.observed, verdict.lo, verdict.hi]
    np.testing.assert_allclose(got, [difference.mean(), expected.lo, expected.hi], rtol=1e-8)  # nine digits
    assert (verdict.limit, verdict.comparison, verdict.n, verdict.confidence) == (0.05, "<=", N, 0.9)
    # of nearly normal differences the p of a t test is not far
    assert verdict.p == verdict.q == pytest.approx(stats.ttest_1samp(difference, 0.05).pvalue, rel=0.5, abs=1e-3)


def test_unpaired_the_same_change_would_drown(two):
    """The control: the spread between examples is ten times that of their changes."""
    base, new = (memdiag.read(path).to_pandas()["loss"].to_numpy() for path in two)
    assert stats.ttest_ind(base, new).pvalue > 0.05
    assert memdiag.diff(*two, "loss: +0.02").outcome.verdicts[0].verdict == "fail"


def test_sql_over_base_and_new(two):
    found = memdiag.diff(
        *two,
        "avg(new.loss - base.loss) < 0.01",
        "avg(new.loss) - avg(base.loss) < 0.01",
        "count_if(new.truth AND NOT base.truth) / count(*) <= 0.001",
        "(SELECT count(*) FROM new) = (SELECT count(*) FROM base)",
        "names: bool_and(new.example_id = base.example_id)",
    ).outcome.verdicts
    assert [verdict.verdict for verdict in found] == ["fail", "fail", "inconclusive", "pass", "pass"]
    assert [verdict.method for verdict in found] == ["bootstrap-t", None, "Clopper-Pearson", None, None]
    assert [verdict.p is None for verdict in found] == [False, True, False, True, True]
    with pytest.raises(InputError, match=r"rule 'avg\(new.los\) < 1': no column 'los'"):
        memdiag.diff(*two, "avg(new.los) < 1")
    with pytest.raises(InputError, match="SQL here reaches no files"):
        memdiag.diff(*two, "(SELECT count(*) FROM read_csv('/etc/passwd')) > 0")


def test_rows_in_another_order_change_nothing(two, tmp_path):
    table = memdiag.read(two[1]).to_pandas().sample(frac=1, random_state=1)
    columns = {name: table[name].tolist() for name in table}
    mixed = write_columns(tmp_path / "mixed.parquet", columns, **memdiag.read(two[1]).meta)
    rules = ("loss: +0.01", "avg(new.loss - base.loss) < 0.1", "truth: ±0.5")
    straight, other = memdiag.diff(*two, *rules), memdiag.diff(two[0], mixed, *rules)
    assert [v.verdict for v in straight.outcome.verdicts] == [v.verdict for v in other.outcome.verdicts]
    for a, b in zip(straight.outcome.verdicts, other.outcome.verdicts):
        np.testing.assert_allclose([a.observed, a.lo, a.hi, a.p], [b.observed, b.lo, b.hi, b.p], rtol=1e-8)


def test_several_rules_are_judged_together(two):
    """Benjamini and Hochberg: q of the least p among m is at most m times it; a rule beside nineteen needs more."""
    rules = [f"loss: +{limit}" for limit in np.linspace(0.08, 0.1, 20)]
    found = memdiag.diff(*two, *rules).outcome.verdicts
    p = [verdict.p for verdict in found]
    np.testing.assert_allclose([verdict.q for verdict in found], stats.false_discovery_control(p), rtol=1e-8)
    alone = [memdiag.diff(*two, rule).outcome.verdicts[0] for rule in rules]
    assert [verdict.p for verdict in alone] == p == [verdict.q for verdict in alone]
    for together, by_itself in zip(found, alone):
        assert together.verdict == (by_itself.verdict if together.q <= 0.05 else "inconclusive")
        if together.verdict != by_itself.verdict:
            assert together.note == f"its own interval says {by_itself.verdict}; 20 rules together do not (q)"


def test_of_rules_without_a_change_few_are_found(tmp_path):
    """The false discovery rate by simulation: nothing has changed, at the limit itself, twenty rules each time."""
    rng = np.random.default_rng(0)
    runs, wrong, uncorrected = 60, 0, 0
    for run in range(runs):
        ids = [str(i) for i in range(50)]
        base = {f"c{k}": rng.normal(size=50) for k in range(10)}
        new = {name: values + rng.normal(0, 0.3, size=50) for name, values in base.items()}
        paths = [
            write_columns(tmp_path / f"{run}-{i}.parquet", {"example_id": ids, **of})
            for i, of in enumerate((base, new))
        ]
        found = memdiag.diff(*paths, *(f"c{k}: +0" for k in range(10)), top=0).outcome.verdicts
        wrong += any(verdict.verdict != "inconclusive" for verdict in found)
        uncorrected += any(verdict.p <= 0.05 for verdict in found)
    # all hypotheses are true: the chance of any verdict is 5 %; of 60 runs at most 8 but for one time in 200
    assert wrong <= 8
    assert uncorrected >= 15  # the control: one in ten p-values each 5 %, 40 % of runs


def test_nothing_changed_is_a_pass_and_undefined_a_fail(two, tmp_path):
    found = memdiag.diff(two[0], two[0], "loss: +0", "loss: -0", "loss: ±0.1").outcome.verdicts
    assert [(v.verdict, v.note) for v in found] == [("pass", "no pair changed")] * 3
    nulls = {"example_id": ["a", "b"], "loss": [None, 1.0], "x": [1.0, None]}
    a = write_columns(tmp_path / "a.parquet", nulls)
    b = write_columns(tmp_path / "b.parquet", {"example_id": ["a", "b"], "loss": [1.0, None], "x": [2.0, 1.0]})
    found = memdiag.diff(a, b, "loss: +1", "x: +3").outcome.verdicts
    assert (found[0].verdict, found[0].n) == ("fail", 0)
    assert found[0].note == "undefined: no pair has a value on both sides; 2 pairs have a value on one side only"
    assert (found[1].verdict, found[1].observed, found[1].n) == ("inconclusive", 1.0, 1)
    assert found[1].note == "one value; 1 pair has a value on one side only"
    assert [v.confidence for v in found] == [0.95, 0.95]  # judged with statistics, though there is no interval


def of_values(folder, base, new, *rules, **options):
    """Verdicts of rules about one column `v`; `confidence` and so on are options."""
    ids = [f"e{i}" for i in range(len(base))]
    folder.mkdir(exist_ok=True)
    paths = [
        write_columns(folder / f"{name}.parquet", {"example_id": ids, "v": pa.array(v, from_pandas=False)})
        for name, v in (("base", base), ("new", new))
    ]
    return memdiag.diff(*paths, *rules, **options).outcome.verdicts


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_values_that_became_nan_or_infinite_fail(tmp_path, odd):
    x = np.random.default_rng(1).gamma(2.0, size=50).tolist()
    became = [odd if i < 45 else value - 0.001 * i for i, value in enumerate(x)]
    for base, new in ((x, became), (became, x), (became, became)):
        for verdict in of_values(tmp_path, base, new, "v: +9", "v: -9", "v: ±9"):
            assert (verdict.verdict, verdict.observed, verdict.lo, verdict.p) == ("fail", None, None, None)
            assert verdict.note == "undefined: 45 pairs became NaN or infinite, or were"
    assert of_values(tmp_path, x, [*x[:-1], odd], "v: +9")[0].note == "undefined: 1 pair became NaN or infinite, or was"


def test_values_on_one_side_only_are_told_and_are_a_change(tmp_path):
    x = np.random.default_rng(2).gamma(2.0, size=50).tolist()
    gone = [None] * 40 + x[40:]
    for base, new in ((x, gone), (gone, x)):
        (verdict,) = of_values(tmp_path, base, new, "v: +0")
        assert (verdict.verdict, verdict.n, verdict.observed) == ("inconclusive", 10, 0.0)
        assert verdict.note == "all values are equal; 40 pairs have a value on one side only"
    moved = [None if value is None else value + 0.1 * i for i, value in enumerate(gone)]
    (verdict,) = of_values(tmp_path, x, moved, "v: +0")
    assert (verdict.verdict, verdict.note) == ("fail", "40 pairs have a value on one side only")
    (verdict,) = of_values(tmp_path, gone, gone, "v: +0")
    assert (verdict.verdict, verdict.note) == ("pass", "no pair changed")


@pytest.mark.parametrize(
    ("difference", "why"),
    [
        ([0.5] * 20, "all values are equal"),
        ([0.5], "one value"),
        ([9.5] + [0.0] * 19, "too few different values for an interval"),
        ([2000.0] + [0.0] * 1999, "the mean hangs on too few of the values for an interval"),
    ],
)
def test_without_an_interval_what_breaks_its_rule_fails_and_only_what_keeps_it_is_unsure(tmp_path, difference, why):
    """Statistics must never open a gate: judged by its value, each of these would have failed."""
    found = of_values(tmp_path, [0.0] * len(difference), difference, "v: +0.4", "v: +0.6", "v: ±0.4", "v: -0", "v: ±9")
    wanted = ["fail", "inconclusive", "fail", "inconclusive", "inconclusive"]
    if difference[0] > 1000:
        wanted[1] = "fail"
    assert [v.verdict for v in found] == wanted
    assert {(v.note, v.p, v.q, v.lo, v.confidence) for v in found} == {(why, None, None, None, 0.95)}
    fallen = [-value for value in difference]
    found = of_values(tmp_path, [0.0] * len(difference), fallen, "v: -0.4", "v: ±0.4", "v: +0")
    assert [v.verdict for v in found] == ["fail", "fail", "inconclusive"]


@pytest.mark.parametrize(("rules", "confidence"), [(260, 0.95), (60, 0.99), (6, 0.999), (2, 1 - 1e-6)])
def test_what_rose_by_fifty_standard_deviations_fails_among_any_number_of_rules(tmp_path, rules, confidence):
    rng = np.random.default_rng(3)
    ids = [f"e{i}" for i in range(100)]
    base = {f"c{k}": rng.gamma(2.0, size=100) for k in range(rules)}
    new = {name: values + rng.normal(0, 0.1, 100) for name, values in base.items()}
    new["c0"] = base["c0"] + 50 * base["c0"].std() * (1 + 0.01 * rng.random(100))
    paths = [
        write_columns(tmp_path / f"{name}.parquet", {"example_id": ids, **of}) for name, of in (("b", base), ("n", new))
    ]
    asked = [f"c{k}: +0" for k in range(rules)]
    found = memdiag.diff(*paths, *asked, confidence=confidence, top=0).outcome.verdicts
    assert found[0].verdict == "fail"
    assert found[0].q < 1e-50
    assert sum(v.verdict != "inconclusive" for v in found) <= 1 + rules * (1 - confidence)


def test_a_rule_with_two_limits_passes_no_sooner_than_each_of_them_alone(tmp_path):
    x = np.random.default_rng(4).exponential(size=30) ** 1.5
    x = x - x.mean() - 1e-6
    limit = 1.03 * mean_interval(x, 0.95).hi
    found = of_values(tmp_path, [0.0] * 30, x, f"v: ±{limit:.6f}")[0]
    assert p_value(x, -limit) < p_value(x, limit) == pytest.approx(found.p, rel=1e-3)


def test_a_rate_that_no_value_could_break_has_no_p(tmp_path):
    ids = [str(i) for i in range(50)]
    base = write_columns(tmp_path / "b.parquet", {"example_id": ids, "hit": [True] * 50, "no": [False] * 50})
    new = write_columns(tmp_path / "n.parquet", {"example_id": ids, "hit": [True] * 49 + [False], "no": [False] * 50})
    always = (
        "count_if(base.hit) / count(*) <= 1",
        "count_if(base.no) / count(*) >= 0",
        "count_if(base.no) / count(*) BETWEEN 0 AND 1",
        "hit: -1",
        "hit: ±1",
    )
    found = memdiag.diff(base, new, *always).outcome.verdicts
    assert [(v.verdict, v.p, v.q) for v in found] == [("pass", None, None)] * 5
    real = ("count_if(base.hit) / count(*) >= 0.9", "count_if(base.no) / count(*) BETWEEN 0 AND 0.1", "hit: ±0.5")
    found = memdiag.diff(base, new, *real).outcome.verdicts
    assert [v.verdict for v in found] == ["pass"] * 3
    assert found[1].p == pytest.approx(2 * 0.9**50)  # of 0.1 alone: no rate is below 0
    assert found[0].p == pytest.approx(2 * 0.9**50)
    (touched,) = memdiag.diff(base, new, "count_if(base.hit) / count(*) < 1").outcome.verdicts
    assert touched.verdict == "inconclusive"  # a rate of 1 breaks it
    (apart,) = memdiag.diff(base, new, "count_if(new.hit) / count(*) < 1").outcome.verdicts
    assert (apart.verdict, apart.p) == ("pass", 0.0)  # and after one miss it cannot be 1


def test_the_seed_reaches_the_rules_and_the_columns(two):
    rules = ("loss: +0.01", "avg(new.loss - base.loss) <= 0.01")
    runs = [memdiag.diff(*two, *rules, seed=seed) for seed in (0, 0, 1)]
    ends = [[v.lo for v in run.outcome.verdicts] + [run.columns.table["lo"][0].as_py()] for run in runs]
    assert ends[0] == ends[1]
    for first, other in zip(ends[0], ends[2], strict=True):
        assert first != other == pytest.approx(ends[2][0], rel=1e-8)


def test_a_noise_floor_that_both_reports_state_widens_the_interval(tmp_path):
    plain = memdiag.diff(*pair(tmp_path, 0.1), "loss: +0.05").outcome.verdicts[0]
    assert plain.verdict == "fail"
    noisy = memdiag.diff(*pair(tmp_path, 0.1, noise_floor={"loss": 0.2}), "loss: +0.05")
    (verdict,) = noisy.outcome.verdicts
    floor = np.hypot(0.2, 0.2)
    expected = [
        plain.observed - np.hypot(plain.observed - plain.lo, floor),
        plain.observed + np.hypot(plain.hi - plain.observed, floor),
    ]
    np.testing.assert_allclose([verdict.lo, verdict.hi], expected, rtol=1e-7)
    assert verdict.verdict == "inconclusive"
    row = noisy.columns.to_pandas().set_index("column").loc["loss"]
    assert row["noise_floor"] == pytest.approx(floor)
    for nonsense in ("x", [1], {"loss": "big"}, {"loss": -1}, {"loss": float("inf")}):
        odd = memdiag.diff(*pair(tmp_path, 0.1, noise_floor=nonsense), "loss: +0.05").outcome.verdicts[0]
        assert odd.verdict == "fail"


def test_the_same_rule_as_sql_has_the_noise_floor_in_it_and_other_sql_says_that_it_has_not(tmp_path):
    two = pair(tmp_path, 0.1, noise_floor={"loss": 0.2})
    told = "the noise floor of loss is not in it; write loss: ±x"
    change, same, turned, spaced = memdiag.diff(
        *two,
        "loss: +0.05",
        "avg(new.loss - base.loss) <= 0.05",
        "avg(base.loss - new.loss) >= -0.05",
        'mean(  NEW."loss" -base.Loss ) <= 0.05',
    ).outcome.verdicts
    for verdict in (same, spaced):
        assert (verdict.verdict, verdict.note) == ("inconclusive", None)
        np.testing.assert_allclose([verdict.lo, verdict.hi, verdict.p], [change.lo, change.hi, change.p], rtol=1e-7)
    assert (turned.verdict, turned.note) == ("inconclusive", None)
    others = (
        "avg(new.loss) - avg(base.loss) <= 9",
        "avg(new.loss - 2 * base.loss) <= 9",
        "count_if(new.loss > base.loss + 1) / count(*) <= 0.9",
        "max(new.LOSS) < 99",
    )
    for verdict in memdiag.diff(*two, *others).outcome.verdicts:
        assert told in verdict.note, verdict
    (other,) = memdiag.diff(*two, "avg(new.margin - base.margin) <= 9").outcome.verdicts
    assert told not in (other.note or "")


# -- which reports fit together ------------------------------------------------------------------------------------


def test_reports_of_other_data_or_options_are_compared_only_anyway(memdiag_, two, tmp_path):
    identity = OF_ONE_DATA["identity"]
    for changed, named in (
        ({"dataset": "d2"}, "dataset"),
        ({"options": {"limit": 5}}, "options.limit"),
        ({"dataset": "d2", "options": {"limit": 5}}, "dataset, options.limit"),
    ):
        _, other = pair(tmp_path / named, identity=identity | changed)
        says = f"the reports are of different data or options (they differ in {named})"
        assert one_line(memdiag_("diff", two[0], other)).startswith(f"memdiag: {says}; make both alike, or compare")
        done = memdiag_("diff", two[0], other, "--anyway", "--json")
        assert done.code == 0
        assert json.loads(done.out)["notes"][0] == f"{says}: a change may come from that"
        assert says in memdiag_("diff", two[0], other, "--anyway", "--format", "markdown").out.replace("`", "")
    free = identity | {"checkpoints": {}, "device": "cuda", "options": {"limit": None, "steps": "100"}}
    _, other = pair(tmp_path / "free", identity=free)
    assert memdiag_("diff", two[0], other).code == 0
    bare = write_columns(tmp_path / "bare.parquet", {"example_id": ["e1"], "loss": [1.0]})
    assert "they differ in" in one_line(memdiag_("diff", two[0], bare))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-r", "los: +1"], "rule 'los: +1': no column 'los'; there are loss, margin, truth; did you mean 'loss'?"),
        (["--on", "loss,nothing"], "no column in both reports 'nothing'"),
        (["--confidence", "2"], "--confidence 2.0 is no probability"),
        (["--top", "-1"], "--top -1 is negative"),
        (["--top", "100001"], "--top 100001 is too many; give 100,000 or fewer"),
        (["--seed", "-1"], "--seed -1 is negative"),
        (["--inconclusive", "perhaps"], "it counts as pass or fail"),
        (["--format", "html"], "no format 'html'"),
        (["--out", "base.parquet"], "base.parquet is a file; give a directory to --out"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2_and_writes_nothing(memdiag_, two, args, says):
    assert says in one_line(memdiag_("diff", *two, *args))
    assert not Path("diff").exists()


def test_reports_of_two_kinds_or_none(memdiag_, two):
    write_kind(Path("entropy.parquet"), "entropy")
    assert "is a report 'score' and entropy.parquet is a report 'entropy'" in one_line(
        memdiag_("diff", two[0], "entropy.parquet")
    )
    assert "no such report: none.parquet" in one_line(memdiag_("diff", two[0], "none.parquet"))
    Path("text.parquet").write_text("hello")
    assert "is not a Parquet file" in one_line(memdiag_("diff", "text.parquet", two[1]))
    part = write_columns(Path("part.parquet"), {"example_id": ["e1"], "loss": [1.0]}, partial=True, **OF_ONE_DATA)
    assert "part.parquet is partial" in one_line(memdiag_("diff", two[0], part))
    done = memdiag_("diff", two[0], part, "--allow-partial", "-r", "loss: +9")
    assert "part.parquet is partial: its run has not finished" in done.err
    assert "299 rows are only in the base report, and in no mean" in done.err


def test_a_column_of_text_has_no_mean(tmp_path):
    paths = [
        write_columns(tmp_path / f"{i}.parquet", {"example_id": ["a", "b"], "name": ["x", f"y{i}"]}) for i in range(2)
    ]
    with pytest.raises(InputError, match="column 'name' is no number, so it has no mean"):
        memdiag.diff(*paths, "name: +1")
    row = memdiag.diff(*paths).columns.to_pandas().set_index("column").loc["name"]
    assert (row["changed"], row["kind"]) == (1, "other")


@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_of_report_can_be_compared(tmp_path, kind):
    a, b = (write_kind(tmp_path / f"{i}.parquet", kind, seed=i) for i in range(2))
    found = memdiag.diff(a, b)
    assert found.outcome.figures["paired"] == 6, found.outcome.figures
    assert found.passed
    same = memdiag.diff(a, a)
    assert set(same.outcome.figures["changed"].values()) <= {0}
    empty = write_kind(tmp_path / "empty.parquet", kind, 0)
    assert memdiag.diff(empty, empty).outcome.figures["paired"] == 0
    assert memdiag.diff(a, empty).outcome.figures["removed"] == 6
    if not any(column.nullable for column in tables.read_schema(a) if column.name in KEYS[kind]):
        nulls = memdiag.diff(a, write_kind(tmp_path / "nulls.parquet", kind, nulls=True)).columns.to_pandas()
        nullable = {column.name for column in tables.read_schema(a) if column.nullable}
        assert set(nulls[nulls["one_sided"] == 6]["column"]) == nullable & set(nulls["column"])
        assert set(nulls["one_sided"]) <= {0, 6}


# -- what is written -----------------------------------------------------------------------------------------------


def test_the_reports_of_a_diff(memdiag_, two):
    memdiag_("diff", *two, "-r", "loss: +0.01", "-r", "avg(new.loss - base.loss) < 9", "--top", 2)
    found = {name: memdiag.read(f"diff/{name}.parquet") for name in ("columns", "movers", "rules")}
    assert sorted(path.name for path in Path("diff").iterdir()) == [
        "columns.parquet",
        "movers.parquet",
        "rules.parquet",
    ]
    assert found["columns"].table["column"].to_pylist() == ["loss", "margin", "truth"]
    assert found["rules"].table["verdict"].to_pylist() == ["fail", "pass"]
    assert all(report.meta["passed"] is False for report in found.values())
    moved = found["movers"].to_pandas()
    assert moved[moved["column"] == "loss"]["rank"].tolist() == [1, 2]
    base, new = (memdiag.read(path).to_pandas().set_index("example_id")["loss"] for path in two)
    assert json.loads(moved["key"][0]) == {"example_id": (new - base).abs().idxmax()}
    assert found["columns"].meta["of"]["paired"] == N


def test_the_same_diff_gives_the_same_bytes_and_an_earlier_one_is_replaced(memdiag_, two):
    memdiag_("diff", *two, "-r", "loss: +0.01")
    first = {path.name: path.read_bytes() for path in Path("diff").iterdir()}
    memdiag_("diff", *two, "-r", "loss: +0.01")
    assert {path.name: path.read_bytes() for path in Path("diff").iterdir()} == first
    assert memdiag_("diff", *two, "-r", "loss: +9").code == 0
    assert tables.read("diff/rules.parquet").meta["passed"] is True


def test_nothing_else_is_written_over(memdiag_, two):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("x")
    assert "mine is not empty and holds no report of diff" in one_line(memdiag_("diff", *two, "--out", "mine"))
    write_kind(Path("mine/columns.parquet"), "score")
    assert "is a report 'score'; --force or another --out" in one_line(memdiag_("diff", *two, "--out", "mine"))
    assert memdiag_("diff", *two, "--out", "mine", "--force").code == 0
    assert Path("mine/notes.txt").read_text() == "x"


@pytest.mark.parametrize("name", ["columns", "movers", "rules"])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("how", ["itself", "link", "hard link", "dots"])
def test_a_report_that_is_compared_is_not_written_over(memdiag_, two, name, side, how):
    """Also where it stands in the way of an earlier diff's own file, and whatever --force says."""
    Path("d").mkdir()
    place, report = Path(f"d/{name}.parquet"), two[side]
    if how == "link":
        place.symlink_to(report.resolve())
    elif how == "hard link":
        place.hardlink_to(report)
    else:
        report.rename(place)
    given = [place if i == side and how in ("itself", "dots") else path for i, path in enumerate(two)]
    before = place.read_bytes()
    out = "d" if how != "dots" else "d/../d"
    for force in ([], ["--force"]):
        says = one_line(memdiag_("diff", *given, "--out", out, *force))
        assert says == f"memdiag: {out}/{name}.parquet is {given[side]}, which is compared; choose another --out"
    assert place.read_bytes() == before
    assert [path.name for path in Path("d").iterdir()] == [place.name]


def test_every_format_of_one_diff(memdiag_, two):
    about = ("diff", *two, "-r", "rise: avg(new.loss - base.loss) < 0.01", "-r", "margin: ±1")
    found = json.loads(memdiag_(*about, "--json").out)
    assert [rule["verdict"] for rule in found["rules"]] == ["fail", "pass"]
    assert found["figures"]["changed"]["margin"] == 0
    for format, says in [
        ("table", "loss: rows that moved most"), ("markdown", "rise"), ("junit", "<testsuites"), ("github", "::error")
    ]:  # fmt: skip
        done = memdiag_(*about, "--format", format)
        assert (done.code, says in done.out) == (1, True), format


def test_rerun_says_the_same(memdiag_, two):
    memdiag_("diff", *two, "-r", "loss: +0.01", "-r", "avg(new.loss - base.loss) < 9")
    for name in ("rules", "columns", "movers"):
        done = memdiag_("rerun", f"diff/{name}.parquet")
        assert done.out.splitlines()[-1] == "the same rows"
    write_kind(Path("strange.parquet"), "diff.rules")
    assert "does not say how it was made" in one_line(memdiag_("rerun", "strange.parquet"))


def test_rules_of_a_file_on_the_command_line(memdiag_, two):
    Path("rules.toml").write_text('[[rule]]\ncolumn = "loss"\nallow = "+0.01"\nname = "no rise"\n')
    done = memdiag_("diff", *two, "--rules", "rules.toml")
    assert (done.code, "fail: no rise: observed" in done.err) == (1, True)


def test_diff_starts_without_what_is_slow(two):
    code = (
        "import sys\n"
        "from memdiag.cli import run\n"
        "args = ['diff', 'base.parquet', 'new.parquet', '-r', 'loss: +9', '-r', 'truth: +1', '-q']\n"
        "try:\n    run(args)\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "slow = {'torch', 'transformers', 'pandas', 'matplotlib', 'scipy.stats', 'jinja2', 'rich'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
