"""Influence of groups on test examples: by hand, as plain loops, in blocks of any size, planted and shuffled."""

from __future__ import annotations

import dataclasses
import math
import time
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from memdiag.influence import Block, _quantile, blocks, pairs, shuffled
from memdiag.memorization import Sums, estimate


def packed(coins: np.ndarray) -> np.ndarray:
    return np.packbits(coins, axis=1)


def drawn(seed: int, n_models: int = 30, n_groups: int = 21, n_tests: int = 17, *, binary: bool = True):
    """Coins (m, g) and measures (m, t)."""
    rng = np.random.default_rng([25, seed])
    measure = rng.random((n_models, n_tests)).astype(np.float32)
    return rng.random((n_models, n_groups)) < 0.6, np.rint(measure) if binary else measure


def whole(coins: np.ndarray, measure: np.ndarray, *, binary: bool, **sizes: int) -> Block:
    """All blocks as one."""
    found = list(blocks(packed(coins), coins.shape[1], measure, binary=binary, **sizes))
    assert [part.first for part in found] == list(np.cumsum([0] + [len(part.se) for part in found])[:-1])
    return Block(
        0,
        np.concatenate([part.influence for part in found]),
        np.concatenate([part.se for part in found]),
        found[0].n_in,
        found[0].n_out,
        binary,
    )


def all_pairs(parts, **options) -> dict[str, np.ndarray]:
    found = list(pairs(parts, **options))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def block_of(influence, se, n_in=None, n_out=None) -> Block:
    influence, se = np.asarray(influence, dtype=float), np.asarray(se, dtype=float)
    n = np.arange(influence.shape[1])
    return Block(0, influence, se, n if n_in is None else n_in, n + 10 if n_out is None else n_out, True)


# ---- by hand and as loops ----


def test_four_models_by_hand():
    coins = np.array([[1, 1], [1, 0], [0, 1], [0, 1]], dtype=bool)
    found = whole(coins, np.array([[1.0], [1.0], [0.0], [1.0]]), binary=True)
    np.testing.assert_allclose(found.influence, [[1 - 1 / 2, 2 / 3 - 1]], atol=1e-15)
    # 2 of 2 is 3 of 4, 1 of 2 is 2 of 4, 2 of 3 is 3 of 5, 1 of 1 is 2 of 3
    wanted = [3 / 16 / 2 + 1 / 4 / 2, 6 / 25 / 3 + 2 / 9 / 1]
    np.testing.assert_allclose(found.se, [np.sqrt(wanted)], atol=1e-15)
    assert (found.n_in.tolist(), found.n_out.tolist()) == ([2, 3], [2, 1])


@pytest.mark.parametrize("binary", [True, False])
def test_influence_and_standard_errors_are_those_of_plain_loops(binary):
    coins, measure = drawn(0, n_models=12, binary=binary)
    coins[:, 0], coins[:, 1] = True, False
    coins[:, 2] = np.arange(12) == 3
    found = whole(coins, measure, binary=binary, block=5, model_block=7)
    for t in range(measure.shape[1]):
        for g in range(coins.shape[1]):
            arms = [measure[coins[:, g], t].astype(float), measure[~coins[:, g], t].astype(float)]
            if not all(len(arm) for arm in arms):
                assert np.isnan([found.influence[t, g], found.se[t, g]]).all()
                continue
            assert found.influence[t, g] == pytest.approx(arms[0].mean() - arms[1].mean(), abs=1e-12)
            spread = [arm.var(ddof=1) if not binary and len(arm) > 1 else 0.0 for arm in arms]
            own = [v if v > 1e-12 else np.append(arm, [0.0, 1.0]).var() for v, arm in zip(spread, arms)]
            variance = sum(v / len(arm) for v, arm in zip(own, arms))
            assert found.se[t, g] == pytest.approx(math.sqrt(variance), abs=1e-12)
            assert min(len(arm) for arm in arms) > 1 or found.se[t, g] > 0.4


@pytest.mark.parametrize("binary", [True, False])
def test_influence_on_itself_is_memorization(binary):
    coins, measure = drawn(1, n_models=20, n_groups=9, n_tests=9, binary=binary)
    sums = Sums.empty(9)
    for included, values in zip(coins, measure):
        sums.add(included, values)
    truth = estimate(sums, kind="binary" if binary else "bounded").memorization
    np.testing.assert_allclose(np.diag(whole(coins, measure, binary=binary).influence), truth, atol=1e-12)


# ---- what must not matter ----


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1), (4, 7), (17, 30), (1000, 1000)])
def test_blocks_of_any_size_give_the_same(sizes, binary):
    coins, measure = drawn(2, binary=binary)
    measure[3, 5] = np.nan
    a = whole(coins, measure, binary=binary)
    b = whole(coins, measure, binary=binary, block=sizes[0], model_block=sizes[1])
    np.testing.assert_allclose(b.influence, a.influence, rtol=0, atol=1e-12)
    np.testing.assert_allclose(b.se, a.se, rtol=0, atol=1e-12)
    assert (a.n_in == b.n_in).all()
    assert (a.n_in == coins.sum(axis=0)).all()
    found, other = (all_pairs([part], top=2) for part in (a, b))
    for name in found:
        np.testing.assert_allclose(found[name], other[name], atol=1e-12)


def test_order_of_models_does_not_matter_and_groups_and_tests_only_move():
    coins, measure = drawn(3, binary=False)
    rng = np.random.default_rng(26)
    models, groups, tests = (rng.permutation(n) for n in (30, 21, 17))
    a = whole(coins, measure, binary=False)
    b = whole(coins[models][:, groups], measure[models][:, tests], binary=False)
    np.testing.assert_allclose(b.influence, a.influence[tests][:, groups], atol=1e-12)
    np.testing.assert_allclose(b.se, a.se[tests][:, groups], atol=1e-12)


def test_wrong_for_right_turns_the_sign():
    coins, measure = drawn(4)
    a, b = whole(coins, measure, binary=True), whole(coins, 1 - measure, binary=True)
    np.testing.assert_allclose(b.influence, -a.influence, atol=1e-12)
    np.testing.assert_allclose(b.se, a.se, atol=1e-12)


def test_a_zero_one_measure_has_the_same_influence_of_either_kind():
    coins, measure = drawn(5)
    a, b = whole(coins, measure, binary=True), whole(coins, measure, binary=False)
    np.testing.assert_allclose(b.influence, a.influence, atol=1e-12)


def test_a_memmap_gives_the_same(tmp_path):
    coins, measure = drawn(6)
    np.save(tmp_path / "measure.npy", measure)
    mapped = np.load(tmp_path / "measure.npy", mmap_mode="r")
    np.testing.assert_array_equal(
        whole(coins, mapped, binary=True, block=5).influence, whole(coins, measure, binary=True).influence
    )


# ---- edges ----


def test_no_standard_error_is_zero():
    coins = np.arange(10)[:, None] < np.array([[2, 5, 8]])
    for binary in (True, False):
        for constant in (0.0, 1.0) if binary else (0.0, 0.37, 1.0):
            found = whole(coins, np.full((10, 2), constant), binary=binary)
            np.testing.assert_allclose(found.influence, 0, atol=1e-12)
            assert found.se.min() > 0.1
    # all right with, all wrong without, but two models out
    found = whole(coins, coins[:, 2:].astype(float), binary=True)
    assert found.influence[0, 2] == 1
    assert found.se[0, 2] == pytest.approx(math.sqrt(0.9 * 0.1 / 8 + 0.75 * 0.25 / 2))


def test_a_test_example_with_a_gap_is_null_and_the_others_are_not():
    coins, measure = drawn(7, binary=False)
    whole_measure = measure.copy()
    measure[2, 4] = np.nan
    found, without = whole(coins, measure, binary=False), whole(coins, whole_measure, binary=False)
    assert np.isnan(found.influence[4]).all()
    assert np.isnan(found.se[4]).all()
    others = np.arange(17) != 4
    np.testing.assert_allclose(found.influence[others], without.influence[others], atol=1e-12)
    assert 4 not in all_pairs([found])["test"]
    assert np.isnan(measure).sum() == 1  # the caller's array is as it was


def test_no_tests_no_groups_and_no_models():
    coins, measure = drawn(8)
    assert list(blocks(packed(coins), 21, measure[:, :0], binary=True)) == []
    part = whole(coins[:, :0], measure, binary=True)
    assert part.influence.shape == (17, 0)
    assert len(all_pairs([part])["test"]) == 0
    empty = whole(coins[:0], measure[:0], binary=False)
    assert np.isnan(empty.influence).all()
    assert len(all_pairs([empty])["test"]) == 0


def test_shapes_that_do_not_match_and_measures_out_of_range_are_refused():
    coins, measure = drawn(9)
    for bits, n_groups in ((packed(coins)[:-1], 21), (packed(coins), 30), (coins, 21)):
        with pytest.raises(ValueError, match="coins are"):
            list(blocks(bits, n_groups, measure, binary=True))
    with pytest.raises(ValueError, match="at least 1"):
        list(blocks(packed(coins), 21, measure, binary=True, block=0))
    with pytest.raises(ValueError, match="binary"):
        list(blocks(packed(coins), 21, measure / 2, binary=True))
    for beyond in (-0.1, 1.1, np.inf):
        measure[0, 0] = beyond
        with pytest.raises(ValueError, match="outside"):
            list(blocks(packed(coins), 21, measure, binary=False))


# ---- which pairs ----


def test_pairs_by_hand():
    influence = [[0.1, -0.5, 0.5, np.nan, 0.2], [0.0, 0.0, 0.15, 0.0, 0.0]]
    se = [[0.01, 0.2, 0.1, 0.1, 0.05], [0.1, 0.1, 0.05, 0.1, 0.1]]
    found = all_pairs([block_of(influence, se)], top=1)
    assert found["test"].tolist() == [0, 0, 0, 1]
    assert found["group"].tolist() == [1, 2, 4, 2]  # equal sizes by group; 0.1 is too small, -0.5 too uncertain
    assert found["rank"].tolist() == [1, 2, 3, 1]
    assert found["significant"].tolist() == [False, True, True, True]
    assert found["influence"].tolist() == [-0.5, 0.5, 0.2, 0.15]
    assert found["se"].tolist() == [0.2, 0.1, 0.05, 0.05]
    assert (found["n_in"].tolist(), found["n_out"].tolist()) == ([1, 2, 4, 2], [11, 12, 14, 12])
    assert all_pairs([block_of(influence, se)], top=0)["group"].tolist() == [2, 4, 2]
    assert all_pairs([block_of([[0.5, 0.5]], [[0.25, 0.26]])], n_se=2, top=0)["group"].tolist() == [0]
    assert all_pairs([block_of(influence, se)], top=99, n_se=9)["group"].tolist() == [1, 2, 4, 0, 2, 0, 1, 3, 4]


def test_rounding_does_not_keep_a_pair_from_the_threshold():
    assert 0.6 - 0.45 < 0.15
    found = all_pairs([block_of([[0.6 - 0.45, 0.15, 0.1499]], [[0.05, 0.05, 0.05]])], top=0)
    assert found["group"].tolist() == [0, 1]
    assert found["rank"].tolist() == [1, 2]


@pytest.mark.parametrize("top", [0, 1, 3, 50])
def test_pairs_are_those_of_a_loop(top):
    rng = np.random.default_rng(27)
    influence, se = rng.integers(-9, 10, (13, 20)) / 20, rng.random((13, 20)) / 5
    influence[rng.random((13, 20)) < 0.1] = np.nan
    influence[4] = np.nan
    found = all_pairs([block_of(influence, se)], min_influence=0.2, n_se=2, top=top)
    wanted = []
    for t in range(13):
        known = [g for g in range(20) if not math.isnan(influence[t, g])]
        for rank, g in enumerate(sorted(known, key=lambda g: (-abs(influence[t, g]), g)), start=1):
            significant = abs(influence[t, g]) >= 0.2 and abs(influence[t, g]) >= 2 * se[t, g]
            if significant or rank <= top:
                wanted.append((t, g, rank, significant))
    assert list(zip(*(found[name].tolist() for name in ("test", "group", "rank", "significant")))) == wanted
    np.testing.assert_array_equal(found["influence"], influence[found["test"], found["group"]])


def test_the_first_of_many_groups_are_the_first_of_a_sort():
    influence = np.random.default_rng(33).integers(-99, 100, (40, 3000)) / 100
    found = all_pairs(
        [block_of(influence, np.ones((40, 3000)))], top=60
    )  # some 30 groups of each value: ties at the cut
    order = np.argsort(-np.abs(influence), axis=1, kind="stable")[:, :60]
    assert not found["significant"].any()
    np.testing.assert_array_equal(found["group"].reshape(40, 60), order)


def test_tests_are_numbered_through_all_blocks():
    coins, measure = drawn(10)
    found = all_pairs(blocks(packed(coins), 21, measure, binary=True, block=4), top=1)
    assert sorted(set(found["test"].tolist())) == list(range(17))


# ---- planted truth, and the control ----


def planted(n_models: int = 200, n_groups: int = 300, n_tests: int = 100, *, binary: bool):
    """Test example t < 20 is right with group 3 t and seldom without; no group matters to the others."""
    rng = np.random.default_rng([28, binary])
    coins = rng.random((n_models, n_groups)) < 0.7
    rate = np.tile(rng.random(n_tests), (n_models, 1))
    rate[:, :20] = np.where(coins[:, 0:60:3], 0.9, 0.2)
    tokens = 1 if binary else 30
    return coins, (rng.binomial(tokens, rate) / tokens).astype(np.float32)


@pytest.mark.parametrize("binary", [True, False])
def test_planted_pairs_are_found_and_shuffled_ones_are_chance(binary):
    coins, measure = planted(binary=binary)
    options = {"min_influence": 0.3, "n_se": 5.0, "top": 1}  # P(|z| > 5) of 30,000 pairs: 0.02 expected
    found = all_pairs(blocks(packed(coins), 300, measure, binary=binary, block=32), **options)
    first = found["rank"] == 1
    assert found["group"][first][:20].tolist() == list(range(0, 60, 3))
    hits = set(zip(found["test"][found["significant"]].tolist(), found["group"][found["significant"]].tolist()))
    assert hits == {(t, 3 * t) for t in range(20)}
    for broken in (
        blocks(packed(coins), 300, shuffled(measure, 0), binary=binary),
        blocks(shuffled(packed(coins), 1), 300, measure, binary=binary),
    ):
        assert all_pairs(broken, **options)["significant"].sum() == 0


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_few_models_do_not_make_chance_look_certain(tokens):
    rng = np.random.default_rng([29, tokens])
    for n_models in (8, 16, 40):
        coins = rng.random((n_models, 400)) < 0.5
        measure = rng.binomial(tokens, rng.beta(2, 1, 100), (n_models, 100)) / tokens
        found = all_pairs(blocks(packed(coins), 400, measure, binary=tokens == 1), top=0)
        # three standard errors of a normal estimate are passed by 0.27 % of 40,000 pairs; twice that is too many
        assert found["significant"].sum() <= 2 * 0.0027 * 40_000


def test_shuffling_is_one_permutation_for_all_tests_and_the_seeds_own():
    _, measure = drawn(11, binary=False)
    a = shuffled(measure, 5)
    assert sorted(map(tuple, a.tolist())) == sorted(map(tuple, measure.tolist()))
    assert (a != measure).any()
    np.testing.assert_array_equal(a, shuffled(measure, 5))
    assert (a != shuffled(measure, 6)).any()
    assert not np.shares_memory(a, measure)


# ---- size ----


def peak(n_tests: int, block: int, n_groups: int = 4000) -> int:
    rng = np.random.default_rng(30)
    bits = rng.integers(0, 256, (64, n_groups // 8), dtype=np.uint8)
    measure = rng.integers(0, 2, (64, n_tests)).astype(np.float32)
    tracemalloc.start()
    try:
        for part in pairs(blocks(bits, n_groups, measure, binary=True, block=block, model_block=32), top=3):
            assert len(part["test"])
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_a_block_however_many_tests_there_are():
    few, many = peak(64, 16), peak(1024, 16)
    assert many < 1.2 * few
    assert few < 12 * 8 * 16 * 4000 + 2 * 8 * 32 * 4000
    assert peak(64, 64) > 2 * few  # the measurement sees blocks at all


def test_a_million_pairs_are_quick():
    rng = np.random.default_rng(31)
    bits, measure = rng.integers(0, 256, (400, 250), dtype=np.uint8), rng.integers(0, 2, (400, 500)).astype(np.float32)
    start = time.process_time()
    found = all_pairs(blocks(bits, 2000, measure, binary=True))
    assert time.process_time() - start < 5  # 0.3 s on one core; a loop over pairs takes a minute
    assert len(found["test"]) >= 1500


def test_few_models_need_more_standard_errors_of_a_measure_that_is_not_binary():
    n_in, n_out = np.array([5, 4, 2, 40]), np.array([5, 9, 1, 400])
    part = Block(0, np.full((1, 4), 0.5), np.full((1, 4), 0.07), n_in, n_out, False)
    # P(t > q) = P(normal > 3) = .00135: q is 6.62 with 4 degrees of freedom, 9.22 with 3, 3.20 with 39, none with 0
    wanted = stats.t.isf(stats.norm.sf(3), [4, 3, 39])
    assert wanted == pytest.approx([6.62, 9.22, 3.20], abs=0.01)
    np.testing.assert_allclose(_quantile(part, 3.0), [wanted[0], wanted[1], np.inf, wanted[2]])
    (found,) = pairs([part], top=0)
    assert found["group"].tolist() == [0, 3]  # .5 / .07 = 7.1
    assert _quantile(dataclasses.replace(part, binary=True), 3.0) == 3.0
