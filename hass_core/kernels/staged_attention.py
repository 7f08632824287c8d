"""Attention over a key-value cache as one stage of a launch, its merging included.

A program takes some queries that share a key-value head, over a share of the slots. Where the context is long, several
programs share the same queries; the last of them to end merges by the log-sum-exp of each share (FlashDecoding).

Shapes: B batch rows, T new tokens, A heads, KV key-value heads, G = A / KV, d head size, S slots, C columns of
`visible`.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from hass_core.kernels.grid import is_last

FEWEST_SLOTS = tl.constexpr(512)  # of a share: merging two takes as long as reading some hundred slots


@triton.jit
def attention_stage(
    queries, keys, values, lengths, live, visible, partial, lse, merged, out, tokens, offset, columns, scale,
    batch_rows, blocks, splits, cache_row, cache_head, A: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr, NEW: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """`out` [B, T, A·d] from rotated `queries` [B, T, A, d]; the new tokens' keys and values are in the cache already.

    Units: a block of QUERIES that share a key-value head, over one of at most `splits` shares of the slots. `live` is
    the length of the program's first unit. `partial`, `lse` hold the shares' results, `merged` [B·KV, blocks] counts
    those that are done.
    """
    units = batch_rows * KV * blocks * splits
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        group, split = unit // splits, unit % splits
        batch = group // blocks // KV
        if unit != tl.program_id(0):
            live = tl.load(lengths + batch)
        shares = tl.minimum(splits, tl.maximum(1, (live.to(tl.int32) + offset + tokens) // FEWEST_SLOTS))
        if split < shares:
            _unit(
                queries, keys, values, visible, partial, lse, merged, out, tokens, offset, columns, scale, batch,
                group // blocks % KV, group % blocks, live.to(tl.int32), split, shares, group, splits, cache_row,
                cache_head, A, KV, D, WIDTH, QUERIES, SLOTS, NEW, CAUSAL,
            )  # fmt: skip


@triton.jit
def _unit(
    queries, keys, values, visible, partial, lse, merged, out, tokens, offset, columns, scale, batch, head, block, live,
    split, shares, group, splits, cache_row, cache_head, A: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr, NEW: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One block of queries over one of `shares` shares of the slots."""
    G: tl.constexpr = A // KV
    share = tl.cdiv(tl.cdiv(live, SLOTS), shares) * SLOTS
    stop = tl.minimum((split + 1) * share, live)
    row = block * QUERIES + tl.arange(0, QUERIES)
    token, dim, real = batch * tokens + row // G, tl.arange(0, WIDTH), row < tokens * G
    mask = real[:, None] & (dim < D)[None, :]
    place = (token * A + head * G + row % G)[:, None] * D + dim[None, :]
    query = tl.load(queries + place, mask=mask, other=0.0)
    keys += batch.to(tl.int64) * cache_row + head * cache_head
    values += batch.to(tl.int64) * cache_row + head * cache_head

    highest = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    summed = tl.zeros([QUERIES, WIDTH], tl.float32)
    for first in tl.range(split * share, stop, SLOTS, num_stages=2):
        slot = first + tl.arange(0, SLOTS)
        held = (slot < stop)[:, None] & (dim < D)[None, :]
        at = slot[:, None] * D + dim[None, :]
        key = tl.load(keys + at, mask=held, other=0.0)
        value = tl.load(values + at, mask=held, other=0.0)
        seen = (slot < stop)[None, :] & real[:, None]
        highest, total, summed = _step(query, key, value, seen, highest, total, summed, scale)
    if split == shares - 1:  # the slots behind the live ones are seen by some queries only
        for first in range(0, offset + tokens, NEW):
            behind = first + tl.arange(0, NEW)  # column of `visible`
            held = behind < offset + tokens
            at = (live + behind)[:, None] * D + dim[None, :]
            in_width = held[:, None] & (dim < D)[None, :]
            key = tl.load(keys + at, mask=in_width, other=0.0)
            value = tl.load(values + at, mask=in_width, other=0.0)
            if CAUSAL:
                seen = held[None, :] & (behind[None, :] <= offset + (row // G)[:, None])
            else:
                asked = real[:, None] & held[None, :]
                seen = tl.load(visible + token[:, None] * columns + behind[None, :], mask=asked, other=0) != 0
            highest, total, summed = _step(query, key, value, seen, highest, total, summed, scale)

    mean = summed / tl.maximum(total, 1e-30)[:, None]
    if shares == 1:
        tl.store(out + place, mean.to(out.dtype.element_ty), mask=mask)
    else:
        line = (group * splits + split) * QUERIES + tl.arange(0, QUERIES)
        tl.store(lse + line, highest + tl.log(tl.maximum(total, 1e-30)))
        tl.store(partial + line[:, None] * WIDTH + dim[None, :], mean)
        if is_last(merged + group, shares):
            _merge(partial, lse, group * splits, shares, out + place, mask, QUERIES, WIDTH)


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
