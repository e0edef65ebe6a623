"""Commands that train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from memdiag.cli import options as o
from memdiag.cli.measure import begin, finish, is_first, print_plan


def train_gapt(
    checkpoint: Annotated[
        str | None, o.argument(metavar="[CKPT]", help="A causal language model to go on training. Default: a new one.")
    ] = None,
    config: Annotated[
        str | None,
        o.option(metavar="NAME|FILE", help="A new model: gpt2-tiny (default), gpt2-small, or a config.json."),
    ] = None,
    data: Annotated[str | None, o.option("--data", "-d", help="What to train on. Default: task:pydoc.")] = None,
    val: Annotated[str | None, o.option(help="Held-out data. Default: every tenth example of --data.")] = None,
    out: o.OutDirectory = Path("train-gapt"),
    steps: Annotated[int, o.option(help="Updates.")] = 1000,
    save_every: Annotated[int | None, o.option(help="Updates between checkpoints. Default: a fifth of them.")] = None,
    gate: Annotated[
        str, o.option(help="paper (Algorithm 1), relative; controls: none (CE only), constant, random.")
    ] = "paper",
    weight: Annotated[float, o.option(help="w of CE + w · MBE in the phase compress.")] = 1.0,
    layers: Annotated[
        str | None, o.option(help="Layers to compress, e.g. 3-10. Default: without the first and last two blocks.")
    ] = None,
    patch_size: Annotated[int, o.option(help="Consecutive tokens in a patch.")] = 8,
    alternate: Annotated[
        bool, o.option("--alternate", help="Each part of an update has one loss, CE or one layer's MBE.")
    ] = False,
    ce_patience: Annotated[
        int | None,
        o.option(help="Updates without progress in CE before it compresses. Default: a 20th of all, at most 125."),
    ] = None,
    mbe_patience: Annotated[
        int | None,
        o.option(help="Updates without progress in MBE before it memorizes. Default: a 33rd of all, at most 75."),
    ] = None,
    ce_delta: Annotated[float, o.option(help="Progress in CE; nats (relative: a share).")] = 0.01,
    mbe_delta: Annotated[float, o.option(help="Progress in MBE of any active layer; nats (relative: a share).")] = 0.01,
    spike: Annotated[float, o.option(help="Back to memorizing when CE is this share above its best.")] = 0.1,
    smoothing: Annotated[float, o.option(help="Of the running means that the gate sees; 0: none.")] = 0.9,
    reset_on_enter: Annotated[
        bool | None,
        o.option(
            "--reset-on-enter/--keep-on-enter",
            help="Forget best values on compressing. Default: paper does.",
            show_default=False,
        ),
    ] = None,
    reset_on_exit: Annotated[
        bool, o.option("--reset-on-exit", help="Forget the best MBE on memorizing again.")
    ] = False,
    share: Annotated[float, o.option(help="Of the updates that --gate random compresses in.")] = 0.5,
    ratio_every: Annotated[
        int, o.option(help="Updates between two measurements of |w g_MBE| / |g_CE|; 0: never.")
    ] = 50,
    compare: Annotated[bool, o.option("--compare", help="Train the controls, too, on several seeds.")] = False,
    seeds: Annotated[str | None, o.option(metavar="0,1,2", help="Of --compare. Default: 0,1,2,3,4.")] = None,
    batch_size: Annotated[int, o.option(help="Sequences in an update, over all processes.")] = 16,
    accumulate: Annotated[int, o.option(help="Parts that an update is computed in, to save memory.")] = 1,
    max_length: Annotated[
        int | None, o.option(help="Tokens in a sequence. Default: the model's positions, at most 1024.")
    ] = None,
    documents: Annotated[
        bool, o.option("--documents", help="A sequence for each example, instead of packing them end to end.")
    ] = False,
    lr: Annotated[float | None, o.option(help="Learning rate. Default: 0.002 for a new model, else 0.00005.")] = None,
    schedule: Annotated[str, o.option(help="cosine, linear (constant for 60 %, then linear), constant.")] = "cosine",
    warmup: Annotated[int | None, o.option(help="Updates. Default: a twentieth, at most 100.")] = None,
    weight_decay: Annotated[float, o.option(help="Decoupled, as in AdamW; of matrices.")] = 0.1,
    beta2: Annotated[float, o.option(help="AdamW's.")] = 0.95,
    clip: Annotated[float, o.option(help="The longest gradient; 0: any.")] = 1.0,
    columns: o.Columns = None,
    tokenizer: Annotated[
        str | None, o.option(help="Its directory. Default: the checkpoint's; new: a byte-level BPE of the data.")
    ] = None,
    limit: o.Limit = None,
    shard: Annotated[
        bool, o.option("--shard", help="Under torchrun: share the model among the processes (FSDP2).")
    ] = False,
    seed: o.Seed = 0,
    dtype: Annotated[
        str, o.option(help="auto (bfloat16 products where the device is made for it), float32, bfloat16.")
    ] = "auto",
    device: o.Device = "auto",
    plot: Annotated[Path | None, o.option(help="Draw the run also to this .png or .svg.")] = None,
    force: o.Force = False,
    dry_run: o.DryRun = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    show: o.Show = False,
    online: o.Online = False,
) -> None:
    """Train a language model that memorizes and compresses in turns (GAPT, arXiv:2505.08727), beside its controls.

    Example: memdiag train-gapt --data texts.jsonl --steps 2000 --out runs/gapt

    Example: memdiag train-gapt --compare --seeds 0,1,2,3,4
    """
    given = dict(locals())
    begin(online=online, quiet=quiet)
    from memdiag import drawing, train_gapt_report, train_gapt_view
    from memdiag.progress import Progress

    names = train_gapt_report.TrainGaptOptions.__dataclass_fields__
    settings = train_gapt_report.TrainGaptOptions(**{name: given[name] for name in names})
    if dry_run:
        print_plan(train_gapt_report.plan(checkpoint, settings), as_json=as_json)
        return
    if plot is not None:
        drawing.check_plot(plot)
    with Progress(show=not quiet and is_first()) as progress:
        found = train_gapt_report.measure(checkpoint, settings, out=out, force=force, progress=progress)
    if found.path is None:  # another rank writes and shows it
        return
    finish(train_gapt_view, found, plot=plot, as_json=as_json, show=show, quiet=quiet)


def train(
    task: Annotated[str | None, o.argument(metavar="[TASK]", help="What to train on, e.g. task:digits.")] = None,
    data: Annotated[
        str | None, o.option("--data", "-d", help="The same as an option: a file, save_to_disk directory, or task.")
    ] = None,
    test: Annotated[str | None, o.option(help="Held-out data, evaluated at every save.")] = None,
    test_fraction: Annotated[float | None, o.option(help="Instead: hold out this share, drawn by the seed.")] = None,
    out: o.OutDirectory = Path("train"),
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
    epochs: Annotated[int | None, o.option(help="Passes over the data. Default: 60; language model: 5.")] = None,
    batch_size: Annotated[int | None, o.option(help="Examples in an update. Default: 64; language model: 32.")] = None,
    save_every: Annotated[int | None, o.option(help="Updates between checkpoints. Default: an epoch.")] = None,
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
    seed: o.Seed = 0,
    dtype: Annotated[
        str,
        o.option(help="auto (language model: bfloat16 products where the device is made for it), float32, bfloat16."),
    ] = "auto",
    device: o.Device = "auto",
    plot: Annotated[Path | None, o.option(help="Draw the run also to this .png or .svg.")] = None,
    force: o.Force = False,
    dry_run: o.DryRun = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    show: o.Show = False,
    online: o.Online = False,
) -> None:
    """Train a small model on any dataset, with the trajectory of every example, for `memdiag score`.

    Example: memdiag train task:digits --corruption 0.1 --out runs/digits

    Example: memdiag train --data texts.jsonl --epochs 5 --out runs/texts
    """
    given = dict(locals())
    begin(online=online, quiet=quiet)
    from memdiag import drawing, train_report, train_view
    from memdiag.errors import InputError
    from memdiag.progress import Progress

    if task is not None and data is not None:
        raise InputError(f"{task} and --data {data} both say what to train on; give one of them")
    given["data"] = task or data
    names = train_report.TrainOptions.__dataclass_fields__
    settings = train_report.TrainOptions(**{name: given[name] for name in names})
    if dry_run:
        print_plan(train_report.plan(settings), as_json=as_json)
        return
    if plot is not None:
        drawing.check_plot(plot)
    with Progress(show=not quiet) as progress:
        found = train_report.measure(settings, out=out, force=force, progress=progress)
    finish(train_view, found, plot=plot, as_json=as_json, show=show, quiet=quiet)
