"""What GAPT adds to a loss: in the phase `compress`, w times the entropy of the hidden states of its active layers.

    loss = CE                                    in the phase memorize
           CE + w · mean_l mean_patches S_2      in the phase compress, l over the active layers

S_2 of patches of 8 consecutive tokens (`mbe`), in float32 whatever the model computes in. Yu, arXiv:2505.08727; see
`gapt` for the phases.

Axes: b sequence, t token, d dimension, l layer: 0 is the embedding output, L the last block's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from memdiag import gapt, mbe, observe
from memdiag.errors import InputError

PATCH_SIZE = 8
IGNORED = -100  # a label that does not count, as transformers marks it


def active_layers(model: nn.Module, wanted: str | None = None) -> list[int]:
    """The layers that are compressed: of L blocks all but the first two and the last two, of fewer than five fewer.

    Args:
        wanted: indices and ranges such as "3-10" or "2,4,-1"; 0 is the embedding output, 1 to L are the blocks.
    Raises:
        InputError: the model has no stack of blocks, or an index is out of range.
    """
    depth = len(observe.blocks(model))
    if not depth:
        raise InputError("GAPT needs a transformer with a stack of blocks; this model has none")
    if wanted is None:
        skipped = min(2, (depth - 1) // 2)
        return list(range(1 + skipped, depth - skipped + 1))
    layers, _ = observe.layers_of(model, wanted)
    names = [layer.name for layer in observe.layers_of(model)[0]]
    try:
        return [names.index(layer.name) for layer in layers]
    except ValueError:
        raise InputError(f"--layers {wanted!r}: wanted indices and ranges of layers 0 to {depth}") from None


def entropies(
    hidden: Sequence[Tensor], mask: Tensor, *, active: Collection[int], patch_size: int = PATCH_SIZE
) -> tuple[Tensor, Tensor]:
    """Σ S_2 over the patches of every layer, and how many have one: (l,), (l,), float32.

    With gradients for the active layers only. A patch of zeros has no entropy and does not count.
    """
    sums, counts = [], []
    with torch.autocast(mask.device.type, enabled=False):
        for layer, states in enumerate(hidden):
            with torch.set_grad_enabled(torch.is_grad_enabled() and layer in active):
                found = mbe.patch_entropy(states, mask, patch_size=patch_size)
                sums.append(found.nansum().float())
                counts.append((~found.isnan()).sum().float())
    return torch.stack(sums), torch.stack(counts)


def cross_entropy_sum(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Σ −ln p(next token) over the real tokens (b, t), nats, float32, differentiable."""
    labels = ids.masked_fill(~mask, IGNORED)
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # shifting the labels spares a copy of the logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


class Gapt:
    """The gate and its regulariser for your own training loop.

        gapt = memdiag.Gapt(model)                    # once
        ...
        loss = gapt.loss(cross_entropy, mask)         # after every forward pass, instead of the cross-entropy
        loss.backward()
        optimizer.step()
        gapt.step()                                   # after every update

    With several micro-batches in an update call `loss` for each, and `step` once. Under torch.distributed `step`
    averages over the processes, so that all switch together.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float = 1.0,
        layers: str | None = None,
        patch_size: int = PATCH_SIZE,
        **rule: Any,
    ) -> None:
        """Watch a transformer; `close` lets go of it.

        Args:
            model: with a stack of blocks, as transformers' are; what DDP wraps around it may be given, too.
            weight: w, ≥ 0.
            layers: see `active_layers`.
            patch_size: tokens of a patch, ≥ 1.
            **rule: the fields of `memdiag.gapt.Rule`, e.g. gate="relative", ce_patience=50.
        Raises:
            InputError: a value out of range.
        """
        if not 0 <= weight < float("inf"):
            raise InputError(f"weight must be a finite number >= 0, got {weight}")
        if patch_size < 1:
            raise InputError(f"patch_size must be at least 1, got {patch_size}")
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.weight, self.patch_size = weight, patch_size
        self.active = active_layers(inner, layers)
        self.gate = gapt.start(gapt.Rule(**rule))
        self._recorder = observe.Recorder(inner, observe.layers_of(inner)[0])
        self._seen: list[Tensor] = []

    @property
    def phase(self) -> str:
        """memorize or compress: what the update to come does."""
        return self.gate.phase

    def loss(self, cross_entropy: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        """The loss of the last forward pass.

        Args:
            cross_entropy: (), in nats; the mean over this micro-batch.
            mask: (b, t) bool or 0/1, real tokens first; None if all are real.
            scale: of the entropy, where the cross-entropy has already been divided, e.g. by the micro-batches.
        Raises:
            ValueError: there was no forward pass with gradients.
        """
        hidden = self._recorder.take()
        if mask is None:
            mask = torch.ones(hidden[0].shape[:2], dtype=torch.bool, device=hidden[0].device)
        compress = self.phase == gapt.COMPRESS
        active = self.active if compress else ()
        sums, counts = entropies(hidden, mask.bool(), active=active, patch_size=self.patch_size)
        if not bool((mask.sum(1) >= self.patch_size).any()):
            raise InputError(f"no sequence fills a patch of {self.patch_size} tokens; use longer ones")
        self._seen.append(
            torch.cat([cross_entropy.detach()[None], torch.full_like(sums[:1], scale), sums.detach(), counts])
        )
        if not compress:
            return cross_entropy
        return cross_entropy + self.weight * scale * (sums / counts)[self.active].mean()

    def step(self) -> str:
        """The update was made: let the gate see it. Returns the phase of the next one.

        Raises:
            ValueError: `loss` was not called since the last step.
        """
        if not self._seen:
            raise ValueError("step without a loss: call loss after each forward pass, step after each update")
        total = torch.stack(self._seen).double().sum(0).cpu()
        self._seen = []
        if dist.is_initialized():
            if dist.get_backend() == "nccl":  # it knows no host memory
                total = total.cuda()
            dist.all_reduce(total)
            total = total.cpu()
        sums, counts = total[2:].chunk(2)
        ce, layers = float(total[0] / total[1]), (sums / counts)[self.active]
        self.gate = self.gate.advance(ce, layers.tolist())
        return self.phase

    def state_dict(self) -> dict[str, Any]:
        """The gate's state as plain values, for a checkpoint."""
        return self.gate.to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken, under the rule given here."""
        self.gate = gapt.Gate.from_json(self.gate.rule, state)

    def close(self) -> None:
        """Take the hooks off the model."""
        self._recorder.close()

    # -- for the Trainer of transformers

    def compute_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """What `Trainer(compute_loss_func=...)` wants: next-token cross-entropy, and the regulariser.

        Args:
            outputs: with logits (b, t, v).
            labels: (b, t), −100 where padded.
            num_items_in_batch: tokens of the whole update, by which the sum is divided; None: this batch's own.
        """
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        counts = labels != IGNORED
        n = counts[:, 1:].sum()
        total = cross_entropy_sum(logits, labels.clamp(min=0), counts)
        mask = counts.int().flip(1).cummax(1).values.flip(1)  # a prompt that does not count is no padding
        if num_items_in_batch is None:
            return self.loss(total / n, mask) if torch.is_grad_enabled() else total / n
        loss = total / num_items_in_batch
        return self.loss(loss, mask, scale=float(n / num_items_in_batch)) if torch.is_grad_enabled() else loss

    def callback(self) -> Any:
        """What `Trainer(callbacks=[...])` wants: it steps the gate after every update."""
        from transformers import TrainerCallback

        step = self.step

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                step()

        return Callback()
