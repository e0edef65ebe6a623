"""The formats of an outcome, each read by its own consumer: JSON's schema, JUnit, Markdown, GitHub's commands."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import junitparser
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len

from memdiag import __version__, verdict_words
from memdiag import verdict_formats as formats
from memdiag import verdict_markdown as markdown
from memdiag.verdicts import Outcome, Table, Verdict

SCHEMA = json.loads((Path(__file__).resolve().parent.parent / "docs" / "verdicts.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
TEXTS = ("markdown", "json", "junit", "github")
HOSTILE = {
    "markup": "<script>alert(1)</script><img src=x onerror=alert(1)>&lt;b&gt;</details>",
    "pipes": "a | b || c \\| d \\\\| e | ",
    "code": "`` ` ``` code ` `` | `",
    "mention": "@torvalds ping @org/team foo@example.com #1 GH-2 owner/repo#3",
    "links": "[x](https://evil.example) ![y](http://e.example/p.png) <https://a.example> www.evil.example https://b.example",
    "lines": "one\ntwo\r\nthree\r::error::four\n\n| a | b |\n| --- | --- |\n# heading\u2028five",
    "ansi": "\x1b[31mred\x1b[0m\x07\x1b]0;title\x07\x9b2J",
    "turned": "pass \u202eliaf\u202c \u2066isolate\u2069 \u200fmark",
    "control": "a\x00b\x01c\x0bd\x1fe\x7ff\x85g\ufffe\uffff",
    "surrogate": "lone \ud800 half",
    "joined": "\u200d::error::x #\u200d#[add-mask]y",
    "parted": ":\u200d:error::x",
    "commands": "::error::no\n::stop-commands::x\n##[add-mask]y ##vso[task.complete] ##teamcity[z] ###",
    "percent": "100 % %0A %25 a:b,c;d=e",
    "xml": "]]> <!-- --> <?x ?> &amp; &#1; \"quoted\" 'single'",
    "emoji": "👩‍👩‍👧 naïve 日本語 e\u0301",
    "empty": "",
    "blank": " \t ",
    "dashes": "---",
    "emphasis": "**bold** _low_ ~~gone~~ $x$ \\",
    "number": "1. first",
}
LINKED = re.compile(r"@\w|://|www\.|#\d|GH-\d")
hostile = pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)


def a_verdict(**given: Any) -> Verdict:
    fields: dict[str, Any] = {field.name: None for field in dataclasses.fields(Verdict)}
    return Verdict(**(fields | {"rule": "avg(mbe) < 1.2", "sql": "avg(mbe) < 1.2", "verdict": "pass"} | given))


def an_outcome(*verdicts: Verdict, **given: Any) -> Outcome:
    fields = {"command": "check", "subject": "score.parquet", "file": "score.parquet", "report": "check.parquet"}
    return Outcome(**(fields | {"verdicts": verdicts, "inconclusive": "pass"} | given))


def three(**given: Any) -> Outcome:
    """One that passes, one that fails, one that is inconclusive."""
    span = {"observed": 1.1, "lo": 1.05, "hi": 1.15, "limit": 1.2, "comparison": "<", "n": 200, "confidence": 0.95}
    return an_outcome(
        a_verdict(**span, method="bootstrap-t"),
        a_verdict(rule="none", sql="count(*) = 0", verdict="fail", observed=3, limit=0, comparison="=", n=200),
        a_verdict(rule="unsure", verdict="inconclusive", **(span | {"hi": 1.3}), note="the interval holds 1.2"),
        **given,
    )


def printed(outcome: Outcome, capsys: pytest.CaptureFixture[str], width: int = 80) -> str:
    capsys.readouterr()
    formats.print_table(outcome, width=width)
    return capsys.readouterr().out


# -- readers of the formats ------------------------------------------------------------------------------------------


def markdown_tables(text: str) -> tuple[list[list[list[Token]]], list[Token]]:
    """The tables as rows of cells (each its inline token), and all tokens, read as GitHub's flavour."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    tables: list[list[list[Token]]] = []
    inside = False
    for token in tokens:
        if token.type == "table_open":
            tables.append([])
            inside = True
        elif token.type == "table_close":
            inside = False
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and inside:
            tables[-1][-1].append(token)
    return tables, tokens


def words(cell: Token) -> str:
    """A cell as it is read; the zero-width spaces that break links up are not seen."""
    return "".join(child.content for child in cell.children or []).replace("\u200b", "")


def shown(name: str, most: int = markdown.MOST_MARKDOWN_CELL) -> str:
    """A name as one line that can be seen: what a format without control characters can give back."""
    return verdict_words.plain(name, most)


def in_cell(name: str) -> str:
    """A name as a cell of Markdown holds it: no backslash before a pipe, no ## (a runner's command)."""
    return re.sub(r"#(?=[\u200c\u200d]*#)", "# ", re.sub(r"\\(?=\|)", r"\\ ", shown(name)))


def github_commands(text: str) -> list[tuple[str, dict[str, str], str]]:
    """The workflow commands of a log as the runner reads them: ::name key=value,key=value::message.

    A line is a command if it begins with :: after blanks. %25, %0D, %0A are undone in the message, %3A and %2C in
    properties too; %25 last.
    """

    def undone(value: str, *more: tuple[str, str]) -> str:
        for code, character in (("%0D", "\r"), ("%0A", "\n"), *more, ("%25", "%")):
            value = value.replace(code, character)
        return value

    found = []
    for line in re.split(r"\r\n|\r|\n", text):
        match = re.match(r"\s*::(?P<head>.*?)::(?P<message>.*)$", line, re.DOTALL)
        assert match is not None, f"not a command: {line[:200]!r}"
        name, _, properties = match["head"].partition(" ")
        pairs = dict(one.split("=", 1) for one in properties.split(",") if one)
        values = {key: undone(value, ("%3A", ":"), ("%2C", ",")) for key, value in pairs.items()}
        found.append((name, values, undone(match["message"])))
    return found


def junit_suite(text: str) -> junitparser.TestSuite:
    """The only suite, with the counts that its attributes claim compared with what is in it."""
    (suite,) = list(root := junitparser.JUnitXml.fromstring(text.encode()))
    claimed = (suite.tests, suite.failures, suite.errors, suite.skipped)
    assert (root.tests, root.failures, root.errors, root.skipped) == claimed
    suite.update_statistics()
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == claimed
    return suite


def in_xml(name: str) -> str:
    """A name with what XML 1.0 cannot hold, and what turns text around, as escapes."""
    held = [0x9, 0xA, 0xD, *range(0x20, 0xD800), *range(0xE000, 0xFFFE)]
    turning = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    known = set(held) - set(turning)
    kept = (c if ord(c) in known or ord(c) >= 0x10000 else c.encode("unicode_escape").decode() for c in name)
    return "".join(kept)


# -- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, "–"),
        (math.nan, "–"),
        (0.0, "0"),
        (-0.0, "0"),
        (3.0, "3"),
        (-2, "-2"),
        (1234567.0, "1234567"),
        (1234567.5, "1.23457e+06"),
        (1e16, "1e+16"),
        (0.1 + 0.2, "0.3"),
        (1 / 3, "0.333333"),
        (1.5e-9, "1.5e-09"),
        (math.inf, "inf"),
        (np.float64(0.25), "0.25"),
    ],
)
def test_numbers_have_six_digits_whole_ones_all(value: float | None, wanted: str) -> None:
    assert verdict_words.number(value) == wanted


def test_a_figure_that_is_not_the_limit_does_not_look_like_it() -> None:
    near = a_verdict(observed=0.5 - 1e-9, lo=0.4, hi=0.6, limit=0.5, comparison="<", verdict="pass")
    assert verdict_words.digits_of(near) == 9
    assert verdict_words.digits_of(dataclasses.replace(near, observed=0.5)) == 6
    assert verdict_words.digits_of(dataclasses.replace(near, lo=math.nextafter(0.5, 0))) == 16
    last = dataclasses.replace(near, observed=0.1 + 0.2, limit=0.3)
    assert verdict_words.digits_of(last) == 17
    assert "observed 0.30000000000000004, " in verdict_words.figures(last)
    (rule,) = json.loads(formats.to_json(an_outcome(near)))["rules"]
    assert rule["observed"] == 0.499999999 < rule["limit"]


@given(*[st.floats(allow_infinity=False, allow_nan=False)] * 2)
def test_rounding_never_moves_a_figure_to_the_other_side_of_the_limit(observed: float, limit: float) -> None:
    (rule,) = json.loads(formats.to_json(an_outcome(a_verdict(observed=observed, limit=limit))))["rules"]
    assert (rule["observed"] < rule["limit"]) == (observed < limit)
    assert (rule["observed"] == rule["limit"]) == (observed == limit)
    assert rule["observed"] == pytest.approx(observed, rel=5e-6, abs=0)
    assert "-0" not in (str(rule["observed"]), str(rule["limit"]))


def test_figures_say_what_is_known_and_no_more() -> None:
    assert verdict_words.figures(a_verdict()) == "observed –"
    assert verdict_words.figures(three().verdicts[2]) == (
        "observed 1.1, 95 % interval 1.05 to 1.3, wanted < 1.2, n 200: the interval holds 1.2"
    )
    assert verdict_words.figures(a_verdict(observed=1, lo=0.5, p=0.5, q=0.25)) == (
        "observed 1, interval 0.5 to –, p 0.5, q 0.25"
    )


@pytest.mark.parametrize(
    ("verdicts", "inconclusive", "wanted"),
    [
        ([], "pass", "pass: 0 of 0 rules failed"),
        (["pass"], "fail", "pass: 0 of 1 rule failed"),
        (["fail", "pass"], "pass", "fail: 1 of 2 rules failed"),
        (["inconclusive"], "pass", "pass: 0 of 1 rule failed, 1 is inconclusive, which counts as pass"),
        (["inconclusive"] * 2, "fail", "fail: 0 of 2 rules failed, 2 are inconclusive, which counts as fail"),
    ],
)
def test_the_whole_fails_if_a_rule_does(verdicts: list[str], inconclusive: str, wanted: str) -> None:
    outcome = an_outcome(*(a_verdict(verdict=verdict) for verdict in verdicts), inconclusive=inconclusive)
    assert verdict_words.sentence(outcome) == wanted
    assert outcome.failed == wanted.startswith("fail")
    assert json.loads(formats.to_json(outcome))["verdict"] == wanted.split(":")[0]


def test_what_cannot_be_seen_is_an_escape() -> None:
    assert verdict_words.visible("a\x1b[0m\u202e\ud800\x85\r\n") == r"a\x1b[0m\u202e\ud800\x85\r\n"
    assert verdict_words.visible("a\r\n\t", keep="\r\n") == "a\r\n\\t"
    assert verdict_words.visible("日本語 👩\u200d👩 é") == "日本語 👩\u200d👩 é"
    assert verdict_words.plain(" a\n\tb \u2028 c\x00 ", 99) == r"a b c\x00"
    assert verdict_words.plain("abcdef", 6) == "abcdef"
    assert verdict_words.plain("abcdefg", 6) == "abcde…"
    assert verdict_words.plain(" \n", 6) == "–"


# -- table -----------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_per_rule_in_the_order_given(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("largest movers", ("example_id", "difference"), (("a", "0.5"),))
    out = printed(three(tables=(table,), notes=("partial",)), capsys)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[:6] == [
        "check score.parquet",
        "verdict rule observed 95 % interval wanted n",
        "pass avg(mbe) < 1.2 1.1 1.05 to 1.15 < 1.2 200",
        "fail none 3 = 0 200",
        "inconclusive unsure 1.1 1.05 to 1.3 < 1.2 200",
        "unsure: the interval holds 1.2",
    ]
    assert lines[7:] == [
        "largest movers",
        "example_id difference",
        "a 0.5",
        "note: partial",
        "fail: 1 of 3 rules failed, 1 is inconclusive, which counts as pass",
        "report: check.parquet",
    ]


FULL = a_verdict(
    rule="quantile_cont(memorization, 0.95) <= 0.5 AND count(*) > 10",
    verdict="inconclusive",
    observed=0.123456,
    lo=-0.123456,
    hi=0.234567,
    limit=0.5,
    comparison="<=",
    n=1234567,
    confidence=0.95,
    q=0.0123,
)


@pytest.mark.parametrize("width", [80, 60, 40])
def test_nothing_is_lost_where_the_table_is_narrow(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    near = dataclasses.replace(FULL, observed=math.nextafter(0.5, 0))
    for verdicts in ((FULL,), (a_verdict(), FULL), (near, FULL)):
        out = printed(an_outcome(*verdicts), capsys, width)
        assert max(map(cell_len, out.splitlines())) <= max(width, len("report: check.parquet"))
        for word in ("inconclusive", "0.123456", "-0.123456", "0.234567", "<= 0.5", "1234567", "0.0123"):
            assert word in " ".join(out.split())
        assert "quantile_con" in "".join(out.split())
    assert ("verdict " in printed(an_outcome(FULL), capsys, width)) == (width == 80)


@pytest.mark.parametrize("width", range(30, 82))
def test_no_column_is_dropped_at_any_width(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    short = a_verdict(rule="x", observed=3, lo=1, hi=4, limit=7, comparison="=", n=5, confidence=0.95, q=0.25)
    out = " ".join(printed(an_outcome(short), capsys, width).split())
    assert "pass x 3 1 to 4 = 7 5 0.25" in out or "observed 3, 95 % interval 1 to 4, wanted = 7, n 5, q 0.25" in out


def test_intervals_of_several_levels_have_no_level_in_the_heading(capsys: pytest.CaptureFixture[str]) -> None:
    first = a_verdict(observed=1, lo=0, hi=2, confidence=0.95)
    out = printed(an_outcome(first, dataclasses.replace(first, confidence=0.9)), capsys)
    assert " interval" in out
    assert "%" not in out
    assert "95 % interval" in printed(an_outcome(first, a_verdict()), capsys)


def test_verdicts_are_coloured_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert "\x1b" not in printed(three(), capsys)
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = printed(three(), capsys)
    assert "\x1b[32mpass" in out
    assert "\x1b[1;31mfail" in out
    assert "\x1b[33minconclusive" in out


@hostile
def test_nothing_hostile_gets_out_of_the_table(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(name, (name, "b"), ((name, name),))
    bad = a_verdict(rule=name, sql=name, verdict="fail", note=name)
    out = printed(an_outcome(bad, subject=name, report=name, tables=(table,), notes=(name,)), capsys)
    assert [c for c in out if not (c.isprintable() or c in "\n\u200c\u200d")] == []
    assert [line for line in out.splitlines() if line.lstrip().startswith("::")] == []
    assert re.search(r"#[\u200c\u200d]*#|^[\s\u200c\u200d]*:[\u200c\u200d]*:", out, re.MULTILINE) is None
    out.encode()


def test_a_rule_of_a_megabyte_is_cut_in_the_table_and_whole_in_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 1_000_000
    outcome = an_outcome(a_verdict(rule=long, sql=long, verdict="fail", note=long), notes=(long,))
    assert len(printed(outcome, capsys)) < 10_000
    found = json.loads(formats.to_json(outcome))
    assert (found["rules"][0]["rule"], found["rules"][0]["note"]) == (long, long)
    assert len(markdown.to_markdown(outcome)) < markdown.MOST_MARKDOWN
    assert len(formats.to_github(outcome)) < 10_000
    (case,) = junit_suite(formats.to_junit(outcome))
    assert case.name == long[: formats.MOST_NAME - 1] + "…"
    assert long in case.result[0].text


# -- JSON ------------------------------------------------------------------------------------------------------------


def test_the_json_by_hand() -> None:
    found = json.loads(formats.to_json(three(notes=("partial",), figures={"a": {"b": (np.float32(0.5), math.nan)}})))
    VALIDATOR.validate(found)
    rules = found.pop("rules")
    assert found == {
        "memdiag_version": __version__,
        "command": "check",
        "subject": "score.parquet",
        "report": "check.parquet",
        "verdict": "fail",
        "inconclusive": "pass",
        "counts": {"pass": 1, "fail": 1, "inconclusive": 1},
        "metrics": {"avg(mbe) < 1.2": 1.1, "none": 3, "unsure": 1.1},
        "figures": {"a": {"b": [0.5, None]}},
        "notes": ["partial"],
    }
    assert [list(rule) for rule in rules] == [[field.name for field in dataclasses.fields(Verdict)]] * 3
    assert rules[1] == dataclasses.asdict(three().verdicts[1])


def test_what_is_no_number_is_null_in_the_json() -> None:
    odd = a_verdict(observed=math.nan, lo=-math.inf, hi=math.inf, limit=-0.0)
    text = formats.to_json(an_outcome(odd, figures={"nan": [math.nan, -0.0], "inf": math.inf}))
    found = json.loads(text, parse_constant=pytest.fail)
    VALIDATOR.validate(found)
    assert [found["rules"][0][name] for name in ("observed", "lo", "hi", "limit")] == [None, None, None, 0]
    assert found["figures"] == {"nan": [None, 0.0], "inf": None}
    assert "-0" not in text


def test_two_rules_of_a_name_are_both_among_the_metrics() -> None:
    same = [a_verdict(rule="a", observed=i) for i in (1, 2, 3)]
    taken = a_verdict(rule="a (2)", observed=4)
    assert json.loads(formats.to_json(an_outcome(taken, *same)))["metrics"] == {
        "a (2)": 4,
        "a": 1,
        "a (3)": 2,
        "a (4)": 3,
    }


def test_the_schema_is_one_and_refuses_what_it_should() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    good = json.loads(formats.to_json(three()))
    assert list(VALIDATOR.iter_errors(good)) == []
    rule = SCHEMA["$defs"]["rule"]
    assert list(rule["properties"]) == rule["required"] == [field.name for field in dataclasses.fields(Verdict)]
    for change in ({"more": 1}, {"verdict": "maybe"}, {"observed": "1"}, {"n": -1}, {"n": 1.5}, {"p": 1.1}):
        bad = good | {"rules": [good["rules"][0] | change]}
        assert not VALIDATOR.is_valid(bad), change
    for name in good:
        assert not VALIDATOR.is_valid({key: value for key, value in good.items() if key != name}), name


# -- Markdown --------------------------------------------------------------------------------------------------------


def test_the_markdown_by_hand() -> None:
    movers = Table("largest movers", ("example_id", "difference"), (("a|b", "0.5"), ("two words", "-1e-05")))
    text = markdown.to_markdown(three(tables=(movers,), notes=("partial",)))
    tables, tokens = markdown_tables(text)
    assert [[words(cell) for cell in row] for row in tables[0]] == [
        ["verdict", "rule", "observed", "interval", "wanted", "n", "note"],
        ["✓ pass", "avg(mbe) < 1.2", "1.1", "1.05 to 1.15 (95 %)", "< 1.2", "200", ""],
        ["✗ fail", "none", "3", "", "= 0", "200", ""],
        ["? inconclusive", "unsure", "1.1", "1.05 to 1.3 (95 %)", "< 1.2", "200", "the interval holds 1.2"],
    ]
    assert [[words(cell) for cell in row] for row in tables[1]] == [
        ["example_id", "difference"],
        ["a|b", "0.5"],
        ["two words", "-1e-05"],
    ]
    assert [words(row[0]) for row in tables[2]] == ["rule", "none", "unsure"]
    blocks = [token.content for token in tokens if token.type == "html_block"]
    opened = "<details>\n<summary>{}</summary>\n"
    assert blocks == [
        opened.format("largest movers"),
        "</details>\n",
        opened.format("The rules as SQL"),
        "</details>\n",
    ]
    assert text.startswith("### memdiag check of `score.parquet`\n\n**fail: 1 of 3 rules failed, ")
    assert "\n\n- partial\n\n" in text
    assert text.endswith("\n\nReport: `check.parquet`")


@hostile
def test_nothing_hostile_gets_out_of_the_markdown(name: str) -> None:
    table = Table(name, (name, "b"), ((name, "1"), ("c", name)))
    bad = a_verdict(rule=name, sql="sql " + name, verdict="fail", note=name)
    text = markdown.to_markdown(an_outcome(bad, subject=name, report=name, tables=(table,), notes=(name, "end")))
    tables, tokens = markdown_tables(text)
    wanted = in_cell(name)
    assert [len(row) for found in tables for row in found] == [7, 7, 2, 2, 2, 2, 2]
    assert words(tables[0][1][1]) == wanted
    assert words(tables[0][1][6]) == (shown(name) if name else "")
    assert [words(cell) for row in tables[1] for cell in row] == [shown(name), "b", wanted, "1", "c", wanted]
    inline = [child.type for token in tokens for child in token.children or []]
    assert set(inline) <= {"text", "text_special", "code_inline", "strong_open", "strong_close"}
    opened = f"<details>\n<summary>{html.escape(shown(name), quote=False).replace('#', '&#35;')}</summary>\n"
    blocks = [token.content.replace("\u200b", "") for token in tokens if token.type == "html_block"]
    assert blocks[:2] == [opened, "</details>\n"]
    assert len(blocks) == 4
    assert [token.type for token in tokens if token.type in ("heading_open", "hr", "fence", "code_block")] == [
        "heading_open"
    ]
    assert re.search(r"#[\u200c\u200d]*#", text.removeprefix("### ")) is None
    assert sum(token.type == "list_item_open" for token in tokens) == 2
    assert [c for c in text if not (c.isprintable() or c in "\n\u200b\u200c\u200d")] == []
    for token in tokens:
        outside = [child.content for child in token.children or [] if child.type != "code_inline"]
        outside += [html.unescape(token.content)] if token.type == "html_block" else []
        assert [text for text in outside if LINKED.search(text)] == []  # GitHub links nothing in code


def test_markdown_that_would_be_too_long_leaves_out_passes_first_and_says_so() -> None:
    bad = {1, 250, 499}
    verdicts = [a_verdict(rule=f"{i} {'x' * 200}", verdict="fail" if i in bad else "pass") for i in range(500)]
    table = Table("movers", ("a",), (("b" * 200,),) * 400)
    text = markdown.to_markdown(an_outcome(*verdicts, tables=(table,)))
    assert markdown.MOST_MARKDOWN - 2000 < len(text) <= markdown.MOST_MARKDOWN
    ((_, *rows),), _ = markdown_tables(text)
    kept = [int(words(row[1]).split()[0]) for row in rows]
    assert bad <= set(kept)
    assert kept == sorted({*range(len(kept) - 2), *bad})
    assert f"\n- {500 - len(kept)} more rules are in `check.parquet`.\n" in text
    assert "\n- Too long to show: movers." in text
    assert "3 of 500 rules failed" in text


def test_many_notes_do_not_fill_the_markdown() -> None:
    text = markdown.to_markdown(an_outcome(a_verdict(), notes=("<" * 1000,) * 50))
    assert len(text) <= markdown.MOST_MARKDOWN
    assert "\n- 30 more notes are in the JSON.\n" in text
    assert text.count("\n- ") == 21


def test_the_step_summary_is_appended(tmp_path: Path) -> None:
    file = tmp_path / "summary.md"
    file.write_text("before\n", encoding="utf-8")
    assert formats.append_summary(three(), file) is None
    assert formats.append_summary(three(), str(file)) is None
    text = markdown.to_markdown(three())
    assert file.read_text(encoding="utf-8") == f"before\n{text}\n\n{text}\n\n"


def test_a_step_summary_that_cannot_be_written_is_a_note(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "no" / "file", "No such file"), ("\0", "null")):
        note = formats.append_summary(three(), path)
        assert note is not None
        assert note.startswith("no step summary: ")
        assert why in note
        assert note.isprintable()


def test_a_step_summary_that_github_would_drop_is_not_made_longer(tmp_path: Path) -> None:
    file, added = tmp_path / "summary.md", len(markdown.to_markdown(three()).encode()) + 2
    file.write_bytes(b"x" * (formats.MOST_SUMMARY - added))
    assert formats.append_summary(three(), file) is None
    assert file.stat().st_size == formats.MOST_SUMMARY
    note = formats.append_summary(three(), file)
    assert note is not None
    assert "longer than GitHub takes" in note
    assert file.stat().st_size == formats.MOST_SUMMARY


# -- JUnit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inconclusive", ["pass", "fail"])
def test_the_junit_by_hand(inconclusive: str) -> None:
    text = formats.to_junit(three(inconclusive=inconclusive, notes=("partial", "second\nnote")))
    suite = junit_suite(text)
    assert (suite.tests, suite.failures, suite.skipped) == ((3, 1, 1) if inconclusive == "pass" else (3, 2, 0))
    passed, failed, unsure = suite
    assert (suite.name, passed.name, passed.classname) == ("score.parquet", "avg(mbe) < 1.2", "memdiag.check")
    assert passed.is_passed
    assert passed.system_out == verdict_words.figures(three().verdicts[0])
    (failure,) = failed.result
    assert isinstance(failure, junitparser.Failure)
    assert (failure.type, failure.message) == ("fail", "observed 3, wanted = 0, n 200")
    assert failure.text == "observed 3, wanted = 0, n 200\nrule: count(*) = 0"
    (result,) = unsure.result
    if inconclusive == "pass":
        assert isinstance(result, junitparser.Skipped)
        assert result.message.startswith("inconclusive: observed 1.1, 95 % interval")
    else:
        assert isinstance(result, junitparser.Failure)
        assert result.type == "inconclusive"
    assert ElementTree.fromstring(text).findtext("testsuite/system-out") == "- partial\n- second note"
    assert "timestamp" not in text


def test_a_suite_without_rules_is_a_suite() -> None:
    assert list(junit_suite(formats.to_junit(an_outcome()))) == []


@hostile
def test_names_come_back_from_the_junit(name: str) -> None:
    bad = a_verdict(rule=name, sql=name, verdict="fail", note=name)
    skipped = dataclasses.replace(bad, verdict="inconclusive")
    text = formats.to_junit(an_outcome(bad, skipped, subject=name, report=name, file=name, notes=(name,)))
    assert text.isascii()
    assert "##" not in text
    assert [line for line in text.splitlines() if line.lstrip().startswith("::")] == []
    suite = junit_suite(text)
    assert [case.name for case in suite] == [in_xml(name)] * 2
    assert suite.name == in_xml(name)


# -- GitHub ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inconclusive", "kind"), [("pass", "warning"), ("fail", "error")])
def test_the_commands_by_hand(inconclusive: str, kind: str) -> None:
    found = github_commands(formats.to_github(three(inconclusive=inconclusive, file="out/score.parquet")))
    file = {"file": "out/score.parquet"}
    assert found == [
        ("error", file | {"title": "none"}, "fail: none: observed 3, wanted = 0, n 200"),
        (
            kind,
            file | {"title": "unsure"},
            "inconclusive: unsure: observed 1.1, 95 % interval 1.05 to 1.3, wanted < 1.2, n 200: "
            "the interval holds 1.2",
        ),
        (
            "notice",
            file | {"title": "memdiag check"},
            f"score.parquet: fail: 1 of 3 rules failed, 1 is inconclusive, which counts as {inconclusive}",
        ),
    ]


def test_the_escapes_are_those_of_githubs_documentation() -> None:
    name = "a%b\r\nc:d,e"
    line, _ = formats.to_github(an_outcome(a_verdict(rule=name, verdict="fail"), file=name)).split("\n")
    assert line == ("::error file=a%25b%0D%0Ac%3Ad%2Ce,title=a%25b%0D%0Ac%3Ad%2Ce::fail: a%25b%0D%0Ac:d,e: observed –")


def test_the_last_annotation_that_is_shown_counts_the_others() -> None:
    fails = [a_verdict(rule=f"f{i}", verdict="fail") for i in range(12)]
    unsure = [a_verdict(rule=f"u{i}", verdict="inconclusive") for i in range(10)]
    found = github_commands(formats.to_github(an_outcome(*fails, *unsure)))
    assert [kind for kind, _, _ in found] == ["error"] * 12 + ["warning"] * 10 + ["notice"]
    assert [message for _, _, message in found if "more" in message] == ["fail: f9: observed – (and 2 more in the log)"]
    both = github_commands(formats.to_github(an_outcome(*fails, *unsure, inconclusive="fail")))
    assert "(and 12 more in the log)" in both[9][2]


@hostile
def test_names_come_back_from_the_commands(name: str) -> None:
    bad = a_verdict(rule=name, sql=name, verdict="fail", note=name)
    (kind, properties, message), notice = github_commands(formats.to_github(an_outcome(bad, file=name, subject=name)))
    seen = verdict_words.visible(name, keep="\r\n")
    assert (kind, properties) == ("error", {"file": seen, "title": seen})
    assert message.startswith(f"fail: {seen}: observed –")
    assert notice[2] == f"{seen}: fail: 1 of 1 rule failed"


def test_a_long_title_is_cut_where_github_would() -> None:
    for name in ("x" * 256, "\x1b" * 250):
        ((_, properties, message), _) = github_commands(
            formats.to_github(an_outcome(a_verdict(rule=name, verdict="fail")))
        )
        assert len(properties["title"]) == 255
        assert properties["title"].endswith("…")
        assert verdict_words.visible(name) in message


# -- any text at all ---------------------------------------------------------------------------------------------------

ANY = st.text(st.characters(), max_size=60) | st.text("`|\\<>@#:%,&;*_~[]()!- \n\r\t\x1b\u202ea1", max_size=30)


@given(ANY, ANY, st.sampled_from(["fail", "inconclusive", "pass"]))
def test_any_name_comes_back_from_every_format(name: str, other: str, verdict: str) -> None:
    bad = a_verdict(rule=name, sql=other, verdict=verdict, note=other)
    table = Table(other, ("a", other), ((name, other),))
    outcome = an_outcome(bad, subject=other, file=other, tables=(table,), notes=(other,))
    found = json.loads(formats.to_json(outcome))
    VALIDATOR.validate(found)
    assert (found["rules"][0]["rule"], list(found["metrics"]), found["notes"]) == (name, [name], [other])
    (case,) = junit_suite(formats.to_junit(outcome))
    assert case.name == in_xml(name)
    commands = github_commands(formats.to_github(outcome))
    assert [command[1]["title"] for command in commands[:-1]] == (
        [] if verdict == "pass" else [verdict_words.visible(name, keep="\r\n")]
    )
    tables, tokens = markdown_tables(markdown.to_markdown(outcome))
    assert words(tables[0][1][1]) == in_cell(name)
    assert [words(cell) for cell in tables[1][1]] == [in_cell(name), in_cell(other)]
    inline = {child.type for token in tokens for child in token.children or []}
    assert inline <= {"text", "text_special", "code_inline", "strong_open", "strong_close"}


@given(ANY)
def test_any_name_fits_in_the_table(name: str) -> None:
    from io import StringIO
    from unittest.mock import patch

    with patch("sys.stdout", StringIO()) as out:
        formats.print_table(an_outcome(a_verdict(rule=name, verdict="fail")), width=300)
    text = out.getvalue()
    assert [c for c in text if not (c.isprintable() or c in "\n\u200c\u200d")] == []
    together = "".join(shown(name).split())
    assert "#" in together or together in "".join(text.split())


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format must be one of table, json, markdown, junit, github, got 'html'"):
        formats.text_of(three(), "html")


@pytest.mark.parametrize("format", TEXTS)
def test_show_prints_each_format(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    formats.show(three(), format)
    assert capsys.readouterr().out == formats.text_of(three(), format) + "\n"
    formats.show(three(), "table")
    assert capsys.readouterr().out.startswith("check score.parquet\n")
    assert set(formats.FORMATS) == {"table", *TEXTS}
