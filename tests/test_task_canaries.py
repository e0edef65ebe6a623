"""task:canaries: random strings among real text, each as often as it says."""

from __future__ import annotations

from collections import Counter

import pytest

from memdiag import InputError, tasks
from memdiag.checkpoint import train_tokenizer
from memdiag.dataset import open_dataset
from memdiag.tasks.canaries import strings


def rows(query=""):
    return list(tasks.load(f"task:canaries{query}").rows())


def test_every_string_comes_as_often_as_it_says():
    canaries = [row for row in rows("?levels=16&per_level=3") if row["canary"]]
    counts = Counter(row["text"] for row in canaries)
    assert len(counts) == 3 * 5
    assert all(counts[row["text"]] == row["repeats"] for row in canaries)
    assert Counter(counts.values()) == {1: 3, 2: 3, 4: 3, 8: 3, 16: 3}
    for row in canaries:
        _, repeats, number, copy = row["id"].split("/")
        assert int(repeats) == row["repeats"]
        assert int(copy) < row["repeats"]
        assert row["text"] == strings(3, 96, 0, row["repeats"] + 1)[int(number)]


def test_ids_are_unique_and_the_splits_are_parts_of_the_whole():
    whole = {row["id"]: row for row in rows("?split=all")}
    parts = [rows(f"?split={split}") for split in ("train", "unseen", "held-out")]
    assert sum(map(len, parts)) == len(whole)
    for part in parts:
        assert len({row["id"] for row in part}) == len(part)
        assert all(whole[row["id"]] == row for row in part)
    texts = [{row["text"] for row in part if row["canary"]} for part in parts]
    assert not texts[0] & texts[1]
    assert len(texts[1]) == 32
    assert not texts[2]


def test_a_tenth_of_the_passages_is_held_out():
    train, held_out = (rows(f"?split={split}") for split in ("train", "held-out"))
    texts = [row for row in train if row["kind"] == "text"]
    assert len(held_out) == (len(texts) + len(held_out)) // 10
    assert {row["repeats"] for row in held_out} == {0}
    assert {row["repeats"] for row in texts} == {1}
    assert {(row["kind"], row["canary"]) for row in train} == {("text", False), ("canary", True)}


def test_the_seed_decides():
    assert rows() == rows("?seed=0")
    one, two = ({row["text"] for row in rows(f"?seed={seed}") if row["canary"]} for seed in (0, 1))
    assert not one & two
    assert {r["id"] for r in rows("?split=held-out")} != {r["id"] for r in rows("?split=held-out&seed=1")}


def test_strings_are_letters_digits_and_single_blanks():
    for text in strings(200, 50, 0, 5):
        assert len(text) == 50
        assert set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789 ")
        assert "  " not in text
        assert text == text.strip()
    share = sum(text.count(" ") for text in strings(200, 50, 0, 5)) / 10_000
    assert 0.1 < share < 0.17
    assert strings(3, 50, 0, 5) == strings(9, 50, 0, 5)[:3]


def test_a_tokenizer_of_the_data_does_not_know_the_strings():
    """However often they come: 64 tokens and more for each, and no more than gpt2-tiny can read."""
    tokenizer = train_tokenizer((row["text"] for row in rows()), 512)
    lengths = {row["text"]: len(tokenizer(row["text"])["input_ids"]) for row in rows("?split=all") if row["canary"]}
    assert min(lengths.values()) >= 64
    assert max(lengths.values()) <= 128


def test_it_opens_as_a_dataset():
    dataset = open_dataset("task:canaries?split=unseen&per_level=1&length=64", columns={"truth": "canary"})
    assert (dataset.kind, dataset.n_examples) == ("text", 4)
    assert not dataset.has_labels


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?split=test", "no split of task:canaries 'test'"),
        ("?per_level=0", "per_level is 0; wanted at least 1"),
        ("?levels=0", "levels is 0; wanted at least 1"),
        ("?length=1", "length is 1; wanted at least 2"),
        ("?seed=-1", "seed is -1; wanted at least 0"),
        ("?chars=0", "chars is 0; wanted at least 1"),
    ],
)
def test_values_out_of_range_are_refused(query, message):
    with pytest.raises(InputError, match=message):
        rows(query)
