"""A lean forward pass over a draft model's weights and the cache, the draft's counterpart of `FusedRunner`.

Shapes: B batch, T rows, A heads, KV key-value heads, d head size, H hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hass_core.draft_model.layers import DraftModel
from hass_core.target_model.compiling import Compiled, compiled
from hass_core.target_model.fused import joined
from hass_core.target_model.kv_cache import KVCache, LayerShape
from hass_core.target_model.linear import Linear, few_rows
from hass_core.target_model.placement import Placement, place
from hass_core.target_model.rope import RopeTable


class DraftRunner:
    """Rows in, estimated features out, with the weights that `model` has now: a CPU copies them, and so do 8 bits."""

    def __init__(self, model: DraftModel, eight_bits: bool = False):
        architecture, layer = model.architecture, model.layer
        attention, mlp = layer.self_attn, layer.mlp
        self.device, self.dtype = model.fc.weight.device, model.fc.weight.dtype
        self.heads, self.head_dim = architecture.num_attention_heads, architecture.head_dim
        self.shape = LayerShape(architecture.num_key_value_heads, architecture.head_dim)
        self.group = self.heads // self.shape.num_key_value_heads
        self.embedding, self._eps, self._act = model.embedding, architecture.rms_norm_eps, mlp.activation
        self._silu = architecture.hidden_act == "silu"
        self._fc = Linear(model.fc.weight, model.fc.bias, eight_bits)
        self._qkv = joined([attention.q_proj, attention.k_proj, attention.v_proj], eight_bits)
        self._q_norm, self._k_norm = attention.q_norm, attention.k_norm
        self._o = Linear(attention.o_proj.weight, None, eight_bits)
        self._down = Linear(mlp.down_proj.weight, None, eight_bits)
        self._gate_up = joined([mlp.gate_proj, mlp.up_proj], eight_bits)
        self._norm = layer.post_attention_layernorm.weight
        self.rope = RopeTable(model.rotary, self.device, self.dtype)
        self._compiled = (Compiled(self._before), Compiled(self._after)) if self.device.type == "cuda" else None
        self._paired = compiled(self._pair, any_shape=True) if self.device.type == "cuda" else self._pair

    def new_cache(self, batch_size: int, slots: int) -> KVCache:
        """An empty cache of one layer."""
        self.rope.grow(slots)
        return KVCache.allocate([self.shape], batch_size, slots, self.device, self.dtype)

    def pairs(self, token_ids: Tensor, features: Tensor) -> Tensor:
        """A row's input [B, T, 2H]: the token's embedding and the feature before it [B, T, H]."""
        return self._paired(token_ids, features)

    def forward(
        self,
        pairs: Tensor,
        turns: tuple[Tensor, Tensor],
        cache: KVCache,
        visible: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        """Estimated next features [B, T, H] of rows `pairs` [B, T, 2H], at positions with the `turns` of `rope`.

        They are written `offset` slots behind the live lengths, and see what `place` of
        `hass_core.target_model.placement` says.
        """
        count = pairs.shape[0] * pairs.shape[1]
        where = place(pairs.shape[1], cache, visible, self.group, self.dtype, offset)
        if cache.steady and self._silu and few_rows(pairs, count):
            return self._few_rows(pairs, turns, where, cache)
        before, after = self._before, self._after
        if self._compiled and cache.steady:
            before, after = self._compiled[0].for_tokens(count), self._compiled[1].for_tokens(count)
        u, mixed = before(pairs)
        return after(u, where.attention(mixed, *turns, *cache.layers[0]))

    def _few_rows(self, pairs: Tensor, turns: tuple[Tensor, Tensor], where: Placement, cache: KVCache) -> Tensor:
        """The estimated features [B, T, H] by the kernels for few rows."""
        from hass_core.kernels.few_rows import (  # Triton is there on a GPU only
            Norm,
            added_product,
            added_product_to_norm,
            product,
        )

        u = product(pairs, self._fc)
        attended = where.attention(self._heads(product(u, self._qkv)), *turns, *cache.layers[0])
        y, ready = added_product_to_norm(attended, self._o, u, Norm(self._norm, self._eps))
        return added_product(product(ready, self._gate_up, gated=True), self._down, y)

    def _pair(self, token_ids: Tensor, features: Tensor) -> Tensor:
        return torch.cat([F.embedding(token_ids, self.embedding), features], -1)

    def _before(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """The fused input [B, T, H], and its queries, keys and values [B, T, A + 2·KV, d]."""
        u = self._fc(pairs)
        return u, self._heads(self._qkv(u))

    def _heads(self, mixed: Tensor) -> Tensor:
        """[B, T, A + 2·KV, d] from the product [B, T, (A + 2·KV)·d], with the norms of queries and keys."""
        kv, mixed = self.shape.num_key_value_heads, mixed.unflatten(-1, (-1, self.head_dim))
        if isinstance(self._q_norm, nn.Identity):
            return mixed
        queries, keys, values = mixed.split([self.heads, kv, kv], dim=2)
        return torch.cat([self._q_norm(queries), self._k_norm(keys), values], dim=2)

    def _after(self, u: Tensor, attended: Tensor) -> Tensor:
        """The estimated features [B, T, H] from the fused input and the attended values [B, T, A·d]."""
        y = u + self._o(attended)
        gate, up = self._gate_up(F.rms_norm(y, (y.shape[-1],), self._norm, self._eps)).chunk(2, dim=-1)
        return y + self._down(self._act(gate) * up)
