"""`memdiag import`: bring a published or foreign score into a score report, so that it enters the agreement table.

Importing this module does not import torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag import scores, tables, trajectory
from memdiag.errors import InputError, one_line, unknown
from memdiag.keywords import options_from
from memdiag.score_report import KEY, REPORT, TRUTH, VERSION, rank_column
from memdiag.score_summary import summary_of
from memdiag.tables import column

log = logging.getLogger("memdiag")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")
ENDS = ("high", "low")


@dataclass(frozen=True)
class ImportOptions:
    """Options of `memdiag import`; the field names are the command's option names."""

    name: str  # --as
    into: str = "score.parquet"
    key: str | None = None
    column: str | None = None
    memorized: str = "high"

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise InputError(f"--as {self.name!r}: wanted a name of letters, digits and _, beginning with a letter")
        if self.name in scores.NAMES or self.name.endswith("_rank"):
            raise InputError(
                f"--as {self.name}: is a name of memdiag's own; choose another, e.g. {self.name}_published"
            )
        if self.memorized not in ENDS:
            raise unknown("end for --memorized", self.memorized, ENDS)


def import_score(
    file: str | Path, *, out: str | Path | None = None, force: bool = False, **options: Any
) -> tables.Report:
    """Write a score report with one column more.

    Args:
        file: .npy with one number per row of the dataset, or CSV, JSONL, Parquet, .npz with a column of numbers.
        out: the new report; None: beside the old one, as NAME.with-AS.parquet.
        force: replace what stands there.
        **options: the fields of ImportOptions: `name`, `into` (a report of memdiag score), `key` (the column of FILE
            that holds the examples' ids; None: its rows are the dataset's), `column`, `memorized` (high or low).
    Returns:
        The new report. Examples that FILE does not have are null.
    Raises:
        InputError: a file is at fault, or no example is in both.
    """
    settings = options_from(ImportOptions, options)
    into = Path(settings.into)
    target = Path(out) if out is not None else into.with_name(f"{into.stem}.with-{settings.name}.parquet")
    meta, schema = tables.read_meta(into), tables.read_schema(into)
    if meta["report"] != REPORT:
        raise InputError(f"{into}: is a report of {meta['report']}; wanted one of memdiag score")
    _check(into, meta, schema)
    if settings.name in schema.names:
        raise InputError(f"{into}: has a column {settings.name!r} already; choose another --as")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{path}: no such file; wanted .npy, CSV, JSONL, .npz or Parquet with a column of numbers")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    identity = {"report": REPORT, "into": meta["identity"], "file": digest, **_same_numbers(settings)}
    if tables.check_place(target, lambda: identity, force=force):
        log.info("%s is already there, made from the same inputs; --force makes it again", target)
        return tables.read(target)
    by_id, by_row = _read(path, settings)
    return _write(target, into, meta, schema, settings, by_id, by_row, {"file": path.name, "sha256": digest}, identity)


def _check(into: Path, meta: dict[str, Any], schema: pa.Schema) -> None:
    """Refuse a score report that is damaged: without what it should say of itself, or without a column."""
    names, summary, foreign = meta.get("scores"), meta.get("summary"), meta.get("foreign") or {}
    figures = summary.get("scores") if isinstance(summary, dict) else None
    whole = (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and isinstance(figures, dict)
        and set(figures) <= set(names)
        and all(isinstance(found, dict) for found in figures.values())
        and isinstance(foreign, dict)
        and all(isinstance(found, dict) and found.get("memorized") in ENDS for found in foreign.values())
        and type(meta.get("seed")) is int
        and 0 <= meta["seed"] < 2**32
        and isinstance(meta.get("identity"), dict)
    )
    if not whole:
        raise InputError(f"{into} is damaged: what it says of its scores cannot be read; make it again")
    wanted = KEY | (TRUTH if "truth" in schema.names else {})
    for name in names or ():
        of_ours = name in scores.NAMES
        wanted[name] = scores.load(name).COLUMN if of_ours else column(pa.float64(), "imported", nullable=True)
    trajectory.check_columns(into, schema, tables.row_class("ScoreRow", REPORT, VERSION, wanted))


def _same_numbers(settings: ImportOptions) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(settings).items() if k != "into"}


def _write(
    target: Path,
    into: Path,
    meta: dict[str, Any],
    schema: pa.Schema,
    settings: ImportOptions,
    by_id: dict[str, float] | None,
    by_row: NDArray[np.float64],
    about: dict[str, Any],
    identity: dict[str, Any],
) -> tables.Report:
    name, end = settings.name, settings.memorized
    doc = f"imported from {about['file']}; {end}: more memorized"
    fields = {
        found[0]: column(schema.field(found[0]).type, found[4], unit=found[2], nullable=found[3])
        for found in tables.described(schema)
    }
    n_ranks = sum(field.endswith("_rank") for field in fields)
    fields[name] = column(pa.float64(), doc, nullable=True)
    row = tables.row_class("ScoreRow", REPORT, VERSION, fields)
    key = tables.row_class("KeyRow", REPORT, VERSION, KEY)
    matched = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal matched
        for table in tables.stream(into):
            trajectory.check_nulls(into, table, key)
            if by_id is not None:
                values = np.array([by_id.get(i, np.nan) for i in table["example_id"].to_pylist()], dtype=np.float64)
            else:
                rows = table["row"].to_numpy()
                inside = (rows >= 0) & (rows < len(by_row))
                values = np.where(inside, by_row[np.where(inside, rows, 0)], np.nan)
            matched += int((~np.isnan(values)).sum())
            columns = {n: table[n].combine_chunks() for n in table.column_names} | {name: values}
            yield tables.from_columns(row, columns)

    plain = target.with_name(f".{target.name}.plain")
    try:
        tables.write(plain, row, batches(), {"report": REPORT})
        if not matched:
            how = f"id in its column {settings.key!r}" if settings.key else "row number"
            raise InputError(f"{about['file']}: has a number for no example of {into} (by {how}); check --key")
        names = (*meta["scores"], name)
        foreign = dict(meta.get("foreign") or {}) | {name: about | {"memorized": end, "matched": matched}}
        ends = {n: found["memorized"] for n, found in foreign.items()}
        summary, ranked = summary_of(
            plain, names, truth="truth" in schema.names, ranks=bool(n_ranks), seed=meta["seed"], foreign=ends
        )
        for score, figures in meta["summary"]["scores"].items():
            summary["scores"][score]["top"] = figures.get("top", [])  # with their texts
        summary |= {k: v for k, v in meta["summary"].items() if k not in summary}
        new = meta | {"scores": list(names), "foreign": foreign, "summary": summary, "identity": identity}
        if n_ranks:
            row = tables.row_class("ScoreRow", REPORT, VERSION, fields | {f"{name}_rank": rank_column(name)})
            tables.write(target, row, _ranked(plain, row, f"{name}_rank", ranked[name]), new)
        else:
            tables.join(target, row, [plain], new)
    finally:
        plain.unlink(missing_ok=True)
    return tables.read(target)


def _ranked(plain: Path, row: type, name: str, ranks: NDArray[np.float64]) -> Iterator[pa.RecordBatch]:
    start = 0
    for table in tables.stream(plain):
        part = ranks[start : start + table.num_rows]
        start += table.num_rows
        yield tables.from_columns(row, {n: table[n].combine_chunks() for n in table.column_names} | {name: part})


def _read(path: Path, settings: ImportOptions) -> tuple[dict[str, float] | None, NDArray[np.float64]]:
    """The numbers by id, or in the order of their rows."""
    if path.suffix == ".npy":
        if settings.key is not None:
            raise InputError(f"{path}: an .npy has no columns, so no --key; its rows are taken as the dataset's")
        return None, _finite(path, _npy(path))
    from memdiag.dataset import cells
    from memdiag.dataset.readers import open_file

    source = open_file(path)
    names = list(source.columns)
    if settings.key is not None and settings.key not in names:
        raise unknown(f"column of {path.name} for --key", settings.key, names)
    wanted = settings.column or _guess(path, settings, names)
    if wanted not in names:
        raise unknown(f"column of {path.name}", wanted, names)
    ids: list[str] = []
    values: list[float] = []
    for chunk in source.read(sorted({wanted, *([settings.key] if settings.key else [])})):
        for i in range(len(chunk[wanted])):
            values.append(_number(path, len(values), cells.cell(chunk[wanted], i)))
            if settings.key is not None:
                ids.append(str(cells.cell(chunk[settings.key], i)))
    if settings.key is None:
        return None, _finite(path, np.array(values))
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise InputError(f"{path}: the id {twice[:40]!r} is there twice in column {settings.key!r}; wanted unique ids")
    return dict(zip(ids, _finite(path, np.array(values)).tolist())), np.empty(0)


def _npy(path: Path) -> NDArray[np.float64]:
    from memdiag.dataset.faults import DAMAGED

    try:
        found = np.load(path, allow_pickle=False)
    except DAMAGED as error:
        raise InputError(f"{path}: cannot be read as .npy ({one_line(error, 120)})") from None
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "biuf":
        raise InputError(
            f"{path}: holds {getattr(found, 'dtype', 'no')} of shape {getattr(found, 'shape', ())}; "
            "wanted one number per row"
        )
    return found.astype(np.float64)


def _guess(path: Path, settings: ImportOptions, names: list[str]) -> str:
    others = [name for name in names if name != settings.key]
    if settings.name in others:
        return settings.name
    if len(others) != 1:
        raise InputError(f"{path}: has the columns {', '.join(names)[:200]}; say with --column which is the score")
    return others[0]


def _number(path: Path, row: int, cell: Any) -> float:
    try:
        return float("nan") if cell is None or cell == "" else float(cell)
    except (TypeError, ValueError, OverflowError):  # a whole number of 400 digits
        raise InputError(
            f"{path}: row {row}: {str(cell)[:40]!r} is no number; say with --column which is the score"
        ) from None


def _finite(path: Path, values: NDArray[np.float64]) -> NDArray[np.float64]:
    if not len(values):
        raise InputError(f"{path}: has no rows; wanted a number for each example")
    infinite = np.isinf(values)
    if infinite.any():
        raise InputError(f"{path}: row {int(infinite.argmax())} is infinite; leave such rows empty")
    return values
