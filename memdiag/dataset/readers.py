"""Which reader opens which file: by its suffix. Tasks are read like files."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from memdiag import tasks
from memdiag.dataset.arrays import npz, safetensors
from memdiag.dataset.columnar import parquet, saved
from memdiag.dataset.faults import fault, reading
from memdiag.dataset.lines import csv_file, jsonl, text
from memdiag.dataset.source import Chunk, Source

FORMATS: dict[str, Callable[[Path], Source]] = {
    ".parquet": parquet,
    ".jsonl": jsonl,
    ".jsonl.gz": jsonl,
    ".csv": csv_file,
    ".npz": npz,
    ".safetensors": safetensors,
    ".txt": text,
    ".md": text,
}


def open_file(path: Path) -> Source:
    """The Source of a file or `save_to_disk` directory; the suffix decides the format.

    Raises:
        InputError: not there, not readable, of unknown suffix, or not what the suffix says.
    """
    name = str(path)
    with reading(name, "path"):
        mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return saved(path)
    if not stat.S_ISREG(mode):
        raise fault(name, "is a pipe, socket or device; wanted a file that can be read twice: save it to disk first")
    suffix = next((known for known in FORMATS if path.name.lower().endswith(known)), None)
    if suffix is None:
        raise fault(name, f"unknown suffix {path.suffix!r}; wanted one of {' '.join(FORMATS)}")
    with reading(name, "file"):
        path.open("rb").close()
        if path.stat().st_size == 0:
            raise fault(name, "is empty: 0 bytes; wanted at least one row")
    return FORMATS[suffix](path)


def open_task(task: tasks.Task) -> Source:
    """The Source of a built-in task; its first row's keys are the columns."""
    return Source(list(next(task.rows(), {})), lambda wanted: _read_task(task, wanted), lambda _: None, [])


def _read_task(task: tasks.Task, wanted: list[str]) -> Iterator[Chunk]:
    for row in task.rows():
        yield {column: [row[column]] for column in wanted}
