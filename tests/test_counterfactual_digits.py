"""What `memdiag counterfactual` says of handwritten digits of which a tenth has a wrong label: the truth is planted."""

import numpy as np
import pytest
from scipy import stats

import memdiag

NOISY = "task:digits?split=train&corruption=0.1"
TEST = "task:digits?split=test"

pytestmark = pytest.mark.xdist_group("digits")  # the models are trained once


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "hundred"
    return memdiag.counterfactual(NOISY, test=TEST, models=100, out=out)


@pytest.mark.slow
def test_a_hundred_models_find_the_wrong_labels(hundred):
    about, table = hundred.summary, hundred.to_pandas()
    wrong = table["truth"].to_numpy(bool)
    assert wrong.sum() == 143
    assert about["truth"]["auc"]["value"] >= 0.99  # .995 is the dossier's
    assert table["memorization"][wrong].mean() >= 0.95
    assert table["memorization"][~wrong].mean() <= 0.12
    assert table["p_in"].min() >= 0.9
    assert table["p_in"].mean() >= 0.999  # the models interpolate, without which nothing of this holds
    assert not [text for text in about["warnings"] if "have learned" in text]


@pytest.mark.slow
def test_the_standard_errors_foretell_how_far_two_halves_differ(hundred):
    half = hundred.summary["stability"]
    assert half["rmse"] == pytest.approx(half["rms_se"], rel=0.15)
    assert half["spearman"]["value"] >= 0.8  # .851 is the dossier's at 50 against 50


@pytest.mark.slow
def test_fifty_of_them_are_enough_and_train_nothing_new(hundred, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (hundred.path / "shards").glob("*.parquet")}
    assert len(before) == 100
    fifty = memdiag.counterfactual(NOISY, test=TEST, models=50, out=hundred.path)
    assert fifty.summary["models"] == 50
    assert fifty.summary["truth"]["auc"]["value"] >= 0.985
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_influence_is_more_than_chance_and_a_row_helps_its_like(hundred):
    pairs = hundred.summary["influence"]
    assert pairs["significant"] > pairs["significant_if_shuffled"]
    table, labels = hundred.influence.to_pandas(), hundred.to_pandas().set_index("example_id")
    strongest = table[table["significant"] & (table["influence"] > 0)].nlargest(100, "influence")
    own = labels.loc[strongest["example_id"], "label"].to_numpy()
    true = {row["id"]: row["label"] for row in _rows(TEST)}
    helped = np.array([true[name] for name in strongest["test_id"]])
    same = int((own == helped).sum())  # a tenth of them by chance
    assert stats.binomtest(same, len(own), 0.1, alternative="greater").pvalue < 1e-3


@pytest.mark.slow
def test_what_was_not_learned_has_no_memorization(tmp_path):
    # the control: raw pixels and fewer passes, so that most wrong labels are never fitted
    found = memdiag.counterfactual(NOISY, models=50, epochs=40, standardize=False, out=tmp_path / "unfitted")
    truth = found.summary["truth"]
    assert truth["p_in_true"] < 0.3
    assert truth["auc"]["value"] < 0.85
    assert [text for text in found.summary["warnings"] if "have learned" in text]


def _rows(name):
    from memdiag import tasks

    return tasks.load(name).rows()
