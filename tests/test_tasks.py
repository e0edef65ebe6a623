from __future__ import annotations

import sys

import numpy as np
import pytest

from memdiag import tasks
from memdiag.errors import InputError
from memdiag.tasks.pydoc import passages


def test_names_are_the_files():
    assert {"digits", "pydoc"} <= set(tasks.names())


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
        "task:digits?seed=3&shape=flat&split=test&test_fraction=0.2"
    )


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


def test_without_scikit_learn_digits_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="scikit-learn"):
        list(tasks.load("task:digits").rows())
