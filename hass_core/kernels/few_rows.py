"""Linear layers for a handful of rows, with what stands between them in the same launches.

To verify a tree is to read every weight once for a few dozen rows. The products wait for memory, and between them stand
norms, gates and sums too small to fill a GPU. Here a gate or a residual belongs to the product before it, and so does
most of the RMSNorm behind it: (w ⊙ x / rms(x)) · W = ((w ⊙ x) · W) / rms(x), so the product that makes x also writes
w ⊙ x and its sums of squares, and the next one divides its result. A decoder layer takes four launches for eight.

The sums of squares are kept one per program and added in order: the same input gives the same bits.

Weights may be of 8 bits with a scale per output: half the reading; the products are those of 16-bit numbers.

Shapes: R rows, I inputs, O outputs, P programs that made the inputs.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from typing import NamedTuple, Protocol

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

MOST_ROWS = 64


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


class Tiles(NamedTuple):
    """How a product is cut: outputs a program, inputs a step; and Triton's launch settings."""

    columns: int
    step: int
    warps: int
    stages: int


def product(x: Tensor | Scaled, layer: Layer, gated: bool = False, tiles: Tiles | None = None) -> Tensor:
    """[..., O] from x [..., I] for at most MOST_ROWS rows in all, summed in float32.

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


def tiles_for(inputs: int, outputs: int) -> Tiles:
    """The cut that measured fastest, or nearly so, on an H100 for products of about this size."""
    if outputs >= 8192:
        return Tiles(64, 128 if inputs >= 2048 else 64, 4, 4)
    if outputs >= 2048:
        return Tiles(32, 128, 4, 4 if outputs > 4096 else 6)
    return Tiles(16, 128, 4, 5)


def _launch(
    x: Tensor | Scaled, layer: Layer, gated: bool = False, residual: Tensor | None = None, norm: Norm | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scaled, x = (x, x.values) if isinstance(x, Scaled) else (None, x)
    inputs, outputs = x.shape[-1], len(layer.weight) // 2 if gated else len(layer.weight)
    x, rows = x.contiguous(), x.numel() // inputs
    tiles = tiles or tiles_for(inputs, outputs)
    programs, made_by = triton.cdiv(outputs, tiles.columns), len(scaled.squares) if scaled else 1
    out = x.new_empty(*x.shape[:-1], outputs)
    values = torch.empty_like(out) if norm else out
    squares = x.new_empty(programs if norm else 0, rows, dtype=torch.float32)
    _product[(programs,)](
        x, scaled and scaled.squares, layer.weight, layer.scale, layer.bias, residual, norm and norm.weight, out,
        values, squares, scaled.eps if scaled else 0.0, made_by, rows, outputs, INPUTS=inputs,
        ROWS=max(16, triton.next_power_of_2(rows)), COLUMNS=tiles.columns, STEP=tiles.step,
        STAGES=tiles.stages, SHRUNK=triton.next_power_of_2(made_by) if scaled else 0, SCALE=layer.scale is not None,
        BIAS=layer.bias is not None, GATED=gated, RESIDUAL=residual is not None, NORM=norm is not None,
        num_warps=tiles.warps,
    )  # fmt: skip
    return out, values, squares


@triton.jit
def _product(
    x, x_squares, weight, scale, bias, residual, norm, out, values, squares, eps, made_by, rows, outputs,
    INPUTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    SHRUNK: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Program: COLUMNS outputs of all rows."""
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real, inside = row < rows, column < outputs
    summed, ungated = sums(x, weight, rows, outputs, outputs, row, column, INPUTS, ROWS, COLUMNS, STEP, STAGES, GATED)
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
        own = tl.sum(tl.where(mask, wide * wide, 0.0), 1)
        tl.store(squares + tl.program_id(0) * rows + row, own, mask=real)


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
    STEP: tl.constexpr, STAGES: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """x · weightᵀ at the rows and columns, and if PAIRED at the columns `apart` behind those."""
    real, inside, step = row < rows, column < outputs, tl.arange(0, STEP)
    own_rows = x + row[:, None] * INPUTS
    own_weight = weight + column[None, :].to(tl.int64) * INPUTS
    other_weight = weight + (column + apart)[None, :].to(tl.int64) * INPUTS
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)
    other = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, INPUTS, STEP, num_stages=STAGES):
        place = first + step
        held = (place < INPUTS) | (INPUTS % STEP == 0)
        part = tl.load(own_rows + place[None, :], mask=real[:, None] & held[None, :], other=0.0)
        columns = tl.load(own_weight + place[:, None], mask=inside[None, :] & held[:, None], other=0.0)
        summed = tl.dot(part, columns.to(part.dtype), summed, input_precision="ieee")
        if PAIRED:
            columns = tl.load(other_weight + place[:, None], mask=inside[None, :] & held[:, None], other=0.0)
            other = tl.dot(part, columns.to(part.dtype), other, input_precision="ieee")
    return summed, other
