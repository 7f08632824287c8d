"""Settings refuse what they do not know, naming it, and every shipped preset loads."""

import pytest

from hass_core.config import RunConfig, load_config, parse_config, preset_names
from hass_core.errors import ConfigError


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_under_its_own_name(name):
    assert load_config(name).name == name


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.pases=2", r"training\.pases: no such setting; did you mean training\.passes\?"),
        ("trainign.passes=2", r"trainign: no such setting; did you mean training\?"),
        ("training.align_steps=99", r"training\.align_steps = 99: .*less than or equal to 8"),
        ("training.step_weights=[1.0]", r"step_weights has 1 values, training\.align_steps is 3"),
        ('responses.engine="openai"', r"needs responses\.server_url"),
        ("responses.sampling=[{share=0.5}]", r"must sum to 1, they sum to 0\.5"),
        ('name="../escape"', r"name = '\.\./escape'"),
        ("training.passes", r"not of the form section\.key=value"),
        ("tracking.uri=http://me:secret@host", r"uri holds a password, .* give it by the environment"),
        ("store=s3://key:secret@bucket/x", r"store holds a password"),
        ("training.packs_per_batch=8", r"training\.packs_per_batch is gone: set packs_per_step"),
        (
            "pretraining.accumulation_steps=8",
            r"pretraining\.accumulation_steps is gone: it follows from packs_per_step",
        ),
        ("training.renormalize_top_k=true", r"training\.renormalize_top_k is gone: no result was better for it"),
        ("draft.fc_bias=true", r"draft\.fc_bias is gone: vLLM cannot serve such a draft"),
        ("features.encoding=fp8", r"features\.encoding = 'fp8' is gone: \"bf16\" is exact, \"int8\" halves"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(override, says):
    with pytest.raises(ConfigError, match=says):
        load_config("smollm2-cpu", [override])


def test_all_bad_settings_are_told_at_once():
    with pytest.raises(ConfigError, match="2 bad settings"):
        load_config("smollm2-cpu", ["training.top_k=0", "evaluation.repeats=0"])


def test_a_bad_setting_is_named_with_where_it_stands(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[training]\ntop_k = 0\n")
    with pytest.raises(ConfigError) as told:
        load_config(file, ["evaluation.repeats=0", "tree.nods=3"])
    of_file, _, of_command_line = str(told.value).partition("; the command line: 2 bad settings: ")
    assert of_file.startswith(f"{file}: training.top_k = 0")
    assert "evaluation.repeats = 0" in of_command_line
    assert "tree.nods: no such setting; did you mean tree.nodes?" in of_command_line
    file.write_text("[prompts]\nself_written = 3\n")
    with pytest.raises(ConfigError, match=r"mine\.toml with the command line: give prompts\.self_written or"):
        load_config(file, ["prompts.self_written_share=0.5"])
    file.write_text('name = "mine"\n')
    with pytest.raises(ConfigError, match=r"^the command line: training = 5: this is a section"):
        load_config(file, ["training=5"])
    with pytest.raises(ConfigError, match=r"^overrides: training\.passes = 0"):
        load_config(file, ["training.passes=0"], "overrides")


def test_overrides_take_toml_values_and_bare_words():
    config = load_config("smollm2-cpu", ["training.passes=2", "target.dtype=float32", "draft.vocab_size=none"])
    assert (config.training.passes, config.target.dtype, config.draft.vocab_size) == (2, "float32", None)


def test_noise_of_one_width_on_states_of_different_sizes_is_refused():
    tapped = ["draft.architecture=eagle3", "draft.warm_start=none", "training.feature_noise=0.1"]
    assert load_config("smollm2-cpu", tapped).training.feature_noise == 0.1
    with pytest.raises(ConfigError, match=r"training\.feature_noise is one width"):
        load_config("smollm2-cpu", [*tapped, "draft.taps=three"])


def test_an_encoding_called_none_can_be_typed():
    assert load_config("smollm2-cpu", ["features.encoding=none"]).features.encoding == "none"


def test_a_settings_file_is_read_and_a_missing_or_broken_one_named(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\n[training]\nalign_steps = 2\n')
    assert load_config(file).training.align_steps == 2
    with pytest.raises(ConfigError, match=r"missing\.toml does not exist"):
        load_config(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="no preset named 'smollm3'"):
        load_config("smollm3")
    file.write_text("name = ")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(file)


def test_every_setting_has_a_description():
    plain = [
        f"{section}.{name}"
        for section, field in RunConfig.model_fields.items()
        if hasattr(field.annotation, "model_fields")
        for name, setting in field.annotation.model_fields.items()
        if not setting.description
    ]
    assert plain == [], "these settings appear without help in the flows' forms"


def test_settings_survive_a_round_trip_through_json():
    config = load_config("smollm2-cpu")
    assert parse_config(config.model_dump(mode="json")) == config


def test_a_refused_password_is_not_repeated():
    with pytest.raises(ConfigError) as refused:
        load_config("smollm2-cpu", ["tracking.uri=http://me:hunter2@host"])
    assert "hunter2" not in str(refused.value)


def test_the_store_is_taken_from_the_environment_unless_it_is_set(monkeypatch):
    assert parse_config({}).store == ".hass/store"
    monkeypatch.setenv("HASS_STORE", "s3://hass/store")
    assert parse_config({}).store == load_config("smollm2-cpu").store == "s3://hass/store"
    assert parse_config({"store": "elsewhere"}).store == "elsewhere"
    monkeypatch.setenv("HASS_STORE", "s3://key:secret@bucket/x")
    with pytest.raises(ConfigError, match="store holds a password"):
        parse_config({})


def test_a_setting_that_decided_nothing_may_stand_in_old_files():
    assert parse_config({"features": {"conversations_per_shard": 8}}) == parse_config({})
    with pytest.raises(ConfigError, match="no such setting"):
        parse_config({"features": {"conversations_per_shrad": 8}})


def test_settings_that_passed_through_json_name_the_same_stages():
    """A flow's settings come as JSON; a number that is 0 here and 0.0 there would make every stage anew."""
    config = parse_config({})
    through = RunConfig.model_validate_json(config.model_dump_json())
    assert through.model_dump_json() == config.model_dump_json()
