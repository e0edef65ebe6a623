"""A dataset as one checkpoint reads it: batches of tokens or features, in halves where memory runs out.

Axes: b example of a batch, t token.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from memdiag import device as devices
from memdiag import observe
from memdiag.checkpoint import Checkpoint, pad_id
from memdiag.dataset import Batch, Dataset, Example, batches
from memdiag.errors import InputError

log = logging.getLogger("memdiag")

LONGEST = 2048  # tokens of an example that are read when the user does not say
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")  # count from pad_token_id + 1
Result = TypeVar("Result")


@dataclass(frozen=True)
class Reading:
    """What is read, with whose tokenizer, and how much at once."""

    dataset: Dataset
    checkpoint: Checkpoint
    tokenizer: str | None = None  # a directory, if the checkpoint has none
    max_length: int | None = None
    batch_size: str = "auto"


def stream_of(
    reading: Reading, model: nn.Module, target: torch.device, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """This rank's batches of the dataset, tokenised for this checkpoint."""
    return batches(
        examples_of(reading, model, rank, world),
        tokens_per_batch=devices.tokens_per_batch(target, vocab_size(model) or 1),
        pad_id=pad_id(getattr(model, "config", None), reading.checkpoint.tokenizer(reading.tokenizer)),
        examples_per_batch=None if reading.batch_size == "auto" else int(reading.batch_size),
    )


def examples_of(reading: Reading, model: nn.Module, rank: int = 0, world: int = 1) -> Iterator[Example]:
    """This rank's examples of the dataset, tokenised for this checkpoint."""
    return reading.dataset.examples(
        tokenizer=reading.checkpoint.tokenizer(reading.tokenizer),
        max_length=reading.max_length or default_max_length(model),
        vocab_size=vocab_size(model),
        rank=rank,
        world_size=world,
    )


def in_halves(
    stream: Iterable[Batch], run: Callable[[Batch], Result], device: torch.device
) -> Iterator[tuple[Batch, Result]]:
    """(batch, run(batch)) of every batch; one for which memory runs out is run in halves, and so are those after it.

    Raises:
        InputError: a single example does not fit.
    """
    limit = math.inf  # examples × longest that fitted, once one did not
    for whole in stream:
        waiting = [whole]
        while waiting:
            batch = waiting.pop()
            n, size = len(batch.example_ids), batch.mask.size if batch.mask is not None else len(batch.example_ids)
            if size <= limit or n == 1:
                try:
                    result = run(batch)
                except (RuntimeError, MemoryError) as error:
                    if not devices.is_out_of_memory(error):
                        raise
                    if n == 1:
                        raise InputError(
                            f"example {batch.example_ids[0]!r} alone does not fit in memory; use --max-length, "
                            "--dtype bfloat16 or fewer --layers"
                        ) from None
                else:
                    yield batch, result
                    continue
                devices.free(device)
                limit = size / 2
                log.warning("out of memory with %d examples at once; going on with %d", n, (n + 1) // 2)
            half = (n + 1) // 2
            waiting += [rows_of_batch(batch, slice(half, n)), rows_of_batch(batch, slice(0, half))]


def rows_of_batch(batch: Batch, rows: slice) -> Batch:
    """Some examples of a batch, cut to the longest of them."""

    def cut(array: Any) -> Any:
        return None if array is None else array[rows]

    ids, mask = cut(batch.input_ids), cut(batch.mask)
    if mask is not None:
        width = max(1, int(np.flatnonzero(mask.any(0)).max(initial=0)) + 1)
        ids, mask = ids[:, :width], mask[:, :width]
    return dataclasses.replace(
        batch,
        example_ids=batch.example_ids[rows],
        rows=batch.rows[rows],
        input_ids=ids,
        mask=mask,
        features=cut(batch.features),
        labels=cut(batch.labels),
        truth=cut(batch.truth),
        true_labels=cut(batch.true_labels),
        truncated=0,
    )


def check_kind(model: nn.Module, batch: Batch) -> None:
    """Refuse text for a model of images and the other way round.

    Raises:
        InputError: they do not go together.
    """
    reads = getattr(model, "main_input_name", None)
    if batch.input_ids is None and reads == "input_ids":
        raise InputError("the model reads tokens, but the dataset holds features; give one with text or input_ids")
    if batch.input_ids is not None and reads not in (None, "input_ids"):
        raise InputError(f"the model reads {reads}, but the dataset holds text; give one with a features column")


def vocab_size(model: nn.Module) -> int | None:
    """Rows of the input embedding; None for a model without one."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except NotImplementedError:  # how transformers says that a model of images has none
        embedding = None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def default_max_length(model: nn.Module) -> int:
    """As many tokens as the model has positions, but not more than LONGEST."""
    text = observe.text_config(model)
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return LONGEST
    padding = getattr(text, "pad_token_id", None)
    if getattr(text, "model_type", "") in OFFSET_POSITIONS and isinstance(padding, int):
        positions -= padding + 1
    return min(positions, LONGEST)
