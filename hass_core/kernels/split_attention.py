"""Attention of so few queries over a key-value cache that its slots must be shared out to keep a GPU busy.

Three kernels: the new tokens are rotated and put into the cache; the live slots and the new ones are attended to in
splits, by many programs at once, each reading only slots that hold something; the splits are merged by their
log-sum-exp (FlashDecoding). Nothing depends on the host knowing how many slots are live, so a captured graph serves
every length.

    `_place`    one program: some heads of one new token     rotate q and k; k, v ──► cache
    `_attend`   one program: the G·T queries of a key-value  slots │ split 0 │ split 1 │ … │ new │
                head over one split of its slots             ──► sum and log-sum-exp of the split
    `_merge`    one program: one query                       splits weighted by exp(lse - max) ──► out

Measured (H100, `chain_trials` in `infra/evidence/h100.json`): a layer of SmolLM2, one row, 12.2 µs with these three
launches for 14.0 with `tree_attention`'s one (1.15 ×); Llama's attention alone 5.1 µs for 6.3 (1.2 ×).

Shapes: B rows, T new tokens, A heads, KV key-value heads, G = A / KV, d head size, S slots, C columns of `visible`.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import math

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from hass_core.kernels.chain import chained, fetch, wait_for_inputs

MOST_QUERIES = 16  # that share a key-value head
PARTS_AT_ONCE = 8
PROCESSORS = 132  # of an H100
MOST_SPLITS = 16


def split_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    offset: int,
    visible: Tensor | None,
) -> Tensor:
    """As `hass_core.kernels.tree_attention.tree_attention`, for at most MOST_QUERIES queries of a key-value head."""
    batch, tokens, parts, dim = qkv.shape
    kv = keys.shape[1]
    heads = parts - 2 * kv
    group = heads // kv
    width = triton.next_power_of_2(dim)
    queries = torch.empty(batch, tokens, heads, dim, device=qkv.device, dtype=qkv.dtype)
    _place[(batch * tokens, triton.cdiv(parts, PARTS_AT_ONCE))](
        qkv, cos, sin, queries, keys, values, lengths, offset, tokens, cos.stride(1), keys.stride(0), keys.stride(1),
        values.stride(0), values.stride(1), heads, kv, dim, PARTS=PARTS_AT_ONCE, WIDTH=width, **chained(qkv),
    )  # fmt: skip
    # of the wide ones a processor holds one or two
    splits = max(1, min(MOST_SPLITS, PROCESSORS * (1 if width >= 128 else 4) // (batch * kv)))
    out = torch.empty(batch, tokens, heads * dim, device=qkv.device, dtype=qkv.dtype)
    lines = batch * kv * splits * tokens * group if splits > 1 else 0
    partial = torch.empty(lines, dim, device=qkv.device, dtype=torch.float32)
    lse = torch.empty(lines, device=qkv.device, dtype=torch.float32)
    columns = 0 if visible is None else visible.shape[2]
    _attend[(batch * kv, splits)](
        queries, keys, values, lengths, visible, partial, lse, out, offset, tokens, columns, 1 / math.sqrt(dim),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), heads, kv, group, dim, SPLITS=splits,
        ROWS=MOST_QUERIES, SLOTS=32 if width >= 128 else 64, WIDTH=width, CAUSAL=visible is None, **chained(qkv),
    )  # fmt: skip
    if splits > 1:
        _merge[(batch * kv, tokens * group)](
            partial, lse, out, tokens, heads, kv, group, dim, splits, SPLITS=triton.next_power_of_2(splits),
            WIDTH=width, **chained(qkv),
        )  # fmt: skip
    return out


@triton.jit
def _place(
    qkv, cos, sin, queries, keys, values, lengths, offset, tokens, stride, key_batch, key_head, value_batch, value_head,
    heads, kv, dim, PARTS: tl.constexpr, WIDTH: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Program: some heads of one token. Rotates queries and keys, stores keys and values."""
    token = tl.program_id(0)
    batch = (token // tokens).to(tl.int64)
    slot = tl.load(lengths + batch) + offset + token % tokens
    part, column = tl.program_id(1) * PARTS + tl.arange(0, PARTS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (part < heads + 2 * kv) & (column < dim)
    start = qkv + (token.to(tl.int64) * (heads + 2 * kv) + part) * dim
    cosine = tl.load(cos + token * stride + column, mask=column < dim, other=0.0).to(tl.float32)
    sine = tl.load(sin + token * stride + column, mask=column < dim, other=0.0).to(tl.float32)
    wait_for_inputs(CHAINED)
    own = tl.load(start + column, mask=inside, other=0.0)
    rolled = tl.load(start + (column + dim // 2) % dim, mask=inside, other=0.0).to(tl.float32)
    rotated = (own.to(tl.float32) * cosine + rolled * sine).to(own.dtype)
    tl.store(queries + (token.to(tl.int64) * heads + part) * dim + column, rotated, mask=inside & (part < heads))
    own_key, own_value = part - heads, part - heads - kv
    address = keys + batch * key_batch + own_key * key_head + slot * dim + column
    tl.store(address, rotated, mask=inside & (own_key >= 0) & (own_key < kv))
    address = values + batch * value_batch + own_value * value_head + slot * dim + column
    tl.store(address, own, mask=inside & (own_value >= 0))


@triton.jit
def _attend(
    queries, keys, values, lengths, visible, partial, lse, out, offset, tokens, columns, scale, key_batch, key_head,
    value_batch, value_head, heads, kv, group, dim, SPLITS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, CAUSAL: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Program: the queries that share a key-value head, over one split of the slots."""
    batch, head = (tl.program_id(0) // kv).to(tl.int64), tl.program_id(0) % kv
    split = tl.program_id(1)
    live = tl.load(lengths + batch)
    end = live + offset + tokens
    share = tl.cdiv(tl.cdiv(end, SLOTS), SPLITS) * SLOTS
    stop = tl.minimum((split + 1) * share, end)

    row = tl.arange(0, ROWS)
    token, column, real = row // group, tl.arange(0, WIDTH), row < tokens * group
    in_width = column[None, :] < dim
    address = ((batch * tokens + token) * heads + head * group + row % group) * dim
    keys += batch * key_batch + head * key_head
    values += batch * value_batch + head * value_head
    ahead = tl.minimum(split * share + tl.arange(0, SLOTS), end) * dim
    fetch(keys + ahead, CHAINED)
    fetch(values + ahead, CHAINED)
    wait_for_inputs(CHAINED)
    query = tl.load(queries + address[:, None] + column[None, :], mask=real[:, None] & in_width, other=0.0)

    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(split * share, stop, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        held = (slot < stop)[:, None] & in_width
        key = tl.load(keys + slot[:, None] * dim + column[None, :], mask=held, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        past = (slot - live)[None, :]  # column of `visible`
        if CAUSAL:
            seen = past <= offset + token[:, None]
        else:
            asked = visible + (batch * tokens + token)[:, None] * columns + past
            seen = tl.load(asked, mask=real[:, None] & (past >= 0) & (past < columns), other=0) != 0
            seen = seen | (past < 0)
        scores = tl.where(seen & (slot < stop)[None, :], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weight = tl.exp(scores - higher[:, None])
        shrunk = tl.exp(highest - higher)
        value = tl.load(values + slot[:, None] * dim + column[None, :], mask=held, other=0.0)
        summed = summed * shrunk[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * shrunk + tl.sum(weight, 1)
        highest = higher

    mean = summed / tl.maximum(total, 1e-30)[:, None]
    if SPLITS == 1:
        tl.store(out + address[:, None] + column[None, :], mean.to(out.dtype.element_ty), mask=real[:, None] & in_width)
    else:
        line = (tl.program_id(0).to(tl.int64) * SPLITS + split) * tokens * group + row
        tl.store(lse + line, highest + tl.log(tl.maximum(total, 1e-30)), mask=real)
        tl.store(partial + line[:, None] * dim + column[None, :], mean, mask=real[:, None] & in_width)


@triton.jit
def _merge(
    partial, lse, out, tokens, heads, kv, group, dim, splits, SPLITS: tl.constexpr, WIDTH: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Program: one query. Its splits, weighted by their share of the softmax."""
    batch, head, row = tl.program_id(0) // kv, tl.program_id(0) % kv, tl.program_id(1)
    split, column = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    line = (tl.program_id(0).to(tl.int64) * splits + split) * tokens * group + row
    wait_for_inputs(CHAINED)
    part = tl.load(lse + line, mask=split < splits, other=-1e30)
    weight = tl.exp(part - tl.max(part, 0))
    inside = (split < splits)[:, None] & (column < dim)[None, :]
    means = tl.load(partial + line[:, None] * dim + column[None, :], mask=inside, other=0.0)
    merged = tl.sum(means * weight[:, None], 0) / tl.sum(weight, 0)
    address = ((batch.to(tl.int64) * tokens + row // group) * heads + head * group + row % group) * dim
    tl.store(out + address + column, merged.to(out.dtype.element_ty), mask=column < dim)
