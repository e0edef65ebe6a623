"""The shard files of `memdiag counterfactual`: what one model makes of every example, checked when it is read.

Axes: n training example, t held-out example. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdiag import tables
from memdiag.counterfactual_rows import ShardRow
from memdiag.errors import InputError
from memdiag.subsets import Bools, Ints, fingerprint

FOLDER = "shards"


@dataclass(frozen=True, eq=False)
class Shard:
    """What model `item` makes of every example."""

    item: int
    seed: int
    subset: str  # sha256 of `included`
    weights: str  # sha256 of the model's
    rows: Ints  # (n + t,) of the examples in their datasets
    included: Bools  # (n,)
    accuracy: NDArray[np.float32]  # (n + t,) NaN: none
    soft: NDArray[np.float32]  # (n + t,)


def shard_path(folder: Path, item: int) -> Path:
    """Where a model's shard is."""
    return folder / f"model-{item:05d}.parquet"


def time_path(folder: Path, item: int) -> Path:
    """Where it says how long the model took."""
    return folder / f"model-{item:05d}.json"


def items_in(folder: Path) -> list[int]:
    """The models that have a shard, damaged or not."""
    numbers = (path.stem.removeprefix("model-") for path in folder.glob("model-*.parquet"))
    items = {int(number) for number in numbers if number.isdecimal()}
    return sorted(item for item in items if shard_path(folder, item).is_file())  # model-1.parquet is nobody's


def run_of(identity: Mapping[str, Any]) -> str:
    """sha256 (hex) of a run's identity, which every shard of it holds."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def write_shard(folder: Path, shard: Shard, run: str) -> None:
    """Write a shard in one step.

    Args:
        run: digest of the run's identity.
    """
    n, total = len(shard.included), len(shard.rows)
    held_out = np.arange(total) >= n
    meta = {
        "report": ShardRow.report,
        "schema_version": ShardRow.schema_version,
        "run": run,
        "model": shard.item,
        "seed": shard.seed,
        "subset": shard.subset,
        "weights": shard.weights,
        "sha256": _digest(shard),
    }
    columns = {
        "row": shard.rows,
        "held_out": held_out,
        "included": np.concatenate([shard.included, np.zeros(total - n, dtype=np.bool_)]),
        "accuracy": shard.accuracy,
        "soft": shard.soft,
    }
    tables.write(shard_path(folder, shard.item), ShardRow, [tables.from_columns(ShardRow, columns)], meta)


def read_shard(folder: Path, item: int, run: str | None = None) -> Shard:
    """Read a shard, and check that it is whole and what its name says.

    Args:
        run: digest of the run that it must be of; None: of any.
    Raises:
        InputError: there is none, or it is damaged, or of another run or model.
    """
    path = shard_path(folder, item)
    report = tables.read(path)
    meta, table = report.meta, report.table
    if meta.get("report") != ShardRow.report or not table.schema.equals(tables.schema_of(ShardRow)):
        raise InputError(f"{path} is no shard of counterfactual; give it back its own, or delete it")
    if meta.get("model") != item or (run is not None and meta.get("run") != run):
        raise InputError(f"{path} is of another run or another model; give it back its own, or delete it")
    held_out = table["held_out"].to_numpy()
    found = Shard(
        item,
        meta.get("seed", -1),
        meta.get("subset", ""),
        meta.get("weights", ""),
        table["row"].to_numpy(),
        table["included"].to_numpy()[~held_out],
        table["accuracy"].to_numpy(),
        table["soft"].to_numpy(),
    )
    apart = np.array_equal(held_out, np.arange(len(held_out)) >= len(found.included))
    if not apart or _digest(found) != meta.get("sha256") or fingerprint(found.included) != found.subset:
        raise InputError(f"{path} is damaged: its contents are not what was written; delete it to make it again")
    return found


def is_of(folder: Path, item: int, run: str) -> bool:
    """Whether a shard says that it is of this run; its rows are not looked at."""
    try:
        return tables.read_meta(shard_path(folder, item)).get("run") == run
    except InputError:
        return False


def time_of(folder: Path, item: int) -> Mapping[str, Any]:
    """Seconds and engine of a model, if they are known; nothing depends on what the file says."""
    try:
        found = json.loads(time_path(folder, item).read_text())
        seconds, engine = float(found["seconds"]), found["engine"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    if not 0 <= seconds < math.inf or not isinstance(engine, str) or not engine.isprintable():
        return {}
    return {"seconds": seconds, "engine": engine}


def _digest(shard: Shard) -> str:
    """sha256 (hex) of what a shard says; NaN counts as one value."""
    told = f"{shard.item} {shard.seed} {shard.subset} {shard.weights} {len(shard.included)}\n"
    found = hashlib.sha256(told.encode(errors="replace"))
    found.update(shard.rows.astype("<i8").tobytes())
    found.update(np.packbits(shard.included).tobytes())
    for values in (shard.accuracy, shard.soft):
        found.update(np.where(np.isnan(values), -9e9, values).astype("<f4").tobytes())
    return found.hexdigest()
