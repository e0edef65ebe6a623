"""Many models trained at once on one device: their weights stacked along a leading axis, each with its own examples.

Three ways, the same for every model of a run, whatever its neighbours:

    stacked   a ReLU network of linear layers under SGD without clipping: forward, backward and update by hand, a
              batched matrix product for every layer. With a_0 the inputs and δ_L = (softmax(z) − onehot(y)) / b,
                  z_l = a_{l−1} W_l + c_l      a_l = max(z_l, 0)      δ_{l−1} = (δ_l W_lᵀ) ∘ [a_{l−1} > 0]
                  V ← 0.9 V + a_{l−1}ᵀ δ_l + λ W_l      W_l ← W_l − η V
    vmap      any other module: torch.func.vmap over stacked parameters and buffers. The loss is the sum over models of
              each model's mean, so that no gradient meets another's. How a model's sums are rounded depends on where
              in the stack it lies and on the stack's size: stacks have one size, and a model its place.
    alone     one after another: modules that draw random numbers when they train (dropout), those that vmap cannot run
              or runs differently, and on a CPU those whose updates are so long that nothing is gained side by side.

Model k's order of examples is a permutation of all n from its seed and the epoch, of which it skips those that it is
not trained on: the order does not tell who is in.

Axes: m model, n example, b example of an update, t token, i o units of a layer, k class or vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memdiag import device as devices
from memdiag import observe, training
from memdiag.errors import InputError, one_line
from memdiag.models.mlp import MLP, MlpConfig, scaled
from memdiag.packing import Corpus
from memdiag.supervised import Examples
from memdiag.training import Recipe

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
New = Callable[[int], nn.Module]

RESIDENT = 2**30  # bytes of examples that are kept on the device
AHEAD = 2**22  # places of examples drawn at once
ALIGN = 16  # units are padded to a multiple, 64 bytes: where a model lies in memory then has no effect on its sums
MOMENTUM = 0.9
PLACES = {"cpu": 8, "cuda": 64}  # models of vmap's stacks, by kind of device
HEAVY = 1e8  # operations of the forward pass of an update, beyond which a core is busy with one model
MOST_STACKED = 2**28  # weights of a stack: 4 GiB with gradients and moments
SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TRIAL_S, ENOUGH = 0.1, 0.95  # of each size; a larger one is taken only if it needs less than this share of the time
AGREE = 1e-4  # of vmap's gradient with the plain one, relative to the largest


@dataclass(frozen=True, eq=False)
class Member:
    """One model of an ensemble."""

    seed: int  # of its initial weights and its order
    included: Bools  # (n,) the examples it is trained on, at least one
    place: int = 0  # e.g. its number; vmap runs together what has different places, modulo the size of a stack

    def __post_init__(self) -> None:
        if not self.included.any():
            raise ValueError("a model is trained on at least one example")


class Data:
    """Examples on the device, where they fit there; tokens padded to the longest example, whoever is in a batch."""

    def __init__(self, examples: Examples, pad_id: int, device: torch.device) -> None:
        self.examples, self.pad_id, self.device = examples, pad_id, device
        inputs, n = examples.inputs, len(examples)
        self.labels = None if examples.labels is None else torch.from_numpy(examples.labels).to(device)
        self.length = int(inputs.lengths.max()) if isinstance(inputs, Corpus) else 0
        size = 8 * n * self.length if isinstance(inputs, Corpus) else inputs.nbytes
        self._kept = self._load(np.arange(n)) if n and size <= RESIDENT else None

    def __len__(self) -> int:
        return len(self.examples)

    def _load(self, at: Ints) -> tuple[Tensor, Tensor | None]:
        """Features, or tokens and lengths."""
        inputs = self.examples.inputs
        if not isinstance(inputs, Corpus):
            return torch.from_numpy(np.array(inputs[at])).to(self.device), None
        ids, mask = inputs.batch(at, pad_id=self.pad_id)
        ids = F.pad(ids, (0, self.length - ids.shape[1]), value=self.pad_id)
        return ids.to(self.device), mask.sum(1).to(self.device)

    def batch(self, at: Tensor) -> dict[str, Tensor]:
        """What the examples at some places, of any shape, hold: features, or tokens and mask; and labels."""
        flat = at.flatten()
        if self._kept is None:
            values, lengths = self._load(flat.cpu().numpy())
        else:
            kept, sizes = self._kept
            values, lengths = kept.index_select(0, flat), None if sizes is None else sizes.index_select(0, flat)
        found = {} if self.labels is None else {"labels": self.labels.index_select(0, flat)}
        if lengths is None:
            found["features"] = values
        else:
            found["tokens"] = values
            found["mask"] = torch.arange(self.length, device=self.device) < lengths[:, None]
        return {name: x.view(*at.shape, *x.shape[1:]) for name, x in found.items()}


def places(members: Sequence[Member], n: int, batch_size: int, steps: int, device: torch.device) -> Iterator[Tensor]:
    """(m, b) the examples of one update after another."""
    orders = [_order(member, n) for member in members]
    held = [next(order) for order in orders]
    at_once = max(1, AHEAD // (len(members) * batch_size))
    for first in range(0, steps, at_once):
        size = min(at_once, steps - first) * batch_size
        for i, order in enumerate(orders):
            more, n_held = [held[i]], len(held[i])
            while n_held < size:
                more.append(next(order))
                n_held += len(more[-1])
            held[i] = np.concatenate(more)
        block = np.stack([own[:size] for own in held]).reshape(len(members), -1, batch_size)
        held = [own[size:] for own in held]
        yield from torch.from_numpy(block.swapaxes(0, 1).copy()).to(device)


def _order(member: Member, n: int) -> Iterator[Ints]:
    """A member's examples, epoch after epoch."""
    epoch = 0
    while True:
        every = np.random.default_rng([member.seed, epoch]).permutation(n)
        yield every[member.included[every]]
        epoch += 1


# -- the three ways --------------------------------------------------------------------------------------------------


def way_of(new: New, data: Data, recipe: Recipe) -> tuple[str, str]:
    """How models of this kind are trained, and why not in a faster way ("" for the fastest).

    Args:
        new: makes the model of a seed.
    """
    model = new(0)
    if is_plain(model, recipe):
        return "stacked", ""
    model = model.to(data.device).train()
    some = torch.arange(min(2, len(data)), device=data.device)
    try:
        with training.seeded(0):  # whatever it draws, nothing leaks out
            wanted = _gradients_alone(model, data.batch(some))
        pair = [new(0).to(data.device).train(), new(1).to(data.device).train()]
        state = _Stack(pair)
        with sdpa_kernel(SDPBackend.MATH):
            state.losses(data.batch(some.expand(2, -1))).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # what a model does under torch.func is not ours to foresee
        if devices.is_out_of_memory(error):  # another day it may be there
            raise
        return "alone", one_line(error, 160)
    for name, right in wanted.items():
        found = state.parameters[name].grad
        if found is None or not torch.allclose(found[0], right, rtol=AGREE, atol=AGREE * float(right.abs().max())):
            return "alone", f"the gradient of {name} is another one under vmap"
    own = dict(model.named_buffers())
    if any(not torch.allclose(state.buffers[name][0].double(), own[name].double(), rtol=AGREE) for name in own):
        return "alone", "what it keeps beside its weights is another under vmap"
    if data.device.type == "cpu" and _operations(model, data, some) * recipe.batch_size / len(some) > HEAVY:
        return "alone", "one update keeps a core busy"
    return "vmap", ""


def _operations(model: nn.Module, data: Data, at: Tensor) -> int:
    """Of a forward pass, as they are counted from the shapes of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _Loss(model)(data.batch(at))
    return int(counter.get_total_flops())


def _gradients_alone(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    state = torch.get_rng_state()
    _Loss(model)(batch).backward()
    if not torch.equal(state, torch.get_rng_state()):
        raise RuntimeError("it draws random numbers when it trains")
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train(
    members: Sequence[Member],
    new: New,
    data: Data,
    recipe: Recipe,
    *,
    way: str,
    steps: int | None = None,
) -> list[nn.Module]:
    """The models, trained; a model's weights do not depend on the others.

    Args:
        members: at least one.
        new: makes the model of a seed.
        recipe: its seed is not used; every update has batch_size examples, which may begin another pass.
        way: of `way_of`.
        steps: stop after as many updates; None: after the recipe's.
    Raises:
        InputError: the model cannot be run on these examples.
    """
    steps = recipe.steps if steps is None else steps
    models = [new(member.seed).to(data.device).train() for member in members]
    if way == "alone":
        for member, model in zip(members, models):
            _train_alone(member, model, data, recipe, steps)
    elif way == "stacked":
        _train_stacked(members, models, data, recipe, steps)
    else:
        _train_vmap(members, models, data, recipe, steps)
    return [model.eval() for model in models]


def is_finite(model: nn.Module) -> bool:
    """Whether all of a model's weights are finite numbers."""
    return all(bool(p.isfinite().all()) for p in model.parameters())


def size_of_chunk(new: New, data: Data, recipe: Recipe, *, way: str, most: int) -> int:
    """How many models to train at once: the smallest number that a larger one, in a quick trial, does not beat.

    More is not better on a CPU, where the weights soon leave its cache. With vmap as many as there are places, which
    are computed whether they are taken or not.

    Args:
        most: models that there are to train.
    """
    if way != "stacked":
        return 1 if way == "alone" else _places(new(0).to(data.device))
    everyone = np.ones(len(data), dtype=np.bool_)
    best, best_s = 1, float("inf")
    for size in [size for size in SIZES if size <= most]:
        members = [Member(seed, everyone) for seed in range(size)]
        try:
            seconds = _timed(members, new, data, recipe, way) / size
        except torch.OutOfMemoryError:
            break
        if seconds < ENOUGH * best_s:
            best, best_s = size, seconds
        elif size >= 4 * best:
            break
    return best


def _timed(members: Sequence[Member], new: New, data: Data, recipe: Recipe, way: str) -> float:
    """Seconds of an update, from so many that they take a while; what a single one takes is setting up."""

    on_cuda = data.device.type == "cuda"
    clock = time.perf_counter if on_cuda else time.process_time  # of one thread, whatever else the machine does

    def taken(steps: int) -> float:
        began = clock()
        train(members, new, data, recipe, way=way, steps=steps)
        if on_cuda:
            torch.cuda.synchronize()
        return clock() - began

    taken(1)  # compiles and allocates
    one, steps = taken(1), 2
    while (several := taken(steps) - one) < TRIAL_S and steps < recipe.steps:
        steps = min(4 * steps, recipe.steps)
    return max(several, 1e-9) / (steps - 1)


# alone


class _Loss(nn.Module):
    """The mean loss of a batch as a module, so that torch.func can call it with other weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """A classifier's over examples, a language model's over tokens.

        A language model gets no mask: padding comes after the tokens, which do not look ahead, and has no loss.
        """
        labels, tokens, mask = batch.get("labels"), batch.get("tokens"), batch.get("mask")
        shown = observe.Inputs(tokens, mask if labels is not None else None, batch.get("features"), labels)
        logits = observe.call(self.model, shown)
        if logits is None:
            raise InputError("the model has no output that could be logits")
        if labels is not None:
            return F.cross_entropy(logits.float(), labels)
        assert tokens is not None
        assert mask is not None
        counts = mask[:, 1:]
        nll = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return (nll * counts.flatten()).sum() / counts.sum()


def _train_alone(member: Member, model: nn.Module, data: Data, recipe: Recipe, steps: int) -> None:
    """With PyTorch's own optimizer, one model."""
    order = places([member], len(data), recipe.batch_size, steps, data.device)
    loss_of, at = _Loss(model), training.begin(model, recipe)
    for step in range(steps):
        with training.seeded(member.seed, step):
            loss_of(_trimmed(data.batch(next(order)[0]))).backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        _set_lr(at.optimizer, recipe.lr_at(step))
        at.optimizer.step()
        at.optimizer.zero_grad(set_to_none=True)


def _trimmed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of one model without what is padding for all of it."""
    if "mask" not in batch:
        return batch
    longest = int(batch["mask"].sum(1).max())
    return batch | {name: batch[name][:, :longest] for name in ("tokens", "mask")}


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


# vmap


class _Stack:
    """The parameters and buffers of several models of a kind, stacked."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        parameters, self.buffers = stack_module_state(list(models))
        self.parameters = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        program = _Loss(models[0])

        def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
            named = {f"model.{name}": x for name, x in (parameters | buffers).items()}
            found: Tensor = functional_call(program, named, (batch,))
            return found

        self._losses = vmap(loss)  # which refuses random numbers

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """(m,) the mean loss of each model on its own examples (m, b, ...)."""
        found: Tensor = self._losses(self.parameters, self.buffers, batch)
        return found

    def unstack(self, models: Mapping[int, nn.Module]) -> None:
        """Put the weights of some places into models."""
        with torch.no_grad():
            for i, model in models.items():
                for name, p in model.named_parameters():
                    p.copy_(self.parameters[name][i])
                for name, buffer in model.named_buffers():
                    buffer.copy_(self.buffers[name][i])


def _train_vmap(
    members: Sequence[Member], models: Sequence[nn.Module], data: Data, recipe: Recipe, steps: int
) -> None:  # fmt: skip
    size, waiting = _places(models[0]), list(zip(members, models))
    while waiting:
        taken: dict[int, tuple[Member, nn.Module]] = {}
        for member, model in waiting:
            taken.setdefault(member.place % size, (member, model))
        now = {place: model for place, (_, model) in taken.items()}
        waiting = [(member, model) for member, model in waiting if model is not now[member.place % size]]
        spare = next(iter(taken.values()))  # what stands at a place that nobody has
        seats = [taken.get(place, spare) for place in range(size)]
        stack = _Stack([model for _, model in seats])
        _train_stack([member for member, _ in seats], stack, data, recipe, steps)
        stack.unstack(now)


def _places(model: nn.Module) -> int:
    """How many models of a kind are stacked."""
    weights = list(model.parameters())
    return max(1, min(PLACES.get(weights[0].device.type, 1), MOST_STACKED // sum(p.numel() for p in weights)))


def _train_stack(members: Sequence[Member], stack: _Stack, data: Data, recipe: Recipe, steps: int) -> None:
    parameters = list(stack.parameters.values())
    decayed = [p for p in parameters if p.ndim > 2]  # a model's own have an axis less
    others = [p for p in parameters if p.ndim <= 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=MOMENTUM, fused=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, recipe.beta2), fused=True)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no rule for vmap
        for step, at in enumerate(places(members, len(data), recipe.batch_size, steps, data.device)):
            stack.losses(data.batch(at)).sum().backward()  # type: ignore[no-untyped-call]
            if recipe.clip:
                _clip_each(parameters, recipe.clip)
            _set_lr(optimizer, recipe.lr_at(step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _clip_each(parameters: Sequence[Tensor], longest: float) -> None:
    """As clip_grad_norm_ does it, each model by the length of its own gradient."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([g.reshape(len(g), -1).norm(dim=1) for g in gradients]).norm(dim=0)  # (m,)
    factors = (longest / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


# stacked


def is_plain(model: nn.Module, recipe: Recipe) -> bool:
    """Whether a model and its recipe are those of the way `stacked`."""
    if type(model) is not MLP or recipe.optimizer != "sgd" or recipe.clip:
        return False
    config = model.config
    return config.activation == "relu" and config.norm == "none" and not config.dropout and config.bias


@torch.no_grad()
def _train_stacked(
    members: Sequence[Member], models: Sequence[nn.Module], data: Data, recipe: Recipe, steps: int
) -> None:  # fmt: skip
    m, b, labels = len(models), recipe.batch_size, data.labels
    assert labels is not None
    layers = [[layer for layer in model.modules() if isinstance(layer, nn.Linear)] for model in models]
    # (m, i, o) and (m, 1, o), a copy, padded by units that stay 0; those of the last layer have probability e^−∞
    weights = [_padded(torch.stack([layer.weight.T for layer in same]), 1, 2) for same in zip(*layers)]
    biases = [_padded(torch.stack([layer.bias for layer in same])[:, None], 2) for same in zip(*layers)]
    biases[-1][..., layers[0][-1].out_features :] = -torch.inf
    motions = [torch.zeros_like(w) for w in weights]
    bias_motions = [torch.zeros_like(c) for c in biases]
    minus_one = torch.full((m, b, 1), -1.0, device=data.device)
    config = models[0].config
    assert isinstance(config, MlpConfig)
    if int(labels.max()) >= config.widths[-1]:
        raise InputError(f"the model has {config.widths[-1]} outputs, and there is a label {int(labels.max())}")
    last = len(weights) - 1
    for step, at in enumerate(places(members, len(data), b, steps, data.device)):
        batch = data.batch(at)
        activations = [_padded(scaled(batch["features"].flatten(2), config.input_mean, config.input_std), 2)]
        for layer in range(last):
            activations.append(torch.baddbmm(biases[layer], activations[-1], weights[layer]).relu_())
        delta = torch.baddbmm(biases[last], activations[-1], weights[last]).softmax(-1)
        delta.scatter_add_(-1, batch["labels"][..., None], minus_one).mul_(1 / b)
        lr = recipe.lr_at(step)
        for layer in range(last, -1, -1):
            back = torch.bmm(delta, weights[layer].transpose(1, 2)) if layer else None
            motion = motions[layer].baddbmm_(activations[layer].transpose(1, 2), delta, beta=MOMENTUM)
            if recipe.weight_decay:
                motion.add_(weights[layer], alpha=recipe.weight_decay)
            bias_motions[layer].mul_(MOMENTUM).add_(delta.sum(1, keepdim=True))
            weights[layer].add_(motion, alpha=-lr)
            biases[layer].sub_(bias_motions[layer] * lr)  # rounded twice in every place; with alpha= in some once
            if back is not None:
                delta = torch.ops.aten.threshold_backward(back, activations[layer], 0)
    for i, own in enumerate(layers):
        for layer, module in enumerate(own):
            module.weight.copy_(weights[layer][i, : module.in_features, : module.out_features].T)
            module.bias.copy_(biases[layer][i, 0, : module.out_features])


def _padded(x: Tensor, *axes: int) -> Tensor:
    """With zeros at the end of some axes, so that their lengths are multiples."""
    more = [-x.shape[axis] % ALIGN if axis in axes else 0 for axis in range(x.ndim)]
    return F.pad(x, [n for length in reversed(more) for n in (0, length)]) if any(more) else x
