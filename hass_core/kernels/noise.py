"""The noise of `hass_core.sampling`, made where it is used: nothing of it is written to memory or read.

Every operation is the one that file does, in its order, so that the bits are the same. A kernel that calls `gumbel` is
launched with `UNFUSED`: a product and a sum in one instruction round once, and the bits would differ.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

UNFUSED: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit
def gumbel(streams, position, token_ids):
    """The noise of a tensor of tokens at a position, of the row whose two words lie at `streams`."""
    low = tl.load(streams).to(tl.uint32, bitcast=True)
    high = tl.load(streams + 1).to(tl.uint32, bitcast=True)
    place = _mix(position.to(tl.uint32) + low)
    salt = _mix(place + high)
    bits = _mix(_mix(token_ids.to(tl.uint32) ^ place) + salt).to(tl.int32, bitcast=True)
    w = ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    from_zero = bits < 0
    f, exponent = _split(tl.where(from_zero, w, 1 - w))
    f = tl.where(from_zero | (exponent != 0), f, -w)
    f, exponent = _split(-_log(f, exponent))
    return -_log(f, exponent)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _split(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    return (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1, exponent


@triton.jit
def _log(f, exponent):
    total = -0.10082265734672546 * f
    total = (total + 0.1618049293756485) * f
    total = (total - 0.17243246734142303) * f
    total = (total + 0.1990688145160675) * f
    total = (total - 0.249712273478508) * f
    total = (total + 0.3333471417427063) * f
    total = (total - 0.5000032186508179) * (f * f)
    return total + f + exponent.to(tl.float32) * 0.6931471824645996
