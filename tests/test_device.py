"""Devices: which one, how much fits, and what running out of memory looks like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import memdiag
from memdiag import device
from memdiag.errors import InputError


def test_auto_is_a_device_that_is_there() -> None:
    found = device.resolve("auto")
    torch.zeros(1, device=found)
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert found.type == expected


def test_a_device_by_name() -> None:
    assert device.resolve("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:9999", "", "cpu:cpu", "xpu:4", "metal ✨"])
def test_a_device_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match=r"cannot be used.*--device cpu") as caught:
        device.resolve(name)
    assert "\n" not in str(caught.value)


def test_a_device_of_the_model_that_is_not_there(fixtures: Path) -> None:
    with pytest.raises(InputError, match="device 'gpu'"):
        memdiag.entropy(fixtures / "tiny-gpt2", data=str(fixtures / "texts.jsonl"), device="gpu")


def test_tokens_per_batch_keeps_the_logits_in_bounds() -> None:
    cpu = torch.device("cpu")
    found = {v: device.tokens_per_batch(cpu, v) for v in (0, 1, 512, 50_257, 256_000, 10**9)}
    assert all(512 <= n <= 4096 for n in found.values())
    assert found[512] == 4096
    assert found[50_257] * 50_257 * 4 <= 2**28  # 256 MB
    assert found[10**9] == 512  # but never so few that a batch is empty
    assert device.tokens_per_batch(torch.device("cuda"), 50_257) > found[50_257]
    assert [found[v] for v in sorted(found)] == sorted(found.values(), reverse=True)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 80 bytes."),
    ],
)
def test_out_of_memory_is_known(error: Exception) -> None:
    assert device.is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("out of memory"), OSError(12, "x")])
def test_other_errors_are_not_out_of_memory(error: Exception) -> None:
    assert not device.is_out_of_memory(error)


def test_a_real_host_allocation_that_fails_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert device.is_out_of_memory(caught.value)


def test_free_and_describe() -> None:
    cpu = torch.device("cpu")
    device.free(cpu)
    assert device.describe(cpu) == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama", "tiny-bert", "tiny-vit", "digits-mlp"])
def test_cuda_gives_the_numbers_of_the_cpu(fixtures: Path, assert_same_rows: Callable[..., None], name: str) -> None:
    data = None if name in ("tiny-vit", "digits-mlp") else str(fixtures / "texts.jsonl")
    options = {"data": data, "unit": "all", "spectra": True, "dtype": "float32", "limit": 20}
    expected = memdiag.entropy(fixtures / name, device="cpu", **options).table.to_pylist()
    found = memdiag.entropy(fixtures / name, device="cuda", **options).table.to_pylist()
    assert_same_rows(found, expected, rel=1e-3, abs=1e-4)


def test_peak_memory_rises_with_what_is_held() -> None:
    before = device.peak_memory()
    block = torch.ones(int(before // 4 + 50e6))  # as much again as the most so far, and 200 MB
    assert device.peak_memory() >= before + 190e6
    assert block[0] == 1
