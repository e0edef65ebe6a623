"""Progress on stderr: a bar with an ETA on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType

EVERY_S = 5.0


class Progress:
    """Counts steps of a known total; silent unless `show`."""

    def __init__(self, *, show: bool = False) -> None:
        self._show = show
        self._bar = None
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
        self._total = self._done = 0
        self._what, self._unit = "", "examples"

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def start(self, what: str, total: int, *, unit: str = "examples") -> None:
        """Begin to count `total` units of `what`."""
        self._what, self._total, self._done, self._unit = what, total, 0, unit
        self._began = self._said = time.monotonic()
        if self._bar:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(what, total=total)

    def advance(self, n: int, note: str = "") -> None:
        """`n` more are done; `note` says how it stands."""
        self._done += n
        if self._bar:
            shown = f"{self._what}  {note}" if note else self._what
            self._bar.update(self._bar.task_ids[-1], advance=n, description=shown)
        elif self._show and self._done and time.monotonic() - self._said > EVERY_S:
            self._said = time.monotonic()
            left = (self._said - self._began) / self._done * (self._total - self._done)
            line = f"{self._what}: {self._done}/{self._total} {self._unit}, ETA {left:.0f} s"
            print(f"{line}  {note}" if note else line, file=sys.stderr, flush=True)
