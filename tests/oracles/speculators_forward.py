"""Runs in the environment of speculators: one forward pass of its EAGLE speculator with a draft's weights.

    python speculators_forward.py FOLDER

FOLDER holds the draft (config.json, model.safetensors) and inputs.safetensors: token_ids [1, L], features [1, L, H],
embedding [V, H]. Writes outputs.safetensors: features [L, H].
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle import EagleSpeculator, EagleSpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def main(folder: Path) -> None:
    given = json.loads((folder / "config.json").read_text())
    layer = LlamaConfig(**{key: value for key, value in given.items() if key not in ("hass", "dtype", "torch_dtype")})
    layer._attn_implementation = "eager"
    serving = SpeculatorsConfig(
        algorithm="eagle",
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
    )
    config = EagleSpeculatorConfig(
        transformer_layer_config=layer, layernorms=False, fusion_bias=False, speculators_config=serving
    )
    model = EagleSpeculator(config).float().eval()
    names = {"fc.": "fusion_fc.", "layers.0.": "transformer."}
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        weights[names[prefix] + name.removeprefix(prefix)] = tensor
    model.load_state_dict(weights)

    inputs = load_file(folder / "inputs.safetensors")
    model.embed_tokens = torch.nn.Embedding.from_pretrained(inputs["embedding"])
    model.rotary_emb = LlamaRotaryEmbedding(layer)
    model.lm_head = torch.nn.Identity()  # its features are compared, before any head
    with torch.no_grad():
        features = model(
            input_ids=inputs["token_ids"],
            hidden_states=inputs["features"],
            attention_mask=torch.ones_like(inputs["token_ids"]),
            return_dict=False,
        )
    save_file({"features": features.reshape(-1, layer.hidden_size).contiguous()}, folder / "outputs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
