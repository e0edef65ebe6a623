"""Strange options and damaged files given to `score`, `import` and `train`: a report, or one line; and kill -9."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_fuzz_cli import DAMAGE, SEEDS, WORDS, damage_one
from test_fuzz_cli import run as run  # a fixture
from test_kill import PRELOAD, command, ended
from typer.testing import CliRunner

from memdiag import cli, tables

VALUES = [*WORDS, "1", "2", "8", "0.3", "30", "1e30", "constant", "linear", "bfloat16", "0,1", "corrupted", "loss,aum"]
VALUES += ["low", "id", "mem", "100", "60", "1.5"]
SCORE = [
    "--data", "--scores", "--truth", "--reference", "--prefix-tokens", "--suffix-tokens", "--columns", "--model",
    "--steps", "--at", "--tokenizer", "--max-length", "--limit", "--plot", "--seed", "--dtype", "--device",
    "--batch-size", "--arch", "--epochs", "--seeds",
]  # fmt: skip
SPLIT = [
    "--data", "--truth", "--columns", "--limit", "--arch", "--epochs", "--second-epochs", "--lr", "--second-lr",
    "--seeds", "--seed", "--dtype", "--device", "--batch-size", "--max-length", "--tokenizer", "--scores", "--plot",
    "--model", "--prefix-tokens",
]  # fmt: skip
TRAIN = [
    "--data", "--test", "--test-fraction", "--corruption", "--arch", "--model", "--config", "--width", "--depth",
    "--epochs", "--batch-size", "--save-every", "--optimizer", "--lr", "--schedule", "--warmup", "--weight-decay",
    "--clip", "--columns", "--tokenizer", "--max-length", "--limit", "--seed", "--dtype", "--device", "--plot",
]  # fmt: skip
IMPORT = ["--as", "--into", "--key", "--column", "--memorized"]
TRAINED = ["train", "task:digits", "--corruption", 0.2, "--width", 8, "--epochs", 2, "--limit", 60, "--batch-size", 30]
SHORT = ["--epochs", 2, "--second-epochs", 1, "--seeds", "0"]
CHEAP = ["--scores", "loss,margin,aum,forgetting_events,grand", "--truth", "corrupted"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small run of `memdiag train`, a report of its scores, and files with foreign scores."""
    folder = tmp_path_factory.mktemp("made")
    for args in (
        [*TRAINED, "-q", "-o", folder / "run"],
        ["score", folder / "run", *CHEAP, "--ranks", "-q", "-o", folder / "score.parquet"],
    ):
        assert CliRunner().invoke(cli.app, [str(arg) for arg in args]).exit_code == 0
    report = tables.read(folder / "score.parquet").table
    ids, values = report["example_id"].to_pylist(), np.linspace(0, 1, report.num_rows)
    (folder / "f.csv").write_text("id,mem\n" + "".join(f"{i},{v}\n" for i, v in zip(ids, values)))
    (folder / "f.jsonl").write_text("".join(json.dumps({"id": i, "mem": v}) + "\n" for i, v in zip(ids, values)))
    pq.write_table(pa.table({"id": ids, "mem": values}), folder / "f.parquet", compression="none")
    np.save(folder / "f.npy", values)
    np.savez(folder / "f.npz", mem=values)
    return folder


def judge(run, out, args, what):
    """A report and nothing beside it; or one line, with nothing left but finished pieces. The exit code."""
    folder = out.parent
    code, stdout, stderr = run(*args, "-q", "-o", out)
    case = f"{what}: exit {code}, {stderr}"
    assert code in (0, 2, 3), case
    assert "Traceback" not in stderr, case
    if code == 0:
        assert stdout == f"{out}\n", case
        assert not stderr or stderr.startswith("memdiag: a network had learned"), case
        assert os.listdir(folder) == [out.name], case
        assert not [path for path in folder.rglob("*") if path.name.endswith((".parts", ".partial"))], case
        assert tables.read(out if out.is_file() else out / "examples.parquet").table.num_rows, case
        return 0
    (line,) = stderr.splitlines() or [""]
    assert line.startswith("memdiag: "), case
    assert line.isprintable(), case
    assert len(line) < 1200, case
    assert stdout == "", case
    assert not out.is_file(), case
    left = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.endswith(".partial")], case
    if args[0] == "import" or not any(path.name.startswith(("seen-", "network-", "epoch=")) for path in left):
        assert left == [], case
    return code


def options(rng, known, most=2):
    return [word for name in rng.sample(known, rng.randint(1, most)) for word in (name, rng.choice(VALUES))]


@pytest.mark.parametrize(("command", "known", "cases"), [
    ("score", SCORE, 40), ("second-split", SPLIT, 25), ("train", TRAIN, 50), ("import", IMPORT, 40),
])  # fmt: skip
def test_strange_values_of_options(run, made, tmp_path, command, known, cases):
    begins = {
        "score": ["score", made / "run", *CHEAP],
        "second-split": ["score", "--second-split", "--data", "task:digits", "--limit", 40, *SHORT],
        "train": TRAINED,
        "import": ["import", made / "f.csv", "--as", "mem", "--key", "id", "--into", made / "score.parquet"],
    }
    seen = []
    for seed in range(cases * SEEDS):
        rng = random.Random(f"{command} {seed}")
        (folder := tmp_path / f"case-{seed}").mkdir()
        given = options(rng, known)
        seen.append(judge(run, folder / "out", [*begins[command], *given], f"{command} {seed} {given}"))
        shutil.rmtree(folder)
    assert {0, 2} <= set(seen)


# -- damaged files -------------------------------------------------------------------------------------------------


def null(table, rng):
    """A value that is not there."""
    name = rng.choice(table.column_names)
    values = table[name].to_pylist()
    values[rng.randrange(len(values))] = None
    return put(table, name, pa.array(values, table[name].type))


def put(table, name, values):
    """The table with another column of that name."""
    return table.set_column(table.column_names.index(name), name, values)


def other_type(table, rng):
    name = rng.choice(table.column_names)
    n = table.num_rows
    new = rng.choice([["x"] * n, [0.5] * n, [True] * n, [[1, 2]] * n, [None] * n, [b"\xff"] * n, [-(2**63)] * n])
    return put(table, name, pa.array(new))


def odd_number(table, rng):
    """NaN, an infinity or a number far out of range."""
    name = rng.choice([f.name for f in table.schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)])
    values, kind = table[name].to_pylist(), table[name].type
    odd = [float("nan"), float("inf"), -1e38] if pa.types.is_floating(kind) else [-1, 2**31 - 1, 0]
    values[rng.randrange(len(values))] = rng.choice(odd)
    return put(table, name, pa.array(values, kind))


def without(table, rng):
    return table.drop_columns([rng.choice(table.column_names)])


def renamed(table, rng):
    names = list(table.column_names)
    names[rng.randrange(len(names))] = rng.choice([*names, "x", ""])
    return table.rename_columns(names)


def no_rows(table, rng):
    return table.slice(0, 0)


def fewer_rows(table, rng):
    return table.slice(rng.choice([0, 1, 5]), rng.randrange(1, table.num_rows))


def twice(table, rng):
    return pa.concat_tables([table, table])


def shuffled(table, rng):
    order = list(range(table.num_rows))
    rng.shuffle(order)
    return table.take(order)


def other_meta(table, rng):
    """One value of the report's metadata replaced by something of another kind."""
    if tables.KEY not in (table.schema.metadata or {}):  # a foreign file has none
        return no_rows(table, rng)
    meta = json.loads(table.schema.metadata[tables.KEY])
    inner = rng.choice([meta, *(value for value in meta.values() if isinstance(value, dict) and value)])
    inner[rng.choice(sorted(inner))] = rng.choice([None, -1, 2**70, 1e300, "x", [], {}, [[]], True, ["x"]])
    return table.replace_schema_metadata({tables.KEY: json.dumps(meta)})


def no_meta(table, rng):
    return table.replace_schema_metadata(None)


TABLES = [null, other_type, other_type, odd_number, without, renamed, no_rows, fewer_rows, twice, shuffled]
TABLES += [other_meta, other_meta, no_meta]


def damage_report(path, rng, others):
    """Damage a Parquet report in its bytes or in what it holds, replace it by another report, or remove it."""
    kind = rng.choice(["table"] * 7 + ["bytes"] * 2 + ["other", "removed"])
    if kind == "removed":
        path.unlink()
        return f"{path.name} removed"
    if kind == "other":
        other = rng.choice(others)
        shutil.copy(other, path)
        return f"{path.name} is {other.name}"
    change = rng.choice(TABLES if kind == "table" else DAMAGE)
    if kind == "table":
        pq.write_table(change(pq.read_table(path, partitioning=None), rng), path)
    else:
        path.write_bytes(change(path.read_bytes(), rng))
    return f"{path.name} {change.__name__}"


def damage_run(run_, rng, made):
    """Damage one file of a run of `memdiag train`."""
    kind = rng.choice(["examples", "examples", "history", "epoch", "epoch", "checkpoint"])
    if kind == "checkpoint":
        folder = rng.choice(sorted(run_.glob("checkpoint-*")))
        return f"{folder.name} {damage_one(folder, rng)}"
    path = rng.choice(sorted((run_ / "trajectory").iterdir())) if kind == "epoch" else run_ / f"{kind}.parquet"
    others = [made / "score.parquet", made / "f.parquet", *sorted((made / "run").glob("*.parquet"))]
    return damage_report(path, rng, [*others, *sorted((made / "run" / "trajectory").iterdir())])


def test_damaged_runs(run, made, tmp_path):
    seen = []
    for seed in range(60 * SEEDS):
        rng = random.Random(seed)
        folder = tmp_path / f"case-{seed}"
        (folder / "o").mkdir(parents=True)
        shutil.copytree(made / "run", folder / "run")
        what = f"{seed} {damage_run(folder / 'run', rng, made)}"
        scored = rng.choice(["run", "run", "run/trajectory", sorted(os.listdir(folder / "run"))[0]])
        names = rng.choice([CHEAP, [], ["--scores", "aum,tracin_self"], ["--truth", "corrupted", "--ranks"]])
        if scored == "run/trajectory":
            names = rng.choice([[], ["--truth", "corrupted"], ["--limit", 5, "--ranks"], ["--data", "task:digits"]])
        seen.append(
            judge(run, folder / "o" / "s.parquet", ["score", folder / scored, *names], f"{what} {scored} {names}")
        )
        shutil.rmtree(folder)
    assert {0, 2} <= set(seen)


def test_damaged_score_reports_and_foreign_scores(run, made, tmp_path):
    seen = []
    for seed in range(50 * SEEDS):
        rng = random.Random(seed)
        folder = tmp_path / f"case-{seed}"
        (folder / "o").mkdir(parents=True)
        name = rng.choice(["f.csv", "f.jsonl", "f.parquet", "f.npy", "f.npz"])
        for file in ("score.parquet", name):
            shutil.copy(made / file, folder)
        others = [made / "f.parquet", *sorted((made / "run").glob("*.parquet"))]
        if rng.random() < 0.5:
            what = damage_report(folder / "score.parquet", rng, others)
        elif name == "f.parquet":
            what = damage_report(folder / name, rng, others)
        else:
            change = rng.choice(DAMAGE)
            (folder / name).write_bytes(change((folder / name).read_bytes(), rng))
            what = f"{name} {change.__name__}"
        key = [] if name in ("f.npy", "f.npz") else ["--key", "id"]
        args = ["import", folder / name, "--as", "mem", "--into", folder / "score.parquet", *key]
        seen.append(judge(run, folder / "o" / "new.parquet", args, f"{seed} {what}"))
        shutil.rmtree(folder)
    assert {0, 2} <= set(seen)


# -- kill -9 -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_score_killed_at_random_moments_goes_on_and_ends_with_the_same_bytes(made, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "memdiag.score_run", "memdiag.score_view", "safetensors.torch"])
    out, whole = tmp_path / "out" / "s.parquet", tmp_path / "whole" / "s.parquet"

    def start(to):
        args = ["score", made / "run", *CHEAP, "--ranks", "-q", "-o", to]
        process = context.Process(target=command, args=([str(arg) for arg in args], tmp_path / "stderr", None))
        process.start()
        return process

    assert ended(start(tmp_path / "first.parquet")) == 0  # imports are not to be timed
    began = time.monotonic()
    assert ended(start(whole)) == 0
    lasts, dice, killed = time.monotonic() - began, random.Random(1), 0
    expected = whole.read_bytes()
    for _ in range(40):
        process = start(out)
        process.join(dice.uniform(0.1, 0.9) * lasts)
        process.kill()
        code = ended(process)
        assert code in (0, -signal.SIGKILL), (tmp_path / "stderr").read_text()
        killed += code != 0
        if out.exists():
            assert out.read_bytes() == expected
            out.unlink()
        if killed == 6:
            break
    assert killed == 6
    assert ended(start(out)) == 0, (tmp_path / "stderr").read_text()
    assert out.read_bytes() == expected
    assert os.listdir(out.parent) == ["s.parquet"]
