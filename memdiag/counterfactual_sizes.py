"""Carry out `memdiag counterfactual --sizes`: a run for every width, and how memorization changes from one to the next.

Every width is a whole run in DIR/width-W, with the same subsets and seeds: two widths differ in the width alone.

Axes: s width, n example.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag import counterfactual_run, counterfactual_view, size_trajectories, tables
from memdiag.counterfactual_estimates import read_summary, write_text
from memdiag.counterfactual_report import INTERPOLATES, MEMORIZED, Counterfactual, CounterfactualOptions
from memdiag.counterfactual_rows import SizeRow
from memdiag.memorization import at_least
from memdiag.progress import Progress
from memdiag.size_trajectories import SHAPES, Trajectories, standard_errors

log = logging.getLogger("memdiag")
MAIN, SUMMARY, PLOT = "sizes.parquet", "summary.json", "sizes.png"  # MAIN comes last
GROUP = 2048  # examples written at once

Floats = NDArray[np.float64]


def run(options: CounterfactualOptions, out: Path, *, force: bool, progress: Progress) -> Counterfactual:
    """Train at every width, and write DIR/sizes.parquet; errors as `counterfactual_report.counterfactual`."""
    widths = options.widths()
    of_width = [dataclasses.replace(options, sizes=None, width=width) for width in widths]
    # before a day of training it is known that the data is good, and every width can be made
    identity = {f"width-{own.width}": counterfactual_run.opened(own).identity for own in of_width}
    about = {"report": SizeRow.report, "schema_version": SizeRow.schema_version}
    there = tables.check_directory(
        out,
        MAIN,
        lambda: identity,
        force=force,
        command="counterfactual --sizes",
        made=[MAIN, SUMMARY, PLOT, *identity],
    )
    if there and tables.read_meta(out / MAIN).get("analysis") == options.analysis():
        log.info("%s is already there, made from the same inputs; --force makes it again", out)
        tables.remove_leftovers(out, identity)
        return read(out)
    parts = tables.Parts(out, identity, force=force)
    try:
        tables.write(parts.path("begun"), SizeRow, [], about)  # whoever comes back knows what the directory is
        found = []
        for own, place in zip(of_width, identity):
            log.info("%s", place.replace("-", " "))
            found.append(counterfactual_run.run(own, out / place, force=False, progress=progress))
        first = found[0].meta
        meta = {**first, **about, "options": dataclasses.asdict(options), "identity": identity}
        _write(out, widths, found, meta)
        parts.remove()
    finally:
        parts.close()
    return read(out)


def read(out: Path) -> Counterfactual:
    """What stands in a directory that the command wrote."""
    return Counterfactual(tables.read(out / MAIN), read_summary(out / SUMMARY, "trajectories"), out)


def _write(out: Path, widths: Sequence[int], found: Sequence[Counterfactual], meta: dict[str, Any]) -> None:
    columns = {
        name: np.stack([made.table[name].to_numpy(zero_copy_only=False).astype(np.float64) for made in found])
        for name in ("memorization", "p_in", "p_out", "n_in", "n_out")
    }  # (s, n)
    se = standard_errors(columns["p_in"], columns["n_in"], columns["p_out"], columns["n_out"])
    calls = size_trajectories.classify(columns["memorization"], se)
    tables.write(out / f".{MAIN}.whole", SizeRow, _rows(widths, found[0].table, columns, se, calls), meta)
    about = _summary(widths, found, columns["memorization"], se, calls, meta)
    write_text(out / SUMMARY, json.dumps(about, indent=2) + "\n")
    whole = tables.read(out / f".{MAIN}.whole")
    counterfactual_view.plot_sizes(Counterfactual(whole, about, out), out / PLOT)
    (out / f".{MAIN}.whole").replace(out / MAIN)


def _rows(
    widths: Sequence[int], examples: pa.Table, columns: dict[str, Floats], se: Floats, calls: Trajectories
) -> Iterator[pa.RecordBatch]:
    """Example after example, each at every width."""
    s, n = se.shape
    for start in range(0, n, GROUP):
        part = slice(start, min(start + GROUP, n))
        size = part.stop - part.start
        repeated = np.repeat(np.arange(part.start, part.stop), s)
        same = {name: examples[name].take(repeated) for name in ("row", "example_id", "label", "truth")}
        yield tables.from_columns(
            SizeRow,
            {name: column.combine_chunks() for name, column in same.items()}
            | {name: values[:, part].T.ravel() for name, values in columns.items()}
            | {
                "se": se[:, part].T.ravel(),
                "width": np.tile(np.array(widths), size),
                "trajectory": np.repeat(calls.shape[part], s).tolist(),
            },
        )


def _summary(
    widths: Sequence[int],
    found: Sequence[Counterfactual],
    mem: Floats,
    se: Floats,
    calls: Trajectories,
    meta: dict[str, Any],
) -> dict[str, Any]:
    return {
        "model": meta["model"],
        "data": meta["dataset"]["name"],
        "widths": list(widths),
        "models": found[0].summary["models"],
        "examples": mem.shape[1],
        "of_width": [
            {
                "width": width,
                **{name: (made.summary[name] or {}).get("value") for name in (
                    "accuracy_in", "accuracy_out", "test_accuracy", "memorization",
                )},
                "memorized": int(at_least(own, MEMORIZED).sum()),
            }
            for width, made, own in zip(widths, found, mem)
        ],
        "trajectories": {shape: int((calls.shape == shape).sum()) for shape in SHAPES},
        "called_by_chance": size_trajectories.false_call_rate(se, meta["seed"]),
        "warnings": _warnings(widths, found),
    }  # fmt: skip


def _warnings(widths: Sequence[int], found: Sequence[Counterfactual]) -> list[str]:
    """What is said of several widths alike is said once."""
    learned = {
        width: made.summary["accuracy_in"]["value"] or 0.0 for width, made in zip(widths, found)
    }  # fmt: skip
    little = {width: share for width, share in learned.items() if share < INTERPOLATES}
    said = [text for text in found[0].summary["warnings"] if "have learned" not in text]
    if little:
        shares = ", ".join(f"{share:.1%} at width {width}" for width, share in little.items())
        said.append(
            f"the models have learned {shares} of what they were trained on: memorization there is of what was "
            "learned, and grows as more is; more --epochs learn more"
        )
    return said
