"""What `memdiag score` has to do: which scores, read from which checkpoint, in which pieces of the data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn

from memdiag import observe, scores, scoring, tables, trajectory
from memdiag.checkpoint import pad_id
from memdiag.dataset import Batch, Example, batches
from memdiag.errors import InputError
from memdiag.reading import default_max_length, vocab_size
from memdiag.score_inputs import Inputs
from memdiag.score_report import KEY, OF_CLASSIFIER, OF_LANGUAGE, TRUTH, VERSION, ScoreOptions, row_of
from memdiag.scoring import OVER_CHECKPOINTS, SERIES, Kind
from memdiag.tables import column

PIECE, MOST_PIECES = 1024, 1000  # rows of a piece at least, and pieces of a dataset at most
PROBE = 4  # examples on which it is found out what a model is
NUMBER = column(pa.float64(), "observed", nullable=True)


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be done, once the first checkpoint has been looked at."""

    inputs: Inputs
    kind: Kind
    names: tuple[str, ...]  # the report's scores
    at_one: tuple[str, ...]  # of these, those of a single checkpoint
    over: frozenset[str]  # arrays that are wanted of every checkpoint
    piece: int  # rows

    @property
    def truth(self) -> bool:
        """Whether the report has a column of that name."""
        return self.inputs.options.truth is not None

    @property
    def visited(self) -> list[int]:
        """Indices of the checkpoints that are looked at."""
        return list(range(len(self.inputs.checkpoints))) if self.over else [self.inputs.focus]

    def row(self, *, ranked: bool) -> type:
        """The report's rows."""
        classifier, language = self.kind == "classifier", self.kind == "language model"
        language = language and bool(self.inputs.checkpoints)
        return row_of(self.names, classifier=classifier, language=language, truth=self.truth, ranks=ranked)

    def keys(self) -> dict[str, Any]:
        """The columns that are no scores."""
        own = OF_CLASSIFIER if self.kind == "classifier" else OF_LANGUAGE
        return {**KEY, **(own if self.inputs.checkpoints else {}), **(TRUTH if self.truth else {})}

    def part_row(self, index: int) -> type:
        """The rows of what checkpoint `index` shows of a piece."""
        more = [*self.over, *(self.at_one if index == self.inputs.focus else ())]
        return tables.row_class("PartRow", "score.part", VERSION, self.keys() | dict.fromkeys(more, NUMBER))


def job_of(inputs: Inputs, model: nn.Module) -> Job:
    """Which scores, and what they need of which checkpoint.

    Raises:
        InputError: a score that was asked for cannot be had from this input; the reason is said.
    """
    options, dataset = inputs.options, inputs.dataset
    assert dataset is not None
    kind = scoring.kind_of(model, probe_of(inputs, model))
    reasons = scoring.possible(
        kind,
        features=dataset.kind == "features",
        several=len(inputs.checkpoints) > 1,
        trajectory=inputs.epochs is not None,
        reference=inputs.reference is not None,
    )
    names = _chosen(options, reasons)
    if inputs.reference is not None and kind == "classifier":
        raise InputError("--reference is for language models; this is a classifier")
    over: set[str] = set()
    at_one = []
    for name in names:
        needs = scores.needs([name])
        if needs & set(SERIES):
            over |= set() if inputs.epochs is not None else set(SERIES)
        elif needs & {"gradient_norms", "input_gradient_norms", "input_hessian_traces"}:
            over |= {one for one, many in OVER_CHECKPOINTS.items() if many in needs}
        else:
            at_one.append(name)
    if {"grand", "gradnorm"} & set(names):
        at_one.append("_gradient_norm")
    piece = max(PIECE, -(-dataset.n_examples // MOST_PIECES))
    return Job(inputs, kind, names, tuple(at_one), frozenset(over), piece)


def _chosen(options: ScoreOptions, reasons: dict[str, str | None]) -> tuple[str, ...]:
    asked = options.names()
    for name in asked or ():
        if reasons[name] is not None:
            raise InputError(f"--scores {name}: {reasons[name]}")
    return asked or tuple(name for name, reason in reasons.items() if reason is None)


def job_of_trajectory(inputs: Inputs) -> Job:
    """The job of a trajectory alone."""
    reasons = {
        name: None if scores.load(name).NEEDS == "trajectory" else "it needs checkpoints, and this is a trajectory"
        for name in scores.NAMES
    }
    names = _chosen(inputs.options, reasons)
    assert inputs.epochs is not None
    labelled = next(trajectory.read_chunks(inputs.epochs))["label"] is not None
    return Job(inputs, "classifier" if labelled else "language model", names, (), frozenset(), trajectory.GROUP)


def probe_of(inputs: Inputs, model: nn.Module, n: int = PROBE) -> Batch:
    """The first examples."""
    stream = batches(
        itertools.islice(examples_of(inputs, model), n), tokens_per_batch=2**12, pad_id=pad_of(inputs, model)
    )
    return inputs.with_labels(next(stream))


def examples_of(inputs: Inputs, model: nn.Module, keep: Callable[[int], bool] | None = None) -> Iterator[Example]:
    """The examples to be scored, tokenised for the checkpoint in focus; `keep` says which rows are wanted.

    Raises:
        InputError: longer ones are asked for than the model can read.
    """
    stated, asked = getattr(observe.text_config(model), "max_position_embeddings", None), inputs.options.max_length
    if isinstance(stated, int) and asked is not None and asked > stated:
        raise InputError(f"--max-length {asked} is more than the {stated} positions of this model")
    return inputs.examples(
        tokenizer=inputs.one.tokenizer(inputs.options.tokenizer),
        max_length=inputs.options.max_length or default_max_length(model),
        vocab_size=vocab_size(model),
        keep=keep,
    )


def pad_of(inputs: Inputs, model: nn.Module) -> int:
    """The token that stands where there is none."""
    return pad_id(getattr(model, "config", None), inputs.one.tokenizer(inputs.options.tokenizer))


def path_of(directory: Path, index: int, piece: int) -> Path:
    """Where a checkpoint\'s view of a piece is kept."""
    return directory / f"seen-{index:05d}-{piece:05d}.parquet"
