"""What a draft's config.json says is computed, or refused with the field's name."""

import json
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hass_core.draft_model.accounting import read_draft
from hass_core.draft_model.checkpoint import load_draft
from hass_core.draft_model.config_fields import READ
from hass_core.draft_model.engines import ENGINES
from hass_core.errors import CorruptFile, DraftMismatch, HassError
from hass_core.export.checks import check_draft
from tests.draft_model.conftest import tensors_of


@pytest.mark.parametrize(
    "change",
    [
        {"d2t": torch.zeros(64, dtype=torch.long)},
        {"midlayer.hidden_norm.weight": torch.ones(48)},
        {"layers.0.hidden_norm.weight": torch.ones(48)},
        {"fc.weight": torch.zeros(48, 144)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_eagle3_draft_is_called_one(write, tiny_target, change):
    with pytest.raises(DraftMismatch, match=r"the EAGLE-3 draft in .* cannot be taken"):
        read_draft(write(change), tiny_target)
    with pytest.raises(DraftMismatch, match=r"the EAGLE-3 draft in .* cannot be taken"):
        read_draft(write(architectures=["LlamaForCausalLMEagle3"]), tiny_target)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("partial_rotary_factor", 0.5), ("rope_parameters", {"partial_rotary_factor": 0.25}), ("mlp_bias", True)),
        *(("quantization_config", {"quant_method": "fp8"}), ("num_hidden_layers", 2), ("add_para_norm", True)),
    ],
)
def test_arithmetic_that_is_not_supported_is_named(write, tiny_target, setting, value):
    named = next(iter(value)) if setting == "rope_parameters" else setting
    with pytest.raises(DraftMismatch, match=named):
        read_draft(write(**{setting: value}), tiny_target)


@pytest.mark.parametrize("value", ["many", None, 0, -1, [4]])
def test_a_senseless_config_is_one_sentence(write, tiny_target, value):
    with pytest.raises((CorruptFile, DraftMismatch)):
        read_draft(write(num_attention_heads=value), tiny_target)


@pytest.mark.parametrize("epsilon", [0.0, -1.0])
def test_an_epsilon_that_is_none_is_refused_not_replaced(write, tiny_target, epsilon):
    with pytest.raises(CorruptFile, match="rms_norm_eps"):
        read_draft(write(rms_norm_eps=epsilon), tiny_target)


def test_a_rotation_of_parts_is_seen_in_the_old_form_too(write, tiny_target):
    rope = {"rope_type": "default", "partial_rotary_factor": 0.5}
    with pytest.raises(DraftMismatch, match="partial_rotary_factor"):
        read_draft(write(rope_scaling=rope), tiny_target)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_act": "gronk"}, "hidden_act = 'gronk' in config.json is no known activation"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "the rotary embedding in config.json makes no sense"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "the rotary embedding in config.json makes no sense"),
        ({"rope_theta": -5.0}, "gives no finite frequencies"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_computed_are_told_where_the_draft_is_read(write, tiny_target, change, told):
    with pytest.raises(DraftMismatch, match=told):
        read_draft(write(**change), tiny_target)


@pytest.mark.parametrize(
    ("named", "config"),
    [
        ("sliding_window = 128", {"sliding_window": 128}),
        ("sliding_window = 128", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 0}),
        ("layer_types", {"layer_types": ["sliding_attention"], "sliding_window": 128}),
        ("attn_logit_softcapping = 50.0", {"attn_logit_softcapping": 50.0}),
        ("final_logit_softcapping = 30.0", {"final_logit_softcapping": 30.0}),
        ("query_pre_attn_scalar = 256", {"query_pre_attn_scalar": 256}),
        ("attention_multiplier = 0.5", {"attention_multiplier": 0.5}),
        ("logits_scaling = 8.0", {"logits_scaling": 8.0}),
        ("logit_scale = 0.0625", {"logit_scale": 0.0625}),
        ("scale_emb = 12", {"scale_emb": 12}),
        ("clip_qkv = 8", {"clip_qkv": 8}),
        ("no_rope_layers", {"no_rope_layers": [0]}),
        ("layer_norm_eps", {"layer_norm_eps": 1e-5}),
        ("use_rope = False", {"use_rope": False}),
        ("a_setting_to_come", {"a_setting_to_come": {"on": True}}),
        ("model_type = 'gemma2'", {"model_type": "gemma2"}),
        ("draft_vocab_size = 64", {"draft_vocab_size": 64}),
    ],
    ids=str,
)
def test_a_field_that_would_change_the_arithmetic_is_refused_by_name(write, tiny_target, named, config):
    with pytest.raises(DraftMismatch) as refused:
        read_draft(write(**config), tiny_target)
    assert f"what no draft here computes: {named}" in str(refused.value)


def test_a_targets_whole_configuration_is_no_obstacle_where_it_is_plain(write, tiny_target):
    """As EAGLE's trainers leave it: the target's config.json with one layer."""
    copied = {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 28, "attention_bias": True}
    plain = {"layer_types": ["full_attention"] * 28, "attn_logit_softcapping": None, "logit_scale": 1.0}
    names = {"model_type": "qwen2", "_attn_implementation": "sdpa", "initializer_range": 0.02, "top_p": 0.8}
    config = tiny_target.model.config.to_dict() | {"num_hidden_layers": 1} | copied | plain | names
    read_draft(write(**config), tiny_target)
    read_draft(write(sliding_window=512), tiny_target)  # as long as the context


def test_every_field_that_is_read_decides(write, architecture, tiny_target):
    gelu = read_draft(write(hidden_act="silu", hidden_activation="gelu_pytorch_tanh"), tiny_target)
    assert gelu.architecture.hidden_act == "gelu_pytorch_tanh"
    rope = {"type": "yarn", "factor": 4.0}
    yarn = read_draft(write(rope_scaling=rope, original_max_position_embeddings=128), tiny_target)
    assert yarn.architecture.rope_parameters["original_max_position_embeddings"] == 128


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
    ],
    ids=str,
)
def test_two_rotary_embeddings_in_one_file_are_refused(write, tiny_target, config):
    with pytest.raises(DraftMismatch, match="two rotary embeddings"):
        read_draft(write(**config), tiny_target)


def test_an_eagle3_class_that_is_no_list_is_seen_too(write, tiny_target):
    with pytest.raises(DraftMismatch, match=r"the EAGLE-3 draft in .* cannot be taken"):
        read_draft(write(architectures="LlamaForCausalLMEagle3"), tiny_target)
    read_draft(write(architectures="LlamaForCausalLM"), tiny_target)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"head_dim": 0}, "head_dim: Input should be greater than 0"),
        ({"partial_rotary_factor": ":"}, "could not convert string to float"),
        ({"partial_rotary_factor": {"a": 1}}, "makes no sense"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": [1]}, "makes no sense"),
        ({"head_dim": 13}, "head_dim: Input should be a multiple of 2"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: Input should be a valid number"),
        ({"max_position_embeddings": -3}, "max_position_embeddings: Input should be greater than 0"),
        ({"hass": "yes"}, "hass in the draft's config.json makes no sense"),
        ({"hass": {"target_identity": 5}}, r"hass\.target_identity in the draft's config\.json makes no sense"),
        ({"hass": {"calibration": {"hot": [1.0, 1.0]}}}, r"hass\.calibration in the draft's config\.json"),
        ({"hass": {"calibration": {"0.7": [1.0]}}}, r"hass\.calibration\.0\.7 in the draft's config\.json"),
    ],
    ids=str,
)
def test_senseless_entries_are_named(write, tiny_target, config, told):
    with pytest.raises(CorruptFile, match=told):
        read_draft(write(**config), tiny_target)


def test_a_base_of_zero_is_no_missing_one(write, architecture, tiny_target):
    folder = write()
    config = {**architecture.to_config_json(), "rope_theta": 0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DraftMismatch, match="no finite frequencies"):
        read_draft(folder, tiny_target)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
FIELDS = st.sampled_from([*sorted(READ - {"hidden_size", "vocab_size"}), "clip_qkv", "pad_token_id", "target"])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3), VALUES)
def test_any_config_is_taken_or_refused_in_words(architecture, tiny_target, tmp_path, changes, record):
    """By whoever reads a draft: the accounting, and the checker with its readings of other engines."""
    config = architecture.to_config_json() | {"hass": {"target_identity": record}} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors_of(architecture), tmp_path / "model.safetensors")
    with suppress(HassError):
        load_draft(tmp_path, tiny_target)
    for engine in ENGINES.values():
        with suppress(HassError):
            check_draft(tmp_path, tiny_target, engine)
