"""Prompt lookup decoding (PLD): the draft is what followed the last few tokens where they stood before.

The longest suffix of at most three tokens that occurs earlier in prompt or answer is found, latest occurrence first;
the tokens after it are verified as a chain. It costs no model, and pays where answers quote their prompts.
The chain always has the same length: without a match it repeats the root, which costs what any chain costs.
"""

import torch
from torch import Tensor

from hass_core.config import TreeConfig
from hass_core.decoding.decoder import TreeDecoder
from hass_core.decoding.drafter import NoDraft
from hass_core.decoding.sampler import Sampler
from hass_core.decoding.tree import Tree, TreeShape, chain_of
from hass_core.target_model.kv_cache import FixedShapes
from hass_core.target_model.runner import Runner

LONGEST_MATCH = 3
DRAFT_TOKENS = 10


class PromptLookupDecoder(TreeDecoder):
    """See `hass_core.decoding.decoder.Decoder`."""

    def __init__(self, runner: Runner):
        super().__init__(runner, LookupDrafter(), name="pld")


Contexts = list[list[int]]
"""What stands for the draft's cache: each row's tokens so far, without the prompt's first."""


class LookupDrafter(NoDraft):
    """See `hass_core.decoding.drafter.TreeDrafter`."""

    shape = TreeShape.of(TreeConfig(kind="chain", depth=DRAFT_TOKENS, top_k=1), 1)
    capturable, scratch_slots = False, 0

    def new_cache(self, batch_size: int, max_tokens: int) -> Contexts:
        return [[] for _ in range(batch_size)]

    def start(self, cache: Contexts, first: Tensor, skipped: Tensor) -> None:
        for context in cache:
            context.clear()

    def extend(
        self, cache: Contexts, features: Tensor, token_ids: Tensor, counts: Tensor, fixed: FixedShapes | None = None
    ) -> Tensor:
        """Remember the tokens [B, R] just made certain; there is no feature to estimate."""
        for context, new, count in zip(cache, token_ids.tolist(), counts.tolist(), strict=True):
            context += new[:count]
        return features[:, 0]

    def grow(
        self, cache: Contexts, root: Tensor, estimate: Tensor, sampler: Sampler, fixed: FixedShapes | None = None
    ) -> Tree:
        """A chain after root tokens [B]."""
        depth = self.shape.depth
        drafted = [lookup(context, depth) for context in cache]
        rows = [draft + [last] * (depth - len(draft)) for draft, last in zip(drafted, root.tolist(), strict=True)]
        return chain_of(root, torch.tensor(rows, device=root.device))


def lookup(context: list[int], count: int) -> list[int]:
    """Up to `count` tokens that followed the latest earlier occurrence of the context's longest repeated suffix."""
    for size in range(min(LONGEST_MATCH, len(context) - 1), 0, -1):
        suffix = context[-size:]
        for start in range(len(context) - size - 1, -1, -1):
            if context[start : start + size] == suffix:
                return context[start + size : start + size + count]
    return []
