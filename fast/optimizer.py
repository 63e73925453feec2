"""Drop-in for `torch.optim.AdamW`.

Replaces: the wrappers that hide its methods from PyTorch's compiler, and import the compiler to do so.
Saves: 1.4 of 5.8 s in a run of the bundled model (two cores of AMD EPYC Zen 4, `benchmarks/LOG.md`).
Off: never; the methods are PyTorch's own.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class AdamW(torch.optim.AdamW):
    """torch's AdamW without the wrappers.

    Attributes:
        grad_scale: a tensor on the device; the fused kernel divides the gradients by it.
        found_inf: a tensor on the device; if it is 1, the fused kernel leaves weights and moments unchanged.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        inspect.unwrap(Optimizer.zero_grad)(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        inspect.unwrap(torch.optim.AdamW.step)(self, closure)
