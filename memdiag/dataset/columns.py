"""Which column plays which role.

| role | columns guessed, first match wins | a cell holds |
| --- | --- | --- |
| text | text content sentence document | a string |
| input_ids | input_ids tokens | a list of token ids |
| attention_mask | attention_mask | a list of 0 and 1 as long as input_ids; tokens at 0 are removed |
| features | features pixel_values x X image images | numbers, the same shape in every row |
| label | label labels y target | an integer |
| id | id example_id uid | a string or an integer, unique |
| truth | none: read only if named | true or false: whether the example is suspect |
| true_label | none: read only if named | an integer |
| group | none: read only if named | a string or an integer: which examples belong together |

Where several would do, text is read before input_ids and these before features, unless a role is named:
a named input_ids wins over text, named text and features together are refused. A guessed label that holds
text or lists (the labels of a language model) is not a label and is passed over. `role=` with no column
switches a role off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from memdiag.dataset.faults import fault
from memdiag.errors import unknown

Kind = Literal["text", "tokens", "features"]

ROLES: dict[str, tuple[str, ...]] = {
    "text": ("text", "content", "sentence", "document"),
    "input_ids": ("input_ids", "tokens"),
    "attention_mask": ("attention_mask",),
    "features": ("features", "pixel_values", "x", "X", "image", "images"),
    "label": ("label", "labels", "y", "target"),
    "id": ("id", "example_id", "uid"),
    "truth": (),
    "true_label": (),
    "group": (),
}
KINDS: dict[str, Kind] = {"input_ids": "tokens", "text": "text", "features": "features"}  # in order, when named


def choose(
    name: str, present: Sequence[str], named: Mapping[str, str], is_label: Callable[[str], bool]
) -> tuple[Kind, dict[str, str]]:
    """What the dataset holds, and the columns to read: role -> column.

    Args:
        name: of the dataset, for errors.
        present: the columns there are.
        named: role -> column as the user gave it; "" switches the role off.
        is_label: whether a column's first cell may be a label; asked of guessed columns only.
    Raises:
        InputError: an unknown role or column, nothing to read, or roles that contradict each other.
    """
    _check_named(name, present, named)
    content = _content(name, present, named)
    roles = {content: named.get(content) or _guess(content, present)[0]}
    for role in (
        "label",
        "id",
        "truth",
        "true_label",
        "group",
        *(["attention_mask"] if content == "input_ids" else []),
    ):
        guessed = [] if role in named else _guess(role, present)
        if role == "label":
            guessed = [column for column in guessed if is_label(column)]
        for column in [named[role]] if named.get(role) else guessed[:1]:
            roles[role] = column
    return KINDS[content], roles


def _check_named(name: str, present: Sequence[str], named: Mapping[str, str]) -> None:
    for role, column in named.items():
        if role not in ROLES:
            raise fault(name, unknown("role", role, ROLES))
        if column and column not in present:
            raise fault(name, unknown("column", column, present))
    given = [role for role in named if named[role]]
    if "features" in given and ("text" in given or "input_ids" in given):
        raise fault(name, "columns name features as well as text or input_ids; wanted one of them")


def _content(name: str, present: Sequence[str], named: Mapping[str, str]) -> str:
    """The role that the examples are read from."""
    content = next((role for role in KINDS if named.get(role)), "") or next(
        (role for role in ("text", "input_ids", "features") if role not in named and _guess(role, present)), ""
    )
    if not content:
        raise fault(
            name,
            f"no column to read examples from; found {', '.join(present) or 'none'}; name one as "
            f"text, input_ids or features, e.g. --columns text={next(iter(present), 'body')}",
        )
    if named.get("attention_mask") and content != "input_ids":
        raise fault(name, f"columns name an attention_mask, but it goes with input_ids and this reads {content}")
    return content


def _guess(role: str, present: Sequence[str]) -> list[Any]:
    return [column for column in ROLES[role] if column in present]
