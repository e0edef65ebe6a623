"""Which rows of two reports belong together."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pyarrow as pa
import pytest
from reports import write_columns, write_kind

from memdiag import tables
from memdiag.errors import InputError
from memdiag.pairing import KEYS, key_of, key_text, paired_by, quoted
from memdiag.report_kinds import ROWS, row_of
from memdiag.report_sql import opened


@contextmanager
def session_of(folder, base, new, kind="score"):
    paths = {"base": folder / "base.parquet", "new": folder / "new.parquet"}
    for side, columns in (("base", base), ("new", new)):
        write_columns(paths[side], columns, kind=kind)
    with opened(paths) as session:
        yield session


@pytest.mark.parametrize("kind", sorted(ROWS))
def test_every_report_has_a_key_of_its_own_columns(kind, tmp_path):
    names = tables.schema_of(row_of(kind)).names
    assert set(KEYS[kind]) <= set(names)
    assert key_of(kind, names) == KEYS[kind]
    paths = {side: write_kind(tmp_path / f"{side}.parquet", kind) for side in ("base", "new")}
    with opened(paths) as session:
        assert paired_by(session, kind).in_order


def test_rows_pair_by_key_in_whatever_order(tmp_path):
    base = {"example_id": ["a", "b", "c"], "loss": [1.0, 2.0, 3.0]}
    with session_of(tmp_path, base, {"example_id": ["c", "a", "d"], "loss": [30.0, 10.0, 40.0]}) as session:
        pairing = paired_by(session, "score")
        assert (pairing.keys, pairing.in_order, pairing.base_rows, pairing.new_rows) == (("example_id",), False, 3, 3)
        found = session.rows(f"SELECT b.loss, n.loss FROM {pairing.joined} ORDER BY ALL")
        assert found == [(1.0, 10.0), (2.0, None), (3.0, 30.0), (None, 40.0)]
    with session_of(tmp_path, base, {"example_id": ["a", "b", "c"], "loss": [3.0, 2.0, 1.0]}) as session:
        pairing = paired_by(session, "score")
        assert pairing.in_order
        assert session.rows(f"SELECT b.loss, n.loss FROM {pairing.joined} ORDER BY ALL") == [(1, 3), (2, 2), (3, 1)]


def test_an_order_that_breaks_late_is_seen(tmp_path):
    ids = [str(i) for i in range(5000)]
    swapped = [*ids[:-2], ids[-1], ids[-2]]
    with session_of(tmp_path, {"example_id": ids, "x": ids}, {"example_id": swapped, "x": swapped}) as session:
        pairing = paired_by(session, "score")
        assert not pairing.in_order
        assert session.rows(f"SELECT count(*) FROM {pairing.joined} WHERE b.x = n.x") == [(5000,)]


def test_one_report_of_more_rows_is_not_in_order_although_it_begins_alike(tmp_path):
    with session_of(tmp_path, {"example_id": ["a"]}, {"example_id": ["a", None]}) as session:
        assert not paired_by(session, "score").in_order


def test_nulls_in_keys_match_each_other(tmp_path):
    key = {"seed": [None, None, 1], "order": ["random", "ipr", "ipr"], "draw": [None, None, 2], "n_pruned": [0, 0, 0]}
    new = {name: values[::-1] for name, values in key.items()}
    with session_of(tmp_path, key, new, "prune-memorizers.pruning") as session:
        pairing = paired_by(session, "prune-memorizers.pruning")
        assert not pairing.in_order
        both = 'b."is on this side" AND n."is on this side"'
        assert session.rows(f"SELECT count(*) FROM {pairing.joined} WHERE {both}") == [(3,)]


def test_a_key_column_of_one_value_in_each_report_is_left_out(tmp_path):
    def entropy(checkpoint, layers, pooling=None):
        n = len(layers)
        text = pa.array([pooling] * n, pa.string())
        return {"checkpoint": [checkpoint] * n, "unit": ["patch"] * n, "pooling": text, "layer": layers}

    with session_of(tmp_path, entropy("step_1", [0, 1]), entropy("step_2", [1, 0]), "entropy") as session:
        pairing = paired_by(session, "entropy")
        assert pairing.keys == ("layer",)
        assert pairing.left_out == ("checkpoint", "unit", "pooling")
    two = {"checkpoint": ["x", "x", "y", "y"], "unit": ["patch"] * 4, "pooling": pa.nulls(4, pa.string())}
    with session_of(tmp_path, two | {"layer": [0, 1, 0, 1]}, entropy("x", [0, 1]), "entropy") as session:
        assert paired_by(session, "entropy").keys == ("checkpoint", "layer")
    some = {"checkpoint": ["x", "x"], "unit": ["dataset"] * 2, "pooling": [None, "mean"], "layer": [0, 0]}
    with session_of(tmp_path, some, some, "entropy") as session:  # a null is a value beside another
        assert paired_by(session, "entropy").keys == ("pooling", "layer")


def test_the_last_key_column_stays_so_that_two_single_examples_do_not_pair(tmp_path):
    with session_of(tmp_path, {"example_id": ["a"]}, {"example_id": ["b"]}) as session:
        assert paired_by(session, "score").keys == ("example_id",)


def test_other_columns_can_be_the_key(tmp_path):
    columns = {"example_id": ["a", "a"], "row": [0, 1], "order": ["x", "y"], "one": [1, 1]}
    with session_of(tmp_path, columns, columns) as session:
        assert paired_by(session, "score", "row").keys == ("row",)
        assert paired_by(session, "score", " one , row,row").keys == ("one", "row")  # as asked, though it is one value
        assert paired_by(session, "score", "order").keys == ("order",)
        assert paired_by(session, "unheard of", "row").keys == ("row",)
        with pytest.raises(InputError, match=r"no column in both reports 'rwo'.*did you mean 'row'"):
            paired_by(session, "score", "rwo")
        with pytest.raises(InputError, match="--on names no column"):
            paired_by(session, "score", " , ")
        with pytest.raises(InputError, match="nobody says how rows of a report 'unheard of' are paired; give --on"):
            paired_by(session, "unheard of")


def test_the_key_must_be_in_both(tmp_path):
    with (
        session_of(tmp_path, {"example_id": ["a"]}, {"id": ["a"]}) as session,
        pytest.raises(InputError, match="no column in both reports 'example_id'"),
    ):
        paired_by(session, "score")


@pytest.mark.parametrize("side", ["base", "new", "both"])
def test_a_key_that_repeats_is_told_with_how_often(side, tmp_path):
    once = {"example_id": ["a", "b", "c", "d"]}
    twice = {"example_id": ["a", "b", "b", "b"]}
    base, new = (twice if side in (which, "both") else once for which in ("base", "new"))
    told = "new" if side == "new" else "base"
    with (
        session_of(tmp_path, base, new) as session,
        pytest.raises(InputError, match=rf'"example_id": "b".* of 3 rows of the {told} report; give --on'),
    ):
        paired_by(session, "score")


def test_a_null_key_repeats_as_any_other(tmp_path):
    with (
        session_of(tmp_path, {"example_id": ["a", None, None]}, {"example_id": ["a"]}) as session,
        pytest.raises(InputError, match=r'"example_id": null.* of 2 rows'),
    ):
        paired_by(session, "score")


def test_empty_reports_pair(tmp_path):
    nothing = {"example_id": pa.array([], pa.string())}
    with session_of(tmp_path, nothing, nothing) as session:
        pairing = paired_by(session, "score")
        assert (pairing.base_rows, pairing.new_rows, pairing.in_order) == (0, 0, True)
    with session_of(tmp_path, nothing, {"example_id": ["a"]}) as session:
        assert not paired_by(session, "score").in_order


def test_a_key_is_shown_as_json():
    assert json.loads(key_text(("a", "b"), ('x"', None))) == {"a": 'x"', "b": None}
    assert key_text(("a",), ("é",)) == '{"a": "é"}'


def test_a_name_is_quoted_whatever_is_in_it():
    assert quoted('a"; DROP') == '"a""; DROP"'


@pytest.mark.parametrize(
    ("base", "new", "alike"),
    [
        (["1", "2"], [1, 2], False),
        ([1, 2], [1.0, 2.0], False),
        ([True, False], [1, 0], False),
        (pa.array([1, 2], pa.int8()), pa.array([1, 2], pa.uint64()), True),
        (pa.array([1, 2], pa.float32()), [1.0, 2.0], True),
    ],
)
def test_keys_of_types_that_cannot_be_told_equal_do_not_pair(base, new, alike, tmp_path):
    columns = {"row": [0, 1]}
    with session_of(tmp_path, {"example_id": base, **columns}, {"example_id": new, **columns}) as session:
        if alike:
            assert paired_by(session, "score").in_order
        else:
            said = r"key column 'example_id' is (VARCHAR|BIGINT|BOOLEAN) in the base report and (BIGINT|DOUBLE) in the"
            with pytest.raises(InputError, match=said):
                paired_by(session, "score")
        assert paired_by(session, "score", "row").in_order
