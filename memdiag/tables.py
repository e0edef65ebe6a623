"""Reports: declared once as a dataclass, written as Parquet, read back. The only file that writes Parquet.

A report's rows are a frozen dataclass whose fields are made by `column`. Its `report` name and `schema_version`
stand in the class as plain attributes. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from memdiag.errors import IncompleteError, InputError, one_line

if TYPE_CHECKING:
    import pandas

KEY = b"memdiag"
Rows = Iterable[Mapping[str, Any]]


def column(type: pa.DataType, doc: str, *, unit: str = "", nullable: bool = False) -> Any:
    """A field of a row: its Arrow type, what it means, its unit ("" for a pure number or a name)."""
    return dataclasses.field(metadata={"type": type, "doc": doc, "unit": unit, "nullable": nullable})


def row_class(name: str, report: str, schema_version: int, columns: Mapping[str, Any]) -> type:
    """A row dataclass whose columns are settled only when a command runs.

    Args:
        name: of the class.
        report: the report's name.
        schema_version: of the report.
        columns: name -> what `column` returned, in order.
    """
    about = {"report": report, "schema_version": schema_version}
    fields = [(name, Any, field_again(found)) for name, found in columns.items()]
    return dataclasses.make_dataclass(name, fields, frozen=True, namespace=about)


def field_again(found: Any) -> Any:
    """A field like this one: dataclasses keep a field's name in it, so no two may share one."""
    return dataclasses.field(metadata=dict(found.metadata))


def schema_of(row: type) -> pa.Schema:
    """The Arrow schema of a row dataclass, with `doc` and `unit` in each field's metadata."""
    return pa.schema(
        [
            pa.field(
                field.name,
                field.metadata["type"],
                nullable=field.metadata["nullable"],
                metadata={"doc": field.metadata["doc"], "unit": field.metadata["unit"]},
            )
            for field in dataclasses.fields(row)
        ]
    )


def markdown(schema: pa.Schema) -> str:
    """The schema as a Markdown table, as the docs hold it."""
    lines = ["| column | type | unit | null? | meaning |", "| --- | --- | --- | --- | --- |"]
    for name, type_, unit, nullable, doc in described(schema):
        lines.append(
            f"| `{name}` | {type_} | {unit} | {'yes' if nullable else ''} | {doc.replace('|', chr(92) + '|')} |"
        )
    return "\n".join(lines)


def described(schema: pa.Schema) -> list[tuple[str, str, str, bool, str]]:
    """(name, type, unit, nullable, doc) of every column."""
    out = []
    for field in schema:
        meta = field.metadata or {}
        unit, doc = (meta.get(key, b"").decode(errors="replace") for key in (b"unit", b"doc"))  # a file may be damaged
        out.append((field.name, str(field.type), unit, field.nullable, doc))
    return out


@dataclasses.dataclass(frozen=True)
class Report:
    """A report that was read or just written."""

    table: pa.Table
    meta: dict[str, Any]
    path: Path | None = None

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a pandas DataFrame; nulls become NaN or None."""
        frame: pandas.DataFrame = self.table.to_pandas()
        return frame


def to_batch(row: type, rows: Rows) -> pa.RecordBatch:
    """Rows as Arrow, checked against the declaration.

    NaN in a nullable float column becomes null: undefined is never a number.

    Raises:
        ValueError: a missing or unknown column, a null where none may be, an infinity, or a NaN where no null may
            be. All of these are bugs of the caller.
    """
    schema = schema_of(row)
    return pa.RecordBatch.from_pydict(_checked(row, schema, rows), schema=schema)


def to_small_batch(row: type, rows: Rows) -> pa.RecordBatch:
    """`to_batch` of a few rows of plain Python values, by way of JSON: pyarrow imports pandas to look at a list, which
    takes longer than all else that a command like `check` does.
    """
    schema = schema_of(row)
    columns = _checked(row, schema, rows)
    lines = "\n".join(json.dumps(dict(zip(columns, values))) for values in zip(*columns.values())).encode()
    if not lines:
        return pa.RecordBatch.from_pydict(columns, schema=schema)
    table = pyarrow.json.read_json(
        pa.BufferReader(lines),
        read_options=pyarrow.json.ReadOptions(block_size=len(lines) + 1),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error"),
    )
    return pa.RecordBatch.from_arrays(table.combine_chunks().to_batches()[0].columns, schema=schema)


def _checked(row: type, schema: pa.Schema, rows: Rows) -> dict[str, list[Any]]:
    """Rows as columns, each fit for its declaration; errors as `to_batch`."""
    names = set(schema.names)
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for record in rows:
        if set(record) != names:
            raise ValueError(f"columns differ from {row.__name__}: {sorted(set(record) ^ names)}")
        for name, value in record.items():
            columns[name].append(None if isinstance(value, float) and math.isnan(value) else value)
    for field in schema:
        values = columns[field.name]
        if not field.nullable and any(value is None for value in values):
            raise ValueError(f"column {field.name} may not be null or NaN")
        if any(isinstance(value, float) and math.isinf(value) for value in values):
            raise ValueError(f"column {field.name} holds an infinity")
    return columns


def from_columns(row: type, columns: Mapping[str, Any]) -> pa.RecordBatch:
    """Columns (arrays or lists, by name) as Arrow, checked against the declaration.

    NaN and null are one; floats become whole numbers or truth values where the declaration says so.

    Raises:
        ValueError: as `to_batch`.
    """
    schema = schema_of(row)
    if set(columns) != set(schema.names):
        raise ValueError(f"columns differ from {row.__name__}: {sorted(set(columns) ^ set(schema.names))}")
    return pa.RecordBatch.from_arrays([_as_arrow(field, columns[field.name]) for field in schema], schema=schema)


def _as_arrow(field: pa.Field, values: Any) -> pa.Array:
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        undefined = np.isnan(values)
        if np.isinf(values).any():
            raise ValueError(f"column {field.name} holds an infinity")
        if not pa.types.is_floating(field.type):  # whole numbers and truth values with gaps come as floats
            values = np.where(undefined, 0, values).astype(np.int64 if pa.types.is_integer(field.type) else np.bool_)
        found = pa.array(values, mask=undefined).cast(field.type)
    else:
        found = pa.array(values, type=field.type)
    if not field.nullable and found.null_count:
        raise ValueError(f"column {field.name} may not be null or NaN")
    return found


def write(path: Path, row: type, batches: Iterable[Rows | pa.RecordBatch], meta: Mapping[str, Any]) -> None:
    """Write a report in one step: readers see the old file, or the whole new one.

    Args:
        path: where; what was there is replaced (the caller decides whether it may be).
        row: the dataclass of its rows.
        batches: rows, or what `from_columns` made of them; each becomes one row group, written as it comes.
        meta: goes into the file's metadata as JSON under the key `memdiag`.
    Raises:
        IncompleteError: the disk is full.
        InputError: the place cannot be written to.
    """
    schema = _with_meta(schema_of(row), meta)
    with replacing(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for rows in batches:
            batch = rows if isinstance(rows, pa.RecordBatch) else to_batch(row, rows)
            if batch.num_rows:
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))


def join(path: Path, row: type, parts: Iterable[Path], meta: Mapping[str, Any]) -> None:
    """One report out of parts with the same columns, row group by row group, in the order given."""
    schema = _with_meta(schema_of(row), meta)
    with replacing(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for part in parts:
            with _opened(part) as source, pq.ParquetFile(source) as piece:
                for i in range(piece.num_row_groups):
                    writer.write_table(piece.read_row_group(i).cast(schema).replace_schema_metadata(schema.metadata))


def _with_meta(schema: pa.Schema, meta: Mapping[str, Any]) -> pa.Schema:
    text = json.dumps(meta, sort_keys=True, ensure_ascii=False)
    return schema.with_metadata({KEY: text.encode(errors="backslashreplace")})  # a path need not be UTF-8


@contextmanager
def replacing(path: Path, *, option: str = "--out") -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place if the block succeeds and is removed if it does not.

    Args:
        path: where.
        option: that says so, for errors.
    Raises:
        IncompleteError: the disk is full.
        InputError: the place cannot be written to.
    """
    partial = path.with_name(f".{path.name}.partial")
    check_regular(path, option=option)
    with _explaining(path, option):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path.parent) from None
        file = _made(partial, path)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # a power cut must not leave an empty file under the final name
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def check_regular(path: Path, *, option: str = "--out") -> None:
    """Refuse to put a file in the place of a device, a pipe or a socket.

    Raises:
        InputError: one stands there.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path} is no regular file; choose another {option}")


def _made(partial: Path, path: Path) -> BinaryIO:
    """A new file that nobody else writes. What a killed process has left there goes; a link is not followed.

    Raises:
        InputError: another process is writing it.
    """
    while True:
        with suppress(FileExistsError):
            file = open(partial, "xb")  # noqa: SIM115 - closed by who asked; "x" follows no link
            _lock_nowait(file)
            return file
        if partial.is_file() and not partial.is_symlink():
            with suppress(FileNotFoundError), open(partial, "rb") as old:
                if not _lock_nowait(old):
                    raise InputError(f"another process is writing {path}; wait for it, or choose another place")
        partial.unlink(missing_ok=True)


@contextmanager
def _explaining(path: Path, option: str = "--out") -> Iterator[None]:
    """An OSError of writing as an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            todo = "free some space and run the same command again to go on"
            raise IncompleteError(f"{path}: the disk is full; {todo}") from error
        raise InputError(
            f"{path} cannot be written ({one_line(error.strerror or error)}); choose another {option}"
        ) from error


def _opened(path: Path) -> pa.NativeFile:
    """A file to read from. Not Python's own: pyarrow reads in threads, and one that lets go of a Python object while
    the interpreter ends aborts the process. Nor a bare path, which pyarrow may take for the address of something else.
    """
    return pa.OSFile(os.fspath(path))


def read(path: str | Path) -> Report:
    """Read a report.

    Raises:
        InputError: there is no such file, it is not Parquet, or not a report of memdiag.
    """
    path = Path(path)
    meta = read_meta(path)
    try:
        with _opened(path) as file:
            table = pq.read_table(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {one_line(error, 120)}; make it again") from None
    return Report(table, meta, path)


def stream(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """A report's row groups, one after another; errors as `read`."""
    try:
        with _opened(path) as file, pq.ParquetFile(file) as opened:
            for i in range(opened.num_row_groups):
                yield opened.read_row_group(i, columns=columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {one_line(error, 120)}; make it again") from None


def read_meta(path: Path) -> dict[str, Any]:
    """The run metadata of a report, without reading its rows; errors as `read`."""
    return _meta_of(path, read_schema(path))


def read_schema(path: Path) -> pa.Schema:
    """The columns of a report with their docs, without reading its rows; errors as `read`."""
    if not path.exists():
        raise InputError(f"no such report: {path}")
    try:
        with _opened(path) as file:
            return pq.read_schema(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} is not a Parquet file ({one_line(error, 120)}); give a report of memdiag") from None


def _meta_of(path: Path, schema: pa.Schema) -> dict[str, Any]:
    try:
        meta = json.loads((schema.metadata or {})[KEY])
        if not isinstance(meta, dict) or not isinstance(meta.get("report"), str):
            raise ValueError
    except (KeyError, ValueError):
        raise InputError(f"{path} is Parquet but no report of memdiag (no {KEY.decode()!r} metadata)") from None
    return meta


def check_place(path: Path, identity: Callable[[], Mapping[str, Any]], *, force: bool) -> bool:
    """Whether a finished report with this identity already stands at `path`.

    Args:
        path: where a report shall go.
        identity: asked for only if something stands there, because it takes time.
        force: nothing that stands there matters.
    Raises:
        InputError: something else stands there; the fields that differ are named. Or it is no place for a file.
    """
    with _explaining(path):
        if path.is_dir():
            raise InputError(f"{path} is a directory; give a file name to --out")
        if not str(path).isprintable():
            raise InputError(f"--out {str(path)!r}: the name has letters that cannot be printed; choose another --out")
        check_regular(path)
        if force or not path.exists():
            return False
    try:
        found = read_meta(path).get("identity", {})
    except InputError:
        raise InputError(f"{path} is there and is no whole report of memdiag; --force or another --out") from None
    differing = differing_fields(found, identity())
    if differing:
        raise InputError(f"{path} already holds another report (differs in {differing}); --force or another --out")
    return True


def check_directory(
    out: Path, main: str, identity: Callable[[], Mapping[str, Any]], *, force: bool, command: str, made: Iterable[str]
) -> bool:
    """Whether the finished reports of a command with this identity already stand in `out`.

    Args:
        out: a directory, or where one shall be.
        main: the report in it that is written last.
        identity: as `check_place`.
        force: what the command `made` there, files and directories by name, is deleted.
    Raises:
        InputError: something else stands there.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a directory to --out")
    if check_place(out / main, identity, force=force):
        return True
    begun = out.with_name(f".{out.name}.parts").exists()
    if not force and not begun and out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and holds no report of {command}; choose another --out")
    for name in made if force and out.is_dir() else ():
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return False


def differing(a: Report, b: Report) -> list[str]:
    """The columns that are not equal, bit for bit; those of only one of the two among them.

    Times and speeds (unit s or …/s) are a clock's, which no run repeats, and are not compared.
    """
    clock = {name for name, _, unit, *_ in described(a.table.schema) if unit == "s" or unit.endswith("/s")}
    names = sorted({*a.table.column_names, *b.table.column_names} - clock)
    both = {*a.table.column_names} & {*b.table.column_names}
    return [name for name in names if name not in both or not a.table[name].equals(b.table[name])]


def differing_fields(a: Any, b: Any, prefix: str = "") -> str:
    """The names of the fields in which two identities differ, "" if they are the same."""
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return prefix.rstrip(".") or "everything"
    keys = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    if prefix and len(keys) > 3:  # a run of other checkpoints: their names would say no more
        return prefix.rstrip(".")
    return ", ".join(differing_fields(a.get(key), b.get(key), f"{prefix}{key}.") for key in keys)


class Parts:
    """The finished pieces of a report in the making, in a directory beside it, so that an interrupted run goes on.

    Each part is itself a whole report file. The directory's `identity.json` says which run it belongs to.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], *, force: bool) -> None:
        """Open or make the directory.

        Raises:
            InputError: it belongs to a run with other inputs or options and `force` is not given, or another process
                is at work on the same report.
            IncompleteError: the disk is full.
        """
        self.out = out
        self.directory = out.with_name(f".{out.name}.parts")
        self._lock = self._locked()
        try:
            self._begin(identity, force=force)
        except BaseException:
            self.close()
            raise

    def _begin(self, identity: Mapping[str, Any], *, force: bool) -> None:
        file = self.directory / "identity.json"
        try:
            found = json.loads(file.read_text()) if file.exists() else None
        except (ValueError, OSError):
            found = None  # killed while it was made or removed: nobody knows what other parts belong to
        if force or self._is_empty():
            found = None  # nothing was finished, so nothing can be lost or mixed up
        if found is not None and (differing := differing_fields(found, json.loads(json.dumps(identity)))):
            raise InputError(
                f"{self.out} was begun with other inputs (differs in {differing}); give --force to start afresh, "
                "or another --out"
            )
        if found is None:
            for old in self.directory.glob("[!.]*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            with replacing(file) as opened:
                opened.write(json.dumps(identity, sort_keys=True).encode())

    def _locked(self) -> IO[str]:
        """A lock that ends with the process, however it ends."""
        path = self.directory / ".lock"
        with _explaining(self.out):
            while True:
                self.directory.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # another process has just finished and removed the directory
                    lock = open(path, "w")  # noqa: SIM115 - held for as long as the parts are
                    if not _lock_nowait(lock):
                        lock.close()
                        raise InputError(f"another process is writing {self.out}; wait for it, or choose another --out")
                    if os.path.samestat(os.stat(path), os.fstat(lock.fileno())):
                        return lock
                    lock.close()

    def path(self, name: str) -> Path:
        """Where the part of this name is or will be."""
        return self.directory / f"{name}.parquet"

    def has(self, name: str, of: str, identity: Mapping[str, Any]) -> bool:
        """Whether the part is finished.

        Raises:
            InputError: it is, but what it was made `of` has changed since.
        """
        path = self.path(name)
        if not path.exists():
            return False
        if differing_fields(read_meta(path).get("part"), identity):
            raise InputError(f"{of} has changed since {self.out} was begun; give --force to start afresh")
        return True

    def close(self) -> None:
        """Let another process go on; the directory stays if a part in it was finished."""
        if self._lock.closed:
            return
        if self._is_empty():
            shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()

    def remove(self) -> None:
        """Delete the parts: the report is whole."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()

    def _is_empty(self) -> bool:
        return not any(self.directory.glob("*.parquet"))


def remove_leftovers(out: Path, identity: Mapping[str, Any]) -> None:
    """Delete what a run has left behind that was killed when its report already stood at `out`."""
    if out.with_name(f".{out.name}.parts").exists():
        with suppress(InputError, IncompleteError):  # they belong to another run, which may still go on
            Parts(out, identity, force=False).remove()


def _lock_nowait(file: IO[Any]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
