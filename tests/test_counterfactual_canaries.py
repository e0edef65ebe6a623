"""What `memdiag counterfactual` says of a language model that learned random strings, texts, and texts with copies.

Acceptance item 26 of Zhang et al.'s counterfactual memorization, smaller: strings share a coin with their copies, texts
that are there eight times have a coin each.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

import memdiag
from memdiag import agreement, checkpoint, tasks
from memdiag.counterfactual_shards import read_shard

T, VOCABULARY = 32, 512
MODELS = 8

pytestmark = pytest.mark.xdist_group("canaries")  # the models are trained once


@pytest.fixture(scope="module")
def canaries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canaries")
    texts = [row["text"] for row in tasks.load("task:pydoc?chars=100000").rows()]
    tokenizer = checkpoint.train_tokenizer(iter(texts[:40]), VOCABULARY)
    tokens = [token for text in texts[:40] for token in tokenizer(text)["input_ids"]]
    blocks = np.array(tokens[: len(tokens) // T * T]).reshape(-1, T)
    rng = np.random.default_rng(26)
    order = rng.permutation(len(blocks))
    rows = [(f"text/{i}", blocks[i], f"text/{i}", "text") for i in order[:40]]
    rows += [(f"eight/{i}/{c}", blocks[i], f"eight/{i}/{c}", "eight") for i in order[40:44] for c in range(8)]
    for repeats in (1, 2, 4):
        for i in range(6):
            string = rng.integers(1, VOCABULARY, T)
            name = f"canary/{repeats}/{i}"
            rows += [(f"{name}/{copy}", string, name, f"canary x{repeats}") for copy in range(repeats)]
    names = ("id", "input_ids", "coin", "kind")
    columns = {name: [row[i].tolist() if i == 1 else row[i] for row in rows] for i, name in enumerate(names)}
    pq.write_table(pa.table(columns), folder / "train.parquet")
    small = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": T, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps({**checkpoint.read_config("gpt2-tiny"), **small}))
    found = memdiag.counterfactual(
        folder / "train.parquet", config=folder / "config.json", group_by="coin", models=MODELS, subset_ratio=0.5,
        epochs=30, batch_size=16, lr=3e-3, out=folder / "out",
    )  # fmt: skip
    table = found.to_pandas()
    table["kind"] = columns["kind"]
    return found, table


@pytest.mark.slow
def test_every_example_is_in_half_of_the_models(canaries):
    _, table = canaries
    assert (table["n_in"] == 4).all()
    assert (table["n_out"] == 4).all()


@pytest.mark.slow
def test_a_string_with_a_shared_coin_is_memorized_and_a_text_with_copies_hides(canaries):
    _, table = canaries
    means = table.groupby("kind")[["memorization", "p_in", "memorization_copies"]].mean()
    assert means.loc["canary x2", "memorization"] >= 0.9
    assert means.loc["canary x4", "memorization"] >= 0.9
    assert means.loc["eight", "p_in"] >= 0.9
    assert means.loc["eight", "memorization"] <= 0.15  # per copy, though it is among the best known
    assert (table.loc[table["kind"] == "eight", "copies"] == 8).all()
    assert means.loc["text", "memorization"] > means.loc["eight", "memorization"]
    # all copies of a string share its coin, so that together they are what each is
    strings = table[table["kind"].str.startswith("canary")]
    np.testing.assert_allclose(strings["memorization_copies"], strings["memorization"])


@pytest.mark.slow
def test_who_was_trained_on_what_can_be_told_from_the_shards(canaries):
    found, _ = canaries
    shards = [read_shard(found.path / "shards", k) for k in range(MODELS)]
    included = np.array([shard.included for shard in shards])
    measure = np.array([shard.soft for shard in shards], dtype=np.float64)
    ratios = np.empty_like(measure)
    for k in range(MODELS):  # LiRA, online, one model left out, one variance for all
        others = np.arange(MODELS) != k
        inside = np.where(included[others], measure[others], np.nan)
        outside = np.where(included[others], np.nan, measure[others])
        m_in, m_out = np.nanmean(inside, axis=0), np.nanmean(outside, axis=0)
        s_in, s_out = (np.sqrt(np.nanmean((x - m) ** 2)) for x, m in ((inside, m_in), (outside, m_out)))
        ratios[k] = stats.norm.logpdf(measure[k], m_in, s_in) - stats.norm.logpdf(measure[k], m_out, s_out)
    ratio = agreement.auc(ratios.ravel(), included.ravel()).value
    loss = agreement.auc(measure.ravel(), included.ravel()).value
    assert ratio >= 0.95
    assert ratio >= loss
