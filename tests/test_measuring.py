"""Running a model over a dataset: the same numbers in halves when memory runs out, and one line for what cannot be."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from memdiag import reading
from memdiag.checkpoint import open_checkpoints
from memdiag.dataset import Batch, Example, batches, collate
from memdiag.entropy_report import EntropyOptions
from memdiag.errors import InputError
from memdiag.layer_sums import Sums, rows_of
from memdiag.measuring import Watched, observe_all, watch
from memdiag.progress import Progress

Same = Callable[..., None]
OPTIONS = EntropyOptions(unit="all", patch_size=4, spectra=True)
LENGTHS = [9, 3, 12, 7, 1, 5, 12, 4, 8, 2, 11, 6, 10]

OUT_OF_MEMORY = {
    "accelerator": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "host": lambda: RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B"
    ),
    "numpy": lambda: MemoryError(),
}


class Hungry(nn.Module):
    """A small GPT-2 whose memory runs out at more than `most` examples, after all its layers were seen."""

    def __init__(self, most: float = math.inf, error: Callable[[], BaseException] = OUT_OF_MEMORY["host"]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = GPT2Config(
            vocab_size=40, n_embd=8, n_head=2, n_layer=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
        self.inner = GPT2LMHeadModel(self.config).eval()
        self.most, self.error = most, error
        self.tried: list[int] = []
        self.n_failures = 0

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        self.tried.append(len(tokens))
        output = self.inner(tokens, attention_mask=attention_mask, **options)
        if len(tokens) > self.most:
            self.n_failures += 1
            raise self.error()
        return output


def examples(lengths: list[int] = LENGTHS) -> list[Example]:
    g = torch.Generator().manual_seed(1)
    return [
        Example(i, f"id-{i}", torch.randint(0, 40, (n,), generator=g).numpy(), None, None, False)
        for i, n in enumerate(lengths)
    ]


def watched_by(model: nn.Module, first: Batch) -> Watched:
    """What `watch` finds, before memory becomes scarce."""
    most, model.most = model.most, math.inf
    watched = watch(model, first, None)
    model.most, model.tried = most, []
    return watched


def measured(model: nn.Module, stream: list[Batch], fixtures: Path, options: EntropyOptions = OPTIONS) -> list[dict]:
    watched = watched_by(model, stream[0])
    return rows(watched, observe_all(watched, stream, options, Progress()), fixtures, options)


def rows(watched: Watched, sums: Sums, fixtures: Path, options: EntropyOptions = OPTIONS) -> list[dict]:
    return list(rows_of(sums, watched.layers_seen().taken, open_checkpoints(fixtures / "tiny-gpt2")[0], options))


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
@pytest.mark.parametrize("most", [1, 2, 3, 12])
def test_in_halves_the_result_is_the_same(
    fixtures: Path, assert_same_rows: Same, caplog: pytest.LogCaptureFixture, kind: str, most: int
) -> None:
    expected = measured(Hungry(), [collate(examples())], fixtures)
    assert expected[0]["n_examples"] == 13
    assert expected[0]["cross_entropy"] > 3
    model = Hungry(most, OUT_OF_MEMORY[kind])
    with caplog.at_level(logging.WARNING, "memdiag"):
        found = measured(model, [collate(examples())], fixtures)
    assert_same_rows(found, expected, rel=1e-5, abs=1e-6)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == model.n_failures  # once per halving
    assert said[0] == "out of memory with 13 examples at once; going on with 7"
    assert model.n_failures <= 4


def test_a_size_that_failed_is_not_tried_again(fixtures: Path) -> None:
    model = Hungry(4)
    whole = collate(examples([8] * 8))
    measured(model, [whole] * 5, fixtures)
    assert model.tried == [8] + [4] * 10
    assert model.n_failures == 1


def test_progress_counts_every_example_once() -> None:
    model, progress = Hungry(2), Progress()
    stream = list(batches(examples(), tokens_per_batch=40))
    watched = watched_by(model, stream[0])
    observe_all(watched, stream, OPTIONS, progress)
    assert progress._done == len(LENGTHS)


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_one_example_that_does_not_fit_is_named(kind: str) -> None:
    model = Hungry()
    watched = watch(model, collate(examples()), None)
    model.most, model.error = 0, OUT_OF_MEMORY[kind]
    with pytest.raises(InputError, match=r"example 'id-0' alone does not fit in memory; use --max-length") as caught:
        observe_all(watched, [collate(examples())], OPTIONS, Progress())
    assert "\n" not in str(caught.value)


def test_another_error_is_not_taken_for_memory() -> None:
    model = Hungry()
    watched = watch(model, collate(examples()), None)
    model.most, model.error = 3, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        observe_all(watched, [collate(examples())], OPTIONS, Progress())
    assert model.n_failures == 1


def test_cut_examples_are_counted_once_however_the_batch_is_split(fixtures: Path) -> None:
    cut = [Example(e.row, e.example_id, e.input_ids, None, None, e.row % 3 == 0) for e in examples()]
    for most in (math.inf, 2):
        assert {row["truncated"] for row in measured(Hungry(most), [collate(cut)], fixtures)} == {5}


def test_pieces_of_a_batch_are_no_wider_than_their_longest() -> None:
    batch = collate(examples([9, 3, 12, 7]))
    piece = reading.rows_of_batch(batch, slice(1, 2))
    assert piece.example_ids == ["id-1"]
    assert piece.input_ids.shape == piece.mask.shape == (1, 3)
    assert piece.rows.tolist() == [1]
    mask = np.array([[False, True, False, True, False], [False, False, True, False, False]])
    holes = Batch(["a", "b"], np.arange(2), np.arange(10).reshape(2, 5), mask, None, None, 0)
    assert reading.rows_of_batch(holes, slice(0, 1)).input_ids.tolist() == [[0, 1, 2, 3]]
    features = Batch(["a", "b"], np.arange(2), None, None, np.zeros((2, 3), dtype=np.float32), np.array([1, 2]), 0)
    assert reading.rows_of_batch(features, slice(1, 2)).features.shape == (1, 3)
    assert reading.rows_of_batch(features, slice(1, 2)).labels.tolist() == [2]


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_batch", [1, 2, 5])
def test_the_size_of_batches_does_not_matter(fixtures: Path, assert_same_rows: Same, per_batch: int) -> None:
    model = Hungry()
    expected = measured(model, [collate(examples())], fixtures)
    stream = list(batches(examples(), tokens_per_batch=10**6, examples_per_batch=per_batch))
    assert_same_rows(measured(model, stream, fixtures), expected, rel=1e-5, abs=1e-6)


def test_a_batch_shorter_than_a_patch(fixtures: Path) -> None:
    options = EntropyOptions(unit="all", patch_size=8)
    for row in measured(Hungry(), [collate(examples([3, 2]))], fixtures, options):
        assert row["n_units"] == {"patch": 0, "sequence": 2, "dataset": 1}[row["unit"]]


def test_an_example_of_one_token(fixtures: Path) -> None:
    found = measured(Hungry(), [collate(examples([1]))], fixtures)
    assert all(row["cross_entropy"] is None for row in found)  # nothing was predicted
    assert [row["mbe"] for row in found if row["unit"] == "sequence"] == pytest.approx([0, 0, 0], abs=1e-9)


# --- watching ------------------------------------------------------------------------------------------------------


def test_watching_tries_a_piece_of_the_longest_example_only() -> None:
    model = Hungry()
    watched = watch(model, collate(examples()), None)
    assert max(model.tried) <= 2  # once more, to tell examples from what they share
    assert watched.predicts
    assert [layer.index for layer in watched.layers] == [0, 1, 2]
    assert not watched.skipped
    assert watched.layers_seen().taken[0] == (0, "inner.transformer.h.0 (input)")


def test_watching_lists_what_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2)).eval()
    batch = Batch(["a"], np.arange(1), None, None, np.zeros((1, 3), dtype=np.float32), None, 0)
    watched = watch(model, batch, "0,1-2")
    assert not watched.predicts
    assert watched.layers_seen().taken == [(0, "0"), (1, "1")]
    assert watched.layers_seen().skipped == [("3", "not in --layers"), ("2", "it passes its input on unchanged")]


class Ints(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x > self.weight).long()


@pytest.mark.parametrize("wanted", [None, "0"])
def test_no_layer_that_can_be_measured_is_an_error_not_an_empty_report(wanted: str | None) -> None:
    batch = Batch(["a"], np.arange(1), None, None, np.zeros((1, 3), dtype=np.float32), None, 0)
    for model in (Ints(), nn.Sequential(Ints(), nn.Dropout()).eval()):
        with pytest.raises(InputError, match=r"no layer of this model can be measured .*float tensor.*--layers"):
            watch(model, batch, wanted)


# --- hidden states that are not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["patch", "sequence", "dataset", "all"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hidden_states_that_are_not_finite_name_the_layer_and_examples(unit: str, bad: float) -> None:
    model = Hungry()
    with torch.no_grad():
        model.inner.transformer.h[1].mlp.c_proj.bias[3] = bad
    options = EntropyOptions(unit=unit, patch_size=4)
    watched = watch(model, collate(examples()), None)
    with pytest.raises(InputError, match=r"layer inner\.transformer\.h\.1: .*NaN or an infinity.*'id-0', 'id-1'") as e:
        observe_all(watched, [collate(examples())], options, Progress())
    assert "\n" not in str(e.value)
