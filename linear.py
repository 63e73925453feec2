"""Matrix products in autocast's precision, in less memory than autocast takes."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TRAINED_ROWS = 256  # of logits that exist at a time in training
ROWS_ON_GPU = 4096  # the same there
FEW_ROWS = 16  # up to which a packed weight is multiplied at least as fast as one in bf16


class CastLinear(torch.autograd.Function):
    """`F.linear` in autocast's precision that casts the weight when it is needed, a block of its rows at a time.

    autocast would cast every weight once a step and keep all the casts until the backward pass is over: for 355M
    parameters 0.7 GB more, as fresh memory each time. Casting twice costs less than that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        # x is half of what training remembers, and only the weight's gradient asks for it: not where that is frozen.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        with torch.autocast(x.device.type, enabled=False):
            parts = [
                F.linear(x, weight[rows].to(dtype), None if bias is None else bias[rows].to(dtype))
                for rows in row_blocks(weight)
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        flat_y = grad_y.flatten(0, -2)  # (B * T, out)
        grad_x = grad_weight = None
        if needs_x:
            parts = [grad_y[..., rows] @ weight[rows].to(grad_y.dtype) for rows in row_blocks(weight)]
            # The sum of bf16 is made in fp32 and rounded once.
            grad_x = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)  # (..., in)
        if needs_weight:
            grad_weight = torch.empty_like(weight)
            for rows in row_blocks(weight):
                grad_weight[rows] = flat_y[:, rows].t() @ x.flatten(0, -2)
        grad_bias = flat_y.sum(0, dtype=weight.dtype) if needs_bias else None
        return grad_x, grad_weight, grad_bias


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Slices of at most 8M parameters each: all of a layer's matrix, and the token embedding of 51M in seven parts."""
    rows = max(1, (8 << 20) // weight.size(1))
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) → (..., out), in autocast's precision where that is on.

    Without autocast the result has the precision of x, and a bf16 weight is multiplied in bf16.
    """
    if torch.is_autocast_enabled(x.device.type):
        if weight.dtype == torch.float32:
            return CastLinear.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
        return F.linear(x, weight, bias)  # frozen in autocast's precision: nothing to cast, nothing to remember
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    y = F.linear(x.to(weight.dtype), weight).to(x.dtype)
    return y if bias is None else y + bias


class Packable:
    """A layer with a matrix that may be kept a second time for decoding, where few rows are multiplied by it.

    FBGEMM's fp16 weights, laid out in the order of reading, are read at three quarters of the memory's rate; oneDNN's
    in bf16 at a third. The products are fp32, so nothing but the weight is rounded, and that to 11 bits, not 8.
    """

    weight: Tensor
    packed: torch.ScriptObject | None = None

    def pack(self) -> None:
        self.packed = torch.ops.quantized.linear_prepack_fp16(self.weight.detach().float(), getattr(self, "bias", None))

    def few_rows(self, x: Tensor) -> Tensor | None:
        """x (..., in), if it is few rows and the matrix is packed, times it → (..., out) in fp32; else None.

        Never where gradients are wanted: these products have none. Nor under autocast, where losses are computed: they
        are to be those of training, and not to depend on how many rows a batch happens to have.
        """
        if self.packed is None or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return None
        if x.numel() > FEW_ROWS * x.size(-1):
            return None
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


def pack_matrices(layers: Iterable[Any]) -> None:
    """Pack those of `layers` whose matrix is in bf16, once, on a processor that has the kernels (x86).

    A second copy of the weights: 0.7 GB for 355M. A single thread packs; others in Python would halve the 2.5 s, and
    one that ends as a signal ends the process aborts it.
    """
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return
    for layer in layers:
        wanted = isinstance(layer, Packable) and layer.packed is None
        if wanted and layer.weight.is_cpu and layer.weight.dtype == torch.bfloat16:
            layer.pack()


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
