from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy import stats

from memdiag import tasks
from memdiag.dataset import open_dataset
from memdiag.errors import InputError
from memdiag.tasks.pydoc import passages


def test_names_are_the_files():
    assert {"digits", "pydoc", "modular-addition", "modular-subtraction", "modular-multiplication"} <= set(
        tasks.names()
    )
    assert not any("_" in name for name in tasks.names())


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_has_defaults_ids_and_the_same_rows_twice(name):
    task = tasks.load(f"task:{name}")
    first, second = list(task.rows()), list(task.rows())
    assert len(first) > 1
    assert len({row["id"] for row in first}) == len(first)
    assert all(a.keys() == b.keys() for a, b in zip(first, second))
    assert all(np.array_equal(a[key], b[key]) for a, b in zip(first, second) for key in a)
    assert tasks.load(task.name).name == task.name  # the canonical name names itself


def test_the_canonical_name_has_every_key_sorted():
    assert tasks.load("task:pydoc").name == "task:pydoc?chars=1000"
    assert tasks.load("task:digits?split=test&seed=3").name == (
        "task:digits?corruption=0.0&seed=3&shape=flat&split=test&test_fraction=0.2"
    )
    assert tasks.load("task:modular-addition?p=11&corruption=0.30").name == (
        "task:modular-addition?corruption=0.3&corruption_law=uniform&p=11&seed=0&split=train&train_fraction=0.5"
    )


def test_the_values_of_all_keys_and_which_of_them_were_named():
    task = tasks.load("task:digits?seed=3&corruption=0")
    assert task.values == {"split": "all", "seed": 3, "test_fraction": 0.2, "shape": "flat", "corruption": 0.0}
    assert task.given == {"seed", "corruption"}
    assert tasks.load("task:digits").given == set()
    assert tasks.load(task.name).given == set(task.values)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("task:pydok", "did you mean 'pydoc'?"),
        ("task:", "no task ''"),
        ("task:../pydoc", "no task"),
        ("task:pydoc?char=5", "did you mean 'chars'?"),
        ("task:pydoc?chars=many", "wanted int"),
        ("task:pydoc?chars=" + "9" * 5000, "wanted int"),
        ("task:pydoc?chars=1.5", "wanted int"),
        ("task:pydoc?chars=", "wanted int"),
        ("task:pydoc?chars", "wanted key=value"),
        ("task:pydoc?chars=5&chars=6", "given twice"),
        ("task:pydoc?chars=0", "wanted at least 1"),
        ("task:digits?split=dev", "no split of task:digits 'dev'"),
        ("task:digits?shape=round", "no shape of task:digits"),
        ("task:digits?test_fraction=1", "less than 1"),
        ("task:digits?test_fraction=nan", "less than 1"),
        ("task:digits?seed=-1", "at least 0"),
        ("task:digits?corruption=1", "corruption is 1.0; wanted at least 0 and less than 1"),
        ("task:digits?corruption=-0.1", "corruption is -0.1; wanted at least 0"),
        ("task:digits?corruption=nan", "corruption is nan; wanted at least 0"),
        ("task:modular_addition", "did you mean 'modular-addition'?"),
        ("task:modular-adition", "did you mean 'modular-addition'?"),
        ("task:modular-addition?q=7", "no key of task:modular-addition 'q'"),
        ("task:modular-addition?p=7.5", "task:modular-addition: p is '7.5'; wanted int"),
        ("task:modular-addition?p=2", "p is 2; wanted a modulus"),
        ("task:modular-multiplication?p=9", "p is 9, which is not prime"),
        ("task:modular-subtraction?split=dev", "no split of task:modular-subtraction 'dev'"),
        ("task:modular-subtraction?corruption_law=even", "no corruption law 'even'"),
        ("task:pydoc?\n=\n", "no key of task:pydoc"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(spec, wanted):
    with pytest.raises(InputError) as error:
        list(tasks.load(spec).rows())
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


def test_passages_by_hand():
    assert list(passages("aa\n\nbb\n\ncc", chars=6)) == ["aa\n\nbb", "cc"]
    assert list(passages("aa\n\nbb\n\ncc", chars=5)) == ["aa", "bb", "cc"]
    assert list(passages("one two three", chars=8)) == ["one two", "three"]
    assert list(passages("abcdefgh", chars=3)) == ["abc", "def", "gh"]
    assert list(passages("\n\n \n\n", chars=3)) == []


@pytest.mark.parametrize("chars", [1, 37, 1000])
def test_passages_lose_nothing_but_space(chars):
    from pydoc_data.topics import topics

    for topic, text in list(topics.items())[:12]:
        found = list(passages(text, chars=chars))
        assert all(0 < len(passage) <= chars and passage.strip() for passage in found), topic
        assert "".join("".join(found).split()) == "".join(text.split())


def test_pydoc_rows_are_in_topic_order():
    rows = list(tasks.load("task:pydoc").rows())
    topics = [row["id"].rsplit("/", 1)[0] for row in rows]
    assert topics == sorted(topics)
    assert rows[0]["id"] == "assert/0"
    assert max(len(row["text"]) for row in rows) <= 1000


def test_digits_by_hand():
    rows = list(tasks.load("task:digits").rows())
    assert len(rows) == 1797
    assert rows[0]["label"] == 0
    assert rows[0]["features"].dtype == np.float32
    assert rows[0]["features"][:6] * 16 == pytest.approx([0, 0, 5, 13, 9, 1])
    assert max(row["features"].max() for row in rows) == 1
    image = next(tasks.load("task:digits?shape=image").rows())["features"]
    assert image.shape == (1, 8, 8)
    assert np.array_equal(image.ravel(), rows[0]["features"])


def test_digits_train_and_test_are_a_partition_drawn_by_seed():
    def ids(query: str) -> list[str]:
        return [row["id"] for row in tasks.load(f"task:digits?{query}").rows()]

    train, test = ids("split=train"), ids("split=test")
    assert len(test) == 359
    assert sorted(train + test, key=int) == [str(i) for i in range(1797)]
    assert ids("split=test&seed=1") != test


def digits(query):
    return list(tasks.load(f"task:digits?{query}").rows())


def test_digits_columns():
    assert list(digits("")[0]) == ["id", "features", "label", "true_label", "corrupted"]
    row = digits("corruption=0.9&split=train")[0]
    assert [type(row[key]) for key in ("id", "label", "true_label", "corrupted")] == [str, int, int, bool]


def test_digits_are_corrupted_in_training_only_and_always_wrong():
    plain, rows = digits("split=all"), digits("split=all&corruption=0.2")
    test = {row["id"] for row in digits("split=test&corruption=0.2")}
    assert not any(row["corrupted"] for row in plain)
    assert sum(row["corrupted"] for row in rows) == int(0.2 * (1797 - 359)) == 287
    for before, row in zip(plain, rows):
        assert row["id"] == before["id"]
        assert np.array_equal(row["features"], before["features"])
        assert row["true_label"] == before["label"] == before["true_label"]
        assert (row["label"] != row["true_label"]) == row["corrupted"]
        assert 0 <= row["label"] <= 9
        assert not (row["corrupted"] and row["id"] in test)
    assert [row["label"] for row in digits("split=train&corruption=0.2")] == [
        row["label"] for row in rows if row["id"] not in test
    ]


def test_the_nine_wrong_digits_are_equally_likely():
    offsets = np.zeros(10)
    for seed in range(4):
        for row in digits(f"split=train&corruption=0.9&seed={seed}"):
            offsets[(row["label"] - row["true_label"]) % 10] += row["corrupted"]
    assert offsets[0] == 0
    assert offsets[1:].min() > 0
    assert stats.chisquare(offsets[1:]).pvalue > 1e-3


def test_more_corruption_of_digits_holds_the_less_and_the_seed_decides():
    def corrupted(query):
        return {row["id"]: row["label"] for row in digits(query) if row["corrupted"]}

    less, more = corrupted("corruption=0.1"), corrupted("corruption=0.5")
    assert less.items() < more.items()
    assert corrupted("corruption=0.1&seed=1") != less


@pytest.mark.parametrize("name", ["addition", "subtraction", "multiplication"])
def test_modular_tasks_hand_their_keys_on(name):
    of = {"addition": lambda m, n: m + n, "subtraction": lambda m, n: m - n, "multiplication": lambda m, n: m * n}[name]
    query = "p=7&split=all&train_fraction=0.75&corruption=0.5&corruption_law=wrong&seed=4"
    rows = list(tasks.load(f"task:modular-{name}?{query}").rows())
    assert len(rows) == 49
    for row in rows:
        m, n = divmod(int(row["id"]), 7)
        assert row["true_label"] == of(m, n) % 7
        assert np.flatnonzero(row["features"]).tolist() == [m, 7 + n]
        assert (row["label"] != row["true_label"]) == row["corrupted"]
    assert sum(row["corrupted"] for row in rows) == int(0.5 * 36)
    train = list(tasks.load(f"task:modular-{name}?{query.replace('all', 'train')}").rows())
    assert [row["id"] for row in train] == [row["id"] for row in rows[:36]]
    other = tasks.load(f"task:modular-{name}?{query.replace('seed=4', 'seed=5')}").rows()
    assert [row["id"] for row in other] != [row["id"] for row in rows]


def test_modular_rows_as_a_dataset():
    dataset = open_dataset("task:modular-addition?p=11&split=test")
    assert dataset.kind == "features"
    assert dataset.n_examples == 61
    assert next(dataset.examples()).label in range(11)


def test_without_scikit_learn_digits_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="scikit-learn"):
        list(tasks.load("task:digits").rows())
