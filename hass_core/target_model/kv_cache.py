"""Keys and values of all layers and rows, allocated once; each row of the batch has its own live length.

Rows are left-aligned: slot i of a row holds its i-th token. A forward pass writes behind the live length; the caller
then decides which of the written slots live on (`advance` for the first ones, `keep` for a path through a tree).
Whatever stands behind the live length is scrap and is overwritten by the next pass.

Shapes: B batch, T new tokens, KV key-value heads, S slots, d head size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """What one layer stores per token."""

    num_key_value_heads: int
    head_dim: int


class KVCache:
    """`blocks` hold the layers in order, each block [layers, 2, B, KV, S, d]. Layers of one shape share a block.

    `lengths` [B] is the live length on the device, `host_lengths` its copy for Python; on the CPU they are one memory.
    """

    def __init__(self, blocks: list[Tensor], lengths: Tensor, host_lengths: np.ndarray):
        self.blocks = blocks
        # keys and values apart: a compiled layer writes into its arguments in place, into views of them by a copy
        self.layers = [(layer[0], layer[1]) for block in blocks for layer in block.unbind(0)]
        self.lengths = lengths
        self.host_lengths = host_lengths
        self.width: int | None = None  # slots attended to when that must not vary, as in a captured graph
        self.steady = False  # passes of the same shapes will come again and again: worth compiling for

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
        """The live length shared by all rows, None when they differ or the host may not look."""
        lengths = self.host_lengths
        return int(lengths[0]) if self.width is None and (lengths == lengths[0]).all() else None

    def reach(self, new_tokens: int) -> int:
        """Slots that a pass over `new_tokens` tokens a row attends to."""
        return self.longest + new_tokens if self.width is None else self.width

    def rows(self, start: int, stop: int) -> "KVCache":
        """Rows `start` to `stop` as a cache of their own over the same memory."""
        blocks = [block[:, :, start:stop] for block in self.blocks]
        return KVCache(blocks, self.lengths[start:stop], self.host_lengths[start:stop])

    def clear(self) -> None:
        """Forget all tokens."""
        self.lengths.zero_()
        self.host_lengths[:] = 0

    def advance(self, counts: int | list[int]) -> None:
        """The first `counts` slots behind each row's live length live on; a number per row, or one for all."""
        self.host_lengths += np.asarray(counts)
        if self.lengths.device.type != "cpu":
            self.lengths.copy_(torch.from_numpy(self.host_lengths))

    def lengthen(self, counts: Tensor) -> None:
        """As `advance`, by counts [B] on the device. With `width` set the host is not told: use `told`."""
        self.lengths.add_(counts)
        if self.width is None and self.lengths.device.type != "cpu":
            self.host_lengths[:] = self.lengths.cpu().numpy()

    def told(self, host_lengths: np.ndarray) -> None:
        """Let Python know lengths that the device has reached by itself."""
        self.host_lengths[:] = host_lengths

    def keep(self, slots: Tensor, counts: list[int]) -> None:
        """Of the slots just written, keep `slots` [B, K], numbered from the live length, the first `counts` of a row.

        They move to directly behind the live length, in order; `slots[b]` must be increasing.
        """
        self.move(slots)
        self.advance(counts)

    def move(self, slots: Tensor) -> None:
        """The move that `keep` makes, without the new lengths: fixed shapes, no look from the host."""
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
