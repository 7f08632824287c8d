"""The second architecture in the layouts of vLLM and SGLang: what is written, and what is looked for in a folder.

Read in vLLM 0.32.0 (`model_executor/models/llama_eagle3.py`, `v1/worker/gpu/spec_decode/eagle`) and SGLang 0.5.23
(`srt/models/llama_eagle3.py`). Both draw the same from the same weights, but the target's last hidden state, which the
draft reads, comes otherwise: SGLang has a switch for it. vLLM's default runner ignores that switch; there the draft
taps the state after the last layer, norms it as the target does, and fuses it by the identity.

A draft that fuses states inside the target is one folder for both: vLLM reads the list of layers at the top of
config.json, SGLang the one in eagle_config, whose numbers are one less.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hass_core.draft_model.accounting import StoredDraft
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.eagle3 import DRAFTED, FUSION, LM_HEAD, OFFSETS, TAP_COUNT, TAP_LAYERS, Eagle3Architecture
from hass_core.draft_model.eagle3_files import TAP_NORM, offsets_of, reads_last_state, taps_told
from hass_core.draft_model.engines import Engine
from hass_core.draft_model.target import DraftedTarget
from hass_core.export.findings import EXPORT_AGAIN, Finding

CLASS = "LlamaForCausalLMEagle3"


def unheld_of_target(engine: Engine, draft: DraftArchitecture, target: DraftedTarget) -> Iterator[str]:
    """Why the engine cannot give an eagle3 draft this target's last hidden state."""
    if engine.name != "vllm" or not draft.own_head or _fuses(draft):
        return
    if target.final_norm is None:
        yield "the target's last hidden state (its final norm is not known to be a plain RMSNorm)"
    elif target.final_norm[1] != draft.rms_norm_eps:
        yield (
            f"two epsilons of norms (the draft's {draft.rms_norm_eps:g}, and {target.final_norm[1]:g} of the target's "
            "final norm, which the draft's file has to repeat)"
        )


def _fuses(draft: DraftArchitecture) -> bool:
    return isinstance(draft, Eagle3Architecture) and bool(draft.taps)


def eagle3_weights(source: StoredDraft, engine: Engine, target: DraftedTarget) -> dict[str, Tensor]:
    """All tensors of the engine's file beside the embedding. t2d is read by trainers alone, and skipped by engines."""
    weights = dict(source.weights)
    if source.vocabulary is not None:
        weights |= offsets_of(source.vocabulary, target.head.shape[0])
    if engine.name == "vllm" and target.final_norm is not None and not _fuses(source.architecture):
        weights[FUSION] = torch.eye(source.architecture.hidden_size)
        weights[TAP_NORM] = target.final_norm[0].detach().cpu()
    return weights


def eagle3_config(draft: Eagle3Architecture, engine: Engine, target: DraftedTarget) -> dict[str, Any]:
    """What config.json says beside sizes, rotary embedding and types."""
    common = {
        "norm_output": draft.norm_output,
        "norm_before_residual": False,
        "draft_vocab_size": draft.draft_vocab_size,
    }
    if draft.taps:
        return common | draft.tapping()
    if engine.name != "vllm":
        return common | {"eagle_config": {"use_aux_hidden_state": False}}
    tapped = {TAP_LAYERS: [target.num_layers], TAP_COUNT: 1, "fc_norm": True}
    return common | tapped | {"eagle_config": {"use_aux_hidden_state": True}}


def eagle3_findings(
    config: dict[str, Any], tensors: dict[str, Tensor], engine: Engine, target: DraftedTarget
) -> Iterator[Finding]:
    """Faults that only this layout can have, in config.json and in the tensors."""
    yield from _settings(config, engine, target)
    yield from _vocabulary(config, tensors, engine, target.head.shape[0])
    if LM_HEAD not in tensors:
        yield Finding(
            "lm_head",
            f"{LM_HEAD} is missing",
            f"{engine.title} takes random or the target's rows instead",
            EXPORT_AGAIN,
        )


def _settings(config: dict[str, Any], engine: Engine, target: DraftedTarget) -> Iterator[Finding]:
    nested = config.get("eagle_config") or {}
    wanted: dict[str, tuple[Any, Any, str]] = {  # found, needed, consequence
        "norm_before_residual": (
            config.get("norm_before_residual", False), False, "vLLM adds to other rows than the draft was trained with"
        ),
        "bias": (config.get("bias", False), False, "a bias is built that the file does not hold, and stays random"),
        "attention_bias": (
            config.get("attention_bias", False), False, "biases are built that the file does not hold: random ones"
        ),
    }  # fmt: skip
    if fuses(config, target):
        yield from _taps(config, target)
    elif engine.name == "vllm":
        wanted |= {
            TAP_LAYERS: (config.get(TAP_LAYERS), [target.num_layers], "other states of the target reach the draft"),
            TAP_COUNT: (config.get(TAP_COUNT), 1, "fc is built for another number of states"),
            "fc_norm": (config.get("fc_norm"), True, "the target's state reaches the draft without its final norm"),
            "use_aux_hidden_state": (
                nested.get("use_aux_hidden_state", True), True,
                "vLLM's default runner captures states all the same and fails, or feeds them without the final norm",
            ),
        }  # fmt: skip
    else:
        wanted["use_aux_hidden_state"] = (
            nested.get("use_aux_hidden_state", True), False,
            f"{engine.title} captures three states of the target for an fc that is not there",
        )  # fmt: skip
    if engine.name == "sglang":
        wanted["draft_vocab_size"] = (
            "draft_vocab_size" in config, True, f"{engine.title} stops at its start: it asks for the key"
        )  # fmt: skip
    for setting, (found, needed, consequence) in wanted.items():
        if found != needed:
            what = f"{setting} is {found!r} in config.json, {engine.title} needs {needed!r}"
            yield Finding(setting, what, consequence, EXPORT_AGAIN)


def fuses(config: dict[str, Any], target: DraftedTarget) -> bool:
    """Whether config.json is of a draft that fuses states inside the target, whatever is wrong with it."""
    return not reads_last_state(config) and config.get(TAP_LAYERS) != [target.num_layers]


def _taps(config: dict[str, Any], target: DraftedTarget) -> Iterator[Finding]:
    """One list of layers for each engine, and how many they are."""
    top, nested = config.get(TAP_LAYERS), (config.get("eagle_config") or {}).get(TAP_LAYERS)
    for where, named, engine in (("at its top", top, "vLLM"), ("in eagle_config", nested, "SGLang")):
        if named is None:
            yield Finding(
                TAP_LAYERS,
                f"config.json has no {TAP_LAYERS} {where}",
                f"{engine} takes layers of its own choice",
                EXPORT_AGAIN,
            )
    try:
        taps = taps_told(config, target.num_layers)
    except ValueError as error:
        yield Finding(TAP_LAYERS, str(error), "other states of the target reach the draft", EXPORT_AGAIN)
        return
    if config.get(TAP_COUNT) != len(taps):
        yield Finding(
            TAP_COUNT, f"{TAP_COUNT} is {config.get(TAP_COUNT)!r} for the states after layers {list(taps)}",
            "fc is built for another number of states", EXPORT_AGAIN,
        )  # fmt: skip


def _vocabulary(config: dict[str, Any], tensors: dict[str, Tensor], engine: Engine, rows: int) -> Iterator[Finding]:
    size = config.get("draft_vocab_size") or rows
    if size < rows and OFFSETS not in tensors:
        yield Finding(
            OFFSETS, f"{OFFSETS} is missing and {size} of {rows} tokens are drafted",
            f"{engine.title} drafts the first {size} tokens instead, without a word", EXPORT_AGAIN,
        )  # fmt: skip
    if size == rows and {OFFSETS, DRAFTED} & tensors.keys():
        yield Finding(
            OFFSETS,
            f"{OFFSETS} is in the file and all tokens are drafted",
            "vLLM refuses to load it",
            f"remove {OFFSETS}",
        )
