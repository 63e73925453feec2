"""Causal attention (Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1), in the form that is fastest.

Shapes as in `gpt_model`; without a cache, so each token has keys and values of its own.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SHORT = 256  # tokens, up to which attention keeps its T * T weights in bf16 on a CPU


class Packed(NamedTuple):
    """Dialogues that stand one after another in a single row of N tokens, each seeing itself alone."""

    lengths: Sequence[int]  # N in all
    bounds: Tensor  # (dialogues + 1,) int32: where each begins, and where the last ends

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Packed":
        return cls(lengths, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device))

    def positions(self) -> Tensor:
        """(N,), from 0 in each dialogue."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.bounds.device)


def short_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention (B, H, T, D) after the formula (Vaswani et al. 2017, section 3.2.1); its T * T weights are kept.

    In bf16 on a CPU PyTorch's own spares that memory and takes twice to four times as long, most of it backwards.
    """
    B, H, T, D = q.shape
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    hidden = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    weights = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=1 / math.sqrt(D)).softmax(dim=-1)  # (B * H, T, T)
    return torch.bmm(F.dropout(weights, dropout), v).view(B, H, T, D)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """(B, H, T, D), each token looking at itself and what comes before it, in the form that is fastest."""
    if q.is_cpu and q.dtype == torch.bfloat16 and q.size(2) <= SHORT:
        return short_attention(q, k, v, dropout)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed, dropout: float) -> Tensor:
    """Causal attention (1, H, N, D) within each dialogue of a packed row."""
    flash = q.is_cuda and q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= (8, 0)
    if flash and not dropout:
        return varlen_attention(q, k, v, packed)
    dialogues = zip(*(x.split(packed.lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([causal_attention(q, k, v, dropout) for q, k, v in dialogues], dim=2)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    """`packed_attention` as one kernel of the GPU (FlashAttention, Dao et al. 2022), without dropout."""
    from torch.nn.attention.varlen import varlen_attn  # it registers operators, which others need not wait for

    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, H, D)
    bounds, longest = packed.bounds, max(packed.lengths)
    y = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))  # back without limit, never ahead
    assert isinstance(y, Tensor)
    return y.transpose(0, 1)[None]
