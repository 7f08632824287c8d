"""The draft model of EAGLE and HASS: one fusion layer and one decoder layer over the target's features.

Row t takes the target's feature f_t (its hidden state after the final norm) and the next token x_{t+1}, and returns an
estimate of f_{t+1}. The target's own output head turns that into the distribution of x_{t+2}:

    u = fc([embedding(x_{t+1}) ; f_t])        embedding first
    y = u + attention(u)                      no norm before attention
    f̂_{t+1} = y + mlp(norm(y))                no final norm

Shapes: B batch, L rows, H hidden, A heads, KV key-value heads, d head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from hass_core.draft_model.architecture import DraftArchitecture


class DraftModel(nn.Module):
    """Trainable weights under EAGLE's flat names; the target's embedding [V, H] is shared, frozen and not saved."""

    embedding: Tensor

    def __init__(self, architecture: DraftArchitecture, embedding: Tensor):
        super().__init__()
        self.architecture = architecture
        self.fc = nn.Linear(2 * architecture.hidden_size, architecture.hidden_size, bias=architecture.fc_bias)
        self.layers = nn.ModuleList([DraftLayer(architecture)])
        self.register_buffer("embedding", embedding, persistent=False)
        self.rotary = Rotary(architecture.rotary_config())
        self.to(embedding.device)

    @property
    def layer(self) -> "DraftLayer":
        layer = self.layers[0]
        assert isinstance(layer, DraftLayer)
        return layer

    def fuse(self, token_ids: Tensor, features: Tensor) -> Tensor:
        """u [B, L, H] from next tokens [B, L] and features [B, L, H]."""
        embedded = F.embedding(token_ids, self.embedding).to(features.dtype)
        return self.fc(torch.cat([embedded, features], dim=-1))

    def qkv(self, u: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, A, L, d], rotated keys and values [B, KV, L, d] of rows at `position_ids` [B, L]."""
        queries, keys, values = self.layer.self_attn.project(u)
        cos, sin = self.rotary(u, position_ids)
        queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
        return queries, keys, values

    def enter(self, token_ids: Tensor, features: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """u [B, L, H], and its rotated queries [B, A, L, d], keys and values [B, KV, L, d]."""
        u = self.fuse(token_ids, features)
        return u, *self.qkv(u, position_ids)

    def output(self, u: Tensor, attended: Tensor) -> Tensor:
        """The new features [B, L, H] from u and the attended values [B, A, L, d]."""
        layer = self.layer
        y = u + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return y + layer.mlp(layer.post_attention_layernorm(y))

    def forward(self, token_ids: Tensor, features: Tensor, position_ids: Tensor) -> Tensor:
        """Estimated next features [B, L, H] of rows that each see those up to themselves.

        Training (training/alignment.py) and decoding (decoding/drafter.py) attend otherwise, to a drafted chain and to
        a cache: they take the parts above, or the weights. An exported draft is compared with this.
        """
        u, queries, keys, values = self.enter(token_ids, features, position_ids)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return self.output(u, attended)


class DraftLayer(nn.Module):
    """A decoder layer without its input norm."""

    def __init__(self, architecture: DraftArchitecture):
        super().__init__()
        self.self_attn = Projections(architecture)
        self.mlp = GatedMLP(architecture)
        self.post_attention_layernorm = Norm(architecture.hidden_size, eps=architecture.rms_norm_eps)


class Norm(nn.RMSNorm):
    """RMSNorm in its input's type, weights too: mixed types have no fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, tuple(self.normalized_shape), self.weight.to(x.dtype), self.eps)


class Rotary(LlamaRotaryEmbedding):
    """transformers' rotary embedding, whose frequencies stay float32 when the model is cast."""

    def _apply(self, fn: Any, recurse: bool = True) -> "Rotary":
        frequencies = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, exact in frequencies.items():
            setattr(self, name, exact.to(getattr(self, name).device))
        return self


class Projections(nn.Module):
    """The attention's weights. What they attend to differs between training and decoding, so that is not in here."""

    def __init__(self, architecture: DraftArchitecture):
        super().__init__()
        self.head_dim = architecture.head_dim
        hidden, bias = architecture.hidden_size, architecture.qkv_bias
        queries = architecture.num_attention_heads * architecture.head_dim
        keys = architecture.num_key_value_heads * architecture.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.k_proj = nn.Linear(hidden, keys, bias=bias)
        self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=architecture.o_bias)
        if architecture.qk_norm:
            self.q_norm = Norm(architecture.head_dim, eps=architecture.rms_norm_eps)
            self.k_norm = Norm(architecture.head_dim, eps=architecture.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, A, L, d], keys and values [B, KV, L, d] before rotation."""
        queries, keys, values = (
            projection(u).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = self.q_norm(queries), self.k_norm(keys)
        return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(self, architecture: DraftArchitecture):
        super().__init__()
        hidden, inner = architecture.hidden_size, architecture.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.activation = ACT2FN[architecture.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
