"""How products are cut: the cuts fit the memory of the GPU they run on."""

from unittest.mock import patch

import pytest
import torch

from hass_core.kernels import tiles
from hass_core.kernels.tiles import fitting, tiles_for

LAYERS = {  # inputs, outputs, gated
    "smollm2-135m": [(576, 960, False), (576, 576, False), (576, 1536, True), (1536, 576, False), (576, 49152, False)],
    "llama3-8b": [(4096, 6144, False), (8192, 4096, False), (4096, 14336, True), (14336, 4096, False),
                  (4096, 32000, False), (4096, 128256, False)],
}  # fmt: skip


def cuts_of(shape: str, memory: int):
    """Every cut of several rows with its bytes a step, the cut chosen and the one fitted to `memory` bytes."""
    for inputs, outputs, gated in LAYERS[shape]:
        for rows in (2, 10, 16, 17, 60, 64):
            for kind in (torch.bfloat16, torch.float8_e4m3fn):
                x = torch.empty(rows, inputs, dtype=torch.bfloat16, device="meta")
                weight = torch.empty(outputs * (1 + gated), inputs, dtype=kind, device="meta")
                chosen = tiles_for(inputs, outputs, rows, kind == torch.float8_e4m3fn)
                with patch.object(tiles, "shared_memory", lambda device: memory):
                    fitted = fitting(chosen, x, weight, rows, gated)
                padded = max(16, 1 << (rows - 1).bit_length())
                weights = chosen.columns * (1 + gated) * weight.element_size()
                yield chosen.step * (weights + padded * x.element_size()), chosen, fitted


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("kilobytes", [99, 163, 227])
def test_the_steps_under_way_fit_into_shared_memory(shape, kilobytes):
    for step, chosen, fitted in cuts_of(shape, kilobytes << 10):
        assert 1 <= fitted.stages <= chosen.stages
        assert fitted.stages * step <= kilobytes << 10
        assert fitted._replace(stages=chosen.stages) == chosen


@pytest.mark.parametrize("shape", LAYERS)
def test_where_the_cuts_were_measured_they_stay(shape):
    assert all(fitted == chosen for _, chosen, fitted in cuts_of(shape, 227 << 10))


@pytest.mark.parametrize("shape", LAYERS)
def test_little_memory_takes_steps_away(shape):
    assert any(fitted != chosen for _, chosen, fitted in cuts_of(shape, 48 << 10))
