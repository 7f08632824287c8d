"""How often this process has compiled something or captured a CUDA graph: what no timed region may hold."""

from collections import Counter
from functools import cache
from typing import Any

from hass_core import cuda_graphs

_seen: Counter[str] = Counter()


def compilations() -> int:
    """Compilations by torch.compile and of Triton kernels since the first call, and first runs and captures of graphs.

    A kernel that a compiler finds in its cache on disk counts too: to load it takes time as well.
    """
    _watch()
    return _seen.total() + cuda_graphs.graph_beginnings()


@cache
def _watch() -> None:
    """Ask PyTorch's and Triton's compilers to tell of what they do, once per process."""
    from torch._dynamo.callback import callback_handler

    callback_handler.register_start_callback(lambda _: _seen.update(("torch.compile",)))
    try:
        from triton import knobs  # pyright: ignore[reportMissingImports]
    except ImportError:  # builds of PyTorch for a CPU come without it
        return
    former = knobs.runtime.jit_post_compile_hook

    def told(**about: Any) -> Any:
        _seen.update(("triton",))
        return former(**about) if former else None

    knobs.runtime.jit_post_compile_hook = told
