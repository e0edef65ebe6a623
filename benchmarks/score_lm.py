"""What does scoring text cost over just running the model? Ratios of times taken in turn, in one run, and peak memory.

A small GPT-2 (4 blocks of 256, 50 257 tokens) with random weights reads 4 texts of 256 tokens: the head is most of the
work, so what is done over the vocabulary weighs as much as it can. The floor is the model's own logits, which nobody
has looked at yet. The obvious way takes log_softmax of all of them in float32, then the moments. One thread.

    python benchmarks/score_lm.py           # ratios beside their targets; exit 1 if one is missed
    python benchmarks/score_lm.py --rounds 21 --dtype bfloat16
    python benchmarks/score_lm.py --memorized         # every token is the argmax, the most expensive case for ties
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WAYS = ("bare", "logp", "all", "suffix", "obvious")
MEANING = {
    "bare": "the model's own logits",
    "logp": "log p and hits",
    "all": "and vocabulary moments, top-40",
    "suffix": "and moments, top-40 of 50 tokens a text",
    "obvious": "log_softmax of all, and moments",
}
TIME = {"logp": 1.2, "all": 1.7, "suffix": 1.7}  # times the bare pass
B, T, V = 4, 256, 50257
CHUNK = 2**25 // V  # tokens whose logits may be held twice, in float32


def ways(device: str, dtype: str, memorized: bool = False) -> dict[str, Callable[[], object]]:
    """What is timed, each over the same batch."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from memdiag.observe import Inputs
    from memdiag.observe.next_tokens import Scorer
    from memdiag.training import seeded

    torch.set_num_threads(1)
    with seeded(0):
        model = GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=4, n_head=4, n_positions=T, vocab_size=V)).eval()
        tokens = torch.randint(0, V, (B, T))
    model = model.requires_grad_(False).to(device, getattr(torch, dtype))
    tokens = tokens.to(device)
    if memorized:  # whatever comes before, token V − 1 follows
        tokens.fill_(V - 1)
        model.transformer.ln_f.bias.copy_(4 * model.lm_head.weight[V - 1] / model.lm_head.weight[V - 1].norm())
    mask = torch.ones_like(tokens, dtype=torch.bool)
    inputs = Inputs(tokens, mask, None, None)
    suffix = mask[:, 1:].clone()
    suffix[:, :-50] = False

    @torch.no_grad()
    def bare() -> object:
        return model(tokens, attention_mask=mask.long(), use_cache=False).logits.shape

    @torch.no_grad()
    def obvious() -> object:
        logp = model(tokens, attention_mask=mask.long(), use_cache=False).logits[:, :-1].float().log_softmax(-1)
        at, p = logp.gather(-1, tokens[:, 1:, None])[..., 0], logp.exp()
        mu = (p * logp).sum(-1)
        sigma = ((p * logp**2).sum(-1) - mu**2).clamp(min=1e-6).sqrt()
        hit = logp.argmax(-1) == tokens[:, 1:]
        return at.cpu(), hit.cpu(), ((at - mu) / sigma).cpu()

    plain, whole = Scorer(model, inputs), Scorer(model, inputs, moments=True, top_k=40)
    assert plain.why_fallback is None, plain.why_fallback
    if memorized:
        assert plain(inputs).hit.all()
    return {
        "bare": bare,
        "logp": lambda: plain(inputs),
        "all": lambda: whole(inputs),
        "suffix": lambda: whole(inputs, top_at=suffix),
        "obvious": obvious,
    }


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds, on a CPU those of its one thread: they hardly move when others work beside it."""
    import torch

    clock = time.perf_counter if device == "cuda" else time.process_time
    began = clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def ratios(rounds: int, device: str, dtype: str, memorized: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Median over rounds of each way's time over the bare pass's of the same round, and seconds."""
    candidates = ways(device, dtype, memorized)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for i in range(rounds + 1):
        taken = {name: timed(candidates[name], device) for name in (WAYS if i % 2 == 0 else WAYS[::-1])}
        if i > 0:  # the first call of everything is slow
            for name in WAYS:
                found[name].append(taken[name] / taken["bare"])
                seconds[name].append(taken[name])
    return tuple({name: statistics.median(of[name]) for name in WAYS} for of in (found, seconds))  # type: ignore[return-value]


def peak(name: str, device: str, dtype: str) -> float:
    """MiB that a pass needs above what a fresh process held before it (the model); on Linux."""
    command = [sys.executable, __file__, "--peak", name, "--device", device, "--dtype", dtype]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def print_peak(name: str, device: str, dtype: str) -> None:
    import torch

    from memdiag import device as devices

    run = ways(device, dtype)[name]
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # forget the peak so far; where that cannot be done, the figure is too high
            Path("/proc/self/clear_refs").write_text("5")
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    run()
    after = torch.cuda.max_memory_allocated() if device == "cuda" else devices.peak_memory()
    print((after - before) / 2**20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memorized", action="store_true", help="every token of the texts is the model's argmax")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(args.peak, args.device, args.dtype)
        return 0
    found, seconds = ratios(args.rounds, args.device, args.dtype, args.memorized)
    memory = {name: peak(name, args.device, args.dtype) for name in WAYS}
    most = 2 * CHUNK * V * 4 / 2**20
    print(f"{B} × {T} tokens of {V}, {args.dtype}, median of {args.rounds} rounds; memory above what stood before")
    print(f"{'way':8} {'':40} {'s':>6} {'time':>6} {'target':>7} {'MiB':>5} {'memory':>7} {'target':>7}")
    failed = False
    for name in WAYS:
        bound = name in TIME and args.dtype == "float32"  # half precision makes the head cheaper, not the sums
        limits = (f"<= {TIME[name]}", f"<= {most:.0f}") if bound else ("", "")
        print(
            f"{name:8} {MEANING[name]:40} {seconds[name]:6.3f} {found[name]:6.3f} {limits[0]:>7} {memory[name]:5.0f}"
            f" {memory[name] / memory['bare']:7.3f} {limits[1]:>7}"
        )
        failed |= bound and (found[name] > TIME[name] or memory[name] > most)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
