"""Compile what a captured graph replays: fused kernels instead of one launch per operation."""

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
import torch._dynamo

P = ParamSpec("P")
R = TypeVar("R")
SHAPES = 64  # tree shapes that one process may decode with


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` compiled anew for each set of shapes."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    return torch.compile(function, dynamic=False)


class Compiled(Generic[P, R]):
    """`function` compiled twice: for a single token, and once for all other numbers of rows and tokens.

    A product with one row is a sum that joins its neighbours' kernels, if Inductor is let to tune; that takes longer.
    """

    def __init__(self, function: Callable[P, R]):
        self._single = torch.compile(function, dynamic=False, options={"coordinate_descent_tuning": True})
        self._several = torch.compile(function, dynamic=True)

    def for_tokens(self, count: int) -> Callable[P, R]:
        """What to call with `count` tokens in all."""
        return self._single if count == 1 else self._several
