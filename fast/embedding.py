"""Drop-in for `torch.nn.Embedding`, for a weight that may also be the output head (tied weights).

Replaces: a second gradient of the size of the embedding, which autograd makes for the looked-up rows and adds to the
head's. The loss runs first in the backward pass and shows the head's gradient (`shared_weight`); the rows are added to
that one in place.
Saves: 206 MB at the peak of a step of gpt2-medium, and 11 ms (two cores of AMD EPYC Zen 4, `benchmarks/LOG.md`). Also a
second at the start: torch's layer draws random numbers that loading replaces.
Off: where the head has no gradient of its own, and in a model that is compiled as a whole; then the rows get torch's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing: GPTModel initialises its parameters, or takes loaded ones."""

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
        # autograd holds this very tensor until all gradients of the weight have arrived, ours included.
        shown.index_add_(0, ids.flatten(), grad_rows.flatten(0, -2))
        return None, None


class ShowGradient(torch.autograd.Function):
    """The weight as it is; in the backward pass its gradient is left where `Lookup` finds it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.weight.shown_gradient = grad_weight
        return grad_weight


def shared_weight(weight: Tensor) -> Tensor:
    """`weight` for the use that comes first in the backward pass, where an `Embedding` has it too."""
    if torch.compiler.is_compiling():
        return weight
    return ShowGradient.apply(weight)  # pyright: ignore[reportReturnType]
