"""One contract for every engine: each item is done, a bad one costs no other, and what is stopped can go on."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path

import engine_work as work
import pytest
from engine_work import calls, path_of, run

from memdiag import engine, engine_ray
from memdiag.engine import ATTEMPTS, Engine
from memdiag.errors import IncompleteError, InputError

HERE = Path(__file__).resolve().parent
HAS_RAY = importlib.util.find_spec("ray") is not None and " " not in sys.executable  # Ray cannot start from there
NEEDS_RAY = [pytest.mark.slow, pytest.mark.skipif(not HAS_RAY, reason='needs Ray: pip install "memdiag[ray]"')]
RAY = pytest.param("ray", marks=NEEDS_RAY)
BESIDE = pytest.mark.parametrize("name", ["inline", RAY])  # engines whose work is in processes of its own
EVERY = pytest.mark.parametrize("name", ["inline", "one by one", RAY])
CHUNKS = [(0, 1, 2), (3, 4), (5,), (6, 7)]
ITEMS = range(8)


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """A cluster of two cores as the engine starts it, kept for the tests that do not start or end one themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 2)
        patch.setenv("OMP_NUM_THREADS", "3")
        handler = signal.getsignal(signal.SIGTERM)
        with engine_ray.connected(None) as ray:
            assert signal.getsignal(signal.SIGTERM) is handler  # the command line's, which says 143
            patch.undo()
            yield ray


@pytest.fixture
def options(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    if name == "ray":
        request.getfixturevalue("cluster")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    return Engine(one_by_one=True) if name == "one by one" else Engine(name)


def whole(folder: Path) -> set[int]:
    """The items that are there; all of them are whole."""
    found = {int(path.stem): path.read_bytes() for path in folder.glob("*.item")}
    assert all(data == f"{k} {k**2}".encode() * 1000 for k, data in found.items())
    return set(found)


def alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- everything is done --------------------------------------------------------------------------------------------


@EVERY
def test_every_item_is_done_once_with_the_same_bytes(options: Engine, tmp_path: Path) -> None:
    progress = run(work.write, CHUNKS, tmp_path, options)
    assert whole(tmp_path) == set(ITEMS)
    assert [calls(tmp_path, k) for k in ITEMS] == [1] * 8
    assert progress.n == 3 * 8
    assert not (tmp_path / "logs").exists()


@EVERY
@pytest.mark.parametrize(("chunks", "n"), [([], 0), ([()], 0), ([(0,)], 1), ([(), (0, 1, 2)], 3), ([(5,), (0,)], 2)])
def test_few_chunks(options: Engine, tmp_path: Path, chunks: list[tuple[int, ...]], n: int) -> None:
    progress = run(work.write, chunks, tmp_path, options)
    assert whole(tmp_path) == {k for chunk in chunks for k in chunk}
    assert progress.n == 3 * n


@EVERY
def test_what_is_there_is_not_done_again(options: Engine, tmp_path: Path) -> None:
    for k in (0, 4, 5):
        work.finish(tmp_path, k)
    progress = run(work.write, CHUNKS, tmp_path, options)
    assert whole(tmp_path) == set(ITEMS)
    assert [calls(tmp_path, k) for k in ITEMS] == [0, 1, 1, 1, 0, 0, 1, 1]
    assert progress.n == 3 * 5


def test_what_another_machine_did_meanwhile_is_left_out(tmp_path: Path) -> None:
    def done(k: int) -> bool:
        if k == 5 and path_of(tmp_path, 0).exists() and not path_of(tmp_path, 5).exists():
            work.finish(tmp_path, 5)
        return path_of(tmp_path, k).exists()

    run(work.write, [(0,), (4, 5)], tmp_path, Engine(one_by_one=True), done)
    assert [calls(tmp_path, k) for k in (0, 4, 5)] == [1, 1, 0]


@BESIDE
def test_work_beside_other_work_has_one_thread(
    options: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # of a cluster, when it started
    run(work.threads, [(0,), (1,)], tmp_path, options)
    assert [path_of(tmp_path, k).read_text().split()[0] for k in (0, 1)] == ["1", "1"]
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert str(os.getpid()) not in {path_of(tmp_path, k).read_text().split()[1] for k in (0, 1)}


def test_one_by_one_is_in_this_process(tmp_path: Path) -> None:
    run(work.threads, [(0,), (1,)], tmp_path, Engine(one_by_one=True))
    assert {path_of(tmp_path, k).read_text().split()[1] for k in (0, 1)} == {str(os.getpid())}


# -- something fails -----------------------------------------------------------------------------------------------


@BESIDE
def test_a_process_that_is_killed_costs_one_attempt(
    options: Engine, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    progress = run(work.kill_itself_once, CHUNKS, tmp_path, options, bad=1)
    assert whole(tmp_path) == set(ITEMS)
    assert progress.n == (7 if options.name == "ray" else 8)  # of item 0, what the dead had to say is lost under Ray
    assert [calls(tmp_path, k) for k in ITEMS] == [1, 2, 1, 1, 1, 1, 1, 1]  # 0 was done, 2 had not begun
    (log,) = (tmp_path / "logs").iterdir()
    assert log.name == "chunk-0-2.attempt-1.log"
    assert "SIGKILL" in log.read_text() or "died" in log.read_text()
    assert capfd.readouterr() == ("", "")


@BESIDE
def test_an_item_that_kills_every_process_costs_the_others_nothing(options: Engine, tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match="1 of 5 models failed: 0; see"):
        run(work.kill_itself, [(0,), (1,), (2,), (3,), (4,)], tmp_path, options, bad=0)
    assert whole(tmp_path) == {1, 2, 3, 4}
    assert [calls(tmp_path, k) for k in range(5)] == [ATTEMPTS, 1, 1, 1, 1]


@EVERY
def test_an_item_that_fails_every_time_is_named_and_the_others_are_done(options: Engine, tmp_path: Path) -> None:
    with pytest.raises(IncompleteError) as caught:
        run(work.fail, CHUNKS, tmp_path, options, bad=1, times=99)
    logs = tmp_path / "logs"
    assert str(caught.value) == f"1 of 8 models failed: 1; see {logs}; run the same command again to try them again"
    assert whole(tmp_path) == set(ITEMS) - {1}
    assert [calls(tmp_path, k) for k in ITEMS] == [2, ATTEMPTS, 2, 1, 1, 1, 1, 1]
    names = ["chunk-0-2.attempt-1.log", "chunk-1-1.attempt-2.log", "chunk-1-1.attempt-3.log"]
    assert sorted(path.name for path in logs.iterdir()) == names
    for name in names:
        text = (logs / name).read_text()
        assert text.startswith("Traceback")
        assert "in fail\n" in text
        assert text.endswith("ZeroDivisionError: item 1 is bad\n")


@EVERY
@pytest.mark.parametrize("times", [1, 2])
def test_an_item_that_fails_at_first_is_done_in_the_end(options: Engine, tmp_path: Path, times: int) -> None:
    progress = run(work.fail, CHUNKS, tmp_path, options, bad=1, times=times)
    assert whole(tmp_path) == set(ITEMS)
    assert [calls(tmp_path, k) for k in ITEMS] == [2, times + 1, 2, 1, 1, 1, 1, 1]
    assert progress.n == 8  # steps of a failed attempt are taken back


@EVERY
def test_work_that_leaves_no_file_has_failed(options: Engine, tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match="3 of 3 models failed: 0-2; see"):
        run(work.forget, [(0, 1), (2,)], tmp_path, options)
    assert [calls(tmp_path, k) for k in range(3)] == [ATTEMPTS] * 3
    assert "the file is not there" in (tmp_path / "logs" / "chunk-0-1.attempt-1.log").read_text()


@EVERY
@pytest.mark.parametrize("incomplete", [False, True])
def test_an_error_for_the_user_ends_it_at_once(options: Engine, tmp_path: Path, incomplete: bool) -> None:
    began, kind = time.monotonic(), IncompleteError if incomplete else InputError
    with pytest.raises(kind) as caught:
        run(work.refuse, [(1,), (0,), (2,), (3,)], tmp_path, options, bad=1, incomplete=incomplete)
    assert type(caught.value) is kind
    assert str(caught.value) == "item 1 is at fault"
    assert time.monotonic() - began < 20  # the others take a minute each
    assert calls(tmp_path, 1) == 1
    assert not (tmp_path / "logs").exists()
    assert whole(tmp_path) == set()


def test_processes_that_cannot_begin_are_no_fault_of_the_items(tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match="end before they begin"):
        run(work.write, [(0,), (1,)], tmp_path, Engine(), context=work.Deadly())
    assert not (tmp_path / "logs").exists()


def test_processes_that_die_before_they_begin_now_and_then_do_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    run(work.kill_itself_once, [(0,), (1,)], tmp_path, Engine(), bad=work.Unsteady(tmp_path, 0))
    assert whole(tmp_path) == {0, 1}
    assert calls(tmp_path, 1000) == 6  # two processes had the work, after two each that had not


# -- stopped -------------------------------------------------------------------------------------------------------

SCRIPT = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import os
os.cpu_count = lambda: 2
from pathlib import Path
import engine_work as work
from memdiag.engine import Engine
if __name__ == "__main__":
    work.run(work.linger, [(0, 1), (2, 3), (4,), (5,)], Path(sys.argv[1]), Engine(sys.argv[2]))
"""


@pytest.fixture
def lingering(name: str, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that dispatches, in a group of its own, when two items are half-written."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    temporary = tempfile.mkdtemp(prefix="m")  # short: Ray has sockets in it; nobody empties it after a kill
    with (tmp_path / "stderr").open("wb") as stderr:
        command = [sys.executable, str(script), str(tmp_path), name]
        process = subprocess.Popen(
            command, stderr=stderr, start_new_session=True, env=os.environ | {"TMPDIR": temporary}
        )
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.partial"))) < 2:
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what Ray leaves for a while when its parent was killed
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def workers_end(folder: Path, seconds: float) -> bool:
    pids = [int(path.stem) for path in folder.glob("*.pid")]
    assert len(pids) == 2
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("group", [False, True])
@BESIDE
def test_ctrl_c_ends_everything_and_it_goes_on_from_there(
    lingering: subprocess.Popen[bytes], name: str, group: bool, options: Engine, tmp_path: Path
) -> None:
    (os.killpg if group else os.kill)(lingering.pid, signal.SIGINT)  # a terminal sends it to all processes
    assert lingering.wait(timeout=20) == -signal.SIGINT
    stderr = (tmp_path / "stderr").read_text()
    assert stderr.count("Traceback") == 1, stderr
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert workers_end(tmp_path, 5)
    before = whole(tmp_path)
    assert before == {0, 1, 2}
    assert not (tmp_path / "logs").exists()
    run(work.write, [(0, 1), (2, 3), (4,), (5,)], tmp_path, options)
    assert whole(tmp_path) == set(range(6))
    assert [calls(tmp_path, k) for k in range(6)] == [1, 1, 1, 2, 2, 1]


@BESIDE
def test_no_work_outlives_a_kill_9(lingering: subprocess.Popen[bytes], name: str, tmp_path: Path) -> None:
    lingering.kill()
    lingering.wait()
    assert workers_end(tmp_path, 15)
    assert whole(tmp_path) == {0, 1, 2}


# -- Ray -----------------------------------------------------------------------------------------------------------


def test_importing_the_engine_imports_neither_ray_nor_torch() -> None:
    code = "import sys, memdiag.engine; print({'ray', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_a_path_with_a_space_is_refused_before_ray_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = types.SimpleNamespace(__file__="/lib/ray/__init__.py", is_initialized=lambda: False)
    monkeypatch.setattr(engine_ray, "_ray", lambda: ray)
    monkeypatch.setattr(sys, "executable", "/my envs/bin/python")
    said = r"^--engine ray: Ray cannot start from a path with a space, /my envs/bin/python; .* use --engine inline$"
    with pytest.raises(InputError, match=said), engine_ray.connected(None):
        pass


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'^--engine ray needs Ray, which is not .* pip install "memdiag\[ray\]"$'):
        run(work.write, [(0,)], tmp_path, Engine("ray"))


CONNECTS = """
import sys
from functools import partial
from pathlib import Path
from memdiag.engine import Engine, dispatch
from memdiag.progress import Progress
def write(chunk, advance, folder):
    for k in chunk:
        (folder / f"{k}.item").write_text("x")
folder = Path(sys.argv[1])
dispatch(partial(write, folder=folder), [(0, 1), (2,)], engine=Engine("ray", ray_address=sys.argv[2]),
    done=lambda k: (folder / f"{k}.item").exists(), logs=folder / "logs", progress=Progress())
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="needs Ray")
def test_a_cluster_that_was_there_before_stays(cluster: object, tmp_path: Path) -> None:
    ray = sys.modules["ray"]
    script = tmp_path / "script.py"
    script.write_text(CONNECTS)
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, str(script), str(tmp_path), address]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.glob("*.item")) == ["0.item", "1.item", "2.item"]
    (tmp_path / "again").mkdir()
    run(work.write, [(0,)], tmp_path / "again", Engine("ray"))
    assert whole(tmp_path / "again") == {0}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="needs Ray")
def test_a_share_of_a_gpu_that_is_not_there_is_refused(cluster: object, tmp_path: Path) -> None:
    there = sys.modules["ray"].cluster_resources().get("GPU", 0)
    with pytest.raises(InputError, match=rf"^--ray-gpus is {there + 1:g}; the Ray cluster has {there:g} GPUs$"):
        run(work.write, [(0,)], tmp_path, Engine("ray", ray_gpus=there + 1))


@pytest.mark.skipif(not HAS_RAY, reason="needs Ray")
def test_an_address_where_nobody_answers_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules.get("ray") or engine_ray._ray(), "is_initialized", lambda: False)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"^--ray-address 127.0.0.1:1: nobody answers there: .*refused"):
        run(work.write, [(0,)], tmp_path, Engine("ray", ray_address="127.0.0.1:1"))
    assert time.monotonic() - began < 5


def test_another_version_on_a_machine_of_the_cluster_is_refused(tmp_path: Path) -> None:
    outcome, steps = engine_ray._at_work(lambda chunk, advance: advance(1), (0,), "0.0.0")
    assert (type(outcome), steps) == (InputError, 0)
    assert str(outcome).startswith("this is memdiag 0.0.0, a machine of the Ray cluster has ")


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "rya"}, "no engine 'rya'; there are inline, ray; did you mean 'ray'?"),
        ({"ray_address": "auto"}, "--ray-address needs --engine ray"),
        ({"ray_gpus": 0.5}, "--ray-gpus needs --engine ray"),
        ({"name": "ray", "ray_gpus": -1.0}, "--ray-gpus is -1.0; it is from 0 to 1, or a whole number"),
        ({"name": "ray", "ray_gpus": 1.5}, "--ray-gpus is 1.5; it is from 0 to 1, or a whole number"),
        ({"name": "ray", "ray_gpus": float("nan")}, "--ray-gpus is nan; it is from 0 to 1, or a whole number"),
        ({"name": "ray", "ray_gpus": float("inf")}, "--ray-gpus is inf; it is from 0 to 1, or a whole number"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Engine(**options)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize("options", [{}, {"ray_address": "auto"}, {"ray_gpus": 0.25}, {"ray_gpus": 2.0}])
def test_options_that_make_sense(options: dict[str, object]) -> None:
    assert Engine("ray", **options).name == "ray"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("items", "shown"),
    [([4], "4"), ([20, 22, 4, 21, 17, 25, 24], "4, 17, 20-22, 24-25"), (range(9), "0-8")],
)
def test_failed_items_are_listed_as_ranges(items: list[int], shown: str) -> None:
    assert engine._ranges(items) == shown


def test_a_long_list_of_failed_items_is_cut() -> None:
    assert engine._ranges(range(0, 40, 2)).endswith("36, 38")
    assert engine._ranges(range(0, 42, 2)).endswith("36, 38, …")
