"""Drafting: bring the draft's cache up to date with true features, then grow a tree from there.

The cache's live rows are built from the target's own features and stay. The rows of a tree, built from the draft's
own estimates, stand after them and are overwritten by the next cycle.

Shapes: B batch, R new rows, T rows of one pass, K children and frontier nodes, H hidden, D draft vocabulary, N tree
nodes, C tree rows in the cache.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hass_core import kernels
from hass_core.decoding.draft_runner import DraftRunner, fused_input
from hass_core.decoding.sampler import NO_TOKEN, Proposal, Sampler
from hass_core.decoding.tree import ROOT, Pool, Tree, TreeShape, assemble, best, static_scores
from hass_core.draft_model.checkpoint import Draft
from hass_core.target_model.block import Linear
from hass_core.target_model.compiling import compiled
from hass_core.target_model.kv_cache import FixedShapes, KVCache

Calibration = Mapping[float, tuple[float, float]]
"""By temperature sharpness and width, which tell how far a draft's guesses are to be trusted (`sampler.py`)."""
CALIBRATION = "calibration"  # in the `hass` section of the draft's config: {"0.6": [sharpness, width], …}
# of a draft that does not tell: measured on a HASS draft of 148 M tokens for SmolLM2-135M, levels 1 of 24 answers
USUAL: Calibration = {0.6: (1.4, 2.0), 0.7: (1.6, 2.0), 1.0: (1.1, 1.0)}


class TreeDrafter(Protocol):
    """Whatever proposes a tree: `Drafter` with a draft model, or a rival without one."""

    shape: TreeShape
    capturable: bool  # `extend` and `grow` can go into a CUDA graph
    scratch_slots: int  # cache slots needed after the live rows
    prompt_tokens: int | None  # it reads no more of a prompt than so many tokens at its end
    taps: tuple[int, ...]  # layers after which it reads the target's states, in place of the last one; mostly none

    def new_cache(self, batch_size: int, max_tokens: int) -> Any:
        """What the drafter remembers of the rows; handed back to it in every call."""
        ...

    def start(self, cache: Any, first: Tensor, skipped: Tensor) -> None:
        """Forget the rows; new ones begin with tokens [B] that no `extend` hands over. Before them `skipped` [B] tokens
        of each row are left out."""
        ...

    def extend(
        self, cache: Any, features: Tensor, token_ids: Tensor, counts: Tensor, fixed: FixedShapes | None = None
    ) -> Tensor:
        """Take in true features [B, R, H] with their next tokens [B, R], the first `counts` [B] of each row.

        Returns whatever `grow` starts from, after each row's last live feature.
        """
        ...

    def features_from(self, tapped: Tensor) -> Tensor:
        """The features [..., H] that `extend` takes, from the states [..., n·H] after the layers `taps`, if any."""
        ...

    def grow(
        self, cache: Any, root: Tensor, estimate: Tensor, sampler: Sampler, fixed: FixedShapes | None = None
    ) -> Tree:
        """The tree over root tokens [B], from what `extend` returned, of tokens that `sampler` may draw."""
        ...


class NoDraft:
    """Proposes the root alone, which is plain decoding, and remembers nothing; see `TreeDrafter`."""

    shape = TreeShape(depth=0, top_k=0, nodes=1, static=True)
    capturable = True
    scratch_slots = 1
    prompt_tokens: int | None = None
    taps = ()

    def new_cache(self, batch_size: int, max_tokens: int) -> Any:
        return self

    def start(self, cache: Any, first: Tensor, skipped: Tensor) -> None:
        pass

    def extend(
        self, cache: Any, features: Tensor, token_ids: Tensor, counts: Tensor, fixed: FixedShapes | None = None
    ) -> Tensor:
        return counts

    def features_from(self, tapped: Tensor) -> Tensor:
        return tapped  # never asked: it reads none

    def grow(
        self, cache: Any, root: Tensor, estimate: Tensor, sampler: Sampler, fixed: FixedShapes | None = None
    ) -> Tree:
        alone = torch.zeros_like(root)[:, None]  # not by `chain_of`, whose mask would take launches that nothing needs
        return Tree(
            root[:, None], alone, alone, alone, torch.ones_like(alone, dtype=torch.bool)[:, :, None], alone[:, 1:]
        )


class Children(NamedTuple):
    """The K likeliest next tokens after each of n nodes."""

    scores: Tensor  # [B, n, K] logarithms of the chance to be the one drawn
    token_ids: Tensor  # [B, n, K]


class Frontier(NamedTuple):
    """The K nodes of a level that are drafted from."""

    token_ids: Tensor  # [B, K]
    inputs: Tensor  # [B, K, 2H] the draft's: the nodes' embeddings, and the features estimated before them
    scores: Tensor  # [B, K]
    pool_index: Tensor  # [B, K]
    seen: Tensor  # [B, K, C] tree rows in the cache that the node sees, itself included


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
        self.taps, self.prompt_tokens = draft.model.taps, draft.prompt_tokens
        self._head, self._product = draft.head, Linear(draft.head.weight, None, draft.eight_bits)
        self.shape = shape
        self._by_rank = static_scores(shape.top_k).to(draft.head.weight.device) if shape.static else None
        self.calibration, self.capturable = calibration_of(draft.info), self._runner.rope.fixed
        self.scratch_slots = (shape.depth - 1) * shape.top_k
        cuda = draft.head.weight.is_cuda
        self._begin, self._finish = (compiled(first_frontier), compiled(tree_of)) if cuda else (first_frontier, tree_of)

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        return self._runner.new_cache(batch_size, max_tokens)

    def start(self, cache: KVCache, first: Tensor, skipped: Tensor) -> None:
        cache.clear()
        cache.skipped.copy_(skipped)

    def extend(
        self, cache: KVCache, features: Tensor, token_ids: Tensor, counts: Tensor, fixed: FixedShapes | None = None
    ) -> Tensor:
        """Append rows of true features [B, R, H] with their next tokens [B, R], `counts` [B] of each batch row live.

        Returns the estimated feature [B, H] after each batch row's last live row.
        """
        positions = cache.lengths[:, None] + torch.arange(token_ids.shape[1], device=token_ids.device)
        inputs = self._runner.inputs(token_ids, features)
        outputs = self._runner.forward(inputs, self._runner.rope.at(positions), cache, fixed=fixed)
        cache.lengthen(counts, fixed)
        return last_of(outputs, counts.clamp(min=1))

    def features_from(self, tapped: Tensor) -> Tensor:
        return self._runner.features_from(tapped)

    def grow(
        self, cache: KVCache, root: Tensor, estimate: Tensor, sampler: Sampler, fixed: FixedShapes | None = None
    ) -> Tree:
        """The tree over root tokens [B]; `estimate` [B, H] is the draft's state for the row whose next token is the
        root."""
        shape, runner = self.shape, self._runner
        begin, finish = (self._begin, self._finish) if fixed and fixed.lasting else (first_frontier, tree_of)
        children = partial(self._children, cache.lengths + cache.skipped, sampler)
        first, levels = children(estimate[:, None], 1), []
        rotations = self._rotations(cache)
        features = estimate
        for number in range(shape.depth - 1):
            if number == 0:
                frontier = begin(first, estimate, runner.embedding, self.scratch_slots)
            else:
                frontier = next_frontier(levels[-1], features, runner.embedding, number)
            path = path_of(levels, frontier) if sampler.wants_paths else None
            offset = number * shape.top_k
            features = runner.forward(frontier.inputs, rotations[number], cache, frontier.seen, offset, fixed)
            levels.append(Level(frontier, children(features, number + 2, path)))
        return finish(root, first, levels, shape)

    def _rotations(self, cache: KVCache) -> list[tuple[Tensor, Tensor]]:
        """Of each level that is drafted from, the rotation of its K nodes: all of a level stand at one position."""
        depths = torch.arange(self.shape.depth - 1, device=cache.lengths.device)
        positions = (depths[:, None] + cache.lengths).flatten()[:, None].expand(-1, self.shape.top_k)
        if not self._runner.rope.fixed:  # the positions of one call decide the frequencies
            return [self._runner.rope.at(level) for level in positions.split(cache.batch_size)]
        cos, sin = self._runner.rope.at(positions)
        return list(zip(cos.split(cache.batch_size), sin.split(cache.batch_size), strict=True))

    def _children(
        self, lengths: Tensor, sampler: Sampler, features: Tensor, ahead: int, path: Tensor | None = None
    ) -> Children:
        """The K likeliest draws after features [B, n, H], at positions `ahead` of the roots' [B]; see `path_of`."""
        logits = self._product.of_few_rows(self._runner.read(features))
        calibrated = at_temperature(self.calibration, sampler.temperature)
        top_k, ids = self.shape.top_k, self._head.token_ids
        scores, token_ids = sampler.guess(Proposal(logits, lengths, ahead, top_k, ids, path, calibrated))
        return Children(scores if self._by_rank is None else self._by_rank.expand(scores.shape), token_ids)


def path_of(levels: list[Level], frontier: Frontier) -> Tensor:
    """The tokens [B, K, P] that lead to the nodes of a frontier, themselves included; NO_TOKEN among them."""
    tokens = torch.cat([*(level.frontier.token_ids for level in levels), frontier.token_ids], 1)
    return torch.where(frontier.seen[..., : tokens.shape[1]], tokens[:, None], NO_TOKEN)


def first_frontier(children: Children, estimate: Tensor, embedding: Tensor, tree_rows: int) -> Frontier:
    """All of the root's children [B, 1, K], after the estimated feature [B, H]; C = `tree_rows`."""
    scores, token_ids = children.scores[:, 0], children.token_ids[:, 0]
    batch, top_k = token_ids.shape
    index = torch.arange(top_k, device=token_ids.device).expand(batch, -1)
    seen = index[:, :, None] == torch.arange(tree_rows, device=token_ids.device)
    inputs = fused_input(token_ids, estimate[:, None].expand(-1, top_k, -1), embedding)
    return Frontier(token_ids, inputs, scores, index, seen)


def next_frontier(level: Level, features: Tensor, embedding: Tensor, number: int) -> Frontier:
    """The K best of a level's candidates, as level `number` that is drafted from, the root's children being level 0;
    `features` [B, K, H] were estimated at the frontier before."""
    frontier, children = level
    top_k = frontier.token_ids.shape[1]
    rows_from, candidates_from = number * top_k, top_k + (number - 1) * top_k * top_k
    if kernels.usable(features):
        from hass_core.kernels.frontier import best_candidates  # Triton is there on a GPU only

        scores, seen = frontier.scores, frontier.seen
        return Frontier(*best_candidates(scores, *children, seen, features, embedding, rows_from, candidates_from))
    pool = level.pool
    chosen = best(pool.scores, top_k)
    parent = (chosen // top_k)[:, :, None]
    token_ids = pool.token_ids.gather(1, chosen)
    before = features.gather(1, parent.expand(-1, -1, features.shape[2]))
    rows = torch.arange(frontier.seen.shape[2], device=chosen.device)
    itself = rows_from + torch.arange(top_k, device=chosen.device)[:, None] == rows
    return Frontier(
        token_ids,
        fused_input(token_ids, before, embedding),
        pool.scores.gather(1, chosen),
        candidates_from + chosen,
        frontier.seen.gather(1, parent.expand(-1, -1, frontier.seen.shape[2])) | itself,
    )


def tree_of(root: Tensor, first: Children, levels: list[Level], shape: TreeShape) -> Tree:
    """The tree over root tokens [B] with the best of all that was drafted: the root's children and the levels."""
    roots = Pool(first.token_ids[:, 0], first.scores[:, 0], torch.full_like(first.token_ids[:, 0], ROOT))
    pools = [roots, *(level.pool for level in levels)]
    return assemble(root, Pool(*(torch.cat(part, 1) for part in zip(*pools, strict=True))), shape)


def last_of(rows: Tensor, counts: Tensor) -> Tensor:
    """[B, H]: of each row of [B, L, H] the element before `counts` [B]."""
    return rows.gather(1, (counts - 1)[:, None, None].expand(-1, 1, rows.shape[2]))[:, 0]


def calibration_of(info: Mapping[str, Any]) -> Calibration:
    """Sharpness and width by temperature from the `hass` section of a draft's config."""
    fitted = info.get(CALIBRATION)
    return {float(t): (float(s), float(w)) for t, (s, w) in fitted.items()} if fitted else USUAL


def at_temperature(calibration: Calibration, temperature: float) -> tuple[float, float]:
    """Sharpness and width between the nearest temperatures fitted, those of the last one beyond it."""
    known = sorted(calibration)
    below = max((t for t in known if t <= temperature), default=known[0])
    above = min((t for t in known if t >= temperature), default=known[-1])
    share = 0.0 if above == below else (temperature - below) / (above - below)
    (s0, w0), (s1, w1) = calibration[below], calibration[above]
    return s0 + share * (s1 - s0), w0 + share * (w1 - w0)
