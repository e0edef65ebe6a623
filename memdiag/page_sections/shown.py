"""How figures of a page are written: as many digits as their interval allows, and never a digit more.

Needs nothing but Python.
"""

from __future__ import annotations

import math
import re

NOTHING = "–"
MOST_PLACES = 6


def number(value: object, places: int | None = None) -> str:
    """A value as text; – for null and NaN.

    Args:
        value: a number or truth value; anything else is shown as it is.
        places: behind the point; None: three significant digits.
    """
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if places is not None:
        return _signed(f"{value:,.{places}f}")
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e15 or size < 1e-4:
        return _signed(f"{value:.2e}")
    return _signed(f"{value:,.{max(0, 2 - math.floor(math.log10(size)))}f}")


def places_of(lo: float | None, hi: float | None) -> int | None:
    """Places behind the point that show two digits of an interval's half width; None without an interval."""
    if lo is None or hi is None or not math.isfinite(hi - lo) or hi <= lo:
        return None
    places = 1 - math.floor(math.log10((hi - lo) / 2))
    return max(0, places) if places <= MOST_PLACES else None


def interval(lo: float | None, hi: float | None) -> str:
    """An interval as "0.161 to 0.183"; "" without one, "at least 0.1" where one end is open."""
    if lo is None and hi is None:
        return ""
    places = places_of(lo, hi)
    if hi is None:
        return f"at least {number(lo)}"
    if lo is None:
        return f"at most {number(hi)}"
    return f"{number(lo, places)} to {number(hi, places)}"


def with_interval(value: object, lo: float | None, hi: float | None) -> str:
    """A value with its interval behind it, as in a sentence or a cell: "0.172 (0.161 to 0.183)"."""
    ends = interval(lo, hi)
    own = number(value, places_of(lo, hi) if isinstance(value, float) else None)
    return f"{own} ({ends})" if ends and own != NOTHING else own


def is_number(text: str) -> bool:
    """Whether a cell is a number, an interval, a share or nothing, and not a word."""
    parts = re.sub(r"^at (least|most) | to ", " ", text).replace("(", " ").replace(")", " ").split()
    return all(re.fullmatch(r"–|−?∞|−?[\d,]*\d(\.\d+)?(e[+-]\d+)?%?", part) for part in parts)


def share(part: float, whole: float) -> str:
    """A share as per cent, with a digit behind the point; – of nothing."""
    return f"{part / whole:.1%}" if whole else NOTHING


def words(name: str) -> str:
    """A name with spaces for what a computer writes in their place."""
    return name.replace("_", " ")


def listed(names: list[str], most: int = 5) -> str:
    """Some names as text; beyond `most` how many more there are."""
    more = len(names) - most
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:most])} and {more:,} more"


def counted(n: int, name: str, several: str = "") -> str:
    """A number of things: "1 phase", "2 phases"; `several` where the plural is no s."""
    return f"{n:,} {name if n == 1 else several or f'{name}s'}"


def _signed(text: str) -> str:
    """With a true minus sign, and no minus before nothing."""
    if text.startswith("-"):
        return f"−{text[1:]}" if any(digit in "123456789" for digit in text.partition("e")[0]) else text[1:]
    return text
