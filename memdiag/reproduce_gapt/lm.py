"""Language modelling: does GAPT lower held-out cross-entropy, and how far does it compress?

Yu, arXiv:2505.08727, section 4.1: a GPT of 12 blocks on FineWeb, cross-entropy 3.31 to 3.15 and entropy of the active
layers 0.39 to 0.12, one run of each. Here each arm is `memdiag train-gapt` with the same seeds, tokens and updates.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memdiag import train_gapt_compare, train_gapt_run
from memdiag.errors import InputError
from memdiag.reproduce_effects import Arm, Control, Effect
from memdiag.train_gapt_report import TrainGaptOptions

ARMS = (Arm("none"), Arm("gapt"), Arm("constant", needs="gapt"), Arm("random", needs="gapt"))
SETTINGS = {
    # `memdiag train-gapt` as it is, with fewer updates
    "smoke": TrainGaptOptions(steps=600, save_every=600, ratio_every=0),
    # the shape of the paper's model and its number of updates; of what the paper does not say, gapt's defaults
    "paper": TrainGaptOptions(
        config="gpt2-small", steps=1750, save_every=1750, batch_size=512, accumulate=32, max_length=1024, lr=6e-4,
        schedule="linear", ratio_every=0,
    ),
}  # fmt: skip
NOTE = "one run of each; FineWeb, a GPT of 12 blocks of 768 with its own optimizer"


def effects(preset: str) -> list[Effect]:
    """What the paper says of pre-training."""
    controls = (Control("constant"), Control("random"))
    shared = {"baseline": "none", "treated": "gapt", "controls": controls, "relative": True, "direction": -1}
    return [
        Effect(
            name="held_out_ce",
            statement="GAPT lowers held-out cross-entropy by 4.8 %",
            measure="val_ce",
            paper={"none": 3.31, "gapt": 3.15},
            paper_note=f"text; {NOTE}; the author's later note: 3.30 to 3.28",
            **shared,  # type: ignore[arg-type]
        ),
        Effect(
            name="active_mbe",
            statement="the entropy of the active layers falls by 70 %",
            measure="val_mbe",
            paper={"none": 0.3905, "gapt": 0.1168},
            paper_note=f"means of its table of layers; {NOTE}",
            **shared,  # type: ignore[arg-type]
        ),
        Effect(
            name="other_mbe",
            statement="layers that are not active are compressed as well",
            measure="val_mbe_other",
            paper={},
            paper_note="its arithmetic model compresses mostly layers that are not active; no figure for text",
            **shared,  # type: ignore[arg-type]
        ),
        Effect(
            name="train_ce",
            statement="training cross-entropy is not higher for it",
            measure="train_ce",
            paper={},
            paper_note="not given",
            **shared,  # type: ignore[arg-type]
        ),
    ]


def steps(preset: str, arm: str) -> int:
    """Updates of one run."""
    return SETTINGS[preset].steps


def settings(preset: str) -> dict[str, Any]:
    """What decides the figures besides arm and seed."""
    return dataclasses.asdict(SETTINGS[preset])


def run(
    arm: str,
    seed: int,
    preset: str,
    given: Mapping[str, float | None] | None,
    advance: Callable[[int], None],
    data: str | None = None,
) -> dict[str, float | None]:
    """Train one arm and measure it at its last update.

    Args:
        data: texts to train on, instead of task:pydoc.
    Raises:
        InputError: the paper's sizes without data to train on.
    """
    if preset == "paper" and data is None:
        raise InputError("gapt-lm --preset paper trains a model of 124 million weights; give texts with --data FILE")
    options = dataclasses.replace(SETTINGS[preset], data=data, seed=seed, gate="paper" if arm == "gapt" else arm)
    if given is not None:
        share = given["share_compress"] or 0.0
        change = {"share": share} if arm == "random" else {"weight": options.weight * share}
        options = dataclasses.replace(options, **change)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as directory:
        progress = train_gapt_compare.Counting(advance)
        found = train_gapt_run.run(None, options, Path(directory) / "run", force=False, progress=progress)
    measures = {name: values[0] for name, values in train_gapt_compare.values_of([found.summary]).items()}
    return measures | {"share_compress": found.summary["share_compress"], "weight": options.weight}
