"""Nothing may destroy a CUDA graph while another is capturing."""

import gc
from contextlib import nullcontext

import pytest
import torch

from hass_core.cuda_graphs import capturing


class Graph:
    """Stands for a CUDA graph where there is no GPU."""


@pytest.fixture
def asked(monkeypatch):
    calls = []

    def graph(*arguments, **options):
        calls.append(options)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return calls


def test_the_garbage_collector_waits_for_a_capture_and_goes_on_after_a_failed_one(asked):
    with capturing("pool") as graph:
        assert not gc.isenabled()
    assert isinstance(graph, Graph)
    assert gc.isenabled()
    assert asked == [{"pool": "pool", "capture_error_mode": "thread_local"}]
    with pytest.raises(RuntimeError), capturing("pool"):
        raise RuntimeError("out of memory")
    assert gc.isenabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_that_nothing_refers_to_any_more_do_not_spoil_a_capture():
    x, pool = torch.zeros(8, device="cuda"), torch.cuda.graph_pool_handle()
    for _ in range(3):
        with capturing(pool) as graph:
            x.add_(1)
        graph.replay()
        cycle = [graph]
        cycle.append(cycle)
        del graph, cycle
        with capturing(pool) as graph:
            x.add_(1)
            for _ in range(5000):  # enough for the collector to run
                made = [None]
                made.append(made)
        graph.replay()
    assert x.tolist() == [6.0] * 8
