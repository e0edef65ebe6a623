"""What does measuring cost over just running the model? Ratios of times taken in turn, in one run.

A GPT-2-small-shaped model with random weights (12 layers, width 768, 50257 tokens) reads 512-token sequences. The
floor is the bare forward pass over the same batches; the obvious way keeps all hidden states and decomposes every
sequence.

    python benchmarks/entropy.py            # ratios beside their targets; exit 1 if one is missed
    python benchmarks/entropy.py --rounds 9
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LENGTH, PER_BATCH = 512, 2
TARGETS = {"patch": 1.10, "all": 1.35}
MEMORY_TARGET = 1.15
FLAT_TARGET = 1.10  # the bare forward pass itself moves by a few hundredths from run to run


def prepare(n_batches: int):
    """The model, its batches of token ids, and what watches it."""
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from memdiag.dataset import Batch
    from memdiag.measuring import watch

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    shape = (PER_BATCH, LENGTH)
    batches = [
        Batch(
            example_ids=[str(PER_BATCH * i + j) for j in range(PER_BATCH)],
            rows=np.arange(PER_BATCH),
            input_ids=rng.integers(0, 50257, shape),
            mask=np.ones(shape, dtype=bool),
            features=None,
            labels=None,
            truncated=0,
        )
        for i in range(n_batches)
    ]
    return model, batches, watch(model, batches[0], None)


def ways(n_batches: int) -> dict[str, Callable[[], object]]:
    """What is timed, each over the same batches."""
    import torch

    from memdiag import observe
    from memdiag.entropy_report import EntropyOptions
    from memdiag.measuring import observe_all
    from memdiag.progress import Progress

    model, batches, watched = prepare(n_batches)

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches:
            inputs = observe.to_inputs(batch, model)
            observe.call(model, inputs)

    @torch.inference_mode()
    def obvious() -> list[float]:
        found = []
        for batch in batches:
            inputs = observe.to_inputs(batch, model)
            output = model(inputs.tokens, labels=inputs.tokens, output_hidden_states=True, use_cache=False)
            for hidden in output.hidden_states:
                for z in hidden:
                    p = torch.linalg.eigvalsh((z @ z.T).double())
                    p = p.clamp(min=0) / p.sum()
                    found.append(float(-p.square().sum().log()))
        return found

    def measured(unit: str) -> Callable[[], object]:
        options = EntropyOptions(unit=unit)
        return lambda: observe_all(watched, batches, options, Progress())

    return {"bare": bare, "patch": measured("patch"), "all": measured("all"), "obvious": obvious}


def times(rounds: int) -> dict[str, float]:
    """Median over rounds of each way's time over the bare forward pass of the same round."""
    candidates = ways(1)
    for way in candidates.values():
        way()
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds):
        taken = {}
        order = list(candidates) if i % 2 == 0 else list(candidates)[::-1]  # so that a drift hits both alike
        for name in order:
            began = time.perf_counter()
            candidates[name]()
            taken[name] = time.perf_counter() - began
        for name, seconds in taken.items():
            ratios[name].append(seconds / taken["bare"])
        print(f"  round {i + 1}/{rounds}: bare forward {taken['bare']:.2f} s", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in ratios.items()}


def peak_mb(way: str, n_batches: int) -> float:
    """Peak resident memory of a fresh process that does this over so many batches."""
    command = [sys.executable, __file__, "--peak", way, "--batches", str(n_batches)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", choices=["bare", "patch", "all", "obvious"], help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        ways(args.batches)[args.peak]()
        from memdiag.device import peak_memory

        print(peak_memory() / 2**20)
        return 0
    missed = 0

    def line(what: str, value: float, target: float | None) -> None:
        nonlocal missed
        verdict = "" if target is None else f"  target ≤ {target:.2f}  {'ok' if value <= target else 'MISSED'}"
        missed += target is not None and value > target
        print(f"{what:58} {value:6.2f} ×{verdict}", flush=True)

    print(f"memdiag entropy, 12 layers × 768, {LENGTH}-token sequences, median of {args.rounds} rounds")
    found = times(args.rounds)
    for name in ("patch", "all"):
        line(f"time, --unit {name}, over the bare forward pass", found[name], TARGETS[name])
    line("time, the obvious way, over the bare forward pass", found["obvious"], None)
    line("time, the obvious way, over --unit all", found["obvious"] / found["all"], None)
    few, many = 2, 16  # one batch would not show what a second one needs while the first is still held
    floor = {n: peak_mb("bare", n) for n in (few, many)}
    line("peak memory, bare forward pass, 8 × the data over 1 ×", floor[many] / floor[few], None)
    for name in ("patch", "all"):
        peak = {n: peak_mb(name, n) for n in (few, many)}
        line(f"peak memory, --unit {name}, over the bare forward pass", peak[many] / floor[many], MEMORY_TARGET)
        line(f"peak memory, --unit {name}, 8 × the data over 1 ×", peak[many] / peak[few], FLAT_TARGET)
    line("peak memory, the obvious way, over the bare forward pass", peak_mb("obvious", few) / floor[few], None)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
