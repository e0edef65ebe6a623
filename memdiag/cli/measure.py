"""Commands that measure a checkpoint."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, TextIO

from memdiag.cli import options as o


def begin(*, online: bool, quiet: bool) -> None:
    """What every command does first: no network, and the library's notes go to stderr."""
    if not online:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    log = logging.getLogger("memdiag")
    log.handlers = [logging.StreamHandler(sys.stderr)]
    log.handlers[0].setFormatter(logging.Formatter("memdiag: %(message)s"))
    log.setLevel(logging.WARNING if quiet or not is_first() else logging.INFO)
    if "MEMDIAG_DEBUG" not in os.environ:
        warnings.showwarning = _as_a_line


def _as_a_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings as a line like every other; those of libraries are for us, not for who runs the command."""
    if Path(__file__).parents[1] in Path(filename).parents:
        logging.getLogger("memdiag").warning("%s", message)


def is_first() -> bool:
    """Whether this process is the only one, or the one of those under torchrun that speaks."""
    return os.environ.get("RANK", "0") == "0"


def entropy(
    checkpoint: o.Checkpoint,
    data: o.Data = None,
    out: o.Out = Path("entropy.parquet"),
    unit: Annotated[
        str,
        o.option(
            help="What one spectrum is of: patch, sequence, dataset, or all. auto: patch; dataset without tokens."
        ),
    ] = "auto",
    patch_size: Annotated[int, o.option(help="Consecutive tokens in a patch.")] = 8,
    alpha: Annotated[float, o.option(help="Order of the entropy, > 0. 2 needs no eigenvalues.")] = 2.0,
    spectra: Annotated[bool, o.option("--spectra", help="Also rankme and effective_rank of sequences.")] = False,
    gradients: Annotated[
        bool, o.option("--gradients", help="Also the alignment of the CE and MBE gradients, OUT.gradients.parquet.")
    ] = False,
    gradient_batches: Annotated[int, o.option(help="Batches the gradients are taken on.")] = 4,
    gradient_batch_size: Annotated[int, o.option(help="Examples in each of them.")] = 8,
    plot: Annotated[Path | None, o.option(help="Draw layer × step to this .png or .svg.")] = None,
    columns: o.Columns = None,
    model: o.Model = None,
    steps: o.Steps = None,
    layers: o.Layers = None,
    tokenizer: o.Tokenizer = None,
    max_length: o.MaxLength = None,
    limit: o.Limit = None,
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
    """How compressed are the hidden states, layer by layer? Matrix-based entropy (MBE) and the spectrum around it.

    Example: memdiag entropy runs/my-model --data texts.jsonl --plot entropy.png
    """
    begin(online=online, quiet=quiet)
    from memdiag import entropy_report, entropy_view
    from memdiag.progress import Progress

    settings = entropy_report.EntropyOptions(
        data=data,
        columns=columns,
        model=model,
        steps=steps,
        layers=layers,
        tokenizer=tokenizer,
        unit=unit,
        patch_size=patch_size,
        alpha=alpha,
        spectra=spectra,
        max_length=max_length,
        limit=limit,
        gradients=gradients,
        gradient_batches=gradient_batches,
        gradient_batch_size=gradient_batch_size,
        dtype=dtype,
        seed=seed,
        device=device,
        batch_size=batch_size,
    )
    if dry_run:
        print_plan(entropy_report.plan(checkpoint, settings), as_json=as_json)
        return
    if plot is not None:
        entropy_view.check_plot(plot)
    with Progress(show=not quiet and is_first()) as progress:
        report = entropy_report.measure(checkpoint, settings, out=out, force=force, progress=progress)
    if report.path is None:  # another rank writes and shows it
        return
    if plot is not None:
        entropy_view.plot(report, plot)
    if as_json:
        print(json.dumps(entropy_view.summary(report) | ({"plot": str(plot)} if plot else {})))
    elif (sys.stdout.isatty() or show) and not quiet:
        entropy_view.print_table(report)
    else:
        print(report.path)


def print_plan(plan: dict[str, object], *, as_json: bool) -> None:
    """What a command would do, as JSON or a line each."""
    if as_json:
        print(json.dumps(plan))
        return
    for name, value in plan.items():
        print(f"{name.replace('_', ' ') + ':':22} {value}")
