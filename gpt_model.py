"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

Shapes: B rows in the batch, T tokens, C channels (`n_embd`), H heads, D = C / H channels per head,
S keys and values (cached and new), V tokens in the vocabulary.

Parameters are named as in the published files. The four names from `fast` are drop-ins for torch's own: with torch's,
every number is the same up to rounding, but the model is slower.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fast import Embedding, Linear, linear_cross_entropy, scaled_dot_product_attention


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model, with the field names of the published `config.json`."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257
    n_positions: int = 1024
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    layer_norm_epsilon: float = 1e-5


PUBLISHED = {
    "distilgpt2": GPTConfig(n_layer=6, n_head=12, n_embd=768),
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class KVCache:
    """Keys and values of all tokens so far, so that a decode step computes only the new token.

    Args:
        padding: (B,) number of padding tokens at the left of each row; they are masked.
        capacity: maximum number of tokens in a row, padding included.
    """

    def __init__(self, config: GPTConfig, padding: Tensor, capacity: int) -> None:
        B, H, D = len(padding), config.n_head, config.n_embd // config.n_head
        self.keys = torch.empty(config.n_layer, B, H, capacity, D, device=padding.device)
        self.values = torch.empty_like(self.keys)
        self.padding = padding
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, D) keys and values of new tokens; return those of all tokens, (B, H, S, D)."""
        S = self.length + k.size(2)
        self.keys[layer, :, :, self.length : S] = k
        self.values[layer, :, :, self.length : S] = v
        return self.keys[layer, :, :, :S], self.values[layer, :, :, :S]

    def positions(self, T: int) -> Tensor:
        """(B, T) positions of the next T tokens; the first token after the padding has position 0."""
        columns = torch.arange(self.length, self.length + T, device=self.padding.device)
        return (columns - self.padding[:, None]).clamp(min=0)

    def mask(self, T: int) -> Tensor:
        """(B, 1, T, S) mask, true where the next T tokens may attend: not to padding, and not to later tokens."""
        keys = torch.arange(self.length + T, device=self.padding.device)  # (S,)
        queries = keys[self.length :, None]  # (T, 1)
        visible = (keys <= queries) & (keys >= self.padding[:, None, None])  # (B, T, S)
        # Padding attends to itself, because a softmax over no keys is NaN.
        return (visible | (keys == queries))[:, None]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one product
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head
        self.layer = layer
        self.dropout = dropout

    def forward(self, x: Tensor, cache: KVCache | None, mask: Tensor | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D)
        dropout = self.dropout if self.training else 0.0
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, dropout: float) -> None:
        super().__init__()
        width = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, width)
        self.c_proj = Linear(width, config.n_embd)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """A transformer block: each half normalizes its input and adds its output to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer, dropout)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config, dropout)

    def forward(self, x: Tensor, cache: KVCache | None, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class GPTModel(nn.Module):
    def __init__(self, config: GPTConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer, dropout) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:  # initialising a meta tensor triggers an import that takes a second
                initialise(name, parameter, config.n_layer)

    def tie_weights(self) -> None:
        """Use the token embedding as the output head (Press and Wolf 2017); call again after replacing `wte.weight`."""
        self.lm_head.weight = self.wte.weight

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, cache: KVCache | None = None, reduction: str = "sum"
    ) -> Tensor:
        """(B, T) token ids → (B, T, V) logits, or with a `cache` (B, 1, V) logits of the last token.

        With `targets` (B, T), return their negative log-likelihood in nats instead, ignoring -100: the sum (the
        training loop divides it by the learned tokens of the whole step), or (B * T,) values with `reduction="none"`.
        Without a cache, rows may be padded on the right, because attention is causal.
        """
        T = ids.size(1)
        positions = torch.arange(T, device=ids.device) if cache is None else cache.positions(T)
        mask = None if cache is None else cache.mask(T)
        x = self.wte(ids) + self.wpe(positions)  # (B, T, C)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.h:
            x = block(x, cache, mask)
        x = self.ln_f(x)
        if cache is not None:
            cache.length += T
        if targets is not None:
            x, targets = x.flatten(0, 1), targets.flatten()  # (B * T, C), (B * T,)
            return linear_cross_entropy(x, self.lm_head.weight, targets, reduction=reduction)
        return self.lm_head(x if cache is None else x[:, -1:])


def count_parameters(config: GPTConfig) -> int:
    """The number of parameters in a model, without creating it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPTModel(config).parameters())


def initialise(name: str, parameter: nn.Parameter, n_layer: int) -> None:
    """GPT-2's initialisation: N(0, 0.02), scaled down for the 2 * n_layer layers that add to the residual stream."""
    if name.endswith("bias"):
        nn.init.zeros_(parameter)
    elif "ln_" in name:
        nn.init.ones_(parameter)
    else:
        scale = 1 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 1.0
        nn.init.normal_(parameter, std=0.02 * scale)
