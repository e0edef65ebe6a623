"""Hidden states by hooks: exactly Hugging Face's own, one at a time, whatever the padding; and the loss beside them."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from memdiag import observe
from memdiag.dataset import Batch, open_dataset
from memdiag.errors import InputError

Load = Callable[[str], nn.Module]
TEXT = ("tiny-gpt2", "tiny-llama", "tiny-bert")
FINAL_NORM = {"tiny-gpt2": "transformer.ln_f", "tiny-llama": "model.norm"}  # the others have none in the way
POISON = 7  # a token id that stands under the padding, where its value must not matter


def token_batch(rows: list[list[int]], *, pad: int = POISON, side: str = "right", extra: int = 0) -> Batch:
    width = max(len(row) for row in rows) + extra
    ids, mask = np.full((len(rows), width), pad, dtype=np.int64), np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, at], mask[i, at] = row, True
    return batch_of(ids, mask)


def batch_of(ids: np.ndarray, mask: np.ndarray) -> Batch:
    n = len(ids)
    return Batch([str(i) for i in range(n)], np.arange(n), ids, mask, None, None, 0)


def feature_batch(features: Tensor, labels: Any = None) -> Batch:
    n = len(features)
    known = None if labels is None else np.asarray(labels, dtype=np.int64)
    return Batch([str(i) for i in range(n)], np.arange(n), None, None, features.numpy(), known, 0)


def token_rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(8, 512, (length,), generator=g).tolist() for length in lengths]


def digits(n: int) -> tuple[Tensor, list[int]]:
    examples = list(open_dataset("task:digits?shape=image", limit=n).examples())
    return torch.stack([torch.from_numpy(e.features) for e in examples]), [e.label for e in examples]


def hidden_states(model: nn.Module, batch: Batch, wanted: str | None = None) -> list[tuple[Tensor, Tensor]]:
    layers, _ = observe.layers_of(model, wanted)
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(position: int, hidden: Tensor, mask: Tensor) -> None:
        assert position not in found
        found[position] = (hidden.clone(), mask.clone())

    observe.forward(model, observe.to_inputs(batch, model), layers, keep)
    assert sorted(found) == list(range(len(layers)))
    return [found[i] for i in range(len(layers))]


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def deep_gpt2(n_layer: int = 6) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_head=2, n_layer=n_layer, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


# --- hidden states are Hugging Face's ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT)
def test_text_models_give_hugging_faces_hidden_states(load: Load, name: str) -> None:
    model, batch = copy.deepcopy(load(name)), token_batch(token_rows(11, 4, 9, 1))
    ours = hidden_states(model, batch)
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.mask)
    with torch.inference_mode():
        theirs = model(ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False).hidden_states
        assert len(ours) == len(theirs) == model.config.num_hidden_layers + 1
        for (hidden, hidden_mask), wanted in zip(ours[:-1], theirs[:-1], strict=True):
            assert torch.equal(hidden, wanted)
            assert torch.equal(hidden_mask, mask)
        last = ours[-1][0]
        if name in FINAL_NORM:
            assert not torch.allclose(last, theirs[-1], atol=1e-3)  # ours is before the norm
            last = model.get_submodule(FINAL_NORM[name])(last)
        assert torch.equal(last, theirs[-1])


def test_a_vision_transformer_gives_hugging_faces_hidden_states(load: Load) -> None:
    model, (images, _) = copy.deepcopy(load("tiny-vit")), digits(5)
    ours = hidden_states(model, feature_batch(images))
    with torch.inference_mode():
        theirs = model(images, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 3
    for (hidden, mask), wanted in zip(ours, theirs, strict=True):
        assert torch.equal(hidden, wanted)
        assert mask.all()
        assert mask.shape == (5, 17)


def test_layer_0_is_what_goes_into_the_first_block(load: Load) -> None:
    model = load("tiny-gpt2")
    rows = token_rows(6)
    wte, wpe = model.transformer.wte.weight, model.transformer.wpe.weight
    expected = torch.stack([wte[token] + wpe[i] for i, token in enumerate(rows[0])])
    torch.testing.assert_close(hidden_states(model, token_batch(rows))[0][0][0], expected)


# --- padding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT)
def test_padding_of_any_kind_gives_the_states_of_each_row_alone(load: Load, name: str) -> None:
    model, rows = load(name), token_rows(11, 4, 9, 1)
    alone = [hidden_states(model, token_batch([row])) for row in rows]
    interior = token_batch(rows, extra=3)
    ids, mask = interior.input_ids.copy(), interior.mask.copy()
    for i, row in enumerate(rows):  # holes: the row's tokens at random places, in order
        at = np.sort(np.random.default_rng(i).permutation(ids.shape[1])[: len(row)])
        ids[i], mask[i] = POISON, False
        ids[i, at], mask[i, at] = row, True
    assert not (mask[1, 1:] <= mask[1, :-1]).all()
    variants = {
        "right": token_batch(rows),
        "wider": token_batch(rows, extra=20),
        "left": token_batch(rows, side="left", extra=2),
        "interior": batch_of(ids, mask),
        "other pad": token_batch(rows, pad=500, extra=5),
    }
    for variant, batch in variants.items():
        for layer, (hidden, found_mask) in enumerate(hidden_states(model, batch)):
            for i, row in enumerate(rows):
                assert found_mask[i].sum() == len(row)
                torch.testing.assert_close(
                    hidden[i, : len(row)], alone[i][layer][0][0], atol=1e-5, rtol=1e-5, msg=f"{variant}, layer {layer}"
                )


def test_inputs_put_real_tokens_first_in_their_order(load: Load) -> None:
    ids = np.array([[9, 1, 9, 2, 3], [1, 2, 3, 9, 9], [9, 9, 9, 9, 4]])
    mask = np.array([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=bool)
    inputs = observe.to_inputs(batch_of(ids, mask), load("tiny-gpt2"))
    assert [row[m].tolist() for row, m in zip(inputs.tokens, inputs.mask)] == [[1, 2, 3], [1, 2, 3], [4]]
    assert inputs.mask.tolist() == [[True] * 3 + [False] * 2] * 2 + [[True] + [False] * 4]
    plain = token_batch(token_rows(5, 3))
    assert observe.to_inputs(plain, load("tiny-gpt2")).tokens.tolist() == plain.input_ids.tolist()


def test_features_take_the_models_dtype() -> None:
    model = nn.Linear(3, 2).bfloat16()
    inputs = observe.to_inputs(feature_batch(torch.randn(4, 3), [0, 1, 0, 1]), model)
    assert inputs.features.dtype == torch.bfloat16
    assert inputs.labels.dtype == torch.int64
    assert inputs.tokens is inputs.mask is None


# --- one layer at a time, and no hooks left ------------------------------------------------------------------------


def test_hidden_states_are_not_kept() -> None:
    model = deep_gpt2(8)
    layers, _ = observe.layers_of(model)
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def look(position: int, hidden: Tensor, mask: Tensor) -> None:
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(hidden))

    observe.forward(model, observe.to_inputs(token_batch([list(range(20))]), model), layers, look)
    assert len(alive) == 9
    assert max(alive) <= 1  # the block's own input, which the model itself still holds
    assert sum(ref() is not None for ref in seen) == 0


def test_no_hook_stays_behind_even_after_an_exception() -> None:
    model, batch = deep_gpt2(2), token_batch([[1, 2, 3]])
    layers, _ = observe.layers_of(model)
    inputs = observe.to_inputs(batch, model)

    def fail(position: int, hidden: Tensor, mask: Tensor) -> None:
        if position == 1:
            raise KeyError("of the caller")

    assert n_hooks(model) == 0
    observe.forward(model, inputs, layers, lambda *_: None)
    assert n_hooks(model) == 0
    with pytest.raises(KeyError):
        observe.forward(model, inputs, layers, fail)
    assert n_hooks(model) == 0
    observe.usable(model, inputs, layers)
    assert n_hooks(model) == 0
    bad = observe.Inputs(torch.tensor([[9999]]), torch.ones(1, 1, dtype=torch.bool), None, None)
    with pytest.raises(InputError, match="cannot run on this data"):
        observe.usable(model, bad, layers)
    assert n_hooks(model) == 0
    observe.forward_with_graph(model, batch)
    assert n_hooks(model) == 0


def test_nothing_is_recorded_for_gradients(load: Load) -> None:
    model = copy.deepcopy(load("tiny-gpt2")).requires_grad_()
    assert not any(hidden.requires_grad for hidden, _ in hidden_states(model, token_batch(token_rows(5))))


# --- which models predict the next token ---------------------------------------------------------------------------


class Bag(nn.Module):
    """Vocabulary logits at every position, from all positions: looks like a language model and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, 8)
        self.head = nn.Linear(8, 512)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens) + self.embed(tokens).mean(1, keepdim=True))


class Unigram(nn.Module):
    """Logits from the position's own token only."""

    def __init__(self, n_outputs: int = 512) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, n_outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens)


class Constant(nn.Module):
    """Logits that do not look at the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(512))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bias.expand(*tokens.shape, 512)


@pytest.mark.parametrize(("name", "expected"), [("tiny-gpt2", True), ("tiny-llama", True), ("tiny-bert", False)])
@pytest.mark.parametrize("row", [[5, 6, 7, 8], [5, 5, 5], [0, 0], [1, 0], list(range(100, 130)), [511, 511], [0, 511]])
def test_causal_language_models_predict_next_tokens(load: Load, name: str, expected: bool, row: list[int]) -> None:
    assert observe.predicts_next_token(load(name), torch.tensor([row])) is expected


def test_what_only_looks_like_a_language_model_does_not() -> None:
    torch.manual_seed(0)
    tokens = torch.tensor([[5, 6, 7, 8]])
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert not observe.predicts_next_token(BertForMaskedLM(BertConfig(vocab_size=512, **small)).eval(), tokens)
    assert not observe.predicts_next_token(Bag(), tokens)
    assert not observe.predicts_next_token(Constant(), tokens)
    assert not observe.predicts_next_token(nn.Embedding(512, 4), tokens)  # (b, t, 4) is no vocabulary
    assert not observe.predicts_next_token(Unigram(), tokens[:, :1])  # of one token there is no telling
    assert observe.predicts_next_token(Unigram(), tokens)


def test_images_have_no_next_token(load: Load) -> None:
    images, labels = digits(2)
    inputs = observe.to_inputs(feature_batch(images, labels), load("tiny-vit"))
    assert observe.call(load("tiny-vit"), inputs).shape == (2, 10)


# --- cross-entropy -------------------------------------------------------------------------------------------------


def nll_by_loop(logits: Tensor, rows: list[list[int]]) -> tuple[float, int]:
    total, n = 0.0, 0
    for i, row in enumerate(rows):
        for t in range(1, len(row)):
            z = logits[i, t - 1].double().tolist()
            top = max(z)
            total += top + math.log(sum(math.exp(x - top) for x in z)) - z[row[t]]
            n += 1
    return total, n


def test_next_token_loss_by_hand() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = math.log(3)  # p = 1/6, 1/6, 1/2, 1/6
    inputs = observe.Inputs(torch.tensor([[1, 2, 0]]), torch.ones(1, 3, dtype=torch.bool), None, None)
    total, n = observe.cross_entropy_sum(logits, inputs)
    assert (total, n) == (pytest.approx(math.log(2) + math.log(4), abs=1e-6), 2)


@pytest.mark.parametrize(
    ("vocabulary", "poison"),
    [(32, math.nan), (32, math.inf), (32, -1e30), (2**17, math.nan)],  # the last takes several chunks
)
def test_next_token_loss_is_the_loop_and_never_reads_padding(vocabulary: int, poison: float) -> None:
    rows = [[1, 5, 9, 2], [3], [31, 30], [4, 4, 4]]
    rows = rows if vocabulary == 32 else [(list(range(31)) * 3)[:80], [3], [5, 6]]
    batch = token_batch(rows, extra=2)
    logits = torch.randn(*batch.input_ids.shape, vocabulary, generator=torch.Generator().manual_seed(0))
    inputs = observe.Inputs(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.mask), None, None)
    if vocabulary == 32:
        expected = nll_by_loop(logits, rows)
    else:
        logp = logits.double().log_softmax(-1)
        expected = (
            -sum(float(logp[i, t - 1, row[t]]) for i, row in enumerate(rows) for t in range(1, len(row))),
            80 - 1 + 1,
        )
    logits[~inputs.mask] = poison
    total, n = observe.cross_entropy_sum(logits, inputs)
    assert n == expected[1]
    assert total == pytest.approx(expected[0], rel=1e-6)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_next_token_loss_is_hugging_faces_for_one_row(load: Load, name: str) -> None:
    model, (row,) = load(name), token_rows(23)
    inputs = observe.to_inputs(token_batch([row]), model)
    with torch.inference_mode():
        expected = model(inputs.tokens, labels=inputs.tokens).loss.item()
    total, n = observe.cross_entropy_sum(observe.call(model, inputs), inputs)
    assert n == 22
    assert total / n == pytest.approx(expected, abs=1e-5)


def test_loss_of_half_precision_logits_is_taken_in_float32() -> None:
    logits = (8 * torch.randn(1, 200, 512, generator=torch.Generator().manual_seed(0))).bfloat16()
    rows = token_rows(200)
    inputs = observe.Inputs(torch.tensor(rows), torch.ones(1, 200, dtype=torch.bool), None, None)
    total, _ = observe.cross_entropy_sum(logits, inputs)
    assert total == pytest.approx(nll_by_loop(logits.float(), rows)[0], rel=1e-6)


def test_loss_of_double_precision_logits_is_not_rounded() -> None:
    logits = torch.randn(1, 30, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = [list(range(30))]
    inputs = observe.Inputs(torch.tensor(rows), torch.ones(1, 30, dtype=torch.bool), None, None)
    assert observe.cross_entropy_sum(logits, inputs)[0] == pytest.approx(nll_by_loop(logits, rows)[0], rel=1e-12)


def test_label_loss_is_the_loop() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    inputs = observe.Inputs(None, None, None, torch.tensor([3, 0, 1]))
    expected = -sum(
        float(logits[i, y]) - math.log(sum(math.exp(float(x)) for x in logits[i])) for i, y in enumerate([3, 0, 1])
    )
    assert observe.cross_entropy_sum(logits, inputs) == (pytest.approx(expected, abs=1e-5), 3)


@pytest.mark.parametrize("labels", [[0, 4], [-1, 0]])
def test_labels_must_be_classes_of_the_model(labels: list[int]) -> None:
    inputs = observe.Inputs(None, None, None, torch.tensor(labels))
    wrong = next(y for y in labels if not 0 <= y < 4)
    with pytest.raises(InputError, match=f"label {wrong} does not fit a model of 4 classes"):
        observe.cross_entropy_sum(torch.zeros(2, 4), inputs)


def test_without_labels_there_is_no_loss() -> None:
    assert observe.cross_entropy_sum(torch.zeros(2, 4), observe.Inputs(None, None, torch.zeros(2, 1), None)) == (0, 0)


# --- layers_of -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "indices"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6]),
        ("0", [0]),
        ("-1", [6]),
        ("2-4", [2, 3, 4]),
        ("0,4-5,-1", [0, 4, 5, 6]),
        (" 3 , 1 ", [1, 3]),
        ("1,1-2", [1, 2]),
        ("2--2", [2, 3, 4, 5]),
    ],
)
def test_layers_by_index(wanted: str | None, indices: list[int]) -> None:
    layers, skipped = observe.layers_of(deep_gpt2(6), wanted)
    assert [layer.index for layer in layers] == indices
    names = ["transformer.h.0 (input)"] + [f"transformer.h.{i}" for i in range(6)]
    assert [layer.name for layer in layers] == [names[i] for i in indices]
    assert {s.name for s in skipped} == set(names) - {names[i] for i in indices}
    assert all(s.why == "not in --layers" for s in skipped)


def test_chosen_layers_give_the_same_states_as_all() -> None:
    model, batch = deep_gpt2(4), token_batch([list(range(9))])
    every = hidden_states(model, batch)
    for wanted, indices in (("0", [0]), ("-1", [4]), ("1,3", [1, 3])):
        for (found, _), i in zip(hidden_states(model, batch, wanted), indices, strict=True):
            assert torch.equal(found, every[i][0])


@pytest.mark.parametrize("wanted", ["7", "-8", "0-7", "5-2", "1-", "99999", "0,7"])
def test_an_index_out_of_range_says_what_there_is(wanted: str) -> None:
    with pytest.raises(InputError, match=r"layers 0 to 6|neither an index") as caught:
        observe.layers_of(deep_gpt2(6), wanted)
    assert "\n" not in str(caught.value)


def test_layers_by_name_pattern(load: Load) -> None:
    layers, skipped = observe.layers_of(load("tiny-gpt2"), "*.mlp,transformer.ln_?")
    assert [layer.name for layer in layers] == ["transformer.h.0.mlp", "transformer.h.1.mlp", "transformer.ln_f"]
    assert [layer.index for layer in layers] == [0, 1, 2]
    assert "lm_head" in {s.name for s in skipped}
    states = hidden_states(load("tiny-gpt2"), token_batch(token_rows(5, 3)), "*.mlp,transformer.ln_?")
    assert [hidden.shape for hidden, _ in states] == [(2, 5, 32)] * 3


@pytest.mark.parametrize("wanted", ["*.mpl", "transformer.h.9", "", "0,"])
def test_a_pattern_without_a_match_names_what_there_is(load: Load, wanted: str) -> None:
    with pytest.raises(InputError, match="no module matching") as caught:
        observe.layers_of(load("tiny-gpt2"), wanted)
    assert "lm_head" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- modules that are no transformer -------------------------------------------------------------------------------


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Identity(), nn.Linear(5, 3)).eval()


def test_leaves_of_an_mlp() -> None:
    model, x = mlp(), torch.randn(4, 6)
    layers, _ = observe.layers_of(model)
    assert [(layer.index, layer.name) for layer in layers] == [(i, str(i)) for i in range(5)]
    kept, skipped = observe.usable(model, observe.to_inputs(feature_batch(x), model), layers)
    assert [layer.name for layer in kept] == ["0", "1", "4"]
    assert [layer.index for layer in kept] == [0, 1, 4]
    assert [s.name for s in skipped] == ["2", "3"]
    assert {s.why for s in skipped} == {"it passes its input on unchanged"}
    states = hidden_states(model, feature_batch(x), "0,1,4")
    linear = model[0](x)
    for (hidden, mask), expected in zip(states, (linear, linear.relu(), model(x)), strict=True):
        assert hidden.shape == (4, 1, expected.shape[1])  # one token an example
        assert mask.all()
        assert torch.equal(hidden[:, 0], expected)  # also before the in-place ReLU wrote over it


def test_a_single_module_is_its_own_layer() -> None:
    model = nn.Linear(3, 2)
    layers, _ = observe.layers_of(model)
    assert [(layer.index, layer.name) for layer in layers] == [(0, "")]
    x = torch.randn(4, 3)
    assert torch.equal(hidden_states(model, feature_batch(x))[0][0][:, 0], model(x))


def test_feature_maps_have_a_token_for_every_position() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 5, 2)).eval()
    images = torch.randn(3, 1, 8, 7)
    states = hidden_states(model, feature_batch(images))
    assert [tuple(hidden.shape) for hidden, _ in states] == [(3, 30, 4), (3, 30, 4), (3, 1, 120), (3, 1, 2)]
    maps = model[0](images)
    for i in range(6):
        for j in range(5):
            assert torch.equal(states[0][0][:, 5 * i + j], maps[:, :, i, j])
    assert states[0][1].all()


def test_a_sequence_of_channels_is_read_as_one() -> None:
    model = nn.Conv1d(3, 4, 2)
    x = torch.randn(2, 3, 9)
    ((hidden, _),) = hidden_states(model, feature_batch(x))
    assert torch.equal(hidden, model(x).transpose(1, 2))


class Odd(nn.Module):
    """Outputs of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.shared = nn.Linear(4, 4)
        self.halve = nn.AvgPool1d(1)
        self.unused = nn.Linear(4, 4)
        self.count = Counter()

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.embed(tokens))
        x = self.shared(self.shared(x))
        self.count(tokens)
        return self.halve(x)[:, ::2]


class Counter(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + 1


def test_odd_outputs_are_read_or_skipped_with_a_reason() -> None:
    torch.manual_seed(0)
    model, batch = Odd().eval(), token_batch([[1, 2, 3, 4]])
    layers, _ = observe.layers_of(model)
    inputs = observe.to_inputs(batch, model)
    kept, skipped = observe.usable(model, inputs, layers)
    assert [layer.name for layer in kept] == ["embed", "lstm", "shared", "halve"]
    reasons = {s.name: s.why for s in skipped}
    assert reasons["unused"] == "it is not called in the forward pass"
    assert "not a float tensor" in reasons["count"]
    found: dict[str, Tensor] = {}
    observe.forward(model, inputs, kept, lambda i, hidden, mask: found.__setitem__(kept[i].name, hidden.clone()))
    with torch.inference_mode():
        assert torch.equal(found["lstm"], model.lstm(found["embed"])[0])  # the first of a tuple
        assert torch.equal(found["shared"], model.shared(found["lstm"]))  # its first call, not its second
    with pytest.raises(InputError, match=r"layer 'count' cannot be measured: .*--layers"):
        observe.forward(model, inputs, [x for x in layers if x.name == "count"], lambda *_: None)


def test_other_numbers_of_positions_than_tokens_are_skipped() -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 4)
            self.every_other = Every()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.every_other(self.embed(tokens))

    class Every(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, ::2]

    model = Strided()
    layers, _ = observe.layers_of(model)
    kept, skipped = observe.usable(model, observe.to_inputs(token_batch([[1, 2, 3, 4]]), model), layers)
    assert [layer.name for layer in kept] == ["embed"]
    assert skipped == [observe.Skipped("every_other", "its output has 2 positions where the batch has 4 tokens")]


def test_what_all_examples_share_is_no_hidden_state(load: Load) -> None:
    model = load("tiny-gpt2")
    layers, _ = observe.layers_of(model, "transformer.wte,transformer.wpe")
    kept, skipped = observe.usable(model, observe.to_inputs(token_batch(token_rows(5, 3)), model), layers)
    assert [layer.name for layer in kept] == ["transformer.wte"]
    assert skipped == [observe.Skipped("transformer.wpe", "its output has 1 rows for 2 examples")]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((2, 4, 3), (2, 4, 3)), ((2, 3), (2, 1, 3)), ((2, 3, 2, 2), (2, 4, 3)), ((2,), None), ((2, 1, 1, 1, 3), None)],
)
def test_shapes_as_tokens(shape: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    found = observe.as_tokens(nn.Linear(1, 1), torch.zeros(shape), None, shape[0])
    if expected is None:
        assert isinstance(found, str)
        assert str(shape) in found
    else:
        assert not isinstance(found, str)
        assert found[0].shape == expected
        assert found[1].shape == expected[:2]


def test_the_wrong_kind_of_data_is_one_line(load: Load) -> None:
    vit, gpt2 = load("tiny-vit"), load("tiny-gpt2")
    wrong = observe.to_inputs(feature_batch(torch.zeros(2, 3)), vit)
    with pytest.raises(InputError, match=r"cannot run on this data \(features of shape \(3,\)\)") as caught:
        observe.usable(vit, wrong, observe.layers_of(vit)[0])
    assert "\n" not in str(caught.value)
    wrong = observe.to_inputs(feature_batch(torch.zeros(2, 3)), gpt2)
    with pytest.raises(InputError, match="cannot run on this data"):
        observe.usable(gpt2, wrong, observe.layers_of(gpt2)[0])


# --- in the graph --------------------------------------------------------------------------------------------------


def test_forward_with_graph_has_the_same_states_and_gradients(load: Load) -> None:
    for name in ("tiny-gpt2", "tiny-llama"):
        model = copy.deepcopy(load(name)).requires_grad_()
        rows = token_rows(9, 5)
        batch = token_batch(rows)
        graph = observe.forward_with_graph(model, batch)
        for hidden, (expected, _) in zip(graph.hidden, hidden_states(model, batch), strict=True):
            torch.testing.assert_close(hidden.detach(), expected, atol=1e-6, rtol=1e-6)
            assert hidden.requires_grad
        assert graph.mask.sum(1).tolist() == [9, 5]
        inputs = observe.to_inputs(batch, model)
        with torch.inference_mode():
            total, n = observe.cross_entropy_sum(observe.call(model, inputs), inputs)
        assert n == 12
        assert graph.cross_entropy.item() == pytest.approx(total / n, abs=1e-5)
        first, last = observe.blocks(model)[0][1], observe.blocks(model)[-1][1]
        weights = list(first.parameters())
        found = torch.autograd.grad(graph.hidden[1].square().mean(), weights, retain_graph=True)
        assert all(g.isfinite().all() for g in found)
        assert any(g.abs().max() > 0 for g in found)
        above = torch.autograd.grad(
            graph.hidden[1].square().mean(), list(last.parameters()), retain_graph=True, allow_unused=True
        )
        assert all(g is None for g in above)  # blocks above a layer have no part in it
        assert any(g.abs().max() > 0 for g in torch.autograd.grad(graph.cross_entropy, list(last.parameters())))


@pytest.mark.parametrize("name", ["tiny-bert", "digits-mlp"])
def test_gradients_need_a_causal_language_model(load: Load, name: str) -> None:
    batch = token_batch(token_rows(4)) if name == "tiny-bert" else feature_batch(torch.zeros(2, 64))
    with pytest.raises(InputError, match="gradients need"):
        observe.forward_with_graph(load(name), batch)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_no_memory_for_a_first_example_is_told_as_such(error: BaseException) -> None:
    class Full(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    model = Full(2, 2)
    inputs = observe.Inputs(None, None, torch.zeros(2, 2), None)
    with pytest.raises(InputError, match="a single example does not fit in memory"):
        observe.usable(model, inputs, observe.layers_of(model)[0])
