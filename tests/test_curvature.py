"""tr H and tr H² of the loss around an example: exact for piecewise linear networks, estimated for others."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from memdiag.errors import InputError
from memdiag.models.mlp import MLP, MlpConfig
from memdiag.observe import Inputs, curvature
from memdiag.observe.curvature import Curvature


class Fn(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def table(n: int, width: int = 5, k: int = 3, dtype: torch.dtype = torch.float32) -> Inputs:
    g = torch.Generator().manual_seed(0)
    return Inputs(None, None, torch.randn(n, width, generator=g).to(dtype), torch.randint(k, (n,), generator=g))


def images(n: int) -> Inputs:
    return Inputs(None, None, torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3)


def mlp(*widths: int, activation: str = "relu", **settings: Any) -> nn.Module:
    return MLP(MlpConfig(widths or (5, 8, 7, 3), activation, **settings))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def made(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return build().eval().requires_grad_(False)


def hessian(model: nn.Module, inputs: Inputs, i: int) -> np.ndarray:
    """(d, d) by torch.func, which knows nothing of how the network is made."""
    x, y = inputs.features[i], inputs.labels[i : i + 1]

    def loss(flat: Tensor) -> Tensor:
        return F.cross_entropy(model(flat.view(1, *x.shape)), y)

    return torch.func.hessian(loss)(x.flatten()).double().numpy()


def trace(model: nn.Module, inputs: Inputs, **settings: Any) -> np.ndarray:
    return Curvature(model, inputs, **settings)(inputs, np.arange(inputs.n_examples)).trace


# --- values by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0, 1, 2])
def test_the_curvature_of_a_linear_softmax_by_hand_whatever_the_label(label):
    model = nn.Linear(2, 3, bias=False).requires_grad_(False)
    model.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]]))
    inputs = Inputs(None, None, torch.tensor([[0.3, -0.2]], dtype=torch.float64), torch.tensor([label]))
    curved = Curvature(model.double(), inputs, squared=True)
    assert curved.way == "exact"
    found = curved(inputs, np.array([0]))
    np.testing.assert_allclose(found.trace, [1.366887398], rtol=1e-8)
    np.testing.assert_allclose(found.trace_of_square, [1.323301863], rtol=1e-8)


# --- exact --------------------------------------------------------------------------------------------------------

PIECEWISE_LINEAR = {
    "relu": (mlp, lambda: table(8)),
    "with batch norm": (lambda: mlp(norm="batch"), lambda: table(8)),
    "leaky": (lambda: nn.Sequential(nn.Linear(5, 7), nn.LeakyReLU(), nn.Linear(7, 3)), lambda: table(8)),
    "conv": (conv_net, lambda: images(4)),
}


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_it_is_the_trace_of_the_hessian_of_a_piecewise_linear_network(name):
    build, data = PIECEWISE_LINEAR[name]
    model, inputs = made(build), data()
    curved = Curvature(model, inputs, squared=True)
    assert (curved.way, curved.why) == ("exact", None)
    found = curved(inputs, np.arange(inputs.n_examples))
    expected = [hessian(model, inputs, i) for i in range(inputs.n_examples)]
    np.testing.assert_allclose(found.trace, [np.trace(h) for h in expected], rtol=1e-4)
    np.testing.assert_allclose(found.trace_of_square, [np.square(h).sum() for h in expected], rtol=1e-4)
    assert Curvature(model, inputs)(inputs, np.arange(inputs.n_examples)).trace_of_square is None
    np.testing.assert_allclose(trace(model, inputs), found.trace, rtol=1e-12)


def test_no_label_is_needed_and_none_changes_it():
    model, inputs = made(mlp), table(8)
    given = trace(model, inputs)
    for labels in (None, (inputs.labels + 1) % 3):
        assert (trace(model, Inputs(None, None, inputs.features, labels)) == given).all()


def test_no_digits_are_lost_where_the_model_is_sure():
    model = nn.Linear(4, 3).requires_grad_(False)
    model.weight.copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    model.bias.copy_(torch.tensor([25.0, 0.0, 0.0]))
    inputs = table(3, 4)
    found = Curvature(model, inputs, squared=True)(inputs, np.arange(3))
    for i, z in enumerate(model(inputs.features).tolist()):
        e = [Fraction(math.exp(each - z[0])) for each in z]
        p, w = [each / sum(e) for each in e], [[Fraction(x) for x in row] for row in model.weight.tolist()]
        s = [[(c == d) * p[c] - p[c] * p[d] for d in range(3)] for c in range(3)]  # exact, as p (1 − p) needs it
        pairs = [(c, d) for c in range(3) for d in range(3)]
        h = [[sum(w[c][j] * s[c][d] * w[d][k] for c, d in pairs) for k in range(4)] for j in range(4)]
        assert found.trace[i] == pytest.approx(float(sum(h[j][j] for j in range(4))), rel=1e-5, abs=0)
        assert found.trace_of_square[i] == pytest.approx(float(sum(x * x for row in h for x in row)), rel=1e-5, abs=0)
        assert found.trace[i] < 1e-7


def test_few_examples_at_a_time_give_the_same(monkeypatch):
    model, inputs = made(mlp), table(9)
    whole = Curvature(model, inputs, squared=True)(inputs, np.arange(9))
    monkeypatch.setattr(curvature, "GRAM_BYTES", 1)
    found = Curvature(model, inputs, squared=True)(inputs, np.arange(9))
    np.testing.assert_allclose(found.trace_of_square, whole.trace_of_square, rtol=1e-5)
    np.testing.assert_allclose(found.trace, whole.trace, rtol=1e-5)


# --- which way ----------------------------------------------------------------------------------------------------


def hidden(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """What it does between its layers is no module."""
    return Fn(lambda m, x: m.two(function(m.one(x))), one=nn.Linear(5, 7), two=nn.Linear(7, 3))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: mlp(activation="tanh"), r"layers.act_1 \(Tanh\)"),
        (lambda: mlp(activation="square"), r"layers.act_1 \(Square\)"),
        (lambda: mlp(norm="layer"), r"layers.norm_1 \(LayerNorm\)"),
        (lambda: hidden(torch.tanh), "second derivative"),
        (lambda: hidden(lambda h: h * h.relu()), "second derivative"),
        (lambda: hidden(F.softplus), "second derivative"),
    ],
)
def test_a_network_that_is_not_piecewise_linear_is_found_out(build, reason):
    curved = Curvature(made(build), table(6))
    assert curved.way == "hutchinson"
    assert re.search(reason, curved.why)


def test_a_relu_that_is_no_module_is_exact_all_the_same():
    assert Curvature(made(lambda: hidden(F.relu)), table(6)).way == "exact"


# --- Hutchinson ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [lambda: mlp(activation="tanh"), lambda: mlp(activation="gelu", norm="layer")])
def test_the_estimate_is_the_mean_over_its_vectors(build):
    model, inputs = made(lambda: build().double()), table(4, dtype=torch.float64)
    rows = np.array([5, 0, 900, 3])
    curved = Curvature(model, inputs, n_probes=4, seed=2, squared=True)
    found = curved(inputs, rows)
    for i, row in enumerate(rows):
        rng, h = np.random.default_rng(np.random.SeedSequence((2, int(row)))), hessian(model, inputs, i)
        v = np.stack([rng.integers(0, 2, 5, dtype=np.int8) * 2.0 - 1 for _ in range(4)])
        assert found.trace[i] == pytest.approx(np.mean([u @ h @ u for u in v]), rel=1e-8)
        assert found.trace_of_square[i] == pytest.approx(np.mean([np.square(h @ u).sum() for u in v]), rel=1e-8)


def test_the_estimate_comes_near_the_hessian_of_a_smooth_network():
    model, inputs = made(lambda: mlp(activation="tanh").double()), table(12, dtype=torch.float64)
    found = Curvature(model, inputs, n_probes=2000, squared=True)(inputs, np.arange(12))
    h = [hessian(model, inputs, i) for i in range(12)]
    np.testing.assert_allclose(found.trace, [np.trace(x) for x in h], rtol=0.1, atol=0.01)
    np.testing.assert_allclose(found.trace_of_square, [np.square(x).sum() for x in h], rtol=0.1)


def test_the_estimate_agrees_with_the_exact_value_on_a_relu_network():
    from scipy.stats import spearmanr

    model, inputs = made(lambda: mlp(20, 32, 32, 5).double()), table(100, 20, 5, dtype=torch.float64)
    model.layers.linear_3.weight.mul_(6)
    inputs.features *= torch.logspace(-1, 1, 100)[:, None]
    exact = Curvature(model, inputs, squared=True)
    expected = exact(inputs, np.arange(100))
    other = Curvature(model, inputs, n_probes=200, squared=True)
    other.way = "hutchinson"
    found = other(inputs, np.arange(100))
    assert found.trace_of_square.mean() == pytest.approx(expected.trace_of_square.mean(), rel=0.02)
    assert np.median(np.abs(found.trace_of_square / expected.trace_of_square - 1)) < 0.08
    assert spearmanr(found.trace_of_square, expected.trace_of_square).statistic > 0.995
    assert found.trace.mean() == pytest.approx(expected.trace.mean(), rel=0.02)


def test_the_label_matters_to_a_smooth_network():
    model, inputs = made(lambda: mlp(activation="tanh")), table(8)
    other = Inputs(None, None, inputs.features, (inputs.labels + 1) % 3)
    assert not np.allclose(trace(model, inputs), trace(model, other), rtol=1e-3)


def test_attention_is_differentiated_twice():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, image_size=4, patch_size=2, num_channels=1, num_labels=3)
    model = made(lambda: ViTForImageClassification(config))
    inputs = Inputs(None, None, torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(2))
    curved = Curvature(model, inputs, n_probes=3)
    assert curved.way == "hutchinson"
    found = curved(inputs, np.arange(2))
    g = [np.random.default_rng(np.random.SeedSequence((0, i))) for i in range(2)]
    for i in range(2):
        x, y = inputs.features[i], inputs.labels[i : i + 1]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            h = torch.autograd.functional.hessian(
                lambda z, x=x, y=y: F.cross_entropy(model(z.view(1, *x.shape)).logits, y), x.flatten()
            )
        v = np.stack([g[i].integers(0, 2, 16, dtype=np.int8) * 2.0 - 1 for _ in range(3)])
        assert found.trace[i] == pytest.approx(np.einsum("ni,ij,nj->n", v, h.double().numpy(), v).mean(), rel=1e-3)


# --- invariances --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_batch_size_and_order_do_not_matter(activation):
    model, inputs = made(lambda: mlp(activation=activation)), table(9)
    curved, rows = Curvature(model, inputs, squared=True), np.arange(100, 109)
    whole = curved(inputs, rows)
    order = np.array([4, 1, 8, 0, 2, 7, 5, 3, 6])
    for size in (1, 4):
        parts = [order[i : i + size] for i in range(0, 9, size)]
        some = [curved(Inputs(None, None, inputs.features[p], inputs.labels[p]), rows[p]) for p in parts]
        np.testing.assert_allclose(np.concatenate([s.trace for s in some]), whole.trace[order], rtol=1e-4, atol=1e-6)
        squares = np.concatenate([s.trace_of_square for s in some])
        np.testing.assert_allclose(squares, whole.trace_of_square[order], rtol=1e-4)


def test_the_seed_and_the_row_choose_the_vectors():
    model, inputs = made(lambda: mlp(activation="tanh")), table(2)
    inputs.features[1], inputs.labels[1] = inputs.features[0], inputs.labels[0]
    curved = Curvature(model, inputs, n_probes=2)
    found = curved(inputs, np.array([3, 4])).trace
    assert found[0] != pytest.approx(found[1], rel=1e-4)
    assert curved(inputs, np.array([3, 3])).trace == pytest.approx(found[0], rel=1e-6)  # rounding goes by the place
    assert Curvature(model, inputs, n_probes=2, seed=1)(inputs, np.array([3, 4])).trace[0] != found[0]


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_model_and_the_batch_are_left_as_they_were(activation):
    model, inputs = made(lambda: mlp(activation=activation, dropout=0.5)).train(), table(5)
    before = inputs.features.clone()
    curved = Curvature(model, inputs)
    first = curved(inputs, np.arange(5)).trace
    assert (curved(inputs, np.arange(5)).trace == first).all()  # no dropout
    assert all(m.training for m in model.modules())
    assert not inputs.features.requires_grad
    assert torch.equal(inputs.features, before)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


# --- edges --------------------------------------------------------------------------------------------------------


def test_one_example_none_one_class_and_nan():
    for activation in ("relu", "tanh"):
        model, inputs = made(lambda activation=activation: mlp(activation=activation)), table(4)
        curved = Curvature(model, table(1))
        assert len(curved(Inputs(None, None, torch.zeros(0, 5), torch.zeros(0).long()), np.zeros(0, int)).trace) == 0
        clean = curved(inputs, np.arange(4)).trace
        inputs.features[1] = math.nan
        found = curved(inputs, np.arange(4)).trace
        assert np.isnan(found[1])
        np.testing.assert_allclose(found[[0, 2, 3]], clean[[0, 2, 3]], rtol=1e-4)
    one_class = Inputs(None, None, torch.randn(3, 5), torch.zeros(3, dtype=torch.int64))
    assert (trace(made(lambda: mlp(5, 4, 1)), one_class) == 0).all()


def test_a_linear_model_of_a_constant_has_none():
    model = made(lambda: Fn(lambda m, x: m.one(x * 0), one=nn.Linear(5, 3)))
    assert (trace(model, table(3)) == 0).all()


def test_what_has_no_curvature_says_why():
    model = made(lambda: mlp(activation="tanh"))
    texts = Inputs(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool), None, torch.arange(2))
    with pytest.raises(InputError, match="needs features"):
        Curvature(model, texts)
    with pytest.raises(InputError, match="at least one example"):
        Curvature(model, Inputs(None, None, torch.zeros(0, 5), None))
    with pytest.raises(InputError, match="at least 1 probe vector, got 0"):
        Curvature(model, table(3), n_probes=0)
    with pytest.raises(InputError, match="need labels"):
        Curvature(model, table(3))(Inputs(None, None, torch.zeros(2, 5), None), np.arange(2))
    with pytest.raises(ValueError, match="each of 3 examples, got 2"):
        Curvature(model, table(3))(table(3), np.arange(2))
    with pytest.raises(InputError, match="no second derivative"):
        Curvature(made(lambda: Fn(lambda m, x: m.one(x).detach(), one=nn.Linear(5, 3))), table(3))
