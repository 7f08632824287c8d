"""Settings written as a file are the same settings when the file is read."""

from pathlib import Path

import pytest

from hass_core.config import RunConfig, load_config, preset_names
from hass_core.settings import as_toml

CHANGES = [
    "training.clip_norm=none",
    "training.betas=[0.8, 0.9]",
    'prompts.files=["a\\"b.jsonl", "ü.jsonl"]',
    "responses.sampling=[{share = 0.5, temperature = 0.0}, {share = 0.5}]",
    "store=/elsewhere",
]


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("changes", [[], CHANGES])
def test_settings_survive_being_written_as_toml(tmp_path: Path, preset, changes):
    settings = load_config(preset, changes)
    text, cleared = as_toml(settings)
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "run.toml", cleared) == settings
    assert cleared == (["training.clip_norm=none"] if changes else [])


def test_defaults_are_an_empty_file():
    assert as_toml(RunConfig()) == ("\n", [])
