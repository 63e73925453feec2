"""Drop-in for `torch.nn.functional.scaled_dot_product_attention` (Vaswani et al. 2017, section 3.2.1).

Replaces: torch's fused kernel, for short causal sequences in bf16 on a CPU; everything else goes to torch.
Saves: half to three quarters of the attention time, mostly in the backward pass; costs memory for the T * T weights
(two cores of AMD EPYC Zen 4, `benchmarks/LOG.md`).
Off: on a GPU, in fp32, with a mask, and for sequences of more than `SHORT` tokens.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SHORT = 512  # longest sequence, in tokens, whose T * T weights are kept


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """(B, H, T, D) queries, (B, H, S, D) keys and values → (B, H, T, D)."""
    plain = is_causal and attn_mask is None and query.shape == key.shape
    if plain and query.is_cpu and query.dtype == torch.bfloat16 and query.size(2) <= SHORT:
        return short_attention(query, key, value, dropout_p)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal
    )


def short_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention (B, H, T, D) by the textbook formula; autograd keeps the T * T weights."""
    B, H, T, D = q.shape
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(D)).softmax(dim=-1)  # (B * H, T, T)
    return torch.bmm(F.dropout(weights, dropout), v).view(B, H, T, D)
