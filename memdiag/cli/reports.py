"""The commands about reports: `schema` explains them, `report` shows them, `rerun` measures again."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from memdiag.cli import options as o
from memdiag.errors import InputError
from memdiag.report_kinds import ROWS, row_of

if TYPE_CHECKING:
    from memdiag.progress import Progress
    from memdiag.tables import Report


def schema(
    report: Annotated[
        str | None, o.argument(metavar="[REPORT|NAME]", help="A report file, or the name of a report.")
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """What is in a report: every column with its type, unit and meaning, and how a file was made.

    Example: memdiag schema entropy.parquet
    """
    from memdiag import tables

    if report is None:
        print(json.dumps(sorted(ROWS)) if as_json else "\n".join(sorted(ROWS)))
        return
    is_name = report in ROWS or not (Path(report).exists() or Path(report).suffix)
    found = tables.schema_of(row_of(report)) if is_name else tables.read_schema(Path(report))
    meta = None if is_name else tables.read_meta(Path(report))
    columns = [
        dict(zip(("name", "type", "unit", "nullable", "doc"), described)) for described in tables.described(found)
    ]
    if as_json:
        print(json.dumps({"columns": columns} | ({"meta": meta} if meta else {})))
    else:
        print_schema(columns, meta)


def print_schema(columns: list[dict[str, Any]], meta: dict[str, Any] | None) -> None:
    """The columns as a table, and below it the run that a file comes from."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("column", "type", "unit", "null?", "meaning"):
        table.add_column(heading, no_wrap=heading != "meaning", overflow="fold")
    for c in columns:
        table.add_row(c["name"], c["type"], c["unit"], "yes" if c["nullable"] else "", c["doc"])
    console = Console()
    console.print(table)
    for key, value in (meta or {}).items():
        if key != "identity":
            console.print(f"[bold]{key}[/]: ", end="")
            console.print(
                value if isinstance(value, str) else json.dumps(value), markup=False, highlight=False, soft_wrap=True
            )


def report(
    paths: Annotated[
        list[str], o.argument(metavar="DIR|REPORT...", help="Reports, and directories that are searched for reports.")
    ],
    html: Annotated[
        Path | None, o.option("--html", help="The page to write. Default: report.html, unless --markdown is given.")
    ] = None,
    markdown: Annotated[
        str | None, o.option(metavar="FILE|-", help="The summary for a pull request; - prints it.")
    ] = None,
    title: Annotated[str | None, o.option(help="Of the page. Default: the directory's or the report's name.")] = None,
    force: Annotated[bool, o.option("--force", help="Replace a file that is no page of memdiag.")] = False,
    as_json: Annotated[
        bool, o.option("--json", help="Print one JSON object: what was written, of which reports.")
    ] = False,
    quiet: o.Quiet = False,
) -> None:
    """Show reports to people: one self-contained page with figures, plots and how to reproduce them; or Markdown.

    The page holds no script and asks for nothing over the network.

    Example: memdiag report runs/ --html report.html

    Example: memdiag report score.parquet entropy.parquet --markdown -
    """
    from memdiag import page_report
    from memdiag.cli.measure import begin

    begin(online=False, quiet=quiet)
    if as_json and markdown == "-":
        raise InputError("--json and --markdown - both want stdout; give one of them")
    if html is None and markdown is None:
        html = Path("report.html")
    file = None if markdown in (None, "-") else markdown
    made = page_report.report(*paths, html=html, markdown=file, title=title, force=force)
    for note in made.notes:
        logging.getLogger("memdiag").info("%s", note)
    written = {name: str(path) for name, path in (("html", html), ("markdown", file)) if path is not None}
    if as_json:
        print(json.dumps(written | {"reports": [section.name for section in made.sections], "notes": list(made.notes)}))
    elif markdown == "-":
        print(made.markdown)
    else:
        print("\n".join(written.values()))


def rerun(
    report: Annotated[Path, o.argument(metavar="REPORT", help="A report of memdiag.")],
    out: Annotated[
        Path | None,
        o.option("--out", "-o", help="Where it goes. Default: NAME.rerun.parquet, or directory NAME.rerun."),
    ] = None,
    force: o.Force = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    online: o.Online = False,
) -> None:
    """Repeat the run that made a report, with the options recorded in it, and say whether it came out the same.

    Example: memdiag rerun entropy.parquet
    """
    from memdiag import tables
    from memdiag.cli.measure import begin, is_first
    from memdiag.progress import Progress

    begin(online=online, quiet=quiet)
    old = tables.read(report)
    with Progress(show=not quiet and is_first()) as progress:
        made = _again(old, report, out, force=force, progress=progress)
    if made is None:  # another rank writes and shows it
        return
    new, path = made
    differing = tables.differing(old, new)
    if as_json:
        print(json.dumps({"report": str(path), "same": not differing, "differing": differing}))
    elif quiet:
        print(path)
    else:
        print(path)
        print("the same rows" if not differing else f"differs in {', '.join(differing)}")


def _again(old: Report, path: Path, out: Path | None, *, force: bool, progress: Progress) -> tuple[Report, Path] | None:
    """The same run once more: the new report of the same name, and what was written."""
    kind = str(old.meta.get("report"))
    if kind == "check":
        from memdiag import check_report

        checked, how = check_report.options_of(old)
        target = out or path.with_name(f"{path.stem}.rerun.parquet")
        return check_report.measure(checked, how, out=target, force=force).report, target
    if kind.startswith("diff."):
        from memdiag import diff_report

        base, new, compared = diff_report.options_of(old)
        folder = path.absolute().parent
        target = out or folder.with_name(f"{folder.name}.rerun")
        diffed = diff_report.measure(base, new, compared, out=target, force=force)
        return getattr(diffed, kind.removeprefix("diff.")), target
    if kind.startswith("counterfactual"):
        from memdiag import counterfactual_report

        part = {"influence": "influence", "models": "models"}.get(kind.removeprefix("counterfactual."), "report")
        if kind in ("counterfactual.shard", "counterfactual.examples"):
            raise InputError(f"{path}: is a part of a run; give the counterfactual.parquet of its directory")
        folder = path.absolute().parent
        target = out or folder.with_name(f"{folder.name}.rerun")
        counted = counterfactual_report.measure(
            counterfactual_report.options_of(old), out=target, force=force, progress=progress
        )
        return getattr(counted, part), target
    if kind.startswith("prune-memorizers."):
        from memdiag import prune_report

        given, options = prune_report.options_of(old)
        folder = path.absolute().parent
        target = out or folder.with_name(f"{folder.name}.rerun")
        found = prune_report.measure(given, options, out=target, force=force, progress=progress)
        again: Report = getattr(found, kind.removeprefix("prune-memorizers."))
        return again, target
    if kind.startswith("reproduce."):
        from memdiag import reproduce_report

        name, asked = reproduce_report.options_of(old)
        folder = path.absolute().parent
        target = out or folder.with_name(f"{folder.name}.rerun")
        reproduced = reproduce_report.measure(name, asked, out=target, force=force, progress=progress)
        return getattr(reproduced, kind.removeprefix("reproduce.")), target
    if kind.startswith("train-gapt."):
        from memdiag import train_gapt_report

        given, choices = train_gapt_report.options_of(old)
        folder = path.absolute().parent
        target = out or folder.with_name(f"{folder.name}.rerun")
        made = train_gapt_report.measure(given, choices, out=target, force=force, progress=progress)
        return None if made.path is None else (made.report, target)
    if kind.startswith("train."):
        from memdiag import train_report

        folder = path.absolute().parent
        target = out or folder.with_name(f"{folder.name}.rerun")
        if kind == "train.trajectory":
            raise InputError(f"{path}: is one epoch of a run; give the history.parquet of its directory")
        trained = train_report.measure(train_report.options_of(old), out=target, force=force, progress=progress)
        return getattr(trained, kind.removeprefix("train.")), target
    if kind == "score.second-split":
        from memdiag import second_split_report

        target = out or path.with_name(f"{path.stem}.rerun.parquet")
        split = second_split_report.options_of(old)
        return second_split_report.measure(split, out=target, force=force, progress=progress), target
    if kind == "score":
        from memdiag import score_report

        if old.meta.get("foreign"):
            raise InputError(f"{path}: has imported columns, which no run can make; give the report they were put into")
        source, wanted = score_report.options_of(old)
        target = out or path.with_name(f"{path.stem}.rerun.parquet")
        scored = score_report.measure(source, wanted, out=target, force=force, progress=progress)
        return None if scored.path is None else (scored, target)
    from memdiag import entropy_report

    checkpoint, settings = entropy_report.options_of(old)
    target = out or path.with_name(f"{path.stem}.rerun.parquet")
    report = entropy_report.measure(checkpoint, settings, out=target, force=force, progress=progress)
    return None if report.path is None else (report, target)
