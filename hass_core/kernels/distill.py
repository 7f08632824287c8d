"""The distribution terms of the objective and their gradient, reading the logits twice and writing them once.

For a row's teacher logits t and each of n steps' student logits s (formulas in `hass_core.training.losses`):

    survey     pieces of a row: maxima, sums of exponentials, Σ exp(t)·s, and the teacher's maximum in each block
    merge      a row's log-sum-exps, the teacher's best K, the terms, and the gradient at those K
    gradient   mass · p - w_ce · q, in place of the student's logits; the K are then put right

The best K tokens lie in the K blocks with the highest maxima, so merge looks at K blocks only. Neither a softmax nor a
target distribution is ever stored. PyTorch, compiled, passes over the same logits a dozen times and sorts.

    teacher t [R, D]      │ piece │ piece │ …     `_survey`, one program: one piece of one row, teacher and all n steps
    students s [n, R, D]  │ piece │ piece │ …     `_merge`, one program: one row
                              ▼                   `_gradient`, one program: one piece of one row, all n steps
    stats [R, P, 2 + 3n] ─► lse, top K, terms ─► s becomes its gradient

Measured (H100): 12.1 of a step's 41.2 ms (docs/results.md); beside PyTorch's own alone it is not on record.

Shapes: R rows, n steps, D vocabulary, K top tokens, P pieces of a row.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

PIECE, BLOCK = 2048, 64  # tokens


def distribution_terms(
    teacher: Tensor, logits: Tensor, k: int, soft_ce: float, top_k: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `hass_core.training.losses.distribution_terms`; `logits` [n, R, D] become the gradient."""
    steps, rows, size = logits.shape
    pieces = triton.cdiv(size, PIECE)
    new = {"device": logits.device, "dtype": torch.float32}
    stats = torch.empty(rows, pieces, 2 + 3 * steps, **new)
    blocks = pieces * (PIECE // BLOCK)
    maxima = torch.empty(rows, blocks, **new)
    _survey[(rows, pieces)](
        teacher, logits, stats, maxima, rows, size, pieces, STEPS=steps, PIECE=PIECE, BLOCK=BLOCK, num_warps=8
    )
    lse = torch.empty(rows, 1 + steps, **new)
    mass = torch.empty(rows, **new)
    total, top, right = torch.empty(3, steps, rows, **new)
    best = torch.empty(rows, k, device=logits.device, dtype=torch.int64)
    at_best = torch.empty(steps, rows, k, device=logits.device, dtype=logits.dtype)
    _merge[(rows,)](
        teacher, logits, stats, maxima, lse, mass, total, top, right, best, at_best, rows, size, pieces, blocks,
        soft_ce, top_k, STEPS=steps, K=k, KS=triton.next_power_of_2(k), BLOCK=BLOCK,
        BLOCKS=triton.next_power_of_2(blocks), PIECES=triton.next_power_of_2(pieces), num_warps=1,
    )  # fmt: skip
    _gradient[(rows, pieces)](teacher, logits, lse, mass, rows, size, soft_ce, STEPS=steps, PIECE=PIECE, num_warps=8)
    logits.scatter_(2, best.expand(steps, -1, -1), at_best)
    return total, top, right, logits


@triton.jit
def _survey(
    teacher, logits, stats, maxima, rows, size, pieces, STEPS: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program: one piece of one row, of the teacher and all steps."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = piece * PIECE + tl.arange(0, PIECE)
    inside = index < size
    t = tl.load(teacher + row * size + index, mask=inside, other=-float("inf")).to(tl.float32)
    line = row * pieces + piece
    by_block = tl.max(tl.reshape(t, (PIECE // BLOCK, BLOCK)), 1)
    tl.store(maxima + line * (PIECE // BLOCK) + tl.arange(0, PIECE // BLOCK), by_block)
    highest = tl.max(by_block, 0)
    weight = tl.exp(t - highest)
    place = stats + line * (2 + 3 * STEPS)
    tl.store(place, highest)
    tl.store(place + 1, tl.sum(weight, 0))
    for step in tl.static_range(STEPS):
        s = tl.load(logits + (step * rows + row) * size + index, mask=inside, other=-float("inf")).to(tl.float32)
        top = tl.max(s, 0)
        tl.store(place + 2 + 3 * step, top)
        tl.store(place + 3 + 3 * step, tl.sum(tl.exp(s - top), 0))
        tl.store(place + 4 + 3 * step, tl.sum(tl.where(inside, weight * s, 0.0), 0))


@triton.jit
def _merge(
    teacher, logits, stats, maxima, lse, mass, total, top, right, best, at_best, rows, size, pieces, blocks, soft_ce,
    top_k, STEPS: tl.constexpr, K: tl.constexpr, KS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Program: one row."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PIECES)
    there = piece < pieces
    line = stats + (row * pieces + piece) * (2 + 3 * STEPS)
    highs = tl.load(line, mask=there, other=-float("inf"))
    highest = tl.max(highs, 0)
    share = tl.exp(highs - highest)
    teacher_sum = tl.sum(tl.load(line + 1, mask=there, other=0.0) * share, 0)
    teacher_lse = highest + tl.log(teacher_sum)
    tl.store(lse + row * (1 + STEPS), teacher_lse)

    block = tl.arange(0, BLOCKS)
    rank = tl.arange(0, KS)
    left = tl.load(maxima + row * blocks + block, mask=block < blocks, other=-float("inf"))
    first = tl.full([KS], 0, tl.int32)  # tokens with which the best blocks begin
    filled = tl.zeros([KS], tl.int32)
    for number in tl.static_range(K):
        value, at = tl.max(left, 0, return_indices=True)
        first = tl.where(rank == number, at * BLOCK, first)
        filled = tl.where(rank == number, (value > -float("inf")).to(tl.int32), filled)
        left = tl.where(block == at, -float("inf"), left)
    candidates = first[:, None] + tl.arange(0, BLOCK)[None, :]
    inside = (filled[:, None] > 0) & (candidates < size)
    candidates = tl.reshape(candidates, (KS * BLOCK,))
    near = tl.load(teacher + row * size + candidates, mask=tl.reshape(inside, (KS * BLOCK,)), other=-float("inf"))
    near = near.to(tl.float32)
    own = tl.arange(0, KS * BLOCK)
    values = tl.full([KS], -float("inf"), tl.float32)
    tokens = tl.zeros([KS], tl.int32)
    for number in tl.static_range(K):
        value, at = tl.max(near, 0, return_indices=True)
        token = tl.sum(tl.where(own == at, candidates, 0), 0)
        values = tl.where(rank == number, value, values)
        tokens = tl.where(rank == number, tl.minimum(token, size - 1), tokens)  # with NaN, `at` may be anything
        near = tl.where(own == at, -float("inf"), near)
    chosen = rank < K
    tl.store(best + row * K + rank, tokens.to(tl.int64), mask=chosen)
    q = tl.where(chosen, tl.exp(values - teacher_lse), 0.0)
    within = tl.sum(q, 0)
    all_mass = soft_ce + top_k * within
    tl.store(mass + row, all_mass)

    for step in tl.static_range(STEPS):
        highs = tl.load(line + 2 + 3 * step, mask=there, other=-float("inf"))
        highest = tl.max(highs, 0)
        sums = tl.load(line + 3 + 3 * step, mask=there, other=0.0)
        own_lse = highest + tl.log(tl.sum(sums * tl.exp(highs - highest), 0))
        tl.store(lse + row * (1 + STEPS) + 1 + step, own_lse)
        dot = tl.sum(tl.load(line + 4 + 3 * step, mask=there, other=0.0) * share, 0) / teacher_sum
        s = tl.load(logits + (step * rows + row) * size + tokens, mask=chosen, other=0.0).to(tl.float32)
        own_top = within * own_lse - tl.sum(q * s, 0)
        tl.store(top + step * rows + row, own_top)
        tl.store(total + step * rows + row, soft_ce * (own_lse - dot) + top_k * own_top)
        favourite = tl.sum(tl.where(rank == 0, s, 0.0), 0)
        tl.store(right + step * rows + row, (favourite == highest).to(tl.float32))
        gradient = all_mass * tl.exp(s - own_lse) - (soft_ce + top_k) * q
        tl.store(at_best + (step * rows + row) * K + rank, gradient.to(at_best.dtype.element_ty), mask=chosen)


@triton.jit
def _gradient(teacher, logits, lse, mass, rows, size, soft_ce, STEPS: tl.constexpr, PIECE: tl.constexpr):
    """Program: one piece of one row, all steps. Right everywhere but at the teacher's best K."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = index < size
    t = tl.load(teacher + row * size + index, mask=inside, other=0.0).to(tl.float32)
    wanted = soft_ce * tl.exp(t - tl.load(lse + row * (1 + STEPS)))
    all_mass = tl.load(mass + row)
    for step in tl.static_range(STEPS):
        place = logits + (step * rows + row) * size + index
        s = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        p = tl.exp(s - tl.load(lse + row * (1 + STEPS) + 1 + step))
        tl.store(place, (all_mass * p - wanted).to(logits.dtype.element_ty), mask=inside)
