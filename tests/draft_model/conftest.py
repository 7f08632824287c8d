"""A draft's folder, written as a test wants it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hass_core.draft_model.architecture import DraftArchitecture


def tensors_of(architecture: DraftArchitecture) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: 0.1 * torch.randn(shape) for name, shape in architecture.tensors().items()}


@pytest.fixture
def architecture(tiny_target):
    return DraftArchitecture.from_target_config(tiny_target.model.config)


@pytest.fixture
def write(tmp_path, architecture):
    """Write a draft folder; `tensors` and `config` are changed as told."""

    def written(tensors=None, shape=architecture, name="draft", **config) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        save_file(tensors_of(shape) | (tensors or {}), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(shape.to_config_json() | config))
        return folder

    return written
