"""Which drafted nodes stand.

The acceptance rule. At every node of the tree the target's processed distribution p over the next token is known.
Draw one token from p at every node. Start at the root. While the token drawn at the current node equals the token of
one of its children, that child is accepted and becomes the current node. The token drawn at the last node is the new
root. Greedy decoding is the same with p a point mass.

Why it is lossless: each emitted token is a draw from p at its own exact prefix. Siblings carry distinct tokens, and
the tree does not depend on the draws. It equals rejection sampling child after child (accept c with probability p(c),
else set p(c) to 0 and renormalise; Leviathan et al. arXiv 2211.17192 for a deterministic draft, SpecInfer arXiv
2305.09781 for trees): walking through the children splits the very interval that one inverted coin falls into, so
accepted, residual and bonus tokens all come from the one processed distribution.

Shapes: B batch, N nodes, R places of a path (`TreeShape.places`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hass_core.decoding.tree import Tree, best


class Accepted(NamedTuple):
    """The outcome per row. Places of a path past its count are unspecified nodes."""

    path: Tensor  # [B, R] node numbers from the root down, increasing
    counts: Tensor  # [B] nodes on the path, root included: 1 + accepted drafts
    token_ids: Tensor  # [B, R] the tokens this cycle emits: the accepted ones, then the new root

    def all_on_path(self, flags: Tensor) -> Tensor:
        """[B]: whether the flag [B, N] is set at every node of the path."""
        past = torch.arange(self.path.shape[1], device=flags.device) >= self.counts[:, None]
        return (flags.gather(1, self.path) | past).all(1)


def accept(tree: Tree, drawn: Tensor, places: int) -> Accepted:
    """Follow the drawn tokens [B, N] through the tree."""
    matched = tree.token_ids == drawn.gather(1, tree.parents)
    matched[:, 0] = True
    standing = (matched[:, None] | ~tree.visible).all(-1)
    # breadth-first numbering: standing nodes in order of number are the path from the root
    path = best(standing.float(), places)
    return Accepted(path, standing.sum(-1), drawn.gather(1, path))
