"""Causal attention (Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1), in the form that is fastest.

Shapes as in `gpt_model`; without a cache, so each token has keys and values of its own.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SHORT = 256  # tokens, up to which attention keeps its T * T weights in bf16 on a CPU


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
