"""One broken checkpoint per fault: the checker names each, and a clean export has none."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hass_core.config import TreeConfig
from hass_core.draft_model.checkpoint import load_draft
from hass_core.errors import BadInput, DraftMismatch
from hass_core.export.card import serving_command
from hass_core.export.checks import check_draft
from hass_core.export.engines import ENGINES
from hass_core.export.exporter import export_draft
from hass_core.export.layout import Layout

CHAIN = TreeConfig(kind="chain", depth=3, nodes=4)


@pytest.fixture(scope="module")
def config(tiny_target):
    return tiny_target.model.config


@pytest.fixture(scope="module")
def embedding(tiny_target):
    return tiny_target.embedding


@pytest.fixture
def draft(tmp_path, config) -> Path:
    """A draft folder as training leaves it."""
    folder = tmp_path / "draft"
    folder.mkdir()
    source = {key: value for key, value in config.to_dict().items() if key != "architectures"}
    torch.manual_seed(1)
    tensors = {name: torch.randn(shape) for name, shape in Layout.from_config(source).trained().items()}
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(source | {"bias": False}))
    return folder


def exported(draft, config, embedding, engine, tmp_path) -> Path:
    return export_draft(draft, config, embedding, engine, tmp_path / engine, CHAIN, "org/target")


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_fresh_export_has_no_fault_for_its_engine(draft, config, embedding, engine, tmp_path):
    folder = exported(draft, config, embedding, engine, tmp_path)
    assert check_draft(folder, config, ENGINES[engine], embedding) == []
    card = (folder / "README.md").read_text()
    assert {"vllm": "--speculative-config", "sglang": "--speculative-num-steps 3", "eagle": "--ea-model-path"}[
        engine
    ] in card


def test_vllm_and_sglang_get_identical_weights(draft, config, embedding, tmp_path):
    vllm = load_file(str(exported(draft, config, embedding, "vllm", tmp_path) / "model.safetensors"))
    sglang = load_file(str(exported(draft, config, embedding, "sglang", tmp_path) / "model.safetensors"))
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
    ("vllm", edit_config(max_position_embeddings=64), "max_position_embeddings", "the draft stops at 64"),
    ("vllm", edit_config(vocab_size=128), "vocab_size", "the draft's vocab_size is 128"),
    ("vllm", edit_config(rms_norm_eps=0.1), "rms_norm_eps", 'set "rms_norm_eps"'),
    (
        "vllm",
        edit_tensors(lambda t: t.update({"fc.weight": torch.zeros(48, 48)})),
        "shape",
        "config.json asks for (48, 96)",
    ),
    ("vllm", edit_tensors(with_nan), "values", "NaN"),
]


@pytest.mark.parametrize(
    ("engine", "damage", "check", "says"), FAULTS, ids=[f"{e}-{c}-{i}" for i, (e, _, c, _) in enumerate(FAULTS)]
)
def test_each_fault_is_named(draft, config, embedding, tmp_path, engine, damage, check, says):
    folder = exported(draft, config, embedding, engine, tmp_path)
    damage(folder)
    findings = check_draft(folder, config, ENGINES[engine], embedding)
    assert check in {finding.check for finding in findings}
    assert says in "\n".join(map(str, findings))


def test_a_draft_of_another_target_is_not_exported(draft, config, embedding, tmp_path):
    edit_config(hidden_size=64)(draft)
    with pytest.raises(DraftMismatch, match=r"hidden_size is 64, the target's is 48"):
        exported(draft, config, embedding, "vllm", tmp_path)
    assert not (tmp_path / "vllm").exists()


def test_a_draft_of_another_target_of_the_same_size_is_named(draft, config, embedding, tiny_target, tmp_path):
    edit_config(hass=tiny_target.record() | {"target": "elder"})(draft)
    folder = exported(draft, config, embedding, "vllm", tmp_path)
    assert check_draft(folder, config, ENGINES["vllm"], embedding, tiny_target) == []
    other = replace(tiny_target, identity=replace(tiny_target.identity, weights="other"))
    (finding,) = check_draft(folder, config, ENGINES["vllm"], embedding, other)
    assert "trained for elder, which differs from tiny in its weights" in str(finding)
    assert "few of its guesses are accepted" in str(finding)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_file_and_the_draft_itself_are_not_written_over(draft, config, embedding, engine, tmp_path):
    (tmp_path / engine).write_text("mine")
    with pytest.raises(BadInput, match="is a file; name a folder"):
        exported(draft, config, embedding, engine, tmp_path)
    with pytest.raises(BadInput, match="is the draft to read; name another folder"):
        export_draft(draft, config, embedding, engine, draft, CHAIN, "org/target")


def test_a_whole_model_given_as_a_draft_is_named(tiny_target, tmp_path, config, embedding):
    tiny_target.model.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"holds no draft: it has no fc\.weight\. Name a draft's folder"):
        check_draft(tmp_path, config, ENGINES["vllm"], embedding)
    with pytest.raises(DraftMismatch, match=r"holds no draft: it has no fc\.weight"):
        load_draft(tmp_path, tiny_target)


def test_a_file_given_as_a_draft_says_what_a_draft_is(tmp_path, config):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"file/config\.json does not exist; a draft is a folder with"):
        check_draft(tmp_path / "file", config, ENGINES["vllm"])


def test_an_unreadable_folder_says_what_is_missing(tmp_path, config):
    with pytest.raises(BadInput, match=r"config\.json does not exist"):
        check_draft(tmp_path, config, ENGINES["vllm"])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match="not valid JSON"):
        check_draft(tmp_path, config, ENGINES["vllm"])
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="not a readable safetensors"):
        check_draft(tmp_path, config, ENGINES["vllm"])


def test_the_command_can_be_pasted_whatever_the_folders_are_called():
    for engine in ENGINES.values():
        words = shlex.split(serving_command(engine, CHAIN, "my target", "it's a draft"))
        assert "my target" in words
        assert any("it's a draft" in word for word in words)


def test_a_draft_of_a_trimmed_vocabulary_is_not_said_to_be_one_at_an_engine(draft, config, embedding, tmp_path):
    edit_config(hass={"draft_vocab_size": 64, "target": "tiny", "val_tau": 1.23456789})(draft)
    folder = exported(draft, config, embedding, "vllm", tmp_path)
    assert json.loads((folder / "config.json").read_text())["hass"] == {"target": "tiny", "val_tau": 1.23456789}
    card = (folder / "README.md").read_text()
    assert "# Draft model for tiny\n" in card
    assert "| val_tau | 1.235 |" in card
