"""The one line that a user sees."""

from __future__ import annotations

import pytest

from memdiag.errors import InputError, one_line, unknown


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    error = unknown("unit", "sequense", ["patch", "sequence", "dataset"])
    assert isinstance(error, InputError)
    assert str(error) == "no unit 'sequense'; there are dataset, patch, sequence; did you mean 'sequence'?"


def test_nothing_is_guessed_where_nothing_is_near():
    assert str(unknown("task", "zzz", iter(["digits"]))) == "no task 'zzz'; there are digits"


def test_no_known_names_at_all():
    assert str(unknown("column", "text", [])) == "no column 'text'; there are none"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("a\n  b\tc \r\n d", "a b c d"),
        (ValueError("two\nlines"), "two lines"),
        (ValueError(""), "ValueError"),  # a message is never empty
        (KeyError("name"), "'name'"),
    ],
)
def test_a_library_message_is_folded_to_one_line(message, expected):
    assert one_line(message) == expected


def test_a_long_message_is_cut_at_the_limit_and_says_so():
    assert one_line("x" * 300) == "x" * 300
    assert one_line("x" * 301) == "x" * 299 + "…"
    assert one_line("abcdef", limit=4) == "abc…"
