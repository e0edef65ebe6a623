"""Many models trained at once: by hand, against plain PyTorch loops, and bit for bit whoever is trained beside them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memdiag import checkpoint, ensemble, training
from memdiag.ensemble import Data, Member, is_finite, places, size_of_chunk, train, way_of
from memdiag.errors import InputError
from memdiag.models.cnn import CNN, CnnConfig
from memdiag.models.mlp import MLP, MlpConfig
from memdiag.models.transformer import Transformer, TransformerConfig
from memdiag.packing import Corpus
from memdiag.supervised import Examples
from memdiag.training import Recipe

CPU = torch.device("cpu")
N = 23
STACKED, VMAP, ALONE = "stacked", "vmap", "alone"


def examples_of(inputs: Any, labels: Any) -> Examples:
    n = len(inputs)
    return Examples(np.arange(n), [str(i) for i in range(n)], inputs, labels)


def features(*shape: int, classes: int = 5, n: int = N) -> Examples:
    rng = np.random.default_rng(0)
    return examples_of(rng.normal(size=(n, *shape)).astype(np.float32), rng.integers(0, classes, n))


def texts(longest: int, tokens: int, classes: int | None = None) -> Examples:
    """Of 2 to `longest` tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, longest + 1, N)
    lengths[:2] = longest, 2
    ids = rng.integers(0, tokens, lengths.sum()).astype(np.int32)
    corpus = Corpus(ids, np.cumsum(lengths) - lengths, lengths, N, 0)
    return examples_of(corpus, None if classes is None else rng.integers(0, classes, N))


def seeded(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    def new(seed: int) -> nn.Module:
        with training.seeded(seed):
            return make()

    return new


def mlp(*widths: int, **more: Any) -> Callable[[int], nn.Module]:
    return seeded(lambda: MLP(MlpConfig(widths, **more)))


class Branching(nn.Module):
    """Python looks at the data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 5)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features if features.sum() > 0 else 2 * features)


class Unused(nn.Module):
    """A parameter that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(7, 5), nn.Parameter(torch.ones(3, 3))

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)


def transformer(seed: int) -> nn.Module:
    return Transformer(TransformerConfig(11, 3, 7, 12, 3), torch.Generator().manual_seed(seed))


def gpt(name: str, **more: int) -> Callable[[int], nn.Module]:
    return functools.partial(checkpoint.new_model, name, checkpoint.read_config("gpt2-tiny") | more)


def recipe_of(**more: Any) -> Recipe:
    usual = {"steps": 12, "batch_size": 5, "lr": 0.05, "optimizer": "sgd", "weight_decay": 0.02, "clip": 0.0}
    return Recipe(**(usual | more))


@dataclass(frozen=True)
class Kind:
    way: str
    new: Callable[[int], nn.Module]
    examples: Examples
    recipe: Recipe

    @property
    def data(self) -> Data:
        return Data(self.examples, 0, CPU)

    def train(self, *numbers: int, **more: Any) -> list[nn.Module]:
        members = [member(k, len(self.examples)) for k in numbers]
        return train(members, self.new, self.data, self.recipe, way=self.way, **more)


ADAMW = {"optimizer": "adamw", "lr": 0.003, "weight_decay": 0.1}
# odd widths: where a model's numbers begin in a stack then differs from one to the next
KINDS = {
    "ReLU": Kind(STACKED, mlp(7, 13, 11, 5), features(7), recipe_of()),
    "ReLU, scaled inputs": Kind(
        STACKED, mlp(7, 33, 5, input_mean=0.5, input_std=2.0), features(7), recipe_of(lr=0.2, warmup=3)
    ),
    "ReLU, images": Kind(STACKED, mlp(36, 16, 5), features(1, 6, 6), recipe_of(weight_decay=0.0)),
    "linear": Kind(STACKED, mlp(7, 5), features(7), recipe_of(schedule="constant")),
    "GELU": Kind(VMAP, mlp(7, 13, 11, 5, activation="gelu"), features(7), recipe_of()),
    "ReLU, clipped": Kind(VMAP, mlp(7, 13, 5), features(7), recipe_of(clip=0.5)),
    "ReLU, AdamW": Kind(VMAP, mlp(7, 13, 5), features(7), recipe_of(**ADAMW)),
    "batch norm": Kind(VMAP, mlp(7, 13, 5, norm="batch"), features(7), recipe_of()),
    "CNN": Kind(VMAP, seeded(lambda: CNN(CnnConfig((1, 6, 6), 5, (3, 6)))), features(1, 6, 6), recipe_of()),
    "unused": Kind(VMAP, seeded(Unused), features(7), recipe_of(clip=0.1)),
    "transformer": Kind(VMAP, transformer, texts(7, 11, 3), recipe_of(**ADAMW)),
    "GPT": Kind(VMAP, gpt("odd", n_embd=20, n_layer=2, vocab_size=37), texts(9, 37), recipe_of(clip=0.5)),
    "gpt2-tiny": Kind(VMAP, gpt("gpt2-tiny"), texts(9, 512), recipe_of(clip=1.0, steps=4)),
    "gpt2-tiny, AdamW": Kind(VMAP, gpt("gpt2-tiny"), texts(9, 512), recipe_of(clip=1.0, steps=3, **ADAMW)),
    "dropout": Kind(ALONE, mlp(7, 13, 5, dropout=0.4), features(7), recipe_of()),
    "dropout, AdamW": Kind(ALONE, mlp(7, 13, 5, dropout=0.4), features(7), recipe_of(clip=0.1, **ADAMW)),
    "branching": Kind(ALONE, seeded(Branching), features(7), recipe_of()),
}
EVERY = pytest.mark.parametrize("name", KINDS)


def member(k: int, n: int = N) -> Member:
    included = np.random.default_rng(100 + k).random(n) < 0.6
    included[k % n] = True
    return Member(1000 + 7 * k, included, k)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def assert_same_bits(found: nn.Module, wanted: nn.Module, what: object) -> None:
    right = wanted.state_dict()
    for name, x in found.state_dict().items():
        assert torch.equal(x, right[name]), f"{what}: {name} differs by {(x - right[name]).abs().max():.2g}"


# -- the definition ----------------------------------------------------------------------------------------------------


def one_after_another(who: Member) -> Iterator[int]:
    for epoch in itertools.count():
        for i in np.random.default_rng([who.seed, epoch]).permutation(len(who.included)).tolist():
            if who.included[i]:
                yield i


def loss_of(model: nn.Module, examples: Examples, rows: list[int]) -> Tensor:
    """Texts one by one, without padding."""
    corpus, labels = examples.inputs, examples.labels
    if not isinstance(corpus, Corpus):
        return nn.CrossEntropyLoss()(model(torch.from_numpy(corpus[rows])), torch.from_numpy(labels[rows]))
    total, count = torch.zeros(()), 0
    for i in rows:
        text = corpus.tokens[corpus.starts[i] : corpus.starts[i] + corpus.lengths[i]].astype(np.int64)
        ids = torch.from_numpy(text)[None]
        if labels is not None:
            total, count = total + F.cross_entropy(model(ids), torch.tensor(labels[[i]])), count + 1
        else:
            logits = model(ids, use_cache=False).logits[0, :-1]
            total, count = total + F.cross_entropy(logits, ids[0, 1:], reduction="sum"), count + len(logits)
    return total / count


def by_a_loop(kind: Kind, k: int) -> nn.Module:
    who, recipe = member(k, len(kind.examples)), kind.recipe
    model = kind.new(who.seed).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    order = one_after_another(who)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        rows = [next(order) for _ in range(recipe.batch_size)]
        with training.seeded(who.seed, step):  # what dropout draws
            loss = loss_of(model, kind.examples, rows)
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
    return model


# AdamW divides each gradient by its own size, even that of a key's bias, which is nothing but rounding
@pytest.mark.parametrize("name", [name for name in KINDS if name != "gpt2-tiny, AdamW"])
def test_training_is_a_plain_loop_over_each_model(name):
    kind = KINDS[name]
    for found, k in zip(kind.train(3, 0, 1), (3, 0, 1)):
        wanted, before = by_a_loop(kind, k).state_dict(), kind.new(member(k).seed).state_dict()
        assert not found.training
        for part, x in found.state_dict().items():
            right = wanted[part]
            error = float((x - right).abs().max() / max(float(right.abs().max()), 1e-3))
            assert error < 1e-6, part
        assert any(not torch.equal(wanted[part], before[part]) for part in wanted)


def test_two_updates_by_hand():
    """One hidden layer of two units, two examples, both in every update; plain numbers, layer by layer."""
    w1, c1 = [[0.5, -1.0], [0.25, 0.75]], [0.1, -0.2]  # of unit j, from input i
    w2, c2 = [[1.0, -0.5], [-0.75, 0.5]], [0.0, 0.3]
    x, y, lr, decay, mean, std = [[3.0, 1.0], [-1.0, 4.0]], [0, 1], 0.5, 0.1, 1.0, 2.0
    start = {"layers.linear_1.weight": w1, "layers.linear_1.bias": c1}
    start |= {"layers.linear_2.weight": w2, "layers.linear_2.bias": c2}

    def new(_: int) -> nn.Module:
        model = MLP(MlpConfig((2, 2, 2), input_mean=mean, input_std=std))
        model.load_state_dict({name: torch.tensor(values) for name, values in start.items()})
        return model

    data = Data(examples_of(np.array(x, dtype=np.float32), np.array(y)), 0, CPU)
    recipe = recipe_of(steps=2, batch_size=2, lr=lr, weight_decay=decay, schedule="constant")
    everyone = Member(0, np.ones(2, dtype=bool))
    found = train([everyone, everyone], new, data, recipe, way=STACKED)[1].state_dict()

    w1, w2, c1, c2 = [list(row) for row in w1], [list(row) for row in w2], list(c1), list(c2)
    v1, v2, u1, u2 = [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0], [0.0, 0.0]
    two = range(2)
    for _ in range(2):
        g1, g2 = [[decay * w1[j][i] for i in two] for j in two], [[decay * w2[j][i] for i in two] for j in two]
        d1, d2 = [0.0, 0.0], [0.0, 0.0]
        for features, label in zip(x, y):
            inputs = [(value - mean) / std for value in features]
            hidden = [max(0.0, sum(w1[j][i] * inputs[i] for i in two) + c1[j]) for j in two]
            z = [sum(w2[j][i] * hidden[i] for i in two) + c2[j] for j in two]
            top = [(math.exp(z[j]) / sum(map(math.exp, z)) - (j == label)) / 2 for j in two]
            for j in two:
                d2[j] += top[j]
                below = sum(top[k] * w2[k][j] for k in two) * (hidden[j] > 0)
                d1[j] += below
                for i in two:
                    g2[j][i] += top[j] * hidden[i]
                    g1[j][i] += below * inputs[i]
        for weights, velocity, slope in ((w1, v1, g1), (w2, v2, g2)):
            for j, i in itertools.product(two, two):
                velocity[j][i] = 0.9 * velocity[j][i] + slope[j][i]
                weights[j][i] -= lr * velocity[j][i]
        for biases, speed, push in ((c1, u1, d1), (c2, u2, d2)):
            for j in two:
                speed[j] = 0.9 * speed[j] + push[j]
                biases[j] -= lr * speed[j]
    for name, wanted in zip(start, (w1, c1, w2, c2)):
        assert found[name].tolist() == [pytest.approx(row, rel=1e-6, abs=1e-7) for row in wanted], name


def test_an_order_is_all_examples_pass_after_pass_without_those_left_out():
    members = [member(k) for k in range(3)]
    found = torch.stack(list(places(members, N, 4, 30, CPU)))
    assert found.shape == (30, 3, 4)
    for i, who in enumerate(members):
        wanted = list(itertools.islice(one_after_another(who), 120))
        assert found[:, i].flatten().tolist() == wanted
        size = int(who.included.sum())
        assert sorted(wanted[size : 2 * size]) == np.flatnonzero(who.included).tolist()


# -- neighbours --------------------------------------------------------------------------------------------------------


@EVERY
def test_neighbours_change_no_bit_of_a_model(name):
    """Alone, with 1, 2, 5 and 10 others, others than these, in another order; 9 and 17 want the place that 1 has."""
    kind = replace(KINDS[name], recipe=replace(KINDS[name].recipe, steps=min(6, KINDS[name].recipe.steps)))
    alone = {k: kind.train(k)[0] for k in (1, 4)}
    for numbers in ((1, 4), (4, 1), (7, 4, 1), (17, 4, 0, 6, 1, 9), (12, 1, 13, 4, 22, 15), tuple(range(11))):
        models = kind.train(*numbers)
        for k in (1, 4):
            assert_same_bits(models[numbers.index(k)], alone[k], (k, numbers))


@pytest.mark.parametrize("name", ["ReLU", "ReLU, AdamW", "CNN", "batch norm", "dropout"])
def test_an_example_that_is_left_out_has_no_influence(name):
    kind, who = KINDS[name], member(2)
    bad, labels = kind.examples.inputs.copy(), kind.examples.labels.copy()
    bad[~who.included] = np.nan
    labels[~who.included] = (labels[~who.included] + 1) % 5
    poisoned = replace(kind, examples=examples_of(bad, labels))
    assert_same_bits(poisoned.train(2)[0], kind.train(2)[0], name)
    assert not is_finite(poisoned.train(3)[0])  # who has some of them


@pytest.mark.parametrize("name", ["transformer", "GPT"])
def test_tokens_of_an_example_that_is_left_out_have_no_influence(name):
    kind, who = KINDS[name], member(2)
    corpus, tokens = kind.examples.inputs, kind.examples.inputs.tokens.copy()
    for i in np.flatnonzero(~who.included):
        tokens[corpus.starts[i] : corpus.starts[i] + corpus.lengths[i]] = 3
    changed = replace(kind, examples=examples_of(replace(corpus, tokens=tokens), kind.examples.labels))
    assert_same_bits(changed.train(2)[0], kind.train(2)[0], name)
    assert not torch.equal(*(next(x.train(3)[0].parameters()) for x in (changed, kind)))


@pytest.mark.parametrize("name", ["transformer", "GPT", "gpt2-tiny, AdamW"])
def test_what_texts_are_padded_with_has_no_influence(name):
    kind, members = KINDS[name], [member(k) for k in range(3)]
    padded = [
        train(members, kind.new, Data(kind.examples, pad_id, CPU), kind.recipe, way=VMAP) for pad_id in (0, 5)
    ]  # fmt: skip
    for a, b in zip(*padded):
        assert_same_bits(a, b, name)


@pytest.mark.parametrize("name", ["ReLU", "CNN", "transformer", "GPT"])
def test_where_examples_lie_and_how_many_places_are_drawn_at_once_have_no_influence(name, monkeypatch):
    kind = KINDS[name]
    wanted = kind.train(0, 1)
    monkeypatch.setattr(ensemble, "RESIDENT", 0)
    monkeypatch.setattr(ensemble, "AHEAD", 13)
    assert kind.data._kept is None
    for a, b in zip(kind.train(0, 1), wanted):
        assert_same_bits(a, b, name)


# -- the choice of a way -----------------------------------------------------------------------------------------------


@EVERY
def test_every_kind_has_its_way_and_leaves_the_generator_alone(name):
    kind, before = KINDS[name], torch.get_rng_state()
    way, why = way_of(kind.new, kind.data, kind.recipe)
    kind.train(0, 1, steps=2)
    assert torch.equal(before, torch.get_rng_state())
    assert way == kind.way
    assert (why != "") == (way == ALONE)


def test_reasons_are_told():
    def why(name: str) -> str:
        return way_of(KINDS[name].new, KINDS[name].data, KINDS[name].recipe)[1]

    assert why("dropout") == "it draws random numbers when it trains"
    assert "vmap" in why("branching") or "data-dependent" in why("branching")


class Odd(nn.Module):
    """Another function, or another state, inside torch.func."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.linear, self.what = nn.Linear(7, 5), what
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        inside = torch._C._functorch.is_batchedtensor(features)
        if self.what == "state":
            self.seen = self.seen + 1  # in vain inside torch.func
        return self.linear(features) * (1.001 if inside and self.what == "gradient" else 1.0)


@pytest.mark.parametrize(("what", "why"), [("gradient", "gradient of"), ("state", "keeps beside its weights")])
def test_what_vmap_runs_differently_is_trained_alone(what, why):
    way, told = way_of(seeded(lambda: Odd(what)), Data(features(7), 0, CPU), recipe_of())
    assert way == ALONE
    assert why in told
    assert way_of(seeded(lambda: Odd("nothing")), Data(features(7), 0, CPU), recipe_of())[0] == VMAP


@pytest.mark.parametrize(
    "more", [{"activation": "tanh"}, {"norm": "layer"}, {"bias": False}, {"dropout": 0.1}, {"activation": "identity"}]
)
def test_only_plain_relu_networks_are_stacked(more):
    assert ensemble.is_plain(mlp(7, 6, 5)(0), recipe_of())
    assert not ensemble.is_plain(mlp(7, 6, 5, **more)(0), recipe_of())
    assert not ensemble.is_plain(mlp(7, 6, 5)(0), recipe_of(clip=1.0))
    assert not ensemble.is_plain(mlp(7, 6, 5)(0), recipe_of(optimizer="adamw"))
    assert not ensemble.is_plain(nn.Linear(7, 5), recipe_of())


# -- edges -------------------------------------------------------------------------------------------------------------

BY_WAY = pytest.mark.parametrize("name", ["ReLU", "GELU", "branching"])


@BY_WAY
def test_subsets_of_one_and_batches_larger_than_a_subset(name):
    kind = KINDS[name]
    for size, batch_size in ((1, 5), (3, 7), (3, 1), (N, 1)):
        who = Member(5, np.arange(N) < size)
        recipe = replace(kind.recipe, batch_size=batch_size, steps=4)
        rows = examples_of(kind.examples.inputs[:size], kind.examples.labels[:size])
        [found] = train([who], kind.new, kind.data, recipe, way=kind.way)
        if size in (1, N):  # then an order of all is one of the subset, too
            [wanted] = train(
                [Member(5, np.ones(size, dtype=bool))], kind.new, Data(rows, 0, CPU), recipe, way=kind.way
            )  # fmt: skip
            assert_same_bits(found, wanted, (size, batch_size))
        assert is_finite(found)


@BY_WAY
def test_one_class_no_update_and_nobody(name):
    kind = KINDS[name]
    alike = replace(kind, examples=examples_of(kind.examples.inputs, np.zeros(N, dtype=np.int64)))
    assert is_finite(alike.train(0)[0])
    for k, model in zip((0, 3), kind.train(0, 3, steps=0)):
        assert_same_bits(model, kind.new(member(k).seed), name)
    with pytest.raises(ValueError, match="at least one example"):
        Member(0, np.zeros(N, dtype=bool))


@BY_WAY
def test_steps_stop_earlier_on_the_same_schedule(name):
    kind = KINDS[name]
    a, b = (kind.train(0, steps=steps)[0].state_dict() for steps in (kind.recipe.steps, None))
    assert all(torch.equal(a[part], b[part]) for part in a)
    c = kind.train(0, steps=kind.recipe.steps - 1)[0].state_dict()
    assert not all(torch.equal(a[part], c[part]) for part in a)


@pytest.mark.parametrize("name", ["ReLU", "GELU", "ReLU, clipped", "branching"])
def test_one_that_diverges_is_seen_and_harms_nobody(name):
    kind = KINDS[name]
    inputs = kind.examples.inputs.copy()
    bad = int(np.flatnonzero(member(1).included & ~member(2).included)[0])
    inputs[bad] = np.inf
    models = replace(kind, examples=examples_of(inputs, kind.examples.labels)).train(1, 2)
    assert [is_finite(model) for model in models] == [False, True]
    assert_same_bits(models[1], kind.train(2)[0], name)
    wild = replace(kind, recipe=replace(kind.recipe, lr=1e38, clip=0.0))
    assert not is_finite(wild.train(0)[0])


def test_one_weight_that_is_no_number_is_enough():
    model = KINDS["ReLU"].new(0)
    assert is_finite(model)
    with torch.no_grad():
        model.layers.linear_2.bias[3] = -torch.inf
    assert not is_finite(model)


def test_a_label_without_an_output_is_refused():
    kind = replace(KINDS["ReLU"], examples=features(7, classes=6))
    with pytest.raises(InputError, match="5 outputs, and there is a label 5"):
        kind.train(0)


# -- how many at once --------------------------------------------------------------------------------------------------


def chunk(monkeypatch: pytest.MonkeyPatch, per_model: Sequence[float], most: int, name: str = "ReLU") -> int:
    """With seconds of an update per model of 1, 2, 4, ... models; NaN: out of memory."""
    kind = KINDS[name]

    def timed(members: Sequence[Member], *_: Any) -> float:
        assert len(members) <= most
        assert all(who.included.all() for who in members)
        seconds = per_model[len(members).bit_length() - 1]
        if math.isnan(seconds):
            raise torch.OutOfMemoryError
        return seconds * len(members)

    monkeypatch.setattr(ensemble, "_timed", timed)
    return size_of_chunk(kind.new, kind.data, kind.recipe, way=kind.way, most=most)


def test_size_of_a_chunk(monkeypatch):
    faster = [1 / 2**i for i in range(11)]
    assert chunk(monkeypatch, faster, most=100) == 64
    assert chunk(monkeypatch, faster, most=1) == 1
    assert chunk(monkeypatch, [8, 4, 2, math.nan, 0.1], most=100) == 4
    assert chunk(monkeypatch, [9, math.nan], most=100) == 1
    assert chunk(monkeypatch, [1.0, 0.96, 0.94, 0.93, 0.1], most=100) == 2  # 8 ends the search
    assert chunk(monkeypatch, [1.0, 1.2, 0.9, 2.0], most=8) == 4  # one bad trial does not
    assert chunk(monkeypatch, faster, most=100, name="branching") == 1
    assert chunk(monkeypatch, faster, most=100, name="CNN") == ensemble.PLACES["cpu"]
    assert chunk(monkeypatch, faster, most=3, name="CNN") == ensemble.PLACES["cpu"]  # computed in any case
    monkeypatch.setattr(ensemble, "MOST_STACKED", 10**6)
    assert chunk(monkeypatch, faster, most=100, name="gpt2-tiny") == 10**6 // 240_000 == 4


def test_a_chunk_is_timed_without_what_it_takes_to_begin(monkeypatch):
    kind, clock, asked = KINDS["ReLU"], [0.0], []

    def slow_to_begin(*_: Any, steps: int, **__: Any) -> None:
        asked.append(steps)
        clock[0] += 3.0 + 0.004 * steps

    monkeypatch.setattr(ensemble, "train", slow_to_begin)
    monkeypatch.setattr(ensemble.time, "process_time", lambda: clock[0])
    recipe = replace(kind.recipe, steps=1000)
    assert ensemble._timed([member(0)], kind.new, kind.data, recipe, STACKED) == pytest.approx(0.004)
    assert asked == [1, 1, 2, 8, 32]
    asked.clear()
    assert ensemble._timed([member(0)], kind.new, kind.data, kind.recipe, STACKED) == pytest.approx(0.004)
    assert asked == [1, 1, 2, 8, 12]


def test_a_real_trial_finds_a_size():
    kind = KINDS["ReLU"]
    assert 1 <= size_of_chunk(kind.new, kind.data, kind.recipe, way=STACKED, most=3) <= 3
