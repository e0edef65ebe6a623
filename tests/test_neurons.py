"""Neurons are found by trying in any model; masks, zeroed weights and contributions are what their definitions say."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from memdiag.checkpoint import open_checkpoints
from memdiag.errors import InputError
from memdiag.models.mlp import MLP, MlpConfig
from memdiag.observe import NOT_CHOSEN, Inputs, call, neurons, probing
from memdiag.observe.neurons import Site

VOCABULARY = 40
POISON = 7  # a token id that stands under the padding, where its value must not matter
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32}

# --- models and data -----------------------------------------------------------------------------------------------


class Fn(nn.Module):
    """A model from a function of itself and its input, with layers by keyword."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Encoder(nn.Module):
    """PyTorch's own transformer, whose fused path calls none of its layers; positions come first if it is told so."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(VOCABULARY, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        x, padding = self.embed(tokens), attention_mask == 0
        if self.batch_first:
            return self.head(self.blocks(x, src_key_padding_mask=padding)[:, 0])
        return self.head(self.blocks(x.transpose(0, 1), src_key_padding_mask=padding)[0])


def texts(*lengths: int, seed: int = 0, extra: int = 0, labelled: bool = False) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    width = max(lengths) + extra
    tokens, mask = torch.full((len(lengths), width), POISON), torch.zeros(len(lengths), width, dtype=torch.bool)
    for i, length in enumerate(lengths):
        tokens[i, :length], mask[i, :length] = torch.randint(8, VOCABULARY, (length,), generator=g), True
    labels = torch.arange(len(lengths)) % 3 if labelled else None
    return Inputs(tokens, mask, None, labels)


def features(*shape: int, seed: int = 0) -> Inputs:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return Inputs(None, None, x, torch.arange(shape[0]) % 3)


def row(inputs: Inputs, i: int) -> Inputs:
    """One example alone, without padding."""

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[i : i + 1]

    n = None if inputs.mask is None else int(inputs.mask[i].sum())
    tokens, mask = (None if x is None else x[i : i + 1, :n] for x in (inputs.tokens, inputs.mask))
    return Inputs(tokens, mask, cut(inputs.features), cut(inputs.labels))


def conv(n_in: int, n_out: int, size: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, size, padding=size // 2, **settings)


def conv_net() -> nn.Module:
    model = nn.Sequential(
        conv(1, 4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        conv(4, 5),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(80, 3),
    )
    with torch.no_grad():  # the identity that a fresh batch norm is would hide a mistake
        model[4].running_mean.uniform_(-1, 1), model[4].running_var.uniform_(0.5, 2), model[4].bias.uniform_(-1, 1)
    return model


def residual() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.stem(x))
        return m.head(F.relu_(m.two(F.relu_(m.one(h))).add_(h)).mean((2, 3)))

    return Fn(forward, stem=conv(1, 4), one=conv(4, 6), two=conv(6, 4), head=nn.Linear(4, 3))


def fire() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.squeeze(x))
        return m.head(F.relu(m.last(torch.cat([F.relu(m.small(h)), F.relu(m.large(h))], 1))).mean((2, 3)))

    layers = {"squeeze": conv(1, 3, 1), "small": conv(3, 4, 1), "large": conv(3, 6), "last": conv(10, 5, 1)}
    return Fn(forward, **layers, head=nn.Linear(5, 3))


def separable() -> nn.Module:
    layers = [conv(1, 4, 1), conv(4, 4, groups=4), conv(4, 8, 1), conv(8, 6, groups=2)]
    body = [part for layer in layers for part in (layer, nn.ReLU6())]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def series() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Conv1d(4, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3))


def squeeze_and_excite() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.one(x))
        gate = torch.sigmoid(m.excite(F.gelu(m.squeeze(h.mean((2, 3))))))
        return m.head(F.relu(m.two(h * gate[:, :, None, None])).mean((2, 3)))

    layers = {"one": conv(1, 4), "squeeze": nn.Linear(4, 2), "excite": nn.Linear(2, 4), "two": conv(4, 5)}
    return Fn(forward, **layers, head=nn.Linear(5, 3))


def gated(*, alternating: bool) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.both(x)
        gate, up = (y[:, ::2], y[:, 1::2]) if alternating else y.chunk(2, 1)
        return m.down(input=F.silu(gate) * up)  # by keyword, as some models call their layers

    return Fn(forward, both=nn.Linear(5, 12), down=nn.Linear(6, 3))


def mixer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head((x + m.two(F.gelu(m.one(x.transpose(1, 2)))).transpose(1, 2)).mean(1))

    return Fn(forward, one=nn.Linear(7, 9), two=nn.Linear(9, 7), head=nn.Linear(5, 3))


def flattened_tokens() -> nn.Module:
    """(b t, d) inside, as in some language models."""

    def forward(m: Any, tokens: Tensor) -> Tensor:
        x = m.embed(tokens)
        return m.head(x + m.two(F.relu(m.one(x.flatten(0, 1)))).view_as(x))

    embed, one, two = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 12), nn.Linear(12, 8)
    return Fn(forward, embed=embed, one=one, two=two, head=nn.Linear(8, VOCABULARY))


def low_rank() -> nn.Module:
    layers = {"main": nn.Linear(5, 6), "a": nn.Linear(5, 2), "b": nn.Linear(2, 6), "out": nn.Linear(6, 3)}
    return Fn(lambda m, x: m.out(F.relu(m.main(x) + m.b(m.a(x)))), **layers)


def resnet(kind: str) -> nn.Module:
    sizes = {"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [1, 2]}
    return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=3, layer_type=kind, **sizes))


@dataclass
class Case:
    make: Callable[[], nn.Module]
    inputs: Inputs
    sites: list[tuple[str, tuple[str, ...], int, int]]  # reader, producers, neurons, inputs of the reader for each


def blocks(
    reader: str, producers: list[str], n: int = 2, width: int = 24
) -> list[tuple[str, tuple[str, ...], int, int]]:
    """The same site in every block; `#` is the block's number."""
    return [(reader.replace("#", str(i)), tuple(p.replace("#", str(i)) for p in producers), width, 1) for i in range(n)]


pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the encoder's own
IMAGES, TABLE, PAIRS = features(5, 1, 8, 8), features(6, 5), texts(11, 4, 9, 2, labelled=True)
ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0."
STAGE = "resnet.encoder.stages.#.layers."
CASES = {
    "mlp": Case(
        lambda: MLP(MlpConfig((5, 7, 6, 3), activation="gelu")),
        TABLE,
        [("layers.linear_2", ("layers.linear_1",), 7, 1), ("layers.linear_3", ("layers.linear_2",), 6, 1)],
    ),
    "conv": Case(conv_net, IMAGES, [("3", ("0",), 4, 1), ("7", ("3",), 5, 16)]),
    "residual": Case(residual, IMAGES, [("two", ("one",), 6, 1)]),
    "fire": Case(fire, IMAGES, [("last", ("small", "large"), 10, 1), ("head", ("last",), 5, 1)]),
    "separable": Case(
        separable, IMAGES, [("2", ("0",), 4, 1), ("4", ("2",), 4, 1), ("6", ("4",), 8, 1), ("10", ("6",), 6, 1)]
    ),
    "series": Case(series, features(5, 2, 8), [("2", ("0",), 4, 1), ("5", ("2",), 5, 4)]),
    "excite": Case(squeeze_and_excite, IMAGES, [("excite", ("squeeze",), 2, 1), ("head", ("two",), 5, 1)]),
    "halves": Case(lambda: gated(alternating=False), TABLE, [("down", ("both",), 6, 1)]),
    "alternating": Case(lambda: gated(alternating=True), TABLE, [("down", ("both",), 6, 1)]),
    "mixer": Case(mixer, features(4, 7, 5), [("two", ("one",), 9, 1)]),
    "low rank": Case(low_rank, TABLE, [("out", ("main", "b"), 6, 1)]),
    "flattened": Case(flattened_tokens, texts(11, 4, 9, 2), [("two", ("one",), 12, 1)]),
    "encoder": Case(
        lambda: Encoder(batch_first=True),
        PAIRS,
        blocks("blocks.layers.#.linear2", ["blocks.layers.#.linear1"], width=12),
    ),
    "positions first": Case(
        lambda: Encoder(batch_first=False),
        PAIRS,
        blocks("blocks.layers.#.linear2", ["blocks.layers.#.linear1"], width=12),
    ),
    "gpt2": Case(
        lambda: GPT2LMHeadModel(GPT2Config(**GPT2, n_inner=24, bos_token_id=0, eos_token_id=0)),
        texts(11, 4, 9, 1),
        blocks("transformer.h.#.mlp.c_proj", ["transformer.h.#.mlp.c_fc"]),
    ),
    "llama": Case(
        lambda: LlamaForCausalLM(LlamaConfig(**TEXT, **TINY)),
        texts(11, 4, 9, 1),
        blocks("model.layers.#.mlp.down_proj", ["model.layers.#.mlp.gate_proj", "model.layers.#.mlp.up_proj"]),
    ),
    "phi3": Case(
        lambda: Phi3ForCausalLM(Phi3Config(**TEXT, **TINY)),
        texts(11, 4, 9, 1),
        blocks("model.layers.#.mlp.down_proj", ["model.layers.#.mlp.gate_up_proj"]),
    ),
    "gpt-neox": Case(
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**TEXT, **TINY, use_parallel_residual=True)),
        texts(11, 4, 9, 1),
        blocks("gpt_neox.layers.#.mlp.dense_4h_to_h", ["gpt_neox.layers.#.mlp.dense_h_to_4h"]),
    ),
    "bert": Case(
        lambda: BertForSequenceClassification(BertConfig(**TEXT, **TINY, num_labels=3)),
        PAIRS,
        [
            *blocks("bert.encoder.layer.#.output.dense", ["bert.encoder.layer.#.intermediate.dense"]),
            ("classifier", ("bert.pooler.dense",), 16, 1),
        ],
    ),
    "albert": Case(
        lambda: AlbertForSequenceClassification(AlbertConfig(**TEXT, **TINY, embedding_size=8, num_labels=3)),
        PAIRS,
        [(ALBERT + "ffn_output", (ALBERT + "ffn",), 24, 1), ("classifier", ("albert.pooler",), 16, 1)],
    ),
    "vit": Case(
        lambda: ViTForImageClassification(ViTConfig(**TINY, image_size=8, patch_size=4, num_channels=1, num_labels=3)),
        IMAGES,
        blocks("vit.layers.#.mlp.fc2", ["vit.layers.#.mlp.fc1"]),
    ),
    "resnet": Case(
        lambda: resnet("basic"),
        features(4, 1, 16, 16),
        [
            *blocks(f"{STAGE}0.layer.1.convolution", [f"{STAGE}0.layer.0.convolution"], n=1, width=8),
            *blocks(f"{STAGE}0.layer.1.convolution", [f"{STAGE}0.layer.0.convolution"], width=12)[1:],
            *blocks(f"{STAGE}1.layer.1.convolution", [f"{STAGE}1.layer.0.convolution"], width=12)[1:],
        ],
    ),
}
ALL = pytest.mark.parametrize("name", CASES)
LANGUAGE = ["flattened", "gpt2", "llama", "phi3", "gpt-neox"]


@functools.cache
def built(name: str) -> nn.Module:
    """A case's model in float32, shared, so not to be changed. Its weights are not small."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CASES[name].make().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.7 / math.sqrt(parameter[0].numel()))
            else:
                parameter += torch.randn_like(parameter) * 0.1
    return model


@functools.cache
def sites_in(name: str) -> tuple[Site, ...]:
    return tuple(neurons.sites_of(built(name), CASES[name].inputs)[0])


def own(name: str) -> tuple[nn.Module, list[Site]]:
    """A copy that may be changed, with its sites."""
    model = copy.deepcopy(built(name))
    return model, neurons.sites_of(model, CASES[name].inputs)[0]


def logits_of(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.inference_mode():
        logits = call(model, inputs)
    assert logits is not None
    return logits if inputs.mask is None or logits.ndim == 2 else logits[inputs.mask]


def halves(sites: Any, seed: int = 0) -> list[Tensor]:
    """(k,) bool for each site, about half of them True and never all alike."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randperm(site.width, generator=g) % 2 == 0 for site in sites]


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Asserts that a model is left as it was: weights, modes, gradients, hooks; and PyTorch's fused path."""

    def state() -> Any:
        weights = {name: (p.clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
        modes = [module.training for module in model.modules()]
        return weights, modes, n_hooks(model), torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()

    before = state()
    try:
        yield
    finally:
        after = state()
        assert after[1:] == before[1:]
        for name, (weight, needs, grad) in before[0].items():
            assert torch.equal(weight, after[0][name][0])
            assert (needs, grad) == after[0][name][1:]


# --- where the neurons are ------------------------------------------------------------------------------------------


@ALL
def test_the_sites_of_every_kind_of_model(name: str) -> None:
    model = built(name)
    with unchanged(model):
        sites, skipped = neurons.sites_of(model, CASES[name].inputs)
    assert [(s.name, s.producers, s.width, s.group) for s in sites] == CASES[name].sites
    assert all(s.reader is model.get_submodule(s.name) for s in sites)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    layers = {n for n, m in model.named_modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"}
    assert {s.name for s in sites} | {s.name for s in skipped} == layers
    assert len(sites) + len(skipped) == len(layers)
    assert all(s.why for s in skipped)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "square"])
@pytest.mark.parametrize("extra", [{}, {"dropout": 0.3}, {"norm": "batch", "dropout": 0.3}])
def test_hidden_layers_of_an_mlp(activation: str, extra: dict[str, Any]) -> None:
    model = MLP(MlpConfig((5, 7, 6, 3), activation=activation, **extra)).train()
    with unchanged(model):
        sites, skipped = neurons.sites_of(model, TABLE)
    assert [(s.name, s.producers) for s in sites] == [
        ("layers.linear_2", ("layers.linear_1",)),
        ("layers.linear_3", ("layers.linear_2",)),
    ]
    assert [(s.name, s.why) for s in skipped] == [("layers.linear_1", "its input depends on no other layer")]


def test_an_mlp_without_an_activation_or_with_a_norm_after_it_has_no_neurons() -> None:
    with pytest.raises(InputError, match=r"nothing to prune.*affine function of the outputs of layers.linear_1"):
        neurons.sites_of(MLP(MlpConfig((5, 7, 3), activation="identity")), TABLE)
    with pytest.raises(InputError, match=r"nothing to prune.*it mixes those of layers.linear_1"):
        neurons.sites_of(MLP(MlpConfig((5, 7, 3), norm="layer")), TABLE)
    with pytest.raises(InputError, match=r"nothing to prune.*no linear or convolutional layer"):
        neurons.sites_of(nn.Flatten(), TABLE)


def test_experts_that_are_no_layers_have_no_neurons_to_prune() -> None:
    config = MixtralConfig(**TEXT, **TINY, num_key_value_heads=1, num_local_experts=4)
    with pytest.raises(InputError, match="nothing to prune") as error:
        neurons.sites_of(MixtralForCausalLM(config).eval(), texts(8, 8))
    assert "\n" not in str(error.value)


def two_readers(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    return m.b(h) + m.c(h)


def also_put_out(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    return m.b(h) + h[:, :3]


def hardly_mixed(y: Tensor) -> Tensor:
    return y + y.tanh() / 10 + y.roll(1, 1) / 999


def also_centred(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(h.relu()) + m.c(h - h.mean(1, keepdim=True))  # of which the sum has no slope at all


def linear(**shapes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*shape) for name, shape in shapes.items()}


REFUSED = {
    "read twice": (two_readers, linear(a=(5, 6), b=(6, 3), c=(6, 3)), "b", "of a is also used by c"),
    "put out": (also_put_out, linear(a=(5, 6), b=(6, 3)), "b", "of a is also used by the model's output"),
    "centred": (also_centred, linear(a=(5, 8), b=(8, 3), c=(8, 3)), "b", "of a is also used by c"),
    "softmax": (
        lambda m, x: m.b(m.a(x).softmax(-1)), linear(a=(5, 6), b=(6, 3)), "b", "mixes those of a"
    ),
    "normed": (
        lambda m, x: m.b(F.layer_norm(m.a(x).relu(), (6,))), linear(a=(5, 6), b=(6, 3)), "b", "mixes those of a"
    ),
    "scaled": (lambda m, x: m.b(3 * m.a(x) - 1), linear(a=(5, 6), b=(6, 3)), "b", "an affine function of"),
    "with features": (
        lambda m, x: m.b(torch.cat([m.a(x).relu(), x], 1)), linear(a=(5, 6), b=(11, 3)), "b", "mixes those of a"
    ),
    "hardly mixed": (
        lambda m, x: m.b(hardly_mixed(m.a(x))), linear(a=(5, 6), b=(6, 3)), "b", "mixes those"
    ),
    "reversed": (lambda m, x: m.b(m.a(x).relu().flip(1)), linear(a=(5, 6), b=(6, 3)), "b", "mixes those of a"),
    "other examples": (
        lambda m, x: m.b(m.a(x).relu().cumsum(0)), linear(a=(5, 6), b=(6, 3)), "b", "no row for each example"
    ),
    "batch statistics": (
        lambda m, x: m.b(m.a(x).relu() - m.a(x).relu().mean(0)), linear(a=(5, 6), b=(6, 3)), "b", "mixes positions of"
    ),
    "recurrent": (
        lambda m, x: m.b(m.l(m.l(m.a(x).tanh()).tanh()).tanh()),
        linear(a=(5, 6), l=(6, 6), b=(6, 3)), "b", "of l is also used by l",
    ),
    "unlike calls": (
        lambda m, x: m.b(m.a(x).relu()) + m.b(x), linear(a=(5, 5), b=(5, 3)), "b", "depends on no other layer"
    ),
    "not called": (
        lambda m, x: F.linear(m.a(x).relu(), m.b.weight), linear(a=(5, 6), b=(6, 3)), "b", "not called in the forward"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_site_is_skipped_with_what_was_found(name: str) -> None:
    function, layers, reader, why = REFUSED[name]
    model = Fn(
        lambda m, x: function(m, x) + m.good_2(m.good_1(x).relu()), **layers, **linear(good_1=(5, 4), good_2=(4, 3))
    )
    sites, skipped = neurons.sites_of(model, TABLE)
    assert [s.name for s in sites] == ["good_2"]
    assert why in {s.name: s.why for s in skipped}[reader]


def test_positions_of_a_linear_layer_must_not_be_mixed() -> None:
    layers = linear(a=(5, 6), b=(6, 3), c=(42, 3))
    pooled = Fn(lambda m, x: m.b(m.a(x).relu().mean(1)) + m.c(m.a(x).relu().flatten(1)), **layers)
    with pytest.raises(InputError, match=r"mixes positions of the outputs of a"):
        neurons.sites_of(pooled, features(4, 7, 5))
    shifted = Fn(lambda m, x: m.b(m.a(x).relu().roll(1, 1)).mean(1), **linear(a=(5, 6), b=(6, 3)))
    with pytest.raises(InputError, match=r"mixes positions of the outputs of a"):
        neurons.sites_of(shifted, features(4, 7, 5))
    picked = Fn(lambda m, x: m.b(m.a(x).relu()[:, 2]), **linear(a=(5, 6), b=(6, 3)))
    assert [s.name for s in neurons.sites_of(picked, features(4, 7, 5))[0]] == ["b"]


def test_a_gate_may_be_the_same_at_all_positions() -> None:
    layers = linear(a=(5, 6), gate=(5, 6), b=(6, 3))
    model = Fn(lambda m, x: m.b(m.a(x).relu() * m.gate(x.mean(1, keepdim=True)).sigmoid()).mean(1), **layers)
    assert [s.producers for s in neurons.sites_of(model, features(4, 7, 5))[0]] == [("a", "gate")]
    why = {s.name: s.why for s in neurons.sites_of(built("excite"), IMAGES)[1]}
    assert why["two"] == "what it reads of one is also used by squeeze"


def test_positions_must_be_those_of_the_tokens() -> None:
    layers = {"embed": nn.Embedding(VOCABULARY, 5), **linear(a=(5, 6), b=(6, 3))}
    every_other = Fn(lambda m, tokens: m.b(m.a(m.embed(tokens)[:, ::2]).relu()).mean(1), **layers)
    with pytest.raises(InputError, match="4 positions where the batch has 8 tokens"):
        neurons.sites_of(every_other, texts(8, 8))


def test_a_layer_that_is_called_on_two_layouts_is_no_site() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return (m.b(m.a(x).relu()) + m.b(m.a(x.transpose(0, 1)).relu()).transpose(0, 1)).mean(1)

    with pytest.raises(InputError, match="b: what it reads is not made alike in all its calls"):
        neurons.sites_of(Fn(forward, **linear(a=(5, 6), b=(6, 3))), features(4, 7, 5))


def test_weights_that_others_share_or_that_are_computed_are_left_alone() -> None:
    layers = [nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)]
    model = nn.Sequential(*layers)
    model[4].weight = model[2].weight
    sites, skipped = neurons.sites_of(model, TABLE)
    assert [s.name for s in sites] == ["6"]
    assert {s.name: s.why for s in skipped}["2"] == "its weight is also that of 4"
    kept = model[4].weight.clone()
    neurons.zero_(model, sites, [torch.ones(6, dtype=torch.bool)])
    assert torch.equal(model[4].weight, kept)
    assert not model[6].weight.any()
    normed = nn.Sequential(*copy.deepcopy(layers[:2]), nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)))
    with pytest.raises(InputError, match="2: its weight is not a plain parameter"):
        neurons.sites_of(normed, TABLE)


def test_a_tied_head_and_attention_are_skipped_for_what_they_are() -> None:
    model = CASES["gpt2"].make().eval()
    why = {s.name: s.why for s in neurons.sites_of(model, texts(9, 9))[1]}
    assert why["lm_head"] == "its weight is also that of transformer.wte"
    assert why["transformer.h.0.attn.c_attn"] == "its input depends on no other layer"
    assert why["transformer.h.1.attn.c_proj"].endswith("it mixes those of transformer.h.1.attn.c_attn")
    assert why["transformer.h.1.mlp.c_fc"].endswith(
        "transformer.h.0.mlp.c_proj, transformer.h.1.attn.c_proj and 1 more"
    )


def test_one_example_or_a_dead_or_always_active_layer_does_not_hide_the_neurons() -> None:
    model = MLP(MlpConfig((5, 7, 6, 3)))
    assert len(neurons.sites_of(model, features(1, 5))[0]) == 2
    assert len(neurons.sites_of(built("gpt2"), texts(9))[0]) == 2
    for bias in (100, -100):
        model.layers.linear_1.bias.detach().fill_(bias)
        assert [s.name for s in neurons.sites_of(model, TABLE)[0]] == ["layers.linear_2", "layers.linear_3"]
    one = MLP(MlpConfig((5, 1, 3), activation="gelu"))
    assert [s.width for s in neurons.sites_of(one, TABLE)[0]] == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "conv", "resnet", "halves"])
def test_sites_are_the_same_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    x = case.inputs.features
    inputs = Inputs(case.inputs.tokens, case.inputs.mask, None if x is None else x.to(dtype), None)
    sites, _ = neurons.sites_of(copy.deepcopy(built(name)).to(dtype), inputs)
    assert [(s.name, s.producers, s.width, s.group) for s in sites] == case.sites


def test_examples_are_where_they_are_even_if_there_are_as_many_as_tokens() -> None:
    for n in (2, 4):
        inputs = texts(*[n] * n)
        assert [s.axis for s in neurons.sites_of(built("positions first"), inputs)[0]] == [1, 1]
        assert [s.axis for s in neurons.sites_of(built("encoder"), inputs)[0]] == [0, 0]
    assert [s.axis for s in neurons.sites_of(built("positions first"), texts(9))[0]] == [1, 1]
    turned = Fn(lambda m, x: m.b(m.a(x.transpose(0, 1)).relu()).mean(0), **linear(a=(5, 6), b=(6, 3)))
    assert [s.axis for s in neurons.sites_of(turned, features(1, 7, 5))[0]] == [1]


def test_activations_that_are_not_finite_are_told() -> None:
    model, sites = own("mlp")
    model.layers.linear_1.weight[3] = math.nan
    with pytest.raises(InputError, match=r"layer 'layers.linear_2': its input holds NaN"):
        neurons.sites_of(model, TABLE)
    with unchanged(built("mlp")), pytest.raises(InputError, match=r"layer 'layers.linear_2': its input holds NaN"):
        neurons.margin_contributions(model, TABLE, sites)
    model = MLP(MlpConfig((5, 7, 3)))
    sites, _ = neurons.sites_of(model, TABLE)
    with torch.no_grad():
        model.layers.linear_1.bias[3] = math.inf
    for find in (neurons.sites_of, functools.partial(neurons.margin_contributions, sites=sites)):
        with pytest.raises(InputError, match=r"layer 'layers.linear_2': its input holds infinity"):
            find(model, TABLE)


# --- the user's choice ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("0", [0]),
        ("-1", [2]),
        ("1-2", [1, 2]),
        ("2,0", [0, 2]),
        ("classifier", [2]),
        ("*.dense", [0, 1, 2]),
        ("*.intermediate.*", [0, 1]),
        ("*.1.*, -1", [1, 2]),
    ],
)
def test_sites_are_chosen_by_index_or_by_the_path_of_reader_or_producer(wanted: str, expected: list[int]) -> None:
    all_sites, all_skipped = neurons.sites_of(built("bert"), PAIRS)
    sites, skipped = neurons.sites_of(built("bert"), PAIRS, wanted)
    assert sites == [all_sites[i] for i in expected]
    left = [s.name for i, s in enumerate(all_sites) if i not in expected]
    assert [s.name for s in skipped if s.why == NOT_CHOSEN] == left
    assert [s for s in skipped if s.why != NOT_CHOSEN] == all_skipped


@pytest.mark.parametrize(
    ("wanted", "message"), [("classifer", "did you mean 'classifier'"), ("3", "0 to 2"), ("", "no ")]
)
def test_a_choice_that_fits_nothing_is_an_error(wanted: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        neurons.sites_of(built("bert"), PAIRS, wanted)


# --- masks and zeroed weights ---------------------------------------------------------------------------------------


@ALL
def test_the_reader_is_the_only_way_out_of_a_neuron(name: str) -> None:
    """Without what the readers read, nothing that is done to the producers can be noticed."""
    model, sites = own(name)
    none = [torch.zeros(site.width) for site in sites]
    with neurons.masked(sites, none):
        expected = logits_of(model, CASES[name].inputs)
    g = torch.Generator().manual_seed(1)
    for path in {path for site in sites for path in site.producers}:
        weight = model.get_submodule(path).weight
        weight += torch.randn(weight.shape, generator=g)
    with neurons.masked(sites, none):
        assert torch.equal(logits_of(model, CASES[name].inputs), expected)
    assert not torch.allclose(
        logits_of(model, CASES[name].inputs), logits_of(built(name), CASES[name].inputs), atol=1e-3
    )


@ALL
def test_zeroed_weights_do_what_the_mask_does(name: str) -> None:
    model, sites = own(name)
    inputs, gone = CASES[name].inputs, halves(sites)
    full = logits_of(model, inputs)
    with unchanged(model), neurons.masked(sites, [~g for g in gone]):
        masked = logits_of(model, inputs)
    assert not torch.allclose(masked, full, atol=1e-3)
    assert torch.equal(logits_of(model, inputs), full)
    neurons.zero_(model, sites, gone)
    zeroed = logits_of(model, inputs)
    assert (zeroed - masked).abs().max() < 1e-6
    assert torch.equal(zeroed.argmax(-1), masked.argmax(-1))
    for site, which in zip(sites, gone):  # what they were made with and what they gave
        outgoing, incoming = (n[0] for n in neurons.norms(model, [site]))
        assert not outgoing[which].any()
        assert not incoming[which].any()
        if name != "separable":  # where one site's reader is the next one's producer, unit for unit
            assert incoming[~which].all()


def test_what_enters_and_leaves_a_neuron_becomes_zero_and_nothing_else() -> None:
    model, sites = own("mlp")
    before = {name: p.clone() for name, p in model.named_parameters()}
    neurons.zero_(model, sites[:1], [torch.arange(7) == 2])
    for name, p in model.named_parameters():
        expected = before[name]
        if name.startswith("layers.linear_1"):
            expected[2] = 0
        if name == "layers.linear_2.weight":
            expected[:, 2] = 0
        assert torch.equal(p, expected)


def test_masks_are_factors_by_hand() -> None:
    model, sites = own("mlp")
    a, b, c = (layer for layer in model.layers if isinstance(layer, nn.Linear))
    first, second = torch.rand(7), torch.rand(6)
    with neurons.masked(sites, [first, second]):
        found = logits_of(model, TABLE)
    expected = c(second * F.gelu(b(first * F.gelu(a(TABLE.features)))))
    torch.testing.assert_close(found, expected)
    with neurons.masked(sites[1:], [torch.ones(6, dtype=torch.bool)]):
        assert torch.equal(logits_of(model, TABLE), logits_of(built("mlp"), TABLE))


def test_a_masked_feature_map_is_black() -> None:
    model, sites = own("conv")
    with neurons.masked(sites, [torch.tensor([1.0, 0, 1, 1]), torch.tensor([1.0, 1, 0, 1, 1])]):
        found = logits_of(model, IMAGES)
    h = model[:3](IMAGES.features)
    h[:, 1] = 0
    h = model[3:6](h)
    h[:, 2] = 0
    torch.testing.assert_close(found, model[6:](h))


def test_a_mask_holds_at_every_call_of_a_shared_layer() -> None:
    model, sites = own("albert")
    seen: list[Tensor] = []
    with neurons.masked(sites, [torch.arange(24.0), torch.ones(16)]):
        handle = sites[0].reader.register_forward_hook(lambda m, args, out: seen.append(args[0]))
        logits_of(model, PAIRS)
        handle.remove()
    assert len(seen) == 2
    assert all((x[..., 0] == 0).all() and (x[..., 1:] != 0).all() for x in seen)


def test_masks_of_another_shape_are_refused_and_no_hook_stays_behind() -> None:
    model, sites = own("mlp")
    for masks in ([torch.ones(7)], [torch.ones(6), torch.ones(7)]):
        with pytest.raises(ValueError, match="one number per neuron"), neurons.masked(sites, masks):
            pass
        with pytest.raises(ValueError, match="one number per neuron"):
            neurons.zero_(model, sites, masks)
    with unchanged(model), pytest.raises(KeyError), neurons.masked(sites, [torch.ones(7), torch.ones(6)]):
        raise KeyError("of the caller")
    wrong = Inputs(None, None, torch.zeros(2, 9), torch.tensor([0, 1]))
    with unchanged(model), pytest.raises(RuntimeError):
        neurons.margin_contributions(model, wrong, sites)
    with unchanged(model), pytest.raises(RuntimeError):
        neurons.sites_of(model, wrong)


def test_zeroing_a_loaded_checkpoint_leaves_its_file_as_it_was(fixtures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fixtures / "digits-mlp", tmp_path / "mlp"))
    files = sorted(folder.rglob("*.safetensors"))
    before = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    model = open_checkpoints(folder)[0].load(dtype="auto")
    inputs = features(3, *([model.config.widths[0]]))
    sites, _ = neurons.sites_of(model, inputs)
    neurons.zero_(model, sites, [torch.ones(site.width, dtype=torch.bool) for site in sites])
    assert not sites[0].reader.weight.any()
    assert before == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


# --- norms ----------------------------------------------------------------------------------------------------------


def test_norms_by_hand() -> None:
    model = MLP(MlpConfig((2, 2, 2)))
    with torch.no_grad():
        model.layers.linear_1.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        model.layers.linear_2.weight.copy_(torch.tensor([[1.0, 6.0], [0.0, 8.0]]))
    site = Site("layers.linear_2", model.layers.linear_2, ("layers.linear_1",), 2)
    (outgoing,), (incoming,) = neurons.norms(model, [site])
    assert outgoing.tolist() == [1, 10]
    assert incoming.tolist() == [5, 2]
    assert outgoing.dtype == incoming.dtype == torch.float64


@ALL
def test_norms_are_the_loop(name: str) -> None:
    """A neuron's own weights, told by the layers' classes: what it adds to each output, what it is made with."""
    model, sites = built(name), list(sites_in(name))
    for site, outgoing, incoming in zip(sites, *neurons.norms(model, sites)):
        weight = site.reader.weight if type(site.reader).__name__ == "Conv1D" else site.reader.weight.transpose(0, 1)
        groups = getattr(site.reader, "groups", 1)
        for k in range(site.width):
            each = range(k * site.group, (k + 1) * site.group)
            if groups == 1:
                total = sum(float(weight[i].double().square().sum()) for i in each)
            else:  # input i of a group meets the outputs of its group only
                rows = slice(*(weight.shape[1] // groups * (k // weight.shape[0] + extra) for extra in (0, 1)))
                total = float(weight[k % weight.shape[0], rows].double().square().sum())
            assert outgoing[k].item() == pytest.approx(math.sqrt(total))
            product, start = 1.0, 0
            for path in site.producers:
                layer = model.get_submodule(path)
                rows = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
                own_rows = {"halves": [k, k + 6], "alternating": [2 * k, 2 * k + 1], "phi3": [k, k + 24]}.get(name, [k])
                if name == "fire" and site.name == "last":
                    own_rows = [k - start] if 0 <= k - start < len(rows) else []
                    start += len(rows)
                product *= math.prod(float(rows[c].double().norm()) for c in own_rows)
            assert incoming[k].item() == pytest.approx(product)


# --- contributions --------------------------------------------------------------------------------------------------


def plain_margin(z: Tensor, y: int) -> Tensor:
    others = [z[v] for v in range(len(z)) if v != y]
    return z[y] - max(others, key=Tensor.item)


def by_definition(model: nn.Module, one: Inputs, sites: Any, prefix: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """∂margin/∂mask and −∂loss/∂mask at a mask of ones for one example: what a · ∂/∂a is by the chain rule."""
    masks = [torch.ones(site.width, requires_grad=True) for site in sites]
    with neurons.masked(sites, masks):
        logits = call(model, one)
    assert logits is not None
    if logits.ndim == 2:
        terms = [(logits[0], int(one.labels[0]))]
    else:
        tokens = one.tokens[0].tolist()
        terms = [(logits[0, t - 1], tokens[t]) for t in range(max(1, prefix), len(tokens))]
    if not terms:
        return [torch.zeros(site.width) for site in sites], [torch.zeros(site.width) for site in sites]
    margin = sum(plain_margin(z, y) for z, y in terms) / len(terms)
    loss = sum(torch.logsumexp(z, 0) - z[y] for z, y in terms) / len(terms)
    by_margin = torch.autograd.grad(margin, masks, retain_graph=True)
    return list(by_margin), [-g for g in torch.autograd.grad(loss, masks)]


@ALL
def test_contributions_are_the_definition_one_example_at_a_time(name: str) -> None:
    model, sites, inputs = built(name), sites_in(name), CASES[name].inputs
    with unchanged(model):
        found = neurons.margin_contributions(model, inputs, sites)
    for i in range(inputs.n_examples):
        margin, loss = by_definition(model, row(inputs, i), sites)
        for s in range(len(sites)):
            torch.testing.assert_close(found.margin[s][i].float(), margin[s], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.loss[s][i].float(), loss[s], atol=1e-5, rtol=1e-4)
    for s, site in enumerate(sites):
        assert all(x[s].shape == (inputs.n_examples, site.width) for x in (found.margin, found.loss, found.activation))
        assert all(x[s].dtype == torch.float64 for x in (found.margin, found.loss, found.activation))
        assert found.margin[s].abs().max() > 1e-4


def test_contributions_by_hand() -> None:
    model = MLP(MlpConfig((2, 2, 3), bias=False))
    with torch.no_grad():
        model.layers.linear_1.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        model.layers.linear_2.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0], [-1.0, 3.0]]))
    inputs = Inputs(None, None, torch.tensor([[2.0, 1.0], [2.0, -1.0]]), torch.tensor([0, 1]))
    sites, _ = neurons.sites_of(model, inputs)
    found = neurons.margin_contributions(model, inputs, sites)
    # a = (2, 1), z = (4, 1, 1): the first of the two runners-up or the other; a = (2, 0), z = (2, 0, -2), label 1
    assert found.margin[0][0].tolist() in ([2 * 1.0, 1 * 1.0], [2 * 2.0, 1 * -1.0])
    assert found.margin[0][1].tolist() == [2 * -1.0, 0]
    assert found.activation[0].tolist() == [[2, 1], [2, 0]]
    p = torch.tensor([2.0, 0.0, -2.0], dtype=torch.float64).softmax(0)
    expected = 2 * (0 - float(p[0] * 1 + p[1] * 0 + p[2] * -1))  # a (∂z_y/∂a − Σ p ∂z/∂a)
    assert found.loss[0][1].tolist() == [pytest.approx(expected, abs=1e-6), 0]


@pytest.mark.parametrize("name", ["mlp", "conv", "series", "bert", "halves"])
def test_at_a_linear_read_out_a_contribution_is_what_removing_the_neuron_costs(name: str) -> None:
    model, inputs = built(name), CASES[name].inputs
    site = sites_in(name)[-1]
    found = neurons.margin_contributions(model, inputs, [site]).margin[0]
    z = logits_of(model, inputs)
    runner_up = [
        max((v for v in range(3) if v != y), key=lambda v: float(z[i, v])) for i, y in enumerate(inputs.labels)
    ]
    i = torch.arange(len(z))
    for k in range(site.width):
        with neurons.masked([site], [torch.arange(site.width) != k]):
            without = logits_of(model, inputs)
        cost = (z[i, inputs.labels] - z[i, runner_up]) - (without[i, inputs.labels] - without[i, runner_up])
        torch.testing.assert_close(found[:, k].float(), cost, atol=2e-6, rtol=1e-5)


@ALL
def test_activations_are_the_loop_over_real_positions(name: str) -> None:
    model, sites, inputs = built(name), sites_in(name), CASES[name].inputs
    found = neurons.margin_contributions(model, inputs, sites).activation
    for i in range(inputs.n_examples):
        for s, site in enumerate(sites):
            seen: list[Tensor] = []
            handle = site.reader.register_forward_pre_hook(
                lambda m, args, kwargs, seen=seen: seen.append(args[0] if args else kwargs["input"]), with_kwargs=True
            )
            with probing.unfused():
                logits_of(model, row(inputs, i))  # alone: every position is real
            handle.remove()
            x = torch.stack(seen).double().abs()
            channels = 2 if isinstance(site.reader, nn.Conv1d | nn.Conv2d) else x.ndim - 1
            x = x.movedim(channels, -1).reshape(-1, site.width, site.group).mean((0, 2))
            torch.testing.assert_close(found[s][i], x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*LANGUAGE, "bert", "albert", "encoder", "positions first"])
def test_padding_and_batch_size_do_not_matter(name: str) -> None:
    model, sites, inputs = built(name), sites_in(name), CASES[name].inputs
    found = neurons.margin_contributions(model, inputs, sites)
    padding = ~inputs.mask
    other = Inputs(inputs.tokens.masked_fill(padding, 31), inputs.mask, None, inputs.labels)
    wider = Inputs(F.pad(other.tokens, (0, 5), value=3), F.pad(other.mask, (0, 5)), None, inputs.labels)
    order = torch.arange(inputs.n_examples).flip(0)
    turned = Inputs(
        inputs.tokens[order], inputs.mask[order], None, None if inputs.labels is None else inputs.labels[order]
    )
    alone = [neurons.margin_contributions(model, row(inputs, i), sites) for i in range(inputs.n_examples)]
    again = [neurons.margin_contributions(model, variant, sites) for variant in (other, wider)]
    back = neurons.margin_contributions(model, turned, sites)
    for kind in ("margin", "loss", "activation"):
        for s in range(len(sites)):
            expected = getattr(found, kind)[s]
            assert expected.isfinite().all()
            for variant in again:
                torch.testing.assert_close(getattr(variant, kind)[s], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(getattr(back, kind)[s][order], expected, atol=1e-5, rtol=1e-5)
            rows = torch.cat([getattr(one, kind)[s] for one in alone])
            torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_text_without_a_target_contributes_nothing(name: str) -> None:
    model, sites = built(name), sites_in(name)
    for inputs in (texts(6, 1, 3), texts(1, 1), texts(1)):
        found = neurons.margin_contributions(model, inputs, sites)
        single = inputs.mask.sum(1) == 1
        for s in range(len(sites)):
            assert not found.margin[s][single].any()
            assert not found.loss[s][single].any()
            assert (found.activation[s] >= 0).all()
            assert found.activation[s].any(1).all()
            assert found.margin[s][~single].any(1).all()


def test_tokens_of_the_prefix_are_no_targets() -> None:
    model, sites, inputs = built("gpt2"), sites_in("gpt2"), texts(9, 4, 2)
    plain = neurons.margin_contributions(model, inputs, sites)
    for prefix in (0, 1, 2, 4, 8, 9, 50):
        found = neurons.margin_contributions(model, inputs, sites, prefix=prefix)
        for i in range(3):
            margin, loss = by_definition(model, row(inputs, i), sites, prefix)
            for s in range(len(sites)):
                torch.testing.assert_close(found.margin[s][i].float(), margin[s], atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(found.loss[s][i].float(), loss[s], atol=1e-5, rtol=1e-4)
                assert torch.equal(found.activation[s], plain.activation[s])  # over all tokens, whatever the prefix


def test_masked_neurons_contribute_nothing_and_the_rest_what_it_does_without_them() -> None:
    model, sites = own("llama")
    inputs, gone = CASES["llama"].inputs, halves(sites)
    with neurons.masked(sites, [~g for g in gone]):
        masked = neurons.margin_contributions(model, inputs, sites)
    assert all(not found[:, which].any() for found, which in zip(masked.margin, gone))
    neurons.zero_(model, sites, gone)
    zeroed = neurons.margin_contributions(model, inputs, sites)
    for s in range(len(sites)):
        torch.testing.assert_close(masked.margin[s], zeroed.margin[s], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_give_the_same_to_their_precision(dtype: torch.dtype) -> None:
    model, sites = own("llama")
    wanted = neurons.margin_contributions(model, CASES["llama"].inputs, sites)
    found = neurons.margin_contributions(model.to(dtype), CASES["llama"].inputs, sites)
    close = 1e-5 if dtype == torch.float64 else 0.06
    for kind in ("loss", "activation"):  # of the margin in half precision, the runner-up may be another
        for a, b in zip(getattr(found, kind), getattr(wanted, kind)):
            assert a.dtype == torch.float64
            assert (a - b).norm() < close * b.norm()
    if dtype == torch.float64:
        torch.testing.assert_close(found.margin, wanted.margin, atol=1e-5, rtol=1e-4)


def half_a_model(dtype: torch.dtype, first: float, last: float) -> tuple[nn.Module, Site]:
    """One neuron, which reads a 1 and adds to the first of two logits."""
    model = MLP(MlpConfig((1, 1, 2), bias=False)).to(dtype)
    with torch.no_grad():
        model.layers.linear_1.weight.fill_(first)
        model.layers.linear_2.weight.copy_(torch.tensor([[last], [0]]))
    return model, Site("layers.linear_2", model.layers.linear_2, ("layers.linear_1",), 1)


def test_half_precision_does_not_swallow_small_contributions() -> None:
    inputs = Inputs(None, None, torch.ones(1, 1), torch.tensor([0]))
    model, site = half_a_model(torch.float16, 2**-13, 2**-13)
    small = neurons.margin_contributions(model, Inputs(None, None, torch.ones(1, 1).half(), inputs.labels), [site])
    assert small.margin[0].item() == 2**-26  # less than the least float16 above 0
    model, site = half_a_model(torch.bfloat16, 1, 8)
    sure = neurons.margin_contributions(model, Inputs(None, None, torch.ones(1, 1).bfloat16(), inputs.labels), [site])
    assert sure.loss[0].item() == pytest.approx(8 / (1 + math.exp(8)), rel=0.01)  # where p is 1 in bfloat16


def test_a_padding_id_outside_the_vocabulary_is_no_target() -> None:
    model = flattened_tokens()
    model.embed = nn.Embedding(VOCABULARY + 1, 8)
    inputs = texts(6, 3)
    sites, _ = neurons.sites_of(model, inputs)
    expected = neurons.margin_contributions(model, inputs, sites)
    padded = Inputs(inputs.tokens.masked_fill(~inputs.mask, VOCABULARY), inputs.mask, None, None)
    torch.testing.assert_close(neurons.margin_contributions(model, padded, sites).loss, expected.loss)


def test_what_is_changed_after_it_was_read_counts_as_it_was_read() -> None:
    def forward(m: Any, x: Tensor, *, later: bool = True) -> Tensor:
        h = F.gelu(m.a(x))
        z = m.b(h)
        if later:
            h.mul_(100)
        return z

    layers = linear(a=(5, 6), b=(6, 3))
    changing = Fn(forward, **layers).requires_grad_(False)
    keeping = Fn(functools.partial(forward, later=False), **layers).requires_grad_(False)
    sites, _ = neurons.sites_of(changing, TABLE)
    found, expected = (neurons.margin_contributions(m, TABLE, sites) for m in (changing, keeping))
    assert torch.equal(found.margin[0], expected.margin[0])
    assert torch.equal(found.activation[0], expected.activation[0])


def test_weights_that_want_gradients_get_none_and_a_training_model_is_not_trained() -> None:
    model, sites = own("mlp")
    model.requires_grad_().train()
    with unchanged(model), torch.inference_mode():
        found = neurons.margin_contributions(model, TABLE, sites)
    expected = neurons.margin_contributions(built("mlp"), TABLE, sites_in("mlp"))
    torch.testing.assert_close(found.margin, expected.margin)
    dropping = MLP(MlpConfig((5, 7, 3), dropout=0.5, norm="batch")).train()
    with unchanged(dropping):
        sites, _ = neurons.sites_of(dropping, TABLE)
        once, again = (neurons.margin_contributions(dropping, TABLE, sites) for _ in range(2))
    assert torch.equal(once.margin[0], again.margin[0])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (Inputs(None, None, TABLE.features, None), "needs labels"),
        (Inputs(None, None, TABLE.features, torch.tensor([0, 1, 2, 3, 0, 0])), "label 3 does not fit a model of 3"),
        (Inputs(None, None, TABLE.features, torch.tensor([0, 1, -1, 1, 0, 0])), "label -1 does not fit a model of 3"),
    ],
)
def test_labels_that_are_missing_or_do_not_fit_are_told(inputs: Inputs, message: str) -> None:
    with unchanged(built("mlp")), pytest.raises(InputError, match=message):
        neurons.margin_contributions(built("mlp"), inputs, sites_in("mlp"))


def test_logits_that_are_none_of_a_class_or_token_are_told() -> None:
    one = MLP(MlpConfig((5, 7, 1)))
    with pytest.raises(InputError, match="two classes or more"):
        neurons.margin_contributions(one, TABLE, neurons.sites_of(one, TABLE)[0])
    tagger = BertForTokenClassification(BertConfig(**TEXT, **TINY, num_labels=3)).eval()
    with pytest.raises(InputError, match="3 logits a token are not over its vocabulary"):
        neurons.margin_contributions(tagger, PAIRS, neurons.sites_of(tagger, PAIRS)[0])
    maps = nn.Sequential(conv(1, 4), nn.ReLU(), conv(4, 3))
    with pytest.raises(InputError, match=r"shape \(5, 3, 8, 8\)"):
        neurons.margin_contributions(maps, IMAGES, neurons.sites_of(maps, IMAGES)[0])


# -- a linear read-out -------------------------------------------------------------------------------------------------


class Sharpened(nn.Module):
    """Its logits are twice what the last layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP(MlpConfig((6, 5, 3)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 2 * self.inner(x)
        return out


def test_readout_activations_are_the_last_layers_input_and_nothing_else() -> None:
    plain = MLP(MlpConfig((6, 5, 3))).eval()
    inputs = Inputs(None, None, torch.randn(4, 6), None)
    sites, _ = neurons.sites_of(plain, inputs)
    a = neurons.readout_activations(plain, inputs, sites[0])
    assert a is not None
    torch.testing.assert_close(plain.layers.linear_2(a), plain(inputs.features))
    deep = MLP(MlpConfig((6, 5, 4, 3))).eval()
    first, last = neurons.sites_of(deep, inputs)[0]
    assert neurons.readout_activations(deep, inputs, first) is None
    assert neurons.readout_activations(deep, inputs, last) is not None
    sharpened = Sharpened().eval()
    (site,), _ = neurons.sites_of(sharpened, inputs)
    assert neurons.readout_activations(sharpened, inputs, site) is None
