"""Work of fixed shapes captured as CUDA graphs, so that one call replays what were hundreds of launches."""

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")

_beginnings = 0


@dataclass(frozen=True)
class _Captured(Generic[R]):
    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]  # what the graph reads: kept, and overwritten before a replay
    result: R  # what it writes


class GraphCache:
    """Graphs by key: the first time work runs as it is, the second time it is captured, from then on replayed.

    The first time compiles kernels and warms up what cannot be captured. With `most` graphs no other key is taken:
    its work runs as it is for ever.
    """

    def __init__(self, most: int | None = None):
        self._captured: dict[Hashable, _Captured[Any] | None] = {}
        self._most = most
        self._pool = torch.cuda.graph_pool_handle()

    @classmethod
    def on(cls, device: torch.device, capturable: bool) -> "GraphCache | None":
        """None where there are no CUDA graphs, or where the work asks something of the host: a capture cannot."""
        return cls() if device.type == "cuda" and capturable else None

    def run(self, key: Hashable, work: Callable[[], R], inputs: Sequence[Tensor] = ()) -> R:
        """The result of `work`, which reads nothing back to the host and changes no shape.

        Of a key, what `work` reads must be at the same address each time, or among `inputs`: those of the capture stay,
        later ones are copied into them. A result is overwritten by the key's next run.
        """
        if key not in self._captured:
            if self._most is None or len(self._captured) < self._most:
                self._captured[key] = None
                _begun()
            return work()
        captured = self._captured[key]
        if captured is None:
            with capturing(self._pool) as graph:
                result = work()
            captured = self._captured[key] = _Captured(graph, inputs, result)
        else:
            for own, new in zip(captured.inputs, inputs, strict=True):
                own.copy_(new)
        captured.graph.replay()
        return captured.result


def graph_beginnings() -> int:
    """How often this process ran work as it is because a graph of it is still to come, or captured one."""
    return _beginnings


@contextmanager
def capturing(pool: Any) -> Iterator[torch.cuda.CUDAGraph]:
    """A new graph of the work done inside, its memory from `pool`.

    Python's garbage collector waits meanwhile: to destroy an older graph, as it might, would spoil the capture. What
    other threads do on the GPU does not.
    """
    _begun()
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield graph
    finally:
        if collecting:
            gc.enable()


def _begun() -> None:
    global _beginnings
    _beginnings += 1
