"""speculators, an independent implementation of the same draft, computes the same features in float32.

Release 0.3.0: it holds the EAGLE-1 layout, 0.6.0.2 only EAGLE-3 and others. Without
HASS_SPECULATORS_PYTHON the test is skipped; see CONTRIBUTING.md.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hass_core.model.architecture import DraftArchitecture
from hass_core.model.checkpoint import draft_info, save_draft
from hass_core.model.draft import DraftModel
from hass_core.model.head import DraftHead

PYTHON = os.environ.get("HASS_SPECULATORS_PYTHON")
TOKENS = 40


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="HASS_SPECULATORS_PYTHON names no python with speculators (CONTRIBUTING.md)")
def test_speculators_computes_the_same_features(tiny_target, tmp_path):
    torch.manual_seed(3)
    draft = DraftModel(DraftArchitecture.from_target_config(tiny_target.model.config), tiny_target.embedding).eval()
    save_draft(tmp_path, draft, DraftHead.from_target(tiny_target.head), draft_info(tiny_target))
    vocabulary, hidden = tiny_target.embedding.shape
    token_ids, features = torch.randint(vocabulary, (1, TOKENS)), torch.randn(1, TOKENS, hidden)
    inputs = {"token_ids": token_ids, "features": features, "embedding": tiny_target.embedding.detach().clone()}
    save_file(inputs, tmp_path / "inputs.safetensors")

    script = Path(__file__).with_name("speculators_forward.py")
    done = subprocess.run([str(PYTHON), str(script), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(tmp_path / "outputs.safetensors")["features"]
    with torch.no_grad():
        ours = draft(token_ids, features, torch.arange(TOKENS)[None])[0]
    assert ours.abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
