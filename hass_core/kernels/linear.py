"""A matrix product for a few rows, with what stands before and after it in a decoder layer in the same kernel.

With a few rows a product is bound by reading its weight once. On a small model it is over in two microseconds, and as
much again goes into each kernel that normalises, gates or adds around it; so those are done on the way.

    y = act(norm(x) · Wᵀ · scale) + residual

norm is RMSNorm: its weight is multiplied into x, its factor 1 / rms(x), one number a row, into the product.
act is silu(gate) · up when W holds gate's rows before up's. `scale` holds one factor for each row of an fp8 W.

Shapes: M rows, K inputs, N outputs (2·N rows of W when gated).
"""

# pyright: reportIndexIssue=false
import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

PROCESSORS = 132  # of an H100; a guide for the size of the blocks, nothing depends on it
INPUTS_AT_ONCE = 128


def linear(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """[..., N] from x [..., K] and `weight` [N, K], [2·N, K] when gated; see the module's docstring."""
    x = x.contiguous()
    inputs, outputs = weight.shape[1], weight.shape[0] // (2 if gated else 1)
    rows = x.numel() // inputs
    out = torch.empty(*x.shape[:-1], outputs, device=x.device, dtype=x.dtype)
    block_rows = min(64, max(16, triton.next_power_of_2(rows)))
    block_outputs = _block_outputs(outputs)
    _linear[(triton.cdiv(outputs, block_outputs), triton.cdiv(rows, block_rows))](
        x, weight, norm, residual, bias, scale, out, rows, outputs, eps, INPUTS=inputs, NORM=norm is not None,
        GATED=gated, RESIDUAL=residual is not None, BIAS=bias is not None, SCALE=scale is not None,
        ROWS=block_rows, OUTPUTS=block_outputs, STEP=INPUTS_AT_ONCE, num_warps=4,
        num_stages=3 if gated and block_rows == 64 else 4,
    )  # fmt: skip
    return out


def _block_outputs(outputs: int) -> int:
    """The widest block that still gives every processor of the GPU one."""
    return next((width for width in (64, 32) if outputs >= width * PROCESSORS), 16)


@triton.jit
def _linear(  # noqa: C901 - each switch is decided when it is compiled
    x, weight, norm, residual, bias, scale, out, rows, outputs, eps, INPUTS: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Program: a block of rows and outputs."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    real, there = row < rows, output < outputs
    own_x = x + row.to(tl.int64)[:, None] * INPUTS
    own_weight = weight + output.to(tl.int64)[:, None] * INPUTS
    summed = tl.zeros([ROWS, OUTPUTS], tl.float32)
    second = tl.zeros([ROWS, OUTPUTS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, INPUTS, STEP):
        place = start + tl.arange(0, STEP)
        inside = place < INPUTS
        part = tl.load(own_x + place[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        if NORM:
            precise = part.to(tl.float32)
            squares += tl.sum(precise * precise, 1)
            part = (precise * tl.load(norm + place, mask=inside, other=0.0).to(tl.float32)[None, :]).to(part.dtype)
        chosen = there[:, None] & inside[None, :]
        w = tl.load(own_weight + place[None, :], mask=chosen, other=0.0).to(part.dtype)
        summed = tl.dot(part, tl.trans(w), summed, input_precision="ieee")
        if GATED:
            further = own_weight + outputs.to(tl.int64) * INPUTS
            w = tl.load(further + place[None, :], mask=chosen, other=0.0).to(part.dtype)
            second = tl.dot(part, tl.trans(w), second, input_precision="ieee")
    if NORM:
        factor = tl.rsqrt(squares / INPUTS + eps)[:, None]
        summed *= factor
        second *= factor
    if SCALE:
        summed *= tl.load(scale + output, mask=there, other=0.0).to(tl.float32)[None, :]
        if GATED:
            second *= tl.load(scale + outputs + output, mask=there, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        summed += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)[None, :]
    if GATED:
        summed = summed * tl.sigmoid(summed) * second
    place = row.to(tl.int64)[:, None] * outputs + output[None, :]
    chosen = real[:, None] & there[None, :]
    if RESIDUAL:
        summed += tl.load(residual + place, mask=chosen, other=0.0).to(tl.float32)
    tl.store(out + place, summed.to(out.dtype.element_ty), mask=chosen)
