"""From shards to reports: memorization, influence, the models, and a summary.

Everything is computed from the shards and examples.parquet in one pass over the models, of which nothing is held but
sums, the coins as bits, and what they make of the held-out examples (on the disk).

Axes: m model, n training example, g group (coin), t held-out example. Needs no torch.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memdiag import counterfactual_view, influence, memorization, tables
from memdiag.counterfactual_report import Counterfactual, CounterfactualOptions
from memdiag.counterfactual_rows import CounterfactualRow, ExampleRow, InfluenceRow, ModelRow
from memdiag.counterfactual_shards import FOLDER, Shard, read_shard, shard_path, time_of
from memdiag.counterfactual_summary import noise_floor, summary_of
from memdiag.errors import InputError
from memdiag.memorization import Kind, Memorization, Sums

MAIN, INFLUENCE, MODELS = "counterfactual.parquet", "influence.parquet", "models.parquet"  # MAIN comes last
EXAMPLES, SUMMARY, PLOT, LOGS = "examples.parquet", "summary.json", "histogram.png", "logs"
MADE = [MAIN, INFLUENCE, MODELS, EXAMPLES, SUMMARY, PLOT]  # and what `made_in` finds
GROUP = 8192  # rows written at once
BLOCK_CELLS = 2**22  # pairs of held-out examples and groups looked at together


@dataclass(frozen=True, eq=False)
class Examples:
    """examples.parquet in memory; training examples come first."""

    table: pa.Table
    n: int  # training examples
    groups: NDArray[np.int64]  # (n,)
    content: NDArray[np.int64]  # (n,)
    first: NDArray[np.int64]  # (g,) the first example of each group

    @classmethod
    def read(cls, folder: Path) -> Examples:
        path = folder / EXAMPLES
        table = tables.read(path).table
        if not table.schema.equals(tables.schema_of(ExampleRow)):
            raise InputError(f"{path} holds no examples of counterfactual; give it back its own")
        held_out = table["held_out"].to_numpy()
        n = int((~held_out).sum())
        if not n or held_out[:n].any() or any(table[name][:n].null_count for name in ("group_id", "group", "content")):
            raise InputError(f"{path} is damaged: its training examples are not told apart; give it back its own")
        groups = table["group"][:n].to_numpy().astype(np.int64)
        content = table["content"][:n].to_numpy().astype(np.int64)
        return cls(table, n, groups, content, np.unique(groups, return_index=True)[1])

    @property
    def is_classifier(self) -> bool:
        return int(self.table["label"].null_count) == 0

    @property
    def n_held_out(self) -> int:
        return int(self.table.num_rows) - self.n

    def truth(self) -> NDArray[np.bool_] | None:
        """(n,) or None where the data does not say."""
        column = self.table["truth"][: self.n]
        return None if column.null_count else column.to_numpy().astype(np.bool_)


@dataclass(frozen=True, eq=False)
class Estimates:
    """What the models say together."""

    hard: Memorization
    soft: Memorization
    copies: Memorization  # of all exact copies together
    halves: tuple[Memorization, Memorization] | None  # of the even and the odd blocks of models
    models: list[dict[str, Any]]  # rows of models.parquet


def made_in(out: Path) -> list[str]:
    """What the command has written to a directory, by name; files of others in folders of the same names are not."""
    inner = [path for name, pattern in ((FOLDER, "model-*"), (LOGS, "chunk-*")) for path in (out / name).glob(pattern)]
    return MADE + [str(path.relative_to(out)) for path in inner]


def estimate(folder: Path, items: Sequence[int], block: int, held: _HeldOut | None = None) -> Estimates:
    """One pass over the shards.

    Args:
        folder: of the run.
        items: the models that count.
        block: models of a balanced block.
        held: gets the coins and what the models make of the held-out examples.
    Raises:
        InputError: a shard is missing or damaged.
    """
    examples = Examples.read(folder)
    kind: Kind = "binary" if examples.is_classifier else "bounded"
    n = examples.n
    hard, soft, copies, even, odd = (Sums.empty(n) for _ in range(5))
    rows = []
    for place, item in enumerate(items):
        shard = read_shard(folder / FOLDER, item)
        if len(shard.included) != n or len(shard.rows) != examples.table.num_rows:
            raise InputError(f"{shard_path(folder / FOLDER, item)} is of other examples; delete it to make it again")
        hard.add(shard.included, shard.accuracy[:n])
        soft.add(shard.included, shard.soft[:n])
        copies.add(memorization.any_included(shard.included, examples.content), shard.accuracy[:n])
        (odd if item // block % 2 else even).add(shard.included, shard.accuracy[:n])
        if held is not None:
            held.add(place, shard.included[examples.first], shard.accuracy[n:])
        rows.append(_model_row(folder, shard, n))
    halves = (memorization.estimate(even, kind=kind), memorization.estimate(odd, kind=kind))
    return Estimates(
        memorization.estimate(hard, kind=kind),
        memorization.estimate(soft, kind="bounded" if examples.is_classifier else "real"),
        memorization.estimate(copies, kind=kind),
        halves if odd.count.any() and even.count.any() else None,
        rows,
    )


class _HeldOut:
    """Coins as bits (m, g / 8), and what each model makes of the held-out examples (m, t), on the disk."""

    def __init__(self, n_models: int, n_groups: int, n_held_out: int) -> None:
        self.n_groups = n_groups
        self.bits = np.zeros((n_models, -(-n_groups // 8)), dtype=np.uint8)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - held for as long as the array is
        self.measure = np.memmap(self._file, dtype=np.float32, mode="w+", shape=(n_models, n_held_out))

    def add(self, place: int, coins: NDArray[np.bool_], measure: NDArray[np.float32]) -> None:
        self.bits[place] = np.packbits(coins)
        self.measure[place] = measure


def _model_row(folder: Path, shard: Shard, n: int) -> dict[str, Any]:
    def mean(values: NDArray[np.float32]) -> float | None:
        known = values[~np.isnan(values)]
        return float(known.mean(dtype=np.float64)) if len(known) else None

    told = time_of(folder / FOLDER, shard.item)
    own = shard.accuracy[:n]
    return {
        "model": shard.item,
        "seed": shard.seed,
        "subset": shard.subset,
        "examples": int(shard.included.sum()),
        "accuracy_in": mean(own[shard.included]),
        "accuracy_out": mean(own[~shard.included]),
        "test_accuracy": mean(shard.accuracy[n:]),
        "weights": shard.weights,
        "seconds": told.get("seconds"),
        "engine": told.get("engine"),
    }


def write_reports(
    folder: Path, items: Sequence[int], options: CounterfactualOptions, meta: Mapping[str, Any]
) -> None:  # fmt: skip
    """All reports of a run whose shards are there; the main one comes last.

    Args:
        items: the models that count.
        options: how to tell of pairs.
        meta: of every report.
    Raises:
        InputError: a shard is missing or damaged.
    """
    examples = Examples.read(folder)
    held = _HeldOut(len(items), len(examples.first), examples.n_held_out) if examples.n_held_out else None
    found = estimate(folder, items, options.how().block, held)

    def of(row: Any) -> dict[str, Any]:
        return {**meta, "report": row.report, "schema_version": row.schema_version, "n_models": len(items)}

    told: dict[str, Any] | None = None
    if held is not None:
        told = {}
        pairs = _influence_rows(examples, held, options, told)
        tables.write(folder / INFLUENCE, InfluenceRow, pairs, of(InfluenceRow))
        told["significant_if_shuffled"] = _by_chance(examples, held, options)
    else:
        (folder / INFLUENCE).unlink(missing_ok=True)
    tables.write(folder / MODELS, ModelRow, [found.models], of(ModelRow))
    ids = examples.table["example_id"].slice(0, examples.n).to_pylist()
    labels = examples.table["label"].slice(0, examples.n).to_pylist()
    about = summary_of(
        found.hard, found.soft, found.halves, found.models, examples.truth(), ids, labels, examples.groups, told,
        n_held_out=examples.n_held_out, options=options, meta=meta,
    )  # fmt: skip
    write_text(folder / SUMMARY, json.dumps(about, indent=2) + "\n")
    whole = folder / f".{MAIN}.whole"
    stated = of(CounterfactualRow) | {"noise_floor": noise_floor(found.models)}
    tables.write(whole, CounterfactualRow, _main_rows(examples, found), stated)
    counterfactual_view.plot_report(tables.read(whole), folder / PLOT)
    os.replace(whole, folder / MAIN)


def write_text(path: Path, text: str) -> None:
    """Write a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _main_rows(examples: Examples, found: Estimates) -> Iterator[pa.RecordBatch]:
    counts = np.bincount(examples.content)[examples.content]
    hard, soft, copies = found.hard, found.soft, found.copies
    arrays = {
        "copies": counts,
        **{name: getattr(hard, name) for name in ("memorization", "se", "lo", "hi", "p_in", "p_out", "n_in", "n_out")},
        "simplicity": hard.simplicity,
        "memorization_soft": soft.memorization,
        "se_soft": soft.se,
        "lo_soft": soft.lo,
        "hi_soft": soft.hi,
        "soft_in": soft.p_in,
        "soft_out": soft.p_out,
        "memorization_copies": copies.memorization,
        "n_without_copies": copies.n_out,
    }
    for start in range(0, examples.n, GROUP):
        size = min(GROUP, examples.n - start)
        part = examples.table.slice(start, size)
        same = {name: part[name].combine_chunks() for name in ("row", "example_id", "group_id", "label", "truth")}
        yield tables.from_columns(
            CounterfactualRow, same | {name: values[start : start + size] for name, values in arrays.items()}
        )


def _influence_rows(
    examples: Examples, held: _HeldOut, options: CounterfactualOptions, told: dict[str, Any]
) -> Iterator[pa.RecordBatch]:
    """The pairs worth telling; counts go into `told`."""
    ids = np.array(examples.table["example_id"].to_pylist(), dtype=object)
    group_ids = np.array(examples.table["group_id"].slice(0, examples.n).to_pylist(), dtype=object)[examples.first]
    told |= {"pairs": held.n_groups * examples.n_held_out, "listed": 0, "significant": 0}
    for found in _pairs(examples, held, options, held.bits, options.top):
        some = found["influence"] != 0  # where no coin matters, none is the strongest
        part = {name: values[some] for name, values in found.items()}
        told["listed"] += len(part["test"])
        told["significant"] += int(part["significant"].sum())
        columns = {
            "example_id": ids[examples.first[part["group"]]].tolist(),
            "group_id": group_ids[part["group"]].tolist(),
            "test_id": ids[examples.n + part["test"]].tolist(),
        }
        names = ("influence", "se", "significant", "rank", "n_in", "n_out")
        yield tables.from_columns(InfluenceRow, columns | {name: part[name] for name in names})


def _by_chance(examples: Examples, held: _HeldOut, options: CounterfactualOptions) -> int:
    """The control: pairs that would be significant if the outcomes were those of other models."""
    bits = influence.shuffled(held.bits, options.seed)
    return sum(int(part["significant"].sum()) for part in _pairs(examples, held, options, bits, 0))


def _pairs(
    examples: Examples, held: _HeldOut, options: CounterfactualOptions, bits: NDArray[np.uint8], top: int
) -> Iterator[dict[str, Any]]:
    size = max(8, min(256, BLOCK_CELLS // held.n_groups))
    found = influence.blocks(
        bits, held.n_groups, held.measure, binary=examples.is_classifier, block=size, model_block=size
    )
    yield from influence.pairs(found, min_influence=options.min_influence, top=top)


def read(out: Path) -> Counterfactual:
    """What stands in a directory that the command wrote.

    Raises:
        InputError: one of its files is missing or damaged.
    """
    main, about = tables.read(out / MAIN), read_summary(out / SUMMARY, "held_out")
    pairs = part(out / INFLUENCE, InfluenceRow) if about["held_out"] else None
    return Counterfactual(main, about, out, pairs, part(out / MODELS, ModelRow))


def read_summary(path: Path, key: str) -> dict[str, Any]:
    """A summary that has a `key`.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or key not in found:
        raise InputError(f"{path} is missing or damaged; give --force to make everything again")
    return found


def part(path: Path, row: Any) -> tables.Report:
    """One of the reports of a directory.

    Raises:
        InputError: it is missing, damaged or another one.
    """
    found = tables.read(path)
    if found.meta.get("report") != row.report or not found.table.schema.equals(tables.schema_of(row)):
        raise InputError(f"{path} is a report of {found.meta.get('report')}; wanted {row.report}, give it back its own")
    return found
