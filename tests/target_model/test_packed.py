"""Rows laid end to end give what the model's own pass gives for each alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from hass_core.errors import NonFinite
from hass_core.target_model import capture
from hass_core.target_model.capture import batches_by_tokens, batches_for, capture_features
from hass_core.target_model.packed import PackedPass, packed_pass
from tests.target_model.conftest import tiny_model

CLOSE = {"atol": 2e-5, "rtol": 1e-4}  # float32, two layers: rounding in another order
ROWS = [[7], list(range(3, 40)), [9, 8, 7, 6, 5], np.arange(20, 60, dtype=np.int32)]


@pytest.fixture
def packing(monkeypatch):
    """Have capture lay rows end to end on a CPU too."""
    monkeypatch.setattr(capture, "packed_pass", PackedPass)


def test_packed_rows_equal_the_models_own_pass_over_each(any_target):
    packed = PackedPass(any_target)
    if not packed.rope.fixed:
        pytest.skip("positions depend on the longest row")
    found = packed(ROWS).split([len(row) for row in ROWS])
    for row, features in zip(ROWS, found, strict=True):
        with torch.no_grad():
            own = any_target.model(torch.tensor(row)[None].long(), output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(features, own, **CLOSE)


def test_captured_rows_are_the_same_packed_and_padded(tiny_target, packing, monkeypatch):
    together = capture_features(tiny_target, ROWS)
    monkeypatch.setattr(capture, "packed_pass", lambda target: None)
    for ids, features, padded in zip(ROWS, together, capture_features(tiny_target, ROWS), strict=True):
        assert features.shape == (len(ids), 48)
        torch.testing.assert_close(features, padded, rtol=0.01, atol=0.01)


def test_the_packed_row_that_is_not_finite_is_named(packing):
    target = tiny_model("llama")
    target.embedding[9] = float("nan")
    with pytest.raises(NonFinite, match="conversation third"):
        capture_features(target, [[5, 6], [7], [8, 9, 10], [11]], ["first", "second", "third", "fourth"])


def test_batches_without_padding_hold_as_many_tokens_as_allowed():
    lengths = [50, 10, 30, 60, 10, 20]
    assert list(batches_by_tokens(lengths, 80, padded=False)) == [[3], [0, 2], [5, 1, 4]]
    assert list(batches_by_tokens(lengths, 80)) == [[3], [0], [2, 5], [1, 4]]
    assert list(batches_by_tokens([100, 5], 80, padded=False)) == [[0], [1]]


def test_batches_are_padded_where_the_models_own_pass_is_used(tiny_target, packing, monkeypatch):
    lengths, whole = [50, 10, 10, 10], [[0, 1, 2, 3]]
    assert list(batches_for(tiny_target, lengths, 80)) == whole
    monkeypatch.setattr(capture, "packed_pass", lambda target: None)
    assert list(batches_for(tiny_target, lengths, 80)) != whole


def test_a_cpu_and_models_of_other_families_pad(any_target):
    assert packed_pass(any_target) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_batch_of_very_different_rows_equals_each_alone():
    target = tiny_model("qwen3")
    model = target.model.to("cuda", torch.bfloat16)
    rows = [torch.randint(3, 250, (n,)).tolist() for n in (200, 1, 130, 7)]
    assert packed_pass(target) is not None
    for row, features in zip(rows, capture_features(target, rows), strict=True):
        with torch.no_grad():
            own = model(torch.tensor([row], device="cuda"), output_hidden_states=True).hidden_states[-1][0].cpu()
        assert float((features.float() - own.float()).norm() / own.float().norm()) < 0.03
    borders = [0, *np.cumsum([len(row) for row in rows]).tolist()]
    together = PackedPass(target)(rows).cpu()
    for (start, end), features in zip(pairwise(borders), capture_features(target, rows), strict=True):
        assert torch.equal(together[start:end], features)
