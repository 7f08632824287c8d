"""Drafting: bring the draft's cache up to date with true features, then grow a tree from there.

The cache's live rows are built from the target's own features and stay. The rows of a tree, built from the draft's
own estimates, stand behind them and are overwritten by the next cycle.

Shapes: B batch, R new rows, K children and frontier nodes, H hidden, D draft vocabulary, N tree nodes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hass_core.decoding.draft_runner import DraftRunner
from hass_core.decoding.prefill import last_of
from hass_core.decoding.tree import ROOT, Pool, Tree, TreeShape, assemble, attention_mask, best, static_scores
from hass_core.model.checkpoint import Draft
from hass_core.target.kv_cache import KVCache
from hass_core.target.placement import Placement


@dataclass(frozen=True)
class Frontier:
    """The K nodes of a level that are drafted from."""

    token_ids: Tensor  # [B, K]
    features: Tensor  # [B, K, H] estimated feature of each node's predecessor
    scores: Tensor  # [B, K]
    pool_index: Tensor  # [B, K]
    seen: Tensor  # [B, K, C] tree rows in the cache that the node sees, itself included


class Drafter:
    """A draft model as the tree builder."""

    def __init__(self, draft: Draft, shape: TreeShape):
        self._runner, self._head, self.shape = DraftRunner(draft), draft.head, shape
        self._by_rank = static_scores(shape.top_k).to(draft.head.weight.device) if shape.static else None
        self.capturable = self._runner.rope.fixed
        self.scratch_slots = (shape.depth - 1) * shape.top_k

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        return self._runner.new_cache(batch_size, max_tokens)

    def clear(self, cache: KVCache) -> None:
        cache.clear()
        cache.width = None

    def extend(self, cache: KVCache, features: Tensor, token_ids: Tensor, counts: Tensor) -> Tensor:
        """Append rows of true features [B, R, H] with their next tokens [B, R], `counts` [B] of each batch row live.

        Returns the estimated feature [B, H] behind each batch row's last live row.
        """
        rows = token_ids.shape[1]
        positions = cache.lengths[:, None] + torch.arange(rows, device=token_ids.device)
        place = Placement.of(rows, cache, None, self._runner.group, self._runner.dtype)
        outputs = self._runner.forward(token_ids, features, positions, cache, place)
        cache.lengthen(counts)
        return last_of(outputs, counts.clamp(min=1))

    def grow(self, cache: KVCache, root: Tensor, estimate: Tensor) -> Tree:
        """The tree over root tokens [B], whose predecessor's estimated feature behind the root is `estimate` [B, H]."""
        shape, top_k = self.shape, self.shape.top_k
        scores, token_ids = self._children(estimate[:, None])
        levels = [(token_ids[:, 0], scores[:, 0], torch.full_like(token_ids[:, 0], ROOT))]
        frontier = self._first_frontier(token_ids[:, 0], scores[:, 0], estimate)
        for level in range(1, shape.depth):
            features = self._expand(cache, frontier, level)
            scores, token_ids = self._children(features)
            scores = (frontier.scores[:, :, None] + scores).flatten(1)
            levels.append((token_ids.flatten(1), scores, frontier.pool_index.repeat_interleave(top_k, 1)))
            if level + 1 < shape.depth:
                frontier = self._next_frontier(frontier, token_ids.flatten(1), scores, features, level)
        return assemble(root, Pool(*(torch.cat(part, 1) for part in zip(*levels, strict=True))), shape)

    def _children(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and target token ids [B, n, K] of the K likeliest next tokens behind features [B, n, H]."""
        logits = self._runner.logits(features)
        top, index = logits.topk(self.shape.top_k, dim=-1)
        token_ids = self._head.to_target_ids(index)
        if self._by_rank is not None:
            return self._by_rank.expand(top.shape), token_ids
        return (top.float() - logits.float().logsumexp(-1, keepdim=True)).clamp_(max=0), token_ids

    def _first_frontier(self, token_ids: Tensor, scores: Tensor, estimate: Tensor) -> Frontier:
        batch, top_k = token_ids.shape
        index = torch.arange(top_k, device=token_ids.device).expand(batch, -1)
        itself = torch.eye(top_k, dtype=torch.bool, device=token_ids.device).expand(batch, -1, -1)
        return Frontier(token_ids, estimate[:, None].expand(-1, top_k, -1), scores, index, itself)

    def _next_frontier(
        self, frontier: Frontier, token_ids: Tensor, scores: Tensor, features: Tensor, level: int
    ) -> Frontier:
        """The K best of the K² candidates just drafted [B, K²]."""
        top_k = self.shape.top_k
        chosen = best(scores, top_k)
        parent = (chosen // top_k)[:, :, None]
        itself = torch.eye(top_k, dtype=torch.bool, device=chosen.device).expand(len(chosen), -1, -1)
        return Frontier(
            token_ids.gather(1, chosen),
            features.gather(1, parent.expand(-1, -1, features.shape[2])),
            scores.gather(1, chosen),
            chosen + (top_k + (level - 1) * top_k * top_k),
            torch.cat([frontier.seen.gather(1, parent.expand(-1, -1, frontier.seen.shape[2])), itself], 2),
        )

    def _expand(self, cache: KVCache, frontier: Frontier, level: int) -> Tensor:
        """Run the frontier nodes of `level`, behind the tree rows of the levels before: features [B, K, H]."""
        offset = (level - 1) * self.shape.top_k
        mask = attention_mask(frontier.seen, cache.lengths, cache.reach(offset + self.shape.top_k))
        place = Placement.of(self.shape.top_k, cache, mask, self._runner.group, self._runner.dtype, offset)
        positions = (cache.lengths + (level - 1))[:, None].expand_as(frontier.token_ids)
        return self._runner.forward(frontier.token_ids, frontier.features, positions, cache, place)
