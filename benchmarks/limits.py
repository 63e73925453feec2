"""The machine's limits: matrix products, memory reads and file reads. Usage: `limits.py TASK JSON`.

They are measured with PyTorch's own operations on matrices of the model's shapes.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch

from measure import run_task
from training.device import has_fast_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEAST_SECONDS = 1.0  # minimum duration of a measurement, in seconds
READ_BYTES = 1 << 30  # far more than any cache holds


def products(rows: int, width: int, device: str, precision: str) -> dict[str, Any]:
    """The rate of a block's matrix products: `rows` tokens of `width` channels times its four matrices.

    Each matrix is (out, in), as in a linear layer. Cycling through four blocks keeps
    the matrices out of the caches, so they are read from memory.
    """
    dtype, blocks = DTYPES[precision], 4
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    inputs = {size: torch.randn(rows, size, device=device, dtype=dtype) for size in (width, 4 * width)}
    weights = [torch.randn(shape, device=device, dtype=dtype) for _ in range(blocks) for shape in shapes]
    flops = 2 * rows * sum(weight.numel() for weight in weights)

    def multiply() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.size(1)], weight)

    return {"flops_per_second": flops / fastest(multiply, device)}


def memory(device: str) -> dict[str, Any]:
    """The rate of memory reads: the faster of a sum and a matrix-vector product."""
    buffer = torch.ones(READ_BYTES // 4 // 1024, 1024, device=device)
    vector = torch.ones(1024, device=device)
    seconds = min(fastest(buffer.sum, device), fastest(lambda: buffer @ vector, device))
    return {"bytes_per_second": READ_BYTES / seconds}


def file(path: str) -> dict[str, Any]:
    """The rate of reading a file from the system's page cache into memory that is already in use."""
    size = Path(path).stat().st_size
    buffer = memoryview(bytearray(size))
    buffer[::4096] = bytes(len(buffer[::4096]))  # touch every page

    def read() -> None:
        with open(path, "rb", buffering=0) as stream:
            done = 0
            while done < size:  # Linux reads at most 2 GB per call
                done += stream.readinto(buffer[done:]) or 0

    seconds = fastest(read, "cpu")
    return {"load_seconds": seconds, "bytes_per_second": size / seconds}


def fastest(work: Any, device: str) -> float:
    """The time of the fastest of many calls, in seconds; the first two calls are ignored."""
    taken, ended = [], 0.0
    while len(taken) < 5 or ended - taken[0][0] < LEAST_SECONDS:
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        ended = time.perf_counter()
        taken.append((started, ended - started))
    return min(seconds for _, seconds in taken[2:])


def describe(device: str) -> dict[str, Any]:
    """PyTorch's description of the machine."""
    described: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "bf16": has_fast_bf16(device),
    }
    return described | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


if __name__ == "__main__":
    run_task({task.__name__: task for task in (products, memory, file, describe)}, sys.argv[1:])
