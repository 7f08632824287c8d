"""All layers of a decoder for a handful of rows, in one launch.

A layer of a small model is a few microseconds of reading, and a launch for each of its products costs as much again:
the next kernel starts when the last program of the one before has ended, with nothing on its way from memory. Here
the programs stay for all layers. They pass from product to attention to product over a barrier, and before they wait
there each starts to fetch the weights that it needs behind it.

Stages of a layer: q/k/v, rotated and put into the cache; attention; output projection, residual and most of a norm;
gate and up; down, residual and most of the next layer's norm. See `hass_core.kernels.few_rows` for how a norm is shared
between two products, and `hass_core.kernels.staged_attention` for the attention. A draft has one layer, without a norm
before it, behind the product that fuses embedding and feature.

Shapes: R = B·T rows, H hidden, A heads, KV key-value heads, d head size, I inner, S slots, L layers.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from hass_core.kernels.few_rows import norm_left, squares_made, sums
from hass_core.kernels.grid import fetch, wait_for_all
from hass_core.kernels.staged_attention import attention_stage

FIELDS = tl.constexpr(15)  # of a layer in the table of addresses, in this order
QKV, QKV_BIAS, QKV_SCALE, OUT, OUT_BIAS, OUT_SCALE, GATE_UP, GATE_UP_SCALE = (tl.constexpr(i) for i in range(8))
DOWN, DOWN_SCALE, NORM, NEXT_NORM, FUSE, FUSE_BIAS, FUSE_SCALE = (tl.constexpr(i) for i in range(8, 15))


@triton.jit(do_not_specialize=["layers", "rows", "tokens", "offset", "columns", "blocks", "splits"])
def whole_pass(
    table, pairs, x, ready, normed, squares, queries, attended, gated, partial, lse, merged, arrivals,
    cos, sin, lengths, visible, cache, layers, rows, tokens, turn, offset, columns, eps, scale, blocks, splits,
    cache_layer, cache_part, cache_row, cache_head,
    HIDDEN: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, INNER: tl.constexpr,
    ROWS: tl.constexpr, QKV_CUT: tl.constexpr, OUT_CUT: tl.constexpr, UP_CUT: tl.constexpr, DOWN_CUT: tl.constexpr,
    FUSE_CUT: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr, NEW: tl.constexpr, WIDTH: tl.constexpr,
    MADE: tl.constexpr, FUSED: tl.constexpr, EIGHT: tl.constexpr, CAUSAL: tl.constexpr, HAS_QKV_BIAS: tl.constexpr,
    HAS_OUT_BIAS: tl.constexpr, HAS_FUSE_BIAS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Program: its share of every stage. A cut is (columns a tile, inputs a step, steps under way, lines of a row of
    weights that are fetched ahead)."""
    programs = tl.num_programs(0)
    before = tl.load(arrivals + 1)  # barriers that earlier launches passed
    live = tl.load(lengths + tl.minimum(tl.program_id(0) // (splits * blocks * KV), rows // tokens - 1))
    passed = before * programs
    if FUSED:
        _fuse_stage(
            pairs, _weight(table, FUSE, x, EIGHT), _vector(table, FUSE_BIAS, x), _floats(table, FUSE_SCALE), x, rows,
            HIDDEN, ROWS, FUSE_CUT, HAS_FUSE_BIAS, EIGHT,
        )  # fmt: skip
        ready = x
        passed += programs
        weight, bias, factor = _weight(table, QKV, x, EIGHT), _vector(table, QKV_BIAS, x), _floats(table, QKV_SCALE)
        _fetch_heads(table, HIDDEN, HEADS + 2 * KV, DIM, QKV_CUT, x, EIGHT, PTX)
        wait_for_all(arrivals, passed, PTX)
    else:
        weight, bias, factor = _weight(table, QKV, x, EIGHT), _vector(table, QKV_BIAS, x), _floats(table, QKV_SCALE)
    for layer in range(layers):
        # what a stage needs to begin is looked up before the barrier in front of it
        own = table + layer * FIELDS
        _qkv_stage(
            ready, weight, bias, factor, squares, queries, cache, cos, sin, lengths, rows, layer, tokens, turn, offset,
            eps, cache_part, cache_row, cache_head, HIDDEN, HEADS, KV, DIM, ROWS, QKV_CUT, HAS_QKV_BIAS, EIGHT,
            DOWN_CUT[0], 0 if FUSED else MADE,
        )  # fmt: skip
        _fetch_tile(own, OUT, HIDDEN, HEADS * DIM, OUT_CUT, 1, x, EIGHT, PTX)
        passed += programs
        wait_for_all(arrivals, passed, PTX)

        attention_stage(
            queries, cache, cache + cache_part, lengths, live, visible, partial, lse, merged, attended, tokens, offset,
            columns, scale, rows // tokens, blocks, splits, cache_row, cache_head, HEADS, KV, DIM, WIDTH, QUERIES,
            SLOTS, NEW, CAUSAL,
        )  # fmt: skip
        weight, bias, factor = _weight(own, OUT, x, EIGHT), _vector(own, OUT_BIAS, x), _floats(own, OUT_SCALE)
        norm = _vector(own, NORM, x)
        passed += programs
        wait_for_all(arrivals, passed, PTX)

        _residual_stage(
            attended, weight, bias, factor, x, norm, normed, squares, rows, HEADS * DIM, HIDDEN, ROWS, OUT_CUT,
            HAS_OUT_BIAS, EIGHT,
        )  # fmt: skip
        weight, factor = _weight(own, GATE_UP, x, EIGHT), _floats(own, GATE_UP_SCALE)
        _fetch_tile(own, GATE_UP, INNER, HIDDEN, UP_CUT, 2, x, EIGHT, PTX)
        passed += programs
        wait_for_all(arrivals, passed, PTX)

        _gated_stage(
            normed, weight, factor, squares, gated, rows, eps, HIDDEN, INNER, ROWS, UP_CUT, EIGHT, OUT_CUT[0], MADE
        )
        weight, factor, norm = _weight(own, DOWN, x, EIGHT), _floats(own, DOWN_SCALE), _vector(own, NEXT_NORM, x)
        _fetch_tile(own, DOWN, HIDDEN, INNER, DOWN_CUT, 1, x, EIGHT, PTX)
        passed += programs
        wait_for_all(arrivals, passed, PTX)

        _residual_stage(
            gated, weight, bias, factor, x, norm, normed, squares, rows, INNER, HIDDEN, ROWS, DOWN_CUT, False, EIGHT
        )
        if layer < layers - 1:
            own += FIELDS
            weight, bias, factor = _weight(own, QKV, x, EIGHT), _vector(own, QKV_BIAS, x), _floats(own, QKV_SCALE)
            _fetch_heads(own, HIDDEN, HEADS + 2 * KV, DIM, QKV_CUT, x, EIGHT, PTX)
            passed += programs
            wait_for_all(arrivals, passed, PTX)
        cache += cache_layer
    if tl.program_id(0) == 0:
        tl.store(arrivals + 1, before + 5 * layers - 1 + FUSED)


@triton.jit
def _fuse_stage(
    pairs, weight, bias, factor, x, rows, HIDDEN: tl.constexpr, ROWS: tl.constexpr, CUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """x = pairs · weightᵀ + bias."""
    row = tl.arange(0, ROWS)
    for tile in range(tl.program_id(0), tl.cdiv(HIDDEN, CUT[0]), tl.num_programs(0)):
        column = tile * CUT[0] + tl.arange(0, CUT[0])
        inside = column < HIDDEN
        factors, added = _factors(factor, column, inside, EIGHT), _added(bias, column, inside, HAS_BIAS)
        summed, _ = sums(pairs, weight, rows, HIDDEN, 0, row, column, 2 * HIDDEN, ROWS, CUT[0], CUT[1], CUT[2], False)
        summed = summed * factors + added.to(tl.float32)
        mask = (row < rows)[:, None] & inside[None, :]
        tl.store(x + row[:, None] * HIDDEN + column[None, :], summed.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _qkv_stage(
    ready, weight, bias, factor, squares, queries, cache, cos, sin, lengths, rows, layer, tokens, turn, offset, eps,
    cache_part, cache_row, cache_head, HIDDEN: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, CUT: tl.constexpr, HAS_BIAS: tl.constexpr, EIGHT: tl.constexpr, MAKERS_COLUMNS: tl.constexpr,
    MADE: tl.constexpr,
):  # fmt: skip
    """Rotated queries, and rotated keys and values in the cache. A tile has columns of a head's first half and those of
    its second half that rotation mixes with them. Behind the first layer with MADE, `ready` is yet to be normed."""
    HALF: tl.constexpr = DIM // 2
    TILES: tl.constexpr = (HALF + CUT[0] - 1) // CUT[0]  # of a head
    row = tl.arange(0, ROWS)
    real, batch = row < rows, row // tokens
    for tile in range(tl.program_id(0), (HEADS + 2 * KV) * TILES, tl.num_programs(0)):
        head = tile // TILES
        dim = tile % TILES * CUT[0] + tl.arange(0, CUT[0])
        inside = dim < HALF
        mask = real[:, None] & inside[None, :]
        column = head * DIM + dim
        # all that the end needs is on its way before the product begins, and looked at after it
        live = tl.load(lengths + batch, mask=real, other=0)
        turned = mask & (column < (HEADS + KV) * DIM)[None, :]
        at = row[:, None] * turn + dim[None, :]
        along = tl.load(cos + at, mask=turned, other=1.0)
        across = tl.load(sin + at, mask=turned, other=0.0)
        other_along = tl.load(cos + at + HALF, mask=turned, other=1.0)
        other_across = tl.load(sin + at + HALF, mask=turned, other=0.0)
        if MADE:
            made = squares_made(squares, tl.cdiv(HIDDEN, MAKERS_COLUMNS), rows, row, MADE)
        factors, added = _factors(factor, column, inside, EIGHT), _added(bias, column, inside, HAS_BIAS)
        other_factors = _factors(factor, column + HALF, inside, EIGHT)
        other_added = _added(bias, column + HALF, inside, HAS_BIAS)
        end = tl.where(inside, column, (HEADS + 2 * KV) * DIM)
        first, other = sums(
            ready, weight, rows, (HEADS + 2 * KV) * DIM, HALF, row, end, HIDDEN, ROWS, CUT[0], CUT[1], CUT[2], True
        )
        if MADE:
            left = tl.where(layer != 0, norm_left(made, eps, HIDDEN), 1.0)[:, None]
            first *= left
            other *= left
        first = first * factors + added.to(tl.float32)
        other = other * other_factors + other_added.to(tl.float32)
        turned_first = first * along.to(tl.float32) + other * across.to(tl.float32)
        turned_other = other * other_along.to(tl.float32) + first * other_across.to(tl.float32)
        if head < HEADS:
            goal = queries + (row * HEADS + head)[:, None] * DIM + dim[None, :]
        else:
            kept = head - HEADS
            slot = live.to(tl.int32) + offset + row % tokens
            start = cache + kept // KV * cache_part + kept % KV * cache_head
            goal = start + batch.to(tl.int64)[:, None] * cache_row + slot[:, None] * DIM + dim[None, :]
        tl.store(goal, turned_first.to(queries.dtype.element_ty), mask=mask)
        tl.store(goal + HALF, turned_other.to(queries.dtype.element_ty), mask=mask)


@triton.jit
def _gated_stage(
    normed, weight, factor, squares, gated, rows, eps, HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr,
    CUT: tl.constexpr, EIGHT: tl.constexpr, MAKERS_COLUMNS: tl.constexpr, MADE: tl.constexpr,
):  # fmt: skip
    """gated = SiLU(gate) · up of the rows, all but normed by makers of MAKERS_COLUMNS each."""
    row = tl.arange(0, ROWS)
    for tile in range(tl.program_id(0), tl.cdiv(INNER, CUT[0]), tl.num_programs(0)):
        column = tile * CUT[0] + tl.arange(0, CUT[0])
        inside = column < INNER
        made = squares_made(squares, tl.cdiv(HIDDEN, MAKERS_COLUMNS), rows, row, MADE)
        gate_factors = _factors(factor, column, inside, EIGHT)
        up_factors = _factors(factor, column + INNER, inside, EIGHT)
        gate, up = sums(normed, weight, rows, INNER, INNER, row, column, HIDDEN, ROWS, CUT[0], CUT[1], CUT[2], True)
        left = norm_left(made, eps, HIDDEN)[:, None]
        gate *= left * gate_factors
        result = gate * tl.sigmoid(gate) * up * left * up_factors
        mask = (row < rows)[:, None] & inside[None, :]
        tl.store(gated + row[:, None] * INNER + column[None, :], result.to(gated.dtype.element_ty), mask=mask)


@triton.jit
def _residual_stage(
    inputs, weight, bias, factor, x, norm, normed, squares, rows, INPUTS: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, CUT: tl.constexpr, HAS_BIAS: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """x += inputs · weightᵀ + bias; normed = x times the norm's weight, and each tile's sums of squares."""
    row = tl.arange(0, ROWS)
    for tile in range(tl.program_id(0), tl.cdiv(HIDDEN, CUT[0]), tl.num_programs(0)):
        column = tile * CUT[0] + tl.arange(0, CUT[0])
        inside = column < HIDDEN
        mask = (row < rows)[:, None] & inside[None, :]
        goal = row[:, None] * HIDDEN + column[None, :]
        residual = tl.load(x + goal, mask=mask, other=0.0)
        norms = tl.load(norm + column, mask=inside, other=0.0)
        factors, added = _factors(factor, column, inside, EIGHT), _added(bias, column, inside, HAS_BIAS)
        summed, _ = sums(inputs, weight, rows, HIDDEN, 0, row, column, INPUTS, ROWS, CUT[0], CUT[1], CUT[2], False)
        result = (summed * factors + added.to(tl.float32) + residual.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + goal, result, mask=mask)
        wide = result.to(tl.float32)
        tl.store(normed + goal, (wide * norms.to(tl.float32)[None, :]).to(normed.dtype.element_ty), mask=mask)
        tl.store(squares + tile * rows + row, tl.sum(tl.where(mask, wide * wide, 0.0), 1), mask=row < rows)


@triton.jit
def _factors(factor, column, inside, EIGHT: tl.constexpr):
    """[1, columns] that weights of 8 bits are multiplied by."""
    if EIGHT:
        return tl.load(factor + column, mask=inside, other=0.0)[None, :]
    else:
        return tl.full([1, column.shape[0]], 1.0, tl.float32)


@triton.jit
def _added(bias, column, inside, HAS_BIAS: tl.constexpr):
    """The bias [1, columns]."""
    if HAS_BIAS:
        return tl.load(bias + column, mask=inside, other=0.0)[None, :]
    else:
        return tl.full([1, column.shape[0]], 0.0, tl.float32)


@triton.jit
def _fetch_tile(
    own, WEIGHT: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, CUT: tl.constexpr, PARTS: tl.constexpr,
    like, EIGHT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Start to fetch the weights that this program will read first; a gated layer's have two PARTS."""
    if PTX and CUT[3]:
        SIZE: tl.constexpr = 1 if EIGHT else like.dtype.element_ty.primitive_bitwidth // 8
        column = tl.program_id(0) * CUT[0] + tl.arange(0, CUT[0])
        if tl.program_id(0) * CUT[0] < OUTPUTS:
            for part in tl.static_range(PARTS):
                own_rows = tl.minimum(column, OUTPUTS - 1) + part * OUTPUTS
                fetch(tl.load(own + WEIGHT), own_rows, INPUTS * SIZE, CUT[3])


@triton.jit
def _fetch_heads(
    own, HIDDEN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, CUT: tl.constexpr, like, EIGHT: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """As `_fetch_tile`, of q/k/v."""
    if PTX and CUT[3]:
        SIZE: tl.constexpr = 1 if EIGHT else like.dtype.element_ty.primitive_bitwidth // 8
        TILES: tl.constexpr = (DIM // 2 + CUT[0] - 1) // CUT[0]
        tile = tl.program_id(0)
        if tile < HEADS * TILES:
            dim = tl.minimum(tile % TILES * CUT[0] + tl.arange(0, CUT[0]), DIM // 2 - 1)
            column = tile // TILES * DIM + dim
            fetch(tl.load(own + QKV), column, HIDDEN * SIZE, CUT[3])
            fetch(tl.load(own + QKV), column + DIM // 2, HIDDEN * SIZE, CUT[3])


@triton.jit
def _weight(table, FIELD: tl.constexpr, like, EIGHT: tl.constexpr):
    if EIGHT:
        return _pointer(table, FIELD, tl.float8e4nv)
    else:
        return _pointer(table, FIELD, like.dtype.element_ty)


@triton.jit
def _vector(table, FIELD: tl.constexpr, like):
    return _pointer(table, FIELD, like.dtype.element_ty)


@triton.jit
def _floats(table, FIELD: tl.constexpr):
    return _pointer(table, FIELD, tl.float32)


@triton.jit
def _pointer(table, FIELD: tl.constexpr, KIND: tl.constexpr):
    # of a number made a pointer the compiler must be told what it may read at once
    return tl.multiple_of(tl.load(table + FIELD).to(tl.pointer_type(KIND)), 16)
