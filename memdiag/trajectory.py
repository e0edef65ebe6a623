"""Trajectories: what every epoch saw of every example when it was presented, one Parquet file per epoch.

With logits z of an example and its label y, in train mode and with the weights just before the update that uses it:

    label_logit  z_y      other_logit  max_{c ≠ y} z_c      logsumexp  ln Σ_c exp z_c      correct  argmax_c z_c = y

From these follow loss (logsumexp − label_logit), margin (label_logit − other_logit) and confidence (exp of minus the
loss) of every epoch, and all scores that training dynamics give: AUM (Pleiss et al., arXiv:2001.10528), cartography
(Swayamdipta et al., arXiv:2009.10795), forgetting events (Toneva et al., arXiv:1812.05159). Of a language model the
first three are means over the tokens that an example has to predict, and correct says that all of them are right.

Importing this module does not import torch.

Axes: e epoch, b example, t token, k class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from memdiag import tables
from memdiag.errors import InputError, one_line
from memdiag.tables import column

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "trajectory"  # of a run's directory
NAME = re.compile(r"epoch=(\d{4,9})\.parquet")
GROUP = 8192  # rows written, and held by a reader, at once
VALUES = ("label_logit", "other_logit", "logsumexp")


@dataclass(frozen=True)
class TrajectoryRow:
    """One row per example, by row; a file per epoch, and the same rows in each."""

    report: ClassVar[str] = "train.trajectory"
    schema_version: ClassVar[int] = 1

    epoch: int = column(pa.int32(), "pass over the data, from 0")
    row: int = column(pa.int64(), "row of the example in the dataset, from 0")
    example_id: str = column(pa.string(), "the example's id, as in every report")
    label: int | None = column(pa.int64(), "label trained on; null for a language model", nullable=True)
    label_logit: float = column(pa.float32(), "logit of the label when presented; language model: mean over tokens")
    other_logit: float | None = column(
        pa.float32(), "highest logit of the other classes, likewise; null if there is none", nullable=True
    )
    logsumexp: float = column(pa.float32(), "ln of the sum of exp of all logits, likewise; minus label_logit: the loss")
    correct: bool = column(
        pa.bool_(), "the label has the highest logit, the first of equal ones; language model: at every token"
    )


def presented(logits: Tensor, labels: Tensor) -> Tensor:
    """What a trajectory keeps of logits.

    Args:
        logits: (b, k), any floating-point dtype, on any device.
        labels: (b,) int64, 0 … k − 1, on the same device.
    Returns:
        (4, b) float32, without a gradient: label_logit, other_logit (NaN for k = 1), logsumexp, correct (1 or 0).
        The arithmetic is in float32 whatever the dtype of the logits.
    """
    import torch

    logits = logits.detach().float()
    own = logits.gather(1, labels[:, None])[:, 0]
    correct = logits.argmax(1) == labels  # the first of equal ones
    top = logits.topk(min(2, logits.shape[1]), dim=1).values
    runner_up = top[:, 1] if top.shape[1] > 1 else torch.full_like(own, torch.nan)
    other = torch.where(correct, runner_up, top[:, 0]) if top.shape[1] > 1 else runner_up
    return torch.stack([own, other, logits.logsumexp(1), correct.float()])


# -- writing -------------------------------------------------------------------------------------------------------


def path_of(directory: Path, epoch: int) -> Path:
    """Where an epoch (from 0) is."""
    return directory / f"epoch={epoch:04d}.parquet"


def meta_of(dataset: Mapping[str, Any], n_examples: int) -> dict[str, Any]:
    """What the metadata of every epoch must hold.

    Args:
        dataset: its name, fingerprint (null: unknown) and columns.
        n_examples: rows of the file.
    """
    return {
        "report": TrajectoryRow.report,
        "schema_version": TrajectoryRow.schema_version,
        "dataset": dict(dataset),
        "n_examples": n_examples,
    }


def write_epoch(
    path: Path,
    epoch: int,
    rows: NDArray[np.int64],
    ids: Sequence[str],
    labels: NDArray[np.int64] | None,
    values: NDArray[np.float32],
    meta: Mapping[str, Any],
) -> None:
    """Write one epoch, or some of its rows, in one step.

    Args:
        path: the file; what was there is replaced.
        rows: (b,) rows of the dataset, ascending.
        ids: (b,) of the same examples.
        labels: (b,), None for a language model.
        values: (4, b) as `presented` gives them.
    """

    def groups() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(rows), GROUP):
            part = slice(start, start + GROUP)
            own, other, total, correct = values[:, part]
            columns = {
                "epoch": np.full(len(own), epoch, dtype=np.int32),
                "row": rows[part],
                "example_id": ids[part],
                "label": [None] * len(own) if labels is None else labels[part],
                "label_logit": own,
                "other_logit": np.where(np.isfinite(other), other, np.float32(np.nan)),
                "logsumexp": total,
                "correct": correct,
            }
            yield tables.from_columns(TrajectoryRow, columns)

    tables.write(path, TrajectoryRow, groups(), meta)


# -- reading -------------------------------------------------------------------------------------------------------


def epochs(directory: str | Path) -> list[Path]:
    """The files of a trajectory in the order of their epochs, checked to belong together.

    Args:
        directory: with epoch=0000.parquet and so on, or a run's directory with a folder `trajectory`.
    Raises:
        InputError: there is none, an epoch is missing, or they are of different datasets.
    """
    folder = Path(directory)
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    if not folder.is_dir():
        raise InputError(f"{folder}: no such directory; wanted a trajectory, e.g. runs/my-run/{FOLDER}")
    found = written(folder)
    if not found:
        raise InputError(f"{folder}: holds no trajectory (epoch=0000.parquet, ...); `memdiag train` writes one")
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise InputError(
            f"{folder}: epoch {missing[0]} is missing, the last is {max(found)}; copy all of the files there"
        )
    paths = [found[epoch] for epoch in sorted(found)]
    first = _belongs(paths[0])
    for path in paths[1:]:
        if _belongs(path) != first:
            raise InputError(f"{path}: is of another dataset or of other examples than {paths[0].name}; keep one run")
    return paths


def written(folder: Path) -> dict[int, Path]:
    """The epochs that are there, by number; none if there is no such folder."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return {int(match[1]): path for path in inside if (match := NAME.fullmatch(path.name))}


def _belongs(path: Path) -> tuple[Any, Any]:
    """The dataset's fingerprint and the number of examples that a file says it is of."""
    meta = tables.read_meta(path)
    if meta["report"] != TrajectoryRow.report:
        raise InputError(f"{path}: is a report of {meta['report']}; wanted {TrajectoryRow.report}")
    dataset = meta.get("dataset")
    return (dataset.get("fingerprint") if isinstance(dataset, dict) else None), meta.get("n_examples")


def read_chunks(directory: str | Path, chunk_rows: int = GROUP) -> Iterator[dict[str, Any]]:
    """All epochs side by side, some rows at a time; of each epoch no more than about `GROUP` + `chunk_rows` are held.

    Yields:
        row (b,) int64, example_id (list of b), label (b,) int64 or None for a language model; label_logit,
        other_logit (NaN where there is none) and logsumexp (e, b) float32; correct (e, b) bool. Rows ascend.
    Raises:
        InputError: as `epochs`; or a file is damaged, or has other rows than the first.
    """
    paths = epochs(directory)
    if chunk_rows < 1:
        raise InputError(f"chunk_rows is {chunk_rows}; wanted at least 1")
    with ExitStack() as stack:
        streams = [_batches(path, chunk_rows, stack) for path in paths]
        last = -1
        while True:
            parts = [next(stream, None) for stream in streams]
            first = parts[0]
            for path, part in zip(paths, parts):
                if (part is None) != (first is None) or not _same_rows(part, first):
                    raise InputError(
                        f"{path}: has other rows or labels than {paths[0].name}; keep the files of one run"
                    )
            if first is None:
                return
            rows = first["row"].to_numpy()
            if not (np.diff(rows, prepend=last) > 0).all():
                raise InputError(f"{paths[0]} is damaged: its rows do not ascend; make it again")
            if 0 < first["label"].null_count < len(rows):
                raise InputError(f"{paths[0]} is damaged: column label has gaps; make it again")
            last = rows[-1]
            yield _side_by_side([part for part in parts if part is not None])


def _batches(path: Path, chunk_rows: int, stack: ExitStack) -> Iterator[pa.RecordBatch]:
    names = [name for name in tables.schema_of(TrajectoryRow).names if name != "epoch"]
    try:
        file = pq.ParquetFile(stack.enter_context(pa.OSFile(str(path))))
        check_columns(path, file.schema_arrow, TrajectoryRow)
        for batch in file.iter_batches(batch_size=chunk_rows, columns=names):
            check_nulls(path, batch, TrajectoryRow)
            yield batch
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {one_line(error, 120)}; make it again") from None


def check_columns(path: Path, found: pa.Schema, row: type) -> None:
    """Raises InputError: a report that was read lacks one of the columns of its rows, or holds another type there."""
    for field in tables.schema_of(row):
        at = found.get_field_index(field.name)  # -1 also where there are two
        if at < 0 or found.field(at).type != field.type:
            raise InputError(f"{path} is damaged: it has no column {field.name} of {field.type}; make it again")


def check_nulls(path: Path, found: pa.Table | pa.RecordBatch, row: type) -> None:
    """Raises InputError: a column that was read has a gap where there may be none."""
    for field in tables.schema_of(row):
        if not field.nullable and field.name in found.schema.names and found[field.name].null_count:
            raise InputError(f"{path} is damaged: column {field.name} has gaps; make it again")


def _same_rows(a: pa.RecordBatch | None, b: pa.RecordBatch | None) -> bool:
    return a is b or (a is not None and b is not None and a["row"].equals(b["row"]) and a["label"].equals(b["label"]))


def _side_by_side(parts: list[pa.RecordBatch]) -> dict[str, Any]:
    first = parts[0]
    floats = {
        name: np.stack([part[name].to_numpy(zero_copy_only=False).astype(np.float32, copy=False) for part in parts])
        for name in VALUES
    }
    return {
        "row": first["row"].to_numpy(),
        "example_id": first["example_id"].to_pylist(),
        "label": None if first["label"].null_count else first["label"].to_numpy(),
        **floats,
        "correct": np.stack([part["correct"].to_numpy(zero_copy_only=False) for part in parts]).astype(np.bool_),
    }
