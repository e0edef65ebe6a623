"""What a causal language model says about each token of a text, from one forward pass: never a float32 (b, t, v).

With logits z_t that predict token t, p = softmax(z_t) and the true token x_t:

    log p(x_t | x_<t)                                      and the teacher-forced hit [argmax z_t = x_t]
    (log p(x_t) − μ) / σ,  μ = Σ p log p,  σ² = Σ p log² p − μ²   the Min-K%++ value (arXiv 2404.02936)
    log q(x_t), q = p over the k largest logits, renormalised     sampling with top-k (arXiv 2410.19482)

The head is applied here, to the hidden states of real tokens only and to some of them at a time, because the model's
own logits would be the largest tensor by far. Some models change the logits behind their head (soft cap, scale), so
the result is first compared with the model's own logits; where they differ, the model's own are used, a few rows at
a time. Everything over the vocabulary is a sum of e^d, d e^d and d² e^d with d = z − max z; blocks of a few rows stay
in the cache of a CPU through all of them.

Axes: b example, t predicted token (token t + 1 of the example), n scored token of the batch, v vocabulary,
d dimension.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memdiag.device import is_out_of_memory
from memdiag.errors import InputError, one_line
from memdiag.observe import Inputs, call, text_config

LOWEST_VARIANCE = 1e-6  # σ² of a uniform or one-hot p is 0; log p − μ is 0 there too
FAR_BELOW = -80.0  # e^d is nothing beside e^0 there, in any dtype; a logit of −inf would give 0 · inf
PROBE_ROWS, PROBE_TOKENS = 2, 8


@dataclass(frozen=True)
class NextTokens:
    """What was found, on the host. Axes: b example, t predicted token (token t + 1 of the example), right padded."""

    logp: NDArray[np.float64]  # (b, t) log p(x_t | x_<t), nats, at most 0; NaN outside `scored`
    hit: NDArray[np.bool_]  # (b, t) x_t is the argmax, of tied ones the lowest token id; False outside `scored`
    scored: NDArray[np.bool_]  # (b, t) real tokens but the first of each example
    z: NDArray[np.float64] | None  # (b, t) (log p − μ) / σ; NaN outside `scored`
    logp_top: NDArray[np.float64] | None  # (b, t) log q(x_t) ≥ log p, −inf below the k-th logit; NaN if not asked for


class Scorer:
    """Scores batches with one model; made once, from a first batch.

    Args:
        model: a causal language model, as observe.predicts_next_token finds it, in evaluation mode.
        probe: some text, on which it is found how to apply the head; a few tokens of it are used.
        moments: whether `z` is wanted.
        top_k: k, if `logp_top` is wanted. As in Hugging Face's sampler, a tie at rank k keeps more than k tokens.
    Raises:
        InputError: k is not positive, or the model gives no logits for every token.
    """

    why_fallback: str | None  # why the model's own logits are used; None if its head is applied here

    def __init__(self, model: nn.Module, probe: Inputs, *, moments: bool = False, top_k: int | None = None) -> None:
        if top_k is not None and top_k < 1:
            raise InputError(f"top-k is {top_k}, wanted a whole number of at least 1")
        self.model, self.moments, self.top_k = model, moments, top_k
        tokens, mask = _tokens_and_mask(probe)
        few = _trimmed(tokens[:PROBE_ROWS, :PROBE_TOKENS], mask[:PROBE_ROWS, :PROBE_TOKENS])
        with torch.no_grad():
            logits = call(model, few)
            if logits is None or logits.ndim != 3:
                raise InputError("scores of text need a causal language model; this model gives no next-token logits")
            self._n_outputs = logits.shape[-1]
            self._head, self.why_fallback = _own_head(model, few, logits)

    def __call__(self, inputs: Inputs, *, top_at: Tensor | None = None) -> NextTokens:
        """One forward pass without gradients.

        A row of one token has nothing to score. Logits that are NaN give NaN and no hit.

        Args:
            inputs: tokens (b, t + 1) with their mask, real tokens first; what stands under the padding is not read.
            top_at: (b, t) bool, where `logp_top` is wanted; None for everywhere. Finding the k largest logits is a
                good part of the cost, and often only a suffix is asked about.
        """
        if top_at is not None and self.top_k is None:
            raise ValueError("top_at says where the top-k value is wanted, but the scorer was made without top_k")
        tokens, mask = _tokens_and_mask(inputs)
        scored = mask[:, 1:]
        targets = tokens[:, 1:][scored]
        wanted = None if top_at is None else top_at.to(scored.device)[scored]
        found = []
        if len(targets):
            with torch.no_grad():
                start = 0
                for logits in self._logits(_trimmed(tokens, mask)):
                    here = slice(start, start + len(logits))
                    found.append(
                        _sums(logits, targets[here], self.moments, self.top_k, None if wanted is None else wanted[here])
                    )
                    start += len(logits)
                    del logits  # so that the next ones do not stand beside them
        sums = torch.cat(found).cpu().double().numpy() if found else np.zeros((0, 6))
        return _next_tokens(sums, scored.cpu().numpy(), self.moments, self.top_k is not None)

    def _logits(self, inputs: Inputs) -> Iterator[Tensor]:
        """Logits (n, v) of the scored tokens in order, example after example, some at a time."""
        assert inputs.tokens is not None
        assert inputs.mask is not None
        if self._head is not None:
            hidden = _hidden(self.model, inputs)[:, :-1][inputs.mask[:, 1:]]
            for start in range(0, len(hidden), self._head.most):
                yield self._head(hidden[start : start + self._head.most])
            return
        lengths = inputs.mask.sum(1).tolist()
        step = max(1, 2**25 // (inputs.tokens.shape[1] * self._n_outputs))
        for start in range(0, inputs.n_examples, step):
            rows = slice(start, start + step)
            logits = call(self.model, _trimmed(inputs.tokens[rows], inputs.mask[rows]))
            assert logits is not None
            yield from (row[: length - 1] for row, length in zip(logits, lengths[rows]) if length > 1)
            del logits


# -- running the model -----------------------------------------------------------------------------------------------


def _tokens_and_mask(inputs: Inputs) -> tuple[Tensor, Tensor]:
    assert inputs.tokens is not None, "next tokens are asked of text"
    mask = inputs.mask if inputs.mask is not None else torch.ones_like(inputs.tokens, dtype=torch.bool)
    return inputs.tokens, mask.bool()


def _trimmed(tokens: Tensor, mask: Tensor) -> Inputs:
    """Without the columns that are padding in every row; the rest of the padding is token 0."""
    width = max(1, int(mask.sum(1).max())) if len(mask) else tokens.shape[1]
    return Inputs(tokens[:, :width].masked_fill(~mask[:, :width], 0), mask[:, :width], None, None)


def _hidden(model: nn.Module, inputs: Inputs) -> Tensor:
    """The last hidden state (b, t, d) of the model without its head, called as observe.call calls the whole."""
    trunk: Any = model.base_model
    kwargs: dict[str, Any] = {"use_cache": False} if hasattr(text_config(model), "use_cache") else {}
    if "attention_mask" in inspect.signature(trunk.forward).parameters:
        kwargs["attention_mask"] = inputs.mask.long() if inputs.mask is not None else None
    hidden: Tensor = trunk(inputs.tokens, **kwargs).last_hidden_state
    return hidden


def _own_head(model: nn.Module, probe: Inputs, logits: Tensor) -> tuple[_Head | None, str | None]:
    """How to get the model's logits (b, t, v) from its last hidden states, or why that is not known."""
    assert probe.mask is not None
    trunk = getattr(model, "base_model", None)
    if not isinstance(trunk, nn.Module) or trunk is model:
        return None, "the model has no base_model"
    if not bool(probe.mask.any()):
        return None, "there is no token to try it on"
    v = logits.shape[-1]
    most = max(256, (2**24 if logits.device.type == "cpu" else 2**25) // v)
    try:
        embeddings = model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(embeddings, nn.Module):
            return None, "the model has no output embeddings"
        hidden = _hidden(model, probe)[probe.mask]
        for config in (text_config(model), None):
            head = _Head(embeddings, config, most)
            if _agree(head(hidden), logits[probe.mask]):
                return head, None
    except (RuntimeError, AttributeError, TypeError, ValueError, LookupError) as error:
        if is_out_of_memory(error):
            raise
        return None, f"the head cannot be applied by itself: {one_line(error, 120)}"
    return None, "the model changes its logits behind the head in a way that is not known"


class _Head:
    """The output embeddings, and what a config says is done to the logits: Cohere's and Granite's scales, Gemma's cap.

    Args:
        most: how many tokens are given at once.
    """

    def __init__(self, embeddings: nn.Module, config: Any, most: int) -> None:
        self.embeddings, self.most = embeddings, most
        self.times, self.over = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.room: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (n, v) of hidden states (n, d); the next call may write over them."""
        logits = (
            self._linear(self.embeddings, hidden) if type(self.embeddings) is nn.Linear else self.embeddings(hidden)
        )
        if self.times is not None:
            logits.mul_(self.times)
        if self.over is not None:
            logits.div_(self.over)
        return logits.div_(self.cap).tanh_().mul_(self.cap) if self.cap is not None else logits

    def _linear(self, layer: nn.Linear, hidden: Tensor) -> Tensor:
        """Into the same memory every time: on a CPU fresh pages would take as long as the sums."""
        weight, bias = layer.weight, layer.bias
        if self.room is None:
            with torch.inference_mode(False):  # or it could not be written to outside of that mode
                self.room = hidden.new_empty((self.most, len(weight)))
        out = self.room[: len(hidden)]
        return torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two computations of the same logits differ by rounding alone."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    eps = torch.finfo(ours.dtype).eps
    a, b = ours.double().cpu(), theirs.double().cpu()
    off = torch.where(a == b, 0.0, a - b)  # infinities that are equal
    size = torch.where(b.isfinite(), b, 0.0)
    # the root mean square finds a wrong scale, the maximum a single token that is treated apart
    rounding = 64 * eps if eps < 1e-5 else eps  # long sums in single precision; one rounding more in half precision
    return bool(off.square().mean() <= (rounding * size.square().mean().sqrt()) ** 2) and bool(
        off.abs().max() <= 8 * rounding * size.abs().max()
    )


# -- over the vocabulary ---------------------------------------------------------------------------------------------


def _sums(logits: Tensor, targets: Tensor, moments: bool, top_k: int | None, wanted: Tensor | None) -> Tensor:
    """What a scored token needs of its logits, in float32 (float64 for float64 models).

    Args:
        logits: (n, v), which are left as they are: they may be the model's own memory.
        targets: (n,) int64 x_t.
        wanted: (n,) bool, where the top-k sum is wanted; None for everywhere.
    Returns:
        (n, 6): d of the target (d = z − max z); hit, 0 or 1; Σ e^d; Σ d e^d; Σ d² e^d; Σ e^d over the kept ones of
        top-k, infinite if the target is not among them. NaN where not asked for.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    n, v = logits.shape
    out = torch.full((n, 6), torch.nan, dtype=dtype, device=logits.device)
    z_y = logits.gather(1, targets[:, None]).to(dtype)
    highest = torch.empty_like(z_y)
    # on a CPU what a core can keep near, for each thread; elsewhere enough that starting a kernel costs little
    step = max(1, (3 * 2**16 * torch.get_num_threads() if logits.device.type == "cpu" else 2**23) // v)
    far, powers = (torch.empty((min(step, n), v), dtype=dtype, device=logits.device) for _ in range(2))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        z, top = logits[rows].to(dtype), highest[rows]
        torch.amax(z, 1, keepdim=True, out=top)
        d = torch.sub(z, top, out=far[: len(z)])
        if moments:
            e = torch.exp(d.clamp_(min=FAR_BELOW), out=powers[: len(z)])
            out[rows, 2] = e.sum(1)
            out[rows, 3] = e.mul_(d).sum(1)
            out[rows, 4] = e.mul_(d).sum(1)
        else:
            out[rows, 2] = d.exp_().sum(1)
        if top_k is not None:
            at = slice(None) if wanted is None else wanted[rows].nonzero()[:, 0]
            out[rows][at, 5] = _kept(z[at], z_y[rows][at], top[at], top_k)
    out[:, 0] = (z_y - highest)[:, 0]
    out[:, 1] = _hits(logits, targets, (z_y == highest)[:, 0])
    return out


def _hits(z: Tensor, y: Tensor, highest: Tensor) -> Tensor:
    """Whether y (n,) is the argmax of z (n, v), of tied ones the lowest, given whether z_y is the highest (n,)."""
    if z.device.type != "cpu":
        return highest & (z.argmax(1) == y)  # the first of equal ones, as documented
    # on a CPU argmax takes as long as all the sums; it only matters what stands before a target that is highest
    hit = highest.clone()
    for i, at in zip(highest.nonzero()[:, 0].tolist(), y[highest].tolist()):
        if at > 0:
            hit[i] = z[i, :at].amax() < z[i, at]
    return hit


def _kept(z: Tensor, z_y: Tensor, highest: Tensor, k: int) -> Tensor:
    """Σ e^d (n,) over the logits of z (n, v) that are not below the k-th; infinite if z_y (n, 1) is."""
    k = min(k, z.shape[1])
    some, rest = _large(z, 2 * k)
    kth = some.topk(k).values[:, -1:]
    kept = (some - highest).masked_fill_(some < kth, -torch.inf).exp().sum(1)
    more = (rest >= kth)[:, 0].nonzero()[:, 0]
    if len(more):  # so many are tied at rank k that some of them are in the rest
        kept[more] = (z[more] - highest[more]).masked_fill_(z[more] < kth[more], -torch.inf).exp().sum(1)
    return kept.masked_fill_((z_y < kth)[:, 0], torch.inf)


def _large(z: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Some values of each row of z (n, v), the `n_groups` largest among them, and a bound (n, 1) on all others.

    The largest are in the groups with the largest maxima. With √(n_groups v) groups, far fewer values than v have to
    be sorted afterwards.
    """
    of = math.isqrt(n_groups * z.shape[1])
    size = z.shape[1] // of
    if size < 4:
        return z, torch.full_like(z[:, :1], -torch.inf)
    groups = z[:, : of * size].view(len(z), size, of)  # each of values that are not side by side
    best = groups.amax(1).topk(n_groups)
    inside = groups.gather(2, best.indices[:, None].expand(-1, size, -1)).flatten(1)
    return torch.cat([inside, z[:, of * size :]], 1), best.values[:, -1:]


def _next_tokens(sums: NDArray[np.float64], scored: NDArray[np.bool_], moments: bool, top: bool) -> NextTokens:
    """The columns of `_sums` as log p, z and log q, put where their tokens are."""

    def placed(values: NDArray[Any], missing: Any) -> NDArray[Any]:
        full = np.full(scored.shape, missing, dtype=values.dtype)
        full[scored] = values
        return full

    d, hit, s0, s1, s2, kept = sums.T
    kept = np.where(np.isinf(kept), kept, np.minimum(kept, s0))  # two sums of the same terms, rounded their own way
    with np.errstate(invalid="ignore"):  # NaN logits
        mu, variance = s1 / s0, s2 / s0 - (s1 / s0) ** 2
        z = (d - mu) / np.sqrt(np.maximum(variance, LOWEST_VARIANCE))  # log p − μ: both have ln Σ e^d in them
        return NextTokens(
            logp=placed(d - np.log(s0), np.nan),
            hit=placed(hit == 1, False),
            scored=scored,
            z=placed(z, np.nan) if moments else None,
            logp_top=placed(d - np.log(kept), np.nan) if top else None,
        )
