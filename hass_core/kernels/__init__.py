"""Triton kernels. Each stands beside PyTorch code that computes the same; tests hold the two together."""

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def usable(x: Tensor) -> bool:
    """Whether kernels can run where `x` lies. PyTorch's CUDA builds for Linux bring Triton with them."""
    return x.is_cuda and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
