"""The likeliest tokens of many distributions, or those that win with the noise of their places: one read of the logits.

Two kernels: each program looks at one piece of one row, the second looks at what the pieces found. torch.topk sorts
by radix in ten launches, and a log-sum-exp takes six more.

A logit and its place are compared as one integer: its bits, in the order of the numbers, above the place's, reversed,
so that ties go to the lower index. For 16 bits a GPU has an instruction that finds the largest of a warp.

    row of D logits │ piece │ piece │ …         `_piece`, one program a piece: its best K, its maximum and Σ exp
                        ▼       ▼
                      K keys  K keys  …         `_whole`, one program a row: best K of all keys, log-sum-exp of all sums

Measured (H100, `decoding_profile` in `infra/evidence/h100.json`): 6 and 5 µs a launch in a tree's cycle; beside
torch.topk alone it is not on record.

The noise is made in registers (`hass_core.kernels.noise`): a draw reads what an argmax reads.

Shapes: R rows, D logits a row, P pieces of a row, B rows of the batch; R is a multiple of B.
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
from hass_core.kernels.noise import UNFUSED, gumbel

PIECE = 1024
MANY = 1024  # candidates that one warp would look at for long


class RowNoise(NamedTuple):
    """Whose noise is added to the logits of a row, and how."""

    streams: Tensor  # [B, 2] int32, `hass_core.sampling.stream` of each row of the batch
    positions: Tensor  # [R], or [B] where all rows of one stream stand at one position
    ahead: int  # added to the positions
    sharpness: float  # factor of the logits
    width: float = 1.0  # divisor of logits and noise in the scores
    lowest: Tensor | None = None  # [R] only logits from there on count, times sharpness


def row_top_k(
    logits: Tensor, k: int, token_ids: Tensor | None = None, noise: RowNoise | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [R, k] in float32, at most 0, and indices [R, k] of the k largest of each row of [R, D], best
    first, ties to the lower index; with `token_ids` [D], those instead of the indices.

    With `noise` the k largest of sharpness · logit + noise, and their log-softmax of that divided by the width.
    A log-probability is NaN where a logit of its row is NaN or +infinite.
    """
    rows, size = logits.shape
    narrow = noise is None and logits.element_size() == 2
    pieces, wide = triton.cdiv(size, PIECE), torch.int32 if narrow else torch.int64
    found = torch.empty(rows, pieces, k, device=logits.device, dtype=wide)
    mass = torch.empty(rows, pieces, 2, device=logits.device, dtype=torch.float32)
    options = {"K": k, "PIECE": PIECE, **chained(logits)}
    streams = positions = lowest = None
    ahead, sharpness, inverse_width, per_stream, per_position = 0, 1.0, 1.0, 1, 1
    if noise is not None:
        streams, positions, lowest = noise.streams, noise.positions.contiguous(), noise.lowest
        ahead, sharpness, inverse_width = noise.ahead, noise.sharpness, 1 / noise.width
        per_stream, per_position = rows // len(streams), rows // positions.numel()
        options |= UNFUSED
    _piece[(rows, pieces)](
        logits, found, mass, size, logits.stride(0), pieces, token_ids, streams, positions, lowest, ahead, sharpness,
        inverse_width, per_stream, per_position, num_warps=1, **options,
    )  # fmt: skip
    scores = torch.empty(rows, k, device=logits.device, dtype=torch.float32)
    indices = torch.empty(rows, k, device=logits.device, dtype=torch.int64)
    candidates = triton.next_power_of_2(pieces * k)
    _whole[(rows,)](
        found, mass, token_ids, scores, indices, logits, size, pieces, inverse_width, CANDIDATES=candidates,
        PIECES=triton.next_power_of_2(pieces), num_warps=4 if candidates > MANY else 1, **options,
    )  # fmt: skip
    return scores, indices


@triton.jit
def _piece(
    logits, found, mass, size, stride, pieces, token_ids, streams, positions, lowest, ahead, sharpness, inverse_width,
    per_stream, per_position, K: tl.constexpr, PIECE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Program: the best K of one piece, its maximum and its sum of exponentials."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own = tl.arange(0, PIECE)
    index = piece * PIECE + own
    wait_for_inputs(CHAINED)
    values = tl.load(logits + row * stride + index, mask=index < size, other=-float("inf"))
    line = row * pieces + piece
    if streams is not None:
        values = values.to(tl.float32) * sharpness
        if lowest is not None:
            values = tl.where(values < tl.load(lowest + row), -float("inf"), values)
        token = index
        if token_ids is not None:
            token = tl.load(token_ids + index, mask=index < size, other=0)
        position = tl.load(positions + row // per_position) + ahead
        values += gumbel(streams + 2 * (row // per_stream), position, token)
    exact = values.to(tl.float32)
    highest = tl.max(exact, 0)
    tl.store(mass + 2 * line, highest)
    level = tl.where(highest == -float("inf"), 0.0, highest)  # of a piece without a token to count
    tl.store(mass + 2 * line + 1, tl.sum(tl.exp((exact - level) * inverse_width), 0))
    left = _with_place(_ordered(values), own)
    for rank in tl.static_range(K):
        best = tl.max(left, 0)
        tl.store(found + line * K + rank, best)
        left = tl.where(left == best, _with_place(_lowest(left), own), left)


@triton.jit
def _whole(
    found, mass, token_ids, scores, indices, like, size, pieces, inverse_width, K: tl.constexpr, PIECE: tl.constexpr,
    CANDIDATES: tl.constexpr, PIECES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Program: the best K of one row's candidates."""
    row = tl.program_id(0).to(tl.int64)
    own, piece = tl.arange(0, CANDIDATES), tl.arange(0, PIECES)
    wait_for_inputs(CHAINED)
    maxima = tl.load(mass + 2 * (row * pieces + piece), mask=piece < pieces, other=-float("inf"))
    sums = tl.load(mass + 2 * (row * pieces + piece) + 1, mask=piece < pieces, other=0.0)
    candidates = tl.load(found + row * pieces * K + own, mask=own < pieces * K, other=0)
    highest = tl.max(maxima, 0)
    lse = highest * inverse_width + tl.log(tl.sum(sums * tl.exp((maxima - highest) * inverse_width), 0))
    key = tl.where(own < pieces * K, _key(candidates), _lowest(candidates))
    left = _with_place(key, own)  # candidates stand in the order of their indices
    for rank in tl.static_range(K):
        best = tl.max(left, 0)
        place = _place(best)
        index = place // K * PIECE + _place(tl.load(found + row * pieces * K + place))
        index = tl.minimum(index, size - 1)
        if token_ids is not None:
            index = tl.load(token_ids + index)
        tl.store(indices + row * K + rank, index.to(tl.int64))
        score = _number(_key(best), like) * inverse_width - lse
        tl.store(scores + row * K + rank, tl.where(score > 0, 0.0, score))  # NaN stays
        left = tl.where(left == best, _with_place(_lowest(left), own), left)


@triton.jit
def _ordered(values):
    """Signed integers in the order of the numbers: of those below zero all bits but the sign are turned."""
    if values.dtype.primitive_bitwidth == 16:
        bits = values.to(tl.int16, bitcast=True).to(tl.int32)
        return tl.where(bits < 0, bits ^ 0x7FFF, bits)
    else:
        bits = values.to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _number(key, like):
    """The number that `_ordered` made the key of, in float32."""
    if key.dtype.primitive_bitwidth == 32:
        bits = tl.where(key < 0, key ^ 0x7FFF, key).to(tl.int16)
        return bits.to(like.dtype.element_ty, bitcast=True).to(tl.float32)
    else:
        bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _with_place(key, place):
    """Key and place as one integer."""
    if key.dtype.primitive_bitwidth == 32:
        return key * 0x10000 + (0xFFFF - place)
    else:
        return key * 0x100000000 + (0xFFFFFFFF - place.to(tl.int64))


@triton.jit
def _key(joined):
    if joined.dtype.primitive_bitwidth == 32:
        return joined >> 16
    else:
        return joined >> 32


@triton.jit
def _place(joined):
    if joined.dtype.primitive_bitwidth == 32:
        return 0xFFFF - (joined & 0xFFFF)
    else:
        return (0xFFFFFFFF - (joined & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def _lowest(like):
    """The lowest key of such integers."""
    if like.dtype.primitive_bitwidth == 32:
        return tl.full(like.shape, -0x8000, tl.int32)
    else:
        return tl.full(like.shape, -0x80000000, tl.int64)
