"""The draft models: one decoder layer over the target's features, in two architectures.

Row t takes the target's feature f_t (its hidden state after the final norm) and the next token x_{t+1}, and returns a
state. What a head reads of that is the distribution of x_{t+2}, and the state stands for f_{t+1} where the next row is
drafted too. EAGLE and HASS return an estimate of f_{t+1}, which the target's own head reads:

    u = fc([embedding(x_{t+1}) ; f_t])        embedding first
    y = u + attention(u)                      no norm before attention
    f̂_{t+1} = y + mlp(norm(y))                no final norm

EAGLE-3's attention takes both side by side, and a head of the draft's own reads the state h_{t+1}:

    w = [norm(embedding(x_{t+1})) ; norm(f_t)]
    y = f_t + attention(w)
    h_{t+1} = y + mlp(norm(y))                read by head(norm(h)); with `norm_output` h is normed itself

With taps, f_t is no state of the target but fuses several, those after some of its layers, side by side in s:

    f_t = fc(s_t)                             with `fc_norm` each state is normed before

Shapes: B batch, L rows, H hidden, A heads, KV key-value heads, d head size, D draft vocabulary.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.eagle3 import Eagle3Architecture
from hass_core.draft_model.head import DraftHead


class DraftModel(nn.Module):
    """Trainable weights under EAGLE's flat names; the target's embedding [V, H] is shared, frozen and not saved."""

    embedding: Tensor

    def __init__(self, architecture: DraftArchitecture, embedding: Tensor):
        super().__init__()
        self.architecture = architecture
        self._make_parts(architecture)
        self.register_buffer("embedding", embedding, persistent=False)
        self.rotary = Rotary(architecture.rotary_config())
        self.to(embedding.device)

    def _make_parts(self, architecture: DraftArchitecture) -> None:
        self.fc = nn.Linear(2 * architecture.hidden_size, architecture.hidden_size, bias=architecture.fc_bias)
        self.layers = nn.ModuleList([DraftLayer(architecture, inputs=architecture.hidden_size)])

    @property
    def layer(self) -> "DraftLayer":
        layer = self.layers[0]
        assert isinstance(layer, DraftLayer)
        return layer

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return self.layer.mlp.down_proj.weight.dtype

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers of the target after which states are read in place of the last one."""
        return ()

    def features_from(self, states: Tensor) -> Tensor:
        """The features [..., H] of rows, from what is read of the target there [..., n·H]."""
        return states

    def fuse(self, token_ids: Tensor, features: Tensor) -> Tensor:
        """u [B, L, H] from next tokens [B, L] and features [B, L, H]."""
        embedded = F.embedding(token_ids, self.embedding).to(features.dtype)
        return self.fc(torch.cat([embedded, features], dim=-1))

    def qkv(self, attending: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, A, L, d], rotated keys and values [B, KV, L, d] of rows at `position_ids` [B, L], from
        what the attention takes of them."""
        queries, keys, values = self.layer.self_attn.project(attending)
        cos, sin = self.rotary(attending, position_ids)
        queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
        return queries, keys, values

    def enter(self, token_ids: Tensor, features: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """What the layer adds to [B, L, H], and rotated queries [B, A, L, d], keys and values [B, KV, L, d]."""
        u = self.fuse(token_ids, features)
        return u, *self.qkv(u, position_ids)

    def output(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The states [B, L, H] from what the layer adds to and the attended values [B, A, L, d]."""
        layer = self.layer
        y = residual + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return y + layer.mlp(layer.post_attention_layernorm(y))

    def read(self, states: Tensor) -> Tensor:
        """What the head takes of states [..., H]."""
        return states

    def own_head(self) -> list[Tensor]:
        """The weight [D, H] of the draft's own head, where it has one."""
        return []

    def head(self, of_target: DraftHead) -> DraftHead:
        """The head that reads this draft, from the target's over the same tokens."""
        return of_target

    def forward(self, token_ids: Tensor, features: Tensor, position_ids: Tensor) -> Tensor:
        """States [B, L, H] of rows that each see those up to themselves.

        Training (training/alignment.py) and decoding (decoding/drafter.py) attend otherwise, to a drafted chain and to
        a cache: they take the parts above, or the weights. An exported draft is compared with this.
        """
        residual, queries, keys, values = self.enter(token_ids, features, position_ids)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return self.output(residual, attended)


class Eagle3Model(DraftModel):
    """The second architecture; its names are those of EAGLE-3's files."""

    architecture: Eagle3Architecture

    def _make_parts(self, architecture: DraftArchitecture) -> None:
        assert isinstance(architecture, Eagle3Architecture)
        hidden, eps = architecture.hidden_size, architecture.rms_norm_eps
        self.midlayer = Eagle3Layer(architecture)
        if count := len(architecture.taps):
            self.fc = nn.Linear(count * hidden, hidden, bias=False)
        if architecture.fc_norm:
            self.fc_norm = nn.ModuleList([Norm(hidden, eps=eps) for _ in architecture.taps])
        self.norm = Norm(hidden, eps=eps)
        self.lm_head = nn.Linear(hidden, architecture.draft_vocab_size, bias=False)

    @property
    def layer(self) -> "Eagle3Layer":
        return self.midlayer

    @property
    def taps(self) -> tuple[int, ...]:
        return self.architecture.taps

    @property
    def tap_norms(self) -> list["Norm"]:
        """One for each tap, or none."""
        return [cast(Norm, norm) for norm in self.fc_norm] if self.architecture.fc_norm else []

    def features_from(self, states: Tensor) -> Tensor:
        return self.fc(self.taken(states)) if self.taps else states

    def taken(self, states: Tensor) -> Tensor:
        """What `fc` takes of the states [..., n·H]."""
        norms = self.tap_norms
        each = zip(norms, states.chunk(len(norms), -1), strict=True) if norms else ()
        return torch.cat([norm(state) for norm, state in each], -1) if norms else states

    def enter(self, token_ids: Tensor, features: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        layer, embedded = self.midlayer, F.embedding(token_ids, self.embedding).to(features.dtype)
        both = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(features)], dim=-1)
        return features, *self.qkv(both, position_ids)

    def output(self, residual: Tensor, attended: Tensor) -> Tensor:
        out = super().output(residual, attended)
        return self.norm(out) if self.architecture.norm_output else out

    def read(self, states: Tensor) -> Tensor:
        return states if self.architecture.norm_output else self.norm(states)

    def own_head(self) -> list[Tensor]:
        return [self.lm_head.weight]

    def head(self, of_target: DraftHead) -> DraftHead:
        return of_target.with_weight(self.lm_head.weight)


def build_draft(architecture: DraftArchitecture, embedding: Tensor) -> DraftModel:
    """The model of an architecture, with random weights; it shares the target's `embedding` [V, H]."""
    kind = Eagle3Model if isinstance(architecture, Eagle3Architecture) else DraftModel
    return kind(architecture, embedding)


class DraftLayer(nn.Module):
    """A decoder layer without its input norm; `inputs`: how wide a row is for the attention."""

    def __init__(self, architecture: DraftArchitecture, inputs: int):
        super().__init__()
        self.self_attn = Projections(architecture, inputs)
        self.mlp = GatedMLP(architecture)
        self.post_attention_layernorm = Norm(architecture.hidden_size, eps=architecture.rms_norm_eps)


class Eagle3Layer(DraftLayer):
    """One whose attention takes an embedding and a feature side by side, each with a norm of its own."""

    def __init__(self, architecture: DraftArchitecture):
        super().__init__(architecture, inputs=2 * architecture.hidden_size)
        self.input_layernorm = Norm(architecture.hidden_size, eps=architecture.rms_norm_eps)
        self.hidden_norm = Norm(architecture.hidden_size, eps=architecture.rms_norm_eps)


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

    def __init__(self, architecture: DraftArchitecture, inputs: int):
        super().__init__()
        self.head_dim = architecture.head_dim
        hidden, bias = architecture.hidden_size, architecture.qkv_bias
        queries = architecture.num_attention_heads * architecture.head_dim
        keys = architecture.num_key_value_heads * architecture.head_dim
        self.q_proj = nn.Linear(inputs, queries, bias=bias)
        self.k_proj = nn.Linear(inputs, keys, bias=bias)
        self.v_proj = nn.Linear(inputs, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=architecture.o_bias)
        if architecture.qk_norm:
            self.q_norm = Norm(architecture.head_dim, eps=architecture.rms_norm_eps)
            self.k_norm = Norm(architecture.head_dim, eps=architecture.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def project(self, attending: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, A, L, d], keys and values [B, KV, L, d] before rotation."""
        queries, keys, values = (
            projection(attending).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
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
