"""A rule as SQL, taken apart: what it compares, with which limit, and whether that is a mean or a rate. Needs no torch.

A rule is one boolean expression about all rows, such as `avg(mbe) < 1.2`. DuckDB parses it; what its tree says decides
whether the rule is about a mean or a rate, which have an interval, and what it compares with which limit.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from memdiag.errors import InputError
from memdiag.report_sql import Session

# DuckDB's name of a comparison -> how people write it, and how it reads the other way round
COMPARISONS = {
    "COMPARE_LESSTHAN": ("<", ">"),
    "COMPARE_LESSTHANOREQUALTO": ("<=", ">="),
    "COMPARE_GREATERTHAN": (">", "<"),
    "COMPARE_GREATERTHANOREQUALTO": (">=", "<="),
    "COMPARE_EQUAL": ("=", "="),
    "COMPARE_NOTEQUAL": ("!=", "!="),
}
MEANS = ("avg", "mean")
COUNTS_OF = ("count_if", "countif")


@dataclass(frozen=True)
class Mean:
    """avg(values) over the rows that are `among`; SQL of a row."""

    values: str
    among: str


@dataclass(frozen=True)
class Rate:
    """The share of rows with `hit` among those that are `among`; SQL of a row."""

    hit: str
    among: str


@dataclass(frozen=True)
class Parsed:
    """What a rule says, as SQL that DuckDB wrote again from its tree."""

    sql: str
    comparison: str | None
    observed: str | None
    limits: tuple[str, ...]
    statistic: Mean | Rate | None


def parse(session: Session, text: str, *, of: str) -> Parsed:
    """Take a rule apart.

    Args:
        session: whose parser is used.
        text: of the rule.
        of: how errors call it.
    Raises:
        InputError: it is not one SQL expression.
    """
    tree = _tree(session, text, of)
    write = _Writer(session, tree["whole"])
    expression = tree["expression"]
    kind, type_ = expression.get("class"), expression.get("type")
    if kind == "COMPARISON" and type_ in COMPARISONS:
        left, right = expression["left"], expression["right"]
        forwards, backwards = COMPARISONS[type_]
        if _is_constant(left) and not _is_constant(right):
            left, right, forwards = right, left, backwards
        statistic = _statistic(left, write) if _is_constant(right) else None
        return Parsed(write(expression), forwards, write(left), (write(right),), statistic)
    if kind == "BETWEEN" and type_ == "COMPARE_BETWEEN":
        ends = (expression["lower"], expression["upper"])
        statistic = _statistic(expression["input"], write) if all(map(_is_constant, ends)) else None
        return Parsed(write(expression), "between", write(expression["input"]), tuple(map(write, ends)), statistic)
    return Parsed(write(expression), None, None, (), None)


def expression(session: Session, text: str, *, of: str) -> str:
    """One SQL expression, written again from its tree; errors as `parse`."""
    tree = _tree(session, text, of)
    return _Writer(session, tree["whole"])(tree["expression"])


def _tree(session: Session, text: str, of: str) -> dict[str, Any]:
    """The tree of `SELECT (text)` and of the expression in it.

    The text stands alone here: one that closes the bracket, adds a clause or a statement shows as such in the tree.
    """
    found = json.loads(session.rows("SELECT json_serialize_sql(?)", [f"SELECT (\n{text}\n)"], of=of)[0][0])
    if found.get("error"):
        said = " ".join(str(found.get("error_message", "")).split())
        raise InputError(f"{of} is no SQL: {said[:200]}")
    node = found["statements"][0]["node"] if len(found["statements"]) == 1 else {}
    extras = ("where_clause", "group_expressions", "group_sets", "having", "sample", "qualify", "modifiers")
    alone = (
        node.get("type") == "SELECT_NODE"
        and len(node["select_list"]) == 1
        and node["from_table"].get("type") == "EMPTY"
        and not any(node.get(extra) for extra in extras)
        and not node["cte_map"]["map"]
    )
    if not alone or not text.strip():
        raise InputError(f"{of} must be one SQL expression, such as avg(mbe) < 1.2, and no statement")
    return {"whole": found, "expression": node["select_list"][0]}


class _Writer:
    """Trees of expressions as SQL."""

    def __init__(self, session: Session, whole: Mapping[str, Any]) -> None:
        self._session = session
        self._whole = whole

    def __call__(self, expression: Mapping[str, Any]) -> str:
        tree = copy.deepcopy(dict(self._whole))
        tree["statements"][0]["node"]["select_list"] = [expression]
        sql = str(self._session.rows("SELECT json_deserialize_sql(?)", [json.dumps(tree)])[0][0])
        return f"({sql.removeprefix('SELECT ')})"


def _nodes(tree: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(tree, Mapping):
        if "class" in tree:
            yield tree
        for child in tree.values():
            yield from _nodes(child)
    elif isinstance(tree, list):
        for child in tree:
            yield from _nodes(child)


def _is_constant(expression: Mapping[str, Any]) -> bool:
    """Whether it is made of literals alone: no column, no aggregate, no query."""
    return all(
        node["class"] in ("CONSTANT", "CAST", "TYPE") or (node["class"] == "FUNCTION" and node.get("is_operator"))
        for node in _nodes(expression)
    )


def _statistic(expression: Mapping[str, Any], write: _Writer) -> Mean | Rate | None:
    """The mean or rate that an expression is, else None."""
    expression = _inner(expression)
    if _is_call(expression, *MEANS) and len(expression["arguments"]) == 1:
        return Mean(write(_argument(expression)), _among(expression, write))
    if not (_is_call(expression, "/") and len(expression["arguments"]) == 2):
        return None
    over, under = (_inner(argument["expression"]) for argument in expression["arguments"])
    hit, among = _counted(over, write), _counted(under, write)
    # `count(*) / count(*)` counts no hits; a column that is counted has hits where it is not null
    return Rate(hit, among) if hit not in (None, "true") and among is not None else None


def _counted(call: Mapping[str, Any], write: _Writer) -> str | None:
    """What a call of count counts, as a condition of a row; None: it is no count."""
    if _is_call(call, "count_star") or (_is_call(call, "count") and not call["arguments"]):
        return _among(call, write)
    if _is_call(call, *COUNTS_OF) and len(call["arguments"]) == 1:
        return _both(_among(call, write), write(_argument(call)))
    if _is_call(call, "count") and len(call["arguments"]) == 1:
        return _both(_among(call, write), f"({write(_argument(call))} IS NOT NULL)")
    return None


def _among(call: Mapping[str, Any], write: _Writer) -> str:
    return "true" if call.get("filter") is None else write(call["filter"])


def _both(one: str, other: str) -> str:
    return other if one == "true" else f"({one} AND {other})"


def _argument(call: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = call["arguments"][0]["expression"]
    return found


def _inner(expression: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without casts around it."""
    while expression.get("class") == "CAST":
        expression = expression["child"]
    return expression


def _is_call(expression: Mapping[str, Any], *names: str) -> bool:
    plain = not expression.get("distinct") and not (expression.get("order_bys") or {}).get("orders")
    return expression.get("class") == "FUNCTION" and expression.get("function_name") in names and plain
