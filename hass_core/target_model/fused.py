"""A lean forward pass over the weights of a Llama, Mistral, Qwen2 or Qwen3 model, for decoding.

It uses the model's own parameters. The q/k/v and the gate/up matrices of a layer are laid out one after the other, so
that each trio and pair is one product. On a GPU the model's parameters become views of those, so no memory is doubled
and the model works as before; on a CPU the products' weights are packed copies, see `hass_core.target_model.linear`.

Shapes: B batch, T new tokens, S slots attended to, H hidden, A heads, KV key-value heads, d head size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hass_core.target_model.compiling import Compiled
from hass_core.target_model.kv_cache import KVCache, LayerShape
from hass_core.target_model.linear import Linear, few_rows, packable
from hass_core.target_model.loader import Target
from hass_core.target_model.placement import Placement, place
from hass_core.target_model.rope import RopeTable

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; norms are [H] or [d]."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class FusedRunner:
    """See `hass_core.target_model.runner.Runner`."""

    def __init__(self, target: Target):
        model, config = target.model, target.model.config
        self.device, self.dtype = target.device, target.dtype
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.context_tokens = target.context_tokens
        self.heads = config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.shape = LayerShape(config.num_key_value_heads, self.head_dim)
        self.eps = config.rms_norm_eps
        decoder = cast(Any, model).model
        self.embedding, self._head = target.embedding, Linear(target.head)
        self.layers = [_layer_weights(layer) for layer in decoder.layers]
        self.final_norm = decoder.norm.weight
        self.rope = RopeTable(decoder.rotary_emb, self.device, self.dtype)
        self.capturable = self.rope.fixed
        self._compiled = (Compiled(self._before), Compiled(self._after)) if self.device.type == "cuda" else None

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether the model is of a known family, in plain weights, with full attention in every layer."""
        config = model.config
        if config.model_type not in FAMILIES or getattr(config, "quantization_config", None) is not None:
            return False
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        windowed = config.model_type == "mistral" and config.sliding_window is not None
        plain = config.hidden_act == "silu" and not getattr(config, "mlp_bias", False)
        return plain and not windowed and kinds == {"full_attention"}

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        self.rope.grow(min(max_tokens, self.context_tokens))
        shapes = [self.shape] * len(self.layers)
        return KVCache.allocate(shapes, batch_size, max_tokens, self.device, self.dtype)

    def logits(self, features: Tensor) -> Tensor:
        return self._head.of_few_rows(features)

    @torch.no_grad()
    def forward(self, token_ids: Tensor, position_ids: Tensor, cache: KVCache, visible: Tensor | None = None) -> Tensor:
        group = self.heads // self.shape.num_key_value_heads
        turns = self.rope.at(position_ids)
        where = place(token_ids.shape[1], cache, visible, group, self.dtype)
        x = F.embedding(token_ids, self.embedding)
        quick = cache.steady and few_rows(self.embedding, token_ids.numel())
        layers = self._few_rows if quick else self._layers
        return self._normed(layers(x, turns, where, cache), self.final_norm)

    def _layers(self, x: Tensor, turns: tuple[Tensor, Tensor], where: Placement, cache: KVCache) -> Tensor:
        """The last layer's output [B, T, H]."""
        before, after = self._before, self._after
        if self._compiled and cache.steady:
            count = x.shape[0] * x.shape[1]
            before, after = self._compiled[0].for_tokens(count), self._compiled[1].for_tokens(count)
        for weights, (keys, values) in zip(self.layers, cache.layers, strict=True):
            x = after(x, where.attention(before(x, weights), *turns, keys, values), weights)
        return x

    def _few_rows(self, x: Tensor, turns: tuple[Tensor, Tensor], where: Placement, cache: KVCache) -> Tensor:
        """The same by the kernels for few rows."""
        from hass_core.kernels.few_rows import Norm, added_product_to_norm, product  # Triton is there on a GPU only

        ready = self._normed(x, self.layers[0].input_norm)
        next_norms = [*(weights.input_norm for weights in self.layers[1:]), self.final_norm]
        for weights, (keys, values), next_norm in zip(self.layers, cache.layers, next_norms, strict=True):
            mixed = self._heads(product(ready, weights.qkv), weights)
            attended = where.attention(mixed, *turns, keys, values)
            x, ready = added_product_to_norm(attended, weights.o, x, Norm(weights.mlp_norm, self.eps))
            gated = product(ready, weights.gate_up, gated=True)
            x, ready = added_product_to_norm(gated, weights.down, x, Norm(next_norm, self.eps))
        return x

    def _normed(self, x: Tensor, norm: Tensor) -> Tensor:
        return F.rms_norm(x, (self.hidden_size,), norm, self.eps)

    def _before(self, x: Tensor, weights: LayerWeights) -> Tensor:
        """Queries, keys and values [B, T, A + 2·KV, d] of a layer's input [B, T, H]."""
        return self._heads(weights.qkv(self._normed(x, weights.input_norm)), weights)

    def _heads(self, mixed: Tensor, weights: LayerWeights) -> Tensor:
        """[B, T, A + 2·KV, d] from the product [B, T, (A + 2·KV)·d], with the norms of queries and keys."""
        mixed = mixed.unflatten(-1, (-1, self.head_dim))
        if weights.q_norm is None or weights.k_norm is None:
            return mixed
        kv = self.shape.num_key_value_heads
        queries, keys, values = mixed.split([self.heads, kv, kv], dim=2)
        queries = F.rms_norm(queries, (self.head_dim,), weights.q_norm, self.eps)
        keys = F.rms_norm(keys, (self.head_dim,), weights.k_norm, self.eps)
        return torch.cat([queries, keys, values], dim=2)

    def _after(self, x: Tensor, attended: Tensor, weights: LayerWeights) -> Tensor:
        """A layer's output [B, T, H] from its input and the attended values [B, T, A·d]."""
        x = x + weights.o(attended)
        gate, up = weights.gate_up(self._normed(x, weights.mlp_norm)).chunk(2, dim=-1)
        return x + weights.down(F.silu(gate) * up)


def _layer_weights(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return LayerWeights(
        input_norm=layer.input_layernorm.weight,
        qkv=joined(projections),
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if k_norm is None else k_norm.weight,
        o=Linear(attention.o_proj.weight, attention.o_proj.bias),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=joined([mlp.gate_proj, mlp.up_proj]),
        down=Linear(mlp.down_proj.weight),
    )


def joined(linears: list[nn.Linear], eight_bits: bool = False) -> Linear:
    """One product for several of the same input. Packing and rounding copy; else the linears become views of it."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = torch.cat([b.detach() for b in biases]) if biases else None
    if eight_bits or packable(linears[0].weight):
        return Linear(torch.cat([linear.weight.detach() for linear in linears]), bias, eight_bits)
    return Linear(side_by_side(linears), bias)


def side_by_side(linears: list[nn.Linear]) -> Tensor:
    """One tensor of all the linears' weights along the outputs; the linears then hold views of it."""
    weights = [linear.weight for linear in linears]
    if (already := _adjoining(weights)) is not None:  # an earlier runner of the same model did it
        return already
    whole = torch.cat([weight.detach() for weight in weights])
    for linear, view in zip(linears, whole.split([len(weight) for weight in weights]), strict=True):
        linear.weight = nn.Parameter(view, requires_grad=False)
    return whole


def _adjoining(tensors: Sequence[Tensor]) -> Tensor | None:
    """The one tensor that all of them are parts of, if they stand one after the other in memory."""
    first, offset = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and tensor.storage_offset() == offset and tensor.is_contiguous()):
            return None
        offset += tensor.numel()
    rows = sum(len(tensor) for tensor in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
