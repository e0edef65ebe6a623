"""Small reports of every kind, made of their declarations, for the commands that read reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from memdiag import tables
from memdiag.report_kinds import row_of
from memdiag.tables import column


def value(type_: pa.DataType, row: int, rng: np.random.Generator) -> Any:
    """A value of this type, another one in every row."""
    if pa.types.is_boolean(type_):
        return bool(row % 2)
    if pa.types.is_integer(type_):
        return row
    if pa.types.is_floating(type_):
        return float(rng.normal())
    if pa.types.is_string(type_):
        return f"text {row}"
    if pa.types.is_list(type_):
        return [value(type_.value_type, row, rng)] * 2
    raise AssertionError(f"no value of type {type_}")


def write_kind(path: Path, kind: str, rows: int = 6, *, seed: int = 0, nulls: bool = False, **meta: Any) -> Path:
    """A report of this kind whose rows are made up; `nulls`: wherever they may be."""
    rng = np.random.default_rng(seed)
    row = row_of(kind)
    records = [
        {
            field.name: None if nulls and field.metadata["nullable"] else value(field.metadata["type"], i, rng)
            for field in dataclasses.fields(row)
        }
        for i in range(rows)
    ]
    about = {"report": kind, "schema_version": row.schema_version, "memdiag_version": "0.1.0", "options": {}, **meta}
    tables.write(path, row, [records], about)
    return path


def write_columns(path: Path, columns: Mapping[str, Any], *, kind: str = "score", **meta: Any) -> Path:
    """A report with these columns; types as Arrow sees them."""
    arrays = {name: pa.array(values) for name, values in columns.items()}
    declared = {name: column(array.type, name, nullable=True) for name, array in arrays.items()}
    row = tables.row_class("Row", kind, row_of(kind).schema_version, declared)
    batch = pa.RecordBatch.from_arrays(list(arrays.values()), schema=tables.schema_of(row))
    about = {"report": kind, "schema_version": row.schema_version, "memdiag_version": "0.1.0", "options": {}, **meta}
    tables.write(path, row, [batch], about)
    return path
