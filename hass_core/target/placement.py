"""Where one forward pass writes in the cache and what it sees there; worked out once and used by every layer.

Shapes: B batch, T new tokens, A heads, KV key-value heads, G = A / KV, S slots attended to, d head size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core.target.kv_cache import KVCache

FEW_TOKENS = 256


@dataclass(frozen=True)
class Placement:
    """`slots` [B, T] are written; `width` = S slots are attended to, through the additive `bias` [B, 1, G·T, S]."""

    width: int
    bias: Tensor | None  # None = everything is visible
    start: int | None  # the first slot written, when it is the same for all rows
    slots: Tensor

    @classmethod
    def of(
        cls, tokens: int, cache: KVCache, mask: Tensor | None, group: int, dtype: torch.dtype, offset: int = 0
    ) -> "Placement":
        """`tokens` new tokens a row, `offset` slots behind the live lengths. `mask` as in `Runner.forward`."""
        slots = cache.lengths[:, None] + torch.arange(offset, offset + tokens, device=cache.lengths.device)
        start = None if cache.same_length is None else cache.same_length + offset
        if mask is None:
            width = cache.reach(offset + tokens)
            if cache.width is not None or start is None or tokens > 1:  # else the one token sees all there is
                mask = (torch.arange(width, device=slots.device) <= slots[:, :, None])[:, None]
        else:
            width = mask.shape[-1]
        return cls(width, None if mask is None else additive(mask, dtype).repeat(1, 1, group, 1), start, slots)

    def write(self, stored: Tensor, new: Tensor) -> None:
        """Put `new` [B, T, KV, d] into `stored` [B, KV, slots, d]."""
        if self.start is not None:
            stored[:, :, self.start : self.start + new.shape[1]] = new.transpose(1, 2)
        elif new.shape[0] == 1:
            stored.index_copy_(2, self.slots[0], new.transpose(1, 2))
        else:
            batch = torch.arange(new.shape[0], device=new.device)[:, None]
            stored.transpose(1, 2)[batch, self.slots] = new

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attended values [B, A, T, d] of queries [B, A, T, d] over keys and values [B, KV, slots, d]."""
        batch, heads, tokens, dim = queries.shape
        # query heads of one key-value head stand side by side: a group is attended to as if it were more tokens
        grouped = queries.reshape(batch, keys.shape[1], -1, dim)
        keys, values = keys[:, :, : self.width], values[:, :, : self.width]
        if queries.is_cuda and tokens <= FEW_TOKENS:
            attended = attend_by_products(grouped, keys, values, self.bias)
        else:
            attended = F.scaled_dot_product_attention(grouped, keys, values, self.bias)
        return attended.view(batch, heads, tokens, dim)


def attend_by_products(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Attention as two products: for few queries, faster than the fused kernels, which use one block per head."""
    scores = (queries @ keys.transpose(-1, -2)).float() / math.sqrt(queries.shape[-1])
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1).to(values.dtype) @ values


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, the lowest finite number elsewhere: a row that sees nothing stays a number."""
    return torch.zeros(mask.shape, device=mask.device, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
