"""log p, hits, Min-K%++ and top-k values of each token: by hand, by their definitions, and the same however batched."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from transformers.generation.logits_process import TopKLogitsWarper

from memdiag.errors import InputError
from memdiag.observe import Inputs, call
from memdiag.observe.next_tokens import NextTokens, Scorer, _agree
from memdiag.training import seeded

VOCABULARY = 97
POISON = 7  # a token id that stands under the padding, where its value must not matter
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | SPECIAL
INNER = SIZE | {"intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = INNER | {"num_key_value_heads": 1}
FAMILIES: dict[str, tuple[type[nn.Module], Any]] = {
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, **SPECIAL),
    ),
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPED)),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**INNER)),
    "opt": (OPTForCausalLM, OPTConfig(**SIZE, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16)),
    "phi": (PhiForCausalLM, PhiConfig(**INNER)),  # its head has a bias
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**GROUPED, head_dim=16, final_logit_softcapping=3.0)),
    "cohere": (CohereForCausalLM, CohereConfig(**GROUPED, logit_scale=0.25)),
    "cohere2": (Cohere2ForCausalLM, Cohere2Config(**GROUPED, logit_scale=0.25)),
    "granite": (GraniteForCausalLM, GraniteConfig(**GROUPED, logits_scaling=4.0)),
}
PLAIN = ("gpt2", "llama", "neox", "opt")
ADJUSTED = ("gemma2", "cohere", "cohere2", "granite")


# --- models and text ------------------------------------------------------------------------------------------------


def model_of(family: str, dtype: torch.dtype = torch.float32, kind: type[nn.Module] | None = None) -> Any:
    """Random weights, large enough that texts are far from uniform and a soft cap or a bias is felt."""
    known, config = FAMILIES[family]
    with seeded(0):
        model: Any = (kind or known)(config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 1.0))
    return model.to(dtype)


class Bigram(nn.Module):
    """The logits after token i are row i (modulo their number) of a table: any distribution can be asked for."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens % len(self.table)]


class Shared(Bigram):
    """Its logits are its own memory."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[None, : tokens.shape[1]].expand(len(tokens), -1, -1)


def texts(*lengths: int, vocabulary: int = VOCABULARY, seed: int = 0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=g).tolist() for length in lengths]


def batch(rows: list[list[int]], extra: int = 0, pad: int = POISON) -> Inputs:
    width = max(len(row) for row in rows) + extra
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows], dtype=torch.int64)
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return Inputs(tokens, mask, None, None)


def score(model: nn.Module, inputs: Inputs, top_k: int | None = 5, top_at: Tensor | None = None) -> NextTokens:
    return Scorer(model, inputs, moments=True, top_k=top_k)(inputs, top_at=top_at)


def bigram(*distributions: list[float]) -> Bigram:
    return Bigram(torch.tensor(distributions).log())


# --- the definition -------------------------------------------------------------------------------------------------


def defined(logits: Tensor, target: int, k: int) -> tuple[float, bool, float, float]:
    """log p, hit, (log p − μ) / σ and the top-k log q of one token, one term at a time in float64."""
    values = [float(value) for value in logits.double()]
    highest = max(values)
    total = math.fsum(math.exp(value - highest) for value in values)
    logs = [value - highest - math.log(total) for value in values]
    p = [math.exp(log) for log in logs]
    mu = math.fsum(a * b for a, b in zip(p, logs) if a)
    variance = math.fsum(a * (b - mu) ** 2 for a, b in zip(p, logs) if a)
    kth = sorted(values, reverse=True)[min(k, len(values)) - 1]
    kept = math.fsum(a for a, value in zip(p, values) if value >= kth)
    top = logs[target] - math.log(kept) if values[target] >= kth else -math.inf
    z = (logs[target] - mu) / math.sqrt(max(variance, 1e-6))
    return logs[target], values.index(highest) == target, z, top


def assert_defined(found: NextTokens, logits: Tensor, rows: list[list[int]], k: int, tol: float, rtol: float) -> None:
    """`logits` are the model's own, (b, t + 1, v)."""
    assert found.z is not None
    assert found.logp_top is not None
    for i, row in enumerate(rows):
        assert found.scored[i].tolist() == [t + 1 < len(row) for t in range(found.scored.shape[1])]
        for t, target in enumerate(row[1:]):
            logp, hit, z, top = defined(logits[i, t], target, k)
            assert found.hit[i, t] == hit
            assert found.logp[i, t] == pytest.approx(logp, abs=tol)
            assert found.z[i, t] == pytest.approx(z, abs=tol, rel=rtol)
            assert found.logp_top[i, t] == pytest.approx(top, abs=tol)
        for values in (found.logp, found.z, found.logp_top):
            assert np.isnan(values[i, len(row) - 1 :]).all()
        assert not found.hit[i, len(row) - 1 :].any()


# --- by hand --------------------------------------------------------------------------------------------------------

DYADIC = [0.5, 0.25, 0.125, 0.125]


def test_dyadic_distribution_by_hand():
    found = score(bigram(*[DYADIC] * 4), batch([[3, 0], [3, 1], [3, 2], [3, 3]]), top_k=2)
    np.testing.assert_allclose(found.logp[:, 0], np.log(DYADIC), atol=1e-6)
    np.testing.assert_allclose(found.z[:, 0], [0.904534, -0.301511, -1.507557, -1.507557], atol=1e-6)
    np.testing.assert_allclose(found.logp_top[:, 0], [math.log(2 / 3), -1.098612, -np.inf, -np.inf], atol=1e-6)
    assert found.hit[:, 0].tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("p", "top", "bottom"), [(0.6, 0.816497, -1.224745), (0.9, 0.333333, -3.0), (0.99, 0.100504, -9.949874)]
)
def test_of_two_outcomes_the_likely_one_scores_less_the_likelier_it_is(p, top, bottom):
    found = score(bigram([p, 1 - p], [p, 1 - p]), batch([[0, 0], [0, 1]]))
    np.testing.assert_allclose(found.z[:, 0], [top, bottom], atol=2e-6)


def test_uniform_and_one_hot_distributions_have_finite_values():
    found = score(bigram([0.25] * 4, [0, 0, 1, 0], [0.25] * 4, [0, 0, 1, 0]), batch([[0, 3, 2]]), top_k=1)
    assert found.logp[0].tolist() == [pytest.approx(-math.log(4)), 0.0]
    assert found.z[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert found.logp_top[0].tolist() == [pytest.approx(-math.log(4)), 0.0]  # all four are tied at rank 1


def test_a_token_that_the_model_rules_out_has_log_p_of_minus_infinity():
    found = score(bigram([0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.4, 0.4]), batch([[0, 2, 1, 0]]), top_k=2)
    np.testing.assert_allclose(found.logp[0], [-np.inf, math.log(0.4), 0.0], atol=1e-7)
    assert found.logp_top[0].tolist() == [-np.inf, pytest.approx(math.log(0.5)), 0.0]
    np.testing.assert_allclose(found.z[0], [-np.inf, 1 / math.sqrt(4), 0.0], atol=1e-6)  # p = .2, .8 as two outcomes


def test_logits_that_are_nan_give_nan_and_no_hit():
    table = torch.zeros(4, 4)
    table[1, 2] = torch.nan
    found = score(Bigram(table), batch([[0, 1, 2, 0]]), top_k=2)
    for values in (found.logp, found.z, found.logp_top):
        assert np.isnan(values[0]).tolist() == [False, True, False]
    assert found.hit[0].tolist() == [False, False, True]


# --- ties -----------------------------------------------------------------------------------------------------------


def test_of_tied_logits_the_lowest_token_id_is_the_hit():
    found = score(Bigram(torch.tensor([[0.0, 2, 1, 2, 2]] * 5)), batch([[0, 1], [0, 3], [0, 4], [0, 0], [0, 2]]))
    assert found.hit[:, 0].tolist() == [True, False, False, False, False]
    first = score(Bigram(torch.tensor([[2.0, 2, 1]] * 3)), batch([[1, 0], [1, 1]]))
    assert first.hit[:, 0].tolist() == [True, False]


@pytest.mark.parametrize("vocabulary", [12, 3001])
@pytest.mark.parametrize("k", [1, 2, 5, 40, 5000])
def test_top_k_is_what_the_sampler_of_transformers_keeps(vocabulary, k):
    g = torch.Generator().manual_seed(k)
    table = torch.randn(12, vocabulary, generator=g)
    table[6:] = (table[6:] * 2).round() / 2  # ties at every rank
    order = table.argsort(descending=True)
    rows = [[i, int(ids[min(rank, vocabulary - 1)])] for i, ids in enumerate(order) for rank in (*range(9), 39, 45)]
    logits = table[[row[0] for row in rows]]
    kept = TopKLogitsWarper(top_k=k)(torch.zeros(len(rows), 1, dtype=torch.int64), logits.double())
    expected = kept.log_softmax(-1).gather(1, torch.tensor([row[1:] for row in rows]))
    found = score(Bigram(table), batch(rows), top_k=k).logp_top
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert k >= vocabulary or (kept.isfinite().sum(1) > k).any()  # there are ties at rank k


def test_leaving_tokens_out_makes_none_of_the_others_less_likely():
    table = torch.randn(64, 4001, generator=torch.Generator().manual_seed(0)) * 14
    rows = [[i, int(table[i].argmax())] for i in range(64)]
    for k in (1, 40, 100, 4000, 4001):
        found = score(Bigram(table), batch(rows), top_k=k)
        assert (found.logp_top >= found.logp).all()  # exactly, where the sums are the same but for rounding
        assert (found.logp_top <= 0).all()
    np.testing.assert_allclose(found.logp_top, found.logp, atol=1e-6)


def test_top_k_where_it_is_asked_for_is_what_it_is_everywhere():
    model, inputs = model_of("gpt2"), batch(texts(9, 4, 12))
    scorer = Scorer(model, inputs, top_k=20)
    asked = torch.rand(3, 11, generator=torch.Generator().manual_seed(0)) < 0.4
    some, everywhere = scorer(inputs, top_at=asked).logp_top, scorer(inputs).logp_top
    assert (np.isfinite(some) & ~asked.numpy()).sum() == 0
    np.testing.assert_array_equal(some[asked.numpy()], everywhere[asked.numpy()])
    assert np.isnan(scorer(inputs, top_at=torch.zeros(3, 11, dtype=torch.bool)).logp_top).all()


# --- by the definition ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_are_their_definitions_as_plain_loops(spread, dtype):
    g = torch.Generator().manual_seed(0)
    table = (torch.randn(50, 1009, generator=g) * spread).to(dtype)
    table[10:15, 300:] = -torch.inf
    rows = texts(7, 1, 5, 2, 12, vocabulary=50)
    rows += [[i, int(table[i].argmax())] for i in range(20)]
    inputs = batch(rows)
    found = score(Bigram(table), inputs, top_k=20)
    exact = dtype == torch.float64
    assert_defined(found, table[inputs.tokens % 50], rows, 20, 1e-12 if exact else 1e-5, 1e-10 if exact else 1e-5)


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_moments_of_a_large_vocabulary_are_those_in_float64(spread):
    g = torch.Generator().manual_seed(1)
    table = torch.randn(6, 50257, generator=g) * spread
    table[3:, 11] = 12 * spread
    rows = texts(6, vocabulary=6) + texts(6, vocabulary=6, seed=3) + [[3, 11], [4, 11], [0, 50256], [5, 0]]
    inputs = batch(rows)
    found = score(Bigram(table), batch(rows), top_k=40)
    logp = table.double().log_softmax(-1)
    mu = (logp.exp() * logp).sum(-1)
    sigma = ((logp.exp() * (logp - mu[:, None]) ** 2).sum(-1)).clamp(min=1e-6).sqrt()
    before, token = inputs.tokens[:, :-1] % 6, inputs.tokens[:, 1:]
    at = found.scored
    np.testing.assert_allclose(found.logp[at], logp[before, token].numpy()[at], atol=1e-5)
    expected = ((logp[before, token] - mu[before]) / sigma[before]).numpy()
    np.testing.assert_allclose(found.z[at], expected[at], atol=1e-5, rtol=1e-5)


def test_logits_that_are_the_models_own_memory_are_left_as_they_are():
    table = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    model = Shared(table.clone())
    score(model, batch(texts(8, 5, vocabulary=30)))
    assert torch.equal(model.table, table)


# --- real architectures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_log_p_is_that_of_the_models_own_logits_without_computing_them(family, monkeypatch):
    model, rows = model_of(family), texts(9, 1, 4, 12, 2)
    inputs = batch(rows)
    logits = model(inputs.tokens, attention_mask=inputs.mask.long()).logits
    scorer = Scorer(model, inputs, moments=True, top_k=5)
    assert scorer.why_fallback is None
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("all logits were computed"))
    found = scorer(inputs)
    expected = logits.float().log_softmax(-1)[:, :-1].gather(-1, inputs.tokens[:, 1:, None])[..., 0].numpy()
    assert np.abs(found.logp - expected)[found.scored].max() <= 1e-4
    assert np.ptp(expected[found.scored]) > 1  # the model is not uniform
    assert_defined(found, logits, rows, 5, 1e-4, 1e-4)


@pytest.mark.parametrize("family", ADJUSTED)
def test_a_head_without_the_models_corrections_would_be_wrong(family):
    model, inputs = model_of(family), batch(texts(12, 9))
    found = Scorer(model, inputs)(inputs)
    naive = model.get_output_embeddings()(model.base_model(inputs.tokens).last_hidden_state).log_softmax(-1)
    naive = naive[:, :-1].gather(-1, inputs.tokens[:, 1:, None])[..., 0].numpy()
    assert np.abs(found.logp - naive)[found.scored].max() > 0.1


def test_a_config_that_names_a_scale_which_the_model_does_not_use_is_not_believed():
    model, inputs = model_of("llama"), batch(texts(12, 9))
    expected = Scorer(model, inputs)(inputs).logp
    model.config.logit_scale = 3.0
    scorer = Scorer(model, inputs)
    assert scorer.why_fallback is None
    np.testing.assert_array_equal(scorer(inputs).logp, expected)


class Scaled(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.7 - 0.1 * output.logits.abs()
        return output


class OneTokenForbidden(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[..., 5] = -torch.inf
        return output


class Trunkless(LlamaForCausalLM):
    base_model_prefix = "nothing"


class Headless(LlamaForCausalLM):
    def get_output_embeddings(self) -> None:
        return None


class Refusing(LlamaForCausalLM):
    def get_output_embeddings(self) -> Any:
        raise NotImplementedError("ask somebody else")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Scaled, "behind the head in a way that is not known"),
        (OneTokenForbidden, "behind the head in a way that is not known"),
        (Trunkless, "no base_model"),
        (Headless, "no output embeddings"),
        (Refusing, "cannot be applied by itself: ask somebody else"),
    ],
)
def test_a_model_whose_head_is_not_understood_is_read_from_its_own_logits(kind, why, dtype):
    model, rows = model_of("llama", dtype, kind), texts(9, 1, 4, 12, 2)
    inputs = batch(rows)
    scorer = Scorer(model, inputs, moments=True, top_k=5)
    assert why in (scorer.why_fallback or "")
    logits = call(model, inputs)
    assert logits is not None
    if dtype == torch.float32:
        assert_defined(scorer(inputs), logits, rows, 5, 1e-4, 1e-4)
    else:
        expected = logits.float().log_softmax(-1)[:, :-1].gather(-1, inputs.tokens[:, 1:, None])[..., 0].numpy()
        off = np.abs(scorer(inputs).logp - expected)[scorer(inputs).scored]
        assert off[np.isfinite(off)].max() <= 0.05  # bfloat16 in batches of other widths


def test_a_fallback_in_pieces_of_rows_is_that_of_the_whole_batch():
    model, inputs = model_of("llama", kind=Scaled), batch(texts(9, 1, 4, 12, 2, 1, 8))
    scorer = Scorer(model, inputs, moments=True)
    whole = scorer(inputs)
    scorer._n_outputs = 2**25 // 24  # as if the vocabulary were so large that two rows fit
    pieces = scorer(inputs)
    np.testing.assert_array_equal(pieces.hit, whole.hit)
    np.testing.assert_allclose(pieces.logp, whole.logp, atol=1e-5)
    np.testing.assert_allclose(pieces.z, whole.z, atol=1e-5)


@pytest.mark.parametrize("family", [*PLAIN, *ADJUSTED])
def test_bfloat16_models_are_summed_in_float32(family):
    model, inputs = model_of(family, torch.bfloat16), batch(texts(9, 1, 4, 12, 2))
    scorer = Scorer(model, inputs, moments=True, top_k=5)
    assert scorer.why_fallback is None
    found = scorer(inputs)
    logits = model(inputs.tokens, attention_mask=inputs.mask.long()).logits
    assert logits.dtype == torch.bfloat16
    expected = logits.double().log_softmax(-1)[:, :-1].gather(-1, inputs.tokens[:, 1:, None])[..., 0].numpy()
    off = np.abs(found.logp - expected)[found.scored]
    assert np.median(off) <= 1e-5  # most logits are the same bits; some round the other way in another product
    assert off.max() <= 0.1
    assert np.isfinite(found.z[found.scored]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_told_from_a_wrong_scale_and_from_a_single_token_treated_apart(dtype):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 256, generator=g, dtype=torch.float64), torch.randn(20000, 256, generator=g)
    logits = (hidden.to(dtype).double() @ weight.to(dtype).double().T).to(dtype)
    assert _agree(hidden.to(dtype) @ weight.to(dtype).T, logits)
    one = logits.clone()
    one[3, 7] += float(logits.abs().max()) * (0.1 if dtype == torch.bfloat16 else 1e-3)
    for other in (logits * 1.01, one, logits.double(), logits[:-1]):
        assert not _agree(other, logits)
    forbidden = logits.clone()
    forbidden[:, 5] = -torch.inf
    assert _agree(forbidden.clone(), forbidden)
    assert not _agree(logits, forbidden)
    assert not _agree(torch.full_like(logits, torch.nan), logits)


def test_the_model_without_its_head_is_called_like_the_whole(monkeypatch):
    model, inputs, calls = model_of("llama"), batch(texts(9, 4)), []
    forward = type(model.base_model).forward

    @functools.wraps(forward)
    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return forward(self, *args, **kwargs)

    scorer = Scorer(model, inputs)
    monkeypatch.setattr(type(model.base_model), "forward", watched)
    scorer(inputs)
    assert len(calls) == 1
    assert calls[0]["use_cache"] is False
    assert torch.equal(calls[0]["attention_mask"], inputs.mask.long())


# --- invariance -----------------------------------------------------------------------------------------------------


def assert_same(found: NextTokens, expected: NextTokens) -> None:
    """The same values for the tokens that both have."""
    t = min(found.scored.shape[1], expected.scored.shape[1])
    np.testing.assert_array_equal(found.scored[:, :t], expected.scored[:, :t])
    np.testing.assert_array_equal(found.hit[:, :t], expected.hit[:, :t])
    for name in ("logp", "z", "logp_top"):
        np.testing.assert_allclose(getattr(found, name)[:, :t], getattr(expected, name)[:, :t], atol=1e-5, err_msg=name)
        assert np.isnan(getattr(found, name)[:, t:]).all()


@pytest.mark.parametrize("family", PLAIN)
def test_padding_batch_size_and_order_of_rows_do_not_matter(family):
    model, rows = model_of(family), texts(*[1 + (5 * i) % 23 for i in range(64)])
    scorer = Scorer(model, batch(rows[:3]), moments=True, top_k=5)
    whole = scorer(batch(rows))
    assert whole.hit.any()
    for pad in (POISON, 0, VOCABULARY - 1, -100):
        assert_same(scorer(batch(rows, extra=12, pad=pad)), whole)
    for i, row in enumerate(rows):
        one = NextTokens(*(getattr(whole, name)[i : i + 1] for name in ("logp", "hit", "scored", "z", "logp_top")))
        assert_same(scorer(batch([row])), one)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    mixed = scorer(batch([rows[i] for i in order]))
    moved = NextTokens(*(getattr(whole, name)[order] for name in ("logp", "hit", "scored", "z", "logp_top")))
    assert_same(mixed, moved)


@pytest.mark.parametrize("family", ["gpt2", "phi", "gemma2"])
def test_how_many_tokens_the_head_is_given_at_once_does_not_matter(family):
    model, inputs = model_of(family), batch(texts(9, 1, 4, 12, 2))
    scorer = Scorer(model, inputs, moments=True, top_k=5)
    expected = scorer(inputs)
    scorer._head.most = 4
    scorer._head.room = None
    assert_same(scorer(inputs), expected)


def test_what_is_found_does_not_depend_on_the_text_of_the_trial():
    model, inputs = model_of("gemma2"), batch(texts(9, 4))
    assert_same(score(model, inputs), Scorer(model, batch([[3]]), moments=True, top_k=5)(inputs))
    without = Inputs(inputs.tokens[:, :4], None, None, None)
    assert_same(score(model, without), score(model, batch(inputs.tokens[:, :4].tolist())))


# --- the edges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, Scaled])
@pytest.mark.parametrize(
    ("rows", "shape"), [([[5]], (1, 0)), ([[5], [6], [7]], (3, 0)), ([[5], [6, 7], [8]], (3, 1)), ([[5, 6]], (1, 1))]
)
def test_a_text_of_one_token_has_nothing_to_score(rows, shape, kind):
    found = score(model_of("llama", kind=kind), batch(rows))
    for values in (found.logp, found.hit, found.scored, found.z, found.logp_top):
        assert values.shape == shape
    assert found.scored.sum() == sum(len(row) - 1 for row in rows)
    assert np.isfinite(found.logp[found.scored]).all()


def test_an_empty_batch_gives_empty_arrays():
    model = model_of("gpt2")
    scorer = Scorer(model, batch(texts(5)), moments=True, top_k=5)
    nothing = Inputs(torch.zeros((0, 6), dtype=torch.int64), torch.zeros((0, 6), dtype=torch.bool), None, None)
    found = scorer(nothing)
    assert found.logp.shape == found.z.shape == found.logp_top.shape == found.hit.shape == (0, 5)


def test_only_what_was_asked_for_is_there():
    model, inputs = model_of("gpt2"), batch(texts(5, 3))
    found = Scorer(model, inputs)(inputs)
    assert found.z is None
    assert found.logp_top is None
    assert found.logp.dtype == np.float64
    assert found.hit.dtype == found.scored.dtype == np.bool_


def test_a_vocabulary_of_one_token_is_certain():
    found = score(Bigram(torch.tensor([[3.0]])), batch([[0, 0, 0]]))
    assert found.logp.tolist() == found.z.tolist() == found.logp_top.tolist() == [[0.0, 0.0]]
    assert found.hit.all()


def test_what_cannot_be_asked_is_refused():
    model, inputs = model_of("gpt2"), batch(texts(5, 3))
    with pytest.raises(InputError, match="top-k is 0, wanted a whole number of at least 1"):
        Scorer(model, inputs, top_k=0)
    with pytest.raises(ValueError, match="made without top_k"):
        Scorer(model, inputs)(inputs, top_at=inputs.mask[:, 1:])
    with pytest.raises(InputError, match="no next-token logits"):
        Scorer(nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Flatten()), inputs)


def test_no_gradient_is_kept():
    model, inputs = model_of("gpt2").requires_grad_(True), batch(texts(5, 3))
    scorer = Scorer(model, inputs, moments=True, top_k=5)
    scorer(inputs)
    assert torch.is_grad_enabled()
    assert not scorer._head.room.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_scorer_made_in_inference_mode_works_outside_of_it():
    model, inputs = model_of("gpt2"), batch(texts(5, 3))
    with torch.inference_mode():
        scorer = Scorer(model, inputs, moments=True, top_k=5)
        inside = scorer(inputs)
    assert_same(scorer(inputs), inside)


# --- memory ---------------------------------------------------------------------------------------------------------

PEAK = """
import resource
from pathlib import Path
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from memdiag.device import peak_memory
from memdiag.observe import Inputs
from memdiag.observe.next_tokens import Scorer

torch.set_num_threads(1)
V = 50257
config = GPT2Config(vocab_size=V, n_embd=64, n_layer=2, n_head=2, n_positions=256)
model = GPT2LMHeadModel(config).eval().requires_grad_(False)
tokens = torch.randint(0, V, (4, 256), generator=torch.Generator().manual_seed(0))
inputs = Inputs(tokens, torch.ones_like(tokens, dtype=torch.bool), None, None)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def above(run):
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident()
    run()
    return peak_memory() - before

scorer = Scorer(model, inputs, moments=True, top_k=40)
with torch.no_grad():
    trunk = above(lambda: model.base_model(tokens, use_cache=False))
    used = above(lambda: scorer(inputs))
    obvious = above(lambda: model(tokens, use_cache=False).logits.float().log_softmax(-1))
    found = scorer(inputs)  # of more tokens than the head is given at once
    for i, row in enumerate(tokens):
        logp = model(row[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
        assert abs(found.logp[i] - logp.gather(-1, row[1:, None])[:, 0].numpy()).max() <= 1e-5
        assert (found.hit[i] == (logp.argmax(-1) == row[1:]).numpy()).all()
    assert 4 * 255 > scorer._head.most
    print(used - trunk, 2 * scorer._head.most * V * 4, obvious, 4 * 256 * V * 4)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a part is only known on Linux")
def test_the_logits_of_a_batch_are_never_held_at_once():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used, two_chunks, obvious, all_logits = (int(part) for part in done.stdout.split())
    assert used < two_chunks < all_logits
    assert obvious > 1.5 * all_logits  # the measurement sees what is held
