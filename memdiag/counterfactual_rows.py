"""The rows of the reports of `memdiag counterfactual`. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from memdiag.tables import column

_RATE = "; language model: mean over models of its token accuracy"


@dataclass(frozen=True)
class CounterfactualRow:
    """One row per example. "In" are the models with its group in their subset, "out" the others."""

    report: ClassVar[str] = "counterfactual"
    schema_version: ClassVar[int] = 1

    row: int = column(pa.int64(), "row of the example in the dataset, from 0")
    example_id: str = column(pa.string(), "the example's id, as in every report")
    group_id: str = column(pa.string(), "whom it shares its coin with: id of the first exact copy, or of --group-by")
    copies: int = column(pa.int64(), "exact copies of it in the data, itself among them")
    label: int | None = column(pa.int64(), "label trained on; null for a language model", nullable=True)
    truth: bool | None = column(pa.bool_(), "whether the data calls it suspect; null: it does not say", nullable=True)
    memorization: float | None = column(pa.float64(), "p_in - p_out; null where a side has no model", nullable=True)
    se: float | None = column(pa.float64(), "its plug-in standard error, 0 at rates of 0 and 1", nullable=True)
    lo: float | None = column(pa.float64(), "its 95 % interval (Newcombe; language model: see docs)", nullable=True)
    hi: float | None = column(pa.float64(), "likewise", nullable=True)
    p_in: float | None = column(pa.float64(), "share of models in that are right" + _RATE, nullable=True)
    p_out: float | None = column(pa.float64(), "share of models out that are right" + _RATE, nullable=True)
    n_in: int = column(pa.int32(), "models trained with it")
    n_out: int = column(pa.int32(), "models trained without it")
    simplicity: float | None = column(pa.float64(), "p_in + p_out: 2 easy, 0 hard", nullable=True)
    memorization_soft: float | None = column(
        pa.float64(), "the same of the label's probability; language model: of the mean log-probability of its tokens",
        nullable=True,
    )  # fmt: skip
    se_soft: float | None = column(pa.float64(), "its standard error", nullable=True)
    lo_soft: float | None = column(pa.float64(), "its 95 % interval (Student's t of each side)", nullable=True)
    hi_soft: float | None = column(pa.float64(), "likewise", nullable=True)
    soft_in: float | None = column(pa.float64(), "mean of the soft measure in", nullable=True)
    soft_out: float | None = column(pa.float64(), "mean of the soft measure out", nullable=True)
    memorization_copies: float | None = column(
        pa.float64(), "of all its exact copies together: any of them in, against none", nullable=True
    )
    n_without_copies: int = column(pa.int32(), "models trained without any exact copy of it")


@dataclass(frozen=True)
class InfluenceRow:
    """One row per pair of a group of training examples and a held-out example that is worth telling."""

    report: ClassVar[str] = "counterfactual.influence"
    schema_version: ClassVar[int] = 1

    example_id: str = column(pa.string(), "training example, the first of its group")
    group_id: str = column(pa.string(), "its group, as in counterfactual.parquet")
    test_id: str = column(pa.string(), "held-out example")
    influence: float = column(pa.float64(), "accuracy on the held-out example with the group in, less that without it")
    se: float | None = column(pa.float64(), "its standard error, never 0: see docs", nullable=True)
    significant: bool = column(pa.bool_(), "at least --min-influence and 3 standard errors away from 0")
    rank: int = column(pa.int32(), "among the groups, by |influence| on this held-out example, from 1")
    n_in: int = column(pa.int32(), "models trained with the group")
    n_out: int = column(pa.int32(), "models trained without it")


@dataclass(frozen=True)
class ModelRow:
    """One row per model."""

    report: ClassVar[str] = "counterfactual.models"
    schema_version: ClassVar[int] = 1

    model: int = column(pa.int64(), "its number k; with the run's seed it decides subset, order and initial weights")
    seed: int = column(pa.int64(), "of its initial weights and the order of its examples")
    subset: str = column(pa.string(), "sha256 of which examples it was trained on")
    examples: int = column(pa.int64(), "how many these are")
    accuracy_in: float | None = column(pa.float64(), "on these", nullable=True)
    accuracy_out: float | None = column(pa.float64(), "on the other training examples; null: none", nullable=True)
    test_accuracy: float | None = column(pa.float64(), "held out; null: nothing is", nullable=True)
    weights: str = column(pa.string(), "sha256 of its weights")
    seconds: float | None = column(
        pa.float64(), "it took, its share of those trained with it; null: not known", unit="s", nullable=True
    )
    engine: str | None = column(pa.string(), "that trained it; null: not known", nullable=True)


@dataclass(frozen=True)
class ShardRow:
    """What one model makes of every example: the training data, then what is held out."""

    report: ClassVar[str] = "counterfactual.shard"
    schema_version: ClassVar[int] = 1

    row: int = column(pa.int64(), "row of the example in its dataset, from 0")
    held_out: bool = column(pa.bool_(), "it is of the held-out data")
    included: bool = column(pa.bool_(), "the model was trained on it")
    accuracy: float | None = column(
        pa.float32(), "1 right, 0 wrong; language model: share of its tokens that are right; null: has none to predict",
        nullable=True,
    )  # fmt: skip
    soft: float | None = column(
        pa.float32(), "probability of its label; language model: mean log-probability of its tokens", nullable=True
    )


@dataclass(frozen=True)
class ExampleRow:
    """The examples that the shards are about, in their order."""

    report: ClassVar[str] = "counterfactual.examples"
    schema_version: ClassVar[int] = 1

    row: int = column(pa.int64(), "row of the example in its dataset, from 0")
    held_out: bool = column(pa.bool_(), "it is of the held-out data")
    example_id: str = column(pa.string(), "the example's id, as in every report")
    label: int | None = column(pa.int64(), "label trained on; null for a language model", nullable=True)
    truth: bool | None = column(pa.bool_(), "whether the data calls it suspect", nullable=True)
    group_id: str | None = column(pa.string(), "whom it shares its coin with; null: held out", nullable=True)
    group: int | None = column(pa.int64(), "number of that group", nullable=True)
    content: int | None = column(pa.int64(), "the same for exact copies", nullable=True)


@dataclass(frozen=True)
class SizeRow:
    """One row per example and width."""

    report: ClassVar[str] = "counterfactual.sizes"
    schema_version: ClassVar[int] = 1

    row: int = column(pa.int64(), "row of the example in the dataset, from 0")
    example_id: str = column(pa.string(), "the example's id, as in every report")
    label: int | None = column(pa.int64(), "label trained on", nullable=True)
    truth: bool | None = column(pa.bool_(), "whether the data calls it suspect", nullable=True)
    width: int = column(pa.int64(), "units of a hidden layer")
    memorization: float | None = column(pa.float64(), "p_in - p_out at this width", nullable=True)
    se: float | None = column(pa.float64(), "its standard error, never 0 (Agresti and Caffo's)", nullable=True)
    p_in: float | None = column(pa.float64(), "share of models in that are right", nullable=True)
    p_out: float | None = column(pa.float64(), "share of models out that are right", nullable=True)
    n_in: int = column(pa.int32(), "models trained with it")
    n_out: int = column(pa.int32(), "models trained without it")
    trajectory: str | None = column(
        pa.string(), "over all widths: constant, rising, falling, cap, other; null: a width has no value", nullable=True
    )


@dataclass(frozen=True)
class TurnOverRow:
    """One row per example: what a network makes of it with its own units, and with those that never saw it."""

    report: ClassVar[str] = "counterfactual.turn-over-dropout"
    schema_version: ClassVar[int] = 1

    row: int = column(pa.int64(), "row of the example in the dataset, from 0")
    example_id: str = column(pa.string(), "the example's id, as in every report")
    label: int = column(pa.int64(), "label trained on")
    truth: bool | None = column(pa.bool_(), "whether the data calls it suspect", nullable=True)
    self_influence: float = column(pa.float64(), "flipped_loss - own_loss, mean over networks", unit="nat")
    own_loss: float = column(pa.float64(), "with the units that it was trained with", unit="nat")
    flipped_loss: float = column(pa.float64(), "with the other units", unit="nat")
    own_correct: float = column(pa.float64(), "share of networks that are right with its own units")
    flipped_correct: float = column(pa.float64(), "share that are right with the other units")
