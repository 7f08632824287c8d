"""What stands between the products of many rows: the gate and the rotation, each in one launch.

PyTorch takes two launches for a gate and four for a rotation, and each carries all the numbers through memory again.

Shapes: T tokens, I inner size, A heads, KV key-value heads, d head size.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

COLUMNS, HEADS = 1024, 16  # of a program


def gate(mixed: Tensor) -> Tensor:
    """SiLU(gate) · up [T, I] from the gates and what they gate, side by side [T, 2·I]."""
    tokens, inner = mixed.shape[0], mixed.shape[1] // 2
    out = mixed.new_empty(tokens, inner)
    _gate[(tokens, triton.cdiv(inner, COLUMNS))](mixed.contiguous(), out, inner, COLUMNS=COLUMNS)
    return out


def turn(mixed: Tensor, turns: Tensor, heads: int) -> Tensor:
    """The first `heads` heads of mixed [T, A + 2·KV, d], turned by cosines and signed sines [T, 2, d]."""
    tokens, every, size = mixed.shape
    out = mixed.new_empty(tokens, heads, size)
    _turn[(tokens, triton.cdiv(heads, HEADS))](
        mixed.contiguous(), turns.contiguous(), out, heads, every, size,
        HEADS=HEADS, SIZE=triton.next_power_of_2(size),
    )  # fmt: skip
    return out


@triton.jit
def _gate(mixed, out, inner, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < inner
    gates = tl.load(mixed + token * 2 * inner + columns, there, 0.0).to(tl.float32)
    gated = tl.load(mixed + token * 2 * inner + inner + columns, there, 0.0).to(tl.float32)
    opened = (gates / (1 + tl.exp(-gates))).to(out.dtype.element_ty)  # rounded here, as the model's own layers do
    tl.store(out + token * inner + columns, (opened.to(tl.float32) * gated).to(out.dtype.element_ty), there)


@triton.jit
def _turn(mixed, turns, out, heads, every, size, HEADS: tl.constexpr, SIZE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    place = tl.arange(0, SIZE)[None, :]
    opposite = tl.where(place < size // 2, place + size // 2, place - size // 2)
    there = (head < heads) & (place < size)
    rows = mixed + (token * every + head) * size
    cosines = tl.load(turns + token * 2 * size + place, place < size, 0.0).to(tl.float32)
    sines = tl.load(turns + (token * 2 + 1) * size + place, place < size, 0.0).to(tl.float32)
    turned = tl.load(rows + place, there, 0.0).to(tl.float32) * cosines
    turned += tl.load(rows + opposite, there, 0.0).to(tl.float32) * sines
    tl.store(out + (token * heads + head) * size + place, turned.to(out.dtype.element_ty), there)
