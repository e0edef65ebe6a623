"""A rule taken apart, run over rows and judged: by hand, against the same in Python, and what must not change it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from reports import write_columns
from scipy import stats

from memdiag.errors import InputError
from memdiag.judging import judge, judged, p_of_limits
from memdiag.mean_interval import MOST_RESAMPLED, Interval, mean_interval, of_moments
from memdiag.report_sql import opened
from memdiag.rule_sql import Mean, Rate, parse
from memdiag.rules import Rule

N = 60


def columns(n=N, seed=0):
    rng = np.random.default_rng(seed)
    loss = rng.gamma(2.0, size=n)
    return {
        "example_id": [f"e{i}" for i in range(n)],
        "loss": [None if i % 7 == 3 else float(x) for i, x in enumerate(loss)],
        "found": [bool(x > 2) for x in loss],
        "layer": [i % 3 for i in range(n)],
    }


@pytest.fixture
def report(tmp_path):
    return write_columns(tmp_path / "score.parquet", columns())


def one(report, sql, **options):
    with opened({"report": report}) as session:
        return judge(session, [Rule(sql, **options)], "report")[0]


@pytest.mark.parametrize(
    ("sql", "comparison", "limits", "statistic"),
    [
        ("avg(loss) < 1.2", "<", ("(1.2)",), Mean("(loss)", "true")),
        ("1.2 > avg(loss)", "<", ("(1.2)",), Mean("(loss)", "true")),
        ("1.2 <= avg(loss)", ">=", ("(1.2)",), Mean("(loss)", "true")),
        ("((mean(loss) >= -1))", ">=", ("(-1)",), Mean("(loss)", "true")),
        ("avg(loss) FILTER (WHERE layer = 1) <= 2 * 0.5", "<=", ("((2 * 0.5))",), Mean("(loss)", "((layer = 1))")),
        ("avg(loss)::FLOAT < 1", "<", ("(1)",), Mean("(loss)", "true")),
        ("avg(loss) BETWEEN 1 AND 2", "between", ("(1)", "(2)"), Mean("(loss)", "true")),
        ("avg(loss - 1) < 1", "<", ("(1)",), Mean("((loss - 1))", "true")),
        ("count_if(found) / count(*) < 0.1", "<", ("(0.1)",), Rate("(found)", "true")),
        ("count(*) FILTER (WHERE found) / count(*) < 0.1", "<", ("(0.1)",), Rate("(found)", "true")),
        ("count() FILTER (WHERE found)::DOUBLE / count(*) < 0.1", "<", ("(0.1)",), Rate("(found)", "true")),
        (
            "count_if(found) FILTER (WHERE layer = 1) / count(*) FILTER (WHERE layer = 1) < 0.1",
            "<", ("(0.1)",), Rate("(((layer = 1)) AND (found))", "((layer = 1))"),
        ),
        ("count(loss) / count(*) > 0.5", ">", ("(0.5)",), Rate("((loss) IS NOT NULL)", "true")),
        # no mean and no rate
        ("avg(DISTINCT loss) < 1", "<", ("(1)",), None),
        ("sum(loss) / count(*) < 1", "<", ("(1)",), None),
        ("count(*) / count(*) < 1", "<", ("(1)",), None),
        ("count_if(found) / sum(layer) < 1", "<", ("(1)",), None),
        ("count(*) FILTER (WHERE found) = 0", "=", ("(0)",), None),
        ("max(loss) < 1", "<", ("(1)",), None),
        ("avg(loss) < max(loss)", "<", ("(max(loss))",), None),
        ("avg(loss) BETWEEN min(loss) AND 2", "between", ("(min(loss))", "(2)"), None),
        ("avg(CASE WHEN found THEN 1 ELSE 0 END) < 1", "<", ("(1)",),
         Rate("((CASE  WHEN (found) THEN (1) ELSE 0 END) = 1)", "true")),
        ("avg(CASE WHEN found THEN 2 ELSE 0 END) < 1", "<", ("(1)",),
         Mean("(CASE  WHEN (found) THEN (2) ELSE 0 END)", "true")),
        ("avg(found::INT) < 1", "<", ("(1)",), Mean("(CAST(found AS INTEGER))", "true", "(found)")),
        ("avg(loss) + 1 < 2", "<", ("(2)",), None),
        ("avg(loss) < 1 AND true", None, (), None),
        ("NOT avg(loss) < 1", None, (), None),
        ("bool_and(found)", None, (), None),
    ],
)  # fmt: skip
def test_a_rule_is_taken_apart(report, sql, comparison, limits, statistic):
    with opened({"report": report}) as session:
        found = parse(session, sql, of="rule")
    assert (found.comparison, found.limits, found.statistic) == (comparison, limits, statistic)


@pytest.mark.parametrize(
    "sql",
    [
        "", " ", "-- nothing", "1 = 1; SELECT 2", "true, false", "true FROM report", "true WHERE true",
        "true GROUP BY 1", "true LIMIT 1", "true UNION SELECT true", "true USING SAMPLE 5",
        "true; DROP VIEW report; --", "true FROM (SELECT 1)",
        "true ORDER BY 1", "true HAVING true", "true QUALIFY true", "DISTINCT true", "true AS x", "*", "true) OR (true",
        "avg(loss) < 1 ) or (true", "true) FROM report WHERE (true", "COPY report TO 'x'", ")", "(",
        "avg(loss) <", "/*", "'",
        '"', "\x00", "$1 = 1", "? = 1", "avg(loss) < 1 --",
    ],
)  # fmt: skip
def test_a_rule_is_one_expression(report, sql):
    if sql == "avg(loss) < 1 --":  # a comment at the end is one
        assert one(report, sql).verdict == "fail"
        return
    with pytest.raises(InputError) as caught:
        one(report, sql)
    assert "\n" not in str(caught.value)
    if sql.startswith(("true ", "true,")):  # SQL that parses, but does more than a rule
        assert "must be one SQL expression, such as avg(mbe) < 1.2, and no statement" in str(caught.value)


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("loss < 1", "is about one row; say what of all rows"),
        ("found", "is about one row"),
        ("avg(loss)", "gives double, not true or false; compare it with a limit"),
        ("avg(found) < 1", r"takes the mean of truth values; make them numbers: avg\(…::INT\)"),
        ("avg(los) < 1", "no column 'los'; .* did you mean 'loss'"),
        ("loss OVER () < 1", "is no SQL"),
        ("avg(loss) < 'x'", "Could not convert"),
        ("(SELECT count(*) FROM read_csv('/etc/passwd')) > 0", "SQL here reaches no files"),
        ("(SELECT count(*) FROM duckdb_settings()) > 0", r"SQL here reaches no files.*\(duckdb_settings\)"),
        ("(SELECT count(*) FROM information_schema.tables) > 0", r"SQL here reaches no files.*\(tables\)"),
        ("(SELECT count(*) FROM duckdb_views) > 0", r"SQL here reaches no files.*\(duckdb_views\)"),
        ("(SELECT count(*) FROM '/etc/passwd.csv') > 0", "SQL here reaches no files"),
    ],
)
def test_what_a_rule_may_not_be(report, sql, says):
    with pytest.raises(InputError, match=says) as caught:
        one(report, sql)
    assert str(caught.value).startswith("rule ")


def test_a_where_is_a_condition_of_rows(report):
    for where, says in [
        ("layer = ", "--where .* is no SQL"),
        ("true) OR (true", "is no SQL"),
        ("lay = 1", "--where .*no column 'lay'.*did you mean 'layer'"),
        ("true; DROP VIEW report", "is no SQL"),
        ("avg(loss) > 1", "--where"),
    ]:
        with pytest.raises(InputError, match=says):
            one(report, "count(*) > 0", where=where)


def test_values_by_hand(tmp_path):
    report = write_columns(tmp_path / "r.parquet", {"x": [1.0, 2.0, 6.0, None], "ok": [True, False, True, True]})
    for sql, verdict, observed, limit, n in [
        ("avg(x) < 3", "fail", 3.0, 3.0, 3),  # rows with a value
        ("avg(x) <= 3", "pass", 3.0, 3.0, 3),
        ("avg(x) FILTER (WHERE ok) <= 3.5", "pass", 3.5, 3.5, 2),
        ("3 < max(x)", "pass", 6.0, 3.0, 4),
        ("count(*) FILTER (WHERE ok) = 3", "pass", 3.0, 3.0, 4),
        ("count(x) / count(*) > 0.75", "fail", 0.75, 0.75, 4),
        ("avg(x) BETWEEN 2 AND 3", "pass", 3.0, 3.0, 3),
        ("median(x) != 2", "fail", 2.0, 2.0, 4),
        ("max(x) > min(x)", "pass", 6.0, 1.0, 4),
        ("bool_and(ok)", "fail", None, None, 4),
        ("max(x) > 1 AND min(x) > 1", "fail", None, None, 4),
        ("min(ok::VARCHAR) = 'false'", "pass", None, None, 4),  # text is compared, and is no figure
    ]:
        found = one(report, sql)
        assert (found.verdict, found.observed, found.limit, found.n) == (verdict, observed, limit, n), sql
        assert (found.lo, found.hi, found.confidence, found.method, found.p, found.q) == (None,) * 6
        assert found.least == (2.0 if "BETWEEN" in sql else None)


def test_undefined_fails_and_says_so(tmp_path):
    report = write_columns(tmp_path / "r.parquet", {"x": [None, None, 1.0], "k": [0, 0, 1]})
    for confidence in (None, 0.95):
        found = one(report, "avg(x) < 3", where="k = 0", confidence=confidence)
        assert (found.verdict, found.observed) == ("fail", None)
        assert "undefined" in found.note
        found = one(report, "avg(x) < 3", where="k = 7", confidence=confidence)
        assert (found.verdict, found.observed, found.n) == ("fail", None, 0)
        assert found.note.startswith("undefined: no row has a value")
    assert one(report, "avg(x) < NULL").note == "undefined: its limit is null"
    for sql in (
        "count(x) / count(*) FILTER (WHERE k = 5) < 1", "avg(x / 0) > 0", "avg(x) > 'nan'", "avg(x) < 'inf'",
        "avg('nan'::DOUBLE) > 0.2 AND true",
        "NOT (avg('nan'::DOUBLE) < 0.2)", "count_if(x > 9) / count_if(x > 9) > 0.9 AND count(*) > 2",
        "count(*) > 2 OR avg(x / 0) BETWEEN 0 AND 1",
    ):  # fmt: skip
        for confidence in (None, 0.95):
            found = one(report, sql, confidence=confidence)
            assert (found.verdict, found.lo) == ("fail", None), sql
            assert found.note.startswith("undefined: ")


def test_figures_are_those_of_a_plain_loop(report):
    rows = columns()
    loss = [x for x in rows["loss"] if x is not None]
    with opened({"report": report}) as session:
        rules = [
            Rule("avg(loss) < 1.2", where="layer = 1", confidence=0.9),
            Rule("avg(loss) < 2"),
            Rule("count_if(found) / count(*) <= 0.4", confidence=0.9),
            Rule("avg(found::INT) <= 0.4", confidence=0.9),
            Rule("count_if(found) FILTER (WHERE layer = 2) / count(*) FILTER (WHERE layer = 2) <= 0.4", confidence=0.9),
            Rule("count(loss) FILTER (WHERE found) / count(*) > 0", confidence=0.9),
            Rule("quantile_cont(loss, 0.9) < 5", confidence=0.9),
        ]
        found = judge(session, rules, "report", seed=3)
    of_layer = [x for x, layer in zip(rows["loss"], rows["layer"]) if layer == 1 and x is not None]
    expected = mean_interval(np.array(of_layer), 0.9, seed=3)
    np.testing.assert_allclose(
        [found[0].observed, found[0].lo, found[0].hi], [np.mean(of_layer), expected.lo, expected.hi]
    )
    assert (found[0].n, found[0].method) == (len(of_layer), "bootstrap-t")
    assert found[1].observed == pytest.approx(np.mean(loss), rel=1e-11)
    for verdict, hits, n in [
        (found[2], sum(rows["found"]), N),
        (found[3], sum(rows["found"]), N),
        (found[4], sum(f for f, layer in zip(rows["found"], rows["layer"]) if layer == 2), rows["layer"].count(2)),
        (found[5], sum(f and x is not None for f, x in zip(rows["found"], rows["loss"])), N),
    ]:
        exact = stats.binomtest(hits, n).proportion_ci(0.9, "exact")
        np.testing.assert_allclose(
            [verdict.observed, verdict.lo, verdict.hi], [hits / n, exact.low, exact.high], rtol=1e-9
        )
        assert (verdict.n, verdict.method, verdict.confidence) == (n, "Clopper-Pearson", 0.9)
    assert found[6].observed == pytest.approx(np.quantile(loss, 0.9))
    assert (found[6].lo, found[6].confidence) == (None, None)
    assert "judged by its value" in found[6].note


def test_many_values_take_the_interval_of_their_moments(tmp_path):
    far = 1e7  # from 0, where third powers lose their digits
    x = np.random.default_rng(1).gamma(0.5, size=MOST_RESAMPLED + 1) + far
    report = write_columns(tmp_path / "r.parquet", {"x": x})
    found = one(report, f"avg(x) < {far + 1}", confidence=0.95)
    skewness = float(stats.skew(x, bias=False))
    expected = of_moments(len(x), float(x.mean()), float(x.std(ddof=1)), skewness, 0.95)
    mean = x.mean()
    np.testing.assert_allclose([mean - found.lo, found.hi - mean], [mean - expected.lo, expected.hi - mean], rtol=5e-3)
    assert found.method == expected.method != "bootstrap-t"


def test_the_order_of_rows_and_what_is_asked_beside_changes_nothing(tmp_path):
    rows = columns()
    order = np.random.default_rng(5).permutation(N)
    mixed = {name: [values[i] for i in order] for name, values in rows.items()}
    rule = Rule("avg(loss) < 2", confidence=0.95)
    with opened({"report": write_columns(tmp_path / "a.parquet", rows)}) as session:
        alone = judge(session, [rule], "report")[0]
        beside = judge(session, [Rule("count(*) > 0", where="layer = 1"), Rule("max(loss) < 9"), rule], "report")[2]
    assert alone == beside
    assert one(write_columns(tmp_path / "b.parquet", mixed), rule.sql, confidence=0.95) == alone


def test_a_rate_of_zero_is_not_sure(tmp_path):
    """Nothing found among 60 examples: up to 6 % may still be (1 - 0.025^(1/60))."""
    report = write_columns(tmp_path / "r.parquet", {"found": [False] * 60, "zero": [0.0] * 60})
    found = one(report, "count_if(found) / count(*) <= 0.05", confidence=0.95)
    assert (found.verdict, found.lo) == ("inconclusive", 0.0)
    assert found.hi == pytest.approx(1 - 0.025 ** (1 / 60))
    assert one(report, "avg(found::INT) <= 0.07", confidence=0.95).verdict == "pass"
    # numbers that happen to be all the same have no spread to tell an interval from
    constant = one(report, "avg(zero) <= 0.05", confidence=0.95)
    assert (constant.verdict, constant.observed, constant.lo) == ("inconclusive", 0.0, None)
    assert constant.note


def test_a_share_must_be_one(report):
    """Hits that are not among those below make no share, whatever the quotient is."""
    found = one(report, "count_if(layer = 1) / count(*) FILTER (WHERE layer = 2) < 5", confidence=0.95)
    assert (found.verdict, found.lo) == ("inconclusive", None)
    assert "no share" in found.note


def test_whole_numbers_that_happen_to_be_0_and_1_are_no_rate(tmp_path):
    """A count that is 100 once in a hundred rows: fifty zeros do not show that its mean is small."""
    zeros = write_columns(tmp_path / "r.parquet", {"events": [0] * 60, "ok": [False] * 60})
    for sql in ("avg(events)", "avg(events::DOUBLE)"):
        found = one(zeros, f"{sql} <= 0.07", confidence=0.95)
        assert (found.verdict, found.lo, found.method) == ("inconclusive", None, None)
    for sql in (
        "avg(ok::INT)",
        "avg(CASE WHEN ok THEN 1 ELSE 0 END)",
        "avg((events > 0)::DOUBLE)",
        "avg(ok::INT)::DOUBLE",
    ):
        found = one(zeros, f"{sql} <= 0.07", confidence=0.95)
        assert (found.verdict, found.method) == ("pass", "Clopper-Pearson"), sql
    mixed = write_columns(tmp_path / "m.parquet", {"ok": [True, None, False, True]})
    found = one(mixed, "avg(ok::INT) < 1", confidence=0.95)
    assert (found.observed, found.n) == (pytest.approx(2 / 3), 3)
    assert one(mixed, "avg(CASE WHEN ok THEN 1 ELSE 0 END) < 1", confidence=0.95).n == 4


def test_statistics_never_open_a_gate(tmp_path):
    """What has no interval and does not hold as it stands fails, as it does without --confidence."""
    report = write_columns(tmp_path / "r.parquet", {"zero": [0.0] * 9, "few": [0.0] * 8 + [9.0]})
    for sql in ("avg(zero) > 0.9", "avg(few) > 5", "avg(zero) BETWEEN 1 AND 2"):
        for confidence in (None, 0.95):
            found = one(report, sql, confidence=confidence)
            assert (found.verdict, found.lo) == ("fail", None), sql
    assert one(report, "avg(zero) < 0.9", confidence=0.95).verdict == "inconclusive"
    assert one(report, "avg(zero) > 0.9", where="few > 5", confidence=0.95).verdict == "fail"  # one value


def test_a_cast_that_changes_the_figure_has_no_interval(report):
    for sql in ("avg(loss)::INT <= 2", "(count_if(found)::BOOLEAN)::INT / count(*) <= 0.1"):
        found = one(report, sql, confidence=0.95)
        assert found.lo is None, sql
        assert "judged by its value" in found.note or "no interval" in found.note
    assert one(report, "avg(loss)::DOUBLE <= 9", confidence=0.95).lo is not None


def test_text_is_compared_as_text(report):
    found = one(report, "max(example_id) < 'e9z'")
    assert (found.verdict, found.observed, found.limit) == ("pass", None, None)
    assert one(report, "sum(loss)::VARCHAR < '9'").observed is None


def test_a_limit_beyond_all_bounds(report):
    assert one(report, "avg(loss) < 1e300", confidence=0.95).verdict == "pass"


@pytest.mark.parametrize(
    "sql",
    [
        "random() < 2", "avg(random()) < 0.5", "today() > DATE '2020-01-01'", "current_setting('threads') > '0'",
        "(SELECT count(*) FROM report TABLESAMPLE 10%) > 0", "first(loss) < 9", "any_value(loss) < 9",
        "sleep_ms(5) IS NULL",
        "unnest([true, false])", "unnest([]::BOOLEAN[])", "bool_and(COLUMNS('loss|layer') > 0)",
        "avg(COLUMNS('l.*r|loss')) < 5",
    ],
)  # fmt: skip
def test_a_rule_gives_one_value_and_the_same_again(report, sql):
    with pytest.raises(InputError, match=r"the same again|gives several values|is of any row"):
        one(report, sql)
    with pytest.raises(InputError):
        one(report, "count(*) > 0", where=sql)


def test_what_looks_alike_and_gives_the_same_again(report):
    queries = [
        "(WITH t AS (SELECT max(loss) AS m FROM report) SELECT m FROM t) > 0",
        "(SELECT sum(i) FROM range(3) t(i)) = 3",
    ]
    for sql in (
        *queries,
        "first(loss ORDER BY example_id) < 99",
        "(SELECT max(x) FROM (SELECT unnest([1, 2]) AS x)) = 2",
    ):
        assert one(report, sql).verdict == "pass", sql


@pytest.mark.parametrize(
    "sql", ["avg(loss) < 0" + " + 1" * 400, "NOT " * 600 + "true", "abs(" * 600 + "1" + ")" * 600 + " > 0"]
)
def test_a_rule_may_be_long_but_not_deep(report, sql):
    try:
        assert one(report, sql).verdict in ("pass", "fail")
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either is right, a RecursionError is not


def test_a_noise_floor_widens_the_mean_that_it_is_of(report):
    rules = [Rule("avg(loss) < 9", confidence=0.95), Rule("avg(loss + 0) < 9", confidence=0.95)]
    with opened({"report": report}) as session:
        widened, other = judge(session, rules, "report", floors={"(loss)": 1.0})
        plain = judge(session, rules, "report")[0]
    assert (other.lo, other.hi) == (plain.lo, plain.hi)
    assert widened.hi == pytest.approx(plain.observed + math.hypot(plain.hi - plain.observed, 1.0))


def test_of_two_reports_without_a_pair_nothing_passes(report):
    rule = Rule("count(*) = 0", where="layer = 99")
    with opened({"report": report}) as session:
        (found,) = judge(session, [rule], "report", with_p=True)
        assert (found.verdict, found.note) == ("fail", "undefined: no row of the one report has a partner in the other")
        assert judge(session, [rule], "report")[0].verdict == "pass"


def test_between_two_limits_both_must_be_told_apart():
    def p_of(limit):
        return {0.0: 0.2, 1.0: 0.001}[limit]

    assert p_of_limits(p_of, [0.0, 1.0], 0.1) == 0.2
    assert p_of_limits(p_of, [0.0, 1.0], 0.9) == 0.2  # the nearest is not enough
    assert p_of_limits(p_of, [0.0, 1.0], 1.5) == 0.001
    assert p_of_limits(p_of, [0.0, 1.0], -0.5) == 0.2
    assert p_of_limits(p_of, [1.0], 9.0) == 0.001
    assert p_of_limits(p_of, [], 9.0) is p_of_limits(p_of, [1.0], None) is None


def test_infinite_values_have_no_interval(report):
    found = one(report, "avg(1 / layer) < 5", confidence=0.95)
    assert (found.verdict, found.observed, found.lo) == ("fail", None, None)
    assert found.note == "undefined: it compares inf with 5"


def test_a_rule_that_must_have_an_interval(report):
    for sql in ("max(loss) < 9", "avg(loss) = 1", "avg(loss) != 1", "avg(loss) < 1 OR true"):
        with pytest.raises(InputError, match="has a confidence, but no interval"):
            one(report, sql, confidence=0.95, must=True)
        assert one(report, sql, confidence=0.95).lo is None


@pytest.mark.parametrize(
    ("comparison", "limits", "lo", "hi", "verdict"),
    [
        ("<", [1], 0.5, 0.9, "pass"), ("<", [1], 0.5, 1.0, "inconclusive"), ("<", [1], 1.0, 2.0, "fail"),
        ("<", [1], 0.9, 2.0, "inconclusive"), ("<=", [1], 0.5, 1.0, "pass"), ("<=", [1], 1.0, 2.0, "inconclusive"),
        ("<=", [1], 1.1, 2.0, "fail"), (">", [1], 1.1, 2.0, "pass"), (">", [1], 1.0, 2.0, "inconclusive"),
        (">", [1], 0.5, 1.0, "fail"), (">=", [1], 1.0, 2.0, "pass"), (">=", [1], 0.5, 1.0, "inconclusive"),
        (">=", [1], 0.5, 0.9, "fail"), ("between", [1, 2], 1.0, 2.0, "pass"),
        ("between", [1, 2], 0.5, 1.5, "inconclusive"),
        ("between", [1, 2], 1.5, 2.5, "inconclusive"), ("between", [1, 2], 0.1, 0.9, "fail"),
        ("between", [1, 2], 2.1, 3, "fail"), ("between", [1, 2], 0.5, 3, "inconclusive"),
        ("<", [1], None, None, "inconclusive"), ("<", [None], 0.5, 0.9, "inconclusive"), ("<", [0], -2, -1, "pass"),
        (">", [0], -2, -1, "fail"), ("<", [math.nan], 0.5, 0.9, "inconclusive"),
    ],
)  # fmt: skip
def test_an_interval_is_judged_as_a_whole(comparison, limits, lo, hi, verdict):
    assert judged(comparison, limits, Interval(None, lo, hi, 9, None, None)) == verdict


def test_a_limit_far_above_is_a_pass_and_one_far_below_a_fail(report):
    mean = one(report, "avg(loss) < 0").observed
    for sql, verdict in [
        (f"avg(loss) < {mean * 3}", "pass"),
        (f"avg(loss) < {mean}", "inconclusive"),
        ("avg(loss) < 0", "fail"),
    ]:
        assert one(report, sql, confidence=0.95).verdict == verdict
