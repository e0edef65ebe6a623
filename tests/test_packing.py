"""Texts as sequences: packed end to end or one an example, by hand and as a plain loop."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memdiag.dataset import Example
from memdiag.errors import InputError
from memdiag.packing import Corpus, documents, pack


def examples(*texts: Sequence[int]) -> list[Example]:
    return [Example(i, str(i), np.array(ids, dtype=np.int64), None, None, False) for i, ids in enumerate(texts)]


def sequences(corpus: Corpus) -> list[list[int]]:
    return [corpus.tokens[s : s + n].tolist() for s, n in zip(corpus.starts, corpus.lengths)]


TEXTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), max_size=8)


# --- packed --------------------------------------------------------------------------------------------------------


def test_packing_by_hand() -> None:
    """0 ends a text, unless it is there already."""
    corpus = pack(examples([1, 2, 3], [4, 0], [5], [6, 7]), 4, end=0)
    assert sequences(corpus) == [[1, 2, 3, 0], [4, 0, 5, 0]]
    assert corpus.tokens.tolist() == [1, 2, 3, 0, 4, 0, 5, 0, 6, 7, 0]
    assert (len(corpus), corpus.n_examples, corpus.n_left_out) == (2, 4, 3)


def test_a_shorter_tail_is_kept_on_request() -> None:
    corpus = pack(examples([1, 2, 3], [4, 0], [5], [6, 7]), 4, end=0, keep_tail=True)
    assert sequences(corpus) == [[1, 2, 3, 0], [4, 0, 5, 0], [6, 7, 0]]
    assert corpus.n_left_out == 0
    one = pack(examples([1, 2, 3, 4, 5]), 4, end=None, keep_tail=True)  # one token has nothing to predict
    assert (sequences(one), one.n_left_out) == ([[1, 2, 3, 4]], 1)
    exact = pack(examples([1, 2], [3, 4]), 4, end=None, keep_tail=True)
    assert (sequences(exact), exact.n_left_out) == ([[1, 2, 3, 4]], 0)


def test_without_an_end_token_nothing_goes_between_texts() -> None:
    assert sequences(pack(examples([1], [2, 3], [4]), 2, end=None)) == [[1, 2], [3, 4]]


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(2, 6), st.none() | st.integers(0, 9), st.booleans())
def test_packing_is_a_plain_loop(texts: list[list[int]], length: int, end: int | None, keep_tail: bool) -> None:
    stream: list[int] = []
    for text in texts:
        stream += text
        if end is not None and text[-1] != end:
            stream.append(end)
    expected = []
    for start in range(0, len(stream), length):
        piece = stream[start : start + length]
        if len(piece) == length or (keep_tail and len(piece) >= 2):
            expected.append(piece)
    corpus = pack(iter(examples(*texts)), length, end=end, keep_tail=keep_tail)
    assert sequences(corpus) == expected
    assert corpus.n_examples == len(texts)
    assert corpus.n_left_out == len(stream) - sum(map(len, expected))


@pytest.mark.parametrize("length", [1, 0, -3])
def test_sequences_too_short_to_predict_anything_are_refused(length: int) -> None:
    with pytest.raises(InputError, match=f"sequences of {length} token leave nothing to predict; wanted at least 2"):
        pack(examples([1, 2]), length, end=None)


# --- one an example ------------------------------------------------------------------------------------------------


def test_documents_by_hand() -> None:
    corpus = documents(examples([1, 2, 3], [4], [5, 6], [7]))
    assert sequences(corpus) == [[1, 2, 3], [5, 6]]
    assert (len(corpus), corpus.n_examples, corpus.n_left_out) == (2, 4, 2)
    assert (corpus.starts.dtype, corpus.lengths.dtype, corpus.tokens.dtype) == (np.int64, np.int64, np.int32)


@settings(max_examples=40, deadline=None)
@given(TEXTS)
def test_documents_are_a_plain_loop(texts: list[list[int]]) -> None:
    corpus = documents(iter(examples(*texts)))
    assert sequences(corpus) == [text for text in texts if len(text) > 1]
    assert (corpus.n_examples, corpus.n_left_out) == (len(texts), sum(len(text) == 1 for text in texts))


@pytest.mark.parametrize("texts", [[], [[3]]])
def test_nothing_to_train_on_is_an_empty_corpus(texts: list[list[int]]) -> None:
    for corpus in (pack(examples(*texts), 4, end=None, keep_tail=True), documents(examples(*texts))):
        nothing = np.arange(0)
        assert (len(corpus), corpus.n_targets(nothing), corpus.n_patches(nothing, 2)) == (0, 0, 0)
        assert (corpus.n_examples, corpus.n_left_out) == (len(texts), len(texts))


def test_features_are_refused() -> None:
    example = Example(0, "0", None, np.zeros(3, dtype=np.float32), None, False)
    for make in (documents, lambda found: pack(found, 4, end=None)):
        with pytest.raises(InputError, match="a language model is trained on text or input_ids"):
            make([example])


# --- what is asked of them -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(TEXTS.filter(lambda texts: any(len(text) > 1 for text in texts)), st.integers(1, 4), st.data())
def test_targets_and_patches_are_counted_by_a_plain_loop(
    texts: list[list[int]], patch_size: int, data: st.DataObject
) -> None:
    corpus = documents(examples(*texts))
    kept = [text for text in texts if len(text) > 1]
    rows = data.draw(st.lists(st.integers(0, len(kept) - 1), min_size=1))  # in any order, also twice
    targets = patches = 0
    for row in rows:
        for at in range(len(kept[row])):
            targets += at > 0
            patches += (at + 1) % patch_size == 0
    assert corpus.n_targets(np.array(rows)) == targets
    assert corpus.n_patches(np.array(rows), patch_size) == patches


def test_a_batch_is_padded_on_the_right() -> None:
    corpus = documents(examples([1, 2, 3], [4, 5], [6, 7, 8, 9]))
    ids, mask = corpus.batch(np.array([1, 0, 1]), pad_id=30)
    assert ids.tolist() == [[4, 5, 30], [1, 2, 3], [4, 5, 30]]
    assert mask.tolist() == [[True, True, False], [True, True, True], [True, True, False]]
    assert str(ids.dtype) == "torch.int64"
    whole, all_real = corpus.batch(np.array([2]))
    assert whole.tolist() == [[6, 7, 8, 9]]
    assert all_real.all()


def test_a_batch_can_be_written_to_and_the_corpus_cannot() -> None:
    corpus = documents(examples([1, 2, 3]))
    ids, _ = corpus.batch(np.array([0]))
    ids.zero_()
    assert corpus.tokens.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0] = 1


def test_tokens_stay_on_the_disk_for_as_long_as_they_are_wanted() -> None:
    long = np.arange(300_000) % 50_000
    made = [pack(examples(long), 1000, end=None), documents(examples(long))]
    for corpus in made:
        assert isinstance(corpus.tokens, np.memmap)
    gc.collect()
    for corpus in made:
        assert np.array_equal(corpus.tokens, long)
    assert np.array_equal(made[0].batch(np.array([299]))[0][0].numpy(), long[-1000:])
