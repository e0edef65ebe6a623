"""Turn-over dropout (Kobayashi et al., arXiv:2012.04207): what an example changed, from one training.

Every training example i has a dropout mask of its own, m_i in {0, 1}^d with each bit 1 at p = 1/2, drawn once and used
every time the example is learned. Behind the activation of each hidden layer:

    h · m_i / p              own network: what learns i
    h · (1 - m_i) / (1 - p)  flipped network: units that i never trained

    self-influence(i)     L(x_i; flipped mask of i) - L(x_i; mask of i)           L = -ln p(y_i | x_i), nats
    influence(i -> t)     L(x_t; flipped mask of i) - L(x_t; mask of i)

High self-influence is memorization: only the units that learned i know its label. A control trains with masks that are
drawn anew for every update, as ordinary dropout does; then no units are an example's own, and self-influence is chance.

Caveats. With a mask behind every hidden layer the loss of i moves no weight of the flipped network but the biases of
the output; the rest it hears of all the same, through other examples, whose masks are half i's. So the flipped network
is one that i did not train, not one trained without i. As half a network it is worse on every example: self-influence
has no zero point. It orders examples, and finds wrong labels well, but follows memorization as measured by training
without the example (see `memorization`) only loosely. Read it where own networks get nearly all of their examples
right.

Axes: n training example, t test example, b example of a batch, d masked unit (hidden layers one after the other).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from memdiag import supervised, training
from memdiag.errors import InputError
from memdiag.models.mlp import MLP, MlpConfig, scaled
from memdiag.progress import Progress
from memdiag.supervised import Examples
from memdiag.training import Recipe

P = 0.5  # of a unit to be on; the flipped mask is as dense only here
MASKS, REDRAWN = 6, 7  # keys of the draws beside the seed

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Network:
    """A network, and the mask that each of its training examples has.

    Attributes:
        mlp: in eval mode once it is trained.
        bits: (n, ceil(d / 8)) uint8, `np.packbits` of the masks along the units.
    """

    mlp: MLP
    bits: NDArray[np.uint8]

    def masks(self, at: Ints) -> Bools:
        """(b, d) masks of training examples, by their places."""
        return np.unpackbits(self.bits[at], axis=1, count=n_units(self.mlp.config)).astype(np.bool_)


@dataclass(frozen=True, eq=False)
class SelfInfluence:
    """What the two networks of every training example make of it.

    Attributes:
        own_loss, flipped_loss: (n,) ≥ 0, nats.
        own_correct, flipped_correct: (n,) whether the label has the highest logit, the first of equal ones.
    """

    own_loss: Floats
    flipped_loss: Floats
    own_correct: Bools
    flipped_correct: Bools

    @property
    def influence(self) -> Floats:
        """(n,) flipped_loss - own_loss, nats; high is memorized."""
        return self.flipped_loss - self.own_loss


def n_units(config: MlpConfig) -> int:
    """d: the units of all hidden layers."""
    return sum(config.widths[1:-1])


def draw_bits(n: int, units: int, seed: int) -> NDArray[np.uint8]:
    """The masks of n examples, packed; an example's depends on the seed, its place and the number of units alone.

    Returns:
        (n, ceil(units / 8)) uint8 for `np.unpackbits`; the bits behind the last unit are 0.
    """
    n_bytes = -(-units // 8)
    drawn = np.frombuffer(np.random.default_rng([seed, MASKS]).bytes(n * n_bytes), dtype=np.uint8)
    bits = drawn.reshape(n, n_bytes).copy()
    if units % 8:
        bits[:, -1] &= 0xFF << (8 - units % 8) & 0xFF
    return bits


def logits(mlp: MLP, features: Tensor, masks: Tensor) -> Tensor:
    """Logits of a network of which only the units of a mask are on.

    Args:
        features: (b, ...) as `MLP.forward` takes them.
        masks: (b, d) or (1, d) bool on the same device, 1 for on; the others are 0, and these are divided by p.
    Returns:
        (b, k), differentiable.
    """
    hidden = torch.flatten(scaled(features, mlp.config.input_mean, mlp.config.input_std), start_dim=1)
    left = list(torch.split(masks, list(mlp.config.widths[1:-1]), dim=1))
    for name, layer in mlp.layers.named_children():
        hidden = layer(hidden)
        if name.startswith("act_"):
            hidden = hidden * (left.pop(0).to(hidden.dtype) / P)
    return hidden


def fit(
    examples: Examples,
    config: MlpConfig,
    recipe: Recipe,
    *,
    device: torch.device,
    redrawn: bool = False,
    progress: Progress | None = None,
) -> Network:
    """Train a network, every example with its own mask.

    Initial weights, masks and the order of examples follow from recipe.seed. The last update may begin another pass.

    Args:
        examples: features with labels, at least one.
        config: of the network, with one hidden layer at least; no norm, which would mix masks, and no other dropout.
        redrawn: the control: ordinary dropout, the masks of the result are not those that it was trained with.
        progress: hears of every update.
    Raises:
        InputError: examples or a config of another kind.
        Diverged: the loss or its gradient is not finite.
    """
    _check(examples, config)
    with training.seeded(recipe.seed):
        mlp = MLP(config).to(device)
    n, units = len(examples), n_units(config)
    network = Network(mlp, draw_bits(n, units, recipe.seed))

    def backward(step: int) -> tuple[float, None]:
        at = training.rows_of_update(step, n, recipe.batch_size, recipe.seed)
        masks = network.masks(at)
        if redrawn:
            masks = np.random.default_rng([recipe.seed, REDRAWN, step]).random(masks.shape) < P
        inputs = examples.batch(at, 0, device)
        assert inputs.features is not None
        assert inputs.labels is not None
        loss = F.cross_entropy(logits(mlp, inputs.features, torch.from_numpy(masks).to(device)), inputs.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach()), None

    for _ in training.train(training.begin(mlp, recipe), recipe, backward):
        if progress is not None:
            progress.advance(1)
    mlp.eval()
    return network


def self_influence(network: Network, examples: Examples, *, batch_size: int = supervised.EVALUATED) -> SelfInfluence:
    """Loss of every training example in its own network and in the flipped one.

    Args:
        examples: those of `fit`, in the same order.
        batch_size: evaluated at once, ≥ 1; it changes nothing but rounding.
    Raises:
        InputError: they are not as many as there are masks, or of another kind.
    """
    _check_places(network, examples)
    _check(examples, network.mlp.config)
    own, flipped = [], []
    for start in range(0, len(examples), batch_size):
        at = np.arange(start, min(start + batch_size, len(examples)))
        masks = network.masks(at)
        own.append(_losses(network.mlp, examples, at, masks))
        flipped.append(_losses(network.mlp, examples, at, ~masks))
    (own_loss, own_correct), (flipped_loss, flipped_correct) = (map(np.concatenate, zip(*x)) for x in (own, flipped))
    return SelfInfluence(own_loss, flipped_loss, own_correct, flipped_correct)


def influence(
    network: Network, examples: Examples, test: Examples, at: Ints, *, batch_size: int = supervised.EVALUATED
) -> Floats:
    """influence(i -> t) of some training examples on test examples: how much higher the loss is without i's units.

    Args:
        examples: those of `fit`, in the same order.
        test: with labels among those of the training examples.
        at: (r,) places of the training examples.
        batch_size: test examples evaluated at once, ≥ 1; it changes nothing but rounding.
    Returns:
        (r, t) nats, positive where i helps t. A training example as t has its self-influence on the diagonal.
    Raises:
        InputError: the training examples are not as many as there are masks, or the test examples of another kind.
    """
    _check_places(network, examples)
    _check(test, network.mlp.config)
    found = np.empty((len(at), len(test)))
    for r, mask in enumerate(network.masks(at)):
        for start in range(0, len(test), batch_size):
            where = np.arange(start, min(start + batch_size, len(test)))
            own, _ = _losses(network.mlp, test, where, mask[None])
            flipped, _ = _losses(network.mlp, test, where, ~mask[None])
            found[r, where] = flipped - own
    return found


def _losses(mlp: MLP, examples: Examples, at: Ints, masks: Bools) -> tuple[Floats, Bools]:
    """(b,) losses in nats, and whether the label has the highest logit."""
    device = next(mlp.parameters()).device
    inputs = examples.batch(at, 0, device)
    assert inputs.features is not None
    assert examples.labels is not None
    with torch.no_grad():
        z = logits(mlp, inputs.features, torch.from_numpy(masks).to(device)).cpu().double()
    labels = examples.labels[at]
    loss = F.cross_entropy(z, torch.from_numpy(labels), reduction="none")
    return loss.numpy(), z.numpy().argmax(axis=1) == labels  # numpy's argmax is the first of equal ones


def _check_places(network: Network, examples: Examples) -> None:
    if len(examples) != len(network.bits):
        raise InputError(
            f"{len(examples)} examples, and the network has masks of {len(network.bits)}; wanted those it was trained "
            "on, in the same order"
        )


def _check(examples: Examples, config: MlpConfig) -> None:
    """Raise unless such a network can learn such examples with masks."""
    if examples.labels is None or not isinstance(examples.inputs, np.ndarray):
        raise InputError("turn-over dropout is for features with labels, and these examples are texts; use --arch mlp")
    if not len(examples):
        raise InputError("there is no example to learn; turn-over dropout needs at least 1")
    if len(config.widths) < 3:
        raise InputError("the network has no hidden layer to mask; turn-over dropout needs at least 1")
    if config.norm != "none" or config.dropout:
        raise InputError(
            f"the network has norm {config.norm} and dropout {config.dropout:g}; turn-over dropout wants neither"
        )
    top = int(examples.labels.max())
    if top >= config.widths[-1]:
        raise InputError(
            f"the network has {config.widths[-1]} outputs, and there is a label {top}; wanted an output for every "
            "class, 0 to the highest label"
        )
