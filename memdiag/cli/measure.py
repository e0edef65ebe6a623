"""Commands that measure a checkpoint."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, TextIO

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
    from memdiag import drawing, entropy_report, entropy_view
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
        drawing.check_plot(plot)
    with Progress(show=not quiet and is_first()) as progress:
        report = entropy_report.measure(checkpoint, settings, out=out, force=force, progress=progress)
    if report.path is None:  # another rank writes and shows it
        return
    finish(entropy_view, report, plot=plot, as_json=as_json, show=show, quiet=quiet)


def prune_memorizers(
    checkpoint: o.MaybeCheckpoint = None,
    data: Annotated[
        str | None,
        o.option("--data", "-d", help="Training data (with CKPT), or task:modular-addition?p=71 (without)."),
    ] = None,
    out: o.OutDirectory = Path("prune-memorizers"),
    corruption: Annotated[float | None, o.option(help="Share of training labels redrawn. Default: 0.3.")] = None,
    corruption_law: Annotated[
        str | None, o.option(help="uniform: from all classes, 1 in p stays right (default); wrong: never right.")
    ] = None,
    train_fraction: Annotated[float | None, o.option(help="Share of the pairs trained on. Default: 0.5.")] = None,
    width: Annotated[int | None, o.option(help="Neurons. Default: about 5 p, 500 for p = 97.")] = None,
    activation: Annotated[str | None, o.option(help="square (default) or relu.")] = None,
    norm: Annotated[str | None, o.option(help="After the activation: none (default), batch or layer.")] = None,
    dropout: Annotated[float | None, o.option(help="Before the activation. Default: 0.")] = None,
    weight_decay: Annotated[float | None, o.option(help="Decoupled, as in AdamW. Default: 0.")] = None,
    lr: Annotated[float | None, o.option(help="Learning rate. Default: 0.01.")] = None,
    steps: Annotated[int | None, o.option(help="Updates. Default: 1000.")] = None,
    train_batch_size: Annotated[int | None, o.option(help="Pairs in an update. Default: all.")] = None,
    eval_every: Annotated[int | None, o.option(help="Steps between rows of dynamics.parquet. Default: 20.")] = None,
    seeds: Annotated[
        str | None, o.option(metavar="0,1,2", help="Networks trained side by side, each with its own data.")
    ] = None,
    filter_frequencies: Annotated[
        bool, o.option("--filter-frequencies", help="Also keep only the strongest frequency of each curve.")
    ] = False,
    test: Annotated[str | None, o.option(help="CKPT: held-out data.")] = None,
    truth: Annotated[
        str | None, o.option(metavar="COLUMN", help="CKPT: true where the training example is corrupted or suspect.")
    ] = None,
    suspects: Annotated[
        str | None, o.option(metavar="FILE:COLUMN:SHARE", help="CKPT: the top share of a score is suspect.")
    ] = None,
    columns: o.Columns = None,
    model: o.Model = None,
    layers: Annotated[
        str | None, o.option(help="CKPT: indices (0,2-3) of the layers of neurons, or name patterns ('*.mlp.*').")
    ] = None,
    tokenizer: o.Tokenizer = None,
    prefix_tokens: Annotated[
        int | None, o.option(help="Language model: tokens given before those that count. Default: 1.")
    ] = None,
    max_length: o.MaxLength = None,
    limit: o.Limit = None,
    ablation: Annotated[
        bool, o.option("--ablation", help="CKPT: exact ablation_* columns, a pass over the data for each neuron.")
    ] = False,
    points: Annotated[
        int | None, o.option(help="CKPT: points of a curve. Default: 24, or every neuron of a linear read-out.")
    ] = None,
    rank_by: Annotated[str, o.option(help="Which neurons go first: memorization, ipr, norm_product, ...")] = (
        "memorization"
    ),
    keep_clean: Annotated[float, o.option(help="The cut may cost 1 - this of clean training accuracy.")] = 0.99,
    fraction: Annotated[float | None, o.option(help="Prune this share instead of choosing the cut.")] = None,
    n: Annotated[int | None, o.option("--n", help="Prune this many neurons instead of choosing the cut.")] = None,
    draws: Annotated[int, o.option(help="Random orders of the control, at least 20.")] = 20,
    plot: Annotated[Path | None, o.option(help="Draw the curves to this .png or .svg.")] = None,
    seed: o.Seed = 0,
    dtype: Annotated[
        str, o.option(help="Training: float32 (auto) or bfloat16. CKPT: auto (its own), float32, bfloat16, ...")
    ] = "auto",
    device: o.Device = "auto",
    batch_size: o.BatchSize = "auto",
    force: o.Force = False,
    dry_run: o.DryRun = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    show: o.Show = False,
    online: o.Online = False,
) -> None:
    """Which neurons hold the corrupted labels, and what happens when they go? Always beside a random control.

    Without CKPT it trains a network on modular arithmetic with corrupted labels, where the truth is known.

    Example: memdiag prune-memorizers --corruption 0.3 --plot prune.png

    Example: memdiag prune-memorizers runs/my-model --data train.parquet --truth is_wrong --test test.parquet
    """
    given = dict(locals())
    begin(online=online, quiet=quiet)
    from memdiag import drawing, prune_report, prune_view
    from memdiag.progress import Progress

    names = prune_report.PruneOptions.__dataclass_fields__
    settings = prune_report.PruneOptions(**{name: given[name] for name in names})
    if dry_run:
        print_plan(prune_report.plan(checkpoint, settings), as_json=as_json)
        return
    if plot is not None:
        drawing.check_plot(plot)
    with Progress(show=not quiet) as progress:
        found = prune_report.measure(checkpoint, settings, out=out, force=force, progress=progress)
    finish(prune_view, found, plot=plot, as_json=as_json, show=show, quiet=quiet)


def finish(view: Any, found: Any, *, plot: Path | None, as_json: bool, show: bool, quiet: bool) -> None:
    """What every command does last: draw, then print JSON, a table for people, or the path.

    Args:
        view: the module with `plot`, `summary` and `print_table` of what was found.
        found: a report, or several in a directory; its `path` says where.
    """
    if plot is not None:
        view.plot(found, plot)
    if as_json:
        print(json.dumps(view.summary(found) | ({"plot": str(plot)} if plot else {})))
    elif (sys.stdout.isatty() or show) and not quiet:
        view.print_table(found)
    else:
        print(found.path)


def print_plan(plan: dict[str, object], *, as_json: bool) -> None:
    """What a command would do, as JSON or a line each."""
    if as_json:
        print(json.dumps(plan))
        return
    for name, value in plan.items():
        print(f"{name.replace('_', ' ') + ':':22} {value}")
