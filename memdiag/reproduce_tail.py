"""The long tail: what does it cost to leave out the examples that a network memorizes? Feldman and Zhang,
arXiv:2008.03703, section 3, on scikit-learn's digits.

With mem(i) of row i from M networks on random subsets (`memdiag.memorization`), networks are trained on

    all                                       every row
    memorized_t    { i : mem(i) < t }         without what is memorized: k rows fewer
    random_t       k rows fewer at random, the memorized ones among those that may go
    by_class_t     k rows fewer at random, of each class as many as are memorized

and asked for the test rows. That memorization is needed means acc(memorized_t) < acc(random_t). A row's estimate never
sees a test label, and its networks have other seeds than those that are compared. Those are compared seed by seed: a
seed gives all arms the same initial weights and the same order of rows, from which each skips what it lacks. A random
arm takes the mean over DRAWS networks, each with a draw of its own, so that the seeds average over draws also.

The seeds share their split of the digits, and so the 359 test rows: their interval says what other networks would do,
not what other digits would. In the `split_` arms each seed has a split of its own, with estimates of its own; that
interval is of splits of these 1,797 digits, which share rows, and for other digits would be about sqrt(1 + n_seeds / 4)
times as wide (Nadeau and Bengio 2003). The `noisy_` arms have a tenth of the labels wrong.

Axes: n training row.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from memdiag import ensemble, memorization, supervised, tables, workers
from memdiag.counterfactual_job import Job, job_of, one_thread, train_chunk
from memdiag.counterfactual_report import CounterfactualOptions
from memdiag.counterfactual_rows import ShardRow
from memdiag.counterfactual_shards import read_shard, shard_path
from memdiag.ensemble import Member
from memdiag.errors import IncompleteError
from memdiag.memorization import Sums
from memdiag.progress import Progress
from memdiag.reproduce_tail_arms import ARMS, CORRUPTION, DRAWS, WAYS, Bools, Floats, effects, removed
from memdiag.supervised import Examples
from memdiag.train_plan import FEATURES, SGD_LR, recipe_of

CHUNK = 20  # networks trained at once: faster than one by one, and lost at most if it is stopped
FIRST_SPLIT = 1  # seed s of a `split_` arm divides the digits by the seed FIRST_SPLIT + s; split 0 is everyone else's
TRIED = 50  # updates of a dry run
EVALUATED = 21  # key of the draws beside the seed

__all__ = ["ARMS", "effects", "prepare", "run", "settings", "steps"]


@dataclass(frozen=True)
class Size:
    """What a preset trains."""

    models: int  # M
    split_models: int  # of each split
    epochs: int = FEATURES.epochs


SIZES = {"smoke": Size(100, 50), "paper": Size(400, 100)}


def steps(preset: str, arm: str) -> int:
    """Networks of one run, which is what its progress is told in."""
    return len(WAYS[arm].draws)


def settings(preset: str) -> dict[str, Any]:
    """What decides the figures besides arm and seed."""
    ways = {name: asdict(way) | {"draws": list(way.draws)} for name, way in WAYS.items()}
    return asdict(SIZES[preset]) | {"ways": ways, "corruption": CORRUPTION, "recipe": asdict(FEATURES) | {"lr": SGD_LR}}


def planned(arms: Sequence[str], seeds: Sequence[int], preset: str, networks: int) -> dict[str, object]:
    """What an experiment would take, from a few timed updates; `networks` are those that are compared."""
    found = subjects(arms, seeds, preset)
    models = sum(len(options.items()) for options in found.values())
    job = job_of(subject("clean", 0, preset))
    everyone = np.ones(len(job.inputs.examples), dtype=np.bool_)
    members = [Member(seed, everyone) for seed in range(DRAWS)]
    with one_thread():
        began = time.perf_counter()
        ensemble.train(members, job.inputs.new, job.data, job.recipe, way=job.way, steps=TRIED)
        seconds = (time.perf_counter() - began) / DRAWS / TRIED * job.recipe.steps
    side_by_side = os.cpu_count() or 1
    return {
        "memorization_networks": models,
        "networks": networks,
        "seconds_expected": round(seconds * (models + networks) / side_by_side, 1),
    }


# -- memorization --------------------------------------------------------------------------------------------------


def subject(data: str, seed: int, preset: str) -> CounterfactualOptions:
    """The `memdiag counterfactual` that gives an arm's rows and their memorization."""
    size, split = SIZES[preset], FIRST_SPLIT + seed if data == "split" else 0
    more = f"&corruption={CORRUPTION}" if data == "noisy" else ""
    return CounterfactualOptions(
        data=f"task:digits?split=train&seed={split}{more}",
        test=f"task:digits?split=test&seed={split}",
        models=size.split_models if data == "split" else size.models,
        epochs=size.epochs,
        device="cpu",
        seed=split,
    )


def subjects(arms: Sequence[str], seeds: Sequence[int], preset: str) -> dict[str, CounterfactualOptions]:
    """What must be known of memorization before these arms can run, by the name of its folder."""
    needed = {WAYS[arm].data for arm in arms if WAYS[arm].removed == "memorized" or WAYS[arm].threshold is not None}
    return {
        _folder(data, seed): subject(data, seed, preset)
        for data in ("clean", "noisy", "split")
        if data in needed
        for seed in (seeds if data == "split" else [0])
    }


def _folder(data: str, seed: int) -> str:
    return f"{data}-{seed}" if data == "split" else data


def prepare(arms: Sequence[str], seeds: Sequence[int], preset: str, directory: Path, progress: Progress) -> None:
    """Train the networks that memorization is estimated from; those that are there are not trained again.

    Args:
        directory: gets a folder for each of `subjects`, in it a file for each network.
    """
    waiting = []
    for name, options in subjects(arms, seeds, preset).items():
        folder = directory / name
        folder.mkdir(parents=True, exist_ok=True)
        missing = [k for k in options.items() if not shard_path(folder, k).exists()]
        waiting += [(options, folder, tuple(missing[i : i + CHUNK])) for i in range(0, len(missing), CHUNK)]
    # whoever comes back knows by it that something is here to go on with
    tables.write(directory / "begun.parquet", ShardRow, [], {"report": ShardRow.report})
    progress.start("memorization", sum(len(chunk) for _, _, chunk in waiting), unit="networks")
    workers.each(_train, waiting, progress)


def _train(work: tuple[CounterfactualOptions, Path, tuple[int, ...]], advance: Callable[[int], None]) -> None:
    options, folder, chunk = work
    train_chunk(options, str(folder), job_of(options).identity, "inline", chunk, advance)


@functools.lru_cache(maxsize=4)
def memorization_of(folder: Path, models: int, digest: str) -> Floats:
    """(n,) mem of each training row; NaN where all networks, or none, were trained on it.

    Args:
        folder: of the networks' files.
        digest: of the run that they must be of.
    Raises:
        InputError: a file is missing, damaged or of another run.
    """
    sums: Sums | None = None
    for k in range(models):
        shard = read_shard(folder, k, digest)
        n = len(shard.included)
        sums = sums or Sums.empty(n)
        sums.add(shard.included, shard.accuracy[:n])
    assert sums is not None
    return memorization.estimate(sums, kind="binary").memorization


# -- runs ----------------------------------------------------------------------------------------------------------


def seed_of(seed: int) -> int:
    """The seed of the initial weights and the order of a run's networks; never one of memorization's."""
    return int(np.random.SeedSequence([seed, EVALUATED]).generate_state(1)[0])


def run(
    arm: str,
    seed: int,
    preset: str,
    given: Mapping[str, float | None] | None,
    advance: Callable[[int], None],
    *,
    directory: Path,
) -> dict[str, float | None]:
    """Train an arm's networks, and look at them.

    Args:
        directory: what `prepare` has filled.
    Returns:
        test_acc; train_acc, on the rows trained on; removed_acc, on the others, None if there are none: all means over
        the networks. n_removed; n_wrong_removed, the mean number of wrong labels among them.
    Raises:
        IncompleteError: no row is left, or a network's weights are not finite.
    """
    way = WAYS[arm]
    options = subject(way.data, seed, preset)
    job = job_of(options)
    examples, held_out = job.inputs.examples, job.inputs.held_out
    assert examples.labels is not None
    assert held_out is not None
    assert options.models is not None

    def mem() -> Floats:
        return memorization_of(directory / _folder(way.data, seed), options.models or 0, job.digest)

    wrong = job.inputs.corrupted
    out = removed(way, mem, examples.labels, wrong, seed)
    if out[0].all():
        raise IncompleteError(f"{arm}, seed {seed}: every row is memorized, and none is left to train on")
    with one_thread():
        members = [Member(seed_of(seed), ~gone) for gone in out]
        _, recipe = recipe_of(job.inputs, int(members[0].included.sum()))  # as many passes, whatever is left out
        models = ensemble.train(members, job.inputs.new, job.data, recipe, way=job.way)
        if not all(map(ensemble.is_finite, models)):
            raise IncompleteError(f"{arm}, seed {seed}: the weights are not finite; nothing is known of this seed")
        seen = [right(model, examples, job) for model in models]
        test = [right(model, held_out, job) for model in models]
    advance(steps(preset, arm))
    return {
        "test_acc": _mean([own.mean() for own in test]),
        "train_acc": _mean([own[~gone].mean() for own, gone in zip(seen, out)]),
        "removed_acc": _mean([own[gone].mean() for own, gone in zip(seen, out)]) if out[0].any() else None,
        "n_removed": float(out[0].sum()),
        "n_wrong_removed": 0.0 if wrong is None else _mean([float(wrong[gone].sum()) for gone in out]),
    }


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(values))


@torch.no_grad()
def right(model: nn.Module, examples: Examples, job: Job) -> Bools:
    """(n,) which examples a network tells the recorded label of."""
    inputs = examples.batch(np.arange(len(examples)), job.inputs.pad_id, job.device)
    assert inputs.labels is not None
    logits = supervised.logits_of(model, inputs, name=job.inputs.name, top=int(inputs.labels.max()))
    found: Bools = (logits.argmax(1) == inputs.labels).cpu().numpy()
    return found
