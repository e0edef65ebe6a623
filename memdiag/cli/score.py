"""Commands about scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from memdiag.cli import options as o
from memdiag.cli.measure import begin, finish, is_first, print_plan
from memdiag.errors import InputError


def score(
    source: Annotated[
        str | None,
        o.argument(metavar="CKPT|RUN|TRAJECTORY", help="A checkpoint, a run of them, or a folder of epochs."),
    ] = None,
    data: Annotated[
        str | None, o.option("--data", "-d", help="The examples. Default: those that memdiag trained it on, or a task.")
    ] = None,
    out: o.Out = Path("score.parquet"),
    scores: Annotated[str | None, o.option(metavar="A,B,C", help="Which. Default: all that the input allows.")] = None,
    ranks: Annotated[
        bool, o.option("--ranks", help="Add a column NAME_rank from 0 to 1 for each; 1: most memorized.")
    ] = False,
    truth: Annotated[
        str | None, o.option(metavar="COLUMN", help="True where an example is corrupted or suspect: adds AUC, top k.")
    ] = None,
    reference: Annotated[
        str | None, o.option(metavar="CKPT", help="Language model that did not see the data: ref_delta, ez_score.")
    ] = None,
    prefix_tokens: Annotated[int, o.option(help="Language model: tokens given before the suffix.")] = 32,
    suffix_tokens: Annotated[int, o.option(help="Language model: tokens that must come out.")] = 32,
    columns: o.Columns = None,
    model: o.Model = None,
    steps: o.Steps = None,
    at: Annotated[
        int | None, o.option(metavar="STEP", help="Run: the checkpoint for scores of a single one. Default: the last.")
    ] = None,
    tokenizer: o.Tokenizer = None,
    max_length: o.MaxLength = None,
    limit: o.Limit = None,
    second_split: Annotated[
        bool,
        o.option("--second-split", help="Train on one half, go on with the other: what is forgotten? Without CKPT."),
    ] = False,
    arch: Annotated[
        str | None, o.option(help="--second-split: mlp, cnn or transformer. Default: what suits the data.")
    ] = None,
    epochs: Annotated[int | None, o.option(help="--second-split: of the first half. Default: 60.")] = None,
    second_epochs: Annotated[int | None, o.option(help="--second-split: of the second half. Default: 20.")] = None,
    lr: Annotated[float | None, o.option(help="--second-split: learning rate of the first half.")] = None,
    second_lr: Annotated[float | None, o.option(help="--second-split: learning rate of the second half.")] = None,
    seeds: Annotated[str | None, o.option(metavar="0,1,2", help="--second-split: networks, two a seed.")] = None,
    plot: Annotated[Path | None, o.option(help="Draw distributions and agreement to this .png or .svg.")] = None,
    seed: o.Seed = 0,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    batch_size: o.BatchSize = "auto",
    force: o.Force = False,
    dry_run: o.DryRun = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    show: o.Show = False,
    online: o.Online = False,
) -> None:
    """Which examples were memorized? One row per example, one column per score, and how far the scores agree.

    Example: memdiag score runs/digits --truth corrupted

    Example: memdiag score runs/my-model --data texts.jsonl --scores nll_mean,min_k_20,extractable

    Example: memdiag score --second-split --data train.parquet --truth is_wrong
    """
    given = dict(locals())
    begin(online=online, quiet=quiet)
    if second_split:
        _second_split(given)
        return
    for name in SECOND_SPLIT:
        if given[name] is not None:
            raise InputError(f"--{name.replace('_', '-')} trains networks, which only --second-split does")
    if source is None:
        raise InputError("nothing to score: give a checkpoint, a run or a trajectory (or --second-split --data D)")
    from memdiag import drawing, score_report, score_view
    from memdiag.progress import Progress

    names = score_report.ScoreOptions.__dataclass_fields__
    settings = score_report.ScoreOptions(**{name: given[name] for name in names})
    if dry_run:
        print_plan(score_report.plan(source, settings), as_json=as_json)
        return
    if plot is not None:
        drawing.check_plot(plot)
    with Progress(show=not quiet and is_first()) as progress:
        found = score_report.measure(source, settings, out=out, force=force, progress=progress)
    if found.path is None:  # another rank writes and shows it
        return
    finish(score_view, found, plot=plot, as_json=as_json, show=show, quiet=quiet)


SECOND_SPLIT = ("arch", "epochs", "second_epochs", "lr", "second_lr", "seeds")
NOT_SECOND_SPLIT = ("source", "scores", "reference", "steps", "at")


def _second_split(given: dict[str, Any]) -> None:
    """`memdiag score --second-split`."""
    from memdiag import drawing, second_split_report, second_split_view
    from memdiag.progress import Progress

    for name in NOT_SECOND_SPLIT:
        if given[name] is not None:
            told = "CKPT" if name == "source" else f"--{name}"
            raise InputError(f"{told} is of no use with --second-split, which trains its own networks; leave it out")
    names = second_split_report.SecondSplitOptions.__dataclass_fields__
    chosen = {name: given[name] for name in names if name != "seeds" or given["seeds"] is not None}
    settings = second_split_report.SecondSplitOptions(**chosen)
    if given["dry_run"]:
        print_plan(second_split_report.plan(settings), as_json=given["as_json"])
        return
    if given["plot"] is not None:
        drawing.check_plot(given["plot"])
    with Progress(show=not given["quiet"]) as progress:
        found = second_split_report.measure(settings, out=given["out"], force=given["force"], progress=progress)
    shown = {name: given[name] for name in ("plot", "as_json", "show", "quiet")}
    finish(second_split_view, found, **shown)


def import_(
    file: Annotated[Path, o.argument(metavar="FILE", help="A .npy, CSV, JSONL, .npz or Parquet file of numbers.")],
    name: Annotated[str, o.option("--as", metavar="NAME", help="The new column.")],
    into: Annotated[Path, o.option(metavar="REPORT", help="The report of memdiag score that it joins.")] = Path(
        "score.parquet"
    ),
    key: Annotated[
        str | None, o.option(metavar="COLUMN", help="Column of FILE with the ids. Default: its rows are the dataset's.")
    ] = None,
    column: Annotated[
        str | None, o.option(help="Column of FILE with the numbers. Default: the only other one.")
    ] = None,
    memorized: Annotated[str, o.option(metavar="high|low", help="Which end is more memorized.")] = "high",
    out: Annotated[
        Path | None, o.option("--out", "-o", help="The new report. Default: REPORT.with-NAME.parquet.")
    ] = None,
    force: o.Force = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    show: o.Show = False,
) -> None:
    """Bring a published or foreign score into a score report, so that it can be compared with the others.

    Example: memdiag import feldman.csv --as mem_published --key id --into score.parquet
    """
    begin(online=False, quiet=quiet)
    from memdiag import import_report, score_view

    found = import_report.import_score(
        file, out=out, force=force, name=name, into=into, key=key, column=column, memorized=memorized
    )
    finish(score_view, found, plot=None, as_json=as_json, show=show, quiet=quiet)
