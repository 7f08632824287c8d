"""Linear layers for a handful of rows, with what stands between them in the same launches.

To verify a tree is to read every weight once for a few dozen rows. The products wait for memory, and between them stand
norms, gates and sums too small to fill a GPU. Here a gate or a residual belongs to the product before it, and so does
most of the RMSNorm behind it: (w ⊙ x / rms(x)) · W = ((w ⊙ x) · W) / rms(x), so the product that makes x also writes
w ⊙ x and its sums of squares, and the next one divides its result. A decoder layer takes four launches for eight.

The sums of squares are kept one per program and added in order: the same input gives the same bits.

Shapes: R rows, I inputs, O outputs, P programs that made the inputs.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from typing import NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

MOST_ROWS = 64


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


def product(
    x: Tensor | Scaled, weight: Tensor, bias: Tensor | None = None, gated: bool = False, tiles: Tiles | None = None
) -> Tensor:
    """x [..., I] · weightᵀ [O, I] + bias [O] for at most MOST_ROWS rows in all, summed in float32.

    With `gated`, `weight` holds the gates above what they gate, and the result [..., O / 2] is SiLU(gate) · gated.
    """
    return _launch(x, weight, bias, gated=gated, tiles=tiles)[0]


def added_product(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """residual [..., O] + x [..., I] · weightᵀ [O, I] + bias [O], as `product`."""
    return _launch(x, weight, bias, residual=residual)[0]


def added_product_to_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm: Norm, bias: Tensor | None = None, tiles: Tiles | None = None
) -> tuple[Tensor, Scaled]:
    """As `added_product`, and the result all but normed for the next product."""
    out, values, squares = _launch(x, weight, bias, residual=residual, norm=norm, tiles=tiles)
    return out, Scaled(values, squares, norm.eps)


def tiles_for(inputs: int, outputs: int, gated: bool) -> Tiles:
    """The cut that measured fastest on an H100 for products of about this size."""
    step = 64 if gated or inputs % 128 else 128
    if outputs >= 8192:
        return Tiles(64, step, 4, 4)
    return Tiles(32, step, 4, 6) if outputs >= 2048 else Tiles(16, step, 4, 5)


def _launch(
    x: Tensor | Scaled, weight: Tensor, bias: Tensor | None, gated: bool = False, residual: Tensor | None = None,
    norm: Norm | None = None, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scaled, x = (x, x.values) if isinstance(x, Scaled) else (None, x)
    inputs, outputs = x.shape[-1], len(weight) // 2 if gated else len(weight)
    x, rows = x.contiguous(), x.numel() // inputs
    tiles = tiles or tiles_for(inputs, outputs, gated)
    programs, made_by = triton.cdiv(outputs, tiles.columns), len(scaled.squares) if scaled else 1
    out = x.new_empty(*x.shape[:-1], outputs)
    values = torch.empty_like(out) if norm else out
    squares = x.new_empty(programs if norm else 0, rows, dtype=torch.float32)
    _product[(programs,)](
        x, scaled and scaled.squares, weight, bias, residual, norm and norm.weight, out, values, squares,
        scaled.eps if scaled else 0.0, made_by, rows, outputs, INPUTS=inputs,
        ROWS=max(16, triton.next_power_of_2(rows)), COLUMNS=tiles.columns, STEP=tiles.step,
        SCALED=triton.next_power_of_2(made_by) if scaled else 0, BIAS=bias is not None, GATED=gated,
        RESIDUAL=residual is not None, NORM=norm is not None, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out, values, squares


@triton.jit
def _product(
    x, x_squares, weight, bias, residual, norm, out, values, squares, eps, made_by, rows, outputs,
    INPUTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, SCALED: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Program: COLUMNS outputs of all rows."""
    row, step = tl.arange(0, ROWS), tl.arange(0, STEP)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real, inside = row < rows, column < outputs
    own_rows = x + row[:, None] * INPUTS
    own_weight = weight + column[None, :].to(tl.int64) * INPUTS
    gated_weight = own_weight + outputs.to(tl.int64) * INPUTS
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)
    ungated = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, INPUTS, STEP):
        place = first + step
        held = (place < INPUTS) | (INPUTS % STEP == 0)
        part = tl.load(own_rows + place[None, :], mask=real[:, None] & held[None, :], other=0.0)
        columns = tl.load(own_weight + place[:, None], mask=inside[None, :] & held[:, None], other=0.0)
        summed = tl.dot(part, columns, summed, input_precision="ieee")
        if GATED:
            columns = tl.load(gated_weight + place[:, None], mask=inside[None, :] & held[:, None], other=0.0)
            ungated = tl.dot(part, columns, ungated, input_precision="ieee")
    if SCALED:
        maker = tl.arange(0, SCALED)
        held = (maker < made_by)[:, None] & real[None, :]
        made = tl.load(x_squares + maker[:, None] * rows + row[None, :], mask=held, other=0.0)
        shrink = tl.rsqrt(tl.sum(made, 0) / INPUTS + eps)[:, None]
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
        scale = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(values + goal, (wide * scale[None, :]).to(out.dtype.element_ty), mask=mask)
        own = tl.sum(tl.where(mask, wide * wide, 0.0), 1)
        tl.store(squares + tl.program_id(0) * rows + row, own, mask=real)
