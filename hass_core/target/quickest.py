"""Which of several ways to compute the same is the fastest on this GPU: asked once, by timing them."""

import logging
import statistics
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from hass_core.cuda_graphs import captured

REPLAYS = 7
# of the norm: 16-bit sums in another order, through 32 layers of random weights, differ by 0.05
MOST_DIFFERENT = 0.25

log = logging.getLogger(__name__)


class Quickest:
    """Of ways by name, the fastest for each case; the first until there was an occasion to time them.

    The first way is the one to trust: another that fails here or computes something else is named and left alone. Each
    is timed as it will run, from a CUDA graph, so that launches cost what they cost there. That cannot be done
    while another graph is captured: a case's first call should come before.
    """

    def __init__(self, seconds: Callable[[Callable[[], Tensor]], float] | None = None):
        self._seconds = seconds or graph_seconds
        self.times: dict[Hashable, dict[str, float]] = {}  # seconds of each way, by case

    def __call__(self, case: Hashable, ways: dict[str, Callable[[], Tensor]]) -> Tensor:
        """What the way chosen for `case` returns. A way may be called any number of times."""
        if case not in self.times:
            if len(ways) == 1 or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                return next(iter(ways.values()))()
            self.times[case] = self._timed(case, ways)
        times = self.times[case]
        return ways[min(times, key=lambda name: times[name])]()

    def _timed(self, case: Hashable, ways: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
        """Seconds of the ways that agree with the first one."""
        (trusted, first), *others = ways.items()
        expected = first()
        times = {trusted: self._seconds(first)}
        for name, way in others:
            try:
                difference = float((way() - expected).float().norm() / expected.float().norm())
                if not difference <= MOST_DIFFERENT:
                    raise ArithmeticError(f"its result differs by {difference:.2f} of the norm")
                times[name] = self._seconds(way)
            except Exception as fault:  # what compilers of kernels raise has no class in common
                log.warning("%s is not used for %s: %s", name, case, fault)
        return times


def graph_seconds(way: Callable[[], Tensor]) -> float:
    """Median time of a replay of `way`, which has run before, captured."""
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
