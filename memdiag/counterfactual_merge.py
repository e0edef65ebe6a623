"""Carry out `memdiag counterfactual merge`: runs of several machines, which differ in their models only, as one.

Needs no torch, and not the data: what the shards are about stands beside them.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdiag import tables
from memdiag.counterfactual_estimates import EXAMPLES, MAIN, MODELS, Examples, made_in, part, read, write_reports
from memdiag.counterfactual_report import Counterfactual, options_of
from memdiag.counterfactual_rows import CounterfactualRow, ModelRow
from memdiag.counterfactual_shards import FOLDER, items_in, read_shard, run_of, shard_path, time_path
from memdiag.errors import InputError


def merge(directories: Sequence[Path], out: Path, *, force: bool) -> Counterfactual:
    """Join finished runs; errors as `counterfactual_report.merge_counterfactual`."""
    if len(directories) < 2:
        raise InputError(
            "merge wants at least two directories of counterfactual, e.g. merge runs/a runs/b --out runs/ab"
        )
    if len({path.resolve() for path in directories}) < len(directories):
        raise InputError("a directory is given twice; merge wants different runs")
    mains = [_main_of(path) for path in directories]
    if any(path.resolve() == out.resolve() for path in directories):  # by another name, too: --force would delete it
        raise InputError(f"--out {out} is one of the runs; choose another --out")
    identity = mains[0].meta["identity"]
    for path, main in zip(directories[1:], mains[1:]):
        if different := tables.differing_fields(identity, main.meta["identity"]):
            raise InputError(
                f"{path} is of another run than {directories[0]} (differs in {different}); merge wants the same data, "
                "model, options and --seed, with other --first-model"
            )
    where = _sources(directories, run_of(identity))
    told = [Examples.read(path).table for path in directories]
    for path, table in zip(directories[1:], told[1:]):
        if not table.equals(told[0]):
            raise InputError(f"{path / EXAMPLES} differs from {directories[0] / EXAMPLES}; give it back its own")
    options = options_of(mains[0])
    there = tables.check_directory(
        out, MAIN, lambda: identity, force=force, command="counterfactual", made=made_in(out)
    )  # fmt: skip
    parts = tables.Parts(out, identity, force=force)
    try:
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        for name in (parts.path("examples"), out / EXAMPLES):
            shutil.copyfile(directories[0] / EXAMPLES, name)
        for item, folder in where.items():
            for path_of in (time_path, shard_path):
                if path_of(folder, item).exists():
                    target = path_of(out / FOLDER, item)
                    partial = target.with_name(f".{target.name}.partial")
                    shutil.copyfile(path_of(folder, item), partial)
                    os.replace(partial, target)
        more = [item for item in items_in(out / FOLDER) if item not in where] if there else []
        for item in more:
            read_shard(out / FOLDER, item, run_of(identity))
        items = sorted({*where, *more})
        # as if they had been asked for at once: the same command finds them there
        options = dataclasses.replace(options, until_width=None, first_model=items[0], models=len(items))
        analysis: dict[str, Any] = options.analysis()
        if items != list(options.items()):
            analysis["items"] = _ranges(items)
        meta = {**mains[0].meta, "options": dataclasses.asdict(options), "analysis": analysis, "items": _ranges(items)}
        write_reports(out, items, options, meta)
        parts.remove()
    finally:
        parts.close()
    return read(out)


def _main_of(path: Path) -> tables.Report:
    if not (path / MAIN).exists():
        raise InputError(f"{path} holds no finished run of counterfactual; run its command again, then merge")
    main = part(path / MAIN, CounterfactualRow)
    identity, dataset = main.meta.get("identity"), main.meta.get("dataset")
    known = isinstance(identity, dict) and isinstance(dataset, dict) and "way" in identity and "name" in dataset
    if not known or "model" not in main.meta:
        raise InputError(f"{path / MAIN} does not say how it was made; give it back its own")
    return main


def _sources(directories: Sequence[Path], run: str) -> dict[int, Path]:
    """The folder that each model is taken from; where several have it they must agree."""
    where: dict[int, Path] = {}
    for directory in directories:
        folder = directory / FOLDER
        reported = part(directory / MODELS, ModelRow).table["model"].to_pylist()
        for item in sorted({*items_in(folder), *reported}):
            if item in where:
                a, b = read_shard(where[item], item, run), read_shard(folder, item, run)
                if (a.weights, a.subset) != (b.weights, b.subset):
                    raise InputError(
                        f"{shard_path(where[item], item)} and {shard_path(folder, item)} are two models of the same "
                        "number; merge wants runs of other --first-model"
                    )
            else:
                read_shard(folder, item, run)
                where[item] = folder
    return dict(sorted(where.items()))


def _ranges(items: Sequence[int]) -> str:
    """0-99,150: the numbers in short."""
    found: list[list[int]] = []
    for item in items:
        if found and item == found[-1][1] + 1:
            found[-1][1] = item
        else:
            found.append([item, item])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
