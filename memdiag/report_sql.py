"""SQL over reports: DuckDB, shut in with the files that it was given. Needs no torch.

Rules come from files of other people: what runs here can read the reports by their names, and nothing else. It cannot
write, load extensions, change a setting, run longer than its time or take more than its memory.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import duckdb

from memdiag import tables
from memdiag.errors import InputError, one_line, unknown

TIME_LIMIT = 60.0  # seconds that one statement may take
MEMORY_LIMIT = "4GB"
GRACE = 3.0  # seconds after its time in which a statement may stop by itself
THREADS = 8  # at the most: each takes address space, which a limit of the process would run out of on many cores
ROOM = 2 << 30  # bytes beyond the memory limit: threads, what DuckDB does not count, and Python
_NO_COLUMN = re.compile(r'Referenced column "(?P<name>.*?)" not found|does not have a column named "(?P<other>.*?)"')
_FAULTS_OF_SQL = (
    duckdb.ParserException,
    duckdb.BinderException,
    duckdb.CatalogException,
    duckdb.ConversionException,
    duckdb.OutOfRangeException,
)
_SIZE = re.compile(r"\d+(\.\d+)?\s*[kmgt]i?b", re.IGNORECASE)


class Session:
    """Reports by name, as views: what `opened` gives."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        columns: Mapping[str, Sequence[str]],
        paths: Mapping[str, Path],
        time_limit: float,
        last_resort: Callable[[str], None] | None = None,
    ) -> None:
        self._connection = connection
        self._time_limit = time_limit
        self._paths = paths
        self._last_resort = last_resort
        self.columns = columns  # by the name of the view

    def rows(self, sql: str, parameters: Sequence[Any] = (), *, of: str = "the query") -> list[tuple[Any, ...]]:
        """All rows that a statement returns; `of` says whose it is, for errors.

        Raises:
            InputError: it is no SQL, names what is not there, is not allowed, takes too long or too much memory, or a
                report is damaged.
        """
        return list(self._ran(sql, parameters, of, lambda done: done.fetchall()))

    def column(self, sql: str, *, of: str = "the query") -> Any:
        """The first column that a statement returns as a NumPy array; errors as `rows`."""
        found = self._ran(sql, (), of, lambda done: done.fetchnumpy())
        return next(iter(found.values()))

    def types(self, sql: str, *, of: str = "the query") -> list[str]:
        """The types of the columns that a statement would return, without running it; errors as `rows`."""
        return [str(row[1]) for row in self.rows(f"DESCRIBE {sql}", of=of)]

    def _ran(self, sql: str, parameters: Sequence[Any], of: str, take: Any) -> Any:
        alarms = [threading.Timer(self._time_limit, self._connection.interrupt)]
        if self._last_resort is not None:  # one call of a function is not interrupted, however long it is
            said = f"{self._took_too_long(of)}"
            alarms.append(threading.Timer(self._time_limit + GRACE, self._last_resort, [said]))
        for alarm in alarms:
            alarm.daemon = True
            alarm.start()
        try:
            return take(self._connection.execute(sql, list(parameters)))
        except MemoryError:
            raise InputError(_too_much_memory(of)) from None
        except duckdb.Error as error:
            raise self._explained(error, of) from None
        except (UnicodeError, RuntimeError) as error:  # text that is not UTF-8, as the query's or in a file
            raise InputError(f"{of}: {one_line(error, 160)}") from None
        finally:
            for alarm in alarms:
                alarm.cancel()

    def _took_too_long(self, of: str) -> str:
        return f"{of} took longer than {self._time_limit:g} s; make it simpler or give a longer --time-limit"

    def _explained(self, error: duckdb.Error, of: str) -> InputError:
        """DuckDB's error as one line that says what to do."""
        text = str(error)
        if isinstance(error, duckdb.InterruptException):
            return InputError(self._took_too_long(of))
        if isinstance(error, duckdb.PermissionException) or "configuration has been locked" in text:
            return InputError(f"{of} wants more than the report: SQL here reaches no files, extensions or settings")
        if isinstance(error, duckdb.OutOfMemoryException):
            return InputError(_too_much_memory(of))
        if found := _NO_COLUMN.search(text):
            name = found["name"] or found["other"]
            known = {column for columns in self.columns.values() for column in columns}
            return InputError(f"{of}: {unknown('column', name, known)}")
        if not isinstance(error, _FAULTS_OF_SQL):  # a file may be damaged: says which, if one is
            for path in self._paths.values():
                _check_whole(path)
        if "expression depth" in text:
            return InputError(f"{of} is too deeply nested; make it simpler")
        said = re.sub(r"^\w+( \w+)* Error: ", "", text.split("\nLINE ")[0].split("Candidate functions")[0])
        kind = "is no SQL" if isinstance(error, duckdb.ParserException) else "does not work"
        return InputError(f"{of} {kind}: {one_line(said, 200)}")


def _too_much_memory(of: str) -> str:
    return f"{of} takes more memory than it may; make it simpler or give a larger --memory-limit"


@contextmanager
def opened(
    reports: Mapping[str, Path],
    *,
    time_limit: float = TIME_LIMIT,
    memory_limit: str | None = None,
    own_process: bool = False,
) -> Iterator[Session]:
    """Reports as views, each by its name, in a database without access to anything else.

    Args:
        reports: name -> file.
        time_limit: seconds that one statement may take.
        memory_limit: such as 4GB; what does not fit goes to temporary files where it can.
        own_process: this process does nothing else. Then the limits are also those of the process: DuckDB does not
            count all the memory that functions take, and cannot interrupt a single call of one.
    Raises:
        InputError: there is no such report, or it is not one of memdiag; `memory_limit` is no size.
    """
    memory = memory_limit or MEMORY_LIMIT
    if not _SIZE.fullmatch(memory):
        raise InputError(f"--memory-limit {memory!r} is no size; give one like {MEMORY_LIMIT}")
    if not time_limit > 0 or time_limit > threading.TIMEOUT_MAX:
        raise InputError(f"--time-limit {time_limit:g} is no time to run in; give seconds, e.g. {TIME_LIMIT:g}")
    schemas = {}
    for name, path in reports.items():
        tables.read_meta(path)
        schemas[name] = tables.read_schema(path).names
    # Under names of our own: in the user's, DuckDB would see patterns, partitions and addresses.
    with (
        tempfile.TemporaryDirectory(prefix="memdiag-sql-") as folder,
        _shut_in(Path(folder), memory) as connection,
        _limited(memory) if own_process else nullcontext(),
    ):
        places = {name: Path(folder, f"{number}.parquet") for number, name in enumerate(reports)}
        for name, place in places.items():
            os.symlink(os.path.abspath(reports[name]), place)
        allowed = ", ".join(_quoted(place) for place in places.values())
        connection.execute(f"SET allowed_paths = [{allowed}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        session = Session(connection, schemas, reports, time_limit, _ended(folder) if own_process else None)
        for name, place in places.items():
            view = f'CREATE VIEW "{name}" AS SELECT * FROM read_parquet({_quoted(place)}, hive_partitioning = false)'
            session.rows(view, of=str(reports[name]))
        yield session


@contextmanager
def _shut_in(folder: Path, memory: str) -> Iterator[duckdb.DuckDBPyConnection]:
    connection = duckdb.connect(
        config={
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "allow_community_extensions": "false",
            "python_enable_replacements": "false",  # a table's name is no Python variable
            "preserve_insertion_order": "false",  # less memory; whoever needs an order says so
            "memory_limit": memory,
            "threads": str(min(THREADS, os.cpu_count() or 1)),
            "temp_directory": str(folder / "spilled"),
        }
    )
    try:
        yield connection
    finally:
        with suppress(duckdb.Error):
            connection.close()


@contextmanager
def _limited(memory: str) -> Iterator[None]:
    """No more address space for this process than it has, the limit, and some room."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    units = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    number, unit = re.fullmatch(r"([\d.]+)\s*([kmgt])i?b", memory.lower()).groups()  # type: ignore[union-attr]
    wanted = int(float(number) * units[unit]) + ROOM + _address_space()
    limits = [limit for limit in (wanted, *before) if limit != resource.RLIM_INFINITY]
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _address_space() -> int:
    """Bytes that this process has mapped; generous where it cannot be told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 1 << 34


def _ended(folder: str) -> Callable[[str], None]:
    """Ends the process with one line and exit code 2, from another thread than the one that hangs."""

    def end(said: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"memdiag: {said}", file=sys.stderr, flush=True)
        os._exit(2)

    return end


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


def _check_whole(path: Path) -> None:
    """Read a report from end to end.

    Raises:
        InputError: it is damaged.
    """
    for _ in tables.stream(path):
        pass
