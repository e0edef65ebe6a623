"""Carry out `memdiag counterfactual --turn-over-dropout`: an estimate from one training, averaged over networks.

What each network says is a part of its own, so that an interrupted run goes on with the next network.

Axes: n example.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

import memdiag
from memdiag import agreement, counterfactual_view, tables, turnover_dropout
from memdiag import device as devices
from memdiag.counterfactual_estimates import read_summary, write_text
from memdiag.counterfactual_report import INTERPOLATES, Counterfactual, CounterfactualOptions
from memdiag.counterfactual_rows import TurnOverRow
from memdiag.errors import IncompleteError, InputError
from memdiag.models.mlp import MlpConfig
from memdiag.progress import Progress
from memdiag.tables import column
from memdiag.train_inputs import Inputs, open_inputs
from memdiag.train_plan import recipe_of
from memdiag.training import Diverged, Recipe

log = logging.getLogger("memdiag")
MAIN, SUMMARY, PLOT = "turn-over-dropout.parquet", "summary.json", "turn-over-dropout.png"  # MAIN comes last
NETWORK_SEED = 13  # key of the draws beside the run's seed
GROUP = 8192  # rows written at once
TOP = 10

NAMES = ("own_loss", "flipped_loss", "own_correct", "flipped_correct")
Floats = NDArray[np.float64]

PartRow = tables.row_class(
    "PartRow",
    "counterfactual.turn-over-dropout.part",
    TurnOverRow.schema_version,
    {name: column(pa.float64(), "of one network") for name in NAMES},
)


def run(options: CounterfactualOptions, out: Path, *, force: bool, progress: Progress) -> Counterfactual:
    """Train the networks, and write the report; errors as `counterfactual_report.counterfactual`."""
    inputs = _open(options)
    networks = options.models or 1
    epochs, recipe = recipe_of(inputs)
    identity = {
        "report": TurnOverRow.report,
        "schema_version": TurnOverRow.schema_version,
        "options": options.identity() | {"networks": networks},
        **inputs.identity(inputs.new(options.seed)),
    }
    made = [MAIN, SUMMARY, PLOT]
    if tables.check_directory(
        out, MAIN, lambda: identity, force=force, command="counterfactual --turn-over-dropout", made=made
    ):
        log.info("%s is already there, made from the same inputs; --force makes it again", out)
        tables.remove_leftovers(out, identity)
        return read(out)
    parts = tables.Parts(out, identity, force=force)
    try:
        _train_all(inputs, recipe, networks, parts, progress)
        meta = {
            "report": TurnOverRow.report,
            "schema_version": TurnOverRow.schema_version,
            "memdiag_version": memdiag.__version__,
            "options": dataclasses.asdict(options),
            "seed": options.seed,
            **inputs.meta(),
            "settled": {"epochs": epochs, **dataclasses.asdict(recipe)},
            "n_examples": len(inputs.examples),
            "networks": networks,
            "dtype": "float32",
            "torch": torch.__version__,
            "identity": identity,
        }
        _write(inputs, networks, parts, out, meta)
        parts.remove()
    finally:
        parts.close()
    return read(out)


def plan(options: CounterfactualOptions) -> dict[str, object]:
    """What `run` would take, from a few updates; writes nothing."""
    inputs = _open(options)
    epochs, recipe = recipe_of(inputs)
    assert inputs.config is not None
    few, networks = dataclasses.replace(recipe, steps=min(20, recipe.steps)), options.models or 1
    device = devices.resolve(options.device)
    began = time.perf_counter()
    turnover_dropout.fit(inputs.examples, MlpConfig.from_json(inputs.config), few, device=device)
    seconds = (time.perf_counter() - began) / few.steps * recipe.steps
    return {
        "data": inputs.train.name,
        "examples": len(inputs.examples),
        "networks": networks,
        "epochs": epochs,
        "updates_of_a_network": recipe.steps,
        "device": devices.describe(device),
        "seconds_expected": round(seconds * networks, 1),
    }


def read(out: Path) -> Counterfactual:
    """What stands in a directory that the command wrote."""
    return Counterfactual(tables.read(out / MAIN), read_summary(out / SUMMARY, "networks"), out)


def _open(options: CounterfactualOptions) -> Inputs:
    inputs = open_inputs(options.training())
    if inputs.train.kind != "features" or inputs.examples.labels is None:
        raise InputError(f"{inputs.train.name}: holds {inputs.train.kind}; --turn-over-dropout reads features")
    return inputs


def _train_all(inputs: Inputs, recipe: Recipe, networks: int, parts: tables.Parts, progress: Progress) -> None:
    assert inputs.config is not None
    config = MlpConfig.from_json(inputs.config)
    progress.start(f"train {inputs.name} with turn-over dropout", networks * recipe.steps, unit="updates")
    for k in range(networks):
        if parts.has(f"network-{k}", inputs.train.name, {"network": k}):
            progress.advance(recipe.steps)
            continue
        seed = int(np.random.SeedSequence([inputs.options.seed, NETWORK_SEED, k]).generate_state(1)[0])
        try:
            network = turnover_dropout.fit(
                inputs.examples,
                config,
                dataclasses.replace(recipe, seed=seed),
                device=devices.resolve(inputs.options.device),
                progress=progress,
            )
        except Diverged as error:
            raise IncompleteError(f"network {k}: {error}; try a smaller --lr or --clip 1, and another --out") from None
        found = turnover_dropout.self_influence(network, inputs.examples)
        columns = {name: getattr(found, name).astype(np.float64) for name in NAMES}
        meta = {"report": "counterfactual.turn-over-dropout.part", "part": {"network": k}}
        tables.write(parts.path(f"network-{k}"), PartRow, [tables.from_columns(PartRow, columns)], meta)


def _write(inputs: Inputs, networks: int, parts: tables.Parts, out: Path, meta: dict[str, Any]) -> None:
    tables_of = [tables.read(parts.path(f"network-{k}")).table for k in range(networks)]
    means = {name: np.mean([table[name].to_numpy() for table in tables_of], axis=0) for name in NAMES}
    whole = parts.path("whole")
    tables.write(whole, TurnOverRow, _rows(inputs, means), meta)
    about = _summary(inputs, networks, means)
    write_text(out / SUMMARY, json.dumps(about, indent=2) + "\n")
    counterfactual_view.plot_turn_over(tables.read(whole), out / PLOT)
    whole.replace(out / MAIN)


def _rows(inputs: Inputs, means: dict[str, Floats]) -> Iterator[pa.RecordBatch]:
    examples = inputs.examples
    assert examples.labels is not None
    for start in range(0, len(examples), GROUP):
        part = slice(start, min(start + GROUP, len(examples)))
        size = part.stop - part.start
        yield tables.from_columns(
            TurnOverRow,
            {
                "row": examples.rows[part],
                "example_id": list(examples.ids[part]),
                "label": examples.labels[part],
                "truth": [None] * size if inputs.corrupted is None else inputs.corrupted[part],
                "self_influence": (means["flipped_loss"] - means["own_loss"])[part],
                **{name: values[part] for name, values in means.items()},
            },
        )


def _summary(inputs: Inputs, networks: int, means: dict[str, Floats]) -> dict[str, Any]:
    influence, truth = means["flipped_loss"] - means["own_loss"], inputs.corrupted
    labels: Sequence[int] = inputs.examples.labels.tolist() if inputs.examples.labels is not None else []
    own = float(means["own_correct"].mean())
    warnings = [
        "a good detector of wrong labels, a rough estimate of memorization: the units that did not see an example are "
        "half a network, and worse on every example"
    ]
    if own < INTERPOLATES:
        warnings.append(
            f"with their own units the networks know {own:.1%} of the examples: what was not learned has no influence; "
            "more --epochs or a larger --width learn more"
        )
    return {
        "model": inputs.name,
        "data": inputs.train.name,
        "networks": networks,
        "examples": len(influence),
        "own_accuracy": own,
        "flipped_accuracy": float(means["flipped_correct"].mean()),
        "self_influence": float(influence.mean()),
        "truth": None
        if truth is None or not truth.any() or truth.all()
        else {"n_true": int(truth.sum()), "auc": asdict(agreement.auc(influence, truth))},
        "top": [
            {"example_id": inputs.examples.ids[i], "label": labels[i], "self_influence": float(influence[i])}
            for i in np.argsort(-influence, kind="stable")[:TOP].tolist()
        ],
        "warnings": warnings,
    }
