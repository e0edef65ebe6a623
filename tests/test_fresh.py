"""New models and tokenizers: from a config and a seed alone, refused in one line where that makes none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from memdiag.checkpoint import new_model, pad_id, read_config, read_tokenizer, train_tokenizer
from memdiag.checkpoint.fresh import CONFIGS
from memdiag.errors import InputError

TINY = {"vocab_size": 32, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2}
GPT2 = {"model_type": "gpt2"} | TINY
LLAMA = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 16}
TOKENIZER = train_tokenizer(["the cat sat on the mat", "naïve café, 你好", "  two  spaces ."] * 5, 300)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- configs -------------------------------------------------------------------------------------------------------


def test_a_config_has_a_name_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "mine.json").write_text(json.dumps(GPT2))
    assert read_config(str(tmp_path)) == read_config(str(tmp_path / "config.json")) == LLAMA
    assert read_config(str(tmp_path / "mine.json")) == GPT2
    tiny = read_config("gpt2-tiny")
    tiny["n_layer"] = 99  # a copy
    assert read_config("gpt2-tiny")["n_layer"] == 4


@pytest.mark.parametrize(("name", "n"), [("gpt2-tiny", 241_024), ("gpt2-small", 124_439_808)])
def test_named_configs_make_models_of_a_known_size_without_dropout(name: str, n: int) -> None:
    config = read_config(name)
    if n > 10**6:
        d, layers = config["n_embd"], config["n_layer"]
        count = (config["vocab_size"] + config["n_positions"]) * d + layers * (12 * d * d + 13 * d) + 2 * d
    else:
        model = new_model(name, config, 0)
        count = sum(p.numel() for p in model.parameters())
        assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.0}
    assert count == n
    assert {config[key] for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")} == {0.0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2-tny", "no config 'gpt2-tny'; there are gpt2-small, gpt2-tiny; did you mean 'gpt2-tiny'?"),
        ("x" * 300, f"no config '{'x' * 300}'; there are gpt2-small, gpt2-tiny"),
        ("a\0b", "no config 'a\\x00b'; there are gpt2-small, gpt2-tiny"),
        ("not-there.json", "not-there.json: no such file; give a Hugging Face config.json, or gpt2-tiny, gpt2-small"),
    ],
    ids=["misspelt", "long", "nul", "file"],
)
def test_a_config_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        read_config(name)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "gp', "not JSON"),
        ("\xff\xfe", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "holds a list, wanted a JSON object"),
    ],
    ids=["cut off", "binary", "deep", "list"],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=message) as error:
        read_config(str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: No such file or directory"):
        read_config(str(tmp_path))


# --- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_weights_depend_on_config_and_seed_alone(config: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        first = new_model("here", config, 0)
        torch.rand(7)
        before = torch.random.get_rng_state()
        again, other = new_model("there", dict(config), 0), new_model("here", config, 2**32 - 1)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert same(first, again)
    assert not same(first, other)
    assert first.training
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert all(p.requires_grad and p.isfinite().all() and not p.is_meta for p in first.parameters())


def test_weights_are_float32_whatever_the_config_says() -> None:
    for key in ("dtype", "torch_dtype"):
        model = new_model("here", LLAMA | {key: "bfloat16"}, 0)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert same(model, new_model("here", LLAMA, 0))


def test_a_config_is_not_changed() -> None:
    config = json.loads(json.dumps(GPT2))
    new_model("here", config, 0)
    assert config == GPT2


def test_code_that_a_config_brings_is_not_run() -> None:
    """Of a known model_type it is not needed."""
    model = new_model("here", GPT2 | {"auto_map": {"AutoModelForCausalLM": "evil--repo.module.Model"}}, 0)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert same(model, new_model("here", GPT2, 0))


VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TINY, "config.json has no model_type, so there is no telling what model it is"),
        ({"model_type": 3}, "config.json has no model_type"),
        ({"model_type": "gpt-2"}, "config.json has model_type 'gpt-2', which transformers [0-9.]+ does not know"),
        ({"model_type": "mine", "auto_map": {"AutoModel": "m.M"}}, "code shipped with the checkpoint, .* never runs"),
        (VIT, "makes no causal language model"),
        ({"model_type": "t5"}, "t5 is an encoder-decoder model"),
        (GPT2 | {"n_head": 3}, "makes no causal language model: ValueError: .*divisible"),
        (GPT2 | {"n_embd": "16"}, "makes no causal language model"),
        (GPT2 | {"n_embd": -16}, "makes no causal language model"),
        (GPT2 | {"n_layer": 10**9}, "asks for 1e[+]09 layers; is the config damaged?"),
        (GPT2 | {"vocab_size": 10**12}, "asks for 1.6e[+]13 weights; is the config damaged?"),
        (GPT2 | {"n_inner": 10**12}, "asks for .* weights; is the config damaged?"),
        (GPT2 | {"n_embd": 10**9}, "makes no causal language model"),
        (GPT2 | {"vocab_size": 10**30}, "makes no causal language model"),
    ],
)
def test_a_config_that_makes_no_causal_language_model_is_refused_in_one_line(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        new_model("some/config.json", config, 0)
    assert str(error.value).startswith("some/config.json: ")
    assert "\n" not in str(error.value)


def test_configs_are_causal_and_end_with_token_0() -> None:
    for config in CONFIGS.values():
        assert (config["model_type"], config["eos_token_id"]) == ("gpt2", 0)
        assert pad_id(config) == 0


# --- tokenizers ----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.text())
@example("a . b 's , ! n't")
@example("<|endoftext|> in the middle <|endoftext|>")
@example("\x00\x7f\ufffd\U0010ffff e\u0301")
@example("  two  spaces \r\n\t")
def test_any_text_comes_back_as_it_was(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= token < len(TOKENIZER) for token in ids)
    assert len(ids) <= len(text.encode())


def test_token_0_ends_a_text_and_none_is_unknown() -> None:
    assert (TOKENIZER.eos_token_id, TOKENIZER.bos_token_id, TOKENIZER.unk_token_id) == (0, 0, None)
    assert TOKENIZER("a<|endoftext|>b")["input_ids"].count(0) == 1
    assert TOKENIZER("cat")["input_ids"].count(0) == 0  # nothing is added


def test_what_occurs_often_is_one_token_and_the_size_is_kept() -> None:
    texts = ["banana bandana"] * 50
    assert len(train_tokenizer(texts, 257)) == 257
    assert len(train_tokenizer(texts, 260)) == 260
    assert len(train_tokenizer(texts, 5000)) <= 275  # there is no more to merge
    sizes = [len(train_tokenizer(texts, size)("banana bandana")["input_ids"]) for size in (257, 260, 5000)]
    assert sizes[0] == 14
    assert sizes[0] > sizes[1] > sizes[2] == 2
    assert len(train_tokenizer([], 300)) == 257


def test_a_tokenizer_depends_on_its_texts_alone_and_survives_its_directory(tmp_path: Path) -> None:
    texts = ["one two three two one", "tea for two"] * 3
    first, again = train_tokenizer(texts, 280), train_tokenizer(iter(texts), 280)
    assert first.get_vocab() == again.get_vocab()
    first.save_pretrained(tmp_path)
    opened = read_tokenizer(tmp_path)
    for text in (*texts, "é <|endoftext|> . x"):
        ids = first(text)["input_ids"]
        assert again(text)["input_ids"] == opened(text)["input_ids"] == ids
        assert opened.decode(ids) == text
    assert opened.eos_token_id == 0


@pytest.mark.parametrize("size", [256, 1, 0, -5])
def test_a_vocabulary_too_small_for_the_bytes_is_refused(size: int) -> None:
    with pytest.raises(InputError) as error:
        train_tokenizer(["text"], size)
    assert str(error.value) == f"a vocabulary of {size} cannot hold all bytes; wanted at least 257"


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer there"):
        read_tokenizer(tmp_path)


def test_a_vocabulary_beyond_any_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match=r"a vocabulary of 3e[+]21 tokens is more than any tokenizer has"):
        train_tokenizer(["a"], 3 * 10**21)


def test_a_model_that_the_memory_cannot_hold_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)  # a page of 1000 bytes, 1000 of them
    with pytest.raises(InputError, match=r"some/config.json: asks for 1[.]61e[+]06 weights, 0 GiB; there are 0"):
        new_model("some/config.json", GPT2 | {"vocab_size": 10**5}, 0)
