"""The loss of a language model in pieces."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TRAINED_ROWS = 256  # of logits that exist at a time in training
ROWS_ON_GPU = 4096  # the same there


def cast_aligned(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` (V, C) in `dtype`; where that is another, with zeros below it up to a multiple of 8 rows.

    A GPU has slow kernels of its own for a product whose number of columns, here V = 50,257, 8 does not divide.
    """
    if dtype == weight.dtype:
        return weight
    V, C = weight.shape
    cast = weight.new_empty(V + -V % 8, C, dtype=dtype)
    cast[:V] = weight
    cast[V:] = 0
    return cast


class LinearCrossEntropy(torch.autograd.Function):
    """The summed negative log-likelihood of targets by the logits x (N, C) times weight (V, C), -100 left out.

    With V = 50,257 columns the logits, their softmax and its gradient would be the largest tensors of a training step.
    The gradient of the loss is known with the loss (softmax less one at the target): both are made for a few rows at a
    time, and forgotten.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, compiled: bool) -> Tensor:
        device, dtype, size = x.device, x.dtype, ROWS_ON_GPU if x.is_cuda else TRAINED_ROWS
        differentiate = compiled_differentiation() if compiled else loss_and_gradient
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        losses, grads, grad_weight = [], [], None
        with torch.autocast(device.type, enabled=False):
            x, cast = x.to(dtype), cast_aligned(weight, dtype)
            for rows, wanted in zip(x.split(size), targets.split(size), strict=True):
                logits = F.linear(rows, cast)  # (rows, V or a few more)
                logits[:, len(weight) :] = -math.inf
                ignored = (wanted == -100)[:, None]
                loss, grad = differentiate(logits, wanted[:, None].masked_fill(ignored, 0))
                losses.append(loss.masked_fill_(ignored, 0).sum())
                grads.append((grad @ cast).masked_fill_(ignored, 0))
                if ctx.needs_input_grad[1]:
                    part = grad.t() @ rows.masked_fill(ignored, 0)  # (V or a few more, C)
                    grad_weight = part.to(weight.dtype) if grad_weight is None else grad_weight.add_(part)
        ctx.save_for_backward(torch.cat(grads), None if grad_weight is None else grad_weight[: len(weight)])
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_loss, None if grad_weight is None else grad_weight * grad_loss, None, None


def loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood (N, 1) of targets (N, 1) by the logits (N, V), and its gradient by them (N, V)."""
    log_p = logits.float().log_softmax(dim=-1)
    hit = log_p.gather(1, targets)
    grad = log_p.exp_().to(logits.dtype)
    return -hit, grad.scatter_(1, targets, hit.expm1().to(grad.dtype))


@functools.cache
def compiled_differentiation() -> Callable[..., tuple[Tensor, Tensor]]:
    """`loss_and_gradient`, compiled at its first call: on a GPU a tenth of a step is the passes over all the logits."""
    return torch.compile(loss_and_gradient, dynamic=True)
