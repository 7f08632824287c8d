"""Whatever a target's config.json or generation_config.json says, the target is one to work with, or is refused."""

import json
import shutil
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hass_core.config import TargetConfig
from hass_core.errors import HassError
from hass_core.target_model.loader import load_target
from tests.conftest import byte_tokenizer, tiny_llama

NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 1, -1, 2, 3, 48, 259, 512, 0.5])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=6)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=6), SCALARS, max_size=2)
FIELDS = [
    *("model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "vocab_size"),
    *("rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "attention_bias"),
    *("attention_dropout", "mlp_bias", "eos_token_id", "bos_token_id", "pad_token_id", "dtype", "layer_types"),
    *("sliding_window", "partial_rotary_factor", "quantization_config", "text_config", "auto_map", "use_cache"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sound target; its two files of settings are written anew for each try."""
    folder = tmp_path_factory.mktemp("target")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    shutil.copy(folder / "config.json", folder / "sound.json")
    return folder


CHANGES = st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=2)


@settings(max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHANGES, VALUES)
@example({"eos_token_id": "2"}, None)
@example({"eos_token_id": [2, None]}, [[2]])
@example({"max_position_embeddings": "many"}, 2)
@example({"max_position_embeddings": -1}, 2)
@example({"rope_parameters": {"rope_type": "llama3"}}, 2)
@example({"rms_norm_eps": "small"}, 2)
@example({"vocab_size": 10**12}, 2)
@example({"num_hidden_layers": 0}, 2)
@example({"auto_map": {"AutoConfig": "x.py"}}, 2)
def test_any_target_is_worked_with_or_refused(folder, changes, ends):
    sound = json.loads((folder / "sound.json").read_text())
    (folder / "config.json").write_text(json.dumps(sound | changes))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with suppress(HassError):
        target = load_target(TargetConfig(source=str(folder), dtype="float32", device="cpu"))
        assert target.context_tokens > 0
        assert all(type(token) is int for token in target.eos_token_ids)
        assert target.identity.digest
        assert torch.isfinite(target.model(torch.tensor([[5, 6, 7]])).logits).all()
