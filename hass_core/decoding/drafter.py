"""Drafting: bring the draft's cache up to date with true features, then grow a tree from there.

The cache's live rows are built from the target's own features and stay. The rows of a tree, built from the draft's
own estimates, stand behind them and are overwritten by the next cycle.

Shapes: B batch, R new rows, K children and frontier nodes, H hidden, D draft vocabulary, N tree nodes, C tree rows in
the cache.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hass_core.decoding.draft_runner import DraftRunner
from hass_core.decoding.prefill import last_of
from hass_core.decoding.top_tokens import top_tokens
from hass_core.decoding.tree import ROOT, Pool, Tree, TreeShape, assemble, best, static_scores
from hass_core.model.checkpoint import Draft
from hass_core.target.compiling import compiled
from hass_core.target.kv_cache import KVCache
from hass_core.target.linear import Linear


class Children(NamedTuple):
    """The K likeliest next tokens behind each of n nodes."""

    scores: Tensor  # [B, n, K] log-probabilities
    token_ids: Tensor  # [B, n, K]


class Frontier(NamedTuple):
    """The K nodes of a level that are drafted from, and where their children go."""

    token_ids: Tensor  # [B, K]
    features: Tensor  # [B, K, H] estimated feature of each node's predecessor
    scores: Tensor  # [B, K]
    pool_index: Tensor  # [B, K]
    seen: Tensor  # [B, K, C] tree rows in the cache that the node sees, itself included
    children_from: Tensor  # [] pool index of the first child
    rows_from: Tensor  # [] tree row of the first child that is drafted from


class Level(NamedTuple):
    """A frontier and what was drafted from it."""

    frontier: Frontier
    children: Children

    @property
    def pool(self) -> Pool:
        """The level as candidates [B, K²]."""
        scores = (self.frontier.scores[:, :, None] + self.children.scores).flatten(1)
        parents = self.frontier.pool_index[:, :, None].expand_as(self.children.token_ids).flatten(1)
        return Pool(self.children.token_ids.flatten(1), scores, parents)


class Drafter:
    """A draft model as the tree builder. Drafters of one model can share a runner, and with it what was compiled."""

    def __init__(self, draft: Draft, shape: TreeShape, runner: DraftRunner | None = None):
        self._runner = runner or DraftRunner(draft.model, draft.eight_bits)
        self._head, self._product = draft.head, Linear(draft.head.weight, None, draft.eight_bits)
        self.shape = shape
        self._by_rank = static_scores(shape.top_k).to(draft.head.weight.device) if shape.static else None
        self.capturable = self._runner.rope.fixed
        self.scratch_slots = (shape.depth - 1) * shape.top_k
        self._steps = first_frontier, next_frontier, tree_of
        steady = compiled(first_frontier), compiled(next_frontier), compiled(tree_of)
        self._steady_steps = steady if draft.head.weight.is_cuda else self._steps

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        return self._runner.new_cache(batch_size, max_tokens)

    def clear(self, cache: KVCache) -> None:
        cache.clear()
        cache.width, cache.steady = None, False

    def extend(self, cache: KVCache, features: Tensor, token_ids: Tensor, counts: Tensor) -> Tensor:
        """Append rows of true features [B, R, H] with their next tokens [B, R], `counts` [B] of each batch row live.

        Returns the estimated feature [B, H] behind each batch row's last live row.
        """
        positions = cache.lengths[:, None] + torch.arange(token_ids.shape[1], device=token_ids.device)
        outputs = self._runner.forward(token_ids, features, positions, cache)
        cache.lengthen(counts)
        return last_of(outputs, counts.clamp(min=1))

    def grow(self, cache: KVCache, root: Tensor, estimate: Tensor) -> Tree:
        """The tree over root tokens [B], whose predecessor's estimated feature behind the root is `estimate` [B, H]."""
        shape = self.shape
        begin, deepen, finish = self._steady_steps if cache.steady else self._steps
        first, levels = self._children(estimate[:, None]), []
        features = estimate
        for number in range(1, shape.depth):
            frontier = deepen(levels[-1], features) if levels else begin(first, estimate, self.scratch_slots)
            positions = (cache.lengths + (number - 1))[:, None].expand_as(frontier.token_ids)
            offset = (number - 1) * shape.top_k
            features = self._runner.forward(
                frontier.token_ids, frontier.features, positions, cache, frontier.seen, offset
            )
            levels.append(Level(frontier, self._children(features)))
        return finish(root, first, levels, shape)

    def _children(self, features: Tensor) -> Children:
        """The K likeliest next tokens behind features [B, n, H]."""
        scores, index = top_tokens(self._product.of_few_rows(features), self.shape.top_k)
        own = scores.clamp(max=0) if self._by_rank is None else self._by_rank.expand(scores.shape)
        return Children(own, self._head.to_target_ids(index))


def first_frontier(children: Children, estimate: Tensor, tree_rows: int) -> Frontier:
    """All of the root's children [B, 1, K], behind the estimated feature [B, H]; C = `tree_rows`."""
    scores, token_ids = children.scores[:, 0], children.token_ids[:, 0]
    batch, top_k = token_ids.shape
    index = torch.arange(top_k, device=token_ids.device).expand(batch, -1)
    seen = index[:, :, None] == torch.arange(tree_rows, device=token_ids.device)
    after = torch.full((), top_k, device=token_ids.device)
    return Frontier(token_ids, estimate[:, None].expand(-1, top_k, -1), scores, index, seen, after, after)


def next_frontier(level: Level, features: Tensor) -> Frontier:
    """The K best of a level's candidates; `features` [B, K, H] were estimated at its frontier."""
    frontier, pool = level.frontier, level.pool
    top_k = frontier.token_ids.shape[1]
    chosen = best(pool.scores, top_k)
    parent = (chosen // top_k)[:, :, None]
    rows = torch.arange(frontier.seen.shape[2], device=chosen.device)
    itself = frontier.rows_from + torch.arange(top_k, device=chosen.device)[:, None] == rows
    return Frontier(
        pool.token_ids.gather(1, chosen),
        features.gather(1, parent.expand(-1, -1, features.shape[2])),
        pool.scores.gather(1, chosen),
        frontier.children_from + chosen,
        frontier.seen.gather(1, parent.expand(-1, -1, frontier.seen.shape[2])) | itself,
        frontier.children_from + top_k * top_k,
        frontier.rows_from + top_k,
    )


def tree_of(root: Tensor, first: Children, levels: list[Level], shape: TreeShape) -> Tree:
    """The tree over root tokens [B] with the best of all that was drafted: the root's children and the levels."""
    roots = Pool(first.token_ids[:, 0], first.scores[:, 0], torch.full_like(first.token_ids[:, 0], ROOT))
    pools = [roots, *(level.pool for level in levels)]
    return assemble(root, Pool(*(torch.cat(part, 1) for part in zip(*pools, strict=True))), shape)
