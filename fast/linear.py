"""Drop-in for `torch.nn.Linear` in autocast's precision.

Replaces: autocast's casts of fp32 weights, which stay in memory until the end of the backward pass. Here a weight is
cast on use, a block of rows at a time; casting twice is cheaper than allocating fresh memory. On a GPU, products
write fp32 gradients directly, and a bias gets its gradient from a product with ones.
Saves: 0.8 of 7.1 GB in a step of gpt2-medium, at the same speed (two cores of AMD EPYC Zen 4, `benchmarks/LOG.md`); a
tenth of a captured step on 8 short dialogues (H100).
Also saves a second at start-up: torch's layer initialises random weights that loading overwrites.
Off: without autocast, and for a frozen weight that is stored in autocast's precision.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Do nothing: GPTModel initialises its parameters, or loads them."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class CastLinear(torch.autograd.Function):
    """`F.linear` in autocast's precision that casts the weight on use, a block of rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        # Only the weight's gradient needs x, which is half of the saved activations: drop it for a frozen weight.
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
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            parts = [grad_y[..., rows] @ weight[rows].to(grad_y.dtype) for rows in row_blocks(weight)]
            # The sum of bf16 parts accumulates in fp32.
            grad_x = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)  # (..., in)
        if needs_weight:
            flat_x = x.flatten(0, -2)
            if x.is_cuda:
                grad_weight = product(flat_y.t(), flat_x, weight.dtype)
            else:
                grad_weight = torch.empty_like(weight)
                for rows in row_blocks(weight):
                    grad_weight[rows] = flat_y[:, rows].t() @ flat_x
        if needs_bias and flat_y.is_cuda and not torch.compiler.is_compiling():
            grad_bias = product(flat_y.new_ones(1, len(flat_y)), flat_y, weight.dtype)[0]  # faster than a sum
        elif needs_bias:
            grad_bias = flat_y.sum(0, dtype=weight.dtype)
        return grad_x, grad_weight, grad_bias


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a (M, K) times b (K, N); a GPU writes the result in `dtype`, without rounding it to the precision of a and b."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda and a.dtype != dtype else a @ b


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Slices of at most 8M parameters each: one for most layers, seven for the token embedding of gpt2-medium."""
    rows = max(1, (8 << 20) // weight.size(1))
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in), plus bias → (..., out), in autocast's precision if autocast is on.

    Without autocast the result has the precision of x, and a bf16 weight is multiplied in bf16.
    """
    if torch.is_autocast_enabled(x.device.type):
        if weight.dtype == torch.float32:
            return CastLinear.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
        return F.linear(x, weight, bias)  # frozen, in autocast's precision: nothing to cast or save
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    y = F.linear(x.to(weight.dtype), weight).to(x.dtype)
    return y if bias is None else y + bias
