"""Carry out `memdiag score --second-split`: two networks for every seed, each trained in two stages.

    direction   stage 1   stage 2   measured
    1           A         B         A
    2           B         A         B

What a network shows of its half is a part of its own, so that an interrupted run goes on with the next network. The
half is looked at in eval mode: in train mode batch norm would mix the examples of a batch, and learn from what is
only looked at.

Axes: n example, b example of the half that is measured, e epoch of stage 2.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

import memdiag
from memdiag import device as devices
from memdiag import supervised, tables, training
from memdiag.dataset import open_dataset
from memdiag.entropy_report import parse_columns
from memdiag.errors import IncompleteError, InputError
from memdiag.forgetting import first_half, forgetting_time, within_half
from memdiag.packing import Corpus
from memdiag.progress import Progress
from memdiag.score_summary import summary_of
from memdiag.second_split_report import REPORT, SCORES, SECOND_EPOCHS, VERSION, SecondSplitOptions, row_of
from memdiag.supervised import Examples, Run, loss_of, of_update
from memdiag.tables import column
from memdiag.train_inputs import Inputs, open_inputs
from memdiag.train_plan import recipe_of
from memdiag.training import Diverged, Recipe

log = logging.getLogger("memdiag")
DIRECTIONS = (1, 2)
SHARE = 0.5  # of the learning rate of stage 1, in stage 2
LEARNED = 0.98  # of a half, or it is said
GROUP = 8192  # rows of the report written at once

PartRow = tables.row_class(
    "PartRow",
    "score.second-split.part",
    VERSION,
    {
        "row": column(pa.int64(), "row of the example in the dataset"),
        "learned": column(pa.bool_(), "right at the end of stage 1"),
        "time": column(pa.int64(), "second-split forgetting time", unit="epoch"),
        "accuracy": column(pa.float64(), "mean over epochs of stage 2 of whether it was right"),
        "confidence": column(pa.float64(), "likewise of the probability of its label"),
    },
)


@dataclass(frozen=True, eq=False)
class Stage:
    """Examples to learn, and how."""

    examples: Examples
    epochs: int
    recipe: Recipe


class LookedAt(Run):
    """A run whose network can be asked about examples that it is not learning."""

    def values(self, examples: Examples) -> NDArray[np.float32]:
        """(4, b) as `trajectory.presented`, in eval mode and without a gradient."""
        self.training.model.eval()
        try:
            found = [np.empty((4, 0), dtype=np.float32)]
            for start in range(0, len(examples), supervised.EVALUATED):
                at = np.arange(start, min(start + supervised.EVALUATED, len(examples)))
                inputs = examples.batch(at, self.pad_id, self._device)
                with torch.no_grad():
                    found.append(of_update(self._logits(inputs), inputs)[1])
        finally:
            self.training.model.train()
        return np.concatenate(found, axis=1)


def run(options: SecondSplitOptions, out: Path, *, force: bool, progress: Progress) -> tables.Report:
    """Train all networks and write the report; networks that an interrupted run has finished are not trained again.

    Errors as `second_split_report.second_split`.
    """
    inputs = _open(options)
    identity = {
        "report": REPORT,
        "schema_version": VERSION,
        "options": options.identity(),
        **inputs.identity(inputs.new(options.seed)),
    }
    if tables.check_place(out, lambda: identity, force=force):
        log.info("%s is already there, made from the same inputs; --force makes it again", out)
        tables.remove_leftovers(out, identity)
        return tables.read(out)
    parts = tables.Parts(out, identity, force=force)
    try:
        _train_all(inputs, options, parts, progress)
        _finish(inputs, options, parts, out, identity)
        parts.remove()
    finally:
        parts.close()
    return tables.read(out)


def _open(options: SecondSplitOptions) -> Inputs:
    """Everything that is read, with the model of the first seed.

    Raises:
        InputError: it is not there, not readable, or nothing that a classifier can learn in two halves.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--second-split runs in one process; start it without torchrun")
    if options.data is None:
        raise InputError("--second-split trains networks of its own; say with --data on what, e.g. --data task:digits")
    settings = options.training(options.seed_list()[0])
    dataset = open_dataset(options.data, columns=parse_columns(settings.columns) or {}, limit=options.limit)
    if not dataset.has_labels:
        raise InputError(
            f"{dataset.name}: has no column of labels, and --second-split is for classifiers; name it with "
            "--columns label=NAME"
        )
    inputs = open_inputs(settings)
    if len(inputs.examples) < 2:
        raise InputError(f"{dataset.name}: has {len(inputs.examples)} example; two halves need at least 2")
    return inputs


def stages_of(inputs: Inputs, options: SecondSplitOptions, seed: int, direction: int) -> tuple[Stage, Stage]:
    """What the network of a seed and direction learns first, and then."""
    in_first = first_half(len(inputs.examples), seed)
    first, second = (_some(inputs.examples, half) for half in (in_first, ~in_first))
    if direction == 2:
        first, second = second, first

    def stage(examples: Examples, number: int, **how: Any) -> Stage:
        # each stage draws its own order and dropout
        drawn = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        settings = dataclasses.replace(inputs.options, seed=drawn, **how)
        return Stage(examples, *recipe_of(dataclasses.replace(inputs, examples=examples, options=settings)))

    one = stage(first, 1)
    lr = one.recipe.lr * SHARE if options.second_lr is None else options.second_lr
    two = stage(second, 2, epochs=options.second_epochs or SECOND_EPOCHS, lr=lr, schedule="constant", warmup=0)
    return one, two


def _some(examples: Examples, mine: NDArray[np.bool_]) -> Examples:
    """Some of the examples."""
    at = mine.nonzero()[0]
    inputs: NDArray[np.float32] | Corpus
    if isinstance(examples.inputs, Corpus):
        whole = examples.inputs
        inputs = Corpus(whole.tokens, whole.starts[at], whole.lengths[at], len(at), 0)
    else:
        inputs = examples.inputs[at]
    assert examples.labels is not None
    return Examples(examples.rows[at], [examples.ids[i] for i in at.tolist()], inputs, examples.labels[at])


# -- training ------------------------------------------------------------------------------------------------------


def _train_all(inputs: Inputs, options: SecondSplitOptions, parts: tables.Parts, progress: Progress) -> None:
    """Make the parts that are not there."""
    of_all = [(seed, direction) for seed in options.seed_list() for direction in DIRECTIONS]
    for i, (seed, direction) in enumerate(of_all, 1):
        about = {"seed": seed, "direction": direction}
        if parts.has(_name(seed, direction), inputs.train.name, about):
            continue
        stages = stages_of(inputs, options, seed, direction)
        progress.start(f"network {i} of {len(of_all)}", sum(s.recipe.steps for s in stages), unit="updates")
        try:
            columns, network = two_stages(inputs, inputs.new(seed), stages, progress)
        except Diverged as error:
            raise IncompleteError(
                f"seed {seed}, direction {direction}: {error}; try a smaller --lr or --second-lr, and another --out"
            ) from None
        meta = {"report": PartRow.report, "part": about, "network": about | network}  # type: ignore[attr-defined]
        tables.write(parts.path(_name(seed, direction)), PartRow, [tables.from_columns(PartRow, columns)], meta)


def _name(seed: int, direction: int) -> str:
    return f"seed-{seed}-direction-{direction}"


def two_stages(
    inputs: Inputs, model: nn.Module, stages: tuple[Stage, Stage], progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train a network in two stages, and look at what it learned first.

    Args:
        model: at update 0; it is changed in place.
        progress: hears of every update.
    Returns:
        The columns of PartRow, and what to say of the network.
    Raises:
        Diverged: the loss or its gradient is not finite.
    """
    one, two = stages
    model = model.to(devices.resolve(inputs.options.device))
    first = _run_of(inputs, model, one, one.recipe)
    for _ in training.train(first.training, one.recipe, first.backward):
        progress.advance(1, "stage 1")
    learned = _finite(first.values(one.examples), one.recipe.steps)[3] == 1
    second = _run_of(inputs, model, two, two.recipe)
    correct: list[NDArray[np.bool_]] = []
    confidence = np.zeros(len(one.examples))
    for update in training.train(second.training, two.recipe, second.backward):
        progress.advance(1, "stage 2")
        if update.step * two.recipe.batch_size >= (len(correct) + 1) * len(two.examples):  # an epoch has ended
            seen = _finite(second.values(one.examples), update.step)
            correct.append(seen[3] == 1)
            confidence += np.exp(-loss_of(seen))
    columns = {
        "row": one.examples.rows,
        "learned": learned,
        "time": forgetting_time(np.stack(correct)),
        "accuracy": np.mean(correct, axis=0, dtype=np.float64),
        "confidence": confidence / len(correct),
    }
    network = {
        "learned": float(learned.mean()),
        "kept": float(correct[-1].mean()),
        "learned_second": float(second.values(two.examples)[3].mean(dtype=np.float64)),
    }
    return columns, network


def _run_of(inputs: Inputs, model: nn.Module, stage: Stage, recipe: Recipe) -> LookedAt:
    begun = training.begin(model, recipe)
    return LookedAt(begun, recipe, stage.examples, stage.epochs, inputs.pad_id, None, inputs.name)


def _finite(values: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """Batch norm can be finite in train mode and not in eval mode."""
    if not np.isfinite(loss_of(values)).all():
        raise Diverged(step - 1, "loss in eval mode")
    return values


# -- putting together ----------------------------------------------------------------------------------------------


def _joined(inputs: Inputs, options: SecondSplitOptions, parts: tables.Parts) -> dict[str, Any]:
    """The report's columns, in the order of the rows."""
    examples, seeds = inputs.examples, options.seed_list()
    n, last = len(examples), (options.second_epochs or SECOND_EPOCHS) + 1
    sums = {name: np.zeros(n) for name in ("learned", "time", "censored", "rank", "accuracy", "confidence")}
    for seed in seeds:
        seen = {name: np.empty(n) for name in ("learned", "time", "accuracy", "confidence")}
        for direction in DIRECTIONS:
            table = tables.read(parts.path(_name(seed, direction))).table
            at = np.searchsorted(examples.rows, table["row"].to_numpy())
            for name, values in seen.items():
                values[at] = table[name].cast("float64").to_numpy()
        censored = seen["time"] == last
        found = seen | {
            "censored": censored,
            "rank": within_half(seen["time"], censored, first_half(n, seed)),
        }
        for name in sums:
            sums[name] += found[name]
    half = first_half(n, seeds[0])
    columns = {
        "example_id": list(examples.ids),
        "row": examples.rows,
        "label": examples.labels,
        "half": np.where(half, "first", "second").tolist(),
        "learned": sums["learned"] / len(seeds),
        "second_split_forgetting": sums["time"] / len(seeds),
        "n_censored": sums["censored"],
        "n_seeds": np.full(n, len(seeds)),
        "second_split_rank": sums["rank"] / len(seeds),
        "stage2_accuracy": sums["accuracy"] / len(seeds),
        "stage2_confidence": sums["confidence"] / len(seeds),
    }
    if options.truth is not None:
        columns["truth"] = inputs.corrupted
    return columns


def _finish(
    inputs: Inputs, options: SecondSplitOptions, parts: tables.Parts, out: Path, identity: dict[str, Any]
) -> None:
    """Write the report with its summary."""
    row, columns = row_of(truth=options.truth is not None), _joined(inputs, options, parts)
    n = len(inputs.examples)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, n, GROUP):
            yield tables.from_columns(row, {k: v[start : start + GROUP] for k, v in columns.items()})

    whole = parts.path("whole")
    tables.write(whole, row, batches(), {"report": REPORT})
    texts = inputs.train if inputs.train.kind == "text" else None
    summary, _ = summary_of(
        whole, tuple(SCORES), truth=options.truth is not None, ranks=False, seed=options.seed, texts=texts,
        foreign=SCORES,
    )  # fmt: skip
    names = [_name(seed, direction) for seed in options.seed_list() for direction in DIRECTIONS]
    networks = [tables.read_meta(parts.path(name))["network"] for name in names]
    least = min(network["learned"] for network in networks)
    if least < LEARNED:
        log.warning(
            "a network had learned %.1f %% of its half after stage 1; what is not learned looks forgotten at once, so "
            "read `learned` beside the scores, or give more --epochs",
            100 * least,
        )
    one, two = stages_of(inputs, options, options.seed_list()[0], 1)
    meta = {
        "report": REPORT,
        "schema_version": VERSION,
        "memdiag_version": memdiag.__version__,
        "options": dataclasses.asdict(options),
        "seed": options.seed,
        "seeds": options.seed_list(),
        "kind": "classifier",
        "scores": list(SCORES),
        "memorized": SCORES,
        **inputs.meta(),
        "settled": [{"epochs": stage.epochs, **dataclasses.asdict(stage.recipe)} for stage in (one, two)],
        "networks": networks,
        "n_examples": n,
        "dtype": "float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "summary": summary,
        "identity": identity,
    }
    tables.join(out, row, [whole], meta)


def plan(options: SecondSplitOptions) -> dict[str, object]:
    """What `run` would take, from a few timed updates and one look; writes nothing."""
    inputs = _open(options)
    one, two = stages_of(inputs, options, options.seed_list()[0], 1)
    target = devices.resolve(inputs.options.device)
    model = inputs.new(inputs.options.seed).to(target)
    first = _run_of(inputs, model, one, one.recipe)
    times, began = [], time.perf_counter()
    few = dataclasses.replace(one.recipe, steps=min(5, one.recipe.steps))
    for _ in training.train(first.training, few, first.backward):
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
    first.values(one.examples)
    look = time.perf_counter() - began
    n_networks = len(options.seed_list()) * len(DIRECTIONS)
    steps = one.recipe.steps + two.recipe.steps
    return {
        "model": inputs.name,
        "weights": sum(p.numel() for p in model.parameters()),
        "data": inputs.train.name,
        "examples": len(inputs.examples),
        "networks": n_networks,
        "updates": steps * n_networks,
        "device": devices.describe(target),
        "seconds_expected": round((min(times) * steps + look * (two.epochs + 2)) * n_networks, 1),
        "memory_expected_mb": round(devices.peak_memory() / 2**20),
    }
