"""How far it is: nothing unless asked, a line every few seconds in a log, a bar on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from memdiag import progress
from memdiag.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still until `clock[0]` is set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def count(clock, seconds, *, show=True, step=10):
    with Progress(show=show) as shown:
        shown.start("checkpoint-50", 40)
        for at in seconds:
            clock[0] = 100.0 + at
            shown.advance(step)


def test_silent_unless_shown(clock, capsys):
    count(clock, [10, 20, 30, 40], show=False)
    assert capsys.readouterr() == ("", "")


def test_a_line_every_few_seconds_where_there_is_no_terminal(clock, capsys):
    count(clock, [1, 6, 7, 12])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "checkpoint-50: 20/40 examples, ETA 6 s",  # 20 took 6 s, 20 are left
        "checkpoint-50: 40/40 examples, ETA 0 s",
    ]


def test_each_checkpoint_is_counted_afresh(clock, capsys):
    with Progress(show=True) as shown:
        shown.start("first", 10)
        shown.advance(10)
        clock[0] = 200.0
        shown.start("second", 4)
        clock[0] = 208.0
        shown.advance(1)
    assert capsys.readouterr().err == "second: 1/4 examples, ETA 24 s\n"


def test_a_short_job_says_nothing(clock, capsys):
    count(clock, [1, 2, 3, 4])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["checkpoint-50", "a[/b]", "{x}", "[red]"])
def test_a_bar_on_a_terminal_leaves_no_trace_in_stdout(monkeypatch, capsys, name):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(show=True) as shown:
        for total in (2, 3):
            shown.start(name, total)
            for _ in range(total):
                shown.advance(1)
    assert name in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_the_bar_is_taken_away_when_an_error_passes(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def interrupted():
        with Progress(show=True) as shown:
            shown.start("run", 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert terminal.getvalue().endswith("\x1b[2K")  # the last line was cleared
