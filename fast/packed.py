"""Packed weights for decoding."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FEW_ROWS = 16  # up to which a packed weight is multiplied at least as fast as one in bf16


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
