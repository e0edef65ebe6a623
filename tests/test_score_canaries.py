"""Planted strings in real text: the scores of a language model against how often each string was trained on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

import memdiag
from memdiag import agreement, tasks, train_report

REPEATS = (1, 2, 4, 8, 16, 32)


def train_and_score(where):
    """A tiny GPT-2 trained on every sixteenth passage and on strings repeated 1 to 32 times; all of them scored."""
    rows = list(tasks.load("task:canaries?split=all&per_level=4&levels=32").rows())
    texts = [row for row in rows if not row["canary"] and row["repeats"]][::16]
    held_out = [row for row in rows if not row["canary"] and not row["repeats"]]
    strings = [row for row in rows if row["canary"]]
    trained = texts + [row for row in strings if row["repeats"]]
    for name, some in (("train", trained), ("all", texts + held_out + strings)):
        (where / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in some))
    train_report.train(where / "train.jsonl", out=where / "run", epochs=14, batch_size=16, lr=3e-3, save_every=10_000)
    last = max((where / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    report = memdiag.score(
        last, data=where / "all.jsonl", columns={"truth": "canary", "id": "id", "text": "text"}, truth="canary",
        prefix_tokens=16, suffix_tokens=24,
        scores="nll_mean,nll_sum,min_k_20,min_kpp_20,em_suffix,match_prefix_len,extractable,logp_suffix_t1",
    )  # fmt: skip
    frame = report.to_pandas()
    frame["repeats"] = [row["repeats"] for row in texts + held_out + strings]
    return frame


@pytest.mark.slow
def test_what_was_repeated_is_remembered_and_min_k_plus_plus_is_no_degree_of_it(tmp_path):
    scored = train_and_score(tmp_path)
    strings = scored[scored.truth & (scored.repeats > 0)].drop_duplicates("nll_mean")
    rho = {
        name: stats.spearmanr(strings[name].astype(float), strings.repeats, nan_policy="omit").statistic
        for name in ("nll_mean", "min_k_20", "min_kpp_20", "em_suffix", "logp_suffix_t1")
    }
    assert rho["nll_mean"] < -0.9
    assert rho["min_k_20"] > 0.9
    assert rho["logp_suffix_t1"] > 0.9
    assert rho["em_suffix"] > 0.8
    assert rho["min_kpp_20"] < 0.8  # the control: it falls again once a string is known by heart
    often, once = strings[strings.repeats == 32], strings[strings.repeats == 1]
    assert often.extractable.astype(bool).all()
    assert not once.extractable.astype(bool).any()
    unseen = scored[scored.truth & (scored.repeats == 0)]
    for name, sign in (("nll_mean", -1), ("min_k_20", 1)):
        values = sign * np.concatenate([once[name].to_numpy(float), unseen[name].to_numpy(float)])
        truth = np.arange(len(values)) < len(once)
        assert agreement.auc(values, truth).value > 0.95
    # 96 letters, one in six a blank: nobody can know a string that was not there better than by its entropy
    entropy = 96 * -(math.log(1 / 6) / 6 + 5 / 6 * math.log(5 / 6 / 36))
    assert unseen.nll_sum.mean() > 0.95 * entropy
    with_suffix = scored[scored.n_suffix > 0]
    whole = with_suffix.extractable.astype(bool)
    assert (whole == (with_suffix.em_suffix == 1)).all()
    assert (whole == (with_suffix.match_prefix_len == with_suffix.n_suffix)).all()
    assert (with_suffix.match_prefix_len / with_suffix.n_suffix <= with_suffix.em_suffix + 1e-12).all()
    np.testing.assert_allclose(scored.nll_sum, scored.nll_mean * scored.n_scored, rtol=1e-9)
