"""Drafts for each family of targets, read back as each engine reads them: the features are the trained draft's."""

import json

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hass_core.config import TreeConfig
from hass_core.draft_model.accounting import read_draft
from hass_core.draft_model.checkpoint import draft_info, save_draft
from hass_core.draft_model.engines import ENGINES, table
from hass_core.draft_model.family import draft_architecture
from hass_core.draft_model.files import read_config, read_tensors
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.errors import DraftMismatch
from hass_core.export.checks import check_draft
from hass_core.export.exporter import export_draft
from hass_core.export.parity import feature_difference
from hass_core.export.readers import read_as
from hass_core.target_model.loader import freeze
from tests import conftest
from tests.conftest import byte_tokenizer

CHAIN = TreeConfig(kind="chain", depth=3, nodes=4)
SIZES = conftest.SIZES | {"max_position_embeddings": 8192}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024}
TARGETS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama3 rope": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "llama, biased": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True)),
    "llama, linear rope": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, head_dim=16, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen2, yarn": (Qwen2ForCausalLM, Qwen2Config(**SIZES, rope_parameters=YARN)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16)),
    "phi3": (Phi3ForCausalLM, Phi3Config(**SIZES)),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=None)),
    "glm": (GlmForCausalLM, GlmConfig(**SIZES, head_dim=12, attention_bias=True)),
}
NOT_IN_EAGLE = {  # what the official code has no place for, by target
    "llama3 rope": 'rope_type "llama3"',
    "llama, biased": r"o_proj\.bias",
    "mistral": "head_dim 16",
    "qwen2, yarn": 'rope_type "yarn"',
    "qwen3": "head_dim 16",
    "gemma2": "head_dim 16",
}


@pytest.fixture(scope="module")
def targets():
    made = {}
    for name, (kind, config) in TARGETS.items():
        torch.manual_seed(0)
        made[name] = freeze(kind(config).to(torch.bfloat16), byte_tokenizer(), name=name.replace(", ", "-"))
    return made


def save_random(folder, target, family="auto"):
    """A draft whose weights, biases and norms are nowhere at their initial values."""
    torch.manual_seed(1)
    model = DraftModel(draft_architecture(target.model.config, family), target.embedding)
    for name, weight in model.named_parameters():
        torch.nn.init.uniform_(weight, 0.5, 1.5) if "norm" in name else torch.nn.init.normal_(weight, std=0.3)
    save_draft(folder, model.float(), DraftHead.from_target(target.head), draft_info(target))
    return folder


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("name", list(TARGETS))
def test_an_export_gives_the_drafts_features_or_says_what_has_no_place(targets, name, engine, tmp_path):
    target, draft = targets[name], save_random(tmp_path / "draft", targets[name])
    if engine == "eagle" and name in NOT_IN_EAGLE:
        with pytest.raises(DraftMismatch, match=NOT_IN_EAGLE[name]):
            export_draft(draft, target, engine, tmp_path / "out", CHAIN, name)
        assert not (tmp_path / "out").exists()
        return
    out = export_draft(draft, target, engine, tmp_path / "out", CHAIN, name)
    source = read_draft(draft, target)
    reading = read_as(engine, read_config(out), read_tensors(out), target.embedding)
    assert feature_difference(reading, source, target) <= 1e-3
    assert check_draft(out, target, ENGINES[engine], source) == []
    assert check_draft(out, target, ENGINES[engine]) == []


@pytest.mark.parametrize(("name", "tensor"), [("qwen2", "q_proj.bias"), ("llama, biased", "o_proj.bias")])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_biases_of_the_attention_are_in_the_export_and_built(targets, name, tensor, engine, tmp_path):
    target = targets[name]
    out = export_draft(save_random(tmp_path / "draft", target), target, engine, tmp_path / "out", CHAIN, name)
    assert read_tensors(out)[f"layers.0.self_attn.{tensor}"].abs().min() > 0
    config = read_config(out)
    (out / "config.json").write_text(json.dumps(config | {"qkv_bias": False, "attention_bias": False}))
    assert {"bias", "features"} <= {finding.check for finding in check_draft(out, target, ENGINES[engine])}


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize(
    ("name", "told"), [("qwen3", r"q_norm\.weight, layers\.0\.self_attn\.k_norm\.weight"), ("gemma2", "gelu")]
)
def test_a_draft_of_the_targets_own_shape_is_refused_where_it_has_no_place(targets, name, told, engine, tmp_path):
    target = targets[name]
    draft = save_random(tmp_path / "draft", target, "target")
    if (engine, name) == ("eagle", "gemma2"):
        told = "head_dim 16"
    with pytest.raises(DraftMismatch, match=told):
        export_draft(draft, target, engine, tmp_path / "out", CHAIN, name)
    findings = check_draft(draft, target, ENGINES[engine])
    assert any(finding.check == "not held" for finding in findings)


def test_the_default_family_loads_in_vllm_and_sglang_whatever_the_target(targets):
    shapes = {name: draft_architecture(target.model.config) for name, target in targets.items()}
    assert shapes["qwen2"].qkv_bias
    assert shapes["llama, biased"].o_bias
    for name in ("qwen3", "gemma2", "glm"):
        assert shapes[name].tensors().keys() == shapes["llama"].tensors().keys(), name
        assert shapes[name].hidden_act == "silu"


def test_the_document_shows_the_table_that_the_exporter_uses(request):
    text = (request.config.rootpath / "docs" / "engines.md").read_text()
    assert table() in text
