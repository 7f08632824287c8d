"""Draft trees as tensors of fixed shape: choosing their nodes, which of them stand, and what the host learns of that.

Drafting fills a pool level by level: the root's K children, then K children for each of K frontier nodes a level. A
candidate's score is the sum of its path's log-probabilities (EAGLE-2), or of constants that depend on the ranks along
the path alone (a static tree, EAGLE). The best nodes of the pool form the tree; a chain is the case K = 1.

Ties are broken by pool index, a total order. A child's score is never above its parent's and its index is always
higher, so the chosen set is closed under taking parents.

The acceptance rule. At every node of the tree the target's processed distribution p over the next token is known.
Draw one token from p at every node. Start at the root. While the token drawn at the current node equals the token of
one of its children, that child is accepted and becomes the current node. The token drawn at the last node is the new
root. Greedy decoding is the same with p a point mass.

Why it is lossless: each emitted token is a draw from p at its own exact prefix. Siblings carry distinct tokens, and
the tree does not depend on the draws. It equals rejection sampling child after child (accept c with probability p(c),
else set p(c) to 0 and renormalise; Leviathan et al. arXiv 2211.17192 for a deterministic draft, SpecInfer arXiv
2305.09781 for trees): walking through the children splits the very interval that one inverted coin falls into, so
accepted, residual and bonus tokens all come from the one processed distribution.

Shapes: B batch, P pool, N nodes with the root, K children a node, R nodes of the longest path.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hass_core.config import TreeConfig

ROOT = -1  # parent of the pool's first level


class Pool(NamedTuple):
    """Candidates in the order drafted."""

    token_ids: Tensor  # [B, P]
    scores: Tensor  # [B, P], at most the parent's
    parents: Tensor  # [B, P] pool index of the parent, ROOT on the first level


class Tree(NamedTuple):
    """Nodes in breadth-first order, node 0 the root: the token drawn last, not yet seen by the target."""

    token_ids: Tensor  # [B, N]
    parents: Tensor  # [B, N] node numbers, the root's is itself
    depths: Tensor  # [B, N], root 0
    ranks: Tensor  # [B, N] rank among the siblings by draft probability, from 0
    visible: Tensor  # [B, N, N] True where the column is the row's ancestor or itself
    order: Tensor  # [B, N - 1] the drafted nodes by falling score

    def to(self, device: torch.device) -> "Tree":
        return Tree(*(part.to(device) for part in self))


@dataclass(frozen=True)
class TreeShape:
    """The sizes a tree setting leads to."""

    depth: int
    top_k: int
    nodes: int  # N
    static: bool

    @property
    def longest_path(self) -> int:
        """R: nodes of the longest path, root included."""
        return min(self.depth + 1, self.nodes)

    @classmethod
    def of(cls, config: TreeConfig, draft_vocab_size: int) -> "TreeShape":
        """A chain has one child a node; no tree has more nodes than its pool plus the root."""
        top_k = 1 if config.kind == "chain" else min(config.top_k, draft_vocab_size)
        pool = pool_size(config.depth, top_k)
        nodes = pool + 1 if config.kind == "chain" else min(config.nodes, pool + 1)
        return cls(config.depth, top_k, nodes, static=config.kind == "static")


def pool_size(depth: int, top_k: int) -> int:
    """P = K + (depth - 1)·K²."""
    return top_k + (depth - 1) * top_k * top_k


def static_scores(top_k: int) -> Tensor:
    """[K] log-scores by rank for a static tree: the first child is right in about 6 of 10 cases, the next in 2, …

    With 26 nodes and depth 5 this gives the proportions of EAGLE's hand-made tree (arXiv 2401.15077, Fig. 7).
    """
    return torch.log(0.6 * 0.35 ** torch.arange(top_k, dtype=torch.float32))


def best(scores: Tensor, count: int) -> Tensor:
    """Indices [B, count] of the highest scores [B, P], best first, ties to the lower index."""
    if scores.is_cuda or scores.is_meta:
        return by_rank(scores)[:, :count]
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def by_rank(scores: Tensor) -> Tensor:
    """Indices [B, P] of scores [B, P] as `best` orders them, each put where its rank says.

    A rank is the number of scores ahead. For the few hundred that a tree has, counting them is one small kernel on a
    GPU; a sort is many, or one that takes half a minute to compile. NaN ranks first, as in a sort.
    """
    index = torch.arange(scores.shape[1], device=scores.device)
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    own, other = scores[:, :, None], scores[:, None, :]
    ranks = ((other > own) | ((other == own) & (index < index[:, None]))).sum(-1)
    return torch.empty_like(ranks).scatter_(1, ranks, index.expand_as(ranks))


def index_in(ascending: Tensor, values: Tensor) -> Tensor:
    """[B, M]: how many of `ascending` [B, N] are below each of `values` [B, M]; its index, if it is among them.

    torch.searchsorted says the same; compiled for a GPU it fails where N is 1.
    """
    return (ascending[:, None] < values[:, :, None]).sum(-1)


def assemble(root: Tensor, pool: Pool, shape: TreeShape) -> Tree:
    """The tree over root tokens [B] with the pool's N-1 best candidates."""
    by_score = best(pool.scores, shape.nodes - 1).contiguous()
    chosen = by_score.gather(1, best(-by_score.float(), shape.nodes - 1))
    parent_index = pool.parents.gather(1, chosen)
    parents = index_in(chosen, parent_index) + (parent_index != ROOT)
    first = torch.zeros_like(root)[:, None]
    levels = (chosen - shape.top_k).div(shape.top_k * shape.top_k, rounding_mode="floor") + 2
    parents = torch.cat([first, parents], 1)
    return Tree(
        token_ids=torch.cat([root[:, None], pool.token_ids.gather(1, chosen)], 1),
        parents=parents,
        depths=torch.cat([first, levels], 1),
        ranks=torch.cat([first, chosen % shape.top_k], 1),
        visible=ancestors(parents, shape.depth),
        order=index_in(chosen, by_score) + 1,
    )


def ancestors(parents: Tensor, depth: int) -> Tensor:
    """[B, N, N], True where the column is an ancestor of the row or the row itself, from parents [B, N]."""
    node = torch.arange(parents.shape[1], device=parents.device).expand_as(parents)
    path = [node]
    for _ in range(depth):
        path.append(parents.gather(1, path[-1]))
    seen = torch.zeros(*parents.shape, parents.shape[1], dtype=torch.bool, device=parents.device)
    return seen.scatter_(2, torch.stack(path, -1), True)


def chain_of(root: Tensor, token_ids: Tensor) -> Tree:
    """The tree over root tokens [B] that is one path, through tokens [B, N - 1] from the root down."""
    nodes = torch.arange(token_ids.shape[1] + 1, device=root.device).expand(len(root), -1)
    parents = (nodes - 1).clamp(min=0)
    return Tree(
        token_ids=torch.cat([root[:, None], token_ids], 1),
        parents=parents,
        depths=nodes,
        ranks=torch.zeros_like(nodes),
        visible=ancestors(parents, token_ids.shape[1]),
        order=nodes[:, 1:],
    )


class Accepted(NamedTuple):
    """The outcome per row. A path's entries past its count are unspecified nodes."""

    path: Tensor  # [B, R] node numbers from the root down, increasing
    counts: Tensor  # [B] nodes on the path, root included: 1 + accepted drafts
    token_ids: Tensor  # [B, R] the tokens this cycle emits: the accepted ones, then the new root

    def all_on_path(self, flags: Tensor) -> Tensor:
        """[B]: whether the flag [B, N] is set at every node of the path."""
        past = torch.arange(self.path.shape[1], device=flags.device) >= self.counts[:, None]
        return (flags.gather(1, self.path) | past).all(1)


def accept(tree: Tree, drawn: Tensor, longest_path: int) -> Accepted:
    """Follow the drawn tokens [B, N] through the tree; `longest_path` is its shape's R."""
    matched = tree.token_ids == drawn.gather(1, tree.parents)
    matched[:, 0] = True
    standing = (matched[:, None] | ~tree.visible).all(-1)
    # breadth-first numbering: standing nodes in order of number are the path from the root
    path = best(standing.float(), longest_path)
    return Accepted(path, standing.sum(-1), drawn.gather(1, path))


@dataclass(frozen=True)
class RowReport:
    """What the host learns of one row's cycle. `ranks` and `offered` as in `hass_core.decoding.answers.CycleTrace`."""

    token_ids: list[int]
    sound: bool
    ranks: tuple[int, ...]
    offered: tuple[int, ...]


def pack_report(tree: Tree, accepted: Accepted, sound: Tensor) -> Tensor:
    """One integer tensor [B, 2 + 3R], copied to the host once: counts, soundness, tokens, and along the path ranks and
    numbers of children. `sound` [B, N] tells where the target's logits were numbers."""
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


def unpack_report(report: list[list[int]]) -> list[RowReport]:
    """The rows of `pack_report(...).tolist()`."""
    rows = []
    for row in report:
        count, longest = row[0], (len(row) - 2) // 3
        tokens, ranks, offered = (row[2 + i * longest : 2 + (i + 1) * longest] for i in range(3))
        rows.append(RowReport(tokens[:count], bool(row[1]), tuple(ranks[1:count]), tuple(offered[:count])))
    return rows
