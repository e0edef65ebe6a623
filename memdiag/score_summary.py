"""What a score report says as a whole: means, the examples that score highest, agreement, and truth. Needs no torch.

Means, agreement and areas under the curve are of at most `MOST` examples, drawn by seed; the highest are of all.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memdiag import agreement, scores, tables

if TYPE_CHECKING:
    from memdiag.dataset import Dataset

MOST = 100_000
TOP = 5
SHOWN = 100  # letters of a text


def summary_of(
    path: Path,
    names: tuple[str, ...],
    *,
    truth: bool,
    ranks: bool,
    seed: int,
    texts: Dataset | None = None,
    foreign: dict[str, str] | None = None,
) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """The summary of a report, as plain values, and the ranks of each score if they are asked for.

    Args:
        path: the report, or its rows without metadata.
        names: its scores, those of `foreign` among them.
        truth: whether it has a column of that name.
        seed: of the sample and the resamples.
        texts: the dataset, to quote from.
        foreign: columns that memdiag did not compute, with the end that is more memorized.
    """
    columns = tables.read_schema(path).names
    rows = _column(path, "row")
    n = len(rows)
    sample = np.arange(n) if n <= MOST else np.sort(np.random.default_rng(seed).choice(n, MOST, replace=False))
    true = _column(path, "truth").astype(bool) if truth else None
    held: dict[str, NDArray[np.float64]] = {}
    ranked: dict[str, NDArray[np.float64]] = {}
    found: dict[str, Any] = {"n": n, "n_sample": len(sample), "scores": {}}
    best: dict[str, list[int]] = {}
    for name in names:
        values = _column(path, name)
        turned = _turned(name, values, path, columns, foreign or {})
        if ranks:
            ranked[name] = agreement.ranks(turned)
        about: dict[str, Any] = {
            "mean": asdict(agreement.mean(values[sample], seed=seed)),
            "n_null": int(np.isnan(values).sum()),
        }
        held[name] = turned[sample]
        oriented = (foreign or {}).get(name) or (name not in scores.NAMES) or scores.load(name).MEMORIZED
        if true is not None and oriented:
            about["auc"] = asdict(agreement.auc(held[name], true[sample]))
            about["found_in_top"] = asdict(agreement.found_in_top(held[name], true[sample]))
        order = np.argsort(-np.where(np.isnan(turned), -np.inf, turned), kind="stable")[:TOP]
        best[name] = [int(i) for i in order if not np.isnan(turned[i])]
        found["scores"][name] = about
    found["agreement"] = [
        {"a": a, "b": b, **asdict(agreement.spearman(held[a], held[b]))} for a, b in combinations(names, 2)
    ]
    if true is not None:
        found["truth"] = {"n_true": int(true.sum()), "n": n}
    _quote(found, best, path, columns, rows, texts)
    return found, ranked


def _turned(
    name: str, values: NDArray[np.float64], path: Path, columns: list[str], foreign: dict[str, str]
) -> NDArray[np.float64]:
    """Higher = more memorized."""
    if name in foreign:
        return -values if foreign[name] == "low" else values
    key = "n_suffix" if "suffix" in scores.needs([name]) else "n_scored"
    defined = _column(path, key) > 0 if key in columns else np.ones(len(values), dtype=bool)
    return scores.oriented(name, values, defined)


def _column(path: Path, name: str) -> NDArray[Any]:
    """A column of numbers as one array, truth values as 0 and 1, null as NaN."""
    parts = []
    for table in tables.stream(path, [name]):
        values = table[name].cast("float64") if str(table[name].type) != "int64" else table[name]
        parts.append(values.to_numpy())
    return np.concatenate(parts) if parts else np.empty(0)


def _quote(
    found: dict[str, Any],
    best: dict[str, list[int]],
    path: Path,
    columns: list[str],
    rows: NDArray[np.int64],
    texts: Dataset | None,
) -> None:
    """Put the highest examples into the summary, with their label or the beginning of their text."""
    wanted = {i for indices in best.values() for i in indices}
    about: dict[int, dict[str, Any]] = {}
    start = 0
    names = [name for name in ("example_id", "label", "truth") if name in columns]
    for table in tables.stream(path, names):
        for i in wanted:
            if start <= i < start + table.num_rows:
                about[i] = {name: table[name][i - start].as_py() for name in names}
        start += table.num_rows
    if texts is not None and wanted:
        by_row = {int(rows[i]): i for i in wanted}
        last = max(by_row)
        for row, text in texts.texts():
            if row in by_row:
                about[by_row[row]]["text"] = " ".join(text[: 4 * SHOWN].split())[:SHOWN]
            if row >= last:
                break
    for name, indices in best.items():
        found["scores"][name]["top"] = [about[i] for i in indices]
