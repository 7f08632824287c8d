"""A lean forward pass over a draft model's weights and the cache, the draft's counterpart of `FusedRunner`.

Shapes: B batch, T rows, A heads, KV key-value heads, d head size, H hidden, D draft vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core.model.checkpoint import Draft
from hass_core.target.compiling import compiled
from hass_core.target.fused import joined
from hass_core.target.kv_cache import KVCache, LayerShape
from hass_core.target.linear import Linear
from hass_core.target.placement import Placement
from hass_core.target.rope import RopeTable, rotated


class DraftRunner:
    """Rows in, estimated features out; `logits` in the draft's own vocabulary."""

    def __init__(self, draft: Draft):
        model, self.head = draft.model, draft.head
        architecture, layer = model.architecture, model.layer
        attention, mlp = layer.self_attn, layer.mlp
        self.device, self.dtype = draft.head.weight.device, draft.head.weight.dtype
        self.heads, self.head_dim = architecture.num_attention_heads, architecture.head_dim
        self.shape = LayerShape(architecture.num_key_value_heads, architecture.head_dim)
        self.group = self.heads // self.shape.num_key_value_heads
        self._embedding, self._eps, self._act = model.embedding, architecture.rms_norm_eps, mlp.activation
        self._fc = Linear(model.fc.weight, model.fc.bias)
        self._qkv = joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self._q_norm, self._k_norm = attention.q_norm, attention.k_norm
        self._o, self._down = Linear(attention.o_proj.weight), Linear(mlp.down_proj.weight)
        self._gate_up = joined([mlp.gate_proj, mlp.up_proj])
        self._norm = layer.post_attention_layernorm.weight
        self._head = Linear(draft.head.weight)
        self.rope = RopeTable(model.rotary, self.device, self.dtype)
        self._compiled_layer = compiled(self._layer) if self.device.type == "cuda" else self._layer

    def new_cache(self, batch_size: int, slots: int) -> KVCache:
        """An empty cache of one layer."""
        self.rope.grow(slots)
        return KVCache.allocate([self.shape], batch_size, slots, self.device, self.dtype)

    def forward(
        self, token_ids: Tensor, features: Tensor, position_ids: Tensor, cache: KVCache, place: Placement
    ) -> Tensor:
        """Estimated next features [B, T, H] of rows (feature [B, T, H], next token [B, T]) written at `place`."""
        keys, values = cache.layers[0]
        layer = self._layer if cache.width is None else self._compiled_layer
        return layer(token_ids, features, *self.rope.at(position_ids), keys, values, place)

    def logits(self, features: Tensor) -> Tensor:
        """[..., D] from [..., H]."""
        return self._head(features)

    def _layer(
        self,
        token_ids: Tensor,
        features: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        place: Placement,
    ) -> Tensor:
        batch, tokens, kv = *token_ids.shape, self.shape.num_key_value_heads
        u = self._fc(torch.cat([F.embedding(token_ids, self._embedding), features], -1))
        mixed = self._qkv(u).view(batch, tokens, self.heads + 2 * kv, self.head_dim)
        queries, new_keys, new_values = mixed.split([self.heads, kv, kv], dim=2)
        place.write(keys, rotated(self._k_norm(new_keys), cos, sin))
        place.write(values, new_values)
        attended = place.attend(rotated(self._q_norm(queries), cos, sin).transpose(1, 2), keys, values)
        y = u + self._o(attended.transpose(1, 2).reshape(batch, tokens, -1))
        gate, up = self._gate_up(F.rms_norm(y, (y.shape[-1],), self._norm, self._eps)).chunk(2, dim=-1)
        return y + self._down(self._act(gate) * up)
