"""Inverse participation ratio: curves by hand, sums of sines and cosines as plain loops, invariances, the null."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from memdiag import fourier
from memdiag.fourier import curve_ipr, dead, dominant, frequency, ipr, low_below, null_quantile, power
from memdiag.modular import discrete_log_order

LENGTHS = [2, 3, 7, 8, 58, 59]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wave(length: int, j: int, *, phase: float = 0.0, amplitude: float = 1.0) -> Tensor:
    m = torch.arange(length, dtype=torch.float64)
    return amplitude * torch.cos(2 * math.pi * j * m / length + phase)


def coefficients(x: list[float]) -> list[complex]:
    """Σ_m x_m exp(−2πi j m / p) for j = 0 … p/2, term by term."""
    p = len(x)
    angle = -2 * math.pi / p
    return [
        complex(
            sum(x[m] * math.cos(angle * j * m) for m in range(p)), sum(x[m] * math.sin(angle * j * m) for m in range(p))
        )
        for j in range(p // 2 + 1)
    ]


def ipr_by_definition(x: list[float], *, keep_dc: bool) -> float:
    p = [abs(z) ** 2 for z in coefficients(x)][0 if keep_dc else 1 :]
    return sum(a * a for a in p) / sum(p) ** 2


# --- power and the IPR of a curve ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([1, 0, 0], [1, 1]),
        ([1, 2, 3], [36, 3]),  # |1 + 2 w + 3 w²|² = 1 + 4 + 9 − (2 + 3 + 6)
        ([1, 2, 3, 6], [144, 20, 16]),  # 12, |−2 + 4i|, 1 − 2 + 3 − 6
        ([5, 5], [100, 0]),
    ],
)
def test_power_by_hand(curve: list[float], expected: list[float]) -> None:
    x = torch.tensor(curve, dtype=torch.float64)
    assert power(x, keep_dc=True).tolist() == pytest.approx(expected)
    assert power(x, keep_dc=False).tolist() == pytest.approx(expected[1:])


@pytest.mark.parametrize(
    ("curve", "with_dc", "without"),
    [
        ([1, 0, 0], 1 / 2, 1),
        ([1, 2, 3], (36**2 + 3**2) / 39**2, 1),
        ([1, 2, 3, 6], (144**2 + 20**2 + 16**2) / 180**2, (20**2 + 16**2) / 36**2),
        ([1, -1, 1, -1], 1, 1),
    ],
)
def test_ipr_by_hand(curve: list[float], with_dc: float, without: float) -> None:
    x = torch.tensor(curve, dtype=torch.float32)
    assert curve_ipr(x).item() == pytest.approx(with_dc, rel=1e-12)
    assert curve_ipr(x, keep_dc=False).item() == pytest.approx(without, rel=1e-12)
    assert curve_ipr(x).dtype == torch.float64


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("keep_dc", [True, False])
def test_power_and_ipr_agree_with_the_definition(length: int, keep_dc: bool) -> None:
    curves = gaussian(2, 3, length, seed=length) + 0.7
    found_power, found_ipr = power(curves, keep_dc=keep_dc), curve_ipr(curves, keep_dc=keep_dc)
    assert found_power.shape == (2, 3, length // 2 + keep_dc)
    assert found_ipr.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            x = curves[i, j].tolist()
            expected = [abs(z) ** 2 for z in coefficients(x)][0 if keep_dc else 1 :]
            assert found_power[i, j].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
            assert found_ipr[i, j].item() == pytest.approx(ipr_by_definition(x, keep_dc=keep_dc), rel=1e-9)


@pytest.mark.parametrize("p", [59, 97])
def test_the_ends_of_the_range(p: int) -> None:
    one_hot = torch.eye(p)
    assert curve_ipr(one_hot).tolist() == pytest.approx([2 / (p + 1)] * p, rel=1e-12)
    assert curve_ipr(one_hot, keep_dc=False).tolist() == pytest.approx([2 / (p - 1)] * p, rel=1e-12)
    for j in (1, 2, (p - 1) // 2):
        assert curve_ipr(wave(p, j, phase=0.3 * j).float()).item() == pytest.approx(1, abs=1e-5)
    assert curve_ipr(torch.ones(p)).item() == pytest.approx(1, abs=1e-12)  # a constant is a wave of frequency 0
    two = wave(p, 3, amplitude=2) + wave(p, 7, phase=1)
    assert curve_ipr(two).item() == pytest.approx((16 + 1) / (4 + 1) ** 2, rel=1e-12)


@pytest.mark.parametrize("p", [7, 59, 97])
def test_the_full_spectrum_would_give_half_for_curves_without_mean(p: int) -> None:
    curves = gaussian(20, p)
    curves = torch.cat([curves, torch.stack([wave(p, j) for j in (1, 2, 3)])])
    curves -= curves.mean(1, keepdim=True)
    full = torch.fft.fft(curves).abs().square()
    full_ipr = full.square().sum(1) / full.sum(1).square()
    torch.testing.assert_close(full_ipr, curve_ipr(curves) / 2, rtol=1e-9, atol=0)
    assert full_ipr[-1].item() == pytest.approx(0.5)


@pytest.mark.parametrize("keep_dc", [True, False])
def test_scale_sign_shift_direction_and_relabelling_do_not_matter(keep_dc: bool) -> None:
    p = 59
    x = gaussian(4, p) + 0.5
    expected = curve_ipr(x, keep_dc=keep_dc)
    for same in (1e6 * x, -1e-9 * x, x.roll(5, dims=1), x.flip(1), x[:, 7 * torch.arange(p) % p]):
        torch.testing.assert_close(curve_ipr(same, keep_dc=keep_dc), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(curve_ipr(x + 3, keep_dc=False), curve_ipr(x, keep_dc=False), rtol=1e-9, atol=0)
    assert not torch.allclose(curve_ipr(x + 3), curve_ipr(x), rtol=0.1)


def test_a_curve_without_power_has_none_and_a_faint_or_huge_one_has() -> None:
    assert curve_ipr(torch.zeros(2, 9)).isnan().all()
    for scale in (1e-37, 1e37):  # the fourth power of it is out of float32's range
        faint = torch.stack([(scale * wave(9, 2)).float(), (scale * torch.eye(9)[0]).float()])
        assert curve_ipr(faint).tolist() == pytest.approx([1, 1 / 5], rel=1e-6)


def test_a_multiplicative_character_is_one_wave_in_the_order_of_logarithms() -> None:
    p = 97
    order = torch.from_numpy(discrete_log_order(p))
    for j in (1, 5, 48):
        character = torch.zeros(p, dtype=torch.float64)
        character[order] = wave(p - 1, j, phase=0.2)
        assert curve_ipr(character[order]).item() == pytest.approx(1, abs=1e-9)
        if j != 48:  # that one is ±1, the Legendre symbol, whose spectrum is flat but for 0
            assert curve_ipr(character).item() < 0.1


# --- neurons -------------------------------------------------------------------------------------------------------


def test_a_neuron_has_the_mean_of_its_three_curves() -> None:
    u, v, w = (torch.tensor([curve], dtype=torch.float32) for curve in ([1, 0, 0], [1, 1, 1], [1, 2, 3]))
    assert ipr(u, v, w).tolist() == pytest.approx([(1 / 2 + 1 + (36**2 + 3**2) / 39**2) / 3])
    assert ipr(u, u, w, keep_dc=False).tolist() == pytest.approx([1])


@pytest.mark.parametrize("keep_dc", [True, False])
def test_neurons_agree_with_the_definition_in_any_order(keep_dc: bool) -> None:
    u, v, w = gaussian(3, 6, 11)
    found = ipr(u, v, w, keep_dc=keep_dc)
    for k in range(6):
        each = [ipr_by_definition(curve[k].tolist(), keep_dc=keep_dc) for curve in (u, v, w)]
        assert found[k].item() == pytest.approx(sum(each) / 3, rel=1e-9)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(ipr(u[order], v[order], w[order], keep_dc=keep_dc), found[order])
    assert torch.equal(ipr(v, u, w, keep_dc=keep_dc), found)


def test_dead_neurons_have_no_ipr() -> None:
    u, v, w = gaussian(3, 5, 11)
    w[0] *= 1e-5  # nothing comes out
    u[1] *= 1e-5
    v[1] *= 1e-5  # nothing goes in
    u[2] *= 1e-5  # it still reads one operand
    u[3] = 0
    assert ipr(u, v, w).isnan().tolist() == [True, True, False, True, False]
    assert dead(torch.cat([u, v], 1), w).tolist() == [True, True, False, False, False]


def test_dead_is_a_norm_below_a_thousandth() -> None:
    alive = torch.ones(3, 2, 2)
    rows = torch.tensor([[0.0006, 0.0008], [0.0006, 0.00081], [0.0006, 0.00079]])  # norm 0.001 and a little around it
    assert dead(alive, rows).tolist()[1:] == [False, True]
    assert dead(rows, alive).tolist()[1:] == [False, True]
    assert fourier.DEAD == 1e-3


def test_the_frequency_of_three_curves_by_hand() -> None:
    p = 11
    loud, three, flat = 100 * wave(p, 2), wave(p, 3, phase=1.0), torch.zeros(p)
    mixed = wave(p, 4, amplitude=3) + wave(p, 5, amplitude=2.9)
    u = torch.stack([loud, three, flat, mixed, three + 50])
    v = torch.stack([three, three, flat, mixed, three])
    w = torch.stack([three, loud, wave(p, 5), wave(p, 5), three - 50])
    # each curve has one vote, divided as its power is; the mean has none, nor has a curve of zeros
    assert frequency(u, v, w).tolist() == [3, 3, 5, 5, 3]
    assert frequency(u, v, w).dtype == torch.int64


def test_the_frequency_is_found_in_noise_whatever_phase_and_scale() -> None:
    p = 59
    js = torch.arange(1, (p - 1) // 2 + 1)
    curves = [
        torch.stack([wave(p, int(j), phase=float(j + i), amplitude=10.0**i) for j in js])
        + 0.1 * 10**i * gaussian(len(js), p, seed=i)
        for i in range(3)
    ]
    assert torch.equal(frequency(*curves), js)


# --- the null ------------------------------------------------------------------------------------------------------


def test_white_noise_has_the_mean_that_was_measured() -> None:
    values = ipr(*gaussian(3, 20_000, 97))
    assert values.mean().item() == pytest.approx(0.0404, abs=0.002)
    assert values.quantile(0.99).item() == pytest.approx(0.050, abs=0.001)


@pytest.mark.parametrize(("length", "point"), [(97, 0.061), (67, 0.096), (59, 0.107), (31, 0.230), (23, 0.304)])
def test_the_null_has_the_quantiles_that_were_measured(length: int, point: float) -> None:
    assert null_quantile(length) == pytest.approx(point, rel=0.05)  # ten draws lie beyond it


def test_the_null_is_a_quantile_of_noise_with_and_without_the_mean() -> None:
    length, n = 23, 200_000
    for keep_dc in (True, False):
        noise = torch.stack([curve_ipr(gaussian(n, length, seed=i), keep_dc=keep_dc) for i in (1, 2, 3)]).mean(0)
        above = int((noise > null_quantile(length, keep_dc=keep_dc)).sum())
        assert 4 <= above <= 45  # 20 expected, of 200,000
    assert null_quantile(3, keep_dc=False) == pytest.approx(1, abs=1e-12)  # there is one frequency only
    assert 0.9 < null_quantile(3) < 0.9999


def test_the_null_is_the_same_on_every_call_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    fourier._null.cache_clear()
    first = null_quantile(23)
    fourier._null.cache_clear()
    assert null_quantile(23) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_low_is_below_a_tenth_or_the_null() -> None:
    assert low_below(97) == 0.1
    assert low_below(23) == null_quantile(23) > 0.1
    assert low_below(23, keep_dc=False) == null_quantile(23, keep_dc=False)


# --- the dominant frequency ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([1, 0, 0], [2 / 3, -1 / 3, -1 / 3]),  # with three points, all but the mean
        ([4, 1, -1, 0], [2.5, 0.5, -2.5, -0.5]),  # z₁ = 5 − i, z₂ = 2, so (5 cos + sin) / 2
        ([7, 7, 7, 7], [0, 0, 0, 0]),
        ([2, -2, 2, -2], [2, -2, 2, -2]),  # the highest frequency of an even length
    ],
)
def test_dominant_by_hand(curve: list[float], expected: list[float]) -> None:
    x = torch.tensor(curve, dtype=torch.float32)
    assert dominant(x).dtype == torch.float32
    assert dominant(x).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("length", LENGTHS)
def test_dominant_agrees_with_the_definition(length: int) -> None:
    curves = gaussian(2, 4, length, seed=length) + 2
    found = dominant(curves)
    for i in range(2):
        for k in range(4):
            z = coefficients(curves[i, k].tolist())
            j = max(range(1, len(z)), key=lambda j: abs(z[j]))
            share = (1 if 2 * j == length else 2) / length  # the highest of an even length has no twin
            angle = 2 * math.pi * j / length
            expected = [
                share * (z[j].real * math.cos(angle * m) - z[j].imag * math.sin(angle * m)) for m in range(length)
            ]
            assert found[i, k].tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("length", [58, 59])
def test_dominant_is_one_wave_that_is_kept_and_moves_with_the_curve(length: int) -> None:
    x = gaussian(5, length)
    once = dominant(x)
    torch.testing.assert_close(dominant(once), once)
    torch.testing.assert_close(curve_ipr(once), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(dominant(x.roll(3, dims=1)), once.roll(3, dims=1))
    torch.testing.assert_close(dominant(-2 * x + 9), -2 * once)
    rest = power(x - once, keep_dc=False)
    torch.testing.assert_close(rest.amin(1), torch.zeros(5, dtype=torch.float64))  # nothing of it is left
    torch.testing.assert_close(rest.sum(1) + power(once, keep_dc=False).sum(1), power(x, keep_dc=False).sum(1))


def test_nothing_is_written_into_what_is_given() -> None:
    curves = gaussian(3, 4, 11)
    before = curves.clone()
    ipr(*curves), dominant(curves), frequency(*curves), power(curves, keep_dc=False)
    assert torch.equal(curves, before)


def test_a_constant_has_no_ipr_once_its_mean_is_left_out() -> None:
    constant = torch.full((3, 97), 0.3)
    assert fourier.curve_ipr(constant, keep_dc=False).isnan().all()
    torch.testing.assert_close(fourier.curve_ipr(constant), torch.ones(3, dtype=torch.float64))
    tiny = constant.double() + 1e-9 * torch.cos(2 * torch.pi * 4 * torch.arange(97) / 97)  # a real wave counts
    assert fourier.curve_ipr(tiny, keep_dc=False).tolist() == pytest.approx([1, 1, 1], abs=1e-6)
