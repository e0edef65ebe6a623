"""`memdiag check`: what it writes and prints, its exit codes, and every kind of report."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reports import write_columns, write_kind
from test_cli import memdiag_ as memdiag_  # a fixture
from test_cli import one_line, process

import memdiag
from memdiag import tables
from memdiag.check_report import CheckRow
from memdiag.errors import InputError
from memdiag.report_kinds import ROWS, row_of


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    loss = rng.gamma(2.0, size=200)
    path = write_columns(tmp_path / "score.parquet", {"example_id": [str(i) for i in range(200)], "loss": loss})
    return path.relative_to(tmp_path)


# -- exit codes ----------------------------------------------------------------------------------------------------


def test_exit_0_if_all_pass_and_1_if_one_fails(memdiag_, report):
    done = memdiag_("check", report, "--rule", "avg(loss) > 1", "--rule", "count(*) = 200")
    assert (done.code, done.out, done.err) == (0, "check.parquet\n", "")
    done = memdiag_("check", report, "--rule", "avg(loss) > 1", "--rule", "few: count(*) < 100")
    assert (done.code, done.out) == (1, "check.parquet\n")
    assert done.err == "memdiag: fail: few: observed 200, wanted < 100, n 200\n"
    assert memdiag_("check", report, "--rule", "count(*) < 100", "--quiet") == (1, "check.parquet\n", "")


def test_exit_1_leaves_a_process_as_it_does_this_one(report):
    done = process("check", report, "-r", "count(*) < 100", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (1, "check.parquet\n", "")


def test_nobody_reading_a_failed_check_is_still_a_failed_check(report):
    """`memdiag check ... | head` in a script with pipefail: a closed stdout is no reason to pass."""
    read, write = os.pipe()
    os.close(read)
    done = process("check", report, "-r", "count(*) < 100", "--show", stdout=write)
    os.close(write)
    assert done.returncode == 1


def test_inconclusive_passes_with_a_warning_unless_it_shall_fail(memdiag_, report):
    about = ("check", report, "--rule", "avg(loss) < 2", "--confidence", 0.95)
    done = memdiag_(*about)
    assert done.code == 0
    assert done.err.startswith("memdiag: inconclusive: avg(loss) < 2: observed ")
    assert "95 % interval" in done.err
    assert memdiag_(*about, "--inconclusive", "fail").code == 1
    assert tables.read("check.parquet").meta["passed"] is False
    done = memdiag_(*about, "--inconclusive", "maybe")
    assert one_line(done) == "memdiag: --inconclusive 'maybe': it counts as pass or fail"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "there is no rule; give --rule"),
        (["-r", "avg(los) > 1"], "no column 'los'; there are example_id, loss; did you mean 'loss'?"),
        (["-r", "loss > 1"], "is about one row"),
        (["-r", "1 = 1", "--where", "x > 1"], "no column 'x'"),
        (["-r", "1 = 1", "--confidence", "95"], "--confidence 95.0 is no probability"),
        (["-r", "1 = 1", "--format", "xml"], "no format 'xml'; there are github, json, junit, markdown, table"),
        (["-r", "1 = 1", "--format", "junit", "--json"], "--json and --format junit are two"),
        (["-r", "1 = 1", "--rules", "none.toml"], "--rules none.toml: No such file"),
        (["-r", "1 = 1", "--time-limit", "0"], "--time-limit 0 is no time"),
        (["-r", "1 = 1", "--memory-limit", "much"], "--memory-limit 'much' is no size"),
        (["-r", "1 = 1", "--seed", "-1"], "--seed -1 is negative"),
        (["-r", "1 = 1", "--out", "."], "is a directory"),
        (["-r", "(SELECT count(*) FROM read_csv('/etc/passwd')) > 0"], "SQL here reaches no files"),
        (
            ["-r", "(SELECT count(*) FROM range(10000000) a, range(10000000) b) > 0", "--time-limit", "0.2"],
            "took longer",
        ),
    ],
)
def test_wrong_use_is_one_line_and_exit_2_and_writes_nothing(memdiag_, report, args, says):
    assert says in one_line(memdiag_("check", report, *args))
    assert not Path("check.parquet").exists()


# -- reports that are not fit --------------------------------------------------------------------------------------


def test_a_partial_report_is_refused_unless_allowed(memdiag_, report):
    write_columns(Path("part.parquet"), {"loss": [1.0, 2.0]}, partial=True)
    about = ("check", "part.parquet", "-r", "avg(loss) > 1")
    line = one_line(memdiag_(*about))
    assert line == "memdiag: part.parquet is partial: its run has not finished; let it finish, or give --allow-partial"
    done = memdiag_(*about, "--allow-partial")
    assert done.code == 0
    assert done.err == "memdiag: the report is partial: the run that made it has not finished\n"


def test_another_version_is_refused_unless_allowed(memdiag_, report):
    write_columns(Path("old.parquet"), {"loss": [1.0, 2.0]})
    table = pq.read_table("old.parquet")
    meta = json.loads(table.schema.metadata[b"memdiag"]) | {"schema_version": 99}
    pq.write_table(table.replace_schema_metadata({b"memdiag": json.dumps(meta).encode()}), "new.parquet")
    about = ("check", "new.parquet", "-r", "avg(loss) > 1")
    assert "has schema_version 99 of report 'score', and this version writes" in one_line(memdiag_(*about))
    assert memdiag_(*about, "--any-version").code == 0
    meta["report"] = "dream"
    pq.write_table(table.replace_schema_metadata({b"memdiag": json.dumps(meta).encode()}), "new.parquet")
    assert "is a report 'dream' that this version does not know" in one_line(memdiag_(*about))
    assert memdiag_(*about, "--any-version").code == 0


def test_what_is_no_report_is_one_line(memdiag_, report):
    Path("empty.parquet").write_bytes(b"")
    Path("half.parquet").write_bytes(report.read_bytes()[:300])
    pq.write_table(pa.table({"loss": [1.0]}), "foreign.parquet")
    for name, says in [
        ("none.parquet", "no such report"),
        ("empty.parquet", "is not a Parquet file"),
        ("half.parquet", "is not a Parquet file"),
        ("foreign.parquet", "is Parquet but no report of memdiag"),
        (".", "is not a Parquet file"),
    ]:
        assert says in one_line(memdiag_("check", name, "-r", "avg(loss) > 1"))


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("nulls", [False, True])
def test_every_kind_of_report_can_be_checked(tmp_path, kind, nulls):
    path = write_kind(tmp_path / "r.parquet", kind, nulls=nulls)
    schema = tables.schema_of(row_of(kind))
    rules = ["rows: count(*) = 6"]
    for field in schema:
        rules.append(f'{field.name}: count("{field.name}") = {0 if nulls and field.nullable else 6}')
        if pa.types.is_floating(field.type):
            rules.append(f'mean of {field.name}: avg("{field.name}") BETWEEN -9 AND 9')
    found = memdiag.check(path, *rules, confidence=0.95)
    for verdict in found.outcome.verdicts:
        undefined = (
            nulls
            and verdict.rule.startswith("mean of ")
            and schema.field(verdict.rule.removeprefix("mean of ")).nullable
        )
        assert verdict.verdict == ("fail" if undefined else "pass"), verdict
    empty = memdiag.check(write_kind(tmp_path / "empty.parquet", kind, 0), "count(*) = 0")
    assert empty.passed
    assert empty.outcome.notes == ("the report has no rows",)


# -- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        # one call of a function, which DuckDB does not interrupt
        ("levenshtein(repeat('a', 300000), repeat('b', 300000)) > 0", "took longer than 0.3 s; make it simpler"),
        # memory that DuckDB does not count
        ("len(range(600000000)) > 0", "takes more memory than it may"),
        ("length(repeat('x', 3000000000)) > 0", "takes more memory than it may"),
    ],
)
def test_a_rule_is_held_to_its_limits_by_the_process(report, monkeypatch, rule, says):
    place = report.absolute().parent / "temporary"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    done = process("check", report, "-r", rule, "--time-limit", "0.3", "--memory-limit", "200MB", timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("memdiag: rule ")
    assert says in line
    assert list(place.iterdir()) == []
    assert not Path("check.parquet").exists()


def test_the_limits_of_this_process_are_put_back(memdiag_, report):
    before = resource.getrlimit(resource.RLIMIT_AS)
    memdiag_("check", report, "-r", "avg(loss) > 1")
    assert resource.getrlimit(resource.RLIMIT_AS) == before


# -- what is written -----------------------------------------------------------------------------------------------


def test_the_report_of_a_check(memdiag_, report):
    memdiag_("check", report, "-r", "mean: avg(loss) < 1", "-r", "count(*) = 200", "--confidence", 0.9, "--seed", 4)
    found = memdiag.read("check.parquet")
    assert found.table.schema.remove_metadata() == tables.schema_of(CheckRow).remove_metadata()
    first, second = found.table.to_pylist()
    assert (first["condition"], second["condition"]) == (None, None)
    assert (first["rule"], first["sql"], first["verdict"], first["limit"]) == ("mean", "avg(loss) < 1", "fail", 1.0)
    assert first["lo"] < first["observed"] < first["hi"]
    assert (first["n"], first["confidence"], first["method"], first["comparison"]) == (200, 0.9, "bootstrap-t", "<")
    assert (second["rule"], second["verdict"], second["lo"], second["confidence"]) == (
        "count(*) = 200",
        "pass",
        None,
        None,
    )
    assert found.meta["of"] == {"report": "score", "schema_version": row_of("score").schema_version, "rows": 200}
    assert found.meta["options"]["rules"][0]["sql"] == "avg(loss) < 1"
    assert found.meta["passed"] is False


def test_the_same_check_gives_the_same_bytes(memdiag_, report):
    about = ("check", report, "-r", "avg(loss) < 2", "--confidence", 0.95)
    memdiag_(*about)
    first = Path("check.parquet").read_bytes()
    memdiag_(*about)
    assert Path("check.parquet").read_bytes() == first
    memdiag_(*about, "--seed", 1)  # a check takes the place of an earlier one
    assert Path("check.parquet").read_bytes() != first


def test_nothing_else_is_written_over(memdiag_, report):
    before = report.read_bytes()
    about = ("check", report, "-r", "avg(loss) < 2", "--out")
    assert one_line(memdiag_(*about, report)).endswith("is what is to be read; choose another --out")
    assert one_line(memdiag_(*about, report, "--force")).endswith("is what is to be read; choose another --out")
    write_kind(Path("other.parquet"), "score")
    assert one_line(memdiag_(*about, "other.parquet")).endswith("is a report 'score'; --force or another --out")
    Path("notes.txt").write_text("mine")
    assert one_line(memdiag_(*about, "notes.txt")).endswith("is no report of memdiag; --force or another --out")
    assert (report.read_bytes(), Path("notes.txt").read_text()) == (before, "mine")
    assert memdiag_(*about, "notes.txt", "--force").code == 0
    assert tables.read(Path("notes.txt")).meta["report"] == "check"


def test_every_format_of_one_check(memdiag_, report, monkeypatch, tmp_path):
    about = ("check", report, "-r", "small: avg(loss) < 1", "-r", "count(*) = 200")
    assert json.loads(memdiag_(*about, "--json").out)["verdict"] == "fail"
    assert memdiag_(*about, "--format", "json").out == memdiag_(*about, "--json").out
    for format, says in [
        ("table", "small"),
        ("markdown", "| "),
        ("junit", "<testsuites"),
        ("github", "::error file=score"),
    ]:
        done = memdiag_(*about, "--format", format)
        assert (done.code, says in done.out) == (1, True), format
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    memdiag_(*about, "--format", "table")
    assert not summary.exists()  # only for who asks for GitHub's format
    memdiag_(*about, "--format", "github")
    assert "small" in summary.read_text()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "such"))
    done = memdiag_(*about, "--format", "github")
    assert (done.code, "summary" in done.err.lower()) == (1, True)


def test_rules_of_a_file_on_the_command_line(memdiag_, report):
    Path("rules.toml").write_text('[[rule]]\nname = "a"\nsql = "avg(loss) > 1"\n[[rule]]\nsql = "max(loss) < 3"\n')
    done = memdiag_("check", report, "--rules", "rules.toml", "--json")
    assert [rule["rule"] for rule in json.loads(done.out)["rules"]] == ["a", "max(loss) < 3"]
    assert done.code == 1
    done = memdiag_("check", report, "--rules", "rules.toml", "--where", "loss < 3", "--json")
    assert done.code == 0
    assert memdiag.read("check.parquet").table["condition"].to_pylist() == ["loss < 3"] * 2


def test_a_check_of_a_check_does_not_replace_it(memdiag_, report):
    memdiag_("check", report, "-r", "avg(loss) < 9")
    before = Path("check.parquet").read_bytes()
    assert "is what is to be read" in one_line(memdiag_("check", "check.parquet", "-r", "bool_and(verdict = 'pass')"))
    assert Path("check.parquet").read_bytes() == before
    assert memdiag_("check", "check.parquet", "-r", "bool_and(verdict = 'pass')", "--out", "second.parquet").code == 0


def test_a_noise_floor_that_the_report_states_is_in_the_interval(memdiag_, report):
    columns = {"memorization": np.random.default_rng(0).beta(2, 5, size=400)}
    write_columns(Path("plain.parquet"), columns, kind="counterfactual")
    write_columns(Path("noisy.parquet"), columns, kind="counterfactual", noise_floor={"memorization": 0.1})
    for name, verdict in (("plain", "pass"), ("noisy", "inconclusive")):
        found = memdiag.check(f"{name}.parquet", "avg(memorization) < 0.35", confidence=0.95)
        assert found.outcome.verdicts[0].verdict == verdict


def test_where_no_row_is_left(memdiag_, report):
    done = memdiag_("check", report, "-r", "count(*) = 0", "--where", "loss < 0")
    assert (done.code, done.err) == (0, "memdiag: no row is left of rule 'count(*) = 0'\n")


def test_rerun_says_the_same(memdiag_, report):
    memdiag_("check", report, "-r", "m: avg(loss) < 2", "--confidence", 0.95, "--where", "loss > 0.1")
    done = memdiag_("rerun", "check.parquet")
    assert done == (0, "check.rerun.parquet\nthe same rows\n", "")
    write_kind(Path("strange.parquet"), "check")
    assert "does not say how it was made" in one_line(memdiag_("rerun", "strange.parquet"))


# -- Python --------------------------------------------------------------------------------------------------------


def test_from_python(report):
    found = memdiag.check(report, "m: avg(loss) < 1", "count(*) = 200")
    assert (found.passed, found.path) == (False, None)
    assert found.report.to_pandas()["verdict"].tolist() == ["fail", "pass"]
    assert not Path("check.parquet").exists()
    assert memdiag.check(report, "avg(loss) < 9", out="c.parquet").path == Path("c.parquet")
    with pytest.raises(InputError, match=r"no option 'inconclusiv'; .* did you mean 'inconclusive'"):
        memdiag.check(report, "1 = 1", inconclusiv="fail")


def test_check_starts_without_what_is_slow(report):
    code = (
        "import sys\n"
        "from memdiag.cli import run\n"
        "args = ['check', 'score.parquet', '-r', 'avg(loss) < 9', '--confidence', '0.95', '-q']\n"
        "try:\n    run(args)\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "slow = {'torch', 'transformers', 'pandas', 'matplotlib', 'scipy.stats', 'jinja2', 'rich'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
