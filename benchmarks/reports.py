"""What do `check` and `diff` cost beside the library that does their work? Ratios of whole processes, taken in turn.

Start-up on a small report beside `python -c "import duckdb, pyarrow"`; a report of ten million rows beside DuckDB alone
with the same SQL on the same file; two of them beside DuckDB's join with the same means. And the most memory that a
check of it takes.

    python benchmarks/reports.py                    # ratios beside their targets; exit 1 if one is missed
    python benchmarks/reports.py --rows 1000000
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROWS = 10_000_000
SMALL = 200
GROUP = 100_000  # rows of a row group
SCORES = ("loss", "margin", "aum", "el2n")
MOST_START, MOST_CHECK, MOST_DIFF, MOST_MEMORY = 2.0, 2.0, 3.0, 500.0
MOST_SURE = 3.0  # with resampling: aimed at 2, and missed
RULES = ("avg(loss) < 2", "count_if(margin < -1) / count(*) < 0.3", "max(aum) < 100")


def write(path: Path, rows: int, shift: float, seed: int) -> None:
    """A score report as `memdiag score` writes it: ids and four scores."""
    import numpy as np
    import pyarrow as pa

    from memdiag import tables
    from memdiag.score_report import ScoreRow
    from memdiag.tables import column

    scores = {name: column(pa.float64(), name, nullable=True) for name in SCORES}
    row = tables.row_class("Row", "score", ScoreRow.schema_version, {"example_id": column(pa.string(), "id"), **scores})
    rng = np.random.default_rng(seed)

    def batches():  # type: ignore[no-untyped-def]
        for start in range(0, rows, GROUP):
            n = min(GROUP, rows - start)
            ids = [f"example-{i}" for i in range(start, start + n)]
            drawn = {name: rng.normal(size=n) + shift for name in SCORES}
            yield tables.from_columns(row, {"example_id": ids, **drawn})

    tables.write(path, row, batches(), {"report": "score", "schema_version": ScoreRow.schema_version, "options": {}})


def run(command: Sequence[str], cwd: Path) -> tuple[float, float]:
    """Seconds that a process takes, and the most memory that it held, in MB."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        sys.exit(f"{' '.join(command)}: exit {process.returncode}")
    return seconds, used.ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


def in_turn(ways: Sequence[Sequence[str]], cwd: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Median seconds of each way, and the most memory."""
    times: list[list[float]] = [[] for _ in ways]
    memory = [0.0] * len(ways)
    for _ in range(rounds):
        for i, way in enumerate(ways):
            seconds, held = run(way, cwd)
            times[i].append(seconds)
            memory[i] = max(memory[i], held)
    return [statistics.median(taken) for taken in times], memory


def main() -> int:
    """Print the ratios; 1 if one misses its target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="keep the reports there")
    asked = parser.parse_args()
    missed = 0

    def tell(what: str, value: float, most: float, unit: str = "x", about: str = "") -> None:
        nonlocal missed
        missed += value > most
        print(f"{what:46} {value:8.2f} {unit}   at most {most:g}{'' if value <= most else '   MISSED'}   {about}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.directory or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "small.parquet", SMALL, 0.0, 0)
        write(folder / "small-new.parquet", SMALL, 0.001, 1)
        for name, shift, seed in (("base", 0.0, 2), ("new", 0.001, 3)):
            if not (folder / f"{name}.parquet").exists():
                write(folder / f"{name}.parquet", asked.rows, shift, seed)
        python = sys.executable
        memdiag = [python, "-m", "memdiag"]
        rules = [word for rule in RULES for word in ("--rule", rule)]
        floor = [python, "-c", "import duckdb, pyarrow"]
        (bare, check, sure, diff), _ = in_turn(
            [
                floor,
                [*memdiag, "check", "small.parquet", *rules, "-q"],
                [*memdiag, "check", "small.parquet", *rules, "--confidence", "0.95", "-q"],
                [*memdiag, "diff", "small.parquet", "small-new.parquet", "--rule", "loss: +0.1", "-q"],
            ],
            folder,
            3 * asked.rounds,
        )
        tell(
            "check of a small report / import duckdb, pyarrow",
            check / bare,
            MOST_START,
            about=f"{check:.2f} / {bare:.2f} s",
        )
        tell("  with --confidence", sure / bare, MOST_SURE, about=f"{sure:.2f} s")
        tell("diff of two small reports", diff / bare, MOST_SURE, about=f"{diff:.2f} s")

        alone = f"import duckdb; duckdb.sql(\"SELECT {', '.join(RULES)} FROM 'base.parquet'\").fetchall()"
        (bare, check), (_, memory) = in_turn(
            [[python, "-c", alone], [*memdiag, "check", "base.parquet", *rules, "-q"]], folder, asked.rounds
        )
        tell(
            f"check of {asked.rows:,} rows / DuckDB alone",
            check / bare,
            MOST_CHECK,
            about=f"{check:.2f} / {bare:.2f} s",
        )
        tell("  the most memory", memory, MOST_MEMORY, "MB")
        means = ", ".join(f"avg(n.{name} - b.{name})" for name in SCORES)
        joined = f"SELECT {means} FROM 'base.parquet' b JOIN 'new.parquet' n USING (example_id)"
        alone = f'import duckdb; duckdb.sql("{joined}").fetchall()'
        (bare, diff), (_, memory) = in_turn(
            [[python, "-c", alone], [*memdiag, "diff", "base.parquet", "new.parquet", "--rule", "loss: +0.1", "-q"]],
            folder,
            max(1, asked.rounds // 2),
        )
        tell(
            f"diff of two of {asked.rows:,} rows / DuckDB alone",
            diff / bare,
            MOST_DIFF,
            about=f"{diff:.2f} / {bare:.2f} s",
        )
        print(f"{'  the most memory':46} {memory:8.0f} MB")
    print(f"(a process of its own has {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB here)")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
