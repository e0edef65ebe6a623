"""Look at a model once, and have every array that the scores asked for are computed from.

The arrays' names are those of `memdiag.scores`. What a score needs is observed once and shared by all that need it.

Axes: b example, t predicted token, k class.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from memdiag import observe, scores, trajectory
from memdiag.dataset import Batch, Example, collate
from memdiag.errors import InputError
from memdiag.observe.curvature import Curvature
from memdiag.observe.depth import Probes
from memdiag.observe.gradients import GradientNormer
from memdiag.observe.next_tokens import Scorer
from memdiag.reading import check_kind
from memdiag.scores.zlib_len import compressed

log = logging.getLogger("memdiag")

Kind = Literal["classifier", "language model"]
Arrays = dict[str, NDArray[Any]]
TOP_K = 40
REFERENCE_ROWS = 256  # examples at once of the reference of the k-NN probes
SERIES = ("label_logit", "other_logit", "logsumexp", "correct")  # of a trajectory, or at the checkpoints of a run
# one number per example and checkpoint, from which scores over checkpoints are computed; the name over checkpoints
OVER_CHECKPOINTS = {
    "gradient_norm": "gradient_norms",
    "input_gradient_norm": "input_gradient_norms",
    "input_hessian_trace": "input_hessian_traces",
}


def kind_of(model: nn.Module, probe: Batch) -> Kind:
    """Whether a model gives each example one set of logits, or one for every next token.

    Raises:
        InputError: neither; the data does not go with the model, or a classifier's data has no labels.
    """
    check_kind(model, probe)
    inputs = observe.to_inputs(probe, model)
    observe.usable(model, inputs, [])  # says in one line what is wrong where the model cannot run
    with torch.inference_mode():
        logits = observe.call(model, inputs)
    if logits is not None and logits.ndim == 2 and len(logits) == inputs.n_examples:
        if probe.labels is None:
            raise InputError("scores of a classifier need labels; the data has none: --columns label=NAME")
        return "classifier"
    if inputs.tokens is not None and logits is not None and logits.ndim == 3:
        two = torch.tensor([[0, 1]], device=inputs.tokens.device) if inputs.tokens.shape[1] < 2 else inputs.tokens
        if observe.predicts_next_token(model, two):
            return "language model"
    raise InputError("scores need a classifier (logits per example) or a causal language model; this is neither")


def possible(kind: Kind, *, features: bool, several: bool, trajectory: bool, reference: bool) -> dict[str, str | None]:
    """Every score: None if it can be had from this input, else why not, in a few words."""
    why: dict[str, str | None] = {}
    for name in scores.NAMES:
        module, reason = scores.load(name), None
        needs = scores.needs([name])
        if name in scores.CLASSIFIER and kind != "classifier":
            reason = "it is a classifier's, and this is a language model"
        elif name in (*scores.LANGUAGE, *scores.REFERENCE) and kind != "language model":
            reason = "it is a language model's, and this is a classifier"
        elif name in scores.REFERENCE and not reference:
            reason = "it compares two models: give the other one with --reference"
        elif module.NEEDS == "checkpoints" and name != "loss_curvature" and not several:
            reason = "it needs the checkpoints of a run, and this is one"
        elif module.NEEDS == "trajectory" and not (several or trajectory):
            reason = "it needs a trajectory or the checkpoints of a run (memdiag train writes both)"
        elif module.NEEDS == "trajectory" and not trajectory and kind == "language model":
            reason = "it needs a trajectory (memdiag train writes it); of a language model checkpoints do not do"
        elif needs & {"input_gradient_norm", "input_gradient_norms", "input_hessian_traces"} and not features:
            reason = "it is a derivative by the input, and tokens have none"
        why[name] = reason
    return why


@dataclass
class Looker:
    """One checkpoint, and what is looked at in it."""

    model: nn.Module
    kind: Kind
    wanted: set[str]  # names of arrays
    prefix_tokens: int
    suffix_tokens: int
    decode: Callable[[NDArray[np.int64]], str] | None
    normer: GradientNormer | None = None
    curvature: Curvature | None = None
    probes: Probes | None = None
    scorer: Scorer | None = None
    reference: Scorer | None = None

    def __call__(self, batch: Batch) -> Arrays:
        """The arrays of a batch, b first."""
        return self._texts(batch) if self.kind == "language model" else self._classes(batch)

    def _classes(self, batch: Batch) -> Arrays:
        inputs = observe.to_inputs(batch, self.model)
        with torch.inference_mode():
            logits = observe.call(self.model, inputs)
        assert logits is not None
        assert inputs.labels is not None
        observe.cross_entropy_sum(logits, inputs)  # refuses a label that is no class
        found: Arrays = {"labels": inputs.labels.cpu().numpy(), "logits": logits.double().cpu().numpy()}
        bad = ~np.isfinite(found["logits"]).all(1)
        if bad.any():
            raise InputError(f"example {batch.example_ids[int(bad.argmax())]!r}: the model's logits are not finite")
        found["predicted"] = found["logits"].argmax(1)
        if self.wanted & set(SERIES):
            found |= dict(zip(SERIES, trajectory.presented(logits, inputs.labels).double().cpu().numpy()))
        if self.normer is not None:
            norms = self.normer(inputs)
            for name, values in (
                ("gradient_norm", norms.whole),
                ("last_layer_gradient_norm", norms.last_layer),
                ("input_gradient_norm", norms.inputs),
            ):
                if values is not None:
                    found[name] = values
        if "last_layer_gradient_norm" in self.wanted and "last_layer_gradient_norm" not in found:
            found["last_layer_gradient_norm"] = np.full(inputs.n_examples, np.nan)
        if self.curvature is not None:
            found["input_hessian_trace"] = self.curvature(inputs, batch.rows).trace
        if self.probes is not None:
            found["probes"] = self.probes(inputs, batch.rows)
        return found

    def _texts(self, batch: Batch) -> Arrays:
        inputs = observe.to_inputs(batch, self.model)
        assert inputs.mask is not None
        assert self.scorer is not None
        n_tokens = inputs.mask.sum(1).cpu().numpy()
        at = np.arange(inputs.mask.shape[1] - 1) + 1  # index of the token that is predicted
        long_enough = n_tokens >= self.prefix_tokens + self.suffix_tokens
        suffix = (at >= self.prefix_tokens) & (at < self.prefix_tokens + self.suffix_tokens) & long_enough[:, None]
        top_at = torch.from_numpy(suffix).to(inputs.mask.device) if "logp_top40" in self.wanted else None
        seen = self.scorer(inputs, top_at=top_at)
        found: Arrays = {"logp": seen.logp, "hit": seen.hit, "scored": seen.scored, "suffix": suffix}
        found |= {"n_tokens": n_tokens, "n_scored": seen.scored.sum(1), "n_suffix": suffix.sum(1)}
        if not np.isfinite(seen.logp[seen.scored]).all():
            bad = (~np.isfinite(np.where(seen.scored, seen.logp, 0))).any(1)
            raise InputError(f"example {batch.example_ids[int(bad.argmax())]!r}: a log-probability is not finite")
        if seen.z is not None:
            found["z"] = seen.z
        if seen.logp_top is not None:
            found["logp_top40"] = seen.logp_top
        if self.reference is not None:
            found["reference_logp"] = self.reference(inputs).logp
        if "zlib_bytes" in self.wanted:
            assert batch.input_ids is not None
            assert batch.mask is not None
            texts = [ids[real] for ids, real in zip(batch.input_ids, batch.mask)]
            found["zlib_bytes"] = np.array([self._zlib(ids) for ids in texts])
        if self.normer is not None:
            whole = self.normer(inputs).whole
            assert whole is not None
            found["gradient_norm"] = whole
        return found

    def _zlib(self, ids: NDArray[np.int64]) -> float:
        """Bytes of the text that was scored, compressed; NaN where there is no tokenizer to give the text."""
        return np.nan if self.decode is None else float(compressed(self.decode(ids)))


def look_at(
    model: nn.Module,
    kind: Kind,
    probe: Batch,
    names: Iterable[str],
    *,
    prefix_tokens: int = 32,
    suffix_tokens: int = 32,
    seed: int = 0,
    tokenizer: Any = None,
    reference: nn.Module | None = None,
    examples: Callable[[], Iterator[Example]] | None = None,
    also: frozenset[str] = frozenset(),
) -> Looker:
    """Prepare to look at one checkpoint.

    Args:
        model: in eval mode.
        probe: a few examples of the data, on which the quickest right way is found.
        names: scores to be computed at this checkpoint.
        seed: of the vectors that estimate curvature where there is no closed form.
        tokenizer: gives the text for zlib; None: no text.
        reference: the other model of REFERENCE scores.
        examples: all examples in their order, for prediction depth.
        also: arrays wanted besides those of the scores.
    """
    wanted = scores.needs(names) | also
    inputs = observe.to_inputs(probe, model)
    found = Looker(model, kind, wanted, prefix_tokens, suffix_tokens, None)
    gradients = {
        "whole": "gradient_norm" in wanted,
        "last_layer": "last_layer_gradient_norm" in wanted,
        "inputs": "input_gradient_norm" in wanted,
    }
    if any(gradients.values()):
        found.normer = GradientNormer(model, inputs, **gradients)
    if "input_hessian_trace" in wanted:
        found.curvature = Curvature(model, inputs, seed=seed)
    if "probes" in wanted and examples is not None:
        found.probes = Probes(model, _in_order(model, examples))
    if kind == "language model":
        top_k = TOP_K if "logp_top40" in wanted else None
        found.scorer = Scorer(model, inputs, moments="z" in wanted, top_k=top_k)
        if reference is not None:
            found.reference = Scorer(reference, inputs)
        if tokenizer is not None:
            found.decode = lambda ids: str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
    return found


def _in_order(model: nn.Module, examples: Callable[[], Iterator[Example]]) -> Iterator[observe.Inputs]:
    """All examples in the order of their rows, as the probes want them."""
    stream = examples()
    while group := list(islice(stream, REFERENCE_ROWS)):
        yield observe.to_inputs(collate(group), model)


def scores_of(names: Iterable[str], arrays: Arrays) -> Arrays:
    """The scores (b,) of some arrays."""
    found: Arrays = {}
    for name in names:
        needed = scores.needs([name])
        found[name] = scores.load(name).score(**{array: arrays[array] for array in needed})
    return found
