"""Readers of arrays: npz and safetensors. Rows of all arrays in step; nothing is unpickled."""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from memdiag.dataset.faults import fault, reading
from memdiag.dataset.source import CHUNK_BYTES, MAX_ROW_BYTES, Chunk, Source, refuse_twins

MAX_WHOLE_BYTES = 2**30  # an npz array in Fortran order cannot be read row by row


@dataclass(frozen=True)
class Layout:
    """Where one array lies in its file, and how."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int = 0  # bytes from the start of the file or zip member
    fortran: bool = False
    bfloat16: bool = False  # dtype is then uint16

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, at least 1."""
        return max(1, self.dtype.itemsize * math.prod(self.shape[1:]))


def npz(path: Path) -> Source:
    """Arrays (n, ...) with a common n, read row by row; pickled objects are refused."""
    with reading(str(path), "npz file"), zipfile.ZipFile(path) as archive:
        members = [info.filename for info in archive.infolist() if info.filename.endswith(".npy")]
    columns = [member.removesuffix(".npy") for member in members]
    refuse_twins(path, columns)
    return Source(
        columns,
        lambda wanted: _read_npz(path, wanted),
        lambda wanted: _common_rows(path, _npz_layouts(path, wanted)),
        [path],
    )


def _npz_layouts(path: Path, wanted: list[str]) -> dict[str, Layout]:
    with reading(str(path), "npz file"), zipfile.ZipFile(path) as archive:
        return {column: _npy_layout(path, archive, column) for column in wanted}


def _npy_layout(path: Path, archive: zipfile.ZipFile, column: str) -> Layout:
    info = archive.getinfo(column + ".npy")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise fault(str(path), f"array {column!r} is in npy version {version}; wanted 1.0 or 2.0")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(member)
        layout = Layout(shape, dtype, offset=member.tell(), fortran=fortran and len(shape) > 1)
    if dtype.hasobject:
        raise fault(str(path), f"array {column!r} holds pickled objects, which are never loaded; save plain numbers")
    if min(shape, default=0) < 0 or dtype.itemsize * math.prod(shape) != info.file_size - layout.offset:
        raise fault(str(path), f"array {column!r} does not have the size its header says; the file is damaged")
    return layout


def _read_npz(path: Path, wanted: list[str]) -> Iterator[Chunk]:
    layouts = _npz_layouts(path, wanted)
    with reading(str(path), "npz file"), ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(path))
        files: dict[str, Any] = {c: stack.enter_context(archive.open(c + ".npy")) for c in wanted}
        for column, layout in layouts.items():
            if layout.fortran:
                files[column] = _row_by_row(path, column, files[column], layout)
            else:
                files[column].seek(layout.offset)
        yield from _rows(path, files, layouts)


def _row_by_row(path: Path, column: str, file: Any, layout: Layout) -> io.BytesIO:
    n_bytes = layout.dtype.itemsize * math.prod(layout.shape)
    if n_bytes > MAX_WHOLE_BYTES:
        raise fault(
            str(path),
            f"array {column!r} is {n_bytes >> 20} MiB in Fortran order, which cannot be streamed; "
            f"save numpy.ascontiguousarray of it",
        )
    file.seek(layout.offset)
    array = np.frombuffer(file.read(n_bytes), layout.dtype).reshape(layout.shape, order="F")
    return io.BytesIO(array.tobytes(order="C"))


DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


def safetensors(path: Path) -> Source:
    """Tensors (n, ...) with a common n, read row by row; bfloat16 becomes float32."""
    # the library checks the header: sizes, overlaps, offsets
    with reading(str(path), "safetensors file"), safe_open(str(path), framework="numpy") as file:
        columns = list(file.keys())
    return Source(
        columns,
        lambda wanted: _read_safetensors(path, wanted),
        lambda wanted: _common_rows(path, _safetensors_layouts(path, wanted)),
        [path],
    )


def _safetensors_layouts(path: Path, wanted: list[str]) -> dict[str, Layout]:
    with reading(str(path), "safetensors file"), path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(length, path.stat().st_size)))
        layouts = {}
        for column in wanted:
            entry = header[column]
            if entry["dtype"] not in DTYPES:
                raise fault(str(path), f"tensor {column!r} is {entry['dtype']}; wanted one of {' '.join(DTYPES)}")
            dtype, offset = np.dtype(DTYPES[entry["dtype"]]), 8 + length + entry["data_offsets"][0]
            layouts[column] = Layout(tuple(entry["shape"]), dtype, offset, bfloat16=entry["dtype"] == "BF16")
    return layouts


def _read_safetensors(path: Path, wanted: list[str]) -> Iterator[Chunk]:
    layouts = _safetensors_layouts(path, wanted)
    with reading(str(path), "safetensors file"), ExitStack() as stack:
        files = {column: stack.enter_context(path.open("rb")) for column in wanted}
        for column, file in files.items():
            file.seek(layouts[column].offset)
        yield from _rows(path, files, layouts)


def _common_rows(path: Path, layouts: dict[str, Layout]) -> int:
    """The common first axis of the arrays in use; others in the file may have another."""
    lengths = {layout.shape[0] if layout.shape else -1 for layout in layouts.values()}
    if len(lengths) != 1 or -1 in lengths:
        told = ", ".join(f"{column} {layout.shape}" for column, layout in layouts.items())
        raise fault(str(path), f"its arrays have no common first axis: {told}; wanted one row per example")
    return int(lengths.pop())


def _rows(path: Path, files: dict[str, Any], layouts: dict[str, Layout]) -> Iterator[Chunk]:
    """Chunks of the arrays, read side by side from files that stand at their first bytes."""
    n_rows = _common_rows(path, layouts)
    widest = max(layout.row_bytes for layout in layouts.values())
    if widest > MAX_ROW_BYTES:
        raise fault(str(path), f"a row is {widest >> 20} MiB; wanted at most {MAX_ROW_BYTES >> 20} MiB")
    step = max(1, CHUNK_BYTES // widest)
    for start in range(0, n_rows, step):
        size = min(step, n_rows - start)
        yield {column: _next_rows(files[column], layout, size) for column, layout in layouts.items()}


def _next_rows(file: Any, layout: Layout, size: int) -> NDArray[Any]:
    shape = (size, *layout.shape[1:])
    data = file.read(layout.dtype.itemsize * math.prod(shape))
    array = np.frombuffer(data, layout.dtype).reshape(shape)
    return (array.astype(np.uint32) << 16).view(np.float32) if layout.bfloat16 else array
