"""Decoding: a model prepared for generation, its KV cache, and on a GPU, the decode step as a CUDA graph.

Shapes: B rows in the batch, T new tokens, H heads, D channels per head, S keys and values, V tokens in the vocabulary.
"""

import copy

import torch
from torch import Tensor, nn

from fast.graph import capture, warm_up
from fast.packed import pack_layers
from gpt_model import GPTConfig, GPTModel, KVCache


class Decoder:
    """The decoder for all generated text: sampling, the chat, `--watch`, evaluation.

    Args:
        model: the decoder shares the weights that it does not round, and never changes them. After more training,
            create a new decoder.
        dtype: bf16 rounds the matrices once. Most of a decode step is spent reading weights, so half the bytes take
            about half the time.
    """

    def __init__(self, model: GPTModel, dtype: torch.dtype = torch.float32) -> None:
        self.model = decoding_copy(model, dtype)

    @property
    def config(self) -> GPTConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.wpe.weight.device

    def start(self, padding: Tensor, capacity: int) -> "Decoding":
        """Start a batch of texts with (B,) numbers of padding tokens on the left, and `capacity` tokens per row."""
        return Decoding(self.model, KVCache(self.config, padding, capacity))


class Decoding:
    """A batch of texts that is being decoded."""

    def __init__(self, model: GPTModel, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.step: CapturedStep | None = None

    def next_logits(self, ids: Tensor) -> Tensor:
        """(B, T) new token ids → (B, V) logits of the next token: a prefill, or with T = 1 a decode step."""
        if ids.size(1) > 1 or not ids.is_cuda:
            return self.model(ids, cache=self.cache)[:, -1]
        self.step = self.step or CapturedStep(self.model, self.cache)
        return self.step(ids)


def decoding_copy(model: GPTModel, dtype: torch.dtype) -> GPTModel:
    """A copy of `model` in evaluation mode, its matrices rounded if `dtype` is bf16, and bf16 matrices packed.

    Positions, biases, norms and adapters stay fp32, and so does the residual stream.
    """
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and name.endswith(".weight") and name != "wpe.weight"
        if dtype == torch.bfloat16 and parameter.dtype != torch.bfloat16
    ]
    sizes = [matrix.numel() for matrix in matrices]
    # Allocate one block: many small ones, once freed, would fragment the memory that training uses next.
    block = torch.empty(sum(sizes), dtype=dtype, device=model.wpe.weight.device)
    rounded = {
        id(matrix): nn.Parameter(part.view_as(matrix).copy_(matrix.detach()), requires_grad=False)
        for matrix, part in zip(matrices, block.split(sizes), strict=True)
    }
    shared = {id(parameter): parameter for parameter in model.parameters()}
    # deepcopy does not copy objects in its memo.
    copied = copy.deepcopy(model, shared | rounded).eval()
    pack_layers(copied)
    return copied


class StaticCache(KVCache):
    """The keys and values of an existing cache, for decode steps that all do the same work in the same memory.

    The position of the next token is a tensor, `place`, so that a replay reads its new value; `length` is unused here.
    Attention reads the whole cache, and slots after `place` are masked.
    """

    def __init__(self, cache: KVCache) -> None:
        self.keys, self.values, self.padding, self.length = cache.keys, cache.values, cache.padding, cache.length
        self.place = torch.tensor([cache.length], device=cache.padding.device)
        for unwritten in (self.keys, self.values):
            unwritten[..., cache.length :, :] = 0  # 0 * NaN is NaN, so masked slots must be finite

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, 1, D) keys and values at `place`; return the whole cache, (B, H, S, D)."""
        self.keys[layer].index_copy_(2, self.place, k)
        self.values[layer].index_copy_(2, self.place, v)
        return self.keys[layer], self.values[layer]

    def positions(self, T: int) -> Tensor:
        """(B, 1) positions of the next token."""
        return (self.place - self.padding[:, None]).clamp(min=0)

    def mask(self, T: int) -> Tensor:
        """(B, 1, 1, S) mask, true where the next token may attend."""
        keys = torch.arange(self.keys.size(3), device=self.padding.device)
        return ((keys <= self.place) & (keys >= self.padding[:, None]))[:, None, None]


class CapturedStep:
    """A decode step for a cache; on a GPU it is captured as a CUDA graph and replayed."""

    def __init__(self, model: GPTModel, cache: KVCache) -> None:
        self.model, self.cache, self.static = model, cache, StaticCache(cache)
        self.ids = torch.zeros(len(cache.padding), 1, dtype=torch.long, device=cache.padding.device)
        self.graph = None
        if self.ids.is_cuda:
            warm_up(self.compute)
            self.graph = capture(self.compute)

    def compute(self) -> None:
        self.logits = self.model(self.ids, cache=self.static)[:, -1]

    def __call__(self, ids: Tensor) -> Tensor:
        """(B, 1) new token ids → (B, V) logits. Adds the tokens to the cache, which may have been cut between calls."""
        self.ids.copy_(ids)
        self.static.place.fill_(self.cache.length)
        self.cache.length += 1
        if self.graph:
            self.graph.replay()
        else:
            self.compute()
        return self.logits.clone()  # the graph overwrites this buffer on its next replay
