"""Write a trained draft the way one engine loads it: the same tensors, that engine's config.json, a model card.

SGLang's fc always has a bias and would leave it random, so it gets one of zeros; vLLM has none and ignores it, so that
both can load the same weights. EAGLE's own code loads strictly: it gets the embedding, and a bias only where there is
one. Biases of the attention that an engine builds beside one that is needed are zeros too.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hass_core.config import TreeConfig
from hass_core.draft_model.accounting import EMBEDDING, StoredDraft, account, read_draft
from hass_core.draft_model.architecture import FC_BIAS, O_BIAS, QKV_BIASES, DraftArchitecture
from hass_core.draft_model.checkpoint import origin_difference
from hass_core.draft_model.eagle3 import Eagle3Architecture
from hass_core.draft_model.engines import ENGINES, Engine, unheld
from hass_core.draft_model.files import CONFIG, WEIGHTS
from hass_core.draft_model.identity import draft_identity
from hass_core.draft_model.target import DraftedTarget
from hass_core.errors import ConfigError, DraftMismatch
from hass_core.export.card import model_card
from hass_core.export.checks import ServedTarget, check_draft
from hass_core.export.eagle3 import CLASS, eagle3_config, eagle3_weights, unheld_of_target
from hass_core.export.folders import EXPORTED, check_out, replacing
from hass_core.target_model.licence import NOT_STATED

TOKEN_MAP = "token_map.pt"  # SGLang reads it by torch.load(weights_only=True)
LENGTH_BOUND_ROPES = ("dynamic", "longrope")  # max_position_embeddings is part of what they compute


def is_draft_file(name: str) -> bool:
    """Whether a file of the draft stage belongs to the draft itself, not to its training."""
    return not name.startswith(("metrics.jsonl", "checkpoint-"))


def export_draft(
    draft: Path,
    target: ServedTarget,
    engine_name: str,
    out: Path,
    tree: TreeConfig,
    target_name: str,
    licence: str = NOT_STATED,
) -> Path:
    """Write `out` for one engine and check it against the draft; returns `out`. A failure leaves nothing there.

    `licence` is the target's, for the card. Raises DraftMismatch with the findings when the draft does not belong to
    the target or the engine has no place for all of it, CorruptFile when the draft's folder is broken.
    """
    engine = ENGINES[engine_name]
    check_out(out, draft)
    source = read_draft(draft, target)
    shape = [*unheld(engine, source.architecture)]
    if reasons := [*shape, *_unheld_extras(engine, source, target)]:
        way_out = '; a draft trained with draft.family = "llama" loads in vLLM and SGLang' if shape else ""
        raise DraftMismatch(
            f"the draft {draft} cannot serve under {engine.title}, which has no place for {'; '.join(reasons)}{way_out}"
        )
    if difference := origin_difference(source.info, target):
        raise DraftMismatch(f"the draft {draft} {difference}; name the target it was trained for (--target)")
    weights, token_map = engine_weights(source, engine, target), source.vocabulary
    config = engine_config(source, engine, target)
    section = {**source.info, "draft_identity": draft_identity(source)}
    with replacing(out) as partial:
        made = account(partial, config, weights, target)
        if not source.architecture.own_head:
            # the first layout has no place for a trimmed vocabulary: all tokens are drafted, or those of SGLang's map
            section = {key: value for key, value in section.items() if key != "draft_vocab_size"}
        config["hass"] = section | {EXPORTED: draft_identity(made)}
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(weights, str(partial / WEIGHTS), metadata={"format": "pt"})
        mapped = engine.name == "sglang" and token_map is not None and not source.architecture.own_head
        if mapped and token_map is not None:
            torch.save(token_map.tolist(), partial / TOKEN_MAP)
        (partial / "README.md").write_text(model_card(config, engine, tree, target_name, licence, mapped))
        if findings := check_draft(partial, target, engine, source):
            listed = "\n".join(f"- {finding}" for finding in findings)
            raise DraftMismatch(f"the draft {draft} cannot serve under {engine.title}:\n{listed}")
    return out


def check_engines(names: Iterable[str], draft: DraftArchitecture, target: DraftedTarget, setting: str) -> None:
    """Raise ConfigError where an engine that a setting names has no place for a target's drafts of this
    architecture."""
    for name in names:
        if reasons := [*unheld(ENGINES[name], draft), *unheld_of_target(ENGINES[name], draft, target)]:
            raise ConfigError(
                f"{setting} names {name}, and {ENGINES[name].title} has no place for {'; '.join(reasons)} of the draft "
                f'that these settings train; take {name} out of {setting}, or set draft.family = "llama" if that '
                "changes it"
            )


def _unheld_extras(engine: Engine, source: StoredDraft, target: ServedTarget) -> Iterator[str]:
    yield from unheld_of_target(engine, source.architecture, target)
    if source.embedding is not None and engine.embedding == "replaced":
        yield f"{EMBEDDING} (the draft's own, where it serves the target's)"
    if FC_BIAS in source.weights and engine.fc_bias == "ignored":
        yield f"{FC_BIAS} (`hass import --fold-bias` moves it into the draft's own embedding where that is exact)"


def engine_weights(source: StoredDraft, engine: Engine, target: ServedTarget) -> dict[str, Tensor]:
    """All tensors of the engine's file, in the target's type; whole numbers stay such."""
    embedding = target.embedding
    weights = eagle3_weights(source, engine, target) if source.architecture.own_head else _eagle_weights(source, engine)
    if source.embedding is not None or (engine.embedding == "required" and not source.architecture.own_head):
        weights[EMBEDDING] = embedding.detach().cpu() if source.embedding is None else source.embedding
    return {
        name: (tensor.to(embedding.dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in weights.items()
    }


def _eagle_weights(source: StoredDraft, engine: Engine) -> dict[str, Tensor]:
    """The first architecture's tensors beside the embedding."""
    weights, hidden = dict(source.weights), source.architecture.hidden_size
    if engine.fc_bias != "by_config":
        weights.setdefault(FC_BIAS, torch.zeros(hidden))
    if engine.qkv_bias == "attention_bias" and _biased(source):
        for bias in (*QKV_BIASES, O_BIAS):
            rows = weights[bias.removesuffix("bias") + "weight"].shape[0]
            weights.setdefault(bias, torch.zeros(rows))
    return weights


def engine_config(source: StoredDraft, engine: Engine, target: ServedTarget) -> dict[str, Any]:
    """config.json for one engine, without the `hass` section: the draft's own sizes and rotary embedding, and the
    longest context of the two."""
    draft, dtype = source.architecture, str(target.embedding.dtype).removeprefix("torch.")
    rope = draft.rope_parameters
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    longest = draft.max_position_embeddings
    if rope["rope_type"] not in LENGTH_BOUND_ROPES:
        longest = max(longest, target.context_tokens)
    config = draft.to_config_json() | {
        "architectures": [engine.architecture],
        "max_position_embeddings": longest,
        "rope_parameters": rope,
        # transformers 4 and the engines' own code read these two
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling | {"type": scaling["rope_type"]},
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }
    if isinstance(draft, Eagle3Architecture):
        return config | {"architectures": [CLASS]} | eagle3_config(draft, engine, target)
    if engine.qkv_bias == "attention_bias":
        config.pop("qkv_bias", None)
        config |= {"attention_bias": True} if _biased(source) else {}
    if engine.fc_bias == "by_config":
        config["bias"] = draft.fc_bias
    return config


def _biased(source: StoredDraft) -> bool:
    return source.architecture.qkv_bias or source.architecture.o_bias
