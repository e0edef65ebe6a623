"""What a verdict says, in words and figures, with the text of strangers made visible. Needs no torch."""

from __future__ import annotations

import math
import re

from memdiag.errors import one_line
from memdiag.verdicts import Outcome, Verdict

NOTHING = "–"


def number(value: float | None, digits: int = 6) -> str:
    """A figure to that many significant digits, whole numbers in full; – for a null or NaN; never -0."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value) or not float(value).is_integer() or abs(value) >= 2**53:
        return f"{value:.{digits}g}"
    return str(int(value))


def digits_of(verdict: Verdict) -> int:
    """Significant digits that the rule's figures need, 6 or more: what is not the limit must not look like it."""
    ends = [end for end in (verdict.observed, verdict.lo, verdict.hi) if end is not None and end != verdict.limit]
    for digits in range(6, 17):
        limit = number(verdict.limit, digits)
        if all(number(end, digits) != limit or limit == NOTHING for end in ends):
            return digits
    return 17


def interval(verdict: Verdict) -> str:
    """As `0.161 to 0.183`; "" where there is none. An end may be missing."""
    if verdict.lo is None and verdict.hi is None:
        return ""
    digits = digits_of(verdict)
    return f"{number(verdict.lo, digits)} to {number(verdict.hi, digits)}"


def limit(verdict: Verdict) -> str:
    """As `< 1.2`; "" for a rule that compares with no constant, and `0.5 to 1.2` for two limits."""
    if verdict.comparison == "between":
        digits = digits_of(verdict)
        return f"{number(verdict.least, digits)} to {number(verdict.limit, digits)}"
    known = "" if verdict.limit is None else number(verdict.limit, digits_of(verdict))
    return " ".join(part for part in (verdict.comparison, known) if part)


def figures(verdict: Verdict) -> str:
    """One line: observed, interval, limit, n, p and q, note."""
    parts = [f"observed {number(verdict.observed, digits_of(verdict))}"]
    if span := interval(verdict):
        parts.append(f"{'' if verdict.confidence is None else f'{number(100 * verdict.confidence)} % '}interval {span}")
    parts += [f"wanted {limit(verdict)}"] if limit(verdict) else []
    parts += [f"{name} {number(value)}" for name, value in _of(verdict, "n", "p", "q")]
    return ", ".join(parts) + (f": {one_line(verdict.note)}" if verdict.note else "")


def _of(verdict: Verdict, *names: str) -> list[tuple[str, float]]:
    return [(name, value) for name in names if (value := getattr(verdict, name)) is not None]


def counts(outcome: Outcome) -> dict[str, int]:
    """How many rules passed, failed and are inconclusive."""
    found = [verdict.verdict for verdict in outcome.verdicts]
    return {word: found.count(word) for word in ("pass", "fail", "inconclusive")}


def sentence(outcome: Outcome) -> str:
    """As `fail: 1 of 3 rules failed, 1 is inconclusive, which counts as pass`."""
    found, n = counts(outcome), len(outcome.verdicts)
    said = f"{found['fail']} of {n} rule{'' if n == 1 else 's'} failed"
    if unsure := found["inconclusive"]:
        said += f", {unsure} {'is' if unsure == 1 else 'are'} inconclusive, which counts as {outcome.inconclusive}"
    return f"{'fail' if outcome.failed else 'pass'}: {said}"


def cut(text: str, most: int) -> str:
    """At most that many characters, the last of them … if some are missing."""
    return text if len(text) <= most else text[: most - 1] + "…"


def visible(text: str, keep: str = "") -> str:
    """Control characters, bidi overrides and all else that cannot be seen as escapes like `\\x1b`; `keep` stays."""
    joiners = "\u200c\u200d"  # part of words in some scripts, and of emoji
    return "".join(c if c.isprintable() or c in joiners or c in keep else escape(c) for c in text)


def escape(character: str) -> str:
    """A character as \\x1b and the like."""
    return character.encode("unicode_escape").decode("ascii")


def plain(text: str, most: int) -> str:
    """Untrusted text as one line that can be seen, not too long; – for an empty one."""
    return cut(visible(" ".join(text.split())), most) or NOTHING


def apart(text: str) -> str:
    """No ## in it; joiners between do not count, since a runner may compare without them."""
    return re.sub(r"#(?=[\u200c\u200d]*#)", "# ", text)
