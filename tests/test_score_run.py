"""`memdiag score` end to end: real checkpoints, runs and trajectories, against what plain loops find."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

import memdiag
from memdiag import agreement, observe, score_inputs, score_job, scores, tables, train_report
from memdiag.checkpoint import open_checkpoints, save
from memdiag.errors import InputError
from memdiag.models.mlp import MLP, MlpConfig
from memdiag.observe.gradients import GradientNormer
from memdiag.score_report import KEY, OF_CLASSIFIER, OF_LANGUAGE, ScoreOptions, ScoreRow

DIGITS = "task:digits?split=train&corruption=0.1"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of memdiag train with corrupted labels: checkpoints and a trajectory."""
    out = tmp_path_factory.mktemp("score") / "run"
    train_report.train("task:digits?split=train", out=out, epochs=3, corruption=0.1, limit=300, width=32)
    return out


def bare(fixtures, name="tiny-gpt2"):
    return open_checkpoints(fixtures / name)[0]


# -- classifiers ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_digits_with_planted_noise_give_the_known_bands(tmp_path):
    found = train_report.train(DIGITS, out=tmp_path / "run", epochs=60)
    assert found.summary["train_accuracy"] > 0.999
    report = memdiag.score(tmp_path / "run", truth="corrupted")
    auc = {name: about["auc"]["value"] for name, about in report.meta["summary"]["scores"].items()}
    for name in ("csl", "aum_early", "cartography_confidence", "cartography_variability", "correctness", "tracin_self"):
        assert auc[name] > 0.98, name
    assert auc["csg"] > 0.97
    assert auc["aum"] > 0.96
    assert 0.85 < auc["forgetting_events"] < 0.97
    assert 0.88 < auc["loss"] < 0.98  # at the end of training the noise is fitted: worse than on the way
    first = memdiag.score(tmp_path / "run", truth="corrupted", at=0, scores="grand,el2n,loss")
    start = {name: about["auc"]["value"] for name, about in first.meta["summary"]["scores"].items()}
    assert 0.4 < start["grand"] < 0.6  # the control: at initialization it knows nothing of labels
    assert 0.4 < start["el2n"] < 0.6


def test_gradients_at_initialization_measure_the_length_of_the_input():
    """Over ten initial networks; a single one has a rank correlation between .30 and .68 here."""
    rows = _rows(DIGITS)
    x, y = np.stack([row["features"] for row in rows]), np.array([row["label"] for row in rows])
    middle, spread = float(x.mean()), float(x.std())
    inputs = observe.Inputs(None, None, torch.tensor(x), torch.tensor(y))
    norms = []
    for seed in range(10):
        with torch.random.fork_rng():
            torch.random.manual_seed(seed)
            network = MLP(MlpConfig((64, 128, 128, 10), input_mean=middle, input_std=spread))
        norms.append(GradientNormer(network, inputs)(inputs).whole)
    lengths = np.linalg.norm((x - middle) / spread, axis=1)
    assert stats.spearmanr(np.mean(norms, axis=0), lengths).statistic > 0.8
    truth = np.array([row["corrupted"] for row in rows])
    assert 0.4 < agreement.auc(np.mean(norms, axis=0), truth).value < 0.6


def _rows(task):
    from memdiag import tasks

    return list(tasks.load(task).rows())


def test_scores_of_one_checkpoint_are_what_plain_loops_find(run):
    report = memdiag.score(run, at=None, scores="loss,margin,el2n,grand,last_layer_grand,input_grad_norm")
    last = open_checkpoints(run)[-1].load()
    last.requires_grad_(True)
    examples = pq.read_table(run / "examples.parquet")
    features = [row["features"] for row in _rows("task:digits?split=train")]
    for i in (0, 7, 123, 299):
        x = torch.tensor(features[i])[None].requires_grad_()
        y = torch.tensor([examples["label"][i].as_py()])
        z = last(x)
        loss = F.cross_entropy(z, y)
        gradients = torch.autograd.grad(loss, [x, *last.parameters()])
        row = {name: report.table[name][i].as_py() for name in report.table.column_names}
        other = max(float(v) for c, v in enumerate(z[0]) if c != int(y))
        whole = sum(float(g.double().square().sum()) for g in gradients[1:]) ** 0.5
        wanted = {
            "loss": float(loss),
            "margin": float(z[0, y]) - other,
            "el2n": float((z.softmax(1) - F.one_hot(y, 10)).norm()),
            "grand": whole,
            "last_layer_grand": sum(float(g.double().square().sum()) for g in gradients[-2:]) ** 0.5,
            "input_grad_norm": float(gradients[0].norm()),
        }
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_labels_are_those_that_were_trained_on(run):
    examples = pq.read_table(run / "examples.parquet")
    assert examples["corrupted"].to_numpy().sum() == 30
    report = memdiag.score(run, scores="loss", truth="corrupted")
    assert report.table["label"].equals(examples["label"])
    assert report.table["truth"].to_numpy().tolist() == examples["corrupted"].to_numpy().tolist()
    assert report.table["loss"].to_numpy()[examples["corrupted"].to_numpy()].mean() > 1


def test_a_trajectory_and_its_run_give_the_same(run):
    names = "csl,aum,forgetting_events,learned_forever,correctness"
    a, b = memdiag.score(run, scores=names), memdiag.score(run / "trajectory", scores=names)
    for name in names.split(","):
        assert a.table[name].equals(b.table[name]), name
    trajectory = [pq.read_table(run / "trajectory" / f"epoch={e:04d}.parquet") for e in range(3)]
    losses = [t["logsumexp"].to_numpy().astype(float) - t["label_logit"].to_numpy().astype(float) for t in trajectory]
    np.testing.assert_allclose(a.table["csl"].to_numpy(), np.maximum(losses, 0).sum(0), rtol=1e-6)
    assert a.meta["trajectory"] == "at presentation time"


def test_examples_that_were_not_trained_on_have_no_dynamics(tmp_path):
    data = "task:digits?split=train"
    train_report.train(data, out=tmp_path / "run", epochs=2, test_fraction=0.3, limit=80, width=8)
    trained = pq.read_table(tmp_path / "run" / "examples.parquet")["row"].to_pylist()
    assert trained != list(range(len(trained)))
    own = memdiag.score(tmp_path / "run", scores="csl,loss")
    assert own.table["row"].to_pylist() == trained
    every = memdiag.score(tmp_path / "run", data=data, limit=80, scores="csl,loss")
    assert every.table["row"].to_pylist() == list(range(80))
    assert [row for row, csl in enumerate(every.table["csl"].to_pylist()) if csl is not None] == trained
    assert every.table.take(trained)["csl"].combine_chunks().equals(own.table["csl"].combine_chunks())
    assert every.table["loss"].null_count == 0


def test_without_a_trajectory_the_checkpoints_stand_in(run, tmp_path):
    for step in (5, 10, 15):
        checkpoint = next(c for c in open_checkpoints(run) if c.step and c.step >= step - 1)
        save(tmp_path / "bare" / f"checkpoint-{step}", checkpoint.load(), task="task:digits?split=train")
    report = memdiag.score(tmp_path / "bare", data="task:digits?split=train", limit=300)
    assert report.meta["trajectory"] == "at the checkpoints"
    by_hand = np.zeros(300)
    x = torch.tensor(np.stack([row["features"] for row in _rows("task:digits?split=train")[:300]]))
    y = torch.tensor([row["label"] for row in _rows("task:digits?split=train")[:300]])
    for checkpoint in open_checkpoints(tmp_path / "bare"):
        by_hand += F.cross_entropy(checkpoint.load()(x), y, reduction="none").detach().double().numpy()
    np.testing.assert_allclose(report.table["csl"].to_numpy(), by_hand, rtol=1e-5, atol=1e-6)


def test_tracin_weighs_squared_gradients_with_the_learning_rates_of_the_run(run):
    report = memdiag.score(run, scores="tracin_self,csg,loss_curvature")
    grand = [memdiag.score(run, scores="grand,input_grad_norm", at=c.step).table for c in open_checkpoints(run)]
    eta = score_inputs.open_inputs(str(run), ScoreOptions()).learning_rates()
    assert len(eta) == len(grand) == 4
    lr = pq.read_table(run / "history.parquet")["lr"].to_pylist()
    assert eta.tolist() == [lr[0], *lr]  # of the last update before it; the initial weights have none
    squares = np.stack([t["grand"].to_numpy() for t in grand]) ** 2
    np.testing.assert_allclose(report.table["tracin_self"].to_numpy(), eta @ squares, rtol=1e-6)
    inputs = np.stack([t["input_grad_norm"].to_numpy() for t in grand]) ** 2
    np.testing.assert_allclose(report.table["csg"].to_numpy(), inputs.sum(0), rtol=1e-6)


def test_the_batch_size_changes_nothing(run, assert_same_rows):
    a = memdiag.score(run, batch_size=7).table.to_pylist()
    b = memdiag.score(run).table.to_pylist()
    assert_same_rows(a, b, rel=1e-4, abs=1e-5)


def test_ranks_are_oriented_and_run_from_0_to_1(run):
    report = memdiag.score(run, scores="csl,aum", ranks=True)
    csl, aum = (report.table[name].to_numpy() for name in ("csl", "aum"))
    assert report.table["csl_rank"].to_numpy()[csl.argmax()] == 1
    assert report.table["aum_rank"].to_numpy()[aum.argmin()] == 1  # low is memorized
    assert report.table["aum_rank"].to_numpy().min() == 0


def test_more_pieces_and_an_interrupted_run_give_the_same_bytes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(score_job, "PIECE", 64)
    memdiag.score(run, out=tmp_path / "whole.parquet")
    written = []
    real = tables.write

    def cut_off(path, *args, **kwargs):
        if len(written) == stop:
            raise KeyboardInterrupt
        real(path, *args, **kwargs)
        written.append(path)

    for stop in (0, 1, 9, 20, 21):  # 4 checkpoints x 5 pieces, then the whole
        written.clear()
        out = tmp_path / f"cut-{stop}.parquet"
        with monkeypatch.context() as m:
            m.setattr(tables, "write", cut_off)
            if stop < 21:
                with pytest.raises(KeyboardInterrupt):
                    memdiag.score(run, out=out)
        memdiag.score(run, out=out)
        assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
        assert not (tmp_path / f".cut-{stop}.parquet.parts").exists()


def test_pieces_do_not_change_rows(run, monkeypatch, assert_same_rows):
    whole = memdiag.score(run).table.to_pylist()
    monkeypatch.setattr(score_job, "PIECE", 50)
    assert_same_rows(memdiag.score(run).table.to_pylist(), whole, rel=1e-4, abs=1e-5)


def test_two_processes_write_the_same_report(run, tmp_path, torchrun):
    arguments = ["-m", "memdiag", "score", str(run), "--truth", "corrupted", "--ranks", "--quiet", "--out"]
    done = torchrun(*arguments, str(tmp_path / "two.parquet"))
    assert done.returncode == 0, done.stderr
    memdiag.score(run, out=tmp_path / "one.parquet", truth="corrupted", ranks=True)
    one, two = tables.read(tmp_path / "one.parquet"), tables.read(tmp_path / "two.parquet")
    assert one.table.equals(two.table)
    assert one.meta["summary"]["agreement"] == two.meta["summary"]["agreement"]


def test_coherence_is_one_for_each_and_counts_examples(run):
    found = memdiag.score(run, scores="grand").meta["summary"]["coherence"]
    assert found["m"] == 300
    assert 0 <= found["overall"] <= 300
    assert sum(found["m_per_class"].values()) == 300


def test_a_custom_layer_is_scored_one_by_one(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "class Odd(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = torch.nn.Parameter(torch.eye(64)[:10].clone())\n"
        "    def forward(self, x):\n"
        "        if float(x.sum()) > -1e9:\n"  # a branch on data, which vmap cannot take
        "            return x @ self.w.T\n"
        "        return x[:, :10]\n"
        "def make():\n"
        "    return Odd()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    torch.save({"w": torch.randn(10, 64, generator=torch.Generator().manual_seed(0))}, tmp_path / "w.pt")
    report = memdiag.score(tmp_path / "w.pt", model="own:make", data="task:digits", limit=20, scores="grand,el2n")
    pixels = np.stack([row["features"] for row in _rows("task:digits")[:20]]).astype(np.float64)
    wanted = report.table["el2n"].to_numpy() * np.linalg.norm(pixels, axis=1)
    np.testing.assert_allclose(report.table["grand"].to_numpy(), wanted, rtol=1e-5)


# -- language models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_language_scores_are_what_the_models_own_logits_say(fixtures, name):
    report = memdiag.score(
        fixtures / name, data=fixtures / "texts.jsonl", dtype="float32", prefix_tokens=8, suffix_tokens=4
    )
    checkpoint = bare(fixtures, name)
    model, tokenizer = checkpoint.load(dtype="float32"), checkpoint.tokenizer()
    texts = [json.loads(line)["text"] for line in (fixtures / "texts.jsonl").read_text().splitlines()]
    assert report.table["row"].to_pylist() == list(range(len(texts)))  # though batches are made by length
    for i in range(0, len(texts), 3):
        ids = torch.tensor(tokenizer(texts[i])["input_ids"])[None]
        with torch.no_grad():
            logp = model(ids).logits.double().log_softmax(-1)[0, :-1]
        own = logp.gather(1, ids[0, 1:, None])[:, 0]
        hit = logp.argmax(-1) == ids[0, 1:]
        row = {column: report.table[column][i].as_py() for column in report.table.column_names}
        assert row["n_tokens"] == ids.shape[1]
        assert row["nll_mean"] == pytest.approx(-float(own.mean()), rel=1e-5)
        assert row["em_full"] == pytest.approx(float(hit.double().mean()))
        worst = own.sort().values[: max(1, int(len(own) * 0.2))]
        assert row["min_k_20"] == pytest.approx(float(worst.mean()), rel=1e-5)
        if ids.shape[1] >= 12:
            assert row["n_suffix"] == 4
            assert row["logp_suffix_t1"] == pytest.approx(float(own[7:11].sum()), rel=1e-5)
            greedy = model.generate(ids[:, :8], max_new_tokens=4, do_sample=False, eos_token_id=None)
            assert row["extractable"] == torch.equal(greedy[0, 8:], ids[0, 8:12])
        else:
            assert (row["n_suffix"], row["logp_suffix_t1"], row["extractable"]) == (0, None, None)


def test_a_reference_is_a_difference_of_two_models(fixtures, tmp_path):
    steps = [c.path for c in open_checkpoints(fixtures / "run")]
    report = memdiag.score(steps[-1], reference=steps[1], limit=20, scores="nll_mean,ref_delta,ez_score")
    other = memdiag.score(steps[1], limit=20, scores="nll_mean", data="task:pydoc", tokenizer=fixtures / "run")
    difference = other.table["nll_mean"].to_numpy() - report.table["nll_mean"].to_numpy()
    np.testing.assert_allclose(report.table["ref_delta"].to_numpy(), difference, rtol=1e-6, atol=1e-7)
    same = memdiag.score(steps[-1], reference=steps[-1], limit=5, scores="ref_delta")
    assert same.table["ref_delta"].to_pylist() == [0.0] * 5


def test_a_text_of_one_token_has_no_score_and_stops_nothing(fixtures, tmp_path):
    path = tmp_path / "ids.jsonl"
    path.write_text('{"input_ids": [5]}\n{"input_ids": [5, 6, 7]}\n')
    report = memdiag.score(fixtures / "tiny-gpt2", data=path)
    first, second = report.table.to_pylist()
    assert first["n_scored"] == 0
    assert first["nll_mean"] is None
    assert first["gradnorm"] is None
    assert second["nll_mean"] > 0
    assert second["zlib_len"] is not None  # the checkpoint's tokenizer gives the text
    alone = memdiag.score(fixtures / "tiny-gpt2", data=path, limit=1)
    assert alone.table.num_rows == 1


def test_a_text_as_long_as_prefix_and_suffix_has_a_suffix_and_one_token_less_has_none(fixtures, tmp_path):
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [5, 6, 7, 8, 9]}\n{"input_ids": [5, 6, 7, 8]}\n')
    how = {"data": tmp_path / "ids.jsonl", "prefix_tokens": 3, "suffix_tokens": 2}
    report = memdiag.score(fixtures / "tiny-gpt2", scores="suffix_nll_mean,nll_sum", **how)
    assert report.table["n_suffix"].to_pylist() == [2, 0]
    assert report.table["suffix_nll_mean"][1].as_py() is None
    with torch.no_grad():
        logp = bare(fixtures).load()(torch.tensor([[5, 6, 7, 8, 9]])).logits[0].double().log_softmax(-1)
    by_hand = -(float(logp[2, 8]) + float(logp[3, 9])) / 2
    assert report.table["suffix_nll_mean"][0].as_py() == pytest.approx(by_hand, rel=1e-5)


def test_language_scores_do_not_depend_on_the_batch(fixtures, assert_same_rows):
    how = {"data": fixtures / "texts.jsonl", "prefix_tokens": 8, "suffix_tokens": 8}
    a = memdiag.score(fixtures / "tiny-gpt2", batch_size=1, **how).table.to_pylist()
    assert_same_rows(a, memdiag.score(fixtures / "tiny-gpt2", **how).table.to_pylist(), rel=1e-4, abs=1e-5)


def test_a_run_of_a_language_model_has_both_kinds_of_scores_and_its_trajectory_alone_one(tmp_path):
    texts = [f"{i} a few words of text {i * i}" for i in range(24)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    train_report.train(tmp_path / "t.jsonl", out=tmp_path / "run", epochs=2)
    both = memdiag.score(tmp_path / "run", prefix_tokens=4, suffix_tokens=4)
    assert {"nll_mean", "tracin_self", "csl", "aum", "gradnorm"} <= set(both.table.column_names)
    alone = memdiag.score(tmp_path / "run" / "trajectory")
    assert "label" not in alone.table.column_names
    assert alone.meta["kind"] == "language model"
    assert both.table["csl"].equals(alone.table["csl"])
    seen = [pq.read_table(tmp_path / "run" / "trajectory" / f"epoch=000{e}.parquet") for e in (0, 1)]
    by_hand = sum(t["logsumexp"].to_numpy().astype(float) - t["label_logit"].to_numpy().astype(float) for t in seen)
    np.testing.assert_allclose(alone.table["csl"].to_numpy(), by_hand, rtol=1e-5)


# -- what is wrong with the input ----------------------------------------------------------------------------------


def test_bad_input_is_told_in_one_line(run, fixtures, tmp_path):
    np.savez(tmp_path / "bare.npz", features=np.zeros((3, 64), dtype=np.float32))
    np.savez(tmp_path / "wrong.npz", features=np.zeros((3, 64), dtype=np.float32), label=np.array([0, 10, 1]))
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [5, 99999]}\n')
    last = open_checkpoints(run)[-1].path
    for source, options, told in [
        (last, {"data": tmp_path / "bare.npz"}, "need labels"),
        (last, {"data": tmp_path / "wrong.npz"}, "label 10 does not fit a model of 10 classes"),
        (last, {"data": fixtures / "texts.jsonl"}, "text"),
        (fixtures / "tiny-gpt2", {"data": tmp_path / "ids.jsonl"}, "99999"),
        (fixtures / "tiny-gpt2", {"data": fixtures / "texts.jsonl", "scores": "csl"}, "needs a trajectory"),
        (fixtures / "tiny-gpt2", {"data": fixtures / "texts.jsonl", "scores": "loss"}, "classifier's"),
        (last, {"scores": "aum"}, "needs a trajectory"),
        (last, {"scores": "ref_delta"}, "language model's"),
        (last, {"scores": "los"}, "did you mean 'loss'"),
        (run, {"at": 7}, "the nearest is"),
        (run / "trajectory", {"data": "task:digits"}, "fingerprints"),
        (fixtures / "tiny-gpt2", {"data": fixtures / "texts.jsonl", "max_length": 9999}, "positions of this model"),
        (run / "trajectory", {"scores": "grand"}, "this is a trajectory"),
        (tmp_path, {}, "not a checkpoint"),
        (
            fixtures / "tiny-gpt2",
            {"data": fixtures / "texts.jsonl", "reference": fixtures / "tiny-bert"},
            "--reference",
        ),
    ]:
        with pytest.raises(InputError) as caught:
            memdiag.score(source, **options)
        assert told in str(caught.value), (source, options)
    with pytest.raises(InputError, match="did you mean"):
        memdiag.score(last, score="loss")


def test_one_example_one_class(tmp_path):
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        save(tmp_path / "one", MLP(MlpConfig((4, 3, 1))))
    np.savez(tmp_path / "one.npz", features=np.ones((1, 4), dtype=np.float32), label=np.array([0]))
    report = memdiag.score(tmp_path / "one", data=tmp_path / "one.npz")
    (row,) = report.table.to_pylist()
    assert row["loss"] == 0
    assert row["margin"] is None
    assert row["grand"] == 0


def test_the_schema_has_every_score_and_says_which_end_is_memorized():
    fields = {name: doc for name, _, _, _, doc in tables.described(tables.schema_of(ScoreRow))}
    assert set(fields) == {*scores.NAMES, *KEY, *OF_CLASSIFIER, *OF_LANGUAGE, "truth"}
    for name in scores.NAMES:
        assert "memoriz" in fields[name] or scores.load(name).MEMORIZED is None, name
