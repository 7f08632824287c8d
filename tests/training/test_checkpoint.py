"""A training is continued from its own checkpoints alone."""

import pytest
import torch
from torch import nn

from hass_core.errors import CorruptFile
from hass_core.training.checkpoint import Position, checkpoint_name, load_checkpoint, save_checkpoint, training_state


def test_a_checkpoint_of_another_training_is_refused(store):
    model, name = nn.Linear(2, 2), checkpoint_name(5)
    own, other = store.stage("draft", {"lr": 1}), store.stage("draft", {"lr": 2})
    save_checkpoint(own, training_state(model, [], None), Position(step=5), [{"step": 5}])
    before = model.weight.clone()
    nn.init.zeros_(model.weight)
    assert load_checkpoint(own, name, model, [], None) == (Position(step=5), [{"step": 5}])
    assert torch.equal(model.weight, before)
    with other.writing(name) as file:
        file.path.write_bytes(own.local_path(name).read_bytes())
    with pytest.raises(CorruptFile, match=rf"{name} is a checkpoint of another training, {own.digest}; remove"):
        load_checkpoint(other, name, model, [], None)
