"""One decoder layer, as target and draft compute it while they decode: its products, its norms, its rotary positions.

    x = x + o(attention(qkv(norm(x))))        a draft's layer has no norm here
    x = x + down(act(gate(norm(x))) · up(norm(x)))

It uses the model's own parameters. The q/k/v and the gate/up matrices are laid out one after the other, so that each
trio and pair is one product. On a GPU the model's parameters become views of those, so no memory is doubled and the
model works as before, and a handful of rows goes through `hass_core.kernels.few_rows`. On a CPU oneDNN re-orders a
weight into blocks on every call unless it is handed one already in blocks: packing made SmolLM2-135M's token 1.5 times
faster in bfloat16, and a tree of 8 tokens 1.6 times faster in float32. The blocks are a copy, so there decoding needs
the weights' memory a second time.

Rotation is x·cos + roll(x, d/2)·sin with the first half of sin negated: the same products as rotate-half.

Shapes: B batch, T new tokens, H hidden, A heads, KV key-value heads, d head size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hass_core import kernels
from hass_core.target_model.compiling import Compiled

MOST_FEW_ROWS = 64
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
EIGHT_BITS = torch.float8_e4m3fn
LENGTH_DEPENDENT = ("dynamic", "longrope")  # their frequencies change with the sequence: no table holds them


@dataclass(frozen=True)
class LayerShape:
    """What one layer stores per token."""

    num_key_value_heads: int
    head_dim: int


Attend = Callable[[Tensor], Tensor]  # [B, T, A·d] from [B, T, A + 2·KV, d]


class Linear:
    """y [..., out] = x [..., in] · weightᵀ + bias, for frozen weights [out, in].

    With `eight_bits` the weights are rounded to fp8 with a scale per output. On a GPU that halves what a few rows wait
    for, while more rows restore the weights for every call; a CPU, or a GPU without fp8, keeps them restored, so that
    all compute the same.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, eight_bits: bool = False):
        self.bias, self.scale = bias, None
        weight = weight.detach()
        if eight_bits:
            rounded, scale = in_eight_bits(weight)
            if kernels.takes_eight_bits(weight):
                weight, self.scale = rounded, scale
            else:
                weight = restored(rounded, scale, weight.dtype)
        self._packed = packable(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        weight = self.weight if self.scale is None else restored(self.weight, self.scale, x.dtype)
        return F.linear(x, weight, self.bias)

    def of_few_rows(self, x: Tensor) -> Tensor:
        """The same, by the kernel for few rows where it serves."""
        if not few_rows(x, x.numel() // x.shape[-1]):
            return self(x)
        from hass_core.kernels.few_rows import product  # Triton is there on a GPU only

        return product(x, self)


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; norms are [H] or [d]."""

    input_norm: Tensor | None
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear

    @classmethod
    def of(cls, layer: Any, eight_bits: bool = False) -> "LayerWeights":
        """Those of a layer of transformers, or of a draft's layer; `eight_bits` as in `Linear`."""
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        return cls(
            input_norm=_weight(layer, "input_layernorm"),
            qkv=joined(projections, eight_bits),
            q_norm=_weight(attention, "q_norm"),
            k_norm=_weight(attention, "k_norm"),
            o=Linear(attention.o_proj.weight, attention.o_proj.bias, eight_bits),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=joined([mlp.gate_proj, mlp.up_proj], eight_bits),
            down=Linear(mlp.down_proj.weight, None, eight_bits),
        )


class DecoderBlock:
    """The arithmetic of a decoder layer. Weights are arguments: what is compiled serves all layers of a model."""

    def __init__(self, heads: int, shape: LayerShape, eps: float, activation: Callable[[Tensor], Tensor], cuda: bool):
        self.heads, self.shape, self.eps, self._activation = heads, shape, eps, activation
        self._compiled = (Compiled(self.before), Compiled(self.after)) if cuda else None

    @property
    def group(self) -> int:
        """Query heads of one key-value head."""
        return self.heads // self.shape.num_key_value_heads

    def __call__(
        self, x: Tensor, weights: LayerWeights, attend: Attend, lasting: bool = False, attending: Tensor | None = None
    ) -> Tensor:
        """The layer's output [B, T, H]. What is `lasting` is worth compiling for. A draft's attention may take other
        rows than x, `attending` [B, T, I]."""
        before, after = self.before, self.after
        if self._compiled and lasting:
            count = x.shape[0] * x.shape[1]
            before, after = self._compiled[0].for_tokens(count), self._compiled[1].for_tokens(count)
        return after(x, attend(before(x if attending is None else attending, weights)), weights)

    def by_kernels(
        self, x: Tensor, normed: Any, weights: LayerWeights, attend: Attend, next_norm: Tensor | None
    ) -> tuple[Tensor, Any]:
        """The same by the kernels for few rows, in which a norm belongs to the product before it.

        `normed` is x after the layer's own norm, as the layer before left it; with the output comes what the next
        layer takes as such, after `next_norm`.
        """
        from hass_core.kernels.few_rows import (  # Triton is there on a GPU only
            Norm,
            added_product,
            added_product_to_norm,
            product,
        )

        attended = attend(self.by_head(product(normed, weights.qkv), weights))
        x, normed = added_product_to_norm(attended, weights.o, x, Norm(weights.mlp_norm, self.eps))
        gated = product(normed, weights.gate_up, gated=True)
        if next_norm is None:
            return added_product(gated, weights.down, x), None
        return added_product_to_norm(gated, weights.down, x, Norm(next_norm, self.eps))

    def before(self, x: Tensor, weights: LayerWeights) -> Tensor:
        """Queries, keys and values [B, T, A + 2·KV, d] of the layer's input [B, T, H]."""
        normed = x if weights.input_norm is None else self.normed(x, weights.input_norm)
        return self.by_head(weights.qkv(normed), weights)

    def after(self, x: Tensor, attended: Tensor, weights: LayerWeights) -> Tensor:
        """The layer's output [B, T, H] from its input and the attended values [B, T, A·d]."""
        x = x + weights.o(attended)
        gate, up = weights.gate_up(self.normed(x, weights.mlp_norm)).chunk(2, dim=-1)
        return x + weights.down(self._activation(gate) * up)

    def by_head(self, qkv: Tensor, weights: LayerWeights) -> Tensor:
        """[B, T, A + 2·KV, d] from the product [B, T, (A + 2·KV)·d], with the norms of queries and keys."""
        kv, dim = self.shape.num_key_value_heads, self.shape.head_dim
        qkv = qkv.unflatten(-1, (-1, dim))
        if weights.q_norm is None or weights.k_norm is None:
            return qkv
        queries, keys, values = qkv.split([self.heads, kv, kv], dim=2)
        return torch.cat([self.normed(queries, weights.q_norm), self.normed(keys, weights.k_norm), values], dim=2)

    def normed(self, x: Tensor, norm: Tensor) -> Tensor:
        """RMSNorm over the last dimension."""
        return F.rms_norm(x, (x.shape[-1],), norm, self.eps)


def few_rows(x: Tensor, rows: int) -> bool:
    """Whether the kernels of `hass_core.kernels.few_rows` serve `rows` rows like x."""
    return rows <= MOST_FEW_ROWS and x.dtype in SIXTEEN_BITS and kernels.usable(x)


def in_eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp8 weights [out, in] and the float32 scale [out] of each row's largest onto fp8's largest."""
    scale = weight.abs().amax(1).float().clamp(min=1e-12) / torch.finfo(EIGHT_BITS).max
    return (weight.float() / scale[:, None]).to(EIGHT_BITS), scale


def restored(rounded: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that `in_eight_bits` stands for."""
    return (rounded.float() * scale[:, None]).to(dtype)


def packable(weight: Tensor) -> bool:
    """Whether this processor has blocked products for the weight's type."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def _weight(module: Any, name: str) -> Tensor | None:
    """The weight of a part that a model may lack, or have as the identity."""
    return getattr(getattr(module, name, None), "weight", None)


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


class RopeTable:
    """Cosines and signed sines by position, from transformers' rotary embedding, so every scaling type is covered."""

    def __init__(self, rotary: nn.Module, device: torch.device, dtype: torch.dtype):
        self._rotary = rotary
        self._like = torch.zeros(1, device=device, dtype=dtype)
        self.fixed = getattr(rotary, "rope_type", "default") not in LENGTH_DEPENDENT
        self._table = self._compute(torch.arange(1, device=device)[None])[0]
        self._outgrown: list[Tensor] = []  # captured graphs still read them

    def at(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors [B, T, 1, d] for positions [B, T]."""
        both = self._table[position_ids] if self.fixed else self._compute(position_ids)
        return both[:, :, :1], both[:, :, 1:]

    def grow(self, positions: int) -> None:
        """Let the table hold at least `positions` positions."""
        if self.fixed and len(self._table) < positions:
            rounded = 1 << math.ceil(math.log2(positions))
            self._outgrown.append(self._table)
            self._table = self._compute(torch.arange(rounded, device=self._like.device)[None])[0]

    def _compute(self, position_ids: Tensor) -> Tensor:
        """[B, T, 2, d]: cosines and signed sines side by side, so that one look-up finds both."""
        cos, sin = self._rotary(self._like, position_ids)
        half = sin.shape[-1] // 2
        return torch.stack([cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)], dim=2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads x [B, T, heads, d] rotated by their positions' cosines and signed sines [B, T, 1, d]."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
