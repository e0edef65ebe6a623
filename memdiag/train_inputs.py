"""What `memdiag train` starts from: a dataset read whole, labels with or without corruption, and a new model.

Axes: b example, t token.
"""

from __future__ import annotations

import array
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from memdiag import checkpoint as checkpoints
from memdiag import device as devices
from memdiag import observe, tasks
from memdiag.checkpoint import pad_id, tokenizer_fingerprint
from memdiag.dataset import Dataset, Example, open_dataset
from memdiag.entropy_report import parse_columns
from memdiag.errors import InputError
from memdiag.packing import Corpus, documents
from memdiag.reading import default_max_length, vocab_size
from memdiag.supervised import Examples, Ints
from memdiag.train_models import digest, fitting_model, given_model
from memdiag.train_report import TrainOptions

LONGEST = 1024  # tokens of a sequence when the user does not say
TOKENS = 512  # of the tokenizer that is made for a classifier of texts
MOST_CLASSES = 1024  # more than this, and more than there are examples, is no set of classes
SPLIT, CORRUPTION = 1, 2  # keys of the draws beside the seed

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything that was read, before anything is trained."""

    options: TrainOptions
    train: Dataset
    test: Dataset | None  # None: none, or part of `train` is held out
    examples: Examples
    held_out: Examples | None
    true_labels: Ints | None  # (b,) of `examples`; None: not known
    corrupted: Bools | None  # (b,)
    groups: Sequence[str] | None  # (b,) which examples belong together; None: the data does not say
    tokenizer: Any
    name: str  # of the model, for people
    config: dict[str, Any] | None  # of the model; None: the factory knows
    new: Callable[[int], nn.Module]  # the model at update 0, of a seed always the same

    @property
    def language(self) -> bool:
        """Whether it is a language model that is trained."""
        return self.examples.labels is None

    @property
    def pad_id(self) -> int:
        """The token to pad with."""
        return pad_id(self.config, self.tokenizer)

    def identity(self, model: nn.Module) -> dict[str, Any]:
        """What decides the numbers; the model is the one at update 0."""
        return {
            "model": hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest(),
            "weights": digest(model),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "dataset": self.train.fingerprint(),
            "test": None if self.test is None else self.test.fingerprint(),
        }

    def meta(self) -> dict[str, Any]:
        """What the reports say of their inputs."""

        def told(dataset: Dataset) -> dict[str, Any]:
            return {"name": dataset.name, "fingerprint": dataset.fingerprint(), "columns": dataset.columns}

        share = self.options.test_fraction
        drawn = None if share is None else f"{share:g} of the training data, drawn by the seed"
        return {
            "model": self.name,
            "config": self.config,
            "dataset": told(self.train),
            "test": drawn if self.test is None else told(self.test),
            "device": devices.describe(devices.resolve(self.options.device)),
        }

    def task(self) -> str | None:
        """The task trained on, which a checkpoint keeps."""
        return self.train.name if self.train.name.startswith(tasks.PREFIX) else None


def open_inputs(options: TrainOptions) -> Inputs:
    """Open and read everything the command needs.

    Raises:
        InputError: anything that is not there, not readable or does not fit.
    """
    if options.data is None:
        raise InputError("nothing to train on; give a task or a file, e.g. task:digits")
    roles = parse_columns(options.columns) or {}
    train = _with_truth(open_dataset(options.data, columns=roles, limit=options.limit), options, roles)
    test_roles = {role: name for role, name in roles.items() if role not in ("truth", "true_label", "group")}
    test = None if options.test is None else open_dataset(options.test, columns=test_roles)
    if test is not None and test.kind != train.kind:
        raise InputError(f"--test {test.name} holds {test.kind}, and {train.name} {train.kind}; give what goes with it")
    language = options.config is not None or (train.kind != "features" and not train.has_labels)
    _check_kind(train, options, language)
    if test is not None and not language and not test.has_labels:
        raise InputError(f"--test {test.name}: has no column of labels; name it with --columns label=NAME")
    split = _split(train, options)
    reader = _Reader(options, train, test, split, language)
    return reader.read()


def _with_truth(dataset: Dataset, options: TrainOptions, roles: Mapping[str, str]) -> Dataset:
    """A task that says which labels are wrong is believed without being asked."""
    assert options.data is not None
    if not dataset.name.startswith(tasks.PREFIX):
        return dataset
    known = {"truth": "corrupted", "true_label": "true_label"}
    more = {role: c for role, c in known.items() if role not in roles and c in dataset.source.columns}
    return open_dataset(options.data, columns={**roles, **more}, limit=options.limit) if more else dataset


def _check_kind(train: Dataset, options: TrainOptions, language: bool) -> None:
    """Refuse a model that cannot read what the dataset holds."""
    if language:
        if train.kind == "features":
            raise InputError(f"{train.name}: holds features; --config is for a language model of text or input_ids")
        if options.arch not in (None, "transformer"):
            raise InputError(f"{train.name}: holds {train.kind} without labels; --arch {options.arch} needs labels")
        if options.width is not None or options.depth is not None or options.standardize is not None:
            raise InputError("--width, --depth and --standardize are for classifiers; give --config with a config.json")
        if options.corruption:
            raise InputError(f"--corruption replaces labels, and there are none in {train.name}; leave it out")
        return
    if not train.has_labels:
        raise InputError(f"{train.name}: has no column of labels to train on; name it with --columns label=NAME")
    if train.kind == "features" and options.arch == "transformer":
        raise InputError(f"{train.name}: holds features; --arch transformer reads tokens, use mlp or cnn")
    if train.kind != "features" and options.arch in ("mlp", "cnn"):
        raise InputError(f"{train.name}: holds {train.kind}; --arch {options.arch} reads features, use transformer")
    if train.kind != "features" and options.standardize:
        raise InputError(f"--standardize is for features, and {train.name} holds {train.kind}")
    if train.kind != "features" and options.depth not in (None, 1):
        raise InputError(f"--arch transformer has one block; --depth {options.depth} needs a model of yours, --model")


def _split(train: Dataset, options: TrainOptions) -> Bools | None:
    """Which rows are held out by --test-fraction."""
    if options.test_fraction is None:
        return None
    n = train.n_examples
    n_test = round(options.test_fraction * n)
    if not 0 < n_test < n:
        raise InputError(f"--test-fraction {options.test_fraction}: of {n} examples {n_test} would be held out")
    found = np.zeros(n, dtype=np.bool_)
    found[np.random.default_rng([options.seed, SPLIT]).permutation(n)[:n_test]] = True
    return found


def corrupt(labels: Ints, share: float, seed: int) -> tuple[Ints, Bools]:
    """int(share · b) labels, each replaced by one of the other classes that occur, uniformly.

    Returns:
        (b,) labels, (b,) which of them were replaced. A larger share replaces the same ones and more.
    Raises:
        InputError: there is no other class.
    """
    classes, codes = np.unique(labels, return_inverse=True)
    n, rng = len(labels), np.random.default_rng([seed, CORRUPTION])
    order = rng.permutation(n)
    replaced = np.zeros(n, dtype=np.bool_)
    replaced[order[: int(share * n)]] = True
    if len(classes) < 2:
        if replaced.any():
            raise InputError(f"all labels are {labels[0]}: --corruption has no other class to replace them by")
        return labels, replaced
    shift = rng.integers(1, len(classes), size=n)
    return np.where(replaced, classes[(codes + shift) % len(classes)], labels), replaced


# -- reading -------------------------------------------------------------------------------------------------------


@dataclass
class _Held:
    """Examples of one side as they come."""

    rows: array.array[int]
    ids: list[str]
    labels: array.array[int]
    true_labels: list[int | None]
    truth: list[bool | None]
    groups: list[str | None]

    def add(self, example: Example) -> None:
        self.rows.append(example.row)
        self.ids.append(example.example_id)
        self.true_labels.append(example.true_label)
        self.truth.append(example.truth)
        self.groups.append(example.group)
        if example.label is not None:
            self.labels.append(example.label)

    def named_groups(self) -> list[str] | None:
        return [group for group in self.groups if group is not None] if None not in self.groups else None


@dataclass
class _Reader:
    """Reads the dataset once, and makes the model that fits it."""

    options: TrainOptions
    train: Dataset
    test: Dataset | None
    split: Bools | None
    language: bool

    def read(self) -> Inputs:
        options = self.options
        given = self.language or options.model is not None
        made = given_model(options, language=self.language) if given else None
        size, length, tokenizer = None, options.max_length, None
        if made is not None:
            name, config, new = made
            model = new(options.seed)
            size = vocab_size(model)
            positions = default_max_length(model)
            stated = getattr(observe.text_config(model), "max_position_embeddings", None)
            if length is not None and isinstance(stated, int) and length > stated:
                raise InputError(f"--max-length {length} is more than the {stated} positions of this model")
            length = length or min(LONGEST, positions)
        if self.train.kind == "text":
            tokenizer = self._tokenizer(size)
            if size is not None and len(tokenizer) > size:
                raise InputError(f"the tokenizer has {len(tokenizer)} tokens and the model {size}; give another one")
            size = size or len(tokenizer)
        held, examples = self._examples(self.train, tokenizer, length, size, lambda row: not self._is_test(row))
        self._check_labels(examples)
        if made is None:
            name, config, new = fitting_model(self.train.name, examples, options, size)
            length = config.get("positions", length)
            size = config.get("tokens", size)
        held_out = self._held_out(tokenizer, length, size, examples)
        true_labels, corrupted = self._truth(held, examples)
        if options.corruption:
            assert examples.labels is not None
            if corrupted is not None and corrupted.any():
                raise InputError(
                    f"{self.train.name}: {int(corrupted.sum())} of its labels are wrong already; leave --corruption out"
                )
            true_labels = examples.labels if true_labels is None else true_labels
            labels, corrupted = corrupt(examples.labels, options.corruption, options.seed)
            examples = examples.labelled(labels)
        return Inputs(
            options,
            self.train,
            self.test,
            examples,
            held_out,
            true_labels,
            corrupted,
            held.named_groups(),
            tokenizer,
            name,
            config,
            new,
        )

    def _is_test(self, row: int) -> bool:
        return self.split is not None and bool(self.split[row])

    def _tokenizer(self, size: int | None) -> Any:
        if self.options.tokenizer is not None:
            return checkpoints.read_tokenizer(self.options.tokenizer)
        if self.options.model is not None and size is None:
            raise InputError(f"{self.options.model}: says no number of tokens; give a tokenizer with --tokenizer")
        texts = (text for row, text in self.train.texts() if not self._is_test(row))
        return checkpoints.train_tokenizer(texts, size or TOKENS)

    def _examples(
        self, dataset: Dataset, tokenizer: Any, length: int | None, size: int | None, keep: Callable[[int], bool]
    ) -> tuple[_Held, Examples]:
        held = _Held(array.array("q"), [], array.array("q"), [], [], [])
        found = dataset.examples(tokenizer=tokenizer, max_length=length, vocab_size=size)
        kept = (example for example in found if keep(example.row))
        if self.language:
            inputs: NDArray[np.float32] | Corpus = documents(_noted(kept, held, at_least=2))
            if not held.ids:
                raise InputError(f"{dataset.name}: has no example of two tokens to predict from; give longer ones")
        elif dataset.kind == "features":
            inputs = _features(_noted(kept, held))
        else:
            inputs = _tokens(_noted(kept, held))
        labels = None if self.language else np.array(held.labels, dtype=np.int64)
        return held, Examples(np.array(held.rows, dtype=np.int64), held.ids, inputs, labels)

    def _check_labels(self, examples: Examples) -> None:
        labels = examples.labels
        if labels is None:
            return
        low, high = int(labels.argmin()), int(labels.argmax())
        if labels[low] < 0:
            raise InputError(
                f"{self.train.name}: row {examples.rows[low]}: label is {labels[low]}; wanted classes 0, 1, 2, ..."
            )
        if labels[high] >= max(MOST_CLASSES, len(labels)):
            raise InputError(
                f"{self.train.name}: row {examples.rows[high]}: label is {labels[high]}, among {len(labels)} examples; "
                "wanted classes 0, 1, 2, ..."
            )

    def _held_out(
        self, tokenizer: Any, length: int | None, size: int | None, examples: Examples
    ) -> Examples | None:  # fmt: skip
        if self.test is None and self.split is None:
            return None
        source = self.test or self.train
        _, found = self._examples(
            source, tokenizer, length, size, lambda row: self.test is not None or self._is_test(row)
        )
        if found.labels is not None and examples.labels is not None:
            known = int(examples.labels.max())
            bad = (found.labels < 0) | (found.labels > known)
            if bad.any():
                row = int(bad.argmax())
                raise InputError(
                    f"{source.name}: row {found.rows[row]}: the held-out label {found.labels[row]} is none of those "
                    f"trained on, 0 to {known}"
                )
        if isinstance(found.inputs, np.ndarray) and isinstance(examples.inputs, np.ndarray):
            own, theirs = list(examples.inputs.shape[1:]), list(found.inputs.shape[1:])
            if own != theirs:
                raise InputError(f"{source.name}: features have shape {theirs}, and {self.train.name}'s {own}")
        return found

    def _truth(self, held: _Held, examples: Examples) -> tuple[Ints | None, Bools | None]:
        true_labels = None if None in held.true_labels or self.language else np.array(held.true_labels, dtype=np.int64)
        truth = None if None in held.truth else np.array(held.truth, dtype=np.bool_)
        return true_labels, truth


def _noted(examples: Iterable[Example], held: _Held, at_least: int = 1) -> Iterator[Example]:
    """The examples that are long enough, noted down on their way."""
    for example in examples:
        if example.input_ids is None or len(example.input_ids) >= at_least:
            held.add(example)
        yield example


def _features(examples: Iterable[Example]) -> NDArray[np.float32]:
    """All features (b, ...), on the disk."""
    shape: tuple[int, ...] = ()
    n = 0
    with tempfile.TemporaryFile() as file:
        for example in examples:
            assert example.features is not None
            shape, n = example.features.shape, n + 1
            file.write(example.features.tobytes())
        file.flush()
        return np.memmap(file, dtype=np.float32, mode="r", shape=(n, *shape))


def _tokens(examples: Iterable[Example]) -> Corpus:
    """All tokens, a sequence for each example, whatever its length."""
    tokens, lengths = array.array("i"), array.array("q")
    for example in examples:
        assert example.input_ids is not None
        tokens.extend(example.input_ids.tolist())
        lengths.append(len(example.input_ids))
    sizes = np.array(lengths, dtype=np.int64)
    return Corpus(np.array(tokens, dtype=np.int32), np.cumsum(sizes) - sizes, sizes, len(sizes), 0)
