"""What each layer's input is made of: found by trying, not by names or a list of architectures.

Axes: b example, p position (token or pixel), i input of a layer, c output of a layer, k neuron.

In one forward pass every layer's output is cut off from what it was made of, so that gradients tell what each input
is directly made of. If the gradient is taken of inputs that were multiplied, each unit by a power of two, then an
elementwise function gives exactly the same multiples, unit for unit, in any dtype, and one that mixes units does
not. Positions and examples likewise. An affine one has the same gradient whatever the outputs are. A use of a layer's
output that is not differentiable is not seen.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memdiag.errors import InputError
from memdiag.observe import Inputs, call

PROBE_TOKENS = 16
PROBE_EXAMPLES = 4
PROBE_ROWS = 16  # of a table, where an example shows one state of each unit only
OUTPUT = "the model's output"

# -- layers ------------------------------------------------------------------------------------------------------------


def is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with a weight (in, out)."""
    library = sys.modules.get("transformers.pytorch_utils")  # if nobody imported it, no module is of its class
    return library is not None and isinstance(module, library.Conv1D)


def layers_in(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers and convolutions by path; a module that has several is there once."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) or is_transposed(m)}


def n_spatial(module: nn.Module) -> int:
    """Axes after that of the channels; 0 for a linear layer."""
    return len(module.kernel_size) if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 0


def grid_of(module: nn.Module, x: Tensor, n_examples: int, axis: int = 0) -> Tensor | None:
    """A layer's input or output as (b, p, units), whichever of these it comes as; None if it is none of them.

    (b, units), (b, …, units), (b p, units), with axis = 1 (p, b, units); of convolutions (b, units, …).
    """
    spatial = n_spatial(module)
    if x.ndim < 2 + spatial or axis > x.ndim - 2 - spatial:
        return None
    x = x.movedim(-1 - spatial, -1).movedim(axis, 0)
    if len(x) == 0 or len(x) % n_examples or (axis and len(x) != n_examples):
        return None
    return x.reshape(n_examples, -1, x.shape[-1])


# -- running -----------------------------------------------------------------------------------------------------------


@contextmanager
def unfused() -> Iterator[None]:
    """Without nn.TransformerEncoder's fused path, which calls none of its layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and with gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with unfused(), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass
class Call:
    """One call of a layer in a forward pass that is cut at every layer's output."""

    name: str
    turn: int  # calls of the same layer before
    module: nn.Module
    x: Tensor  # made of the outputs of calls before it
    y: Tensor  # made of nothing
    axis: int | None = None  # where both have their examples


def _run(
    model: nn.Module, inputs: Inputs, change: Callable[[Tensor], Tensor] = torch.clone
) -> tuple[dict[tuple[str, int], Call], Tensor | None]:
    """All calls of layers by name and turn, in order, and the logits; with every layer's output changed."""
    calls: dict[tuple[str, int], Call] = {}
    turns = Counter[str]()

    def after(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return output
            x, y = args[0] if args else next(iter(kwargs.values())), change(output.detach()).requires_grad_()
            calls[name, turns[name]] = Call(name, turns[name], module, x.clone(), y)
            turns[name] += 1
            return y.clone()  # clones, since both may be changed in place later on

        return hook

    with ExitStack() as stack, evaluating(model):
        for name, module in layers_in(model).items():
            stack.callback(module.register_forward_hook(after(name), with_kwargs=True).remove)
        logits = call(model, inputs)
    return calls, logits


# -- probing -----------------------------------------------------------------------------------------------------------


@dataclass
class Probe:
    """What the forward pass of a few examples shows."""

    calls: list[Call]  # with changed outputs
    plain: dict[tuple[str, int], Call]  # the same with the outputs as they are
    n_examples: int
    n_tokens: int | None
    makers: list[list[int]]  # of each call's input: the calls whose outputs it is directly made of
    users: dict[str, set[str]]  # of each layer's outputs: the layers whose inputs are directly made of them

    def names(self, calls: Iterable[int]) -> str:
        """What to call some of the calls in a reason."""
        names = list(dict.fromkeys(self.calls[j].name for j in calls))
        return ", ".join(names[-2:]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _piece(inputs: Inputs) -> Inputs:
    """A few examples, the longest ones. Where there are too few, they are repeated, shifted to be no copies."""
    n = PROBE_ROWS if inputs.features is not None and inputs.features.ndim == 2 else PROBE_EXAMPLES
    if inputs.mask is None:
        return _changed(inputs, lambda x: torch.stack([x[i % len(x)].roll(i // len(x), -1) for i in range(n)]))
    lengths = inputs.mask.sum(1)
    longest = lengths.argsort(descending=True, stable=True)[:n]
    width = min(PROBE_TOKENS, max(1, int(lengths.max())))
    piece = _changed(inputs, lambda x: x[longest, :width])
    return piece if len(longest) > 1 else _changed(piece, lambda x: torch.cat([x, x.roll(1, -1)]))


def _changed(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    data = (inputs.tokens, inputs.mask, inputs.features)
    tokens, mask, features = (None if x is None else change(x) for x in data)
    return Inputs(tokens, mask, features, None)


def _slopes(x: Tensor, weights: Tensor, calls: Sequence[Call]) -> list[Tensor | None]:
    """∂(Σ weights · x)/∂y of each call; None where that is zero all over."""
    if not calls or not x.requires_grad:
        return [None] * len(calls)
    weights = weights.to(x).expand_as(x)
    found = torch.autograd.grad(x, [c.y for c in calls], weights, retain_graph=True, allow_unused=True)
    return [None if g is None or not g.count_nonzero() else g for g in found]


def _random_weights(shape: Sequence[int]) -> Tensor:
    """From ½ to 1½, so that no two terms cancel, as they do in the plain sum over a layer norm's outputs."""
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(0)) + 0.5


def _multipliers(n: int) -> Tensor:
    """(n,) powers of two of either sign, all different for n ≤ 14, else at random: exact in any float dtype."""
    powers = torch.tensor([sign * 2.0**e for e in range(-3, 4) for sign in (1, -1)])
    return powers[torch.randperm(n, generator=torch.Generator().manual_seed(n)) % len(powers)]


def probe_of(model: nn.Module, inputs: Inputs) -> Probe:
    """What a few examples of the batch show.

    Raises:
        InputError: what a layer reads is NaN or infinite.
    """
    inputs = _piece(inputs)
    n_examples, n_tokens = inputs.n_examples, None if inputs.tokens is None else inputs.tokens.shape[1]
    plain, _ = _run(model, inputs)
    for c in plain.values():
        if not c.x.isfinite().all():
            raise InputError(f"layer {c.name!r}: its input holds {'NaN' if c.x.isnan().any() else 'infinity'}")
    rolled, _ = _run(model, _changed(inputs, lambda x: x.roll(1, 0)))
    found, logits = _run(model, inputs, _turned)
    calls = list(found.values())
    makers: list[list[int]] = []
    users: dict[str, set[str]] = defaultdict(set)
    for i, c in enumerate(calls):
        c.axis = _axis(plain.get((c.name, c.turn)), rolled.get((c.name, c.turn)), n_examples)
        slopes = _slopes(c.x, _random_weights(c.x.shape), calls[:i])
        makers.append([j for j, slope in enumerate(slopes) if slope is not None])
        for j in makers[i]:
            users[calls[j].name].add(c.name)
    for j, slope in enumerate(_slopes(logits, _random_weights(logits.shape), calls) if logits is not None else []):
        if slope is not None:
            users[calls[j].name].add(OUTPUT)
    return Probe(calls, plain, n_examples, n_tokens, makers, users)


def _turned(y: Tensor) -> Tensor:
    """Times 1 or −2 at random, so that no unit is off, or on, in all places; no odd function has equal slopes there."""
    return y * torch.randint(2, y.shape, generator=torch.Generator().manual_seed(0)).to(y.device).mul_(-3).add_(1).to(y)


def _axis(one: Call | None, other: Call | None, n_examples: int) -> int | None:
    """Which axis of a layer's input follows the examples when they change places."""
    if one is None or other is None:
        return None
    for axis in (0, 1):
        a, b = (grid_of(c.module, c.x.detach().cpu(), n_examples, axis) for c in (one, other))
        if a is not None and b is not None and a.shape == b.shape:
            a, b = a.double(), b.double()
            spread = (a - a.mean(0)).norm()  # what the examples have in common tells nothing
            if (a.roll(1, 0) - b).norm() <= 0.1 * spread + 4 * torch.finfo(one.x.dtype).eps * a.norm():
                return axis
    return None


@dataclass
class Reading:
    """How the input of one call is made."""

    width: int
    group: int
    rows: dict[str, Tensor]  # path of a producer -> (c,) int64: the neuron that each of its outputs is part of
    axis: int


def reading_of(probe: Probe, index: int) -> Reading | str:
    """How a call's input is made, or why it is no elementwise, non-affine function of outputs that it alone uses."""
    c, makers = probe.calls[index], probe.makers[index]
    if not makers:
        return "its input depends on no other layer"
    x = None if c.axis is None else grid_of(c.module, c.x, probe.n_examples, c.axis)
    if x is None or any(probe.calls[j].axis is None for j in makers):
        return "its input has no row for each example"
    if probe.n_tokens is not None and x.shape[1] not in (1, probe.n_tokens):
        return f"its input has {x.shape[1]} positions where the batch has {probe.n_tokens} tokens"
    names = probe.names(makers)
    weights = _random_weights(x.shape)
    plain = _grids(probe, x, weights, makers)
    found = _neurons(probe, index, x, weights, plain)
    if found is None:
        return f"its input is no elementwise function of other layers' outputs: it mixes those of {names}"
    if not _keeps_places(probe, x, weights, plain):
        return f"its input mixes positions of the outputs of {names}"
    if _is_affine(probe, index):
        return f"its input is an affine function of the outputs of {names}"
    for name in (probe.calls[j].name for j in makers):
        for user in sorted(probe.users[name] - {c.name}):
            return f"what it reads of {name} is also used by {user}"
    return found


def _grids(probe: Probe, x: Tensor, weights: Tensor, makers: Sequence[int]) -> dict[int, Tensor]:
    """∂(Σ weights · x)/∂y of some calls as (b, p, c)."""
    calls = [probe.calls[j] for j in makers]
    found: dict[int, Tensor] = {}
    for j, maker, slope in zip(makers, calls, _slopes(x, weights, calls)):
        slope = torch.zeros_like(maker.y) if slope is None else slope
        grid = grid_of(maker.module, slope, probe.n_examples, maker.axis or 0)
        assert grid is not None  # a layer's output has its examples where its input has them
        found[j] = grid
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal but for the order of sums over pixels, and in float16, where small slopes are not exact, for rounding."""
    relative = 2 * torch.finfo(a.dtype).eps if a.dtype == torch.float16 else 1e-5
    return torch.allclose(a, b, rtol=relative, atol=torch.finfo(a.dtype).tiny)


def _neurons(probe: Probe, index: int, x: Tensor, weights: Tensor, plain: Mapping[int, Tensor]) -> Reading | None:
    """Which neuron each output of the producers is part of, if each is part of one only."""
    c, n_inputs = probe.calls[index], x.shape[-1]
    n_outputs = max(slope.shape[-1] for slope in plain.values())
    flattened = n_spatial(c.module) == 0 and x.shape[1] == 1 and n_inputs % n_outputs == 0
    for group in sorted({1, n_inputs // n_outputs}) if flattened else [1]:
        each = _multipliers(n_inputs // group)
        scaled = _grids(probe, x, weights * each.repeat_interleave(group).to(weights), list(plain))
        rows = _rows(probe, plain, scaled, each)
        if rows and len({k for of in rows.values() for k in of.tolist()}) == len(each):
            return Reading(len(each), group, rows, c.axis or 0)
    return None


def _rows(
    probe: Probe, plain: Mapping[int, Tensor], scaled: Mapping[int, Tensor], each: Tensor
) -> dict[str, Tensor] | None:
    """Of each producer the (c,) neurons that its outputs are part of, read off from how their slopes were scaled."""
    rows: dict[str, Tensor] = {}
    start = 0
    for j, slope in plain.items():
        n = slope.shape[-1]
        fits = (k for k in _orders(n, len(each), start) if _same(scaled[j], slope * each[k].to(slope)))
        fit = next(fits, None)
        if fit is None or not torch.equal(rows.setdefault(probe.calls[j].name, fit), fit):
            return None
        start += n
    return rows


def _orders(n: int, width: int, start: int) -> Iterator[Tensor]:
    """The (c,) neurons that n outputs may be part of: all of them in order, once or again and again (gate and up
    from one layer) or alternating; or, where outputs are concatenated, those from `start`.
    """
    if n % width == 0:
        yield torch.arange(n) % width
        yield torch.arange(n) // (n // width)
    if start + n <= width:
        yield torch.arange(n) + start


def _keeps_places(probe: Probe, x: Tensor, weights: Tensor, plain: Mapping[int, Tensor]) -> bool:
    """Whether no entry of x is made of another example, or of another position of a linear layer.

    Of feature maps it may be made of several positions: pooling and flattening are allowed.
    """
    by_example, by_position = _multipliers(len(x))[:, None, None], _multipliers(x.shape[1])[:, None]
    moved = _grids(probe, x, weights * by_example, list(plain))
    if not all(_same(moved[j], slope * by_example.to(slope)) for j, slope in plain.items()):
        return False
    linear = [j for j in plain if n_spatial(probe.calls[j].module) == 0]
    moved = _grids(probe, x, weights * by_position, linear)
    for j in linear:
        slope = plain[j]
        if slope.shape[1] == x.shape[1]:
            if not _same(moved[j], slope * by_position.to(slope)):
                return False
        elif slope.shape[1] != 1 and (x.shape[1] != 1 or bool(((slope != 0).sum(1) > 1).any())):
            return False  # unless there is one position only, for all of x, or one that is picked, e.g. that of [CLS]
    return True


def _is_affine(probe: Probe, index: int) -> bool:
    """Whether the slopes of a call's input are the same when the outputs that it is made of are others."""
    calls = [probe.calls[index], *(probe.calls[j] for j in probe.makers[index])]
    (x, *makers), (other, *others) = calls, [probe.plain[c.name, c.turn] for c in calls]  # an axis means it is there
    if x.x.shape != other.x.shape:
        return False
    weights = _random_weights(x.x.shape)
    for a, b in zip(_slopes(x.x, weights, makers), _slopes(other.x, weights, others)):
        if (a is None) != (b is None):
            return False
        if a is not None and b is not None and not torch.allclose(a, b, rtol=4 * torch.finfo(a.dtype).eps, atol=0):
            return False
    return True
