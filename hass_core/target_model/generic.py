"""Run any causal language model of transformers over our static cache, by way of its own forward pass.

Slower than `FusedRunner`, but it asks nothing of the model except keys and values per layer and a 4-D attention mask.
A sliding window becomes part of the mask: given one of four dimensions, a model applies none of its own.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hass_core.target_model.kv_cache import FixedShapes, KVCache, additive, cache_mask, tree_attention_mask
from hass_core.target_model.loader import Target
from hass_core.target_model.soundness import FULL, SLIDING, check_model
from hass_core.target_model.taps import Taps, listening


class HFRunner:
    """See `hass_core.target_model.runner.Runner`."""

    def __init__(self, target: Target):
        self._model = target.model
        self._body = cast(nn.Module, target.model.base_model)
        self._head = cast(nn.Module, target.model.get_output_embeddings())
        self.device, self.dtype = target.device, target.dtype
        self.vocab_size, self.hidden_size = target.embedding.shape
        self.context_tokens = target.context_tokens
        self.capturable = False  # who knows what a model's own code asks of the host
        config = target.model.config.get_text_config()
        self._window: int | None = getattr(config, "sliding_window", None)
        self._kinds = set(getattr(config, "layer_types", None) or ())
        self._shapes = check_model(target.model, target.name)

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        return KVCache.allocate(self._shapes, batch_size, max_tokens, self.device, self.dtype)

    def logits(self, features: Tensor) -> Tensor:
        return self._head(features)

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
        slots = cache.lengths[:, None] + torch.arange(token_ids.shape[1], device=self.device)
        width = cache.width(token_ids.shape[1], fixed)
        mask = cache_mask(slots, width) if visible is None else tree_attention_mask(visible, cache.lengths, width)
        with listening(self._model, len(self._shapes), taps, self.device):
            out = self._body(
                input_ids=token_ids,
                position_ids=position_ids,
                attention_mask=self._masks(mask, position_ids, slots),
                past_key_values=SlotCache(cache, slots, mask.shape[-1]),
                use_cache=True,
            )
        return out.last_hidden_state

    def _masks(self, mask: Tensor, position_ids: Tensor, slots: Tensor) -> Tensor | dict[str, Tensor]:
        """The additive mask, or one for each kind of layer."""
        if self._window is None or self._kinds == {FULL}:
            return additive(mask, self.dtype)
        near = additive(mask & within_window(position_ids, slots, mask.shape[-1], self._window), self.dtype)
        return {FULL: additive(mask, self.dtype), SLIDING: near} if self._kinds else near


def within_window(position_ids: Tensor, slots: Tensor, width: int, window: int) -> Tensor:
    """[B, 1, T, width]: slots whose token is less than `window` positions before the query at `position_ids` [B, T].

    A live slot's position is its number; the new tokens' slots [B, T] hold their own.
    """
    batch = torch.arange(len(slots), device=slots.device)[:, None]
    positions = torch.arange(max(width, int(slots.max()) + 1), device=slots.device).repeat(len(slots), 1)
    positions[batch, slots] = position_ids
    return (position_ids[:, :, None] - positions[:, None, :width] < window)[:, None]


class SlotCache(Cache):
    """Lets a model of transformers write into our cache at given slots and see its first `width` slots."""

    def __init__(self, cache: KVCache, slots: Tensor, width: int):
        super().__init__(layers=[])
        self._stored, self._slots, self._width = cache, slots, width
        self._batch = torch.arange(slots.shape[0], device=slots.device)[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        stored = self._stored.layers[layer_idx]
        for index, new in enumerate((key_states, value_states)):
            stored[index].transpose(1, 2)[self._batch, self._slots] = new.transpose(1, 2)
        return stored[0][:, :, : self._width], stored[1][:, :, : self._width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._stored.longest
