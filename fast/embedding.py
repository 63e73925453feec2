"""Drop-in for `torch.nn.Embedding`, for a weight that may also be the output head (tied weights).

Replaces: the second full-size gradient that autograd allocates for the looked-up rows and adds to the head's. The head
comes first in the backward pass and records its gradient (`shared_weight`); the lookup adds its rows to it in place.
Saves: 206 MB of peak memory and 11 ms per step of gpt2-medium (two cores of AMD EPYC Zen 4, `benchmarks/LOG.md`).
Also saves a second at start-up: torch's layer initialises random weights that loading overwrites.
Off: if the head has no gradient, and in a model that is compiled as a whole; torch's gradient is used then.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Do nothing: GPTModel initialises its parameters, or loads them."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return F.embedding(input, self.weight)
        return Lookup.apply(self.weight, input)  # pyright: ignore[reportReturnType]


class Lookup(torch.autograd.Function):
    """`F.embedding` whose gradient is added in place to the gradient that `shared_weight` recorded, if there is one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.weight = weight
        vars(weight).pop("shown_gradient", None)  # left over from a backward pass that failed
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (ids,), weight = ctx.saved_tensors, ctx.weight
        shown = vars(weight).pop("shown_gradient", None)
        if shown is None:
            return torch.ops.aten.embedding_dense_backward(grad_rows, ids, len(weight), -1, False), None
        # autograd keeps this tensor until all gradients of the weight have arrived, including ours.
        shown.index_add_(0, ids.flatten(), grad_rows.flatten(0, -2))
        return None, None


class ShowGradient(torch.autograd.Function):
    """The unchanged weight; the backward pass leaves its gradient where `Lookup` finds it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.weight.shown_gradient = grad_weight
        return grad_weight


def shared_weight(weight: Tensor) -> Tensor:
    """`weight`, for the layer that comes first in the backward pass and shares it with an `Embedding`."""
    if torch.compiler.is_compiling():
        return weight
    return ShowGradient.apply(weight)  # pyright: ignore[reportReturnType]
