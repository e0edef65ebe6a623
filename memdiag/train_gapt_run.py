"""Carry out `memdiag train-gapt`: from save to save, resumable bit for bit, on one process or many.

At every save, in this order: the checkpoint in DIR, the rows since the last save, the state of model, optimizer and
gate. A run that is taken up again goes on from the newest state and makes again whatever is newer than that.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import memdiag
from memdiag import checkpoint as checkpoints
from memdiag import device as devices
from memdiag import gapt, ranks, tables, train_gapt_view, training
from memdiag.errors import IncompleteError, InputError
from memdiag.gapt_training import Method, Run, Seen
from memdiag.progress import Progress
from memdiag.train_gapt_inputs import Inputs, Sequences, open_inputs, sequences_of
from memdiag.train_gapt_report import HistoryRow, TrainedGapt, TrainGaptOptions
from memdiag.training import Diverged, Recipe, Update

log = logging.getLogger("memdiag")
MAIN, SUMMARY, PLOT = "history.parquet", "summary.json", "history.png"  # the report is written last
Rows = list[dict[str, Any]]


def run(
    checkpoint: str | None, options: TrainGaptOptions, out: Path, *, force: bool, progress: Progress
) -> TrainedGapt:
    """Train, and write everything to the directory `out`; what an interrupted run has saved is not done again.

    Errors as `train_gapt_report.train_gapt`.
    """
    rank, world = ranks.start()
    if options.shard and world == 1:
        raise InputError("--shard shares one model among processes; start them with torchrun --nproc-per-node N")
    if options.batch_size < world * options.accumulate:
        raise InputError(
            f"--batch-size {options.batch_size} cannot be shared by {world} processes in {options.accumulate} parts"
        )
    inputs = open_inputs(checkpoint, options)
    if checkpoint is not None and out.absolute() in Path(checkpoint).absolute().parents:
        raise InputError(f"{checkpoint} lies in --out {out}, where new checkpoints go; choose another --out")
    identity = {
        "report": HistoryRow.report,
        "schema_version": HistoryRow.schema_version,
        "options": options.identity(),
        **inputs.identity(),
    }
    if ranks.broadcast(rank == 0 and _is_there(out, identity, force=force)):
        log.info("%s is already there, made from the same inputs; --force makes it again", out)
        if rank == 0:
            tables.remove_leftovers(out, identity)
    else:
        parts = tables.Parts(out, identity, force=force) if rank == 0 else None
        try:
            work = _begin(inputs, out, parts)
            work.go(progress)
            if parts is not None:
                _finish(work, parts, {"checkpoint": checkpoint, **dataclasses.asdict(options)}, identity)
                parts.remove()
        finally:
            if parts is not None:
                parts.close()
    ranks.broadcast(None)  # nobody leaves before the report is there
    return read(out) if rank == 0 else TrainedGapt(None, None, {}, None)


def read(out: Path) -> TrainedGapt:
    """What stands in a directory that the command wrote."""
    history = tables.read(out / MAIN)
    return TrainedGapt(history, None, json.loads((out / SUMMARY).read_text()), out)


def _is_there(out: Path, identity: dict[str, Any], *, force: bool) -> bool:
    main, begun = out / MAIN, directory_of(out).exists()
    if begun and not force and main.exists() and _is_partial(main):
        main.unlink()  # of a run that diverged: its rows are still among the parts
    made = [MAIN, SUMMARY, PLOT, *(f"checkpoint-{n}" for n in checkpoints.inner_steps(out))]
    force = force and (begun or main.exists())  # checkpoints that are not ours are never deleted
    return tables.check_directory(out, MAIN, lambda: identity, force=force, command="train-gapt", made=made)


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
    parts: tables.Parts | None  # of the first process
    sequences: Sequences
    run: Run
    rows: Rows  # since the last save
    tokens: int  # predicted so far

    def go(self, progress: Progress) -> None:
        """Make the updates that are left, saving now and then.

        Raises:
            IncompleteError: the loss or its gradient is not finite.
        """
        options, recipe = self.inputs.options, self.run.recipe
        progress.start(f"gate {options.gate}", recipe.steps, unit="updates")
        progress.advance(self.run.training.step)
        every = options.save_every or max(1, recipe.steps // 5)
        began = time.perf_counter()
        try:
            for update in training.train(self.run.training, recipe, self.run.backward):
                rows = training.rows_of_update(
                    update.step - 1, len(self.sequences.train), recipe.batch_size, recipe.seed
                )
                n = self.sequences.train.n_targets(rows)
                self.tokens += n
                speed = n / (time.perf_counter() - began)
                self.rows.append(_row(update, self.tokens, speed))
                seen = update.result
                progress.advance(1, f"{seen.phase}  CE {seen.ce:.3f}  MBE {seen.mbe or 0:.3f}  {speed:,.0f} tokens/s")
                if update.step % every == 0 or update.step == recipe.steps:
                    self._evaluate()
                    self._save()
                began = time.perf_counter()
        except Diverged as error:
            raise self._diverged(error) from None
        finally:
            self.run.close()

    def _evaluate(self) -> None:
        if self.sequences.val is None:
            return
        ce, layers = self.run.evaluate(self.sequences.val, self.run.recipe.batch_size)
        if not math.isfinite(ce):  # weights that are no good are not saved
            raise Diverged(self.run.training.step - 1, "held-out loss")
        known = [layers[layer] for layer in self.run.active]
        mbe = None if None in known else sum(v for v in known if v is not None) / len(known)
        self.rows[-1] |= {"val_ce": ce, "val_mbe": mbe, "val_mbe_layers": layers}

    def _save(self) -> None:
        """See the head of this file; every process calls it."""
        step, work = self.run.training.step, self.run.training
        weights = training.whole_weights(work) if self.inputs.options.shard else None
        if self.parts is not None:
            target = self.out / f"checkpoint-{step}"
            shutil.rmtree(target, ignore_errors=True)  # of a run that was killed before its state was saved
            checkpoints.save(
                target, work.model, tokenizer=self.inputs.tokenizer, task=self.inputs.task(), weights=weights
            )
            self._write_rows(step)
        state = directory_of(self.out) / f"state-{step}"
        training.save_state(state, work, {"gate": self.run.gate.to_json(), "tokens": self.tokens})
        if self.parts is not None:
            for old in directory_of(self.out).glob("state-*"):
                if old != state:
                    shutil.rmtree(old)
        self.rows = []

    def _write_rows(self, step: int) -> None:
        assert self.parts is not None
        last = self.rows[-1].get("val_mbe_layers")
        meta = {"report": HistoryRow.report, "part": {"step": step}, "val_mbe_layers": last}
        names = [field.name for field in dataclasses.fields(HistoryRow)]
        rows = [{name: row.get(name) for name in names} for row in self.rows]
        tables.write(self.parts.path(f"history-{step}"), HistoryRow, [rows], meta)

    def _diverged(self, error: Diverged) -> IncompleteError:
        """Keep what is good: the weights, if they gave a finite loss, and the rows up to here."""
        step = error.step
        if error.what == "gradient" and self.rows:
            self._save()
        elif self.parts is not None and self.rows:
            self._write_rows(step)
        if self.parts is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            pieces = [self.parts.path(f"history-{n}") for n in _steps_of_parts(self.parts)]
            meta = {"report": HistoryRow.report, "schema_version": HistoryRow.schema_version, "partial": True}
            tables.join(self.out / MAIN, HistoryRow, pieces, meta)
        saved = checkpoints.inner_steps(self.out)
        good = self.out / f"checkpoint-{saved[-1]}" if saved else None
        todo = f"memdiag train-gapt {good} with " if good else ""
        return IncompleteError(
            f"{error}; last good checkpoint: {good or 'none yet'}; {MAIN} has the updates before it; "
            f"try {todo}a smaller --lr, --weight or --clip, a longer --warmup, and another --out"
        )


def directory_of(out: Path) -> Path:
    """Where the parts of a run are; every process knows."""
    return out.with_name(f".{out.name}.parts")


def _row(update: Update[Seen], tokens: int, speed: float) -> dict[str, Any]:
    seen = update.result
    return {
        "step": update.step,
        "tokens": tokens,
        "phase": seen.phase,
        "switch_reason": seen.reason,
        "ce": seen.ce,
        "mbe": seen.mbe,
        "mbe_layers": seen.mbe_layers,
        "gradient_ratio": seen.ratio,
        "lr": update.lr,
        "grad_norm": update.grad_norm,
        "val_ce": None,
        "val_mbe": None,
        "tokens_per_s": speed,
    }


def _begin(inputs: Inputs, out: Path, parts: tables.Parts | None) -> Work:
    """The run at its newest state, or at update 0."""
    options = inputs.options
    target = devices.resolve(options.device)
    model = inputs.model().to(target)
    sequences = sequences_of(inputs, model)
    recipe = recipe_of(options, new=inputs.checkpoint is None)
    method = method_of(options)
    at = training.begin(model, recipe, shard=options.shard)
    run = Run(at, recipe, method, sequences.train, sequences.pad_id, autocast_of(options, target))
    out.mkdir(parents=True, exist_ok=True)
    states = {int(path.name.removeprefix("state-")): path for path in directory_of(out).glob("state-*")}
    newest = ranks.broadcast(max(states, default=None))
    tokens = 0
    if newest is not None:
        extra = training.load_state(states[newest], at)
        run.gate, tokens = gapt.Gate.from_json(method.rule, extra["gate"]), extra["tokens"]
        log.info("going on from update %d of %d", newest, recipe.steps)
    if parts is not None:
        for step in _steps_of_parts(parts):
            if step > (newest or 0):
                parts.path(f"history-{step}").unlink()
    return Work(inputs, out, parts, sequences, run, [], tokens)


def _steps_of_parts(parts: tables.Parts) -> list[int]:
    return sorted(int(path.stem.removeprefix("history-")) for path in parts.directory.glob("history-*.parquet"))


def recipe_of(options: TrainGaptOptions, *, new: bool) -> Recipe:
    """The loop's settings; a model that is trained already moves more slowly."""
    same = {field.name for field in dataclasses.fields(Recipe)} & set(TrainGaptOptions.__dataclass_fields__)
    given = {name: getattr(options, name) for name in same}
    given["lr"] = options.lr or (2e-3 if new else 5e-5)
    given["warmup"] = min(100, options.steps // 20) if options.warmup is None else options.warmup
    return Recipe(**given)


def method_of(options: TrainGaptOptions) -> Method:
    """GAPT's settings."""
    same = {field.name for field in dataclasses.fields(Method)} & set(TrainGaptOptions.__dataclass_fields__)
    return Method(rule=options.rule(), **{name: getattr(options, name) for name in same})


def autocast_of(options: TrainGaptOptions, device: torch.device) -> torch.dtype | None:
    """What the matrix products are done in: bfloat16 where the device is made for it, unless told otherwise."""
    if options.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if options.dtype == "bfloat16" else None


# -- the whole -----------------------------------------------------------------------------------------------------


def _finish(work: Work, parts: tables.Parts, options: dict[str, Any], identity: dict[str, Any]) -> None:
    """Join the rows, and put summary and plot beside them; again from anywhere, if it is cut off."""
    run, inputs = work.run, work.inputs
    pieces = [parts.path(f"history-{step}") for step in _steps_of_parts(parts)]
    layers = {step: tables.read_meta(path)["val_mbe_layers"] for step, path in zip(_steps_of_parts(parts), pieces)}
    meta = {
        "report": HistoryRow.report,
        "schema_version": HistoryRow.schema_version,
        "memdiag_version": memdiag.__version__,
        "options": options,
        "seed": options["seed"],
        **inputs.meta(),
        "settled": {
            "lr": run.recipe.lr,
            "warmup": run.recipe.warmup,
            "active_layers": run.active,
            "ce_patience": run.method.rule.ce_patience,
            "mbe_patience": run.method.rule.mbe_patience,
        },
        "data": _told(work.sequences),
        "dtype": "float32" if run.autocast is None else "float32 weights, bfloat16 products",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "identity": identity,
    }
    whole = parts.path("whole")
    tables.join(whole, HistoryRow, pieces, meta)
    history = tables.read(whole)
    found = train_gapt_view.summary_of(history, layers)
    _write_text(work.out / SUMMARY, json.dumps(found, indent=2) + "\n")
    train_gapt_view.plot_history(history, work.out / PLOT)
    os.replace(whole, work.out / MAIN)


def _told(sequences: Sequences) -> dict[str, Any]:
    return {
        "sequence_length": sequences.length,
        "train_sequences": len(sequences.train),
        "train_tokens": int(sequences.train.lengths.sum()),
        "left_out": sequences.train.n_left_out,
        "val_sequences": len(sequences.val) if sequences.val is not None else 0,
        "val_tokens": int(sequences.val.lengths.sum()) if sequences.val is not None else 0,
    }


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def plan(checkpoint: str | None, options: TrainGaptOptions) -> dict[str, object]:
    """What `run` would take, from a few timed updates that compress; writes nothing."""
    inputs = open_inputs(checkpoint, options)
    target = devices.resolve(options.device)
    model = inputs.model().to(target)
    sequences = sequences_of(inputs, model)
    recipe = recipe_of(options, new=inputs.checkpoint is None)
    method = dataclasses.replace(method_of(options), rule=gapt.Rule(gate="constant"), ratio_every=0)
    run = Run(
        training.begin(model, recipe), recipe, method, sequences.train, sequences.pad_id, autocast_of(options, target)
    )
    times = list(_seconds(run))
    n_weights = sum(p.numel() for p in model.parameters())
    saves = -(-options.steps // (options.save_every or max(1, options.steps // 5)))
    return {
        "model": inputs.checkpoint.name if inputs.checkpoint else inputs.config_name,
        "weights": n_weights,
        "active_layers": run.active,
        "data": inputs.train.name,
        **_told(sequences),
        "updates": options.steps,
        "epochs": round(options.steps * options.batch_size / len(sequences.train), 2),
        "device": devices.describe(target),
        "seconds_expected": round(min(times) * options.steps, 1),
        "memory_expected_mb": round(devices.peak_memory() / 2**20),
        "disk_expected_kb": round(saves * n_weights * 4 / 1024 + options.steps * 0.2 + n_weights * 12 / 1024),
    }


def _seconds(run: Run) -> Iterator[float]:
    began = time.perf_counter()
    for _ in training.train(run.training, dataclasses.replace(run.recipe, steps=3), run.backward):
        yield time.perf_counter() - began
        began = time.perf_counter()
    run.close()
