"""task:pydoc: the topic texts of `help()`, real English that ships with CPython. Another Python has other texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memdiag.errors import InputError


def rows(*, chars: int = 1000) -> Iterator[dict[str, Any]]:
    """Yield {id: "topic/0", text} by topic name, each topic in passages of at most `chars` characters.

    Raises:
        InputError: chars < 1, or a Python without its `pydoc_data`.
    """
    if chars < 1:
        raise InputError(f"task:pydoc: chars is {chars}; wanted at least 1")
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError("task:pydoc: this Python lacks the module pydoc_data; install a complete one") from None
    for topic in sorted(topics):
        for i, passage in enumerate(passages(topics[topic], chars=chars)):
            yield {"id": f"{topic}/{i}", "text": passage}


def passages(text: str, *, chars: int) -> Iterator[str]:
    """As many whole paragraphs as fit into `chars` characters; a longer one is cut at a space."""
    held = ""
    for paragraph in text.split("\n\n"):
        for piece in _pieces(paragraph.strip("\n"), chars):
            joined = f"{held}\n\n{piece}" if held else piece
            if len(joined) > chars:
                yield held
                joined = piece
            held = joined
    if held:
        yield held


def _pieces(paragraph: str, chars: int) -> Iterator[str]:
    while len(paragraph) > chars:
        cut = max(paragraph.rfind(" ", 1, chars + 1), paragraph.rfind("\n", 1, chars + 1))
        head = paragraph[: cut if cut > 0 else chars]
        paragraph = paragraph[len(head) :].lstrip()
        if head.strip():
            yield head
    if paragraph.strip():
        yield paragraph
