"""Carry out `memdiag counterfactual`: train the models that are missing, then write the reports.

DIR/shards holds a file for every model that was ever trained there; reports are of those that were asked for. A model
is a function of (seed, k), so asking for more of them, on any engine, adds to what is there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import transformers

import memdiag
from memdiag import counterfactual_estimates as estimates
from memdiag import device as devices
from memdiag import engine, ensemble, memorization, tables
from memdiag.counterfactual_estimates import EXAMPLES, LOGS, MAIN, made_in
from memdiag.counterfactual_job import Job, job_of, one_thread, train_chunk
from memdiag.counterfactual_report import Counterfactual, CounterfactualOptions
from memdiag.counterfactual_rows import ExampleRow
from memdiag.counterfactual_shards import FOLDER, is_of, items_in, read_shard, shard_path
from memdiag.errors import InputError
from memdiag.progress import Progress

log = logging.getLogger("memdiag")
GROUP = 8192  # rows of examples.parquet written at once
MOST_IN_A_BLOCK = 100  # models of a balanced block that --until-width completes


def run(options: CounterfactualOptions, out: Path, *, force: bool, progress: Progress) -> Counterfactual:
    """Train, and write everything to the directory `out`; models that are there are not trained again.

    Errors as `counterfactual_report.counterfactual`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("memdiag counterfactual is not run by torchrun; --engine ray uses several machines")
    if options.turn_over_dropout:
        from memdiag import counterfactual_turnover

        return counterfactual_turnover.run(options, out, force=force, progress=progress)
    if options.sizes is not None:
        from memdiag import counterfactual_sizes

        return counterfactual_sizes.run(options, out, force=force, progress=progress)
    job = opened(options)
    there = not _is_begun(out, job, force=force) and tables.check_directory(
        out, MAIN, lambda: job.identity, force=force, command="counterfactual", made=made_in(out)
    )
    if there and (found := _finished(out, options)) is not None:
        log.info("%s is already there, made from the same inputs; --force makes it again", out)
        tables.remove_leftovers(out, job.identity)
        return found
    parts = tables.Parts(out, job.identity, force=force)
    try:
        meta = _meta(job)
        for path in (parts.path("examples"), out / EXAMPLES):
            tables.write(path, ExampleRow, _example_rows(job), meta | _about(ExampleRow))
        items = _train_until(job, out, progress)
        estimates.write_reports(out, items, options, meta)
        parts.remove()
    finally:
        parts.close()
    return estimates.read(out)


def plan(options: CounterfactualOptions) -> dict[str, object]:
    """What `run` would take, from a quick trial; writes nothing."""
    if options.turn_over_dropout:
        from memdiag import counterfactual_turnover

        return counterfactual_turnover.plan(options)
    job = opened(options)
    items = options.items()
    widths = options.widths()
    size = chunk_size(job, len(items))
    members = [job.member(k) for k in items[: min(size, len(items))]]
    steps = max(1, min(job.recipe.steps, 50))
    with one_thread():
        began = time.perf_counter()
        ensemble.train(members, job.inputs.new, job.data, job.recipe, way=job.way, steps=steps)
        seconds = (time.perf_counter() - began) / steps * job.recipe.steps / len(members)
    n = len(job.inputs.examples) + (len(job.inputs.held_out) if job.inputs.held_out is not None else 0)
    return {
        "model": job.inputs.name,
        "data": job.inputs.train.name,
        "examples": len(job.inputs.examples),
        "groups": int(job.groups.max()) + 1,
        "held_out": n - len(job.inputs.examples),
        "models": len(items) * max(1, len(widths)),
        "models_of_a_block": options.how().block,
        "updates_of_a_model": job.recipe.steps,
        "trained": job.way + (f" ({job.why})" if job.why else ""),
        "at_once": size,
        "device": devices.describe(job.device),
        "seconds_expected": round(seconds * len(items) * max(1, len(widths)) / _workers(job), 1),
        "disk_expected_kb": round(len(items) * max(1, len(widths)) * (n * 10 / 1024 + 4) + 100),
    }


def opened(options: CounterfactualOptions) -> Job:
    """The job of a run; files may have changed since another run of this process."""
    job_of.cache_clear()
    job = job_of(options)
    if job.why and job.options.chunk != 1:
        log.info("models are trained %s: %s", job.way, job.why)
    return job


def _is_begun(out: Path, job: Job, *, force: bool) -> bool:
    """Whether shards of this run stand there and its report does not, or is damaged: days of training are not lost."""
    if force or not any(is_of(out / FOLDER, k, job.digest) for k in items_in(out / FOLDER)):
        return False
    try:
        tables.read_meta(out / MAIN)
    except InputError as error:
        if (out / MAIN).is_file():
            log.warning("%s; it is written again", str(error).partition(";")[0])
            (out / MAIN).unlink()
        return not (out / MAIN).exists()
    return False


def _finished(out: Path, options: CounterfactualOptions) -> Counterfactual | None:
    """What stands there, if it is what was asked for and whole; the shards have what it takes to write it again."""
    if tables.read_meta(out / MAIN).get("analysis") != options.analysis():
        return None
    try:
        return estimates.read(out)
    except InputError as error:
        log.warning("%s; it is written again", str(error).partition(";")[0])
        return None


# -- training ------------------------------------------------------------------------------------------------------


def _train_until(job: Job, out: Path, progress: Progress) -> range:
    """The models asked for; with --until-width as many more, in whole blocks, as it takes."""
    options, block = job.options, job.options.how().block
    items = options.items()
    train_missing(job, out, items, progress)
    while options.until_width is not None and len(items) < options.max_models:
        found = estimates.estimate(out, items, block).hard
        width = memorization.median_width(found)
        if width is not None and width <= options.until_width:
            break
        needed = memorization.models_needed(found, len(items), options.until_width) or 2 * len(items)
        # a rate seen in few models is no rate yet: not more than twice as many before looking again
        wanted = max(min(needed, 2 * len(items)), len(items) + 1)
        if block <= MOST_IN_A_BLOCK:
            wanted = -(-wanted // block) * block
        items = options.items(min(options.max_models, wanted))
        log.info(
            "median interval %s wide; going on to %d models", "unknown" if width is None else f"{width:.3f}", len(items)
        )
        train_missing(job, out, items, progress)
    return items


def train_missing(job: Job, out: Path, items: Sequence[int], progress: Progress) -> None:
    """Train the models that have no whole shard yet.

    Raises:
        IncompleteError: some could not be trained; the others were.
    """
    folder = (out / FOLDER).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    there = set(items_in(folder))
    missing = [k for k in items if k not in there or not _is_whole(folder, k, job.digest)]
    if not missing:
        return
    dispatcher = dataclasses.replace(job.options.dispatcher(), one_by_one=_takes_all(job))
    size = chunk_size(job, len(missing))
    chunks = [tuple(missing[i : i + size]) for i in range(0, len(missing), size)]
    progress.start(f"train {job.inputs.name}", len(missing), unit="models")
    work = functools.partial(
        train_chunk, job.options, str(folder), json.loads(json.dumps(job.identity)), dispatcher.name
    )
    engine.dispatch(
        work, chunks, engine=dispatcher, done=lambda k: shard_path(folder, k).exists(), logs=out / LOGS,
        progress=progress,
    )  # fmt: skip


def _is_whole(folder: Path, item: int, run: str) -> bool:
    """Whether a shard is good; one that is not is named and taken away."""
    try:
        read_shard(folder, item, run)
    except InputError as error:
        log.warning("%s; it is trained again", str(error).partition(";")[0])
        shard_path(folder, item).unlink()
        return False
    return True


def chunk_size(job: Job, n_missing: int) -> int:
    """How many models are trained at once."""
    most = max(1, -(-n_missing // _workers(job)))
    if job.options.chunk is not None:
        return min(job.options.chunk, most)
    with one_thread():
        return ensemble.size_of_chunk(job.inputs.new, job.data, job.recipe, way=job.way, most=most)


def _workers(job: Job) -> int:
    return 1 if _takes_all(job) else os.cpu_count() or 1


def _takes_all(job: Job) -> bool:
    """Whether one process needs all of an accelerator."""
    return job.options.engine == "inline" and job.device.type != "cpu"


# -- what the reports say ------------------------------------------------------------------------------------------


def _about(row: Any) -> dict[str, Any]:
    return {"report": row.report, "schema_version": row.schema_version}


def _example_rows(job: Job) -> Iterator[pa.RecordBatch]:
    inputs = job.inputs
    for examples, held_out in ((inputs.examples, False), (inputs.held_out, True)):
        for start in range(0, 0 if examples is None else len(examples), GROUP):
            assert examples is not None
            stop = min(start + GROUP, len(examples))
            own = slice(start, stop)
            none = [None] * (stop - start)
            truth = None if held_out else inputs.corrupted
            yield tables.from_columns(
                ExampleRow,
                {
                    "row": examples.rows[own],
                    "held_out": [held_out] * (stop - start),
                    "example_id": list(examples.ids[own]),
                    "label": none if examples.labels is None else examples.labels[own],
                    "truth": none if truth is None else truth[own],
                    "group_id": none if held_out else job.group_ids[own],
                    "group": none if held_out else job.groups[own],
                    "content": none if held_out else job.content[own],
                },
            )


def _meta(job: Job) -> dict[str, Any]:
    options = dataclasses.asdict(job.options)
    return {
        "memdiag_version": memdiag.__version__,
        "options": options,
        "analysis": job.options.analysis(),
        "seed": options["seed"],
        **job.inputs.meta(),
        "settled": {"epochs": job.epochs, **dataclasses.asdict(job.recipe)},
        "trained": job.way,
        "n_examples": len(job.inputs.examples),
        "dtype": "float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "identity": job.identity,
    }
