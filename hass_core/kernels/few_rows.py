"""Linear layers for a handful of rows, with what stands between them in the same launches.

To verify a tree is to read every weight once for a few dozen rows. The products wait for memory, and between them stand
norms, gates and sums too small to fill a GPU. Here a gate or a residual belongs to the product before it, and so does
most of the RMSNorm after it: (w ⊙ x / rms(x)) · W = ((w ⊙ x) · W) / rms(x), so the product that makes x also writes
w ⊙ x and its sums of squares, and the next one divides its result. A decoder layer takes four launches for eight.

The sums of squares are kept one per program and added in order: the same input gives the same bits.

Weights may be of 8 bits with a scale per output: half the reading. Their products are those of float16, to which fp8
numbers turn exactly and in one instruction. So little is read then that some programs share an output's inputs; the
last of them adds up. A single row has a kernel of its own, `hass_core.kernels.one_row`.

                inputs I                        one program of `_product`: COLUMNS outputs of all rows
             ┌──────────────┐               1. start fetching its weights; wait for the launch before
      rows R │      x       │               2. step by step: sum += x[:, step] · weight[columns, step]ᵀ
             └──────────────┘               3. if SPLITS share the inputs, the last to end adds their sums up
    COLUMNS  ┌──────────────┐ ──► [R, C]    4. / rms of x · scale + bias; gate; + residual
             │    weight    │               5. write the result, and if a norm follows w ⊙ result and Σ result²
             └──────────────┘

Measured (H100, `infra/evidence/h100.json`): a layer's product with the norm before it, Llama-3-8B's q/k/v, 60 rows,
24 µs for 31 by cuBLAS and PyTorch (1.3 ×, `few_rows_linear`); verifying 60 nodes with SmolLM2 1,286 → 888 µs with what
else changed from `764ebf6` to `56bb5c5` (1.4 ×, `decoding`).

Shapes: R rows, I inputs, O outputs, P programs that made the inputs.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
from functools import cache
from typing import NamedTuple, Protocol

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from hass_core.kernels.chain import chained, fetch, wait_for_inputs
from hass_core.kernels.grid import is_last
from hass_core.kernels.one_row import one_row_product
from hass_core.kernels.tiles import Tiles, fitting, lines_ahead, tiles_for

MOST_SHARED = 4096  # tiles of a product whose inputs are shared among programs
MOST_HALF = tl.constexpr(65504.0)  # of float16


class Layer(Protocol):
    """A linear layer: x · weightᵀ · scale + bias."""

    weight: Tensor  # [O, I]
    bias: Tensor | None  # [O]
    scale: Tensor | None  # [O] in float32


class Scaled(NamedTuple):
    """An RMSNorm all but done: the normed rows are values / sqrt(sum(squares) / I + eps)."""

    values: Tensor  # [..., I] inputs times the norm's weight
    squares: Tensor  # [P, R] sums of the inputs' squares, in float32
    eps: float


class Norm(NamedTuple):
    """RMSNorm of a product's result."""

    weight: Tensor  # [O]
    eps: float


def product(x: Tensor | Scaled, layer: Layer, gated: bool = False, tiles: Tiles | None = None) -> Tensor:
    """[..., O] from x [..., I] for at most 64 rows in all, summed in float32.

    With `gated`, the layer's first half are the gates of its second half, it has no bias, and the result [..., O / 2]
    is SiLU(gate) · gated.
    """
    return _launch(x, layer, gated=gated, tiles=tiles)[0]


def added_product(x: Tensor, layer: Layer, residual: Tensor) -> Tensor:
    """As `product`, and residual [..., O] added."""
    return _launch(x, layer, residual=residual)[0]


def added_product_to_norm(
    x: Tensor, layer: Layer, residual: Tensor, norm: Norm, tiles: Tiles | None = None
) -> tuple[Tensor, Scaled]:
    """As `added_product`, and the result all but normed for the next product."""
    out, values, squares = _launch(x, layer, residual=residual, norm=norm, tiles=tiles)
    return out, Scaled(values, squares, norm.eps)


def _launch(
    x: Tensor | Scaled, layer: Layer, gated: bool = False, residual: Tensor | None = None, norm: Norm | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scaled, x = (x, x.values) if isinstance(x, Scaled) else (None, x)
    inputs, outputs = x.shape[-1], len(layer.weight) // 2 if gated else len(layer.weight)
    x, rows = x.contiguous(), x.numel() // inputs
    tiles = fitting(tiles or tiles_for(inputs, outputs, rows, layer.scale is not None), x, layer.weight, rows, gated)
    programs, made_by = triton.cdiv(outputs, tiles.columns), len(scaled.squares) if scaled else 1
    out = x.new_empty(*x.shape[:-1], outputs)
    values = torch.empty_like(out) if norm else out
    squares = x.new_empty(programs if norm else 0, rows, dtype=torch.float32)
    flags = {
        "SHRUNK": triton.next_power_of_2(made_by) if scaled else 0, "SCALE": layer.scale is not None,
        "BIAS": layer.bias is not None, "GATED": gated, "RESIDUAL": residual is not None, "NORM": norm is not None,
        "num_warps": tiles.warps, **chained(x),
    }  # fmt: skip
    common = (
        x, scaled and scaled.squares, layer.weight, layer.scale, layer.bias, residual, norm and norm.weight, out,
        values, squares, scaled.eps if scaled else 0.0, made_by,
    )  # fmt: skip
    if rows == 1:
        one_row_product[(programs,)](*common, outputs, INPUTS=inputs, COLUMNS=tiles.columns, STEP=tiles.step, **flags)
        return out, values, squares
    shared = tiles.splits > 1
    partial = x.new_empty(tiles.splits, rows, len(layer.weight), dtype=torch.float32) if shared else None
    _product[(programs, tiles.splits)](
        *common, partial, _arrivals(x.device) if shared else None, rows, outputs, INPUTS=inputs,
        ROWS=max(16, triton.next_power_of_2(rows)), COLUMNS=tiles.columns, STEP=tiles.step, STAGES=tiles.stages,
        SPLITS=tiles.splits, LINES=lines_ahead(tiles, layer.weight), **flags,
    )  # fmt: skip
    return out, values, squares


@cache
def _arrivals(device: torch.device) -> Tensor:
    """Zero between launches: what programs that share inputs count with."""
    return torch.zeros(MOST_SHARED, dtype=torch.int32, device=device)


@triton.jit
def _product(
    x, x_squares, weight, scale, bias, residual, norm, out, values, squares, eps, made_by, partial, arrivals, rows,
    outputs, INPUTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr, SHRUNK: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, LINES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Program: COLUMNS outputs of all rows, over its part of the inputs."""
    tile, split = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    if LINES:
        SHARE: tl.constexpr = (INPUTS + SPLITS * STEP - 1) // (SPLITS * STEP) * STEP
        EACH: tl.constexpr = 128 // (weight.dtype.element_ty.primitive_bitwidth // 8)  # weights a line
        own = tl.minimum(column, outputs - 1)[:, None].to(tl.int64) * INPUTS
        line = tl.minimum(split * SHARE + tl.arange(0, LINES) * EACH, INPUTS - 1)[None, :]
        fetch(weight + own + line, CHAINED)
        if GATED:
            fetch(weight + outputs * INPUTS + own + line, CHAINED)
    wait_for_inputs(CHAINED)
    summed, ungated = sums(
        x, weight, rows, outputs, outputs, row, column, INPUTS, ROWS, COLUMNS, STEP, STAGES, GATED, SPLITS, split
    )
    if SPLITS == 1:
        _finish(
            summed, ungated, x_squares, scale, bias, residual, norm, out, values, squares, eps, made_by, rows, outputs,
            row, column, tile, INPUTS, SHRUNK, SCALE, BIAS, GATED, RESIDUAL, NORM,
        )  # fmt: skip
    else:
        WIDE: tl.constexpr = 2 if GATED else 1
        mask = (row < rows)[:, None] & (column < outputs)[None, :]
        address = row[:, None] * outputs * WIDE + column[None, :]
        tl.store(partial + split * rows * outputs * WIDE + address, summed, mask=mask)
        if GATED:
            tl.store(partial + split * rows * outputs * WIDE + address + outputs, ungated, mask=mask)
        if is_last(arrivals + tile, SPLITS):
            summed = tl.zeros([ROWS, COLUMNS], tl.float32)
            ungated = tl.zeros([ROWS, COLUMNS], tl.float32)
            for part in tl.static_range(SPLITS):
                there = partial + part * rows * outputs * WIDE + address
                summed += tl.load(there, mask=mask, other=0.0, cache_modifier=".cg")
                if GATED:
                    ungated += tl.load(there + outputs, mask=mask, other=0.0, cache_modifier=".cg")
            _finish(
                summed, ungated, x_squares, scale, bias, residual, norm, out, values, squares, eps, made_by, rows,
                outputs, row, column, tile, INPUTS, SHRUNK, SCALE, BIAS, GATED, RESIDUAL, NORM,
            )  # fmt: skip


@triton.jit
def _finish(
    summed, ungated, x_squares, scale, bias, residual, norm, out, values, squares, eps, made_by, rows, outputs, row,
    column, tile, INPUTS: tl.constexpr, SHRUNK: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """What comes after a product, and writing it."""
    real, inside = row < rows, column < outputs
    if SCALE:
        summed *= tl.load(scale + column, mask=inside, other=0.0)[None, :]
        if GATED:
            ungated *= tl.load(scale + outputs + column, mask=inside, other=0.0)[None, :]
    if SHRUNK:
        shrink = norm_left(squares_made(x_squares, made_by, rows, row, SHRUNK), eps, INPUTS)[:, None]
        summed *= shrink
        ungated *= shrink
    if BIAS:
        summed += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        summed = summed * tl.sigmoid(summed) * ungated
    goal = row[:, None] * outputs + column[None, :]
    mask = real[:, None] & inside[None, :]
    if RESIDUAL:
        summed += tl.load(residual + goal, mask=mask, other=0.0).to(tl.float32)
    result = summed.to(out.dtype.element_ty)
    tl.store(out + goal, result, mask=mask)
    if NORM:
        wide = result.to(tl.float32)
        weights = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(values + goal, (wide * weights[None, :]).to(out.dtype.element_ty), mask=mask)
        tl.store(squares + tile * rows + row, tl.sum(tl.where(mask, wide * wide, 0.0), 1), mask=real)


@triton.jit
def squares_made(squares, made_by, rows, row, SHRUNK: tl.constexpr):
    """[SHRUNK, ROWS]: the sums of squares that `made_by` programs left of the inputs' rows `row`."""
    maker = tl.arange(0, SHRUNK)
    held = (maker < made_by)[:, None] & (row < rows)[None, :]
    return tl.load(squares + maker[:, None] * rows + row[None, :], mask=held, other=0.0)


@triton.jit
def norm_left(made, eps, INPUTS: tl.constexpr):
    """1 / rms of the inputs' rows, from what `squares_made` returned."""
    return tl.rsqrt(tl.sum(made, 0) / INPUTS + eps)


@triton.jit
def sums(
    x, weight, rows, outputs, apart, row, column, INPUTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr, PAIRED: tl.constexpr, SPLITS: tl.constexpr = 1, split=0,
):  # fmt: skip
    """x · weightᵀ at the rows and columns, and if PAIRED at the columns `apart` after those; over every SPLITS-th part
    of the inputs."""
    SHARE: tl.constexpr = (INPUTS + SPLITS * STEP - 1) // (SPLITS * STEP) * STEP
    EVEN: tl.constexpr = INPUTS % (SPLITS * STEP) == 0
    real, inside, step = row < rows, column < outputs, tl.arange(0, STEP)
    own_rows = x + row[:, None] * INPUTS
    own_weight = weight + column[None, :].to(tl.int64) * INPUTS
    other_weight = weight + (column + apart)[None, :].to(tl.int64) * INPUTS
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)
    other = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, SHARE, STEP, num_stages=STAGES):
        index = split * SHARE + first + step
        held = (index < INPUTS) | EVEN
        part = tl.load(own_rows + index[None, :], mask=real[:, None] & held[None, :], other=0.0)
        columns = tl.load(own_weight + index[:, None], mask=inside[None, :] & held[:, None], other=0.0)
        part = as_factor(part, columns)
        summed = tl.dot(part, columns.to(part.dtype), summed, input_precision="ieee")
        if PAIRED:
            columns = tl.load(other_weight + index[:, None], mask=inside[None, :] & held[:, None], other=0.0)
            other = tl.dot(part, columns.to(part.dtype), other, input_precision="ieee")
    return summed, other


@triton.jit
def as_factor(x, weights):
    """Inputs in the type that products with these weights are taken in."""
    if weights.dtype == tl.float8e4nv and x.dtype == tl.bfloat16:
        return tl.clamp(x.to(tl.float32), -MOST_HALF, MOST_HALF).to(tl.float16)
    else:
        return x
