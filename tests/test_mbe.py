"""Matrix-based entropy: vectors by hand, the definition as a plain loop in numpy, invariances, planted truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from memdiag import mbe, spectrum
from memdiag.mbe import MEASURES, Moments, matrix_entropy, patch_entropy, split_patches, unit_measures

Array = NDArray[np.float64]
ALPHAS = (0.5, 1.0, 2.0, 3.0)
SHAPES = [(3, 7), (9, 4), (5, 5), (1, 6), (6, 1)]  # n < d, n > d, square, one row, one dimension
LN = math.log

# Z, then S_1, S_2, S_3 as exact expressions
VECTORS = {
    "T1": (np.eye(4), LN(4), LN(4), LN(4)),
    "T2": ([[1, 0]] * 3, 0, 0, 0),
    "T3": (np.diag([math.sqrt(3), 1]), LN(4) - 0.75 * LN(3), LN(8 / 5), LN(16 / 7) / 2),
    "T4": ([[1, 0], [0, 1], [1, 1]], LN(4) - 0.75 * LN(3), LN(8 / 5), LN(16 / 7) / 2),
    "T5": (np.diag([2, 1, 1]), 2 / 3 * LN(3 / 2) + LN(6) / 3, LN(2), LN(36 / 11) / 2),
    "T6": ([[1, 0], [1, 1]], 0.381264054, LN(9 / 7), LN(3 / 2) / 2),
    "T7": ([[1, 0], [0, 1], [1, 0], [1, 0]], LN(4) - 0.75 * LN(3), LN(8 / 5), LN(16 / 7) / 2),
}


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_definition(z: Any, alpha: float) -> float:
    """The formula as the paper writes it: eigenvalues of Z Zᵀ, normalised, a loop over them."""
    z = np.asarray(z, dtype=np.float64)
    eigenvalues = [max(float(x), 0.0) for x in np.linalg.eigvalsh(z @ z.T)]
    total = sum(eigenvalues)
    if total == 0:
        return math.nan
    p = [x / total for x in eigenvalues if x / total > 1e-14]
    if alpha == 1:
        return -sum(x * LN(x) for x in p)
    return LN(sum(x**alpha for x in p)) / (1 - alpha)


def all_by_definition(z: Any, alpha: float) -> dict[str, float]:
    """Every one of MEASURES of one unit, in loops over rows."""
    z = np.asarray(z, dtype=np.float64)
    n, d = z.shape
    norms = [math.sqrt(sum(x * x for x in row)) for row in z]
    unit = np.array([[x / norm if norm > 0 else 0.0 for x in row] for row, norm in zip(z, norms)])
    mean = np.array([sum(z[:, j]) / n for j in range(d)])
    centred = np.array([row - mean for row in z])
    is_constant = np.allclose(z, z[0], rtol=1e-9, atol=0)
    used = [i for i in range(n) if norms[i] > 0]
    cosines = [float(unit[i] @ unit[j]) for i in used for j in used if i != j]
    singular = np.linalg.svd(z, compute_uv=False)
    singular = [x for x in singular / max(singular.sum(), 1e-300) if x > 1e-9]
    return {
        "mbe": by_definition(z, alpha),
        "mbe_max": LN(min(n, d)),
        "mbe_centred": math.nan if is_constant else by_definition(centred, alpha),
        "mbe_row_normalised": by_definition(unit, alpha),
        "rankme": math.exp(-sum(x * LN(x) for x in singular)) if singular else math.nan,
        "effective_rank": math.exp(by_definition(z, 1.0)),
        "participation_ratio": math.exp(by_definition(z, 2.0)),
        "mean_cosine": sum(cosines) / len(cosines) if cosines else math.nan,
    }


def named(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(MEASURES, np.asarray(values, dtype=np.float64).tolist(), strict=True))


def approx(values: Any, *, rel: float = 1e-9, abs: float = 1e-11) -> Any:
    return pytest.approx(values, rel=rel, abs=abs, nan_ok=True)


# --- matrix_entropy: by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1, 2, 3])
@pytest.mark.parametrize("name", VECTORS)
def test_vectors_by_hand(name: str, alpha: int) -> None:
    z, *expected = VECTORS[name]
    digits = 1e-9 if (name, alpha) == ("T6", 1) else 1e-12  # that one is known to nine digits only
    assert matrix_entropy(torch.tensor(np.asarray(z), dtype=torch.float64), alpha=alpha).item() == pytest.approx(
        expected[alpha - 1], abs=digits
    )
    assert matrix_entropy(torch.tensor(np.asarray(z), dtype=torch.float32), alpha=alpha).item() == pytest.approx(
        expected[alpha - 1], abs=1e-6
    )


def test_t6_from_its_own_spectrum() -> None:
    p = [(3 + math.sqrt(5)) / 6, (3 - math.sqrt(5)) / 6]
    z = torch.tensor([[1, 0], [1, 1]], dtype=torch.float64)
    assert matrix_entropy(z, alpha=1).item() == pytest.approx(-sum(x * LN(x) for x in p), abs=1e-12)


def test_a_batch_of_matrices_is_a_batch_of_entropies() -> None:
    z = gaussian(2, 3, 5, 4)
    for alpha in (1.0, 2.0):
        found = matrix_entropy(z, alpha=alpha)
        assert found.shape == (2, 3)
        for i in range(2):
            for j in range(3):
                assert found[i, j].item() == pytest.approx(by_definition(z[i, j], alpha), abs=1e-12)


# --- matrix_entropy: against the definition ------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_definition(shape: tuple[int, int], alpha: float) -> None:
    for seed in range(3):
        z = gaussian(*shape, seed=seed)
        expected = by_definition(z, alpha)
        assert matrix_entropy(z, alpha=alpha).item() == pytest.approx(expected, abs=1e-10)
        assert matrix_entropy(z.float(), alpha=alpha).item() == pytest.approx(expected, abs=2e-6)


@given(
    n=st.integers(1, 8),
    d=st.integers(1, 8),
    alpha=st.floats(0.3, 5.0),
    rank=st.integers(1, 8),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_agrees_with_the_definition_for_any_rank_and_alpha(n: int, d: int, alpha: float, rank: int, seed: int) -> None:
    z = gaussian(n, rank, seed=seed) @ gaussian(rank, d, seed=seed + 1)
    found = matrix_entropy(z, alpha=alpha).item()
    assert found == pytest.approx(by_definition(z, alpha), abs=1e-6)
    assert -1e-9 <= found <= LN(min(n, d, rank)) + 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_half_precision_input_is_computed_in_float32_or_better(dtype: torch.dtype, alpha: float) -> None:
    z = (5 * gaussian(64, 48) + 3).to(dtype)
    found = matrix_entropy(z, alpha=alpha)
    assert found.dtype in (torch.float32, torch.float64)
    assert torch.equal(found, matrix_entropy(z.float(), alpha=alpha))  # the values were rounded, nothing else
    assert found.item() == pytest.approx(by_definition(z.double(), alpha), abs=2e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_small_orders_do_not_count_rounding_as_directions(alpha: float) -> None:
    z = (gaussian(64, 2) @ gaussian(2, 48, seed=1)).float()  # two directions, in float32
    found = matrix_entropy(z, alpha=alpha).item()
    assert found == pytest.approx(by_definition(gaussian(64, 2) @ gaussian(2, 48, seed=1), alpha), abs=1e-4)
    assert found < LN(2)


def test_float32_is_not_half_precision_and_float64_stays() -> None:
    assert matrix_entropy(gaussian(8, 4, dtype=torch.float32)).dtype == torch.float32
    assert matrix_entropy(gaussian(8, 4)).dtype == torch.float64


# --- matrix_entropy: invariances -----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("factor", [1e6, 1e-6, -1e30, 1e-30])
def test_scale_does_not_matter_even_in_float32(factor: float, alpha: float) -> None:
    z = gaussian(8, 16, dtype=torch.float32)
    assert matrix_entropy(z * factor, alpha=alpha).item() == pytest.approx(
        matrix_entropy(z, alpha=alpha).item(), abs=2e-6
    )


def test_a_tiny_identity_has_the_entropy_of_an_identity() -> None:
    for factor in (1e-3, 1e-2, 1.0, 100.0):  # an absolute epsilon gives 0 for the first two
        assert matrix_entropy(factor * torch.eye(4)).item() == pytest.approx(LN(4), abs=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_order_of_rows_rotation_and_transposition_do_not_matter(alpha: float) -> None:
    z = gaussian(6, 4)
    left, _ = torch.linalg.qr(gaussian(6, 6, seed=1))
    right, _ = torch.linalg.qr(gaussian(4, 4, seed=2))
    expected = matrix_entropy(z, alpha=alpha).item()
    for same in (z[torch.randperm(6, generator=torch.Generator().manual_seed(3))], left @ z, z @ right, z.mT):
        assert matrix_entropy(same, alpha=alpha).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_rows_of_zeros_do_not_count(alpha: float) -> None:
    z = gaussian(6, 4)
    padded = torch.cat([z, torch.zeros(5, 4, dtype=z.dtype)])
    assert matrix_entropy(padded, alpha=alpha).item() == pytest.approx(matrix_entropy(z, alpha=alpha).item(), abs=1e-12)


def test_never_rises_with_alpha() -> None:
    z = gaussian(50, 6, 5)
    entropies = torch.stack([matrix_entropy(z, alpha=alpha) for alpha in (0.25, 0.5, 1, 1.5, 2, 3, 8)])
    assert (entropies.diff(dim=0) <= 1e-12).all()
    assert (entropies >= 0).all()
    assert (entropies <= LN(5) + 1e-12).all()


def test_a_common_offset_matters() -> None:
    z = gaussian(8, 64)
    assert matrix_entropy(z + 4).item() < matrix_entropy(z).item() / 5


# --- matrix_entropy: gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4)])
def test_gradient_is_the_analytic_one(shape: tuple[int, int]) -> None:
    z = gaussian(*shape).requires_grad_()
    (found,) = torch.autograd.grad(matrix_entropy(z), z)
    with torch.no_grad():
        gram = z @ z.mT
        expected = 4 * (z / gram.trace() - gram @ z / gram.square().sum())
    assert (found - expected).abs().max() < 1e-10
    assert abs((z * found).sum().item()) < 1e-10  # along Z itself: scale does not matter


@pytest.mark.parametrize("z", [np.eye(4), np.array([[1.0, 0.0]] * 3)])
def test_gradient_is_zero_at_the_flat_spectrum_and_at_rank_one(z: Array) -> None:
    leaf = torch.tensor(z, requires_grad=True)
    (found,) = torch.autograd.grad(matrix_entropy(leaf), leaf)
    assert found.abs().max() < 1e-12


@pytest.mark.parametrize("factor", [1.0, 1e25, 1e-25])
def test_an_all_zero_patch_does_not_poison_the_others_gradient(factor: float) -> None:
    whole = factor * gaussian(3, 8, 5, dtype=torch.float32)
    whole[1] = 0
    leaf = whole.requires_grad_()
    entropy = matrix_entropy(leaf)
    assert entropy.isnan().tolist() == [False, True, False]
    (found,) = torch.autograd.grad(entropy.nansum(), leaf)
    assert found.isfinite().all()
    assert (found[1] == 0).all()
    alone = whole[0].detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(matrix_entropy(alone), alone)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-5 / factor)


def test_descending_the_gradient_compresses() -> None:
    z = gaussian(8, 16).requires_grad_()
    before = matrix_entropy(z)
    (gradient,) = torch.autograd.grad(before, z)
    assert matrix_entropy(z - 0.1 * gradient) < before


# --- matrix_entropy: undefined and refused -------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_zero_and_not_finite_are_undefined_and_touch_nobody_else(bad: float, alpha: float) -> None:
    z = gaussian(4, 5, 3, dtype=torch.float32)
    expected = matrix_entropy(z, alpha=alpha)
    z[1] = 0
    z[2, 0, 0] = bad
    found = matrix_entropy(z, alpha=alpha)
    assert found.isnan().tolist() == [False, True, True, False]
    assert found[[0, 3]].tolist() == pytest.approx(expected[[0, 3]].tolist(), abs=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4), (0, 3, 4)])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_no_rows_are_undefined(shape: tuple[int, ...], alpha: float) -> None:
    found = matrix_entropy(torch.zeros(shape), alpha=alpha)
    assert found.shape == shape[:-2]
    assert found.isnan().all()


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_alpha_must_be_a_number_above_zero(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        matrix_entropy(torch.eye(2), alpha=alpha)


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(\.\.\., n, d\)"):
        matrix_entropy(torch.ones(3))


# --- patches -------------------------------------------------------------------------------------------------------

E1, E2 = [1.0, 0.0], [0.0, 1.0]


@pytest.mark.parametrize(
    ("rows", "patch_size", "expected"),
    [
        ([E1, E2, E1, E1], 2, [LN(2), 0]),  # T7
        ([E1, E2, E1, E1], 4, [LN(8 / 5)]),
        ([E1, E2, E1, E1], 1, [0, 0, 0, 0]),
        ([E1, E1, E2, E2], 2, [0, 0]),
        ([E1, E2, E1, E2], 2, [LN(2), LN(2)]),  # the same rows in another order
        ([E1, E1, E2, E2], 4, [LN(2)]),
        ([E1, E2, E1, E2], 4, [LN(2)]),
        ([E1, E2, E1], 2, [LN(2)]),  # the tail does not fill a patch
        ([E1], 2, []),
    ],
)
def test_patches_by_hand(rows: list[list[float]], patch_size: int, expected: list[float]) -> None:
    hidden = torch.tensor([rows])
    found = patch_entropy(hidden, torch.ones(1, len(rows), dtype=torch.bool), patch_size=patch_size)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_mean_over_the_patches_of_t7() -> None:
    hidden = torch.tensor([[E1, E2, E1, E1]], dtype=torch.float64)
    found = patch_entropy(hidden, torch.ones(1, 4, dtype=torch.bool), patch_size=2)
    assert found.mean().item() == pytest.approx(0.346573590, abs=1e-9)


@pytest.mark.parametrize("patch_size", [1, 2, 3, 8])
def test_patches_agree_with_a_loop_and_never_touch_padding(patch_size: int) -> None:
    lengths = [17, 0, 8, 3, 24, 1]
    hidden = gaussian(len(lengths), 24, 5)
    mask = torch.arange(24) < torch.tensor(lengths)[:, None]
    expected, origin = [], []
    for i, length in enumerate(lengths):
        for start in range(0, length - patch_size + 1, patch_size):
            expected.append(by_definition(hidden[i, start : start + patch_size], 2.0))
            origin.append(i)
    poisoned = hidden.masked_fill(~mask[..., None], math.nan)
    assert patch_entropy(poisoned, mask, patch_size=patch_size).tolist() == pytest.approx(expected, abs=1e-10)
    patches, of_example = split_patches(poisoned, mask, patch_size)
    assert of_example.tolist() == origin
    assert patches.shape == (len(origin), patch_size, 5)
    assert not patches.isnan().any()


@pytest.mark.parametrize("extra", [1, 7, 8, 40])
def test_more_padding_changes_no_patch(extra: int) -> None:
    hidden = gaussian(2, 16, 5)
    mask = torch.arange(16) < torch.tensor([[16], [9]])
    wider = torch.cat([hidden, torch.full((2, extra, 5), math.nan, dtype=hidden.dtype)], 1)
    wider_mask = torch.cat([mask, torch.zeros(2, extra, dtype=torch.bool)], 1)
    assert torch.equal(patch_entropy(wider, wider_mask), patch_entropy(hidden, mask))


def test_gradient_of_patches_is_zero_at_padding_and_tails() -> None:
    hidden = gaussian(2, 20, 5).requires_grad_()
    mask = torch.arange(20) < torch.tensor([[20], [11]])
    (found,) = torch.autograd.grad(patch_entropy(hidden, mask).mean(), hidden)
    used = torch.zeros(2, 20, dtype=torch.bool)
    used[0, :16] = used[1, :8] = True
    assert torch.equal(found.abs().sum(-1) > 0, used)


def test_a_batch_shorter_than_a_patch_has_no_patches() -> None:
    hidden, mask = gaussian(3, 5, 4), torch.ones(3, 5, dtype=torch.bool)
    assert patch_entropy(hidden, mask).shape == (0,)
    patches, of_example = split_patches(hidden, mask, 8)
    assert patches.shape == (0, 8, 4)
    assert of_example.shape == (0,)
    none = unit_measures(patches, torch.full((0,), 8), alpha=2.0, spectra=True)
    assert none.shape == (0, len(MEASURES))


# --- unit_measures -------------------------------------------------------------------------------------------------


def test_the_names_are_those_of_the_report() -> None:
    from memdiag.entropy_report import EntropyRow
    from memdiag.tables import schema_of

    assert set(MEASURES) <= set(schema_of(EntropyRow).names)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_measure_agrees_with_its_loop(shape: tuple[int, int], dtype: torch.dtype, alpha: float) -> None:
    n, d = shape
    z = (gaussian(4, n, d) + 0.3).to(dtype)
    found = unit_measures(z, torch.full((4,), n), alpha=alpha, spectra=True)
    for row, values in zip(z.double(), found):
        assert named(values) == approx(all_by_definition(row, alpha), abs=1e-8)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("d", [4, 9])  # units are longer than wide, and not
def test_ragged_units_ignore_what_lies_past_their_end(d: int, poison: float, alpha: float) -> None:
    lengths = torch.tensor([6, 1, 4, 2, 3])
    z = gaussian(5, 6, d, dtype=torch.float32) + 0.3
    for i, length in enumerate(lengths.tolist()):
        z[i, length:] = poison
    found = unit_measures(z, lengths, alpha=alpha, spectra=True)
    for i, length in enumerate(lengths.tolist()):
        assert named(found[i]) == approx(all_by_definition(z[i, :length], alpha), abs=1e-8)


def test_one_row_has_no_spread_and_no_pair() -> None:
    z = gaussian(50, 1, 16)  # fifty, because ‖h‖²/‖h‖² is not always exactly 1
    for values in unit_measures(z, torch.ones(50, dtype=torch.int64), alpha=2.0, spectra=True):
        found = named(values)
        assert found["mbe"] == pytest.approx(0, abs=1e-12)
        assert found["mbe_max"] == 0
        assert math.isnan(found["mbe_centred"])
        assert math.isnan(found["mean_cosine"])
        assert found["rankme"] == pytest.approx(1)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("d", [2, 4])
def test_a_unit_without_rows_or_of_zeros_is_undefined(d: int, alpha: float) -> None:
    z = torch.zeros(2, 3, d)
    z[0] = 1
    none, zeros = unit_measures(z, torch.tensor([0, 3]), alpha=alpha, spectra=True)
    assert np.isnan(none).all()
    found = named(zeros)
    assert found.pop("mbe_max") == LN(min(3, d))
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("d", [2, 3])
def test_zero_rows_have_no_cosine(d: int) -> None:
    z = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]])[..., :d]
    found = named(unit_measures(z, torch.tensor([3]), alpha=2.0, spectra=False)[0])
    assert found["mean_cosine"] == pytest.approx(math.sqrt(0.5))
    one = torch.tensor([[[1.0, 0.3], [0.0, 0.0]]])
    assert math.isnan(named(unit_measures(one, torch.tensor([2]), alpha=2.0, spectra=False)[0])["mean_cosine"])


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("d", [3, 16])
def test_equal_rows_have_no_centred_entropy(d: int, dtype: torch.dtype, alpha: float) -> None:
    z = (1000 * gaussian(20, 1, d)).to(dtype).expand(20, 8, d)
    found = unit_measures(z, torch.full((20,), 8), alpha=alpha, spectra=True)
    assert np.isnan(found[:, MEASURES.index("mbe_centred")]).all()
    assert found[:, 0] == pytest.approx(0, abs=1e-12)
    assert found[:, MEASURES.index("mean_cosine")] == pytest.approx(1)


def test_without_spectra_the_same_but_for_what_needs_eigenvalues() -> None:
    z = gaussian(3, 6, 4)
    full, fast = (unit_measures(z, torch.full((3,), 6), alpha=2.0, spectra=spectra) for spectra in (True, False))
    costly = [MEASURES.index("rankme"), MEASURES.index("effective_rank")]
    rest = [i for i in range(len(MEASURES)) if i not in costly]
    assert np.isnan(fast[:, costly]).all()
    assert (fast[:, rest] == full[:, rest]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("d", [2, 4])
def test_a_row_that_counts_must_be_finite(d: int, bad: float) -> None:
    z = gaussian(2, 3, d)
    z[1, 1, 1] = bad
    with pytest.raises(ValueError, match="NaN or an infinity"):
        unit_measures(z, torch.tensor([3, 2]), alpha=2.0, spectra=False)
    assert np.isfinite(unit_measures(z, torch.tensor([3, 1]), alpha=2.0, spectra=False)[:, 0]).all()


@pytest.mark.parametrize("offset", [1e2, 1e3])
@pytest.mark.parametrize("n", [8, 40])
def test_a_common_offset_far_above_the_spread_leaves_the_centred_entropy_right(n: int, offset: float) -> None:
    z = (gaussian(n, 16) + offset).float()
    found = named(unit_measures(z[None], torch.tensor([n]), alpha=2.0, spectra=False)[0])
    exact = z.double() - z.double().mean(0)
    assert found["mbe_centred"] == pytest.approx(by_definition(exact, 2.0), abs=1e-6)


def test_unit_measures_and_patch_entropy_are_the_same_number() -> None:
    hidden, mask = gaussian(3, 20, 6, dtype=torch.float32), torch.arange(20) < torch.tensor([[20], [9], [16]])
    patches, _ = split_patches(hidden, mask, 8)
    found = unit_measures(patches, torch.full((len(patches),), 8), alpha=2.0, spectra=False)
    assert patch_entropy(hidden, mask).tolist() == pytest.approx(found[:, 0].tolist(), abs=1e-6)


# --- what a low value does not mean --------------------------------------------------------------------------------


def gaussian_patches() -> Tensor:
    return gaussian(2000, 8, 64, seed=1)


def means_of(patches: Tensor) -> dict[str, float]:
    lengths = torch.full((len(patches),), patches.shape[1])
    return named(unit_measures(patches, lengths, alpha=2.0, spectra=False).mean(0))


def test_trap_of_the_common_offset() -> None:
    z = gaussian_patches()
    found = [means_of(z + c) for c in (0, 0.5, 1, 2, 4)]
    assert [f["mbe"] for f in found] == pytest.approx([1.95, 1.74, 1.04, 0.37, 0.10], abs=0.01)
    assert [f["mbe_centred"] for f in found] == pytest.approx([found[0]["mbe_centred"]] * 5, abs=1e-9)  # undone
    assert found[0]["mbe_centred"] > 1.8


def test_trap_of_one_large_norm_token() -> None:
    found = []
    for factor in (1, 2, 5, 10, 30):
        z = gaussian_patches()
        z[:, 3] *= factor
        found.append(means_of(z))
    assert [f["mbe"] for f in found] == pytest.approx([1.95, 1.59, 0.49, 0.14, 0.016], abs=0.015)
    assert [f["mbe_row_normalised"] for f in found] == pytest.approx([found[0]["mbe_row_normalised"]] * 5, abs=1e-9)
    assert found[0]["mbe_row_normalised"] > 1.9


def test_trap_of_token_order() -> None:
    basis = torch.eye(64, dtype=torch.float64)[:8]
    sorted_tokens = basis.repeat_interleave(8, 0)[None]  # eight of each, one after the other
    mixed = basis.repeat(8, 1)[None]
    mask = torch.ones(1, 64, dtype=torch.bool)
    assert patch_entropy(sorted_tokens, mask).mean().item() == pytest.approx(0, abs=1e-12)
    assert patch_entropy(mixed, mask).mean().item() == pytest.approx(LN(8))
    assert matrix_entropy(sorted_tokens).item() == pytest.approx(matrix_entropy(mixed).item(), abs=1e-12)


# --- Moments -------------------------------------------------------------------------------------------------------

ROUTES = [(3, 7), (7, 7), (8, 7), (60, 7), (1, 7), (1, 1), (5, 1), (2, 7)]


def filled(*pieces: Array) -> Moments:
    moments = Moments()
    for piece in pieces:
        moments.add(piece)
    return moments


def covariance_spectrum(rows: Array) -> Array:
    centred = rows - rows.mean(0)
    return np.sort(np.linalg.eigvalsh(centred.T @ centred / len(rows)))[::-1]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shape", ROUTES)
def test_moments_agree_with_the_loop_on_both_routes(shape: tuple[int, int], alpha: float) -> None:
    rows = gaussian(*shape).numpy() + 0.3
    measures, spread = filled(rows).measures(alpha=alpha)
    assert named(measures) == approx(all_by_definition(rows, alpha), abs=1e-8)
    if shape[0] == 1:
        assert np.isnan(spread).all()
    else:
        assert spread.tolist() == pytest.approx(covariance_spectrum(rows).tolist(), abs=1e-12)
    assert spread.shape == (shape[1],)


@pytest.mark.parametrize("shape", ROUTES)
def test_moments_of_pieces_in_any_order_and_merged_are_those_of_the_whole(shape: tuple[int, int]) -> None:
    rows = gaussian(*shape).numpy() + 0.3
    expected, spread = filled(rows).measures(alpha=2.0)
    shuffled = rows[np.random.default_rng(0).permutation(len(rows))]
    one_by_one = filled(*(row[None] for row in shuffled))
    for cut in range(len(rows) + 1):
        parts = [filled(rows[:cut]), filled(rows[cut:])]
        for a, b in (parts, parts[::-1]):
            joined = Moments()
            joined.merge(a)
            joined.merge(b)
            assert joined.n == len(rows)
            values, spread_joined = joined.measures(alpha=2.0)
            assert named(values) == approx(named(expected))
            assert spread_joined.tolist() == approx(spread.tolist())
            joined.merge(Moments())
            assert named(joined.measures(alpha=2.0)[0]) == approx(named(expected))
    assert named(one_by_one.measures(alpha=2.0)[0]) == approx(named(expected))


def test_merging_and_adding_can_alternate() -> None:
    rows = gaussian(45, 5).numpy()
    joined = filled(rows[:12])
    for start in (12, 20, 35):
        joined.merge(filled(rows[start : start + 6]))  # more than 5: both sides are folded
        joined.add(rows[start + 6 : start + 8])
        joined.merge(filled(rows[start + 8 : start + 10]))
    seen = np.concatenate([rows[:22], rows[20:30], rows[35:45]])
    assert joined.n == len(seen) == 42
    assert named(joined.measures(alpha=2.0)[0]) == approx(named(filled(seen).measures(alpha=2.0)[0]))


def test_merging_leaves_the_other_as_it_was() -> None:
    rows = gaussian(40, 5).numpy()
    other = filled(rows[:20])
    before = other.measures(alpha=2.0)[0]
    joined = Moments()
    joined.merge(other)
    joined.add(rows[20:])
    assert named(other.measures(alpha=2.0)[0]) == approx(named(before), rel=0, abs=0)
    assert named(joined.measures(alpha=2.0)[0]) == approx(named(filled(rows).measures(alpha=2.0)[0]))


def test_no_vectors_have_no_measures() -> None:
    measures, spread = Moments().measures(alpha=2.0)
    assert np.isnan(measures).all()
    assert spread.shape == (0,)
    empty = Moments()
    empty.add(np.zeros((0, 4)))
    assert np.isnan(empty.measures(alpha=2.0)[0]).all()
    assert empty.n == 0


@pytest.mark.parametrize("n", [3, 30])
def test_vectors_must_be_finite(n: int) -> None:
    rows = gaussian(n, 5).numpy()
    rows[1, 1] = math.nan
    with pytest.raises(ValueError, match="NaN or an infinity"):
        Moments().add(rows)


@pytest.mark.parametrize("d", [7, 64])
@pytest.mark.parametrize("n", [3, 5, 7, 20, 100])
def test_equal_vectors_have_no_spread(n: int, d: int) -> None:
    rows = np.tile(1000 * gaussian(1, d, seed=2).numpy() / 3, (n, 1))
    measures, spread = filled(rows).measures(alpha=2.0)
    assert math.isnan(named(measures)["mbe_centred"])
    assert (spread == 0).all()
    assert math.isnan(spectrum.isotropy(spread))
    assert math.isnan(spectrum.alpha_req(spread)[0])


def test_memory_does_not_grow_with_the_number_of_vectors() -> None:
    moments = filled(*(gaussian(50, 6, seed=i).numpy() for i in range(20)))
    assert moments.n == 1000
    assert len(moments._rows) == 0
    assert moments._sums is not None
    assert sum(part.size for part in moments._sums) == 2 * 6 * 6 + 2 * 6 + 1


@pytest.mark.parametrize(("n", "d"), [(32, 256), (300, 64)])
def test_rank_one_data_is_seen_as_such(n: int, d: int) -> None:
    rows = np.outer(gaussian(n, seed=1).numpy(), gaussian(d, seed=2).numpy())
    found = named(filled(rows).measures(alpha=1.0)[0])
    assert found["mbe"] < 0.01
    assert found["mbe_centred"] < 0.01


@pytest.mark.parametrize("n", [4, 8])
def test_isotropic_data_nearly_reaches_the_most_it_can(n: int) -> None:
    found = named(filled(gaussian(n, 1024, seed=3).numpy()).measures(alpha=1.0)[0])
    assert found["mbe_centred"] >= 0.99 * LN(n - 1)
    assert found["mbe_max"] == LN(n)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_a_planted_power_law_comes_back_through_the_covariance(exponent: float) -> None:
    n, d = 600, 128
    basis, _ = np.linalg.qr(gaussian(n, d + 1).numpy() - gaussian(n, d + 1).numpy().mean(0))
    scores = basis[:, :d] - basis[:, :d].mean(0)
    scores, _ = np.linalg.qr(scores)  # orthonormal columns of mean zero
    rotation, _ = np.linalg.qr(gaussian(d, d, seed=5).numpy())
    rows = scores * np.arange(1, d + 1) ** (-exponent / 2) @ rotation + 7.0
    _, spread = filled(*np.array_split(rows, 5)).measures(alpha=2.0)
    slope, r2 = spectrum.alpha_req(spread)
    assert slope == pytest.approx(exponent, abs=1e-6)
    assert r2 == pytest.approx(1, abs=1e-9)


def test_isotropy_of_a_ball_and_of_a_line() -> None:
    ball = filled(gaussian(20_000, 8).numpy()).measures(alpha=2.0)[1]
    assert spectrum.isotropy(ball) > 0.999
    line = filled(np.outer(gaussian(100, seed=1).numpy(), np.ones(8))).measures(alpha=2.0)[1]
    assert spectrum.isotropy(line) == pytest.approx(0, abs=1e-9)


def test_constant_is_far_above_rounding_and_far_below_a_spread() -> None:
    assert np.finfo(np.float32).eps ** 2 < mbe.CONSTANT < 1e-9
