"""What a draft needs to know of its target."""

from typing import Any, Protocol

import torch
from torch import Tensor


class DraftedTarget(Protocol):
    """See `KnownTarget` of `hass_core.target_model.known`, which this package does not import."""

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def embedding(self) -> Tensor:
        """[V, H]."""
        ...

    @property
    def head(self) -> Tensor:
        """[V, H]."""
        ...

    @property
    def num_layers(self) -> int: ...
    @property
    def final_norm(self) -> tuple[Tensor, float] | None:
        """Weight [H] and epsilon of the RMSNorm before the head."""
        ...

    def record(self) -> dict[str, Any]:
        """What a draft keeps of the target it was trained for."""
        ...

    def differing(self, record: dict[str, Any]) -> list[str]:
        """In what the target differs from a record, in words."""
        ...
