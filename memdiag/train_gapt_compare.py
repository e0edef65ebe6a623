"""Carry out `memdiag train-gapt --compare`: the gate and its controls on the same seeds, side by side.

The controls that need to know how much the gate compressed come second: `random` compresses in as many updates at other
times, `constant` all the time with w times that share, so that the pressure is the same on average.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import memdiag
from memdiag import device as devices
from memdiag import grokking, ranks, tables, train_gapt_run, train_gapt_view, workers
from memdiag.errors import InputError
from memdiag.progress import Progress
from memdiag.reproduce_claims import mean_of, t_interval
from memdiag.train_gapt_inputs import open_inputs
from memdiag.train_gapt_report import CompareRow, TrainedGapt, TrainGaptOptions

log = logging.getLogger("memdiag")
MAIN, PLOT = "compare.parquet", "compare.png"
CONTROLS = ("none", "constant", "random")
Job = tuple[str | None, TrainGaptOptions, Path]
Values = dict[str, list[float | None]]  # measure -> value of each seed


def run(
    checkpoint: str | None, options: TrainGaptOptions, out: Path, *, force: bool, progress: Progress
) -> TrainedGapt:
    """Train every arm of every seed in DIR/ARM/seed-S, and write the comparison.

    Errors as `train_gapt_report.train_gapt`.
    """
    if ranks.start()[1] > 1:
        raise InputError("--compare starts processes of its own; run it without torchrun")
    inputs = open_inputs(checkpoint, dataclasses.replace(options, compare=False, seeds=None))
    identity = {
        "report": CompareRow.report,
        "schema_version": CompareRow.schema_version,
        "options": options.identity(),
        **inputs.identity(),
    }
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a directory to --out")
    if tables.check_place(out / MAIN, lambda: identity, force=force):
        log.info("%s is already there, made from the same inputs; --force makes it again", out)
        return read(out)
    foreign = sorted({p.name for p in out.iterdir()} - {options.gate, *CONTROLS, MAIN, PLOT}) if out.is_dir() else []
    if foreign:
        raise InputError(f"{out} holds {foreign[0]}, which is not of this comparison; choose another --out")
    seeds, begun = options.seed_list(), not force
    first = [_job(checkpoint, options, out, arm, seed) for seed in seeds for arm in (options.gate, "none")]
    progress.start("training", 4 * len(seeds) * options.steps, unit="updates")
    one_by_one = devices.resolve(options.device).type != "cpu"
    workers.each(_train, [(*job, begun) for job in first], progress, one_by_one=one_by_one)
    shares = [_share(out, options.gate, seed) for seed in seeds]
    second = [
        _job(checkpoint, options, out, arm, seed, share) for seed, share in zip(seeds, shares) for arm in CONTROLS[1:]
    ]
    workers.each(_train, [(*job, begun) for job in second], progress, one_by_one=one_by_one)
    summaries = {
        arm: [json.loads((out / arm / f"seed-{seed}" / train_gapt_run.SUMMARY).read_text()) for seed in seeds]
        for arm in (options.gate, *CONTROLS)
    }
    meta = {
        "report": CompareRow.report,
        "schema_version": CompareRow.schema_version,
        "memdiag_version": memdiag.__version__,
        "options": {"checkpoint": checkpoint, **dataclasses.asdict(options)},
        "seed": seeds,
        **inputs.meta(),
        "torch": torch.__version__,
        "identity": identity,
    }
    tables.write(out / MAIN, CompareRow, [compare_rows(summaries)], meta)
    found = read(out)
    train_gapt_view.plot(found, out / PLOT)
    return found


def read(out: Path) -> TrainedGapt:
    """What stands in a directory that the command wrote."""
    compare = tables.read(out / MAIN)
    rows = [{k: v for k, v in row.items() if v is not None} for row in compare.table.to_pylist()]
    return TrainedGapt(None, compare, {"rows": rows}, out)


def _job(
    checkpoint: str | None, options: TrainGaptOptions, out: Path, arm: str, seed: int, share: float | None = None
) -> Job:
    settled = dataclasses.replace(options, compare=False, seeds=None, gate=arm, seed=seed)
    if arm == "constant" and share is not None:
        settled = dataclasses.replace(settled, weight=options.weight * share)
    if arm == "random" and share is not None:
        settled = dataclasses.replace(settled, share=share)
    return checkpoint, settled, out / arm / f"seed-{seed}"


def _share(out: Path, gate: str, seed: int) -> float:
    summary = json.loads((out / gate / f"seed-{seed}" / train_gapt_run.SUMMARY).read_text())
    return float(summary["share_compress"])


class Counting(Progress):
    """Hands on how many updates are done."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        super().__init__()
        self._hand_on = advance

    def advance(self, n: int, note: str = "") -> None:
        self._hand_on(n)


def _train(job: tuple[str | None, TrainGaptOptions, Path, bool], advance: Callable[[int], None]) -> None:
    checkpoint, options, out, begun = job
    with grokking.one_thread():  # as many processes as cores
        train_gapt_run.run(checkpoint, options, out, force=not begun, progress=Counting(advance))


# -- figures -------------------------------------------------------------------------------------------------------


def compare_rows(summaries: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of the report, the gated arm first.

    Args:
        summaries: arm -> the summary of each seed, in one order of seeds; the first arm is held against the others.
    """
    gated, values = next(iter(summaries)), {arm: values_of(runs) for arm, runs in summaries.items()}
    rows = []
    for measure in train_gapt_view.MEASURES:
        mine = values[gated][measure]
        for arm, runs in summaries.items():
            theirs = values[arm][measure]
            lo, hi = t_interval(theirs)
            pairs = [None if a is None or b is None else a - b for a, b in zip(mine, theirs)]
            difference_lo, difference_hi = (None, None) if arm == gated else t_interval(pairs)
            rows.append(
                {
                    "measure": measure,
                    "arm": arm,
                    "mean": mean_of(theirs),
                    "lo": lo,
                    "hi": hi,
                    "difference": None if arm == gated else mean_of(pairs),
                    "difference_lo": difference_lo,
                    "difference_hi": difference_hi,
                    "n_seeds": len(runs),
                    "n_lower": None if arm == gated else sum(pair is not None and pair < 0 for pair in pairs),
                    "share_compress": sum(run["share_compress"] for run in runs) / len(runs),
                    "weight": sum(run["weight"] for run in runs) / len(runs),
                }
            )
    return rows


def values_of(runs: Sequence[dict[str, Any]]) -> Values:
    """Of each run's summary, what is compared, at its last update; by measure."""
    last = [run["saves"][-1] for run in runs]
    return {
        "val_ce": [save["val_ce"] for save in last],
        "val_mbe": [save["val_mbe"] for save in last],
        "val_mbe_other": [_others(run, save["val_mbe_layers"]) for run, save in zip(runs, last)],
        "train_ce": [run["train_ce"] for run in runs],
    }


def _others(run: dict[str, Any], layers: Sequence[float | None] | None) -> float | None:
    """Mean over the blocks that are not active."""
    known = [v for i, v in enumerate(layers or []) if i > 0 and i not in run["active_layers"]]
    found = [v for v in known if v is not None]
    return sum(found) / len(found) if found and len(found) == len(known) else None


def plan(checkpoint: str | None, options: TrainGaptOptions) -> dict[str, object]:
    """What `run` would take; writes nothing."""
    one = train_gapt_run.plan(checkpoint, dataclasses.replace(options, compare=False, seeds=None))
    n = (1 + len(CONTROLS)) * len(options.seed_list())
    side_by_side = min(n, os.cpu_count() or 1)
    seconds, memory, disk = (
        float(str(one[f"{name}_expected{unit}"]))
        for name, unit in (("seconds", ""), ("memory", "_mb"), ("disk", "_kb"))
    )
    return one | {
        "arms": [options.gate, *CONTROLS],
        "seeds": len(options.seed_list()),
        "runs": n,
        "processes": side_by_side,
        "seconds_expected": round(seconds * n / side_by_side, 1),
        "memory_expected_mb": round(memory * side_by_side),
        "disk_expected_kb": round(disk * n),
    }
