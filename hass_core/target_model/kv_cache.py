"""Keys and values of all layers and rows, allocated once, and the attention of one forward pass over them.

Rows are left-aligned: slot i of a row holds its i-th token, and each row has its own live length. A forward pass writes
after the live length; the caller then decides which of the written slots live on: `advance` and `lengthen` for the
first ones, after `move` for a path through a tree. What stands after the live length is scrap and is overwritten by
the next pass.

A few new tokens on a GPU go through `hass_core.kernels.tree_attention`, everything else through PyTorch's attention
with a mask; both compute the same.

Shapes: B batch, T new tokens, A heads, KV key-value heads, G = A / KV, S slots, d head size, C columns of a tree
attention mask `visible`: the slots after the live length.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core import kernels
from hass_core.target_model.block import LayerShape, rotated

FEW_TOKENS = 256


@dataclass(frozen=True)
class FixedShapes:
    """A pass whose shapes say nothing about how many slots are live, so that a CUDA graph can capture it."""

    width: int  # slots attended to, whatever is live
    lasting: bool = True  # passes of these shapes will come again and again: worth compiling for


class KVCache:
    """`blocks` hold the layers in order, each block [layers, 2, B, KV, S, d]. Layers of one shape share a block.

    `lengths` [B] is the live length on the device, `host_lengths` its copy for Python; on the CPU they are one memory.
    `skipped` [B] tokens of each row came before slot 0 and are not held.
    """

    def __init__(self, blocks: list[Tensor], lengths: Tensor, host_lengths: np.ndarray):
        self.blocks = blocks
        # keys and values apart: a compiled layer writes into its arguments in place, into views of them by a copy
        self.layers = [(layer[0], layer[1]) for block in blocks for layer in block.unbind(0)]
        self.lengths = lengths
        self.host_lengths = host_lengths
        self.skipped = torch.zeros_like(lengths)

    @classmethod
    def allocate(
        cls, shapes: list[LayerShape], batch_size: int, slots: int, device: torch.device, dtype: torch.dtype
    ) -> "KVCache":
        """An empty cache. Consecutive layers of one shape become one block."""
        blocks: list[Tensor] = []
        start = 0
        for end in range(1, len(shapes) + 1):
            if end == len(shapes) or shapes[end] != shapes[start]:
                shape = shapes[start]
                size = (end - start, 2, batch_size, shape.num_key_value_heads, slots, shape.head_dim)
                blocks.append(torch.zeros(size, device=device, dtype=dtype))
                start = end
        host_lengths = np.zeros(batch_size, dtype=np.int64)
        lengths = torch.from_numpy(host_lengths)
        return cls(blocks, lengths if device.type == "cpu" else lengths.to(device), host_lengths)

    @property
    def batch_size(self) -> int:
        return self.blocks[0].shape[2]

    @property
    def slots(self) -> int:
        """S: tokens a row can hold."""
        return self.blocks[0].shape[4]

    @property
    def longest(self) -> int:
        """Live length of the longest row."""
        return int(self.host_lengths.max())

    @property
    def same_length(self) -> int | None:
        """The live length shared by all rows, None when they differ."""
        lengths = self.host_lengths
        return int(lengths[0]) if (lengths == lengths[0]).all() else None

    def width(self, new_tokens: int, fixed: FixedShapes | None) -> int:
        """Slots that a pass over `new_tokens` tokens a row attends to."""
        return fixed.width if fixed else self.longest + new_tokens

    def clear(self) -> None:
        """Forget all tokens."""
        self.lengths.zero_()
        self.skipped.zero_()
        self.host_lengths[:] = 0

    def advance(self, counts: int | list[int]) -> None:
        """The first `counts` slots after each row's live length live on; a number per row, or one for all."""
        self.host_lengths += np.asarray(counts)
        if self.lengths.device.type != "cpu":
            self.lengths.copy_(torch.from_numpy(self.host_lengths))

    def lengthen(self, counts: Tensor, fixed: FixedShapes | None = None) -> None:
        """As `advance`, by counts [B] on the device. After a pass of fixed shapes the host does not look: it learns of
        the lengths later, by `host_advance`."""
        self.lengths.add_(counts)
        if fixed is None and self.lengths.device.type != "cpu":
            self.host_lengths[:] = self.lengths.cpu().numpy()

    def host_advance(self, counts: list[int]) -> None:
        """Python's copy of the lengths follows what the device has done by itself."""
        self.host_lengths[:] = self.host_lengths + counts

    def move(self, slots: Tensor) -> None:
        """Move `slots` [B, K] of those just written, numbered from the live length and increasing, to directly after
        the live length. Fixed shapes, and no look from the host.
        """
        steps = torch.arange(slots.shape[1], device=slots.device)
        start = self.lengths[:, None]
        if self.batch_size == 1:
            source, goal = (start + slots)[0], (start + steps)[0]
            for block in self.blocks:
                block.index_copy_(4, goal, block.index_select(4, source))
            return
        batch = torch.arange(self.batch_size, device=slots.device)[:, None]
        for block in self.blocks:
            by_slot = block.permute(2, 4, 0, 1, 3, 5)  # [B, S, layers, 2, KV, d]
            by_slot[batch, start + steps] = by_slot[batch, start + slots]


class Attention(Protocol):
    """Where the new tokens of one pass are written and what they see: worked out once and called by every layer."""

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attended values [B, T, A·d] of `qkv` [B, T, A + 2·KV, d], queries, keys and values side by side.

        Queries and keys are rotated by `cos`, `sin` [B, T, 1, d]; keys and values go into a layer's `keys`, `values`
        [B, KV, S, d].
        """
        ...


def attention_of(
    tokens: int,
    cache: KVCache,
    group: int,
    dtype: torch.dtype,
    visible: Tensor | None = None,
    offset: int = 0,
    fixed: FixedShapes | None = None,
) -> Attention:
    """The attention of `tokens` new tokens a row, written `offset` slots after the live lengths.

    A token sees the live slots, and of those after them what `visible` [B, T, C] says; without it, all up to itself.
    `group` is G.
    """
    if tokens <= FEW_TOKENS and kernels.usable(cache.lengths):
        return KernelAttention(cache.lengths, offset, visible)
    return MaskedAttention.of(tokens, cache, group, dtype, visible, offset, fixed)


@dataclass(frozen=True)
class KernelAttention:
    """See `Attention`."""

    lengths: Tensor  # [B]
    offset: int
    visible: Tensor | None

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        from hass_core.kernels.tree_attention import tree_attention  # Triton is there on a GPU only

        return tree_attention(qkv, cos, sin, keys, values, self.lengths, self.offset, self.visible)


@dataclass(frozen=True)
class MaskedAttention:
    """See `Attention`. `slots` [B, T] are written; `width` = S slots are attended to, through the additive `bias`
    [B, 1, G·T, S]."""

    width: int
    bias: Tensor | None  # None = everything is visible
    start: int | None  # the first slot written, when it is the same for all rows
    slots: Tensor

    @classmethod
    def of(
        cls,
        tokens: int,
        cache: KVCache,
        group: int,
        dtype: torch.dtype,
        visible: Tensor | None = None,
        offset: int = 0,
        fixed: FixedShapes | None = None,
    ) -> "MaskedAttention":
        """As `attention_of`."""
        slots = cache.lengths[:, None] + torch.arange(offset, offset + tokens, device=cache.lengths.device)
        same = None if fixed else cache.same_length
        start = None if same is None else same + offset
        width, mask = cache.width(offset + tokens, fixed), None
        if visible is not None:
            mask = tree_attention_mask(visible, cache.lengths, width)
        elif start is None or tokens > 1:  # else the one token sees all there is
            mask = cache_mask(slots, width)
        return cls(width, None if mask is None else additive(mask, dtype).repeat(1, 1, group, 1), start, slots)

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        kv = keys.shape[1]
        queries_keys = rotated(qkv[:, :, :-kv], cos, sin)
        self._write(keys, queries_keys[:, :, -kv:])
        self._write(values, qkv[:, :, -kv:])
        return self._attend(queries_keys[:, :, :-kv].transpose(1, 2), keys, values)

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


def cache_mask(slots: Tensor, width: int) -> Tensor:
    """[B, 1, T, width]: new tokens in `slots` [B, T] see all slots up to their own."""
    return (torch.arange(width, device=slots.device) <= slots[:, :, None])[:, None]


def tree_attention_mask(visible: Tensor, lengths: Tensor, width: int) -> Tensor:
    """[B, 1, T, width]: T rows see all slots below `lengths` [B], and from there on what `visible` [B, T, C] says."""
    offset = (torch.arange(width, device=lengths.device) - lengths[:, None])[:, None]
    inside = (offset >= 0) & (offset < visible.shape[2])
    index = offset.clamp(0, visible.shape[2] - 1).expand(-1, visible.shape[1], -1)
    return ((offset < 0) | (inside & visible.gather(2, index)))[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, the lowest finite number elsewhere: a row that sees nothing stays a number."""
    return torch.zeros(mask.shape, device=mask.device, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
