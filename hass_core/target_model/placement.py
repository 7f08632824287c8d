"""Where one forward pass writes in the cache and what it sees there; worked out once and used by every layer.

A few new tokens on a GPU go through `hass_core.kernels.tree_attention`, everything else through PyTorch's attention
with a mask; both compute the same.

Shapes: B batch, T new tokens, A heads, KV key-value heads, G = A / KV, S slots attended to, d head size, C columns of
`visible`: the slots behind the live length.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core import kernels
from hass_core.target_model.kv_cache import KVCache
from hass_core.target_model.rope import rotated

FEW_TOKENS = 256


class Placement(Protocol):
    """Attention of one pass over one layer's part of the cache."""

    def attention(self, mixed: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attended values [B, T, A·d] of `mixed` [B, T, A + 2·KV, d], queries, keys and values side by side.

        Queries and keys are rotated by `cos`, `sin` [B, T, 1, d]; keys and values go into `keys`, `values`
        [B, KV, slots, d].
        """
        ...


def place(
    tokens: int, cache: KVCache, visible: Tensor | None, group: int, dtype: torch.dtype, offset: int = 0
) -> Placement:
    """The place of `tokens` new tokens a row, `offset` slots behind the live lengths.

    A token sees the live slots, and of those behind them what `visible` [B, T, C] says; without it, all up to itself.
    """
    if tokens <= FEW_TOKENS and kernels.usable(cache.lengths):
        return KernelPlacement(cache.lengths, offset, visible)
    return MaskedPlacement.of(tokens, cache, visible, group, dtype, offset)


@dataclass(frozen=True)
class KernelPlacement:
    """See `Placement`."""

    lengths: Tensor  # [B]
    offset: int
    visible: Tensor | None

    def attention(self, mixed: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        from hass_core.kernels.tree_attention import tree_attention  # Triton is there on a GPU only

        return tree_attention(mixed, cos, sin, keys, values, self.lengths, self.offset, self.visible)


@dataclass(frozen=True)
class MaskedPlacement:
    """See `Placement`. `slots` [B, T] are written; `width` = S slots are attended to, through the additive `bias`
    [B, 1, G·T, S]."""

    width: int
    bias: Tensor | None  # None = everything is visible
    start: int | None  # the first slot written, when it is the same for all rows
    slots: Tensor

    @classmethod
    def of(
        cls, tokens: int, cache: KVCache, visible: Tensor | None, group: int, dtype: torch.dtype, offset: int
    ) -> "MaskedPlacement":
        """As `place`."""
        slots = cache.lengths[:, None] + torch.arange(offset, offset + tokens, device=cache.lengths.device)
        start = None if cache.same_length is None else cache.same_length + offset
        width, mask = cache.reach(offset + tokens), None
        if visible is not None:
            mask = attention_mask(visible, cache.lengths, width)
        elif cache.width is not None or start is None or tokens > 1:  # else the one token sees all there is
            mask = causal_mask(slots, width)
        return cls(width, None if mask is None else additive(mask, dtype).repeat(1, 1, group, 1), start, slots)

    def attention(self, mixed: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        kv = keys.shape[1]
        turned = rotated(mixed[:, :, :-kv], cos, sin)
        self._write(keys, turned[:, :, -kv:])
        self._write(values, mixed[:, :, -kv:])
        return self._attend(turned[:, :, :-kv].transpose(1, 2), keys, values)

    def _write(self, stored: Tensor, new: Tensor) -> None:
        """Put `new` [B, T, KV, d] into `stored` [B, KV, slots, d]."""
        if self.start is not None:
            stored[:, :, self.start : self.start + new.shape[1]] = new.transpose(1, 2)
        elif new.shape[0] == 1:
            stored.index_copy_(2, self.slots[0], new.transpose(1, 2))
        else:
            batch = torch.arange(new.shape[0], device=new.device)[:, None]
            stored.transpose(1, 2)[batch, self.slots] = new

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[B, T, A·d] of queries [B, A, T, d] over keys and values [B, KV, slots, d]."""
        batch, _, tokens, dim = queries.shape
        # query heads of one key-value head stand side by side: a group is attended to as if it were more tokens
        grouped = queries.reshape(batch, keys.shape[1], -1, dim)
        keys, values = keys[:, :, : self.width], values[:, :, : self.width]
        attended = F.scaled_dot_product_attention(grouped, keys, values, self.bias)
        return attended.reshape(queries.shape).transpose(1, 2).reshape(batch, tokens, -1)


def causal_mask(slots: Tensor, width: int) -> Tensor:
    """[B, 1, T, width]: new tokens in `slots` [B, T] see all slots up to their own."""
    return (torch.arange(width, device=slots.device) <= slots[:, :, None])[:, None]


def attention_mask(visible: Tensor, lengths: Tensor, width: int) -> Tensor:
    """[B, 1, T, width]: T rows see all slots below `lengths` [B], and from there on what `visible` [B, T, C] says."""
    offset = (torch.arange(width, device=lengths.device) - lengths[:, None])[:, None]
    inside = (offset >= 0) & (offset < visible.shape[2])
    index = offset.clamp(0, visible.shape[2] - 1).expand(-1, visible.shape[1], -1)
    return ((offset < 0) | (inside & visible.gather(2, index)))[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, the lowest finite number elsewhere: a row that sees nothing stays a number."""
    return torch.zeros(mask.shape, device=mask.device, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
