"""What a run of `memdiag counterfactual` trains, and one chunk of it: models, and a shard file for each.

A shard holds what one model makes of every example. On a CPU its bytes are a function of the run and the model's
number, so that it does not matter who writes it or how often (on a GPU they are up to rounding, see `ensemble`); how
long it took stands in a file beside it.

Axes: n training example, t held-out example, b example of a batch.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from memdiag import device as devices
from memdiag import ensemble, supervised, trajectory
from memdiag.counterfactual_report import CounterfactualOptions
from memdiag.counterfactual_rows import CounterfactualRow
from memdiag.counterfactual_shards import Shard, run_of, time_path, write_shard
from memdiag.ensemble import Data, Member
from memdiag.errors import IncompleteError, InputError
from memdiag.packing import Corpus
from memdiag.subsets import Bools, Ints, contents, fingerprint, groups_of
from memdiag.supervised import Examples
from memdiag.tables import differing_fields
from memdiag.train_inputs import Inputs, open_inputs
from memdiag.train_models import digest
from memdiag.train_plan import recipe_of
from memdiag.training import Recipe

FEW_GROUPS = 200
MODEL_SEED = 12  # key of the draws beside the run's seed


@dataclass(frozen=True, eq=False)
class Job:
    """A run opened: the data, whose coins are whose, and how a model is trained."""

    options: CounterfactualOptions
    inputs: Inputs
    groups: Ints  # (n,) the number of each example's coin
    content: Ints  # (n,) the same for exact copies
    group_ids: list[str]  # (n,)
    epochs: int
    recipe: Recipe
    device: torch.device
    way: str  # see `ensemble`
    why: str  # it is not a faster one

    @cached_property
    def data(self) -> Data:
        """The training examples on the device."""
        return Data(self.inputs.examples, self.inputs.pad_id, self.device)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides what a model makes of an example."""
        return {
            "report": CounterfactualRow.report,
            "schema_version": CounterfactualRow.schema_version,
            "options": self.options.identity(),
            "device": self.device.type,  # each rounds sums in its own way
            "way": self.way,
            **self.inputs.identity(self.inputs.new(self.options.seed)),
        }

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the identity, which every shard holds."""
        return run_of(self.identity)

    def member(self, k: int) -> Member:
        """Subset and seed of model k."""
        coins = self.options.how().coins(k, int(self.groups.max()) + 1)
        included: Bools = coins[self.groups]
        state = np.random.SeedSequence([self.options.seed, MODEL_SEED, k]).generate_state(1)
        return Member(int(state[0]), included, k)


def open_job(options: CounterfactualOptions) -> Job:
    """Open and read everything, and find out how models are trained.

    Raises:
        InputError: anything that is not there, not readable or does not fit.
    """
    training = options.training()
    inputs = open_inputs(training)
    examples = inputs.examples
    corpus = examples.inputs
    held: Iterator[NDArray[Any]] = (
        (corpus.tokens[start : start + length] for start, length in zip(corpus.starts, corpus.lengths))
        if isinstance(corpus, Corpus)
        else iter(corpus)
    )
    content = groups_of(contents(held, examples.labels))
    groups = content if inputs.groups is None else groups_of(inputs.groups)
    if groups.max() < 1:
        raise InputError(f"{inputs.train.name}: all examples are one group; wanted at least two to tell apart")
    first = np.unique(groups, return_index=True)[1]
    names = examples.ids if inputs.groups is None else inputs.groups
    epochs, recipe = recipe_of(inputs, max(1, round(options.subset_ratio * len(examples))))
    device = devices.resolve(_device_of(options))
    probe = Data(_few(examples), inputs.pad_id, device)
    with one_thread():
        if options.chunk == 1 and not ensemble.is_plain(inputs.new(options.seed), recipe):
            way, why = "alone", "--chunk 1"
        else:
            way, why = ensemble.way_of(inputs.new, probe, recipe)
    if (n_groups := int(groups.max()) + 1) < FEW_GROUPS:  # else it does not happen
        most = options.max_models if options.until_width is not None else None
        for k in options.items(most):
            if not options.how().coins(k, n_groups).any():
                raise InputError(
                    f"{inputs.train.name}: nothing is in the subset of model {k}, of {n_groups} groups (exact copies "
                    "are one); give more, or a larger --subset-ratio"
                )
    return Job(
        options, inputs, groups, content, [names[i] for i in first[groups].tolist()], epochs, recipe, device, way, why
    )  # fmt: skip


def _device_of(options: CounterfactualOptions) -> str:
    """A task of Ray computes on a GPU if it has one, whatever this machine has."""
    if options.engine == "ray" and options.device == "auto":
        return "cuda" if options.ray_gpus else "cpu"
    return options.device


def _few(examples: Examples) -> Examples:
    """The first examples; of texts the longest and the shortest."""
    at = np.arange(min(4, len(examples)))
    if isinstance(examples.inputs, Corpus):
        lengths = examples.inputs.lengths
        at = np.unique([int(lengths.argmax()), int(lengths.argmin())])
    labels = None if examples.labels is None else examples.labels[at]
    corpus = examples.inputs
    inputs = (
        Corpus(corpus.tokens, corpus.starts[at], corpus.lengths[at], len(at), 0)
        if isinstance(corpus, Corpus)
        else np.array(corpus[at])
    )
    return Examples(examples.rows[at], [examples.ids[int(i)] for i in at], inputs, labels)


@functools.lru_cache(maxsize=1)
def job_of(options: CounterfactualOptions) -> Job:
    """`open_job`, which a process does once; what trains clears it before a run."""
    return open_job(options)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums are added up in the same order every time; convolutions on a GPU in float32, as everything else."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(n)


def train_chunk(
    options: CounterfactualOptions,
    folder: str,
    identity: Mapping[str, Any],
    engine: str,
    chunk: tuple[int, ...],
    advance: Callable[[int], None],
) -> None:
    """Train the models of a chunk together, and write their shards.

    Args:
        folder: of the shards.
        identity: of the run; the data may have changed since it began, or be another one on another machine.
        engine: what to say who trained them.
    Raises:
        InputError: the data has changed, or the model cannot be run on it.
        IncompleteError: the weights of a model are no numbers any more.
    """
    job = job_of(options)
    if different := differing_fields(identity, json.loads(json.dumps(job.identity))):
        raise InputError(
            f"{job.inputs.train.name} has changed since the run began, or is another here (differs in {different}); "
            "give --force to start afresh"
        )
    with one_thread():
        began = time.perf_counter()
        members = [job.member(k) for k in chunk]
        try:
            models = ensemble.train(members, job.inputs.new, job.data, job.recipe, way=job.way)
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            raise IncompleteError(
                f"{job.inputs.name}: memory ran out with models trained together ({job.way}); try --chunk 1 in another "
                "--out, or a smaller --batch-size"
            ) from None
        together = (time.perf_counter() - began) / len(chunk)
        for k, member, model in zip(chunk, members, models):
            began = time.perf_counter()
            if not ensemble.is_finite(model):
                raise IncompleteError(
                    f"model {k}: its weights are not finite after {job.recipe.steps} updates; try a smaller --lr or "
                    "--clip 1, and another --out"
                )
            shard = _look(job, k, member, model)
            told = {"seconds": round(together + time.perf_counter() - began, 3), "engine": engine}
            time_path(Path(folder), k).write_text(json.dumps(told))
            write_shard(Path(folder), shard, job.digest)
            advance(1)


def _look(job: Job, k: int, member: Member, model: nn.Module) -> Shard:
    """What a trained model makes of every example."""
    examples, held_out = job.inputs.examples, job.inputs.held_out
    found = [_values(job, model, side) for side in (examples, held_out) if side is not None]
    return Shard(
        item=k,
        seed=member.seed,
        subset=fingerprint(member.included),
        weights=digest(model),
        rows=np.concatenate([examples.rows, *([held_out.rows] if held_out is not None else [])]),
        included=member.included,
        accuracy=np.concatenate([accuracy for accuracy, _ in found]),
        soft=np.concatenate([soft for _, soft in found]),
    )


def _values(job: Job, model: nn.Module, examples: Examples) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(n,) accuracy and soft measure of each example, in eval mode; NaN for a text of one token."""
    labels = examples.labels
    top = -1 if job.inputs.examples.labels is None else int(job.inputs.examples.labels.max())
    size = supervised.EVALUATED if labels is not None else job.recipe.batch_size
    accuracy, soft = (np.full(len(examples), np.nan, dtype=np.float32) for _ in range(2))
    for start in range(0, len(examples), size):
        at = np.arange(start, min(start + size, len(examples)))
        inputs = examples.batch(at, job.inputs.pad_id, job.device)
        with torch.no_grad():
            logits = supervised.logits_of(model, inputs, name=job.inputs.name, top=top)
        if inputs.labels is not None:
            own, _, total, right = trajectory.presented(logits, inputs.labels).cpu().numpy()
            accuracy[at], soft[at] = right, np.exp(own.astype(np.float64) - total)
            continue
        assert inputs.tokens is not None
        assert inputs.mask is not None
        counts = inputs.mask[:, 1:]
        own, _, total, right = trajectory.presented(logits[:, :-1][counts], inputs.tokens[:, 1:][counts]).cpu().numpy()
        lengths = counts.sum(1).cpu().numpy()
        some = lengths > 0
        starts = (np.cumsum(lengths) - lengths)[some]
        for kept, values in ((accuracy, right.astype(np.float64)), (soft, own.astype(np.float64) - total)):
            kept[at[some]] = np.add.reduceat(values, starts) / lengths[some] if some.any() else np.nan
    return accuracy, soft
