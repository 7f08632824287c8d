"""Which of several ways to compute the same is the fastest on this GPU: asked once, by timing them."""

import logging
import statistics
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from hass_core.cuda_graphs import captured

REPLAYS = 7

log = logging.getLogger(__name__)


class Quickest:
    """Of ways by name, the fastest for each case; the first until there was an occasion to time them.

    Each is timed as it will run, from a CUDA graph, so that launches cost what they cost there. That cannot be done
    while another graph is captured: a case's first call should come before.
    """

    def __init__(self, seconds: Callable[[Callable[[], Tensor]], float] | None = None):
        self._seconds = seconds or graph_seconds
        self._chosen: dict[Hashable, str] = {}

    def __call__(self, case: Hashable, ways: dict[str, Callable[[], Tensor]]) -> Tensor:
        """What the way chosen for `case` returns. A way may be called any number of times."""
        if case not in self._chosen:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return next(iter(ways.values()))()
            times = {name: self._seconds(way) for name, way in ways.items()}
            self._chosen[case] = min(times, key=lambda name: times[name])
            log.debug("for %s: %s", case, {name: f"{1e6 * time:.0f} µs" for name, time in times.items()})
        return ways[self._chosen[case]]()


def graph_seconds(way: Callable[[], Tensor]) -> float:
    """Median time of a replay of `way` captured."""
    way()  # compiles
    torch.cuda.synchronize()
    with captured(torch.cuda.graph_pool_handle()) as graph:
        way()
    times = []
    for _ in range(REPLAYS):
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(started.elapsed_time(ended) / 1e3)
    return statistics.median(times)
