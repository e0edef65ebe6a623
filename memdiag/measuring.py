"""Run a model over a dataset and reduce what its layers show, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memdiag import observe
from memdiag.dataset import Batch
from memdiag.entropy_report import EntropyOptions
from memdiag.errors import InputError
from memdiag.layer_sums import LayerSums, Sums, observe_layer
from memdiag.progress import Progress
from memdiag.reading import check_kind, in_halves, rows_of_batch


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
    check_kind(model, first)
    layers, skipped = observe.layers_of(model, wanted)
    longest = int(first.mask.sum(1).argmax()) if first.mask is not None else 0
    one = observe.to_inputs(rows_of_batch(first, slice(longest, longest + 1)), model)

    def twice(x: Tensor | None, most: int | None = None) -> Tensor | None:
        return None if x is None else torch.cat([x, x])[:, :most]  # two rows tell examples from what they share

    piece = observe.Inputs(twice(one.tokens, 16), twice(one.mask, 16), twice(one.features), None)
    kept, unusable = observe.usable(model, piece, layers)
    if not kept:
        why = "; ".join(f"{s.name}: {s.why}" for s in unusable[:3]) or "it has no modules"
        raise InputError(f"no layer of this model can be measured ({why}); choose others with --layers")
    predicts = piece.tokens is not None and observe.predicts_next_token(model, piece.tokens)
    return Watched(model, kept, skipped + unusable, predicts)


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
    device = next(watched.model.parameters()).device
    for batch, sums in in_halves(counted(stream, total), lambda batch: observe_batch(watched, batch, options), device):
        total.merge(sums)
        progress.advance(len(batch.example_ids))
    return total


def counted(stream: Iterable[Batch], total: Sums) -> Iterator[Batch]:
    """The same batches; their truncated examples are counted, which halves of a batch no longer know."""
    for batch in stream:
        total.truncated += batch.truncated
        yield batch
