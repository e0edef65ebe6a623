"""Carry out `memdiag train`: epoch after epoch, resumable bit for bit, with a trajectory file for each.

A trajectory file is written when its epoch ends. At every save, in this order: the checkpoint in DIR, the history's
rows since the last save and what the unfinished epoch has presented, the state of model and optimizer. A run that is
taken up again goes on from the newest state and makes again whatever is newer than that.

Axes: n examples, b those of an update.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

import memdiag
from memdiag import checkpoint as checkpoints
from memdiag import device as devices
from memdiag import tables, train_view, training, trajectory
from memdiag.errors import IncompleteError, InputError
from memdiag.progress import Progress
from memdiag.supervised import Run, Seen, loss_of
from memdiag.train_inputs import Inputs, open_inputs
from memdiag.train_plan import autocast_of, recipe_of
from memdiag.train_report import ExampleRow, HistoryRow, Trained, TrainOptions
from memdiag.training import Diverged, Update

log = logging.getLogger("memdiag")
MAIN, EXAMPLES, SUMMARY, PLOT = "history.parquet", "examples.parquet", "summary.json", "history.png"  # MAIN comes last
GROUP = 8192  # rows of examples.parquet written at once


def run(options: TrainOptions, out: Path, *, force: bool, progress: Progress) -> Trained:
    """Train, and write everything to the directory `out`; what an interrupted run has saved is not done again.

    Errors as `train_report.train`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("memdiag train runs in one process; start it without torchrun")
    inputs = open_inputs(options)
    model = inputs.new(options.seed)
    identity = {
        "report": HistoryRow.report,
        "schema_version": HistoryRow.schema_version,
        "options": options.identity(),
        **inputs.identity(model),
    }
    if _is_there(out, identity, force=force):
        log.info("%s is already there, made from the same inputs; --force makes it again", out)
        tables.remove_leftovers(out, identity)
        return read(out)
    parts = tables.Parts(out, identity, force=force)
    try:
        work = _begin(inputs, model, out, parts, identity)
        work.go(progress)
        work.finish()
        parts.remove()
    finally:
        parts.close()
    return read(out)


def read(out: Path) -> Trained:
    """What stands in a directory that the command wrote."""
    return Trained(tables.read(out / MAIN), tables.read(out / EXAMPLES), json.loads((out / SUMMARY).read_text()), out)


def _is_there(out: Path, identity: dict[str, Any], *, force: bool) -> bool:
    main, begun = out / MAIN, out.with_name(f".{out.name}.parts").exists()
    if begun and not force and main.exists() and _is_partial(main):
        main.unlink()  # of a run that diverged: its rows are still among the parts
    made = [MAIN, EXAMPLES, SUMMARY, PLOT, trajectory.FOLDER]
    made += [f"checkpoint-{n}" for n in checkpoints.inner_steps(out)]
    force = force and (begun or main.exists())  # checkpoints that are not ours are never deleted
    return tables.check_directory(out, MAIN, lambda: identity, force=force, command="train", made=made)


def _is_partial(path: Path) -> bool:
    try:
        return tables.read_meta(path).get("partial") is True
    except InputError:
        return False


# -- training ------------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """A run under way."""

    inputs: Inputs
    out: Path
    parts: tables.Parts
    run: Run
    meta: dict[str, Any]  # of every report
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the history, since the last save
    held_out: tuple[float, float] | None = None  # loss and accuracy, measured in the epoch under way
    since: int = 0  # examples of the epoch under way that this process has presented, and in which time
    seconds: float = 0.0

    def __post_init__(self) -> None:
        n = len(self.run.examples)
        self.values = np.full((4, n), np.nan, dtype=np.float32)  # of the epoch under way
        self.presented = np.zeros(n, dtype=np.bool_)
        self.ended = self.run.training.step * self.run.recipe.batch_size // n  # epochs

    def go(self, progress: Progress) -> None:
        """Make the updates that are left, saving now and then.

        Raises:
            IncompleteError: the loss or its gradient is not finite.
        """
        recipe, every = self.run.recipe, self.inputs.options.save_every
        progress.start(f"train {self.inputs.name}", recipe.steps, unit="updates")
        progress.advance(self.run.training.step)
        began = time.perf_counter()
        try:
            for update in training.train(self.run.training, recipe, self.run.backward):
                self.seconds += time.perf_counter() - began
                ends = update.step * recipe.batch_size // len(self.run.examples) > self.ended
                saves = ends if every is None else update.step % every == 0
                saves = saves or update.step == recipe.steps
                if saves:
                    self._evaluate()
                self._take(update)
                if saves:
                    self._save()
                note = f"loss {self.rows[-1]['train_loss']:.3f}" if self.rows else ""
                progress.advance(1, f"epoch {self.ended} of {self.run.epochs}  {note}")
                began = time.perf_counter()
        except Diverged as error:
            raise self._diverged(error) from None

    def _take(self, update: Update[Seen]) -> None:
        """Keep what an update presented, and end the epoch when it has presented all."""
        seen = update.result
        for epoch in np.unique(seen.epochs).tolist():
            mine = seen.epochs == epoch
            self.values[:, seen.at[mine]] = seen.values[:, mine]
            self.presented[seen.at[mine]] = True
            self.since += int(mine.sum())
            if self.presented.all():
                self._end(epoch, update)

    def _end(self, epoch: int, update: Update[Seen]) -> None:
        examples, labels = self.run.examples, self.run.examples.labels
        path = trajectory.path_of(self.out / trajectory.FOLDER, epoch)
        meta = self.meta | trajectory.meta_of(self.meta["dataset"], len(examples))
        trajectory.write_epoch(path, epoch, examples.rows, examples.ids, labels, self.values, meta)
        self.rows.append(self._row(epoch, update))
        self.values[:], self.presented[:], self.ended = np.nan, False, epoch + 1
        self.held_out, self.since, self.seconds = None, 0, 0.0

    def _row(self, epoch: int, update: Update[Seen]) -> dict[str, Any]:
        right, corrupted = self.values[3], self.inputs.corrupted

        def share(of: Any) -> float | None:
            return None if of is None or not of.any() else float(right[of].mean(dtype=np.float64))

        return {
            "epoch": epoch,
            "step": update.step,
            "lr": update.lr,
            "train_loss": float(loss_of(self.values).mean()),
            "train_accuracy": float(right.mean(dtype=np.float64)),
            "test_loss": None if self.held_out is None else self.held_out[0],
            "test_accuracy": None if self.held_out is None else self.held_out[1],
            "corrupted_accuracy": share(corrupted),
            "clean_accuracy": None if corrupted is None else share(~corrupted),
            "examples_per_s": self.since / self.seconds,
        }

    def _evaluate(self) -> None:
        if self.inputs.held_out is None:
            return
        loss, accuracy = self.run.evaluate(self.inputs.held_out)
        if not math.isfinite(loss):  # weights that are no good are not saved
            raise Diverged(self.run.training.step - 1, "held-out loss")
        self.held_out = loss, accuracy

    def _save(self) -> None:
        """See the head of this file."""
        work, step = self.run.training, self.run.training.step
        self.save_checkpoint(step)
        self._write_rows(step)
        some = self.presented.nonzero()[0]
        if len(some):
            examples = self.run.examples
            labels = None if examples.labels is None else examples.labels[some]
            ids = [examples.ids[i] for i in some.tolist()]
            target = self.parts.path(f"presented-{step}")
            meta = {"report": trajectory.TrajectoryRow.report, "part": {"step": step}}
            trajectory.write_epoch(
                target, self.ended, examples.rows[some], ids, labels, self.values[:, some], meta
            )  # fmt: skip
        state = self.parts.directory / f"state-{step}"
        training.save_state(state, work, {"held_out": self.held_out})
        for old in self.parts.directory.glob("state-*"):
            if old != state:
                shutil.rmtree(old)
        for n in _steps_of_parts(self.parts, "presented"):
            if n != step:
                self.parts.path(f"presented-{n}").unlink()
        self.rows = []

    def save_checkpoint(self, step: int) -> None:
        """The model as it is, beside what a killed run may have left of it."""
        target = self.out / f"checkpoint-{step}"
        shutil.rmtree(target, ignore_errors=True)
        checkpoints.save(target, self.run.training.model, tokenizer=self.inputs.tokenizer, task=self.inputs.task())

    def _write_rows(self, step: int) -> None:
        if self.rows:
            meta = {"report": HistoryRow.report, "part": {"step": step}}
            tables.write(self.parts.path(f"history-{step}"), HistoryRow, [self.rows], meta)

    def _diverged(self, error: Diverged) -> IncompleteError:
        """Keep what is good: the weights, if they gave a finite loss, and the rows up to here."""
        saved = checkpoints.inner_steps(self.out)
        if error.what == "gradient" and error.step > max(saved):
            self._save()
            saved.append(error.step)
        else:
            self._write_rows(error.step)
        pieces = [self.parts.path(f"history-{n}") for n in _steps_of_parts(self.parts, "history")]
        meta = {"report": HistoryRow.report, "schema_version": HistoryRow.schema_version, "partial": True}
        tables.join(self.out / MAIN, HistoryRow, pieces, meta)
        good = [n for n in saved if n < error.step or (n == error.step and error.what != "loss")]
        return IncompleteError(
            f"{error}; last good checkpoint: {self.out / f'checkpoint-{good[-1]}' if good else 'none yet'}; {MAIN} has "
            "the epochs before it; try a smaller --lr, a smaller --clip or a longer --warmup, and another --out"
        )

    def finish(self) -> None:
        """Join the rows, and put summary and plot beside them; again from anywhere, if it is cut off."""
        pieces = [self.parts.path(f"history-{step}") for step in _steps_of_parts(self.parts, "history")]
        meta = self.meta | {"report": HistoryRow.report, "schema_version": HistoryRow.schema_version}
        whole = self.parts.path("whole")
        tables.join(whole, HistoryRow, pieces, meta)
        history = tables.read(whole)
        found = train_view.summary_of(history, self.inputs.corrupted)
        _write_text(self.out / SUMMARY, json.dumps(found, indent=2) + "\n")
        train_view.plot_history(history, self.out / PLOT)
        os.replace(whole, self.out / MAIN)


def _begin(
    inputs: Inputs, model: nn.Module, out: Path, parts: tables.Parts, identity: dict[str, Any]
) -> Work:  # fmt: skip
    """The run at its newest state, or at update 0."""
    target = devices.resolve(inputs.options.device)
    epochs, recipe = recipe_of(inputs)
    at = training.begin(model.to(target), recipe)
    states = {int(path.name.removeprefix("state-")): path for path in parts.directory.glob("state-*")}
    newest = max(states, default=0)
    extra = training.load_state(states[newest], at) if states else {}
    run = Run(at, recipe, inputs.examples, epochs, inputs.pad_id, autocast_of(inputs, target), inputs.name)
    work = Work(inputs, out, parts, run, _meta(inputs, run, identity))
    _write_examples(work)
    if states:
        log.info("going on from update %d of %d", newest, recipe.steps)
        work.held_out = extra["held_out"] and tuple(extra["held_out"])
        _take_up(work)
    else:
        work.save_checkpoint(0)
    return work


def _take_up(work: Work) -> None:
    """What the unfinished epoch had presented at the newest state; what is newer goes."""
    step = work.run.training.step
    for n in _steps_of_parts(work.parts, "history"):
        if n > step:
            work.parts.path(f"history-{n}").unlink()
    for n in _steps_of_parts(work.parts, "presented"):
        if n != step:
            work.parts.path(f"presented-{n}").unlink()
            continue
        table = tables.read(work.parts.path(f"presented-{n}")).table
        at = np.searchsorted(work.run.examples.rows, table["row"].to_numpy())
        work.presented[at] = True
        for i, name in enumerate((*trajectory.VALUES, "correct")):
            work.values[i, at] = table[name].to_numpy().astype(np.float32)
    for epoch, path in trajectory.written(work.out / trajectory.FOLDER).items():
        if epoch >= work.ended:
            path.unlink()


def _write_examples(work: Work) -> None:
    """As a part, too, so that whoever comes back knows what the directory is."""
    examples, inputs = work.run.examples, work.inputs
    n = len(examples)

    def column(values: Any) -> list[Any]:
        return [None] * n if values is None else values.tolist()

    columns = zip(
        column(examples.rows), examples.ids, column(examples.labels), column(inputs.true_labels),
        column(inputs.corrupted),
    )  # fmt: skip
    names = [f.name for f in dataclasses.fields(ExampleRow)]
    rows = [dict(zip(names, values)) for values in columns]
    groups = [rows[i : i + GROUP] for i in range(0, n, GROUP)]
    meta = work.meta | {"report": ExampleRow.report, "schema_version": ExampleRow.schema_version}
    for path in (work.parts.path("examples"), work.out / EXAMPLES):
        tables.write(path, ExampleRow, groups, meta)


def _steps_of_parts(parts: tables.Parts, kind: str) -> list[int]:
    return sorted(int(path.stem.removeprefix(f"{kind}-")) for path in parts.directory.glob(f"{kind}-*.parquet"))


def _meta(inputs: Inputs, run: Run, identity: dict[str, Any]) -> dict[str, Any]:
    recipe, options = run.recipe, dataclasses.asdict(inputs.options)
    return {
        "memdiag_version": memdiag.__version__,
        "options": options,
        "seed": options["seed"],
        **inputs.meta(),
        "settled": {"epochs": run.epochs, **dataclasses.asdict(recipe)},
        "n_examples": len(run.examples),
        "dtype": "float32" if run.autocast is None else "float32 weights, bfloat16 products",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "identity": identity,
    }


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
