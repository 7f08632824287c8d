"""The draft that comes with the package: small, whole, with its card, and the default preset's start."""

import json

import pytest
from safetensors import safe_open

from hass_core.config import load_config
from hass_core.draft_model.accounting import read_draft
from hass_core.draft_model.shipped import SHIPPED, draft_at, shipped_draft

MOST_BYTES = 8_700_000  # on disk; 6.8 MB in a wheel


def test_the_shipped_draft_is_small_and_has_a_card():
    files = {path.name: path.stat().st_size for path in shipped_draft().iterdir()}
    assert files.keys() == {"config.json", "model.safetensors", "token_ranks.json", "README.md"}
    assert sum(files.values()) < MOST_BYTES
    card = (shipped_draft() / "README.md").read_text()
    assert "make retrain PRESET=smollm2-gpu" in card
    with safe_open(shipped_draft() / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype.itemsize for name in tensors.keys()} == {2}  # noqa: SIM118


def test_the_default_preset_starts_from_it_and_none_does_not():
    assert draft_at(load_config("smollm2-cpu").draft.warm_start or "") == shipped_draft()
    assert load_config("smollm2-cpu", ["draft.warm_start=none"]).draft.warm_start is None
    assert draft_at("elsewhere").name == "elsewhere"
    assert SHIPPED == "shipped"


@pytest.mark.slow
def test_it_serves_the_packaged_target():
    from hass_core.config import TargetConfig
    from hass_core.target_model.loader import load_target

    target = load_target(TargetConfig(device="cpu"))
    stored = read_draft(shipped_draft(), target)
    assert target.differing(stored.info) == []
    assert json.loads((shipped_draft() / "config.json").read_text())["hass"]["tokens_seen"] == 148_417_304
