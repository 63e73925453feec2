"""The memory that a run needs, the free memory, and options that make a run fit."""

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

TOLERANCE = 1.25  # largest factor seen between the estimate and a measured peak
ADDRESSES = 0.8  # fraction of RLIMIT_AS usable as heap; the rest goes to mapped files, fragmentation and thread arenas
# A container's memory limit and its usage, in Linux control groups of version 2 and of version 1.
CONTAINER = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class Size(NamedTuple):
    """The sizes that, together with the options, determine the memory of a training run."""

    parameters: int
    layers: int
    width: int
    vocab_size: int
    longest: int  # input tokens of the longest example, with padding
    examples: int  # number of training examples


class Need(NamedTuple):
    """Bytes needed at the peak of training, by purpose."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    program: float = 550 * MEGABYTE

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in self._asdict().items())
        return f"about {sum(self) / 1e9:.1f} GB to train ({parts})"


def expected_memory(size: Size, training: TrainingSettings, precision: str) -> Need:
    """Estimate the bytes that training needs at its peak, in the batch with the longest examples, to within 25%.

    Weights, gradients and AdamW's two moments take 16 bytes per trained parameter; frozen weights take 4, or 2 in bf16.
    The rest is fitted to peaks measured on a CPU, with 7.6M and 355M parameters and 160 to 8,192 tokens.
    """
    layer = size.width * (54 if precision == "fp32" else 36)  # bytes per token
    if precision == "bf16" and size.longest <= SHORT:
        layer += size.width // 64 * size.longest * 2  # the weights of short attention; heads are 64 wide
    kept = size.layers * size.width * 4 + layer if training.gradient_checkpointing else size.layers * layer
    tokens = min(training.batch_size, size.examples) * size.longest
    logits = 12 if precision == "fp16" else 6  # bytes per logit
    activations = tokens * (kept + size.vocab_size * logits)
    trained, weights, passing = size.parameters, 4 * size.parameters, 0
    if training.compile and precision != "fp32" and not (training.lora_rank or training.gradient_checkpointing):
        passing += 2 * size.parameters  # compiled blocks keep their casts of the weights until the backward pass
    if training.lora_rank:
        trained = 16 * size.width * training.lora_rank * size.layers  # A and B at all four matrices of a block
        merging = 8 * size.vocab_size * size.width  # two fp32 copies of the token embedding, the largest tensor
        weights = (2 if precision == "bf16" else 4) * size.parameters + 4 * trained + merging
    return Need(weights, 4 * trained, 8 * trained, activations + passing)


def available_memory(device: torch.device) -> tuple[int, int]:
    """Free bytes on the device, without and with swap."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free, free
    free, swap = psutil.virtual_memory().available, psutil.swap_memory().free
    for limit, used in CONTAINER:
        with contextlib.suppress(OSError, ValueError):  # no such file, or a limit of "max"
            cached = cached_files(Path(used).with_name("memory.stat"))
            left = int(Path(limit).read_text()) - int(Path(used).read_text()) + cached
            if left < free:
                free, swap = left, 0
    if sys.platform == "linux":
        limit = psutil.Process().rlimit(psutil.RLIMIT_AS)[0]
        if limit != psutil.RLIM_INFINITY:
            left = int(ADDRESSES * (limit - psutil.Process().memory_info().vms))
            free, swap = (left, 0) if left < free else (free, swap)
    return free, free + swap


def cached_files(stat: Path) -> int:
    """Bytes of a control group's cached files: they count as used, but the system frees them when needed."""
    counts = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    # Version 1 counts child groups only in `total_`; some sandboxes have no such counts.
    return sum(int(counts.get(f"total_{name}", counts.get(name, 0))) for name in ("inactive_file", "active_file"))


def check_memory(size: Size, training: TrainingSettings, machine: Machine) -> str:
    """One line on the memory that training needs; if memory may run short, also options that need less.

    Raises:
        UserError: the run can't fit in memory.
    """
    # Processes that share the memory.
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if machine.device.type == "cpu" else 1
    need = expected_memory(size, training, machine.precision)
    free, with_swap = available_memory(machine.device)
    together = f", in each of {beside} processes" if beside > 1 else ""
    if beside * sum(need) <= free:
        return f"memory: {need}{together}"
    fitting = advice(size, training, machine, free // beside)
    line = f"memory: {need}{together}, but only {free / 1e9:.1f} GB are free; {fitting}"
    certain = need.weights + need.gradients + need.optimizer  # exact; the rest is an estimate
    if beside * max(certain, sum(need) / TOLERANCE) > with_swap:
        raise UserError(line)
    return line


def advice(size: Size, training: TrainingSettings, machine: Machine, free: int) -> str:
    """The options that would make the run fit in `free` bytes, and the memory that each needs."""
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
        return "to fit, use a smaller model or a shorter --max-length"
    return f"to fit, use {', or '.join(fitting)}"


@contextlib.contextmanager
def explain_lack_of_memory(size: Size, training: TrainingSettings, machine: Machine) -> Iterator[None]:
    """Turn an out-of-memory error into advice.

    Raises:
        UserError: out of memory; the message names options that need less than the estimate for this run.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        kinds = torch.OutOfMemoryError | MemoryError
        if not isinstance(error, kinds) and "allocate memory" not in str(error):  # a CPU raises a plain RuntimeError
            raise
        if not machine.primary:  # the primary process does not know about this error
            display(f"process {machine.rank} is out of memory", file=sys.stderr)
        less = int(0.9 * sum(expected_memory(size, training, machine.precision)))
        raise UserError(f"out of memory; the checkpoints are intact; {advice(size, training, machine, less)}") from None
