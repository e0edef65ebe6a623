"""m-coherence is |Σ g|² / Σ |g|² of the gradients that one backward per example gives, however they are split up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from memdiag.errors import InputError
from memdiag.models.mlp import MLP, MlpConfig
from memdiag.observe import Inputs, coherence
from memdiag.observe.coherence import Coherence, m_coherence
from memdiag.observe.gradients import GradientNormer
from memdiag.observe.losses import rows_of

VECTORS = {
    "identical": ([[1, 0]] * 4, 4.0),
    "orthonormal": (np.eye(4).tolist(), 1.0),
    "opposite": ([[1, 0], [-1, 0]], 0.0),
    "two alike": ([[1, 0], [1, 0], [0, 1]], 5 / 3),
    "of two lengths": ([[2, 0], [1, 0], [0, 1]], 5 / 3),
}


class Toy(nn.Module):
    """Two classes with the logits (w · x, 0) and w = 0, so that the gradient of an example of class 0 is −x / 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad((x @ self.w)[:, None], (0, 1))


def mlp(*widths: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return MLP(MlpConfig(widths)).requires_grad_(False)


def table(n: int, k: int = 3) -> Inputs:
    g = torch.Generator().manual_seed(0)
    return Inputs(None, None, torch.randn(n, 5, generator=g), torch.randint(k, (n,), generator=g))


def texts(*lengths: int) -> Inputs:
    g = torch.Generator().manual_seed(2)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Inputs(torch.randint(8, 40, mask.shape, generator=g), mask, None, None)


def added(model: nn.Module, inputs: Inputs, n_classes: int | None, size: int = 10**9) -> Coherence:
    found, normer = Coherence(n_classes), GradientNormer(model, inputs)
    for rows in torch.arange(inputs.n_examples).split(size):
        batch = rows_of(inputs, rows)
        found.add(model, batch, normer(batch).whole ** 2)
    return found


def gradients_of(model: nn.Module, inputs: Inputs) -> np.ndarray:
    """(b, all parameters) float64, one backward each."""
    model.requires_grad_(True)
    found = []
    for i in range(inputs.n_examples):
        loss = F.cross_entropy(model(inputs.features[i : i + 1]), inputs.labels[i : i + 1])
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    model.requires_grad_(False)
    return torch.stack(found).double().numpy()


def by_definition(g: np.ndarray) -> float:
    return float(np.square(g.sum(0)).sum() / np.square(g).sum())


# --- values by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VECTORS)
def test_known_vectors_have_their_known_coherence(name):
    vectors, expected = VECTORS[name]
    g = torch.tensor(vectors, dtype=torch.float32)
    assert m_coherence(g.sum(0), float(g.square().sum())) == pytest.approx(expected, abs=1e-6)
    inputs = Inputs(None, None, g, torch.zeros(len(g), dtype=torch.int64))
    found = added(Toy(g.shape[1]), inputs, 2).values()
    assert found["overall"] == pytest.approx(expected, abs=1e-6)
    assert found["per_class"] == {0: pytest.approx(expected, abs=1e-6)}
    assert found["m"] == len(g)
    assert found["m_per_class"] == {0: len(g)}


def test_opposite_labels_cancel_overall_but_not_in_their_classes():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = added(Toy(2), Inputs(None, None, x, torch.tensor([0, 1, 0, 1])), 2).values()
    assert found["overall"] == pytest.approx(0, abs=1e-6)
    assert found["per_class"] == {0: pytest.approx(2), 1: pytest.approx(2)}


# --- the definition and invariances -------------------------------------------------------------------------------


def test_it_is_the_ratio_of_the_gradients_of_one_backward_per_example():
    model, inputs = mlp(5, 8, 3), table(40)
    g, labels = gradients_of(model, inputs), inputs.labels.numpy()
    found = added(model, inputs, 3, size=7).values()
    assert found["overall"] == pytest.approx(by_definition(g), rel=1e-5)
    assert found["per_class"] == {k: pytest.approx(by_definition(g[labels == k]), rel=1e-5) for k in range(3)}
    assert found["m_per_class"] == {k: int((labels == k).sum()) for k in range(3)}
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_batches_and_order_do_not_matter():
    model, inputs = mlp(5, 8, 3), table(40)
    whole = added(model, inputs, 3).values()
    for size in (1, 7):
        other = added(
            model, rows_of(inputs, torch.randperm(40, generator=torch.Generator().manual_seed(size))), 3, size
        )
        assert other.values()["overall"] == pytest.approx(whole["overall"], rel=1e-5)
        for k, value in other.values()["per_class"].items():
            assert value == pytest.approx(whole["per_class"][k], rel=1e-5)


def test_two_processes_merged_are_one():
    model, inputs = mlp(5, 8, 3), table(40)
    inputs.labels[:20] = inputs.labels[:20] % 2  # a class that only the second process has
    whole = added(model, inputs, 3).values()
    first, second = (added(model, rows_of(inputs, part), 3) for part in torch.arange(40).split(20))
    before = second.values()
    total = Coherence(3)
    for part in (first, second):
        total.merge(part)
    assert second.values() == before
    assert total.values()["overall"] == pytest.approx(whole["overall"], rel=1e-5)
    assert total.values()["per_class"] == {k: pytest.approx(v, rel=1e-5) for k, v in whole["per_class"].items()}
    assert total.values()["m_per_class"] == whole["m_per_class"]
    with pytest.raises(ValueError, match="coherence of 3 classes"):
        total.merge(Coherence(None))


def test_too_many_classes_leave_the_overall_sum_alone(monkeypatch):
    model, inputs = mlp(5, 8, 3), table(20)
    whole = added(model, inputs, 3).values()
    monkeypatch.setattr(coherence, "MOST_BYTES", 3 * 4 * sum(p.numel() for p in model.parameters()))
    assert added(model, inputs, 3).values() == whole
    monkeypatch.setattr(coherence, "MOST_BYTES", coherence.MOST_BYTES - 1)
    found = added(model, inputs, 3)
    assert found.values()["per_class"] == {}
    assert found.values()["m"] == 20
    assert found.values()["overall"] == pytest.approx(whole["overall"], rel=1e-5)


def test_a_language_model_has_one_sum_and_its_short_texts_are_left_out():
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=2, n_positions=32)).eval()
    model.requires_grad_(False)
    inputs = texts(9, 1, 5, 12)
    found = added(model, inputs, None).values()
    model.requires_grad_(True)
    slopes = []
    for i, length in ((0, 9), (2, 5), (3, 12)):
        ids = inputs.tokens[i : i + 1, :length]
        loss = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
        slopes.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert found["overall"] == pytest.approx(by_definition(torch.stack(slopes).double().numpy()), rel=1e-5)
    assert (found["m"], found["per_class"]) == (3, {})


# --- edges --------------------------------------------------------------------------------------------------------


def test_without_a_gradient_it_is_undefined():
    assert math.isnan(m_coherence(torch.zeros(3), 0.0))
    assert math.isnan(m_coherence(torch.tensor([math.inf]), math.inf))
    assert math.isnan(m_coherence(torch.tensor([math.nan]), 1.0))
    assert Coherence(3).values() == {"overall": None, "m": 0, "per_class": {}, "m_per_class": {}}
    zero = Inputs(None, None, torch.zeros(3, 2), torch.tensor([0, 0, 1]))
    found = added(Toy(2), zero, 2).values()
    assert found == {"overall": None, "m": 3, "per_class": {0: None, 1: None}, "m_per_class": {0: 2, 1: 1}}


def test_one_example_is_coherent_with_itself():
    found = added(mlp(5, 8, 3), table(1), 3).values()
    assert found["overall"] == pytest.approx(1, rel=1e-6)
    assert found["m"] == 1


def test_an_example_of_nan_is_left_out():
    model, inputs = mlp(5, 8, 3), table(12)
    expected = added(model, rows_of(inputs, torch.arange(11)), 3).values()
    inputs.features[11] = math.nan
    normer = GradientNormer(model, rows_of(inputs, torch.arange(3)))
    found = Coherence(3)
    found.add(model, inputs, normer(inputs).whole ** 2)
    assert found.values()["m"] == 11
    assert found.values()["overall"] == pytest.approx(expected["overall"], rel=1e-6)


def test_wrong_labels_and_wrong_norms_are_named():
    model, inputs = mlp(5, 8, 3), table(4)
    with pytest.raises(ValueError, match=r"each of 4 examples, got \(3,\)"):
        Coherence(3).add(model, inputs, np.zeros(3))
    inputs.labels[0] = 3
    with pytest.raises(InputError, match="label 3 does not fit"):
        Coherence(3).add(model, inputs, np.zeros(4))


def test_real_labels_start_coherent_and_random_ones_do_not():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy((pixels / 16 - 0.305) / 0.376).float()[:512]
    values = []
    for given in (labels[:512], np.random.default_rng(0).integers(0, 10, 512)):
        inputs = Inputs(None, None, x, torch.from_numpy(given))
        values.append(added(mlp(64, 128, 128, 10), inputs, 10).values()["overall"])
    assert values[0] > 3
    assert values[1] < values[0] / 2
