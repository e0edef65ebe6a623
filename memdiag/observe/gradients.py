"""Norms of per-example gradients: ‖g_i‖ with g_i = ∂ loss_i / ∂θ (GraNd, arXiv:2107.07075; gradnorm of texts).

loss_i is the example's own loss: −ln p(label) of a classifier, the mean next-token nll of a causal language model.
Never a batch mean, so no factor of the batch size. The model is in evaluation mode; θ is every floating-point
parameter, each counted once (tied ones too), whatever its requires_grad says; buffers are no parameters.

Three ways, the first that agrees with one backward per example on a small probe:

    closed form  |g_i|² = Σ_l |δ_l|² (|a_{l−1}|² + 1)   where all parameters are of linear layers that are called once
                 with an input (b, i); δ_l is the slope of the loss at the layer's output, a_{l−1} is its input, and
                 the 1 is for a bias. One forward and one backward of the batch, without weight gradients.
    vmap         torch.func.vmap(grad) over as many examples at once as keeps their gradients under 256 MB.
    one by one   one backward per example; works for every model that has a gradient.

In half precision a gradient is as exact as the model's own dtype, and in float16 a small one is 0: load in float32.

Axes: b example, t token, k class, i input of a layer, o output of a layer, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from memdiag.errors import InputError, one_line
from memdiag.observe import Inputs
from memdiag.observe.losses import (
    check_labels,
    has_loss,
    losses,
    n_classes_of,
    parameters_of,
    row_squares,
    rows_of,
    run,
    wanting_gradients,
)
from memdiag.observe.probing import evaluating

Float64 = NDArray[np.float64]
Way = Literal["closed form", "vmap", "one by one"]

VMAP_BYTES = 2**28  # of per-example gradients at once
PROBE_EXAMPLES, PROBE_TOKENS = 3, 12


# -- norms -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientNorms:
    """(b,) each, ≥ 0; None if not asked for or not there; NaN for an example without a loss."""

    whole: Float64 | None  # ‖∂ loss_i / ∂θ‖
    last_layer: Float64 | None  # the same for the weight and bias of the layer that gives the logits
    inputs: Float64 | None  # ‖∂ loss_i / ∂ features_i‖


@dataclass
class _Squares:
    """(b,) float64 squared norms."""

    whole: Tensor | None = None
    last_layer: Tensor | None = None
    inputs: Tensor | None = None


class _NotSo(Exception):
    """A way does not fit the model."""


class _Losses(nn.Module):
    """The model with its loss, so that torch.func can call both with other parameters."""

    def __init__(self, model: nn.Module, is_text: bool) -> None:
        super().__init__()
        self.model = model
        self.is_text = is_text

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        tokens, mask, features, labels = (data.get(name) for name in ("tokens", "mask", "features", "labels"))
        # padding comes after the real tokens, so a causal model needs no mask: with one, transformers branch on values
        logits = run(self.model, Inputs(tokens, None if self.is_text else mask, features, labels))
        return losses(logits, Inputs(tokens, mask, features, labels)).sum()


class GradientNormer:
    """Per-example gradient norms of one model, in the fastest way that is right for it.

    Attributes:
        way: "closed form", "vmap" or "one by one"; without `whole` it is about the input gradients alone.
        passed_over: why the faster ways were not taken.
        no_last_layer: why there is no last-layer gradient; None if there is one or it was not asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Inputs,
        *,
        whole: bool = True,
        last_layer: bool = False,
        inputs: bool = False,
    ) -> None:
        """Finds the way. It costs a few passes of three short examples; the model is left as it was.

        Args:
            model: any classifier or causal language model; its requires_grad does not matter.
            probe: at least one example of the data, the first batch for instance; its labels are not used.
            whole, last_layer, inputs: which norms to take.
        Raises:
            InputError: the model has no such loss, or it cannot be differentiated.
        """
        if not probe.n_examples:
            raise InputError("gradients need at least one example to find out how to take them; the data has none")
        self.model = model
        self.n_classes = n_classes_of(model, rows_of(probe, torch.arange(1)))
        self.whole, self.inputs = whole, inputs and probe.features is not None
        self.passed_over: dict[str, str] = {}
        self.no_last_layer: str | None = None
        self._parameters = parameters_of(model)
        self._linears = _only_linears(model) if whole else []
        self._last: nn.Linear | None = None
        few = self._few(probe)
        if last_layer:
            self._find_last(few)
        self.way: Way = self._find_way(few) if self.whole or self.inputs else "closed form"

    def __call__(self, inputs: Inputs) -> GradientNorms:
        """The norms of a batch.

        Raises:
            InputError: a classifier's labels are missing or no classes of it.
        """
        check_labels(inputs, self.n_classes)
        n, able = inputs.n_examples, has_loss(inputs, self.n_classes).cpu()
        found = _Squares()
        if able.any():
            with evaluating(self.model):
                found = self._squares(rows_of(inputs, able.nonzero()[:, 0]) if not able.all() else inputs)

        def norms(squares: Tensor | None, wanted: bool) -> Float64 | None:
            if not wanted:
                return None
            values = np.full(n, np.nan)
            if squares is not None:
                values[able.numpy()] = squares.sqrt().cpu().numpy()
            return values

        return GradientNorms(
            norms(found.whole, self.whole),
            norms(found.last_layer, self._last is not None),
            norms(found.inputs, self.inputs),
        )

    def _squares(self, inputs: Inputs) -> _Squares:
        found = None if self.whole or self.inputs else _Squares()
        if found is None and self.way == "closed form":
            try:
                found = self._closed_form(inputs)
            except _NotSo as reason:  # e.g. a branch that the probe did not take
                self.passed_over["closed form"], self.way = str(reason), "one by one"
        if self.way == "vmap":
            try:
                found = self._vmap(inputs)
            except RuntimeError as error:  # as above, or out of memory
                self.passed_over["vmap"], self.way = one_line(error, 160), "one by one"
        if found is None:
            found = self._one_by_one(inputs)
        if self._last is not None and found.last_layer is None:
            found.last_layer = self._last_squares(inputs)
        return found

    # -- finding out ---------------------------------------------------------------------------------------------------

    def _few(self, probe: Inputs) -> Inputs:
        """Three examples, the first ones of a table, the longest ones of a text; the last one has padding.

        Labels are those that the model finds least likely, so that there is a gradient to compare.
        """
        n = probe.n_examples
        order = torch.arange(n) if probe.mask is None else probe.mask.sum(1).cpu().argsort(descending=True, stable=True)
        few = rows_of(probe, order[torch.arange(PROBE_EXAMPLES) % min(n, PROBE_EXAMPLES)])
        if few.features is not None:
            few.features = torch.stack([x.roll(i // n, -1) for i, x in enumerate(few.features)])  # no copies
        if few.tokens is not None and few.mask is not None:
            few.tokens, few.mask = few.tokens[:, :PROBE_TOKENS], few.mask[:, :PROBE_TOKENS].clone()
            few.mask[-1, max(2, few.mask.shape[1] // 2) :] = False
        if self.n_classes is not None:
            with evaluating(self.model), torch.no_grad():
                few.labels = run(self.model, few).argmin(1)
        return few

    def _find_way(self, few: Inputs) -> Way:
        with evaluating(self.model):
            if not bool(has_loss(few, self.n_classes).all()):
                return "one by one"  # texts of one token show nothing
            try:
                right = self._one_by_one(few)
            except RuntimeError as error:
                raise InputError(f"the model's loss cannot be differentiated: {one_line(error, 160)}") from None
            squares = [x for x in (right.whole, right.inputs) if x is not None]
            if not any(bool((x.isfinite() & (x > 0)).any()) for x in squares):
                return "one by one"  # nothing to compare with
            ways: dict[Way, Callable[[Inputs], _Squares]] = {"closed form": self._closed_form}
            if self.whole:
                ways["vmap"] = self._vmap
            for name, way in ways.items():
                try:
                    found = way(few)
                except Exception as error:  # what a model does under torch.func is not ours to foresee
                    self.passed_over[name] = one_line(error, 160)
                    continue
                if all(self._agree(a, b) for a, b in ((found.whole, right.whole), (found.inputs, right.inputs))):
                    return name
                self.passed_over[name] = "it does not agree with one backward per example"
        return "one by one"

    def _agree(self, found: Tensor | None, right: Tensor | None) -> bool:
        """Whether squared norms are of the same gradients, to 1e-4, or to what half precision can tell."""
        if found is None or right is None:
            return found is right
        dtypes = {p.dtype for p in self._parameters.values()}
        tolerance = max([1e-4, *(2 * torch.finfo(dtype).eps for dtype in dtypes)])
        found, right = found.cpu().sqrt(), right.cpu().sqrt()
        return torch.allclose(found, right, rtol=tolerance, atol=1e-2 * tolerance * float(right.nan_to_num(0, 0).max()))

    def _find_last(self, few: Inputs) -> None:
        if self.n_classes is None:
            self.no_last_layer = "a language model has no last-layer gradient for one label"
            return
        linears = [(name, m) for name, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        outputs: dict[str, Tensor] = {}

        def after(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                outputs[name] = output.detach().clone()

            return hook

        with ExitStack() as stack, evaluating(self.model):
            for name, module in linears:
                stack.callback(module.register_forward_hook(after(name)).remove)
            with torch.no_grad():
                logits = run(self.model, few)
        last = [m for name, m in linears if name in outputs and torch.equal(outputs[name], logits)]
        if not last:
            self.no_last_layer = "no nn.Linear of the model has the logits as its output"
            return
        self._last = last[-1]
        with evaluating(self.model):
            right = self._one_by_one(few, only=dict(self._last.named_parameters())).whole
            if not self._agree(self._last_squares(few), right):
                self._last, self.no_last_layer = None, "its last linear layer is also used elsewhere"

    # -- the ways ------------------------------------------------------------------------------------------------------

    def _closed_form(self, inputs: Inputs) -> _Squares:
        """One forward and one backward of the summed loss, to the layers' outputs and the features."""
        if isinstance(self._linears, str):
            raise _NotSo(self._linears)
        n = inputs.n_examples
        outputs: dict[nn.Module, Tensor] = {}
        entered: dict[nn.Module, Tensor] = {}

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            x = args[0] if args else kwargs["input"]
            if module in outputs:
                raise _NotSo("a linear layer is called more than once")
            if x.ndim != 2 or len(x) != n:
                raise _NotSo(f"a linear layer's input has shape {tuple(x.shape)}, not one row for each example")
            entered[module] = row_squares(x) + (0.0 if module.bias is None else 1.0)
            outputs[module] = output if output.requires_grad else output.requires_grad_()
            return output.clone()  # what comes next may change it in place

        leaves = self._leaves(inputs)
        with ExitStack() as stack, wanting_gradients(leaves):
            for linear in self._linears:
                stack.callback(linear.register_forward_hook(after, with_kwargs=True).remove)
            logits = run(self.model, inputs)
            wanted = [*outputs.values(), *leaves]
            slopes = torch.autograd.grad(losses(logits, inputs).sum(), wanted, allow_unused=True)
        found = _Squares()
        if self.whole:
            found.whole = torch.zeros(n, dtype=torch.float64, device=logits.device)
        for module, slope in zip(outputs, slopes):
            square = torch.zeros_like(entered[module]) if slope is None else row_squares(slope) * entered[module]
            assert found.whole is not None
            found.whole += square
            if module is self._last:
                found.last_layer = square
        if self.inputs:
            slope = slopes[-1]
            found.inputs = row_squares(torch.zeros_like(leaves[0]) if slope is None else slope)
        return found

    def _leaves(self, inputs: Inputs) -> list[Tensor]:
        """The features, if their gradient is asked for."""
        return [inputs.features] if self.inputs and inputs.features is not None else []

    def _vmap(self, inputs: Inputs) -> _Squares:
        """vmap(grad) over chunks of examples."""
        bytes_each = sum(p.numel() * p.element_size() for p in self._parameters.values())
        size = VMAP_BYTES // max(1, bytes_each)
        if size < 2:
            raise _NotSo("two gradients at once would need too much memory")
        program = _Losses(self.model, self.n_classes is None)
        parameters = {f"model.{name}": p.detach() for name, p in self._parameters.items()}
        data = {name: getattr(inputs, name) for name in ("tokens", "mask", "features", "labels")}
        data = {name: x for name, x in data.items() if x is not None}

        def loss(parameters: dict[str, Tensor], wanted: dict[str, Tensor], rest: dict[str, Tensor]) -> Tensor:
            one = {name: x[None] for name, x in (wanted | rest).items()}
            total: Tensor = torch.func.functional_call(program, parameters, (one,))
            return total

        slope = torch.func.grad(loss, argnums=(0, 1) if self.inputs else (0,))
        of_each = torch.func.vmap(slope, in_dims=(None, 0, 0))
        wholes, entered = [], []
        for start in range(0, inputs.n_examples, size):
            rest = {name: x[start : start + size] for name, x in data.items()}
            wanted = {"features": rest.pop("features")} if self.inputs else {}
            with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no rule for vmap
                found = of_each(parameters, wanted, rest)
            wholes.append(torch.stack([row_squares(g) for g in found[0].values()]).sum(0))
            if self.inputs:
                entered.append(row_squares(found[1]["features"]))
        return _Squares(torch.cat(wholes), None, torch.cat(entered) if self.inputs else None)

    def _one_by_one(self, inputs: Inputs, only: dict[str, Tensor] | None = None) -> _Squares:
        """A forward and a backward per example, without padding."""
        of = list((only or (self._parameters if self.whole else {})).values())
        wholes, entered = [], []
        for i in range(inputs.n_examples):
            one = rows_of(inputs, torch.tensor([i]))
            wanted = [*of, *self._leaves(one)]
            with wanting_gradients(wanted):
                slopes = torch.autograd.grad(losses(run(self.model, one), one).sum(), wanted, allow_unused=True)
            squares = [torch.zeros(1).double() if g is None else row_squares(g[None]).cpu() for g in slopes]
            if self.inputs:
                entered.append(squares.pop())
            wholes.append(torch.stack(squares).sum(0) if squares else torch.zeros(1).double())
        return _Squares(torch.cat(wholes) if of else None, None, torch.cat(entered) if self.inputs else None)

    def _last_squares(self, inputs: Inputs) -> Tensor:
        """|p − e_y|² (|h|² + 1) with h the input of the last layer; one forward."""
        last, entered = self._last, []
        assert last is not None
        assert inputs.labels is not None

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(row_squares(args[0] if args else kwargs["input"]))

        with ExitStack() as stack, torch.no_grad():
            stack.callback(last.register_forward_pre_hook(before, with_kwargs=True).remove)
            slope = run(self.model, inputs).double().softmax(1)
        slope.scatter_add_(1, inputs.labels[:, None], -torch.ones_like(slope[:, :1]))
        return row_squares(slope) * (entered[-1] + (0.0 if last.bias is None else 1.0))


def _only_linears(model: nn.Module) -> list[nn.Linear] | str:
    """The linear layers if they own all parameters, each its own; else why the closed form does not hold."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    owned = [id(p) for m in linears for p in m.parameters(recurse=False)]
    if len(set(owned)) < len(owned):
        return "linear layers share a parameter"
    if others := [name for name, p in parameters_of(model).items() if id(p) not in set(owned)]:
        return f"{others[0]} is no parameter of a linear layer"
    return linears
