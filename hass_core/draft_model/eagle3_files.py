"""What an EAGLE-3 draft's files say beside its weights: which tokens it drafts, and what of the target it reads.

A draft that fuses states inside the target names their layers, to vLLM and to SGLang in a field for each (see
`Eagle3Architecture.tapping`). A draft of the target's last hidden state comes in two forms that compute the same.
SGLang has a switch for it, `use_aux_hidden_state: false`. vLLM's default runner ignores that; for it the draft taps the
state after the last layer, norms it as the target does, and fuses it by the identity.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hass_core.draft_config import three_taps
from hass_core.draft_model.eagle3 import (
    DRAFTED,
    ELSEWHERE,
    FUSION,
    LAYER,
    LM_HEAD,
    OFFSETS,
    TAP_COUNT,
    TAP_LAYERS,
    check_fields,
    tap_norm,
)
from hass_core.draft_model.files import same_values
from hass_core.draft_model.target import DraftedTarget
from hass_core.errors import TargetError

TAP_NORM, TAP_NORMS = tap_norm(0), "fc_norm."
EAGLE3_FIELDS = {  # of config.json that only EAGLE-3 drafts have
    *("eagle_config", "draft_vocab_size", "norm_output", "fc_norm", "norm_before_fc", "target_hidden_size"),
    *("parallel_drafting", TAP_LAYERS, TAP_COUNT),
}
UNSUPPORTED = {  # settings of EAGLE-3 drafts that change what is computed, and their plain value
    "norm_before_fc": False,
    "parallel_drafting": False,
    "norm_before_residual": False,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
}


@dataclass(frozen=True)
class Eagle3Files:
    """The tensors under this project's names, what they draft, and why they cannot be taken, if so."""

    tensors: dict[str, Tensor]
    token_ids: Tensor | None  # [D] the target's token of each row of the head
    objections: list[str]
    taps: tuple[int, ...] = ()  # layers of the target whose states it fuses; none: it reads the last hidden state


def eagle3_files(config: dict[str, Any], stored: dict[str, Tensor], target: DraftedTarget) -> Eagle3Files:
    """Sort out an EAGLE-3 draft's tensors. One without a head that drafts all tokens has the target's, as in vLLM.

    Raises CorruptFile for fields of config.json that make no sense.
    """
    check_fields(config)
    tensors = {name.replace(ELSEWHERE, LAYER, 1): tensor for name, tensor in stored.items()}
    objections = ["a tensor of its layer is there under two names"] if len(tensors) != len(stored) else []
    tensors = {name: t for name, t in tensors.items() if not (name.endswith(".bias") and not bool(t.any()))}
    offsets, drafted = tensors.pop(OFFSETS, None), tensors.pop(DRAFTED, None)
    rows = target.head.shape[0]
    size = config.get("draft_vocab_size") or rows
    token_ids = None
    if size != rows and offsets is None:
        objections.append(f"it drafts {size} of {rows} tokens and {OFFSETS}, which names them, is missing")
    elif offsets is not None:
        token_ids, wrong = _token_ids(offsets, drafted, size, rows)
        objections += wrong
    if LM_HEAD not in tensors and size == rows and token_ids is None:  # the target's head is in the target's order
        tensors[LM_HEAD] = target.head.detach().cpu()
    objections += _settings(config)
    tensors, taps, wrong = _read_of_target(config, tensors, target)
    return Eagle3Files(tensors, token_ids, [*objections, *wrong], taps)


def offsets_of(token_ids: Tensor, rows: int) -> dict[str, Tensor]:
    """d2t [D] and t2d [V] for the target's `token_ids` [D], which has `rows` tokens."""
    drafted = torch.zeros(rows, dtype=torch.bool)
    drafted[token_ids.cpu()] = True
    return {OFFSETS: token_ids.cpu() - torch.arange(len(token_ids)), DRAFTED: drafted}


def _token_ids(offsets: Tensor, drafted: Tensor | None, size: int, rows: int) -> tuple[Tensor | None, list[str]]:
    """The token ids [D], None where they are all tokens in order; and what is wrong with them."""
    if offsets.is_floating_point() or tuple(offsets.shape) != (size,):
        return None, [f"{OFFSETS} is {tuple(offsets.shape)} of {offsets.dtype}, {size} whole numbers are asked for"]
    ids = offsets.long() + torch.arange(size)
    if int(ids.min()) < 0 or int(ids.max()) >= rows or len(ids.unique()) != size:
        return None, [f"{OFFSETS} does not name {size} of the target's {rows} tokens: it holds offsets, token - row"]
    if drafted is not None and not torch.equal(drafted.bool(), offsets_of(ids, rows)[DRAFTED]):
        return None, [f"{DRAFTED} names other tokens than {OFFSETS}"]
    return (None if size == rows and not bool(offsets.any()) else ids), []


def _settings(config: dict[str, Any]) -> Iterator[str]:
    nested = config.get("eagle_config") or {}
    for setting, plain in UNSUPPORTED.items():
        for value in (config.get(setting), nested.get(setting)):
            if value not in (None, plain):
                yield f"{setting} = {value!r} in config.json is not supported"
    for name in nested.keys() - UNSUPPORTED.keys() - {"use_aux_hidden_state", TAP_LAYERS}:
        yield f"eagle_config.{name} = {nested[name]!r} in config.json: no engine's rule for it is known here"
    if config.get("target_hidden_size") not in (None, config.get("hidden_size")):
        yield "it is narrower or wider than its target (target_hidden_size), which is not supported"
    if config.get("tie_word_embeddings"):
        yield "config.json says tie_word_embeddings, which SGLang follows and vLLM does not"


def _read_of_target(
    config: dict[str, Any], tensors: dict[str, Tensor], target: DraftedTarget
) -> tuple[dict[str, Tensor], tuple[int, ...], list[str]]:
    """Of what is read of the target: the tensors without those that only bring its last hidden state, the layers whose
    states are fused, and what is wrong with them."""
    if reads_last_state(config):
        return tensors, (), []
    rest = {name: tensor for name, tensor in tensors.items() if name != FUSION and not name.startswith(TAP_NORMS)}
    fusion, norm = tensors.get(FUSION), tensors.get(TAP_NORM)
    if fusion is None:
        return rest, (), [f"it lacks {FUSION}, which fuses the target's states that it reads"]
    if fusion.ndim != 2:
        return rest, (), [f"{FUSION} is {tuple(fusion.shape)}, no matrix"]
    if config.get(TAP_LAYERS) == [target.num_layers] and fusion.shape[0] == fusion.shape[1]:
        return rest, (), [*_other_fusion(config, fusion, norm, target)]
    try:
        taps = taps_told(config, target.num_layers)
    except ValueError as error:
        return rest, (), [str(error)]
    return tensors, taps, [*_count(config, fusion, taps)]


def reads_last_state(config: dict[str, Any]) -> bool:
    """Whether config.json says that an EAGLE-3 draft fuses no states of the target."""
    return (config.get("eagle_config") or {}).get("use_aux_hidden_state", True) is False


def taps_told(config: dict[str, Any], layers: int) -> tuple[int, ...]:
    """The layers of a target of so many whose states config.json says are fused, as vLLM counts. Where it names none,
    the three that engines take.

    Raises ValueError saying why they cannot be read.
    """
    top, nested = config.get(TAP_LAYERS), (config.get("eagle_config") or {}).get(TAP_LAYERS)
    for where, named in (("", top), ("eagle_config's ", nested)):
        if named is not None and not (isinstance(named, list) and all(type(layer) is int for layer in named)):
            raise ValueError(f"{where}{TAP_LAYERS} is {named!r}, no list of layers")
    counted = None if nested is None else [layer + 1 for layer in nested]
    if top is not None and counted is not None and top != counted:
        raise ValueError(
            f"{TAP_LAYERS} is {top} and in eagle_config {nested}, which is after layers {counted}: vLLM and SGLang "
            "would read other states"
        )
    named = counted if top is None else top
    if named is None:
        try:
            return three_taps(layers)
        except TargetError:
            raise ValueError(
                f"it fuses states of the target and names no layers ({TAP_LAYERS}); those that engines take, 2, N/2 "
                f"and N-3, are not three in order of the target's {layers}"
            ) from None
    if not named or named != sorted(set(named)) or named[0] < 1 or named[-1] >= layers:
        raise ValueError(
            f"it fuses states of the target after layers {named}, which are not ascending ones from 1 to {layers - 1}"
        )
    return tuple(named)


def _count(config: dict[str, Any], fusion: Tensor, taps: tuple[int, ...]) -> Iterator[str]:
    """What is wrong with the number of states."""
    hidden, count = config.get("hidden_size"), config.get(TAP_COUNT)
    if count is not None and count != len(taps):
        yield f"{TAP_COUNT} is {count}, and {len(taps)} layers are named ({list(taps)})"
    if isinstance(hidden, int) and fusion.shape[1] != len(taps) * hidden:
        fused = fusion.shape[1] // max(1, hidden)
        yield f"{FUSION} fuses {fused} states, and {len(taps)} layers are named ({list(taps)})"


def _other_fusion(config: dict[str, Any], fusion: Tensor, norm: Tensor | None, target: DraftedTarget) -> Iterator[str]:
    """In what a tap of the last layer's state differs from the target's last hidden state."""
    if not torch.equal(fusion.float(), torch.eye(len(fusion))):
        yield f"{FUSION} is not the identity: it fuses the state after the last layer, before the final norm"
    final = target.final_norm
    if final is None or norm is None or not config.get("fc_norm"):
        yield f"it reads the state after the last layer without the target's final norm ({TAP_NORM}, fc_norm)"
    elif not same_values(norm, final[0]) or abs((config.get("rms_norm_eps") or 1e-6) - final[1]) > 1e-12:
        yield f"{TAP_NORM} is not the target's final norm"
