"""What `memdiag reproduce long-tail` compares: its arms, the rows that each leaves out, and what is said of them.

Feldman and Zhang, arXiv:2008.03703; see `reproduce_tail` for the arms in words.

Axes: n training row. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memdiag.memorization import at_least
from memdiag.reproduce_effects import Arm, Control, Effect

THRESHOLDS = (0.1, 0.25, 0.4, 0.6)  # 0.25 is the paper's
CORRUPTION = 0.1
DRAWS = 3  # networks of a random arm, for each seed
DRAWN = 22  # key of the draws beside the seed

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Way:
    """What an arm leaves out of which data."""

    data: str  # clean, noisy, or split: clean, and divided anew for each seed
    removed: str = "nothing"  # or memorized, random, by_class, wrong, wrong_and_random
    threshold: float | None = None  # None: as many rows as have a wrong label
    draws: range = range(1)  # networks, each with a draw of its own


def _of(data: str, name: str, threshold: float | None) -> dict[str, Way]:
    """The arms of a threshold, named by its hundredths."""
    return {
        f"memorized_{name}": Way(data, "memorized", threshold),
        f"random_{name}": Way(data, "random", threshold, range(DRAWS)),
        f"by_class_{name}": Way(data, "by_class", threshold, range(DRAWS)),
    }


def hundredths(threshold: float) -> str:
    """0.25 as "25"."""
    return f"{round(100 * threshold):02d}"


WAYS: dict[str, Way] = {
    "all": Way("clean"),
    **{name: way for t in THRESHOLDS for name, way in _of("clean", hundredths(t), t).items()},
    "again_25": Way("clean", "random", 0.25, range(DRAWS, 2 * DRAWS)),  # as random_25, with other draws
    "split_all": Way("split"),
    **{f"split_{name}": way for name, way in _of("split", "25", 0.25).items()},
    "noisy_all": Way("noisy"),
    "noisy_memorized": Way("noisy", "memorized"),
    "noisy_wrong": Way("noisy", "wrong"),
    "noisy_random": Way("noisy", "random", None, range(DRAWS)),
    "noisy_memorized_25": Way("noisy", "memorized", 0.25),
    "noisy_mixed_25": Way("noisy", "wrong_and_random", 0.25, range(DRAWS)),  # the wrong ones, then at random
}
ARMS = tuple(map(Arm, WAYS))

OTHER_DATA = (
    "of other data: on CIFAR-100 removing the 1,015 rows of its high-influence pairs costs 2.54 ± 0.20 points, as a "
    "critique quotes it; on MNIST hardly anything (recalled, not read again)"
)
OURS = "not given; the paper's data are clean"


def effects(preset: str) -> list[Effect]:
    """What the paper says, then what must not come out, then what does not follow from it."""
    paper = [
        _effect(
            f"tail_{name}",
            f"Without the rows of mem >= {t:g}, test accuracy is lower than without as many random rows",
            f"random_{name}",
            f"memorized_{name}",
            (f"by_class_{name}", *(["again_25"] if t == 0.25 else []), "all"),
        )
        for t, name in ((t, hundredths(t)) for t in THRESHOLDS)
    ]
    by_class = _effect(
        "tail_25_by_class",
        "It is also lower than without as many random rows of the same classes",
        "by_class_25",
        "memorized_25",
        ("all",),
    )
    splits = _effect(
        "tail_25_splits",
        "The same as tail_25, where each seed has its own split of these 1,797 digits",
        "split_random_25",
        "split_memorized_25",
        ("split_by_class_25", "split_all"),
    )
    control = _effect(
        "random_25_again",
        "Control: a random choice costs more than another; inconclusive but for chance",
        "random_25",
        "again_25",
        ("by_class_25",),
        note="not given; a check of the comparison itself",
    )
    same_number = _effect(
        "noisy_cleaning",
        "Wrong labels: without as many rows of largest mem, lower than without the wrong ones",
        "noisy_wrong",
        "noisy_memorized",
        ("noisy_random", "noisy_all"),
        note=OURS,
    )
    tail = _effect(
        "noisy_cleaning_25",
        "Wrong labels: without mem >= 0.25, lower than without the wrong and then random rows",
        "noisy_mixed_25",
        "noisy_memorized_25",
        ("noisy_wrong", "noisy_all"),
        note=OURS,
    )
    above = _effect(
        "noisy_above_random",
        "Wrong labels: without as many rows of largest mem, higher than without random rows",
        "noisy_random",
        "noisy_memorized",
        ("noisy_wrong", "noisy_all"),
        direction=+1,
        note=OURS,
    )
    return [*paper, by_class, splits, control, same_number, tail, above]


def _effect(
    name: str,
    statement: str,
    baseline: str,
    treated: str,
    controls: Sequence[str],
    *,
    direction: int = -1,
    note: str = OTHER_DATA,
) -> Effect:
    return Effect(
        name=name,
        statement=statement,
        measure="test_acc",
        baseline=baseline,
        treated=treated,
        controls=tuple(map(Control, controls)),
        paper={},
        paper_note=note,
        direction=direction,
    )


# -- the rows ------------------------------------------------------------------------------------------------------


def memorized(mem: Floats, *, threshold: float | None = None, most: int | None = None) -> Bools:
    """(n,) the rows with mem of at least `threshold`, or the `most` rows with the largest; never one without a mem."""
    if threshold is not None:
        return at_least(mem, threshold)
    found = np.zeros(len(mem), dtype=np.bool_)
    found[np.argsort(-mem, kind="stable")[:most]] = True  # NaN comes last
    return found & ~np.isnan(mem)


def at_random(n: int, k: int, rng: np.random.Generator) -> Bools:
    """(n,) k rows."""
    found = np.zeros(n, dtype=np.bool_)
    found[rng.permutation(n)[:k]] = True
    return found


def by_class(labels: Ints, like: Bools, rng: np.random.Generator) -> Bools:
    """(n,) of each label as many rows as `like` has, at random."""
    found = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        found[rows[at_random(len(rows), int(like[rows].sum()), rng)]] = True
    return found


def wrong_first(wrong: Bools, k: int, rng: np.random.Generator) -> Bools:
    """(n,) the wrong rows and others at random, k in all; all wrong ones even if they are more."""
    found, others = wrong.copy(), np.flatnonzero(~wrong)
    found[rng.permutation(others)[: max(0, k - int(wrong.sum()))]] = True
    return found


def removed(way: Way, mem: Callable[[], Floats], labels: Ints, wrong: Bools | None, seed: int) -> list[Bools]:
    """(n,) what each network of an arm is trained without.

    Args:
        mem: gives (n,) the memorization of each row; asked only if it matters.
        labels: (n,)
        wrong: (n,) whose label is wrong; None: it is not known of any.
        seed: of the run.
    """
    n, at_fault = len(labels), np.zeros(len(labels), dtype=np.bool_) if wrong is None else wrong
    if way.removed in ("nothing", "wrong"):
        return [at_fault if way.removed == "wrong" else np.zeros(n, dtype=np.bool_)]
    if way.removed == "random" and way.threshold is None:
        tail = at_fault  # as many as these
    else:
        tail = memorized(mem(), threshold=way.threshold, most=int(at_fault.sum()))
    if way.removed == "memorized":
        return [tail]
    k, rngs = int(tail.sum()), [np.random.default_rng([seed, DRAWN, draw]) for draw in way.draws]
    if way.removed == "random":
        return [at_random(n, k, rng) for rng in rngs]
    if way.removed == "wrong_and_random":
        return [wrong_first(at_fault, k, rng) for rng in rngs]
    return [by_class(labels, tail, rng) for rng in rngs]
