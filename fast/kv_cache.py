"""What a model keeps of the tokens it has seen, and on a GPU the step of one token, recorded.

Shapes: B rows in the batch, T new tokens, H heads, D channels of a head, S keys and values to look back on, V words of
the vocabulary.
"""

from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import Tensor

RECORDING = Lock()  # a process records one graph at a time; `chat.py --web` answers several people at once


class KVCache:
    """Keys and values of every token so far, so that the next token costs one token and not all of them again.

    Args:
        padding: (B,) how many tokens at the left of each row are padding, which nothing may look at.
        capacity: the number of tokens there is room for.
    """

    step: "FixedStep | None" = None  # on a GPU, once a single token was asked for

    def __init__(self, config: Any, padding: Tensor, capacity: int) -> None:
        B, H, D = len(padding), config.n_head, config.n_embd // config.n_head
        self.keys = torch.empty(config.n_layer, B, H, capacity, D, device=padding.device)
        self.values = torch.empty_like(self.keys)
        self.padding = padding
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, D) keys and values behind those known so far; return all of them, (B, H, S, D)."""
        S = self.length + k.size(2)
        self.keys[layer, :, :, self.length : S] = k
        self.values[layer, :, :, self.length : S] = v
        return self.keys[layer, :, :, :S], self.values[layer, :, :, :S]

    def positions(self, T: int) -> Tensor:
        """(B, T) positions of the next T tokens: a row's first token that is no padding has position 0."""
        columns = torch.arange(self.length, self.length + T, device=self.padding.device)
        return (columns - self.padding[:, None]).clamp(min=0)

    def mask(self, T: int) -> Tensor:
        """(B, 1, T, S), true where one of the next T tokens may look: at what is not padding and not after it."""
        keys = torch.arange(self.length + T, device=self.padding.device)  # (S,)
        queries = keys[self.length :, None]  # (T, 1)
        visible = (keys <= queries) & (keys >= self.padding[:, None, None])  # (B, T, S)
        # Padding may look at itself: a softmax over nothing is NaN.
        return (visible | (keys == queries))[:, None]


class FixedCache(KVCache):
    """The keys and values of another cache, seen so that every step of one token is the same work in the same memory.

    The token's place is a number on the device, and all of the cache is looked at, what lies beyond the place hidden.
    """

    def __init__(self, cache: KVCache) -> None:
        self.keys, self.values, self.padding, self.length = cache.keys, cache.values, cache.padding, cache.length
        self.place = torch.tensor([cache.length], device=cache.padding.device)
        for unwritten in (self.keys, self.values):
            unwritten[..., cache.length :, :] = 0  # hidden, a NaN would still be one

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, 1, D) keys and values at the place; return all there is room for, (B, H, S, D)."""
        self.keys[layer].index_copy_(2, self.place, k)
        self.values[layer].index_copy_(2, self.place, v)
        return self.keys[layer], self.values[layer]

    def positions(self, T: int) -> Tensor:
        """(B, 1), the position of the next token."""
        return (self.place - self.padding[:, None]).clamp(min=0)

    def mask(self, T: int) -> Tensor:
        """(B, 1, 1, S), true where the next token may look."""
        keys = torch.arange(self.keys.size(3), device=self.padding.device)
        return ((keys <= self.place) & (keys >= self.padding[:, None]))[:, None, None]


class FixedStep:
    """A model's step of one token for each row of a cache, on a GPU as a CUDA graph: recorded once, then replayed.

    Python launches some 700 kernels a token, which takes longer than they run; a graph is launched at once.

    Args:
        compute: from (B, 1) token ids and a cache to (B, V) logits, the cache written at its place.
    """

    def __init__(self, compute: Callable[[Tensor, KVCache], Tensor], cache: KVCache) -> None:
        # Not the cache itself: it has this step, and neither would be freed.
        self.compute, self.fixed = compute, FixedCache(cache)
        self.ids = torch.zeros(len(cache.padding), 1, dtype=torch.long, device=cache.padding.device)
        self.graph = torch.cuda.CUDAGraph() if self.ids.is_cuda else None
        if self.graph:
            with RECORDING:
                self.record(self.graph)

    def record(self, graph: torch.cuda.CUDAGraph) -> None:
        """Compute twice: aside, since libraries allocate at their first call, which can't be recorded; and recorded."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self.compute(self.ids, self.fixed)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.logits = self.compute(self.ids, self.fixed)

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """(B, 1) new token ids → (B, V) logits; the cache, which may have been made shorter meanwhile, has them too."""
        self.ids.copy_(ids)
        self.fixed.place.fill_(cache.length)
        cache.length += 1
        if self.graph is None:
            return self.compute(self.ids, self.fixed)
        self.graph.replay()
        return self.logits.clone()  # the next step writes where these are
