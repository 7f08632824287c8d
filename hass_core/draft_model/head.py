"""A draft's output head: the target's, frozen, or only its rows of the draft vocabulary; or a weight of the draft."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DraftHead(nn.Module):
    """Rows of the target's output projection, or such of the draft's own. `weight` [D, H]; `token_ids` [D] names the
    target's token of each row, None when all V rows are there in order."""

    weight: Tensor
    token_ids: Tensor | None
    _drafted: Tensor | None  # [V] bool, whether the target's token is in the draft vocabulary

    def __init__(self, weight: Tensor, token_ids: Tensor | None = None, drafted: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("token_ids", token_ids, persistent=False)
        self.register_buffer("_drafted", drafted, persistent=False)

    @classmethod
    def from_target(cls, target_head: Tensor, token_ids: Tensor | None = None) -> "DraftHead":
        """The whole head [V, H] without a copy, or its rows `token_ids` [D]."""
        if token_ids is None:
            return cls(target_head)
        token_ids = token_ids.to(target_head.device)
        drafted = torch.zeros(len(target_head), dtype=torch.bool, device=target_head.device)
        drafted[token_ids] = True
        return cls(target_head[token_ids].contiguous(), token_ids, drafted)

    def with_weight(self, weight: Tensor) -> "DraftHead":
        """A head of other numbers [D, H] over the same tokens."""
        return DraftHead(weight, self.token_ids, self._drafted)

    @property
    def size(self) -> int:
        return self.weight.shape[0]

    def logits(self, features: Tensor) -> Tensor:
        """[..., D] from features [..., H]."""
        return F.linear(features.to(self.weight.dtype), self.weight)

    def to_target_ids(self, indices: Tensor) -> Tensor:
        """The target's token ids of indices into the draft vocabulary."""
        return indices if self.token_ids is None else self.token_ids[indices]

    def contains(self, token_ids: Tensor) -> Tensor:
        """Whether each of the target's tokens is in the draft vocabulary."""
        if self._drafted is None:
            return torch.ones_like(token_ids, dtype=torch.bool)
        return self._drafted[token_ids]  # torch.isin sorts, which waits for the GPU: no CUDA graph may
