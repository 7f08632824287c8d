"""Speculative sampling with a small language model (SPS; Leviathan et al. arXiv 2211.17192, Chen et al. 2302.01318).

The small model draws a chain of tokens, verified as `rejection.py` says. Greedy decoding is the same with p and q point
masses.
"""

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from hass_core.config import TreeConfig
from hass_core.decoding.decoder import TreeDecoder
from hass_core.decoding.drafter import NoDraft, last_of
from hass_core.decoding.rivals.rejection import RejectionSampler
from hass_core.decoding.sampler import Proposal, Sampler
from hass_core.decoding.tree import Tree, TreeShape, chain_of
from hass_core.errors import TargetError
from hass_core.target_model.kv_cache import FixedShapes, KVCache
from hass_core.target_model.loader import Target
from hass_core.target_model.runner import Runner

DRAFT_TOKENS = 4
SHARE_OF_LAYERS = 8  # the target's first eighth of layers drafts when no small model is given


class SpeculativeSamplingDecoder(TreeDecoder):
    """See `hass_core.decoding.decoder.Decoder`."""

    def __init__(self, runner: Runner, small: Runner, draft_tokens: int = DRAFT_TOKENS):
        super().__init__(runner, SmallModelDrafter(small, draft_tokens), name="sps", sampler=RejectionSampler)


class SmallModelDrafter(NoDraft):
    """A chain drawn from another language model, whose cache holds all certain tokens; see
    `hass_core.decoding.drafter.TreeDrafter`."""

    capturable = False

    def __init__(self, small: Runner, draft_tokens: int):
        self._small = small
        self.shape = TreeShape.of(TreeConfig(kind="chain", depth=draft_tokens, top_k=1), small.vocab_size)
        self.scratch_slots = draft_tokens

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        return self._small.new_cache(batch_size, max_tokens)

    def start(self, cache: KVCache, first: Tensor, skipped: Tensor) -> None:
        cache.clear()
        self._read(cache, first[:, None])
        cache.lengthen(torch.ones_like(first))

    def extend(
        self, cache: KVCache, features: Tensor, token_ids: Tensor, counts: Tensor, fixed: FixedShapes | None = None
    ) -> Tensor:
        """Read the tokens [B, R] just made certain; the small model's own features [B, H] after the last of them."""
        read = self._read(cache, token_ids)
        cache.lengthen(counts)
        return last_of(read, counts.clamp(min=1))

    def grow(
        self, cache: KVCache, root: Tensor, estimate: Tensor, sampler: Sampler, fixed: FixedShapes | None = None
    ) -> Tree:
        """A chain after root tokens [B], the last ones that the cache holds."""
        certain, features = cache.lengths.clone(), estimate[:, None]
        drafted = root.new_empty(len(root), 0)
        for ahead in range(1, self.shape.depth + 1):
            proposal = Proposal(self._small.logits(features), certain - 1, ahead, k=1, path=drafted[:, None])
            drafted = torch.cat([drafted, sampler.guess(proposal)[1][:, 0]], 1)
            if ahead < self.shape.depth:
                features = self._read(cache, drafted[:, -1:])
                cache.lengthen(torch.ones_like(certain))
        cache.lengthen(certain - cache.lengths)
        return chain_of(root, drafted)

    def _read(self, cache: KVCache, token_ids: Tensor) -> Tensor:
        """Features [B, T, H] of tokens [B, T] after the live ones."""
        positions = cache.lengths[:, None] + torch.arange(token_ids.shape[1], device=token_ids.device)
        return self._small.forward(token_ids, positions.clamp(max=self._small.context_tokens - 1), cache)


def first_layers(target: Target) -> Target:
    """The target cut down to its first eighth of layers, with its own final norm and head; no weight is copied.

    Raises TargetError for a model that does not keep its layers in one list.
    """
    layers = getattr(cast(Any, target.model.base_model), "layers", None)
    if layers is None:
        raise TargetError(
            f"{target.name} does not keep its layers in one list, so its first ones cannot draft; "
            "name a small model as sps=DIR"
        )
    count = max(1, len(layers) // SHARE_OF_LAYERS)
    weights = {id(tensor): tensor for tensor in (*target.model.parameters(), *target.model.buffers())}
    small = cast(Any, copy.deepcopy(target.model, weights))  # the memo makes the copy share every tensor
    small.base_model.layers = small.base_model.layers[:count]
    small.config.num_hidden_layers = count
    return replace(target, name=f"{target.name}, first {count} layers", model=small)
