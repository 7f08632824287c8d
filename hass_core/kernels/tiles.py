"""How a product of a handful of rows is cut into programs: what measured fastest on an H100, fitted to other GPUs."""

from typing import NamedTuple

from torch import Tensor

from hass_core.kernels import shared_memory

LINE = 128  # bytes


class Tiles(NamedTuple):
    """How a product is cut: outputs a program, inputs a step, programs that share the inputs; and Triton's settings."""

    columns: int
    step: int
    warps: int
    stages: int
    splits: int = 1


def tiles_for(inputs: int, outputs: int, rows: int, eight_bits: bool) -> Tiles:
    """The cut that measured fastest, or nearly so, on an H100 for products of about this size."""
    if rows == 1:
        return _tiles_for_one_row(inputs, outputs)
    few = rows <= 16
    if inputs < 2048:
        if outputs >= 8192:
            return Tiles(32, 128, 4, 6) if few else Tiles(32, 64, 4, 4)
        if inputs > 1.5 * outputs:
            return Tiles(32, 128, 4, 4, 4) if few else Tiles(16, 128, 4, 4, 2)
        return Tiles(16, 64, 4, 6)
    if few:
        return _tiles_for_eight_bits(inputs, outputs) if eight_bits else _tiles_for_sixteen_bits(outputs)
    if outputs >= 32768:
        return Tiles(128, 128, 8, 3)
    if outputs >= 8192:
        return Tiles(64, 128, 4, 4)
    return Tiles(32, 128, 4, 4 if outputs > 4096 else 6)


def _tiles_for_eight_bits(inputs: int, outputs: int) -> Tiles:
    """For at most 16 rows."""
    if outputs >= 8192:
        return Tiles(128 if outputs >= 16384 else 64, 256, 4, 4)
    if outputs > 4096:
        return Tiles(128, 256, 4, 4, 2)
    return Tiles(128, 256, 4, 4, 4) if inputs > 4096 else Tiles(64, 128, 4, 4, 4)


def _tiles_for_sixteen_bits(outputs: int) -> Tiles:
    """For at most 16 rows."""
    if outputs >= 8192:
        return Tiles(64 if outputs >= 16384 else 32, 256, 4, 4)
    return Tiles(64, 256, 4, 4, 2)


def _tiles_for_one_row(inputs: int, outputs: int) -> Tiles:
    """Stages mean nothing to it."""
    if inputs < 2048:
        return Tiles(4, power_of_two(inputs), 4, 1)
    return Tiles(1 if inputs >= 8192 or 8192 <= outputs < 32768 else 2, 2048, 8, 1)


def fitting(tiles: Tiles, x: Tensor, weight: Tensor, rows: int, gated: bool) -> Tiles:
    """The tiles, with no more steps under way than shared memory holds; they were chosen on an H100."""
    columns = tiles.columns * (2 if gated else 1) * weight.element_size()
    step = tiles.step * (columns + max(16, power_of_two(rows)) * x.element_size())
    return tiles._replace(stages=max(1, min(tiles.stages, shared_memory(x.device) // step)))


def lines_ahead(tiles: Tiles, weight: Tensor) -> int:
    """Lines of each output's weights that are fetched before the inputs are there; a power of 2."""
    under_way = min(weight.shape[1], tiles.step * tiles.stages) * weight.element_size()
    return power_of_two(max(1, under_way // LINE))


def power_of_two(number: int) -> int:
    """The lowest that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
