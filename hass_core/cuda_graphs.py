"""Capture CUDA graphs undisturbed."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def captured(pool: Any) -> Iterator[torch.cuda.CUDAGraph]:
    """A new graph of the work done inside, its memory from `pool`.

    Python's garbage collector waits meanwhile: to destroy an older graph, as it might, would spoil the capture. What
    other threads do on the GPU does not.
    """
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield graph
    finally:
        if collecting:
            gc.enable()
