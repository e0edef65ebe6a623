"""Numbers as characters of a terminal, and figures as files. Needs no torch."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from memdiag.errors import IncompleteError, InputError, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCKS = " ▏▎▍▌▋▊▉█"
SPARKS = "▁▂▃▄▅▆▇█"


def bar(share: float | None, width: int = 10) -> str:
    """A share in [0, 1] as a bar of eighths of a character; dots for a null."""
    if share is None:
        return "·" * width
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (BLOCKS[rest] if rest else "")).ljust(width)


def sparkline(values: list[float | None]) -> str:
    """Values from lowest to highest as eight heights; a dot for a null."""
    known = [v for v in values if v is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    span = (high - low) or 1.0
    return "".join("·" if v is None else SPARKS[min(7, int((v - low) / span * 8))] for v in values)


def heights(shares: list[float]) -> str:
    """Shares as eight heights of a fixed scale from 0 to 1."""
    return "".join(SPARKS[min(7, int(share * 8))] for share in shares)


def number(value: float | None, digits: int = 3) -> str:
    """A figure of a table; – for a null."""
    return "–" if value is None else f"{value:.{digits}f}"


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be written before anything is computed.

    Raises:
        InputError: the name ends in neither .png nor .svg.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise InputError(f"--plot {path}: the name must end in .png or .svg")


def savefig(figure: Figure, path: Path) -> None:
    """Write a figure in one step; the same figure gives the same file.

    Raises:
        InputError: the name ends in neither .png nor .svg.
        IncompleteError: it cannot be written there.
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        matplotlib.rcParams["svg.hashsalt"] = "memdiag"  # and no date
        figure.savefig(
            partial, format=path.suffix[1:].lower(), metadata={"Date": None} if path.suffix.lower() == ".svg" else {}
        )
        os.replace(partial, path)
    except OSError as error:
        raise IncompleteError(f"{path} could not be written: {one_line(error)}; the report itself is done") from None
    finally:
        with suppress(OSError):
            partial.unlink()
