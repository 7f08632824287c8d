"""Trees by property: closed under parents, masks, positions, paths, ties, and the topologies of static trees."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hass_core.config import TreeConfig
from hass_core.decoding.tree import (
    ROOT,
    Pool,
    Tree,
    TreeShape,
    ancestors,
    assemble,
    best,
    by_rank,
    pool_size,
    static_scores,
)
from hass_core.target_model.kv_cache import tree_attention_mask


@st.composite
def drafted(draw) -> tuple[Pool, TreeShape, torch.Tensor]:
    """A pool as drafting leaves it, with coarse scores so that ties abound, and a shape for its tree."""
    depth, top_k, batch = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    size, levels = pool_size(depth, top_k), draw(st.integers(1, 3))
    scores, parents = torch.zeros(batch, size), torch.full((batch, size), ROOT)

    def falls(count: int) -> torch.Tensor:
        return -torch.randint(0, levels, (batch, count), generator=generator).float()

    scores[:, :top_k] = falls(top_k)
    frontier = torch.arange(top_k).expand(batch, -1)
    for level in range(1, depth):
        start = top_k + (level - 1) * top_k**2
        stop = start + top_k**2
        parents[:, start:stop] = frontier.repeat_interleave(top_k, 1)
        scores[:, start:stop] = scores.gather(1, parents[:, start:stop]) + falls(top_k**2)
        frontier = start + best(scores[:, start:stop], top_k)
    nodes = draw(st.integers(2, size + 1))
    tokens = torch.arange(size).expand(batch, -1) + 100
    return Pool(tokens, scores, parents), TreeShape(depth, top_k, nodes, static=False), torch.arange(batch)


def paths(tree: Tree, row: int) -> list[list[int]]:
    """Each node's path from the root, by walking up."""
    found = []
    for node in range(tree.parents.shape[1]):
        path = [node]
        while path[-1] != 0:
            path.append(int(tree.parents[row, path[-1]]))
        found.append(path[::-1])
    return found


@given(drafted())
@settings(max_examples=150, deadline=None)
def test_a_tree_is_closed_consistent_and_holds_the_best_candidates(given_pool):
    pool, shape, root = given_pool
    tree = assemble(root, pool, shape)
    assert torch.equal(tree.token_ids[:, 0], root)
    for row in range(len(root)):
        chosen = (tree.token_ids[row, 1:] - 100).tolist()
        assert chosen == sorted(set(chosen))
        expected = sorted(range(pool.scores.shape[1]), key=lambda i: (-float(pool.scores[row, i]), i))
        assert chosen == sorted(expected[: shape.nodes - 1])
        assert [chosen[n - 1] for n in tree.order[row].tolist()] == expected[: shape.nodes - 1]
        for node, path in enumerate(paths(tree, row)):
            assert int(tree.depths[row, node]) == len(path) - 1
            assert path == sorted(path)  # parents before children
            assert torch.equal(tree.visible[row, node].nonzero()[:, 0], torch.tensor(path))
            if node:
                parent = pool.parents[row, chosen[node - 1]]
                assert int(tree.parents[row, node]) == (0 if parent == ROOT else chosen.index(int(parent)) + 1)


@given(drafted())
@settings(max_examples=100, deadline=None)
def test_siblings_offered_are_the_likeliest_ones(given_pool):
    pool, shape, root = given_pool
    ordered = pool.scores.clone()  # siblings come best first, as topk gives them
    for start in range(0, ordered.shape[1], shape.top_k):
        ordered[:, start : start + shape.top_k] = ordered[:, start : start + shape.top_k].sort(descending=True).values
    closed = ordered  # no child above its parent, level by level
    for _ in range(shape.depth):
        above = torch.where(pool.parents < 0, 0.0, closed.gather(1, pool.parents.clamp(min=0)))
        closed = torch.minimum(closed, above)
    tree = assemble(root, Pool(pool.token_ids, closed, pool.parents), shape)
    for row in range(len(root)):
        for parent in range(shape.nodes):
            ranks = tree.ranks[row, 1:][tree.parents[row, 1:] == parent].tolist()
            assert ranks == list(range(len(ranks)))


@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 5), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_the_mask_shows_the_live_slots_and_then_the_tree(batch, rows, spare, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 9, (batch,), generator=generator)
    visible = torch.rand(batch, rows, rows, generator=generator) < 0.5
    width = int(lengths.max()) + rows + spare
    mask = tree_attention_mask(visible, lengths, width)
    for b in range(batch):
        for t in range(rows):
            for slot in range(width):
                behind = slot - int(lengths[b])
                expected = behind < 0 or (behind < rows and bool(visible[b, t, behind]))
                assert bool(mask[b, 0, t, slot]) == expected


def test_ties_go_to_the_lower_index():
    assert best(torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]), 4).tolist() == [[1, 2, 4, 3]]


@given(st.integers(1, 3), st.integers(1, 90), st.integers(0, 10_000))
def test_counting_ranks_orders_as_a_stable_sort_does(batch, size, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = -torch.randint(0, 7, (batch, size), generator=generator).float()
    scores[torch.rand(batch, size, generator=generator) < 0.1] = torch.nan
    scores[torch.rand(batch, size, generator=generator) < 0.1] = -torch.inf
    assert torch.equal(by_rank(scores), scores.sort(dim=-1, descending=True, stable=True).indices)


def test_a_chain_is_one_path_and_no_tree_outgrows_its_pool():
    chain = TreeShape.of(TreeConfig(kind="chain", depth=5, top_k=8, nodes=60), 1000)
    assert (chain.top_k, chain.nodes, chain.longest_path) == (1, 6, 6)
    small = TreeShape.of(TreeConfig(depth=2, top_k=3, nodes=60), 1000)
    assert small.nodes == 1 + 3 + 9
    assert TreeShape.of(TreeConfig(depth=2, top_k=30, nodes=60), draft_vocab_size=16).top_k == 16
    assert TreeShape.of(TreeConfig(depth=6, top_k=2, nodes=3), 1000).longest_path == 3


def test_ancestors_of_a_bushy_tree():
    parents = torch.tensor([[0, 0, 0, 1, 3]])
    expected = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 3, 4]]
    assert [row.nonzero()[:, 0].tolist() for row in ancestors(parents, 3)[0]] == expected


def test_a_static_tree_is_the_same_whatever_the_draft_says():
    # the scores by rank alone: the first child's whole line outranks the fourth child of the root
    scores = static_scores(4)
    assert bool((scores[1:] < scores[:-1]).all())
    assert bool((scores < 0).all())
    assert 3 * float(scores[0]) > float(scores[3])
