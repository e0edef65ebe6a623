"""How fast are many models trained at once? Ratios of times taken in turn, one run.

The obvious way is a plain PyTorch loop, model after model. Beside it: `ensemble.train` in one thread, what the command
does with a process for every core, and on a GPU 256 models at once. Of one thread CPU seconds are taken, which other
work on the machine hardly changes; of several processes and of a GPU wall time.

    python benchmarks/counterfactual.py            # ratios beside their targets; exit 1 if one is missed
    python benchmarks/counterfactual.py --cuda     # on a GPU instead
    python benchmarks/counterfactual.py --command  # also 400 models by the whole command, in seconds
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    import torch

    from memdiag.ensemble import Data, Member
    from memdiag.training import Recipe

WIDTHS = (64, 128, 128, 10)
N, SUBSET, EPOCHS, BATCH, LR = 1436, 1005, 60, 64, 0.1  # 70 % of the digits that the command trains on
SHAPES = ((4, 32), (16, 64))  # of a language model's update: texts, tokens
ON_GPU = 256
LEAST = {"one thread": 2.5, "all cores": 4.0, "language model": 1.5, "cuda": 20.0}
BY_COMMAND, BY_WHOLE_COMMAND = 64, 400  # models


class Digits:
    """The digits model, both ways."""

    def __init__(self, device: str) -> None:
        import numpy as np
        import torch
        from sklearn.datasets import load_digits

        from memdiag import training
        from memdiag.ensemble import Data
        from memdiag.models.mlp import MLP, MlpConfig
        from memdiag.supervised import Examples
        from memdiag.training import Recipe

        pixels, labels = load_digits(return_X_y=True)
        x, y = (pixels[:N] / 16).astype(np.float32), labels[:N].astype(np.int64)
        mean, std = float(x.mean()), float(x.std())
        config = MlpConfig(WIDTHS, input_mean=mean, input_std=std)

        def new(seed: int) -> MLP:
            with training.seeded(seed):
                return MLP(config)

        self.new, self.device = new, torch.device(device)
        self.data = Data(Examples(np.arange(N), [str(i) for i in range(N)], x, y), 0, self.device)
        self.x = ((torch.from_numpy(x) - mean) / std).to(device)
        self.y = torch.from_numpy(y).to(device)
        self.recipe = Recipe(
            steps=-(-EPOCHS * SUBSET // BATCH), batch_size=BATCH, lr=LR, optimizer="sgd", weight_decay=0.0, clip=0.0
        )

    def member(self, k: int) -> Member:
        import numpy as np

        from memdiag.ensemble import Member

        return Member(k, np.random.default_rng(k).permutation(N) < SUBSET, k)

    def loop(self, k: int) -> torch.nn.Module:
        """One model, as anyone would write it."""
        import numpy as np
        import torch
        from torch import nn

        rows = torch.from_numpy(np.flatnonzero(self.member(k).included)).to(self.device)
        net = nn.Sequential(
            nn.Linear(WIDTHS[0], WIDTHS[1]), nn.ReLU(), nn.Linear(WIDTHS[1], WIDTHS[2]), nn.ReLU(),
            nn.Linear(WIDTHS[2], WIDTHS[3]),
        ).to(self.device)  # fmt: skip
        optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        loss_of = nn.CrossEntropyLoss()
        for _ in range(EPOCHS):
            for at in rows[torch.randperm(len(rows), device=self.device)].split(BATCH):
                loss = loss_of(net(self.x[at]), self.y[at])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        return net

    def at_once(self, size: int) -> list[torch.nn.Module]:
        from memdiag import ensemble

        return ensemble.train(
            [self.member(k) for k in range(size)], self.new, self.data, self.recipe, way="stacked"
        )  # fmt: skip

    def chunk(self, most: int) -> int:
        from memdiag import ensemble

        return ensemble.size_of_chunk(self.new, self.data, self.recipe, way="stacked", most=most)

    def learned(self, model: torch.nn.Module, k: int, *, scaled: bool) -> float:
        """Accuracy on what the model was trained on, so that both ways are seen to do the same work."""
        import torch

        included = torch.from_numpy(self.member(k).included).to(self.device)
        with torch.no_grad():
            right = model(self.x if scaled else self.data.batch(torch.arange(N))["features"]).argmax(1) == self.y
        return float(right[included].float().mean())


class Language:
    """gpt2-tiny on random texts of one length, both ways; `loop` and `at_once` return seconds of a model's update."""

    def __init__(self, shape: tuple[int, int], device: str) -> None:
        import numpy as np
        import torch

        from memdiag import checkpoint
        from memdiag.ensemble import Data
        from memdiag.packing import Corpus
        from memdiag.supervised import Examples
        from memdiag.training import Recipe

        n, (self.batch, length) = 256, shape
        config = checkpoint.read_config("gpt2-tiny")
        tokens = np.random.default_rng(0).integers(0, config["vocab_size"], n * length).astype(np.int32)
        corpus = Corpus(tokens, np.arange(n) * length, np.full(n, length), n, 0)
        self.new: Callable[[int], Any] = lambda seed: checkpoint.new_model("gpt2-tiny", config, seed)
        self.device = torch.device(device)
        self.data: Data = Data(Examples(np.arange(n), [str(i) for i in range(n)], corpus, None), 0, self.device)
        self.tokens = torch.from_numpy(tokens.astype(np.int64)).view(n, length).to(device)
        self.recipe: Recipe = Recipe(steps=1000, batch_size=self.batch, lr=1e-3, clip=1.0)

    def loop(self, updates: int, clock: Callable[[], float]) -> float:
        import torch
        from torch.nn import functional as F

        model = self.new(0).to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        for i in range(-2, updates):
            if i == 0:
                began = clock()
            at = torch.randint(len(self.tokens), (self.batch,), device=self.device)
            ids = self.tokens[at]
            logits = model(ids, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return (clock() - began) / updates

    def at_once(self, updates: int, clock: Callable[[], float]) -> float:
        import numpy as np

        from memdiag import ensemble
        from memdiag.ensemble import Member

        everyone = np.ones(len(self.data), dtype=np.bool_)
        size = ensemble.size_of_chunk(self.new, self.data, self.recipe, way="vmap", most=1024)
        members = [Member(k, everyone, k) for k in range(size)]
        ends = []
        for steps in (2, 2 + updates):  # the difference is without making the models
            began = clock()
            ensemble.train(members, self.new, self.data, self.recipe, way="vmap", steps=steps)
            ends.append(clock() - began)
        return (ends[1] - ends[0]) / updates / size


def clock_of(device: str) -> Callable[[], float]:
    """Of a GPU, after everything that was begun has ended."""
    import torch

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now if device == "cuda" else time.process_time


def told(what: str, values: list[float], unit: float = 1e3) -> float:
    """The median; all of them on stderr."""
    each = " ".join(f"{unit * value:.4g}" for value in values)
    print(f"  {what}: {each} ms", file=sys.stderr, flush=True)
    return statistics.median(values)


def seconds_of(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each way says it took, in turn forwards and backwards, so that a drift hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name in list(ways) if i % 2 == 0 else list(ways)[::-1]:
            taken = ways[name]()
            if i:  # the first call of everything is slow
                found[name].append(taken)
    return found


def timed(function: Callable[[], object], clock: Callable[[], float], models: int = 1) -> float:
    began = clock()
    function()
    return (clock() - began) / models


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Median, lowest and highest of the rounds' ratios."""
    each = [a / b for a, b in zip(slow, fast)]
    return statistics.median(each), min(each), max(each)


def products_of_an_update(size: int) -> float:
    """Floating-point operations of the matrix products of an update of `size` models."""
    layers = [2 * size * BATCH * i * o for i, o in itertools.pairwise(WIDTHS)]
    return float(3 * sum(layers) - layers[0])  # nothing goes back to the inputs


def rate_of_products(size: int) -> float:
    """Floating-point operations per CPU second of a large batched product, the best of several."""
    import torch

    a, b = torch.randn(size, 512, 512), torch.randn(size, 512, 512)
    taken = min(timed(lambda: torch.bmm(a, b), time.process_time) for _ in range(10))
    return 2 * size * 512**3 / taken


def of_command(models: int, chunk: int | None, folder: Path) -> tuple[float, float]:
    """Wall seconds of the command on a fresh directory, and of a model without start-up and reports.

    The latter is what the processes were busy for, over all of them, divided by their number.
    """
    from memdiag import counterfactual_report
    from memdiag.counterfactual_shards import FOLDER, time_path

    options = counterfactual_report.CounterfactualOptions(
        data="task:digits?split=train", models=models, chunk=chunk, epochs=EPOCHS, device="cpu"
    )
    began = time.perf_counter()
    counterfactual_report.measure(options, out=folder)
    whole = time.perf_counter() - began
    if chunk is None:
        return whole, whole / models
    busy = 0.0
    for first in range(0, models, chunk):
        items = range(first, min(first + chunk, models))
        each = [json.loads(time_path(folder / FOLDER, k).read_text())["seconds"] for k in items]
        busy += max(each) * len(items)  # the last one to be written says what the whole chunk took
    return whole, busy / models / (os.cpu_count() or 1)


def language_in_a_process(shape: tuple[int, int], updates: int) -> float:
    """Wall seconds of a model's update, in a process beside others."""
    import torch

    torch.set_num_threads(1)
    language = Language(shape, "cpu")
    language.at_once(1, time.perf_counter)
    return language.at_once(updates, time.perf_counter)


class Table:
    """Prints the lines, and counts the targets that are missed."""

    missed = 0

    def line(self, what: str, found: tuple[float, float, float], least: float | None = None) -> None:
        middle, low, high = found
        verdict = ""
        if least is not None:
            self.missed += middle < least
            verdict = f"  target ≥ {least:g}  {'ok' if middle >= least else 'MISSED'}"
        print(f"  {what:58} {middle:7.2f} × ({low:.2f} to {high:.2f}){verdict}", flush=True)

    def say(self, what: str, value: str) -> None:
        print(f"  {what:58} {value}", flush=True)


def on_the_cpu(table: Table, rounds: int) -> None:
    cores = os.cpu_count() or 1
    digits, clock = Digits("cpu"), clock_of("cpu")
    size = digits.chunk(BY_COMMAND // cores if cores > 1 else BY_COMMAND)
    print(f"MLP {'-'.join(map(str, WIDTHS))} on {SUBSET} digits, {EPOCHS} epochs, median of {rounds} rounds (range)")
    for models, scaled in (([digits.loop(0)], True), (digits.at_once(2), False)):
        accuracy = digits.learned(models[0], 0, scaled=scaled)
        assert accuracy > 0.99, f"a model gets {accuracy:.1%} of its own examples right"
    ways = {
        "one by one": lambda: timed(lambda: digits.loop(1), clock),
        "at once": lambda: timed(lambda: digits.at_once(size), clock, size),
    }
    found = seconds_of(ways, rounds)
    loop, ours = told("a model, one by one", found["one by one"]), told(f"a model, {size} at once", found["at once"])
    table.say("CPU seconds of a model, one by one", f"{loop:7.3f} s")
    table.say(f"CPU seconds of a model, {size} at once", f"{ours:7.3f} s")
    table.line(f"{size} at once, one thread, over one by one", ratio(*found.values()), LEAST["one thread"])
    floor = digits.recipe.steps * products_of_an_update(size) / rate_of_products(size) / size
    table.line("time of an update over that of its bare matrix products", (ours / floor,) * 3)
    if cores == 1:
        table.say("a process for every core", "skipped: there is one core")
    else:
        walls: dict[str, list[float]] = {"loop": [], "busy": [], "whole": []}
        for _ in range(3):
            walls["loop"].append(timed(lambda: digits.loop(1), time.perf_counter))
            with tempfile.TemporaryDirectory() as folder:
                whole, busy = of_command(BY_COMMAND, size, Path(folder) / "out")
            walls["loop"][-1] = (walls["loop"][-1] + timed(lambda: digits.loop(1), time.perf_counter)) / 2
            walls["busy"].append(busy)
            walls["whole"].append(whole / BY_COMMAND)
        for name, values in walls.items():
            told(f"wall of a model, {name}", values)
        what = f"{cores} processes, {BY_COMMAND} models"
        table.line(f"{what}, over one by one", ratio(walls["loop"], walls["busy"]), LEAST["all cores"])
        table.line(f"{what}, with start-up and reports", ratio(walls["loop"], walls["whole"]))
    for shape, updates in zip(SHAPES, (24, 4)):
        language = Language(shape, "cpu")
        what = f"gpt2-tiny, {shape[0]} × {shape[1]} tokens"
        ways = {
            "one by one": lambda: language.loop(updates, clock),  # noqa: B023
            "at once": lambda: language.at_once(updates, clock),  # noqa: B023
        }
        found = seconds_of(ways, max(3, rounds // 2))
        for name, values in found.items():
            told(f"{what}, an update, {name}", values)
        table.line(f"{what}, one thread", ratio(*found.values()))
        if cores == 1:
            continue
        walls = {"loop": [], "all": []}
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(cores, mp_context=spawn) as pool:
            for _ in range(3):
                walls["loop"].append(language.loop(updates, time.perf_counter))
                each = list(pool.map(language_in_a_process, [shape] * cores, [2 * updates] * cores))
                walls["all"].append(1 / sum(1 / seconds for seconds in each))
        for name, values in walls.items():
            told(f"{what}, wall of an update, {name}", values)
        table.line(f"{what}, {cores} processes", ratio(*walls.values()), LEAST["language model"])


def on_a_gpu(table: Table, rounds: int) -> None:
    import torch

    digits, clock = Digits("cuda"), clock_of("cuda")
    print(f"{torch.cuda.get_device_name()}: MLP {'-'.join(map(str, WIDTHS))} on {SUBSET} digits, {EPOCHS} epochs")
    ways = {
        "one by one": lambda: timed(lambda: digits.loop(1), clock),
        "at once": lambda: timed(lambda: digits.at_once(ON_GPU), clock, ON_GPU),
    }
    found = seconds_of(ways, rounds)
    table.say("seconds of a model, one by one", f"{told('one by one', found['one by one']):8.4f} s")
    table.say(f"seconds of a model, {ON_GPU} at once", f"{told('at once', found['at once']):8.4f} s")
    table.line(f"{ON_GPU} at once over one by one", ratio(*found.values()), LEAST["cuda"])
    table.say("the command would train at once", f"{digits.chunk(1024)}")
    for shape in SHAPES:
        language = Language(shape, "cuda")
        ways = {
            "one by one": lambda: language.loop(30, clock),  # noqa: B023
            "at once": lambda: language.at_once(200, clock),  # noqa: B023
        }
        table.line(f"gpt2-tiny, {shape[0]} × {shape[1]} tokens", ratio(*seconds_of(ways, 3).values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cuda", action="store_true", help="measure on a GPU instead")
    parser.add_argument("--command", action="store_true", help=f"also {BY_WHOLE_COMMAND} models by the whole command")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    table = Table()
    (on_a_gpu if options.cuda else on_the_cpu)(table, options.rounds)
    if options.command:
        with tempfile.TemporaryDirectory() as folder:
            whole, _ = of_command(BY_WHOLE_COMMAND, None, Path(folder) / "out")
        table.say(f"the whole command, {BY_WHOLE_COMMAND} models, {os.cpu_count()} cores", f"{whole:7.1f} s")
    return int(table.missed > 0)


if __name__ == "__main__":
    sys.exit(main())
