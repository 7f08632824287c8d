"""What the host learns of a cycle: one small integer tensor, copied once.

Shapes: B rows, N nodes, R places of a path.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hass_core.decoding.tree import Tree
from hass_core.decoding.verify import Accepted


@dataclass(frozen=True)
class RowReport:
    """One row's part. `ranks` and `offered` as in `CycleTrace`."""

    token_ids: list[int]
    sound: bool
    ranks: tuple[int, ...]
    offered: tuple[int, ...]


def packed(tree: Tree, accepted: Accepted, sound: Tensor) -> Tensor:
    """[B, 2 + 3R] of counts, soundness, tokens, and along the path ranks and numbers of children."""
    nodes = tree.parents.shape[1]
    children = torch.zeros_like(tree.parents)
    if nodes > 1:
        children.scatter_add_(1, tree.parents[:, 1:], torch.ones_like(tree.parents[:, 1:]))
    return torch.cat(
        [
            accepted.counts[:, None],
            accepted.all_on_path(sound)[:, None].long(),
            accepted.token_ids,
            tree.ranks.gather(1, accepted.path),
            children.gather(1, accepted.path),
        ],
        1,
    )


def unpacked(report: list[list[int]]) -> list[RowReport]:
    """The rows of `packed(...).tolist()`."""
    rows = []
    for row in report:
        count, places = row[0], (len(row) - 2) // 3
        tokens, ranks, offered = (row[2 + i * places : 2 + (i + 1) * places] for i in range(3))
        rows.append(RowReport(tokens[:count], bool(row[1]), tuple(ranks[1:count]), tuple(offered[:count])))
    return rows
