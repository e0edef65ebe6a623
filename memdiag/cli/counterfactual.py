"""The command that asks what a model would do without an example."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from memdiag.cli import options as o
from memdiag.cli.measure import begin, finish, print_plan


def counterfactual(
    what: Annotated[
        list[str] | None,
        o.argument(metavar="[TASK | merge DIR DIR ...]", help="What to train on, e.g. task:digits; or runs to join."),
    ] = None,
    data: Annotated[
        str | None, o.option("--data", "-d", help="The same as an option: a file, save_to_disk directory, or task.")
    ] = None,
    test: Annotated[str | None, o.option(help="Held-out data, for influence.")] = None,
    test_fraction: Annotated[float | None, o.option(help="Instead: hold out this share, drawn by the seed.")] = None,
    out: o.OutDirectory = Path("counterfactual"),
    models: Annotated[
        int | None, o.option(help="Models. More later only add some. Default: 100; --turn-over-dropout: 1.")
    ] = None,
    subset_ratio: Annotated[float, o.option(help="Share of the examples that a model is trained on.")] = 0.7,
    design: Annotated[
        str, o.option(help="balanced: every example is in equally many models; bernoulli: independent coins.")
    ] = "balanced",
    until_width: Annotated[
        float | None, o.option(help="Go on until the median interval of memorization is this narrow.")
    ] = None,
    max_models: Annotated[int, o.option(help="But with at most so many models.")] = 1000,
    first_model: Annotated[int, o.option(help="Number of the first model, to share the work: see merge.")] = 0,
    group_by: Annotated[
        str | None,
        o.option(metavar="COLUMN", help="Examples with the same value share a coin. Default: exact copies do."),
    ] = None,
    truth: Annotated[
        str | None, o.option(metavar="COLUMN", help="True where an example is corrupted or suspect; adds AUC.")
    ] = None,
    min_influence: Annotated[float, o.option(help="Pairs of at least this (and 3 standard errors) are told.")] = 0.15,
    top: Annotated[int, o.option(help="And the strongest few of every held-out example.")] = 3,
    sizes: Annotated[
        str | None, o.option(metavar="64,128,256", help="At each of these widths, and how memorization changes.")
    ] = None,
    turn_over_dropout: Annotated[
        bool, o.option("--turn-over-dropout", help="Instead: an estimate from a single training (see docs).")
    ] = False,
    corruption: Annotated[
        float, o.option(help="Share of labels replaced by another class, uniform over the others.")
    ] = 0.0,
    arch: Annotated[
        str | None, o.option(help="mlp (features), cnn (images), transformer (tokens). Text without labels: gpt2-tiny.")
    ] = None,
    model: Annotated[
        str | None, o.option(metavar="PKG.MODULE:FACTORY", help="Instead: your own code that builds the model.")
    ] = None,
    config: Annotated[
        str | None,
        o.option(metavar="NAME|FILE", help="Instead: a language model, gpt2-tiny, gpt2-small, or a config.json."),
    ] = None,
    width: Annotated[
        int | None, o.option(help="Units of a hidden layer. Default: 128; cnn: 32, doubled from layer to layer.")
    ] = None,
    depth: Annotated[int | None, o.option(help="Hidden layers. Default: 2.")] = None,
    standardize: Annotated[
        bool | None,
        o.option(
            "--standardize/--no-standardize",
            help="Scale features to mean 0 and deviation 1, inside the model. Default: mlp and cnn do.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        int | None, o.option(help="Passes over a subset of average size. Default: 60; language model: 5.")
    ] = None,
    batch_size: Annotated[int | None, o.option(help="Examples in an update. Default: 64; language model: 32.")] = None,
    optimizer: Annotated[str | None, o.option(help="sgd (features; momentum 0.9) or adamw (tokens).")] = None,
    lr: Annotated[
        float | None,
        o.option(help="Learning rate. Default: sgd 0.1, adamw 0.001; transformer 0.01, language model 0.002."),
    ] = None,
    schedule: Annotated[str, o.option(help="cosine, linear (constant for 60 %, then linear), constant.")] = "cosine",
    warmup: Annotated[
        int | None, o.option(help="Updates. Default: none; language model: a twentieth, at most 100.")
    ] = None,
    weight_decay: Annotated[float | None, o.option(help="Of matrices. Default: none; language model: 0.01.")] = None,
    clip: Annotated[float | None, o.option(help="The longest gradient; 0: any. Default: 0; language model: 1.")] = None,
    columns: o.Columns = None,
    tokenizer: Annotated[
        str | None, o.option(help="Its directory. Default: a byte-level BPE made of the training texts.")
    ] = None,
    max_length: Annotated[
        int | None, o.option(help="Tokens read of an example. Default: the model's positions, at most 1024.")
    ] = None,
    limit: o.Limit = None,
    engine: Annotated[
        str, o.option(help="inline: a process per core, or one on an accelerator; ray: tasks of a Ray cluster.")
    ] = "inline",
    ray_address: Annotated[
        str | None, o.option(help="auto or an address. Default: a cluster of this machine, for this run.")
    ] = None,
    ray_gpus: Annotated[float, o.option(help="GPUs of a task, e.g. 0.25: four share one.")] = 0.0,
    chunk: Annotated[
        int | None, o.option(help="Models trained at once. Default: by a quick trial. 1: one by one.")
    ] = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    plot: Annotated[Path | None, o.option(help="Draw the report also to this .png or .svg.")] = None,
    force: o.Force = False,
    dry_run: o.DryRun = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    show: o.Show = False,
    online: o.Online = False,
) -> None:
    """What would the model do without this example? Memorization and influence, from many models on random subsets.

    Feldman and Zhang, arXiv:2008.03703; language models: Zhang et al., arXiv:2112.12938.

    Example: memdiag counterfactual --data train.parquet --test test.parquet --models 200

    Example: memdiag counterfactual "task:digits?split=train&corruption=0.1" --until-width 0.2

    Example: memdiag counterfactual merge runs/a runs/b --out runs/ab
    """
    given = dict(locals())
    begin(online=online, quiet=quiet)
    from memdiag import counterfactual_report, counterfactual_view, drawing
    from memdiag.errors import InputError
    from memdiag.progress import Progress

    if plot is not None:
        drawing.check_plot(plot)
    if what and what[0] == "merge":
        if dry_run:
            raise InputError("merge trains nothing that could be planned; leave --dry-run out")
        found = counterfactual_report.merge([Path(path) for path in what[1:]], out=out, force=force)
        finish(counterfactual_view, found, plot=plot, as_json=as_json, show=show, quiet=quiet)
        return
    named = [*(what or []), *([f"--data {data}"] if data is not None else [])]
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} each say what to train on; give one of them")
    given["data"] = what[0] if what else data
    names = counterfactual_report.CounterfactualOptions.__dataclass_fields__
    settings = counterfactual_report.CounterfactualOptions(**{name: given[name] for name in names})
    if dry_run:
        print_plan(counterfactual_report.plan(settings), as_json=as_json)
        return
    with Progress(show=not quiet) as progress:
        found = counterfactual_report.measure(settings, out=out, force=force, progress=progress)
    finish(counterfactual_view, found, plot=plot, as_json=as_json, show=show, quiet=quiet)
