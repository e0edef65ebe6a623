"""Each layer's k nearest neighbours vote as a plain loop over all distances says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from memdiag.errors import InputError
from memdiag.models.mlp import MLP, MlpConfig
from memdiag.observe import Inputs, depth
from memdiag.observe.depth import NONE, Probes
from memdiag.observe.losses import rows_of

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


class Fn(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def made(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return build().eval().requires_grad_(False)


def mlp() -> nn.Module:
    return MLP(MlpConfig((5, 8, 6, 3)))


def table(n: int, width: int = 5, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    return Inputs(None, None, torch.randn(n, width, generator=g), torch.randint(3, (n,), generator=g))


def images(n: int) -> Inputs:
    g = torch.Generator().manual_seed(0)
    return Inputs(None, None, torch.randn(n, 1, 8, 8, generator=g), torch.randint(3, (n,), generator=g))


def split(inputs: Inputs, size: int) -> Iterator[Inputs]:
    for rows in torch.arange(inputs.n_examples).split(size):
        yield rows_of(inputs, rows)


def vote_of(x: np.ndarray, reference: np.ndarray, labels: np.ndarray, k: int, own: int) -> int:
    """By sorting all distances; for data without ties at the k-th."""
    others = [(float(np.linalg.norm(x - r)), int(y)) for i, (r, y) in enumerate(zip(reference, labels)) if i != own]
    votes = [y for _, y in sorted(others)[:k]]
    return max(range(3), key=lambda c: (votes.count(c), -c))


def by_definition(layers: list[Tensor], labels: Tensor, k: int) -> np.ndarray:
    """(l, n) votes for the reference examples themselves."""
    y = labels.numpy()
    found = []
    for layer in layers:
        x = layer.flatten(1).double().numpy()
        found.append([vote_of(x[i], x, y, k, i) for i in range(len(x))])
    return np.array(found)


# --- values by hand -----------------------------------------------------------------------------------------------


def on_a_line(*places: float) -> Tensor:
    return torch.tensor(places, dtype=torch.float32)[:, None]


def identity(k: int = 3) -> nn.Module:
    model = nn.Linear(1, k).requires_grad_(False)
    model.weight.zero_(), model.bias.zero_()
    return model


def test_neighbours_on_a_line_vote():
    reference = Inputs(None, None, on_a_line(0, 1, 2, 10, 11, 12.5), torch.tensor([0, 0, 1, 2, 2, 1]))
    probes = Probes(identity(), [reference], k=3)
    assert probes.layers == ["input", "softmax"]
    asked = Inputs(None, None, on_a_line(0.4, 11.2, 2), None)
    assert probes(asked, np.array([-1, -1, -1]))[0].tolist() == [0, 2, 0]
    # row 1 without itself: rows 0, 2 and 3 have a vote for each class, and the smallest wins
    assert probes(Inputs(None, None, on_a_line(1), None), np.array([1]))[0].tolist() == [0]
    one = Probes(identity(), [reference], k=1)
    assert one(reference, np.arange(6))[0].tolist() == [0, 0, 0, 2, 2, 2]
    assert one(reference, np.full(6, -1))[0].tolist() == reference.labels.tolist()


def test_examples_equally_far_away_share_the_places_that_are_left():
    # of 4 places one is nearer (class 2); 6 as far away share 3: class 0 gets 1, class 1 gets 2
    places, labels = on_a_line(0.5, 1, -1, 1, -1, 1, -1), torch.tensor([2, 0, 0, 1, 1, 1, 1])
    for order in (torch.arange(7), torch.arange(7).flip(0)):
        probes = Probes(identity(), [Inputs(None, None, places[order], labels[order])], k=4)
        assert probes(Inputs(None, None, on_a_line(0), None), np.array([-1]))[0, 0] == 1
    # 3 places: class 2 has 1, class 0 gets 2/3, class 1 4/3; 2 places: 1, 1/3 and 2/3
    for k, expected in ((3, 1), (2, 2), (1, 2)):
        probes = Probes(identity(), [Inputs(None, None, places, labels)], k=k)
        assert probes(Inputs(None, None, on_a_line(0), None), np.array([-1]))[0, 0] == expected


def test_where_all_are_the_same_the_most_frequent_class_wins_and_of_equals_the_smallest():
    inputs = Inputs(None, None, torch.ones(5, 1), torch.tensor([2, 1, 2, 1, 0]))
    found = Probes(identity(), [inputs], k=2)(inputs, np.arange(5))
    assert found.tolist() == [[1, 2, 1, 2, 1]] * 2  # without itself


# --- the definition -----------------------------------------------------------------------------------------------


def of_mlp(m: Any, x: Tensor) -> list[Tensor]:
    one = m.layers.act_1(m.layers.linear_1(x))
    two = m.layers.act_2(m.layers.linear_2(one))
    return [x, one, two, m.layers.linear_3(two).softmax(1)]


def conv_net() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.act(m.two(m.act(m.one(x)).clamp_(max=0.3))).mean((2, 3)))

    layers = {"one": nn.Conv2d(1, 4, 3), "two": nn.Conv2d(4, 5, 3), "act": nn.ReLU(inplace=True)}
    return Fn(forward, **layers, head=nn.Linear(5, 3))


def of_conv_net(m: Any, x: Tensor) -> list[Tensor]:
    """The activation is one module that is called twice, and its first output is changed in place."""
    one = F.relu(m.one(x))
    two = F.relu(m.two(one.clamp(max=0.3)))
    return [x, one.mean((2, 3)), two.mean((2, 3)), m.head(two.mean((2, 3))).softmax(1)]


def without_modules() -> nn.Module:
    return Fn(lambda m, x: m.two(torch.tanh(m.one(x))), one=nn.Linear(5, 7), two=nn.Linear(7, 3))


def of_without_modules(m: Any, x: Tensor) -> list[Tensor]:
    return [x, m.one(x), m(x).softmax(1)]


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1, num_labels=3))


def of_vit(m: Any, x: Tensor) -> list[Tensor]:
    output = m(x, output_hidden_states=True)
    return [x, *(h.mean(1) for h in output.hidden_states[1:]), output.logits.softmax(1)]


CASES = {
    "mlp": (mlp, lambda: table(60), of_mlp, ["input", "layers.act_1", "layers.act_2", "softmax"]),
    "conv": (conv_net, lambda: images(40), of_conv_net, ["input", "act", "act", "softmax"]),
    "without modules": (without_modules, lambda: table(60), of_without_modules, ["input", "one", "softmax"]),
    "vit": (vit, lambda: images(40), of_vit, None),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k", [1, 7])
def test_the_votes_are_those_of_sorted_distances(name, k):
    build, data, layers_of, names = CASES[name]
    model, inputs = made(build), data()
    probes = Probes(model, [inputs], k=k)
    found = probes(inputs, np.arange(inputs.n_examples))
    if names is not None:
        assert probes.layers == names
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, by_definition(layers_of(model, inputs.features), inputs.labels, k))


def test_texts_are_averaged_over_their_real_tokens():
    config = BertConfig(**SIZES, vocab_size=40, num_labels=3)
    model = made(lambda: BertForSequenceClassification(config))
    lengths = torch.randint(2, 9, (30,), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(11) < lengths[:, None]
    tokens = torch.randint(8, 40, mask.shape, generator=torch.Generator().manual_seed(1))
    inputs = Inputs(tokens, mask, None, torch.arange(30) % 3)
    probes = Probes(model, [inputs], k=5)
    found = probes(inputs, np.arange(30))
    output = model(tokens, attention_mask=mask.long(), output_hidden_states=True)
    layers = [(h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) for h in output.hidden_states]
    assert len(probes.layers) == 4
    assert "input" not in probes.layers
    np.testing.assert_array_equal(found, by_definition([*layers, output.logits.softmax(1)], inputs.labels, 5))
    poisoned = Inputs(torch.where(mask, tokens, 3), mask, None, None)
    assert (probes(poisoned, np.arange(30)) == found).all()


# --- invariances --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_batch_sizes_do_not_matter_even_among_copies(name, monkeypatch):
    build, data, _, _ = CASES[name]
    model, inputs = made(build), data()
    n = inputs.n_examples
    inputs.features[n // 2 :] = inputs.features[: n - n // 2]  # copies, with other labels
    whole = Probes(model, [inputs], k=5)(inputs, np.arange(n))
    for size in (1, 7):
        probes = Probes(model, split(inputs, size), k=5)
        monkeypatch.setattr(depth, "BLOCK_ROWS", 6)
        monkeypatch.setattr(depth, "CHUNK_BYTES", 3 * 8 * n)
        rows = np.array_split(np.arange(n), 4)
        found = [probes(rows_of(inputs, torch.from_numpy(r)), r) for r in rows]
        np.testing.assert_array_equal(np.concatenate(found, axis=1), whole)
        monkeypatch.undo()


def test_of_too_many_a_sample_is_kept_the_same_for_any_batch_size():
    model, inputs = made(mlp), table(200)
    inputs.labels = inputs.labels.sort().values  # as many datasets are: the first rows are all of one class
    kept = [Probes(model, split(inputs, size), k=3, most=20) for size in (200, 7, 1)]
    for probes in kept:
        assert probes.n_reference == 20
        assert torch.equal(probes._rows, kept[0]._rows)
        np.testing.assert_array_equal(probes(inputs, np.arange(200)), kept[0](inputs, np.arange(200)))
        np.testing.assert_array_equal(probes._reference[0], inputs.features[probes._rows])
        assert torch.equal(probes._votes.argmax(1), inputs.labels[probes._rows])
    assert len(kept[0]._votes.argmax(1).unique()) == 3


def test_the_model_is_left_as_it_was():
    model = made(lambda: MLP(MlpConfig((5, 8, 3), dropout=0.5))).train()
    inputs = table(20)
    probes = Probes(model, [inputs], k=3)
    assert (probes(inputs, np.arange(20)) == probes(inputs, np.arange(20))).all()  # no dropout
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- edges --------------------------------------------------------------------------------------------------------


def test_fewer_examples_than_neighbours_and_none_at_all():
    model, inputs = made(mlp), table(4)
    inputs.labels = torch.tensor([0, 1, 1, 2])
    probes = Probes(model, [inputs], k=30)
    assert probes(inputs, np.arange(4))[0].tolist() == [1, 0, 0, 1]  # of all others
    alone = Probes(model, [table(1)])
    assert (alone(table(1), np.array([0])) == NONE).all()
    assert (alone(table(1), np.array([-1])) == table(1).labels[0].item()).all()
    assert probes(rows_of(inputs, torch.arange(0)), np.zeros(0, int)).shape == (4, 0)


def test_nan_has_no_neighbours_and_is_nobodys():
    model, inputs = made(mlp), table(20)
    asked = Inputs(None, None, inputs.features.clone(), None)
    asked.features[3] = math.nan
    clean = Probes(model, [rows_of(inputs, torch.arange(19))], k=3)
    found = clean(asked, np.full(20, -1))
    assert (found[:, 3] == NONE).all()
    inputs.features[19] = math.nan
    probes = Probes(model, [inputs], k=3)
    np.testing.assert_array_equal(probes(asked, np.full(20, -1)), found)


def test_what_cannot_be_probed_says_why():
    model = made(mlp)
    with pytest.raises(InputError, match="the data has none"):
        Probes(model, [])
    with pytest.raises(InputError, match="need labels"):
        Probes(model, [Inputs(None, None, torch.zeros(3, 5), None)])
    with pytest.raises(InputError, match="label 7 does not fit a model of 3 classes"):
        Probes(model, [Inputs(None, None, torch.zeros(3, 5), torch.tensor([0, 7, 1]))])
    with pytest.raises(InputError, match="at least 1 neighbour"):
        Probes(model, [table(3)], k=0)
    with pytest.raises(ValueError, match="each of 3 examples, got 2"):
        Probes(model, [table(3)])(table(3), np.arange(2))
    text = Inputs(torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool), None, torch.arange(2))
    gpt2 = made(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=2, n_positions=8)))
    with pytest.raises(InputError, match="needs a classifier"):
        Probes(gpt2, [text])
