"""The arms of an experiment: which orders, which rows, which cut; and the headline made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from memdiag.errors import InputError
from memdiag.prune_curves import Cut, defined, headline, order_by, run_arms, with_intervals
from memdiag.pruning import Row

N = 8
IS_BAD = np.array([False, True, False, False, True, False, True, False])
CUT = Cut(n=None, fraction=None, keep_clean=0.99, draws=20, seed=0, chance=0.1)
SCORES = {
    "memorization": IS_BAD + np.arange(N) * 1e-3,
    "norm_product": np.arange(N, dtype=np.float64),
    "ipr": np.where(IS_BAD, 0.05, 0.9),
}


def curve_of(order: Sequence[int], counts: Sequence[int]) -> list[Row]:
    """A third of the corrupted agreement sits in each bad neuron, a fifth of the clean one in each good one."""
    rows = []
    for n in counts:
        gone = np.asarray(order)[:n]
        bad = int(IS_BAD[gone].sum())
        clean = 1 - (n - bad) / 5
        rows.append(
            {
                "n_pruned": n,
                "train_corrupted_acc": 1 - bad / 3,
                "corrupted_true_acc": None,
                "train_clean_acc": clean,
                "test_acc": clean,
                "train_corrupted_loss": 0.0,
                "train_clean_loss": 0.0,
                "test_loss": 0.0,
            }
        )
    return rows


def test_every_order_is_there_and_starts_at_none() -> None:
    arms = run_arms(curve_of, SCORES, "memorization", CUT)
    orders = {row["order"] for row in arms.rows}
    assert orders == {"memorization", "reversed", "norm_product", "ipr", "random"}
    starts = [(row["order"], row["draw"]) for row in arms.rows if row["n_pruned"] == 0]
    assert len(starts) == len(set(starts)) == 4 + 20
    assert {row["draw"] for row in arms.rows if row["order"] == "random"} == set(range(20))
    assert all(row["draw"] is None for row in arms.rows if row["order"] != "random")
    assert all(row["fraction_pruned"] == row["n_pruned"] / N for row in arms.rows)


def test_the_cut_takes_the_bad_ones() -> None:
    arms = run_arms(curve_of, SCORES, "memorization", CUT)
    assert arms.chosen == 3
    assert set(arms.order[:3]) == set(np.flatnonzero(IS_BAD))
    (chosen,) = [row for row in arms.rows if row["chosen"]]
    assert (chosen["order"], chosen["n_pruned"], chosen["train_corrupted_acc"]) == ("memorization", 3, 0)
    found = headline(arms.rows, "memorization")
    assert found["before"]["train_corrupted_acc"] == 1
    assert found["chosen"]["test_acc"] == 1
    draws = [r for r in arms.rows if r["order"] == "random" and r["n_pruned"] == 3]
    assert found["random"]["test_acc"]["mean"] == pytest.approx(np.mean([r["test_acc"] for r in draws]))
    assert found["random"]["test_acc"]["lo"] == pytest.approx(np.quantile([r["test_acc"] for r in draws], 0.05))
    assert found["beyond_random"]["test_acc"]["mean"] == pytest.approx(found["random"]["test_acc"]["mean"] - 1)
    assert found["random_matched"]["n_pruned"] == N  # at chance the mean of the draws arrives with the last neuron only
    assert "corrupted_true_acc" not in found["before"]


def test_the_reversed_order_is_the_order_reversed() -> None:
    arms = run_arms(curve_of, SCORES, "memorization", CUT)
    by_hand = curve_of(arms.order[::-1], range(N + 1))
    found = [row for row in arms.rows if row["order"] == "reversed"]
    assert [r["train_corrupted_acc"] for r in found] == [r["train_corrupted_acc"] for r in by_hand]


@pytest.mark.parametrize(("forced", "expected"), [({"n": 5}, 5), ({"fraction": 0.25}, 2), ({"n": 0}, 0)])
def test_the_users_number_overrules(forced: dict[str, Any], expected: int) -> None:
    import dataclasses

    arms = run_arms(curve_of, SCORES, "ipr", dataclasses.replace(CUT, **forced, most_points=3, random_points=2))
    assert arms.chosen == expected
    assert arms.rule.startswith("--")
    for order in ("ipr", "norm_product", "reversed", "random"):  # every arm can be read at the cut
        assert any(row["order"] == order and row["n_pruned"] == expected for row in arms.rows)
    assert "memorization" not in {row["order"] for row in arms.rows}
    starts = [(row["order"], row["draw"]) for row in arms.rows if row["n_pruned"] == 0]
    assert len(starts) == len(set(starts))  # the order in question is not its own control as well


def test_more_than_there_are_is_refused() -> None:
    import dataclasses

    with pytest.raises(InputError, match="--n is 9, but there are 8 neurons"):
        run_arms(curve_of, SCORES, "memorization", dataclasses.replace(CUT, n=9))


def test_without_corrupted_examples_no_cut_is_chosen() -> None:
    def blind(order: Sequence[int], counts: Sequence[int]) -> list[Row]:
        return [row | {"train_corrupted_acc": None} for row in curve_of(order, counts)]

    arms = run_arms(blind, SCORES, "memorization", CUT)
    assert arms.chosen is None
    assert arms.rule.startswith("none: without a set of corrupted")
    assert not any(row["chosen"] for row in arms.rows)
    assert headline(arms.rows, "memorization").keys() == {"before"}


def test_a_cut_that_would_take_nothing_is_none() -> None:
    def stubborn(order: Sequence[int], counts: Sequence[int]) -> list[Row]:
        return [row | {"train_clean_acc": 1.0 if row["n_pruned"] == 0 else 0.0} for row in curve_of(order, counts)]

    arms = run_arms(stubborn, SCORES, "memorization", CUT)
    assert (arms.chosen, arms.rule[:5]) == (None, "none:")


def test_undefined_rankings_name_those_that_are() -> None:
    scores = SCORES | {"ipr": np.full(N, np.nan)}
    assert defined(scores) == ["memorization", "norm_product"]
    with pytest.raises(
        InputError, match="ipr is undefined here; the rankings that are not: memorization, norm_product"
    ):
        order_by(scores, "ipr")
    assert "ipr" not in {row["order"] for row in run_arms(curve_of, scores, "memorization", CUT).rows}


def test_intervals_come_from_the_counts() -> None:
    rows: list[Row] = [{"train_corrupted_acc": 0.5, "train_clean_acc": None, "test_acc": 1.0}]
    (row,) = with_intervals(rows, {"corrupted": 10, "clean": 0, "test": 4})
    assert row["train_corrupted_acc_lo"] == pytest.approx(0.1871, abs=1e-4)  # Clopper-Pearson of 5 in 10
    assert row["train_corrupted_acc_hi"] == pytest.approx(0.8129, abs=1e-4)
    assert (row["train_clean_acc_lo"], row["train_clean_acc_hi"]) == (None, None)
    assert row["test_acc_lo"] == pytest.approx(0.025 ** (1 / 4))
    assert row["test_acc_hi"] == 1.0
