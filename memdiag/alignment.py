"""Does a step that lowers the cross-entropy also lower the matrix-based entropy of a layer?

The sign of the cosine between the two gradients says so: positive, the cross-entropy step compresses the layer;
negative, it spreads it out. A cosine near 0 says nothing, and a series of them over a run swings by chance alone,
so `oscillation.py` puts what chance gives beside every number.

Axes: n batch, i and j two of them, l layer (1 ... L, a block).
Source: Yu, arXiv:2505.08727, figures 2 and 3; his code compares per parameter matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memdiag import mbe, observe
from memdiag.errors import InputError

if TYPE_CHECKING:
    from memdiag.dataset import Batch

Float64 = NDArray[np.float64]

_CHUNK = 2**22  # elements turned into float64 at a time: a float64 copy of every gradient would treble the memory


def cosine(a: Tensor, b: Tensor) -> float:
    """<a, b> / (‖a‖ ‖b‖) over all elements, summed in float64.

    Args:
        a, b: floats of one shape; float32 or better, because half precision loses or overflows small gradients.

    Returns:
        from -1 to 1; NaN where either is all zero (it has no direction) or not finite.

    Raises:
        ValueError: two shapes, or half precision.
    """
    if a.shape != b.shape:
        raise ValueError(f"want two tensors of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return float(_products([a], [b]).cosines("ce_mbe")[0, 0])


Pair = Literal["ce_mbe", "ce_ce"]


@dataclass(frozen=True)
class _Products:
    """Inner products of the gradients of n batches; those of several matrices add up to the concatenation's."""

    ce_ce: Float64  # (i, j)
    ce_mbe: Float64  # (i, j): cross-entropy of batch i, entropy of batch j
    mbe_mbe: Float64  # (j,)

    def __add__(self, other: _Products) -> _Products:
        return _Products(self.ce_ce + other.ce_ce, self.ce_mbe + other.ce_mbe, self.mbe_mbe + other.mbe_mbe)

    def norms(self, of: Literal["ce", "mbe"]) -> Float64:
        """(n,)"""
        return np.sqrt(np.diagonal(self.ce_ce) if of == "ce" else self.mbe_mbe)

    def cosines(self, pair: Pair) -> Float64:
        """(i, j); NaN where a gradient is zero or not finite."""
        ce, other = self.norms("ce"), self.norms("mbe" if pair == "ce_mbe" else "ce")
        product = self.ce_mbe if pair == "ce_mbe" else self.ce_ce
        # by one norm after the other: the product of two tiny norms is 0
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.clip(product / ce[:, None] / other[None, :], -1.0, 1.0)


def _products(ce: Sequence[Tensor], mbe_: Sequence[Tensor]) -> _Products:
    """The inner products, in float64, of n gradients of each loss with respect to one matrix."""
    if ce[0].dtype.itemsize < 4 or mbe_[0].dtype.itemsize < 4:
        raise ValueError(f"gradients must be float32 or better, got {ce[0].dtype} and {mbe_[0].dtype}")
    n = len(ce)
    total = torch.zeros(2 * n, 2 * n, dtype=torch.float64, device=ce[0].device)
    flat = [g.detach().flatten() for g in (*ce, *mbe_)]
    for start in range(0, max(1, flat[0].numel()), _CHUNK):
        rows = torch.stack([g[start : start + _CHUNK].double() for g in flat])  # (2n, chunk)
        total += rows @ rows.T
    gram = total.cpu().numpy()
    return _Products(gram[:n, :n], gram[:n, n:], np.diagonal(gram)[n:])


def gradient_rows(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    layers: Sequence[int] | None = None,
    patch_size: int = 8,
    max_batches: int = 4,
) -> list[dict[str, Any]]:
    """Cosines between the gradients of the cross-entropy (CE) and of each layer's entropy (MBE_l).

    One set of rows for every matrix (a parameter of two or more axes) of block l, with MBE_l the mean patch entropy
    of that block's output; one for all matrices of block l as one vector (matrix None); and one for the whole
    model (layer and matrix None): MBE the mean over all L layers, over every parameter that both losses reach, so a
    language-model head of its own is out, and one tied to the embedding is in.
    Blocks above l and the head get no gradient from MBE_l and are excluded, not counted as 0.

    Each set has three rows: ce_mbe on the same batch, ce_mbe across (CE on batch i, MBE on j ≠ i, both ways round) and
    ce_ce across (i < j). Columns: layer, layer_name, matrix, objective_pair, batches, cosine (mean over the pairs),
    cosine_se (their sd / √n_pairs; NaN for one pair; pairs across batches share batches, so theirs is too
    small), n_pairs (with a defined cosine), ce_grad_norm and mbe_grad_norm (means over batches; mbe NaN in ce_ce).

    Time: per batch one forward, two backwards and, for each layer, one backward through its block alone. Memory:
    up to three float32 numbers per parameter (CE, MBE_l, mean MBE) for each of `max_batches` batches.

    Args:
        model: a causal language model; run as it is, half precision as float32, and left exactly as it was found.
        batches: the first `max_batches` of them with a token to predict and a full patch are used.
        layers: the layers to compare, 1 ... L, all by default; 0, the embedding output, has no block and is left out.
        patch_size: tokens per patch.
        max_batches: at least 1.

    Raises:
        InputError: a layer that does not exist, or no batch that can be used.

    Source: arXiv:2505.08727, figures 2 and 3. Everything here is float32 or better; sums are float64.
    """
    if max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches}")
    targets = _targets(model, layers)
    found = []
    with _differentiable(model):
        for batch in batches:
            gradients = _gradients(model, batch, targets, patch_size)
            if gradients is not None:
                found.append(gradients)
            if len(found) == max_batches:
                break
    if not found:
        raise InputError(
            f"no batch has both a token to predict and a full patch of {patch_size} tokens; "
            "use longer texts or a smaller --patch-size"
        )
    return list(_rows(targets, found))


@dataclass(frozen=True)
class _Target:
    """The parameters on which two gradients are compared, and the name of the comparison."""

    layer: int | None  # None: the whole model
    layer_name: str | None
    names: list[str]
    parameters: list[nn.Parameter]


@dataclass(frozen=True)
class _Gradients:
    """Of one batch, for each target and each of its parameters; None where the loss does not reach it."""

    ce: list[list[Tensor | None]]
    mbe: list[list[Tensor | None]]


def _targets(model: nn.Module, layers: Sequence[int] | None) -> list[_Target]:
    """One for each wanted layer, in order, and the whole model last."""
    blocks = observe.blocks(model)
    wanted = range(1, len(blocks) + 1) if layers is None else sorted(set(layers) - {0})
    for layer in wanted:
        if not 1 <= layer <= len(blocks):
            raise InputError(f"layer {layer} has no gradient to compare; this model has blocks 1 to {len(blocks)}")
    targets = []
    for layer in wanted:
        layer_name, block = blocks[layer - 1]
        matrices = {name: p for name, p in block.named_parameters() if p.ndim >= 2 and p.is_floating_point()}
        targets.append(_Target(layer, layer_name, list(matrices), list(matrices.values())))
    everything = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    return [*targets, _Target(None, None, list(everything), list(everything.values()))]


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Inside, every parameter wants a gradient and is float32 or better; after it the model is as it was found.

    Half precision is swapped for a float32 copy and the very same storage put back, so nothing is rounded twice.
    """
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    found = [(tensor, tensor.data, tensor.requires_grad) for tensor in tensors]
    device = tensors[0].device.type if tensors else "cpu"
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        try:
            for tensor in tensors:
                if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                    tensor.data = tensor.data.float()
                if isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(tensor.is_floating_point())
            yield
        finally:
            for tensor, data, requires_grad in found:
                tensor.data = data
                tensor.requires_grad_(requires_grad)


def _gradients(model: nn.Module, batch: Batch, targets: list[_Target], patch_size: int) -> _Gradients | None:
    """The gradients of one batch; None if it has no token to predict or no full patch."""
    graph = observe.forward_with_graph(model, batch)
    if not bool(graph.mask[:, 1:].any()):
        return None
    entropies = [mbe.patch_entropy(hidden, graph.mask, patch_size=patch_size) for hidden in graph.hidden[1:]]
    if entropies[0].numel() == 0:
        return None
    means = [entropy.nanmean() for entropy in entropies]  # a patch of zeros has no entropy
    everything = targets[-1].parameters
    ce = dict(zip(map(id, everything), _grad(graph.cross_entropy, everything), strict=True))
    of_layers = [
        _grad(means[target.layer - 1], target.parameters) for target in targets if target.layer is not None
    ]  # each touches its own block only
    return _Gradients(
        ce=[[ce[id(p)] for p in target.parameters] for target in targets],
        mbe=[*of_layers, _grad(torch.stack(means).mean(), everything)],
    )


def _grad(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)) if parameters else []


def _rows(targets: list[_Target], found: list[_Gradients]) -> Iterator[dict[str, Any]]:
    n = len(found)
    for k, target in enumerate(targets):
        name = {"layer": target.layer, "layer_name": target.layer_name}
        total = _Products(np.zeros((n, n)), np.zeros((n, n)), np.zeros(n))
        for m, (matrix, parameter) in enumerate(zip(target.names, target.parameters, strict=True)):
            ce, mbe_ = [g.ce[k][m] for g in found], [g.mbe[k][m] for g in found]
            products = _products(_filled(ce, parameter), _filled(mbe_, parameter))
            if not any(g is None for g in (*ce, *mbe_)):
                total = total + products
            if target.layer is not None:
                yield from _pair_rows({**name, "matrix": matrix}, products)
        yield from _pair_rows({**name, "matrix": None}, total)


def _filled(gradients: list[Tensor | None], parameter: nn.Parameter) -> list[Tensor]:
    """NaN for each gradient of a loss that does not reach the parameter: undefined, which is not a gradient of 0."""
    return [torch.full_like(parameter, math.nan, dtype=torch.float32) if g is None else g for g in gradients]


def _pair_rows(name: dict[str, Any], products: _Products) -> Iterator[dict[str, Any]]:
    n = len(products.mbe_mbe)
    other = ~np.eye(n, dtype=bool)
    chosen: list[tuple[Pair, str, NDArray[np.bool_]]] = [
        ("ce_mbe", "same", ~other),
        ("ce_mbe", "across", other),
        ("ce_ce", "across", np.triu(other)),
    ]
    for pair, batches, which in chosen:
        cosines = products.cosines(pair)[which]
        cosines = cosines[~np.isnan(cosines)]
        yield {
            **name,
            "objective_pair": pair,
            "batches": batches,
            "cosine": float(cosines.mean()) if len(cosines) else math.nan,
            "cosine_se": float(cosines.std(ddof=1) / math.sqrt(len(cosines))) if len(cosines) > 1 else math.nan,
            "n_pairs": len(cosines),
            "ce_grad_norm": float(products.norms("ce").mean()),
            "mbe_grad_norm": float(products.norms("mbe").mean()) if pair == "ce_mbe" else math.nan,
        }
