"""`memdiag import`: a foreign score joins a report by id or by row, and everything that can be wrong with the file."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import memdiag
from memdiag import tables
from memdiag.errors import InputError
from memdiag.models.mlp import MLP, MlpConfig


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of 20 digits under an untrained network, with truth and ranks."""
    from memdiag.checkpoint import save

    where = tmp_path_factory.mktemp("import")
    save(where / "net", MLP(MlpConfig((64, 8, 10))))
    out = where / "score.parquet"
    how = {"data": "task:digits?corruption=0.5", "limit": 20, "truth": "corrupted", "columns": {"id": "id"}}
    memdiag.score(where / "net", out=out, scores="loss,grand", **how)
    return out


def test_by_id_in_any_order_and_with_gaps(report, tmp_path):
    old = tables.read(report).table
    ids = old["example_id"].to_pylist()
    lines = [json.dumps({"uid": i, "mem": float(n)}) for n, i in enumerate(ids)][5:][::-1]
    (tmp_path / "mem.jsonl").write_text("\n".join(lines))
    new = memdiag.import_score(tmp_path / "mem.jsonl", name="mem", into=report, key="uid", out=tmp_path / "new.parquet")
    assert new.table["mem"].to_pylist() == [None] * 5 + [float(n) for n in range(5, 20)]
    assert new.table.drop_columns("mem").equals(old)
    assert new.meta["foreign"]["mem"]["matched"] == 15
    pairs = {(p["a"], p["b"]): p["n"] for p in new.meta["summary"]["agreement"]}
    assert pairs[("loss", "mem")] == 15
    assert new.meta["summary"]["scores"]["mem"]["auc"]["n"] == 15


def test_by_row_and_the_direction_that_is_said(report, tmp_path):
    loss = tables.read(report).table["loss"].to_numpy()
    np.save(tmp_path / "a.npy", loss.astype(np.float32))
    high = memdiag.import_score(tmp_path / "a.npy", name="same", into=report, out=tmp_path / "high.parquet")
    low = memdiag.import_score(
        tmp_path / "a.npy", name="same", into=report, memorized="low", out=tmp_path / "low.parquet"
    )
    rho = [next(p for p in r.meta["summary"]["agreement"] if p["b"] == "same")["value"] for r in (high, low)]
    assert rho == [pytest.approx(1), pytest.approx(-1)]
    twice = memdiag.import_score(tmp_path / "a.npy", name="again", into=tmp_path / "high.parquet")
    assert twice.path == tmp_path / "high.with-again.parquet"
    assert set(twice.meta["foreign"]) == {"same", "again"}


def test_csv_and_parquet_give_the_same(report, tmp_path):
    ids = tables.read(report).table["example_id"].to_pylist()
    table = pa.table({"id": ids, "mem": np.arange(20.0), "other": ["x"] * 20})
    pq.write_table(table, tmp_path / "m.parquet")
    (tmp_path / "m.csv").write_text("id,mem,other\n" + "".join(f"{i},{n}.0,x\n" for n, i in enumerate(ids)))
    found = [
        memdiag.import_score(tmp_path / f"m.{kind}", name="mem", into=report, key="id", out=tmp_path / f"{kind}.out")
        for kind in ("parquet", "csv")
    ]
    assert found[0].table.equals(found[1].table)


def test_the_same_again_is_there_already_and_another_is_refused(report, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(20.0))
    out = tmp_path / "new.parquet"
    memdiag.import_score(tmp_path / "a.npy", name="a", into=report, out=out)
    before = out.read_bytes()
    memdiag.import_score(tmp_path / "a.npy", name="a", into=report, out=out)
    assert out.read_bytes() == before
    np.save(tmp_path / "a.npy", np.arange(20.0) + 1)
    with pytest.raises(InputError, match="differs in file"):
        memdiag.import_score(tmp_path / "a.npy", name="a", into=report, out=out)


def test_what_is_wrong_is_told(report, tmp_path):
    np.save(tmp_path / "two.npy", np.zeros((2, 2)))
    np.save(tmp_path / "inf.npy", np.array([1.0, np.inf]))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY garbage")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "other.csv").write_text("id,mem\nnobody,1\n")
    (tmp_path / "words.csv").write_text("id,mem\n0,high\n")
    (tmp_path / "twice.csv").write_text("id,mem\n0,1\n0,2\n")
    (tmp_path / "many.csv").write_text("id,a,b\n0,1,2\n")
    np.save(tmp_path / "good.npy", np.zeros(20))
    for file, options, told in [
        ("two.npy", {}, "one number per row"),
        ("text.npy", {}, "one number per row"),
        ("bad.npy", {}, "cannot be read"),
        ("objects.npy", {}, "cannot be read"),
        ("inf.npy", {}, "row 1 is infinite"),
        ("good.npy", {"key": "id"}, "no columns"),
        ("good.npy", {"name": "loss"}, "memdiag's own"),
        ("good.npy", {"name": "label"}, "already"),
        ("good.npy", {"name": "a b"}, "wanted a name"),
        ("good.npy", {"memorized": "hi"}, "high"),
        ("other.csv", {"key": "id"}, "for no example"),
        ("other.csv", {"key": "uid"}, "uid"),
        ("words.csv", {"key": "id"}, "is no number"),
        ("twice.csv", {"key": "id"}, "twice"),
        ("many.csv", {"key": "id"}, "--column"),
        ("many.csv", {"key": "id", "column": "c"}, "'c'"),
        ("none.csv", {}, "no such file"),
    ]:
        with pytest.raises(InputError) as caught:
            memdiag.import_score(tmp_path / file, into=report, out=tmp_path / "x.parquet", **{"name": "mem"} | options)
        assert told in str(caught.value), (file, options, str(caught.value))
        assert not (tmp_path / "x.parquet").exists()
    with pytest.raises(InputError, match="no such report"):
        memdiag.import_score(tmp_path / "good.npy", name="mem", into=tmp_path / "none.parquet")
