"""One command on several processes under torchrun: who am I, and joining what each one saw."""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch
import torch.distributed as dist


def start() -> tuple[int, int]:
    """(rank, world size); (0, 1) when not started by torchrun. Starts the process group once."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return 0, 1
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        # sums and objects go through host memory; gradients and shards stay where they are
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)  # its threads, still running at exit, abort the process at times
    return dist.get_rank(), size


def gather(value: Any) -> list[Any]:
    """Everybody's value, in rank order, on rank 0; an empty list elsewhere."""
    if not dist.is_initialized():
        return [value]
    rank = dist.get_rank()
    values: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(value, values)
    return values or []


def broadcast(value: Any) -> Any:
    """Rank 0's value, everywhere."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
