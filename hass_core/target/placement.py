"""Where one forward pass writes in the cache and what it sees there; worked out once and used by every layer.

Shapes: B batch, T new tokens, A heads, KV key-value heads, G = A / KV, S slots attended to, d head size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core.target.kv_cache import KVCache


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
        lengths = cache.host_lengths
        start = int(lengths[0]) + offset if (lengths == lengths[0]).all() else None
        slots = cache.lengths[:, None] + torch.arange(offset, offset + tokens, device=cache.lengths.device)
        if mask is None:
            width = cache.longest + offset + tokens
            if start is None or tokens > 1:  # a single token in rows of one length sees all there is
                mask = (torch.arange(width, device=slots.device) <= slots[:, :, None])[:, None]
        else:
            width = mask.shape[-1]
        return cls(width, None if mask is None else additive(mask, dtype).repeat(1, 1, group, 1), start, slots)

    def write(self, stored: Tensor, new: Tensor) -> None:
        """Put `new` [B, T, KV, d] into `stored` [B, KV, slots, d]."""
        if self.start is not None:
            stored[:, :, self.start : self.start + new.shape[1]] = new.transpose(1, 2)
        else:
            batch = torch.arange(new.shape[0], device=new.device)[:, None]
            stored.transpose(1, 2)[batch, self.slots] = new

    def attend(self, queries: Tensor, stored: Tensor) -> Tensor:
        """Attended values [B, A, T, d] of queries [B, A, T, d] over `stored` [2, B, KV, slots, d]."""
        batch, heads, tokens, dim = queries.shape
        # query heads of one key-value head stand side by side: a group is attended to as if it were more tokens
        grouped = queries.reshape(batch, stored.shape[2], -1, dim)
        keys, values = stored[0, :, :, : self.width], stored[1, :, :, : self.width]
        return F.scaled_dot_product_attention(grouped, keys, values, self.bias).view(batch, heads, tokens, dim)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, the lowest finite number elsewhere: a row that sees nothing stays a number."""
    return torch.zeros(mask.shape, device=mask.device, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
