"""Which rows of two reports belong together: the key of each kind of report, and the join by it.

The reports are the views `base` and `new` of a `report_sql.Session`. Nulls in keys match each other. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memdiag.errors import InputError, unknown
from memdiag.report_sql import Session

# What tells a row of each report from all its others; the last column is what the rows are about.
KEYS: Mapping[str, tuple[str, ...]] = {
    "check": ("condition", "sql", "rule"),
    "counterfactual": ("example_id",),
    "counterfactual.examples": ("held_out", "example_id"),
    "counterfactual.influence": ("test_id", "example_id"),
    "counterfactual.models": ("model",),
    "counterfactual.shard": ("held_out", "row"),
    "counterfactual.sizes": ("width", "example_id"),
    "counterfactual.turn-over-dropout": ("example_id",),
    "diff.columns": ("column",),
    "diff.movers": ("change", "column", "key"),
    "diff.rules": ("sql", "rule"),
    "entropy": ("checkpoint", "unit", "pooling", "layer"),
    "entropy.gradients": ("kind", "checkpoint", "objective_pair", "batches", "layer", "matrix"),
    "prune-memorizers.pruning": ("seed", "order", "draw", "n_pruned"),
    "prune-memorizers.neurons": ("seed", "layer", "neuron"),
    "prune-memorizers.dynamics": ("seed", "step"),
    "prune-memorizers.filtration": ("seed", "part"),
    "reproduce.claims": ("name",),
    "reproduce.phases": ("network", "seed"),
    "reproduce.effects": ("name", "arm"),
    "reproduce.runs": ("arm", "measure", "seed"),
    "score": ("example_id",),
    "score.second-split": ("example_id",),
    "train.history": ("epoch",),
    "train.examples": ("example_id",),
    "train.trajectory": ("epoch", "example_id"),
    "train-gapt.history": ("step",),
    "train-gapt.compare": ("measure", "arm"),
}
SIDES = ("base", "new")
HERE = "is on this side"  # no report names a column so
_HEAD = 1000  # rows looked at before all are, to see whether both reports are in the same order


@dataclass(frozen=True)
class Pairing:
    """How rows of `base` and `new` are put together.

    keys: the columns that they are paired by. left_out: key columns that hold one value in each report, by which e.g.
    two checkpoints of different names are compared. `joined` is SQL after FROM, with the sides `b` and `n`; in a row of
    one side alone all columns of the other are null, `HERE` among them.
    """

    keys: tuple[str, ...]
    left_out: tuple[str, ...]
    base_rows: int
    new_rows: int
    in_order: bool  # both have the same keys in the same order
    joined: str


def key_of(kind: str, columns: Sequence[str], on: str | None = None) -> tuple[str, ...]:
    """The key columns of a report.

    Args:
        kind: the report's name.
        columns: those that both reports have.
        on: columns to pair by instead, with commas.
    Raises:
        InputError: the reports lack one of them, or nobody knows the key of such a report.
    """
    if on is not None:
        wanted = tuple(dict.fromkeys(name.strip() for name in on.split(",") if name.strip()))
        if not wanted:
            raise InputError("--on names no column; give columns that both reports have, e.g. --on example_id")
    elif kind in KEYS:
        wanted = KEYS[kind]
    else:
        raise InputError(f"nobody says how rows of a report {kind!r} are paired; give --on with the columns of its key")
    for name in wanted:
        if name not in columns:
            raise unknown("column in both reports", name, columns)
    return wanted


def paired_by(session: Session, kind: str, on: str | None = None) -> Pairing:
    """The pairing of two reports by their key.

    Args:
        session: with the views `base` and `new`.
        kind: what both are.
        on: columns to pair by instead of the kind's own, with commas.
    Raises:
        InputError: as `key_of`; or a key repeats within a report.
    """
    common = [name for name in session.columns["base"] if name in session.columns["new"]]
    wanted = key_of(kind, common, on)
    rows = {side: int(session.rows(f"SELECT count(*) FROM {side}")[0][0]) for side in SIDES}
    # the last column is what the rows are about: one example each of two reports need not be the same one
    single = [name for name in wanted[:-1] if on is None and all(_is_single(session, side, name) for side in SIDES)]
    keys = tuple(name for name in wanted if name not in single)
    _check_types(session, keys)
    in_order = rows["base"] == rows["new"] and _same_order(session, keys)
    for side in SIDES[:1] if in_order else SIDES:
        _check_unique(session, side, keys)
    sides = [f'(SELECT *, true AS "{HERE}" FROM {side}) AS {side[0]}' for side in SIDES]
    joined = (
        f"{sides[0]} POSITIONAL JOIN {sides[1]}" if in_order else f"{sides[0]} FULL JOIN {sides[1]} ON {_same(keys)}"
    )
    return Pairing(keys, tuple(single), rows["base"], rows["new"], in_order, joined)


def quoted(name: str) -> str:
    """A column's name as SQL has it."""
    return '"' + name.replace('"', '""') + '"'


def key_text(keys: Sequence[str], values: Sequence[Any]) -> str:
    """A key as JSON text, as reports and messages show it."""
    return json.dumps(dict(zip(keys, values)), ensure_ascii=False, default=str)


def example_key(session: Session, pairing: Pairing, side: str) -> str:
    """The key of one row of a report, "none" if it has no rows."""
    listed = ", ".join(quoted(name) for name in pairing.keys)
    found = session.rows(f"SELECT {listed} FROM {side} LIMIT 1", of=_ABOUT)
    return key_text(pairing.keys, found[0]) if found else "none"


_ABOUT = "pairing the reports"


def _check_types(session: Session, keys: Sequence[str]) -> None:
    """Raise InputError if a key is of one type here and of another there: 1 and "1" are no two names of one row."""
    listed = ", ".join(f"{side}.{quoted(name)}" for side in SIDES for name in keys)
    types = session.types(f"SELECT {listed} FROM base CROSS JOIN new", of=_ABOUT)
    for name, base, new in zip(keys, types, types[len(keys) :]):
        if _family(base) != _family(new):
            raise InputError(
                f"key column {name!r} is {base} in the base report and {new} in the new one, so no row is surely the "
                "same; make both reports from data of one type, or give --on with another column"
            )


def _family(type_: str) -> str:
    """Types whose values can be told equal."""
    name = type_.split("(")[0]
    if name.removeprefix("U") in ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT"):
        return "whole numbers"
    return "other numbers" if name in ("FLOAT", "DOUBLE", "DECIMAL") else type_


def _same(keys: Sequence[str]) -> str:
    return " AND ".join(f"b.{quoted(name)} IS NOT DISTINCT FROM n.{quoted(name)}" for name in keys)


def _is_single(session: Session, side: str, name: str) -> bool:
    """Whether a column holds one value, or null, in every row."""
    column = quoted(name)
    low, high, known, rows = session.rows(
        f"SELECT min({column}), max({column}), count({column}), count(*) FROM {side}", of=_ABOUT
    )[0]
    return bool(low == high and known in (0, rows))


def _same_order(session: Session, keys: Sequence[str]) -> bool:
    """Whether the n-th rows of both have the same key, for every n; both have equally many."""
    for limit in (f" LIMIT {_HEAD}", ""):
        sides = [f"(SELECT * FROM {side}{limit}) AS {side[0]}" for side in SIDES]
        sql = f"SELECT count(*) FROM {sides[0]} POSITIONAL JOIN {sides[1]} WHERE NOT ({_same(keys)})"
        if session.rows(sql, of=_ABOUT)[0][0]:
            return False
    return True


def _check_unique(session: Session, side: str, keys: Sequence[str]) -> None:
    """Raise InputError if a key repeats, with one that does."""
    listed = ", ".join(quoted(name) for name in keys)
    # hashes take a fraction of the memory and time; where two are the same, the keys themselves are looked at
    hashes = np.sort(session.column(f"SELECT hash({listed}) FROM {side}", of=_ABOUT))
    if not (hashes[1:] == hashes[:-1]).any():
        return
    sql = f"SELECT {listed}, count(*) FROM {side} GROUP BY {listed} HAVING count(*) > 1 ORDER BY ALL LIMIT 1"
    for *values, times in session.rows(sql, of=_ABOUT):
        raise InputError(
            f"{key_text(keys, values)} is the key of {times:,} rows of the {side} report; give --on with columns that "
            "tell its rows apart"
        )
