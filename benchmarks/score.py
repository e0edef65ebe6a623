"""What does a per-example gradient norm cost? Ratios of times taken in turn, one run, one thread.

GraNd by the closed form of linear stacks beside one forward and backward of the same batch, as training does it, and
beside one backward per example; twice the batch beside once the batch.

    python benchmarks/score.py            # ratios beside their targets; exit 1 if one is missed
    python benchmarks/score.py --rounds 31
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NETWORKS = {"narrow": (64, 128, 128, 10), "wide": (784, 1024, 1024, 10)}
BATCH = 512
MOST_OF_A_PASS, MOST_OF_HALF = 3.0, 3.0
# where a pass is mostly multiplication the loop's own pass costs little more for each example: no target there
LEAST_OVER_LOOP: dict[str, float | None] = {"narrow": 50.0, "wide": None}
REPEATS = {"narrow": 10, "wide": 2}  # calls in one timing, but for the loop over examples


def ways(widths: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """What is timed, on one network and one batch."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    from memdiag.models.mlp import MLP, MlpConfig
    from memdiag.observe import Inputs
    from memdiag.observe.gradients import GradientNormer

    def batch(n: int) -> Inputs:
        g = torch.Generator().manual_seed(n)
        return Inputs(None, None, torch.randn(n, widths[0], generator=g), torch.randint(10, (n,), generator=g))

    trained, model = (MLP(MlpConfig(widths)) for _ in range(2))
    model.load_state_dict(trained.state_dict())
    model.eval().requires_grad_(False)
    inputs, half = batch(BATCH), batch(BATCH // 2)
    normer = GradientNormer(model, inputs)
    assert normer.way == "closed form", normer.passed_over

    def one_pass() -> None:
        trained.zero_grad(set_to_none=True)
        F.cross_entropy(trained(inputs.features), inputs.labels).backward()

    def loop() -> list[float]:
        found = []
        for i in range(BATCH):
            trained.zero_grad(set_to_none=True)
            F.cross_entropy(trained(inputs.features[i : i + 1]), inputs.labels[i : i + 1]).backward()
            slopes = [p.grad for p in trained.parameters() if p.grad is not None]
            found.append(float(sum(g.square().sum() for g in slopes)) ** 0.5)
        return found

    np.testing.assert_allclose(normer(inputs).whole, loop(), rtol=1e-4)  # the same numbers, before they are timed
    return {
        "closed form": lambda: normer(inputs),
        "half": lambda: normer(half),
        "one pass": one_pass,
        "one by one": loop,
    }


def ratios(network: str, rounds: int) -> dict[str, float]:
    """Medians over rounds; every round times all ways, in turn forwards and backwards."""
    timed = ways(NETWORKS[network])
    found: dict[str, list[float]] = {"of a pass": [], "over the loop": [], "of half": []}
    for i in range(rounds + 1):
        taken = {}
        for name in list(timed) if i % 2 == 0 else list(timed)[::-1]:  # so that a drift hits all alike
            n = 1 if name == "one by one" else REPEATS[network]
            began = time.perf_counter()
            for _ in range(n):
                timed[name]()
            taken[name] = (time.perf_counter() - began) / n
        if i == 0:
            continue  # the first call of everything is slow
        found["of a pass"].append(taken["closed form"] / taken["one pass"])
        found["over the loop"].append(taken["one by one"] / taken["closed form"])
        found["of half"].append(taken["closed form"] / taken["half"])
        each = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in taken.items())
        print(f"  {network}, round {i}/{rounds}: {each}", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    import torch

    torch.set_num_threads(1)
    missed = 0

    def line(what: str, value: float, sign: str, target: float | None) -> None:
        nonlocal missed
        verdict = ""
        if target is not None:
            ok = value <= target if sign == "≤" else value >= target
            missed += not ok
            verdict = f"  target {sign} {target:g}  {'ok' if ok else 'MISSED'}"
        print(f"  {what:58} {value:7.2f} ×{verdict}", flush=True)

    print(f"memdiag score, GraNd of a batch of {BATCH}, one thread, median of {rounds} rounds")
    for network, widths in NETWORKS.items():
        found = ratios(network, rounds)
        print(f"MLP {'-'.join(map(str, widths))}")
        line("time of one forward and backward of the batch", found["of a pass"], "≤", MOST_OF_A_PASS)
        line("faster than one backward per example", found["over the loop"], "≥", LEAST_OVER_LOOP[network])
        line("time of half the batch", found["of half"], "≤", MOST_OF_HALF)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
