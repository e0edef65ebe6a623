"""The case where truth is known: train on modular arithmetic with corrupted labels, attribute, prune.

Axes: i pair, k neuron, q class.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from memdiag import attribution, fourier, grokking, pruning, tasks
from memdiag.errors import InputError, unknown
from memdiag.grokking import Training
from memdiag.models.mlp import MLP
from memdiag.modular import Pairs, make_pairs
from memdiag.prune_curves import Arms, Cut, Found, headline, neuron_rows, run_arms, with_intervals
from memdiag.prune_report import DEFAULT_TASK, TASKS, PruneOptions
from memdiag.pruning import GROUPS, Examples, Readout, Row

DEFAULT_CORRUPTION = 0.3
WIDTH_AT_97 = 500  # the default width grows with p: a much wider network only memorizes


@dataclass(frozen=True)
class Setting:
    """The task and the training of one network, everything settled but the seed."""

    operation: str
    p: int
    train_fraction: float
    corruption: float
    law: str
    data_seed: int | None  # None: the network's own
    training: Training

    def pairs(self, seed: int) -> Pairs:
        """The pairs that the network of this seed is trained and tested on."""
        return make_pairs(
            self.operation,
            self.p,
            train_fraction=self.train_fraction,
            corruption=self.corruption,
            law=self.law,
            seed=seed if self.data_seed is None else self.data_seed,
        )

    def task(self, seed: int) -> str:
        """The same pairs as a dataset: every key of the task."""
        seed = seed if self.data_seed is None else self.data_seed
        return tasks.load(
            f"task:modular-{self.operation}?p={self.p}&train_fraction={self.train_fraction}"
            f"&corruption={self.corruption}&corruption_law={self.law}&seed={seed}"
        ).name


def setting_of(options: PruneOptions) -> Setting:
    """The task and training that the options mean.

    Raises:
        InputError: another task, a value out of its range, a key that an option contradicts, no corrupted examples.
    """
    data = options.data or DEFAULT_TASK
    if not data.startswith(tasks.PREFIX):
        raise InputError(f"--data {data}: without a checkpoint memdiag trains on {', '.join(TASKS)}; give a checkpoint")
    task = tasks.load(data)
    name = task.name.removeprefix(tasks.PREFIX).partition("?")[0]
    if name not in TASKS:
        raise unknown("task to train on", name, TASKS)
    if "split" in task.given:
        raise InputError("prune-memorizers trains on the split train and tests on the other; leave split out of --data")
    keys: dict[str, Any] = dict(task.values)
    for key in ("corruption", "corruption_law", "train_fraction"):
        value = getattr(options, key)
        if value is not None and key in task.given and value != task.values[key]:
            raise InputError(f"--data has {key}={task.values[key]} and --{key.replace('_', '-')} is {value}; give one")
        if value is not None:
            keys[key] = value
    if options.corruption is None and "corruption" not in task.given:
        keys["corruption"] = DEFAULT_CORRUPTION
    if options.filter_frequencies and name == "modular-multiplication":
        raise InputError("--filter-frequencies needs addition or subtraction: 0 has no place among logarithms")
    chosen = {
        field.name: value
        for field in dataclasses.fields(Training)
        if field.name != "dtype" and (value := getattr(options, field.name)) is not None
    }
    chosen.setdefault("width", max(1, round(WIDTH_AT_97 * keys["p"] / 97)))
    if options.n is not None and options.n > chosen["width"]:
        raise InputError(f"--n is {options.n}, but the network has {chosen['width']} neurons; give fewer or --width")
    training = Training(**chosen, dtype="float32" if options.dtype == "auto" else options.dtype)
    setting = Setting(
        operation=name.removeprefix("modular-"),
        p=keys["p"],
        train_fraction=keys["train_fraction"],
        corruption=keys["corruption"],
        law=keys["corruption_law"],
        data_seed=keys["seed"] if "seed" in task.given else None,
        training=training,
    )
    pairs = setting.pairs(0)
    n_corrupted = int(pairs.corrupted.sum())
    if n_corrupted == 0 or n_corrupted == pairs.n_train:
        what = "no" if n_corrupted == 0 else "only"
        raise InputError(
            f"--corruption {setting.corruption:g} of {pairs.n_train} training pairs leaves {what} corrupted ones; "
            "wanted some of both kinds, e.g. --corruption 0.3"
        )
    return setting


def of_seed(setting: Setting, options: PruneOptions, seed: int, advance: Callable[[int], None]) -> Found:
    """Train one network, attribute, prune.

    Args:
        advance: told how many updates are done.
    """
    pairs = setting.pairs(seed)
    cut = Cut(options.n, options.fraction, options.keep_clean, options.draws, options.seed, chance=1 / pairs.p)
    with grokking.one_thread():
        model, dynamics = _trained(setting, pairs, seed, advance)
        scores, examples = attribute(model, pairs)
        arms = run_arms(_curves(model, pairs, examples), scores, options.rank_by, cut)
        filtration = filter_frequencies(model, pairs, examples) if options.filter_frequencies else []
    rows = with_intervals(arms.rows, examples.counts())
    models = {"trained": model} | ({"pruned": pruned(model, arms)} if arms.chosen is not None else {})
    about = {
        "seed": seed,
        "phase": dynamics[-1]["phase"],
        "dtype": setting.training.dtype,
        "examples": examples.counts(),
        "corrupted_that_are_right": int((pairs.corrupted & (pairs.labels == pairs.truth)).sum()),
        "n_neurons": model.config.widths[1],
        "n_dead": int(scores["dead"].sum()),
        "ipr_low_mid_high": ipr_classes(scores["ipr"], pairs, model.config.activation),
        "ipr_null": fourier.null_quantile(_curve_length(pairs), keep_dc=model.config.activation == "square"),
        "mean_ipr": dynamics[-1]["mean_ipr"],
        "rule": arms.rule,
        **headline(rows, options.rank_by),
    }
    return Found(
        [row | {"seed": seed} for row in neuron_rows([("layers.linear_2", len(arms.order))], scores, arms)],
        [{"seed": seed, "train_corrupted_exact": None, **row} for row in rows],
        dynamics,
        [{"seed": seed, **row} for row in filtration],
        about,
        models,
    )


def _trained(setting: Setting, pairs: Pairs, seed: int, advance: Callable[[int], None]) -> tuple[MLP, list[Row]]:
    rows: list[Row] = []
    grokked, last = False, 0
    for step, model in grokking.train(pairs, setting.training, seed=seed):
        at = grokking.evaluate(model, pairs)
        grokked = grokked or (at["test_acc"] or 0) >= 0.9
        rows.append({"seed": seed, "step": step, **at, "phase": grokking.phase(at, pairs.p, grokked=grokked)})
        advance(step - last)
        last = step
    return model, rows


def attribute(model: MLP, pairs: Pairs) -> tuple[dict[str, Any], Examples]:
    """Every score of every neuron, (k,) each, and the examples they are about; NaN where undefined."""
    a = grokking.activations(model, pairs.operands)
    incoming, weights = grokking.weights_of(model)
    logits = a @ weights.T
    labels, truth = torch.from_numpy(pairs.labels), torch.from_numpy(pairs.truth)
    masks = {name: torch.from_numpy(mask) for name, mask in grokking.groups(pairs).items()}
    sets = {"corrupted": masks["corrupted"], "clean": masks["clean"], "heldout": masks["test"]}
    found: dict[str, Any] = {}
    for name, at in sets.items():
        args = (a[at], weights, logits[at], labels[at])
        found[f"margin_{name}"] = attribution.margin(*args)
        found[f"ablation_{name}"] = attribution.ablation(*args)
        found[f"grad_act_{name}"] = attribution.grad_act(*args)
    wrong = masks["corrupted"] & (labels != truth)
    found["direct_logit"] = attribution.direct_logit(a[wrong], weights, labels[wrong], truth[wrong])
    found["activation_norm"] = attribution.activation_norm(a[masks["train"]], weights)

    is_square = model.config.activation == "square"
    u, v, w = grokking.curves(model, pairs.operation)
    found["norm_product"] = attribution.norm_product(
        [incoming[:, : pairs.p], incoming[:, pairs.p :]], weights, degree=2 if is_square else 1
    )
    found["ipr"] = fourier.ipr(u, v, w, keep_dc=is_square)
    found["frequency"] = fourier.frequency(u, v, w)
    found["dead"] = fourier.dead(incoming, weights.T)
    scores = {name: value.numpy() for name, value in found.items()}
    scores["memorization"] = scores["margin_corrupted"] - scores["margin_clean"]
    for name in ("ablation", "grad_act"):
        scores[name] = scores[f"{name}_corrupted"] - scores[f"{name}_clean"]
    group = np.select([masks["corrupted"].numpy(), masks["clean"].numpy()], [0, 1], 2).astype(np.int8)
    assert GROUPS == ("corrupted", "clean", "test")
    return scores, Examples(pairs.labels, pairs.truth, group)


def _curves(model: MLP, pairs: Pairs, examples: Examples) -> Callable[[Any, Any], list[Row]]:
    readout = Readout(grokking.activations(model, pairs.operands), grokking.weights_of(model)[1], None, examples)
    return lambda order, counts: pruning.curve(readout, order, counts)


def pruned(model: MLP, arms: Arms) -> MLP:
    """A copy without the chosen neurons: their outgoing weights are 0, and their incoming ones where nothing else
    depends on these, which a norm over the neurons does."""
    smaller = copy.deepcopy(model)
    gone = torch.from_numpy(arms.order[: arms.chosen].copy())
    first, last = grokking.weights_of(smaller)
    last[:, gone] = 0
    if model.config.norm == "none":
        first[gone] = 0
    return smaller


def _curve_length(pairs: Pairs) -> int:
    return pairs.p - (pairs.operation == "multiplication")  # 0 has no logarithm


def ipr_classes(ipr: Any, pairs: Pairs, activation: str) -> list[int]:
    """How many neurons are not periodic, in between, and periodic; dead ones are neither."""
    low = fourier.low_below(_curve_length(pairs), keep_dc=activation == "square")
    values = ipr[~np.isnan(ipr)]
    high = int((values >= fourier.HIGH).sum())
    n_low = int((values < low).sum())
    return [n_low, len(values) - n_low - high, high]


def filter_frequencies(model: MLP, pairs: Pairs, examples: Examples) -> list[Row]:
    """Accuracies of the network with every curve reduced to its strongest frequency, and of what that leaves out.

    A rule that is spread over neurons which also memorize shows here, below the level of neurons.
    """
    dominant, remainder = copy.deepcopy(model), copy.deepcopy(model)
    first, last = grokking.weights_of(dominant)
    first.copy_(torch.cat([fourier.dominant(first[:, : pairs.p]), fourier.dominant(first[:, pairs.p :])], 1))
    last.copy_(fourier.dominant(last.T).T)
    for left, kept in zip(grokking.weights_of(remainder), (first, last)):
        left -= kept
    rows = []
    for part, network in {"whole": model, "dominant": dominant, "remainder": remainder}.items():
        logits = grokking.activations(network, pairs.operands) @ grokking.weights_of(network)[1].T
        figures = pruning.figures(logits.numpy(), examples)
        rows.append({"part": part, **{name: value for name, value in figures.items() if name.endswith("_acc")}})
    return rows


def seconds_per_step(setting: Setting, *, steps: int = 5) -> float:
    """Measured on a few updates."""
    training = dataclasses.replace(setting.training, steps=steps + 1, eval_every=1)
    with grokking.one_thread():
        stream = grokking.train(setting.pairs(0), training, seed=0)
        next(stream), next(stream)  # the first call of everything is slow
        began = time.perf_counter()
        for _ in range(steps):
            next(stream)
        return (time.perf_counter() - began) / steps
