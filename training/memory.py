"""What memory a run takes, what there is, and what would fit where it doesn't."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from fast.attention import SHORT
from settings import TrainingSettings
from support.errors import UserError, display
from support.files import MEGABYTE
from training.device import Machine

TOLERANCE = 1.25  # within which estimate and measured peak were seen to agree
ADDRESSES = 0.8  # of a limited address space are memory in the end; the rest are mapped files, holes, heaps of threads
# The limit of a container, and what counts against it: version 2 of Linux's control groups, and version 1.
CONTAINER = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class Size(NamedTuple):
    """What the memory of a training depends on, besides its options."""

    parameters: int
    layers: int
    width: int
    vocab_size: int
    longest: int  # inputs of the longest example, padding included
    examples: int  # that there are to train on


class Need(NamedTuple):
    """Bytes at the peak of a training, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    program: float = 550 * MEGABYTE

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in self._asdict().items())
        return f"about {sum(self) / 1e9:.1f} GB to train ({parts})"


def expected_memory(size: Size, training: TrainingSettings, precision: str) -> Need:
    """About how many bytes training takes at its peak, in the batch with the longest examples; allow for 25%.

    Weights, gradients and AdamW's two moments are 16 bytes a trained parameter; frozen weights are 4, or 2 in bf16.
    The rest was fitted to measured peaks of 7.6M and 355M parameters with 160 to 8,192 tokens on a CPU.
    """
    layer = size.width * (54 if precision == "fp32" else 36)  # bytes a token
    if precision == "bf16" and size.longest <= SHORT:
        layer += size.width // 64 * size.longest * 2  # heads are 64 wide; the weights of short attention
    kept = size.layers * size.width * 4 + layer if training.gradient_checkpointing else size.layers * layer
    tokens = min(training.batch_size, size.examples) * size.longest
    logits = 12 if precision == "fp16" else 6  # bytes each
    activations = tokens * (kept + size.vocab_size * logits)
    trained, weights, passing = size.parameters, 4 * size.parameters, 0
    if training.compile and precision != "fp32" and not (training.lora_rank or training.gradient_checkpointing):
        passing += 2 * size.parameters  # compiled blocks keep their casts of the weights until the backward pass
    if training.lora_rank:
        trained = 16 * size.width * training.lora_rank * size.layers  # both matrices at all four places of a block
        merging = 8 * size.vocab_size * size.width  # two fp32 copies of the token embedding, the largest tensor
        weights = (2 if precision == "bf16" else 4) * size.parameters + 4 * trained + merging
    return Need(weights, 4 * trained, 8 * trained, activations + passing)


def available_memory(device: torch.device) -> tuple[int, int]:
    """Free bytes on the device, and with the disk space that stands in for memory."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free, free
    free, swap = psutil.virtual_memory().available, psutil.swap_memory().free
    for limit, used in CONTAINER:
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
            if left < free:
                free, swap = left, 0
    if sys.platform == "linux":
        limit = psutil.Process().rlimit(psutil.RLIMIT_AS)[0]
        if limit != psutil.RLIM_INFINITY:
            left = int(ADDRESSES * (limit - psutil.Process().memory_info().vms))
            free, swap = (left, 0) if left < free else (free, swap)
    return free, free + swap


def check_memory(size: Size, training: TrainingSettings, machine: Machine) -> str:
    """What memory training takes, as a line; and where that may be short, what would fit.

    Raises:
        UserError: the run can't fit.
    """
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if machine.device.type == "cpu" else 1  # share this memory
    need = expected_memory(size, training, machine.precision)
    free, with_swap = available_memory(machine.device)
    together = f", in each of {beside} processes" if beside > 1 else ""
    if beside * sum(need) <= free:
        return f"memory: {need}{together}"
    line = (
        f"memory: {need}{together}, and {free / 1e9:.1f} GB are free; {advice(size, training, machine, free // beside)}"
    )
    certain = need.weights + need.gradients + need.optimizer  # the rest is estimated
    if beside * max(certain, sum(need) / TOLERANCE) > with_swap:
        raise UserError(line)
    return line


def advice(size: Size, training: TrainingSettings, machine: Machine, free: int) -> str:
    """Which options would make the run fit into `free` bytes, and what each of them takes."""
    one = {"batch_size": 1, "gradient_accumulation": training.batch_size * training.gradient_accumulation}
    ways = [
        one,
        {"gradient_checkpointing": True},
        {**one, "gradient_checkpointing": True},
        {"lora_rank": 8},
        {**one, "lora_rank": 8, "gradient_checkpointing": True},
    ]
    fitting = []
    for way in ways:
        changed = replace(training, **way)
        takes = sum(expected_memory(size, changed, machine.precision))
        new = {name: value for name, value in way.items() if value != getattr(training, name)}
        if new and takes <= free:
            options = (
                f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in new.items()
            )
            fitting.append(f"{' '.join(options)} ({takes / 1e9:.1f} GB)")
    if not fitting:
        return "no option makes it fit: take a smaller model, or a shorter --max-length"
    return f"what would fit: {', or '.join(fitting)}"


@contextlib.contextmanager
def explain_lack_of_memory(size: Size, training: TrainingSettings, machine: Machine) -> Iterator[None]:
    """Turn a refusal of memory into advice on what takes less.

    Raises:
        UserError: with what would take less than the run was expected to.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        kinds = torch.OutOfMemoryError | MemoryError
        if not isinstance(error, kinds) and "allocate memory" not in str(error):  # the CPU's is a plain RuntimeError
            raise
        if not machine.primary:  # the one that speaks for all does not know of it
            display(f"process {machine.rank} is out of memory", file=sys.stderr)
        less = int(0.9 * sum(expected_memory(size, training, machine.precision)))
        raise UserError(
            f"out of memory; the checkpoints are as they were; {advice(size, training, machine, less)}"
        ) from None
