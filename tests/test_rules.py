"""Rules as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from memdiag.errors import InputError
from memdiag.rules import Change, Rule, changes_in, confidence_of, gathered, gathered_changes, rule_of, rules_in


@pytest.mark.parametrize(
    ("text", "name", "sql"),
    [
        ("avg(mbe) < 1.2", None, "avg(mbe) < 1.2"),
        ("  avg(mbe) < 1.2 ", None, "avg(mbe) < 1.2"),
        ("compressed: avg(mbe) < 1.2", "compressed", "avg(mbe) < 1.2"),
        ("layer 3, say", None, "layer 3, say"),
        ("no extraction (greedy): x", None, "no extraction (greedy): x"),
        ("v1.2 of a-b: count(*) > 0", "v1.2 of a-b", "count(*) > 0"),
        ("x::INT = 1", None, "x::INT = 1"),  # a cast names nothing
        ("avg(x::INT) < 1", None, "avg(x::INT) < 1"),
        ("x:\\n  count(*) > 0".replace("\\n", "\n"), "x", "count(*) > 0"),
        ("{a: 1}.a = 1", None, "{a: 1}.a = 1"),
    ],
)
def test_a_rule_may_have_a_name(text, name, sql):
    rule = rule_of(text)
    assert (rule.name, rule.sql) == (name, sql)
    assert rule.title == (name or sql)


def test_a_file_of_rules(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text(
        'confidence = 0.9\nwhere = "layer > 0"\n'
        '[[rule]]\nname = "a"\nsql = "avg(x) < 1"\n'
        '[[rule]]\nsql = "avg(x) < 2"\nwhere = "layer = 3"\nconfidence = 0.99\n'
    )
    assert rules_in(file) == [
        Rule("avg(x) < 1", "a", "layer > 0", 0.9, False),
        Rule("avg(x) < 2", None, "layer = 3", 0.99, True),
    ]
    # what the file says goes before what the command line says for all
    assert gathered(["max(x) < 3"], file, where="w", confidence=0.5)[0] == Rule("max(x) < 3", None, "w", 0.5)
    assert gathered([], file, where="w", confidence=0.5)[0].where == "layer > 0"


def test_the_command_line_stands_for_what_a_file_leaves_out(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text('[[rule]]\nsql = "avg(x) < 1"\n')
    assert rules_in(file, where="w", confidence=0.5) == [Rule("avg(x) < 1", None, "w", 0.5, False)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[rule]\n", "is no TOML"),
        ("", "has no rule"),
        ("rule = 3", "has no rule"),
        ("rule = [3]", "has no rule"),
        ("rule = []", "has no rule"),
        ("[[rule]]\nname = 'a'", "rule 1 has no sql"),
        ("[[rule]]\nsql = ''", "rule 1 has no sql"),
        ("[[rule]]\nsql = 3", "sql = 3 must be text"),
        ("[[rule]]\nsql = 'a'\nnam = 'b'", "rule 1: no key 'nam'; .* did you mean 'name'"),
        ("[[rules]]\nsql = 'a'", "no key 'rules'; .* did you mean 'rule'"),
        ("confidence = 1.5\n[[rule]]\nsql = 'a'", "confidence 1.5 is no probability"),
        ("[[rule]]\nsql = 'a'\nconfidence = true", "confidence True is no probability"),
        ("[[rule]]\nsql = 'a'\nconfidence = 'x'", "confidence 'x' is no probability"),
        ("[[rule]]\nsql = 'a'\nwhere = 3", "where = 3 must be text"),
        ("a = " + "[" * 5000, "is no TOML"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, says):
    file = tmp_path / "rules.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        rules_in(file)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        rules_in(tmp_path / "none.toml")
    with pytest.raises(InputError, match="Is a directory"):
        rules_in(tmp_path)
    with pytest.raises(InputError, match="/dev/zero is no regular file; give a TOML file"):
        rules_in(Path("/dev/zero"))
    (tmp_path / "long.toml").write_text("#" * 1_000_001)
    with pytest.raises(InputError, match="is longer than 1,000,000 bytes"):
        rules_in(tmp_path / "long.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is no TOML"):
        rules_in(tmp_path / "binary.toml")


def test_there_must_be_a_rule_and_no_two_of_one_name(tmp_path):
    with pytest.raises(InputError, match="there is no rule; give --rule"):
        gathered([], None)
    with pytest.raises(InputError, match="two rules have the name 'a'"):
        gathered(["a: count(*) > 1", "a: count(*) > 2"], None)
    assert len(gathered(["count(*) > 1", "count(*) > 1"], None)) == 2  # without names they are what they say
    with pytest.raises(InputError, match="1,001 rules are more than"):
        gathered(["count(*) > 1"] * 1001, None)


@pytest.mark.parametrize("value", [0, 1, -0.5, 95, float("nan"), float("inf"), "0.95", True])
def test_a_confidence_is_between_0_and_1(value):
    with pytest.raises(InputError, match="is no probability"):
        confidence_of(value)
    assert confidence_of(0.95) == 0.95
    assert confidence_of(None) is None


@pytest.mark.parametrize(
    ("text", "least", "most", "written"),
    [
        ("memorization: +0.01", None, 0.01, "memorization: +0.01"),
        ("memorization: -0.01", -0.01, None, "memorization: -0.01"),
        ("memorization: ±.5", -0.5, 0.5, "memorization: ±0.5"),
        ("memorization: +-1e-3", -0.001, 0.001, "memorization: ±0.001"),
        ("memorization: +/- 2.", -2.0, 2.0, "memorization: ±2"),
        ("memorization: + 0", None, 0.0, "memorization: +0"),
        ("memorization: -0", 0.0, None, "memorization: -0"),
    ],
)
def test_how_far_a_column_may_move(text, least, most, written):
    (change,) = gathered_changes([text], None)
    assert change == Change("memorization", least, most)
    assert change.sql == change.title == written
    assert str(change.least) != "-0.0"
    assert gathered_changes([written], None) == (change,)


@pytest.mark.parametrize("text", ["a: +x", "+0.01", "a: avg(x) < 1", "avg(x) < 1"])
def test_all_else_is_sql(text):
    (rule,) = gathered_changes([text], None)
    assert isinstance(rule, Rule)


@pytest.mark.parametrize(
    "text", ["memorization: 0.01", "memorization: +1%", "memorization: +1e999", "memorization: +nan"]
)
def test_a_number_alone_does_not_say_which_way(text):
    with pytest.raises(InputError, match=r"does not say which way; give memorization: \+0.01, -0.01 or ±0.01"):
        gathered_changes([text], None)


def test_a_file_of_changes(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text(
        '[[rule]]\ncolumn = "loss"\nallow = "+0.01"\nname = "a"\n[[rule]]\nsql = "avg(new.loss) < avg(base.loss)"\n'
    )
    assert gathered_changes(["loss: -1"], file) == (
        Change("loss", -1.0, None), Change("loss", None, 0.01, "a"), Rule("avg(new.loss) < avg(base.loss)")
    )  # fmt: skip
    assert gathered_changes([], None) == ()
    for text in (
        'column = "loss"', 'allow = "+1"', 'column = "loss"\nallow = "1"', 'column = "loss"\nallow = "+1"\nsql = "x"'
    ):  # fmt: skip
        file.write_text("[[rule]]\n" + text)
        with pytest.raises(InputError, match='rule 1 needs column = "loss" and allow'):
            changes_in(file)
    file.write_text('[[rule]]\nsql = "x"\nwhere = "y"')
    with pytest.raises(InputError, match="no key 'where'"):
        changes_in(file)
