"""The multiplication experiment: answers by hand, by loops, by real decoding; a choice that sees no longer operand."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from memdiag import checkpoint, gapt, training
from memdiag.errors import IncompleteError
from memdiag.gapt_training import Method, Run
from memdiag.reproduce_effects import judge
from memdiag.reproduce_gapt import multiplication
from memdiag.reproduce_gapt.multiplication import (
    ARMS,
    PRESETS,
    Answers,
    Equations,
    answers,
    ce,
    choose,
    equations,
    exact,
    stream,
    temperature,
)
from memdiag.tasks.multiplication import encode, pairs, split_of

TINY = dataclasses.replace(
    PRESETS["smoke"], layers=3, width=16, heads=2, n_train=300, n_val=20, n_test=30, steps=12, warmup=2, batch_size=4,
    every=4, rule=gapt.Rule(ce_patience=2, mbe_patience=2, ce_delta=1.0),
)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Both presets as they are, but for their sizes."""
    sizes = {field.name: getattr(TINY, field.name) for field in dataclasses.fields(TINY)}
    for kept in ("digits", "ood_digits", "device", "schedule", "accumulate"):
        del sizes[kept]
    paper = dataclasses.replace(PRESETS["paper"], **sizes | {"accumulate": 2})
    monkeypatch.setattr(multiplication, "PRESETS", {"smoke": TINY, "paper": paper})


def network(seed=0):
    return checkpoint.new_model("tiny", TINY.config(), seed)


class Knowing(nn.Module):
    """Knows some equations by heart; to any other prefix it says something that depends on the prefix alone."""

    def __init__(self, known):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        self.next = {tuple(ids[:t]): ids[t] for ids in known for t in range(1, len(ids))}

    def forward(self, ids):
        logits = torch.empty(*ids.shape, 15)
        for i, row in enumerate(ids.tolist()):
            for t in range(len(row)):
                prefix = tuple(row[: t + 1])
                logits[i, t] = torch.from_numpy(np.random.default_rng(prefix).normal(size=15))
                if prefix in self.next:
                    logits[i, t, self.next[prefix]] = 9.0
        return logits


def asked(*texts):
    """Equations such as "12 x 34 = 408", whether they are right or not."""
    symbols = {" ": 4, "x": 2, "=": 3} | {str(d): 5 + d for d in range(10)}
    rows = [[0, *(symbols[c] for c in text), 1] for text in texts]
    width = max(map(len, rows))
    ids = np.array([row + [0] * (width - len(row)) for row in rows])
    return Equations(ids, np.arange(width) < np.array([[len(row)] for row in rows])), rows


def plain(model, ids, mask):
    """For each equation, (logits, wanted token) of every token behind the "=", one forward pass a token."""
    found = []
    for row, real in zip(ids.tolist(), mask):
        row = row[: int(real.sum())]
        behind = range(row.index(3) + 1, len(row))
        found.append([(_logits(model, row[:t])[-1], row[t]) for t in behind])
    return found


@torch.no_grad()
def _logits(model, row):
    out = model(torch.tensor([row]))
    return (out if isinstance(out, torch.Tensor) else out.logits)[0].double()


def decoded(model, row):
    """What greedy decoding writes behind the "=" of an equation, until <eos> or much too long."""
    row = row[: row.index(3) + 1]
    begin = len(row)
    while len(row) < begin + 15 and row[-1] != 1:
        row = [*row, int(_logits(model, row)[-1].argmax())]
    return row[begin:]


# -- cross-entropy and exact match


def test_cross_entropy_is_that_of_a_loop_over_the_tokens_between_equals_and_eos():
    model, some = network().eval(), equations(1, 3, 12, "test", 0)
    found = plain(model, some.ids, some.mask)
    nats = [-float(logits.log_softmax(0)[token]) for answer in found for logits, token in answer[:-1]]
    assert all(answer[-1][1] == 1 and answer[0][1] == 4 for answer in found)
    assert ce(answers(model, some)) == pytest.approx(sum(nats) / len(nats), abs=1e-6)


def test_cross_entropy_by_hand():
    logits = torch.zeros(4, 15, dtype=torch.float64)
    logits[1, 7] = math.log(14)  # p = 1/2
    found = Answers(logits, torch.tensor([4, 7, 8, 1]), torch.zeros(4, dtype=torch.int64), 1)
    assert ce(found) == pytest.approx((2 * math.log(15) + math.log(2)) / 3)  # not the last one, <eos>
    assert ce(found, 1e9) == pytest.approx(math.log(15))


def test_exact_match_is_what_greedy_decoding_writes():
    some, rows = asked("2 x 3 = 6", "12 x 34 = 408", "9 x 9 = 81", "7 x 8 = 56", "5 x 5 = 25")
    _, (too_long, wrong) = asked("9 x 9 = 810", "7 x 8 = 54")
    model = Knowing([rows[0], rows[1], too_long, wrong])
    right = [decoded(model, row) == row[row.index(3) + 1 :] for row in rows]
    assert right == [True, True, False, False, False]  # a product that goes on is another product
    assert exact(answers(model, some)) == pytest.approx(2 / 5)


def test_exact_match_of_many_equations_half_of_which_are_known():
    some = equations(1, 2, 24, "test", 3)
    rows = [row[real].tolist() for row, real in zip(some.ids, some.mask)]
    model = Knowing(rows[::2])
    right = [decoded(model, row) == row[row.index(3) + 1 :] for row in rows]
    assert 12 <= sum(right) < 24
    assert exact(answers(model, some)) == pytest.approx(sum(right) / 24)


@pytest.mark.parametrize("batch_size", [1, 7, 250])
def test_neither_batches_nor_padding_matter(batch_size):
    model, some = network(), equations(1, 3, 20, "test", 0)
    poisoned = Equations(np.where(some.mask, some.ids, 3), some.mask)
    assert not some.mask.all()
    first, second = answers(model, some), answers(model, poisoned, batch_size)
    torch.testing.assert_close(first.logits, second.logits, atol=1e-5, rtol=1e-5)
    assert (first.wanted == second.wanted).all()
    assert (first.of == second.of).all()
    assert model.training


# -- temperature


def planted(scale, n=4000):
    """Labels drawn from softmax(logits / scale)."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(n, 15)) * 3)
    logits[:, 1] = -1e9  # no <eos> among them
    chances = (logits / scale).softmax(1).numpy()
    wanted = torch.tensor([rng.choice(15, p=p / p.sum()) for p in chances])
    return Answers(logits, wanted, torch.arange(n), n)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_planted_is_found(scale):
    found = planted(scale)
    fitted = temperature(found)
    assert fitted == pytest.approx(scale, rel=0.1)
    assert all(ce(found, fitted) <= ce(found, fitted * factor) for factor in (0.5, 0.97, 1.0, 1.03, 2.0))


def test_calibration_lowers_the_cross_entropy_that_it_is_fitted_on():
    model = network()
    with torch.no_grad():
        model.lm_head.weight.mul_(40.0)  # very sure, and wrong
    found = answers(model, equations(1, 2, 100, "val", 0))
    assert temperature(found) > 2
    assert ce(found, temperature(found)) < 0.7 * ce(found)


# -- data


def test_sequences_begin_with_an_equation_and_are_of_the_stream():
    corpus = stream(2, 500, "train", 32, seed=4)
    tokens = np.concatenate([encode(a, b)[0] for a, b in pairs(digits=2, min_digits=1, n=500, split="train", seed=4)])
    wanted, at = [], 0
    while True:
        while at < len(tokens) and tokens[at] != 0:
            at += 1
        if at + 32 > len(tokens):
            break
        wanted.append(tokens[at : at + 32].tolist())
        at += 32
    ids, mask = corpus.batch(np.arange(len(corpus)))
    assert ids.tolist() == wanted
    assert mask.all()
    assert corpus.n_left_out == len(tokens) - 32 * len(wanted)
    assert corpus.n_examples == 500


def test_what_is_trained_on_and_what_is_asked_have_no_pair_in_common():
    def found(ids):
        """The pairs of all whole equations in a sequence."""
        text = "".join("^$x= 0123456789"[token] for token in ids)
        for whole in (part.partition("$")[0] for part in text.split("^")[1:] if "$" in part):
            a, _, b = whole.partition(" = ")[0].partition(" x ")
            yield int(a), int(b)

    trained = {pair for row in stream(2, 2000, "train", 32, 0).batch(np.arange(500))[0] for pair in found(row)}
    for split in ("val", "test"):
        some = {pair for row in equations(1, 2, 500, split, 0).ids for pair in found([*row, 0])}
        assert len(some) > 100
        assert not some & trained
    assert (split_of(*np.array(sorted(trained)).T) == 0).all()


# -- the choice of the checkpoint


def begun(rule=TINY.rule, seed=0, lr=None):
    recipe = TINY.recipe(seed)
    recipe = recipe if lr is None else dataclasses.replace(recipe, lr=lr, warmup=0, clip=0.0)
    corpus = stream(2, TINY.n_train, "train", TINY.length, seed)
    return Run(training.begin(network(seed), recipe), recipe, Method(rule, ratio_every=0), corpus)


def test_the_first_of_the_best_checkpoints_is_gone_back_to():
    run, seen = begun(), []
    losses = iter([3.0, 1.0, 1.0])

    def val_ce():
        seen.append((run.training.step, run.training.model.lm_head.weight.detach().clone()))
        return next(losses)

    counted = []
    chosen, share = choose(run, val_ce, 4, counted.append)
    assert [step for step, _ in seen] == [4, 8, 12]
    assert chosen == 8
    assert torch.equal(run.training.model.lm_head.weight, seen[1][1])
    assert not torch.equal(seen[1][1], seen[2][1])
    assert sum(counted) == 12
    assert 0 < share < 1


def test_the_last_update_is_looked_at_too_and_the_share_is_of_all_updates():
    run, seen, phases = begun(), [], []
    observed = run.backward

    def backward(step):
        loss, result = observed(step)
        phases.append(result.phase)
        return loss, result

    run.backward = backward
    _, share = choose(run, lambda: seen.append(run.training.step) or 1.0, 5, lambda n: None)
    assert seen == [5, 10, 12]
    assert share == Counter(phases)["compress"] / 12


def test_training_that_diverges_says_so():
    run = begun(lr=1e30)
    with pytest.raises(IncompleteError, match="not finite"):
        choose(run, lambda: 1.0, 4, lambda n: None)


def test_longer_operands_change_nothing_that_is_chosen(monkeypatch):
    first = multiplication.run("gapt", 0, "smoke", None, lambda n: None)

    def poisoned(low, high, n, split, seed):
        if split != "ood":
            return equations(low, high, n, split, seed)
        return asked(*(f"{i} x 1 = {i + 7}" for i in range(100, 100 + n)))[0]

    monkeypatch.setattr(multiplication, "equations", poisoned)
    second = multiplication.run("gapt", 0, "smoke", None, lambda n: None)
    differing = {name for name in first if first[name] != second[name]}
    assert {"ood_ce"} <= differing <= {"ood_ce", "ood_ce_calibrated", "ood_ce_best", "ood_exact"}


def test_the_choice_is_made_on_validation_data(monkeypatch):
    asked_for = []

    def told(low, high, n, split, seed):
        asked_for.append((low, high, n, split))
        return equations(low, high, n, split, seed)

    monkeypatch.setattr(multiplication, "equations", told)
    monkeypatch.setattr(multiplication, "choose", lambda *args: (asked_for.append("chosen"), (12, 0.0))[1])
    multiplication.run("none", 0, "smoke", None, lambda n: None)
    assert asked_for == [(1, 2, 20, "val"), "chosen", (1, 2, 30, "test"), (3, 3, 30, "ood")]


def test_the_calibrated_cross_entropy_takes_the_temperature_of_the_validation_data(monkeypatch):
    monkeypatch.setattr(multiplication, "temperature", lambda found: 1e9 if found.n == TINY.n_val else 1.0)
    found = multiplication.run("none", 0, "smoke", None, lambda n: None)
    assert found["ood_ce_calibrated"] == pytest.approx(math.log(15))
    assert found["ood_ce_best"] == found["ood_ce"]


# -- the arms


def test_a_run_repeats_and_depends_on_its_seed():
    first = multiplication.run("gapt", 1, "smoke", None, lambda n: None)
    assert first == multiplication.run("gapt", 1, "smoke", None, lambda n: None)
    assert first["id_ce"] != multiplication.run("gapt", 2, "smoke", None, lambda n: None)["id_ce"]
    assert all(value is not None and math.isfinite(value) for value in first.values())
    assert 0 < first["share"] < 1
    assert first["chosen_step"] in (4, 8, 12)
    assert first["ood_ce_best"] <= min(first["ood_ce"], first["ood_ce_calibrated"]) + 1e-9


def test_entropies_are_those_of_the_held_out_stream_at_the_chosen_checkpoint(monkeypatch):
    seen = []
    evaluate = Run.evaluate

    def kept(self, corpus, batch_size):
        found = evaluate(self, corpus, batch_size)
        seen.append((corpus, found[1], self.active))
        return found

    monkeypatch.setattr(Run, "evaluate", kept)
    found = multiplication.run("none", 0, "smoke", None, lambda n: None)
    ((corpus, layers, active),) = seen
    assert corpus.tokens.tolist() == stream(2, 30, "test", 32, 0).tokens.tolist()
    assert len(layers) == 4  # the embedding output does not count
    assert active == [2]
    assert found["mbe"] == pytest.approx(sum(layers[1:]) / 3)
    assert found["mbe_active"] == pytest.approx(layers[2])


def test_what_the_arms_train_with(monkeypatch):
    told = {}
    monkeypatch.setattr(
        multiplication, "trained_and_measured", lambda setting, rule, weight, seed, advance: (rule, weight, seed)
    )
    for arm in ARMS:
        given = {"share": 0.25} if arm.needs else None
        told[arm.name] = multiplication.run(arm.name, 3, "smoke", given, lambda n: None)
    assert [rule.gate for rule, _, _ in told.values()] == ["none", "paper", "constant", "random"]
    assert [weight for _, weight, _ in told.values()] == [1.0, 1.0, 0.25, 1.0]
    assert {seed for _, _, seed in told.values()} == {3}
    rule = told["random"][0]
    assert (rule.steps, rule.share, rule.seed, rule.mbe_patience) == (12, 0.25, 3, TINY.rule.mbe_patience)


@pytest.mark.parametrize("arm", ["constant", "random"])
def test_a_control_has_the_share_it_is_given(arm):
    found = multiplication.run(arm, 0, "smoke", {"share": 0.5}, lambda n: None)
    assert found["share"] == {"constant": 1.0, "random": 0.5}[arm]


def test_the_paper_preset_runs_to_its_end():
    counted = []
    found = multiplication.run("gapt", 0, "paper", None, counted.append)
    assert sum(counted) == multiplication.steps("paper", "gapt") == 12
    assert all(value is not None and math.isfinite(value) for value in found.values())


def test_the_paper_preset_is_the_papers():
    paper = PRESETS["paper"]
    config = paper.config()
    assert (config["n_layer"], config["n_embd"], config["vocab_size"]) == (12, 768, 15)
    assert {config[name] for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")} == {0.0}
    assert (paper.steps, paper.n_train, paper.digits, paper.ood_digits) == (1750, 10_000_000, 3, (4, 6))
    assert paper.batch_size * paper.length == 16 * 32_768
    assert paper.length > 8 + 6 + 6 + 12
    assert PRESETS["smoke"].length > 8 + 3 + 3 + 6


def test_every_effect_can_be_judged():
    measures = multiplication.run("none", 0, "smoke", None, lambda n: None)
    assert {arm.name for arm in ARMS} == {"none", "gapt", "constant", "random"}
    rising = itertools.count()
    runs = {arm.name: {seed: {name: 1.0 + next(rising) for name in measures} for seed in range(3)} for arm in ARMS}
    for preset in PRESETS:
        effects = multiplication.effects(preset)
        assert len({effect.name for effect in effects}) == len(effects)
        for effect in effects:
            rows = judge(effect, runs)
            assert [row["role"] for row in rows] == ["baseline", "treated", "control", "control"]
            assert all(isinstance(row["ours"], float) for row in rows)
    changes = {e.name: judge(e, runs)[1]["paper_change"] for e in effects}
    assert changes["id_ce"] == pytest.approx(0.10)
    assert changes["ood_ce"] == pytest.approx(-0.35, abs=0.001)
    assert changes["mbe"] == pytest.approx(-0.47, abs=0.003)
    assert changes["ood_exact"] is None
