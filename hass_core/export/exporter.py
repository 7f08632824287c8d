"""Write a trained draft the way one engine loads it: the same tensors, that engine's config.json, a model card.

vLLM and SGLang get identical weights with an all-zero fc.bias: SGLang always has that bias and would leave it random,
vLLM has none and ignores it. EAGLE's own code loads strictly, so it gets the embedding and no bias.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from hass_core.config import TreeConfig
from hass_core.errors import DraftMismatch
from hass_core.export.card import model_card
from hass_core.export.checks import check_draft, rope_of
from hass_core.export.engines import ENGINES, Engine
from hass_core.export.layout import CONFIG, WEIGHTS, Layout, check_out, read_config, read_tensors
from hass_core.target_model.licence import NOT_STATED


def is_draft_file(name: str) -> bool:
    """Whether a file of the draft stage belongs to the draft itself, not to its training."""
    return not name.startswith(("metrics.jsonl", "checkpoint-"))


def export_draft(
    draft: Path,
    target: PretrainedConfig,
    embedding: Tensor,
    engine_name: str,
    out: Path,
    tree: TreeConfig,
    target_name: str,
    licence: str = NOT_STATED,
) -> Path:
    """Write `out` for one engine and check it with the strict checker; returns `out`. A failure leaves nothing there.

    `embedding` is the target's token embedding [V, H], `licence` the target's, for the card. Raises DraftMismatch with
    the findings when the draft does not belong to the target, BadInput when the draft folder is broken.
    """
    engine = ENGINES[engine_name]
    check_out(out, draft)
    source, tensors = read_config(draft), read_tensors(draft)
    layout = Layout.from_config(source)
    dtype = embedding.dtype
    weights = {name: tensors[name].to(dtype).contiguous() for name in layout.trained() if name in tensors}
    if engine.fc_bias != "by_config":
        weights["fc.bias"] = tensors.get("fc.bias", torch.zeros(layout.hidden_size)).to(dtype)
    elif "fc.bias" in tensors:
        weights["fc.bias"] = tensors["fc.bias"].to(dtype)
    if engine.embedding == "required":
        weights["embed_tokens.weight"] = embedding.detach().cpu().contiguous()
    elif source.get("hass", {}).get("folded_bias"):
        weights["embed_tokens.weight"] = tensors["embed_tokens.weight"].to(dtype).contiguous()

    config = engine_config(source, target.get_text_config(), engine, dtype, has_bias="fc.bias" in tensors)
    with _replacing(out) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(weights, str(partial / WEIGHTS), metadata={"format": "pt"})
        (partial / "README.md").write_text(model_card(config, engine, tree, target_name, licence))
        if findings := check_draft(partial, target, engine, embedding):
            listed = "\n".join(f"- {finding}" for finding in findings)
            raise DraftMismatch(f"the draft {draft} cannot serve under {engine.title}:\n{listed}")
    return out


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block ends well, and is gone otherwise."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def engine_config(
    source: dict[str, Any], target: PretrainedConfig, engine: Engine, dtype: torch.dtype, has_bias: bool
) -> dict[str, Any]:
    """config.json for one engine: the draft's sizes, everything positional from the target."""
    layout = Layout.from_config(source)
    rope = rope_of(target.to_dict())
    theta = rope["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    config = {
        "architectures": [engine.architecture],
        "model_type": "llama",
        "hidden_size": layout.hidden_size,
        "intermediate_size": layout.intermediate_size,
        "num_attention_heads": layout.num_attention_heads,
        "num_key_value_heads": layout.num_key_value_heads,
        "head_dim": layout.head_dim,
        "num_hidden_layers": 1,
        "vocab_size": layout.vocab_size,
        "hidden_act": source.get("hidden_act", "silu"),
        "rms_norm_eps": source["rms_norm_eps"],
        "max_position_embeddings": target.max_position_embeddings,
        "rope_parameters": rope,
        "rope_theta": theta,  # transformers 4 and the engines' own code read these two
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "tie_word_embeddings": False,
        "bias": has_bias if engine.fc_bias == "by_config" else False,
        "bos_token_id": target.bos_token_id,
        "eos_token_id": target.eos_token_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        # this layout has no place for a trimmed vocabulary: engines draft among all tokens
        "hass": {key: value for key, value in source.get("hass", {}).items() if key != "draft_vocab_size"},
    }
    return config
