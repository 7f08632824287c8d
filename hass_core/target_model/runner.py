"""Run a target's transformer over a KV cache and get its features, the hidden states that its head takes.

`make_runner` picks the runner: `FusedRunner` for the Llama family, `HFRunner` for any other causal language model.

Shapes: B batch, T new tokens, H hidden, V vocabulary.
"""

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hass_core.errors import TargetError
from hass_core.target_model.block import Attend, DecoderBlock, LayerShape, LayerWeights, Linear, RopeTable, few_rows
from hass_core.target_model.generic import HFRunner
from hass_core.target_model.kv_cache import FixedShapes, KVCache, attention_of
from hass_core.target_model.loader import Target
from hass_core.target_model.taps import Taps

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class Runner(Protocol):
    """What a decoder needs of a target. B batch, T new tokens, H hidden, V vocabulary."""

    hidden_size: int
    vocab_size: int
    context_tokens: int
    device: torch.device
    dtype: torch.dtype
    capturable: bool  # a pass of fixed shapes can go into a CUDA graph

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        """An empty cache for rows of up to `max_tokens` tokens."""
        ...

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        cache: KVCache,
        visible: Tensor | None = None,
        fixed: FixedShapes | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Features after the final norm [B, T, H] of new tokens [B, T] at `position_ids` [B, T].

        Their keys and values go into the slots after each row's live length, which stays as it is: `cache.advance`
        makes them live. Each token sees its row's live slots, and of the new tokens those up to itself or those that
        the tree attention mask `visible` [B, T, T] says. With `fixed`, nothing depends on what the host knows of the
        lengths. `taps` see the states [B, T, H] after their layers.
        """
        ...

    def logits(self, features: Tensor) -> Tensor:
        """[..., V] from features [..., H]."""
        ...


class FusedRunner:
    """The lean pass over a Llama, Mistral, Qwen2 or Qwen3 model: embedding, decoder blocks, final norm."""

    def __init__(self, target: Target):
        model, config = target.model, target.model.config
        self.device, self.dtype = target.device, target.dtype
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.context_tokens = target.context_tokens
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape, cuda = LayerShape(config.num_key_value_heads, head_dim), self.device.type == "cuda"
        self.block = DecoderBlock(heads, shape, config.rms_norm_eps, F.silu, cuda)
        decoder = cast(Any, model).model
        self.embedding, self._head = target.embedding, Linear(target.head)
        self.layers = [LayerWeights.of(layer) for layer in decoder.layers]
        self.final_norm = decoder.norm.weight
        self.rope = RopeTable(decoder.rotary_emb, self.device, self.dtype)
        self.capturable = self.rope.fixed

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
        shapes = [self.block.shape] * len(self.layers)
        return KVCache.allocate(shapes, batch_size, max_tokens, self.device, self.dtype)

    def logits(self, features: Tensor) -> Tensor:
        return self._head.of_few_rows(features)

    @torch.no_grad()
    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        cache: KVCache,
        visible: Tensor | None = None,
        fixed: FixedShapes | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        attention = attention_of(token_ids.shape[1], cache, self.block.group, self.dtype, visible, fixed=fixed)
        cos, sin = self.rope.at(position_ids)
        attends = [lambda qkv, layer=layer: attention(qkv, cos, sin, *layer) for layer in cache.layers]
        x, lasting = F.embedding(token_ids, self.embedding), fixed is not None and fixed.lasting
        if lasting and few_rows(self.embedding, token_ids.numel()):
            x = self._by_kernels(x, attends, taps)
        else:
            for number, (weights, attend) in enumerate(zip(self.layers, attends, strict=True), 1):
                x = self.block(x, weights, attend, lasting)
                if taps:
                    taps.see(number, x)
        return self.block.normed(x, self.final_norm)

    def _by_kernels(self, x: Tensor, attends: list[Attend], taps: Taps | None) -> Tensor:
        """The last layer's output by the kernels for few rows."""
        norms = [cast(Tensor, weights.input_norm) for weights in self.layers] + [self.final_norm]
        normed = self.block.normed(x, norms[0])
        layers = zip(self.layers, attends, norms[1:], strict=True)
        for number, (weights, attend, next_norm) in enumerate(layers, 1):
            x, normed = self.block.by_kernels(x, normed, weights, attend, next_norm)
            if taps:
                taps.see(number, x)
        return x


def make_runner(target: Target) -> Runner:
    """The fastest runner that computes this target exactly. Raises TargetError for one on several GPUs."""
    if target.is_spread:
        raise TargetError(
            f"the target {target.name} lies on several GPUs, which gives features only: load it on one to decode, or "
            'have a server answer (responses.engine="openai")'
        )
    return FusedRunner(target) if FusedRunner.supports(target.model) else HFRunner(target)
