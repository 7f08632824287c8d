"""Time the parts of a cycle on this machine: a pass over N nodes, drafting a tree, the memory's bandwidth."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from hass_core.config import SamplingConfig
from hass_core.decoding.batch import Batch
from hass_core.decoding.session import Session, TreeDrafter
from hass_core.decoding.stop import StopRule
from hass_core.decoding.tree import Tree, TreeShape, ancestors
from hass_core.target_model.runner import Runner

CONTEXT_TOKENS = 128
WARM_CYCLES = 3  # on a GPU: compile, capture, first replay


class FixedTree:
    """Proposes the same star of N nodes for nothing: what remains of a cycle is the verification."""

    def __init__(self, nodes: int):
        self.shape = TreeShape(depth=1, top_k=nodes, nodes=nodes, static=True)
        self.capturable, self.scratch_slots = True, 0

    def new_cache(self, batch_size: int, max_tokens: int) -> Any:
        return self

    def clear(self, cache: Any) -> None:
        pass

    def extend(self, cache: Any, features: Tensor, token_ids: Tensor, counts: Tensor) -> Tensor:
        return counts

    def grow(self, cache: Any, root: Tensor, estimate: Tensor) -> Tree:
        node = torch.arange(self.shape.nodes, device=root.device).expand(len(root), -1)
        parents = torch.zeros_like(node)
        token_ids = torch.where(node == 0, root[:, None], node)  # siblings must differ, or several would be accepted
        return Tree(token_ids, parents, node.clamp(max=1), parents, ancestors(parents, 1), node[:, 1:])


def cycle_seconds(
    runner: Runner, drafter: TreeDrafter, rows: int = 1, cycles: int = 8, context: int = CONTEXT_TOKENS
) -> float:
    """Median time of a cycle of `drafter` over `rows` rows of `context` tokens."""
    capacity = (WARM_CYCLES + cycles) * (drafter.shape.depth + 1) + 1
    context = min(context, runner.context_tokens - capacity - 1)
    prompts = [[(7 * i + row) % runner.vocab_size for i in range(context)] for row in range(rows)]
    batch = Batch(prompts, capacity, StopRule(), runner.context_tokens, seed=0)
    session = Session(runner, drafter, SamplingConfig(), rows, context + capacity)
    session.start(batch)
    times = []
    for _ in range(WARM_CYCLES + cycles):
        started = time.perf_counter()
        session.step([True] * rows)
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_CYCLES:])


def bandwidth_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        _synchronize(device)
        started = time.perf_counter()
        goal.copy_(source)
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
