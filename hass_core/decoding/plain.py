"""Plain decoding: one token a forward pass. The yardstick of speed and of exactness.

It is tree decoding with a tree of one node, the root: the same memory, graphs, draws and stop rules.
"""

import torch
from torch import Tensor

from hass_core.decoding.tree import Tree, TreeShape
from hass_core.decoding.tree_decoder import TreeDecoder
from hass_core.target_model.runner import Runner


class PlainDecoder(TreeDecoder):
    """See `hass_core.decoding.generation.Decoder`."""

    def __init__(self, runner: Runner):
        super().__init__(runner, NoDraft(), name="plain")


class NoDraft:
    """Proposes the root alone; see `hass_core.decoding.session.TreeDrafter`."""

    shape = TreeShape(depth=0, top_k=0, nodes=1, static=True)
    capturable = True
    scratch_slots = 1

    def new_cache(self, batch_size: int, max_tokens: int) -> "NoDraft":
        return self

    def clear(self, cache: "NoDraft") -> None:
        pass

    def extend(self, cache: "NoDraft", features: Tensor, token_ids: Tensor, counts: Tensor) -> Tensor:
        return counts

    def grow(self, cache: "NoDraft", root: Tensor, estimate: Tensor) -> Tree:
        alone = torch.zeros_like(root)[:, None]
        return Tree(
            root[:, None], alone, alone, alone, torch.ones_like(alone, dtype=torch.bool)[:, :, None], alone[:, 1:]
        )
