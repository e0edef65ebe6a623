"""Readers of Arrow record batches: Parquet, and directories written by `datasets`' save_to_disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from memdiag.dataset.faults import fault, printable, reading
from memdiag.dataset.source import CHUNK_BYTES, Chunk, Source, refuse_twins

LARGE_ROW_GROUP = 2**23  # bytes


def parquet(path: Path) -> Source:
    """Parquet, projected and in record batches; a row group is never held whole."""
    with reading(str(path), "Parquet file"), _parquet_file(path) as file:
        meta, columns = file.metadata, list(file.schema_arrow.names)
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        if min(sizes, default=0) < 0 or sum(sizes) != meta.num_rows:
            raise fault(str(path), f"its footer is damaged: {meta.num_rows} rows, but row groups of {sum(sizes)}")
        n_rows, per_row, buffer_size = meta.num_rows, _bytes_per_row(meta), _buffer_size(meta)
    refuse_twins(path, columns)
    size = max(1, min(1024, CHUNK_BYTES // per_row))
    return Source(
        columns, lambda wanted: _read_parquet(path, wanted, size, n_rows, buffer_size), lambda _: n_rows, [path]
    )


def _parquet_file(path: Path, buffer_size: int = 0) -> Any:
    return pq.ParquetFile(
        pa.OSFile(str(path)), pre_buffer=False, buffer_size=buffer_size, page_checksum_verification=True
    )


def _buffer_size(meta: Any) -> int:
    """0, which reads column chunks at once, unless row groups are large: then pages come through a small buffer.

    Not always the buffer: through it a damaged page header makes Arrow fill up to 2 GiB with zeros. Not by the
    size of the column chunks: on damaged statistics, asking for one aborts the process (pyarrow 26).
    """
    largest = max((meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)), default=0)
    return 2**18 if largest > LARGE_ROW_GROUP else 0


def _bytes_per_row(meta: Any) -> int:
    total = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    return max(1, int(total) // max(1, int(meta.num_rows)))


def _read_parquet(path: Path, wanted: list[str], size: int, n_rows: int, buffer_size: int) -> Iterator[Chunk]:
    seen = 0
    with reading(str(path), "Parquet file"), _parquet_file(path, buffer_size) as file:
        for batch in file.iter_batches(batch_size=size, columns=wanted, use_threads=False):
            batch.validate(full=False)
            seen += batch.num_rows
            yield {column: batch.column(column) for column in wanted}
    if seen != n_rows:
        raise fault(str(path), f"holds {seen} rows, but its footer says {n_rows}; it is damaged")


def saved(path: Path) -> Source:
    """A directory written by `datasets`' save_to_disk, through that library; memory-mapped.

    Raises:
        InputError: several splits, another kind of directory, a damaged one, or `datasets` is not installed.
    """
    name = str(path)
    with reading(name, "directory"):
        entries = sorted(entry.name for entry in path.iterdir())
    if "dataset_dict.json" in entries:
        splits = [entry for entry in entries if (path / entry / "state.json").is_file()]
        raise fault(name, f"holds several splits; choose one: {', '.join(str(path / s) for s in splits) or 'none'}")
    if not {"state.json", "dataset_info.json"} <= set(entries):
        seen = f"it holds {', '.join(entries[:5])}" if entries else "it is empty"
        seen += ", which looks like a checkpoint" if "config.json" in entries else ""
        raise fault(name, f"is a directory, but not one of datasets' save_to_disk ({seen}); wanted one file in it")
    dataset = _load(name, path)
    refuse_twins(path, dataset.column_names)
    files = [path / entry for entry in entries if entry.endswith(".arrow")]
    return Source(
        dataset.column_names, lambda wanted: _read_saved(name, dataset, wanted), lambda _: len(dataset), files
    )


def _load(name: str, path: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise fault(name, 'is of the library datasets, which is not installed: pip install "memdiag[hf]"') from None
    try:
        return datasets.load_from_disk(str(path.resolve()))
    except Exception as error:  # a damaged state.json or Arrow file surfaces as any exception there is
        raise fault(name, f"is no readable save_to_disk directory: {printable(error, 200)}") from None


def _read_saved(name: str, dataset: Any, wanted: list[str]) -> Iterator[Chunk]:
    with reading(name, "save_to_disk directory"):
        per_row = max(1, int(dataset.data.nbytes) // max(1, len(dataset)))
        arrow = dataset.select_columns(wanted).with_format("arrow")
        for table in arrow.iter(batch_size=max(1, min(1024, CHUNK_BYTES // per_row))):
            for batch in table.to_batches():
                batch.validate(full=True)  # Arrow trusts the offsets of a mapped file: damaged ones would crash
                yield {column: batch.column(column) for column in wanted}
