"""Features of many rows in one pass, the rows laid end to end: no token is padding, however their lengths differ.

It serves what `FusedRunner` serves, with that runner's products: what is stored is what decoding computes.

Shapes: B rows, T tokens of all rows together, H hidden, A heads, KV key-value heads, d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hass_core.target.fused import FusedRunner
from hass_core.target.loader import Target
from hass_core.target.rope import rotated

FLASH_DTYPES, FLASH_HEAD_DIM = (torch.bfloat16, torch.float16), 256

_passes: WeakKeyDictionary[nn.Module, "PackedPass | None"] = WeakKeyDictionary()


def packed_pass(target: Target) -> "PackedPass | None":
    """What computes this target's features without padding; None where its own pass has to."""
    if target.model not in _passes:
        _passes[target.model] = _made(target)
    return _passes[target.model]


def _made(target: Target) -> "PackedPass | None":
    if target.device.type != "cuda" or target.dtype not in FLASH_DTYPES or not FusedRunner.supports(target.model):
        return None
    if len({weight.device for weight in target.model.parameters()}) > 1:
        return None
    made = PackedPass(target)
    return made if made.rope.fixed and made.head_dim <= FLASH_HEAD_DIM and made.head_dim % 8 == 0 else None


@dataclass(frozen=True)
class Rows:
    """Where the rows stand."""

    starts: Tensor  # [B + 1] int32: of each row, and the end of the last
    longest: int


class PackedPass(FusedRunner):
    """Call it with rows of token ids; it gives their features [T, H], row after row."""

    @torch.no_grad()
    def __call__(self, token_ids: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        lengths = [len(ids) for ids in token_ids]
        starts = np.cumsum([0, *lengths])
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        # sent together, and to a GPU from page-locked memory: else each would wait for the work given before
        numbers = torch.from_numpy(np.concatenate([*token_ids, positions, starts], dtype=np.int32, casting="unsafe"))
        if self.device.type == "cuda":
            numbers = numbers.pin_memory().to(self.device, non_blocking=True)
        ids, places, borders = numbers.split([len(positions), len(positions), len(starts)])
        self.rope.grow(max(lengths))
        turns = self.rope.at(places[None])
        rows = Rows(borders, max(lengths))
        x = F.embedding(ids[None], self.embedding)
        for weights in self.layers:
            x = self._after(x, self._attended(self._before(x, weights), turns, rows), weights)
        return self._normed(x, self.final_norm)[0]

    def _attended(self, mixed: Tensor, turns: tuple[Tensor, Tensor], rows: Rows) -> Tensor:
        """[1, T, A·d] from queries, keys and values [1, T, A + 2·KV, d]."""
        kv = self.shape.num_key_value_heads
        turning, values = mixed[0].split([self.heads + kv, kv], dim=1)
        queries, keys = rotated(turning[None], *turns)[0].split([self.heads, kv], dim=1)
        return attention(queries, keys, values, rows)[None].flatten(-2)


def attention(queries: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> Tensor:
    """Causal attention within each row: [T, A, d] from queries [T, A, d], keys and values [T, KV, d]."""
    if queries.is_cuda:
        return torch.ops.aten._flash_attention_forward(
            queries, keys, values, rows.starts, rows.starts, rows.longest, rows.longest, 0.0, True, False
        )[0]
    each = []
    for start, end in pairwise(rows.starts.tolist()):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (queries, keys, values))
        each.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(each)
