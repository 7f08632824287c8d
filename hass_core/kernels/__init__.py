"""Triton kernels. Each stands beside PyTorch code that computes the same; tests hold the two together."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

SHARED_MEMORY = 227 * 1024  # bytes a program may use of an H100's


def usable(x: Tensor) -> bool:
    """Whether kernels can run where `x` lies. PyTorch's CUDA builds for Linux bring Triton with them."""
    return x.is_cuda and _installed()


def roomy(x: Tensor) -> bool:
    """Whether `hass_core.kernels.layer_pass`, whose cuts were made for an H100, can run where `x` lies."""
    if not usable(x):
        return False
    properties = torch.cuda.get_device_properties(x.device)
    return getattr(properties, "shared_memory_per_block_optin", 0) >= SHARED_MEMORY


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
