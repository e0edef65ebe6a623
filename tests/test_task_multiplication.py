"""task:multiplication: the tokens by hand and by a loop, the split, the laws of lengths and operands."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import memdiag
from memdiag import tasks
from memdiag.dataset import open_dataset
from memdiag.errors import InputError
from memdiag.tasks import multiplication
from memdiag.tasks.multiplication import CHUNK, SPLITS, VOCAB_SIZE, encode, pairs, rows, split_of

TOKEN = {" ": 4, "x": 2, "=": 3} | {str(d): 5 + d for d in range(10)}  # bos is 0, eos is 1


def drawn(**keys):
    keys = {"digits": 3, "min_digits": 1, "n": 1000, "split": "train", "seed": 0, **keys}
    a, b = zip(*pairs(**keys))
    return np.concatenate(a), np.concatenate(b)


def lengths_of(numbers):
    return np.array([len(str(number)) for number in numbers])


def test_by_hand():
    tokens, lengths = encode(np.array([12, 7, 999]), np.array([34, 8, 1]))
    assert lengths.tolist() == [15, 12, 15]
    assert tokens[:15].tolist() == [0, 6, 7, 4, 2, 4, 8, 9, 4, 3, 4, 9, 5, 13, 1]  # 12 x 34 = 408
    assert tokens[15:27].tolist() == [0, 12, 4, 2, 4, 13, 4, 3, 4, 10, 11, 1]  # 7 x 8 = 56
    assert tokens[27:].tolist() == [0, 14, 14, 14, 4, 2, 4, 6, 4, 3, 4, 14, 14, 14, 1]  # 999 x 1 = 999


@pytest.mark.parametrize("digits", [1, 2, 5, 9])
def test_tokens_as_a_loop_over_the_text_gives_them(digits):
    for row in rows(digits=digits, n=200):
        assert row["equation"] == f"{row['a']} x {row['b']} = {row['a'] * row['b']}"
        assert row["input_ids"] == [0, *(TOKEN[c] for c in row["equation"]), 1]
        assert row["product"] == row["a"] * row["b"]


def test_the_longest_product_fits():
    tokens, (length,) = encode(np.array([999_999_999]), np.array([999_999_999]))
    assert length == 8 + 9 + 9 + 18
    assert "".join(str(t - 5) for t in tokens[-19:-1]) == str(999_999_999**2)


def test_the_mean_length_is_that_of_the_authors_files():
    for keys, wanted in (({}, 15.8), ({"digits": 6, "min_digits": 4, "split": "ood"}, 27.8)):
        a, b = drawn(n=20_000, **keys)
        assert encode(a, b)[1].mean() == pytest.approx(wanted, abs=0.1)


# -- the split


def splitmix(a, b):
    """The hash with Python's own whole numbers."""
    z = min(a, b) * 10**9 + max(a, b)
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return {0: "test", 1: "val"}.get((z ^ z >> 31) % 10, "train")


def test_the_split_as_a_loop_gives_it():
    rng = np.random.default_rng(0)
    for largest in (10, 1000, 10**9):
        a, b = rng.integers(1, largest, size=(2, 500))
        assert [SPLITS[s] for s in split_of(a, b)] == [splitmix(int(x), int(y)) for x, y in zip(a, b)]


def test_every_pair_is_in_one_split_together_with_its_mirror_image():
    a, b = (side.ravel() for side in np.meshgrid(np.arange(1, 1000), np.arange(1, 1000)))
    found = split_of(a, b)
    assert (found == split_of(b, a)).all()
    assert np.bincount(found, minlength=3) / len(a) == pytest.approx([0.8, 0.1, 0.1], abs=0.005)


def test_splits_share_no_pair_whatever_their_seeds():
    seen = {}
    for split in ("train", "val", "test"):
        for seed in (0, 1):
            a, b = drawn(digits=2, n=20_000, split=split, seed=seed)
            seen.setdefault(split, set()).update(map(frozenset, zip(a.tolist(), b.tolist())))
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]
    assert sum(map(len, seen.values())) > 0.9 * (99 * 100 / 2)  # and all pairs but a few are somewhere


def test_every_split_has_pairs_of_the_shortest_operands():
    for split in ("train", "val", "test"):
        a, b = drawn(digits=1, n=2000, split=split)
        assert len(set(zip(a.tolist(), b.tolist()))) > 4
        assert max(a.max(), b.max()) < 10


def test_out_of_distribution_are_all_pairs_of_longer_operands():
    a, b = drawn(digits=3, min_digits=3, split="ood", n=5000)
    assert (lengths_of(a) == 3).all()
    assert (lengths_of(b) == 3).all()
    assert np.bincount(split_of(a, b), minlength=3).min() > 300


# -- the laws


@pytest.mark.parametrize("split", SPLITS)
def test_lengths_are_uniform_and_independent(split):
    low, high = (4, 6) if split == "ood" else (1, 3)
    a, b = drawn(min_digits=low, digits=high, n=9000, split=split)
    counts = np.bincount((lengths_of(a) - low) * 3 + lengths_of(b) - low, minlength=9)
    assert stats.chisquare(counts).pvalue > 0.001


def test_operands_are_uniform_within_their_length():
    a, b = drawn(digits=2, min_digits=2, n=30_000, split="ood")
    assert stats.chisquare(np.bincount(a - 10, minlength=90)).pvalue > 0.001
    assert stats.chisquare(np.bincount(b - 10, minlength=90)).pvalue > 0.001
    assert min(a.min(), b.min()) == 10  # no leading zeros
    assert max(a.max(), b.max()) == 99


def test_a_larger_n_only_adds_rows_at_the_end():
    few, many = drawn(n=10), drawn(n=2 * CHUNK + 5)
    assert len(many[0]) == 2 * CHUNK + 5
    assert (few[0] == many[0][:10]).all()
    assert (few[1] == many[1][:10]).all()
    assert (many[0][:CHUNK] != many[0][CHUNK : 2 * CHUNK]).any()
    assert [row["id"] for row in rows(n=CHUNK + 2)] == [str(i) for i in range(CHUNK + 2)]


def test_draws_depend_on_seed_and_split():
    first = drawn()
    assert (first[0] == drawn()[0]).all()
    assert (first[0] != drawn(seed=1)[0]).any()
    assert (lengths_of(first[0]) != lengths_of(drawn(split="val")[0])).any()


# -- as a dataset


def test_it_opens_as_tokens():
    dataset = open_dataset("task:multiplication?n=50&digits=2&split=test")
    assert dataset.name == "task:multiplication?digits=2&min_digits=1&n=50&seed=0&split=test"
    assert (dataset.kind, dataset.n_examples, dataset.columns) == (
        "tokens", 50, {"input_ids": "input_ids", "id": "id"},
    )  # fmt: skip
    examples = list(dataset.examples(vocab_size=VOCAB_SIZE))
    assert all(example.input_ids[0] == 0 and example.input_ids[-1] == 1 for example in examples)


def test_train_gapt_takes_it(tmp_path):
    trained = memdiag.train_gapt(data="task:multiplication?n=200", steps=2, out=tmp_path / "out", batch_size=2)
    assert trained.history.table.num_rows == 2


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("n=0", "n is 0; wanted at least 1"),
        ("digits=0", "digits is 0; wanted 1 to 9"),
        ("digits=10", "digits is 10; wanted 1 to 9"),
        ("min_digits=0", "min_digits is 0; wanted 1 to digits, which is 3"),
        ("digits=2&min_digits=3", "min_digits is 3; wanted 1 to digits, which is 2"),
        ("split=dev", "no split of task:multiplication 'dev'; there are ood, test, train, val"),
        ("split=ood", "give min_digits, e.g. digits=6&min_digits=4"),
        ("seed=-1", "seed is -1; wanted at least 0"),
        ("digit=2", "did you mean 'digits'?"),
        ("n=many", "wanted int"),
    ],
)
def test_what_is_refused_in_one_line(query, wanted):
    with pytest.raises(InputError) as told:
        open_dataset(f"task:multiplication?{query}")
    assert wanted in str(told.value)
    assert "\n" not in str(told.value)


def test_the_canonical_name_and_its_defaults():
    assert (
        tasks.load("task:multiplication").name == "task:multiplication?digits=3&min_digits=1&n=10000&seed=0&split=train"
    )
    assert multiplication.VOCAB_SIZE == 15
