"""SQL over reports: what it reaches, and that it reaches nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reports import write_columns

from memdiag.errors import InputError
from memdiag.report_sql import opened


@pytest.fixture
def report(tmp_path):
    return write_columns(tmp_path / "score.parquet", {"example_id": ["a", "b", "c"], "loss": [1.0, None, 3.0]})


def test_a_report_is_a_view_and_its_nulls_are_nulls(report):
    with opened({"report": report}) as session:
        assert session.rows("SELECT count(*), count(loss), avg(loss) FROM report") == [(3, 2, 2.0)]
        assert session.rows("SELECT example_id FROM report WHERE loss > ?", [2]) == [("c",)]
        assert session.types("SELECT loss > 2, example_id FROM report") == ["BOOLEAN", "VARCHAR"]
        column = session.column("SELECT loss FROM report WHERE loss IS NOT NULL ORDER BY loss")
        np.testing.assert_array_equal(column, [1.0, 3.0])
        assert session.columns == {"report": ["example_id", "loss"]}


def test_two_reports_stand_side_by_side(report, tmp_path):
    other = write_columns(tmp_path / "other.parquet", {"example_id": ["a", "d"], "loss": [5.0, 6.0]})
    with opened({"base": report, "new": other}) as session:
        assert session.rows("SELECT new.loss - base.loss FROM base JOIN new USING (example_id)") == [(4.0,)]


@pytest.mark.parametrize(
    "name", ["a[1].parquet", "*.parquet", "it's.parquet", "k=v.parquet", 'q".parquet', "ü 中.parquet", "?"]
)
def test_a_path_is_a_path_and_no_pattern(tmp_path, name):
    folder = tmp_path / "year=2020"  # no partition either
    folder.mkdir()
    write_columns(folder / "a1.parquet", {"loss": [7.0]})
    path = write_columns(folder / name, {"loss": [1.0, 2.0]})
    with opened({"report": path}) as session:
        assert session.rows("SELECT * FROM report ORDER BY ALL") == [(1.0,), (2.0,)]


OUT_OF_REACH = [
    "SELECT * FROM read_csv('{secret}')",
    "SELECT content FROM read_text('{secret}')",
    "SELECT content FROM read_blob('{secret}')",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM '{secret}'",
    "SELECT * FROM read_parquet('{other}')",
    "SELECT * FROM '{other}'",
    "SELECT * FROM sniff_csv('{secret}')",
    "SELECT * FROM parquet_metadata('{other}')",
    "SELECT * FROM read_json('{secret}')",
    "SELECT * FROM read_csv('https://example.org/x.csv')",
    "SELECT * FROM 's3://bucket/x.parquet'",
    "SELECT * FROM query('SELECT * FROM read_csv(''{secret}'')')",
    "COPY report TO '{folder}/out.csv'",
    "COPY (SELECT 1) TO '{folder}/out.parquet'",
    "EXPORT DATABASE '{folder}/out'",
    "ATTACH '{folder}/out.db'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{secret}'",
    "SET enable_external_access = true",
    "SET allowed_directories = ['/']",
    "SET memory_limit = '100GB'",
    "RESET lock_configuration",
    "PRAGMA enable_profiling",
    "SELECT * FROM enable_logging()",
    "SELECT getenv('HOME')",
    "CREATE SECRET (TYPE s3)",
    "SELECT * FROM secret_variable",
]


@pytest.mark.parametrize("sql", OUT_OF_REACH)
def test_nothing_but_the_report_is_within_reach(report, tmp_path, sql):
    secret_variable = {"x": [1]}  # noqa: F841 - DuckDB looks for names among Python's variables, if it may
    secret = tmp_path / "secret.csv"
    secret.write_text("password\nhunter2\n")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"password": ["hunter2"]}), other)
    before = sorted(os.listdir(tmp_path))
    with opened({"report": report}) as session:
        with pytest.raises(InputError) as caught:
            session.rows(sql.format(secret=secret, folder=tmp_path, other=other), of="rule 'x'")
        assert session.rows("SELECT count(*) FROM report") == [(3,)]
    assert str(caught.value).startswith("rule 'x'")
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_the_control_can_read_what_the_shut_in_cannot(tmp_path):
    """Without the locks the same SQL reads the file: it is they that keep it out."""
    import duckdb

    (tmp_path / "secret.csv").write_text("password\nhunter2\n")
    assert duckdb.sql(f"SELECT * FROM read_csv('{tmp_path / 'secret.csv'}')").fetchall() == [("hunter2",)]


ENDLESS = [
    "WITH RECURSIVE t AS (SELECT 1 AS i UNION ALL SELECT i FROM t) SELECT count(*) FROM t",
    "WITH RECURSIVE t AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM t) SELECT max(i) FROM t",
    "SELECT count(*) FROM range(1000000000) a, range(1000000000) b WHERE a.range + b.range = 7",
    "SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b",
]


@pytest.mark.parametrize("sql", ENDLESS)
def test_what_never_ends_is_ended(report, sql):
    with opened({"report": report}, time_limit=0.3) as session:
        began = time.monotonic()
        with pytest.raises(InputError, match=r"rule 'x' took longer than 0\.3 s; make it simpler or give a longer"):
            session.rows(sql, of="rule 'x'")
        assert time.monotonic() - began < 20  # noisy machines; without the limit it would be for ever
        assert session.rows("SELECT 1") == [(1,)]


def test_what_takes_too_much_memory_is_refused(report):
    with opened({"report": report}, memory_limit="50MB") as session:
        with pytest.raises(
            InputError, match="takes more memory than it may; make it simpler or give a larger --memory"
        ):
            session.rows("SELECT length(string_agg(md5(range::VARCHAR), '')) FROM range(10000000)", of="rule 'x'")
        assert session.rows("SELECT 1") == [(1,)]


def test_a_wrong_column_names_the_nearest(report):
    with opened({"report": report}) as session:
        with pytest.raises(InputError, match=r"no column 'losss'; there are example_id, loss; did you mean 'loss'\?"):
            session.rows("SELECT losss FROM report")
        with pytest.raises(InputError, match=r"no column 'los'; .* did you mean 'loss'\?"):
            session.rows("SELECT r.los FROM report r")


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        (
            "SELECT avgg(loss) FROM report",
            'does not work: Scalar Function with name avgg does not exist! Did you mean "avg"',
        ),
        ("SELECT avg(example_id) FROM report", "does not work: No function matches .*avg"),
        ("SELECT 1 <", "is no SQL: syntax error"),
        ("SELECT * FROM repot", 'Did you mean "report"'),
        ("SELECT loss = 'x' FROM report", "Could not convert string 'x' to DOUBLE"),
    ],
)
def test_other_mistakes_are_one_line(report, sql, says):
    with opened({"report": report}) as session, pytest.raises(InputError, match=says) as caught:
        session.rows(sql)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "limits", [{"time_limit": 0}, {"time_limit": -1}, {"time_limit": float("nan")}, {"time_limit": 1e300}]
)
def test_a_time_to_run_in_is_positive(report, limits):
    with pytest.raises(InputError, match=r"--time-limit .* is no time to run in"), opened({"report": report}, **limits):
        pass


@pytest.mark.parametrize("memory", ["", "lots", "4", "-1GB", "4GB'; DROP"])
def test_a_memory_is_a_size(report, memory):
    with pytest.raises(InputError, match="is no size"), opened({"report": report}, memory_limit=memory or " "):
        pass


def test_what_is_no_report_is_refused(tmp_path):
    empty, text, foreign = tmp_path / "empty.parquet", tmp_path / "text.parquet", tmp_path / "foreign.parquet"
    empty.write_bytes(b"")
    text.write_text("hello")
    pq.write_table(pa.table({"a": [1]}), foreign)
    for path, says in [
        (empty, "is not a Parquet file"),
        (text, "is not a Parquet file"),
        (foreign, "is Parquet but no report of memdiag"),
        (tmp_path / "none.parquet", "no such report"),
        (tmp_path, "is not a Parquet file"),
    ]:
        with pytest.raises(InputError, match=says), opened({"report": path}):
            pass


def test_a_damaged_report_is_said_to_be(tmp_path):
    path = write_columns(tmp_path / "score.parquet", {"loss": np.random.default_rng(0).normal(size=5000)})
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56  # the header of the first page; the footer stays whole
    path.write_bytes(data)
    with opened({"report": path}) as session, pytest.raises(InputError, match="is damaged"):
        session.rows("SELECT avg(loss), max(loss) FROM report", of=str(path))


def test_no_temporary_file_is_left(report, tmp_path, monkeypatch):
    place = tmp_path / "month=5"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    with opened({"report": report}) as session:
        assert session.rows("SELECT * FROM report LIMIT 1") == [("a", 1.0)]  # the place is no partition
        assert [path.name for path in Path(place).iterdir()]
        session.rows("SELECT 1")
    assert list(place.iterdir()) == []
