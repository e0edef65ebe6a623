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
TILE = 2048  # examples at once: few enough that their logits stay in the cache along a curve
FEW = 16  # neurons: with fewer left, two classes can have the same logit by no accident
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
    columns: Tensor, rows: Tensor, offset: Tensor | None, counts: Sequence[int]
) -> Iterator[NDArray[np.float32]]:
    """The logits (q, i) that are left after the first n neurons are gone, for each n of `counts`.

    Args:
        columns: (k, i) activations, in the order in which the neurons go.
        rows: (k, q) of the read-out, in the same order.
        offset: (q,) its bias, if it has one.
        counts: rising, each in 0 … k.
    Yields:
        the same memory each time: look at it before going on. Classes come first, since the largest of contiguous rows
        is found fastest.
    """
    bias = torch.zeros(rows.shape[1]) if offset is None else offset
    logits = torch.empty(rows.shape[1], columns.shape[1])
    refreshed = done = -1
    every = -(-len(rows) // REFRESH)
    for n in counts:
        if refreshed < 0 or n >= refreshed + every or n == len(rows):
            torch.addmm(bias[:, None], rows[n:].T, columns[n:], out=logits)
            refreshed = n
        elif n > done:
            logits.addmm_(rows[done:n].T, columns[done:n], alpha=-1)
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
    examples, weights = readout.examples, readout.weights
    permutation = torch.from_numpy(np.array(order))  # a copy: a reversed view cannot be shared
    by_weight = weights.T[permutation].contiguous()  # (k, q)
    empty = 0 if readout.offset is None else int(readout.offset.argmax())  # the class where nothing is active
    always = len(torch.unique(weights, dim=0)) < len(weights)  # two classes that are the same tie everywhere
    by_group = np.argsort(examples.group, kind="stable")  # so that a group is a slice
    hits = np.zeros((len(counts), len(GROUPS)), dtype=np.int64)
    true = np.zeros(len(counts), dtype=np.int64)  # agreement of the corrupted ones with the truth
    losses = _squared_errors(readout, order, counts) if readout.loss == "mse" else np.zeros((len(counts), len(GROUPS)))
    for start in range(0, len(by_group), TILE):
        at = by_group[start : start + TILE]
        labels, group = examples.labels[at], examples.group[at]
        ends = np.searchsorted(group, range(len(GROUPS) + 1))
        n_corrupted = 0 if examples.truth is None else int(ends[1])
        truth = labels[:0] if examples.truth is None else examples.truth[at[:n_corrupted]]
        column = np.arange(len(at))
        at_label, at_truth = labels * len(at) + column, truth * len(at) + column[:n_corrupted]
        columns = readout.a[torch.from_numpy(at)].T[permutation].contiguous()  # (k, i)
        until = _active_until(columns)
        for j, z in enumerate(partial_logits(columns, by_weight, readout.offset, counts)):
            if always or counts[j] > len(order) - FEW:
                best = z.argmax(0)
                right, right_true = best == labels, best[:n_corrupted] == truth
            else:
                best = z.max(0)
                right, right_true = best == z.take(at_label), best[:n_corrupted] == z.take(at_truth)
            if until.min() <= counts[j]:  # the logits of these are the bias and rounding, which must not choose
                silent = until <= counts[j]
                right[silent] = labels[silent] == empty
                right_true[silent[:n_corrupted]] = truth[silent[:n_corrupted]] == empty
            hits[j] += [np.count_nonzero(right[ends[g] : ends[g + 1]]) for g in range(len(GROUPS))]
            true[j] += np.count_nonzero(right_true)
            if readout.loss == "cross_entropy":
                losses[j] += np.bincount(group, weights=cross_entropy(z.T, labels), minlength=len(GROUPS))
    n = list(examples.counts().values())
    return [
        {"n_pruned": count, **_row(hits[j], None if examples.truth is None else int(true[j]), losses[j], n)}
        for j, count in enumerate(counts)
    ]


def _active_until(columns: Tensor) -> NDArray[np.int64]:
    """(i,) how many neurons must go until none that is active is left: 0 if none ever was."""
    active = (columns != 0).numpy()  # (k, i)
    return np.where(active.any(0), len(active) - active[::-1].argmax(0), 0)


def _row(hits: NDArray[Any], true: int | None, losses: NDArray[Any], n: list[int]) -> Row:
    def mean(total: float | None, group: int) -> float | None:
        return float(total / n[group]) if n[group] and total is not None else None

    return {
        "train_corrupted_acc": mean(hits[0], 0),
        "corrupted_true_acc": mean(true, 0),
        "train_clean_acc": mean(hits[1], 1),
        "test_acc": mean(hits[2], 2),
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
    labels, predicted, size = examples.labels, logits.argmax(1), len(GROUPS)
    if loss == "mse":
        at_label = logits[np.arange(len(logits)), labels]
        error = (np.einsum("iq,iq->i", logits, logits) - 2 * at_label + 1) / logits.shape[1]
    else:
        error = cross_entropy(logits, labels)
    hits = np.bincount(examples.group[predicted == labels], minlength=size)
    true = None
    if examples.truth is not None:
        true = int(np.count_nonzero((predicted == examples.truth)[examples.group == 0]))
    losses = np.bincount(examples.group, weights=error, minlength=size)
    return _row(hits, true, losses, list(examples.counts().values()))


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
