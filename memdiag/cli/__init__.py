"""The command line: `memdiag COMMAND ...`. Commands open their inputs, call one function, and show the report.

Exit codes: 0 done; 1 a check failed; 2 the input is at fault; 3 incomplete, run it again to go on; 70 a bug of ours;
130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer

import memdiag
from memdiag.cli.options import option
from memdiag.errors import IncompleteError, InputError, one_line

_TYPER: dict[str, Any] = {
    "name": "memdiag",
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # plain help: half the start-up time, and it reads well in a pipe
    "context_settings": {"auto_envvar_prefix": "MEMDIAG", "help_option_names": ["-h", "--help"]},
}
# name -> where it is, what it is for. Only the file of the command that is called is imported: all of them, and making
# their options, would take as long as `check` itself.
COMMANDS = {
    "entropy": ("measure:entropy", "How compressed are the hidden states, layer by layer?"),
    "score": ("score:score", "Which examples were memorized?"),
    "counterfactual": ("counterfactual:counterfactual", "What would the model do without this example?"),
    "prune-memorizers": ("measure:prune_memorizers", "Which neurons memorize, and what if they go?"),
    "train": ("train:train", "Train a small model, with the trajectory of every example."),
    "train-gapt": ("train:train_gapt", "Train a language model that memorizes and compresses in turns."),
    "reproduce": ("reproduce:reproduce", "Does the paper hold here?"),
    "import": ("score:import_", "Bring a foreign score into a score report."),
    "check": ("verdicts:check", "Does a report keep the rules? For CI."),
    "diff": ("verdicts:diff", "What changed from one report to another? For CI."),
    "report": ("reports:report", "Show reports to people: one page, or Markdown."),
    "schema": ("reports:schema", "What is in a report: columns, types, units."),
    "rerun": ("reports:rerun", "Repeat the run that made a report."),
}


def _print_version(value: bool) -> None:
    if value:
        print(f"memdiag {memdiag.__version__}")
        raise typer.Exit


def main(
    version: Annotated[
        bool, option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What a neural network memorized, where it sits, whether it matters, and whether a fix worked.

    Commands that measure write Parquet reports. Every option has an environment variable: MEMDIAG_ENTROPY_ALPHA is
    --alpha of memdiag entropy.

    Example: memdiag entropy runs/my-model --data texts.jsonl
    """


def _app_of(names: Iterable[str]) -> typer.Typer:
    """The command line with these commands."""
    made = typer.Typer(**_TYPER)
    made.callback()(main)
    for name in names:
        where, about = COMMANDS[name]
        module, _, function = where.partition(":")
        made.command(name, short_help=about)(getattr(importlib.import_module(f"memdiag.cli.{module}"), function))
    return made


def __getattr__(name: str) -> typer.Typer:
    """`app`, the whole command line, made when it is asked for."""
    if name != "app":
        raise AttributeError(f"module 'memdiag.cli' has no attribute {name!r}")
    globals()["app"] = made = _app_of(COMMANDS)
    return made


def run(args: Sequence[str] | None = None) -> NoReturn:
    """The entry point: everything that can go wrong becomes one line on stderr and the documented exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no partial file stays behind
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _open_streams()
    try:
        given = list(args or sys.argv[1:] or ["--help"])
        called = _app_of([given[0]] if given[0] in COMMANDS else COMMANDS)
        code = typer.main.get_command(called)(args=given, standalone_mode=False) or 0
        _flush_stdout()
    except SystemExit as error:
        code = 0 if error.code == 1 else error.code  # 1 is how typer and rich end when nobody reads stdout (`| head`)
    except BrokenPipeError:
        code = 0
    except Exception as error:
        code = _report(error)
    except KeyboardInterrupt:
        code = 130
    if args is None and sys.argv[1:2] in (["check"], ["diff"]):
        _end(code)
    sys.exit(code)


def _end(code: Any) -> None:
    """End the process here and now: taking Python down takes 50 ms, a sixth of a check, and there is nothing to take
    down. Anything but a whole number is left to Python.
    """
    with suppress(OSError, ValueError):
        sys.stderr.flush()
        if isinstance(code, int):
            os._exit(code)


def _open_streams() -> None:
    """A closed stream swallows what is printed; a stdout that lacks letters shows "?" instead of failing."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - open until the end
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path that is not UTF-8 goes out as it came in
        sys.stdout.reconfigure(errors="surrogateescape" if "utf" in sys.stdout.encoding.lower() else "replace")


def _flush_stdout() -> None:
    """Errors of writing show here, where they can still be told, and not again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _report(error: Exception) -> int:
    """Print what went wrong and return the exit code for it."""
    if os.environ.get("MEMDIAG_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, InputError):
        return _say(str(error), 2)
    if isinstance(error, IncompleteError):
        return _say(str(error), 3)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _say(f"the disk is full ({one_line(error)}); free some space and run the same command again", 3)
    if isinstance(error, OSError) and error.filename is not None:
        return _say(f"{one_line(os.fsdecode(error.filename))}: {error.strerror}; give another path", 2)
    if hasattr(error, "format_message"):  # typer's own: an option or argument is wrong
        return _say(one_line(error.format_message()), 2)
    if isinstance(error, typer.Abort):
        return 130
    where = f"{type(error).__name__}: {one_line(error)}"
    return _say(f"a bug of memdiag, please report it: {where} (MEMDIAG_DEBUG=1 shows where)", 70)


def _say(message: str, code: int) -> int:
    # what a damaged file holds may be quoted here: it must not steer the terminal
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    print(f"memdiag: {shown}", file=sys.stderr)
    return code
