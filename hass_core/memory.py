"""Give memory back between stages, so that a chain of stages needs no more than its largest one."""

import ctypes
import gc
import sys
from contextlib import suppress

import torch


def release_unused() -> None:
    """Free what nothing refers to any more, and return it to the system.

    glibc keeps freed blocks for later; a stage that is over would otherwise hold its peak while the next one grows.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library, which has no such call
            ctypes.CDLL("libc.so.6").malloc_trim(0)
