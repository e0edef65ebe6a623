"""Reports on disk: declared once, checked, written in one step, read back, and the pieces of an unfinished one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memdiag import tables
from memdiag.errors import IncompleteError, InputError
from memdiag.tables import Parts, Report, column


@dataclasses.dataclass(frozen=True)
class Row:
    report: ClassVar[str] = "weather"
    schema_version: ClassVar[int] = 1

    place: str = column(pa.string(), "where | who")
    degrees: float = column(pa.float64(), "how warm", unit="C")
    wind: float | None = column(pa.float64(), "how windy", unit="m/s", nullable=True)
    hour: int | None = column(pa.int32(), "when", nullable=True)


META = {"report": "weather", "identity": {"a": 1}}


def row(place="Oslo", degrees=1.5, wind=None, hour=None):
    return {"place": place, "degrees": degrees, "wind": wind, "hour": hour}


def written(path, *batches, meta=META):
    tables.write(path, Row, batches, meta)
    return path


def says(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- the declaration -----------------------------------------------------------------------------------------------


def test_the_schema_carries_doc_and_unit():
    schema = tables.schema_of(Row)
    assert schema.names == ["place", "degrees", "wind", "hour"]
    assert [str(field.type) for field in schema] == ["string", "double", "double", "int32"]
    assert [field.nullable for field in schema] == [False, False, True, True]
    assert schema.field("degrees").metadata == {b"doc": b"how warm", b"unit": b"C"}
    assert tables.described(schema)[2] == ("wind", "double", "m/s", True, "how windy")


def test_the_docs_table():
    assert tables.markdown(tables.schema_of(Row)).splitlines()[2:] == [
        r"| `place` | string |  |  | where \| who |",
        "| `degrees` | double | C |  | how warm |",
        "| `wind` | double | m/s | yes | how windy |",
        "| `hour` | int32 |  | yes | when |",
    ]


def test_a_column_without_metadata_can_be_described():
    assert tables.described(pa.schema([("x", pa.int8())])) == [("x", "int8", "", True, "")]


# -- writing -------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path):
    path = written(tmp_path / "deep" / "seed=1" / "w.parquet", [row(), row("Rome", 30.0, 2.5, 7)], [row("Bern")])
    report = tables.read(path)
    assert report.table.to_pylist() == [row(), row("Rome", 30.0, 2.5, 7), row("Bern")]
    assert (report.meta, report.path) == (META, path)
    assert tables.read_meta(path) == META
    assert tables.described(tables.read_schema(path)) == tables.described(tables.schema_of(Row))
    assert report.to_pandas()["degrees"].tolist() == [1.5, 30.0, 1.5]
    assert pq.ParquetFile(path).num_row_groups == 2
    assert os.listdir(path.parent) == ["w.parquet"]


def test_other_readers_find_doc_unit_and_run_metadata_in_the_file(tmp_path):
    schema = pq.read_schema(written(tmp_path / "w.parquet", [row()]))
    assert schema.field("degrees").metadata[b"unit"] == b"C"
    assert json.loads(schema.metadata[b"memdiag"]) == META


def test_nan_becomes_null_where_null_may_be(tmp_path):
    table = tables.read(written(tmp_path / "w.parquet", [row(wind=math.nan), row(wind=0.0)])).table
    assert table["wind"].to_pylist() == [None, 0.0]
    assert table["wind"].null_count == 1


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"place": "Oslo", "degrees": 1.0, "wind": None}, r"columns differ from Row: \['hour'\]"),
        (row() | {"rain": 1.0}, r"columns differ from Row: \['rain'\]"),
        (row(degrees=None), "column degrees may not be null"),
        (row(degrees=math.nan), "column degrees may not be null or NaN"),
        (row(place=None), "column place may not be null"),
        (row(wind=math.inf), "column wind holds an infinity"),
        (row(degrees=-math.inf), "column degrees holds an infinity"),
    ],
)
def test_rows_that_break_the_declaration_are_refused(tmp_path, bad, match):
    path = written(tmp_path / "w.parquet", [row()])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=match):
        written(path, [row()], [row(), bad])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.parquet"]


def test_a_value_of_the_wrong_type_is_refused(tmp_path):
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        written(tmp_path / "w.parquet", [row(degrees="warm")])
    assert os.listdir(tmp_path) == []


def test_same_rows_same_bytes(tmp_path):
    batches = [[row("Oslo", i / 7, i / 3, i) for i in range(50)], [row("Rome")]]
    first = written(tmp_path / "a.parquet", *batches).read_bytes()
    assert written(tmp_path / "b.parquet", *batches).read_bytes() == first
    reordered = {"identity": {"a": 1}, "report": "weather"}
    assert written(tmp_path / "c.parquet", *batches, meta=reordered).read_bytes() == first
    assert written(tmp_path / "d.parquet", *batches, meta=META | {"seed": 1}).read_bytes() != first


def test_a_report_without_rows_is_a_report(tmp_path):
    report = tables.read(written(tmp_path / "w.parquet", []))
    assert report.table.num_rows == 0
    assert report.table.schema.names == tables.schema_of(Row).names


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(143)])
def test_a_writer_stopped_midway_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = written(tmp_path / "w.parquet", [row()])
    before = path.read_bytes()

    def batches():
        yield [row("Rome")] * 1000
        assert [name for name in os.listdir(tmp_path) if name != "w.parquet"]  # it is being written beside it
        assert path.read_bytes() == before
        raise error

    with pytest.raises(type(error)):
        tables.write(path, Row, batches(), META)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.parquet"]


def test_a_device_or_pipe_is_never_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (
        lambda: tables.write(pipe, Row, [], META),
        lambda: tables.check_place(pipe, dict, force=True),
        lambda: tables.check_place(pipe, dict, force=False),
    ):
        with pytest.raises(InputError, match="pipe is no regular file; choose another --out"):
            write()
    assert pipe.is_fifo()


def test_a_link_that_waits_for_the_partial_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".w.parquet.partial").symlink_to(victim)
    tables.write(tmp_path / "w.parquet", Row, [], META)
    assert victim.read_text() == "mine"
    assert not (tmp_path / "w.parquet").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["victim", "w.parquet"]


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "w.parquet"
    with tables.replacing(path) as first:
        first.write(b"half")
        first.flush()
        with pytest.raises(InputError, match="another process is writing"):
            tables.write(path, Row, [], META)
        first.write(b" and whole")
    assert path.read_bytes() == b"half and whole"
    (tmp_path / ".w.parquet.partial").write_bytes(b"left by a killed process")
    tables.write(path, Row, [], META)
    assert os.listdir(tmp_path) == ["w.parquet"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"w\.parquet cannot be written \(Not a directory\)") as caught:
        written(tmp_path / "file" / "w.parquet", [row()])
    assert "--out" in says(caught)


def test_a_full_disk_is_incomplete_and_says_what_to_do(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables.os, "fsync", full)
    with pytest.raises(IncompleteError, match="the disk is full; free some space and run the same command") as caught:
        written(tmp_path / "w.parquet", [row()])
    assert says(caught).startswith(str(tmp_path / "w.parquet"))
    assert os.listdir(tmp_path) == []


# -- joining -------------------------------------------------------------------------------------------------------


def test_joining_parts_is_writing_their_concatenation(tmp_path):
    groups = [[[row("a", 1.0), row("b", 2.0)], [row("c", 3.0, 4.0)]], [[row("d", 5.0, None, 9)]], [[]]]
    parts = [written(tmp_path / f"{i}.parquet", *batches, meta={"i": i}) for i, batches in enumerate(groups)]
    tables.join(tmp_path / "joined.parquet", Row, parts, META)
    straight = written(tmp_path / "straight.parquet", *(batch for batches in groups for batch in batches))
    assert (tmp_path / "joined.parquet").read_bytes() == straight.read_bytes()
    file = pq.ParquetFile(tmp_path / "joined.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [2, 1, 1]


def test_the_order_of_parts_is_the_order_of_rows(tmp_path):
    parts = [written(tmp_path / f"{i}.parquet", [row(str(i))]) for i in range(3)]
    tables.join(tmp_path / "joined.parquet", Row, reversed(parts), META)
    assert tables.read(tmp_path / "joined.parquet").table["place"].to_pylist() == ["2", "1", "0"]


# -- reading -------------------------------------------------------------------------------------------------------


def refused(path, match):
    for reader in (tables.read, tables.read_meta):
        with pytest.raises(InputError, match=match) as caught:
            reader(path)
        assert str(path) in says(caught)


def test_what_is_not_a_report_is_refused_in_one_line(tmp_path):
    refused(tmp_path / "none.parquet", "no such report")
    (tmp_path / "text.parquet").write_text("hello\nworld\n")
    refused(tmp_path / "text.parquet", "is not a Parquet file")
    (tmp_path / "empty.parquet").touch()
    refused(tmp_path / "empty.parquet", "is not a Parquet file")
    refused(tmp_path, "is not a Parquet file")


@pytest.mark.parametrize(
    "metadata", [None, {"memdiag": "{"}, {"memdiag": "[1]"}, {"memdiag": "{}"}, {"memdiag": b"\xff"}]
)
def test_parquet_of_somebody_else_is_refused(tmp_path, metadata):
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata(metadata), tmp_path / "x.parquet")
    refused(tmp_path / "x.parquet", "no report of memdiag")


def test_a_report_cut_off_anywhere_is_refused(tmp_path):
    path = written(tmp_path / "w.parquet", [row(str(i), float(i)) for i in range(100)])
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 25):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError) as caught:
            tables.read(path)
        assert str(path) in says(caught)


def test_a_report_with_a_damaged_middle_is_refused_or_whole(tmp_path):
    path = written(tmp_path / "w.parquet", [row(str(i), float(i)) for i in range(100)])
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    assert tables.read_meta(path) == META  # it stands at the end of the file
    with pytest.raises(InputError, match="is damaged") as caught:
        tables.read(path)
    says(caught)


# -- what stands at a place, and what differs ----------------------------------------------------------------------

IDENTITY = {"options": {"alpha": 2.0, "limit": None}, "dataset": "d1", "checkpoints": {"a": {"weights": "w"}}}


def standing(path, identity=IDENTITY):
    return written(path, [row()], meta={"report": "weather", "identity": identity})


def check(path, identity=IDENTITY, *, force=False):
    return tables.check_place(path, lambda: identity, force=force)


def test_the_same_identity_is_recognised(tmp_path):
    path = standing(tmp_path / "w.parquet")
    assert check(path, json.loads(json.dumps(IDENTITY))) is True
    assert check(tmp_path / "other.parquet") is False


def test_an_identity_that_takes_time_is_asked_for_only_if_it_matters(tmp_path):
    def expensive():
        raise AssertionError

    assert tables.check_place(tmp_path / "w.parquet", expensive, force=False) is False
    assert tables.check_place(standing(tmp_path / "w.parquet"), expensive, force=True) is False


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dataset": "d2"}, "dataset"),
        ({"options": {"alpha": 1.0, "limit": None}}, "options.alpha"),
        ({"options": {"alpha": 1.0, "limit": 3}}, "options.alpha, options.limit"),
        ({"checkpoints": {"a": {"weights": "v"}}, "dataset": None}, "checkpoints.a.weights, dataset"),
        ({"checkpoints": {"b": {"weights": "w"}}}, "checkpoints.a, checkpoints.b"),
        ({"more": 1}, "more"),
    ],
)
def test_another_report_in_the_way_is_refused_with_what_differs(tmp_path, change, named):
    path = standing(tmp_path / "w.parquet")
    with pytest.raises(InputError) as caught:
        check(path, IDENTITY | change)
    assert f"(differs in {named})" in says(caught)
    assert "--force" in says(caught)


def test_anything_else_in_the_way_is_refused(tmp_path):
    for force in (False, True):
        with pytest.raises(InputError, match="is a directory; give a file name to --out"):
            check(tmp_path, force=force)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="--force or another --out") as caught:
        check(tmp_path / "notes.txt")
    says(caught)
    assert check(tmp_path / "notes.txt", force=True) is False
    with pytest.raises(InputError, match="cannot be written \\(File name too long") as caught:
        check(tmp_path / ("x" * 300))
    says(caught)


def test_differing_columns():
    table = pa.table({"x": [1.0, None], "y": ["a", "b"]})
    other = pa.table({"x": [1.0, 2.0], "y": ["a", "b"], "z": [0, 0]})
    assert tables.differing(Report(table, {}), Report(table, {})) == []
    assert tables.differing(Report(table, {}), Report(other, {})) == ["x", "z"]


# -- the pieces of an unfinished report ----------------------------------------------------------------------------

SHARED = {"report": "weather", "options": {"alpha": 2.0}}


def part(parts, name, identity):
    tables.write(parts.path(name), Row, [[row()]], {"report": "weather", "part": identity})


@pytest.fixture
def begin(tmp_path):
    """Parts of tmp_path/w.parquet, as the next process would open them: the one before has let go."""
    held = []

    def begin(identity=SHARED, *, force=False):
        for parts in held:
            parts._lock.close()  # as a killed process does it
        held.append(Parts(tmp_path / "w.parquet", identity, force=force))
        return held[-1]

    yield begin
    for parts in held:
        parts.close()


OTHER = {"report": "weather", "options": {"alpha": 1.0}}


def test_parts_go_on_where_they_were(tmp_path, begin):
    parts = begin()
    assert not parts.has("00000", "checkpoint-0", {"weights": "w"})
    part(parts, "00000", {"weights": "w"})
    again = begin()
    assert again.has("00000", "checkpoint-0", {"weights": "w"})
    assert not again.has("00001", "checkpoint-50", {"weights": "v"})
    again.remove()
    assert os.listdir(tmp_path) == []


def test_parts_of_another_run_are_refused_with_what_differs(begin):
    part(begin(), "00000", {})
    for _ in range(2):  # a refusal lets go of them, too
        with pytest.raises(
            InputError, match=r"begun with other inputs \(differs in options\.alpha\).*--force"
        ) as caught:
            begin(OTHER)
        says(caught)
    assert begin().has("00000", "checkpoint-0", {})


def test_a_run_that_finished_nothing_is_in_nobody_s_way(begin):
    begin()
    begin(OTHER)


def test_force_starts_afresh(begin):
    part(begin(), "00000", {})
    assert not begin(OTHER, force=True).has("00000", "checkpoint-0", {})


def test_a_checkpoint_that_changed_since_is_named(begin):
    parts = begin()
    part(parts, "00000", {"weights": "w"})
    with pytest.raises(InputError, match=r"checkpoint-0 has changed since .*w\.parquet was begun.*--force"):
        parts.has("00000", "checkpoint-0", {"weights": "other"})


@pytest.mark.parametrize("left", [None, "", '{"report": "wea', "\xff\xfe"])
def test_killed_while_the_identity_was_made(begin, left):
    """Nobody knows what the parts belong to, so none of them may be used."""
    parts = begin()
    part(parts, "00000", {"weights": "w"})
    file = parts.directory / "identity.json"
    file.unlink()
    if left is not None:
        file.write_text(left, encoding="latin-1")
    again = begin()
    assert not again.has("00000", "checkpoint-0", {"weights": "w"})
    assert json.loads(file.read_text()) == SHARED


def test_a_directory_without_a_part_is_removed_and_one_with_parts_stays(tmp_path, begin):
    begin().close()
    assert os.listdir(tmp_path) == []
    parts = begin()
    part(parts, "00000", {})
    parts.close()
    assert begin().has("00000", "checkpoint-0", {})


def test_only_one_at_a_time(tmp_path):
    out = tmp_path / "w.parquet"
    first = Parts(out, SHARED, force=False)
    for force in (False, True):
        with pytest.raises(InputError, match=r"another process is writing .*; wait for it") as caught:
            Parts(out, SHARED, force=force)
        says(caught)
    first.close()
    second = Parts(out, SHARED, force=False)
    first.close()  # once more does no harm to the second
    with pytest.raises(InputError, match="another process is writing"):
        Parts(out, SHARED, force=False)
    second.remove()
    assert os.listdir(tmp_path) == []


def test_what_was_left_behind_a_whole_report_is_removed_unless_it_is_of_another_run(tmp_path, begin):
    out = tmp_path / "w.parquet"
    tables.remove_leftovers(out, SHARED)
    assert os.listdir(tmp_path) == []
    parts = begin()
    part(parts, "00000", {})
    parts.close()
    tables.remove_leftovers(out, OTHER)
    assert os.listdir(tmp_path) == [".w.parquet.parts"]
    tables.remove_leftovers(out, SHARED)
    assert os.listdir(tmp_path) == []


# -- memory --------------------------------------------------------------------------------------------------------

WRITE_MANY = """
import dataclasses, re, sys
from pathlib import Path
import numpy as np
import pyarrow as pa
from memdiag import tables

@dataclasses.dataclass(frozen=True)
class Row:
    n: int = tables.column(pa.int64(), "a number")
    x: float = tables.column(pa.float64(), "another")

def batches(n_rows, size=20_000):
    for start in range(0, n_rows, size):
        yield [{"n": i, "x": i / 7} for i in range(start, start + size)]

tables.write(Path(sys.argv[1]), Row, batches(int(sys.argv[2])), {"report": "many"})
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    # VmHWM and not getrusage: the latter starts at the peak of whoever started the process
    def peak(n_rows):
        path = tmp_path / f"{n_rows}.parquet"
        done = subprocess.run(
            [sys.executable, "-c", WRITE_MANY, str(path), str(n_rows)], capture_output=True, text=True, check=True
        )
        assert pq.ParquetFile(path).metadata.num_rows == n_rows
        return int(done.stdout)

    assert peak(2_000_000) < 1.3 * peak(200_000)


def test_columns_become_arrow_with_gaps_and_whole_numbers():
    row = tables.row_class(
        "Row", "r", 1,
        {
            "a": tables.column(pa.int32(), "whole", nullable=True), "b": tables.column(pa.bool_(), "", nullable=True),
            "c": tables.column(pa.float64(), "", nullable=True), "d": tables.column(pa.string(), ""),
        },
    )  # fmt: skip
    batch = tables.from_columns(
        row,
        {"a": np.array([1.0, np.nan]), "b": np.array([np.nan, 1.0]), "c": np.array([0.5, np.nan]), "d": ["x", "y"]},
    )
    assert batch.to_pylist() == [{"a": 1, "b": None, "c": 0.5, "d": "x"}, {"a": None, "b": True, "c": None, "d": "y"}]
    assert (row.report, row.schema_version) == ("r", 1)
    good = {"a": np.array([1]), "b": [True], "c": np.array([1.0]), "d": ["x"]}
    with pytest.raises(ValueError, match="infinity"):
        tables.from_columns(row, good | {"c": np.array([np.inf])})
    with pytest.raises(ValueError, match="may not be null"):
        tables.from_columns(row, good | {"d": [None]})
    with pytest.raises(ValueError, match="columns differ"):
        tables.from_columns(row, {"a": np.array([1])})
