"""Untrusted text made fit to be shown: cut, and with every character that hides or reorders written out.

An example may hold a right-to-left override, which would turn the figures beside it round, a null byte, or a
megabyte of one letter. Needs no torch.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup

JOINERS = "\u200c\u200d"  # part of emoji and of the spelling of Persian and Indic languages
MARKS = 4  # combining marks on one letter; a tower of them would cover the lines above
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (bidi among them), surrogate, line and paragraph separators
_TRAILING = ("Mn", "Me", "Mc")


def cut(text: str, limit: int) -> str:
    """At most `limit` characters, the last of them … where something is left out."""
    return text if len(text) <= limit else text[: limit - 1].rstrip(JOINERS) + "…"


def plain(text: str, limit: int) -> str:
    r"""The text cut, its hidden characters as escapes.

    >>> plain("a\u202eb\n", 10)
    'a\\u202eb\\n'
    """
    return "".join(escape if escape else piece for piece, escape in _pieces(cut(text, limit)))


def shown(text: str, limit: int) -> Markup:
    """The text cut, escaped for HTML and isolated from its surroundings; escapes of hidden characters stand out."""
    from markupsafe import Markup, escape

    text = cut(text, limit)
    if text.isascii() and text.isprintable():  # most cells
        return escape(text)
    parts = [
        Markup('<span class="escape">{}</span>').format(code) if code else escape(piece)
        for piece, code in _pieces(text)
    ]
    return Markup("<bdi>{}</bdi>").format(Markup("").join(parts))


def drawable(text: str, limit: int = 40) -> str:
    """A label of a figure: hidden characters as escapes, cut with them, and a $ is a $ and begins no formula."""
    return cut(plain(text, limit), limit).replace("$", r"\$")


def in_markdown(text: str, limit: int) -> str:
    """The text cut, as words of a Markdown table or paragraph: no markup, no link, no mention, no reference."""
    words = plain(text, limit).strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    words = re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", words)
    words = re.sub(r"^(\d*)([.)+=-])(?=\s|[=-]|$)", r"\1\\\2", words)  # no list, no line
    # GitHub looks for @name, #12 and addresses in what it has rendered: no escape stops it, a gap of no width does
    return re.sub(r"(@|\\#|(?i:\bgh-)|(?i:\bwww)(?=\.)|:(?=//))", "\\1&#8203;", words)


def as_code(text: str, limit: int) -> str:
    """The text cut, as a code span of Markdown, in which nothing is markup; not for a table, where | would be."""
    words = plain(text, limit)
    fence = "`" * (1 + _longest_run(words))
    edge = " " if "`" in words or not words.strip() else ""
    return f"{fence}{edge}{words or ' '}{edge}{fence}"


def as_shell(lines: Sequence[str], limit: int) -> str:
    """Lines as a block of code of Markdown, each cut."""
    shown = [plain(line, limit) for line in lines]
    fence = "`" * max(3, 1 + max(map(_longest_run, shown), default=0))
    return "\n".join([f"{fence}sh", *shown, fence])


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _pieces(text: str) -> list[tuple[str, str]]:
    """(visible text, "") or ("", escape of a hidden character), in order."""
    out: list[tuple[str, str]] = []
    visible: list[str] = []
    marks = 0
    for letter in text:
        marks = marks + 1 if unicodedata.category(letter) in _TRAILING else 0
        if not _is_hidden(letter) and marks <= MARKS:
            visible.append(letter)
            continue
        if visible:
            out.append(("".join(visible), ""))
            visible = []
        out.append(("", letter.encode("unicode_escape").decode()))
    return [*out, ("".join(visible), "")] if visible else out


def _is_hidden(letter: str) -> bool:
    if " " <= letter <= "~" or letter in JOINERS:
        return False
    code = ord(letter)
    return unicodedata.category(letter) in _HIDDEN or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
