"""Options that commands share, declared once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

# Every option has an environment variable; that is said once, in `memdiag --help`.
option = partial(typer.Option, show_envvar=False)
argument = partial(typer.Argument, show_envvar=False)

Checkpoint = Annotated[
    str,
    argument(
        metavar="CKPT", help="A checkpoint, or a run: a directory of checkpoints (checkpoint-500, step_500, 500)."
    ),
]
MaybeCheckpoint = Annotated[
    str | None, argument(metavar="[CKPT]", help="A checkpoint. Default: train on modular arithmetic, and keep it.")
]
Data = Annotated[
    str | None,
    option("--data", "-d", help="Parquet, JSONL, CSV, .npz, .safetensors, text, save_to_disk directory, or task:NAME."),
]
Columns = Annotated[str | None, option(help="Which column is what, e.g. text=body,label=y,id=uid.")]
Model = Annotated[
    str | None,
    option(metavar="PKG.MODULE:FACTORY", help="Your own code that builds the model of a bare state dict."),
]
Steps = Annotated[
    str | None, option(metavar="START:STOP:STEP", help="Checkpoints of a run, e.g. 0:1000:100 or 100,500.")
]
Layers = Annotated[
    str | None, option(help="Indices and ranges (0,4-8,-1) or module name patterns ('*.mlp'). Default: all.")
]
Tokenizer = Annotated[str | None, option(help="Directory of a tokenizer, if the checkpoint has none.")]
MaxLength = Annotated[
    int | None, option(help="Tokens read of an example. Default: the model's positions, at most 2048.")
]
Limit = Annotated[int | None, option(help="Only the first N examples.")]
Seed = Annotated[int, option(help="Seed of everything random.")]
Out = Annotated[Path, option("--out", "-o", help="The report to write.")]
OutDirectory = Annotated[Path, option("--out", "-o", help="The directory to write to.")]
Device = Annotated[str, option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, option(help="auto (the checkpoint's own), float32, float64, bfloat16, float16.")]
BatchSize = Annotated[
    str, option(help="Examples at once. auto: by tokens, halved when memory runs out. Never changes results.")
]
Force = Annotated[bool, option("--force", help="Start afresh and replace what is there.")]
AsJson = Annotated[bool, option("--json", help="Print one JSON object instead of a table.")]
Quiet = Annotated[bool, option("--quiet", "-q", help="Print the report's path and nothing else.")]
Show = Annotated[bool, option("--show", help="Print the table even if stdout is not a terminal.")]
DryRun = Annotated[bool, option("--dry-run", help="Open everything, say what it would take, write nothing.")]
Online = Annotated[bool, option("--online", help="Let libraries use the network (default: they may not).")]
