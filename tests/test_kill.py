"""Stopped at any moment, by anything: nothing finished is lost, nothing half-written is ever read."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

import memdiag

pytestmark = pytest.mark.slow
KILLS = 5
PRELOAD = [
    *("memdiag.cli", "memdiag.entropy_run", "memdiag.entropy_view", "memdiag.checkpoint.huggingface"),
    *("transformers.models.gpt2.modeling_gpt2", "pandas", "pyarrow.compute"),
]
CALLS = ("os.mkdir", "open", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")  # what changes a directory


def command(argv, stderr, die_at):
    """`memdiag` with these arguments; kill -9 at the die_at-th time that it touches its output directory."""
    file = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if die_at is not None:
        where, seen = os.path.dirname(os.path.abspath(argv[argv.index("-o") + 1])), [0]

        def hook(event, args):
            if event in CALLS and args and where in os.path.abspath(os.fsdecode(args[0] or "")):
                seen[0] += 1
                if seen[0] == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
    from memdiag import cli

    cli.run(argv)


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have everything imported already: they do at once what is to be stopped."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@pytest.fixture
def start(processes, tmp_path, fixtures):
    """`memdiag entropy` of the run to tmp_path/out/e.parquet as a process."""
    out = tmp_path / "out" / "e.parquet"

    def start(*args, limit=150, die_at=None, data=None, to=out):
        argv = ["entropy", fixtures / "run", "-d", data or "task:pydoc?chars=200", "--limit", limit, "-o", to, *args]
        process = processes.Process(target=command, args=([str(a) for a in argv], tmp_path / "stderr", die_at))
        process.start()
        return process

    return start


def said(tmp_path):
    return (tmp_path / "stderr").read_text()


def ended(process, timeout=120):
    process.join(timeout)
    assert process.exitcode is not None
    return process.exitcode


def parts_of(folder):
    """Name, inode and time of every finished part."""
    found = sorted((folder / ".e.parquet.parts").glob("*.parquet"))
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def left(folder):
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_kill_9_at_random_moments(start, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole" / "e.parquet"
    assert ended(start("--steps", "0", to=tmp_path / "first.parquet", limit=1)) == 0  # imports are not to be timed
    began = time.monotonic()
    assert ended(start(to=whole)) == 0
    lasts = time.monotonic() - began
    expected, dice, kills, before = whole.read_bytes(), random.Random(1), 0, {}
    for _ in range(20 * KILLS):
        if kills == KILLS:
            break
        process = start()
        process.join(dice.uniform(0.1, 0.6) * lasts)
        process.kill()
        if ended(process) == 0:  # too late: it was through
            assert (out / "e.parquet").read_bytes() == expected
            assert left(out) == ["e.parquet"]
            shutil.rmtree(out)
            before = {}
            continue
        kills += 1
        assert process.exitcode == -signal.SIGKILL
        now = parts_of(out)
        assert {name: now.get(name) for name in before} == before or (out / "e.parquet").exists()
        before = now
    assert kills == KILLS
    assert ended(start()) == 0
    assert (out / "e.parquet").read_bytes() == expected
    assert left(out) == ["e.parquet"]


def test_kill_9_at_every_step_that_touches_a_file(start, tmp_path, fixtures):
    """At the 1st, 2nd, ... call that makes, moves or removes something; each time the next run goes on from there."""
    small = {"limit": 2, "data": fixtures / "texts.jsonl"}
    args, whole = ("--steps", "0,50"), tmp_path / "whole" / "e.parquet"
    assert ended(start(*args, to=whole, **small)) == 0
    expected, out = whole.read_bytes(), tmp_path / "out"
    for at in range(1, 200):
        code = ended(start(*args, die_at=at, **small))
        if code == 0:
            break
        assert code == -signal.SIGKILL, said(tmp_path)
        if at % 2:  # else the next one finds what two of them have left behind
            assert ended(start(*args, **small)) == 0, said(tmp_path)
            assert (out / "e.parquet").read_bytes() == expected
            assert left(out) == ["e.parquet"]
            shutil.rmtree(out)
    assert at > 10
    assert (out / "e.parquet").read_bytes() == expected
    assert left(out) == ["e.parquet"]


def test_kill_9_while_a_report_is_replaced_leaves_the_old_one_or_the_new_one(start, tmp_path, fixtures):
    small = {"limit": 2, "data": fixtures / "texts.jsonl"}
    out = tmp_path / "out" / "e.parquet"
    reports = {}
    for alpha in ("1", "2"):
        assert ended(start("--steps", "0", "--alpha", alpha, "--force", **small)) == 0
        reports[alpha] = out.read_bytes()
    seen = set()
    for at in range(1, 100):
        code = ended(start("--steps", "0", "--alpha", "1", "--force", die_at=at, **small))
        seen.add(out.read_bytes())
        assert seen <= set(reports.values())
        if code == 0:
            break
        out.write_bytes(reports["2"])
    assert seen == set(reports.values())


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_it_leaves_what_is_finished_and_no_more(start, tmp_path, sent, code):
    out = tmp_path / "out"
    process = start("-q", limit=800)
    wait_for(lambda: len(parts_of(out)) >= 2 or not process.is_alive())
    os.kill(process.pid, sent)
    assert ended(process) == code
    assert said(tmp_path).strip() == ""
    assert left(out) == [".e.parquet.parts"]
    names = left(out / ".e.parquet.parts")
    assert [name for name in names if name.endswith(".partial")] == []
    before = parts_of(out)
    process = start("-q", limit=800)
    wait_for(lambda: len(parts_of(out)) > len(before) or not process.is_alive())
    now = parts_of(out)
    process.kill()
    ended(process)
    assert {name: now[name] for name in before} == before


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_before_anything_is_finished_it_leaves_nothing(start, tmp_path, sent, code):
    out = tmp_path / "out"
    process = start("-q", limit=800)
    wait_for((out / ".e.parquet.parts" / "identity.json").exists)
    os.kill(process.pid, sent)
    assert ended(process) == code
    assert left(out) == []


def test_ctrl_c_in_a_terminal(fixtures, tmp_path):
    """The real thing: a process of its own, all its threads and imports."""
    out = tmp_path / "out"
    args = ["-m", "memdiag", "entropy", fixtures / "run", "-d", "task:pydoc?chars=200", "-o", out / "e.parquet"]
    process = subprocess.Popen([sys.executable, *map(str, args)], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_for((out / ".e.parquet.parts" / "identity.json").exists)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr.decode()) == (130, b"", "")
    assert not list(out.rglob("*.partial"))


# -- a full disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def little_space(tmp_path):
    """(a directory, a function that makes room in it, what to do in the process that is to run out of space)."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "memdiag-test", str(place)]
    if os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0:
        yield place, lambda: subprocess.run(["mount", "-o", "remount,size=4m", str(place)], check=True), None
        subprocess.run(["umount", str(place)], check=True)
        return

    def limited():  # a file may not grow: the nearest thing that needs no rights
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 1024, resource.RLIM_INFINITY))

    yield place, lambda: None, limited


def test_a_full_disk(fixtures, little_space):
    place, make_room, limited = little_space
    args = ["-m", "memdiag", "entropy", fixtures / "run", "-d", fixtures / "texts.jsonl", "-o", place / "e.parquet"]

    def run(preexec=None):
        return subprocess.run(
            [sys.executable, *map(str, args)], capture_output=True, text=True, check=False, preexec_fn=preexec
        )

    done = run(limited)
    assert (done.returncode, done.stdout) == (3, ""), done
    (line,) = done.stderr.splitlines()
    assert "the disk is full; free some space and run the same command again to go on" in line
    assert str(place) in line
    assert not (place / "e.parquet").exists()
    assert not list(place.rglob("*.partial"))
    for part in place.rglob("*.parquet"):  # what is there is whole
        assert memdiag.read(part).table.num_rows == 4
    make_room()
    done = run()
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{place / 'e.parquet'}\n", "")
    assert left(place) == ["e.parquet"]
    assert memdiag.read(place / "e.parquet").table.num_rows % 4 == 0


# -- two at once ---------------------------------------------------------------------------------------------------


def test_two_processes_on_one_report(processes, fixtures, tmp_path):
    out = tmp_path / "out" / "e.parquet"
    argv = ["entropy", fixtures / "run", "-d", "task:pydoc?chars=200", "--limit", 100, "-o", out]
    names = [tmp_path / "one", tmp_path / "two"]
    both = [processes.Process(target=command, args=([str(a) for a in argv], name, None)) for name in names]
    for process in both:
        process.start()
    codes = [ended(process) for process in both]
    told = [name.read_text().splitlines() for name in names]
    assert sorted(codes) in ([0, 2], [0, 0]), told
    for code, lines in zip(codes, told):
        (line,) = [line for line in lines if line.startswith("memdiag: ")] or [""]
        if code == 2:
            assert line == f"memdiag: another process is writing {out}; wait for it, or choose another --out"
    assert left(out.parent) == ["e.parquet"]
    alone = memdiag.entropy(fixtures / "run", data="task:pydoc?chars=200", limit=100)
    assert memdiag.read(out).table.equals(alone.table)
