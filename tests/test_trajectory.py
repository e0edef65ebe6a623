"""What a trajectory keeps of logits, and how its files are written, checked and read side by side."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from memdiag import InputError, tables, trajectory
from memdiag.trajectory import epochs, meta_of, path_of, presented, read_chunks, write_epoch

# -- the formula ---------------------------------------------------------------------------------------------------


def test_by_hand():
    """z = (1, 2, 3): AUM's example, a margin of −1 for y = 1; ln(e + e² + e³) = 3.407606."""
    found = presented(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), torch.tensor([1, 2]))
    assert found.tolist() == [
        [2.0, 3.0], [3.0, 2.0], pytest.approx([3.407606, 3.407606], abs=1e-6), [0.0, 1.0],
    ]  # fmt: skip
    loss = found[2] - found[0]
    assert loss.tolist() == pytest.approx([1.407606, 0.407606], abs=1e-6)  # scores.md part 2: CE of (2, 1, 0)


@pytest.mark.parametrize("k", [2, 3, 10])
@pytest.mark.parametrize("b", [1, 7])
def test_as_the_definition_written_as_a_loop(b, k):
    generator = torch.Generator().manual_seed(k)
    logits, labels = torch.randn(b, k, generator=generator), torch.randint(k, (b,), generator=generator)
    found = presented(logits, labels).T.tolist()
    for z, y, row in zip(logits.tolist(), labels.tolist(), found, strict=True):
        others = [value for c, value in enumerate(z) if c != y]
        wanted = [z[y], max(others), float(np.log(np.exp(z).sum())), float(z[y] > max(others))]
        assert row == pytest.approx(wanted, rel=1e-5)


def test_a_constant_shifts_logits_and_changes_neither_loss_nor_margin():
    logits, labels = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 5
    one, two = presented(logits, labels), presented(logits + 100, labels)
    torch.testing.assert_close(two[2] - two[0], one[2] - one[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two[0] - two[1], one[0] - one[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(one[3], two[3])


def test_the_order_of_the_other_classes_does_not_matter():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    found = presented(logits[:, [0, 3, 1, 2]], torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(found, presented(logits, torch.zeros(6, dtype=torch.long)))


def test_the_first_of_equal_logits_is_the_prediction():
    found = presented(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 1]))
    assert found[3].tolist() == [1.0, 0.0]
    assert found[:2].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_one_class_has_no_other_logit():
    found = presented(torch.tensor([[2.0]]), torch.tensor([0]))
    assert found[[0, 2, 3], 0].tolist() == [2.0, 2.0, 1.0]
    assert found[1].isnan().all()


def test_no_example():
    assert presented(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (4, 0)


def test_the_result_holds_no_gradient_and_is_float32():
    logits = torch.randn(2, 3, requires_grad=True, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = presented(logits, torch.tensor([0, 1]))
    assert (found.requires_grad, found.dtype) == (False, torch.float32)
    assert torch.equal(found[2], logits.detach().float().logsumexp(1))


# -- files ---------------------------------------------------------------------------------------------------------


def made(directory, n_epochs=3, n=5, *, fingerprint="abc", labels=True):
    """A trajectory of examples in rows 0, 2, 4, ...; the values say where they belong."""
    rows = 2 * np.arange(n)
    for epoch in range(n_epochs):
        values = np.stack([100 * epoch + rows + part for part in (0.1, 0.2, 0.3, 0)]).astype(np.float32)
        values[3] = (rows + epoch) % 4 == 0
        ids = [f"e{row}" for row in rows]
        given = rows % 3 if labels else None
        meta = meta_of({"name": "d", "fingerprint": fingerprint, "columns": {}}, n)
        write_epoch(path_of(directory, epoch), epoch, rows, ids, given, values, meta)
    return directory


@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 100])
def test_all_epochs_are_read_side_by_side(tmp_path, chunk_rows):
    chunks = list(read_chunks(made(tmp_path / "t"), chunk_rows))
    sizes = {1: [1, 1, 1, 1, 1], 2: [2, 2, 1]}
    assert [len(chunk["row"]) for chunk in chunks] == sizes.get(chunk_rows, [5])
    rows = np.concatenate([chunk["row"] for chunk in chunks])
    assert rows.tolist() == [0, 2, 4, 6, 8]
    assert [one for chunk in chunks for one in chunk["example_id"]] == [f"e{row}" for row in rows]
    assert np.concatenate([chunk["label"] for chunk in chunks]).tolist() == (rows % 3).tolist()
    for part, name in enumerate(trajectory.VALUES):
        found = np.concatenate([chunk[name] for chunk in chunks], axis=1)
        assert found.dtype == np.float32
        assert found == pytest.approx(100 * np.arange(3)[:, None] + rows + (part + 1) / 10, rel=1e-6)
    correct = np.concatenate([chunk["correct"] for chunk in chunks], axis=1)
    assert correct.dtype == np.bool_
    assert (correct == ((rows + np.arange(3)[:, None]) % 4 == 0)).all()


def test_many_rows_are_written_and_read_in_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(trajectory, "GROUP", 100)
    made(tmp_path, n_epochs=2, n=1050)
    assert pq.ParquetFile(path_of(tmp_path, 0)).num_row_groups == 11
    chunks = list(read_chunks(tmp_path, 64))
    assert max(len(chunk["row"]) for chunk in chunks) <= 64
    assert np.concatenate([chunk["row"] for chunk in chunks]).tolist() == list(range(0, 2100, 2))


def test_a_language_model_has_no_labels_and_one_class_no_other_logit(tmp_path):
    rows = np.arange(3)
    values = np.ones((4, 3), dtype=np.float32)
    values[1] = np.nan
    write_epoch(path_of(tmp_path, 0), 0, rows, ["a", "b", "c"], None, values, meta_of({"fingerprint": None}, 3))
    (chunk,) = read_chunks(tmp_path)
    assert chunk["label"] is None
    assert np.isnan(chunk["other_logit"]).all()
    assert tables.read(path_of(tmp_path, 0)).table["other_logit"].null_count == 3


def test_a_run_is_as_good_as_its_trajectory(tmp_path):
    made(tmp_path / "run" / "trajectory")
    assert epochs(tmp_path / "run") == epochs(tmp_path / "run" / "trajectory")
    assert [path.name for path in epochs(tmp_path / "run")] == [f"epoch=000{e}.parquet" for e in range(3)]


def test_epochs_come_in_the_order_of_their_numbers(tmp_path):
    made(tmp_path, 1)
    for epoch in range(1, 12):
        shutil.copy(path_of(tmp_path, 0), path_of(tmp_path, epoch))
    shutil.copy(path_of(tmp_path, 0), tmp_path / "epoch=0002.parquet.bak")
    assert [int(path.stem.removeprefix("epoch=")) for path in epochs(tmp_path)] == list(range(12))


# -- what is refused -----------------------------------------------------------------------------------------------


def refused(directory):
    with pytest.raises(InputError) as error:
        list(read_chunks(directory))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_trajectory_is_refused(tmp_path):
    assert "no such directory; wanted a trajectory" in refused(tmp_path / "nowhere")
    assert "holds no trajectory (epoch=0000.parquet, ...); `memdiag train` writes one" in refused(tmp_path)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_missing_epoch_is_refused(tmp_path, gone):
    path_of(made(tmp_path), gone).unlink()
    assert f"epoch {gone} is missing, the last is 2" in refused(tmp_path)


def test_an_epoch_of_another_dataset_is_refused(tmp_path):
    made(tmp_path / "a")
    made(tmp_path / "b", fingerprint="xyz")
    shutil.copy(path_of(tmp_path / "b", 1), path_of(tmp_path / "a", 1))
    assert "epoch=0001.parquet: is of another dataset or of other examples than epoch=0000.parquet" in refused(
        tmp_path / "a"
    )


def test_an_epoch_with_other_rows_is_refused(tmp_path):
    made(tmp_path)
    one = tables.read(path_of(tmp_path, 2))
    values = np.ones((4, 5), dtype=np.float32)
    labels = 2 * np.arange(5) % 3  # the same
    write_epoch(path_of(tmp_path, 2), 2, np.arange(5), list("abcde"), labels, values, one.meta)
    assert "epoch=0002.parquet: has other rows or labels than epoch=0000.parquet" in refused(tmp_path)


def test_an_epoch_with_other_labels_is_refused(tmp_path):
    made(tmp_path)
    one, values = tables.read(path_of(tmp_path, 2)), np.ones((4, 5), dtype=np.float32)
    write_epoch(path_of(tmp_path, 2), 2, 2 * np.arange(5), list("abcde"), np.zeros(5, dtype=np.int64), values, one.meta)
    assert "epoch=0002.parquet: has other rows or labels than epoch=0000.parquet" in refused(tmp_path)


def test_an_epoch_with_fewer_rows_is_refused(tmp_path):
    made(tmp_path)
    meta = tables.read_meta(path_of(tmp_path, 2))
    values = np.ones((4, 4), dtype=np.float32)
    write_epoch(path_of(tmp_path, 2), 2, 2 * np.arange(4), list("abcd"), 2 * np.arange(4) % 3, values, meta)
    assert "epoch=0002.parquet: has other rows" in refused(tmp_path)


def test_another_report_and_a_damaged_file_are_refused(tmp_path):
    made(tmp_path)
    pq.write_table(pa.table({"a": [1]}), path_of(tmp_path, 1))
    assert "epoch=0001.parquet is Parquet but no report of memdiag" in refused(tmp_path)
    path_of(tmp_path, 1).write_bytes(b"PAR1 no")
    assert "epoch=0001.parquet is not a Parquet file" in refused(tmp_path)


def test_the_columns_can_be_read_about_without_torch():
    check = (
        "import sys, memdiag.trajectory, memdiag.train_report, memdiag.train_view; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
