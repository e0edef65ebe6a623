"""The command that asks whether a paper holds here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from memdiag.cli import options as o
from memdiag.cli.measure import begin, finish, print_plan


def reproduce(
    name: Annotated[
        str, o.argument(metavar="NAME", help="grok, gapt-lm, gapt-multiplication, gapt-conflict, long-tail.")
    ],
    preset: Annotated[str, o.option(help="smoke: smaller networks, minutes; paper: the paper's settings.")] = "smoke",
    seeds: Annotated[
        str | None,
        o.option(metavar="0,1,2", help="Networks of each setting; at least 3 for intervals."),
    ] = None,
    out: Annotated[
        Path | None, o.option("--out", "-o", help="The directory to write to. Default: reproduce-NAME.")
    ] = None,
    only: Annotated[str | None, o.option(metavar="CLAIM,CLAIM", help="Only these claims, by name.")] = None,
    data: Annotated[
        str | None, o.option("--data", "-d", help="gapt-lm: texts to train on. Default: task:pydoc.")
    ] = None,
    no_map: Annotated[bool, o.option("--no-map", help="grok: leave out the phase map and its claims.")] = False,
    dtype: Annotated[
        str,
        o.option(help="grok: float32, or bfloat16: faster where the step has a closed form and the CPU matrix units."),
    ] = "float32",
    plot: Annotated[Path | None, o.option(help="Draw phase map or effects to this .png or .svg.")] = None,
    force: o.Force = False,
    dry_run: o.DryRun = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    show: o.Show = False,
    online: o.Online = False,
) -> None:
    """Does the paper hold here? Trains its networks, and puts each claim beside the paper's figure and a control.

    grok: Doshi et al. 2023, "To grok or not to grok", arXiv:2310.13061.

    gapt-lm, gapt-multiplication, gapt-conflict: Yu 2025, "Memorization-Compression Cycles Improve Generalization",
    arXiv:2505.08727.

    long-tail: Feldman and Zhang 2020, "What Neural Networks Memorize and Why", arXiv:2008.03703.

    Example: memdiag reproduce grok --plot phases.png
    """
    begin(online=online, quiet=quiet)
    from memdiag import drawing, reproduce_gapt_view, reproduce_report, reproduce_view
    from memdiag.progress import Progress

    settings = reproduce_report.ReproduceOptions(
        preset=preset, seeds=seeds, only=only, no_map=no_map, dtype=dtype, data=data
    )
    if dry_run:
        print_plan(reproduce_report.plan(name, settings), as_json=as_json)
        return
    if plot is not None:
        drawing.check_plot(plot)
        if name not in reproduce_report.EXPERIMENTS:
            reproduce_view.check_map(settings)
    with Progress(show=not quiet) as progress:
        place = out or Path(f"reproduce-{name}")
        found = reproduce_report.measure(name, settings, out=place, force=force, progress=progress)
    view = reproduce_gapt_view if name in reproduce_report.EXPERIMENTS else reproduce_view
    finish(view, found, plot=plot, as_json=as_json, show=show, quiet=quiet)
