"""What `memdiag train-gapt` starts from: a model or a config, its tokenizer, and the texts as sequences."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from memdiag import checkpoint as checkpoints
from memdiag import device as devices
from memdiag import observe, tasks
from memdiag.checkpoint import Checkpoint, pad_id, tokenizer_fingerprint
from memdiag.checkpoint.guard import refusing
from memdiag.dataset import Dataset, Example, open_dataset
from memdiag.entropy_report import parse_columns
from memdiag.errors import InputError
from memdiag.packing import Corpus, documents, pack
from memdiag.reading import default_max_length, vocab_size
from memdiag.train_gapt_report import DEFAULT_CONFIG, DEFAULT_DATA, HOLD_OUT_EVERY, TrainGaptOptions

log = logging.getLogger("memdiag")
LONGEST = 1024  # tokens of a sequence when the user does not say


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything that was opened, before anything is trained."""

    checkpoint: Checkpoint | None
    config: dict[str, Any]
    config_name: str
    train: Dataset
    val: Dataset | None  # None: part of `train` is held out
    tokenizer: Any
    options: TrainGaptOptions

    def model(self) -> nn.Module:
        """The model at update 0, in float32."""
        if self.checkpoint is None:
            name, model = self.config_name, checkpoints.new_model(self.config_name, self.config, self.options.seed)
        else:
            name, model = str(self.checkpoint.path), self.checkpoint.load(dtype="float32")
        with refusing(f"{name}: its model cannot run"):
            is_causal = observe.predicts_next_token(model.eval(), torch.arange(2)[None])
        if vocab_size(model) is None or not is_causal:
            raise InputError(f"{name}: is no causal language model: its logits at a token depend on later ones")
        return model

    def identity(self) -> dict[str, Any]:
        """What decides the numbers."""
        config = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()
        return {
            "model": config if self.checkpoint is None else self.checkpoint.fingerprint(),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "dataset": self.train.fingerprint(),
            "val": None if self.val is None else self.val.fingerprint(),
        }

    def meta(self) -> dict[str, Any]:
        """What the report says of its inputs."""

        def told(dataset: Dataset) -> dict[str, Any]:
            return {"name": dataset.name, "fingerprint": dataset.fingerprint(), "columns": dataset.columns}

        held_out = f"of the training data, the example before every {HOLD_OUT_EVERY}th"
        checkpoint = self.checkpoint and {"name": self.checkpoint.name, "weights": self.checkpoint.fingerprint()}
        return {
            "checkpoint": checkpoint,
            "config": self.config,
            "dataset": told(self.train),
            "val": held_out if self.val is None else told(self.val),
            "device": devices.describe(devices.resolve(self.options.device)),
        }

    def task(self) -> str | None:
        """The task trained on, which a checkpoint keeps."""
        return self.train.name if self.train.name.startswith(tasks.PREFIX) else None


def open_inputs(name: str | None, options: TrainGaptOptions) -> Inputs:
    """Open everything the command will read.

    Raises:
        InputError: anything that is not there, not readable or does not fit.
    """
    checkpoint = None
    if name is not None:
        if options.config is not None:
            raise InputError("CKPT and --config both say what model it is; give one of them")
        found = checkpoints.open_checkpoints(name)
        if len(found) > 1:
            raise InputError(f"{name} is a run of {len(found)} checkpoints; give one of them, e.g. {found[-1].path}")
        checkpoint = found[0]
    config_name = options.config or DEFAULT_CONFIG
    config = checkpoints.read_config(config_name) if checkpoint is None else checkpoint.config
    roles = parse_columns(options.columns) or {}
    data = options.data or (checkpoint.task if checkpoint else None) or DEFAULT_DATA
    if options.data is None:
        log.info("no --data: training on %s", data)
    train = open_dataset(data, columns=roles, limit=options.limit)
    val = None if options.val is None else open_dataset(options.val, columns=roles)
    inputs = Inputs(checkpoint, config, config_name, train, val, None, options)
    tokenizer = _tokenizer(inputs) if train.kind == "text" else None
    return Inputs(checkpoint, config, config_name, train, val, tokenizer, options)


def _tokenizer(inputs: Inputs) -> Any:
    """That of --tokenizer, of the checkpoint, or a new one for a new model."""
    given = inputs.options.tokenizer
    if inputs.checkpoint is not None:
        found = inputs.checkpoint.tokenizer(given)
        if found is None:
            raise InputError(f"{inputs.checkpoint.path}: has no tokenizer; give its directory with --tokenizer")
        return found
    if given is not None:
        return checkpoints.read_tokenizer(given)
    size = inputs.config.get("vocab_size")
    if type(size) is not int:
        raise InputError(f"{inputs.config_name}: has no vocab_size; give a tokenizer with --tokenizer")
    texts = (text for row, text in inputs.train.texts() if inputs.val is not None or not is_held_out(row))
    return checkpoints.train_tokenizer(texts, size)


def is_held_out(row: int) -> bool:
    """Whether an example is kept for validation when there is no --val."""
    return row % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1


@dataclass(frozen=True, eq=False)
class Sequences:
    """The texts as this model reads them."""

    train: Corpus
    val: Corpus | None
    length: int
    pad_id: int


def sequences_of(inputs: Inputs, model: nn.Module) -> Sequences:
    """Tokenise everything.

    Raises:
        InputError: too few tokens, sequences that the model cannot take, or a vocabulary that does not fit.
    """
    options, size, tokenizer = inputs.options, vocab_size(model), inputs.tokenizer
    if tokenizer is not None and size is not None and len(tokenizer) > size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {size}; give the tokenizer that goes with it, "
            "or a config with a larger vocab_size"
        )
    positions = default_max_length(model)
    length = options.max_length or min(LONGEST, positions)
    stated = getattr(observe.text_config(model), "max_position_embeddings", None)
    if isinstance(stated, int) and length > stated:
        raise InputError(f"--max-length {length} is more than the {stated} positions of this model")
    if length < options.patch_size:
        raise InputError(
            f"sequences of {length} tokens are shorter than a patch of {options.patch_size}; use a smaller --patch-size"
        )
    end = getattr(tokenizer, "eos_token_id", None) if tokenizer is not None else None

    def corpus(dataset: Dataset, *, keep: Any, tail: bool) -> Corpus:
        examples = dataset.examples(
            tokenizer=tokenizer, max_length=length if options.documents else None, vocab_size=size
        )
        kept: Iterator[Example] = (example for example in examples if keep(example.row))
        return documents(kept) if options.documents else pack(kept, length, end=end, keep_tail=tail)

    split = inputs.val is None
    train = corpus(inputs.train, keep=lambda row: not (split and is_held_out(row)), tail=False)
    if not len(train) or not train.n_patches(np.arange(len(train)), options.patch_size):
        unit = "example fills a patch" if options.documents else f"sequence of {length} tokens"
        raise InputError(
            f"{inputs.train.name}: has {len(train.tokens)} tokens to train on, which make no {unit}; give more text, "
            f"or a smaller {'--patch-size' if options.documents else '--max-length'}"
        )
    if inputs.val is None:
        val = corpus(inputs.train, keep=is_held_out, tail=True)
        if not len(val):
            log.info(
                "%s has fewer than %d examples, so none is held out; give --val", inputs.train.name, HOLD_OUT_EVERY
            )
    else:
        val = corpus(inputs.val, keep=lambda row: True, tail=True)
        if not len(val):
            raise InputError(f"--val {inputs.val.name}: has no text of two tokens to predict from; give more")
    return Sequences(train, val if len(val) else None, length, pad_id(getattr(model, "config", None), tokenizer))
