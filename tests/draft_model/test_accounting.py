"""No tensor of a draft's folder is dropped or invented: each is carried, or the draft is refused with its name."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hass_core.draft_config import DraftConfig
from hass_core.draft_model.accounting import read_draft
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.checkpoint import draft_model, load_draft, warm_start
from hass_core.draft_model.config_fields import READ
from hass_core.draft_model.engines import ENGINES
from hass_core.draft_model.identity import draft_identity
from hass_core.errors import CorruptFile, DraftMismatch, HassError
from hass_core.export.checks import check_draft


def tensors_of(architecture: DraftArchitecture) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: 0.1 * torch.randn(shape) for name, shape in architecture.tensors().items()}


@pytest.fixture
def architecture(tiny_target):
    return DraftArchitecture.from_target_config(tiny_target.model.config)


@pytest.fixture
def write(tmp_path, architecture):
    """Write a draft folder; `tensors` and `config` are changed as told."""

    def written(tensors=None, shape=architecture, name="draft", **config) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        save_file(tensors_of(shape) | (tensors or {}), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(shape.to_config_json() | config))
        return folder

    return written


@pytest.mark.parametrize(
    "traits",
    [{"qkv_bias": True}, {"qkv_bias": True, "o_bias": True}, {"o_bias": True}, {"qk_norm": True}, {"fc_bias": True}],
    ids=str,
)
def test_every_bias_and_norm_arrives_and_is_used(write, architecture, tiny_target, traits):
    shape = architecture.model_copy(update=traits)
    stored = read_draft(write(shape=shape), tiny_target)
    assert stored.architecture == shape
    assert all(torch.equal(stored.weights[name], tensor) for name, tensor in tensors_of(shape).items())
    draft, inputs = load_draft(stored.folder, tiny_target), (torch.arange(5)[None], torch.randn(1, 5, 48))
    before = draft.model(*inputs, torch.arange(5)[None])
    added = [name for name in shape.tensors() if name not in architecture.tensors()]
    for name in added:
        state = draft.model.state_dict()
        state[name] = state[name] + torch.randn_like(state[name])
        draft.model.load_state_dict(state)
        assert not torch.allclose(draft.model(*inputs, torch.arange(5)[None]), before), name


@pytest.mark.parametrize(
    "name",
    [
        *("embed_layernorm.weight", "hidden_layernorm.weight", "layers.0.input_layernorm.weight", "norm.weight"),
        *("layers.1.mlp.up_proj.weight", "layers.0.mlp.up_proj.bias", "layers.0.self_attn.sinks", "lm_head.weight"),
    ],
)
def test_a_tensor_without_a_place_is_named(write, tiny_target, name):
    with pytest.raises(DraftMismatch, match=name.replace(".", r"\.")):
        read_draft(write({name: torch.rand(259, 48) if name == "lm_head.weight" else torch.rand(48)}), tiny_target)


def test_the_targets_own_embedding_and_head_are_no_news(write, tiny_target):
    folder = write({"embed_tokens.weight": tiny_target.embedding.clone(), "lm_head.weight": tiny_target.head.clone()})
    assert read_draft(folder, tiny_target).embedding is None
    own = tiny_target.embedding + 1
    stored = read_draft(write({"embed_tokens.weight": own}), tiny_target)
    assert stored.embedding is not None
    assert torch.equal(stored.embedding, own)
    with pytest.raises(DraftMismatch, match=r"embed_tokens\.weight of its own, and training shares the target's"):
        warm_start(stored.folder, tiny_target)


def test_rotary_frequencies_in_the_file_must_be_those_of_the_config(write, tiny_target):
    frequencies = 1e4 ** -(torch.arange(0, 12, 2) / 12)
    read_draft(write({"layers.0.self_attn.rotary_emb.inv_freq": frequencies}), tiny_target)
    with pytest.raises(DraftMismatch, match="inv_freq has no place"):
        read_draft(write({"layers.0.self_attn.rotary_emb.inv_freq": frequencies / 2}), tiny_target)


@pytest.mark.parametrize("name", ["layers.0.self_attn.o_proj.weight", "layers.0.mlp.gate_proj.weight"])
def test_a_missing_tensor_is_named(write, architecture, tiny_target, name):
    folder = write()
    tensors = {key: tensor for key, tensor in tensors_of(architecture).items() if key != name}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DraftMismatch, match=rf"it lacks {name}".replace(".", r"\.")):
        load_draft(folder, tiny_target)


@pytest.mark.parametrize(
    ("claim", "names"),
    [("qkv_bias", "q_proj.bias"), ("qk_norm", "q_norm.weight"), ("bias", "fc.bias")],
)
def test_what_the_config_says_is_there_must_be_there(write, tiny_target, claim, names):
    with pytest.raises(DraftMismatch, match=f'says "{claim}", but the tensors lack .*{names}'):
        read_draft(write(**{claim: True}), tiny_target)


def test_one_bias_of_three_is_not_enough(write, tiny_target):
    with pytest.raises(DraftMismatch, match=r"lacks layers\.0\.self_attn\.k_proj\.bias, layers\.0\.self_attn\.v_proj"):
        read_draft(write({"layers.0.self_attn.q_proj.bias": torch.ones(48)}), tiny_target)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(write, tiny_target, value):
    broken = torch.zeros(48, 96)
    broken[0, 0] = value
    with pytest.raises(DraftMismatch, match=r"fc\.weight holds NaN or infinite numbers"):
        read_draft(write({"fc.weight": broken}), tiny_target)


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


def shard(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Divide a folder's tensors among two files, and return the index's weight_map."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[4:]}
    for file, part in parts.items():
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def test_shards_are_read_through_their_index(write, architecture, tiny_target):
    folder, tensors = write(), tensors_of(architecture)
    whole = draft_identity(read_draft(folder, tiny_target))
    shard(folder, tensors)
    stored = read_draft(folder, tiny_target)
    assert all(torch.equal(stored.weights[name], tensor) for name, tensor in tensors.items())
    assert draft_identity(stored) == whole
    begun = draft_model(warm_start(folder, tiny_target), tiny_target.embedding)
    assert torch.equal(begun.fc.weight, tensors["fc.weight"])


def test_shards_and_index_that_disagree_are_refused(write, architecture, tiny_target):
    folder, tensors = write(), tensors_of(architecture)
    places, index = shard(folder, tensors), folder / "model.safetensors.index.json"

    def says(**changed):
        index.write_text(json.dumps({"weight_map": places | changed}))
        with pytest.raises(CorruptFile) as refused:
            read_draft(folder, tiny_target)
        return str(refused.value)

    assert "model-3.safetensors is missing" in says(**{"norm.weight": "model-3.safetensors"})
    assert "names norm.weight" in says(**{"norm.weight": "model-00001-of-00002.safetensors"})
    assert "outside of its folder" in says(**{"norm.weight": "../else.safetensors"})
    del places["fc.weight"]
    assert "holds fc.weight, which" in says()
    shard(folder, tensors)
    save_file(tensors, folder / "model-00003-of-00003.safetensors")
    with pytest.raises(CorruptFile, match=r"holds model-00003-of-00003\.safetensors beside"):
        read_draft(folder, tiny_target)


def test_the_identity_is_the_contents_alone(write, architecture, tiny_target):
    first = draft_identity(read_draft(write(hass={"val_tau": 1.0, "target": "a"}), tiny_target))
    zeros = {"fc.bias": torch.zeros(48), "layers.0.self_attn.o_proj.bias": torch.zeros(48)}
    assert draft_identity(read_draft(write(zeros, name="elsewhere"), tiny_target)) == first
    assert draft_identity(read_draft(write(rms_norm_eps=1e-5), tiny_target)) != first
    assert draft_identity(read_draft(write(rope_theta=5e5), tiny_target)) != first
    fc = tensors_of(architecture)["fc.weight"]
    fc[0, 0] += 1e-6
    assert draft_identity(read_draft(write({"fc.weight": fc}), tiny_target)) != first
    folder = write()
    (folder / "draft_vocab.json").write_text("[1, 2, 3]")
    assert draft_identity(read_draft(folder, tiny_target)) != first


@pytest.mark.parametrize("content", ["{}", "[1, 1]", "[1, true]", "[1.5]", "[", '["a"]', "[-1]"])
def test_a_list_of_tokens_that_is_none_is_refused(write, tiny_target, content):
    folder = write()
    (folder / "draft_vocab.json").write_text(content)
    with pytest.raises(CorruptFile, match=r"draft_vocab\.json"):
        load_draft(folder, tiny_target)


def test_a_warm_start_keeps_the_drafts_own_architecture(write, architecture, tiny_target):
    shape = architecture.model_copy(
        update={"qkv_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    )
    folder = write(shape=shape)
    stored = warm_start(folder, tiny_target)
    assert draft_model(stored, tiny_target.embedding).architecture == shape
    with pytest.raises(DraftMismatch, match=r'not of draft\.family = "llama": it has .*q_proj\.bias'):
        warm_start(folder, tiny_target, DraftConfig(family="llama"))
    with pytest.raises(CorruptFile, match=r"draft\.warm_start: .* is missing"):
        warm_start(folder / "nowhere", tiny_target)


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


def test_a_bias_of_zeros_says_nothing_whatever_layer_it_is_of(write, tiny_target):
    whole = draft_identity(read_draft(write(), tiny_target))
    zeros = {f"layers.0.mlp.{part}_proj.bias": torch.zeros(96) for part in ("gate", "up")}
    zeros |= {"layers.0.mlp.down_proj.bias": torch.zeros(48), "layers.0.self_attn.o_proj.bias": torch.zeros(48)}
    assert draft_identity(read_draft(write(zeros, name="zeros", mlp_bias=True), tiny_target)) == whole
    for bias in (torch.full((96,), 0.1), torch.zeros(7)):
        with pytest.raises(DraftMismatch, match=r"layers\.0\.mlp\.up_proj\.bias has no place"):
            read_draft(write({"layers.0.mlp.up_proj.bias": bias}), tiny_target)
    with pytest.raises(DraftMismatch, match=r"fc\.bias does not fit its config\.json"):
        read_draft(write({"fc.bias": torch.zeros(7)}), tiny_target)


def test_an_own_embedding_is_looked_at_like_any_tensor(write, tiny_target):
    own = tiny_target.embedding + 1
    with pytest.raises(DraftMismatch, match=r"tie_word_embeddings.*a draft uses the target's head"):
        read_draft(write({"embed_tokens.weight": own}, tie_word_embeddings=True), tiny_target)
    own[3, 3] = float("nan")
    with pytest.raises(DraftMismatch, match=r"embed_tokens\.weight holds NaN"):
        read_draft(write({"embed_tokens.weight": own}), tiny_target)


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


def test_the_tokens_that_are_drafted_are_those_of_the_record(write, tiny_target):
    folder = write(hass={"draft_vocab_size": 3})
    with pytest.raises(DraftMismatch, match=r"drafts 3 tokens by its config\.json, and there is no draft_vocab\.json"):
        read_draft(folder, tiny_target)
    (folder / "draft_vocab.json").write_text("[1, 2]")
    with pytest.raises(DraftMismatch, match=r"and draft_vocab\.json names 2"):
        read_draft(folder, tiny_target)
    (folder / "draft_vocab.json").write_text("[1, 2, 300]")
    with pytest.raises(DraftMismatch, match="outside the target's vocabulary of 259"):
        read_draft(folder, tiny_target)
    (folder / "draft_vocab.json").write_text("[1, 2, 3]")
    assert load_draft(folder, tiny_target).head.size == 3


def test_a_pickle_is_one_of_numbers_under_names_and_says_what_the_other_file_says(write, architecture, tiny_target):
    folder, tensors = write(), tensors_of(architecture)
    torch.save({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    read_draft(folder, tiny_target)  # the same draft twice
    tensors["fc.weight"][0, 0] += 1
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CorruptFile, match=r"both model\.safetensors and pytorch_model\.bin, which differ"):
        read_draft(folder, tiny_target)
    (folder / "model.safetensors").unlink()
    sparse, absent = tensors["fc.weight"].to_sparse(), torch.empty(48, 96, device="meta")
    for broken in (tensors | {"fc.weight": sparse}, tensors | {"fc.weight": absent}, {1: torch.ones(2)}):
        torch.save(broken, folder / "pytorch_model.bin")
        with pytest.raises(CorruptFile, match=r"not a plain file of tensors: .* is none"):
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
