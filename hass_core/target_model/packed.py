"""Features of many rows in one pass, the rows laid end to end: no token is padding, however their lengths differ.

It serves what `FusedRunner` serves, with that runner's products: what is stored is what decoding computes.

Shapes: B rows, T tokens of all rows together, H hidden, A heads, KV key-value heads, d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hass_core import kernels
from hass_core.target_model.block import Linear, rotated
from hass_core.target_model.loader import Target
from hass_core.target_model.runner import FusedRunner
from hass_core.target_model.taps import Taps

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
    if target.is_spread:
        return None
    made = PackedPass(target)
    head_dim = made.block.shape.head_dim
    return made if made.rope.fixed and head_dim <= FLASH_HEAD_DIM and head_dim % 8 == 0 else None


@dataclass(frozen=True)
class Rows:
    """Where the rows stand."""

    cu_seqlens: Tensor  # [B + 1] int32: where each row starts, and the end of the last
    longest: int


class PackedPass(FusedRunner):
    """Call it with rows of token ids; it gives their features [T, H], row after row. `taps` see the states after their
    layers, laid out alike."""

    @torch.no_grad()
    def __call__(self, token_ids: Sequence[Sequence[int] | np.ndarray], taps: Taps | None = None) -> Tensor:
        lengths = [len(ids) for ids in token_ids]
        starts = np.cumsum([0, *lengths])
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        # sent together, and to a GPU from page-locked memory: else each would wait for the work given before
        numbers = torch.from_numpy(np.concatenate([*token_ids, positions, starts], dtype=np.int32, casting="unsafe"))
        if self.device.type == "cuda":
            numbers = numbers.pin_memory().to(self.device, non_blocking=True)
        ids, position_ids, cu_seqlens = numbers.split([len(positions), len(positions), len(starts)])
        self.rope.grow(max(lengths))
        rotation = torch.cat(self.rope.at(position_ids[None]), dim=2)[0]
        rows = Rows(cu_seqlens, max(lengths))
        x, block = F.embedding(ids, self.embedding), self.block
        for number, weights in enumerate(self.layers, 1):
            qkv = block.before(x[None], weights)[0]
            x = added_product(self._attended(qkv, rotation, rows), weights.o, x)
            x = added_product(gate(weights.gate_up(block.normed(x, weights.mlp_norm))), weights.down, x)
            if taps:
                taps.see(number, x)
        return block.normed(x, self.final_norm)

    def _attended(self, qkv: Tensor, rotation: Tensor, rows: Rows) -> Tensor:
        """[T, A·d] from queries, keys and values [T, A + 2·KV, d]."""
        heads, kv = self.block.heads, self.block.shape.num_key_value_heads
        queries, keys = rotate(qkv, rotation, heads + kv).split([heads, kv], dim=1)
        return attention(queries, keys, qkv[:, -kv:], rows).flatten(1)


def gate(gate_up: Tensor) -> Tensor:
    """SiLU(gate) · up [T, I] from the gates and what they gate, side by side [T, 2·I]."""
    if kernels.usable(gate_up):
        return _many_rows().gate(gate_up)
    gates, gated = gate_up.chunk(2, dim=-1)
    return F.silu(gates) * gated


def rotate(qkv: Tensor, rotation: Tensor, heads: int) -> Tensor:
    """The first heads of qkv [T, A + 2·KV, d], rotated by cosines and signed sines [T, 2, d]."""
    if kernels.usable(qkv):
        return _many_rows().rotate(qkv, rotation, heads)
    return rotated(qkv[:, :heads], rotation[:, :1], rotation[:, 1:])


def added_product(x: Tensor, layer: Linear, residual: Tensor) -> Tensor:
    """residual [T, O] + layer(x [T, I]), on a GPU in one launch."""
    if x.is_cuda and layer.bias is None and layer.scale is None:
        return torch.addmm(residual, x, layer.weight.t())
    return residual + layer(x)


def _many_rows() -> ModuleType:
    from hass_core.kernels import many_rows  # Triton is there on a GPU only

    return many_rows


def attention(queries: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> Tensor:
    """Causal attention within each row: [T, A, d] from queries [T, A, d], keys and values [T, KV, d]."""
    if queries.is_cuda:
        return torch.ops.aten._flash_attention_forward(
            queries, keys, values, rows.cu_seqlens, rows.cu_seqlens, rows.longest, rows.longest, 0.0, True, False
        )[0]
    each = []
    for start, end in pairwise(rows.cu_seqlens.tolist()):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (queries, keys, values))
        each.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(each)
