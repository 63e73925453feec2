"""Drop-in for `torch.nn.functional.linear_cross_entropy` (new in torch 2.13): output head and loss in one.

Replaces: logits for every position. Only positions with a learned target are computed, in chunks; in training each
chunk of logits is turned into its gradient immediately, so the full logits never exist.
Saves: a few percent of a step if half of the tokens are learned; 1.7 of 12.9 GB and 8% of the time with gpt2-medium at
4 × 1024 tokens (two cores of AMD EPYC Zen 4, `benchmarks/LOG.md`). `compiled_loss` saves a tenth of a step on an H100.
Off: training uses no chunks on a CPU with up to `TRAINED_ROWS` learned targets (nothing to save), with a weight in
parts, and in fp16 (small gradients would underflow before the loss is scaled). On a GPU, training computes all rows:
counting the learned ones would make the program wait for the GPU, and a CUDA graph needs static shapes.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fast.embedding import shared_weight
from fast.linear import linear, product

TRAINED_ROWS = 256  # rows of logits in a chunk in training
ROWS_ON_GPU = 4096  # the same on a GPU
EVALUATED_ROWS = 128  # the same in evaluation
ROUND = 16  # pad the rows to a multiple of this: oneDNN compiles and caches a kernel for every row count
IGNORED = -100  # torch's default for `ignore_index`

COMPILED: ContextVar[bool] = ContextVar("COMPILED", default=False)  # whether `compiled_loss` is active


@contextlib.contextmanager
def compiled_loss() -> Iterator[None]:
    """Inside this context, one kernel from torch.compile computes the loss and its gradient."""
    token = COMPILED.set(True)
    try:
        yield
    finally:
        COMPILED.reset(token)


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor | tuple[Tensor, ...], target: Tensor, *, reduction: str
) -> Tensor:
    """The negative log-likelihood, in nats, of (N,) targets under the logits of (N, C) inputs and a (V, C) weight.

    Args:
        linear_weight: several parts if only some rows are trained.
        reduction: "sum", or "none" for a result of shape (N,) in evaluation.
    """
    parts = linear_weight if isinstance(linear_weight, tuple) else (linear_weight,)
    trained = torch.is_grad_enabled() and reduction == "sum"
    if trained and input.is_cuda and not is_fp16(input):
        return trained_loss(input, parts, target)
    learned = target != IGNORED
    x, wanted = input[learned], target[learned]  # (n, C), (n,)
    missing = -len(wanted) % ROUND
    x, wanted = F.pad(x, (0, 0, 0, missing)), F.pad(wanted, (0, missing), value=IGNORED)
    if trained:
        return trained_loss(x, parts, wanted)
    losses = [
        F.cross_entropy(logits_of(some, parts), those, reduction=reduction)  # logits: (rows, V)
        for some, those in zip(x.split(EVALUATED_ROWS), wanted.split(EVALUATED_ROWS), strict=True)
    ]
    if reduction == "sum":
        return torch.stack(losses).sum()
    found = torch.cat(losses)[: len(wanted) - missing]
    return found.new_zeros(target.shape).masked_scatter_(learned, found)


def logits_of(x: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    """(n, C) inputs and the parts of a (V, C) weight → (n, V)."""
    return linear(x, parts[0]) if len(parts) == 1 else torch.cat([linear(x, part) for part in parts], dim=-1)


def trained_loss(x: Tensor, parts: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """The summed loss of (n,) targets, for training."""
    parts = (shared_weight(parts[0]), *parts[1:])
    small = x.is_cpu and len(targets) <= TRAINED_ROWS
    if small or len(parts) > 1 or is_fp16(x):
        return F.cross_entropy(logits_of(x, parts), targets, reduction="sum")
    return LinearCrossEntropy.apply(x, parts[0], targets, COMPILED.get())  # pyright: ignore[reportReturnType]


def is_fp16(x: Tensor) -> bool:
    """Whether autocast multiplies `x` in fp16."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


def cast_aligned(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` (V, C) in `dtype`; a cast copy is padded with zeros to a multiple of 8 rows.

    GPUs fall back to slow kernels if V is not a multiple of 8, and GPT-2 has 50,257.
    """
    if dtype == weight.dtype:
        return weight
    V, C = weight.shape
    cast = weight.new_empty(V + -V % 8, C, dtype=dtype)
    cast[:V] = weight
    cast[V:] = 0
    return cast


class LinearCrossEntropy(torch.autograd.Function):
    """The summed negative log-likelihood of targets under the logits x (N, C) @ weight.T (C, V), ignoring -100.

    With V = 50,257 columns the logits, their softmax and its gradient would be the largest tensors of a training step.
    The gradient is known as soon as the loss is (softmax, minus one at the target), so each chunk of logits is turned
    into its loss and the gradients of x and weight, then freed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, compiled: bool) -> Tensor:
        device, dtype, size = x.device, x.dtype, ROWS_ON_GPU if x.is_cuda else TRAINED_ROWS
        differentiate = compiled_differentiation if compiled else loss_and_gradient
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        losses, grads, grad_weight = [], [], None
        with torch.autocast(device.type, enabled=False):
            x, cast = x.to(dtype), cast_aligned(weight, dtype)
            for rows, wanted in zip(x.split(size), targets.split(size), strict=True):
                logits = F.linear(rows, cast)  # (rows, V + padding)
                logits[:, len(weight) :] = -math.inf
                ignored = (wanted == IGNORED)[:, None]
                loss, grad = differentiate(logits, wanted[:, None].masked_fill(ignored, 0))
                losses.append(loss.masked_fill_(ignored, 0).sum())
                grads.append((grad @ cast).masked_fill_(ignored, 0))
                if ctx.needs_input_grad[1]:
                    part = product(grad.t(), rows.masked_fill(ignored, 0), weight.dtype)  # (V + padding, C)
                    grad_weight = part.to(weight.dtype) if grad_weight is None else grad_weight.add_(part)
        ctx.save_for_backward(torch.cat(grads), None if grad_weight is None else grad_weight[: len(weight)])
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_loss, None if grad_weight is None else grad_weight * grad_loss, None, None


def loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood (N, 1) of targets (N, 1), and its gradient (N, V) with respect to logits (N, V)."""
    log_p = logits.float().log_softmax(dim=-1)
    hit = log_p.gather(1, targets)  # the gradient at the target is exp(hit) - 1; expm1 is exact near 0
    grad = log_p.exp_().to(logits.dtype)
    return -hit, grad.scatter_(1, targets, hit.expm1().to(grad.dtype))


def compiled_differentiation(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`loss_and_gradient`, compiled on its first call: its passes over the logits take a tenth of an eager GPU step."""
    for tensor in (logits, targets):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)  # only the rows: code for any number of columns is slower
    return compile_once()(logits, targets)


@functools.cache
def compile_once() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(loss_and_gradient)
