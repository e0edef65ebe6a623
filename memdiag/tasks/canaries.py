"""task:canaries: the help texts of task:pydoc with random strings among them, each repeated a known number of times.

What a language model knows of such a string it has memorized: there is no other way to know it. Strings that were not
trained on (split=unseen) and texts that were not (split=held-out) say what the same model makes of news. Carlini et
al., "The Secret Sharer" (arXiv:1802.08232).

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from memdiag.errors import InputError, unknown
from memdiag.tasks import pydoc

SPLITS = ("train", "unseen", "held-out", "all")
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz0123456789"))
WORD = 6  # every sixth place or so is a blank
HELD_OUT = 10  # one in ten passages
UNSEEN_LEVELS = 4  # as many unseen strings as there are trained on at so many levels
TEXTS, UNSEEN = 0, 1  # keys of the draws beside the seed; a level's is its repeats + 1


def rows(
    *, split: str = "train", seed: int = 0, per_level: int = 8, levels: int = 64, length: int = 96, chars: int = 300
) -> Iterator[dict[str, Any]]:
    """Yield {id, text, repeats, canary, kind}; a string that is repeated r times is r rows, "canary/r/number/copy".

    Args:
        split: train (texts and strings to train on), unseen (strings that are not in it, repeats 0), held-out (texts
            that are not, repeats 0), or all of these.
        seed: of the strings, and of which texts are held out.
        per_level: strings at each number of repeats, 1, 2, 4, ...
        levels: the largest number of repeats.
        length: characters of a string: letters, digits and blanks at random.
        chars: the longest passage of text; the default is one that fits into gpt2-tiny with the tokenizer of the data.
    Raises:
        InputError: a value out of its range, or a Python without its help texts.
    """
    _check(split, seed, per_level, levels, length)
    if split in ("train", "held-out", "all"):
        passages = list(pydoc.rows(chars=chars))
        held_out = np.zeros(len(passages), dtype=np.bool_)
        order = np.random.default_rng([seed, TEXTS]).permutation(len(passages))
        held_out[order[: len(passages) // HELD_OUT]] = True
        for passage, out in zip(passages, held_out.tolist()):
            if split == "all" or out == (split == "held-out"):
                yield _row(f"text/{passage['id']}", passage["text"], 0 if out else 1, "text")
    if split in ("train", "all"):
        repeats = 1
        while repeats <= levels:
            for i, text in enumerate(strings(per_level, length, seed, repeats + 1)):
                for copy in range(repeats):
                    yield _row(f"canary/{repeats}/{i}/{copy}", text, repeats, "canary")
            repeats *= 2
    if split in ("unseen", "all"):
        for i, text in enumerate(strings(UNSEEN_LEVELS * per_level, length, seed, UNSEEN)):
            yield _row(f"canary/0/{i}", text, 0, "canary")


def strings(n: int, length: int, seed: int, key: int) -> list[str]:
    """n random strings of letters, digits and single blanks; more of them only add some at the end."""
    rng, found = np.random.default_rng([seed, key]), []
    for _ in range(n):
        letters = LETTERS[rng.integers(0, len(LETTERS), size=length)]
        blank = rng.random(length) < 1 / WORD
        blank[0] = blank[-1] = False
        blank[1:] &= ~blank[:-1]
        found.append("".join(np.where(blank, " ", letters).tolist()))
    return found


def _row(example_id: str, text: str, repeats: int, kind: str) -> dict[str, Any]:
    return {"id": example_id, "text": text, "repeats": repeats, "canary": kind == "canary", "kind": kind}


def _check(split: str, seed: int, per_level: int, levels: int, length: int) -> None:
    if split not in SPLITS:
        raise unknown("split of task:canaries", split, SPLITS)
    for name, value, least in (
        ("seed", seed, 0),
        ("per_level", per_level, 1),
        ("levels", levels, 1),
        ("length", length, 2),
    ):
        if value < least:
            raise InputError(f"task:canaries: {name} is {value}; wanted at least {least}")
