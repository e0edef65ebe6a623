"""What a user copies from examples/ci works: script, rules, both jobs; and `dvc metrics diff` on the JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import junitparser
import pyarrow.parquet as pq
import pytest
import yaml

import memdiag

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "ci"
BIN = Path(sys.executable).parent
SHELLCHECK = shutil.which("shellcheck", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
SCORES = "em_full,extractable,extraction_strength,min_kpp_20"
RULES = ["no text comes out verbatim", "few tokens are known by heart", "no long run at the end is"]
BROKEN = '[[rule]]\nname = "too much"\nsql = "avg(em_full) < 0.001"\nconfidence = 0.95\n'


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, fixtures: Path) -> Path:
    """A folder with new.parquet and base.parquet: two checkpoints of a run on the same texts."""
    folder = tmp_path_factory.mktemp("reports")
    for name, step in (("new", 800), ("base", 400)):
        memdiag.score(
            fixtures / "run" / f"checkpoint-{step}",
            data=fixtures / "texts.jsonl",
            scores=SCORES,
            prefix_tokens=8,
            suffix_tokens=8,
            out=folder / f"{name}.parquet",
        )
    return folder


@pytest.fixture
def repository(tmp_path: Path, reports: Path) -> Path:
    """A user's repository (its path has a space): the example in ci/, two reports beside it."""
    folder = tmp_path / "a repository"
    shutil.copytree(EXAMPLE, folder / "ci")
    for report in reports.glob("*.parquet"):
        shutil.copy(report, folder)
    return folder


def bash(folder: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run lines as both CI systems do: bash that stops at the first error, memdiag on the path, no other settings."""
    known = {name: os.environ[name] for name in ("LANG", "LC_ALL", "TMPDIR") if name in os.environ}
    settings = {
        "PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(folder.parent),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env=known | settings | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def names(file: Path) -> list[str]:
    """The rules of a JUnit file."""
    (suite,) = junitparser.JUnitXml.fromfile(str(file))
    return [case.name for case in suite]


# -- the script --------------------------------------------------------------------------------------------------------


def test_the_gate_opens_and_leaves_what_ci_reads(repository: Path) -> None:
    found = bash(repository, "ci/gate.sh new.parquet")
    assert (found.returncode, found.stderr) == (0, "")
    assert "pass: 0 of 3 rules failed" in found.stdout
    out = repository / "memdiag-gate"
    assert sorted(path.name for path in out.iterdir()) == [
        "check.json",
        "check.md",
        "check.parquet",
        "check.xml",
        "report.html",
    ]
    assert names(out / "check.xml") == RULES
    verdicts = json.loads((out / "check.json").read_text(encoding="utf-8"))
    assert (verdicts["verdict"], [rule["rule"] for rule in verdicts["rules"]]) == ("pass", RULES)
    assert [rule["lo"] is not None for rule in verdicts["rules"]] == [False, True, False]
    assert (out / "check.md").read_text(encoding="utf-8").startswith("### memdiag check of `new.parquet`\n")
    assert pq.read_table(out / "check.parquet").column("verdict").to_pylist() == ["pass"] * 3


def test_two_reports_are_compared(repository: Path) -> None:
    found = bash(repository, "ci/gate.sh new.parquet base.parquet")
    assert found.returncode == 0, found.stderr
    out = repository / "memdiag-gate"
    verdicts = json.loads((out / "diff.json").read_text(encoding="utf-8"))
    assert (verdicts["command"], len(verdicts["rules"])) == ("diff", 1)
    (rule,) = verdicts["rules"]
    means = [
        pq.read_table(repository / f"{name}.parquet").column("em_full").to_numpy().mean() for name in ("new", "base")
    ]
    assert rule["observed"] == pytest.approx(means[0] - means[1], rel=1e-5)
    assert rule["n"] == 20
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    shown = ("new.parquet", "check.parquet", "diff/columns.parquet", "diff/movers.parquet", "diff/rules.parquet")
    assert [name for name in shown if name.split("/")[-1] not in page] == []


def test_a_broken_rule_closes_the_gate_and_leaves_the_same_files(repository: Path) -> None:
    (repository / "ci" / "rules.toml").write_text(BROKEN, encoding="utf-8")
    found = bash(repository, "ci/gate.sh new.parquet", OUT="other place")
    assert found.returncode == 1
    out = repository / "other place"
    assert not (repository / "other").exists()
    (suite,) = junitparser.JUnitXml.fromfile(str(out / "check.xml"))
    assert (suite.tests, suite.failures) == (1, 1)
    assert "**fail: 1 of 1 rule failed**" in (out / "check.md").read_text(encoding="utf-8")
    assert (out / "report.html").exists()


def test_a_change_beyond_what_is_allowed_closes_the_gate(repository: Path) -> None:
    found = bash(repository, "ci/gate.sh new.parquet base.parquet", CHANGE="min_kpp_20: -0.01")
    assert found.returncode == 1
    assert json.loads((repository / "memdiag-gate" / "check.json").read_text(encoding="utf-8"))["verdict"] == "pass"
    assert json.loads((repository / "memdiag-gate" / "diff.json").read_text(encoding="utf-8"))["verdict"] == "fail"


def test_what_cannot_be_judged_is_neither_pass_nor_fail(repository: Path) -> None:
    (repository / "ci" / "rules.toml").write_text('[[rule]]\nsql = "avg(em_ful) < 1"\n', encoding="utf-8")
    typo = bash(repository, "ci/gate.sh new.parquet")
    assert typo.returncode == 2
    assert "em_full" in typo.stderr
    assert bash(repository, "ci/gate.sh no.parquet").returncode == 2
    usage = bash(repository, "ci/gate.sh")
    assert (usage.returncode, usage.stderr) == (2, "usage: gate.sh NEW [BASE]\n")


@pytest.mark.slow
def test_a_checkpoint_is_measured_first(repository: Path, fixtures: Path) -> None:
    found = bash(
        repository,
        f"ci/gate.sh '{fixtures}/run/checkpoint-800'",
        DATA=str(fixtures / "texts.jsonl"),
        MEMDIAG_SCORE_PREFIX_TOKENS="8",
        MEMDIAG_SCORE_SUFFIX_TOKENS="8",
        MEMDIAG_SCORE_SCORES=SCORES,
    )
    assert found.returncode == 0, found.stderr
    measured = pq.read_table(repository / "memdiag-gate" / "new.parquet")
    assert measured.equals(pq.read_table(repository / "new.parquet"))
    assert bash(repository, f"ci/gate.sh '{fixtures}/broken/no-weights'").returncode == 2


def test_what_an_earlier_run_left_does_not_pass_for_this_one(repository: Path) -> None:
    assert bash(repository, "ci/gate.sh new.parquet base.parquet").returncode == 0
    gate = repository / "memdiag-gate"
    assert (gate / "diff.xml").exists()
    (repository / "ci" / "rules.toml").write_text("[[rule]]\nsql = 'nothing'\n", encoding="utf-8")
    assert bash(repository, "ci/gate.sh new.parquet base.parquet").returncode == 2
    left = {path.name for path in gate.iterdir()}
    assert not left & {"check.xml", "check.md", "check.parquet", "diff.xml", "diff", "report.html"}, left


def test_a_page_that_fails_does_not_change_the_verdict(repository: Path) -> None:
    (repository / "memdiag-gate" / "report.html").mkdir(parents=True)
    found = bash(repository, "ci/gate.sh new.parquet")
    assert found.returncode == 0
    assert found.stderr.endswith("gate: no page\n")


def test_on_github_the_log_holds_commands_and_the_summary_the_table(repository: Path) -> None:
    (repository / "ci" / "rules.toml").write_text(BROKEN, encoding="utf-8")
    summary = repository / "summary.md"
    found = bash(
        repository, "ci/gate.sh new.parquet", GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(summary), FORMAT="table"
    )
    assert found.returncode == 1
    assert [line.split(" ")[0] for line in found.stdout.splitlines()[:2]] == ["::error", "::notice"]
    text = summary.read_text(encoding="utf-8")
    assert text.count("### memdiag check") == 1  # not once per format
    assert text.strip() == (repository / "memdiag-gate" / "check.md").read_text(encoding="utf-8").strip()


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing() -> None:
    found = subprocess.run([str(SHELLCHECK), EXAMPLE / "gate.sh"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_script_can_be_started() -> None:
    assert os.access(EXAMPLE / "gate.sh", os.X_OK)
    assert (EXAMPLE / "gate.sh").read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")


# -- the jobs ----------------------------------------------------------------------------------------------------------


def job(file: str) -> dict[str, Any]:
    """The only job of a file."""
    found = yaml.safe_load((EXAMPLE / file).read_text(encoding="utf-8"))
    ((_, only),) = found.get("jobs", found).items()
    return only


@pytest.mark.slow
def test_the_github_job_gates(repository: Path) -> None:
    steps = job("github-actions.yml")["steps"]
    assert [step["name"] for step in steps] == ["checkout", "setup", "install", "gate", "page"]
    assert [step["name"] for step in steps if "run" in step] == ["install", "gate"]
    assert steps[2]["run"] == "pip install -c memdiag/constraints.txt ./memdiag"
    (gate,) = (step["run"] for step in steps if "run" in step and step["name"] != "install")
    assert bash(repository, gate, GITHUB_ACTIONS="true").returncode == 0
    (repository / "ci" / "rules.toml").write_text(BROKEN, encoding="utf-8")
    assert bash(repository, gate, GITHUB_ACTIONS="true").returncode == 1
    assert (repository / steps[4]["with"]["path"] / "report.html").exists()
    assert steps[4]["if"] == "always()"


def test_the_github_workflow_asks_for_few_rights() -> None:
    workflow = yaml.safe_load((EXAMPLE / "github-actions.yml").read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow[True] == "pull_request"  # YAML 1.1 reads the key `on` so


@pytest.mark.slow
def test_the_gitlab_job_fails_and_shows_why(repository: Path) -> None:
    found = job("gitlab-ci.yml")
    assert found["before_script"] == ["pip install -c memdiag/constraints.txt ./memdiag"]
    script = "\n".join(found["script"])
    (repository / "ci" / "rules.toml").write_text(BROKEN, encoding="utf-8")
    assert bash(repository, script, GITLAB_CI="true").returncode == 1
    artifacts = found["artifacts"]
    shown = sorted(repository.glob(artifacts["reports"]["junit"]))
    assert [path.name for path in shown] == ["check.xml", "diff.xml"]
    assert [names(path)[0] for path in shown] == ["too much", "em_full: +0.05"]
    assert (artifacts["when"], artifacts["paths"]) == ("always", ["memdiag-gate/"])


# -- DVC ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (BIN / "dvc").exists(), reason="needs dvc")
def test_dvc_shows_how_the_figures_changed(repository: Path) -> None:
    settings = {"DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    settings |= {f"GIT_{who}_{what}": "someone" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    check = "memdiag check {}.parquet --rules ci/rules.toml --format json --quiet > check.json"
    lines = [
        "git init --quiet && dvc init --quiet",
        check.format("base"),
        "git add check.json && git commit --quiet --message base",
        check.format("new"),
        "git add check.json && git commit --quiet --message new",
        "dvc metrics diff HEAD~1 HEAD --targets check.json --json",
    ]
    found = bash(repository, "\n".join(lines), **settings)
    assert found.returncode == 0, found.stderr
    changed = json.loads(found.stdout.splitlines()[-1])["check.json"]
    key = "metrics.few tokens are known by heart"
    assert changed[key]["old"] == pytest.approx(0.0757877, abs=0.003)
    assert changed[key]["new"] == pytest.approx(0.0668601, abs=0.003)
    assert changed[key]["diff"] == pytest.approx(changed[key]["new"] - changed[key]["old"])
    assert "metrics.no text comes out verbatim" not in changed  # 0 both times
