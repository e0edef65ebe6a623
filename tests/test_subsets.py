"""Which coin falls how: balanced blocks, equal chances, coins that depend on the seed and the model's number alone."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from scipy import stats

from memdiag import InputError
from memdiag.subsets import COINS, Design, contents, fingerprint, groups_of

RATIOS = [(0.7, 10, 7), (0.5, 2, 1), (0.3333, 3, 1), (0.25, 4, 1), (0.9, 10, 9), (0.001, 1000, 1)]


def coins_of(design, models, n):
    """(m, n)"""
    return np.stack([design.coins(k, n) for k in models])


# -- balanced ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "block", "quota"), RATIOS[:5])
def test_in_every_block_each_group_is_in_exactly_its_quota_of_models(ratio, block, quota):
    design = Design(ratio)
    assert design.block == block
    for start in (0, block, 7 * block):
        found = coins_of(design, range(start, start + block), 50)
        assert found.sum(axis=0).tolist() == [quota] * 50


def test_the_block_is_the_smallest_that_holds_the_ratio():
    assert [(Design(ratio).block, Design(ratio).share.numerator) for ratio, *_ in RATIOS] == [
        (block, quota) for _, block, quota in RATIOS
    ]
    assert Design(0.7, "bernoulli").block == 1


def test_two_blocks_are_not_the_same():
    design = Design(0.5)
    first, second = coins_of(design, range(2), 64), coins_of(design, range(2, 4), 64)
    assert not (first == second).all()


def test_a_models_coins_do_not_depend_on_who_else_is_asked_for():
    """Each from a design of its own, in another order."""
    for name in ("balanced", "bernoulli"):
        found = coins_of(Design(0.7, name, 5), range(25), 40)
        for k in (24, 3, 10, 9, 0):
            assert Design(0.7, name, 5).coins(k, 40).tolist() == found[k].tolist()


def test_the_seed_decides():
    for name in ("balanced", "bernoulli"):
        one, two = (coins_of(Design(0.5, name, seed), range(4), 64) for seed in (0, 1))
        assert not (one == two).all(axis=1).any()


@pytest.mark.parametrize(("ratio", "block", "quota"), [(0.5, 2, 1), (0.3333, 3, 1), (0.6667, 3, 2)])
def test_every_choice_of_the_block_is_equally_likely(ratio, block, quota):
    """χ² of the choices of 30,000 groups; 0.001 is the share of seeds that would fail by chance."""
    found = coins_of(Design(ratio, seed=3), range(block), 30_000)
    choices = list(itertools.combinations(range(block), quota))
    counts = [sum(map(int, (found[list(chosen)].all(axis=0)))) for chosen in choices]
    assert sum(counts) == 30_000
    assert stats.chisquare(counts).pvalue > 0.001


def test_every_one_of_the_120_choices_of_a_block_of_ten_is_equally_likely():
    found = coins_of(Design(0.7, seed=1), range(10), 60_000)
    number = (found * 2 ** np.arange(10)[:, None]).sum(axis=0)
    _, counts = np.unique(number, return_counts=True)
    assert len(counts) == 120
    assert stats.chisquare(counts).pvalue > 0.001


def test_groups_are_independent_of_each_other():
    """χ² of the four outcomes of neighbouring groups over 4,000 blocks, of one model in each."""
    design = Design(0.5, seed=2)
    found = coins_of(design, range(0, 8000, 2), 6)
    for a, b in itertools.combinations(range(6), 2):
        table = np.histogram2d(found[:, a], found[:, b], bins=2)[0]
        assert stats.chi2_contingency(table, correction=False).pvalue > 0.001 / 15


def test_models_of_different_blocks_are_independent():
    design = Design(0.7, seed=4)
    found = coins_of(design, (0, 9, 10, 25), 20_000)
    for a, b in ((0, 2), (1, 2), (2, 3), (0, 3)):
        table = np.histogram2d(found[a], found[b], bins=2)[0]
        assert stats.chi2_contingency(table, correction=False).pvalue > 0.001 / 4


@pytest.mark.parametrize("ratio", [0.7, 0.3333])
def test_the_definition_as_a_plain_loop(ratio):
    """Of each block one stream of uniforms, a row for each model; a group is in with what its quota leaves."""
    design = Design(ratio, seed=9)
    numerator, block, n = design.share.numerator, design.block, 13
    for model in range(2 * block + 1):
        rng = np.random.default_rng([9, COINS, model // block])
        rows = [[rng.random() for _ in range(n)] for _ in range(block)]
        expected = []
        for group in range(n):
            left, coin = numerator, False
            for at in range(model % block + 1):
                coin = rows[at][group] * (block - at) < left
                left -= coin
            expected.append(coin)
        assert design.coins(model, n).tolist() == expected


def test_more_groups_are_not_more_of_the_same_models():
    """None, one and many groups."""
    design = Design(0.5)
    assert design.coins(0, 0).tolist() == []
    assert design.coins(0, 1)[0] != design.coins(1, 1)[0]
    assert design.coins(1, 1).dtype == np.bool_


# -- bernoulli -----------------------------------------------------------------------------------------------------


def test_independent_coins_fall_in_with_the_ratio():
    """400,000 coins: within 4 standard errors; counts of a group vary as binomial ones do."""
    found = coins_of(Design(0.3, "bernoulli", 1), range(200), 2000)
    assert abs(found.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / found.size)
    expected = 200 * 0.3 * 0.7
    assert abs(found.sum(axis=0).var() / expected - 1) < 4 * np.sqrt(2 / 2000)


def test_independent_coins_as_a_plain_loop():
    for model in (0, 1, 17):
        rng = np.random.default_rng([6, COINS, model])
        expected = [bool(rng.random() < 0.123456) for _ in range(20)]
        assert Design(0.123456, "bernoulli", 6).coins(model, 20).tolist() == expected


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["balanced", "bernoulli"])
def test_a_ratio_out_of_range_is_refused(ratio, name):
    with pytest.raises(InputError, match="--subset-ratio must be more than 0 and less than 1"):
        Design(ratio, name)


@pytest.mark.parametrize("ratio", [0.0001, 0.9999, 1e-12])
def test_a_ratio_that_no_block_can_hold_needs_independent_coins(ratio):
    with pytest.raises(InputError, match="blocks of 1000 models cannot hold it; use --design bernoulli"):
        Design(ratio)
    assert Design(ratio, "bernoulli").block == 1


def test_an_unknown_design_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'balanced'"):
        Design(0.7, "balance")


# -- groups and contents -------------------------------------------------------------------------------------------


def test_groups_are_numbered_as_they_first_appear():
    assert groups_of(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 0, 2, 1]
    assert groups_of([]).tolist() == []
    assert groups_of(["x"]).dtype == np.int64


def test_exact_copies_have_the_same_content_and_others_do_not():
    x = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [2.0, 1.0], [1.0, np.nextafter(2.0, 3.0)]])
    labels = np.array([0, 0, 1, 0, 0])
    assert groups_of(contents(x, labels)).tolist() == [0, 0, 1, 2, 3]
    assert groups_of(contents(x, None)).tolist() == [0, 0, 0, 1, 2]


def test_tokens_of_another_length_are_another_content():
    tokens = [np.array(ids, dtype=np.int32) for ids in ([1, 2], [1, 2], [1, 2, 0], [], [])]
    assert groups_of(contents(tokens, None)).tolist() == [0, 0, 1, 2, 2]
    assert groups_of(contents(tokens, np.array([0, -1, 0, 0, 0]))).tolist() == [0, 1, 2, 3, 3]


def test_the_order_in_memory_is_no_part_of_the_content():
    x = np.arange(12.0).reshape(2, 2, 3)
    flipped = np.asfortranarray(x)
    assert list(contents(x, None)) == list(contents(flipped, None))


def test_the_fingerprint_is_of_the_bits():
    included = np.array([True, False, True, True, False, False, False, False, True])
    assert fingerprint(included) == hashlib.sha256(bytes([0b10110000, 0b10000000])).hexdigest()
    other = included.copy()
    other[4] = True
    assert fingerprint(other) != fingerprint(included)
