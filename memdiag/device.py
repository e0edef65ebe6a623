"""Where to compute: the device, how many tokens fit at once, and what running out of memory looks like."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

from memdiag.errors import InputError, one_line


def resolve(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU; anything else is torch's own name for a device that is there.

    Raises:
        InputError: a device that torch does not know, or that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used: {one_line(error, 120)}; try --device cpu") from None
    return device


def tokens_per_batch(device: torch.device, n_outputs: int) -> int:
    """Tokens to run at once when the user does not say: enough to keep the device busy, few enough that the
    logits (tokens × n_outputs) stay near 256 MB on a CPU and 4 GB on an accelerator."""
    most, logits = (4096, 2**26) if device.type == "cpu" else (65536, 2**30)
    return int(min(most, max(512, logits // max(n_outputs, 1))))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the host or on an accelerator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("DefaultCPUAllocator", "out of memory", "not enough memory")
    )


def free(device: torch.device) -> None:
    """Hand cached blocks back, so that a smaller batch can use them."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(device: torch.device) -> str:
    """The device as the report names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory() -> int:
    """The most host memory this process has held so far, in bytes."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    # elsewhere than on Linux; it starts from the parent's peak, so it can only say too much
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
