"""How much faster than the obvious way are a training step and a pruning sweep? Ratios of times taken in turn, one run.

The setting of `memdiag prune-memorizers`: p = 97, 500 neurons, all 4704 training pairs at once. The obvious step is
one-hot inputs, autograd and AdamW; the obvious sweep copies the network, zeroes weights and runs all pairs, for every
point. One thread.

    python benchmarks/prune.py            # ratios beside their targets; exit 1 if one is missed
    python benchmarks/prune.py --rounds 9
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

P, WIDTH = 97, 500
STEPS = 10  # of each way in a round
POINTS = 25  # of the obvious sweep; its 501 points are all alike
TARGETS = {"float32": 2.2, "bfloat16": 3.5, "sweep": 50.0}


def has_bf16_units() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware (AMX on x86)."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def steps() -> dict[str, Callable[[], None]]:
    """What is timed: STEPS updates each."""
    import torch
    from torch.nn import functional as F

    from memdiag import grokking
    from memdiag.grokking import Design, Training
    from memdiag.modular import make_pairs

    pairs = make_pairs("addition", P, corruption=0.35, seed=0)
    operands, labels = grokking._trained_on(pairs)

    def obvious() -> Callable[[], None]:
        model = grokking.initial(P, Training(), 0).requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.0)
        features = F.one_hot(operands + torch.tensor([0, P]), 2 * P).sum(1).float()
        targets = F.one_hot(labels, P).float()

        def run() -> None:
            for _ in range(STEPS):
                optimizer.zero_grad(set_to_none=True)
                F.mse_loss(model(features), targets).backward()
                optimizer.step()

        return run

    def ours(dtype: str) -> Callable[[], None]:
        training = Training(dtype=dtype)
        first, last = grokking.weights_of(grokking.initial(P, training, 0))
        embed, readout = first.T.contiguous(), last.clone()
        design = Design.of(operands, labels, P, getattr(torch, dtype))
        optimizer = grokking._adamw([embed, readout], training)

        def run() -> None:
            for _ in range(STEPS):
                _, embed.grad, readout.grad = grokking.loss_and_gradients(embed, readout, design)
                optimizer.step()

        return run

    return {"obvious": obvious(), "float32": ours("float32"), "bfloat16": ours("bfloat16")}


def step_ratios(rounds: int) -> dict[str, float]:
    """Median over rounds of the obvious step's time over each way's."""
    ways = steps()
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        taken = {}
        for name in list(ways) if i % 2 == 0 else list(ways)[::-1]:  # so that a drift hits all alike
            began = time.perf_counter()
            ways[name]()
            taken[name] = time.perf_counter() - began
        if i == 0:
            continue  # the first call of everything is slow
        for name, seconds in taken.items():
            ratios[name].append(taken["obvious"] / seconds)
        print(
            f"  round {i}/{rounds}: obvious step {1000 * taken['obvious'] / STEPS:.1f} ms, "
            f"float32 {1000 * taken['float32'] / STEPS:.1f} ms",
            file=sys.stderr,
            flush=True,
        )
    return {name: statistics.median(values) for name, values in ratios.items()}


def sweep_ratio(rounds: int) -> float:
    """Median of the time of 501 obvious points over that of our sweep; checks that both give the same."""
    import torch
    from torch.nn import functional as F

    from memdiag import grokking, prune_modular, pruning
    from memdiag.grokking import Training
    from memdiag.modular import make_pairs

    pairs = make_pairs("addition", P, corruption=0.35, seed=0)
    training = Training(steps=300, eval_every=300, dtype="bfloat16" if has_bf16_units() else "float32")
    *_, (_, model) = grokking.train(pairs, training, seed=0)
    scores, examples = prune_modular.attribute(model, pairs)
    order = pruning.ranking(scores["memorization"], first="high")
    counts = pruning.counts_of(WIDTH, WIDTH)
    features = F.one_hot(torch.from_numpy(pairs.operands) + torch.tensor([0, P]), 2 * P).sum(1).float()

    def ours() -> list[pruning.Row]:
        a, weights = grokking.activations(model, pairs.operands), grokking.weights_of(model)[1]
        return pruning.curve(pruning.Readout(a, weights, None, examples), order, counts)

    def obvious(counts: list[int]) -> list[pruning.Row]:
        rows = []
        for n in counts:
            smaller = copy.deepcopy(model)
            first, last = grokking.weights_of(smaller)
            first[order[:n]] = 0
            last[:, order[:n]] = 0
            with torch.no_grad():
                rows.append({"n_pruned": n, **pruning.figures(smaller(features).numpy(), examples)})
        return rows

    some = counts[:: -(-len(counts) // POINTS)]
    ratios = []
    for i in range(rounds + 1):
        began = time.perf_counter()
        mine = ours()
        middle = time.perf_counter()
        theirs = obvious(some)
        ended = time.perf_counter()
        if i:
            ratios.append((ended - middle) / len(some) * len(counts) / (middle - began))
            print(f"  round {i}/{rounds}: our sweep {middle - began:.2f} s", file=sys.stderr, flush=True)
    for row in theirs:
        same = mine[row["n_pruned"]]
        wrong = [name for name in row if name.endswith("_acc") and row[name] != same[name]]
        assert not wrong, f"{wrong} differ at {row['n_pruned']} pruned"
    return statistics.median(ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    import torch

    torch.set_num_threads(1)
    missed = 0

    def line(what: str, value: float, target: float | None) -> None:
        nonlocal missed
        verdict = "" if target is None else f"  target ≥ {target:g}  {'ok' if value >= target else 'MISSED'}"
        missed += target is not None and value < target
        print(f"{what:66} {value:6.2f} ×{verdict}", flush=True)

    print(f"memdiag prune-memorizers, p = {P}, {WIDTH} neurons, one thread, median of {rounds} rounds")
    found = step_ratios(rounds)
    line("a training step, float32, faster than one-hot autograd", found["float32"], TARGETS["float32"])
    target = TARGETS["bfloat16"] if has_bf16_units() else None
    line("a training step, bfloat16, faster than one-hot autograd", found["bfloat16"], target)
    line("a sweep over 501 points, faster than a copy and a pass each", sweep_ratio(rounds), TARGETS["sweep"])
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
