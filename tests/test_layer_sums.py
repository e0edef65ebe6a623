"""From hidden states to rows: means and their standard errors by hand, by a loop, and by planted truth."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from memdiag import mbe, tables
from memdiag.checkpoint import open_checkpoints
from memdiag.entropy_report import EntropyOptions, EntropyRow
from memdiag.layer_sums import LayerSums, Sums, UnitSums, observe_layer, rows_of

Array = NDArray[np.float64]
Same = Callable[..., None]
K = len(mbe.MEASURES)


def measures_of(values: list[float] | Array) -> Array:
    """(u, k): the first measure as given, the others its multiples."""
    return np.asarray(values, dtype=np.float64)[:, None] * np.arange(1, K + 1)


def unit_sums(values: Any, examples: Any) -> UnitSums:
    sums = UnitSums()
    sums.add(measures_of(values), np.asarray(examples, dtype=np.int64), n_tokens=len(values))
    return sums


def se_by_loop(values: Any, examples: Any) -> float:
    """The cluster-robust formula as it is written, example by example."""
    kept = [(x, i) for x, i in zip(values, examples) if not math.isnan(x)]
    ids = sorted({i for _, i in kept})
    m, n = len(ids), len(kept)
    if m < 2:
        return math.nan
    mean = sum(x for x, _ in kept) / n
    total = 0.0
    for i in ids:
        own = [x for x, j in kept if j == i]
        total += (sum(own) - mean * len(own)) ** 2
    return math.sqrt(m / (m - 1) * total) / n


# --- UnitSums ------------------------------------------------------------------------------------------------------


def test_mean_and_standard_error_by_hand() -> None:
    sums = unit_sums([1.0, 3.0, 5.0], [0, 0, 1])
    assert sums.means().tolist() == [3.0 * k for k in range(1, K + 1)]
    se, half = sums.standard_error()
    # s = (4, 5), n = (2, 1): residuals 4 - 2·3 = -2 and 5 - 3 = 2; se² = 2/1 · (4 + 4) / 3²
    assert se == pytest.approx(4 / 3)
    assert half == pytest.approx(4 / 3 * math.tan(0.475 * math.pi))  # t with one degree of freedom is Cauchy


def test_one_unit_an_example_is_the_textbook_standard_error() -> None:
    values = np.random.default_rng(0).normal(2, 0.3, 25)
    se, half = unit_sums(values, range(25)).standard_error()
    assert se == pytest.approx(values.std(ddof=1) / 5)
    lower, upper = stats.t.interval(0.95, 24, values.mean(), values.std(ddof=1) / 5)
    assert (values.mean() - half, values.mean() + half) == (pytest.approx(lower), pytest.approx(upper))


@pytest.mark.parametrize("seed", range(5))
def test_standard_error_agrees_with_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, examples = rng.normal(1, 0.5, 60), rng.integers(0, 9, 60)
    values[rng.random(60) < 0.2] = math.nan
    assert unit_sums(values, examples).standard_error()[0] == pytest.approx(se_by_loop(values, examples))


def test_equal_copies_of_a_patch_tell_nothing_new() -> None:
    values = np.random.default_rng(1).normal(1, 0.5, 12)
    once = unit_sums(values, range(12)).standard_error()[0]
    copied = unit_sums(np.repeat(values, 9), np.repeat(range(12), 9)).standard_error()[0]
    assert copied == pytest.approx(once)


def simulated(rng: np.random.Generator) -> tuple[Array, NDArray[np.int64]]:
    """Patches of 25 examples, 1 to 12 of them each, that share their example's own deviation; the mean is 1."""
    n = rng.integers(1, 13, 25)
    examples = np.repeat(np.arange(25), n)
    return 1 + rng.normal(0, 0.2, 25)[examples] + rng.normal(0, 0.15, len(examples)), examples


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, covered, naive = np.random.default_rng(7), 0, 0
    replications = 2000
    for _ in range(replications):
        values, examples = simulated(rng)
        sums = unit_sums(values, examples)
        covered += abs(sums.means()[0] - 1) <= sums.standard_error()[1]
        naive += abs(values.mean() - 1) <= 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert 0.92 <= covered / replications <= 0.98
    assert naive / replications < 0.75  # patches taken for independent: the control, which must fail


def test_undefined_units_count_but_carry_no_weight() -> None:
    with_gaps = unit_sums([1.0, math.nan, 3.0, math.nan, 5.0], [0, 0, 0, 1, 2])
    without = unit_sums([1.0, 3.0, 5.0], [0, 0, 2])
    assert with_gaps.means().tolist() == without.means().tolist()
    assert with_gaps.standard_error() == without.standard_error()
    assert with_gaps.n_units == 5


def test_a_measure_may_be_undefined_where_another_is_not() -> None:
    measures = measures_of([1.0, 3.0])
    measures[0, 2] = math.nan
    sums = UnitSums()
    sums.add(measures, np.array([0, 1]), 16)
    assert sums.means()[:4].tolist() == [2.0, 4.0, 9.0, 8.0]


@pytest.mark.parametrize(("values", "examples"), [([1.0, 2.0], [3, 3]), ([1.0], [0]), ([1.0, math.nan], [0, 1])])
def test_one_example_has_no_standard_error(values: list[float], examples: list[int]) -> None:
    se, half = unit_sums(values, examples).standard_error()
    assert math.isnan(se)
    assert math.isnan(half)


def test_nothing_seen_is_undefined_not_zero() -> None:
    for sums in (UnitSums(), unit_sums([math.nan], [0]), unit_sums(np.zeros(0), [])):
        assert np.isnan(sums.means()).all()
        assert all(math.isnan(x) for x in sums.standard_error())


def test_merging_is_seeing_all_at_once() -> None:
    rng = np.random.default_rng(3)
    values, examples = simulated(rng)
    values[::7] = math.nan
    whole = unit_sums(values, examples)
    joined = UnitSums()
    for group in ([0, 1, 2], list(range(3, 20)), list(range(20, 25)), []):
        here = np.isin(examples, group)
        joined.merge(unit_sums(values[here], examples[here]))  # an example is never split
    assert joined.means() == pytest.approx(whole.means())
    assert joined.standard_error() == pytest.approx(whole.standard_error())
    assert (joined.n_units, joined.n_tokens) == (whole.n_units, whole.n_tokens)


# --- observe_layer and rows ----------------------------------------------------------------------------------------


def batch(lengths: list[int], d: int, *, width: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(b, t, d) with NaN under the padding, and the mask."""
    t = width or max(lengths)
    hidden = torch.randn(len(lengths), t, d, generator=torch.Generator().manual_seed(seed)) + 0.2
    mask = torch.arange(t) < torch.tensor(lengths)[:, None]
    return hidden.masked_fill(~mask[..., None], math.nan), mask


def rows(fixtures: Path, parts: list[LayerSums], options: EntropyOptions, **seen: Any) -> list[dict[str, Any]]:
    sums = Sums(parts, **({"n_examples": 1} | seen))
    layers = [(i, f"block {i}") for i in range(len(parts))]
    found = list(rows_of(sums, layers, open_checkpoints(fixtures / "tiny-gpt2")[0], options))
    tables.to_batch(EntropyRow, found)  # complete, and nothing infinite
    return found


def mean_over(values: list[float]) -> float:
    known = [x for x in values if not math.isnan(x)]
    return sum(known) / len(known) if known else math.nan


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("d", [5, 40])  # sequences longer and shorter than wide
def test_rows_agree_with_plain_loops(fixtures: Path, d: int, alpha: float) -> None:
    lengths, p = [17, 3, 9, 8, 1], 4
    hidden, mask = batch(lengths, d)
    options = EntropyOptions(unit="all", patch_size=p, alpha=alpha, spectra=True)
    found = {
        (row["unit"], row["pooling"]): row
        for row in rows(fixtures, [observe_layer(hidden, mask, options)], options, n_examples=5)
    }
    assert list(found) == [("patch", None), ("sequence", None), ("dataset", "mean"), ("dataset", "last")]
    z = [hidden[i, :n].double() for i, n in enumerate(lengths)]
    patches = [(i, x[s : s + p]) for i, x in enumerate(z) for s in range(0, len(x) - p + 1, p)]
    units = {
        ("patch", None): patches,
        ("sequence", None): list(enumerate(z)),
        ("dataset", "mean"): [(0, torch.stack([x.mean(0) for x in z]))],
        ("dataset", "last"): [(0, torch.stack([x[-1] for x in z]))],
    }
    for key, members in units.items():
        row, each = found[key], []
        for _, x in members:
            each.append(mbe.unit_measures(x[None], torch.tensor([len(x)]), alpha=alpha, spectra=True)[0])
        for k, name in enumerate(mbe.MEASURES):
            expected = mean_over([float(values[k]) for values in each])
            assert row[name] == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True), (key, name)
        assert row["n_units"] == len(members)
        assert row["n_undefined"] == 0
        assert row["n_dims"] == d
        if key[0] != "dataset":
            se = se_by_loop([float(values[0]) for values in each], [i for i, _ in members])
            assert row["mbe_se"] == pytest.approx(se, rel=1e-6)
            assert row["mbe_hi"] - row["mbe"] == pytest.approx(row["mbe"] - row["mbe_lo"])
            assert row["mbe_lo"] < row["mbe"] < row["mbe_hi"]
    counts = {key: (row["n_tokens"], row["n_tokens_dropped"]) for key, row in found.items()}
    assert counts[("patch", None)] == (16 + 8 + 8, 1 + 3 + 1 + 1)
    assert counts[("sequence", None)] == (38, 0)
    assert counts[("dataset", "mean")] == (38, 0)
    assert counts[("dataset", "last")] == (5, 33)


@pytest.mark.parametrize("spectra", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_rows_do_not_depend_on_the_width_of_the_batch(
    fixtures: Path, assert_same_rows: Same, alpha: float, spectra: bool
) -> None:
    lengths, d = [12, 3, 9, 1, 16], 6  # some longer than wide
    options = EntropyOptions(unit="all", patch_size=4, alpha=alpha, spectra=spectra)
    hidden, mask = batch(lengths, d)
    expected = rows(fixtures, [observe_layer(hidden, mask, options)], options)
    wide, wide_mask = torch.full((5, 40, d), math.nan), torch.zeros(5, 40, dtype=torch.bool)
    wide[:, :16], wide_mask[:, :16] = hidden, mask
    joined = LayerSums()
    for i, n in enumerate(lengths):  # one by one, each as narrow as it can be
        joined.merge(observe_layer(hidden[i : i + 1, :n], mask[i : i + 1, :n], options))
    for found in (observe_layer(wide, wide_mask, options), joined):
        assert_same_rows(rows(fixtures, [found], options), expected, rel=1e-9, abs=1e-9)


def test_order_of_examples_does_not_matter(fixtures: Path, assert_same_rows: Same) -> None:
    options = EntropyOptions(unit="all", patch_size=4)
    hidden, mask = batch([12, 3, 9, 1, 16], 6)
    order = torch.tensor([3, 0, 4, 2, 1])
    expected = rows(fixtures, [observe_layer(hidden, mask, options)], options)
    found = rows(fixtures, [observe_layer(hidden[order], mask[order], options)], options)
    assert_same_rows(found, expected, rel=1e-9, abs=1e-9)


def test_units_that_are_zero_are_left_out_and_counted(fixtures: Path) -> None:
    options = EntropyOptions(unit="all", patch_size=4)
    hidden, mask = batch([8, 8, 8], 6)
    hidden[1] = 0
    hidden[2, :4] = 0
    found = {row["unit"]: row for row in rows(fixtures, [observe_layer(hidden, mask, options)], options)}
    assert (found["patch"]["n_units"], found["patch"]["n_undefined"]) == (6, 3)
    assert (found["sequence"]["n_units"], found["sequence"]["n_undefined"]) == (3, 1)
    assert found["dataset"]["n_undefined"] == 0
    alone = observe_layer(hidden[[0]], mask[[0]], options)
    alone.patch.merge(observe_layer(hidden[[2], 4:], mask[[2], 4:], options).patch)
    assert found["patch"]["mbe"] == pytest.approx(alone.patch.means()[0])


def test_all_zero_hidden_states_are_null_not_an_error(fixtures: Path) -> None:
    options = EntropyOptions(unit="all", patch_size=2, spectra=True)
    seen = observe_layer(torch.zeros(3, 4, 6), torch.ones(3, 4, dtype=torch.bool), options)
    for row in rows(fixtures, [seen], options):
        assert row["n_undefined"] == row["n_units"]
        assert math.isnan(row["mbe"])
        assert math.isnan(row["participation_ratio"])
        assert row["isotropy"] is None or math.isnan(row["isotropy"])


def test_no_patch_is_filled(fixtures: Path) -> None:
    options = EntropyOptions(unit="patch", patch_size=8)
    hidden, mask = batch([5, 3], 6)
    (row,) = rows(fixtures, [observe_layer(hidden, mask, options)], options)
    assert (row["n_units"], row["n_tokens"], row["n_tokens_dropped"]) == (0, 0, 8)
    assert math.isnan(row["mbe"])


def test_one_token_an_example_has_one_pooling_and_no_cosine(fixtures: Path) -> None:
    options = EntropyOptions(unit="all", patch_size=1)
    hidden, mask = batch([1] * 30, 6)
    found = rows(fixtures, [observe_layer(hidden, mask, options)], options)
    assert [(row["unit"], row["pooling"]) for row in found] == [
        ("patch", None),
        ("sequence", None),
        ("dataset", "mean"),
    ]
    assert all(math.isnan(row["mean_cosine"]) for row in found[:2])
    assert np.isfinite(found[2]["mean_cosine"])


@pytest.mark.parametrize(("n", "limited"), [(11, True), (12, False), (40, False)])
def test_few_vectors_are_marked(fixtures: Path, n: int, limited: bool) -> None:
    options = EntropyOptions(unit="dataset")
    hidden, mask = batch([3] * n, 6)
    found = rows(fixtures, [observe_layer(hidden, mask, options)], options)
    assert [row["n_limited"] for row in found] == [limited] * 2


def test_only_the_units_asked_for(fixtures: Path) -> None:
    hidden, mask = batch([8, 8], 6)
    for unit, wanted in {"patch": ["patch"], "sequence": ["sequence"], "dataset": ["dataset"] * 2}.items():
        options = EntropyOptions(unit=unit)
        found = rows(fixtures, [observe_layer(hidden, mask, options)], options)
        assert [row["unit"] for row in found] == wanted


def test_the_dataset_unit_is_fed_before_anything_is_centred(fixtures: Path) -> None:
    """Every example has the same mean vector and its own spread: the data set has one direction, not many."""
    g = torch.Generator().manual_seed(0)
    spread = torch.randn(30, 8, 16, dtype=torch.float64, generator=g)
    hidden = spread - spread.mean(1, keepdim=True) + torch.randn(16, dtype=torch.float64, generator=g)
    options = EntropyOptions(unit="all")
    found = rows(fixtures, [observe_layer(hidden, torch.ones(30, 8, dtype=torch.bool), options)], options)
    row = next(row for row in found if row["pooling"] == "mean")
    assert row["mbe"] == pytest.approx(0, abs=1e-9)
    assert math.isnan(row["mbe_centred"])
    assert found[0]["mbe"] > 0.5


@pytest.mark.parametrize("unit", ["patch", "sequence", "dataset"])
def test_a_state_that_is_not_finite_is_an_error(unit: str) -> None:
    hidden, mask = batch([8, 8], 6)
    hidden[1, 2, 3] = math.inf
    with pytest.raises(ValueError, match="NaN or an infinity"):
        observe_layer(hidden, mask, EntropyOptions(unit=unit))


def test_cross_entropy_is_per_predicted_token(fixtures: Path) -> None:
    hidden, mask = batch([8, 8], 6)
    options = EntropyOptions(unit="patch")
    part = observe_layer(hidden, mask, options)
    total = Sums([part], n_examples=2, truncated=1, nll=10.0, n_predictions=4)
    total.merge(Sums([observe_layer(hidden, mask, options)], n_examples=2, nll=2.0, n_predictions=2))
    (row,) = rows_of(total, [(1, "block")], open_checkpoints(fixtures / "tiny-gpt2")[0], options)
    assert row["cross_entropy"] == 2.0
    assert (row["n_examples"], row["truncated"], row["n_units"]) == (4, 1, 4)
    (row,) = rows(fixtures, [part], options)
    assert row["cross_entropy"] is None


def test_a_process_that_saw_nothing_adds_nothing() -> None:
    hidden, mask = batch([8, 8], 6)
    options = EntropyOptions(unit="all")
    for order in (0, 1):
        total = Sums([])
        parts = [Sums([observe_layer(hidden, mask, options)], n_examples=2), Sums([])]
        for part in parts[:: 1 if order else -1]:
            total.merge(part)
        assert total.n_examples == 2
        assert total.layers[0].patch.n_units == 2
        assert total.layers[0].n_dims == 6


FLAT = """
import torch
from memdiag.device import peak_memory
from memdiag.entropy_report import EntropyOptions
from memdiag.layer_sums import LayerSums, Sums, observe_layer
torch.set_num_threads(1)
generator, mask = torch.Generator().manual_seed(0), torch.ones(2, 256, dtype=torch.bool)
total = Sums([LayerSums() for _ in range(12)])
for i in range(60):
    layers = []
    for _ in range(12):
        hidden = torch.randn(2, 256, 512, generator=generator)
        layers.append(observe_layer(hidden, mask, EntropyOptions(unit="all")))
        del hidden
    total.merge(Sums(layers, 2))
    if i == 9:
        early = peak_memory()
print((peak_memory() - early) / 2**20)
"""


@pytest.mark.slow
def test_memory_stays_flat_as_batches_come() -> None:
    """50 more batches of 12 layers; what is kept of them, 2 vectors a layer, is 10 MB in all."""
    done = subprocess.run([sys.executable, "-c", FLAT], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40
