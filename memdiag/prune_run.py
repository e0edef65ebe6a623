"""Carry out `memdiag prune-memorizers`: network by network, resumable, seeds side by side."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import memdiag
from memdiag import checkpoint as checkpoints
from memdiag import prune_checkpoint, prune_inputs, prune_modular, tables, workers
from memdiag.errors import InputError
from memdiag.progress import Progress
from memdiag.prune_curves import Found
from memdiag.prune_modular import Setting
from memdiag.prune_report import REPORTS, Pruned, PruneOptions

log = logging.getLogger("memdiag")
MAIN = "pruning"  # the report that is written last: where it stands, all is there


def run(checkpoint: str | None, options: PruneOptions, out: Path, *, force: bool, progress: Progress) -> Pruned:
    """Do what is asked for and write it to the directory `out`; what an interrupted run has finished stays done.

    Errors as `prune_report.prune_memorizers`.
    """
    work = _modular(options) if checkpoint is None else _of_checkpoint(checkpoint, options)
    identity = {
        "report": "prune-memorizers",
        "schema_version": REPORTS[MAIN].__dict__["schema_version"],
        "options": options.identity(),
        **work.identity,
    }
    names = [*(f"{report}.parquet" for report in REPORTS), "pruned", *work.names]
    if tables.check_directory(
        out, f"{MAIN}.parquet", lambda: identity, force=force, command="prune-memorizers", made=names
    ):
        log.info("%s is already there, made from the same inputs; --force makes it again", out)
        tables.remove_leftovers(out, identity)
        return read(out)
    parts = tables.Parts(out, identity, force=force)
    try:
        waiting = [i for i, name in enumerate(work.names) if not parts.has(name, name, {"name": name})]
        work.run([work.names[i] for i in waiting], parts, progress)
        _assemble(parts, out, work, {"checkpoint": checkpoint, **dataclasses.asdict(options)}, identity)
        parts.remove()
    finally:
        parts.close()
    return read(out)


def read(out: Path) -> Pruned:
    """What stands in a directory that the command wrote."""
    found = {name: tables.read(path) if (path := out / f"{name}.parquet").exists() else None for name in REPORTS}
    pruning, neurons = found["pruning"], found["neurons"]
    if pruning is None or neurons is None:
        raise InputError(f"{out} holds no finished report of prune-memorizers; run the command again")
    return Pruned(pruning, neurons, found["dynamics"], found["filtration"], out)


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be done: one part for each network."""

    names: list[str]  # of the parts, in the report's order
    identity: dict[str, Any]
    meta: dict[str, Any]
    reports: list[str]
    run: Callable[[list[str], tables.Parts, Progress], None]


# -- networks trained here -----------------------------------------------------------------------------------------


def seeds_of(options: PruneOptions) -> list[int]:
    """The seeds of --seeds, else that of --seed.

    Raises:
        InputError: they cannot be read, are negative, or one comes twice.
    """
    if options.seeds is None:
        return [options.seed]
    texts = [text.strip() for text in options.seeds.split(",")]
    if not all(text.isdecimal() and len(text) < 10 for text in texts) or len(set(map(int, texts))) < len(texts):
        raise InputError(f"--seeds {options.seeds!r}: wanted different whole numbers like 0,1,2")
    return [int(text) for text in texts]


def _modular(options: PruneOptions) -> Work:
    setting, seeds = prune_modular.setting_of(options), seeds_of(options)

    def run(names: list[str], parts: tables.Parts, progress: Progress) -> None:
        progress.start("training", len(names) * setting.training.steps, unit="steps")
        jobs = [(setting, options, int(name.removeprefix("seed-")), parts.directory) for name in names]
        workers.each(_train_one, jobs, progress)

    settled = dataclasses.asdict(setting)
    return Work(
        names=[f"seed-{seed}" for seed in seeds],
        identity={"setting": settled},
        meta={
            "setting": settled,
            "task": [setting.task(seed) for seed in seeds],
            "corrupted_label": "drawn from all classes, may be the true one"
            if setting.law == "uniform"
            else "drawn from the wrong classes",
            "loss": "mean squared error against one-hot labels, mean over classes",
            "device": "cpu",
        },
        reports=["neurons", "dynamics", *(["filtration"] if options.filter_frequencies else []), MAIN],
        run=run,
    )


def _train_one(job: tuple[Setting, PruneOptions, int, Path], advance: Callable[[int], None]) -> None:
    setting, options, seed, directory = job
    found = prune_modular.of_seed(setting, options, seed, advance)
    write_part(directory, f"seed-{seed}", found, None, setting.task(seed))


# -- a checkpoint --------------------------------------------------------------------------------------------------


def _of_checkpoint(name: str, options: PruneOptions) -> Work:
    inputs = prune_inputs.open_inputs(name, options)

    def run(names: list[str], parts: tables.Parts, progress: Progress) -> None:
        if names:
            found = prune_checkpoint.of_checkpoint(inputs, progress)
            write_part(parts.directory, "checkpoint", found, inputs.tokenizer(), inputs.checkpoint.task)

    return Work(
        names=["checkpoint"],
        identity=inputs.identity(),
        meta=inputs.meta(),
        reports=["neurons", MAIN],
        run=run,
    )


# -- parts and the whole -------------------------------------------------------------------------------------------


def write_part(directory: Path, name: str, found: Found, tokenizer: Any, task: str | None) -> None:
    """One network's checkpoints and reports, the one that says that all is there last."""
    staged = directory / name
    shutil.rmtree(staged, ignore_errors=True)  # of a run that was killed
    for kind, model in found.models.items():
        checkpoints.save(staged / kind, model, tokenizer=tokenizer, task=task)
    meta = {"report": "prune-memorizers", "part": {"name": name}, "about": found.about}
    for report in ("neurons", "dynamics", "filtration"):
        tables.write(directory / f"{name}.{report}.parquet", REPORTS[report], [getattr(found, report)], meta)
    tables.write(directory / f"{name}.parquet", REPORTS[MAIN], [found.pruning], meta)


def _assemble(parts: tables.Parts, out: Path, work: Work, options: dict[str, Any], identity: dict[str, Any]) -> None:
    """Move the checkpoints to their place and join the reports; again from anywhere, if it is cut off."""
    out.mkdir(parents=True, exist_ok=True)
    for name in work.names:
        staged = parts.directory / name
        if work.names == ["checkpoint"]:
            staged, target = staged / "pruned", out / "pruned"
        else:
            target = out / name
        if staged.is_dir():
            os.replace(staged, target)
    networks = [tables.read_meta(parts.path(name))["about"] for name in work.names]
    for report in work.reports:
        row = REPORTS[report]
        meta = {
            "report": row.__dict__["report"],
            "schema_version": row.__dict__["schema_version"],
            "memdiag_version": memdiag.__version__,
            "options": options,
            "seed": options["seed"],
            **work.meta,
            "dtype": networks[0]["dtype"],
            "networks": networks,
            "torch": torch.__version__,
            "identity": identity,
        }
        pieces = [parts.path(name if report == MAIN else f"{name}.{report}") for name in work.names]
        tables.join(out / f"{report}.parquet", row, pieces, meta)


def plan(checkpoint: str | None, options: PruneOptions) -> dict[str, object]:
    """What `run` would take, from a few timed steps; writes nothing."""
    if checkpoint is not None:
        return prune_checkpoint.plan(prune_inputs.open_inputs(checkpoint, options))
    setting, seeds = prune_modular.setting_of(options), seeds_of(options)
    training = setting.training
    pairs = setting.pairs(seeds[0])
    per_step = prune_modular.seconds_per_step(setting)
    side_by_side = min(len(seeds), os.cpu_count() or 1)
    evaluations = training.steps // training.eval_every + 2
    one = per_step * (training.steps + 2 * evaluations)  # looking at all pairs costs about two steps
    points = 3 * min(training.width, 500) + options.draws * 100
    one += points * len(pairs.labels) * pairs.p * 1.2e-9
    rows = len(seeds) * (points + training.width + evaluations)
    return {
        "task": setting.task(seeds[0]),
        "seeds": len(seeds),
        "training_pairs": pairs.n_train,
        "corrupted_pairs": int(pairs.corrupted.sum()),
        "held_out_pairs": len(pairs.labels) - pairs.n_train,
        "neurons": training.width,
        "steps": training.steps,
        "rows": rows,
        "device": "cpu",
        "seconds_expected": round(one * -(-len(seeds) // side_by_side), 1),
        "memory_expected_mb": round(side_by_side * (350 + len(pairs.labels) * training.width * 4 * 5 / 2**20)),
        "disk_expected_kb": round(rows * 0.1 + len(seeds) * 2 * 3 * pairs.p * training.width * 4 / 1024),
    }
