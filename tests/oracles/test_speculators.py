"""speculators, an independent implementation of the same draft, computes the same features in float32.

Release 0.3.0: it holds the EAGLE-1 layout, 0.6.0.2 only EAGLE-3 and others. Without
HASS_SPECULATORS_PYTHON the tests are skipped; see CONTRIBUTING.md.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hass_core.config import TargetConfig
from hass_core.data.holdout import heldout_prompts
from hass_core.data.templates import encode_prompt
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.checkpoint import draft_info, load_draft, save_draft
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.target_model.capture import capture_features
from hass_core.target_model.loader import Target, load_target

PYTHON = os.environ.get("HASS_SPECULATORS_PYTHON")
DRAFT = os.environ.get("HASS_ORACLE_DRAFT")  # a trained draft's folder
TOKENS = 40

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="HASS_SPECULATORS_PYTHON names no python with speculators (CONTRIBUTING.md)"),
]


def test_speculators_computes_the_same_features(tiny_target, tmp_path):
    torch.manual_seed(3)
    draft = DraftModel(DraftArchitecture.from_target_config(tiny_target.model.config), tiny_target.embedding).eval()
    vocabulary, hidden = tiny_target.embedding.shape
    assert_same_features(
        tiny_target, draft, torch.randint(vocabulary, (1, TOKENS)), torch.randn(1, TOKENS, hidden), tmp_path
    )


@pytest.mark.skipif(not DRAFT, reason="HASS_ORACLE_DRAFT names no trained draft")
def test_speculators_computes_the_same_features_of_a_trained_draft_over_text(tmp_path):
    target = load_target(TargetConfig(dtype="float32", device="cpu"))
    draft = load_draft(Path(str(DRAFT)), target).model
    token_ids = encode_prompt(target.tokenizer, heldout_prompts()[0].messages[:1])
    (features,) = capture_features(target, [token_ids])
    assert_same_features(target, draft, torch.tensor([token_ids[1:]]), features[None, :-1].float(), tmp_path)


@torch.no_grad()
def assert_same_features(target: Target, draft: DraftModel, token_ids: Tensor, features: Tensor, folder: Path) -> None:
    """Both sides read the files in `folder`."""
    save_draft(folder, draft, DraftHead.from_target(target.head), draft_info(target))
    inputs = {"token_ids": token_ids, "features": features, "embedding": target.embedding.detach().clone()}
    save_file(inputs, folder / "inputs.safetensors")
    script = Path(__file__).with_name("speculators_forward.py")
    done = subprocess.run([str(PYTHON), str(script), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(folder / "outputs.safetensors")["features"]
    ours = draft(token_ids, features, torch.arange(token_ids.shape[1])[None])[0]
    assert ours.abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
