"""The few largest of many logits and the log-sum-exp of all, for a handful of rows: one read of the logits.

Two kernels: each program looks at one piece of one row, the second looks at what the pieces found. torch.topk sorts
by radix in ten launches, and a log-sum-exp takes six more.

Shapes: R rows, D logits a row, P pieces of a row.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

PIECE = 1024


def row_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of each row of [R, D], best first, ties to the lower index: values [R, k] in float32, indices
    [R, k]; and the rows' log-sum-exp [R] in float32."""
    rows, size = logits.shape
    pieces = triton.cdiv(size, PIECE)
    found = torch.empty(rows, pieces, k, device=logits.device, dtype=torch.float32)
    where = torch.empty(rows, pieces, k, device=logits.device, dtype=torch.int32)
    mass = torch.empty(rows, pieces, 2, device=logits.device, dtype=torch.float32)
    _piece[(rows, pieces)](logits, found, where, mass, size, logits.stride(0), pieces, K=k, PIECE=PIECE)
    values = torch.empty(rows, k, device=logits.device, dtype=torch.float32)
    indices = torch.empty(rows, k, device=logits.device, dtype=torch.int64)
    lse = torch.empty(rows, device=logits.device, dtype=torch.float32)
    _whole[(rows,)](
        found, where, mass, values, indices, lse, pieces, K=k,
        CANDIDATES=triton.next_power_of_2(pieces * k), PIECES=triton.next_power_of_2(pieces),
    )  # fmt: skip
    return values, indices, lse


@triton.jit
def _piece(logits, found, where, mass, size, stride, pieces, K: tl.constexpr, PIECE: tl.constexpr):
    """Program: the best K of one piece, its maximum and its sum of exponentials."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own = tl.arange(0, PIECE)
    index = piece * PIECE + own
    left = tl.load(logits + row * stride + index, mask=index < size, other=-float("inf")).to(tl.float32)
    line = row * pieces + piece
    highest = tl.max(left, 0)
    tl.store(mass + 2 * line, highest)
    tl.store(mass + 2 * line + 1, tl.sum(tl.exp(left - highest), 0))
    for rank in tl.static_range(K):
        value, place = tl.max(left, 0, return_indices=True)
        tl.store(found + line * K + rank, value)
        tl.store(where + line * K + rank, tl.minimum(piece * PIECE + place, size - 1))
        left = tl.where(own == place, -float("inf"), left)


@triton.jit
def _whole(
    found, where, mass, values, indices, lse, pieces, K: tl.constexpr, CANDIDATES: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """Program: the best K of one row's candidates, and its log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, CANDIDATES)
    left = tl.load(found + row * pieces * K + own, mask=own < pieces * K, other=-float("inf"))
    for rank in tl.static_range(K):
        value, place = tl.max(left, 0, return_indices=True)  # candidates stand in the order of their indices
        place = tl.minimum(place, pieces * K - 1)  # where a logit is no number, tl.max may name the padding
        tl.store(values + row * K + rank, value)
        tl.store(indices + row * K + rank, tl.load(where + row * pieces * K + place).to(tl.int64))
        left = tl.where(own == place, -float("inf"), left)
    piece = tl.arange(0, PIECES)
    maxima = tl.load(mass + 2 * (row * pieces + piece), mask=piece < pieces, other=-float("inf"))
    sums = tl.load(mass + 2 * (row * pieces + piece) + 1, mask=piece < pieces, other=0.0)
    highest = tl.max(maxima, 0)
    tl.store(lse + row, highest + tl.log(tl.sum(sums * tl.exp(maxima - highest), 0)))
