"""Which shape a new draft has (`draft.architecture`, `draft.family`): the target's own, or the Llama layer that every
engine builds."""

from typing import Any, Literal

from transformers import PretrainedConfig

from hass_core.draft_config import DraftConfig
from hass_core.draft_model.architecture import DraftArchitecture, partial_rotary, rope_parameters
from hass_core.draft_model.eagle3 import Eagle3Architecture
from hass_core.draft_model.engines import SERVING, unheld, unheld_rope
from hass_core.errors import TargetError

Family = Literal["auto", "target", "llama"]


def new_architecture(target: PretrainedConfig, draft: DraftConfig, draft_vocab_size: int) -> DraftArchitecture:
    """The architecture of a new draft by its settings; `draft_vocab_size` rows has a head of its own.

    Raises TargetError as `draft_architecture`.
    """
    if draft.architecture == "eagle3":
        taps = draft.tapped(target.get_text_config().num_hidden_layers)
        return Eagle3Architecture.of(_llama(target), draft_vocab_size, draft.norm_output, taps, draft.fc_norm)
    return draft_architecture(target, draft.family)


def draft_architecture(target: PretrainedConfig, family: Family = "auto") -> DraftArchitecture:
    """The first architecture for a target of this configuration.

    `target`: the shape of the target's layers; raises TargetError where that is none a draft can have. `llama`: their
    sizes without biases and norms on the attention, a SiLU, whole heads rotated, by the target's rope where vLLM and
    SGLang compute it as transformers does, else by a plain one of the same base. `auto`: `target` where vLLM and
    SGLang hold all of it, else `llama`.
    """
    if family == "target":
        return DraftArchitecture.from_target_config(target)
    if family == "auto":
        try:
            own = DraftArchitecture.from_target_config(target)
        except TargetError:
            return _llama(target)
        return _llama(target) if any(True for engine in SERVING for _ in unheld(engine, own)) else own
    return _llama(target)


def _llama(target: PretrainedConfig) -> DraftArchitecture:
    text = target.get_text_config()
    whole = DraftArchitecture.from_target_config(target, whole_heads=True)
    bare = whole.model_copy(update={"qkv_bias": False, "o_bias": False, "qk_norm": False, "hidden_act": "silu"})
    rope = rope_parameters(text.to_dict())
    scaled = any(True for engine in SERVING for _ in unheld_rope(engine, bare))
    if scaled or partial_rotary(text.to_dict()) != 1:
        bare = bare.model_copy(update={"rope_parameters": {"rope_theta": rope["rope_theta"], "rope_type": "default"}})
    return bare


def shape_key(target: PretrainedConfig, draft: DraftConfig) -> dict[str, Any]:
    """What a draft stage's key says of the shape. Nothing where it is the one that every target had before there was a
    choice, so that those drafts keep their names."""
    if draft.architecture == "eagle3":
        taps = draft.tapped(target.get_text_config().num_hidden_layers)
        fusing = {"taps": taps, "fc_norm": draft.fc_norm} if taps else {}
        return {"architecture": "eagle3", "norm_output": draft.norm_output} | fusing
    made = draft_architecture(target, draft.family)
    try:
        own = DraftArchitecture.from_target_config(target)
    except TargetError:
        own = None
    return ({} if made == own else {"family": "llama"}) | ({"o_bias": True} if made.o_bias else {})
