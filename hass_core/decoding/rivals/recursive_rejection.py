"""Recursive rejection sampling over candidates drawn without replacement (RSD; Jeon et al. arXiv 2402.14160): a HASS
draft's tree, verified as `rejection.py` says. Its shape is fixed by rank, since a tree pruned by confidence is biased.
"""

from dataclasses import replace

import torch

from hass_core.config import TreeConfig
from hass_core.decoding.decoder import TreeDecoder
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.rivals.rejection import RejectionSampler
from hass_core.decoding.tree import TreeShape
from hass_core.draft_model.checkpoint import Draft
from hass_core.target_model.runner import Runner

SHARES = (0.564, 0.131, 0.055, 0.043, 0.018, 0.017, 0.016, 0.015)
"""How often the candidate of a rank is accepted at T = 1, further ones like the last: the shape of the tree."""


class RecursiveRejectionDecoder(TreeDecoder):
    """See `hass_core.decoding.decoder.Decoder`."""

    def __init__(self, runner: Runner, draft: Draft, tree: TreeConfig):
        shape = replace(TreeShape.of(tree, draft.head.size), static=True)
        super().__init__(runner, RankedDrafter(draft.set_by(tree), shape), name="rsd", sampler=RejectionSampler)


class RankedDrafter(Drafter):
    """Its tree's shape follows `SHARES`."""

    def __init__(self, draft: Draft, shape: TreeShape):
        super().__init__(draft, shape)
        shares = torch.tensor([SHARES[min(rank, len(SHARES) - 1)] for rank in range(shape.top_k)])
        self._by_rank = shares.log().to(draft.head.weight.device)
