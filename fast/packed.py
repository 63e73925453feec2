"""Drop-ins for `torch.nn.Linear` in decoding, where a few rows are multiplied by a bf16 weight that is not trained.

Replaces: oneDNN's bf16 products. FBGEMM's fp16 weights are packed in the order in which they are read, so a few rows
read them at three quarters of the memory's rate, where oneDNN reaches one third. fp16 holds the bf16 weights exactly in
its normal range, and neither activations nor products are rounded.
Saves: half of the time of decoding 1 to 3 prompts with gpt2-medium, for 0.7 GB and 2.5 s once (two cores of AMD EPYC
Zen 4, `benchmarks/LOG.md`).
Off: for fp32 weights, for weights too large for fp16, on a GPU, on processors other than x86, for more than `FEW_ROWS`
rows, beside LoRA adapters (a second copy of the weights would be most of their memory), and under autocast, where
losses are computed as in training.
A bf16 head computes fp32 logits even where packing is off.
"""

import torch
from torch import Tensor, nn

from fast.linear import Linear, linear

FEW_ROWS = 16  # for more rows, packed fp16 is slower than bf16
HEAD_ROWS = 512  # rows of a bf16 head that are cast to fp32 at a time, so that they stay in the processor's cache


class PackedLinear(Linear):
    """`layer` with its bf16 weight packed, if it is on a processor that has the kernels."""

    def __init__(self, layer: Linear) -> None:
        weight, bias = layer.weight, layer.bias
        super().__init__(weight.size(1), weight.size(0), bias=bias is not None, device="meta")
        self.weight, self.bias = weight, bias
        self.packed = None
        # Pack in one thread: a worker thread that exits while a signal ends the process makes it abort.
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
    """An output head whose logits are computed in fp32: around -100, where GPT-2's lie, bf16 cannot separate them."""

    def unpacked(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type) or self.weight.dtype == input.dtype:
            return linear(input, self.weight)
        # W @ x.T is several times faster than x @ W.T when x has few rows.
        columns = input.flatten(0, -2).t()  # (C, N)
        parts = [rows.to(input.dtype) @ columns for rows in self.weight.split(HEAD_ROWS)]
        return torch.cat(parts).t().reshape(*input.shape[:-1], -1)


def pack_layers(model: nn.Module) -> None:
    """Replace the layers of a GPTModel that have a bf16 weight by packed ones; those with adapters stay as they are."""
    head = model.get_submodule("lm_head")
    parent, name = (
        (model, "lm_head") if isinstance(head, Linear) else (head, "old")
    )  # new tokens have rows of their own
    old = parent.get_submodule(name)
    assert isinstance(old, Linear)
    if old.weight.dtype == torch.bfloat16:
        setattr(parent, name, PackedHead(old))
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is Linear and layer.weight.is_cpu and layer.weight.dtype == torch.bfloat16:
                setattr(parent, name, PackedLinear(layer))
