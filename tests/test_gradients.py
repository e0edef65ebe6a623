"""Per-example gradient norms are those of one backward per example, in whichever way they were taken."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from memdiag.errors import InputError
from memdiag.models.mlp import MLP, MlpConfig
from memdiag.observe import Inputs, call, gradients, losses
from memdiag.observe.gradients import GradientNormer, GradientNorms
from memdiag.observe.losses import row_squares

VOCABULARY, POISON = 40, 7
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}

# --- models and data -----------------------------------------------------------------------------------------------


class Fn(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def table(n: int, width: int = 5, k: int = 3, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    return Inputs(None, None, torch.randn(n, width, generator=g), torch.randint(k, (n,), generator=g))


def images(n: int, side: int = 8, k: int = 3, channels: int = 1) -> Inputs:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, side, side, generator=g)
    return Inputs(None, None, x, torch.randint(k, (n,), generator=g))


def sequences(n: int) -> Inputs:
    x = torch.randn(n, 7, 4, generator=torch.Generator().manual_seed(1))
    return Inputs(None, None, x, torch.arange(n) % 3)


def texts(*lengths: int, extra: int = 0, labelled: bool = False) -> Inputs:
    g = torch.Generator().manual_seed(2)
    tokens = torch.full((len(lengths), max(lengths) + extra), POISON)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, length in enumerate(lengths):
        tokens[i, :length] = torch.randint(8, VOCABULARY, (length,), generator=g)
        mask[i, :length] = True
    return Inputs(tokens, mask, None, torch.arange(len(lengths)) % 3 if labelled else None)


def some(inputs: Inputs, rows: Any) -> Inputs:
    parts = (None if x is None else x[rows] for x in (inputs.tokens, inputs.mask, inputs.features, inputs.labels))
    return Inputs(*parts)


def mlp(*widths: int, activation: str = "relu", bias: bool = True, **settings: Any) -> nn.Module:
    return MLP(MlpConfig(widths or (5, 8, 7, 3), activation, bias, **settings))


def conv_net() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(20, 3),
    )
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1), model[1].running_var.uniform_(0.5, 2)
    return model


def in_place() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu_(m.one(x.mul_(2)))
        return m.head(m.two(h).mul_(0.5).relu_())

    return Fn(forward, one=nn.Linear(5, 6), two=nn.Linear(6, 6), head=nn.Linear(6, 3))


def branching() -> nn.Module:
    """Its way depends on the values of an example."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.stack([m.one(row) if float(row.sum()) > 0 else m.two(row) for row in x])
        return m.head(torch.tanh(h))

    return Fn(forward, one=nn.Linear(5, 6), two=nn.Linear(5, 6), head=nn.Linear(6, 3))


class Doubled(torch.autograd.Function):
    """A custom operation without a rule for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * 2


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(x) * self.by


def custom_layer() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), Scale(), nn.Linear(6, 3))


def shared_layer() -> nn.Module:
    """One linear layer that is called twice: its gradients add up before the norm is taken."""
    return Fn(lambda m, x: m.head(F.relu(m.one(F.relu(m.one(x))))), one=nn.Linear(5, 5), head=nn.Linear(5, 3))


def shared_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    return model


def used_again() -> nn.Module:
    """A linear layer's own weight is used by something that is no layer."""
    return Fn(lambda m, x: m.head(F.relu(m.one(x) @ m.one.weight)), one=nn.Linear(5, 6), head=nn.Linear(5, 3))


def sequence_classifier() -> nn.Module:
    return Fn(lambda m, x: m.head(F.gelu(m.one(x)).mean(1)), one=nn.Linear(4, 6), head=nn.Linear(6, 3))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_head=2, n_layer=2, n_positions=32))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **TEXT, tie_word_embeddings=True))


def neox() -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **TEXT, max_position_embeddings=32))


def opt() -> nn.Module:
    settings = {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
    return OPTForCausalLM(OPTConfig(**{k: v for k, v in SIZES.items() if k != "intermediate_size"}, **TEXT, **settings))


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SIZES, **TEXT, num_labels=3))


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1, num_labels=3))


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """With the same weights every time, far enough from 0, frozen as a loaded checkpoint is."""
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = build().eval().requires_grad_(False)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.ndim > 1 else 0.1) + (p.mean() if p.ndim == 1 else 0))
    return model


def by_definition(model: nn.Module, inputs: Inputs) -> list[tuple[float, float]]:
    """(‖∂ loss / ∂θ‖, ‖∂ loss / ∂x‖) of each example, alone and without padding."""
    found = []
    parameters = list(model.parameters())
    for p in parameters:
        p.requires_grad_()
    for i in range(inputs.n_examples):
        x = None if inputs.features is None else inputs.features[i : i + 1].clone().requires_grad_()
        if inputs.tokens is not None and inputs.mask is not None:
            ids = inputs.tokens[i : i + 1, : int(inputs.mask[i].sum())]
            logits = model(ids).logits
        else:
            output = model(x.clone())
            logits = output if isinstance(output, Tensor) else output.logits
        if inputs.labels is not None:
            loss = -logits.log_softmax(1)[0, inputs.labels[i]]
        else:
            loss = -logits[0, :-1].log_softmax(1).gather(1, ids[0, 1:, None]).mean()
        slopes = torch.autograd.grad(loss, [*parameters, *([] if x is None else [x])], allow_unused=True)
        squares = [0.0 if g is None else float(g.double().square().sum()) for g in slopes]
        entered = math.nan if x is None else math.sqrt(squares.pop())
        found.append((math.sqrt(sum(squares)), entered))
    for p in parameters:
        p.requires_grad_(False)
    return found


# --- values by hand -----------------------------------------------------------------------------------------------


def test_grand_of_a_linear_softmax_by_hand():
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    # p = (⅓, ⅓, ⅓), so |p − e_y| = √(2/3), times √(|x|² + 1)
    x = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, -1.0], [1.0, 1.0]])
    inputs = Inputs(None, None, x, torch.tensor([0, 1, 2, 0]))
    found = GradientNormer(model, inputs, last_layer=True)(inputs)
    expected = [math.sqrt(2 / 3 * (float(row.square().sum()) + 1)) for row in x]
    np.testing.assert_allclose(found.whole, expected, rtol=1e-6)
    np.testing.assert_allclose(found.last_layer, expected, rtol=1e-6)


def test_grand_of_a_linear_softmax_is_el2n_times_the_length_of_input_and_bias():
    model, inputs = made(lambda: nn.Linear(5, 3)), table(20)
    found = GradientNormer(model, inputs, inputs=True)(inputs)
    slope = model(inputs.features).double().softmax(1) - F.one_hot(inputs.labels, 3)
    el2n, right = slope.norm(dim=1), inputs.features.double().square().sum(1).add(1).sqrt()
    np.testing.assert_allclose(found.whole, el2n * right, rtol=1e-6)
    np.testing.assert_allclose(found.inputs, (slope @ model.weight.double()).norm(dim=1), rtol=1e-6)


# --- the definition -----------------------------------------------------------------------------------------------

CASES = {
    "mlp": (mlp, lambda: table(9), "closed form"),
    "mlp without bias": (lambda: mlp(bias=False, activation="tanh"), lambda: table(9), "closed form"),
    "in place": (in_place, lambda: table(9), "closed form"),
    "mlp with norm": (lambda: mlp(norm="layer"), lambda: table(9), "vmap"),
    "shared layer": (shared_layer, lambda: table(9), "vmap"),
    "shared weight": (shared_weight, lambda: table(9), "vmap"),
    "weight used again": (used_again, lambda: table(9), "vmap"),
    "sequences": (sequence_classifier, lambda: sequences(6), "vmap"),
    "branching": (branching, lambda: table(9), "one by one"),
    "custom layer": (custom_layer, lambda: table(9), "one by one"),
    "conv": (conv_net, lambda: images(6), "vmap"),
    "vit": (vit, lambda: images(5), "vmap"),
    "gpt2": (gpt2, lambda: texts(9, 5, 12, 2), "vmap"),
    "llama": (llama, lambda: texts(9, 5, 12, 2), "vmap"),
    "neox": (neox, lambda: texts(9, 5, 12, 2), "vmap"),
    "opt": (opt, lambda: texts(9, 5, 12, 2), "vmap"),
    "bert": (bert, lambda: texts(9, 5, 12, 2, labelled=True), "one by one"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_norms_are_those_of_one_backward_per_example(name):
    build, data, way = CASES[name]
    model, inputs = made(build), data()
    has_features = inputs.features is not None
    normer = GradientNormer(model, inputs, inputs=True)
    found = normer(inputs)
    assert normer.way == way, normer.passed_over
    expected = np.array(by_definition(model, inputs))
    # float32; how far they are apart is the processor's: 3.4e-5 with a norm on one, below 2e-5 on another
    np.testing.assert_allclose(found.whole, expected[:, 0], rtol=1e-4)
    if has_features:
        np.testing.assert_allclose(found.inputs, expected[:, 1], rtol=1e-4, atol=1e-6)
    else:
        assert found.inputs is None
    assert found.last_layer is None
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["mlp", "conv", "gpt2", "branching"])
def test_each_way_that_fits_gives_the_same_norms(name):
    build, data, _ = CASES[name]
    model, inputs = made(build), data()
    normer = GradientNormer(model, inputs)
    found = {}
    for way in ("closed form", "vmap", "one by one"):
        if way not in normer.passed_over:
            normer.way = way
            found[way] = normer(inputs).whole
    for values in found.values():
        np.testing.assert_allclose(values, found["one by one"], rtol=1e-5)
    assert len(found) == {"mlp": 3, "conv": 2, "gpt2": 2, "branching": 1}[name]


def test_it_says_why_it_passed_a_faster_way_over():
    def reason(name: str, way: str) -> str:
        return GradientNormer(made(CASES[name][0]), CASES[name][1]()).passed_over[way]

    assert reason("shared weight", "closed form") == "linear layers share a parameter"
    assert reason("shared layer", "closed form") == "a linear layer is called more than once"
    assert reason("weight used again", "closed form") == "it does not agree with one backward per example"
    assert reason("sequences", "closed form").startswith("a linear layer's input has shape (3, 7, 4)")
    assert reason("mlp with norm", "closed form") == "layers.norm_1.weight is no parameter of a linear layer"
    assert "data-dependent" in reason("branching", "vmap")


def test_the_closed_form_equals_vmap_for_many_examples():
    model, inputs = made(lambda: mlp(64, 128, 128, 10)), table(256, 64, 10)
    normer = GradientNormer(model, inputs, inputs=True)
    closed = normer(inputs)
    normer.way = "vmap"
    vmapped = normer(inputs)
    np.testing.assert_allclose(closed.whole, vmapped.whole, rtol=1e-5)
    np.testing.assert_allclose(closed.inputs, vmapped.inputs, rtol=1e-5)


# --- last layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "mlp without bias", "conv", "vit", "branching", "bert"])
def test_the_last_layer_is_the_one_that_gives_the_logits(name):
    build, data, _ = CASES[name]
    model, inputs = made(build), data()
    normer = GradientNormer(model, inputs, last_layer=True)
    assert normer.no_last_layer is None
    alone = GradientNormer(model, inputs, whole=False, last_layer=True)(inputs)
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    for p in model.parameters():
        p.requires_grad_(any(p is q for q in last.parameters()))
    expected = []
    for i in range(inputs.n_examples):
        one = some(inputs, slice(i, i + 1))
        logits = call(model, Inputs(one.tokens, one.mask, one.features, None))
        loss = F.cross_entropy(logits, one.labels)
        slopes = torch.autograd.grad(loss, list(last.parameters()))
        expected.append(math.sqrt(sum(float(g.double().square().sum()) for g in slopes)))
    model.requires_grad_(False)
    np.testing.assert_allclose(normer(inputs).last_layer, expected, rtol=2e-5)
    np.testing.assert_allclose(alone.last_layer, expected, rtol=2e-5)
    assert alone.whole is None


@pytest.mark.parametrize(
    ("build", "data", "reason"),
    [
        (gpt2, lambda: texts(9, 5), "language model"),
        (lambda: nn.Sequential(nn.Linear(5, 3), nn.Softplus()), lambda: table(4), "no nn.Linear"),
        (lambda: Fn(lambda m, x: m.one(F.relu(m.one(x))), one=nn.Linear(5, 5)), lambda: table(4, k=5), "elsewhere"),
    ],
)
def test_where_there_is_no_last_layer_it_says_why(build, data, reason):
    inputs = data()
    normer = GradientNormer(made(build), inputs, last_layer=True)
    assert reason in normer.no_last_layer
    assert normer(inputs).last_layer is None


# --- invariances --------------------------------------------------------------------------------------------------


def joined(parts: list[GradientNorms]) -> np.ndarray:
    return np.concatenate([part.whole for part in parts])


@pytest.mark.parametrize("name", ["mlp", "conv", "gpt2", "llama", "branching", "bert"])
def test_batch_size_order_and_padding_do_not_matter(name):
    build, data, _ = CASES[name]
    model, inputs = made(build), data()
    normer = GradientNormer(model, inputs)
    whole = normer(inputs).whole
    single = joined([normer(some(inputs, slice(i, i + 1))) for i in range(inputs.n_examples)])
    np.testing.assert_allclose(single, whole, rtol=1e-5)
    order = torch.randperm(inputs.n_examples, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(normer(some(inputs, order)).whole, whole[order.numpy()], rtol=1e-5)
    if inputs.tokens is not None:
        other = Inputs(inputs.tokens.clone(), inputs.mask, None, inputs.labels)
        other.tokens[~other.mask] = VOCABULARY - 1
        wider = Inputs(F.pad(other.tokens, (0, 3), value=3), F.pad(other.mask, (0, 3)), None, other.labels)
        for padded in (other, wider):
            np.testing.assert_allclose(normer(padded).whole, whole, rtol=1e-5)


def test_vmap_in_small_chunks_gives_the_same(monkeypatch):
    model, inputs = made(conv_net), images(7)
    whole = GradientNormer(model, inputs, inputs=True)(inputs)
    n_bytes = 4 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(gradients, "VMAP_BYTES", 2 * n_bytes)
    normer = GradientNormer(model, inputs, inputs=True)
    assert normer.way == "vmap"
    chunked = normer(inputs)
    np.testing.assert_allclose(chunked.whole, whole.whole, rtol=1e-5)
    np.testing.assert_allclose(chunked.inputs, whole.inputs, rtol=1e-5)
    monkeypatch.setattr(gradients, "VMAP_BYTES", 2 * n_bytes - 1)
    assert GradientNormer(model, inputs).way == "one by one"


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_attention_is_run_in_a_way_that_vmap_knows(name):
    build, data, _ = CASES[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        assert GradientNormer(made(build), data()).way == "vmap"


def test_squares_are_summed_in_float64_piece_by_piece(monkeypatch):
    x = torch.full((3, 1000), 1e-3) + torch.tensor([[1e4], [0.0], [1.0]])
    expected = x.double().square().sum(1)
    monkeypatch.setattr(losses, "_CHUNK", 7)
    torch.testing.assert_close(row_squares(x), expected, rtol=1e-12, atol=0)


def test_a_model_that_mixes_examples_is_run_one_by_one():
    model = made(lambda: Fn(lambda m, x: m.one(x - x.mean(0) / 2), one=nn.Linear(5, 3)))
    inputs = table(8)
    normer = GradientNormer(model, inputs)
    assert normer(inputs).whole == pytest.approx(np.array(by_definition(model, inputs))[:, 0], rel=1e-5)


def test_a_branch_that_the_probe_did_not_take_is_still_right():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.one(m.one(x)) if len(x) > 4 else m.one(x))

    model = made(lambda: Fn(forward, one=nn.Linear(5, 5), head=nn.Linear(5, 3)))
    inputs = table(8)
    normer = GradientNormer(model, inputs)
    assert normer.way == "closed form"
    assert normer(inputs).whole == pytest.approx(np.array(by_definition(model, inputs))[:, 0], rel=1e-5)
    assert normer.way == "one by one"


def test_the_model_is_left_as_it_was():
    model = made(lambda: mlp(5, 8, 3, dropout=0.5))
    model.train()
    model.layers.linear_1.weight.requires_grad_(True)
    inputs = table(6)
    before = inputs.features.clone()
    normer = GradientNormer(model, inputs, last_layer=True, inputs=True)
    for way in ("closed form", "vmap", "one by one"):
        normer.way = way
        values = normer(inputs).whole
        np.testing.assert_allclose(values, np.array(by_definition(model.eval(), inputs))[:, 0], rtol=1e-5)
        model.train().requires_grad_(False)
        model.layers.linear_1.weight.requires_grad_(True)
        normer(inputs)
        assert all(m.training for m in model.modules())
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["layers.linear_1.weight"]
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(inputs.features, before)
    assert not inputs.features.requires_grad


# --- what a norm means --------------------------------------------------------------------------------------------


def test_el2n_bounds_hold_for_the_last_layer_of_every_example():
    model, inputs = made(lambda: mlp(5, 8, 4)), table(200, k=4)
    model.layers.linear_2.weight.mul_(8)
    found = GradientNormer(model, inputs, last_layer=True)(inputs).last_layer
    h = F.relu(model.layers.linear_1(inputs.features)).double()
    el2n = found / h.square().sum(1).add(1).sqrt().numpy()
    p = model(inputs.features).double().softmax(1).gather(1, inputs.labels[:, None])[:, 0].numpy()
    assert (el2n >= (1 - p) * math.sqrt(4 / 3) - 1e-6).all()
    assert (el2n <= (1 - p) * math.sqrt(2) + 1e-6).all()


def test_at_initialisation_grand_is_about_the_length_of_the_input_and_no_noise_detector():
    pytest.importorskip("sklearn")
    from scipy.stats import spearmanr
    from sklearn.datasets import load_digits
    from sklearn.metrics import roc_auc_score

    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    corrupted = rng.random(len(labels)) < 0.1
    labels = np.where(corrupted, (labels + rng.integers(1, 10, len(labels))) % 10, labels)
    x = torch.from_numpy((pixels / 16 - 0.305) / 0.376).float()
    inputs = Inputs(None, None, x, torch.from_numpy(labels))
    total = np.zeros(len(labels))
    for seed in range(10):
        with torch.random.fork_rng():
            torch.random.manual_seed(seed)
            model = mlp(64, 128, 128, 10)
        total += GradientNormer(model, inputs)(inputs).whole
    assert spearmanr(total, x.norm(dim=1)).statistic > 0.8
    assert 0.4 < roc_auc_score(corrupted, total) < 0.6


def test_what_a_sure_model_gets_right_has_the_norm_of_its_small_error():
    model = nn.Linear(2, 3).requires_grad_(False)
    model.weight.zero_(), model.bias.copy_(torch.tensor([20.0, 0.0, 0.0]))
    inputs = Inputs(None, None, torch.zeros(2, 2), torch.tensor([0, 1]))
    found = GradientNormer(model, inputs, last_layer=True)(inputs)
    e = math.exp(-20)
    p = np.array([1, e, e]) / (1 + 2 * e)
    expected = [math.sqrt((2 * p[1]) ** 2 + 2 * p[1] ** 2), math.sqrt(p[0] ** 2 + (1 - p[1]) ** 2 + p[2] ** 2)]
    np.testing.assert_allclose(found.whole, expected, rtol=1e-6)
    np.testing.assert_allclose(found.last_layer, expected, rtol=1e-6)


# --- edges --------------------------------------------------------------------------------------------------------


def test_a_text_of_one_token_has_no_gradient_and_harms_no_other():
    model = made(gpt2)
    normer = GradientNormer(model, texts(9, 5))
    inputs = texts(1, 6, 1, 4)
    found = normer(inputs).whole
    assert np.isnan(found[[0, 2]]).all()
    alone = [normer(losses.rows_of(inputs, torch.tensor([i]))).whole[0] for i in (1, 3)]
    np.testing.assert_allclose(found[[1, 3]], alone, rtol=1e-5)
    assert np.isnan(normer(texts(1, 1)).whole).all()
    short = GradientNormer(model, texts(1, 1))
    assert short.way == "one by one"
    np.testing.assert_allclose(short(inputs).whole, found, rtol=1e-5)


def test_one_example_none_and_one_class():
    model = made(mlp)
    normer = GradientNormer(model, table(1), last_layer=True, inputs=True)
    assert normer.way == "closed form"
    empty = normer(some(table(3), slice(0, 0)))
    assert [len(x) for x in (empty.whole, empty.last_layer, empty.inputs)] == [0, 0, 0]
    with pytest.raises(InputError, match="at least one example"):
        GradientNormer(model, some(table(3), slice(0, 0)))
    inputs = Inputs(None, None, torch.randn(4, 5), torch.zeros(4, dtype=torch.int64))
    assert (GradientNormer(made(lambda: mlp(5, 1)), inputs)(inputs).whole == 0).all()  # p = 1 whatever the input is


def test_an_example_of_nan_is_nan_alone():
    for name in ("mlp", "conv", "branching"):
        build, data, way = CASES[name]
        model, inputs = made(build), data()
        normer = GradientNormer(model, inputs, inputs=True)
        clean = normer(inputs)
        inputs.features[2] = math.nan
        found = normer(inputs)
        assert normer.way == way
        others = np.arange(inputs.n_examples) != 2
        assert np.isnan(found.whole[2])
        np.testing.assert_allclose(found.whole[others], clean.whole[others], rtol=1e-5)


def test_half_precision_is_as_exact_as_it_can_be():
    model, inputs = made(lambda: mlp(16, 32, 3)), table(8, 16)
    exact = GradientNormer(model, inputs)(inputs).whole
    half = Inputs(None, None, inputs.features.bfloat16(), inputs.labels)
    normer = GradientNormer(model.bfloat16(), half)
    assert normer.way == "closed form"
    np.testing.assert_allclose(normer(half).whole, exact, rtol=0.05)


def test_wrong_labels_are_named():
    normer = GradientNormer(made(mlp), table(4))
    for label in (3, -1):
        inputs = table(4)
        inputs.labels[2] = label
        with pytest.raises(InputError, match=rf"label {label} does not fit a model of 3 classes"):
            normer(inputs)
    with pytest.raises(InputError, match="need labels"):
        normer(Inputs(None, None, torch.zeros(2, 5), None))


def test_a_probe_without_any_gradient_decides_nothing():
    model = made(lambda: Fn(lambda m, x: m.one(x) * 0, one=nn.Linear(5, 3)))
    normer = GradientNormer(model, table(4))
    assert normer.way == "one by one"
    assert (normer(table(4)).whole == 0).all()
    sure = made(mlp)  # no gradient for the classes that it predicts, but one for others
    sure.layers.linear_3.bias[1] = 1e4
    sure_of = Inputs(None, None, table(4).features, sure(table(4).features).argmax(1))
    normer = GradientNormer(sure, sure_of)
    assert normer.way == "closed form"
    assert (normer(sure_of).whole == 0).all()
    dead = made(mlp)  # no input gradient at all, but one of the weights
    dead.layers.linear_2.bias.fill_(-100)
    assert GradientNormer(dead, table(4), inputs=True).way == "closed form"
    assert (GradientNormer(dead, table(4), inputs=True)(table(4)).inputs == 0).all()


def test_a_model_without_such_a_loss_is_refused():
    with pytest.raises(InputError, match="look ahead"):
        GradientNormer(made(lambda: BertForMaskedLM(BertConfig(**SIZES, **TEXT))), texts(9, 5))
    with pytest.raises(InputError, match=r"shape \(1, 7, 3\)"):
        GradientNormer(made(lambda: nn.Linear(4, 3)), Inputs(None, None, torch.zeros(2, 7, 4), None))

    def cut_off(m: Any, x: Tensor) -> Tensor:
        return m.one(x).detach()

    with pytest.raises(InputError, match="cannot be differentiated"):
        GradientNormer(made(lambda: Fn(cut_off, one=nn.Linear(5, 3))), table(4))
