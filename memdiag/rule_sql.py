"""A rule as SQL, taken apart: what it compares, with which limit, and whether that is a mean or a rate. Needs no torch.

A rule is one boolean expression about all rows, such as `avg(mbe) < 1.2`. DuckDB parses it; what its tree says decides
whether the rule is about a mean or a rate, which have an interval, and what it compares with which limit.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
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
FLOATS = ("DOUBLE", "FLOAT")
WHOLE = ("BIGINT", "INTEGER", "HUGEINT")
# functions that most rules are made of; of others DuckDB is asked whether they give the same again
USUAL = frozenset(
    [*MEANS, *COUNTS_OF, "count", "count_star", "sum", "min", "max", "median", "quantile_cont", "quantile_disc"]
) | {"bool_and", "bool_or", "abs", "coalesce", "round", "stddev_samp", "isfinite", "isnan", "+", "-", "*", "/", "//"}
ANY_ROW = ("first", "last", "any_value", "arbitrary")  # of which row depends on the order in which threads come
TABLE_FUNCTIONS = ("range", "generate_series", "unnest")  # after FROM; others tell of the database and its files
SEVERAL = ("unnest", "unlist", "generate_subscripts")


@dataclass(frozen=True)
class Mean:
    """avg(values) over the rows that are `among`; SQL of a row.

    truth: SQL of what the values are a number of, if that may be a truth value: then the mean is a rate.
    """

    values: str
    among: str
    truth: str | None = None


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
    sides: tuple[str, ...] = ()  # of the comparisons within it, if it is not itself one


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
    write = _Writer(session, tree["whole"], of)
    expression = tree["expression"]
    _check_allowed(session, expression, of)
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
    return Parsed(write(expression), None, None, (), None, tuple(map(write, _sides(expression))))


def expression(session: Session, text: str, *, of: str) -> str:
    """One SQL expression, written again from its tree; errors as `parse`."""
    tree = _tree(session, text, of)
    _check_allowed(session, tree["expression"], of)
    return _Writer(session, tree["whole"], of)(tree["expression"])


def _tree(session: Session, text: str, of: str) -> dict[str, Any]:
    """The tree of `SELECT text` and of the expression in it.

    The text stands alone here: one that closes a bracket is no SQL, and one that adds a clause or a statement shows as
    such in the tree.
    """
    written = session.rows("SELECT json_serialize_sql(?)", [f"SELECT\n{text}\n"], of=of)[0][0]
    try:
        found = json.loads(written)
    except RecursionError:
        raise _too_deep(of) from None
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
        and not node["select_list"][0].get("alias")
    )
    if not alone or not text.strip():
        raise InputError(f"{of} must be one SQL expression, such as avg(mbe) < 1.2, and no statement")
    return {"whole": found, "expression": node["select_list"][0]}


class _Writer:
    """Trees of expressions as SQL."""

    def __init__(self, session: Session, whole: Mapping[str, Any], of: str) -> None:
        self._session = session
        self._whole = whole
        self._of = of

    def __call__(self, expression: Mapping[str, Any]) -> str:
        try:
            tree = copy.deepcopy(dict(self._whole))
            tree["statements"][0]["node"]["select_list"] = [expression]
            written = json.dumps(tree)
        except RecursionError:
            raise _too_deep(self._of) from None
        sql = str(self._session.rows("SELECT json_deserialize_sql(?)", [written], of=self._of)[0][0])
        return f"({sql.removeprefix('SELECT ')})"


def _too_deep(of: str) -> InputError:
    return InputError(f"{of} is too deeply nested; make it simpler")


def _check_allowed(session: Session, expression: Mapping[str, Any], of: str) -> None:
    """Refuse what is about more than the report, or does not give one value, and the same again.

    Raises:
        InputError: it reads another table, is random, depends on the time or on the order of rows, or gives several
            values.
    """
    nodes = list(_nodes(expression))
    called = {str(entry["key"]) for node in nodes for entry in (node.get("cte_map") or {}).get("map", [])}
    for node in nodes:
        of_table = node.get("type") == "BASE_TABLE" and (
            node.get("schema_name") or node.get("table_name") not in {*session.columns, *called}
        )
        function = (node.get("function") or {}).get("function_name") if node.get("type") == "TABLE_FUNCTION" else None
        if of_table or (function is not None and function not in TABLE_FUNCTIONS):
            what = function or node.get("table_name")
            raise InputError(
                f"{of} wants more than the report: SQL here reaches no files, extensions or settings ({what})"
            )
    names = {str(node.get("function_name")): node for node in nodes if node.get("class") == "FUNCTION"}
    asked = sorted(set(names) - USUAL)
    volatile = "SELECT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT' "
    volatile += "AND list_contains(?, function_name)"
    for (name,) in session.rows(volatile, [asked], of=of) if asked else []:
        raise InputError(f"{of} asks for {name}(), which is another each time; a rule gives the same again")
    for name in asked:
        if name in ANY_ROW and not (names[name].get("order_bys") or {}).get("orders"):
            raise InputError(f"{of}: {name}() is of any row; say which: min, max, or {name}(… ORDER BY …)")
    if any(node.get("sample") for node in nodes):
        raise InputError(f"{of} samples rows, which are others each time; a rule gives the same again")
    outside = list(_nodes(expression, within_queries=False))
    several = any(node["class"] == "STAR" and node.get("columns") for node in outside)
    if several or any(node.get("function_name") in SEVERAL for node in outside):
        raise InputError(f"{of} gives several values; a rule is one, true or false")


def _sides(expression: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What is compared under AND, OR and NOT."""
    kind = expression.get("class")
    if kind == "COMPARISON":
        return [expression["left"], expression["right"]]
    if kind == "BETWEEN":
        return [expression["input"], expression["lower"], expression["upper"]]
    if kind == "CONJUNCTION" or expression.get("type") == "OPERATOR_NOT":
        return [side for child in expression["children"] for side in _sides(child)]
    return []


def _nodes(tree: Any, *, within_queries: bool = True) -> Iterator[Mapping[str, Any]]:
    """Every part of a tree that has a class or samples, itself among them."""
    waiting = [tree]  # a stack of its own: trees may be deeper than Python's
    while waiting:
        found = waiting.pop()
        if isinstance(found, Mapping):
            if "class" in found or "sample" in found:
                yield {"class": "", **found}
            if within_queries or found.get("class") != "SUBQUERY":
                waiting += found.values()
        elif isinstance(found, list):
            waiting += found


def _is_constant(expression: Mapping[str, Any]) -> bool:
    """Whether it is made of literals alone: no column, no aggregate, no query."""
    return all(
        node["class"] in ("CONSTANT", "CAST", "TYPE") or (node["class"] == "FUNCTION" and node.get("is_operator"))
        for node in _nodes(expression)
    )


def _statistic(expression: Mapping[str, Any], write: _Writer) -> Mean | Rate | None:
    """The mean or rate that an expression is, else None."""
    expression = _without_casts(expression, FLOATS)
    if _is_call(expression, *MEANS) and len(expression["arguments"]) == 1:
        return _mean(expression, write)
    if not (_is_call(expression, "/") and len(expression["arguments"]) == 2):
        return None
    over, under = (_without_casts(argument["expression"], FLOATS + WHOLE) for argument in expression["arguments"])
    hit, among = _counted(over, write), _counted(under, write)
    # `count(*) / count(*)` counts no hits; a column that is counted has hits where it is not null
    return Rate(hit, among) if hit not in (None, "true") and among is not None else None


def _mean(call: Mapping[str, Any], write: _Writer) -> Mean | Rate:
    """A mean; of CASE WHEN … THEN 1 ELSE 0 END it is a rate, and of a truth value as a number it may be one."""
    argument, among = _argument(call), _among(call, write)
    values = write(argument)
    if argument.get("class") == "CASE":
        results = [check["then_expr"] for check in argument["case_checks"]] + [argument.get("else_expr") or {}]
        if all((result.get("literal") or {}).get("text") in ("0", "1") for result in results):
            return Rate(f"({values} = 1)", among)
    if argument.get("class") == "CAST":
        return Mean(values, among, write(argument["child"]))
    return Mean(values, among)


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


def _without_casts(expression: Mapping[str, Any], types: Sequence[str]) -> Mapping[str, Any]:
    """Without casts to these types around it, which change no value."""
    while expression.get("class") == "CAST" and (expression.get("type_expr") or {}).get("type_name") in types:
        expression = expression["child"]
    return expression


def _is_call(expression: Mapping[str, Any], *names: str) -> bool:
    plain = not expression.get("distinct") and not (expression.get("order_bys") or {}).get("orders")
    return expression.get("class") == "FUNCTION" and expression.get("function_name") in names and plain
