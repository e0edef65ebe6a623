"""Rules as people write them: on the command line, and in a TOML file. Needs no torch."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdiag.errors import InputError, one_line, unknown

_NAMED = re.compile(r"\s*(?P<name>\w[\w .+-]*?):\s+(?P<sql>\S.*)", re.DOTALL)
_CHANGE = re.compile(r"(?P<sign>\+/-|\+-|±|\+|-)\s*(?P<amount>(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)", re.IGNORECASE)
_LONGEST = 1_000_000  # bytes of a file of rules
_MOST = 1000  # rules of one run
KEYS = ("name", "sql", "where", "confidence")
CHANGE_KEYS = ("name", "sql", "column", "allow")


@dataclass(frozen=True)
class Rule:
    """A rule as it was given: what it is called (None: its SQL), over which rows, and at which confidence."""

    sql: str
    name: str | None = None
    where: str | None = None
    confidence: float | None = None  # None: judged by its value
    must: bool = False  # a rule that has no interval is an error, not judged by its value

    @property
    def title(self) -> str:
        """Its name, else its SQL."""
        return self.name or self.sql


@dataclass(frozen=True)
class Change:
    """How far the mean of a column may move from one report to another: `least` at the least, `most` at the most."""

    column: str
    least: float | None  # of new - base; None: it may fall as it likes
    most: float | None
    name: str | None = None

    @property
    def sql(self) -> str:
        """As it is written on the command line."""
        if self.least is not None and self.most is not None:
            return f"{self.column}: ±{self.most:g}"
        return f"{self.column}: +{self.most:g}" if self.most is not None else f"{self.column}: -{-(self.least or 0):g}"

    @property
    def title(self) -> str:
        """Its name, else as it is written."""
        return self.name or self.sql


def rule_of(text: str, *, where: str | None = None, confidence: float | None = None) -> Rule:
    """A rule of the command line: SQL, or NAME: SQL.

    >>> rule_of("compressed: avg(mbe) < 1.2").name
    'compressed'
    """
    named = _NAMED.fullmatch(text)
    if named is None:
        return Rule(text.strip(), None, where, confidence)
    return Rule(named["sql"].strip(), named["name"].strip(), where, confidence)


def change_of(column: str, allow: str, name: str | None = None) -> Change | None:
    """How far a column may move, from text such as +0.01, -0.01 or ±0.01; None: it is no such text.

    >>> change_of("loss", "+0.01").most
    0.01
    """
    found = _CHANGE.fullmatch(allow.strip())
    if found is None or math.isinf(amount := float(found["amount"])):
        return None
    sign = found["sign"]
    return Change(column, None if sign == "+" else 0.0 - amount, None if sign == "-" else amount, name)


def rules_in(path: Path, *, where: str | None = None, confidence: float | None = None) -> list[Rule]:
    """The rules of a TOML file: `[[rule]]` with `sql`, and perhaps `name`, `where` and `confidence`.

    `where` and `confidence` at the top of the file are those of all its rules that have none; the arguments are of
    those that have none after that.

    Raises:
        InputError: it cannot be read, is no TOML, or says what is not known.
    """
    found = _opened(path, ("rule", "where", "confidence"))
    where = _text(found, "where", path) or where
    confidence = confidence_of(found.get("confidence", confidence), f"{path}: confidence")
    return [_rule(one, path, number, where, confidence) for number, one in enumerate(_listed(found, path), 1)]


def changes_in(path: Path) -> list[Rule | Change]:
    """The rules of a TOML file for two reports: `[[rule]]` with `sql`, or `column` and `allow`; errors as above."""
    out: list[Rule | Change] = []
    for number, one in enumerate(_listed(_opened(path, ("rule",)), path), 1):
        _check_keys(one, CHANGE_KEYS, path, number)
        column, allow = _text(one, "column", path), _text(one, "allow", path)
        if column is None and allow is None:
            out.append(_rule(one, path, number, None, None))
            continue
        change = change_of(column, allow, _text(one, "name", path)) if column and allow and "sql" not in one else None
        if change is None:
            raise InputError(f'{path}: rule {number} needs column = "loss" and allow = "+0.01", or sql alone')
        out.append(change)
    return out


def _opened(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"--rules {path} is no regular file; give a TOML file")
        with open(path, "rb") as file:
            text = file.read(_LONGEST + 1)
        if len(text) > _LONGEST:
            raise InputError(f"--rules {path} is longer than {_LONGEST:,} bytes; give a shorter file")
        found = tomllib.loads(text.decode())
    except OSError as error:
        raise InputError(f"--rules {path}: {error.strerror or one_line(error)}; give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"--rules {path} is no TOML: {one_line(error, 120)}") from None
    for key in found:
        if key not in keys:
            raise unknown("key", key, keys)
    return found


def _listed(found: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    listed = found.get("rule")
    if not isinstance(listed, list) or not listed or not all(isinstance(one, dict) for one in listed):
        raise InputError(f'--rules {path} has no rule; give [[rule]] with sql = "avg(mbe) < 1.2"')
    return listed


def _check_keys(one: Mapping[str, Any], keys: Sequence[str], path: Path, number: int) -> None:
    for key in one:
        if key not in keys:
            raise InputError(f"{path}: rule {number}: {unknown('key', key, keys)}")


def _rule(one: Mapping[str, Any], path: Path, number: int, where: str | None, confidence: float | None) -> Rule:
    _check_keys(one, KEYS, path, number)
    sql = _text(one, "sql", path)
    if not sql:
        raise InputError(f"{path}: rule {number} has no sql")
    own = confidence_of(one.get("confidence", confidence), f"{path}: rule {number}: confidence")
    return Rule(sql.strip(), _text(one, "name", path), _text(one, "where", path) or where, own, "confidence" in one)


def _text(of: Mapping[str, Any], key: str, path: Path) -> str | None:
    value = of.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{path}: {key} = {value!r} must be text")
    return value


def confidence_of(value: Any, of: str = "--confidence") -> float | None:
    """A confidence between 0 and 1, or none.

    Raises:
        InputError: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 < value < 1:
        raise InputError(f"{of} {value!r} is no probability; give one between 0 and 1, e.g. 0.95")
    return float(value)


def gathered(
    texts: Sequence[str], file: Path | None, *, where: str | None = None, confidence: float | None = None
) -> tuple[Rule, ...]:
    """The rules of the command line, then those of a file.

    Raises:
        InputError: there is none, too many, or two of one name.
    """
    confidence = confidence_of(confidence)
    found = [rule_of(text, where=where, confidence=confidence) for text in texts]
    found += rules_in(file, where=where, confidence=confidence) if file is not None else []
    if not found:
        raise InputError('there is no rule; give --rule "avg(mbe) < 1.2", or --rules with a TOML file of them')
    _check_names(found)
    return tuple(found)


def gathered_changes(texts: Sequence[str], file: Path | None) -> tuple[Rule | Change, ...]:
    """The rules for two reports of the command line, SQL or COLUMN: +0.01, then those of a file; there may be none.

    Raises:
        InputError: too many, or two of one name.
    """
    found: list[Rule | Change] = []
    for text in texts:
        rule = rule_of(text)
        change = change_of(rule.name, rule.sql) if rule.name else None
        if rule.name and change is None and _is_number(rule.sql):
            raise InputError(f"rule {text!r} does not say which way; give {rule.name}: +0.01, -0.01 or ±0.01")
        found.append(change or rule)
    found += changes_in(file) if file is not None else []
    _check_names(found)
    return tuple(found)


def _is_number(text: str) -> bool:
    try:
        float(text.rstrip("%"))
    except ValueError:
        return False
    return True


def _check_names(rules: Sequence[Rule | Change]) -> None:
    if len(rules) > _MOST:
        raise InputError(f"{len(rules):,} rules are more than the {_MOST:,} of a run; give fewer")
    seen: set[str] = set()
    for rule in rules:
        if rule.name is not None and rule.name in seen:
            raise InputError(f"two rules have the name {rule.name!r}; give each its own")
        seen |= {rule.name} if rule.name is not None else set()
