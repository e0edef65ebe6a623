"""Readers of text: JSONL, CSV, plain text. Row by row, and an error names its line."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from memdiag.dataset.faults import fault, printable, reading
from memdiag.dataset.source import MAX_ROW_BYTES, Chunk, Source, refuse_twins


def jsonl(path: Path) -> Source:
    """One JSON object per line, blank lines skipped; the first row's keys are the columns."""
    columns = list(next((record for _, record in _records(path)), {}))
    return Source(columns, lambda wanted: _read_jsonl(path, wanted), lambda _: None, [path])


def _read_jsonl(path: Path, wanted: list[str]) -> Iterator[Chunk]:
    for _, record in _records(path):
        yield {column: [record.get(column)] for column in wanted}


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise fault(str(path), f"line {number}: byte {error.start + 1} is not UTF-8; save it as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise fault(str(path), f"line {number} is not JSON: {printable(error, 120)}") from None
        if not isinstance(record, dict):
            raise fault(str(path), f"line {number} is {type(record).__name__}; wanted one JSON object per line")
        yield number, record


def text(path: Path) -> Source:
    """Plain text: every line that is not blank is an example, in the column `text`; rows count such lines."""
    return Source(["text"], lambda _: _read_text(path), lambda _: None, [path])


def _read_text(path: Path) -> Iterator[Chunk]:
    for number, line in _lines(path):
        try:
            yield {"text": [line.decode().rstrip("\r\n")]}
        except UnicodeDecodeError as error:
            raise fault(str(path), f"line {number}: byte {error.start + 1} is not UTF-8; save it as UTF-8") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1."""
    kind = "gzip file" if path.name.lower().endswith(".gz") else "text file"
    number = 0
    with reading(str(path), kind), _open_bytes(path) as file:
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                raise fault(str(path), f"line {number} is longer than {MAX_ROW_BYTES >> 20} MiB; wanted one row a line")
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line


def _open_bytes(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def csv_file(path: Path) -> Source:
    """CSV with a header, quoted as in RFC 4180; every cell is text until its role is known."""
    with reading(str(path), "CSV file"):
        header = next(_csv_rows(path), [])
    if not any(column.strip() for column in header):
        raise fault(str(path), "its first line names no column; wanted a header such as text,label")
    refuse_twins(path, header)
    return Source(header, lambda wanted: _read_csv(path, header, wanted), lambda _: None, [path], typed=False)


def _read_csv(path: Path, header: list[str], wanted: list[str]) -> Iterator[Chunk]:
    places = {column: header.index(column) for column in wanted}
    with reading(str(path), "CSV file"):
        rows = _csv_rows(path)
        next(rows)
        for i, row in enumerate(rows):
            if len(row) != len(header):
                raise fault(str(path), f"row {i} has {len(row)} cells, but the header names {len(header)}")
            yield {column: [row[place]] for column, place in places.items()}


def _csv_rows(path: Path) -> Iterator[list[str]]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))  # 128 KiB by default: one long text fails
    with path.open("rb") as file:
        for row in csv.reader(_decoded(path, file), strict=True):
            if row:
                yield row


def _decoded(path: Path, file: BinaryIO) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise fault(str(path), f"line {number} is longer than {MAX_ROW_BYTES >> 20} MiB; wanted CSV")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise fault(str(path), f"line {number}: byte {error.start + 1} is not UTF-8; save it as UTF-8") from None
