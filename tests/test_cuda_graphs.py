"""Work is captured the second time it comes; nothing may destroy a CUDA graph while another is captured."""

import gc
from contextlib import nullcontext

import pytest
import torch

from hass_core.cuda_graphs import GraphCache, capturing


class Graph:
    """Stands for a CUDA graph where there is no GPU: what is captured also runs, a replay is counted."""

    replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def asked(monkeypatch):
    calls = []

    def graph(*arguments, **options):
        calls.append(options)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return calls


def test_only_work_on_a_gpu_that_asks_nothing_of_the_host_is_captured(asked):
    assert isinstance(GraphCache.on(torch.device("cuda"), True), GraphCache)
    assert GraphCache.on(torch.device("cuda"), False) is None
    assert GraphCache.on(torch.device("cpu"), True) is None


def test_work_runs_once_is_captured_once_and_then_replayed_from_its_own_inputs(asked):
    graphs, given = GraphCache(), []

    def run(value: float, key: str = "a") -> torch.Tensor:
        x = torch.tensor([value])
        given.append(x)
        return graphs.run(key, lambda: x * 2, [x])

    assert run(1.0).tolist() == [2.0]
    assert asked == []
    first = run(3.0)
    assert len(asked) == 1
    again = run(5.0)
    assert again is first  # the graph writes where it wrote when it was captured …
    assert given[1].tolist() == [5.0]  # … from the capture's input, which holds the new one
    assert len(asked) == 1
    assert graphs._captured["a"].graph.replays == 2
    assert run(7.0, key="b").tolist() == [14.0]
    assert len(asked) == 1


def test_keys_beyond_the_most_graphs_are_never_captured(asked):
    graphs = GraphCache(most=1)
    for _ in range(3):
        assert [graphs.run(key, lambda key=key: key) for key in "ab"] == ["a", "b"]
    assert len(asked) == 1


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
