"""Launches that begin before the one in front of them has ended.

In a captured graph the next kernel starts about a microsecond after the last program of the one before, and then its
first read is under way for another. From Hopper on a launch may start while the one before still runs (programmatic
dependent launch): it begins to fetch what it needs anyway, its weights say, and then waits for the results in front.

A kernel of a chain lets the next one begin only when it has waited itself. So what it reads before it waits may be
anything but the results of the kernel directly before it.

    kernel n     ├─ fetch ─┤ wait │─ read results of n-1 ─ compute ─ write ─┤
    kernel n+1                    ├─ fetch ─┤ wait ·························│─ read results of n ─ …

Measured (H100, `chain_trials` in `infra/evidence/h100.json`): a layer of SmolLM2, one row, 17.5 → 12.2 µs (1.4 ×), 60
rows 32.3 → 27.3, with new cuts of the products in the same change.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from functools import cache
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

HOPPER = (9, 0)


def chained(x: Tensor) -> dict[str, Any]:
    """The options of a launch where `x` lies: CHAINED for the kernel, and Triton's own."""
    return _options(x.device)


@cache
def _options(device: torch.device) -> dict[str, Any]:
    may = device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= HOPPER
    return {"CHAINED": True, "launch_pdl": True} if may else {"CHAINED": False}


@triton.jit
def wait_for_inputs(CHAINED: tl.constexpr):
    """Go on when the launches before this one have ended and what they wrote is seen; the next one may begin."""
    if CHAINED:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, 0;",
            "=r,~{memory}",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def fetch(pointers, CHAINED: tl.constexpr):
    """Start bringing what `pointers`, a tensor, point to into the L2 cache, a line of 128 bytes for each."""
    if CHAINED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def arrived(x, CHAINED: tl.constexpr):
    """x [m, n], as loaded. The compiler brings what was loaded into the order that a product needs at once, and so
    waits for each load before it begins the next one; it does not look through a reduction, be it over nothing."""
    if CHAINED:
        x = tl.reduce(x[:, :, None], 2, _first)
    return x


@triton.jit
def _first(one, other):
    return one
