"""Series over a run: by hand, against the definition as a loop, and their nulls against white noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from memdiag.oscillation import oscillation


def test_oscillation_by_hand() -> None:
    found = oscillation([0, 10, 20, 30], [1.0, -1.0, 1.0, -1.0])
    assert found.n_points == 4
    assert found.std == pytest.approx(math.sqrt(4 / 3))
    assert found.zero_crossings_per_100 == pytest.approx(100 * 3 / 30)
    # all power at the highest of the two frequencies above 0
    assert found.spectral_peak_over_mean == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("values", "changes"),
    [
        ([1, 0, -1], 1),  # the zero carries the plus
        ([1, 0, 1], 0),
        ([0, 0, -1, 1], 1),  # no sign yet is no change
        ([-1, 0, 0, 2, 0, -1], 2),
        ([0, 0, 0], 0),
    ],
)
def test_zeros_carry_the_sign_before_them(values: list[float], changes: int) -> None:
    steps = range(0, 5 * len(values), 5)
    assert oscillation(steps, values).zero_crossings_per_100 == pytest.approx(100 * changes / steps[-1])


def _by_the_definition(steps: list[int], c: list[float]) -> tuple[float, float, float]:
    n, mean = len(c), sum(c) / len(c)
    std = math.sqrt(sum((x - mean) ** 2 for x in c) / (n - 1))
    crossings = 100 * sum(a * b < 0 for a, b in itertools.pairwise(c)) / ((n - 1) * (steps[1] - steps[0]))
    power = []
    for f in range(1, n // 2 + 1):
        re = sum((x - mean) * math.cos(2 * math.pi * f * i / n) for i, x in enumerate(c))
        im = sum((x - mean) * math.sin(2 * math.pi * f * i / n) for i, x in enumerate(c))
        power.append(re * re + im * im)
    return std, crossings, max(power) / (sum(power) / len(power))


@pytest.mark.parametrize(("n", "k"), [(4, 1), (9, 20), (24, 72)])
def test_oscillation_agrees_with_the_definition(n: int, k: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(5):
        steps, c = [100 + k * i for i in range(n)], list(rng.standard_normal(n) + 0.3)
        found = oscillation(steps, c, permutations=1)
        got = (found.std, found.zero_crossings_per_100, found.spectral_peak_over_mean)
        assert got == pytest.approx(_by_the_definition(steps, c), rel=1e-9)


def test_the_null_band_is_the_quantiles_of_permuted_series() -> None:
    rng = np.random.default_rng(5)
    steps, c = list(range(0, 200, 10)), rng.standard_normal(20).cumsum()
    found = oscillation(steps, c, permutations=4000, seed=1)
    crossings, peaks = [], []
    for _ in range(4000):
        _, crossing, peak = _by_the_definition(steps, list(rng.permutation(c)))
        crossings.append(crossing)
        peaks.append(peak)
    for name, series, tolerance in (
        ("zero_crossings_per_100", crossings, 0.6),
        ("spectral_peak_over_mean", peaks, 0.1),
    ):
        low, high = np.quantile(series, (0.05, 0.95))
        assert getattr(found, f"{name}_null_lo") == pytest.approx(low, abs=tolerance)
        assert getattr(found, f"{name}_null_hi") == pytest.approx(high, abs=tolerance)


def test_oscillation_repeats_by_seed_and_does_not_see_scale_or_start() -> None:
    c = np.random.default_rng(0).standard_normal(12)
    steps = np.arange(12) * 7
    first = oscillation(steps, c, standard_errors=np.ones(12), seed=3)
    assert first == oscillation(steps, c, standard_errors=np.ones(12), seed=3)
    assert first != oscillation(steps, c, standard_errors=np.ones(12), seed=4)
    moved = oscillation(steps + 1000, c * 1e-8, standard_errors=np.full(12, 1e-8), seed=3)
    for field in ("std", "std_null_lo", "std_null_hi"):
        assert getattr(moved, field) == pytest.approx(getattr(first, field) * 1e-8)
    for name in ("zero_crossings_per_100", "spectral_peak_over_mean"):
        for field in (name, f"{name}_null_lo", f"{name}_null_hi"):
            assert getattr(moved, field) == pytest.approx(getattr(first, field))


def _white_noise(n: int, count: int, seed: int = 0) -> Iterator[np.ndarray]:
    yield from np.random.default_rng(seed).standard_normal((count, n))


@pytest.mark.parametrize(
    ("n", "k", "crossings", "peak", "crossings_band", "peak_band"),
    [
        (24, 72, 0.69, 3.2, None, (2.1, 4.9)),
        (73, 24, 2.09, 4.2, (1.7, 2.5), None),
        (97, 18, 2.78, 4.5, (2.3, 3.2), None),
    ],
)
def test_white_noise_gives_the_figures_that_were_taken_for_cycles(n, k, crossings, peak, crossings_band, peak_band):
    found = [oscillation(np.arange(n) * k, c, permutations=1) for c in _white_noise(n, 1500)]
    measured = np.array([(o.zero_crossings_per_100, o.spectral_peak_over_mean) for o in found])
    assert measured[:, 0].mean() == pytest.approx(crossings, abs=0.02)
    assert measured[:, 1].mean() == pytest.approx(peak, abs=0.12)
    for column, band in ((0, crossings_band), (1, peak_band)):
        if band:
            assert np.quantile(measured[:, column], (0.05, 0.95)) == pytest.approx(band, abs=0.15)
    # and the null of a single series is that of white noise
    one = oscillation(np.arange(n) * k, next(_white_noise(n, 1, seed=9)), permutations=2000)
    if crossings_band:
        band = one.zero_crossings_per_100_null_lo, one.zero_crossings_per_100_null_hi
        assert band == pytest.approx(crossings_band, abs=0.15)


def test_a_sinusoid_lies_outside_the_null() -> None:
    steps = np.arange(64) * 25
    found = oscillation(steps, np.sin(2 * np.pi * 4 * np.arange(64) / 64 + 0.3), standard_errors=np.full(64, 0.1))
    assert found.spectral_peak_over_mean == pytest.approx(32, rel=1e-6)  # all power in one of 32 frequencies
    assert found.spectral_peak_over_mean > 2 * found.spectral_peak_over_mean_null_hi
    assert found.zero_crossings_per_100 < found.zero_crossings_per_100_null_lo
    assert found.std > 5 * found.std_null_hi


def test_white_noise_lies_inside_the_null_nine_times_in_ten() -> None:
    inside = {"std": 0, "zero_crossings_per_100": 0, "spectral_peak_over_mean": 0}
    for c in _white_noise(40, 200, seed=2):
        found = oscillation(np.arange(40) * 10, c, standard_errors=np.ones(40))
        for name in inside:
            low, high = getattr(found, f"{name}_null_lo"), getattr(found, f"{name}_null_hi")
            inside[name] += low <= getattr(found, name) <= high
    assert 0.84 <= inside["std"] / 200 <= 0.96
    assert 0.84 <= inside["spectral_peak_over_mean"] / 200 <= 0.96
    assert 0.84 <= inside["zero_crossings_per_100"] / 200 <= 0.99  # counts: both ends of the band belong to it


def test_the_null_of_std_is_what_the_standard_errors_give() -> None:
    errors = np.linspace(0.1, 0.5, 50)
    found = oscillation(np.arange(50), np.zeros(50), standard_errors=errors, permutations=4000)
    spread = math.sqrt((errors**2).mean())
    assert found.std == 0
    assert 0.75 * spread < found.std_null_lo < spread < found.std_null_hi < 1.25 * spread
    without = oscillation(np.arange(50), np.zeros(50))
    assert math.isnan(without.std_null_lo)
    assert math.isnan(without.std_null_hi)


@pytest.mark.filterwarnings("error")
def test_oscillation_is_undefined_where_there_is_too_little() -> None:
    none, one = oscillation([], []), oscillation([5], [0.1])
    assert (none.n_points, one.n_points) == (0, 1)
    for found in (none, one):
        assert all(math.isnan(v) for k, v in vars(found).items() if k != "n_points")
    three = oscillation([0, 1, 2], [1.0, -1.0, 1.0])
    assert three.zero_crossings_per_100 == 100
    assert math.isnan(three.spectral_peak_over_mean)
    uneven = oscillation([0, 1, 2, 4, 5], [1.0, -1.0, 1.0, 2.0, 3.0])
    assert uneven.zero_crossings_per_100 == pytest.approx(100 * 2 / 5)
    assert math.isnan(uneven.spectral_peak_over_mean)
    assert math.isnan(uneven.spectral_peak_over_mean_null_hi)
    flat = oscillation(range(6), [0.1] * 6)
    assert flat.zero_crossings_per_100 == 0
    assert math.isnan(flat.spectral_peak_over_mean)
    assert math.isnan(flat.spectral_peak_over_mean_null_lo)


def test_undefined_points_are_left_out() -> None:
    steps, c = [0, 1, 2, 3, 4, 5], [math.nan, -1.0, 1.0, 2.0, -3.0, 1.0]
    errors = np.ones(6)
    assert oscillation(steps, c, standard_errors=errors) == oscillation(steps[1:], c[1:], standard_errors=errors[1:])
    gap = oscillation([0, 1, 2, 3, 4], [1.0, math.nan, -1.0, 1.0, -1.0])
    assert gap.n_points == 4
    assert math.isnan(gap.spectral_peak_over_mean)  # no longer equally spaced


@pytest.mark.parametrize(
    ("steps", "values", "kwargs"),
    [
        ([0, 1], [1.0], {}),
        ([1, 0], [1.0, 2.0], {}),
        ([0, 0], [1.0, 2.0], {}),
        ([0, 1], [1.0, math.inf], {}),
        ([0, 1], [1.0, 2.0], {"standard_errors": [0.1, -0.1]}),
        ([0, 1], [1.0, 2.0], {"permutations": 0}),
    ],
)
def test_oscillation_refuses_what_is_not_a_series(steps, values, kwargs) -> None:
    with pytest.raises(ValueError, match="want"):
        oscillation(steps, values, **kwargs)
