"""The machine: device, precision, memory allocator, and the processes that torchrun starts."""

import contextlib
import copy
import ctypes
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fast.loss import compiled_loss
from gpt_model import GPTModel
from settings import TrainingSettings
from support.errors import UserError

WAITING = timedelta(hours=2)  # maximum time that a process waits for the others
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Machine(NamedTuple):
    """The device, the precision of matrix products (trained weights are fp32), and the reasons for both."""

    device: torch.device
    precision: str  # "fp32", "bf16" or "fp16"
    explanation: str
    processes: int = 1  # number of processes that train together
    rank: int = 0  # number of this process, from 0

    @property
    def primary(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def inference_dtype(self) -> torch.dtype:
        """The dtype of frozen weights: bf16 halves the memory to read, if products are computed in bf16."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """A context that computes products in the chosen precision."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        # Don't cache casts: each weight is used once per pass, and a CUDA graph must not read a cast from outside it.
        return torch.autocast(self.device.type, dtype=AUTOCAST[self.precision], cache_enabled=False)

    def seed(self, value: int) -> None:
        """Seed dropout. (`torch.manual_seed` seeds all devices, which takes longer.)"""
        (torch.cuda if self.device.type == "cuda" else torch).manual_seed(value)

    @contextlib.contextmanager
    def deterministic(self) -> Iterator[None]:
        """On a GPU, use kernels that add in a fixed order, so that identical runs are bit-identical.

        Only training needs them: the default backward kernels of attention and embedding add in the order in which
        threads finish. In decoding, deterministic kernels would only cost time.
        """
        if self.device.type != "cuda":
            yield
            return
        # Turn off a debugging aid that costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        # "warn" would leave FlashAttention nondeterministic; `use_deterministic_algorithms` imports the compiler, which
        # takes seconds.
        torch.set_deterministic_debug_mode("error")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode("default")

    def gradient_scaler(self, state: dict[str, Any]) -> torch.amp.GradScaler:
        """A scaler that keeps small fp16 gradients from underflowing; in other precisions it does nothing."""
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        if scaler.is_enabled() and state:
            scaler.load_state_dict(state)
        return scaler

    def share(self, model: nn.Module) -> nn.Module:
        """`model`; with several processes, wrapped so that their gradients are averaged."""
        if self.processes == 1:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def without_sharing(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Inside this context, backward passes of a shared model do not exchange gradients."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()

    def take_share(self, batches: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """This process's share of the batches, padded with empty ones: all processes must take part in each pass."""
        missing = -len(batches) % self.processes
        return [*batches, *[()] * missing][self.rank :: self.processes]

    def total(self, *values: float) -> list[float]:
        """The sum of each of `values` over all processes."""
        if self.processes == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(sums)
        return sums.tolist()

    def agree(self, value: str) -> str:
        """The primary process's `value`, on all processes."""
        if self.processes == 1:
            return value
        shared = [value]
        distributed.broadcast_object_list(shared, src=0, device=self.device)
        return shared[0]

    def leave(self) -> None:
        """Leave the process group; from here on, each process works alone."""
        if self.processes > 1:
            distributed.destroy_process_group()

    def record(self) -> dict[str, str | int]:
        """Everything that affects the exact bits of a result."""
        gpu = {"gpu": torch.cuda.get_device_name(self.device)} if self.device.type == "cuda" else {}
        return {
            **gpu,
            "device": self.device.type,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "processes": self.processes,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
        }


def choose_machine(device: str, precision: str) -> Machine:
    """The machine for `--device` and `--precision`; under torchrun, joins the other processes.

    Raises:
        UserError: this computer, or this build of PyTorch, does not have the device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in available.items() if there)
        why_device = {"cuda": "a GPU was found", "mps": "an Apple GPU was found", "cpu": "no GPU was found"}[device]
    elif available[device]:
        why_device = "as requested"
    else:
        raise UserError(f"--device {device}: not found by PyTorch {torch.__version__}; use --device auto")
    if precision == "auto":
        fast = has_fast_bf16(device)
        precision = "bf16" if fast else "fp32"
        why_precision = "native bf16" if fast else "no native bf16"
    else:
        why_precision = "as requested"
    if device == "cuda":
        # cuDNN's attention makes a plan for each new length, which takes 0.1 s or more, and almost every batch has a
        # new length. FlashAttention needs no plan.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Deterministic products need a workspace of fixed size; cuBLAS reads this when it starts.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    processes, rank, place = join_processes(device)
    together = f", {processes} processes" if processes > 1 else ""
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    explanation = f"device: {device} ({why_device}){together}{threads}; precision: {precision} ({why_precision})"
    return Machine(place, precision, explanation, processes, rank)


def join_processes(device: str) -> tuple[int, int, torch.device]:
    """The number of processes that torchrun started, this one's rank, and its device; 1 and 0 without torchrun.

    From here on, only the first process prints.

    Raises:
        UserError: more processes than GPUs, or several processes on a device that can't be shared.
    """
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if processes == 1:
        return 1, 0, torch.device(device)
    place = torch.device(device)
    if device == "cuda":
        number = int(os.environ["LOCAL_RANK"])
        if number >= torch.cuda.device_count():
            raise UserError(
                f"torchrun: {processes} processes for {torch.cuda.device_count()} GPUs; start one process per GPU"
            )
        place = torch.device("cuda", number)
        torch.cuda.set_device(place)
    elif device == "mps":
        raise UserError("several processes can't share an Apple GPU; start without torchrun, or with --device cpu")
    # The others wait while the first evaluates the base model.
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=WAITING)
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return processes, rank, place


def has_fast_bf16(device: str) -> bool:
    """Whether the device has native bf16; processors without it emulate bf16, slower than fp32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def for_training(model: GPTModel, settings: TrainingSettings) -> GPTModel:
    """The model that training runs: `--compile` compiles its blocks and its loss, `--gradient-checkpointing` recomputes
    its blocks in the backward pass. It shares all parameters with `model`, which stays unchanged.
    """
    if not (settings.compile or settings.gradient_checkpointing):
        return model
    trained = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    if settings.compile:
        torch.use_deterministic_algorithms(True)  # keeps the compiler from choosing kernels by timing
        torch.set_deterministic_debug_mode("default")  # eager kernels are deterministic only inside `deterministic`
    for block in trained.h:
        if settings.compile:
            block.compile(dynamic=True)
        if settings.gradient_checkpointing:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if settings.compile:
        trained.forward = compiled_loss()(trained.forward)
    return trained


def check_compiler(machine: Machine) -> None:
    """Compile a small function, to fail early if PyTorch can't compile.

    Raises:
        UserError: PyTorch can't compile here, usually because there is no C++ compiler.
    """
    try:
        torch.compile(torch.sin)(torch.ones(2, device=machine.device))
    except RuntimeError as error:
        reason = str(getattr(error, "inner_exception", error)).partition("\n")[0]
        raise UserError(f"--compile: PyTorch can't compile here ({reason}); run without it") from None


def keep_freed_memory() -> None:
    """Keep freed memory in the process, in huge pages where Linux offers them. Call before the first tensor is made.

    Each step allocates and frees gigabytes of gradients. By default glibc returns every large block to the system, and
    the next block consists of fresh pages. Touching them proceeds at 2 GB/s (30 GB/s for reused memory) and takes
    longer than the arithmetic. Without Linux and glibc this is a no-op.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's allocator reads it when first used
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
        for threshold in (32 << 20, 256 << 20):  # some versions of glibc accept only the first
            libc.mallopt(M_MMAP_THRESHOLD, threshold)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never trim
        libc.mallopt(M_ARENA_MAX, 1)  # threads share freed memory: 2 GB less address space for gpt2-medium


def return_freed_memory() -> None:
    """Return freed memory to the system: the memory kept by `keep_freed_memory`, and on a GPU, PyTorch's cache."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
