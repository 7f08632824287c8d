"""Speculative decoding with a trained draft: HASS and EAGLE-2 (dynamic tree), EAGLE (static tree), or a chain.

Sampling settings, seed and stop rule being equal, the tokens are those of plain decoding.
"""

from dataclasses import replace

from hass_core.config import TreeConfig
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.tree import TreeShape
from hass_core.decoding.tree_decoder import TreeDecoder
from hass_core.draft_model.checkpoint import Draft
from hass_core.errors import DraftMismatch
from hass_core.target_model.runner import Runner


class SpeculativeDecoder(TreeDecoder):
    """See `hass_core.decoding.generation.Decoder`. Raises DraftMismatch when draft and target differ in size."""

    def __init__(self, runner: Runner, draft: Draft, tree: TreeConfig, name: str = "hass"):
        _check_sizes(runner, draft)
        draft = replace(draft.narrowed(tree.vocabulary), eight_bits=tree.eight_bits)
        super().__init__(runner, Drafter(draft, TreeShape.of(tree, draft.head.size)), name)


def _check_sizes(runner: Runner, draft: Draft) -> None:
    architecture = draft.model.architecture
    for name, ours in (("hidden_size", architecture.hidden_size), ("vocab_size", architecture.vocab_size)):
        theirs = getattr(runner, name)
        if ours != theirs:
            raise DraftMismatch(
                f"the draft has {name} {ours}, the target has {theirs}; use the target it was trained for"
            )
