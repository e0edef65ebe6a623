"""Trajectories from your own training loop, or from the Trainer of transformers: `memdiag.TrajectoryRecorder`.

What is kept of every example, and how it is written, is in `trajectory`.

Axes: b example of a call, t token, k class or vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import memdiag
from memdiag import observe, tables, trajectory
from memdiag.dataset import Dataset, cells, open_dataset
from memdiag.errors import InputError
from memdiag.supervised import means_of_tokens

log = logging.getLogger("memdiag")
IGNORED = -100  # a label that does not count, as transformers marks it
KEYWORD = "example_id"  # what the Trainer's batches hold ids under
Ints = NDArray[np.int64]
Ids = Sequence[int | str] | Tensor | Ints


class TrajectoryRecorder:
    """Writes the trajectory of every example from a loop of your own.

        recorder = memdiag.TrajectoryRecorder("runs/mine/trajectory", dataset="train.jsonl")    # once
        ...
        recorder.record(ids, logits, labels)      # after every forward pass, before the weights move
        recorder.end_epoch()                      # after every pass over the data

    Every epoch must present the same examples, each once: those of the first epoch. Files are written when an epoch
    ends; what an unfinished epoch has presented is held in memory, some 40 bytes an example.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        dataset: str | Path | Dataset | None = None,
        columns: Mapping[str, str] | None = None,
        start: int = 0,
    ) -> None:
        """Begin a trajectory, or go on with one.

        Args:
            directory: where the files go; `memdiag score` reads it.
            dataset: what is trained on, a path or task. Its fingerprint is kept, so that scores cannot be joined with
                another dataset, and ids must be among its own (its id column, else row numbers). None: an id that is
                an integer is the row, and texts are numbered in alphabetical order.
            columns: of the dataset, role -> column.
            start: the first epoch to record, when training goes on from a checkpoint; what was recorded of it or of
                later ones is removed.
        Raises:
            InputError: the dataset cannot be read, the directory holds a trajectory already, or one without the epochs
                before `start`.
        """
        self.directory, self.epoch = Path(directory), start
        if isinstance(dataset, str | Path):
            dataset = open_dataset(os.fspath(dataset), columns=columns)
        self._dataset: dict[str, Any] = {"name": None, "fingerprint": None, "columns": None}
        self._row_of: dict[str, int] | None = None  # None: an id is its row
        self._n_rows: int | None = None
        if dataset is not None:
            about = {"name": dataset.name, "fingerprint": dataset.fingerprint(), "columns": dataset.columns}
            self._dataset, self._n_rows = about, dataset.n_examples
            self._row_of = dict(_ids_of(dataset)) if "id" in dataset.columns else None
        self._rows: Ints | None = None  # of the first epoch
        self._texts: list[str] = []
        self._forget()
        self._open(start)

    def _open(self, start: int) -> None:
        found = trajectory.written(self.directory)
        if found and not start:
            raise InputError(
                f"{self.directory}: holds {len(found)} epochs already; give another directory, or start=N to go on"
            )
        missing = [epoch for epoch in range(start) if epoch not in found]
        if start < 0 or missing:
            raise InputError(
                f"{self.directory}: start={start}, but epoch {missing[0] if missing else start} is not there"
            )
        if start:
            first = tables.read(found[0])
            if first.meta["dataset"]["fingerprint"] != self._dataset["fingerprint"]:
                raise InputError(f"{self.directory}: its epochs are of another dataset; record to another directory")
            self._rows, self._texts = first.table["row"].to_numpy(), first.table["example_id"].to_pylist()
            if self._row_of is None and any(str(row) != text for row, text in zip(self._rows, self._texts)):
                self._row_of = dict(zip(self._texts, self._rows.tolist()))
        for epoch, path in found.items():
            if epoch >= start:
                path.unlink()

    @property
    def presented(self) -> int:
        """Examples presented in the epoch under way."""
        return self._n

    def record(self, ids: Ids, logits: Tensor, labels: Tensor) -> None:
        """Keep what a forward pass says of its examples; call it before the weights move.

        Args:
            ids: (b,) example ids: integers, texts, or a tensor of integers.
            logits: (b, k) of a classifier, or (b, t, k) of a language model that predicts token s + 1 at position s.
                Any floating-point dtype, on any device; one transfer to the host is made.
            labels: (b,) classes; or (b, t) tokens, not shifted, −100 where nothing is to be predicted.
        Raises:
            InputError: shapes or labels do not fit, an id is not in the dataset, a logit is not a number, or there are
                more examples than the first epoch had.
        """
        n = len(logits)
        if len(ids) != n or len(labels) != n or logits.ndim != labels.ndim + 1 or labels.ndim not in (1, 2):
            shapes = f"{len(ids)} ids, logits {list(logits.shape)}, labels {list(labels.shape)}"
            raise InputError(
                f"record got {shapes}; wanted (b,), (b, k), (b,); language models: (b,), (b, t, k), (b, t)"
            )
        labels = labels.detach().to(logits.device)
        on_device = ids.detach().to(logits.device).long() if isinstance(ids, Tensor) else None
        if labels.ndim == 1:
            values, targets, host_ids = _to_host(logits, labels, on_device)
            if n and not 0 <= targets.min() <= targets.max() < logits.shape[1]:
                raise InputError(f"record got labels {targets.min()} to {targets.max()} for {logits.shape[1]} classes")
        else:
            values, host_ids = _means(logits, labels, on_device)
            targets = None
        known = host_ids.tolist() if host_ids is not None else list(ids)
        bad = ~(np.isfinite(values[0]) & np.isfinite(values[2]))
        if bad.any():
            raise InputError(f"record got logits that are no numbers, of example {known[int(bad.argmax())]}")
        self._ids.extend(known)
        self._values.append(values)
        if targets is not None:
            self._labels.append(targets)
        self._n += n
        if self._rows is not None and self._n > len(self._rows):
            raise InputError(
                f"epoch {self.epoch} presents more than the {len(self._rows)} examples of the first; call end_epoch() "
                "after every pass, and let each example come once"
            )

    def end_epoch(self) -> Path:
        """Write the epoch, and begin the next.

        Returns:
            The file.
        Raises:
            InputError: an example was presented twice, or not at all.
        """
        if not self._n:
            raise InputError(f"epoch {self.epoch} ends without an example; call record() after every forward pass")
        texts = [str(one) for one in self._ids]
        rows = self._rows_of(texts)
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            one = texts[int((rows == twice[0]).argmax())]
            raise InputError(
                f"epoch {self.epoch} presents example {one!r} twice; let each come once in an epoch (a sampler without "
                "replacement), and call end_epoch() after every pass"
            )
        if self._rows is None:
            self._rows, self._texts = ordered, [texts[i] for i in order.tolist()]
        elif not np.array_equal(ordered, self._rows):
            absent = np.setdiff1d(self._rows, ordered)
            what = f"example {self._texts[int((self._rows == absent[0]).argmax())]!r} of epoch 0" if len(absent) else ""
            raise InputError(
                f"epoch {self.epoch} has other examples than the first"
                + (f", e.g. not {what}" if what else "")
                + "; present all of them in every epoch (drop_last=False)"
            )
        path = trajectory.path_of(self.directory, self.epoch)
        labels = np.concatenate(self._labels)[order] if self._labels else None
        meta = trajectory.meta_of(self._dataset, len(ordered)) | {"memdiag_version": memdiag.__version__}
        values = np.concatenate(self._values, axis=1)[:, order]
        trajectory.write_epoch(path, self.epoch, ordered, self._texts, labels, values, meta)
        self.epoch += 1
        self._forget()
        return path

    def _rows_of(self, texts: list[str]) -> Ints:
        """The row of every id, (b,)."""
        if self._row_of is None and all(isinstance(one, int | np.integer) for one in self._ids):
            rows = np.array(self._ids, dtype=np.int64)
            most = np.iinfo(np.int64).max if self._n_rows is None else self._n_rows - 1
            if (rows < 0).any() or (rows > most).any():
                bad = rows[int(((rows < 0) | (rows > most)).argmax())]
                raise InputError(f"example {bad} is no row of {self._dataset['name'] or 'a dataset'}")
            return rows
        if self._row_of is None and self._n_rows is None:
            self._row_of = {text: row for row, text in enumerate(sorted(set(texts)))}
        row_of = self._row_of if self._row_of is not None else {str(i): i for i in range(self._n_rows or 0)}
        missing = next((text for text in texts if text not in row_of), None)
        if missing is not None:
            where = self._dataset["name"] or "those of the first epoch"
            raise InputError(f"example {missing!r} is not among {where}; give the ids of the examples trained on")
        return np.array([row_of[text] for text in texts], dtype=np.int64)

    def _forget(self) -> None:
        self._ids: list[Any] = []
        self._labels: list[Ints] = []
        self._values: list[NDArray[np.float32]] = []
        self._n = 0

    # -- for the Trainer of transformers

    def callback(self) -> Any:
        """What `Trainer(callbacks=[...])` wants: it records every training pass, and ends the epochs.

        The batches must hold `example_id`, integers, which it takes away before the model sees them: give the dataset
        that column, and `TrainingArguments(remove_unused_columns=False)`. An epoch that `max_steps` cuts short is not
        written. One process, one device.
        """
        from transformers import TrainerCallback

        recorder = self

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                if args.world_size > 1 or args.n_gpu > 1:
                    raise InputError("a trajectory is recorded in one process on one device; found several")
                self.tap = observe.Tap(model, KEYWORD, recorder._take)

            def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if float(state.epoch).is_integer():
                    recorder.end_epoch()
                else:
                    log.info("epoch %d was cut short and is not part of the trajectory", recorder.epoch)
                    recorder._forget()

            def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.tap.close()

        return Callback()

    def _take(self, ids: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """A training pass of the Trainer's model."""
        labels = kwargs.get("labels")
        if ids is None or labels is None:
            what = KEYWORD if ids is None else "labels"
            raise InputError(
                f"no {what} reached the model, which a trajectory needs; give the dataset that column, and "
                "TrainingArguments(remove_unused_columns=False)"
            )
        logits = output["logits"] if isinstance(output, dict) else output.logits
        self.record(ids, logits, labels)


def _to_host(logits: Tensor, labels: Tensor, ids: Tensor | None) -> tuple[NDArray[np.float32], Ints, Ints | None]:
    """(4, b) as `trajectory.presented`, labels (b,), ids (b,): in one transfer, as the bits of integers."""
    inside = labels.clamp(0, logits.shape[1] - 1)  # what is outside is found on the host
    bits = trajectory.presented(logits, inside).view(torch.int32).long()
    found = torch.cat([bits, labels.long()[None], *([] if ids is None else [ids[None]])]).cpu().numpy()
    values = found[:4].astype(np.int32).view(np.float32)
    return values, found[4], None if ids is None else found[5]


def _means(logits: Tensor, labels: Tensor, ids: Tensor | None) -> tuple[NDArray[np.float32], Ints | None]:
    """(4, b) means over the tokens that count, and ids (b,), in one transfer."""
    b, t = labels.shape[0], labels.shape[1] - 1
    targets = labels[:, 1:]
    inside = targets.clamp(0, logits.shape[-1] - 1).flatten()
    bits = trajectory.presented(logits[:, :-1].flatten(0, 1), inside).view(torch.int32).long().flatten()
    found = torch.cat([bits, targets.long().flatten(), *([] if ids is None else [ids])]).cpu().numpy()
    tokens = found[4 * b * t : 5 * b * t]
    counts = (tokens != IGNORED).reshape(b, t)
    if ((tokens < 0) & (tokens != IGNORED)).any() or (tokens >= logits.shape[-1]).any():
        raise InputError(f"record got tokens {tokens.min()} to {tokens.max()} for {logits.shape[-1]} of the vocabulary")
    if not counts.any(1).all():
        raise InputError("record got a sequence without a token to predict; leave it out of the dataset")
    values = found[: 4 * b * t].astype(np.int32).view(np.float32).reshape(4, b * t)[:, counts.reshape(-1)]
    return means_of_tokens(values, counts.sum(1)), None if ids is None else found[5 * b * t :]


def _ids_of(dataset: Dataset) -> Iterator[tuple[str, int]]:
    """(id, row) of every example, without reading the rest."""
    column, row = dataset.columns["id"], 0
    for chunk in dataset.source.read([column]):
        for i in range(len(chunk[column])):
            if dataset.limit is not None and row >= dataset.limit:
                return
            yield cells.as_id(cells.cell(chunk[column], i)), row
            row += 1
