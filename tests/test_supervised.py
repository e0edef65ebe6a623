"""What one update is computed from: order, loss and gradient of classifiers and language models."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memdiag import InputError, observe, training
from memdiag.packing import Corpus
from memdiag.supervised import Examples, Run, loss_of, means_of_tokens, of_tokens, of_update
from memdiag.training import Recipe, seeded


class Tokens(nn.Module):
    """Logits of the next token from the token alone; it reads no mask."""

    def __init__(self, size=7):
        super().__init__()
        with seeded(0):
            self.table = nn.Embedding(size, size)

    def forward(self, input_ids):
        return self.table(input_ids)


def classifier(n=10, epochs=3, batch_size=4, seed=0):
    rng = np.random.default_rng(0)
    examples = Examples(
        np.arange(n), [str(i) for i in range(n)], rng.normal(size=(n, 5)).astype(np.float32), rng.integers(0, 3, n)
    )
    with seeded(1):
        model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5))
    recipe = Recipe(steps=-(-epochs * n // batch_size), batch_size=batch_size, optimizer="sgd", clip=0.0, seed=seed)
    return Run(training.begin(model, recipe), recipe, examples, epochs)


def language(lengths=(3, 5, 2, 4), batch_size=2):
    tokens = np.arange(sum(lengths), dtype=np.int32) % 7
    starts = np.cumsum(lengths) - lengths
    corpus = Corpus(tokens, starts, np.array(lengths), len(lengths), 0)
    examples = Examples(np.arange(len(lengths)), [str(i) for i in range(len(lengths))], corpus, None)
    recipe = Recipe(steps=2, batch_size=batch_size)
    return Run(training.begin(Tokens(), recipe), recipe, examples, 1, pad_id=6)


@pytest.mark.parametrize(("n", "epochs", "batch_size"), [(10, 3, 4), (1, 2, 1), (7, 2, 7), (9, 1, 4), (5, 4, 3)])
def test_every_epoch_is_a_permutation_and_the_last_update_ends_it(n, epochs, batch_size):
    run = classifier(n, epochs, batch_size)
    seen = [run.at(step) for step in range(run.recipe.steps)]
    whole, passes = np.concatenate([s.at for s in seen]), np.concatenate([s.epochs for s in seen])
    assert len(whole) == n * epochs
    for epoch in range(epochs):
        assert sorted(whole[passes == epoch]) == list(range(n))
    assert (np.diff(passes) >= 0).all()
    assert all(len(s.at) == batch_size for s in seen[:-1])
    assert 0 < len(seen[-1].at) <= batch_size


def test_the_gradient_is_that_of_the_mean_loss_and_what_is_seen_comes_from_the_same_pass():
    run = classifier()
    with seeded(5):
        loss, seen = run.backward(1)
    found = [p.grad.clone() for p in run.training.model.parameters()]
    run.training.optimizer.zero_grad()
    x, y = torch.from_numpy(run.examples.inputs[seen.at]), torch.from_numpy(run.examples.labels[seen.at])
    with seeded(5):  # the same dropout
        logits = run.training.model(x)
    by_hand = F.cross_entropy(logits, y)
    by_hand.backward()
    assert loss == pytest.approx(float(by_hand.detach()))
    for p, gradient in zip(run.training.model.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert loss_of(seen.values) == pytest.approx(
        F.cross_entropy(logits, y, reduction="none").detach().numpy(), rel=1e-5
    )


def test_a_language_models_loss_is_the_mean_over_tokens_and_the_trajectorys_the_mean_of_each():
    run = language()
    loss, seen = run.backward(0)
    table = run.training.model.table.weight.detach().double()
    each = []
    for i in seen.at:
        start, length = run.examples.inputs.starts[i], run.examples.inputs.lengths[i]
        ids = run.examples.inputs.tokens[start : start + length].tolist()
        each.append([float(table[a].logsumexp(0) - table[a, b]) for a, b in itertools.pairwise(ids)])
    assert loss == pytest.approx(np.mean([loss for one in each for loss in one]), rel=1e-5)
    assert loss_of(seen.values) == pytest.approx([np.mean(one) for one in each], rel=1e-5)


def test_padding_is_not_read():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 4, 6, generator=generator), torch.randint(6, (2, 4), generator=generator)
    counts = torch.tensor([[True, True, True, True], [True, True, False, False]])
    loss, values = of_tokens(logits, targets, counts)
    poisoned, wrong = logits.clone(), targets.clone()
    poisoned[1, 2:], wrong[1, 2:] = torch.nan, 10**6
    again, others = of_tokens(poisoned, wrong, counts)
    assert torch.equal(loss, again)
    assert np.array_equal(values, others)
    (alone, single) = of_tokens(logits[1:, :2], targets[1:, :2], counts[1:, :2])
    assert single[:, 0] == pytest.approx(values[:, 1], rel=1e-6)
    assert torch.isfinite(alone)


def test_figures_do_not_depend_on_what_else_is_in_the_update():
    run = language(batch_size=4)
    inputs = run.examples.batch(np.arange(4), 6, torch.device("cpu"))
    _, together = of_update(run.training.model(inputs.tokens), inputs)
    for i in range(4):
        one = run.examples.batch(np.array([i]), 6, torch.device("cpu"))
        _, alone = of_update(run.training.model(one.tokens), one)
        assert alone[:, 0] == pytest.approx(together[:, i], rel=1e-6)


def test_means_of_tokens_by_hand():
    values = np.array([[1, 3, 5], [2, 2, 8], [4, 4, 4], [1, 0, 1]], dtype=np.float32)
    found = means_of_tokens(values, np.array([2, 0, 1]))
    assert found[:, 0].tolist() == [2, 2, 4, 0]
    assert np.isnan(found[:, 1]).all()
    assert found[:, 2].tolist() == [5, 8, 4, 1]
    assert means_of_tokens(np.empty((4, 0), dtype=np.float32), np.array([], dtype=np.int64)).shape == (4, 0)


def test_held_out_figures_are_means_over_all_examples_in_eval_mode():
    run = classifier(n=9)
    loss, accuracy = run.evaluate(run.examples)
    model = run.training.model.eval()
    logits = model(torch.from_numpy(run.examples.inputs)).detach()
    labels = torch.from_numpy(run.examples.labels)
    assert loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    assert accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    run.training.model.train()
    run.evaluate(run.examples)
    assert run.training.model.training


def test_a_model_whose_logits_do_not_fit_is_refused():
    run = classifier()
    run.training.runs = nn.Linear(5, 2)
    with pytest.raises(InputError, match="the model: has 2 outputs, and there is a label 2"):
        run.backward(0)
    run.training.runs = nn.Unflatten(1, (5, 1))
    with pytest.raises(InputError, match=r"its logits have shape \[4, 5, 1\]; wanted \(examples, classes\)"):
        run.backward(0)


def test_a_batch_is_padded_with_the_pad_token():
    run = language()
    inputs = run.examples.batch(np.array([2, 1]), 6, torch.device("cpu"))
    assert isinstance(inputs, observe.Inputs)
    assert inputs.tokens.tolist() == [[1, 2, 6, 6, 6], [3, 4, 5, 6, 0]]
    assert inputs.mask.tolist() == [[True, True, False, False, False], [True] * 5]
