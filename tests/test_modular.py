"""Pairs modulo p: by hand, the paper's counts, the law of the redrawn labels, and what the seed and ξ move."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from memdiag.errors import InputError
from memdiag.modular import LAWS, OPERATIONS, discrete_log_order, examples, is_prime, make_pairs

PRIMES = [3, 5, 7, 11, 13, 17, 31, 59, 97, 101, 257]


def assert_evenly_spread(counts: np.ndarray) -> None:
    """No class is left out, and the counts differ as those of even draws do (χ², one in a thousand)."""
    assert counts.min() > 0
    assert stats.chisquare(counts).pvalue > 1e-3


# --- the pairs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "expected"),
    [("addition", {(3, 4): 2, (1, 3): 4, (0, 0): 0}), ("subtraction", {(3, 4): 4, (1, 3): 3, (0, 2): 3}),
     ("multiplication", {(3, 4): 2, (1, 3): 3, (0, 4): 0})],
)  # fmt: skip
def test_truth_by_hand_modulo_5(operation: str, expected: dict[tuple[int, int], int]) -> None:
    pairs = make_pairs(operation, 5)
    truth = {(int(m), int(n)): int(y) for (m, n), y in zip(pairs.operands, pairs.truth)}
    assert {pair: truth[pair] for pair in expected} == expected


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_ordered_pair_is_there_once_with_its_truth(operation: str) -> None:
    p = 11
    of = {"addition": lambda m, n: m + n, "subtraction": lambda m, n: m - n, "multiplication": lambda m, n: m * n}
    pairs = make_pairs(operation, p, seed=3)
    assert sorted(map(tuple, pairs.operands.tolist())) == [(m, n) for m in range(p) for n in range(p)]
    for (m, n), y in zip(pairs.operands.tolist(), pairs.truth.tolist()):
        assert y == of[operation](m, n) % p
    assert pairs.ids.tolist() == [m * p + n for m, n in pairs.operands.tolist()]


def test_the_papers_counts() -> None:
    pairs = make_pairs("addition", 97, train_fraction=0.5, corruption=0.35)
    assert (pairs.n_train, 97**2 - pairs.n_train, int(pairs.corrupted.sum())) == (4704, 4705, 1646)
    assert pairs.p == 97
    assert pairs.operation == "addition"


@pytest.mark.parametrize("law", LAWS)
def test_only_training_labels_are_redrawn_and_all_others_are_true(law: str) -> None:
    pairs = make_pairs("addition", 31, corruption=0.3, law=law, seed=1)
    in_train = np.arange(31**2) < pairs.n_train
    assert not (pairs.corrupted & ~in_train).any()
    assert (pairs.labels == pairs.truth)[~pairs.corrupted].all()
    assert ((pairs.labels >= 0) & (pairs.labels < 31)).all()
    assert int(pairs.corrupted.sum()) == int(0.3 * pairs.n_train)
    assert np.array_equal(make_pairs("addition", 31, law=law).labels, make_pairs("addition", 31, law=law).truth)


# --- the law of the labels -----------------------------------------------------------------------------------------


def test_the_uniform_law_hits_the_truth_once_in_p_and_the_wrong_law_never() -> None:
    p, hits, n = 97, 0, 0
    for seed in range(5):
        pairs = make_pairs("addition", p, corruption=0.35, seed=seed)
        right = int((pairs.labels == pairs.truth)[pairs.corrupted].sum())
        assert abs(right / 1646 - 1 / p) < 0.010  # 4 σ of 1646 draws
        hits, n = hits + right, n + 1646
        wrong = make_pairs("addition", p, corruption=0.35, law="wrong", seed=seed)
        assert (wrong.labels != wrong.truth)[wrong.corrupted].all()
    assert abs(hits - n / p) < 4 * math.sqrt(n / p * (1 - 1 / p))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("law", LAWS)
def test_redrawn_labels_and_their_offsets_are_evenly_spread(operation: str, law: str) -> None:
    p = 31
    offsets, labels = np.zeros(p), np.zeros(p)
    for seed in range(8):
        pairs = make_pairs(operation, p, train_fraction=0.9, corruption=0.9, law=law, seed=seed)
        redrawn = pairs.corrupted
        offsets += np.bincount((pairs.labels - pairs.truth)[redrawn] % p, minlength=p)
        labels += np.bincount(pairs.labels[redrawn], minlength=p)
    if law == "wrong":
        assert offsets[0] == 0
        offsets = offsets[1:]
    assert_evenly_spread(offsets)
    if (operation, law) != ("multiplication", "wrong"):  # there the truth is 0 twice as often, so the label less
        assert_evenly_spread(labels)


def test_the_offset_does_not_depend_on_the_pair() -> None:
    """Offsets by pair number modulo 4 are one distribution: a shift that follows the order would show here."""
    p, table = 7, np.zeros((4, 7))
    for seed in range(120):
        pairs = make_pairs("addition", p, train_fraction=0.9, corruption=0.9, seed=seed)
        redrawn = pairs.corrupted
        np.add.at(table, (pairs.ids[redrawn] % 4, (pairs.labels - pairs.truth)[redrawn] % p), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_the_split_and_the_corrupted_pairs_are_drawn_from_all_pairs() -> None:
    in_train, corrupted = np.zeros(49), np.zeros(49)
    for seed in range(300):
        pairs = make_pairs("addition", 7, corruption=0.4, seed=seed)
        in_train += np.bincount(pairs.ids[: pairs.n_train], minlength=49)
        corrupted += np.bincount(pairs.ids[pairs.corrupted], minlength=49)
    assert_evenly_spread(in_train)
    assert_evenly_spread(corrupted)


# --- what ξ, the law and the seed move -----------------------------------------------------------------------------


def test_the_split_does_not_depend_on_corruption_law_or_operation() -> None:
    plain = make_pairs("addition", 13, seed=5)
    for other in (
        make_pairs("addition", 13, corruption=0.5, seed=5),
        make_pairs("addition", 13, corruption=0.5, law="wrong", seed=5),
        make_pairs("multiplication", 13, seed=5),
    ):
        assert np.array_equal(other.operands, plain.operands)
        assert other.n_train == plain.n_train


@pytest.mark.parametrize("law", LAWS)
def test_a_larger_corruption_holds_the_smaller_with_the_same_labels(law: str) -> None:
    small = make_pairs("addition", 31, corruption=0.1, law=law)
    large = make_pairs("addition", 31, corruption=0.6, law=law)
    assert large.corrupted[small.corrupted].all()
    assert large.corrupted.sum() > small.corrupted.sum()
    assert np.array_equal(large.labels[small.corrupted], small.labels[small.corrupted])


def test_a_larger_training_set_holds_the_smaller() -> None:
    small, large = (make_pairs("addition", 31, train_fraction=fraction) for fraction in (0.3, 0.6))
    assert set(small.ids[: small.n_train]) < set(large.ids[: large.n_train])


def test_the_seed_alone_decides() -> None:
    first, again, other = (make_pairs("addition", 31, corruption=0.5, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.operands, again.operands)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.operands, other.operands)
    assert not np.array_equal(first.labels - first.truth, other.labels - other.truth)


# --- rows of a task ------------------------------------------------------------------------------------------------


def test_a_row_by_hand() -> None:
    rows = {row["id"]: row for row in examples("subtraction", 3, "all", 0.5, 0.0, "uniform", 0)}
    assert len(rows) == 9
    row = rows["5"]  # m = 1, n = 2
    assert row["features"].tolist() == [0, 1, 0, 0, 0, 1]
    assert row["features"].dtype == np.float32
    assert (row["label"], row["true_label"], row["corrupted"]) == (2, 2, False)


@pytest.mark.parametrize("law", LAWS)
def test_rows_are_the_pairs_in_their_order(law: str) -> None:
    p = 7
    pairs = make_pairs("multiplication", p, train_fraction=0.6, corruption=0.5, law=law, seed=2)
    rows = list(examples("multiplication", p, "all", 0.6, 0.5, law, 2))
    assert [row["id"] for row in rows] == [str(i) for i in pairs.ids]
    for i, row in enumerate(rows):
        assert np.flatnonzero(row["features"]).tolist() == [pairs.operands[i, 0], p + pairs.operands[i, 1]]
        assert row["features"].sum() == 2
        assert (row["label"], row["true_label"], row["corrupted"]) == (
            pairs.labels[i], pairs.truth[i], pairs.corrupted[i],
        )  # fmt: skip
        assert [type(row[key]) for key in ("id", "label", "true_label", "corrupted")] == [str, int, int, bool]


def test_train_and_test_rows_are_a_partition_in_order() -> None:
    def ids(split: str) -> list[str]:
        return [row["id"] for row in examples("addition", 5, split, 0.5, 0.4, "uniform", 0)]

    assert len(ids("train")) == 12
    assert ids("train") + ids("test") == ids("all")
    assert not any(row["corrupted"] for row in examples("addition", 5, "test", 0.5, 0.4, "uniform", 0))


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"operation": "adition"}, "no operation 'adition'; there are addition, multiplication, subtraction; did you"),
        ({"p": 2}, "p is 2; wanted a modulus from 3 to 1009"),
        ({"p": 1010}, "p is 1010; wanted a modulus from 3 to 1009"),
        ({"p": -7}, "p is -7; wanted"),
        ({"operation": "multiplication", "p": 96}, "is 96, which is not prime; multiplication needs a prime, e.g. 97"),
        ({"operation": "multiplication", "p": 1000}, "e.g. 997"),
        ({"operation": "multiplication", "p": 4}, "e.g. 3"),
        ({"law": "even"}, "no corruption law 'even'; there are uniform, wrong"),
        ({"corruption": 1.0}, "corruption is 1.0; wanted a share of at least 0 and less than 1"),
        ({"corruption": -0.1}, "corruption is -0.1; wanted"),
        ({"corruption": math.nan}, "corruption is nan; wanted"),
        ({"train_fraction": 0.0}, "train_fraction is 0.0; wanted a share between 0 and 1 of the 49 pairs"),
        ({"train_fraction": 1.0}, "train_fraction is 1.0; wanted"),
        ({"train_fraction": math.nan}, "train_fraction is nan; wanted"),
        ({"train_fraction": 0.02}, "train_fraction is 0.02; wanted"),  # not one pair
        ({"seed": -1}, "seed is -1; wanted at least 0"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_told(options: dict[str, object], says: str) -> None:
    with pytest.raises(InputError) as caught:
        make_pairs(**{"operation": "addition", "p": 7} | options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_split_is_told() -> None:
    with pytest.raises(InputError, match="no split of task:modular-addition 'dev'; there are all, test, train"):
        list(examples("addition", 7, "dev", 0.5, 0.0, "uniform", 0))


@pytest.mark.parametrize("p", [3, 1009])
def test_the_ends_of_the_range_are_in_it(p: int) -> None:
    assert len(make_pairs("multiplication", p).labels) == p * p
    tiny = make_pairs("addition", 3, train_fraction=1 / 9)
    assert tiny.n_train == 1


# --- discrete logarithms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "order"),
    [(2, [1]), (3, [1, 2]), (5, [1, 2, 4, 3]), (7, [1, 3, 2, 6, 4, 5])],  # the roots are 1, 2, 2 and 3
)
def test_powers_of_the_smallest_primitive_root_by_hand(p: int, order: list[int]) -> None:
    assert discrete_log_order(p).tolist() == order
    assert discrete_log_order(p).dtype == np.int64


@pytest.mark.parametrize("p", PRIMES)
def test_every_residue_but_0_comes_once_and_the_root_is_the_smallest(p: int) -> None:
    order = discrete_log_order(p)
    assert sorted(order) == list(range(1, p))
    g = int(order[1])
    assert order.tolist() == [pow(g, i, p) for i in range(p - 1)]
    for smaller in range(1, g):
        assert len({pow(smaller, i, p) for i in range(p - 1)}) < p - 1


@pytest.mark.parametrize("p", PRIMES)
def test_in_this_order_multiplication_is_a_shift(p: int) -> None:
    order = discrete_log_order(p)
    for shift in (1, 2, p // 2):
        assert np.array_equal(order * order[shift % (p - 1)] % p, np.roll(order, -shift))


@pytest.mark.parametrize("p", [0, 1, 4, 9, 91])
def test_there_is_no_order_without_a_prime(p: int) -> None:
    with pytest.raises(ValueError, match=f"p must be prime, got {p}"):
        discrete_log_order(p)


def test_primes_are_those_of_the_sieve() -> None:
    composite = {multiple for d in range(2, 1010) for multiple in range(2 * d, 1010, d)}
    assert [p for p in range(-3, 1010) if is_prime(p)] == [p for p in range(2, 1010) if p not in composite]
