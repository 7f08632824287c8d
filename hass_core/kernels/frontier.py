"""From the candidates of a tree's level to the next level's draft input, in one launch.

Choosing the best of K² candidates and collecting what belongs to them is a few numbers' work; in PyTorch it takes a
dozen launches, and drafting waits for each.

    K nodes × K children = K² candidates        one program: one of the K chosen, COLUMNS of its draft input
        scores = node's + child's               1. find the own rank's candidate among all K² (as every program does)
        ▼ the own rank's best                   2. its token, score, number; the tree rows its parent sees, and its own
    [embedding(token) ; feature of its parent]  3. copy COLUMNS of embedding and feature into the next level's input

Measured (H100, `decoding_profile_chained`): 5 µs a level; the dozen launches it stands for are not on record alone.

Shapes: B rows, K children and frontier nodes, H hidden, C tree rows in the cache, V vocabulary.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from typing import NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from hass_core.kernels.chain import chained, wait_for_inputs

COLUMNS = 1024  # of the draft's input a program


class Chosen(NamedTuple):
    """The K best candidates of a level, best first."""

    token_ids: Tensor  # [B, K]
    inputs: Tensor  # [B, K, 2H] their embeddings, and the features estimated at their parents
    scores: Tensor  # [B, K]
    candidates: Tensor  # [B, K] numbers among the level's candidates
    seen: Tensor  # [B, K, C]


def best_candidates(
    node_scores: Tensor,
    child_scores: Tensor,
    child_ids: Tensor,
    seen: Tensor,
    features: Tensor,
    embedding: Tensor,
    rows_from: int,
    number_from: int,
) -> Chosen:
    """The K best of the children [B, K, K] of K nodes by their scores and their parents' together, ties to the lower
    number, NaN first.

    `seen` [B, K, C] are the tree rows that the nodes see, `features` [B, K, H] what was estimated there. The chosen
    ones stand in the tree rows from `rows_from` on, and see what their parents do and themselves. Candidates are
    numbered from `number_from` on.
    """
    child_ids, seen, features = child_ids.contiguous(), seen.contiguous(), features.contiguous()
    batch, top_k = node_scores.shape
    hidden, columns = features.shape[2], seen.shape[2]
    chosen = Chosen(
        torch.empty_like(child_ids[:, 0]), features.new_empty(batch, top_k, 2 * hidden), torch.empty_like(node_scores),
        torch.empty_like(child_ids[:, 0]), torch.empty_like(seen),
    )  # fmt: skip
    _choose[(batch, top_k, triton.cdiv(hidden, COLUMNS))](
        node_scores, child_scores.contiguous(), child_ids, seen, features, embedding, *chosen, rows_from, number_from,
        hidden, columns, K=top_k, COLUMNS=COLUMNS, CANDIDATES=triton.next_power_of_2(top_k * top_k),
        SEEN=triton.next_power_of_2(columns), num_warps=1, **chained(features),
    )  # fmt: skip
    return chosen


@triton.jit
def _choose(
    node_scores, child_scores, child_ids, seen, features, embedding, token_ids, inputs, scores, candidates, own_seen,
    rows_from, number_from, hidden, columns, K: tl.constexpr, COLUMNS: tl.constexpr, CANDIDATES: tl.constexpr,
    SEEN: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Program: the candidate of one rank, and some columns of its input."""
    batch, rank = tl.program_id(0).to(tl.int64), tl.program_id(1)
    candidate = tl.arange(0, CANDIDATES)
    real = candidate < K * K
    wait_for_inputs(CHAINED)
    score = tl.load(child_scores + batch * K * K + candidate, mask=real, other=-float("inf"))
    score += tl.load(node_scores + batch * K + candidate // K, mask=real, other=0.0)
    # as in `hass_core.kernels.top_k`: the number's bits in order, above the place
    bits = tl.where(score != score, float("inf"), score).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    left = key * 0x100000000 + (0xFFFFFFFF - candidate.to(tl.int64))
    best = tl.max(left, 0)
    for _ in range(rank):
        left = tl.where(left == best, -0x8000000000000000, left)
        best = tl.max(left, 0)
    number = 0xFFFFFFFF - (best & 0xFFFFFFFF)
    token_id = tl.load(child_ids + batch * K * K + number)
    parent = batch * K + number // K
    own = batch * K + rank
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    goal = inputs + own * 2 * hidden + column
    tl.store(goal, tl.load(embedding + token_id * hidden + column, mask=inside), mask=inside)
    tl.store(goal + hidden, tl.load(features + parent * hidden + column, mask=inside), mask=inside)
    if tl.program_id(2) == 0:
        tl.store(token_ids + own, token_id)
        tl.store(scores + own, tl.sum(tl.where(candidate == number, score, 0.0), 0))
        tl.store(candidates + own, number_from + number)
        row = tl.arange(0, SEEN)
        visible = tl.load(seen + parent * columns + row, mask=row < columns, other=0) != 0
        tl.store(own_seen + own * columns + row, visible | (row == rows_from + rank), mask=row < columns)
