"""Multiplication: does GAPT lower the loss on products of longer numbers than those trained on?

Yu, arXiv:2505.08727: a GPT-2 trained from scratch on "12 x 34 = 408", digit by digit, and asked for operands with more
digits than it has ever seen. Here, unlike there: no pair of the test is trained on, the checkpoint is chosen on
held-out pairs of the training range alone, and neither that choice nor the gate sees a longer operand.

Axes: i equation, t token, k token of an answer, v vocabulary, l layer.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F

from memdiag import checkpoint, gapt, training
from memdiag import device as devices
from memdiag.errors import IncompleteError
from memdiag.gapt_training import Method, Run, logits_of
from memdiag.packing import Corpus
from memdiag.reproduce_effects import Arm, Control, Effect
from memdiag.tasks.multiplication import BOS, EOS, EQUALS, VOCAB_SIZE, encode, pairs
from memdiag.training import Diverged, Recipe

NOT_CLAIMED = "not given; the paper's conclusion implies it"
LARGEST_TEMPERATURE = 100.0  # and 1 / it is the smallest; one that is fitted lies between


@dataclass(frozen=True)
class Setting:
    """The networks of a preset, what they are trained on, and how."""

    layers: int
    width: int
    heads: int
    length: int  # tokens of a sequence
    digits: int  # of the longest operand trained on
    ood_digits: tuple[int, int]  # of the shortest and the longest operand beyond
    n_train: int  # equations
    n_val: int
    n_test: int  # of either range
    steps: int
    batch_size: int
    accumulate: int
    lr: float
    warmup: int
    schedule: str
    rule: gapt.Rule
    weight: float
    every: int  # updates between two looks at the validation data
    device: str = "cpu"

    def recipe(self, seed: int) -> Recipe:
        """How the weights of this seed move."""
        return Recipe(
            self.steps, self.batch_size, self.accumulate, self.lr, self.schedule, warmup=self.warmup, seed=seed
        )

    def config(self) -> dict[str, Any]:
        """The network as Hugging Face's config.json says it."""
        return {
            **checkpoint.read_config("gpt2-small"),
            "vocab_size": VOCAB_SIZE,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "n_layer": self.layers,
            "n_embd": self.width,
            "n_head": self.heads,
            "n_positions": self.length,
        }


PRESETS = {
    "smoke": Setting(
        layers=4, width=64, heads=4, length=32, digits=2, ood_digits=(3, 3), n_train=50_000, n_val=500, n_test=1000,
        steps=1000, batch_size=16, accumulate=1, lr=8e-3, warmup=50, schedule="cosine",
        rule=gapt.Rule(ce_patience=70, mbe_patience=40), weight=1.0, every=50,
    ),
    # 2^19 tokens an update, as in the author's code, but in shorter sequences, all of which GPT-2 attends to
    "paper": Setting(
        layers=12, width=768, heads=12, length=1024, digits=3, ood_digits=(4, 6), n_train=10_000_000, n_val=1000,
        n_test=10_000, steps=1750, batch_size=512, accumulate=16, lr=6e-4, warmup=100, schedule="linear",
        rule=gapt.Rule(), weight=1.0, every=25, device="auto",
    ),
}  # fmt: skip

ARMS = (Arm("none"), Arm("gapt"), Arm("constant", needs="gapt"), Arm("random", needs="gapt"))


def effects(preset: str) -> list[Effect]:
    """What the paper says GAPT changes, and what tells whether that is better multiplication."""
    return [
        _effect(
            "id_ce", "GAPT costs a little cross-entropy within the training range.", +1,
            {"none": 0.010, "gapt": 0.011}, "table; 97 % of its test had been trained on, of ours nothing",
        ),
        _effect(
            "ood_ce", "GAPT lowers the cross-entropy on longer operands by a third.", -1,
            {"none": 4.334, "gapt": 2.817},
            "table, of checkpoints chosen on such data; guessing digits gives ln 10 = 2.303, less than either",
        ),
        _effect("ood_ce_calibrated", "Also at the temperature that suits validation data in the training range.", -1),
        _effect("ood_ce_best", "Also at the best temperature: it is not only less sure of what it gets wrong.", -1),
        _effect("ood_exact", "GAPT gets more products of longer operands right.", +1),
        _effect("id_exact", "GAPT gets fewer products within the training range right.", -1),
        _effect(
            "mbe", "GAPT halves the entropy of the hidden states, mean over all blocks.", -1,
            {"none": 0.218, "gapt": 0.115}, "table; all of it in layers 0, 1 and 11, which are not regularised",
        ),
        _effect(
            "mbe_active", "GAPT lowers the entropy of the blocks that it regularises.", -1, None,
            "none in the text; by its figure the mean does not change, 0.0935 to 0.0941",
        ),
    ]  # fmt: skip


def _effect(
    measure: str, statement: str, direction: int, paper: Mapping[str, float] | None = None, note: str = NOT_CLAIMED
) -> Effect:
    return Effect(
        name=measure,
        statement=statement,
        measure=measure,
        baseline="none",
        treated="gapt",
        controls=(Control("constant"), Control("random")),
        paper=paper or {},
        paper_note=note,
        direction=direction,
        relative=not measure.endswith("exact"),  # the mean of exact matches may be 0
    )


def steps(preset: str, arm: str) -> int:
    """Updates of one run."""
    return PRESETS[preset].steps


def settings(preset: str) -> dict[str, Any]:
    """What decides the figures besides arm and seed."""
    return dataclasses.asdict(PRESETS[preset])


def run(
    arm: str, seed: int, preset: str, given: Mapping[str, float | None] | None, advance: Callable[[int], None]
) -> dict[str, float | None]:
    """Train one network and look at it; `given` are the measures of `gapt` with this seed, for the controls.

    Constant has all the time the weight times the share of updates that gapt compressed, so that the pressure is the
    same on average; random compresses in as many updates, at other times.
    """
    setting = PRESETS[preset]
    share = given["share"] if given is not None else None
    rule, weight = dataclasses.replace(setting.rule, gate="paper" if arm == "gapt" else arm), setting.weight
    if share is not None and arm == "constant":
        weight *= share
    if share is not None and arm == "random":
        rule = dataclasses.replace(rule, steps=setting.steps, share=share, seed=seed)
    return trained_and_measured(setting, rule, weight, seed, advance)


def trained_and_measured(
    setting: Setting, rule: gapt.Rule, weight: float, seed: int, advance: Callable[[int], None]
) -> dict[str, float | None]:
    """Train the network of this seed, go back to its best checkpoint, and look at it there.

    Returns:
        id_ce, ood_ce: nats for each token of an answer. ood_ce_calibrated: the same when the logits are divided by the
        temperature that suits the validation data best; ood_ce_best: by the one that suits these data themselves best,
        which no one could know. id_exact, ood_exact: share of products that greedy decoding gets right. mbe,
        mbe_active: S_2 of patches, mean over all blocks and the active ones, held-out products in range. share: of all
        updates, compressed. chosen_step.
    """
    device, small = devices.resolve(setting.device), setting.digits
    model = checkpoint.new_model("the network of reproduce", setting.config(), seed).to(device)
    val = equations(1, small, setting.n_val, "val", seed)
    recipe = setting.recipe(seed)
    run = Run(
        training.begin(model, recipe),
        recipe,
        Method(rule, weight, ratio_every=0),
        stream(small, setting.n_train, "train", setting.length, seed),
        autocast=torch.bfloat16 if device.type == "cuda" else None,
    )
    try:
        chosen, share = choose(run, lambda: ce(answers(model, val)), setting.every, advance)
        within = answers(model, equations(1, small, setting.n_test, "test", seed))
        beyond = answers(model, equations(*setting.ood_digits, setting.n_test, "ood", seed))
        packed = stream(small, setting.n_test, "test", setting.length, seed)
        _, (_, *layers) = run.evaluate(packed, max(1, setting.batch_size // setting.accumulate))
        active = [layers[layer - 1] for layer in run.active]
        return {
            "id_ce": ce(within),
            "ood_ce": ce(beyond),
            "ood_ce_calibrated": ce(beyond, temperature(answers(model, val))),
            "ood_ce_best": ce(beyond, temperature(beyond)),
            "id_exact": exact(within),
            "ood_exact": exact(beyond),
            "mbe": _mean(layers),
            "mbe_active": _mean(active),
            "share": share,
            "chosen_step": float(chosen),
        }
    finally:
        run.close()


def choose(run: Run, val_ce: Callable[[], float], every: int, advance: Callable[[int], None]) -> tuple[int, float]:
    """Train to the end, then go back to the first update of those looked at with the least `val_ce`.

    Returns:
        that update, and the share of all updates that compressed.
    Raises:
        IncompleteError: the loss or its gradient is not finite.
    """
    model, steps = run.training.model, run.recipe.steps
    best, chosen, compressed = math.inf, 0, 0
    weights: dict[str, Tensor] = {}
    try:
        for update in training.train(run.training, run.recipe, run.backward):
            compressed += update.result.phase == gapt.COMPRESS
            advance(1)
            if update.step % every == 0 or update.step == steps:
                found = val_ce()
                if found < best:
                    best, chosen = found, update.step
                    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    except Diverged as error:
        raise IncompleteError(f"{error}; nothing is known of this seed") from None
    model.load_state_dict(weights)
    return chosen, compressed / steps


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


# -- data ----------------------------------------------------------------------------------------------------------


def stream(digits: int, n: int, split: str, length: int, seed: int) -> Corpus:
    """n equations end to end, cut into sequences that begin with one; what is behind it until the next is left out."""
    with tempfile.TemporaryFile() as file:
        for a, b in pairs(digits=digits, min_digits=1, n=n, split=split, seed=seed):
            file.write(encode(a, b)[0].tobytes())
        file.flush()
        tokens = np.memmap(file, dtype=np.int32, mode="r")
    (begins,) = (tokens == BOS).nonzero()
    starts = [0]
    while (i := int(np.searchsorted(begins, starts[-1] + length))) < len(begins):
        starts.append(int(begins[i]))
    kept = np.array([start for start in starts if start + length <= len(tokens)], dtype=np.int64)
    return Corpus(tokens, kept, np.full(len(kept), length), n, len(tokens) - len(kept) * length)


@dataclass(frozen=True, eq=False)
class Equations:
    """Equations, each on its own."""

    ids: NDArray[np.int64]  # (i, t), right padded
    mask: NDArray[np.bool_]  # (i, t)


def equations(min_digits: int, digits: int, n: int, split: str, seed: int) -> Equations:
    """Equations of a split; see `memdiag.tasks.multiplication`."""
    drawn = pairs(digits=digits, min_digits=min_digits, n=n, split=split, seed=seed)
    a, b = (np.concatenate(operands) for operands in zip(*drawn))
    tokens, lengths = encode(a, b)
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = tokens
    return Equations(ids, mask)


# -- what a model says to them -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model predicts behind the "=", given what is right up to there; an answer ends with <eos>."""

    logits: Tensor  # (k, v) float64
    wanted: Tensor  # (k,) the right tokens
    of: Tensor  # (k,) which equation they belong to
    n: int  # equations


@torch.no_grad()
def answers(model: nn.Module, asked: Equations, batch_size: int = 250) -> Answers:
    """Ask a model; padding is on the right, where a causal model does not see it."""
    device = next(model.parameters()).device
    ids, mask = torch.from_numpy(asked.ids), torch.from_numpy(asked.mask)
    told = (ids == EQUALS).cumsum(1).bool() & mask
    answered = told[:, :-1] & mask[:, 1:]  # at t stands the prediction of t + 1
    found = []
    model.eval()
    for at in range(0, len(ids), batch_size):
        some = slice(at, at + batch_size)
        logits = logits_of(model, model, ids[some].to(device), mask[some].to(device), None)[:, :-1]
        found.append(logits[answered[some].to(device)].double().cpu())
    model.train()
    return Answers(torch.cat(found), ids[:, 1:][answered], answered.nonzero()[:, 0], len(ids))


def ce(found: Answers, temperature: float = 1.0) -> float:
    """Mean −ln p over the tokens strictly between "=" and <eos>: the blank, which is sure, and the digits."""
    counted = found.wanted != EOS
    return float(F.cross_entropy(found.logits[counted] / temperature, found.wanted[counted]))


def temperature(found: Answers) -> float:
    """The temperature of least cross-entropy: there is only one minimum, as it is convex in 1/T."""
    largest = math.log(LARGEST_TEMPERATURE)
    done = minimize_scalar(lambda log: ce(found, math.exp(log)), bounds=(-largest, largest), method="bounded")
    return math.exp(float(done.x))


def exact(found: Answers) -> float:
    """Share of equations whose product greedy decoding gets right and ends.

    It does so if, and only if, every token of the right answer is the likeliest behind those before it, so that
    nothing has to be decoded.
    """
    wrong = torch.zeros(found.n, dtype=torch.bool)
    wrong[found.of[found.logits.argmax(1) != found.wanted]] = True
    return 1 - float(wrong.double().mean())
