"""Conflicting experience: does GAPT pull apart the hidden states of two classes that want opposite weights?

Yu, arXiv:2505.08727: a network with one hidden layer is trained on `memdiag.tasks.conflict`, positive and negative
examples mixed or one after the other. In a mixed batch the positive ones come first, so that every patch of 8 rows is
of one class, and low entropy asks each class to be compact by itself. In the `shuffled` arms the rows of a batch are
in random order, and patches hold both classes.

Axes: n example, j hidden neuron.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from memdiag import gapt, mbe, training
from memdiag.errors import IncompleteError
from memdiag.models.mlp import MLP, MlpConfig
from memdiag.reproduce_effects import Arm, Control, Effect
from memdiag.tasks import conflict

STEPS = 1000
BATCH_SIZE = 32  # rows of an update; a mixed one has half of each class
LR = 0.01
SIGMA = 0.25
N_TRAIN, N_VALIDATION = 500, 100  # of each class
PATCH_SIZE = 8
POSITIVE, NEGATIVE, MIXED = (0,), (1,), (0, 1)
RULE = gapt.Rule(ce_patience=50, mbe_patience=50, smoothing=0)  # δ 0.01 and τ 0.1 are the defaults


@dataclass(frozen=True)
class Way:
    """How an arm trains."""

    gate: str = "none"
    weight: float = 0.0
    shuffled: bool = False  # the rows of a batch
    halves: tuple[tuple[int, ...], tuple[int, ...]] = (MIXED, MIXED)  # classes in the first and second half of updates


WAYS = {
    "mixed": Way(),
    "gapt_w1": Way("paper", 1.0),
    "gapt_w10": Way("paper", 10.0),
    "constant_0.1": Way("constant", 0.1),
    "constant_1": Way("constant", 1.0),
    "constant_10": Way("constant", 10.0),
    "random": Way("random", 10.0),
    "shuffled_mixed": Way(shuffled=True),
    "shuffled_gapt_w10": Way("paper", 10.0, shuffled=True),
    "pos_only": Way(halves=(POSITIVE, POSITIVE)),
    "neg_only": Way(halves=(NEGATIVE, NEGATIVE)),
    "pos_then_neg": Way(halves=(POSITIVE, NEGATIVE)),
    "neg_then_pos": Way(halves=(NEGATIVE, POSITIVE)),
}
ARMS = tuple(Arm(name, needs="gapt_w10" if way.gate == "random" else None) for name, way in WAYS.items())

PAPER: dict[str, dict[str, float]] = {  # the paper's table, one run each
    "l1_pos": {
        "pos_only": 0.02, "neg_only": 0.92, "pos_then_neg": 0.43, "neg_then_pos": 0.02, "mixed": 0.03, "gapt_w10": 0.03,
    },
    "l1_neg": {
        "pos_only": 0.71, "neg_only": 0.02, "pos_then_neg": 0.04, "neg_then_pos": 0.57, "mixed": 0.03, "gapt_w10": 0.03,
    },
    "mbe_pos": {"mixed": 0.10, "gapt_w10": 0.02},
    "mbe_neg": {"mixed": 0.22, "gapt_w10": 0.02},
    "distance": {"mixed": 3.66, "gapt_w10": 6.64},
    "separation": {"mixed": 4.11, "gapt_w10": 8.08},
}  # fmt: skip


def effects(preset: str) -> list[Effect]:
    """What the paper's table says, in the order in which it matters."""
    return [
        _gapt("separation", "GAPT doubles the distance between the classes in units of the spread within them", +1),
        _gapt("distance", "GAPT moves the means of the two classes' hidden states apart", +1),
        _gapt("balance", "GAPT keeps the hidden states of both classes about as long", +1),
        _gapt("mbe_pos", "GAPT lowers the entropy of the positive examples' hidden states", -1),
        _gapt("mbe_neg", "GAPT lowers the entropy of the negative examples' hidden states", -1),
        _gapt("l1_pos", "GAPT does not raise the error of positive examples; disagrees means that it does", -1),
        _gapt("l1_neg", "GAPT does not raise the error of negative examples; disagrees means that it does", -1),
        _order("order_forgets_pos", "l1_pos", "pos_then_neg", ("pos_only", "neg_only", "neg_then_pos")),
        _order("order_forgets_neg", "l1_neg", "neg_then_pos", ("neg_only", "pos_only", "pos_then_neg")),
    ]


def _gapt(measure: str, statement: str, direction: int) -> Effect:
    arms = ("gapt_w1", "constant_0.1", "constant_1", "constant_10", "random")
    return Effect(
        name=measure,
        statement=statement,
        measure=measure,
        baseline="mixed",
        treated="gapt_w10",
        controls=(*map(Control, arms), Control("shuffled_gapt_w10", "shuffled_mixed")),
        paper=PAPER.get(measure, {}),
        paper_note="table, one run, without balance; the weight is not given, 10 is that of the author's code",
        direction=direction,
        relative=True,
    )


def _order(name: str, measure: str, treated: str, controls: tuple[str, ...]) -> Effect:
    return Effect(
        name=name,
        statement="The class that comes first is forgotten: its error is larger than after mixed training",
        measure=measure,
        baseline="mixed",
        treated=treated,
        controls=tuple(map(Control, controls)),
        paper=PAPER[measure],
        paper_note="table, one run; GAPT is not tried on it there",
        direction=+1,
    )


def steps(preset: str, arm: str) -> int:
    """Updates of one run; both presets are the same, as it takes a second."""
    return STEPS


def settings(preset: str) -> dict[str, Any]:
    """What decides the figures besides arm and seed."""
    sizes = {"steps": STEPS, "batch_size": BATCH_SIZE, "lr": LR, "sigma": SIGMA, "patch_size": PATCH_SIZE}
    ways = {name: dataclasses.asdict(way) for name, way in WAYS.items()}
    return sizes | {"n": [N_TRAIN, N_VALIDATION], "rule": dataclasses.asdict(RULE), "ways": ways}


def run(
    arm: str, seed: int, preset: str, given: Mapping[str, float | None] | None, advance: Callable[[int], None]
) -> dict[str, float | None]:
    """Train one network from θ and look at it; `given` are the measures of gapt_w10 with this seed, for `random`.

    Random compresses in as many updates, and in stretches as long as those of the gate were on average.

    Returns:
        of the validation rows, class by class: l1_pos, l1_neg, mbe_pos, mbe_neg; distance, separation and balance
        of their hidden states. Of the training: the share of all updates that compressed, and how many stretches they
        made up.
    Raises:
        IncompleteError: the loss is not finite.
    """
    way = WAYS[arm]
    rule = dataclasses.replace(RULE, gate=way.gate)
    if given is not None:
        share, stretches = given["share"] or 0.0, given["stretches"] or 1.0
        length = max(1, round(share * STEPS / stretches))
        rule = dataclasses.replace(rule, steps=STEPS, share=share, mbe_patience=length, seed=seed)
    x, y = _data("train", N_TRAIN, seed)
    model = student(seed)
    adam = torch.optim.Adam(model.parameters(), lr=LR)
    gate, phases = gapt.start(rule), []
    for step in range(STEPS):
        batch = batch_of(step, way, seed)
        hidden, out = forward(model, x[batch])
        l1, compress = F.l1_loss(out, y[batch]), gate.phase == gapt.COMPRESS
        with torch.set_grad_enabled(compress):  # else only the gate wants it
            entropy = mean_entropy(hidden)
        loss = l1 + way.weight * entropy if compress and not entropy.isnan() else l1
        if not math.isfinite(loss.item()):
            raise IncompleteError(f"the loss of update {step + 1} is not finite; nothing is known of this seed")
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        phases.append(compress)
        gate = gate.advance(l1.item(), [entropy.item()])
        advance(1)
    begun = sum(now and not before for before, now in zip([False, *phases], phases))
    return {**measured(model, seed), "share": sum(phases) / STEPS, "stretches": float(begun)}


# -- data ----------------------------------------------------------------------------------------------------------


def _data(split: str, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features and targets of n examples of each class: all positive ones, then all negative ones."""
    x, labels, y = map(np.concatenate, zip(*conflict.examples(n=2 * n, split=split, sigma=SIGMA, seed=seed)))
    order = np.argsort(labels, kind="stable")
    return torch.from_numpy(x[order]), torch.from_numpy(y[order])


def batch_of(step: int, way: Way, seed: int) -> NDArray[np.int64]:
    """The rows of an update, class after class unless they are shuffled; each class epoch by epoch."""
    classes = way.halves[2 * step // STEPS]
    n = BATCH_SIZE // len(classes)
    drawn = [training.rows_of_update(step, N_TRAIN, n, 2 * seed + c) + c * N_TRAIN for c in classes]
    rows = np.concatenate(drawn)
    return np.random.default_rng([seed, step]).permutation(rows) if way.shuffled else rows


# -- the network ---------------------------------------------------------------------------------------------------


def student(seed: int) -> MLP:
    """A network with the weights θ that both classes' teachers are shifts of."""
    theta, _ = conflict.teacher(seed)
    with training.seeded(seed):  # what its layers draw is overwritten, but would move the generator of the caller
        model = MLP(MlpConfig(conflict.WIDTHS))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), theta.parts()):
            parameter.copy_(torch.from_numpy(value))
    return model


def forward(model: MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (n, j) behind the activation, and outputs."""
    hidden: Tensor = model.layers[:2](x)
    return hidden, model.layers[2](hidden)


def mean_entropy(hidden: Tensor) -> Tensor:
    """S_2 of patches of consecutive rows (n, j), their mean; NaN if no patch has any."""
    mask = torch.ones(1, len(hidden), dtype=torch.bool)
    return mbe.patch_entropy(hidden[None], mask, patch_size=PATCH_SIZE).nanmean()


@torch.no_grad()
def measured(model: MLP, seed: int) -> dict[str, float | None]:
    """What a network does to the validation rows; see `run`."""
    x, y = _data("validation", N_VALIDATION, seed)
    hidden, out = forward(model, x)
    errors = (out - y).abs().double().mean(1)
    pos, neg = hidden[:N_VALIDATION].double(), hidden[N_VALIDATION:].double()
    distance, separation = apart(pos, neg)
    return {
        "l1_pos": errors[:N_VALIDATION].mean().item(),
        "l1_neg": errors[N_VALIDATION:].mean().item(),
        "mbe_pos": _known(mean_entropy(pos)),
        "mbe_neg": _known(mean_entropy(neg)),
        "distance": distance,
        "separation": separation,
        "balance": balance(pos, neg),
    }


def balance(pos: Tensor, neg: Tensor) -> float | None:
    """The shorter of the two classes' mean hidden states (n, j) over the longer: near 0, one class is switched off."""
    short, long = sorted(h.mean(0).norm().item() for h in (pos, neg))
    return short / long if long > 0 else None


def _known(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()


def apart(pos: Tensor, neg: Tensor) -> tuple[float, float | None]:
    """‖m⁺ − m⁻‖, and that divided by √(½ (E‖h⁺ − m⁺‖² + E‖h⁻ − m⁻‖²)), None where that is 0.

    Of hidden states (n, j) of each class: here all validation rows, in the paper 32 random ones of each.
    """
    means = pos.mean(0), neg.mean(0)
    distance = (means[0] - means[1]).norm().item()
    spread = [(h - mean).square().sum(1).mean().item() for h, mean in zip((pos, neg), means)]
    within = math.sqrt(sum(spread) / 2)
    return distance, distance / within if within > 0 else None
