"""The draft layer against Hugging Face's own decoder layers with the same random weights."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.layers import DraftModel

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "attn_implementation": "eager",
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama, head_dim other than hidden / heads": (LlamaConfig, LlamaForCausalLM, {"head_dim": 12}),
    "llama, every head its own key": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama, gelu": (LlamaConfig, LlamaForCausalLM, {"hidden_act": "gelu"}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 16, "sliding_window": None}),
    "qwen2 with biases": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3 with norms on q and k": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "large theta": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 32,
    },
}


def twins(config: Any, model_class: Any) -> tuple[DraftModel, Any]:
    """A draft, and the model whose layer 0, without its input norm, holds the same weights."""
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    for parameter in model.parameters():  # biases and norms start at 0 and 1: make them matter
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    layer = model.model.layers[0]
    layer.input_layernorm = nn.Identity()
    draft = DraftModel(DraftArchitecture.from_target_config(config), model.get_input_embeddings().weight.detach())
    draft.layers[0].load_state_dict(layer.state_dict(), strict=True)
    return draft, model


def assert_twins(draft: DraftModel, model: Any, length: int = 40) -> None:
    token_ids = torch.randint(0, 97, (2, length))
    features, positions = torch.randn(2, length, 32), torch.arange(length)[None].expand(2, -1)
    u = draft.fuse(token_ids, features)
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    expected = model.model.layers[0](
        u,
        attention_mask=mask,
        position_ids=positions,
        position_embeddings=model.model.rotary_emb(u, positions),
    )
    torch.testing.assert_close(draft(token_ids, features, positions), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_layer_equals_the_familys_own_without_its_input_norm(family):
    config_class, model_class, extra = FAMILIES[family]
    assert_twins(*twins(config_class(**(SIZES | extra)), model_class))


@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_positions_are_rotated_as_the_target_rotates_them(rope):
    config = LlamaConfig(**SIZES, rope_parameters=ROPES[rope])
    assert_twins(*twins(config, LlamaForCausalLM))


@torch.no_grad()
def test_rope_scaling_survives_the_config_file():
    for parameters in ROPES.values():
        config = LlamaConfig(**SIZES, rope_parameters=parameters)
        before = DraftArchitecture.from_target_config(config)
        after = DraftArchitecture.from_config_json(before.to_config_json(), before.tensors())
        assert after == before


@torch.no_grad()
def test_casting_the_model_keeps_the_rotary_frequencies_exact():
    draft, _ = twins(LlamaConfig(**SIZES), LlamaForCausalLM)
    before = draft.rotary.inv_freq.clone()
    draft.to(torch.bfloat16)
    assert draft.fc.weight.dtype == torch.bfloat16
    assert draft.rotary.inv_freq.dtype == torch.float32
    assert torch.equal(draft.rotary.inv_freq, before)


def test_the_weights_carry_eagles_names_and_nothing_else():
    draft, _ = twins(LlamaConfig(**SIZES), LlamaForCausalLM)
    assert set(draft.state_dict()) == {
        "fc.weight",
        *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "layers.0.post_attention_layernorm.weight",
    }
