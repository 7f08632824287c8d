"""A training step's forward and backward pass as one CUDA graph for each shape of batch.

Eagerly a step is some 1,500 calls from Python, which on a small draft take longer than what they start. A graph is
replayed by a single call. It reads its batch from tensors of its own and adds to the gradients where they are, so those
must stay: set them to zero, not to None.
"""

from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from hass_core.cuda_graphs import GraphCache
from hass_core.training.batch import Batch

MOST_GRAPHS = 12  # batches of still other shapes run eagerly

Backward = Callable[[Batch, Tensor], Tensor]


class Captured:
    """`backward(batch, counts)` by graphs; a shape's first batch runs eagerly, since it warms up what cannot be
    captured. Batches and counts are on the GPU; gradients of all parameters exist from the second call on."""

    def __init__(self, backward: Backward):
        self._backward = backward
        self._graphs = GraphCache(MOST_GRAPHS)

    def __call__(self, batch: Batch, counts: Tensor) -> Tensor:
        inputs = [*tensors_of(batch), counts]
        return self._graphs.run(shape_of(batch), lambda: self._backward(batch, counts), inputs).clone()


def shape_of(batch: Batch) -> Hashable:
    """What must be equal for two batches to be run by one graph."""
    longest = batch.documents.longest, batch.documents.most_queries
    return longest, tuple(tensor.shape for tensor in tensors_of(batch))


def tensors_of(value: Any) -> list[Tensor]:
    """A batch's tensors, in a fixed order."""
    parts = [getattr(value, field.name) for field in fields(value)]
    found: list[Tensor] = []
    for part in parts:
        found += tensors_of(part) if is_dataclass(part) else [part] if isinstance(part, Tensor) else []
    return found
