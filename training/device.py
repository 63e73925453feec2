"""The only room that knows the machine: device, precision, memory, seeds."""

import contextlib
import ctypes
import os
import sys
from typing import Any, NamedTuple

import torch

from files import MEGABYTE, UserError


class Machine(NamedTuple):
    """Where the work is done, in which precision the matrix products are computed (the weights are fp32), and why."""

    device: torch.device
    precision: str  # "fp32" or "bf16"
    explanation: str

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute what is inside in the chosen precision."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def record(self) -> dict[str, Any]:
        """What the bits of a result depend on."""
        return {
            "device": self.device.type,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


def choose_machine(device: str, precision: str) -> Machine:
    """The machine for `--device` and `--precision`.

    Raises:
        UserError: a device that this computer, or this build of PyTorch, does not have.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in available.items() if there)
        why_device = {"cuda": "a GPU was found", "mps": "an Apple GPU was found", "cpu": "no GPU was found"}[device]
    elif available[device]:
        why_device = "as asked"
    else:
        raise UserError(f"--device {device}: not found by PyTorch {torch.__version__} here; use --device auto")
    if precision == "auto":
        fast = has_fast_bf16(device)
        precision = "bf16" if fast else "fp32"
        why_precision = "the hardware multiplies bf16 fast" if fast else "the hardware has no fast bf16"
    else:
        why_precision = "as asked"
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    explanation = f"device: {device} ({why_device}){threads}; precision: {precision} ({why_precision})"
    return Machine(torch.device(device), precision, explanation)


def has_fast_bf16(device: str) -> bool:
    """Whether bf16 is worth it: processors without the instructions emulate it, slower than fp32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def expected_memory(parameters: int, layers: int, width: int, vocab_size: int, tokens: int, precision: str) -> int:
    """About how many bytes training takes at its peak, with `tokens` in a batch, padding included.

    Weights, gradients and AdamW's two moments are 16 bytes a parameter. The rest was fitted to measured peaks of 7.6M
    and 355M parameters with 160 to 8,192 tokens on a CPU; allow for 25%.
    """
    activations = tokens * (layers * width * (54 if precision == "fp32" else 36) + vocab_size * 6)
    return 550 * MEGABYTE + 16 * parameters + activations


def keep_freed_memory() -> None:
    """Keep freed memory in the process, in huge pages where Linux offers them. Call before the first tensor is made.

    Each step allocates and frees gigabytes of gradients. By default glibc returns every large block to the system, and
    the next one comes as fresh pages, whose first touch runs at 2 GB/s where reuse runs at 30: longer than the
    arithmetic. Blocks above 32 MB (the token embedding's gradient) still come and go: kept, they would leave holes that
    nothing of their size fits again, and in huge pages they cost little. Not on Linux, or without glibc: a no-op.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's allocator reads it when first used
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that every version of glibc takes
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
