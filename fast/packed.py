"""Drop-ins for `torch.nn.Linear` in decoding, which multiplies a few rows by a frozen bf16 weight.

Replaces: oneDNN's bf16 products. FBGEMM packs fp16 weights in the order in which it reads them: with a few rows it
reaches three quarters of the memory bandwidth, where oneDNN reaches one third. fp16 represents bf16 weights exactly
within its normal range, and neither activations nor products are rounded.
Saves: half of the time to decode 1 to 3 prompts with gpt2-medium; costs 0.7 GB, and 2.5 s once (two cores of AMD EPYC
Zen 4, `benchmarks/LOG.md`).
Off: for fp32 weights, for weights too large for fp16, on a GPU, on processors other than x86, for more than `FEW_ROWS`
rows, with LoRA adapters (a second copy of the weights would dominate the memory of the run), and under autocast (losses
are computed as in training).
A bf16 head computes fp32 logits even if packing is off.
"""

import torch
from torch import Tensor, nn

from fast.linear import Linear, linear

FEW_ROWS = 16  # with more rows, packed fp16 is slower than bf16
HEAD_ROWS = 512  # rows of a bf16 head to cast to fp32 at a time; they fit in the processor's cache


class PackedLinear(Linear):
    """`layer` with its bf16 weight packed, if the processor supports the kernels."""

    def __init__(self, layer: Linear) -> None:
        weight, bias = layer.weight, layer.bias
        super().__init__(weight.size(1), weight.size(0), bias=bias is not None, device="meta")
        self.weight, self.bias = weight, bias
        self.packed = None
        # Don't pack in worker threads: if one exits while a signal ends the process, the process aborts.
        available = weight.is_cpu and torch.backends.quantized.engine in ("x86", "fbgemm")
        if available and max(map(abs, map(float, torch.aminmax(weight.detach())))) <= torch.finfo(torch.float16).max:
            self.packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), bias)

    def forward(self, input: Tensor) -> Tensor:
        few = input.numel() <= FEW_ROWS * input.size(-1)
        if self.packed is not None and few and not torch.is_autocast_enabled(input.device.type):
            return torch.ops.quantized.linear_dynamic_fp16(input, self.packed)
        return self.unpacked(input)

    def unpacked(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class PackedHead(PackedLinear):
    """An output head with fp32 logits: bf16 cannot separate the top logits, which are around -100 in GPT-2."""

    def unpacked(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type) or self.weight.dtype == input.dtype:
            return linear(input, self.weight)
        # W @ x.T is several times faster than x @ W.T when x has few rows.
        columns = input.flatten(0, -2).t()  # (C, N)
        parts = [rows.to(input.dtype) @ columns for rows in self.weight.split(HEAD_ROWS)]
        return torch.cat(parts).t().reshape(*input.shape[:-1], -1)


def pack_layers(model: nn.Module) -> None:
    """Pack the bf16 layers of a GPTModel; layers with adapters stay unchanged."""
    head = model.get_submodule("lm_head")
    # A head with trained rows for new tokens keeps the frozen rows in `old`.
    parent, name = (model, "lm_head") if isinstance(head, Linear) else (head, "old")
    old = parent.get_submodule(name)
    assert isinstance(old, Linear)
    if old.weight.dtype == torch.bfloat16:
        setattr(parent, name, PackedHead(old))
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is Linear and layer.weight.is_cpu and layer.weight.dtype == torch.bfloat16:
                setattr(parent, name, PackedLinear(layer))
