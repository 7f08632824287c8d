"""A draft's forward pass over a cache: what `DraftModel.forward` of `hass_core.draft_model.layers` computes, whose
formulas these are. The two architectures differ in the layer's inputs and outputs alone (`LayerIO`).

Shapes: B batch, T rows of one pass, H hidden.
"""

from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core.draft_model.layers import DraftModel, Eagle3Model
from hass_core.target_model.block import DecoderBlock, LayerShape, LayerWeights, Linear, RopeTable, few_rows
from hass_core.target_model.compiling import compiled
from hass_core.target_model.kv_cache import FixedShapes, KVCache, attention_of


class DraftRunner:
    """Rows in, states out, with the weights that `model` has now: a CPU copies them, and so do 8 bits.

    A state is the estimated next feature, or what stands for it.
    """

    def __init__(self, model: DraftModel, eight_bits: bool = False):
        architecture, activation = model.architecture, model.layer.mlp.activation
        self.device, self.dtype = model.embedding.device, model.dtype
        shape, cuda = LayerShape(architecture.num_key_value_heads, architecture.head_dim), self.device.type == "cuda"
        heads = architecture.num_attention_heads
        self._block = DecoderBlock(heads, shape, architecture.rms_norm_eps, activation, cuda)
        self._io = layer_io(model, eight_bits)
        self._weights = replace(LayerWeights.of(model.layer, eight_bits), input_norm=None)
        self._silu = architecture.hidden_act == "silu"  # the kernels know no other activation
        self.embedding = model.embedding
        self.rope = RopeTable(model.rotary, self.device, self.dtype)
        self._fused = compiled(fused_input, any_shape=True) if cuda else fused_input

    def new_cache(self, batch_size: int, slots: int) -> KVCache:
        """An empty cache of one layer."""
        self.rope.grow(slots)
        return KVCache.allocate([self._block.shape], batch_size, slots, self.device, self.dtype)

    def inputs(self, token_ids: Tensor, features: Tensor) -> Tensor:
        """What `forward` takes [B, T, 2H]: the tokens' embeddings, and the features before them [B, T, H]."""
        return self._fused(token_ids, features, self.embedding)

    def features_from(self, tapped: Tensor) -> Tensor:
        """Features [..., H] from the target's states [..., n·H] that the draft reads."""
        return self._io.features_from(tapped)

    def forward(
        self,
        inputs: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: KVCache,
        visible: Tensor | None = None,
        offset: int = 0,
        fixed: FixedShapes | None = None,
    ) -> Tensor:
        """States [B, T, H] of `inputs` [B, T, 2H], at positions with the `rotation` of `rope`.

        They are written `offset` slots after the live lengths, and see what
        `hass_core.target_model.kv_cache.attention_of` says.
        """
        block, weights = self._block, self._weights
        attention = attention_of(inputs.shape[1], cache, block.group, self.dtype, visible, offset, fixed)

        def attend(qkv: Tensor) -> Tensor:
            return attention(qkv, *rotation, *cache.layers[0])

        lasting = fixed is not None and fixed.lasting
        by_kernels = lasting and self._silu and few_rows(inputs, inputs.shape[0] * inputs.shape[1])
        residual, attending = self._io.enter(inputs, by_kernels)
        if by_kernels:
            out = block.by_kernels(residual, attending, weights, attend, next_norm=None)[0]
        else:
            out = block(residual, weights, attend, lasting, attending)
        return self._io.leave(out)

    def read(self, states: Tensor) -> Tensor:
        """What the head takes of states [..., H]."""
        return self._io.read(states)


def fused_input(token_ids: Tensor, features: Tensor, embedding: Tensor) -> Tensor:
    """The draft's input [B, T, 2H]: the embeddings of tokens [B, T], and the features before them [B, T, H]."""
    return torch.cat([F.embedding(token_ids, embedding), features], -1)


class LayerIO(Protocol):
    """How one architecture feeds the draft's layer and reads it; rows [B, T, 2H] hold embeddings beside features."""

    def features_from(self, tapped: Tensor) -> Tensor:
        """Features [..., H] from the target's states [..., n·H] that the draft reads."""
        ...

    def enter(self, inputs: Tensor, by_kernels: bool) -> tuple[Tensor, Tensor]:
        """What the layer adds to [B, T, H], and what its attention takes, of rows [B, T, 2H]."""
        ...

    def leave(self, out: Tensor) -> Tensor:
        """The states of the layer's outputs [B, T, H]."""
        ...

    def read(self, states: Tensor) -> Tensor:
        """What the head takes of states [..., H]."""
        ...


def layer_io(model: DraftModel, eight_bits: bool) -> LayerIO:
    """That of a model, with the weights that it has now."""
    return Eagle3IO(model, eight_bits) if isinstance(model, Eagle3Model) else EagleIO(model, eight_bits)


class EagleIO:
    """EAGLE's and HASS's: the fusion layer before, nothing after."""

    def __init__(self, model: DraftModel, eight_bits: bool):
        self._fc = Linear(model.fc.weight, model.fc.bias, eight_bits)

    def features_from(self, tapped: Tensor) -> Tensor:
        return tapped  # it reads none

    def enter(self, inputs: Tensor, by_kernels: bool) -> tuple[Tensor, Tensor]:
        u = self._fc.of_few_rows(inputs) if by_kernels else self._fc(inputs)
        return u, u

    def leave(self, out: Tensor) -> Tensor:
        return out

    def read(self, states: Tensor) -> Tensor:
        return states


class Eagle3IO:
    """EAGLE-3's: a norm for each half before, and one between a state and what the head takes."""

    def __init__(self, model: Eagle3Model, eight_bits: bool):
        layer, architecture = model.layer, model.architecture
        self._norms = layer.input_layernorm.weight.detach(), layer.hidden_norm.weight.detach()
        self._last, self._eps = model.norm.weight.detach(), architecture.rms_norm_eps
        self._normed_state = architecture.norm_output
        cuda = self._last.is_cuda
        self._halves = compiled(normed_halves, any_shape=True) if cuda else normed_halves
        self._fc = Linear(model.fc.weight, None, eight_bits) if architecture.taps else None
        self._tap_norms = [norm.weight.detach() for norm in model.tap_norms]
        self._normed_taps = compiled(normed_taps, any_shape=True) if cuda else normed_taps

    def features_from(self, tapped: Tensor) -> Tensor:
        if self._fc is None:
            return tapped
        normed = self._normed_taps(tapped, self._tap_norms, self._eps) if self._tap_norms else tapped
        return self._fc.of_few_rows(normed)

    def enter(self, inputs: Tensor, by_kernels: bool) -> tuple[Tensor, Tensor]:
        return self._halves(inputs, *self._norms, self._eps)

    def leave(self, out: Tensor) -> Tensor:
        return self._norm(out) if self._normed_state else out

    def read(self, states: Tensor) -> Tensor:
        return states if self._normed_state else self._norm(states)

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self._last, self._eps)


def normed_taps(taps: Tensor, norms: list[Tensor], eps: float) -> Tensor:
    """States [..., n·H], each normed by one of the n weights [H]."""
    each = zip(taps.chunk(len(norms), -1), norms, strict=True)
    return torch.cat([F.rms_norm(state, norm.shape, norm, eps) for state, norm in each], -1)


def normed_halves(inputs: Tensor, embedding_norm: Tensor, feature_norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The features of rows [B, T, 2H], one row after the other, and both halves normed."""
    embedded, features = inputs.chunk(2, -1)
    shape = (features.shape[-1],)
    normed = F.rms_norm(embedded, shape, embedding_norm, eps), F.rms_norm(features, shape, feature_norm, eps)
    return features.contiguous(), torch.cat(normed, -1)
