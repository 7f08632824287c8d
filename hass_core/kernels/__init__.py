"""Triton kernels. Each stands beside PyTorch code that computes the same; tests hold the two together."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

HOPPERS_SHARED_MEMORY, FEWEST_SHARED_MEMORY = 227 << 10, 99 << 10


def usable(x: Tensor) -> bool:
    """Whether kernels can run where `x` lies. PyTorch's CUDA builds for Linux bring Triton with them."""
    return x.is_cuda and _installed()


def takes_eight_bits(x: Tensor) -> bool:
    """Whether kernels where `x` lies can read fp8 weights: NVIDIA's from Ada (8.9) on."""
    return usable(x) and torch.cuda.get_device_capability(x.device) >= (8, 9)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use: 227 KB on an H100, 163 on an A100, 99 on most others."""
    if device.type != "cuda":
        return HOPPERS_SHARED_MEMORY  # Triton's interpreter
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", FEWEST_SHARED_MEMORY)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
