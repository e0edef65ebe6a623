"""memdiag prune-memorizers on a checkpoint: classifiers and language models, known and unknown truth, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedModel

import memdiag
from memdiag import checkpoint, cli, observe, prune_checkpoint, prune_inputs, prune_report, prune_subject, tasks
from memdiag.checkpoint import open_checkpoints
from memdiag.dataset import collate, open_dataset
from memdiag.errors import InputError
from memdiag.models.mlp import MLP, MlpConfig
from memdiag.prune_report import Pruned, PruneOptions

NOISY = "task:digits?split=train&corruption=0.2"


def trained_on_digits(widths: tuple[int, ...], steps: int) -> MLP:
    """A classifier that has fitted the wrong labels as well."""
    rows = list(tasks.load(NOISY).rows())
    features = torch.stack([torch.from_numpy(row["features"]) for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = MLP(MlpConfig(widths))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        batch = torch.randint(len(labels), (128,), generator=generator)
        loss = F.cross_entropy(model(features[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One hidden layer: a linear read-out."""
    path = tmp_path_factory.mktemp("digits") / "shallow"
    checkpoint.save(path, trained_on_digits((64, 256, 10), steps=2500), task=NOISY)
    return path


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hidden layers."""
    path = tmp_path_factory.mktemp("digits") / "deep"
    checkpoint.save(path, trained_on_digits((64, 24, 16, 10), steps=500), task=NOISY)
    return path


CANARIES = [f"The code of room {i} is {' '.join(words)}." for i, words in enumerate(
    [["amber", "kelp", "zinc", "fjord"], ["tulip", "slate", "iris", "dune"], ["lemon", "raven", "ember", "olive"],
     ["maple", "cedar", "pearl", "grove"]]
)]  # fmt: skip


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory, fixtures: Path) -> Path:
    """A folder with a small GPT-2 that knows four canaries by heart, and its training and held-out texts."""
    folder = tmp_path_factory.mktemp("language")
    run = open_checkpoints(fixtures / "run", steps="800")[0]
    model, tokenizer = run.load().requires_grad_(True), run.tokenizer()
    assert isinstance(model, GPT2LMHeadModel)
    assert tokenizer is not None
    texts = [row["text"] for row in tasks.load("task:pydoc?chars=120").rows()]
    train, test = texts[:60], texts[60:100]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(450):
        picked = [train[i] for i in torch.randint(60, (6,), generator=generator).tolist()] + CANARIES
        encoded = [tokenizer(text).input_ids[:64] for text in picked]
        ids = torch.tensor([row + [0] * (64 - len(row)) for row in encoded])
        labels = torch.tensor([row + [-100] * (64 - len(row)) for row in encoded])
        logits = model(ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    checkpoint.save(folder / "model", model, tokenizer=tokenizer)
    rows = [{"id": f"t{i}", "text": text, "canary": False} for i, text in enumerate(train)]
    rows += [{"id": f"c{i}", "text": text, "canary": True} for i, text in enumerate(CANARIES)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(
        "".join(json.dumps({"id": f"h{i}", "text": t}) + "\n" for i, t in enumerate(test))
    )
    return folder


def main_rows(found: Pruned) -> list[dict[str, Any]]:
    name = found.meta["options"]["rank_by"]
    return [row for row in found.table.to_pylist() if row["order"] == name]


# -- classifiers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_shallow(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    return memdiag.prune_memorizers(shallow, truth="corrupted", out=tmp_path_factory.mktemp("o") / "out")


def test_a_noisy_classifier(of_shallow: Pruned) -> None:
    (network,) = of_shallow.meta["networks"]
    assert network["examples"] == {"corrupted": 287, "clean": 1151, "test": 359}
    assert network["layers"] == [["layers.linear_2", 256]]
    assert network["skipped"][0][0] == "layers.linear_1"
    assert network["closed_form"] is True
    assert network["before"]["train_corrupted_acc"] > 0.8
    assert network["before"]["train_clean_acc"] > 0.98
    assert network["chosen"]["train_clean_acc"] >= network["before"]["train_clean_acc"] - 0.01 - 1e-9
    # more of the corrupted goes than under any of nineteen in twenty random orders, and true labels come back
    assert network["beyond_random"]["train_corrupted_acc"]["lo"] > 0.05
    assert network["chosen"]["corrupted_true_acc"] > network["random"]["corrupted_true_acc"]["hi"]
    neurons = of_shallow.neurons.table.to_pylist()
    assert all(row["ipr"] is None and row["frequency"] is None for row in neurons)
    assert all(row["ablation_corrupted"] is not None and row["direct_logit"] is not None for row in neurons)
    assert [row["n_pruned"] for row in main_rows(of_shallow)] == list(range(257))


def test_closed_form_and_forward_passes_agree(
    of_shallow: Pruned, shallow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune_checkpoint, "readout_of", lambda subject: None)
    found = memdiag.prune_memorizers(shallow, truth="corrupted", points=6, ablation=True)
    assert found.meta["networks"][0]["closed_form"] is False
    expected = {row["n_pruned"]: row for row in main_rows(of_shallow)}
    for row in main_rows(found):
        for name, value in row.items():
            if name.endswith("_acc"):
                assert value == expected[row["n_pruned"]][name]
            if name.endswith("_loss"):
                assert value == pytest.approx(expected[row["n_pruned"]][name], rel=1e-4)
    for mine, closed in zip(found.neurons.table.to_pylist(), of_shallow.neurons.table.to_pylist()):
        for name in ("memorization", "margin_heldout", "ablation_corrupted", "ablation_clean", "ablation_heldout"):
            assert mine[name] == pytest.approx(closed[name], rel=1e-3, abs=2e-5), name


def test_attribution_is_that_of_the_definition(of_shallow: Pruned, shallow: Path) -> None:
    """A plain loop over examples: a_k (W_label − W_runner-up), and the loss without each of a few neurons."""
    model = open_checkpoints(shallow)[0].load()
    assert isinstance(model, MLP)
    rows = list(tasks.load(NOISY).rows())
    w1, b1, w2, b2 = (p.double() for p in model.state_dict().values())
    margin, n = {True: torch.zeros(256).double(), False: torch.zeros(256).double()}, {True: 0, False: 0}
    for row in rows:
        a = (w1 @ torch.from_numpy(row["features"]).double() + b1).relu()
        z = w2 @ a + b2
        second = max((q for q in range(10) if q != row["label"]), key=lambda q: z[q].item())
        margin[row["corrupted"]] += a * (w2[row["label"]] - w2[second])
        n[row["corrupted"]] += 1
    expected = margin[True] / n[True] - margin[False] / n[False]
    found = [row["memorization"] for row in of_shallow.neurons.table.to_pylist()]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_pruned_checkpoint_does_what_the_chosen_row_says(of_shallow: Pruned) -> None:
    assert of_shallow.path is not None
    model = open_checkpoints(of_shallow.path / "pruned")[0].load()
    (chosen,) = [row for row in of_shallow.table.to_pylist() if row["chosen"]]
    for group, wanted in (("corrupted", True), ("clean", False)):
        rows = [row for row in tasks.load(NOISY).rows() if row["corrupted"] == wanted]
        features = torch.stack([torch.from_numpy(row["features"]) for row in rows])
        right = model(features).argmax(1) == torch.tensor([row["label"] for row in rows])
        assert right.double().mean().item() == pytest.approx(chosen[f"train_{group}_acc"])
    again = memdiag.entropy(of_shallow.path / "pruned")
    assert again.table.num_rows > 0


def test_a_deeper_classifier_layer_by_layer(deep: Path, tmp_path: Path) -> None:
    found = memdiag.prune_memorizers(deep, truth="corrupted", out=tmp_path / "out", fraction=0.1, points=8)
    (network,) = found.meta["networks"]
    assert network["layers"] == [["layers.linear_2", 24], ["layers.linear_3", 16]]
    assert network["chosen"]["n_pruned"] == 4
    rows = found.neurons.table.to_pylist()
    assert [(row["layer"], row["neuron"]) for row in rows] == [(0, k) for k in range(24)] + [(1, k) for k in range(16)]
    assert all(row["ablation_corrupted"] is None for row in rows)  # not asked for
    gone = [(row["layer"], row["neuron"]) for row in rows if row["is_memorizer"]]
    state = open_checkpoints(tmp_path / "out" / "pruned")[0].load().state_dict()
    for layer, k in gone:
        assert not state[f"layers.linear_{layer + 2}.weight"][:, k].any()
        assert not state[f"layers.linear_{layer + 1}.weight"][k].any()
        assert state[f"layers.linear_{layer + 1}.bias"][k] == 0
    only = memdiag.prune_memorizers(deep, truth="corrupted", layers="0", n=1, points=2)
    assert {row["layer_name"] for row in only.neurons.table.to_pylist()} == {"layers.linear_2"}


def test_the_size_of_batches_does_not_matter(deep: Path) -> None:
    options: dict[str, Any] = {"truth": "corrupted", "points": 3, "n": 3, "limit": 150}
    one, many = (memdiag.prune_memorizers(deep, batch_size=size, **options) for size in (7, 150))
    for a, b in zip(one.neurons.table.to_pylist(), many.neurons.table.to_pylist()):
        for name in ("memorization", "margin_clean", "grad_act_heldout", "activation_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5)
    assert one.table.select(["order", "n_pruned", "test_acc"]).equals(
        many.table.select(["order", "n_pruned", "test_acc"])
    )


class Hungry(MLP):
    """Its memory runs out at more than 50 examples."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if len(features) > 50:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B")
        return super().forward(features)


def hungry() -> nn.Module:
    return Hungry(MlpConfig((64, 256, 10)))


@pytest.mark.parametrize("closed", [True, False])
def test_batches_that_do_not_fit_run_in_halves(
    shallow: Path, of_shallow: Pruned, monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    if not closed:
        monkeypatch.setattr(prune_checkpoint, "readout_of", lambda subject: None)
    found = memdiag.prune_memorizers(
        shallow / "model.safetensors", model=f"{__name__}:hungry", data=NOISY, truth="corrupted", points=3
    )
    for mine, plain in zip(found.neurons.table.to_pylist(), of_shallow.neurons.table.to_pylist()):
        assert mine["memorization"] == pytest.approx(plain["memorization"], rel=1e-4, abs=1e-5)
    expected = {row["n_pruned"]: row["train_clean_acc"] for row in main_rows(of_shallow)}
    assert all(row["train_clean_acc"] == expected[row["n_pruned"]] for row in main_rows(found))
    plan = prune_report.plan(
        str(shallow / "model.safetensors"), PruneOptions(model=f"{__name__}:hungry", data=NOISY, truth="corrupted")
    )
    assert plan["neurons"] == 256


# -- where truth comes from ----------------------------------------------------------------------------------------


def test_a_score_can_say_which_are_suspect(
    shallow: Path, of_shallow: Pruned, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import dataclasses

    from memdiag import tables
    from memdiag.tables import column

    @dataclasses.dataclass(frozen=True)
    class ScoreRow:
        example_id: str = column(pa.string(), "id")
        badness: float | None = column(pa.float64(), "high: suspect", nullable=True)

    rows = [{"example_id": r["id"], "badness": float(r["corrupted"])} for r in tasks.load(NOISY).rows()]
    rows[0]["badness"] = math.nan
    tables.write(tmp_path / "score.parquet", ScoreRow, [rows], {"report": "score"})
    share = sum(r["badness"] == 1 for r in rows) / (len(rows) - 1)
    found = memdiag.prune_memorizers(shallow, suspects=f"{tmp_path}/score.parquet:badness:{share}", n=20)
    known = sum(r["badness"] == 1 for r in rows)
    assert found.meta["networks"][0]["examples"]["corrupted"] == known
    mine = {r["neuron"]: r["memorization"] for r in found.neurons.table.to_pylist()}
    theirs = {r["neuron"]: r["memorization"] for r in of_shallow.neurons.table.to_pylist()}
    assert np.corrcoef(list(mine.values()), list(theirs.values()))[0, 1] > 0.999
    reverse = prune_inputs.read_suspects(f"{tmp_path}/score.parquet:-badness:0.1")
    assert all(row["badness"] == 0 for row in rows if row["example_id"] in reverse)
    tables.write(tmp_path / "twice.parquet", ScoreRow, [rows, rows[5:6]], {"report": "score"})
    other = [row | {"example_id": f"elsewhere {i}"} for i, row in enumerate(rows[:5])]
    tables.write(tmp_path / "more.parquet", ScoreRow, [rows, other], {"report": "score"})
    with caplog.at_level("WARNING", logger="memdiag"):
        memdiag.prune_memorizers(shallow, suspects=f"{tmp_path}/more.parquet:-badness:0.9", n=1, points=1)
    assert any("suspects are not among the training examples" in line for line in caplog.messages)
    for text, says in {
        "x": "is not of the form",
        f"{tmp_path}/score.parquet:badness:2": "wanted more than 0 and less than 1",
        f"{tmp_path}/score.parquet:badnes:0.1": "did you mean 'badness'",
        f"{tmp_path}/score.parquet:example_id:0.1": "wanted numbers",
        f"{tmp_path}/none.parquet:badness:0.1": "no such report",
        f"{tmp_path}/twice.parquet:badness:0.1": "comes more than once",
    }.items():
        with pytest.raises(InputError, match=says):
            prune_inputs.read_suspects(text)


def test_without_truth_training_is_contrasted_with_held_out_data(shallow: Path, of_shallow: Pruned) -> None:
    found = memdiag.prune_memorizers(shallow, n=20)
    (network,) = found.meta["networks"]
    assert network["examples"] == {"corrupted": 0, "clean": 1438, "test": 359}
    for row in found.neurons.table.to_pylist():
        assert row["memorization"] == pytest.approx(row["margin_clean"] - row["margin_heldout"])
        assert row["margin_corrupted"] is None
    assert all(row["train_corrupted_acc"] is None for row in found.table.to_pylist())
    free = memdiag.prune_memorizers(shallow)
    assert free.meta["networks"][0]["rule"].startswith("none: without a set of corrupted")
    assert all(row["is_memorizer"] is None for row in free.neurons.table.to_pylist())


# -- language models -----------------------------------------------------------------------------------------------


def test_canaries_go_before_the_language_does(language: Path, tmp_path: Path) -> None:
    data: dict[str, Any] = {
        "data": language / "train.jsonl", "test": language / "test.jsonl", "truth": "canary", "prefix_tokens": 11,
    }  # fmt: skip
    found = memdiag.prune_memorizers(language / "model", out=tmp_path / "out", keep_clean=0.85, points=10, **data)
    (network,) = found.meta["networks"]
    assert [width for _, width in network["layers"]] == [64, 64, 64]
    assert all(name.endswith("mlp.c_proj") for name, _ in network["layers"])
    assert network["before"]["train_corrupted_exact"] == 1.0
    assert network["chosen"]["train_corrupted_exact"] < network["random"]["train_corrupted_exact"]["mean"]
    matched = network["random_matched"]
    if matched is not None:  # at equal forgetting, random neurons cost more of the language
        assert matched["n_pruned"] > network["chosen"]["n_pruned"]
        assert matched["test_loss"] > network["chosen"]["test_loss"]
    assert all(row["test_acc_lo"] is None for row in found.table.to_pylist())  # tokens are not independent
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "pruned", trust_remote_code=False)
    assert isinstance(loaded, PreTrainedModel)
    check_row(loaded.eval(), language, found, 11)


def check_row(model: nn.Module, language: Path, found: Pruned, prefix: int) -> None:
    """The chosen row, by a loop over texts and tokens with the checkpoint that was written."""
    tokenizer = open_checkpoints(language / "model")[0].tokenizer()
    assert tokenizer is not None
    (chosen,) = [row for row in found.table.to_pylist() if row["chosen"]]
    totals: dict[bool, list[float]] = {True: [0, 0, 0, 0, 0], False: [0, 0, 0, 0, 0]}
    for line in (language / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer(row["text"]).input_ids[:128]
        if len(ids) <= prefix:
            continue
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        right = [int(log_p[t - 1].argmax()) == ids[t] for t in range(prefix, len(ids))]
        nll = [-log_p[t - 1, ids[t]].item() for t in range(prefix, len(ids))]
        sums = (sum(right), sum(nll), len(right), all(right), 1)
        totals[row["canary"]] = [a + b for a, b in zip(totals[row["canary"]], sums)]
    for is_canary, group in ((True, "corrupted"), (False, "clean")):
        right_, nll_, count, exact, texts = totals[is_canary]
        assert chosen[f"train_{group}_acc"] == pytest.approx(right_ / count)
        assert chosen[f"train_{group}_loss"] == pytest.approx(nll_ / count, rel=1e-5)
        if is_canary:
            assert chosen["train_corrupted_exact"] == exact / texts


def test_exact_is_what_greedy_decoding_gives(language: Path) -> None:
    model = open_checkpoints(language / "model")[0].load()
    tokenizer = open_checkpoints(language / "model")[0].tokenizer()
    assert isinstance(model, GPT2LMHeadModel)
    assert tokenizer is not None
    for text in [*CANARIES, "The module defines a function that returns a string."]:
        ids = torch.tensor([tokenizer(text).input_ids])
        batch = collate(list(open_examples(text, tokenizer)))
        inputs = observe.to_inputs(batch, model)
        logits = observe.call(model, inputs)
        assert logits is not None
        right, _, count, _ = prune_subject._of_tokens(logits, inputs, 6)
        decoded = model.generate(ids[:, :6], max_new_tokens=ids.shape[1] - 6, do_sample=False, pad_token_id=0)
        assert bool(right == count) == torch.equal(decoded, ids)


def open_examples(text: str, tokenizer: Any) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.jsonl"
        path.write_text(json.dumps({"text": text}) + "\n")
        yield from open_dataset(path).examples(tokenizer=tokenizer)


def test_texts_too_short_to_predict_anything_are_counted_apart(language: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (language / "train.jsonl").read_text().splitlines()]
    rows += [{"id": "short", "text": "a", "canary": True}, {"id": "short2", "text": "b", "canary": False}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"truth": "canary", "test": language / "test.jsonl", "points": 1, "n": 1}
    short = memdiag.prune_memorizers(language / "model", data=tmp_path / "d.jsonl", **options)
    clean = memdiag.prune_memorizers(language / "model", data=language / "train.jsonl", **options)
    assert short.meta["networks"][0]["n_undefined"] == 2
    assert short.meta["networks"][0]["examples"] == clean.meta["networks"][0]["examples"]
    for a, b in zip(short.neurons.table.to_pylist(), clean.neurons.table.to_pylist()):
        assert a["memorization"] == pytest.approx(b["memorization"], rel=1e-4, abs=1e-6)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.run(["prune-memorizers", *args, "--out", str(tmp_path / "out"), "--quiet"])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def table(path: Path, **columns: list[Any]) -> str:
    n = len(next(iter(columns.values())))
    rng = np.random.default_rng(0)
    data = {"features": [rng.normal(size=64).astype(np.float32) for _ in range(n)], **columns}
    pq.write_table(pa.table(data), path)
    return str(path)


@pytest.mark.parametrize(
    ("columns", "words", "says"),
    [
        ({"label": [0, 1], "bad": [0, 1]}, "--truth bad", "truth (column 'bad') is the int 0; wanted true or false"),
        ({"label": [0, 1], "bad": ["yes", "no"]}, "--truth bad", "is the text 'yes'; wanted true or false"),
        ({"label": [0, 1], "bad": [True, None]}, "--truth bad", "is null; wanted true or false"),
        ({"label": [0, 1], "bad": [False, False]}, "--truth bad", "no example of"),
        ({"label": [0, 1], "bad": [True, True]}, "--truth bad", "every example of"),
        ({"label": [0, 1], "bad": [True, False]}, "--truth bda", "did you mean 'bad'?"),
        ({"label": [0, 10], "bad": [True, False]}, "--truth bad", "label 10 does not fit a model of 10 classes"),
        ({"label": [0, -1], "bad": [True, False]}, "--truth bad", "label -1 does not fit"),
        ({"bad": [True, False]}, "--truth bad", "a classifier needs labels"),
        ({"label": [0, 1]}, "", "nothing says which training examples are suspect"),
        ({"label": [0, 1], "bad": [True, False]}, "--truth bad --suspects a:b:0.1", "give one of them"),
        ({"label": [0, 1], "bad": [True, False]}, "--truth bad --corruption 0.3", "--corruption is about training"),
        ({"label": [0, 1], "bad": [True, False]}, "--truth bad --seeds 0,1", "--seeds is about training"),
        ({"label": [0, 1], "bad": [True, False]}, "--truth bad --prefix-tokens 3", "about language models"),
        ({"label": [0, 1], "bad": [True, False]}, "--truth bad --rank-by ipr", "ipr is undefined here"),
        ({"label": [0, 1], "bad": [True, False]}, "--truth bad --layers nope*", "matching 'nope*'"),
        ({"label": [0, 1], "bad": [True, False]}, "--truth bad --n 1000", "but there are 64 neurons"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    run: Callable[..., tuple[int, str, str]],
    fixtures: Path,
    tmp_path: Path,
    columns: dict[str, list[Any]],
    words: str,
    says: str,
) -> None:
    data = table(tmp_path / "data.parquet", **columns)
    code, out, err = run(str(fixtures / "digits-mlp"), "--data", data, *words.split())
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert says in line


def test_a_test_set_of_other_classes_is_refused(
    run: Callable[..., tuple[int, str, str]], fixtures: Path, tmp_path: Path
) -> None:
    data = table(tmp_path / "data.parquet", label=[0, 1], bad=[True, False])
    test = table(tmp_path / "test.parquet", label=[11, 12])
    code, _, err = run(str(fixtures / "digits-mlp"), "--data", data, "--truth", "bad", "--test", test)
    assert code == 2
    assert "label 11 does not fit a model of 10 classes" in err


def test_kinds_that_do_not_go_together_are_refused(
    run: Callable[..., tuple[int, str, str]], fixtures: Path, tmp_path: Path
) -> None:
    text = str(fixtures / "texts.jsonl")
    data = table(tmp_path / "data.parquet", label=[0, 1], bad=[True, False])
    for ckpt, given, says in (
        ("run", text, "is a run of 6 checkpoints; give one of them"),
        ("tiny-bert", text, "neither a classifier"),
        ("tiny-gpt2", data, "the model reads tokens, but the dataset holds features"),
        ("broken/nan", text, "holds 1 NaN"),
    ):
        code, out, err = run(str(fixtures / ckpt), "--data", given, "--test", given)
        assert (code, out) == (2, ""), err
        assert says in err
        assert len(err.splitlines()) == 1


def test_a_model_with_nothing_to_prune_is_refused(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "linear", MLP(MlpConfig((64, 10))))
    data = table(tmp_path / "data.parquet", label=[0, 1], bad=[True, False])
    code, _, err = run(str(tmp_path / "linear"), "--data", data, "--truth", "bad")
    assert code == 2
    assert "nothing to prune" in err


def test_activations_that_are_no_numbers_are_refused(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    model = MLP(MlpConfig((64, 8, 10), activation="square"))
    with torch.no_grad():
        model.get_parameter("layers.linear_1.weight").fill_(1e30)  # finite, but its square is not
    checkpoint.save(tmp_path / "huge", model)
    data = table(tmp_path / "data.parquet", label=[0, 1], bad=[True, False])
    code, _, err = run(str(tmp_path / "huge"), "--data", data, "--truth", "bad")
    assert code == 2, err
    assert "layers.linear_2" in err
    assert len(err.splitlines()) == 1


def test_a_dry_run_tells_what_it_takes(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(["prune-memorizers", str(fixtures / "tiny-llama"), "--data", str(fixtures / "texts.jsonl"), "--test",
                 str(fixtures / "texts.jsonl"), "--n", "1", "--dry-run", "--json"])  # fmt: skip
    assert ended.value.code == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["neurons"], plan["training_examples"], plan["held_out_examples"]) == (128, 20, 20)
    assert plan["layers"] == "model.layers.0.mlp.down_proj (64), model.layers.1.mlp.down_proj (64)"


def test_options_are_recorded(of_shallow: Pruned, shallow: Path) -> None:
    from memdiag.prune_report import options_of

    given, options = options_of(of_shallow.pruning)
    assert given == str(shallow)
    assert options == PruneOptions(truth="corrupted")
    assert of_shallow.meta["dataset"]["columns"]["truth"] == "corrupted"
    assert of_shallow.meta["dtype"] == "float32"  # what `auto` came to
    assert of_shallow.meta["dataset"]["columns"]["true_label"] == "true_label"
