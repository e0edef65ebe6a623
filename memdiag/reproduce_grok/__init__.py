"""What `memdiag reproduce grok` trains and looks at: "To grok or not to grok", Doshi et al. 2023 (arXiv:2310.13061).

One network of the paper's kind is trained for every setting and seed, and gives the figures that claims name.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from memdiag import fourier, grokking, prune_modular
from memdiag.models.mlp import MLP
from memdiag.modular import Pairs
from memdiag.prune_modular import Setting
from memdiag.pruning import Row
from memdiag.reproduce_grok import looks, transformer
from memdiag.reproduce_grok.looks import FORGOTTEN, KEPT
from memdiag.reproduce_grok.networks import Network
from memdiag.reproduce_grok.phases import phase_by_paper

EARLY = 10  # steps


def measured(network: Network, seed: int, advance: Callable[[int], None]) -> tuple[Row, dict[str, float | None]]:
    """Train the network of this seed and look at it.

    Args:
        advance: told how many updates are done.
    Returns:
        its row of PhaseRow, and every figure that claims may name.
    """
    pairs = network.setting.pairs(seed)
    with grokking.one_thread():
        if network.model == "transformer":
            rows, more = transformer.trained_and_measured(network.setting, pairs, seed, advance)
        else:
            model, rows = _trained(network.setting, pairs, seed, advance)
            more = _neurons(model, pairs)
            for look in network.looks:
                more |= looks.LOOKS[look](model, pairs)
    figures = at_the_ends(rows) | events(rows) | more
    row = _row(network, seed, rows, figures)
    degenerates = row["phase"] == "full_inversion" and row["phase_paper_rule"] == "coexistence"
    return row, figures | {"rule_degenerates": float(degenerates)}


def _trained(setting: Setting, pairs: Pairs, seed: int, advance: Callable[[int], None]) -> tuple[MLP, list[Row]]:
    rows: list[Row] = []
    last = 0
    for step, model in grokking.train(pairs, setting.training, seed=seed):
        rows.append({"step": step, **grokking.evaluate(model, pairs)})
        advance(step - last)
        last = step
    return model, rows


def at_the_ends(rows: Sequence[Row]) -> dict[str, float | None]:
    """What the network does after training; `initial_…`: before it; `early_…` and `test_acc_300`: on the way."""
    found: dict[str, float | None] = {name: value for name, value in rows[-1].items() if name != "step"}
    found |= {f"initial_{name}": rows[0][name] for name in ("test_acc", "mean_ipr")}
    early = next((row for row in rows if row["step"] == EARLY), None)
    for name in ("train_corrupted_acc", "train_clean_acc"):
        found[f"early_{name}"] = early[name] if early is not None else None
    found["test_acc_300"] = next((row["test_acc"] for row in rows if row["step"] == 300), None)
    return found


def events(rows: Sequence[Row]) -> dict[str, float | None]:
    """Steps at which something first happens, of those that were looked at; None for never."""
    fitted = first_step(rows, lambda row: (row["train_corrupted_acc"] or 0) >= 0.5)
    after = [row for row in rows if fitted is not None and row["step"] > fitted]
    return {
        "step_train": first_step(rows, lambda row: row["train_acc"] >= KEPT),
        "step_test": first_step(rows, lambda row: (row["test_acc"] or 0) >= KEPT),
        "step_unlearned": first_step(after, lambda row: row["train_corrupted_acc"] < FORGOTTEN),
    }


def first_step(rows: Sequence[Row], holds: Callable[[Row], bool]) -> float | None:
    """The step of the first row of which it holds."""
    return next((float(row["step"]) for row in rows if holds(row)), None)


def _neurons(model: MLP, pairs: Pairs) -> dict[str, float | None]:
    activation = model.config.activation
    ipr = fourier.ipr(*grokking.curves(model, pairs.operation), keep_dc=activation == "square").numpy()
    low, _, high = prune_modular.ipr_classes(ipr, pairs, activation)
    return {"n_low": low, "n_high": high}


def _row(network: Network, seed: int, rows: Sequence[Row], figures: dict[str, float | None]) -> Row:
    setting, training = network.setting, network.setting.training
    grokked = any((row["test_acc"] or 0) >= 0.9 for row in rows)
    phase = grokking.phase(figures, setting.p, grokked=grokked)
    by_paper = phase_by_paper(figures, setting.corruption, grokked=grokked)
    same = ("train_acc", "train_corrupted_acc", "train_clean_acc", "test_acc", "mean_ipr", "n_low", "n_high")
    return {
        "network": network.name,
        "in_map": network.in_map,
        "model": network.model,
        "operation": setting.operation,
        "p": setting.p,
        "width": training.width,
        "train_fraction": setting.train_fraction,
        "corruption": setting.corruption,
        "weight_decay": training.weight_decay,
        "dropout": training.dropout,
        "norm": training.norm,
        "activation": training.activation,
        "lr": training.lr,
        "train_batch_size": training.train_batch_size,
        "steps": training.steps,
        "dtype": training.dtype,
        "seed": seed,
        **{name: figures[name] for name in same},
        "phase": phase,
        "phase_paper_rule": by_paper,
    }


def seconds_per_step(network: Network, *, steps: int = 3) -> float:
    """Measured on a few updates."""
    setting = network.setting
    if network.model == "mlp":
        return prune_modular.seconds_per_step(setting, steps=steps)
    setting = dataclasses.replace(
        setting, training=dataclasses.replace(setting.training, steps=steps, eval_every=steps)
    )
    with grokking.one_thread():
        stream = transformer.train(setting, setting.pairs(0), 0)
        next(stream)
        began = time.perf_counter()
        next(stream)
        return (time.perf_counter() - began) / steps
