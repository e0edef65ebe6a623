"""What would a layer predict by itself? A k-nearest-neighbour vote after the input, each layer and the softmax.

The prediction depth of an example (Baldock, Maennel, Neyshabur, arXiv:2106.09647) is the first of these layers from
which on every vote is the network's own prediction. Neighbours are reference examples, by the Euclidean distance of
their representations; their given labels vote. A reference example is never its own neighbour.

Representations: the features as they are; of a transformer each block's output (for texts the embeddings too), of any
other model the output of each activation, in the order of their calls, of a model without any that of each layer with
weights but for the one that gives the logits; the softmax. What has positions or tokens is averaged over them.

Axes: b example, r reference example, l layer, d dimension of a representation, k class, t token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memdiag.errors import InputError
from memdiag.observe import Inputs, as_tokens, blocks, layers_of
from memdiag.observe.losses import check_labels, rows_of, run
from memdiag.observe.probing import evaluating

CHUNK_BYTES = 2**25  # of the float64 distances of some examples to all reference examples
BLOCK_ROWS = 1024  # reference examples turned into float64 at a time
NONE = -1  # the class of an example that has no neighbour
SAME = 1e-6  # distances that differ by less than this share of the representation's length count as equal


@dataclass
class _Place:
    """A module whose output, or input, is a representation."""

    name: str
    module: nn.Module
    at_input: bool = False


class Probes:
    """k-nearest-neighbour probes of one classifier.

    Attributes:
        layers: the names of the probes: "input" (not for texts), the modules, "softmax".
        n_reference: r, at most `most`.
    """

    def __init__(self, model: nn.Module, reference: Iterable[Inputs], k: int = 30, most: int = 10_000) -> None:
        """Runs the reference examples, and keeps r · Σ d float32 numbers.

        Args:
            model: a classifier.
            reference: batches with labels, in the order of the dataset: the first example is row 0. Of more than
                `most` examples a random sample of `most` is kept, the same for any batch size.
            k: neighbours that vote; as many as there are where there are fewer.
        Raises:
            InputError: no example, no labels or labels that are no classes, or a model without logits (b, k).
        """
        if k < 1 or most < 1:
            raise InputError(f"prediction depth needs at least 1 neighbour and 1 reference example, got {k} and {most}")
        self.model, self.k = model, k
        self._places: list[_Place] | None = None
        self._n_classes = 0
        lots = np.random.default_rng(0)
        kept: list[_Kept] = []
        seen, worst = 0, np.inf
        for batch in reference:
            lot = lots.random(batch.n_examples)
            rows = np.flatnonzero(lot < worst)  # the others would not be kept
            seen += batch.n_examples
            if not len(rows):
                continue
            some = rows_of(batch, torch.from_numpy(rows))
            if self._places is None:
                self._places, self._n_classes = _places(model, some)
            check_labels(some, self._n_classes)
            assert some.labels is not None
            kept.append(
                _Kept(lot[rows], rows + seen - batch.n_examples, some.labels.cpu(), self._representations(some))
            )
            if sum(len(part.rows) for part in kept) > 2 * most:
                kept = [_fewest(kept, most)]
                worst = float(kept[0].lot.max())
        if not kept:
            raise InputError("prediction depth needs reference examples; the data has none")
        sample = _fewest(kept, most)
        self._rows = torch.from_numpy(sample.rows)
        self._votes = nn.functional.one_hot(sample.labels, self._n_classes).double()  # (r, k)
        self._reference = sample.representations
        # distances from the middle lose fewer digits; the mean of what is a number, so that one NaN stays alone
        self._middles = [x.nanmean(0, dtype=torch.float64) for x in self._reference]
        self.n_reference = len(self._rows)

    @property
    def layers(self) -> list[str]:
        """Names of the probes, first to last."""
        names = [place.name for place in self._places or []]
        return [*(["input"] if len(self._reference) > len(names) + 1 else []), *names, "softmax"]

    def __call__(self, inputs: Inputs, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(l, b) the class that each layer's neighbours vote for; −1 where there is no other reference example.

        Examples as far away as the k-th neighbour share the places that are left, so that neither their order nor the
        batch size matters; of classes with equally many votes the smallest wins.

        An example whose representation is NaN has no neighbour.

        Args:
            rows: (b,) row numbers in the reference's dataset; −1 for an example that is not of it.
        """
        if inputs.n_examples != len(rows):
            raise ValueError(f"want a row number for each of {inputs.n_examples} examples, got {len(rows)}")
        found = np.full((len(self.layers), inputs.n_examples), NONE, dtype=np.int64)
        if not inputs.n_examples:
            return found
        own = torch.from_numpy(np.asarray(rows, dtype=np.int64))[:, None] == self._rows  # (b, r)
        size = max(1, CHUNK_BYTES // (8 * self.n_reference))
        layers = zip(self._representations(inputs), self._reference, self._middles)
        for layer, (x, reference, middle) in enumerate(layers):
            for start in range(0, len(x), size):
                part = slice(start, start + size)
                query = x[part].double() - middle
                distances = _distances(query, reference, middle)
                distances[own[part].to(x.device) | distances.isnan()] = torch.inf
                found[layer, part] = _vote(distances, query.norm(dim=1), self._votes.to(x.device), self.k)
        return found

    def _representations(self, inputs: Inputs) -> list[Tensor]:
        """(b, d) of each layer."""
        assert self._places is not None
        calls, logits = _run(self.model, inputs, self._places)
        found = [] if inputs.features is None else [inputs.features.flatten(1)]
        found += [_pooled(place, value, inputs) for place, value in calls]
        if len(calls) != len(self._places):
            raise InputError(f"the model calls {len(calls)} layers on some data, {len(self._places)} on other")
        return [x.detach().float() for x in (*found, logits.float().softmax(1))]


@dataclass
class _Kept:
    """Some reference examples."""

    lot: NDArray[np.float64]  # (r,) at random in [0, 1); the lowest stay
    rows: NDArray[np.int64]  # (r,)
    labels: Tensor  # (r,)
    representations: list[Tensor]  # (r, d) each


def _fewest(kept: list[_Kept], most: int) -> _Kept:
    """Those with the lowest lots."""
    lot = np.concatenate([part.lot for part in kept])
    best = np.sort(np.argsort(lot, kind="stable")[:most])
    at = torch.from_numpy(best)
    layers = [torch.cat(parts) for parts in zip(*(part.representations for part in kept))]
    labels = torch.cat([part.labels for part in kept])
    rows = np.concatenate([part.rows for part in kept])
    return _Kept(lot[best], rows[best], labels[at], [x[at.to(x.device)] for x in layers])


# -- representations ---------------------------------------------------------------------------------------------------


def _run(model: nn.Module, inputs: Inputs, places: Iterable[_Place]) -> tuple[list[tuple[_Place, Any]], Tensor]:
    """What each place had, in the order of the calls, and the logits."""
    calls: list[tuple[_Place, Any]] = []

    def take(place: _Place, value: Any) -> None:
        # what comes next may change it in place
        calls.append((place, value.clone() if isinstance(value, Tensor) else value))

    def before(place: _Place) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take(place, args[0] if args else kwargs.get("hidden_states"))

        return hook

    def after(place: _Place) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            take(place, output[0] if isinstance(output, tuple | list) and output else output)

        return hook

    with ExitStack() as stack, evaluating(model), torch.no_grad():
        done: set[tuple[int, bool]] = set()
        for place in places:
            if (id(place.module), place.at_input) in done:
                continue  # a module that is called again is there again
            done.add((id(place.module), place.at_input))
            if place.at_input:
                handle = place.module.register_forward_pre_hook(before(place), with_kwargs=True)
            else:
                handle = place.module.register_forward_hook(after(place))
            stack.callback(handle.remove)
        return calls, run(model, inputs)


def _places(model: nn.Module, inputs: Inputs) -> tuple[list[_Place], int]:
    """Where the representations are, in the order of their calls, and the number of classes."""
    first = rows_of(inputs, torch.arange(min(2, inputs.n_examples)))
    if blocks(model):
        layers = [layer for layer in layers_of(model)[0] if layer.index or inputs.tokens is not None]
        wanted = [_Place(layer.name, layer.module, layer.at == "input") for layer in layers]
    else:
        leaves = [(name, m) for name, m in model.named_modules() if name and not list(m.children())]
        wanted = [_Place(name, m) for name, m in leaves if _is_activation(m)]
    calls, logits = _run(model, first, wanted)
    if logits.ndim != 2 or len(logits) != first.n_examples:
        raise InputError("prediction depth needs a classifier, with logits (example, class)")
    if not calls and not blocks(model):
        calls, _ = _run(model, first, [_Place(name, m) for name, m in leaves if list(m.parameters())])
        calls = [made for made in calls if not (isinstance(made[1], Tensor) and made[1].shape == logits.shape)]
    # what is no representation of each example is left out, e.g. a gate that all examples share
    usable = [
        place
        for place, value in calls
        if not isinstance(as_tokens(place.module, value, first.mask, first.n_examples), str)
    ]
    return usable, logits.shape[1]


def _is_activation(module: nn.Module) -> bool:
    """PyTorch's activations, and a class named like one; no softmax, whose output is another probe."""
    name = type(module).__name__
    if isinstance(module, nn.Softmax | nn.LogSoftmax | nn.Softmax2d | nn.Softmin | nn.MultiheadAttention):
        return False
    return type(module).__module__ == nn.ReLU.__module__ or "Activation" in name or name == "Square"


def _pooled(place: _Place, value: Any, inputs: Inputs) -> Tensor:
    """(b, d) the mean over an example's real tokens or positions."""
    states = as_tokens(place.module, value, inputs.mask, inputs.n_examples)
    if isinstance(states, str):
        raise InputError(f"layer {place.name!r} cannot be probed: {states}")
    hidden, mask = states
    weights = mask.to(torch.float64)
    total = torch.where(mask[..., None], hidden, 0).double().sum(1)
    return total / weights.sum(1, keepdim=True).clamp(min=1)


# -- neighbours --------------------------------------------------------------------------------------------------------


def _distances(query: Tensor, reference: Tensor, middle: Tensor) -> Tensor:
    """(b, r) Euclidean, float64, from query (b, d), which has the middle subtracted already."""
    found = torch.empty(len(query), len(reference), dtype=torch.float64, device=query.device)
    squares = query.square().sum(1, keepdim=True)
    for start in range(0, len(reference), BLOCK_ROWS):
        block = reference[start : start + BLOCK_ROWS].double() - middle
        found[:, start : start + BLOCK_ROWS] = squares - 2 * query @ block.T + block.square().sum(1)
    return found.clamp_(min=0).sqrt_()


def _vote(distances: Tensor, lengths: Tensor, votes: Tensor, k: int) -> NDArray[np.int64]:
    """(b,) the class with most votes of the k nearest; distances (b, r), lengths (b,), votes (r, k) one-hot."""
    n_others = distances.isfinite().sum(1)  # all but itself
    n_neighbours = n_others.clamp(max=k)
    last = distances.kthvalue(min(k, distances.shape[1]), dim=1).values
    farthest = distances.masked_fill(distances.isinf(), -1).amax(1)
    edge = torch.minimum(last, farthest)
    slack = SAME * (lengths + edge)
    nearer = (distances < (edge - slack)[:, None]).double() @ votes
    tied = ((distances - edge[:, None]).abs() <= slack[:, None]).double() @ votes
    left = n_neighbours - nearer.sum(1)
    total = nearer * tied.sum(1, keepdim=True) + tied * left[:, None]  # whole numbers: nearer + tied · left / n_tied
    classes = total.cpu().numpy().argmax(1)  # the first of equals
    return np.where(n_others.cpu().numpy() > 0, classes, NONE)
