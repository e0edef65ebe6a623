"""Runs a model to look at it. The only file that registers hooks.

Axes: b example, t position, d dimension, v vocabulary.

Hidden states are handed over layer by layer while the forward pass runs, so that never more than one of them is
kept. Layer 0 is the input of the first block (embeddings, positions and their norm), layer l the output of block
l. The last layer, L, is taken *before* the model's final norm, as the papers do; the last entry of Hugging Face's
`output_hidden_states` is after it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from memdiag.dataset import Batch
from memdiag.device import is_out_of_memory
from memdiag.errors import InputError, one_line, unknown
from memdiag.observe.recording import Recorder as Recorder  # observe.Recorder
from memdiag.observe.recording import Tap as Tap

NOT_CHOSEN = "not in --layers"
OnHidden = Callable[[int, Tensor, Tensor], None]  # (position in the list of layers, hidden (b, t, d), mask (b, t))


@dataclass(frozen=True)
class Layer:
    """A place in the model where hidden states are taken."""

    index: int  # 0 is the embedding output, L the last block's; for other modules their order in the model
    name: str  # the module's path, as in named_modules()
    module: nn.Module
    at: Literal["input", "output"] = "output"


@dataclass(frozen=True)
class Skipped:
    """A module that could have been a layer, and why it is not."""

    name: str
    why: str


@dataclass
class Inputs:
    """One batch as tensors on the model's device, real tokens first."""

    tokens: Tensor | None  # (b, t) int64
    mask: Tensor | None  # (b, t) bool
    features: Tensor | None  # (b, ...)
    labels: Tensor | None  # (b,) int64

    @property
    def n_examples(self) -> int:
        """b"""
        data = self.tokens if self.tokens is not None else self.features
        return 0 if data is None else len(data)


def to_inputs(batch: Batch, model: nn.Module) -> Inputs:
    """The batch on the model's device and, for features, in its dtype.

    Real tokens are moved to the front of their row, whatever the padding was: position ids then count from the
    first real token in every model, whether it counts positions by itself or from the mask.
    """
    parameter = next(model.parameters())
    tokens = mask = features = labels = None
    if batch.input_ids is not None and batch.mask is not None:
        tokens, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.mask)
        if not bool((mask[:, :-1] | ~mask[:, 1:]).all()):  # padding before a real token
            order = torch.argsort(~mask, dim=1, stable=True)
            tokens, mask = tokens.gather(1, order), mask.gather(1, order)
        tokens, mask = tokens.to(parameter.device), mask.to(parameter.device)
    if batch.features is not None:
        features = torch.from_numpy(batch.features).to(parameter.device, parameter.dtype)
    if batch.labels is not None:
        labels = torch.from_numpy(batch.labels).to(parameter.device)
    return Inputs(tokens, mask, features, labels)


def call(model: nn.Module, inputs: Inputs) -> Tensor | None:
    """The model's logits (b, t, v) or (b, classes), or None if it has no output that could be logits."""
    accepted = inspect.signature(model.forward).parameters
    kwargs: dict[str, Any] = {}
    if "use_cache" in accepted or hasattr(getattr(model, "config", None), "use_cache"):
        kwargs["use_cache"] = False
    if inputs.tokens is not None:
        if "attention_mask" in accepted:
            kwargs["attention_mask"] = inputs.mask.long() if inputs.mask is not None else None
        output = model(inputs.tokens, **kwargs)
    else:
        output = model(inputs.features)
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def text_config(model: nn.Module) -> Any:
    """The model's config; of a model with several, that of its text part; None if it has none."""
    config = getattr(model, "config", None)
    return config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The L transformer blocks in order, as (name, module); empty if the model has no such stack.

    The stack is the outermost ModuleList that is as long as the config says the model is deep; there is no list
    of known architectures.
    """
    depth = getattr(text_config(model), "num_hidden_layers", None)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and depth and len(module) == depth
    ]
    if not stacks:
        return []
    name, stack = min(stacks, key=lambda found: found[0].count("."))
    return [(f"{name}.{i}", block) for i, block in enumerate(stack)]


def layers_of(model: nn.Module, wanted: str | None = None) -> tuple[list[Layer], list[Skipped]]:
    """The layers to observe, in order, and the modules left out with the reason.

    Args:
        model: any module.
        wanted: None for all; for a transformer indices and ranges ("0,4-8,-1"); for any model name patterns
            ("*.mlp,fc?"), matched against named_modules().
    Raises:
        InputError: an index or pattern that fits nothing, naming what there is.
    """
    found = blocks(model)
    if wanted is not None and not all(_is_range(part) for part in wanted.split(",")):
        return _layers_by_pattern(model, wanted.split(","))
    if not found:
        leaves = [(name, module) for name, module in model.named_modules() if name and not list(module.children())]
        layers = [Layer(i, name, module) for i, (name, module) in enumerate(leaves)]
        if not layers and not list(model.children()):
            layers = [Layer(0, "", model)]
    else:
        layers = [Layer(0, f"{found[0][0]} (input)", found[0][1], at="input")]
        layers += [Layer(i, name, block) for i, (name, block) in enumerate(found, 1)]
    if wanted is None:
        return layers, []
    chosen = sorted({i for part in wanted.split(",") for i in _indices(part, len(layers))})
    return [layers[i] for i in chosen], [
        Skipped(layer.name, NOT_CHOSEN) for i, layer in enumerate(layers) if i not in chosen
    ]


def _is_range(part: str) -> bool:
    return bool(part.strip()) and all(c.isdigit() or c in "- " for c in part)


def _indices(part: str, n: int) -> list[int]:
    text = part.strip()
    first, dash, last = text.partition("-") if not text.startswith("-") else (text, "", "")
    try:
        low = int(first)
        high = int(last) if dash else low
    except ValueError:
        raise InputError(f"--layers {part!r} is neither an index, a range such as 2-5, nor a name pattern") from None
    if not (-n <= low < n and -n <= high < n and low % n <= high % n):
        raise InputError(f"--layers {part!r} is out of range: this model has layers 0 to {n - 1}")
    return list(range(low % n, high % n + 1))


def _layers_by_pattern(model: nn.Module, patterns: Sequence[str]) -> tuple[list[Layer], list[Skipped]]:
    modules = [(name, module) for name, module in model.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern.strip()) for name, _ in modules):
            raise unknown("module matching", pattern, (name for name, module in modules if not list(module.children())))
    chosen: list[Layer] = []
    skipped: list[Skipped] = []
    for name, module in modules:
        if any(fnmatchcase(name, pattern.strip()) for pattern in patterns):
            chosen.append(Layer(len(chosen), name, module))
        elif not list(module.children()):
            skipped.append(Skipped(name, NOT_CHOSEN))
    return chosen, skipped


def as_tokens(module: nn.Module, output: Any, mask: Tensor | None, n_examples: int) -> tuple[Tensor, Tensor] | str:
    """A module's output as (hidden (b, t, d), mask (b, t)), or the reason why it cannot be read so.

    (b, d) is one token an example; feature maps (b, d, height, width) have a token for every position.
    """
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return f"its output is a {type(output).__name__}, not a float tensor"
    if output.ndim == 4 or (output.ndim == 3 and isinstance(module, nn.Conv1d | nn.BatchNorm1d)):
        output = output.flatten(2).transpose(1, 2)  # (b, d, h, w) -> (b, h w, d)
    if output.ndim == 2:
        output = output[:, None]
    if output.ndim != 3:
        return f"its output has shape {tuple(output.shape)}, wanted (example, token, dimension)"
    if len(output) != n_examples:  # e.g. position embeddings, which all examples share
        return f"its output has {len(output)} rows for {n_examples} examples"
    if mask is not None and output.shape[1] == mask.shape[1]:
        return output, mask
    if mask is not None and output.shape[1] != 1:
        return f"its output has {output.shape[1]} positions where the batch has {mask.shape[1]} tokens"
    return output, torch.ones(output.shape[:2], dtype=torch.bool, device=output.device)


@contextmanager
def _hooked(layers: Sequence[Layer], take: Callable[[int, Any], None]) -> Iterator[None]:
    handles = []
    seen: set[int] = set()

    def once(position: int, value: Any) -> None:
        if position not in seen:  # a module that is called again (shared weights) is observed at its first call
            seen.add(position)
            take(position, value)

    def before(position: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            once(position, args[0] if args else kwargs.get("hidden_states"))

        return hook

    def after(position: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            once(position, output)

        return hook

    try:
        for i, layer in enumerate(layers):
            if layer.at == "input":
                handles.append(layer.module.register_forward_pre_hook(before(i), with_kwargs=True))
            else:
                handles.append(layer.module.register_forward_hook(after(i)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward(model: nn.Module, inputs: Inputs, layers: Sequence[Layer], on_hidden: OnHidden) -> Tensor | None:
    """One forward pass without gradients; `on_hidden` gets each layer's hidden states as soon as they exist.

    Returns:
        the logits, or None if the model has none.
    Raises:
        InputError: the model does not take this kind of data, or a hidden state cannot be read as tokens.
    """

    def take(position: int, value: Any) -> None:
        states = as_tokens(layers[position].module, value, inputs.mask, inputs.n_examples)
        if isinstance(states, str):
            raise InputError(f"layer {layers[position].name!r} cannot be measured: {states}; leave it out by --layers")
        on_hidden(position, *states)

    # not inference_mode: the weights of a sharded model are gathered here, and trained afterwards
    with torch.no_grad(), _hooked(layers, take):
        return call(model, inputs)


def usable(model: nn.Module, inputs: Inputs, layers: Sequence[Layer]) -> tuple[list[Layer], list[Skipped]]:
    """Which layers give something to measure on a first batch: the others with the reason.

    Raises:
        InputError: the forward pass itself fails on this data.
    """
    reasons: dict[int, str | None] = {}

    def take(position: int, value: Any) -> None:
        if isinstance(layers[position].module, nn.Identity | nn.Dropout):
            reasons[position] = "it passes its input on unchanged"
            return
        states = as_tokens(layers[position].module, value, inputs.mask, inputs.n_examples)
        reasons[position] = states if isinstance(states, str) else None

    try:
        with torch.inference_mode(), _hooked(layers, take):
            call(model, inputs)
    except (RuntimeError, MemoryError, ValueError, TypeError, IndexError) as error:
        if is_out_of_memory(error):
            raise InputError("a single example does not fit in memory; use --dtype bfloat16 or --max-length") from None
        kind = "token ids" if inputs.tokens is not None else f"features of shape {tuple(inputs.features.shape[1:])}"  # type: ignore[union-attr]
        raise InputError(f"the model cannot run on this data ({kind}): {one_line(error, 160)}") from error
    kept = [layer for i, layer in enumerate(layers) if reasons.get(i, "") is None]
    skipped = [
        Skipped(layer.name, reasons.get(i) or "it is not called in the forward pass")
        for i, layer in enumerate(layers)
        if reasons.get(i, "") is not None
    ]
    return kept, skipped


def predicts_next_token(model: nn.Module, tokens: Tensor) -> bool:
    """Whether the logits at a position depend only on it and what is before it: a causal language model.

    Found by trying rather than from a list of classes: the last token of a row is changed, and no earlier logit
    may move.

    Args:
        tokens: (b, t) int64 on the model's device; the first row with its first positions is used.
    """
    row = tokens[:1, : min(tokens.shape[1], 8)]
    if row.shape[1] < 2:
        return False
    other = row.clone()
    other[0, -1] = row[0, 0] if row[0, 0] != row[0, -1] else (row[0, -1] + 1) % (int(row.max()) + 1)
    if torch.equal(row, other):  # a row of zeros only: 0 is the one id that is surely in the vocabulary
        other[0, -1] = 1
    with torch.inference_mode():
        logits = [call(model, Inputs(ids, torch.ones_like(ids, dtype=torch.bool), None, None)) for ids in (row, other)]
    a, b = logits
    if a is None or b is None or a.ndim != 3 or a.shape[:2] != row.shape or a.shape[-1] <= int(row.max()):
        return False
    return torch.equal(a[:, :-1], b[:, :-1]) and not torch.equal(a[:, -1], b[:, -1])


def cross_entropy_sum(logits: Tensor, inputs: Inputs) -> tuple[float, int]:
    """Σ −ln p(target) in nats and the number of targets.

    Next tokens for logits (b, t, v) of a causal language model, the label for logits (b, classes). In float32
    or better, in chunks: the whole of log p would take as much memory as the logits again.
    """
    if inputs.tokens is not None and logits.ndim == 3:
        assert inputs.mask is not None
        keep = inputs.mask[:, 1:]
        targets = inputs.tokens[:, 1:][keep]
        where = keep.nonzero()  # (k, 2): row and position of the logits that predict the targets
        step = max(16, 2**20 // logits.shape[-1])
        total = 0.0
        for start in range(0, len(targets), step):
            at = where[start : start + step]
            z = logits[at[:, 0], at[:, 1]]
            z = z if z.dtype == torch.float64 else z.float()
            nll = nn.functional.cross_entropy(z, targets[start : start + step], reduction="none")
            total += float(nll.cpu().double().sum())  # a float32 sum would move in its eighth digit with the batch size
        return total, len(targets)
    if inputs.labels is not None and logits.ndim == 2:
        n_classes = logits.shape[1]
        wrong = inputs.labels[(inputs.labels < 0) | (inputs.labels >= n_classes)]
        if len(wrong):
            raise InputError(
                f"label {int(wrong[0])} does not fit a model of {n_classes} classes; --columns label= leaves labels out"
            )
        z = logits if logits.dtype == torch.float64 else logits.float()
        nll = nn.functional.cross_entropy(z, inputs.labels, reduction="none")
        return float(nll.cpu().double().sum()), len(logits)
    return 0.0, 0


@dataclass
class Graph:
    """A forward pass whose hidden states are still in the autograd graph."""

    hidden: list[Tensor]  # layer 0 … L, each (b, t, d)
    mask: Tensor  # (b, t) bool
    cross_entropy: Tensor  # (), mean over predicted tokens, nats


def forward_with_graph(model: nn.Module, batch: Batch) -> Graph:
    """Hidden states of all layers and the next-token loss, differentiable; for gradients, not for measuring.

    Raises:
        InputError: the model has no stack of blocks, or no next-token logits.
    """
    layers, _ = layers_of(model)
    if not blocks(model):
        raise InputError("gradients need a transformer with a stack of blocks; this model has none")
    inputs = to_inputs(batch, model)
    hidden: list[Tensor | None] = [None] * len(layers)

    def take(position: int, value: Any) -> None:
        hidden[position] = value[0] if isinstance(value, tuple) else value

    with _hooked(layers, take):
        logits = call(model, inputs)
    if inputs.tokens is None or inputs.mask is None or logits is None or logits.ndim != 3:
        raise InputError("gradients need a causal language model and text; this model gives no next-token logits")
    keep = inputs.mask[:, 1:]
    z = logits[:, :-1][keep]
    loss = nn.functional.cross_entropy(
        z if z.dtype == torch.float64 else z.float(), inputs.tokens[:, 1:][keep], reduction="mean"
    )
    states = [h for h in hidden if h is not None]
    if len(states) != len(layers):
        raise InputError("a block of this model gives no hidden state; gradients cannot be taken")
    return Graph(states, inputs.mask, loss)
