"""Carry out `memdiag reproduce`: network by network, resumable, several side by side, then claim by claim."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import memdiag
from memdiag import reproduce_grok, tables, workers
from memdiag.errors import InputError, unknown
from memdiag.progress import Progress
from memdiag.reproduce_claims import Claim, judge
from memdiag.reproduce_grok.claims import claims as grok_claims
from memdiag.reproduce_grok.networks import Network, networks
from memdiag.reproduce_grok.phases import map_figures
from memdiag.reproduce_report import NAMES, REPORTS, PhaseRow, Reproduced, ReproduceOptions

log = logging.getLogger("memdiag")
MAP = "map"  # in claims: what all cells of the phase map give together
MAIN = "claims"  # the report that is written last: where it stands, all is there
Figures = dict[str, dict[int, dict[str, float | None]]]
Job = tuple[Network, int, Path]


@dataclasses.dataclass(frozen=True)
class Work:
    """The claims in question, and the networks that they need, each with the seeds it is trained with."""

    claims: list[Claim]
    networks: list[tuple[Network, list[int]]]

    def jobs(self) -> list[tuple[Network, int]]:
        """Every network of every seed, in the order of the report."""
        return [(network, seed) for network, seeds in self.networks for seed in seeds]

    def fingerprint(self) -> str:
        """Of all settings and bands, which are not options but part of a version."""
        parts = [[dataclasses.asdict(claim) for claim in self.claims], [_part(*job) for job in self.jobs()]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def work_of(name: str, options: ReproduceOptions) -> Work:
    """What the options ask for.

    Raises:
        InputError: a paper or claim that does not exist, or a claim about a map that is not to be made.
    """
    if name not in NAMES:
        raise unknown("paper to reproduce", name, NAMES)
    claims = _chosen(grok_claims(options.preset), options)
    needed = set[str]().union(*(claim.networks() for claim in claims))
    with_map = not options.no_map and (options.only is None or MAP in needed)
    seeds = options.seed_list()
    chosen = [
        (network, seeds[:1] if network.in_map else seeds)
        for network in networks(options.preset, options.dtype)
        if (with_map if network.in_map else network.name in needed)
    ]
    return Work(claims, chosen)


def _chosen(claims: Sequence[Claim], options: ReproduceOptions) -> list[Claim]:
    only = options.only_list()
    known = {claim.name for claim in claims}
    for name in only or []:
        if name not in known:
            raise unknown(f"claim of the preset {options.preset}", name, known)
    chosen = [claim for claim in claims if only is None or claim.name in only]
    about_map = [claim.name for claim in chosen if MAP in claim.networks()]
    if options.no_map and only is not None and about_map:
        raise InputError(f"--only {about_map[0]} is about the phase map; leave out --no-map")
    return [claim for claim in chosen if not options.no_map or claim.name not in about_map]


def run(name: str, options: ReproduceOptions, out: Path, *, force: bool, progress: Progress) -> Reproduced:
    """Do what is asked for and write it to the directory `out`; what an interrupted run has finished stays done.

    Errors as `reproduce_report.reproduce`.
    """
    work = work_of(name, options)
    identity = {
        "report": "reproduce",
        "schema_version": REPORTS[MAIN].__dict__["schema_version"],
        "name": name,
        "options": dataclasses.asdict(options),
        "settings": work.fingerprint(),
    }
    # what is trained depends on these; other claims or seeds may be asked for when it goes on
    begun = {"report": "reproduce", "name": name, "preset": options.preset, "dtype": options.dtype}
    names = [f"{report}.parquet" for report in REPORTS]
    if tables.check_directory(out, f"{MAIN}.parquet", lambda: identity, force=force, command="reproduce", made=names):
        log.info("%s is already there, made from the same inputs; --force makes it again", out)
        tables.remove_leftovers(out, begun)
        return read(out)
    parts = tables.Parts(out, begun, force=force)
    try:
        waiting = [job for job in work.jobs() if not parts.has(_file(*job), _file(*job), _part(*job))]
        progress.start("training", sum(network.setting.training.steps for network, _ in waiting), unit="steps")
        workers.each(_one, [(*job, parts.directory) for job in waiting], progress)
        _assemble(parts, out, work, {"name": name, **dataclasses.asdict(options)}, identity)
        parts.remove()
    finally:
        parts.close()
    return read(out)


def read(out: Path) -> Reproduced:
    """What stands in a directory that the command wrote."""
    claims, phases = (tables.read(out / f"{name}.parquet") for name in ("claims", "phases"))
    return Reproduced(claims, phases, out)


# -- parts ---------------------------------------------------------------------------------------------------------


def _file(network: Network, seed: int) -> str:
    return f"{network.name}.seed-{seed}"


def _part(network: Network, seed: int) -> dict[str, Any]:
    """What a part is made from, as it comes back from JSON."""
    part: dict[str, Any] = json.loads(json.dumps({"seed": seed, **dataclasses.asdict(network)}))
    return part


def _one(job: Job, advance: Callable[[int], None]) -> None:
    """Train one network and write its row, with its figures in the metadata."""
    network, seed, directory = job
    row, figures = reproduce_grok.measured(network, seed, advance)
    meta = {"report": PhaseRow.report, "part": _part(network, seed), "figures": figures}
    tables.write(directory / f"{_file(network, seed)}.parquet", PhaseRow, [[row]], meta)


def _assemble(parts: tables.Parts, out: Path, work: Work, options: dict[str, Any], identity: dict[str, Any]) -> None:
    """Judge the claims by the parts, and write both reports."""
    rows, figures = _read_parts(parts, work)
    if cells := [row for row in rows if row["in_map"]]:
        figures[MAP] = {cells[0]["seed"]: map_figures(cells)}
    found = {"claims": [judge(claim, figures) for claim in work.claims], "phases": rows}
    for name in ("phases", MAIN):
        row = REPORTS[name]
        meta = {
            "report": row.__dict__["report"],
            "schema_version": row.__dict__["schema_version"],
            "memdiag_version": memdiag.__version__,
            "options": options,
            "seed": ReproduceOptions(seeds=options["seeds"]).seed_list(),
            "paper": "Doshi et al. 2023, To grok or not to grok, arXiv:2310.13061",
            "data": "all pairs modulo p; redrawn labels come from all classes, so that one in p is right",
            "device": "cpu",
            "dtype": options["dtype"],
            "torch": torch.__version__,
            "identity": identity,
        }
        tables.write(out / f"{name}.parquet", row, [found[name]], meta)


def _read_parts(parts: tables.Parts, work: Work) -> tuple[list[dict[str, Any]], Figures]:
    rows: list[dict[str, Any]] = []
    figures: Figures = {}
    for network, seed in work.jobs():
        part = tables.read(parts.path(_file(network, seed)))
        rows += part.table.to_pylist()
        figures.setdefault(network.name, {})[seed] = part.meta["figures"]
    return rows, figures


# -- dry run -------------------------------------------------------------------------------------------------------


def plan(name: str, options: ReproduceOptions) -> dict[str, object]:
    """What `run` would take, from a few timed steps of each kind of network; writes nothing."""
    work = work_of(name, options)
    jobs = work.jobs()
    per_product: dict[Any, float] = {}  # seconds of a step for each multiply-add, by kind of network
    seconds = 0.0
    for network, _ in jobs:
        kind = _kind(network)
        if kind not in per_product:
            per_product[kind] = reproduce_grok.seconds_per_step(network) / _products(network)
        seconds += per_product[kind] * _products(network) * network.setting.training.steps
    side_by_side = max(1, min(len(jobs), os.cpu_count() or 1))
    return {
        "claims": len(work.claims),
        "networks": len(jobs),
        "steps": sum(network.setting.training.steps for network, _ in jobs),
        "device": "cpu",
        "processes": side_by_side,
        "seconds_expected": round(1.2 * seconds / side_by_side, 1),  # a fifth for looking at them
        "memory_expected_mb": round(side_by_side * (350 + max(map(_megabytes, jobs), default=0))),
        "disk_expected_kb": round(20 + len(jobs) * 20),
    }


def _kind(network: Network) -> tuple[object, ...]:
    training = network.setting.training
    return (
        network.model, network.setting.p, training.dtype, training.norm, training.dropout > 0,
        training.train_batch_size, training.activation,
    )  # fmt: skip


def _products(network: Network) -> float:
    setting = network.setting
    n = setting.training.train_batch_size or int(setting.train_fraction * setting.p**2)
    return float(n * setting.training.width * setting.p)


def _megabytes(job: tuple[Network, int]) -> float:
    setting = job[0].setting
    return setting.p**2 * setting.training.width * 4 * 5 / 2**20
