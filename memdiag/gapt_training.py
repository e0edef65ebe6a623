"""Train a causal language model with GAPT: what one update is computed from, and what is measured between updates.

Sums are divided by what the whole update holds, not by what a part or a process has of it: cutting an update into
parts, or sharing it among processes, changes neither the loss nor the phases.

Axes: b sequence, t token, l layer: 0 is the embedding output, L the last block's.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from memdiag import gapt, observe, regulariser, training
from memdiag.gapt import COMPRESS, Gate, Rule
from memdiag.packing import Corpus
from memdiag.training import Recipe, Training


@dataclass(frozen=True)
class Method:
    """How GAPT is done; the field names are the command's option names."""

    rule: Rule
    weight: float = 1.0
    layers: str | None = None
    patch_size: int = regulariser.PATCH_SIZE
    alternate: bool = False  # in the phase compress each part of an update has one loss: cross-entropy, or one layer's
    ratio_every: int = 50  # updates between two measurements of the gradients' ratio; 0: never


@dataclass(frozen=True)
class Seen:
    """What one update saw, before it was made."""

    phase: str
    reason: str | None  # why the phase switches after it
    ce: float  # nats a token
    mbe: float | None  # mean of the active layers, nats
    mbe_layers: list[float | None]  # (l,)
    ratio: float | None  # ‖w g_MBE‖ / ‖g_CE‖


@dataclass
class Run:
    """A language model being trained, and everything an update needs."""

    training: Training
    recipe: Recipe
    method: Method
    corpus: Corpus
    pad_id: int = 0
    autocast: torch.dtype | None = None
    gate: Gate = field(init=False)
    active: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.gate = gapt.start(self.method.rule)
        self.active = regulariser.active_layers(self.training.model, self.method.layers)
        self._recorder = observe.Recorder(self.training.model, observe.layers_of(self.training.model)[0])
        self._device = next(self.training.model.parameters()).device
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def close(self) -> None:
        """Take the hooks off the model."""
        self._recorder.close()

    # -- one update

    def backward(self, step: int) -> tuple[float, Seen]:
        """Leave the gradient of update `step` in `.grad`, and show the gate what was seen."""
        rows = training.rows_of_update(step, len(self.corpus), self.recipe.batch_size, self.recipe.seed)
        compress = self.gate.phase == COMPRESS
        every = self.method.ratio_every
        entropic = None
        if compress and every and step % every == 0:
            with torch.random.fork_rng():  # the update draws the same dropout again
                entropic = self._entropy_gradient(rows)
        seen = self._accumulate(rows, compress, step)
        ratio = None if entropic is None else self._ratio(entropic)
        n = len(seen) // 2
        counts = seen[n + 1 :]
        layers = torch.where(counts > 0, seen[1 : n + 1] / counts, math.nan)  # a layer of zeros has no entropy
        ce, mbe = float(seen[0]), layers[self.active].tolist()
        phase, self.gate = self.gate.phase, self.gate.advance(ce, mbe)
        mean = sum(mbe) / len(mbe)
        loss = ce + self.method.weight * mean if compress and not math.isnan(mean) else ce
        found = [None if math.isnan(value) else value for value in layers.tolist()]
        return loss, Seen(phase, self.gate.reason, ce, None if math.isnan(mean) else mean, found, ratio)

    def _accumulate(self, rows: NDArray[np.int64], compress: bool, step: int) -> Tensor:
        """Forward and backward of all parts; (2 l + 1,): cross-entropy, Σ S_2 and patches of layers."""
        parts = np.array_split(rows, self.recipe.accumulate)
        n_targets, n_patches = self.corpus.n_targets(rows), self._n_patches(rows)
        total: Tensor | None = None
        for i, part in enumerate(parts):
            # the last part has the cross-entropy, which reaches every weight, as DDP wants it
            alone = self.method.alternate and compress and (len(parts) - 1 - i) % 2 == 1
            active = [self.active[step % len(self.active)]] if alone else self.active if compress else []
            with self._no_sync(unless=i == len(parts) - 1):
                ce, sums, counts = self._forward(part, active)
                loss = ce / n_targets
                if alone:
                    loss = 0.0 * loss
                if active and not (self.method.alternate and not alone):
                    loss = loss + self.method.weight * sums[active].mean() / n_patches
                (loss * self._world).backward()  # type: ignore[no-untyped-call]
            seen = torch.cat([ce.detach()[None] / n_targets, sums.detach(), counts]).double().cpu()
            total = seen if total is None else total + seen
        assert total is not None
        return training.sum_over_processes(total)

    def _forward(self, part: NDArray[np.int64], active: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Σ nll (), Σ S_2 (l,) and patches (l,) of this process's share of a part."""
        ids, mask = self.corpus.batch(part[self._rank :: self._world], pad_id=self.pad_id)
        ids, mask = ids.to(self._device), mask.to(self._device)
        logits = logits_of(self.training.runs, self.training.model, ids, mask, self.autocast)
        sums, counts = regulariser.entropies(
            self._recorder.take(), mask, active=active, patch_size=self.method.patch_size
        )
        return regulariser.cross_entropy_sum(logits, ids, mask), sums, counts

    def _n_patches(self, rows: NDArray[np.int64]) -> int:
        """What a sum over the patches of an update is divided by; an update of short documents has none."""
        return max(1, self.corpus.n_patches(rows, self.method.patch_size))

    def _no_sync(self, *, unless: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are exchanged once an update, with its last part."""
        runs = self.training.runs
        if unless or not isinstance(runs, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return runs.no_sync()

    # -- how strong is the regulariser?

    def _entropy_gradient(self, rows: NDArray[np.int64]) -> list[Tensor | None]:
        """The gradient of w · MBE alone, parameter by parameter; `.grad` is left empty."""
        n_patches = self._n_patches(rows)
        for part in np.array_split(rows, self.recipe.accumulate):
            with self._no_sync(unless=False):
                _, sums, _ = self._forward(part, self.active)
                loss = self.method.weight * sums[self.active].mean() / n_patches
                (loss * self._world).backward()  # type: ignore[no-untyped-call]
        parameters = list(self.training.model.parameters())
        gradients = [p.grad for p in parameters]
        if isinstance(self.training.runs, nn.parallel.DistributedDataParallel):
            for gradient in gradients:
                if gradient is not None:
                    dist.all_reduce(gradient)
                    gradient /= self._world
        self.training.optimizer.zero_grad(set_to_none=True)
        return gradients

    def _ratio(self, entropic: list[Tensor | None]) -> float | None:
        """‖w g_MBE‖ / ‖g_CE‖, the latter from the update's own gradient."""
        whole = [p.grad for p in self.training.model.parameters()]
        if self.method.alternate:
            others = [g for g in whole if g is not None]  # there is no sum to take apart: beside the update's gradient
        else:
            others = [g if e is None else g - e for g, e in zip(whole, entropic) if g is not None]
        ce = _norm(others)
        return _norm([e for e in entropic if e is not None]) / ce if ce > 0 else None

    # -- between updates

    def evaluate(self, corpus: Corpus, batch_size: int) -> tuple[float, list[float | None]]:
        """Held out: nats a token, and the mean S_2 of every layer (null without a patch); every process calls it."""
        model, rows = self.training.model, np.arange(len(corpus))
        layers = observe.layers_of(model)[0]
        total = torch.zeros(1 + 2 * len(layers), dtype=torch.float64)
        model.eval()
        try:
            for start in range(0, len(rows), batch_size * self._world):
                mine = rows[start : start + batch_size * self._world][self._rank :: self._world]
                # a process without a row runs along: the blocks of a sharded model are fetched by all at once
                seen = self._observe(corpus, mine if len(mine) else rows[:1], layers)
                if len(mine):
                    total += seen
        finally:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # else the next update clips weights that are none any more
            model.train()
        total = training.sum_over_processes(total)
        sums, counts = total[1:].chunk(2)
        means = [float(s / c) if c > 0 else None for s, c in zip(sums, counts)]
        return float(total[0]) / corpus.n_targets(rows), means

    def _observe(self, corpus: Corpus, rows: NDArray[np.int64], layers: list[observe.Layer]) -> Tensor:
        """(2 l + 1,) float64: Σ nll, Σ S_2 and patches of every layer."""
        ids, mask = (tensor.to(self._device) for tensor in corpus.batch(rows, pad_id=self.pad_id))
        sums, counts = torch.zeros(len(layers)), torch.zeros(len(layers))

        def take(position: int, states: Tensor, real: Tensor) -> None:
            (total,), (count,) = regulariser.entropies([states], real, active=(), patch_size=self.method.patch_size)
            sums[position], counts[position] = total, count

        with torch.autocast(self._device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits = observe.forward(self.training.model, observe.Inputs(ids, mask, None, None), layers, take)
        assert logits is not None
        ce = regulariser.cross_entropy_sum(logits, ids, mask)
        return torch.cat([ce.cpu()[None], sums, counts]).double()


def logits_of(runs: nn.Module, model: nn.Module, ids: Tensor, mask: Tensor, autocast: torch.dtype | None) -> Tensor:
    """The model's logits (b, t, v); padding is on the right, and a mask is given only where there is some."""
    accepted = inspect.signature(model.forward).parameters
    kwargs: dict[str, Any] = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    if "attention_mask" in accepted and not bool(mask.all()):
        kwargs["attention_mask"] = mask.long()
    with torch.autocast(ids.device.type, dtype=autocast, enabled=autocast is not None):
        output = runs(ids, **kwargs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def _norm(tensors: list[Tensor]) -> float:
    total = nn.utils.get_total_norm(tensors)
    return float(total.full_tensor() if hasattr(total, "full_tensor") else total)
