"""The case where truth is known, end to end in memory: settings, acceptance checks that need a trained network."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from memdiag import fourier, grokking, prune_modular, pruning
from memdiag.errors import InputError
from memdiag.prune_curves import Found
from memdiag.prune_modular import Setting, setting_of
from memdiag.prune_report import PruneOptions
from memdiag.pruning import Readout

SMALL = {"data": "task:modular-addition?p=59", "width": 256, "corruption": 0.2}


@cache
def found(weight_decay: float = 0.0, steps: int = 1000, filtered: bool = True) -> Found:
    """The dossier's small network, trained once a session."""
    options = PruneOptions(**SMALL, weight_decay=weight_decay, steps=steps, filter_frequencies=filtered)  # type: ignore[arg-type]
    return prune_modular.of_seed(setting_of(options), options, 0, lambda n: None)


def along(order: str, rows: list[dict[str, Any]], draw: int | None = None) -> list[dict[str, Any]]:
    return [row for row in rows if row["order"] == order and row["draw"] == draw]


# -- settings ------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers_example() -> None:
    setting = setting_of(PruneOptions())
    assert (setting.operation, setting.p, setting.train_fraction, setting.corruption) == ("addition", 97, 0.5, 0.3)
    assert (setting.law, setting.data_seed) == ("uniform", None)
    assert (setting.training.width, setting.training.steps, setting.training.lr) == (500, 1000, 0.01)
    assert setting.training.dtype == "float32"


def test_the_width_grows_with_p() -> None:
    widths = {p: setting_of(PruneOptions(data=f"task:modular-addition?p={p}")).training.width for p in (59, 71, 97)}
    assert widths == {59: 304, 71: 366, 97: 500}


def test_keys_of_the_task_and_options_agree() -> None:
    named = setting_of(PruneOptions(data="task:modular-subtraction?corruption=0.2&seed=5&p=31", train_fraction=0.6))
    assert (named.operation, named.corruption, named.train_fraction, named.data_seed) == ("subtraction", 0.2, 0.6, 5)
    assert setting_of(PruneOptions(data="task:modular-addition?corruption=0.2", corruption=0.2)).corruption == 0.2
    assert (named.pairs(0).labels == named.pairs(1).labels).all()  # the data's own seed
    free = setting_of(PruneOptions())
    assert (free.pairs(0).operands != free.pairs(1).operands).any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"corruption": 0.0}, "leaves no corrupted ones"),
        ({"corruption": 1e-5}, "leaves no corrupted ones"),
        ({"corruption": 1.0}, "less than 1"),
        ({"data": "task:modular-addition?corruption=0.2", "corruption": 0.3}, "give one"),
        ({"data": "task:modular-addition?split=test"}, "leave split out"),
        ({"data": "task:modular-multiplication?p=91"}, "not prime; multiplication needs a prime, e.g. 89"),
        ({"data": "task:digits"}, "no task to train on 'digits'"),
        ({"data": "pairs.csv"}, "give a checkpoint"),
        ({"n": 501}, "--n is 501, but the network has 500 neurons"),
        ({"data": "task:modular-multiplication", "filter_frequencies": True}, "0 has no place among logarithms"),
        ({"dtype": "float64"}, "no dtype for training 'float64'"),
    ],
)
def test_settings_that_make_no_run_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        setting_of(PruneOptions(**options))
    assert "\n" not in str(error.value)


# -- coexistence ---------------------------------------------------------------------------------------------------


def test_both_kinds_of_neuron_coexist() -> None:
    """Acceptance check I, no decay: everything is memorized and the rule is learned."""
    about = found().about
    assert about["phase"] == "coexistence"
    assert about["before"]["train_corrupted_acc"] >= 0.97
    assert about["before"]["train_clean_acc"] >= 0.999
    assert about["before"]["test_acc"] == pytest.approx(0.974, abs=0.015)
    low, middle, high = about["ipr_low_mid_high"]
    assert high == pytest.approx(89, abs=8)
    assert low + middle + high + about["n_dead"] == 256
    assert about["ipr_null"] == pytest.approx(0.107, abs=0.006)  # the 99.99 % point of noise for p = 59


def test_low_ipr_neurons_are_what_holds_the_corrupted_labels() -> None:
    rows = found().pruning
    low_first = along("ipr", rows)
    at_chance = next(row["n_pruned"] for row in low_first if row["train_corrupted_acc"] < 0.05)
    assert 128 <= at_chance <= 152  # 135 to 145 of 256 in the dossier
    last = max(row["n_pruned"] for row in low_first if row["test_acc"] >= 0.99)
    assert 170 <= last <= 200  # 180 to 185 there; seeds 0 to 4 here: 196, 186, 191, 178, 184
    random_at = [
        row["train_corrupted_acc"] for row in rows if row["order"] == "random" and row["fraction_pruned"] > 0.5
    ]
    assert max(random_at) > 0.2


def test_the_cut_stands_out_from_its_controls() -> None:
    about = found().about
    assert about["chosen"]["train_corrupted_acc"] <= 1 / 59 + 0.04
    assert about["chosen"]["train_clean_acc"] >= 0.99
    assert about["chosen"]["test_acc"] > about["random"]["test_acc"]["hi"]
    assert about["chosen"]["train_corrupted_acc"] < about["random"]["train_corrupted_acc"]["lo"]
    assert about["reversed"]["test_acc"] < 0.2
    assert about["random_matched"]["n_pruned"] > 1.4 * about["chosen"]["n_pruned"]
    # what was corrupted now gets its true label
    assert about["chosen"]["corrupted_true_acc"] > 0.85


def test_contrast_finds_memorizers_and_importance_alone_does_not() -> None:
    """Acceptance check N on the small network: AUC against IPR < 0.5."""
    neurons = found().neurons
    is_low = [row["ipr"] < fourier.HIGH for row in neurons]
    auc = {
        name: roc_auc_score(is_low, [row[name] for row in neurons]) for name in ("memorization", "ablation_corrupted")
    }
    contrast = [row["ablation_corrupted"] - row["ablation_clean"] for row in neurons]
    baseline = [-row["norm_product"] for row in neurons]
    assert auc["memorization"] >= 0.995
    assert roc_auc_score(is_low, contrast) >= 0.97
    assert auc["ablation_corrupted"] <= 0.45
    assert 0.9 < roc_auc_score(is_low, baseline) < auc["memorization"]


def test_the_strongest_frequencies_alone_know_the_rule() -> None:
    whole, dominant, remainder = found().filtration
    assert whole["train_corrupted_acc"] >= 0.97
    assert dominant["test_acc"] >= 0.99
    assert dominant["train_corrupted_acc"] <= 0.05
    assert remainder["test_acc"] <= 0.1
    assert remainder["train_corrupted_acc"] >= 0.5


def test_rows_are_whole() -> None:
    result = found()
    assert [row["neuron"] for row in result.neurons] == list(range(256))
    assert sorted(row["pruned_at"] for row in result.neurons) == list(range(1, 257))
    n = result.about["chosen"]["n_pruned"]
    assert sum(row["is_memorizer"] for row in result.neurons) == n
    assert {row["pruned_at"] for row in result.neurons if row["is_memorizer"]} == set(range(1, n + 1))
    by_place = sorted(result.neurons, key=lambda row: row["pruned_at"])
    assert all(a["memorization"] >= b["memorization"] for a, b in itertools.pairwise(by_place))
    orders = {row["order"] for row in result.pruning}
    assert orders == {"memorization", "reversed", "norm_product", "ipr", "random"}
    assert all(any(row["n_pruned"] == 0 for row in along(order, result.pruning)) for order in orders - {"random"})
    assert [row["step"] for row in result.dynamics] == list(range(0, 1001, 20))
    start = {name: along("memorization", result.pruning)[0][name] for name in ("train_corrupted_acc", "test_acc")}
    assert start == {name: result.dynamics[-1][name] for name in start}
    assert result.about["corrupted_that_are_right"] == round(348 / 59) or result.about["corrupted_that_are_right"] > 0


def test_a_network_that_was_pruned_does_what_its_row_says() -> None:
    result = found()
    options = PruneOptions(**SMALL)  # type: ignore[arg-type]
    pairs = setting_of(options).pairs(0)
    at = grokking.evaluate(result.models["pruned"], pairs)
    for name in ("train_corrupted_acc", "corrupted_true_acc", "train_clean_acc", "test_acc"):
        assert at[name] == result.about["chosen"][name]
    first, last = grokking.weights_of(result.models["pruned"])
    gone = [row["neuron"] for row in result.neurons if row["is_memorizer"]]
    assert not first[gone].any()
    assert not last[:, gone].any()
    trained = grokking.evaluate(result.models["trained"], pairs)
    assert trained["train_corrupted_acc"] == result.about["before"]["train_corrupted_acc"]


# -- inversion -----------------------------------------------------------------------------------------------------


def test_decay_unlearns_what_was_memorized() -> None:
    """Acceptance check I, weight decay 10: first everything is memorized, then the corrupted labels are let go."""
    result = found(10.0, 800, False)
    about, dynamics = result.about, result.dynamics
    assert about["phase"] == "full_inversion"
    assert about["before"]["train_corrupted_acc"] <= 0.04
    assert about["before"]["test_acc"] >= 0.999
    assert about["ipr_low_mid_high"][0] <= 3
    assert about["chosen"]["n_pruned"] == 0  # nothing is left to be pruned
    assert max(row["train_corrupted_acc"] for row in dynamics) > 0.95

    def first(wanted: Any) -> int:
        return int(next(row["step"] for row in dynamics if wanted(row)))

    learned = first(lambda row: row["train_acc"] >= 0.95)
    grokked = first(lambda row: row["test_acc"] >= 0.99)
    unlearned = first(lambda row: row["step"] > learned and row["train_corrupted_acc"] < 0.05)
    assert learned < grokked <= unlearned


def test_dead_neurons_stand_apart() -> None:
    options = PruneOptions(**SMALL, steps=0)  # type: ignore[arg-type]
    setting = setting_of(options)
    pairs = setting.pairs(0)
    model = grokking.initial(59, setting.training, 0)
    first, last = grokking.weights_of(model)
    first[3], last[:, 5] = 0, 1e-6
    scores, _ = prune_modular.attribute(model, pairs)
    assert np.flatnonzero(scores["dead"]).tolist() == [3, 5]
    assert np.isnan(scores["ipr"][[3, 5]]).all()
    assert pruning.ranking(scores["ipr"], first="low")[-2:].tolist() == [3, 5]
    assert sum(prune_modular.ipr_classes(scores["ipr"], pairs, "square")) == 254


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_normed_network_is_pruned_at_its_read_out(norm: str) -> None:
    options = PruneOptions(**{**SMALL, "data": "task:modular-addition?p=23", "width": 64}, norm=norm, steps=30)
    result = prune_modular.of_seed(setting_of(options), options, 0, lambda n: None)
    pairs = setting_of(options).pairs(0)
    rows = along("memorization", result.pruning)
    model = result.models["trained"]
    a, weights = grokking.activations(model, pairs.operands), grokking.weights_of(model)[1].clone()
    order = [row["neuron"] for row in sorted(result.neurons, key=lambda row: row["pruned_at"])]
    weights[:, order[:20]] = 0
    _, examples = prune_modular.attribute(model, pairs)
    expected = pruning.figures((a @ weights.T).numpy(), examples)
    assert rows[20]["test_acc"] == expected["test_acc"]
    if "pruned" in result.models:
        assert grokking.evaluate(result.models["pruned"], pairs)["test_acc"] == result.about["chosen"]["test_acc"]


def test_multiplication_is_seen_in_the_order_of_logarithms() -> None:
    """Acceptance check O, small: what multiplies is periodic in the discrete logarithm, and noise in natural order."""
    options = PruneOptions(
        data="task:modular-multiplication?p=59", width=256, corruption=0.2, weight_decay=10, steps=800
    )
    result = prune_modular.of_seed(setting_of(options), options, 0, lambda n: None)
    assert result.about["before"]["test_acc"] >= 0.99
    assert result.about["mean_ipr"] >= 0.5
    natural = fourier.ipr(*grokking.curves(result.models["trained"], "addition"))
    assert natural[~natural.isnan()].mean() <= 0.09


def test_direct_logit_is_about_labels_that_are_wrong() -> None:
    """A redrawn label may be right; such an example says nothing of the wrong label over the true one."""
    setting = Setting("addition", 5, 0.8, 0.6, "uniform", None, grokking.Training(width=12, steps=0))
    pairs = setting.pairs(1)
    assert (pairs.corrupted & (pairs.labels == pairs.truth)).any()
    model = grokking.initial(5, setting.training, 0)
    scores, _ = prune_modular.attribute(model, pairs)
    a, weights = grokking.activations(model, pairs.operands), grokking.weights_of(model)[1]
    wrong = [i for i in range(pairs.n_train) if pairs.labels[i] != pairs.truth[i]]
    expected = sum(a[i] * (weights[pairs.labels[i]] - weights[pairs.truth[i]]) for i in wrong) / len(wrong)
    assert isinstance(expected, torch.Tensor)
    np.testing.assert_allclose(scores["direct_logit"], expected.numpy(), rtol=1e-5)


def test_readout_products_are_shared_by_all_orders() -> None:
    setting = Setting("addition", 11, 0.5, 0.3, "wrong", None, grokking.Training(width=20, steps=0))
    pairs = setting.pairs(0)
    model = grokking.initial(11, setting.training, 0)
    _, examples = prune_modular.attribute(model, pairs)
    readout = Readout(grokking.activations(model, pairs.operands), grokking.weights_of(model)[1], None, examples)
    first = readout.products
    pruning.curve(readout, np.arange(20), [0, 10, 20])
    assert readout.products is first
    assert torch.get_num_threads() == 1
