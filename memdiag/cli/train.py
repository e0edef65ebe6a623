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
