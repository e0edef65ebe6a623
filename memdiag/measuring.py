"""Run a model over a dataset and reduce what it shows: batch by batch, in halves when memory runs out."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memdiag import device as devices
from memdiag import observe
from memdiag.checkpoint import Checkpoint, pad_id
from memdiag.dataset import Batch, Example, batches
from memdiag.entropy_report import EntropyOptions, Inputs
from memdiag.errors import InputError
from memdiag.layer_sums import LayerSums, Sums, observe_layer
from memdiag.progress import Progress

log = logging.getLogger("memdiag")

LONGEST = 2048  # tokens of an example that are read when the user does not say
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")  # count from pad_token_id + 1


@dataclass(frozen=True)
class LayersSeen:
    """Index and name of the layers taken, name and reason of those skipped."""

    taken: list[tuple[int, str]]
    skipped: list[tuple[str, str]]


@dataclass
class Watched:
    """A loaded model, the layers to look at, and whether it predicts next tokens."""

    model: nn.Module
    layers: list[observe.Layer]
    skipped: list[observe.Skipped]
    predicts: bool

    def layers_seen(self) -> LayersSeen:
        """What the rows say of the layers; unlike the modules themselves it can be sent to another process."""
        return LayersSeen([(x.index, x.name) for x in self.layers], [(s.name, s.why) for s in self.skipped])


def watch(model: nn.Module, first: Batch, wanted: str | None) -> Watched:
    """Find out on a small piece of the first batch which layers can be measured.

    Raises:
        InputError: no layer is usable, or the model cannot run on this kind of data.
    """
    reads = getattr(model, "main_input_name", None)
    if first.input_ids is None and reads == "input_ids":
        raise InputError("the model reads tokens, but the dataset holds features; give one with text or input_ids")
    if first.input_ids is not None and reads not in (None, "input_ids"):
        raise InputError(f"the model reads {reads}, but the dataset holds text; give one with a features column")
    layers, skipped = observe.layers_of(model, wanted)
    longest = int(first.mask.sum(1).argmax()) if first.mask is not None else 0
    one = observe.to_inputs(_rows(first, slice(longest, longest + 1)), model)

    def twice(x: Tensor | None, most: int | None = None) -> Tensor | None:
        return None if x is None else torch.cat([x, x])[:, :most]  # two rows tell examples from what they share

    piece = observe.Inputs(twice(one.tokens, 16), twice(one.mask, 16), twice(one.features), None)
    kept, unusable = observe.usable(model, piece, layers)
    if not kept:
        why = "; ".join(f"{s.name}: {s.why}" for s in unusable[:3]) or "it has no modules"
        raise InputError(f"no layer of this model can be measured ({why}); choose others with --layers")
    predicts = piece.tokens is not None and observe.predicts_next_token(model, piece.tokens)
    return Watched(model, kept, skipped + unusable, predicts)


def _rows(batch: Batch, rows: slice) -> Batch:
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
        truncated=0,
    )


def observe_batch(watched: Watched, batch: Batch, options: EntropyOptions) -> Sums:
    """One forward pass, reduced. Nothing is kept if it fails, so that it can be tried again in halves."""
    found: dict[int, LayerSums] = {}

    def reduce(position: int, hidden: Tensor, mask: Tensor) -> None:
        try:
            found[position] = observe_layer(hidden, mask, options)
        except ValueError as error:  # the formula knows what is wrong, only this knows where
            names = ", ".join(repr(name) for name in batch.example_ids[:3])
            raise InputError(
                f"layer {watched.layers[position].name}: {error} (a batch with examples {names})"
            ) from None

    inputs = observe.to_inputs(batch, watched.model)
    logits = observe.forward(watched.model, inputs, watched.layers, reduce)
    sums = Sums([found[i] for i in range(len(watched.layers))], len(batch.example_ids))
    if logits is not None and (watched.predicts or logits.ndim == 2):  # next tokens, or labels if there are any
        sums.nll, sums.n_predictions = observe.cross_entropy_sum(logits, inputs)
    return sums


def observe_all(watched: Watched, stream: Iterable[Batch], options: EntropyOptions, progress: Progress) -> Sums:
    """All batches, joined. A batch that does not fit in memory is run in halves.

    Raises:
        InputError: a single example does not fit.
    """
    total = Sums([LayerSums() for _ in watched.layers])
    limit = math.inf  # examples × longest that fitted, once one did not
    for whole in stream:
        total.truncated += whole.truncated
        waiting = [whole]
        while waiting:
            batch = waiting.pop()
            n, size = len(batch.example_ids), batch.mask.size if batch.mask is not None else len(batch.example_ids)
            if size <= limit or n == 1:
                try:
                    total.merge(observe_batch(watched, batch, options))
                    progress.advance(n)
                    continue
                except (RuntimeError, MemoryError) as error:
                    if not devices.is_out_of_memory(error):
                        raise
                    if n == 1:
                        raise InputError(
                            f"example {batch.example_ids[0]!r} alone does not fit in memory; use --max-length, "
                            "--dtype bfloat16 or fewer --layers"
                        ) from None
                devices.free(next(watched.model.parameters()).device)
                limit = size / 2
                log.warning("out of memory with %d examples at once; going on with %d", n, (n + 1) // 2)
            half = (n + 1) // 2
            waiting += [_rows(batch, slice(half, n)), _rows(batch, slice(0, half))]
    return total


def stream_of(
    inputs: Inputs, checkpoint: Checkpoint, model: nn.Module, target: torch.device, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """This rank's batches of the dataset, tokenised for this checkpoint."""
    options = inputs.options
    return batches(
        examples_of(inputs, checkpoint, model, rank, world),
        tokens_per_batch=devices.tokens_per_batch(target, vocab_size(model) or 1),
        pad_id=pad_id(getattr(model, "config", None), checkpoint.tokenizer(options.tokenizer)),
        examples_per_batch=None if options.batch_size == "auto" else int(options.batch_size),
    )


def examples_of(
    inputs: Inputs, checkpoint: Checkpoint, model: nn.Module, rank: int = 0, world: int = 1
) -> Iterator[Example]:
    """This rank's examples of the dataset, tokenised for this checkpoint."""
    return inputs.dataset.examples(
        tokenizer=checkpoint.tokenizer(inputs.options.tokenizer),
        max_length=inputs.options.max_length or default_max_length(model),
        vocab_size=vocab_size(model),
        rank=rank,
        world_size=world,
    )


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
