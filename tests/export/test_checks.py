"""One broken checkpoint per fault: the checker names each, and a clean export has none."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hass_core.config import TreeConfig
from hass_core.draft_model.accounting import read_draft
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.checkpoint import draft_info, load_draft
from hass_core.draft_model.engines import ENGINES
from hass_core.errors import BadInput, CorruptFile, DraftMismatch
from hass_core.export.card import serving_command
from hass_core.export.checks import check_draft
from hass_core.export.exporter import export_draft

CHAIN = TreeConfig(kind="chain", depth=3, nodes=4)


@pytest.fixture
def draft(tmp_path, tiny_target) -> Path:
    """A draft folder as training leaves it, with weights that are nowhere at their initial values."""
    folder = tmp_path / "draft"
    folder.mkdir()
    architecture = DraftArchitecture.from_target_config(tiny_target.model.config)
    torch.manual_seed(1)
    tensors = {name: 0.2 * torch.randn(shape) for name, shape in architecture.tensors().items()}
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(architecture.to_config_json()))
    return folder


def exported(draft, target, engine, tmp_path) -> Path:
    return export_draft(draft, target, engine, tmp_path / engine, CHAIN, "org/target")


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_fresh_export_has_no_fault_for_its_engine(draft, tiny_target, engine, tmp_path):
    folder = exported(draft, tiny_target, engine, tmp_path)
    assert check_draft(folder, tiny_target, ENGINES[engine], read_draft(draft, tiny_target)) == []
    assert check_draft(folder, tiny_target, ENGINES[engine]) == []
    card = (folder / "README.md").read_text()
    assert {"vllm": "--speculative-config", "sglang": "--speculative-num-steps 3", "eagle": "--ea-model-path"}[
        engine
    ] in card


def test_vllm_and_sglang_get_identical_weights(draft, tiny_target, tmp_path):
    vllm = load_file(str(exported(draft, tiny_target, "vllm", tmp_path) / "model.safetensors"))
    sglang = load_file(str(exported(draft, tiny_target, "sglang", tmp_path) / "model.safetensors"))
    assert vllm.keys() == sglang.keys()
    assert all(torch.equal(vllm[name], sglang[name]) for name in vllm)
    assert not vllm["fc.bias"].any()


def edit_tensors(change):
    def edit(folder: Path) -> None:
        tensors = load_file(str(folder / "model.safetensors"))
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / "model.safetensors"))

    return edit


def edit_config(**values):
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.update(values)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def add(name, *shape, value=0.0):
    return edit_tensors(lambda tensors: tensors.update({name: torch.full(shape, value)}))


def rename_with_prefix(tensors):
    for name in list(tensors):
        tensors[f"model.{name}"] = tensors.pop(name)


def with_nan(tensors):
    tensors["fc.weight"][0, 0] = float("nan")


def with_halves_swapped(tensors):
    tensors["fc.weight"] = torch.cat(tensors["fc.weight"].chunk(2, 1)[::-1], 1)


def with_a_bit_less(tensors):
    tensors["layers.0.mlp.up_proj.weight"] *= 0.98


OTHER_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24}
FAULTS = [
    (
        "vllm",
        edit_tensors(lambda t: t.pop("layers.0.self_attn.o_proj.weight")),
        "missing tensor",
        "o_proj.weight is missing",
    ),
    ("vllm", edit_tensors(rename_with_prefix), "prefix", "strip `model.`"),
    ("vllm", add("lm_head.weight", 259, 48), "lm_head", "vLLM refuses to load it"),
    ("sglang", add("lm_head.weight", 259, 48), "lm_head", "SGLang drops it"),
    ("vllm", add("layers.0.input_layernorm.weight", 48), "norm", "layer 0 has no input norm"),
    ("vllm", add("norm.weight", 48), "norm", "a draft has no final norm"),
    ("vllm", add("fc.bias", 48, value=0.5), "fc.bias", "ignores this one silently"),
    ("sglang", edit_tensors(lambda t: t.pop("fc.bias")), "fc.bias", "keeps its random start values"),
    ("eagle", add("fc.bias", 48), "fc.bias", "loads strictly and fails"),
    ("eagle", edit_tensors(lambda t: t.pop("embed_tokens.weight")), "embedding", "embed_tokens.weight is missing"),
    ("vllm", add("embed_tokens.weight", 259, 48, value=1.0), "embedding", "keeps it instead of"),
    ("vllm", edit_config(bias=True), "bias", "nothing is accepted"),
    ("vllm", edit_config(architectures=["LlamaForCausalLMEagle"]), "architectures", "vLLM needs ['LlamaForCausalLM']"),
    ("sglang", edit_config(architectures=["LlamaForCausalLM"]), "architectures", "SGLang needs"),
    ("vllm", edit_config(model_type="qwen2"), "model_type", "needs 'llama'"),
    ("vllm", edit_config(num_hidden_layers=2), "num_hidden_layers", "needs 1"),
    ("vllm", edit_config(tie_word_embeddings=True), "tie_word_embeddings", "needs False"),
    ("vllm", edit_config(rope_parameters={"rope_type": "default", "rope_theta": 5.0}), "rope", "'rope_theta': 5.0"),
    ("sglang", edit_config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2}), "rope", "linear"),
    ("vllm", edit_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "not held", 'rope_type "dynamic"'),
    ("eagle", edit_config(rope_theta=5.0, rope_parameters=None), "rope", "'rope_theta': 5.0"),
    ("vllm", edit_config(max_position_embeddings=64), "max_position_embeddings", "the draft stops at 64"),
    ("vllm", edit_config(vocab_size=128), "vocab_size", "the draft's vocab_size is 128"),
    ("vllm", edit_config(rms_norm_eps=0.1), "rms_norm_eps", "rms_norm_eps is 0.1, the draft was trained with 1e-06"),
    ("sglang", edit_config(hidden_act="gelu"), "not held", "computes silu only"),
    ("vllm", edit_config(num_key_value_heads=4), "shape", "config.json asks for (48, 48)"),
    (
        "sglang",
        edit_config(num_attention_heads=2, num_key_value_heads=1, head_dim=24),
        "num_attention_heads",
        "was trained with 4",
    ),
    ("vllm", edit_config(qkv_bias=True), "bias", "asks for layers.0.self_attn.q_proj.bias"),
    ("sglang", edit_config(attention_bias=True), "bias", "o_proj.bias"),
    ("vllm", add("layers.0.self_attn.q_proj.bias", 48, value=1.0), "bias", "does not ask vLLM for them"),
    ("sglang", add("layers.0.self_attn.o_proj.bias", 48, value=1.0), "bias", "dropped without a word"),
    ("vllm", add("layers.0.self_attn.q_norm.weight", 12, value=1.0), "not held", "norms on queries and keys"),
    (
        "vllm",
        edit_tensors(lambda t: t.update({"fc.weight": torch.zeros(48, 48)})),
        "shape",
        "config.json asks for (48, 96)",
    ),
    ("vllm", edit_tensors(with_nan), "values", "NaN"),
    ("vllm", edit_tensors(with_halves_swapped), "other values", "fc.weight is not that of the draft"),
    ("sglang", edit_tensors(with_a_bit_less), "other values", "up_proj.weight is not that of the draft"),
]


@pytest.mark.parametrize(
    ("engine", "damage", "check", "says"), FAULTS, ids=[f"{e}-{c}-{i}" for i, (e, _, c, _) in enumerate(FAULTS)]
)
def test_each_fault_is_named(draft, tiny_target, tmp_path, engine, damage, check, says):
    folder = exported(draft, tiny_target, engine, tmp_path)
    damage(folder)
    findings = check_draft(folder, tiny_target, ENGINES[engine], read_draft(draft, tiny_target))
    assert check in {finding.check for finding in findings}
    assert says in "\n".join(map(str, findings))


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_each_fault_is_found_without_the_draft_it_was_exported_from(draft, tiny_target, tmp_path, number):
    engine, damage, _, _ = FAULTS[number]
    folder = exported(draft, tiny_target, engine, tmp_path)
    damage(folder)
    assert check_draft(folder, tiny_target, ENGINES[engine])


def test_nobody_advises_to_copy_the_targets_settings(draft, tiny_target, tmp_path):
    edit_config(rope_theta=250_000.0, rms_norm_eps=1e-3)(draft)
    folder = exported(draft, tiny_target, "vllm", tmp_path)
    assert json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"] == 250_000.0
    assert check_draft(folder, tiny_target, ENGINES["vllm"], read_draft(draft, tiny_target)) == []


def test_a_draft_of_another_target_is_not_exported(draft, tiny_target, tmp_path):
    edit_config(hidden_size=64)(draft)
    with pytest.raises(DraftMismatch, match=r"hidden_size is 64, the target's is 48"):
        exported(draft, tiny_target, "vllm", tmp_path)
    assert not (tmp_path / "vllm").exists()


def test_a_draft_of_another_target_of_the_same_size_is_named(draft, tiny_target, tmp_path):
    elder = dataclasses.replace(
        tiny_target, name="elder", identity=dataclasses.replace(tiny_target.identity, weights="0123")
    )
    edit_config(hass=draft_info(elder))(draft)
    folder = exported(draft, elder, "vllm", tmp_path)
    assert check_draft(folder, elder, ENGINES["vllm"]) == []
    (finding,) = check_draft(folder, tiny_target, ENGINES["vllm"])
    assert "trained for elder, which differs from the target tiny in its weights" in str(finding)
    assert "few of its guesses are accepted" in str(finding)
    with pytest.raises(DraftMismatch, match="was trained for elder"):
        exported(draft, tiny_target, "sglang", tmp_path)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_file_and_the_draft_itself_are_not_written_over(draft, tiny_target, engine, tmp_path):
    (tmp_path / engine).write_text("mine")
    with pytest.raises(BadInput, match="is a file; name a folder"):
        exported(draft, tiny_target, engine, tmp_path)
    with pytest.raises(BadInput, match="is or holds the draft to read; name another folder"):
        export_draft(draft, tiny_target, engine, draft, CHAIN, "org/target")


def test_a_whole_model_given_as_a_draft_is_named(tiny_target, tmp_path):
    tiny_target.model.save_pretrained(tmp_path)
    for read in (
        lambda: check_draft(tmp_path, tiny_target, ENGINES["vllm"]),
        lambda: load_draft(tmp_path, tiny_target),
    ):
        with pytest.raises(DraftMismatch, match=r"holds no draft: it has no fc\.weight\. Name a draft's folder"):
            read()


def test_an_unreadable_folder_says_what_is_missing(tmp_path, tiny_target):
    (tmp_path / "file").touch()
    with pytest.raises(CorruptFile, match=r"file/config\.json .*a draft is a folder with"):
        check_draft(tmp_path / "file", tiny_target, ENGINES["vllm"])
    with pytest.raises(CorruptFile, match=r"config\.json is missing"):
        check_draft(tmp_path, tiny_target, ENGINES["vllm"])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptFile, match="not valid JSON"):
        check_draft(tmp_path, tiny_target, ENGINES["vllm"])
    (tmp_path / "config.json").write_text(json.dumps(tiny_target.model.config.to_dict()))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CorruptFile, match="not a readable safetensors"):
        check_draft(tmp_path, tiny_target, ENGINES["vllm"])


def test_the_command_can_be_pasted_whatever_the_folders_are_called():
    for engine in ENGINES.values():
        words = shlex.split(serving_command(engine, CHAIN, "my target", "it's a draft"))
        assert "my target" in words
        assert any("it's a draft" in word for word in words)


def test_a_trimmed_vocabulary_goes_to_sglang_as_a_token_map_and_nowhere_else(draft, tiny_target, tmp_path):
    edit_config(hass={"draft_vocab_size": 64, "target": "tiny", "val_tau": 1.23456789})(draft)
    (draft / "draft_vocab.json").write_text(json.dumps(list(range(0, 128, 2))))
    folder = exported(draft, tiny_target, "sglang", tmp_path)
    assert torch.load(folder / "token_map.pt", weights_only=True) == list(range(0, 128, 2))
    card = (folder / "README.md").read_text()
    assert "--speculative-token-map THIS_FOLDER/token_map.pt" in card
    assert "drafts among the tokens of `token_map.pt`" in card
    folder = exported(draft, tiny_target, "vllm", tmp_path)
    assert not (folder / "token_map.pt").exists()
    assert "draft_vocab_size" not in json.loads((folder / "config.json").read_text())["hass"]
    card = (folder / "README.md").read_text()
    assert "# Draft model for tiny\n" in card
    assert "| val_tau | 1.235 |" in card
    assert "token-map" not in card


@pytest.mark.parametrize(
    ("licence", "told"),
    [
        ("apache-2.0", {"license": "apache-2.0"}),
        ("not stated", {"license": "unknown"}),
        ("Llama 3.1: Community", {"license": "other", "license_name": "Llama 3.1: Community"}),
    ],
)
def test_the_card_opens_with_what_model_hubs_read(draft, tiny_target, tmp_path, licence, told):
    folder = export_draft(draft, tiny_target, "vllm", tmp_path / "out", CHAIN, "org/target", licence)
    data = ModelCard((folder / "README.md").read_text()).data.to_dict()
    assert data["base_model"] == "org/target"
    assert data["pipeline_tag"] == "text-generation"
    assert data["library_name"] == "vllm"
    assert "speculative-decoding" in data["tags"]
    assert told.items() <= data.items()
