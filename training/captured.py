"""Optimizer steps as CUDA graphs, one per batch length: on a GPU, launching kernels takes most of a short step.

The arithmetic equals that of `step.take_step`, but buffers are static, values that change from step to step (learning
rate, learned tokens) are tensors, and nothing waits for the GPU until the loss is read.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from dialogues.batches import IGNORED
from fast.graph import capture, warm_up
from fast.optimizer import AdamW
from settings import TrainingSettings
from training.device import Machine
from training.step import Batch, Learner

SHORT = 256  # capture batches of up to this many tokens at their own length, a multiple of 16
LEAST = 4  # minimum number of batches for a graph: warm-up and capture take as long as three eager steps
MOST = 32  # maximum number of lengths to capture
CLIP_EPSILON = 1e-6  # as in `torch.nn.utils.clip_grad_norm_`
UPDATE = 0  # key of the update's graph; all other keys are lengths


def why_eager(machine: Machine, settings: TrainingSettings, optimizer: Optimizer) -> str:
    """The reason why steps on this GPU are not captured; empty if they are."""
    reasons = {
        type(optimizer).__name__: not isinstance(optimizer, AdamW),  # only AdamW can skip an update on the GPU
        "several processes": machine.processes > 1,
        "fp16": machine.precision == "fp16",  # its gradient scaler decides on the CPU
        "--gradient-checkpointing": settings.gradient_checkpointing,  # it reads the random generator's state
    }
    return ", ".join(reason for reason, applies in reasons.items() if applies)


def graph_length(length: int) -> int:
    """Round `length` up, to one of a few lengths: 16 up to `SHORT`, then 8 per doubling (at most 1/8 padding)."""
    if length <= SHORT:
        return length
    unit = 1 << (length - 1).bit_length() - 4
    return -(-length // unit) * unit


def choose_lengths(lengths: Iterable[int], longest: int) -> list[int]:
    """The lengths to capture, ascending: the most frequent ones with at least `LEAST` batches, and `longest`.

    Batches of other lengths are padded to the next longer one.

    Args:
        lengths: the length of each upcoming batch.
        longest: the length of the longest batch.
    """
    counts = Counter(min(graph_length(length), longest) for length in lengths)
    counts.pop(longest, None)
    frequent = [length for length, count in counts.most_common(MOST - 1) if count >= LEAST]
    return sorted({*frequent, longest})


class Buffers:
    """Static memory for a batch."""

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.inputs = torch.zeros(rows, length, dtype=torch.long, device=device)
        self.targets = torch.zeros_like(self.inputs)

    def fill(self, batch: Batch) -> None:
        """Copy `batch`, which must fit, into the upper left corner; all other targets are ignored."""
        B, T = batch.inputs.shape
        self.inputs.zero_()
        self.targets.fill_(IGNORED)
        self.inputs[:B, :T] = batch.inputs
        self.targets[:B, :T] = batch.targets


class CapturedSteps:
    """Takes the same optimizer steps as `take_step` by replaying CUDA graphs (on a CPU, for tests, eagerly).

    Without gradient accumulation, one graph does the whole step. With it, one graph per length adds a batch's gradient
    to the step's gradient in place, and a separate graph does the update.

    Args:
        rows: examples in a full batch; a smaller batch is padded with rows of ignored targets.
        lengths: lengths of the batches, ascending; see `choose_lengths`.
        accumulates: whether a step may have several batches.

    Raises:
        torch.OutOfMemoryError: a step does not fit in memory even without a graph.
    """

    def __init__(
        self, learner: Learner, machine: Machine, rows: int, lengths: Sequence[int], accumulates: bool
    ) -> None:
        assert isinstance(learner.optimizer, AdamW)
        self.learner, self.machine, self.accumulates = learner, machine, accumulates
        self.optimizer = learner.optimizer
        device = machine.device
        self.learned = torch.zeros((), device=device)  # learned targets in the whole step
        self.loss = torch.zeros((), device=device)  # sum over the step's batches so far
        self.result = torch.zeros(2, device=device)  # loss and gradient norm of the latest step
        self.buffers = {length: Buffers(rows, length, device) for length in lengths}
        self.failure = ""  # why nothing could be captured
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by length; the update's graph under UPDATE
        for group in self.optimizer.param_groups:
            group["lr"] = torch.zeros((), device=device)
            if accumulates:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
        learner.model.train()
        if device.type == "cuda":
            self.capture()

    def compute(self, buffers: Buffers) -> None:
        """Add a batch's loss and gradient to those of the step; without accumulation, also update the weights."""
        with self.machine.autocast():
            part = self.learner.model(buffers.inputs, buffers.targets) / self.learned
        part.backward()
        self.loss += part.detach()
        if not self.accumulates:
            self.update()

    def update(self) -> None:
        """Clip the gradient and update the weights, unless loss or gradient is NaN or infinite; reset both.

        The fused kernel divides the gradients by `grad_scale` as it reads them, so clipping needs no separate pass.
        """
        norm, limit = torch.zeros_like(self.loss), self.learner.max_grad_norm
        if limit:
            gradients = (parameter.grad for parameter in self.learner.model.parameters())
            norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
            self.optimizer.grad_scale = ((norm + CLIP_EPSILON) / limit).clamp(min=1)
        torch.stack((self.loss, norm), out=self.result)
        self.optimizer.found_inf = (~self.result.isfinite().all()).float()
        self.optimizer.step()
        self.loss.zero_()
        self.optimizer.zero_grad(set_to_none=not self.accumulates)

    def capture(self) -> None:
        """Capture the graphs in one memory pool; if they do not fit, all steps run eagerly."""
        works: dict[int, Callable[[], None]] = {
            length: partial(self.compute, buffers) for length, buffers in self.buffers.items()
        }
        if self.accumulates:
            works[UPDATE] = self.update
        pool = torch.cuda.graph_pool_handle()
        self.learned.zero_()  # makes the loss infinite or NaN, so that the updates of the warm-up are skipped
        with self.machine.deterministic():
            # Shortest first: AdamW's moments are allocated here, and would fragment the memory of a longer batch.
            for work in works.values():
                warm_up(work)
            for group in self.optimizer.param_groups:
                group["capturable"] = True
            try:
                for key in sorted(works, reverse=True):  # longest first: the others then fit in its memory
                    self.graphs[key] = capture(works[key], pool)
            except RuntimeError as error:  # out of memory, or a driver that can't capture this
                self.failure = str(error).partition("\n")[0]
                self.graphs.clear()  # while the pool exists, an eager step may not fit in memory
                self.optimizer.zero_grad(set_to_none=not self.accumulates)
            for group in self.optimizer.param_groups:
                group["capturable"] = False  # otherwise PyTorch warns at each eager step
        torch.cuda.empty_cache()

    def run(self, key: int, work: Callable[[], None]) -> None:
        """Replay the graph of `key`, or run `work` if it was not captured."""
        graph = self.graphs.get(key)
        if graph:
            graph.replay()
        else:
            work()

    def __call__(self, batches: Sequence[Batch]) -> tuple[float, int, float | None]:
        """See `take_step`.

        Raises:
            FloatingPointError: the loss or the gradient is NaN or infinite; the weights are unchanged.
        """
        learned = sum(batch.learned for batch in batches)
        self.learned.fill_(learned)
        if not self.learner.model.training:  # visiting every module takes 0.3 ms
            self.learner.model.train()
        with self.machine.deterministic():
            for batch in batches:
                length = next(length for length in self.buffers if length >= batch.inputs.size(1))
                self.machine.seed(batch.seed)
                self.buffers[length].fill(batch)
                self.run(length, partial(self.compute, self.buffers[length]))
            if self.accumulates:
                self.run(UPDATE, self.update)
        loss, norm = self.result.tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient is {norm}")
        return loss, learned, norm if self.learner.max_grad_norm else None
