"""torch.compile as this project uses it."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Generic, ParamSpec, TypeVar

import torch
import torch._dynamo

P = ParamSpec("P")
R = TypeVar("R")
SHAPES = 64  # tree shapes that one process may decode with


def compiled(function: Callable[P, R], any_shape: bool = False, tune: bool = False) -> Callable[P, R]:
    """`function` compiled anew for each set of shapes, or once for all.

    With `tune` a product with a single row becomes a sum that joins its neighbours' kernels; that takes longer.
    """
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, SHAPES)
    # as a symbol a float is a number on the CPU, and to compile for that a GPU's machine runs a C++ compiler
    settings.specialize_float = True
    options: dict[str, Any] = {"coordinate_descent_tuning": tune}
    return torch.compile(function, dynamic=any_shape, options=options)


class Compiled(Generic[P, R]):
    """`function` compiled twice: for a single token, and once for all other numbers of rows and tokens."""

    def __init__(self, function: Callable[P, R]):
        self._function = function

    @cached_property  # torch.compile's first call imports its compiler, which takes seconds
    def _single(self) -> Callable[P, R]:
        return compiled(self._function, tune=True)

    @cached_property
    def _several(self) -> Callable[P, R]:
        return compiled(self._function, any_shape=True)

    def for_tokens(self, count: int) -> Callable[P, R]:
        """What to call with `count` tokens in all."""
        return self._single if count == 1 else self._several
