"""Shards: whole or told to be damaged; and the examples they are about."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memdiag import InputError, tables
from memdiag.counterfactual_estimates import EXAMPLES, Examples, estimate
from memdiag.counterfactual_merge import _ranges
from memdiag.counterfactual_rows import ExampleRow, ShardRow
from memdiag.counterfactual_shards import (
    FOLDER,
    Shard,
    items_in,
    read_shard,
    run_of,
    shard_path,
    time_of,
    time_path,
    write_shard,
)
from memdiag.subsets import fingerprint

FIELDS = [field.name for field in dataclasses.fields(Shard)]


def shard_of(item=3, n=6, t=2, seed=0):
    rng = np.random.default_rng([seed, item])
    included = rng.random(n) < 0.5
    accuracy = rng.integers(0, 2, size=n + t).astype(np.float32)
    soft = rng.random(n + t).astype(np.float32)
    accuracy[1] = soft[1] = np.nan  # a text of one token
    rows = np.concatenate([np.arange(n) * 3, np.arange(t)])
    return Shard(item, 7 + item, fingerprint(included), f"{item:064d}", rows, included, accuracy, soft)


def equal(a, b):
    return all(
        np.array_equal(x, y, equal_nan=x.dtype.kind == "f") if isinstance(x, np.ndarray) else x == y
        for x, y in ((getattr(a, name), getattr(b, name)) for name in FIELDS)
    )


def test_what_is_written_is_read(tmp_path):
    for n, t in ((6, 2), (6, 0), (1, 0), (9, 1)):
        shard = shard_of(n=n, t=t) if n > 1 else dataclasses.replace(shard_of(n=2, t=0), rows=np.arange(2))
        write_shard(tmp_path, shard, "run")
        assert equal(read_shard(tmp_path, 3, "run"), shard)
        assert equal(read_shard(tmp_path, 3), shard)
    table = tables.read(shard_path(tmp_path, 3)).table
    assert table["held_out"].to_pylist() == [False] * 9 + [True]
    assert table["accuracy"][1].as_py() is None


def test_the_bytes_are_a_function_of_the_run_and_the_model(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder, shard_of(), "run")
    assert shard_path(tmp_path / "a", 3).read_bytes() == shard_path(tmp_path / "b", 3).read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model-00003.parquet"]


def test_names_sort_as_numbers_do(tmp_path):
    for item in (7, 100000, 99, 0):
        write_shard(tmp_path, shard_of(item), "run")
        assert equal(read_shard(tmp_path, item, "run"), shard_of(item))
    assert items_in(tmp_path) == [0, 7, 99, 100000]
    assert items_in(tmp_path / "nowhere") == []


def test_a_shard_of_another_run_or_model_is_refused(tmp_path):
    write_shard(tmp_path, shard_of(), "run")
    with pytest.raises(InputError, match="of another run or another model"):
        read_shard(tmp_path, 3, "other")
    shard_path(tmp_path, 4).write_bytes(shard_path(tmp_path, 3).read_bytes())
    for run in ("run", None):
        with pytest.raises(InputError, match=r"model-00004\.parquet is of another run or another model"):
            read_shard(tmp_path, 4, run)
    with pytest.raises(InputError, match=r"no such report: .*model-00005\.parquet"):
        read_shard(tmp_path, 5)


def rewritten(path, change=None, **meta):
    """The file with one column or what it says of itself changed, and written as a good Parquet file."""
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"memdiag"]) | meta
    if change is not None:
        table = change(table)
    pq.write_table(table.replace_schema_metadata({b"memdiag": json.dumps(about).encode()}), path)


def put(name, at, value):
    def change(table):
        values, field = table[name].to_pylist(), table.schema.field(name)
        values[at] = value
        return table.set_column(table.schema.get_field_index(name), field, pa.array(values, type=field.type))

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("accuracy", 0, 0.5),
        put("accuracy", 1, 0.0),  # null no longer
        put("accuracy", 7, None),
        put("soft", 2, 0.25),
        put("included", 0, not shard_of().included[0]),
        put("included", 5, not shard_of().included[5]),
        put("row", 5, 99),
        put("held_out", 5, True),
        put("held_out", 6, False),
        put("held_out", 0, True),
    ],
)
def test_one_value_changed_is_noticed(tmp_path, change):
    write_shard(tmp_path, shard_of(), "run")
    rewritten(shard_path(tmp_path, 3), change)
    with pytest.raises(InputError, match=r"model-00003\.parquet is damaged: its contents are not what was written"):
        read_shard(tmp_path, 3, "run")


def test_what_is_held_out_comes_last(tmp_path):
    """Else a coin could be read from another row."""
    shard = shard_of()
    included = shard.included & (np.arange(6) < 5)
    write_shard(tmp_path, dataclasses.replace(shard, included=included, subset=fingerprint(included)), "run")
    rewritten(shard_path(tmp_path, 3), lambda table: put("held_out", 6, False)(put("held_out", 5, True)(table)))
    with pytest.raises(InputError, match="is damaged"):
        read_shard(tmp_path, 3, "run")


@pytest.mark.parametrize("meta", [{"seed": 1}, {"subset": "0" * 64}, {"weights": "x"}, {"sha256": ""}, {"seed": None}])
def test_what_a_shard_says_of_itself_is_checked_too(tmp_path, meta):
    write_shard(tmp_path, shard_of(), "run")
    rewritten(shard_path(tmp_path, 3), **meta)
    with pytest.raises(InputError, match="is damaged"):
        read_shard(tmp_path, 3, "run")


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["soft"]),
        lambda table: table.append_column("more", pa.array(range(8))),
        lambda table: table.select(["held_out", "row", "included", "accuracy", "soft"]),
        lambda table: table.set_column(0, "row", table["row"].cast(pa.float64())),
        lambda table: table.set_column(1, "held_out", pa.array([None] * 8, type=pa.bool_())),
        lambda table: table.set_column(3, "accuracy", pa.array(["1"] * 8)),
    ],
)
def test_other_columns_are_no_shard(tmp_path, change):
    write_shard(tmp_path, shard_of(), "run")
    rewritten(shard_path(tmp_path, 3), change)
    with pytest.raises(InputError, match="is no shard of counterfactual"):
        read_shard(tmp_path, 3, "run")


def test_another_report_is_no_shard(tmp_path):
    write_shard(tmp_path, shard_of(), "run")
    rewritten(shard_path(tmp_path, 3), report="counterfactual")
    with pytest.raises(InputError, match="is no shard of counterfactual"):
        read_shard(tmp_path, 3, "run")


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    """300 places drawn at random, and every tenth length: never another value."""
    write_shard(tmp_path, shard_of(n=40, t=5), "run")
    path = shard_path(tmp_path, 3)
    whole, wanted, dice, noticed = path.read_bytes(), shard_of(n=40, t=5), random.Random(0), 0
    damaged = [whole[:at] for at in range(0, len(whole), len(whole) // 10)]
    for _ in range(300):
        at = dice.randrange(len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1 :])
    for content in damaged:
        path.write_bytes(content)
        try:
            found = read_shard(tmp_path, 3, "run")
        except InputError:
            noticed += 1
            continue
        assert equal(found, wanted)
    assert noticed > 0.3 * len(damaged)


def test_only_the_names_of_shards_count(tmp_path):
    write_shard(tmp_path, shard_of(), "run")
    for name in ("model-1.parquet", "model-x.parquet", "model-².parquet", "model-٣.parquet", "model-000004.parquet"):
        (tmp_path / name).write_bytes(b"")
    shard_path(tmp_path, 8).mkdir()
    assert items_in(tmp_path) == [3]


def test_the_run_is_the_digest_of_its_identity_as_json():
    identity = {"b": [1, 2.5], "a": {"é": None}}
    text = '{"a": {"\\u00e9": null}, "b": [1, 2.5]}'
    assert run_of(identity) == hashlib.sha256(text.encode()).hexdigest()
    assert run_of(json.loads(json.dumps(identity))) == run_of(identity)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{", "[" * 20_000, '{"seconds": 1}', '{"engine": "inline"}',
        '{"seconds": "x", "engine": "inline"}', '{"seconds": [], "engine": "inline"}',
        '{"seconds": -1, "engine": "inline"}', '{"seconds": NaN, "engine": "inline"}',
        '{"seconds": Infinity, "engine": "inline"}', '{"seconds": 1, "engine": 2}',
        '{"seconds": 1, "engine": "a\\u001b[31m"}',
    ],
)  # fmt: skip
def test_a_time_that_cannot_be_read_is_not_known(tmp_path, text):
    time_path(tmp_path, 3).write_text(text)
    assert time_of(tmp_path, 3) == {}
    assert time_of(tmp_path, 4) == {}


def test_a_time_is_read(tmp_path):
    time_path(tmp_path, 3).write_text('{"seconds": 1, "engine": "ray"}')
    assert time_of(tmp_path, 3) == {"seconds": 1.0, "engine": "ray"}


# -- the examples they are about -----------------------------------------------------------------------------------


def examples(folder, n=6, t=2, **columns):
    rows = {
        "row": [*range(n), *range(t)],
        "held_out": [False] * n + [True] * t,
        "example_id": [f"e{i}" for i in range(n + t)],
        "label": [i % 2 for i in range(n + t)],
        "truth": [None] * (n + t),
        "group_id": [f"e{i}" for i in range(n)] + [None] * t,
        "group": [*range(n)] + [None] * t,
        "content": [*range(n)] + [None] * t,
    } | columns
    about = {"report": ExampleRow.report}
    tables.write(folder / EXAMPLES, ExampleRow, [tables.from_columns(ExampleRow, rows)], about)


def test_examples_are_read_in_their_order(tmp_path):
    examples(tmp_path, group=[0, 1, 1, 0, 2, 2, None, None])
    found = Examples.read(tmp_path)
    assert (found.n, found.n_held_out, found.is_classifier) == (6, 2, True)
    assert found.first.tolist() == [0, 1, 4]
    assert found.truth() is None
    examples(tmp_path, truth=[True, False] * 3 + [None] * 2, label=[None] * 8)
    assert Examples.read(tmp_path).truth().tolist() == [True, False] * 3
    assert not Examples.read(tmp_path).is_classifier


@pytest.mark.parametrize(
    "columns",
    [
        {"held_out": [True] + [False] * 5 + [True] * 2},
        {"held_out": [True] * 8},
        {"group": [0, None, *range(4), None, None]},
        {"content": [None] * 8},
        {"group_id": [None] * 8},
    ],
)
def test_examples_that_are_not_told_apart_are_damaged(tmp_path, columns):
    examples(tmp_path, **columns)
    with pytest.raises(InputError, match=r"examples\.parquet is damaged: its training examples are not told apart"):
        Examples.read(tmp_path)


def test_another_report_holds_no_examples(tmp_path):
    write_shard(tmp_path, shard_of(), "run")
    shard_path(tmp_path, 3).rename(tmp_path / EXAMPLES)
    with pytest.raises(InputError, match=r"examples\.parquet holds no examples of counterfactual"):
        Examples.read(tmp_path)


def test_a_shard_of_other_examples_is_refused(tmp_path):
    examples(tmp_path)
    (tmp_path / FOLDER).mkdir()
    for n, t in ((5, 3), (6, 1), (7, 1)):
        write_shard(tmp_path / FOLDER, shard_of(n=n, t=t), "run")
        with pytest.raises(InputError, match=r"model-00003\.parquet is of other examples"):
            estimate(tmp_path, [3], 10)


def test_models_that_make_nothing_of_an_example_do_not_count_for_it(tmp_path):
    """The text of one token in `shard_of`; and halves by blocks, even and odd."""
    examples(tmp_path, label=[None] * 8)
    (tmp_path / FOLDER).mkdir()
    for item in range(8):
        write_shard(tmp_path / FOLDER, shard_of(item), "run")
    found = estimate(tmp_path, range(8), 2)
    assert (found.hard.n_in + found.hard.n_out).tolist() == [8, 0, 8, 8, 8, 8]
    assert np.isnan(found.hard.memorization[1])
    assert found.hard.kind == "bounded"
    even, odd = found.halves
    shards = [shard_of(item) for item in range(8)]
    for half, items in ((even, (0, 1, 4, 5)), (odd, (2, 3, 6, 7))):
        for i in (0, 2, 5):
            seen = [shards[k].accuracy[i] for k in items if shards[k].included[i]]
            assert half.n_in[i] == len(seen)
            assert np.isnan(half.p_in[i]) if not seen else half.p_in[i] == pytest.approx(np.mean(seen))
    assert estimate(tmp_path, [0, 1], 2).halves is None
    assert estimate(tmp_path, [2, 3], 2).halves is None
    row = found.models[4]
    own = shards[4].accuracy[:6]
    assert row["accuracy_in"] == pytest.approx(np.nanmean(own[shards[4].included]))
    assert row["accuracy_out"] == pytest.approx(np.nanmean(own[~shards[4].included]))
    assert row["test_accuracy"] == pytest.approx(shards[4].accuracy[6:].mean())
    assert (row["seconds"], row["engine"], row["seed"]) == (None, None, 11)


@pytest.mark.parametrize(
    ("items", "short"), [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([0, 1, 3, 4, 9], "0-1,3-4,9"), ([5, 7], "5,7")]
)
def test_ranges_are_told_in_short(items, short):
    assert _ranges(items) == short


def test_the_schema_of_a_shard_is_what_the_docs_say():
    assert [field.name for field in tables.schema_of(ShardRow)] == ["row", "held_out", "included", "accuracy", "soft"]
