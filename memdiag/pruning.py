"""Take neurons away one after the other and see what is lost: accuracy and loss along an order of pruning.

Where the read-out is linear, the logits of n − 1 neurons are those of n less one product of rank 1, so that a whole
curve costs a few forward passes, with the same result as zeroing weights.

Axes: i example, k neuron, q class, j number pruned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta
from torch import Tensor

CHANCE_MARGIN = 0.04  # agreement of up to 1 / classes + this is chance
REFRESH = 4  # times along a curve that the logits are summed afresh, so that rounding does not add up
GROUPS = ("corrupted", "clean", "test")
TILE = 4096  # examples at once: few enough that their logits stay in the cache along a curve
Loss = Literal["mse", "cross_entropy"]
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Examples:
    """Labels of the examples that a curve is about, and which set each belongs to."""

    labels: NDArray[np.int64]  # (i,) as recorded
    truth: NDArray[np.int64] | None  # (i,) the true ones, if known
    group: NDArray[np.int8]  # (i,) index into GROUPS

    def counts(self) -> dict[str, int]:
        """Examples in each group."""
        found = np.bincount(self.group, minlength=len(GROUPS))
        return {name: int(found[i]) for i, name in enumerate(GROUPS)}


def partial_logits(
    a: Tensor, weights: Tensor, offset: Tensor | None, order: NDArray[np.int64], counts: Sequence[int]
) -> Iterator[NDArray[np.float32]]:
    """The logits (i, q) after the first n neurons of `order` are gone, for each n of `counts`.

    Args:
        a: (i, k) activations.
        weights: (q, k) of the read-out.
        offset: (q,) its bias, if it has one.
        order: a permutation of the k neurons.
        counts: rising, each in 0 … k.
    Yields:
        the same memory each time: look at it before going on.
    """
    permutation = torch.from_numpy(np.array(order))  # a copy: a reversed view cannot be shared
    columns = a.T[permutation].contiguous()  # (k, i)
    rows = weights.T[permutation].contiguous()  # (k, q)
    bias = torch.zeros(len(weights)) if offset is None else offset
    logits = torch.empty(len(a), len(weights))
    refreshed = done = -1
    every = -(-len(rows) // REFRESH)
    for n in counts:
        if refreshed < 0 or n >= refreshed + every or n == len(rows):
            torch.addmm(bias, columns[n:].T, rows[n:], out=logits)
            refreshed = n
        elif n > done:
            logits.addmm_(columns[done:n].T, rows[done:n], alpha=-1)
        done = n
        yield logits.numpy()


@dataclass(frozen=True, eq=False)
class Readout:
    """A linear read-out: what it reads of every example, and the examples."""

    a: Tensor  # (i, k) float32 activations
    weights: Tensor  # (q, k)
    offset: Tensor | None  # (q,) its bias, if it has one
    examples: Examples
    loss: Loss = "mse"

    @cached_property
    def products(self) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """For each group the products of which the squared error of any subset of neurons is a sum.

        With M_kl = (Σ_i a_ik a_il) (W_k · W_l) and c_k = Σ_i a_ik W_label,k:  Σ_i ‖f_i − onehot‖² = Σ_kl M_kl − 2 Σ_k
        c_k + n over the neurons that are left. The bias is one more neuron, the last, whose activation is 1.
        """
        a, w = self.a, self.weights
        if self.offset is not None:
            a = torch.cat([a, torch.ones(len(a), 1)], dim=1)
            w = torch.cat([w, self.offset[:, None]], dim=1)
        found = []
        for g in range(len(GROUPS)):
            at = torch.from_numpy(self.examples.group == g)
            labels = torch.from_numpy(self.examples.labels)[at]
            c = torch.zeros(len(w), a.shape[1]).index_add_(0, labels, a[at])
            m = (a[at].T @ a[at]).double() * (w.double().T @ w.double())
            found.append((m.numpy(), (c.double() * w.double()).sum(0).numpy()))
        return found


def curve(readout: Readout, order: NDArray[np.int64], counts: Sequence[int]) -> list[Row]:
    """`figures` of the logits that are left after the first n neurons of `order` are gone, for each n of `counts`.

    Args:
        order: a permutation of the k neurons.
        counts: rising, each in 0 … k.
    Returns:
        a row for each of them, with its n_pruned. The accuracies are exactly those of zeroed weights.
    """
    examples = readout.examples
    by_group = np.argsort(examples.group, kind="stable")  # so that a group is a slice
    hits = np.zeros((len(counts), len(GROUPS), 2), dtype=np.int64)  # agreement with the label, with the truth
    losses = _squared_errors(readout, order, counts) if readout.loss == "mse" else np.zeros((len(counts), len(GROUPS)))
    for start in range(0, len(by_group), TILE):
        rows = by_group[start : start + TILE]
        labels = examples.labels[rows]
        wanted = [labels] if examples.truth is None else [labels, examples.truth[rows]]
        ends = np.searchsorted(examples.group[rows], range(len(GROUPS) + 1))
        a = readout.a[torch.from_numpy(rows)]
        for j, logits in enumerate(partial_logits(a, readout.weights, readout.offset, order, counts)):
            predicted = logits.argmax(1)
            for which, values in enumerate(wanted):
                right = predicted == values
                for g in range(len(GROUPS)):
                    hits[j, g, which] += np.count_nonzero(right[ends[g] : ends[g + 1]])
            if readout.loss == "cross_entropy":
                losses[j] += np.bincount(
                    examples.group[rows], weights=cross_entropy(logits, labels), minlength=len(GROUPS)
                )
    n = list(examples.counts().values())
    return [
        {"n_pruned": count, **_row(hits[j], losses[j], n, examples.truth is not None)} for j, count in enumerate(counts)
    ]


def _row(hits: NDArray[Any], losses: NDArray[Any], n: list[int], has_truth: bool) -> Row:
    def mean(total: float, group: int) -> float | None:
        return float(total / n[group]) if n[group] else None

    return {
        "train_corrupted_acc": mean(hits[0, 0], 0),
        "corrupted_true_acc": mean(hits[0, 1], 0) if has_truth else None,
        "train_clean_acc": mean(hits[1, 0], 1),
        "test_acc": mean(hits[2, 0], 2),
        "train_corrupted_loss": mean(losses[0], 0),
        "train_clean_loss": mean(losses[1], 1),
        "test_loss": mean(losses[2], 2),
    }


def _squared_errors(readout: Readout, order: NDArray[np.int64], counts: Sequence[int]) -> NDArray[np.float64]:
    """(j, 3) the squared error of each group, summed over examples, mean over classes: partial sums of `products`."""
    at = np.append(order, len(order)) if readout.offset is not None else order
    found = np.empty((len(counts), len(GROUPS)))
    for g, (m, c) in enumerate(readout.products):
        left = m[np.ix_(at, at)][::-1, ::-1].cumsum(0).cumsum(1).diagonal()[::-1]  # of neurons n, n + 1, … alone
        last = c[at][::-1].cumsum()[::-1]
        left, last = np.append(left, 0), np.append(last, 0)
        n = int((readout.examples.group == g).sum())
        found[:, g] = (left[list(counts)] - 2 * last[list(counts)] + n) / len(readout.weights)
    return found


def cross_entropy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """(i,) ln Σ_q exp z_iq − z_i,label in nats."""
    top = logits.max(1)
    found: NDArray[np.float32] = np.log(np.exp(logits - top[:, None]).sum(1)) + top
    return found - logits[np.arange(len(logits)), labels]


def figures(logits: NDArray[np.float32], examples: Examples, *, loss: Loss = "mse") -> Row:
    """Accuracy and mean loss of each set.

    Args:
        logits: (i, q).
        loss: mse against one-hot labels, mean over classes too; or cross_entropy, in nats.
    Returns:
        train_corrupted_acc (agreement with the recorded labels), corrupted_true_acc (with the true ones),
        train_clean_acc, test_acc, and train_corrupted_loss, train_clean_loss, test_loss; None where a set is empty or
        the truth unknown.
    """
    labels, truth = examples.labels, examples.labels if examples.truth is None else examples.truth
    if loss == "mse":
        at_label = logits[np.arange(len(logits)), labels]
        error = (np.einsum("iq,iq->i", logits, logits) - 2 * at_label + 1) / logits.shape[1]
    else:
        error = cross_entropy(logits, labels)
    predicted, size = logits.argmax(1), len(GROUPS)
    hits = np.stack(
        [np.bincount(examples.group[predicted == wanted], minlength=size) for wanted in (labels, truth)], axis=1
    )
    losses = np.bincount(examples.group, weights=error, minlength=size)
    return _row(hits, losses, list(examples.counts().values()), examples.truth is not None)


def counts_of(n_neurons: int, most: int, *, also: Sequence[int] = ()) -> list[int]:
    """0 … n_neurons, and those in `also`: every number if there are at most `most`, else closer together where few are
    gone, which is where cuts are."""
    shares = np.linspace(0, 1, most + 1) ** 2 if most < n_neurons else np.linspace(0, 1, n_neurons + 1)
    return sorted({*(shares * n_neurons).round().astype(int).tolist(), *also})


def ranking(score: NDArray[np.float64], *, first: Literal["high", "low"]) -> NDArray[np.int64]:
    """(k,) the neurons in the order in which they go; undefined ones (NaN) last, ties as they come."""
    keyed = np.where(np.isnan(score), np.inf, -score if first == "high" else score)
    return np.argsort(keyed, kind="stable")


def random_orders(n_neurons: int, draws: int, *, seed: int) -> list[NDArray[np.int64]]:
    """The control: permutations that know nothing. A draw does not depend on how many there are."""
    return [np.random.default_rng([seed, draw]).permutation(n_neurons) for draw in range(draws)]


def choose(rows: Sequence[Row], *, agreement: str, chance: float, keep_clean: float) -> tuple[int, bool]:
    """The fewest neurons whose removal brings the agreement with corrupted labels to chance and keeps clean accuracy.

    Where no number of neurons does both, the one that keeps clean accuracy and leaves the least agreement. Decided on
    training data alone.

    Args:
        rows: of one curve, with n_pruned = 0 first.
        agreement: the column that says how much of the corrupted examples is still there.
        chance: what is left of it where nothing is remembered; up to CHANCE_MARGIN more will do.
        keep_clean: clean accuracy may fall by 1 − keep_clean.
    Returns:
        n_pruned, and whether the agreement is at chance there.
    """
    floor = rows[0]["train_clean_acc"] - (1 - keep_clean) - 1e-9
    kept = [row for row in rows if row["train_clean_acc"] >= floor]
    for row in kept:
        if row[agreement] <= chance + CHANCE_MARGIN:
            return int(row["n_pruned"]), True
    best = min(kept, key=lambda row: (row[agreement], row["n_pruned"]))
    return int(best["n_pruned"]), False


def interval(share: float | None, n: int, *, confidence: float = 0.95) -> tuple[float | None, float | None]:
    """The Clopper–Pearson interval of a share of n examples; (None, None) for none."""
    if share is None or n == 0:
        return None, None
    k, tail = round(share * n), (1 - confidence) / 2
    low = 0.0 if k == 0 else float(beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k == n else float(beta.ppf(1 - tail, k + 1, n - k))
    return low, high
