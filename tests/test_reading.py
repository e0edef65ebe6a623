"""A dataset as one checkpoint reads it: lengths, vocabularies, batches, ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import RobertaConfig

from memdiag import reading
from memdiag.checkpoint import open_checkpoints
from memdiag.dataset import Batch, open_dataset
from memdiag.entropy_report import EntropyOptions, Inputs
from memdiag.entropy_run import reading_of
from memdiag.errors import InputError

# --- lengths and vocabularies --------------------------------------------------------------------------------------


def with_config(**settings: Any) -> nn.Module:
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(**settings)  # type: ignore[assignment]
    return model


def test_default_max_length(load: Callable[[str], nn.Module]) -> None:
    found = {name: reading.default_max_length(load(name)) for name in ("tiny-gpt2", "tiny-llama", "tiny-bert")}
    assert found == {"tiny-gpt2": 256, "tiny-llama": 256, "tiny-bert": 128}
    assert reading.default_max_length(nn.Linear(1, 1)) == reading.LONGEST
    assert reading.default_max_length(with_config(max_position_embeddings=131072)) == reading.LONGEST
    assert reading.default_max_length(with_config(max_position_embeddings=-1)) == reading.LONGEST
    roberta = RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    model = nn.Linear(1, 1)
    model.config = roberta  # type: ignore[assignment]
    assert reading.default_max_length(model) == 512  # positions are counted from the padding's on


def test_a_roberta_takes_examples_of_the_default_length() -> None:
    from transformers import RobertaModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = RobertaModel(RobertaConfig(vocab_size=40, max_position_embeddings=14, pad_token_id=1, **small)).eval()
    longest = reading.default_max_length(model)
    tokens = torch.full((1, longest), 5)
    assert longest == 12
    assert model(tokens).last_hidden_state.shape == (1, 12, 8)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


def test_vocab_size(load: Callable[[str], nn.Module]) -> None:
    assert reading.vocab_size(load("tiny-gpt2")) == 512
    assert reading.vocab_size(load("tiny-vit")) is None
    assert reading.vocab_size(load("digits-mlp")) is None


# --- streams -------------------------------------------------------------------------------------------------------


def stream(
    fixtures: Path, load: Callable[[str], nn.Module], rank: int = 0, world: int = 1, **options: Any
) -> list[Batch]:
    settings = EntropyOptions(unit="all", **options)
    dataset = open_dataset(fixtures / "texts.jsonl", limit=settings.limit)
    checkpoint = open_checkpoints(fixtures / "tiny-gpt2")[0]
    inputs = Inputs([checkpoint], dataset, settings)
    return list(reading.stream_of(reading_of(inputs, checkpoint), load("tiny-gpt2"), torch.device("cpu"), rank, world))


def test_ranks_share_the_examples_between_them(fixtures: Path, load: Callable[[str], nn.Module]) -> None:
    every = sorted(row for batch in stream(fixtures, load) for row in batch.rows.tolist())
    assert every == list(range(20))
    parts = [sorted(row for b in stream(fixtures, load, rank, 3) for row in b.rows.tolist()) for rank in range(3)]
    assert parts == [list(range(rank, 20, 3)) for rank in range(3)]
    assert stream(fixtures, load, 1, 2, limit=1) == []


def test_the_batch_size_is_examples(fixtures: Path, load: Callable[[str], nn.Module]) -> None:
    sizes = [len(batch.example_ids) for batch in stream(fixtures, load, batch_size="6")]
    assert sizes == [6, 6, 6, 2]


def test_long_texts_are_cut_and_counted(fixtures: Path, load: Callable[[str], nn.Module]) -> None:
    cut = stream(fixtures, load, max_length=8)
    assert max(int(batch.mask.sum(1).max()) for batch in cut) == 8
    assert sum(batch.truncated for batch in cut) == 20
    assert sum(batch.truncated for batch in stream(fixtures, load)) == 0


def test_a_token_that_the_model_does_not_have_is_an_error(
    fixtures: Path, load: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    data = tmp_path / "tokens.jsonl"
    data.write_text('{"input_ids": [1, 511]}\n{"input_ids": [1, 512]}\n')
    checkpoint = open_checkpoints(fixtures / "tiny-gpt2")[0]
    inputs = Inputs([checkpoint], open_dataset(data), EntropyOptions(unit="all"))
    examples_of = reading.examples_of(reading_of(inputs, checkpoint), load("tiny-gpt2"))
    assert next(examples_of).input_ids.tolist() == [1, 511]
    with pytest.raises(InputError, match=r"row 1: input_ids .*512"):
        next(examples_of)
