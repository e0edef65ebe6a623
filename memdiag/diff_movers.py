"""The rows of two reports that moved most, and those that only one of them has. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memdiag.diff_columns import TOGETHER, Column, Compared, beyond_noise, error_of
from memdiag.pairing import HERE, Pairing, key_text, quoted
from memdiag.report_sql import Session

_ABOUT = "looking for the largest movers"


def movers(session: Session, pairing: Pairing, found: Compared) -> list[dict[str, Any]]:
    """Rows of MoverRow: of each column the pairs with the largest |new - base|, then rows added and removed by key.

    Args:
        session: with the views `base` and `new`.
        pairing: of their rows.
        found: by `compared`; its `top` is how many of each, with ties by key. Pairs that did not move are none.
    """
    if found.top < 1:
        return []
    moving = [column for column in found.columns if column.reach is not None and (column.min or column.max)]
    rows = []
    for column, listed in zip(moving, _largest(session, pairing, found, moving)):
        rows += [_moved(pairing, column.name, rank, row) for rank, row in enumerate(listed, 1)]
    if found.added:
        rows += _alone(session, pairing, "added", "n", "b", found.top)
    if found.removed:
        rows += _alone(session, pairing, "removed", "b", "n", found.top)
    return rows


def _largest(
    session: Session, pairing: Pairing, found: Compared, moving: Sequence[Column]
) -> list[list[dict[str, Any]]]:
    """Of each column the pairs that moved most; how far they must have moved is known, so that few are sorted."""
    if not moving:
        return []
    kinds = {column.name: column.kind for column in found.columns}
    key = ", ".join(f"k{i} := n.{quoted(name)}" for i, name in enumerate(pairing.keys))
    asked, wanted = [], []
    for column in moving:
        c, d, error = quoted(column.name), column.sql, error_of(column.name, kinds)
        noise = beyond_noise(d, error) if error else "CAST(NULL AS BOOLEAN)"
        values = f"b := CAST(b.{c} AS DOUBLE), n := CAST(n.{c} AS DOUBLE), d := CAST({d} AS DOUBLE), beyond := {noise}"
        wanted.append(f"abs({d}) >= {column.reach!r} AND {d} <> 0")
        by = f"struct_pack(far := -abs({d}), {key})"
        asked.append(f"arg_min(struct_pack({values}, {key}), {by}, {found.top}) FILTER (WHERE {wanted[-1]})")
    listed: list[Any] = []
    for start in range(0, len(asked), TOGETHER):
        part = slice(start, start + TOGETHER)
        where = " OR ".join(f"({one})" for one in wanted[part])
        listed += session.rows(f"SELECT {', '.join(asked[part])} FROM {pairing.joined} WHERE {where}", of=_ABOUT)[0]
    return [rows or [] for rows in listed]


def _moved(pairing: Pairing, name: str, rank: int, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "change": "moved",
        "column": name,
        "rank": rank,
        "key": key_text(pairing.keys, [row[f"k{i}"] for i in range(len(pairing.keys))]),
        "base": row["b"],
        "new": row["n"],
        "difference": row["d"],
        "beyond_noise": row["beyond"],
    }


def _alone(session: Session, pairing: Pairing, change: str, side: str, other: str, top: int) -> list[dict[str, Any]]:
    """The first rows, by key, that only one side has."""
    keys = ", ".join(f"{side}.{quoted(name)}" for name in pairing.keys)
    sql = f'SELECT {keys} FROM {pairing.joined} WHERE {other}."{HERE}" IS NULL ORDER BY {keys} LIMIT {top}'
    nothing = {"column": None, "base": None, "new": None, "difference": None, "beyond_noise": None}
    return [
        {"change": change, "rank": rank, "key": key_text(pairing.keys, values), **nothing}
        for rank, values in enumerate(session.rows(sql, of=_ABOUT), 1)
    ]
