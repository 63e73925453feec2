"""Drop-in for `torch.cuda.make_graphed_callables`, for work that reads and writes static buffers.

Replaces: launching a training or decode step kernel by kernel, which leaves the GPU waiting for Python. With
gpt2-medium, a step on 8 short dialogues took 76 ms, and 14.5 ms as one graph (prototype on an H100,
`benchmarks/LOG.md`).
Saves: all launches but one. PyTorch's own function captures forward and backward passes, but not the optimizer.
Off: on a CPU, where the work runs eagerly.
"""

import functools
from collections.abc import Callable
from threading import Lock
from typing import Any

import torch

CAPTURING = Lock()  # a process can capture only one graph at a time; `chat.py --web` serves several users at once


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """The stream of all warm-ups and captures: cuBLAS keeps a workspace for each stream it has seen."""
    return torch.cuda.Stream()


def warm_up(work: Callable[[], None]) -> None:
    """Run `work` once on a side stream: libraries allocate memory on their first call, which can't be captured."""
    with CAPTURING:
        side_stream().wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream()):
            work()
        torch.cuda.current_stream().wait_stream(side_stream())


def capture(work: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Record `work` without running it, after a `warm_up`; `replay` on the result runs it.

    Args:
        work: reads and writes the same tensors on every call, and never waits for the GPU.
        pool: from `torch.cuda.graph_pool_handle`; graphs that never run at the same time can share memory through it.

    Raises:
        torch.OutOfMemoryError: the graph does not fit into the free memory.
    """
    graph = torch.cuda.CUDAGraph()
    with CAPTURING, torch.cuda.graph(graph, pool, side_stream(), capture_error_mode="thread_local"):
        work()
    return graph
