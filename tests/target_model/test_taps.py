"""States inside a target: every runner hands over what transformers calls hidden states, and nothing else changes."""

import threading

import pytest
import torch

from hass_core.errors import TargetError
from hass_core.target_model.capture import capture_features
from hass_core.target_model.generic import HFRunner
from hass_core.target_model.packed import PackedPass
from hass_core.target_model.runner import FusedRunner
from hass_core.target_model.taps import Taps, check_taps, listening
from tests.target_model.conftest import tiny_model
from tests.target_model.test_runner import CLOSE, random_ids

LAYERS, TAPPED = 5, (1, 2, 4)


def truth(target, token_ids: list[int]) -> torch.Tensor:
    """[L, 3·H]."""
    with torch.no_grad():
        states = target.model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
    return torch.cat([states[layer][0] for layer in TAPPED], -1)


@pytest.mark.parametrize("kind", [FusedRunner, HFRunner])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_prompts_steps_and_trees_give_the_states_after_their_layers(family, kind):
    target = tiny_model(family, num_hidden_layers=LAYERS)
    run, rows = kind(target), [random_ids(9), random_ids(9, seed=1)]
    cache, taps = run.new_cache(2, 48), Taps(TAPPED)
    features = run.forward(torch.tensor(rows), torch.arange(9).expand(2, -1), cache, taps=taps)
    for row, states in zip(rows, taps.joined(), strict=True):
        torch.testing.assert_close(states, truth(target, row), **CLOSE)
    cache.advance(9)
    visible = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool().expand(2, -1, -1)  # a root and two children
    tree, depth = torch.tensor([random_ids(3, seed=2)] * 2), torch.tensor([0, 1, 1])
    run.forward(tree, cache.lengths[:, None] + depth, cache, visible, taps=taps)
    for row, states in zip(rows, taps.joined(), strict=True):
        for node, path in enumerate(([0], [0, 1], [0, 2])):
            torch.testing.assert_close(states[node], truth(target, row + tree[0, path].tolist())[-1], **CLOSE)
    cache.clear()
    again = run.forward(torch.tensor(rows), torch.arange(9).expand(2, -1), cache)
    assert torch.equal(again, features)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "glm"])
def test_captured_rows_hold_the_last_state_and_behind_it_those_inside(family):
    target = tiny_model(family, num_hidden_layers=LAYERS)
    rows, hidden = [random_ids(n, seed=n) for n in (5, 19)], target.embedding.shape[1]
    check_taps(target, TAPPED)
    for row, states, alone in zip(
        rows, capture_features(target, rows, taps=TAPPED), capture_features(target, rows), strict=True
    ):
        assert torch.equal(states[:, :hidden], alone)
        torch.testing.assert_close(states[:, hidden:].float(), truth(target, row), rtol=0.02, atol=0.02)


def test_rows_laid_end_to_end_give_theirs():
    target = tiny_model("qwen3", num_hidden_layers=LAYERS)
    rows, taps = [random_ids(n, seed=n) for n in (5, 19, 11)], Taps(TAPPED)
    PackedPass(target)(rows, taps)
    for row, states in zip(rows, taps.joined().split([5, 19, 11]), strict=True):
        torch.testing.assert_close(states, truth(target, row), **CLOSE)


def test_another_threads_pass_meanwhile_is_not_heard():
    target, taps = tiny_model("gemma3_text", num_hidden_layers=LAYERS), Taps(TAPPED)
    row, other = random_ids(9), random_ids(5, seed=1)
    with torch.no_grad(), listening(target.model, LAYERS, taps, target.device):
        target.model.base_model(torch.tensor([row]), use_cache=False)
        thread = threading.Thread(target=capture_features, args=(target, [other]))
        thread.start()
        thread.join()
    torch.testing.assert_close(taps.joined()[0], truth(target, row), **CLOSE)


def test_hooks_are_gone_when_a_pass_ends_or_fails():
    target = tiny_model("gemma3_text", num_hidden_layers=LAYERS)
    capture_features(target, [[1, 2, 3]], taps=TAPPED)
    with pytest.raises(IndexError):
        capture_features(target, [[10**6]], taps=TAPPED)
    assert not any(layer._forward_hooks for layer in target.model.base_model.layers)


def test_a_model_whose_layers_are_no_single_list_is_refused():
    target = tiny_model("llama", num_hidden_layers=LAYERS)
    target.model.model.others = torch.nn.ModuleList([torch.nn.Identity() for _ in range(LAYERS)])
    with pytest.raises(TargetError, match="2 lists of 5 layers were found"):
        check_taps(target, TAPPED)
