"""The transformer of the paper: trained, and the periodicity of its MLP's units."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn import functional as F

from memdiag import fourier, grokking, prune_modular, pruning
from memdiag.models.transformer import Transformer, TransformerConfig, effective_curves
from memdiag.modular import Pairs
from memdiag.prune_modular import Setting
from memdiag.pruning import Examples, Row


def trained_and_measured(
    setting: Setting, pairs: Pairs, seed: int, advance: Callable[[int], None]
) -> tuple[list[Row], dict[str, float | None]]:
    """Train the transformer of this seed and look at it.

    Returns:
        what `evaluate` gives at each step looked at; and n_low, n_high: units of the MLP by the IPR of their effective
        curves; unit_ipr_95: the 95 % quantile of the IPR of the way through attention; embedding_ipr: the median over
        the columns of the token embedding, where it shows less.
    """
    rows: list[Row] = []
    last = 0
    for step, model in train(setting, pairs, seed):
        rows.append({"step": step, **evaluate(model, pairs)})
        advance(step - last)
        last = step
    u, v, w = effective_curves(model)
    alive = ~fourier.dead(torch.cat([u, v], 1), w)
    units = fourier.curve_ipr(u[alive], keep_dc=False).nan_to_num()
    columns = fourier.curve_ipr(model.token.weight.detach().T, keep_dc=False).nan_to_num()
    low, _, high = prune_modular.ipr_classes(fourier.ipr(u, v, w, keep_dc=False).numpy(), pairs, "relu")
    return rows, {
        "n_low": low,
        "n_high": high,
        "unit_ipr_95": float(units.quantile(0.95)) if len(units) else None,
        "embedding_ipr": float(columns.median()),
    }


def train(setting: Setting, pairs: Pairs, seed: int) -> Iterator[tuple[int, Transformer]]:
    """Yield (step, model) as `grokking.train` does: full batch, squared error, AdamW."""
    training, n = setting.training, pairs.n_train
    config = TransformerConfig(tokens=pairs.p, classes=pairs.p, width=training.width)
    model = Transformer(config, torch.Generator().manual_seed(seed))
    tokens = torch.from_numpy(pairs.operands[:n])
    wanted = F.one_hot(torch.from_numpy(pairs.labels[:n]), pairs.p).float()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.lr, betas=grokking.BETAS, eps=grokking.EPS, weight_decay=training.weight_decay
    )
    yield 0, model
    for step in range(1, training.steps + 1):
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(model(tokens), wanted).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % training.eval_every == 0 or step == training.steps:
            yield step, model


@torch.no_grad()
def evaluate(model: Transformer, pairs: Pairs) -> dict[str, float | None]:
    """As `grokking.evaluate`, with the mean IPR of the effective curves of the MLP's units."""
    logits = model(torch.from_numpy(pairs.operands))
    masks = grokking.groups(pairs)
    group = np.select([masks["corrupted"], masks["clean"]], [0, 1], 2).astype(np.int8)
    found = pruning.figures(logits.numpy(), Examples(pairs.labels, pairs.truth, group))
    error = (logits - F.one_hot(torch.from_numpy(pairs.labels), pairs.p)).square().mean(1).numpy()
    ipr = fourier.ipr(*effective_curves(model), keep_dc=False)
    alive = ipr[~ipr.isnan()]
    names = ("train_corrupted_acc", "corrupted_true_acc", "train_clean_acc", "test_acc")
    return {
        "train_acc": float((logits.argmax(1).numpy() == pairs.labels)[masks["train"]].mean()),
        **{name: found[name] for name in names},
        "train_loss": float(error[masks["train"]].mean()),
        "test_loss": float(error[masks["test"]].mean()),
        "mean_ipr": float(alive.mean()) if len(alive) else None,
        "weight_norm": float(sum(w.double().square().sum() for w in model.parameters()) ** 0.5),
    }
