"""A linear layer for a single row, with what `hass_core.kernels.few_rows` puts around it.

Matrix units want 16 rows; for one, each weight is multiplied where it arrives, and nothing but weights passes through.

    x [I]   ────────────────┐               one program: COLUMNS outputs
    weight  ┌──────────────┐│ ⊙, Σ          for each STEP of inputs: sum += weight[columns, step] · x[step]
    COLUMNS │ STEP │ STEP │ … ──► [C]       then as in `few_rows`: / rms, scale, bias, gate, residual, norm
            └──────────────┘

Measured (H100): Llama-3-8B's down projection 40 µs for 49 by the compiled product (1.2 ×, `e18cbb1`); a layer's time
with and without it is not on record.

Shapes: I inputs, O outputs, P programs that made the inputs.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from hass_core.kernels.chain import wait_for_inputs


@triton.jit
def one_row_product(
    x, x_squares, weight, scale, bias, residual, norm, out, values, squares, eps, made_by, outputs,
    INPUTS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, SHRUNK: tl.constexpr, SCALE: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Program: COLUMNS outputs. The arguments are those of `hass_core.kernels.few_rows`."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < outputs
    summed, ungated = _sums(x, weight, column, outputs, inside, INPUTS, COLUMNS, STEP, GATED, CHAINED)
    if SCALE:
        summed *= tl.load(scale + column, mask=inside, other=0.0)
        if GATED:
            ungated *= tl.load(scale + outputs + column, mask=inside, other=0.0)
    if SHRUNK:
        maker = tl.arange(0, SHRUNK)
        made = tl.load(x_squares + maker, mask=maker < made_by, other=0.0)
        shrink = tl.rsqrt(tl.sum(made, 0) / INPUTS + eps)
        summed *= shrink
        ungated *= shrink
    if BIAS:
        summed += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        summed = summed * tl.sigmoid(summed) * ungated
    if RESIDUAL:
        summed += tl.load(residual + column, mask=inside, other=0.0).to(tl.float32)
    result = summed.to(out.dtype.element_ty)
    tl.store(out + column, result, mask=inside)
    if NORM:
        _to_norm(result.to(tl.float32), norm, values, squares, column, inside)


@triton.jit
def _to_norm(result, norm, values, squares, column, inside):
    """The result times the norm's weight, and the sum of its squares."""
    weights = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(values + column, (result * weights).to(values.dtype.element_ty), mask=inside)
    tl.store(squares + tl.program_id(0), tl.sum(tl.where(inside, result * result, 0.0), 0))


@triton.jit
def _sums(
    x, weight, column, apart, inside, INPUTS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    PAIRED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """x · weightᵀ at the columns, and if PAIRED at the columns `apart` after those."""
    start = weight + column[:, None].to(tl.int64) * INPUTS
    other_start = weight + (column + apart)[:, None].to(tl.int64) * INPUTS
    first = _weights(start, 0, inside, INPUTS, STEP)
    other_first = _weights(other_start, 0, inside, INPUTS, STEP) if PAIRED else first
    wait_for_inputs(CHAINED)
    part = _inputs(x, 0, INPUTS, STEP)
    summed = first.to(tl.float32) * part
    other = other_first.to(tl.float32) * part if PAIRED else summed
    for at in range(STEP, INPUTS, STEP):
        part = _inputs(x, at, INPUTS, STEP)
        summed += _weights(start, at, inside, INPUTS, STEP).to(tl.float32) * part
        if PAIRED:
            other += _weights(other_start, at, inside, INPUTS, STEP).to(tl.float32) * part
    return tl.sum(summed, 1), tl.sum(other, 1)


@triton.jit
def _weights(start, first, inside, INPUTS: tl.constexpr, STEP: tl.constexpr):
    """[columns, STEP] weights of the inputs from `first` on."""
    at = first + tl.arange(0, STEP)
    mask = inside[:, None] & ((at < INPUTS) | (INPUTS % STEP == 0))[None, :]
    return tl.load(start + at[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _inputs(x, first, INPUTS: tl.constexpr, STEP: tl.constexpr):
    """[1, STEP] inputs from `first` on, in float32."""
    at = first + tl.arange(0, STEP)
    return tl.load(x + at, mask=(at < INPUTS) | (INPUTS % STEP == 0), other=0.0).to(tl.float32)[None, :]
