"""GPT-2, from scratch (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

Shapes: B dialogues in the batch, T tokens, C channels (`n_embd`), H heads, D = C / H channels of a head,
S keys and values to look back on, V words of the vocabulary, L layers.

Parameters are named as in the published files, so that loading one is a look-up by name.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fast.attention import causal_attention
from fast.kv_cache import FixedStep, KVCache
from fast.linear import linear
from fast.loss import TRAINED_ROWS, LinearCrossEntropy
from fast.packed import Packable, pack_matrices


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; the field names are those of the published `config.json`."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257
    n_positions: int = 1024
    n_inner: int | None = None  # width of the MLP; None means 4 * n_embd
    layer_norm_epsilon: float = 1e-5


PUBLISHED = {
    "distilgpt2": GPTConfig(n_layer=6, n_head=12, n_embd=768),
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}

LOSS_ROWS = 128  # whose logits are computed at a time where nothing is trained
HEAD_ROWS = 512  # of a bf16 embedding, multiplied at a time where they have to be cast to fp32


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing: GPTModel initialises all of its parameters, or takes loaded ones."""


class TiedWeight(torch.autograd.Function):
    """Rows of the token embedding, and all of it again, which goes to the output head.

    So the head's gradient, as large as the embedding, comes back through here, and the rows' is added to it in place:
    autograd would make the sum a tensor of its own, another 206 MB for gpt2-medium.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_weight: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (ids,) = ctx.saved_tensors
        return grad_weight.index_add_(0, ids.flatten(), grad_rows.flatten(0, -2)), None


class TokenEmbedding(Packable, Embedding):
    compiled = False  # whether training computes the gradient of the loss as torch.compile makes it

    def tied(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) token ids → their rows (B, T, C), and the weight (V, C) for `logits` to read."""
        return TiedWeight.apply(self.weight, ids)  # pyright: ignore[reportReturnType]

    def logits(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """x (..., C) → (..., V): the token embedding, or `weight` in its place, read backwards (Press and Wolf 2017).

        GPT-2's logits lie about -100, where the numbers of bf16 are half a unit apart: the likeliest token would be
        drawn by lot. So a bf16 embedding is multiplied in the precision of x, of which a block stays in the processor's
        cache.
        """
        if weight is None and (y := self.few_rows(x)) is not None:
            return y
        weight = self.weight if weight is None else weight
        if torch.is_autocast_enabled(x.device.type) or weight.dtype == x.dtype:
            return linear(x, weight)
        # Rows times x, not x times rows: of a few columns the processor's kernels are several times as fast.
        columns = x.flatten(0, -2).t()  # (C, N)
        parts = [rows.to(x.dtype) @ columns for rows in weight.split(HEAD_ROWS)]
        return torch.cat(parts).t().reshape(*x.shape[:-1], -1)

    def cross_entropy(self, x: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """The summed negative log-likelihood of (N,) targets by the `logits` of x (N, C), to be trained.

        Made with the loss, the gradient is rounded before the loss is scaled, and fp16 would lose what lies below 6e-8.
        """
        device = x.device.type
        fp16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        if fp16 or len(targets) <= TRAINED_ROWS:  # of few rows there is nothing to save
            return F.cross_entropy(self.logits(x, weight), targets, reduction="sum")
        weight = self.weight if weight is None else weight
        return LinearCrossEntropy.apply(x, weight, targets, self.compiled)  # pyright: ignore[reportReturnType]


class Linear(Packable, nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: GPTModel initialises all of its parameters, or takes loaded ones."""

    def forward(self, input: Tensor) -> Tensor:
        y = self.few_rows(input)
        return linear(input, self.weight, self.bias) if y is None else y


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one product
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head
        self.layer = layer
        self.dropout = dropout

    def forward(self, x: Tensor, cache: KVCache | None, visible: Tensor | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        if visible is None:
            y = causal_attention(q, k, v, dropout)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
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
    """A transformer block; normalisation comes before each half, and each half adds to what came in."""

    compiled = False  # whether training runs it as torch.compile makes it

    def __init__(self, config: GPTConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer, dropout)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config, dropout)

    def forward(self, x: Tensor, cache: KVCache | None, visible: Tensor | None) -> Tensor:
        if self.compiled and self.training:
            return compiled_block()(self, x, cache, visible)
        return self.add_halves(x, cache, visible)

    def add_halves(self, x: Tensor, cache: KVCache | None, visible: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, visible)
        return x + self.mlp(self.ln_2(x))


@functools.cache
def compiled_block() -> Callable[..., Tensor]:
    """`Block.add_halves`, compiled once for all blocks and all lengths, at its first call."""
    return torch.compile(Block.add_halves, dynamic=True)


class GPTModel(nn.Module):
    """Token ids in, logits or a loss out. The output head is the token embedding again (tied weights)."""

    def __init__(self, config: GPTConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.gradient_checkpointing = False  # training computes the inside of blocks twice rather than keep it
        self.wte = TokenEmbedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer, dropout) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:  # PyTorch takes a second to learn how to draw numbers that don't exist
                initialise(name, parameter, config.n_layer)

    def hidden_states(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) token ids → (B, T, C), what the output head reads.

        Without a cache, rows may be padded on the right: no token looks at what comes after it.
        """
        return self.transform(self.wte(ids), cache)

    def transform(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T, C) rows of the token embedding → (B, T, C), with positions, through all blocks."""
        T, visible = x.size(1), None
        if cache is not None:
            positions, visible = cache.positions(T), cache.mask(T)
        else:
            positions = torch.arange(T, device=x.device)
        x = x + self.wpe(positions)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.h:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, cache, visible, use_reentrant=False)
            else:
                x = block(x, cache, visible)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T) token ids → (B, T, V) logits; with `targets` (B, T), the summed negative log-likelihood instead."""
        rows, weight = self.wte.tied(ids)
        x = self.transform(rows)
        return self.wte.logits(x, weight) if targets is None else self.loss(x, targets, weight)

    def loss(self, x: Tensor, targets: Tensor, weight: Tensor | None = None, reduction: str = "sum") -> Tensor:
        """(B, T, C) hidden states and (B, T) targets → the negative log-likelihood of the learned targets, in nats.

        A sum, or without a `reduction` ("none") one for each of them, row after row.

        A target of -100 is not learned, and no logits are computed there: with 50,257 columns they are the largest
        tensor of a training step. The rows that are left are made a multiple of 16 again: for each new number of them
        the processor's kernels would be made, and kept, anew.
        """
        learned = targets != -100
        x, targets = x[learned], targets[learned]  # (N, C), (N,)
        missing = -len(targets) % 16
        x, padded = F.pad(x, (0, 0, 0, missing)), F.pad(targets, (0, missing), value=-100)
        if torch.is_grad_enabled() and reduction == "sum":
            return self.wte.cross_entropy(x, padded, weight)
        # Without gradients a piece at a time does, in memory that is used again.
        losses = [
            F.cross_entropy(self.wte.logits(some, weight), those, reduction=reduction)  # logits: (rows, V)
            for some, those in zip(x.split(LOSS_ROWS), padded.split(LOSS_ROWS), strict=True)
        ]
        return torch.stack(losses).sum() if reduction == "sum" else torch.cat(losses)[: len(targets)]

    def next_token_logits(self, ids: Tensor, cache: KVCache) -> Tensor:
        """(B, T) new token ids → (B, V) logits of the token that follows; `cache` then holds the new ones too."""
        if ids.size(1) > 1:
            return self.last_logits(ids, cache)
        if ids.is_cuda:
            cache.step = cache.step or FixedStep(self.last_logits, cache)
            return cache.step(ids, cache)
        pack_matrices(self.modules())
        return self.last_logits(ids, cache)

    def last_logits(self, ids: Tensor, cache: KVCache) -> Tensor:
        """`next_token_logits`, computed as the tokens and the cache come."""
        return self.wte.logits(self.hidden_states(ids, cache)[:, -1])


def count_parameters(config: GPTConfig) -> int:
    """The number of weights of a model of that shape; it is not made."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPTModel(config).parameters())


def in_bf16(model: GPTModel) -> GPTModel:
    """A copy of `model` for decoding, with its matrices in bf16; all else, and those that are, it shares with `model`.

    A new token costs a reading of all the weights and little else: half the bytes are half the time. What autocast
    rounds at each use is rounded once. Positions, biases, norms and adapters stay fp32, and so does what the layers add
    up.
    """
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and name.endswith(".weight") and name != "wpe.weight"
        if parameter.dtype != torch.bfloat16
    ]
    sizes = [matrix.numel() for matrix in matrices]
    # One block: many of them, once freed, would leave holes in the memory that training then takes.
    block = torch.empty(sum(sizes), dtype=torch.bfloat16, device=model.wte.weight.device)
    rounded = {
        id(matrix): nn.Parameter(part.view_as(matrix).copy_(matrix.detach()), requires_grad=False)
        for matrix, part in zip(matrices, block.split(sizes), strict=True)
    }
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared | rounded)


def initialise(name: str, parameter: nn.Parameter, n_layer: int) -> None:
    """GPT-2's initialisation: N(0, 0.02), less for what adds to the residual stream, which 2 * n_layer halves do."""
    if name.endswith("bias"):
        nn.init.zeros_(parameter)
    elif "ln_" in name:
        nn.init.ones_(parameter)
    else:
        scale = 1 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 1.0
        nn.init.normal_(parameter, std=0.02 * scale)
