"""Carry out `memdiag reproduce gapt-*` and `long-tail`: run by run, resumable, side by side, then effect by effect."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import memdiag
from memdiag import device as devices
from memdiag import grokking, reproduce_gapt, tables, workers
from memdiag.dataset import open_dataset
from memdiag.errors import unknown
from memdiag.progress import Progress
from memdiag.reproduce_effects import Arm, Effect, judge
from memdiag.reproduce_report import EFFECT_REPORTS, TAIL, ReproducedEffects, ReproduceOptions, RunRow

log = logging.getLogger("memdiag")
MAIN = "effects"  # the report that is written last: where it stands, all is there
GAPT_PAPER = "Yu 2025, Memorization-Compression Cycles Improve Generalization, arXiv:2505.08727"
TAIL_PAPER = "Feldman and Zhang 2020, What Neural Networks Memorize and Why, arXiv:2008.03703"
Job = tuple[str, str, int, ReproduceOptions, Path]  # experiment, arm, seed


@dataclasses.dataclass(frozen=True)
class Work:
    """The effects in question and the arms that they need."""

    name: str
    effects: list[Effect]
    arms: list[Arm]
    seeds: list[int]

    def rounds(self) -> list[list[tuple[str, int]]]:
        """(arm, seed) of every run: first those that need nothing, then those that need one of them."""
        return [
            [(arm.name, seed) for seed in self.seeds for arm in self.arms if (arm.needs is not None) == later]
            for later in (False, True)
        ]

    def claimed(self) -> str:
        """A fingerprint of the effects, which are no options but part of a version."""
        return _digest([dataclasses.asdict(effect) for effect in self.effects])


def experiment(name: str) -> ModuleType:
    """The module of an experiment; see `reproduce_gapt` for what is in it. The one of long-tail has more."""
    return importlib.import_module("memdiag.reproduce_tail") if name == TAIL else reproduce_gapt.experiment(name)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def work_of(name: str, options: ReproduceOptions) -> Work:
    """What the options ask for.

    Raises:
        InputError: an effect that does not exist.
    """
    module = experiment(name)
    known = {effect.name: effect for effect in module.effects(options.preset)}
    only = options.only_list()
    for wanted in only or []:
        if wanted not in known:
            raise unknown(f"effect of {name}", wanted, known)
    effects = [effect for effect in known.values() if only is None or effect.name in only]
    needed = {arm for effect in effects for arm in effect.arms()}
    needed |= {arm.needs for arm in module.ARMS if arm.name in needed and arm.needs is not None}
    return Work(name, effects, [arm for arm in module.ARMS if arm.name in needed], options.seed_list())


def run(name: str, options: ReproduceOptions, out: Path, *, force: bool, progress: Progress) -> ReproducedEffects:
    """Do what is asked for and write it to the directory `out`; what an interrupted run has finished stays done.

    Errors as `reproduce_report.reproduce`.
    """
    work = work_of(name, options)
    # what is trained depends on these; other effects or seeds may be asked for when it goes on
    begun = {
        "report": "reproduce",
        "name": name,
        "preset": options.preset,
        "settings": _digest(experiment(name).settings(options.preset)),
        "data": None if options.data is None else open_dataset(options.data).fingerprint(),
    }
    identity = {
        "report": EFFECT_REPORTS[MAIN].__dict__["report"],
        "schema_version": EFFECT_REPORTS[MAIN].__dict__["schema_version"],
        "name": name,
        "options": {"seeds": options.seeds, "only": options.only},
        "claimed": work.claimed(),
        **{key: value for key, value in begun.items() if key != "report"},
    }
    names = [f"{report}.parquet" for report in EFFECT_REPORTS]
    if tables.check_directory(out, f"{MAIN}.parquet", lambda: identity, force=force, command="reproduce", made=names):
        log.info("%s is already there, made from the same inputs; --force makes it again", out)
        tables.remove_leftovers(out, begun)
        return read(out)
    parts = tables.Parts(out, begun, force=force)
    try:
        module = experiment(name)
        if name == TAIL:
            arms = [arm.name for arm in work.arms]
            module.prepare(arms, work.seeds, options.preset, parts.directory, progress)
        waiting = [
            [(arm, seed) for arm, seed in round_ if not parts.has(_file(arm, seed), _file(arm, seed), _part(arm, seed))]
            for round_ in work.rounds()
        ]
        total = sum(module.steps(options.preset, arm) for round_ in waiting for arm, _ in round_)
        progress.start("training", total, unit="networks" if name == TAIL else "updates")
        for round_ in waiting:
            jobs = [(name, arm, seed, options, parts.directory) for arm, seed in round_]
            workers.each(_one, jobs, progress, one_by_one=_device(name, options).type != "cpu")
        _assemble(parts, out, work, {"name": name, **dataclasses.asdict(options)}, identity)
        parts.remove()
    finally:
        parts.close()
    return read(out)


def read(out: Path) -> ReproducedEffects:
    """What stands in a directory that the command wrote."""
    effects, runs = (tables.read(out / f"{name}.parquet") for name in EFFECT_REPORTS)
    return ReproducedEffects(effects, runs, out)


def _device(name: str, options: ReproduceOptions) -> torch.device:
    """What the networks are trained on: small ones on the CPU, one a core."""
    is_small = options.preset == "smoke" or name in ("gapt-conflict", TAIL)
    return devices.resolve("cpu" if is_small else "auto")


def _file(arm: str, seed: int) -> str:
    return f"{arm}.seed-{seed}"


def _part(arm: str, seed: int) -> dict[str, Any]:
    return {"arm": arm, "seed": seed}


def _one(job: Job, advance: Callable[[int], None]) -> None:
    """One run, written as a part."""
    name, arm, seed, options, directory = job
    module = experiment(name)
    needs = next(a.needs for a in module.ARMS if a.name == arm)
    given = None if needs is None else _measures(tables.read(directory / f"{_file(needs, seed)}.parquet"))
    more: dict[str, Any] = {} if options.data is None else {"data": options.data}
    if name == TAIL:
        more["directory"] = directory
    alone = contextlib.nullcontext() if options.preset == "paper" else grokking.one_thread()
    with alone:
        found = module.run(arm, seed, options.preset, given, advance, **more)
    rows = [{"arm": arm, "seed": seed, "measure": measure, "value": value} for measure, value in found.items()]
    meta = {"report": RunRow.report, "part": _part(arm, seed)}
    tables.write(directory / f"{_file(arm, seed)}.parquet", RunRow, [rows], meta)


def _measures(report: tables.Report) -> dict[str, float | None]:
    return {row["measure"]: row["value"] for row in report.table.to_pylist()}


def _assemble(parts: tables.Parts, out: Path, work: Work, options: dict[str, Any], identity: dict[str, Any]) -> None:
    """Judge the effects by the parts, and write both reports."""
    device = _device(work.name, ReproduceOptions(**{k: v for k, v in options.items() if k != "name"}))
    runs: dict[str, dict[int, dict[str, float | None]]] = {}
    rows = []
    for arm in work.arms:
        for seed in work.seeds:
            part = tables.read(parts.path(_file(arm.name, seed)))
            runs.setdefault(arm.name, {})[seed] = _measures(part)
            rows += part.table.to_pylist()
    found = {MAIN: [row for effect in work.effects for row in judge(effect, runs)], "runs": rows}
    for report in ("runs", MAIN):
        row = EFFECT_REPORTS[report]
        meta = {
            "report": row.__dict__["report"],
            "schema_version": row.__dict__["schema_version"],
            "memdiag_version": memdiag.__version__,
            "options": options,
            "seed": work.seeds,
            "paper": TAIL_PAPER if work.name == TAIL else GAPT_PAPER,
            "device": devices.describe(device),
            "dtype": "float32 weights, bfloat16 products" if device.type == "cuda" else "float32",
            "torch": torch.__version__,
            "identity": identity,
        }
        tables.write(out / f"{report}.parquet", row, [found[report]], meta)


def plan(name: str, options: ReproduceOptions) -> dict[str, object]:
    """What `run` would take; writes nothing."""
    work = work_of(name, options)
    runs = [job for round_ in work.rounds() for job in round_]
    module = experiment(name)
    steps = sum(module.steps(options.preset, arm) for arm, _ in runs)
    arms = [arm.name for arm in work.arms]
    more = module.planned(arms, work.seeds, options.preset, steps) if name == TAIL else {"updates": steps}
    return {
        "effects": len(work.effects),
        "arms": arms,
        "runs": len(runs),
        **more,
        "processes": max(1, min(len(runs), os.cpu_count() or 1)),
        "disk_expected_kb": 20 + 6 * len(runs),
    }
