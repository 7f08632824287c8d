"""Compile what a captured graph replays: fused kernels instead of one launch per operation."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch._dynamo

P = ParamSpec("P")
R = TypeVar("R")
SHAPES = 64  # batch sizes × tree sizes × attended widths that one process may decode with


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` compiled anew for each set of shapes. Products of a single row join their neighbours' kernels."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    return torch.compile(function, dynamic=False, options={"coordinate_descent_tuning": True})
