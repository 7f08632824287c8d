"""Drafts of every quality for tiny random targets."""

import random

import pytest
import torch

from hass_core.decoding.answers import StopRule
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.sampler import Sampler
from hass_core.decoding.tree import ROOT, Pool, Tree, TreeShape, assemble, pool_size
from hass_core.draft_model.checkpoint import Draft
from hass_core.draft_model.family import Family, draft_architecture
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.target_model.kv_cache import FixedShapes, KVCache
from hass_core.target_model.loader import Target

ENDLESS = StopRule()


def random_draft(
    target: Target, seed: int = 0, token_ids: torch.Tensor | None = None, family: Family = "target"
) -> Draft:
    """A draft with random weights, with the full vocabulary or a trimmed one."""
    torch.manual_seed(seed)
    model = DraftModel(draft_architecture(target.model.config, family), target.embedding)
    model.to(target.dtype).eval().requires_grad_(False)
    return Draft(model, DraftHead.from_target(target.head, token_ids), {})


def worst_draft(target: Target) -> Draft:
    """Proposes what the random draft thinks least likely."""
    draft = random_draft(target)
    return Draft(draft.model, DraftHead(-target.head), {})


class OracleDrafter(Drafter):
    """Grows random trees that hold the known continuation of each row with probability `luck` a level, at any rank."""

    def __init__(self, draft: Draft, shape: TreeShape, prompts: list[list[int]], answers: list[list[int]], luck: float):
        super().__init__(draft, shape)
        self._sequences = [p + a for p, a in zip(prompts, answers, strict=True)]
        self._vocab, self._luck, self._random = draft.head.size, luck, random.Random(0)

    def grow(
        self,
        cache: KVCache,
        root: torch.Tensor,
        estimate: torch.Tensor,
        sampler: Sampler,
        fixed: FixedShapes | None = None,
    ) -> Tree:
        pairs = zip(self._sequences, cache.lengths.tolist(), strict=True)
        rows = [self._pool(sequence[length + 1 :]) for sequence, length in pairs]
        tokens, scores, parents = (torch.tensor(part) for part in zip(*rows, strict=True))
        return assemble(root, Pool(tokens, scores, parents), self.shape)

    def _pool(self, future: list[int]) -> tuple[list[int], list[float], list[int]]:
        k, draw = self.shape.top_k, self._random
        tokens, scores, parents = [], [], []
        frontier, right = [ROOT], ROOT  # pool index of the node on the true path, None once it is lost
        for level in range(self.shape.depth):
            following = None
            for node in frontier:
                children = draw.sample(range(self._vocab), k)
                if node == right and level < len(future) and draw.random() < self._luck:
                    place = draw.randrange(k)
                    children = [c for c in children if c != future[level]]
                    children = [*children[:place], future[level], *children[place:]][:k]
                    following = len(tokens) + children.index(future[level])
                base = 0.0 if node == ROOT else scores[node]
                steps = sorted(draw.random() for _ in range(k))
                for child, step in zip(children, steps, strict=True):
                    tokens.append(child)
                    scores.append(base - (0.0 if len(tokens) - 1 == following else step))
                    parents.append(node)
            level_nodes = list(range(len(tokens) - k * len(frontier), len(tokens)))
            others = [n for n in draw.sample(level_nodes, k) if n != following]
            frontier = sorted([following, *others][:k]) if following is not None else sorted(others[:k])
            right = following
        assert len(tokens) == pool_size(self.shape.depth, k)
        return tokens, scores, parents


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in (7, 23, 12, 1)]
