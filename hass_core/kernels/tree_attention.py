"""Attention of a few new tokens over a key-value cache in one launch, with rotary embedding and writing to the cache.

A program takes some of the queries that share a key-value head, over a share of the slots that hold something, and
then over the new tokens, whose keys it rotates itself; one of those that do writes them into the cache. Where the
context is long, several programs share the same queries, and the last of them to end merges by the log-sum-exp of each
share (FlashDecoding). Nothing depends on the host knowing how many slots are live, so a captured graph serves every
length. For a single token `hass_core.kernels.split_attention` is faster.

                 live slots                     new tokens
    QUERIES  ┌───────────┬───────────┬─────────┬───────────┐   one program (`_unit`): a block of the G·T queries of a
    of one   │  share 0  │  share 1  │    …    │ T, masked │   key-value head, over one share of its slots
    k/v head └───────────┴───────────┴─────────┴───────────┘   1. ask for its first slots; wait for q, k, v; rotate
                   ▼            ▼                  ▼           2. running softmax over its slots, then (the last share)
              sum, lse      sum, lse           sum, lse        over the new tokens, whose k and v it writes
                   └──── the last to end merges them ──► out

Measured (H100, `chain_trials` in `infra/evidence/h100.json`): attention of a tree's 60 nodes 5.9 µs for 10.6 in three
launches (1.8 ×) with SmolLM2's shape; of 10 nodes with Llama-3-8B's 6.7 for 11.7 (1.7 ×).

Shapes: B rows, T new tokens, A heads, KV key-value heads, G = A / KV, d head size, S slots, C columns of `visible`.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import math
from functools import cache

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from hass_core.kernels import HOPPERS_SHARED_MEMORY, shared_memory
from hass_core.kernels.chain import arrived, chained, fetch, wait_for_inputs
from hass_core.kernels.grid import is_last
from hass_core.kernels.split_attention import MOST_QUERIES, PROCESSORS, split_attention

QUERIES_AT_ONCE = 16
SLOTS_AT_ONCE, NEW_AT_ONCE = 256, 64  # of heads of 64, in 16 bits, where shared memory is as large as an H100's
MOST_SPLITS = 16


def tree_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    offset: int = 0,
    visible: Tensor | None = None,
) -> Tensor:
    """Attended values [B, T, A·d] of the queries in `qkv` [B, T, A + 2·KV, d]: queries, keys and values side by side.

    `cos`, `sin` [B, T, 1, d] as in `hass_core.target_model.block`, with the same strides. The new keys and values are
    written into `keys`, `values` [B, KV, S, d] from slot `lengths` [B] + `offset` on. A token sees the first
    `lengths` slots, and of the C slots after them those that `visible` [B, T, C] says; without it, all up to itself.
    """
    batch, tokens, parts, dim = qkv.shape
    kv = keys.shape[1]
    heads = parts - 2 * kv
    wanted, width = tokens * heads // kv, triton.next_power_of_2(dim)
    if wanted <= MOST_QUERIES:
        return split_attention(qkv, cos, sin, keys, values, lengths, offset, visible)
    roomy = shared_memory(qkv.device) >= HOPPERS_SHARED_MEMORY
    # a long context is read once for each block of queries
    queries = QUERIES_AT_ONCE * (2 if roomy and width >= 128 and keys.shape[2] > 1024 else 1)
    fewer, narrow = max(1, width * qkv.element_size() // 128), 1 if roomy else 2
    slots, new = SLOTS_AT_ONCE // fewer // narrow, NEW_AT_ONCE * 2 // max(2, fewer) // narrow
    groups = batch * kv * triton.cdiv(wanted, queries)
    splits = max(1, min(MOST_SPLITS, PROCESSORS // groups, keys.shape[2] // (2 * slots)))
    lines = groups * splits * queries if splits > 1 else 0
    partial = torch.empty(lines, width, device=qkv.device, dtype=torch.float32)
    lse = torch.empty(lines, device=qkv.device, dtype=torch.float32)
    out = torch.empty(batch, tokens, heads * dim, device=qkv.device, dtype=qkv.dtype)
    columns = 0 if visible is None else visible.shape[2]
    _attend[(min(PROCESSORS, groups * splits),)](
        qkv, cos, sin, keys, values, lengths, qkv if visible is None else visible, partial, lse,
        _counters(qkv.device), out, offset, tokens, columns, groups, splits, 1 / math.sqrt(dim), cos.stride(1),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), HEADS=heads, KV=kv, DIM=dim, WIDTH=width,
        QUERIES=queries, SLOTS=slots, NEW=min(new, max(16, triton.next_power_of_2(tokens))),
        CAUSAL=visible is None, EARLIER=offset > 0, num_warps=8, **chained(qkv),
    )  # fmt: skip
    return out


@cache
def _counters(device: torch.device) -> Tensor:
    """Zero between launches; where programs share slots there are at most so many groups."""
    return torch.zeros(PROCESSORS, dtype=torch.int32, device=device)


@triton.jit
def _attend(
    qkv, cos, sin, keys, values, lengths, visible, partial, lse, counters, out, offset, tokens, columns, groups,
    splits, scale, stride, key_batch, key_head, value_batch, value_head, HEADS: tl.constexpr, KV: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr, NEW: tl.constexpr,
    CAUSAL: tl.constexpr, EARLIER: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Program: some of the groups of queries, each over one of at most `splits` shares of the slots."""
    blocks = tl.cdiv(tokens * (HEADS // KV), QUERIES)
    for unit in tl.range(tl.program_id(0), groups * splits, tl.num_programs(0), num_stages=1):
        group, split = unit % groups, unit // groups  # first shares first: there may be no others
        batch, head = (group // blocks // KV).to(tl.int64), group // blocks % KV
        first = batch * tokens  # of the row's tokens
        live = tl.load(lengths + batch).to(tl.int32)
        shares = tl.minimum(splits, tl.maximum(1, (live + offset) // (2 * SLOTS)))
        if split < shares:
            _unit(
                qkv + first * (HEADS + 2 * KV) * DIM, cos + first * stride, sin + first * stride,
                keys + batch * key_batch + head * key_head, values + batch * value_batch + head * value_head,
                visible + first * columns, partial, lse, counters + group, out + first * HEADS * DIM,
                group * splits + split, live, offset, tokens, columns, scale, stride, head, group % blocks, split,
                shares, HEADS, KV, DIM, WIDTH, QUERIES, SLOTS, NEW, CAUSAL, EARLIER, CHAINED,
            )  # fmt: skip


@triton.jit
def _unit(
    qkv, cos, sin, keys, values, visible, partial, lse, counter, out, line, live, offset, tokens, columns, scale,
    stride, head, block, split, shares, HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, SLOTS: tl.constexpr, NEW: tl.constexpr, CAUSAL: tl.constexpr, EARLIER: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """A block of the queries that share a key-value head, over one share of its slots; the last one has the new tokens.

    All that is there before the new queries, keys and values is on its way when these are waited for, and these are
    asked for all at once: the time goes into waiting for memory.
    """
    G: tl.constexpr = HEADS // KV
    PARTS: tl.constexpr = HEADS + 2 * KV
    before = live + offset
    share = tl.cdiv(tl.cdiv(before, SLOTS), shares) * SLOTS
    stop = tl.minimum((split + 1) * share, before)
    slot = split * share + tl.arange(0, SLOTS)
    row = block * QUERIES + tl.arange(0, QUERIES)
    token, real, part = row // G, row < tokens * G, head * G + row % G
    new = tl.arange(0, NEW)
    taken = tl.where(split == shares - 1, tokens, 0)  # new tokens
    kept = tl.where(block == 0, taken, 0)
    held = new < taken
    seen = _seen_of_cached(visible, slot, stop, live, token, real, columns, CAUSAL, EARLIER)
    new_seen = _seen_of_new(visible, new, taken, token, real, columns, offset, CAUSAL)
    key, value = _cached(keys, slot, stop, DIM, WIDTH), _cached(values, slot, stop, DIM, WIDTH)
    cosine, sine = _part(cos, token * stride, real, DIM, WIDTH), _part(sin, token * stride, real, DIM, WIDTH)
    new_cosine, new_sine = _part(cos, new * stride, held, DIM, WIDTH), _part(sin, new * stride, held, DIM, WIDTH)
    fetch(keys + tl.minimum(slot + SLOTS, before) * DIM, CHAINED)
    fetch(values + tl.minimum(slot + SLOTS, before) * DIM, CHAINED)
    wait_for_inputs(CHAINED)

    start, new_start = (token * PARTS + part) * DIM, (new * PARTS + HEADS + head) * DIM
    query = _part(qkv, start, real, DIM, WIDTH)
    rolled = _part_rolled(qkv, start, real, DIM, WIDTH)
    new_key = _part(qkv, new_start, held, DIM, WIDTH)
    new_rolled = _part_rolled(qkv, new_start, held, DIM, WIDTH)
    new_value = _part(qkv, new_start + KV * DIM, held, DIM, WIDTH)
    query = _rotated(query, rolled, cosine, sine, CHAINED)
    new_key = _rotated(new_key, new_rolled, new_cosine, new_sine, CHAINED)
    key, value, new_value = arrived(key, CHAINED), arrived(value, CHAINED), arrived(new_value, CHAINED)
    scores = tl.where(seen, tl.dot(query, tl.trans(key), input_precision="ieee") * scale, -float("inf"))
    new_scores = tl.dot(query, tl.trans(new_key), input_precision="ieee") * scale
    new_scores = tl.where(new_seen, new_scores, -float("inf"))
    highest = tl.maximum(tl.maximum(tl.max(scores, 1), tl.max(new_scores, 1)), -1e30)
    weight, new_weight = tl.exp(scores - highest[:, None]), tl.exp(new_scores - highest[:, None])
    total = tl.sum(weight, 1) + tl.sum(new_weight, 1)
    summed = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
    summed = tl.dot(new_weight.to(value.dtype), new_value, summed, input_precision="ieee")
    _keep(keys, values, new_key, new_value, before + new, new < kept, DIM, WIDTH)

    for first in tl.range(split * share + SLOTS, stop, SLOTS, num_stages=2):
        slot = first + tl.arange(0, SLOTS)
        key, value = _cached(keys, slot, stop, DIM, WIDTH), _cached(values, slot, stop, DIM, WIDTH)
        seen = _seen_of_cached(visible, slot, stop, live, token, real, columns, CAUSAL, EARLIER)
        highest, total, summed = _step(query, key, value, seen, highest, total, summed, scale)
    for first in range(NEW, taken, NEW):
        more = first + tl.arange(0, NEW)
        held = more < taken
        new_start = (more * PARTS + HEADS + head) * DIM
        new_cosine, new_sine = _part(cos, more * stride, held, DIM, WIDTH), _part(sin, more * stride, held, DIM, WIDTH)
        new_key = _part(qkv, new_start, held, DIM, WIDTH)
        new_rolled = _part_rolled(qkv, new_start, held, DIM, WIDTH)
        new_value = _part(qkv, new_start + KV * DIM, held, DIM, WIDTH)
        new_key = _rotated(new_key, new_rolled, new_cosine, new_sine, CHAINED)
        _keep(keys, values, new_key, new_value, before + more, more < kept, DIM, WIDTH)
        new_seen = _seen_of_new(visible, more, taken, token, real, columns, offset, CAUSAL)
        highest, total, summed = _step(query, new_key, new_value, new_seen, highest, total, summed, scale)

    mean = summed / tl.maximum(total, 1e-30)[:, None]
    dim = tl.arange(0, WIDTH)
    mask = real[:, None] & (dim < DIM)[None, :]
    goal = out + ((token * HEADS + part) * DIM)[:, None] + dim[None, :]
    if shares == 1:
        tl.store(goal, mean.to(out.dtype.element_ty), mask=mask)
    else:
        own_row = line * QUERIES + tl.arange(0, QUERIES)
        tl.store(lse + own_row, highest + tl.log(tl.maximum(total, 1e-30)))
        tl.store(partial + own_row[:, None] * WIDTH + dim[None, :], mean)
        if is_last(counter, shares):
            _merge(partial, lse, line - split, shares, goal, mask, QUERIES, WIDTH)


@triton.jit
def _cached(stored, slot, stop, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[slots, WIDTH] keys or values of the slots below `stop`."""
    dim = tl.arange(0, WIDTH)
    mask = (slot < stop)[:, None] & (dim < DIM)[None, :]
    return tl.load(stored + slot[:, None] * DIM + dim[None, :], mask=mask, other=0.0)


@triton.jit
def _seen_of_cached(
    visible, slot, stop, live, token, real, columns, CAUSAL: tl.constexpr, EARLIER: tl.constexpr
):  # fmt: skip
    """[queries, slots]: all live slots, and of EARLIER rows of a tree past them what `visible` says."""
    seen = (slot < stop)[None, :] & real[:, None]
    if EARLIER and not CAUSAL:
        past = (slot - live)[None, :]
        seen &= tl.load(visible + token[:, None] * columns + past, mask=seen & (past >= 0), other=1) != 0
    return seen


@triton.jit
def _seen_of_new(visible, new, taken, token, real, columns, offset, CAUSAL: tl.constexpr):
    """[queries, new tokens]: those up to the query's own, or what `visible` says."""
    seen = (new < taken)[None, :] & real[:, None]
    if CAUSAL:
        return seen & (new[None, :] <= token[:, None])
    else:
        return tl.load(visible + token[:, None] * columns + offset + new[None, :], mask=seen, other=0) != 0


@triton.jit
def _part(rows, start, real, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[n, WIDTH] from the indices `start` [n] of `rows` on."""
    dim = tl.arange(0, WIDTH)
    return tl.load(rows + start[:, None] + dim[None, :], mask=real[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def _part_rolled(rows, start, real, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """As `_part`, the second half first."""
    dim = tl.arange(0, WIDTH)
    rolled = (dim + DIM // 2) % DIM
    return tl.load(rows + start[:, None] + rolled[None, :], mask=real[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def _rotated(x, rolled, cosine, sine, CHAINED: tl.constexpr):
    """Rotated by positions' cosines and signed sines."""
    rotated = x.to(tl.float32) * cosine.to(tl.float32) + rolled.to(tl.float32) * sine.to(tl.float32)
    return arrived(rotated.to(x.dtype), CHAINED)


@triton.jit
def _keep(keys, values, key, value, slot, real, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Put new keys and values into the cache."""
    dim = tl.arange(0, WIDTH)
    mask = real[:, None] & (dim < DIM)[None, :]
    at = slot[:, None] * DIM + dim[None, :]
    tl.store(keys + at, key, mask=mask)
    tl.store(values + at, value, mask=mask)


@triton.jit
def _step(query, key, value, seen, highest, total, summed, scale):
    """Take some keys and values into a running softmax."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(highest, tl.max(scores, 1))
    weight = tl.exp(scores - higher[:, None])
    shrunk = tl.exp(highest - higher)
    summed = summed * shrunk[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
    return higher, total * shrunk + tl.sum(weight, 1), summed


@triton.jit
def _merge(partial, lse, first, shares, goal, mask, QUERIES: tl.constexpr, WIDTH: tl.constexpr):
    """Add up the shares of a block of queries, weighted by their part of the softmax."""
    row, dim = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    highest = tl.full([QUERIES], -1e30, tl.float32)
    for share in range(shares):
        highest = tl.maximum(highest, tl.load(lse + (first + share) * QUERIES + row))
    total = tl.zeros([QUERIES], tl.float32)
    summed = tl.zeros([QUERIES, WIDTH], tl.float32)
    for share in range(shares):
        line = (first + share) * QUERIES + row
        weight = tl.exp(tl.load(lse + line) - highest)
        total += weight
        summed += weight[:, None] * tl.load(partial + line[:, None] * WIDTH + dim[None, :])
    tl.store(goal, (summed / total[:, None]).to(goal.dtype.element_ty), mask=mask)
