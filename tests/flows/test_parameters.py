"""The flows' parameter: a preset, changes with bounds, and a form that explains itself."""

import pytest
from pydantic import ValidationError

from flows.parameters import RunParameters
from hass_core.config import RunConfig, load_config
from hass_core.errors import ConfigError


def parameters(**given) -> RunParameters:
    return RunParameters.model_validate(given)


def test_nothing_given_is_the_preset():
    assert parameters(preset="smollm2-cpu").config() == load_config("smollm2-cpu")


def test_changes_replace_the_presets_values_and_leave_the_rest():
    config = parameters(training={"passes": 2}, overrides=["training.lr_peak=1e-3"]).config()
    assert (config.training.passes, config.training.lr_peak) == (2, 1e-3)
    assert config.tree == load_config("smollm2-cpu").tree


def test_a_first_stage_can_be_changed_or_added():
    preset = load_config("paper-two-stage").pretraining
    assert preset is not None
    changed = parameters(preset="paper-two-stage", pretraining={"passes": 2}).config()
    assert changed.pretraining == preset.model_copy(update={"passes": 2})
    assert changed.training == load_config("paper-two-stage").training
    assert parameters().config().pretraining is None
    added = parameters(pretraining={"passes": 2}).config().pretraining
    assert added is not None
    assert added.passes == 2


def test_an_override_can_clear_a_setting():
    assert parameters(overrides=["draft.vocab_size=none"]).config().draft.vocab_size is None


@pytest.mark.parametrize("wrong", [{"training": {"passes": -1}}, {"training": {"pases": 1}}, {"colour": "red"}])
def test_out_of_bounds_or_unknown_changes_are_refused(wrong):
    with pytest.raises(ValidationError):
        parameters(**wrong)


def test_an_unknown_preset_is_named():
    with pytest.raises(ConfigError, match="no preset named 'nope'; presets are"):
        parameters(preset="nope").config()


def test_the_form_starts_with_the_preset_and_describes_every_field():
    schema = RunParameters.model_json_schema()
    assert next(iter(schema["properties"])) == "preset"
    assert RunConfig.model_fields.keys() <= schema["properties"].keys()
    for name, section in schema["$defs"].items():
        for field, entry in section.get("properties", {}).items():
            assert entry.get("description"), f"{name}.{field} has no description"
