"""Spectrum measures: values by hand, the definitions as plain loops, invariances, and what is undefined."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest

from memdiag import spectrum

DYADIC = [0.5, 0.25, 0.125, 0.125]
MEASURES = {
    "S_1/2": lambda lam: spectrum.renyi_entropy(lam, 0.5),
    "S_1": lambda lam: spectrum.renyi_entropy(lam, 1.0),
    "S_2": lambda lam: spectrum.renyi_entropy(lam, 2.0),
    "S_inf": lambda lam: spectrum.renyi_entropy(lam, math.inf),
    "effective_rank": spectrum.effective_rank,
    "participation_ratio": spectrum.participation_ratio,
    "rankme": spectrum.rankme,
    "alpha_req": lambda lam: spectrum.alpha_req(lam, first=2, last=6)[0],
    "alpha_req_r2": lambda lam: spectrum.alpha_req(lam, first=2, last=6)[1],
    "isotropy": spectrum.isotropy,
}
measures = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())


def _random_spectra(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(0.7, size=shape)


def _entropy_by_loop(weights: list[float], alpha: float) -> float:
    p = [w / math.fsum(weights) for w in weights if w > 0]
    if alpha == 1:
        return -math.fsum(x * math.log(x) for x in p)
    return math.log(math.fsum(x**alpha for x in p)) / (1 - alpha)


# --- by hand -----------------------------------------------------------------------------------------------------


def test_dyadic_spectrum_by_hand() -> None:
    assert spectrum.renyi_entropy(DYADIC, 1.0) == pytest.approx(1.75 * math.log(2), abs=1e-12)  # 1.213008
    assert spectrum.effective_rank(DYADIC) == pytest.approx(2**1.75, abs=1e-12)  # 3.363586
    assert spectrum.renyi_entropy(DYADIC, 2.0) == pytest.approx(math.log(32 / 11), abs=1e-12)  # 1.067841
    assert spectrum.participation_ratio(DYADIC) == pytest.approx(32 / 11, abs=1e-12)  # 2.909091
    assert np.exp(spectrum.renyi_entropy(DYADIC, math.inf)) == pytest.approx(2.0, abs=1e-12)  # 1 / largest p
    assert spectrum.rankme(DYADIC) == pytest.approx(3.828427, abs=1e-6)
    # RankMe with its paper's epsilon is a sixth digit away
    pi = np.sqrt(DYADIC) / np.sqrt(DYADIC).sum()
    assert np.exp(-(pi * np.log(pi + 1e-7)).sum()) == pytest.approx(spectrum.rankme(DYADIC), abs=2e-6)


T_SPECTRA = {  # gapt dossier T1 to T7: vectors as rows, S_1, S_2, S_3
    "T1": (np.eye(4), math.log(4), math.log(4), math.log(4)),
    "T2": ([[1, 0], [1, 0], [1, 0]], 0, 0, 0),
    "T3": (np.diag([math.sqrt(3), 1]), 0.562335145, 0.470003629, 0.413339287),
    "T4": ([[1, 0], [0, 1], [1, 1]], 0.562335145, 0.470003629, 0.413339287),
    "T5": (np.diag([2, 1, 1]), 0.867563228, 0.693147181, 0.592811833),
    "T6": ([[1, 0], [1, 1]], 0.381264054, 0.251314428, 0.202732554),
    "T7": (np.eye(4)[[0, 1, 0, 0]], 0.562335145, 0.470003629, 0.413339287),
}


@pytest.mark.parametrize("name", T_SPECTRA)
@pytest.mark.parametrize("side", ["n x n", "d x d"])
def test_entropies_of_the_dossiers_vectors(name: str, side: str) -> None:
    rows, *expected = T_SPECTRA[name]
    z = np.asarray(rows, dtype=np.float64)
    lam = np.linalg.eigvalsh(z @ z.T if side == "n x n" else z.T @ z)
    assert [spectrum.renyi_entropy(lam, a) for a in (1.0, 2.0, 3.0)] == pytest.approx(expected, abs=1e-9)


POWER_LAW = [  # exponent, effective rank, RankMe, participation ratio of n^-a, n = 1 ... 512
    (0.5, 409.5545, 491.7295, 281.653),
    (1.0, 117.2312, 409.5545, 28.2808),
    (1.5, 16.9481, 260.5851, 5.29986),
    (2.0, 5.056094, 117.2312, 2.494073),
]


@pytest.mark.parametrize(("a", "erank", "rankme", "pr"), POWER_LAW)
def test_power_law_table(a: float, erank: float, rankme: float, pr: float) -> None:
    lam = np.arange(1, 513, dtype=np.float64) ** -a
    assert spectrum.effective_rank(lam) == pytest.approx(erank, rel=5e-6)
    assert spectrum.rankme(lam) == pytest.approx(rankme, rel=1e-6)
    assert spectrum.participation_ratio(lam) == pytest.approx(pr, rel=2e-6)
    # RankMe at a is the effective rank at a / 2: one takes singular values, the other their squares
    half = np.arange(1, 513, dtype=np.float64) ** (-a / 2)
    assert spectrum.rankme(lam) == pytest.approx(spectrum.effective_rank(half), rel=1e-12)
    alpha, r2 = spectrum.alpha_req(lam)
    assert alpha == pytest.approx(a, abs=1e-9)
    assert r2 == pytest.approx(1.0, abs=1e-9)


def test_isoscore_of_a_ball_and_of_a_line() -> None:
    x = np.random.default_rng(0).standard_normal((20_000, 8))
    assert 0.999 <= spectrum.isotropy(np.linalg.eigvalsh(np.cov(x.T))) <= 1
    line = np.outer(np.linspace(-1, 1, 50), np.arange(1.0, 9.0))
    assert spectrum.isotropy(np.linalg.eigvalsh(np.cov(line.T))) == pytest.approx(0, abs=1e-12)
    assert spectrum.isotropy(np.full(8, 3.0)) == pytest.approx(1, abs=1e-12)


def test_isoscore_counts_the_dimensions_that_are_not_used() -> None:
    assert spectrum.isotropy([1, 1, 0, 0]) == pytest.approx(1 / 3)  # 2 of 4 evenly: (2 - 1) / (4 - 1)
    assert spectrum.isotropy([1, 1], dims=4) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="dims must be at least the 4"):
        spectrum.isotropy(DYADIC, dims=3)


# --- the definitions as plain loops --------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.995, 0.9995, 1.0, 1.0005, 1.5, 2.0, 3.0, 7.0])
def test_entropy_agrees_with_the_definition(alpha: float) -> None:
    for lam in _random_spectra(20, 9):
        assert spectrum.renyi_entropy(lam, alpha) == pytest.approx(_entropy_by_loop(list(lam), alpha), abs=1e-11)


def test_rank_measures_agree_with_the_definition() -> None:
    for lam in _random_spectra(20, 9):
        assert spectrum.effective_rank(lam) == pytest.approx(math.exp(_entropy_by_loop(list(lam), 1)), rel=1e-12)
        assert spectrum.participation_ratio(lam) == pytest.approx(sum(lam) ** 2 / sum(x * x for x in lam), rel=1e-12)
        singular = [math.sqrt(x) for x in lam]
        assert spectrum.rankme(lam) == pytest.approx(math.exp(_entropy_by_loop(singular, 1)), rel=1e-12)


def _alpha_req_by_loop(lam: np.ndarray, first: int, last: int) -> tuple[float, float]:
    points = [(n, v) for n, v in enumerate(sorted(lam, reverse=True), 1) if first <= n <= last and v > 0]
    w = [1 / n for n, _ in points]
    x, y = [math.log(n) for n, _ in points], [math.log(v) for _, v in points]
    mean_x = sum(a * b for a, b in zip(w, x, strict=True)) / sum(w)
    mean_y = sum(a * b for a, b in zip(w, y, strict=True)) / sum(w)
    slope = sum(a * (b - mean_x) * (c - mean_y) for a, b, c in zip(w, x, y, strict=True)) / sum(
        a * (b - mean_x) ** 2 for a, b in zip(w, x, strict=True)
    )
    residual = sum(a * (c - mean_y - slope * (b - mean_x)) ** 2 for a, b, c in zip(w, x, y, strict=True))
    return -slope, 1 - residual / sum(a * (c - mean_y) ** 2 for a, c in zip(w, y, strict=True))


@pytest.mark.parametrize(("first", "last"), [(12, 100), (1, 40), (30, 1000)])
def test_alpha_req_agrees_with_weighted_least_squares(first: int, last: int) -> None:
    for lam in _random_spectra(5, 150):
        assert spectrum.alpha_req(lam, first=first, last=last) == pytest.approx(
            _alpha_req_by_loop(lam, first, last), abs=1e-9
        )


def test_alpha_req_fits_only_the_ranks_asked_for() -> None:
    lam = np.arange(1, 201, dtype=np.float64) ** -1.5
    lam[:11], lam[100:] = 1e6, 1e-9  # steps outside ranks 12 ... 100
    alpha, r2 = spectrum.alpha_req(lam)
    assert alpha == pytest.approx(1.5, abs=1e-9)
    assert r2 == pytest.approx(1, abs=1e-9)


def test_isoscore_agrees_with_the_recipe() -> None:
    for lam in _random_spectra(20, 7):
        d = len(lam)
        norm = math.sqrt(sum(v * v for v in lam))
        unit = [math.sqrt(d) * v / norm for v in lam]
        delta = math.sqrt(sum((v - 1) ** 2 for v in unit)) / math.sqrt(2 * (d - math.sqrt(d)))
        phi = (d - delta**2 * (d - math.sqrt(d))) ** 2 / d**2
        assert spectrum.isotropy(lam) == pytest.approx((d * phi - 1) / (d - 1), abs=1e-12)


# --- invariances, bounds and order ---------------------------------------------------------------------------------


@measures
@pytest.mark.parametrize("scale", [1e-300, 1e-6, 1e6, 1e300])
def test_scale_does_not_matter(measure, scale: float) -> None:
    lam = _random_spectra(4, 8)
    np.testing.assert_allclose(measure(lam * scale), measure(lam), rtol=1e-9, atol=1e-12)


@measures
def test_order_does_not_matter(measure) -> None:
    lam = _random_spectra(4, 8)
    np.testing.assert_allclose(measure(lam[:, ::-1]), measure(lam), rtol=1e-12)
    np.testing.assert_allclose(measure(np.random.default_rng(1).permuted(lam, axis=1)), measure(lam), rtol=1e-12)


@measures
def test_a_batch_is_its_spectra_one_by_one(measure) -> None:
    lam = _random_spectra(3, 5, 8)
    whole = measure(lam)
    assert whole.shape == (3, 5)
    assert whole.dtype == np.float64
    for i in range(3):
        for j in range(5):
            assert float(measure(lam[i, j])) == pytest.approx(whole[i, j], rel=1e-12)
    assert measure(lam[:0]).shape == (0, 5)


def test_entropy_never_rises_with_alpha_and_is_continuous_at_one() -> None:
    orders = [0.01, 0.5, 0.99, 0.9989, 0.9991, 1 - 1e-9, 1.0, 1 + 1e-12, 1 + 1e-6, 1.0009, 1.0011, 2.0, 3.0, 50.0, 1e4]
    lam = _random_spectra(50, 8)
    rows = np.array([spectrum.renyi_entropy(lam, a) for a in [*orders, math.inf]])
    assert (np.diff(rows, axis=0) <= 1e-12).all()
    np.testing.assert_allclose(rows[orders.index(1 + 1e-12)], rows[orders.index(1.0)], atol=1e-9)
    np.testing.assert_allclose(rows[orders.index(1e4)], rows[-1], rtol=1e-3)


def test_bounds_and_the_order_of_the_ranks() -> None:
    lam = _random_spectra(50, 8)
    chain = [
        np.ones(50),
        np.exp(spectrum.renyi_entropy(lam, math.inf)),
        spectrum.participation_ratio(lam),
        spectrum.effective_rank(lam),
        spectrum.rankme(lam),
        np.full(50, 8.0),
    ]
    for below, above in itertools.pairwise(chain):
        assert (below <= above + 1e-12).all()
    assert ((spectrum.isotropy(lam) >= 0) & (spectrum.isotropy(lam) <= 1)).all()


def test_zeros_are_no_directions() -> None:
    lam = _random_spectra(6, 8)
    padded = np.concatenate([lam, np.zeros((6, 5))], axis=1)
    for name in ("S_1/2", "S_1", "S_2", "S_inf", "effective_rank", "participation_ratio", "rankme"):
        np.testing.assert_allclose(MEASURES[name](padded), MEASURES[name](lam), rtol=1e-12)


@measures
def test_rounding_below_zero_counts_as_zero(measure) -> None:
    clean = np.array([4.0, 3.0, 2.0, 1.0, 0.5, 0.0, 0.0, 0.0])
    noisy = clean + np.array([0, 0, 0, 0, 0, -3e-16, 1e-16, -1e-15])
    assert measure(noisy) == measure(clean)


def test_both_gram_matrices_give_the_same_numbers() -> None:
    z = np.random.default_rng(2).standard_normal((20, 64))
    small, large = np.linalg.eigvalsh(z @ z.T), np.linalg.eigvalsh(z.T @ z)
    for name in ("S_1/2", "S_1", "S_2", "effective_rank", "participation_ratio", "rankme"):
        assert MEASURES[name](small) == pytest.approx(float(MEASURES[name](large)), abs=1e-10)
    assert spectrum.isotropy(small, dims=64) == pytest.approx(float(spectrum.isotropy(large)), abs=1e-10)


def test_one_direction_against_all_directions() -> None:
    rng = np.random.default_rng(3)
    rank_one = rng.standard_normal((40, 1)) @ rng.standard_normal((1, 256))
    spread = rng.standard_normal((8, 2048))
    entropy = []
    for x in (rank_one, spread):
        x = x - x.mean(0)
        entropy.append(spectrum.renyi_entropy(np.linalg.eigvalsh(x @ x.T), 1.0))
    assert entropy[0] < 0.01
    assert entropy[1] >= 0.99 * math.log(7)


# --- what is undefined ---------------------------------------------------------------------------------------------


@measures
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [[0.0] * 8, [-1e-17] * 8, [1.0] * 7 + [math.nan], [1.0] * 7 + [math.inf]])
def test_no_spectrum_is_nan_and_leaves_its_neighbours_alone(measure, bad: list[float]) -> None:
    good = list(_random_spectra(8))
    assert math.isnan(measure(bad))
    both = measure(np.array([bad, good]))
    assert math.isnan(both[0])
    assert both[1] == pytest.approx(float(measure(good)))


@pytest.mark.filterwarnings("error")
def test_one_eigenvalue() -> None:
    for alpha in (0.5, 1.0, 2.0, math.inf):
        assert spectrum.renyi_entropy([3.0], alpha) == 0
    assert spectrum.effective_rank([3.0]) == spectrum.rankme([3.0]) == spectrum.participation_ratio([3.0]) == 1
    assert math.isnan(spectrum.isotropy([3.0]))  # one dimension is neither even nor uneven
    assert all(math.isnan(x) for x in spectrum.alpha_req([3.0]))


@pytest.mark.filterwarnings("error")
def test_alpha_req_needs_three_ranks_above_zero() -> None:
    lam = np.arange(1, 21, dtype=np.float64) ** -1.0
    assert spectrum.alpha_req(lam[:14])[0] == pytest.approx(1)  # ranks 12, 13, 14
    assert all(math.isnan(x) for x in spectrum.alpha_req(lam[:13]))
    zeros = np.where(np.arange(20) < 13, lam, 0.0)
    assert all(math.isnan(x) for x in spectrum.alpha_req(zeros))
    mixed, _ = spectrum.alpha_req(np.array([lam, zeros]))
    assert mixed[0] == pytest.approx(1)
    assert math.isnan(mixed[1])


@pytest.mark.filterwarnings("error")
def test_a_flat_spectrum_has_slope_zero_and_no_r2() -> None:
    for peak in (0.3, 7.7):
        alpha, r2 = spectrum.alpha_req(np.array([peak] * 5 + [0.3] * 59))
        assert alpha == 0
        assert math.isnan(r2)


def test_no_rounding_past_the_ends_of_a_range() -> None:
    for n in range(1, 40):
        lam = np.arange(1, 120, dtype=np.float64) ** (-n / 10)
        assert spectrum.alpha_req(lam)[1] <= 1
        for alpha in (0.3, 1.0, 1.0003, 2.0, 5.0, math.inf):
            for second in (0.0, n * 1e-15):
                assert not np.signbit(spectrum.renyi_entropy([n, second, 0.0], alpha))


def test_wrong_arguments() -> None:
    for alpha in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="alpha must be > 0"):
            spectrum.renyi_entropy(DYADIC, alpha)
    for empty in (2.0, [], np.ones((3, 0))):
        with pytest.raises(ValueError, match="eigenvalues must be"):
            spectrum.renyi_entropy(empty, 1.0)
    for first, last in [(0, 5), (6, 5)]:
        with pytest.raises(ValueError, match="1 <= first <= last"):
            spectrum.alpha_req(DYADIC, first=first, last=last)


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, memdiag.spectrum; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
