"""What does GAPT cost? An update that memorizes or compresses beside a bare PyTorch loop: time and peak memory.

GPT-2-small's shape (12 blocks of 768, 50 257 tokens), 512 tokens an update, AdamW, clipping. The bare loop is forward,
cross-entropy, backward, clip, step. Updates are timed in turn on one model; memory is that of a process for each way.

    python benchmarks/gapt.py              # ratios beside their targets; exit 1 if one is missed
    python benchmarks/gapt.py --rounds 9 --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WAYS = ("bare", "memorize", "compress")
TOKENS = 512
MOST = {"memorize": 1.02, "compress": 1.08, "memory": 1.05}  # times the bare loop's


def updates(names: tuple[str, ...], device: str, dtype: str) -> dict[str, Callable[[], None]]:
    """What is timed: one update each, on one model."""
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F

    from memdiag import checkpoint, gapt, training
    from memdiag.gapt_training import Method, Run
    from memdiag.packing import Corpus

    config = checkpoint.read_config("gpt2-small")
    model = checkpoint.new_model("gpt2-small", config, seed=0).to(device)
    recipe = training.Recipe(steps=10**9, batch_size=1, lr=1e-5)
    at = training.begin(model, recipe)
    n = 64
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], n * TOKENS).astype(np.int32)
    corpus = Corpus(ids, np.arange(n, dtype=np.int64) * TOKENS, np.full(n, TOKENS, dtype=np.int64), n, 0)
    autocast = None if dtype == "float32" else getattr(torch, dtype)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            logits = at.model(batch, use_cache=False).logits
        labels = F.pad(batch[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)

    def bare() -> None:
        rows = training.rows_of_update(at.step, n, 1, 0)
        batch = torch.from_numpy(ids.reshape(n, TOKENS)[rows].astype(np.int64)).to(device)
        loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(at.model.parameters(), 1.0)
        at.optimizer.step()
        at.optimizer.zero_grad(set_to_none=True)
        at.step += 1
        loss.item()

    def ours(gate: str) -> Callable[[], None]:
        method = Method(gapt.Rule(gate=gate), ratio_every=0)
        run = Run(at, recipe, method, corpus, autocast=autocast)
        steps = training.train(at, recipe, run.backward)
        return lambda: (next(steps), None)[1]

    ways = {"bare": bare, "memorize": lambda: None, "compress": lambda: None}
    for name, gate in (("memorize", "none"), ("compress", "constant")):
        if name in names:
            ways[name] = ours(gate)
    return {name: ways[name] for name in names}


def timed(function: Callable[[], None], device: str) -> float:
    import torch

    began = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ratios(rounds: int, device: str, dtype: str) -> tuple[dict[str, float], dict[str, float]]:
    """Median over rounds of each way's time over the bare loop's, and tokens per second.

    The hooks of one run would see the passes of the others; they keep nothing but a reference, in either case.
    """
    ways = updates(WAYS, device, dtype)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for i in range(rounds + 1):
        taken = {name: timed(ways[name], device) for name in (WAYS if i % 2 == 0 else WAYS[::-1])}
        if i > 0:  # the first call of everything is slow
            for name in WAYS:
                found[name].append(taken[name] / taken["bare"])
                seconds[name].append(taken[name])
    speed = {name: TOKENS / statistics.median(times) for name, times in seconds.items()}
    return {name: statistics.median(values) for name, values in found.items()}, speed


def peak(name: str, device: str, dtype: str) -> float:
    """MiB that a process needs for three updates of one way."""
    command = [sys.executable, __file__, "--peak", name, "--device", device, "--dtype", dtype]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(name: str, device: str, dtype: str) -> None:
    import torch

    from memdiag import device as devices

    way = updates((name,), device, dtype)[name]
    for _ in range(3):
        way()
    used = torch.cuda.max_memory_allocated() if device == "cuda" else devices.peak_memory()
    print(used / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(args.peak, args.device, args.dtype)
        return
    found, speed = ratios(args.rounds, args.device, args.dtype)
    memory = {name: peak(name, args.device, args.dtype) for name in WAYS}
    print(f"{'update':10} {'tokens/s':>9} {'time':>7} {'target':>8} {'MiB':>7} {'memory':>7} {'target':>8}")
    failed = False
    for name in WAYS:
        share = memory[name] / memory["bare"]
        targets = ("", "") if name == "bare" else (f"<= {MOST[name]}", f"<= {MOST['memory']}")
        print(
            f"{name:10} {speed[name]:9.0f} {found[name]:7.3f} {targets[0]:>8} {memory[name]:7.0f} {share:7.3f}"
            f" {targets[1]:>8}"
        )
        failed |= name != "bare" and (found[name] > MOST[name] or share > MOST["memory"])
    sys.exit(failed)


if __name__ == "__main__":
    main()
