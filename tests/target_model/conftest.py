"""Tiny random models of several families."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hass_core.target_model.loader import Target, freeze
from tests import conftest
from tests.conftest import byte_tokenizer

SIZES = conftest.SIZES | {"max_position_embeddings": 256, "initializer_range": 0.2}
VARIANTS = {
    "llama": {},
    "llama, llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama, dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}},
    "llama, wide heads": {"head_dim": 20},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}
OTHERS = {
    "mistral, window": {"sliding_window": 8},
    "qwen2, window": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3, window": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 16},
    "gemma3_text": {"sliding_window": 8, "head_dim": 12},
    "cohere": {"logit_scale": 0.25},
    "cohere, unscaled": {"logit_scale": 1.0},
    "gemma": {"head_dim": 12},
    "gemma2": {"sliding_window": 8, "head_dim": 12, "query_pre_attn_scalar": 12},
    "gemma2, uncapped": {"sliding_window": 8, "head_dim": 12, "final_logit_softcapping": None},
    "phi3": {},
    "phi3, longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        },
        "original_max_position_embeddings": 64,
    },
    "phi": {},
    "glm": {"head_dim": 16, "partial_rotary_factor": 0.5, "attention_bias": True},
    "glm4": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "granite": {"logits_scaling": 8.0},
    "granite, unscaled": {"logits_scaling": 1.0},
    "llama, biases": {"attention_bias": True},
    "llama, partial": {"rope_parameters": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}},
}


def tiny_model(variant: str, seed: int = 0, **sizes: object) -> Target:
    """A random target, of two layers unless `sizes` say otherwise; `variant` is a key of VARIANTS, or a model type
    taking the same sizes."""
    family = variant.split(",")[0]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(SIZES | (VARIANTS | OTHERS).get(variant, {}) | sizes))
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # zeros and ones would hide a missing term
            parameter.data += 0.3 * torch.randn_like(parameter)
    return freeze(model.float(), byte_tokenizer(), name=variant)


@pytest.fixture(params=VARIANTS, scope="session")
def any_target(request) -> Target:
    return tiny_model(request.param)
