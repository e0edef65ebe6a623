"""What `memdiag prune-memorizers CKPT` reads: a checkpoint, its data, and which examples are suspect."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from memdiag import device as devices
from memdiag import tables, tasks
from memdiag.checkpoint import Checkpoint, open_checkpoints, tokenizer_fingerprint
from memdiag.dataset import Dataset, open_dataset
from memdiag.entropy_report import parse_columns
from memdiag.errors import InputError, unknown
from memdiag.prune_report import PruneOptions
from memdiag.reading import Reading

log = logging.getLogger("memdiag")


@dataclass(frozen=True)
class Inputs:
    """The opened checkpoint and datasets of one run of the command."""

    checkpoint: Checkpoint
    train: Dataset
    test: Dataset | None
    suspects: frozenset[str] | None  # example ids, if a score named them
    options: PruneOptions

    @property
    def has_truth(self) -> bool:
        """Whether it is known which training examples are suspect."""
        return self.suspects is not None or "truth" in self.train.columns

    def reading(self, dataset: Dataset) -> Reading:
        """A dataset as the checkpoint reads it."""
        options = self.options
        return Reading(dataset, self.checkpoint, options.tokenizer, options.max_length, options.batch_size)

    def tokenizer(self) -> Any:
        """The checkpoint's, or that of --tokenizer."""
        return self.checkpoint.tokenizer(self.options.tokenizer)

    def identity(self) -> dict[str, Any]:
        """What decides the numbers."""
        suspects = None if self.suspects is None else hashlib.sha256("\n".join(sorted(self.suspects)).encode())
        return {
            "checkpoint": self.checkpoint.fingerprint(),
            "tokenizer": tokenizer_fingerprint(self.tokenizer()),
            "dataset": self.train.fingerprint(),
            "test": None if self.test is None else self.test.fingerprint(),
            "suspects": suspects and suspects.hexdigest(),
        }

    def meta(self) -> dict[str, Any]:
        """What the report says of its inputs."""

        def told(dataset: Dataset) -> dict[str, Any]:
            return {"name": dataset.name, "fingerprint": dataset.fingerprint(), "columns": dataset.columns}

        return {
            "checkpoint": {"name": self.checkpoint.name, "weights": self.checkpoint.fingerprint()},
            "dataset": told(self.train),
            "test": None if self.test is None else told(self.test),
            "loss": "cross-entropy in nats: of the label, or mean over the predicted tokens",
            "device": devices.describe(devices.resolve(self.options.device)),
        }


def open_inputs(name: str, options: PruneOptions) -> Inputs:
    """Open everything the command will read.

    Raises:
        InputError: anything that is not there, not readable or does not fit.
    """
    found = open_checkpoints(name, model=options.model)
    if len(found) > 1:
        raise InputError(f"{name} is a run of {len(found)} checkpoints; give one of them, e.g. {found[-1].path}")
    checkpoint = found[0]
    data, test = options.data or checkpoint.task, options.test
    if data is None:
        raise InputError(f"{checkpoint.name} says no task of its own; give the training data with --data FILE")
    if options.data is None:
        log.info("no --data: measuring on %s", data)
    if test is None and data.startswith(tasks.PREFIX) and (task := tasks.load(data)).values.get("split") == "train":
        test = task.name.replace("split=train", "split=test")
        log.info("no --test: held out is %s", test)
    if options.truth is not None and options.suspects is not None:
        raise InputError("--truth and --suspects both say which examples are suspect; give one of them")
    if options.truth is None and options.suspects is None and test is None:
        raise InputError(
            "nothing says which training examples are suspect: give --truth COLUMN or --suspects FILE:COLUMN:SHARE, "
            "or --test for the contrast of training and held-out data"
        )
    roles = parse_columns(options.columns) or {}
    train = _open_train(data, roles, options)
    held_out = None
    if test is not None:
        held_out = open_dataset(test, columns={r: c for r, c in roles.items() if r != "true_label"})
    suspects = None if options.suspects is None else read_suspects(options.suspects)
    return Inputs(checkpoint, train, held_out, suspects, options)


def _open_train(data: str, roles: dict[str, str], options: PruneOptions) -> Dataset:
    roles = roles | ({"truth": options.truth} if options.truth is not None else {})
    train = open_dataset(data, columns=roles, limit=options.limit)
    if "true_label" in train.source.columns and "true_label" not in roles:
        train = open_dataset(data, columns=roles | {"true_label": "true_label"}, limit=options.limit)
    return train


def read_suspects(text: str) -> frozenset[str]:
    """The example ids that FILE:COLUMN:SHARE means: the top share of a score, or with -COLUMN the bottom.

    Raises:
        InputError: it cannot be read, or the file is no report with example_id and that column.
    """
    parts = text.rsplit(":", 2)
    try:
        file, name, share = parts[0], parts[1], float(parts[2])
    except (IndexError, ValueError):
        raise InputError(f"--suspects {text!r} is not of the form score.parquet:csl:0.05") from None
    if not 0 < share < 1:
        raise InputError(f"--suspects {text!r}: the share is {share:g}; wanted more than 0 and less than 1")
    table = tables.read(file).table
    column = name.removeprefix("-")
    for wanted in ("example_id", column):
        if wanted not in table.column_names:
            raise unknown(f"column in {file}", wanted, table.column_names)
    kind = table.schema.field(column).type
    if str(kind) not in ("double", "float", "halffloat", "bool") and not str(kind).startswith(("int", "uint")):
        raise InputError(f"--suspects {text!r}: column {column!r} holds {kind}; wanted numbers")
    pairs = [
        (float(v), str(i)) for v, i in zip(table[column].to_pylist(), table["example_id"].to_pylist()) if v is not None
    ]
    if not pairs:
        raise InputError(f"--suspects {text!r}: the column is null in every row")
    if len({i for _, i in pairs}) < len(pairs):
        twin = next(i for i, n in Counter(i for _, i in pairs).items() if n > 1)
        raise InputError(
            f"--suspects {text!r}: example {twin[:40]!r} comes more than once; wanted a row for each example"
        )
    pairs.sort(key=lambda pair: pair[0] if name.startswith("-") else -pair[0])  # stable: ties as they come
    return frozenset(i for _, i in pairs[: max(1, round(share * len(pairs)))])
