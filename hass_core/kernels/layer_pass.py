"""Launching `hass_core.kernels.whole_pass`: the addresses of the weights, the cuts of the stages, and the scratch.

Shapes: B batch rows, T new tokens, H hidden, A heads, KV key-value heads, d head size, I inner, S slots.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor

from hass_core.kernels.few_rows import MOST_ROWS, Layer
from hass_core.kernels.whole_pass import whole_pass
from hass_core.target.kv_cache import KVCache

SLOTS_AT_ONCE = 256  # of heads of 64
MOST_SPLITS = 16
FEWEST_UNITS = 64  # of attention, also where there are fewer programs
SHARED = 200 * 1024  # bytes of a program's shared memory that steps under way may fill
MOST_STAGES = 12
AHEAD = 64 * 1024  # bytes of weights that each program fetches before it waits: what arrives in about 2 µs


@dataclass(frozen=True)
class Sizes:
    """Of a decoder's layers."""

    hidden: int  # H
    heads: int  # A
    kv_heads: int  # KV
    head_dim: int  # d
    inner: int  # I


class LayerParts(NamedTuple):
    """What a layer computes with."""

    qkv: Layer
    o: Layer
    gate_up: Layer
    down: Layer
    norm: Tensor  # [H] before gate and up
    next_norm: Tensor  # [H] before the next layer, or the final one


class Cut(NamedTuple):
    """How a product is cut; see `whole_pass`."""

    columns: int
    step: int
    stages: int
    fetched: int  # lines of 128 bytes of each row of weights, a power of 2 or 0


class Cuts(NamedTuple):
    """Of all products."""

    qkv: Cut
    o: Cut
    gate_up: Cut
    down: Cut
    fuse: Cut
    warps: int


class LayerPass:
    """All layers in one launch. The weights' addresses are taken once: they must stay where they are."""

    def __init__(self, layers: Sequence[LayerParts], sizes: Sizes, eps: float, fuse: Layer | None = None):
        first, device = layers[0], layers[0].norm.device
        self._layers, self._fuse, self._sizes, self._eps = layers, fuse, sizes, eps
        self._eight = first.qkv.scale is not None
        self._table = torch.tensor([_addresses(layer, fuse) for layer in layers], dtype=torch.int64, device=device)
        self._arrivals = torch.zeros(2, dtype=torch.int32, device=device)  # at barriers, and barriers passed
        self._programs, ptx = _programs(device)
        self._flags = {
            "FUSED": fuse is not None, "HAS_QKV_BIAS": first.qkv.bias is not None,
            "HAS_OUT_BIAS": first.o.bias is not None, "HAS_FUSE_BIAS": fuse is not None and fuse.bias is not None,
            "PTX": ptx,
        }  # fmt: skip
        self._merged = torch.zeros(MOST_ROWS * sizes.heads, dtype=torch.int32, device=device)

    def __call__(
        self,
        inputs: Tensor,
        ready: Tensor | None,
        turns: tuple[Tensor, Tensor],
        cache: KVCache,
        offset: int = 0,
        visible: Tensor | None = None,
    ) -> Tensor:
        """The last layer's output [B, T, H] for new tokens `offset` slots behind the live lengths of `cache`.

        `inputs` are the first layer's inputs [B, T, H], which are overwritten, and `ready` the same behind its norm.
        With `fuse`, `inputs` [B, T, 2H] go through that first, and there is no norm. At most MOST_ROWS tokens in all.
        """
        sizes, (batch, tokens) = self._sizes, inputs.shape[:2]
        rows, like = batch * tokens, inputs.new_empty
        cuts = cuts_for(sizes, rows, self._eight, inputs.element_size())
        x = inputs if self._fuse is None else like(batch, tokens, sizes.hidden)
        normed = like(batch, tokens, sizes.hidden) if ready is None else ready.contiguous()
        makers = max(triton.cdiv(sizes.hidden, cut.columns) for cut in (cuts.o, cuts.down))
        squares = like(makers, rows, dtype=torch.float32)
        queries, blocks, splits = self._attention_cut(batch, tokens)
        lines = batch * sizes.kv_heads * blocks * splits * queries
        width = triton.next_power_of_2(sizes.head_dim)
        partial = like(lines, width, dtype=torch.float32)
        attended = like(rows, sizes.heads * sizes.head_dim)
        block, (cos, sin) = cache.blocks[0], turns
        whole_pass[(self._programs,)](
            self._table, inputs, x, x if ready is None else normed, normed, squares, torch.empty_like(attended),
            attended, like(rows, sizes.inner), partial, like(lines, dtype=torch.float32), self._merged, self._arrivals,
            cos, sin, cache.lengths, cos if visible is None else visible, block, len(self._layers), rows, tokens,
            cos.stride(1), offset, 0 if visible is None else visible.shape[2], self._eps, 1 / math.sqrt(sizes.head_dim),
            blocks, splits, block.stride(0), block.stride(1), block.stride(2), block.stride(3),
            HIDDEN=sizes.hidden, HEADS=sizes.heads, KV=sizes.kv_heads, DIM=sizes.head_dim, INNER=sizes.inner,
            ROWS=padded(rows), QKV_CUT=tuple(cuts.qkv), OUT_CUT=tuple(cuts.o), UP_CUT=tuple(cuts.gate_up),
            DOWN_CUT=tuple(cuts.down), FUSE_CUT=tuple(cuts.fuse), QUERIES=queries, SLOTS=SLOTS_AT_ONCE * 64 // width,
            NEW=min(64, padded(tokens)), WIDTH=width, MADE=triton.next_power_of_2(makers), EIGHT=self._eight,
            CAUSAL=visible is None, num_warps=cuts.warps, launch_cooperative_grid=self._programs > 1, **self._flags,
        )  # fmt: skip
        return x

    def _attention_cut(self, batch: int, tokens: int) -> tuple[int, int, int]:
        """Queries a block, blocks, and splits of the slots: as many units as there are programs, or fewer."""
        wanted = tokens * self._sizes.heads // self._sizes.kv_heads
        heads, programs = batch * self._sizes.kv_heads, max(self._programs, FEWEST_UNITS)
        queries = next((q for q in (16, 32, 64) if heads * wanted <= q * programs), 128)
        blocks = triton.cdiv(wanted, queries)
        return queries, blocks, max(1, min(MOST_SPLITS, programs // (heads * blocks)))


def cuts_for(sizes: Sizes, rows: int, eight_bits: bool, bytes_each: int) -> Cuts:
    """The cuts that measured fastest, or nearly so, on an H100 for layers of about these sizes."""
    each = 1 if eight_bits else bytes_each

    def cut(inputs: int, columns: int, step: int, ahead: int = AHEAD, parts: int = 1) -> Cut:
        step = min(step, triton.next_power_of_2(inputs))
        under_way = step * (columns * parts * each + padded(rows) * bytes_each)
        lines = max(1, min(inputs * each, ahead // (columns * parts)) // 128)
        stages = min(triton.cdiv(inputs, step), SHARED // under_way, MOST_STAGES)
        return Cut(columns, step, stages, 1 << int(math.log2(lines)))

    heads, inner = sizes.heads * sizes.head_dim, sizes.inner
    if sizes.hidden >= 2048:
        return Cuts(
            qkv=cut(sizes.hidden, 32, 128, parts=2),
            o=cut(heads, 32, 128, ahead=4 * AHEAD),  # attention leaves the memory idle: the whole tile
            gate_up=cut(sizes.hidden, 64, 128, parts=2),
            down=cut(inner, 32, 128),
            fuse=cut(2 * sizes.hidden, 32, 128),
            warps=8,
        )
    return Cuts(
        qkv=cut(sizes.hidden, 16, 64),
        o=cut(heads, 16, 64),
        gate_up=cut(sizes.hidden, 16, 64, parts=2),
        down=cut(inner, 16, 128),
        fuse=cut(2 * sizes.hidden, 16, 128),
        warps=4,
    )


def padded(rows: int) -> int:
    """Rows of a tile that holds so many."""
    return max(16, triton.next_power_of_2(rows))


def _addresses(layer: LayerParts, fuse: Layer | None) -> list[int]:
    """In the order of `whole_pass`'s fields; 0 for what is not there."""
    tensors = [
        layer.qkv.weight, layer.qkv.bias, layer.qkv.scale, layer.o.weight, layer.o.bias, layer.o.scale,
        layer.gate_up.weight, layer.gate_up.scale, layer.down.weight, layer.down.scale, layer.norm, layer.next_norm,
        fuse and fuse.weight, fuse and fuse.bias, fuse and fuse.scale,
    ]  # fmt: skip
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _programs(device: torch.device) -> tuple[int, bool]:
    """Programs of a launch, all running at once, and whether the device takes NVIDIA's instructions."""
    if device.type != "cuda":
        return 1, False  # Triton's interpreter runs one after the other
    return torch.cuda.get_device_properties(device).multi_processor_count, torch.version.cuda is not None
