"""Neurons: units that only one layer reads. Where a model has them, what they contribute, and the model without them.

Axes: b example, p position (token or pixel), i input of the reader, k neuron, c output of a producer, v class.

A site is a layer (linear or convolution), the reader, whose input is an elementwise, non-affine function of the
outputs of other layers, the producers, which nothing else uses: the hidden units of an MLP, gated or not, and the
channels between two convolutions. What attention or a norm made, and the residual stream, is no site.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from memdiag.errors import InputError, unknown
from memdiag.observe import NOT_CHOSEN, Inputs, Skipped, _indices, _is_range, call
from memdiag.observe.probing import (
    Probe,
    Reading,
    evaluating,
    grid_of,
    is_transposed,
    layers_in,
    n_spatial,
    probe_of,
    reading_of,
    unfused,
)

Owners = Mapping[tuple[int, torch.Size], list[str]]


@dataclass(frozen=True)
class Site:
    """A layer whose inputs are neurons."""

    name: str  # path of the reader, as in named_modules()
    reader: nn.Module
    producers: tuple[str, ...]  # paths of the layers whose outputs the neurons are made of
    width: int  # neurons
    group: int = 1  # inputs of the reader per neuron: more than one where feature maps are flattened
    rows: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)  # per producer (c,): its k; () if c = k
    axis: int = 0  # of the reader's input: where the examples are


@dataclass
class Contributions:
    """Of every neuron to every example: for each site a (b, k) float64 tensor."""

    margin: list[Tensor]  # Σ a · ∂margin/∂a over the example's positions: what removing the neuron costs, first order
    loss: list[Tensor]  # −Σ a · ∂loss/∂a, nats: positive where the neuron lowers the loss
    activation: list[Tensor]  # mean |a| over the example's positions


# -- sites -------------------------------------------------------------------------------------------------------------


def sites_of(model: nn.Module, inputs: Inputs, wanted: str | None = None) -> tuple[list[Site], list[Skipped]]:
    """The sites in the order of the forward pass, and the other layers with the reason why they are none.

    Args:
        inputs: real data, of which a few examples are run; one will do, several are safer.
        wanted: None for all; else indices and ranges into the list of sites ("0,2-3,-1") and name patterns
            ("*.mlp.*") that fit the reader or a producer.
    Raises:
        InputError: there is no site, an index or pattern fits none, or an activation is NaN or infinite.
    """
    probe, owners, layers = probe_of(model, inputs), _owners(model), layers_in(model)
    called = dict.fromkeys(c.name for c in probe.calls)
    found = {name: _site(probe, name, layers[name], owners) for name in called}
    found |= {name: "it is not called in the forward pass" for name in layers if name not in called}
    sites = [site for site in found.values() if isinstance(site, Site)]
    skipped = [Skipped(name, why) for name, why in found.items() if isinstance(why, str)]
    if not sites:
        kinds = {s.why.partition(":")[0]: s for s in reversed(skipped)}  # the first layer of each kind will do
        some = "; ".join(f"{s.name}: {s.why}" for s in kinds.values()) or "it has no linear or convolutional layer"
        raise InputError(f"this model has nothing to prune: no layer reads neurons of its own ({some})")
    if wanted is None:
        return sites, skipped
    chosen = _chosen(sites, wanted)
    left = [Skipped(site.name, NOT_CHOSEN) for i, site in enumerate(sites) if i not in chosen]
    return [site for i, site in enumerate(sites) if i in chosen], skipped + left


def _chosen(sites: Sequence[Site], wanted: str) -> set[int]:
    chosen: set[int] = set()
    for part in wanted.split(","):
        if _is_range(part):
            chosen.update(_indices(part, len(sites)))
            continue
        paths = [(i, path) for i, site in enumerate(sites) for path in (site.name, *site.producers)]
        fits = {i for i, path in paths if fnmatchcase(path, part.strip())}
        if not fits:
            raise unknown("layer with neurons matching", part.strip(), {path for _, path in paths})
        chosen |= fits
    return chosen


def _site(probe: Probe, name: str, reader: nn.Module, owners: Owners) -> Site | str:
    """The site of a reader, or why it has none. One that is called several times must read neurons each time."""
    unfit = _unfit(name, reader, owners)
    if unfit:
        return unfit
    readings: list[Reading] = []
    for i, c in enumerate(probe.calls):
        if c.name == name:
            reading = reading_of(probe, i)
            if isinstance(reading, str):
                return reading
            readings.append(reading)
    first = readings[0]
    rows: dict[str, Tensor] = {}
    for reading in readings:
        agree = (reading.group, reading.axis) == (first.group, first.axis)
        if not agree or not all(torch.equal(rows.setdefault(path, k), k) for path, k in reading.rows.items()):
            return "what it reads is not made alike in all its calls"
    return Site(name, reader, tuple(rows), first.width, first.group, tuple(rows.values()), first.axis)


# -- weights -----------------------------------------------------------------------------------------------------------


def _outgoing(module: nn.Module) -> Tensor:
    """What each input is multiplied by, as a view of the weight: (groups, i / groups, …)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if is_transposed(module):
        return weight[None]
    groups = module.groups if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
    return weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2)


def _incoming(module: nn.Module) -> Tensor:
    """What each output is made with, as a view of the weight: (c, …)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.transpose(0, 1) if is_transposed(module) else weight


def _owners(model: nn.Module) -> Owners:
    """The paths of the modules that hold each parameter, by where its numbers are."""
    owners: dict[tuple[int, torch.Size], list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[parameter.data_ptr(), parameter.shape].append(name)
    return owners


def _unfit(name: str, module: nn.Module, owners: Owners) -> str | None:
    """Why the weight of a layer must not be changed; None if it may be."""
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():  # computed from others (weight norm), or quantized
        return "its weight is not a plain parameter of floats"
    others = [owner for owner in owners[weight.data_ptr(), weight.shape] if owner != name]
    return f"its weight is also that of {others[0]}" if others else None


# -- removing ----------------------------------------------------------------------------------------------------------


@contextmanager
def _replacing(readers: Sequence[nn.Module], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Each reader reads change(its index, its input) instead, at every call."""

    def before(s: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(s, args[0]), *args[1:]), kwargs
            name = next(iter(kwargs))
            return args, {**kwargs, name: change(s, kwargs[name])}

        return hook

    with ExitStack() as stack, unfused():
        for s, reader in enumerate(readers):
            stack.callback(reader.register_forward_pre_hook(before(s), with_kwargs=True).remove)
        yield


@contextmanager
def masked(sites: Sequence[Site], masks: Sequence[Tensor]) -> Iterator[None]:
    """Neurons are multiplied by the masks wherever they are read; nothing is left behind.

    Args:
        masks: for each site (k,) floats or bools; 0 removes a neuron, 1 leaves it as it is.
    Raises:
        ValueError: masks of other shapes.
    """
    _check(sites, masks)
    factors = [
        mask.to(site.reader.weight.device).repeat_interleave(site.group).reshape(-1, *[1] * n_spatial(site.reader))  # type: ignore[arg-type]
        for site, mask in zip(sites, masks)
    ]
    with _replacing([site.reader for site in sites], lambda s, x: x * factors[s].to(x)):
        yield


def _check(sites: Sequence[Site], values: Sequence[Tensor]) -> None:
    shapes, want = [tuple(value.shape) for value in values], [(site.width,) for site in sites]
    if shapes != want:
        raise ValueError(f"want one number per neuron, shapes {want}, got {shapes}")


def _producers(site: Site) -> list[tuple[str, Tensor]]:
    return list(zip(site.producers, site.rows or [torch.arange(site.width)] * len(site.producers)))


def norms(model: nn.Module, sites: Sequence[Site]) -> tuple[list[Tensor], list[Tensor]]:
    """‖outgoing weights‖₂, and Π ‖incoming weights‖₂ over all outputs that a neuron is made of, without biases.

    Returns:
        two lists, for each site (k,) float64.
    """
    outgoing, incoming = [], []
    for site in sites:
        weight = _outgoing(site.reader).detach().cpu().double()  # (groups, i / groups, …)
        outgoing.append(weight.flatten(2).norm(dim=2).reshape(site.width, site.group).norm(dim=1))
        product = torch.ones(site.width, dtype=torch.float64)
        for path, rows in _producers(site):
            norm = _incoming(model.get_submodule(path)).detach().cpu().double().flatten(1).norm(dim=1)  # (c,)
            product.scatter_reduce_(0, rows, norm, "prod")
        incoming.append(product)
    return outgoing, incoming


@torch.no_grad()
def zero_(model: nn.Module, sites: Sequence[Site], chosen: Sequence[Tensor]) -> None:
    """Remove neurons from the weights, in place: what leaves them and what enters them becomes 0.

    The model then computes what it computes under `masked` with 0. A producer whose weight also serves another
    layer keeps it.

    Args:
        chosen: for each site (k,) bool.
    Raises:
        ValueError: tensors of other shapes.
    """
    _check(sites, chosen)
    owners = _owners(model)
    for site, gone in zip(sites, chosen):
        weight, gone = _outgoing(site.reader), gone.bool().cpu()
        weight[gone.repeat_interleave(site.group).reshape(weight.shape[:2]).to(weight.device)] = 0
        for path, rows in _producers(site):
            producer = model.get_submodule(path)
            if _unfit(path, producer, owners) is None:
                weight = _incoming(producer)
                weight[gone[rows].to(weight.device)] = 0
                if isinstance(producer.bias, Tensor):
                    producer.bias[gone[rows].to(weight.device)] = 0


# -- contributing ------------------------------------------------------------------------------------------------------


def margin_contributions(model: nn.Module, inputs: Inputs, sites: Sequence[Site], *, prefix: int = 0) -> Contributions:
    """Σ a_k · ∂m/∂a_k over the calls and positions of each example: what its margin m loses without neuron k.

    m = z_y − max z_other for the label y, or the mean of that over the predicted tokens of a text. It is held fixed
    which other logit is the largest. To first order in a_k; exact where the logits are linear in the neurons. One
    forward pass, and one backward pass each for margin and loss. A text without a predicted token contributes 0.

    Args:
        inputs: examples with labels, or texts for a causal language model (logits (b, p, v)).
        prefix: tokens at the start of each text that are given, not predicted; the first one always is.
    Returns:
        for each site (b, k) float64, from products in float32 or better.
    Raises:
        InputError: no labels, or ones that do not fit; no logits; an activation or contribution that is not finite.
    """
    read: list[tuple[int, Tensor]] = []  # index of the site and what it read, in the order of the calls

    def take(s: int, x: Tensor) -> Tensor:
        x = x.clone() if x.requires_grad else x.clone().requires_grad_()  # a copy: the slope is that by this reader
        read.append((s, x))
        return x

    with evaluating(model):
        with _replacing([site.reader for site in sites], take):
            logits = call(model, inputs)
        z, targets, keep = _predictions(logits, inputs, prefix)
        if not z.requires_grad:
            raise InputError("the model's logits do not depend on the neurons by way of gradients")
        activation = _mean_sizes(sites, read, inputs)
        n = keep.sum(1, keepdim=True).clamp(min=1).cpu()  # (b, 1): divided by last, so that no slope underflows

        def effects(dz: Tensor, *, again: bool) -> list[Tensor]:
            slopes = torch.autograd.grad(z, [x for _, x in read], dz, retain_graph=again, allow_unused=True)
            return [total / n for total in _sums(sites, read, slopes, inputs)]

        margin = effects(_margin_slope(z, targets, keep), again=True)
        loss = effects(_likelihood_slope(z, targets, keep), again=False)
    return Contributions(margin, loss, activation)


def _predictions(logits: Tensor | None, inputs: Inputs, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (b, p, v) that predict something, what (b, p) int64, and which of them count (b, p) bool."""
    if logits is None or logits.shape[-1] < 2:
        raise InputError("the model gives no logits of two classes or more; neurons cannot contribute to a margin")
    if logits.ndim == 3 and inputs.tokens is not None and inputs.mask is not None:
        keep = inputs.mask[:, 1:].clone()
        keep[:, : max(prefix - 1, 0)] = False
        targets = inputs.tokens[:, 1:].where(keep, 0)  # a padding id need not be in the vocabulary
        if targets.numel() and int(targets.max()) >= logits.shape[2]:
            raise InputError(f"the model's {logits.shape[2]} logits a token are not over its vocabulary")
        return logits[:, :-1], targets, keep
    if logits.ndim != 2:
        raise InputError(f"the model's logits have shape {tuple(logits.shape)}, wanted (example, class)")
    if inputs.labels is None:
        raise InputError("the margin of a classifier needs labels; give a dataset with a label column")
    wrong = inputs.labels[(inputs.labels < 0) | (inputs.labels >= logits.shape[1])]
    if len(wrong):
        raise InputError(f"label {int(wrong[0])} does not fit a model of {logits.shape[1]} classes")
    return logits[:, None], inputs.labels[:, None], torch.ones_like(inputs.labels[:, None], dtype=torch.bool)


def _margin_slope(z: Tensor, targets: Tensor, keep: Tensor) -> Tensor:
    """∂(z_y − max z_other)/∂z, (b, p, v): 1 at the target, −1 at the largest other."""
    first, second = z.detach().topk(2, dim=-1).indices.unbind(-1)
    other = torch.where(first == targets, second, first)
    slope = torch.zeros_like(z).scatter_(-1, targets[..., None], 1.0).scatter_(-1, other[..., None], -1.0)
    return slope.masked_fill_(~keep[..., None], 0)


def _likelihood_slope(z: Tensor, targets: Tensor, keep: Tensor) -> Tensor:
    """∂(ln p_y)/∂z, (b, p, v): 1 at the target, less p everywhere."""
    slope = -_wide(z.detach()).softmax(-1)
    slope.scatter_add_(-1, targets[..., None], torch.ones_like(slope[..., :1]))
    return slope.masked_fill_(~keep[..., None], 0).to(z)


@torch.inference_mode()
def readout_activations(model: nn.Module, inputs: Inputs, site: Site) -> Tensor | None:
    """(b, k) what the site's reader reads, if the model's logits are just what it makes of that; else None.

    Every effect of its neurons then follows from these activations and the reader's weights.
    """
    read: list[Tensor] = []

    def keep(_: int, x: Tensor) -> Tensor:
        read.append(x)
        return x

    with evaluating(model), _replacing([site.reader], keep):
        logits = call(model, inputs)
    if logits is None or len(read) != 1 or read[0].ndim != 2 or site.group != 1:
        return None
    if not isinstance(site.reader, nn.Linear) or not torch.equal(site.reader(read[0]), logits):
        return None
    return read[0]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows_read(site: Site, x: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What a reader read as (b, p, i) and which of that is real, (b, p, 1) bool."""
    grid = grid_of(site.reader, x.detach(), inputs.n_examples, site.axis)
    if grid is None:
        raise InputError(f"layer {site.name!r}: its input has no row for each example, but shape {tuple(x.shape)}")
    if inputs.mask is not None and inputs.mask.shape[1] == grid.shape[1]:
        return grid, inputs.mask[..., None]
    return grid, torch.ones(*grid.shape[:2], 1, dtype=torch.bool, device=x.device)


def _sums(
    sites: Sequence[Site], read: Sequence[tuple[int, Tensor]], slopes: Iterable[Tensor | None], inputs: Inputs
) -> list[Tensor]:
    """Σ a · slope over calls, positions and the inputs of each neuron: (b, k) float64 for each site."""
    sums = [torch.zeros(inputs.n_examples, site.width, dtype=torch.float64) for site in sites]
    for (s, x), slope in zip(read, slopes):
        if slope is not None:
            (a, real), (g, _) = (_rows_read(sites[s], tensor, inputs) for tensor in (x, slope))
            total = (_wide(a) * _wide(g)).masked_fill_(~real, 0).sum(1).cpu().double()  # (b, i)
            sums[s] += total.reshape(len(total), sites[s].width, sites[s].group).sum(2)
    for site, total in zip(sites, sums):
        if not total.isfinite().all():
            raise InputError(f"layer {site.name!r}: its neurons' slopes overflow; use --dtype float32")
    return sums


def _mean_sizes(sites: Sequence[Site], read: Sequence[tuple[int, Tensor]], inputs: Inputs) -> list[Tensor]:
    """The mean of |a| over calls, real positions and the inputs of each neuron: (b, k) float64 for each site."""
    for s, x in read:
        a, real = _rows_read(sites[s], x, inputs)
        bad = ~a.isfinite() & real
        if bad.any():
            what = "NaN" if a[bad].isnan().any() else "infinity"
            raise InputError(f"layer {sites[s].name!r}: its input holds {what}")
    sums = _sums(sites, read, (x.detach().sign() for _, x in read), inputs)
    counts = [torch.zeros(inputs.n_examples, 1, dtype=torch.float64) for _ in sites]
    for s, x in read:
        counts[s] += _rows_read(sites[s], x, inputs)[1].sum(1).cpu() * sites[s].group
    return [total / count.clamp(min=1) for total, count in zip(sums, counts)]
