"""The commands that judge: `check` and `diff`. Exit code 1 is theirs."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from memdiag.cli import options as o
from memdiag.cli.measure import begin

if TYPE_CHECKING:
    from memdiag.verdicts import Outcome

FORMATS = ("table", "json", "markdown", "junit", "github")  # those of verdict_formats, which help does not wait for

Rules = Annotated[
    list[str] | None,
    o.option("--rule", "-r", metavar="SQL | NAME: SQL", help="What must hold of all rows. As often as you like."),
]
RulesFile = Annotated[Path | None, o.option("--rules", metavar="FILE.toml", help="A file of rules, [[rule]] sql = ….")]
Inconclusive = Annotated[str, o.option(help="What an inconclusive rule counts as: pass (with a warning) or fail.")]
Format = Annotated[str | None, o.option("--format", help=f"What stdout gets: {', '.join(FORMATS)}.")]
AllowPartial = Annotated[
    bool, o.option("--allow-partial", help="Also a report whose run has not finished (else exit 2).")
]
AnyVersion = Annotated[bool, o.option("--any-version", help="Also a report of another schema_version (else exit 2).")]
TimeLimit = Annotated[float, o.option(help="Seconds that one rule may take.")]
Force = Annotated[bool, o.option("--force", help="Replace what stands at --out, whatever it is.")]
AsJson = Annotated[bool, o.option("--json", help="The same as --format json.")]
Quiet = Annotated[bool, o.option("--quiet", "-q", help="No notes on stderr; and stdout is the path, but for --format.")]
MemoryLimit = Annotated[str, o.option(help="Memory that rules may take; beyond it temporary files.")]


def check(
    report: Annotated[Path, o.argument(metavar="REPORT", help="A report of memdiag.")],
    rule: Rules = None,
    rules: RulesFile = None,
    where: Annotated[str | None, o.option(metavar="SQL", help="Only rows that meet this condition count.")] = None,
    confidence: Annotated[
        float | None, o.option(help="A mean or rate must hold with its whole interval, e.g. 0.95.")
    ] = None,
    inconclusive: Inconclusive = "pass",
    format: Format = None,
    out: o.Out = Path("check.parquet"),
    allow_partial: AllowPartial = False,
    any_version: AnyVersion = False,
    time_limit: TimeLimit = 60.0,
    memory_limit: MemoryLimit = "4GB",
    seed: o.Seed = 0,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    show: o.Show = False,
) -> int:
    """Does a report keep the rules? Exit 0 if all pass, 1 if one fails; for CI.

    A rule is a boolean SQL expression over the columns of the report, run by DuckDB without access to anything else.

    Example: memdiag check entropy.parquet --rule "avg(mbe) > 1" --rule "min(mbe) > 0.2"

    Example: memdiag check score.parquet --rules rules.toml --confidence 0.95 --format github
    """
    begin(online=False, quiet=quiet)
    check_format(format, as_json=as_json)
    from memdiag import check_report
    from memdiag.rules import gathered

    settings = check_report.CheckOptions(
        gathered(rule or (), rules, where=where, confidence=confidence),
        inconclusive=inconclusive,
        allow_partial=allow_partial,
        any_version=any_version,
        time_limit=time_limit,
        memory_limit=memory_limit,
        seed=seed,
    )
    found = check_report.measure(report, settings, out=out, force=force, own_process=True)
    return tell(found.outcome, format=format, as_json=as_json, quiet=quiet, show=show)


def check_format(format: str | None, *, as_json: bool) -> None:
    """Refuse a format that does not exist, or two at once."""
    from memdiag.errors import InputError, unknown

    if format is not None and format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if as_json and format not in (None, "json"):
        raise InputError(f"--json and --format {format} are two; give one of them")


def tell(outcome: Outcome, *, format: str | None, as_json: bool, quiet: bool, show: bool) -> int:
    """Print what was found in the wanted form, and what did not pass on stderr; returns the exit code."""
    from memdiag import verdict_formats, verdict_words

    chosen = "json" if as_json else format
    if chosen is None and (sys.stdout.isatty() or show) and not quiet:
        chosen = "table"
    try:
        if chosen is None:
            print(outcome.report)
        else:
            verdict_formats.show(outcome, chosen)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # nobody reads it (rich: SystemExit), which is no reason to pass
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    log = logging.getLogger("memdiag")
    if chosen != "table":
        for verdict in outcome.verdicts:
            if verdict.verdict != "pass":
                name = verdict_words.plain(verdict.rule, verdict_formats.MOST_CELL)
                log.info("%s: %s: %s", verdict.verdict, name, verdict_words.figures(verdict))
        for note in outcome.notes:
            log.info("%s", verdict_words.plain(note, verdict_formats.MOST_NAME))
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if chosen == "github" and summary and (failure := verdict_formats.append_summary(outcome, summary)):
        log.warning("%s", failure)
    return 1 if outcome.failed else 0


def diff(
    base: Annotated[Path, o.argument(metavar="BASE", help="The report before.")],
    new: Annotated[Path, o.argument(metavar="NEW", help="The report after.")],
    rule: Annotated[
        list[str] | None,
        o.option(
            "--rule",
            "-r",
            metavar="COLUMN: ±X | SQL",
            help="How far a mean may move, e.g. 'loss: +0.01'; or SQL over pairs of rows, base.x and new.x.",
        ),
    ] = None,
    rules: Annotated[
        Path | None, o.option("--rules", metavar="FILE.toml", help="A file of rules, [[rule]] column, allow; or sql.")
    ] = None,
    on: Annotated[
        str | None, o.option(metavar="COLUMN,...", help="Pair rows by these columns. Default: the key of the report.")
    ] = None,
    confidence: Annotated[float, o.option(help="Of intervals and verdicts.")] = 0.95,
    top: Annotated[int, o.option(help="Rows told of each column that moved most.")] = 10,
    anyway: Annotated[
        bool, o.option("--anyway", help="Compare reports of different data or options, and say so.")
    ] = False,
    inconclusive: Inconclusive = "pass",
    format: Format = None,
    out: o.OutDirectory = Path("diff"),
    allow_partial: AllowPartial = False,
    any_version: AnyVersion = False,
    time_limit: TimeLimit = 60.0,
    memory_limit: MemoryLimit = "4GB",
    seed: o.Seed = 0,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    show: o.Show = False,
) -> int:
    """What changed from one report to another? Rows are paired by the report's key. Exit 1 if a rule fails; for CI.

    Several rules are judged together (Benjamini and Hochberg).

    Example: memdiag diff base.parquet new.parquet --rule "memorization: +0.01"
    """
    begin(online=False, quiet=quiet)
    check_format(format, as_json=as_json)
    from memdiag import diff_report
    from memdiag.rules import gathered_changes

    settings = diff_report.DiffOptions(
        rules=gathered_changes(rule or (), rules),
        on=on,
        confidence=confidence,
        top=top,
        inconclusive=inconclusive,
        anyway=anyway,
        allow_partial=allow_partial,
        any_version=any_version,
        time_limit=time_limit,
        memory_limit=memory_limit,
        seed=seed,
    )
    found = diff_report.measure(base, new, settings, out=out, force=force, own_process=True)
    return tell(found.outcome, format=format, as_json=as_json, quiet=quiet, show=show)
