"""The tokenizer that goes with a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdiag.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model",
         "sentencepiece.bpe.model", "tiktoken.model")  # fmt: skip

END_OF_TEXT = "<|endoftext|>"


def open_tokenizer(checkpoint: Path, step: int | None, given: str | None) -> PreTrainedTokenizerBase | None:
    """See Checkpoint.tokenizer."""
    if given is not None:
        return read_tokenizer(given)
    own = checkpoint if checkpoint.is_dir() else checkpoint.parent
    # A run saves its tokenizer once, beside the checkpoints.
    places = [own, Path(os.path.abspath(own)).parent] if step is not None and checkpoint.is_dir() else [own]
    return next((_load(place) for place in places if _has_tokenizer(place)), None)


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory.

    Raises:
        InputError: there is none, or its files are damaged or need foreign code.
    """
    directory = Path(path)
    if not _has_tokenizer(directory):
        raise InputError(f"{directory}: no tokenizer there (wanted one of {', '.join(FILES[:4])})")
    return _load(directory)


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in FILES)


def _load(directory: Path) -> PreTrainedTokenizerBase:
    from memdiag.checkpoint.guard import mute, quiet, refusing

    with quiet(), mute(), refusing(f"{directory}: its tokenizer cannot be read"):
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        len(tokenizer)  # a damaged vocabulary shows here, not in the middle of a data set
        tokenizer("a b")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of at most `vocab_size` tokens: any text can be encoded, none is unknown. Token 0 ends a text.

    Raises:
        InputError: fewer tokens than there are bytes, or more than can be.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise InputError(f"a vocabulary of {vocab_size} cannot hold all bytes; wanted at least {len(alphabet) + 1}")
    if vocab_size >= 2**31:
        raise InputError(
            f"a vocabulary of {vocab_size:.3g} tokens is more than any tokenizer has; is the config damaged?"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def pad_id(model: Any, tokenizer: Any = None) -> int:
    """The token to pad with: the tokenizer's, else the config's, else 0; always inside the vocabulary.

    Args:
        model: a model with a `config`, the config itself (an object or a dict), or None for a model without one.
    """
    config = getattr(model, "config", model)
    known = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    vocab_size = known.get("vocab_size")
    for found in (getattr(tokenizer, "pad_token_id", None), known.get("pad_token_id")):
        if type(found) is int and found >= 0 and (type(vocab_size) is not int or found < vocab_size):
            return found
    return 0


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """sha256 of what the tokenizer does to text; None for none."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
