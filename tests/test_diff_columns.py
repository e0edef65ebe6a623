"""What changed between two reports: by hand, against the definition as a loop, whatever the order of rows."""

from __future__ import annotations

import dataclasses
import math
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reports import write_columns, write_kind
from scipy import stats

from memdiag import diff_columns, mean_interval, report_sql, tables
from memdiag.diff_columns import compared
from memdiag.diff_movers import movers
from memdiag.diff_rows import ColumnRow, MoverRow
from memdiag.errors import InputError
from memdiag.pairing import paired_by
from memdiag.report_kinds import ROWS
from memdiag.report_sql import opened


@contextmanager
def opened_pair(folder, base, new, kind="score", on=None):
    paths = {"base": folder / "base.parquet", "new": folder / "new.parquet"}
    for side, columns in (("base", base), ("new", new)):
        write_columns(paths[side], columns, kind=kind)
    with opened(paths) as session:
        pairing = paired_by(session, kind, on)
        yield session, pairing, [tables.read_schema(path) for path in paths.values()]


def compare(folder, base, new, *, kind="score", on=None, **options):
    with opened_pair(folder, base, new, kind, on) as (session, pairing, schemas):
        return compared(session, pairing, *schemas, **options)


def moved(folder, base, new, *, kind="score", top=10):
    with opened_pair(folder, base, new, kind) as (session, pairing, schemas):
        rows = movers(session, pairing, compared(session, pairing, *schemas, top=top))
    tables.to_batch(MoverRow, rows)
    return rows


def by_name(found):
    return {column.name: column for column in found.columns}


BASE = {"example_id": ["a", "b", "c", "d"], "loss": [1.0, 2.0, 4.0, 9.0], "hit": [True, False, True, None]}
NEW = {"example_id": ["e", "d", "b", "a"], "loss": [5.0, None, 2.0, 4.0], "hit": [True, True, True, False]}


def test_figures_by_hand(tmp_path):
    found = compare(tmp_path, BASE, NEW)
    assert (found.paired, found.added, found.removed) == (3, 1, 1)
    loss, hit = by_name(found)["loss"], by_name(found)["hit"]
    # pairs: a 1 -> 4, b 2 -> 2, d 9 -> null
    assert (loss.kind, loss.n, loss.changed) == ("number", 2, 2)
    assert (loss.base, loss.new, loss.difference, loss.min, loss.max) == (1.5, 3.0, 1.5, 0.0, 3.0)
    assert loss.std == pytest.approx(math.sqrt(4.5))
    assert loss.skewness == pytest.approx(0)
    # a true -> false, b false -> true, d null -> true
    assert (hit.kind, hit.n, hit.changed, hit.base, hit.new, hit.difference) == ("boolean", 2, 3, 0.5, 0.5, 0.0)
    assert hit.interval(0.95).method == "Newcombe, paired"


def plain(base, new, key, name):
    """The definition: a dictionary of each side, and a loop over the keys of both."""
    rows = [dict(zip(side[key], side[name])) for side in (base, new)]
    pairs = [(value, rows[1][k]) for k, value in rows[0].items() if k in rows[1]]

    def is_nan(x):
        return isinstance(x, float) and math.isnan(x)

    def is_known(x):
        return x is not None and not isinstance(x, str) and math.isfinite(x)

    changed = sum(not (x == y or (is_nan(x) and is_nan(y))) for x, y in pairs)
    one_sided = sum((x is None) != (y is None) for x, y in pairs)
    odd = sum(is_known(x) + is_known(y) < 2 for x, y in pairs if isinstance(x, float) and isinstance(y, float))
    return (changed, one_sided, odd), [(float(x), float(y)) for x, y in pairs if is_known(x) and is_known(y)]


def random_side(rng, ids, *, hostile):
    n = len(ids)
    x = [None if rng.random() < 0.2 else float(v) for v in np.round(rng.normal(size=n), 1)]
    if hostile:
        x = [math.nan if rng.random() < 0.1 else math.inf if rng.random() < 0.1 else v for v in x]
    whole = [None if rng.random() < 0.2 else int(v) for v in rng.integers(0, 4, n)]
    truth = [None if rng.random() < 0.2 else bool(v) for v in rng.integers(0, 2, n)]
    text = [None if rng.random() < 0.2 else str(v) for v in rng.integers(0, 3, n)]
    return {
        "example_id": list(ids),
        "x": pa.array(x, pa.float64(), from_pandas=False),
        "whole": pa.array(whole, pa.int32()),
        "truth": pa.array(truth, pa.bool_()),
        "text": pa.array(text, pa.string()),
    }


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("resampled", [True, False])
def test_the_figures_are_those_of_a_loop(hostile, in_order, resampled, tmp_path, monkeypatch):
    if not resampled:
        monkeypatch.setattr(diff_columns, "MOST_RESAMPLED", 0)
    rng = np.random.default_rng([hostile, in_order])
    ids = [None, *map(str, range(90))]
    base = random_side(rng, ids, hostile=hostile)
    others = ids if in_order else [ids[i] for i in rng.permutation(91)[:70]] + ["new 1", "new 2"]
    new = random_side(rng, others, hostile=hostile)
    found = compare(tmp_path, base, new)
    lists = [{name: v if isinstance(v, list) else v.to_pylist() for name, v in side.items()} for side in (base, new)]
    assert (found.paired, found.added, found.removed) == ((91, 0, 0) if in_order else (70, 2, 21))
    for column in found.columns:
        (changed, one_sided, odd), known = plain(*lists, "example_id", column.name)
        assert (column.changed, column.one_sided) == (changed, one_sided), column.name
        assert one_sided > 0
        assert column.odd == odd, column.name
        assert (odd > 0) == (hostile and column.name == "x"), column.name
        if column.name == "text":
            assert (column.kind, column.n) == ("other", None)
            continue
        d = np.array([y - x for x, y in known])
        assert column.n == len(d), column.name
        error = d.std(ddof=1) / math.sqrt(len(d))  # figures have nine digits
        assert column.base == pytest.approx(np.mean([x for x, _ in known]), rel=1e-8, abs=1e-8 * error)
        assert column.new == pytest.approx(np.mean([y for _, y in known]), rel=1e-8, abs=1e-8 * error)
        assert column.difference == pytest.approx(d.mean(), rel=1e-8, abs=1e-8 * error)
        assert column.std == pytest.approx(d.std(ddof=1), rel=1e-8)
        assert column.skewness == pytest.approx(stats.skew(d), abs=1e-8)
        assert (column.min, column.max) == (pytest.approx(d.min()), pytest.approx(d.max()))
        interval = column.interval(0.9)
        assert interval.n == len(d)
        if column.kind == "number":
            expected = mean_interval.mean_interval(d, 0.9)
            if not resampled:
                expected = mean_interval.of_moments(len(d), d.mean(), d.std(ddof=1), float(stats.skew(d)), 0.9)
            assert (interval.lo, interval.hi) == (pytest.approx(expected.lo), pytest.approx(expected.hi))
        assert column.p(interval.lo - 1e-6) <= 0.1 < column.p(interval.lo + 1e-3)


def test_the_order_of_rows_does_not_matter_and_swapped_sides_change_the_sign(tmp_path):
    rng = np.random.default_rng(3)
    ids = [str(i) for i in range(60)]
    base = {"example_id": ids, "x": rng.exponential(size=60).tolist(), "t": (rng.random(60) < 0.5).tolist()}
    new = {"example_id": ids, "x": rng.exponential(size=60).tolist(), "t": (rng.random(60) < 0.4).tolist()}
    order = rng.permutation(60)
    shuffled = {name: [values[i] for i in order] for name, values in new.items()}
    found = compare(tmp_path, base, new)
    same, swapped = compare(tmp_path, base, shuffled), compare(tmp_path, shuffled, base)
    for one, other, back in zip(found.columns, same.columns, swapped.columns):
        assert (one.difference, one.one_sided) == (other.difference, 0)
        assert back.difference == -one.difference
        assert (back.changed, back.n, back.std) == (one.changed, one.n, pytest.approx(one.std))
        assert (back.base, back.min) == (pytest.approx(one.new), pytest.approx(-one.max))
        lo, hi = one.interval(0.95).lo, one.interval(0.95).hi
        assert (other.interval(0.95).lo, other.interval(0.95).hi) == (pytest.approx(lo), pytest.approx(hi))
        # resamples are drawn by place in order of size, which a change of sign turns round: near, but not the same
        assert back.interval(0.95).lo == pytest.approx(-hi, abs=0.1 * (hi - lo))


def test_what_is_no_measure_is_not_averaged(tmp_path):
    base = {
        "example_id": ["a", "b"], "row": [0, 1], "label": [3, 4], "seconds": [1.0, 2.0], "speed": [1.0, 2.0],
        "only_base": [1, 2], "list": [[1.0], [2.0]], "mixed": ["1", "x"],
    }  # fmt: skip
    new = {
        "example_id": ["a", "b"], "row": [5, 6], "label": [3, 9], "seconds": [2.0, 3.0], "speed": [3.0, 2.0],
        "only_new": [1, 2], "list": [[1.0], [2.5]], "mixed": [1, 2],
    }  # fmt: skip
    paths = {"base": tmp_path / "b.parquet", "new": tmp_path / "n.parquet"}
    units = {"seconds": "s", "speed": "example/s"}
    for side, columns in (("base", base), ("new", new)):
        declared = {
            name: tables.column(pa.array(v).type, name, nullable=True, unit=units.get(name, ""))
            for name, v in columns.items()
        }
        row = tables.row_class("Row", "score", 1, declared)
        tables.write(paths[side], row, [[dict(zip(columns, v)) for v in zip(*columns.values())]], {"report": "score"})
    with opened(paths) as session:
        schemas = [tables.read_schema(path) for path in paths.values()]
        found = compared(session, paired_by(session, "score"), *schemas)
    assert found.not_compared == ("row", "seconds", "speed")
    assert (found.base_only, found.new_only) == (("only_base",), ("only_new",))
    assert {c.name: (c.kind, c.changed) for c in found.columns} == dict.fromkeys(
        ("label", "list", "mixed"), ("other", 1)
    )
    with pytest.raises(ValueError, match="label has no difference"):
        by_name(found)["label"].interval(0.95)


def test_no_pair_at_all_names_a_key_of_each_side(tmp_path):
    with pytest.raises(InputError, match=r'"x".*"a".*--on'):
        compare(tmp_path, {"example_id": ["a"], "v": [1.0]}, {"example_id": ["x"], "v": [1.0]})
    nothing = {"example_id": pa.array([], pa.string()), "v": pa.array([], pa.float64())}
    for base, new, counts in (
        (nothing, nothing, (0, 0, 0)),
        (nothing, {"example_id": ["a"], "v": [1.0]}, (0, 1, 0)),
        ({"example_id": ["a"], "v": [1.0]}, nothing, (0, 0, 1)),
    ):
        found = compare(tmp_path, base, new)
        assert (found.paired, found.added, found.removed) == counts
        column = by_name(found)["v"]
        assert (column.n, column.difference, column.interval(0.95).value, column.p(0.0)) == (0, None, None, None)
        tables.to_batch(ColumnRow, [one.row(0.95) for one in found.columns])


def test_one_pair_and_pairs_that_move_alike_have_no_interval(tmp_path):
    ids = ["a", "b", "c"]
    one = by_name(compare(tmp_path, {"example_id": ids[:1], "v": [1.0]}, {"example_id": ids[:1], "v": [1.5]}))["v"]
    assert (one.n, one.difference, one.std, one.interval(0.95).lo) == (1, 0.5, None, None)
    alike = by_name(
        compare(tmp_path, {"example_id": ids, "v": [0.1, 0.2, 0.3]}, {"example_id": ids, "v": [0.1, 0.2, 0.3]})
    )["v"]
    assert (alike.difference, alike.std, alike.skewness, alike.changed) == (0.0, 0.0, None, 0)
    assert alike.interval(0.95).note == "all values are equal"
    assert alike.row(0.95)["confidence"] is None


def test_a_shift_with_little_spread_keeps_its_moments(tmp_path, monkeypatch):
    monkeypatch.setattr(diff_columns, "MOST_RESAMPLED", 0)
    rng = np.random.default_rng(4)
    ids = [str(i) for i in range(500)]
    d = 1000 + 1e-5 * rng.exponential(size=500)
    column = by_name(compare(tmp_path, {"example_id": ids, "v": [0.0] * 500}, {"example_id": ids, "v": d.tolist()}))[
        "v"
    ]
    assert column.std == pytest.approx(d.std(ddof=1), rel=1e-4)
    assert column.skewness == pytest.approx(stats.skew(d), rel=1e-3)
    constant = by_name(compare(tmp_path, {"example_id": ids, "v": [0.0] * 500}, {"example_id": ids, "v": [0.1] * 500}))[
        "v"
    ]
    assert (constant.difference, constant.std) == (0.1, 0.0)


def test_values_too_large_to_square_are_told(tmp_path, monkeypatch):
    ids = ["a", "b", "c"]
    base, new = {"example_id": ids, "v": [0.0, 0.0, 0.0]}, {"example_id": ids, "v": [1e200, 3e200, -5e200]}
    for most in (5000, 0):
        monkeypatch.setattr(diff_columns, "MOST_RESAMPLED", most)
        column = by_name(compare(tmp_path, base, new))["v"]
        assert (column.std, column.interval(0.95).lo, column.p(0.0)) == (None, None, None)
        assert "too large to square" in column.interval(0.95).note
        tables.to_batch(ColumnRow, [column.row(0.95)])


def test_noise_of_single_values_and_of_means(tmp_path):
    ids = list("abcd")
    base = {"example_id": ids, "memorization": [0.0, 0.0, 0.0, 0.0], "se": [0.3, 0.3, 0.0, None]}
    new = {"example_id": ids, "memorization": [0.9, -1.0, 0.0, 9.0], "se": [0.4, 0.4, 0.0, 0.1]}
    found = by_name(compare(tmp_path, base, new, noise=({"memorization": 0.3, "se": 1.0}, {"memorization": 0.4})))
    # 1.96 * 0.5 = 0.98: of a and b only b is beyond it; c did not move; d's noise is not known
    assert found["memorization"].beyond_noise == 1
    assert found["se"].beyond_noise is None
    assert found["memorization"].noise_floor == pytest.approx(0.5)
    assert found["se"].noise_floor is None
    plain_one = dataclasses.replace(found["memorization"], noise_floor=None)
    for confidence in (0.8, 0.5):
        expected = mean_interval.widened(plain_one.interval(confidence), 0.5, confidence)
        assert found["memorization"].interval(confidence) == expected
    renamed = [
        {"mbe" if k == "memorization" else "mbe_se" if k == "se" else k: v for k, v in s.items()} for s in (base, new)
    ]
    assert by_name(compare(tmp_path, *renamed))["mbe"].beyond_noise == 1
    unknown = [{**side, "se": pa.nulls(4, pa.float64())} for side in (base, new)]
    assert by_name(compare(tmp_path, *unknown))["memorization"].beyond_noise is None
    only_base = {k: v for k, v in new.items() if k != "se"}
    assert by_name(compare(tmp_path, base, only_base))["memorization"].beyond_noise is None


@pytest.mark.parametrize("kind", sorted(ROWS))
def test_reports_of_every_kind_compare(kind, tmp_path):
    paths = {side: write_kind(tmp_path / f"{side}.parquet", kind, seed=i) for i, side in enumerate(("base", "new"))}
    with opened(paths) as session:
        pairing = paired_by(session, kind)
        found = compared(session, pairing, *(tables.read_schema(path) for path in paths.values()))
        rows = movers(session, pairing, found)
    assert found.paired == 6
    tables.to_batch(ColumnRow, [column.row(0.95) for column in found.columns])
    tables.to_batch(MoverRow, rows)
    assert {row["column"] for row in rows} == {c.name for c in found.columns if c.min or c.max}
    listed = [*(c.name for c in found.columns), *found.not_compared, *pairing.keys, *pairing.left_out]
    assert sorted(listed) == sorted(tables.read_schema(paths["base"]).names)


def test_columns_that_are_null_throughout_compare(tmp_path):
    columns = {"example_id": ["a", "b"], "v": pa.nulls(2, pa.float64()), "t": pa.nulls(2, pa.bool_())}
    found = compare(tmp_path, columns, columns)
    assert [(c.n, c.changed, c.interval(0.95).value) for c in found.columns] == [(0, 0, None)] * 2


def test_p_has_the_noise_floor_in_it(tmp_path):
    x = np.random.default_rng(6).normal(1, 1, 40)
    ids = [str(i) for i in range(40)]
    base, new = {"example_id": ids, "v": [0.0] * 40}, {"example_id": ids, "v": x.tolist()}
    column = by_name(compare(tmp_path, base, new, noise=({"v": 0.6}, {"v": 0.8})))["v"]
    expected = mean_interval.p_value(x, 0.2, floor=1.0)
    assert column.p(0.2) == pytest.approx(expected)
    assert expected > 0.05 > mean_interval.p_value(x, 0.2)


def test_up_to_so_many_differences_are_resampled(tmp_path, monkeypatch):
    monkeypatch.setattr(diff_columns, "MOST_RESAMPLED", 4)
    ids = list("abcde")
    base = {"example_id": ids, "four": [0.0, 0.0, 0.0, 0.0, None], "five": [0.0] * 5}
    new = {"example_id": ids, "four": [1.0, 2.0, 3.0, 9.0, 1.0], "five": [1.0, 2.0, 3.0, 9.0, 1.0]}
    found = by_name(compare(tmp_path, base, new))
    assert sorted(found["four"].values) == [1.0, 2.0, 3.0, 9.0]
    assert found["five"].values is None


@contextmanager
def threads(many, monkeypatch):
    """DuckDB with so many threads, whatever the machine has."""
    connect = report_sql.duckdb.connect
    monkeypatch.setattr(
        report_sql.duckdb,
        "connect",
        lambda *args, config=None, **rest: connect(*args, config={**config, "threads": str(many)}, **rest),
    )
    yield
    monkeypatch.setattr(report_sql.duckdb, "connect", connect)


@pytest.mark.parametrize("in_order", [True, False])
def test_figures_are_the_same_with_any_number_of_threads_and_row_groups(tmp_path, monkeypatch, in_order):
    rng = np.random.default_rng(7)
    n = 30_000
    base = {
        "example_id": np.arange(n),
        "x": rng.lognormal(size=n) * 1e3,
        "far": rng.normal(50, 1, n),
        "still": rng.random(n),
    }
    new = base | {"x": base["x"] + rng.normal(size=n) * 1e3, "far": np.abs(rng.normal(0, 0.1, n))}
    new["still"] = base["still"] + rng.permutation(np.repeat([-1e-3, 1e-3], n // 2))  # a mean of 0 but for rounding
    orders = [np.arange(n), np.arange(n)] if in_order else [rng.permutation(n) for _ in range(2)]
    found = []
    for run, (order, size, many) in enumerate(((0, 700, 1), (0, 700, 4), (1, 3000, 4), (1, 2048, 3))):
        folder = tmp_path / str(run)
        folder.mkdir()
        with opened_pair(folder, base, {name: v[orders[order]] for name, v in new.items()}):
            pass
        for path in folder.iterdir():  # in row groups of so many
            pq.write_table(pq.read_table(path), path, row_group_size=size)
        paths = {side: folder / f"{side}.parquet" for side in ("base", "new")}
        with threads(many, monkeypatch), opened(paths) as session:
            pairing = paired_by(session, "score")
            assert pairing.in_order == in_order
            columns = compared(session, pairing, *(tables.read_schema(path) for path in paths.values()))
            moved_most = movers(session, pairing, columns)
        found.append(([c.row(0.95) | {"p": c.p(0.01)} for c in columns.columns], moved_most))
    assert all(one == found[0] for one in found[1:])
    still = found[0][0][-1]
    assert abs(still["difference"]) <= 1e-9 * still["std"] / math.sqrt(n)


def test_figures_have_nine_digits_of_their_own_size_or_their_errors():
    to = diff_columns._to_digits
    assert to(1.23456789012, 0.0) == 1.23456789
    assert to(-0.000123456789012, 0.0) == -0.000123456789
    assert to(123456789012.0, 1.0) == 123456789000.0
    assert to(1e-17, 0.5) == 0.0
    assert math.copysign(1, to(-1e-17, 0.5)) == 1
    assert to(0.123456789012, 5.0) == 0.12345679
    assert to(None, 5.0) is None
    assert (to(0.0, 0.0), to(3.0, math.inf), to(1e300, 0.0)) == (0.0, 3.0, 1e300)


def test_the_seed_is_that_of_the_resamples(tmp_path):
    x = np.random.default_rng(8).exponential(size=40)
    ids = [str(i) for i in range(40)]
    sides = {"example_id": ids, "v": [0.0] * 40}, {"example_id": ids, "v": x.tolist()}
    for seed in (0, 1, 2):
        expected = mean_interval.mean_interval(x, 0.95, seed=seed)
        found = by_name(compare(tmp_path, *sides, seed=seed))["v"].interval(0.95)
        assert (found.lo, found.hi) == (pytest.approx(expected.lo), pytest.approx(expected.hi))
        row = by_name(compare(tmp_path, *sides, seed=seed))["v"].row(0.95)
        assert (row["lo"], row["hi"]) == (float(f"{found.lo:.9g}"), float(f"{found.hi:.9g}"))
    assert len({by_name(compare(tmp_path, *sides, seed=seed))["v"].interval(0.95).lo for seed in (0, 1, 2)}) == 3


def test_movers_come_by_size_then_key_with_who_was_added_and_removed(tmp_path):
    base = {"example_id": ["a", "b", "c", "d", "x", "y"], "v": [0.0, 0.0, 0.0, 0.0, 7.0, 8.0], "t": [True] * 6}
    new = {
        "example_id": ["d", "c", "b", "a", "q"],
        "v": [-2.0, 1.0, 2.0, 0.0, 5.0],
        "t": [True, False, False, True, True],
    }
    rows = moved(tmp_path, base, new, top=2)
    assert [(r["change"], r["column"], r["rank"], r["key"], r["base"], r["new"], r["difference"]) for r in rows] == [
        ("moved", "v", 1, '{"example_id": "b"}', 0.0, 2.0, 2.0),
        ("moved", "v", 2, '{"example_id": "d"}', 0.0, -2.0, -2.0),
        ("moved", "t", 1, '{"example_id": "b"}', 1.0, 0.0, -1.0),
        ("moved", "t", 2, '{"example_id": "c"}', 1.0, 0.0, -1.0),
        ("added", None, 1, '{"example_id": "q"}', None, None, None),
        ("removed", None, 1, '{"example_id": "x"}', None, None, None),
        ("removed", None, 2, '{"example_id": "y"}', None, None, None),
    ]
    assert [row["key"] for row in moved(tmp_path, base, new, top=9) if row["column"] == "v"] == [
        f'{{"example_id": "{key}"}}' for key in "bdc"
    ]  # a did not move
    assert [row["key"] for row in moved(tmp_path, base, new, top=1) if row["column"] == "v"] == ['{"example_id": "b"}']
    assert [row["change"] for row in moved(tmp_path, base, new, top=1)] == ["moved", "moved", "added", "removed"]
    assert moved(tmp_path, base, new, top=0) == moved(tmp_path, base, new, top=-1) == []
    assert moved(tmp_path, base, base) == []


def test_the_movers_are_those_of_a_loop(tmp_path):
    rng = np.random.default_rng(5)
    ids = list(range(3000))
    base = {"example_id": ids, "w": [i % 7 for i in ids], "v": rng.integers(0, 30, 3000).astype(float).tolist()}
    new = {"example_id": ids, "w": [i % 5 for i in ids], "v": rng.integers(0, 30, 3000).astype(float).tolist()}
    order = rng.permutation(3000)
    for other in (new, {name: [values[i] for i in order] for name, values in new.items()}):
        rows = moved(tmp_path, base, other, top=25)
        for name in ("w", "v"):
            d = {i: y - x for i, x, y in zip(ids, base[name], new[name])}
            expected = sorted((i for i in ids if d[i]), key=lambda i: (-abs(d[i]), i))[:25]
            found = [(row["key"], row["difference"]) for row in rows if row["column"] == name]
            assert found == [(f'{{"example_id": {i}}}', d[i]) for i in expected]


def test_movers_say_whether_they_moved_beyond_noise(tmp_path):
    ids = list("abc")
    base = {"example_id": ids, "memorization": [0.0, 0.0, 0.0], "se": [0.3, 0.3, None]}
    new = {"example_id": ids, "memorization": [0.9, -1.0, 0.5], "se": [0.4, 0.4, 0.1]}
    rows = [row for row in moved(tmp_path, base, new) if row["column"] == "memorization"]
    assert [row["beyond_noise"] for row in rows] == [True, False, None]


def test_many_columns_are_as_few(tmp_path):
    rng = np.random.default_rng(9)
    n, many = 30, 2 * diff_columns.TOGETHER + 3
    base = {"example_id": list(range(n)), **{f"c{k}": rng.normal(size=n) for k in range(many)}}
    new = {name: value if name == "example_id" else value + rng.normal(size=n) for name, value in base.items()}
    found, rows = by_name(compare(tmp_path, base, new)), moved(tmp_path, base, new, top=2)
    assert list(found) == [f"c{k}" for k in range(many)]
    for name, column in found.items():
        d = new[name] - base[name]
        assert column.difference == pytest.approx(d.mean(), rel=1e-7, abs=1e-9)
        largest = sorted(range(n), key=lambda i: -abs(d[i]))[:2]
        assert [row["difference"] for row in rows if row["column"] == name] == [d[i] for i in largest]
