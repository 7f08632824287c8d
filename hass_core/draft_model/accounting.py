"""Every tensor of a draft's folder is carried into the draft, or the draft is refused and the tensor named.

What a draft consists of is `DraftArchitecture.tensors()`. Beside those a folder may hold what says nothing new: the
target's own embedding and head, a table of rotary frequencies that follows from config.json, biases that are all zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from hass_core.draft_model.architecture import (
    FC_BIAS,
    O_BIAS,
    QK_NORMS,
    QKV_BIASES,
    DraftArchitecture,
    contradicting_ropes,
)
from hass_core.draft_model.config_fields import refused_fields
from hass_core.draft_model.eagle3 import Eagle3Architecture, is_eagle3
from hass_core.draft_model.eagle3_files import EAGLE3_FIELDS, eagle3_files
from hass_core.draft_model.files import (
    CONFIG,
    RANKS,
    VOCABULARY,
    read_config,
    read_tensors,
    read_token_ids,
    same_values,
)
from hass_core.draft_model.record import check_record
from hass_core.draft_model.target import DraftedTarget
from hass_core.errors import DraftMismatch

FUSION = "fc.weight"  # every draft of the first architecture has it, no other model
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
FREQUENCIES = "layers.0.self_attn.rotary_emb.inv_freq"
PREFIX = "model."
MLP = ("gate", "up", "down")
MLP_BIASES = tuple(f"layers.0.mlp.{part}_proj.bias" for part in MLP)
HASS_NORMS = {  # of a variant that was only ever released as checkpoints
    *("embed_layernorm.weight", "embedding_layernorm.weight", "hidden_layernorm.weight", "lm_head_layernorm.weight"),
    *("hidden_states_layernorm.weight", "layers.0.input_layernorm.weight"),
}
WHY_NOT = {
    HEAD: ", which uses the target's head: this one is another",
    "norm.weight": ", which has no norm at its end",
    FREQUENCIES: ", whose rotary frequencies follow from config.json: these are others",
}
LINEAR = ("fc", *(f"layers.0.self_attn.{part}_proj" for part in "qkvo"), *(f"layers.0.mlp.{part}_proj" for part in MLP))


@dataclass(frozen=True)
class StoredDraft:
    """A draft's folder, accounted for: `weights` are exactly `architecture.tensors()`."""

    folder: Path
    config: dict[str, Any]
    architecture: DraftArchitecture
    weights: dict[str, Tensor]
    embedding: Tensor | None  # [V, H], the draft's own, where it differs from the target's
    vocabulary: Tensor | None = None  # ids [D], the only tokens that it drafts
    ranks: Tensor | None = None  # ids [R], the tokens that the target's answers use most, best first

    @property
    def info(self) -> dict[str, Any]:
        """The `hass` section of config.json."""
        return self.config.get("hass") or {}


def read_draft(folder: Path, target: DraftedTarget) -> StoredDraft:
    """Read a draft's folder for a target and account for all of it.

    Raises CorruptFile when a file is missing or broken, DraftMismatch when the folder holds another kind of model, a
    draft of other sizes, too few tensors or too many.
    """
    return account(folder, read_config(folder), read_tensors(folder), target)


def account(folder: Path, config: dict[str, Any], stored: dict[str, Tensor], target: DraftedTarget) -> StoredDraft:
    """See `read_draft`."""
    tensors = _flat(folder, stored)
    refuse_other_models(folder, config, tensors)
    _compare_sizes(folder, config, target)
    record, rows = check_record(config), target.head.shape[0]
    listed, ranks = (_token_ids(folder / name, rows) for name in (VOCABULARY, RANKS))
    if is_eagle3(config, tensors):
        sorted_out = eagle3_files(config, tensors, target)
        tensors, vocabulary = sorted_out.tensors, sorted_out.token_ids
        claims, fields = sorted_out.objections, {k: v for k, v in config.items() if k not in EAGLE3_FIELDS}
        architecture = Eagle3Architecture.from_config_json(config, tensors, sorted_out.taps)
    else:
        vocabulary, claims, fields = listed, [*_claims(config, tensors)], config
        tensors = _without_zero_biases(tensors)
        _compare_vocabularies(folder, record.draft_vocab_size, vocabulary, rows)
        architecture = DraftArchitecture.from_config_json(config, tensors)
    embedding = _own_embedding(folder, tensors.pop(EMBEDDING, None), target.embedding)
    objections = [
        *claims,
        *_unknown(fields, tensors, architecture, target),
        *_missing(tensors, architecture),
        *_wrong(tensors, architecture, embedding),
        *_structure(config),
        *_tied(config, embedding),
        *_not_computable(architecture),
    ]
    if objections:
        kind_named = "EAGLE-3 draft" if architecture.own_head else "draft"
        raise DraftMismatch(f"the {kind_named} in {folder} cannot be taken as it is: {'; '.join(objections)}")
    weights = {name: tensors[name] for name in architecture.tensors()}
    return StoredDraft(folder, config, architecture, weights, embedding, vocabulary, ranks)


def refuse_other_models(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise DraftMismatch for what is no draft at all."""
    if FUSION not in tensors and not is_eagle3(config, tensors):
        raise DraftMismatch(f"{folder} holds no draft: it has no {FUSION}. Name a draft's folder, not the target's")


def _flat(folder: Path, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under EAGLE's flat names: some trainers put `model.` in front."""
    flat = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    if len(flat) != len(stored):
        twice = sorted(name for name in flat if name in stored and PREFIX + name in stored)
        raise DraftMismatch(f"the draft in {folder} holds {', '.join(twice)} twice, with and without the prefix model.")
    return flat


def _compare_sizes(folder: Path, config: dict[str, Any], target: DraftedTarget) -> None:
    rows, hidden = target.embedding.shape
    for field, theirs in (("hidden_size", hidden), ("vocab_size", rows)):
        if config.get(field) not in (None, theirs):  # its absence is told with the other fields'
            raise DraftMismatch(
                f"the draft in {folder} was trained for another target: its {field} is {config[field]}, the target's "
                f"is {theirs}; use the target it was trained for, or train a draft for this one"
            )


def _token_ids(path: Path, rows: int) -> Tensor | None:
    token_ids = read_token_ids(path)
    if token_ids is not None and (len(token_ids) == 0 or int(token_ids.max()) >= rows):
        raise DraftMismatch(f"{path} names no token, or token ids outside the target's vocabulary of {rows}")
    return token_ids


def _compare_vocabularies(folder: Path, size: int | None, vocabulary: Tensor | None, rows: int) -> None:
    found = rows if vocabulary is None else len(vocabulary)
    if size is not None and size != found:
        there = f"{VOCABULARY} names {found}" if vocabulary is not None else f"there is no {VOCABULARY}"
        raise DraftMismatch(
            f"the draft in {folder} drafts {size} tokens by its {CONFIG}, and {there}; take both from the same draft"
        )


def _without_zero_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without biases that are all zero, of whatever layer: nothing is computed by them, and exports for engines that
    always build one carry such. Those of q, k and v are one group."""
    adding = {name for name in tensors if name.endswith(".bias") and not _is_zero_bias(name, tensors)}
    kept = {*adding, *(QKV_BIASES if adding & {*QKV_BIASES} else ())}
    return {name: tensor for name, tensor in tensors.items() if name in kept or not _is_zero_bias(name, tensors)}


def _is_zero_bias(name: str, tensors: dict[str, Tensor]) -> bool:
    layer = name.removesuffix(".bias")
    if layer == name or layer not in LINEAR or (weight := tensors.get(f"{layer}.weight")) is None:
        return False
    return tensors[name].shape == weight.shape[:1] and not bool(tensors[name].any())


def _own_embedding(folder: Path, own: Tensor | None, targets: Tensor) -> Tensor | None:
    if own is None:
        return None
    if own.shape != targets.shape:
        raise DraftMismatch(
            f"the draft in {folder} has an {EMBEDDING} of {tuple(own.shape)}, the target's is {tuple(targets.shape)}"
        )
    return None if same_values(own, targets) else own


def _unknown(
    config: dict[str, Any], tensors: dict[str, Tensor], architecture: DraftArchitecture, target: DraftedTarget
) -> Iterator[str]:
    names = sorted(tensors.keys() - architecture.tensors().keys())
    if norms := [name for name in names if name in HASS_NORMS]:
        yield f"{', '.join(norms)} (norms of a variant of HASS) have no place in a draft"
    for name in names:
        if name not in HASS_NORMS and not _says_nothing_new(name, tensors[name], architecture, target):
            yield f"{name} has no place in a draft{WHY_NOT.get(name, '')}"
    if refused := [*refused_fields(config)]:
        yield (
            f"{CONFIG} asks for what no draft here computes: {', '.join(refused)}; remove a field that the draft was "
            "trained without"
        )


def _says_nothing_new(name: str, tensor: Tensor, architecture: DraftArchitecture, target: DraftedTarget) -> bool:
    if name == HEAD:
        return same_values(tensor, target.head)
    return name == FREQUENCIES and _same_frequencies(tensor, architecture)


def _same_frequencies(stored: Tensor, architecture: DraftArchitecture) -> bool:
    from hass_core.draft_model.layers import Rotary

    follows = Rotary(architecture.rotary_config()).inv_freq
    exact = 1e-5 if stored.dtype == torch.float32 else 1e-2  # old checkpoints stored them in half precision
    return stored.shape == follows.shape and torch.allclose(stored.float(), follows, rtol=exact, atol=0)


def _missing(tensors: dict[str, Tensor], architecture: DraftArchitecture) -> Iterator[str]:
    if missing := sorted(architecture.tensors().keys() - tensors.keys()):
        yield f"it lacks {', '.join(missing)}"


def _wrong(tensors: dict[str, Tensor], architecture: DraftArchitecture, embedding: Tensor | None) -> Iterator[str]:
    asked = architecture.tensors()
    if embedding is not None:
        tensors, asked = tensors | {EMBEDDING: embedding}, asked | {EMBEDDING: tuple(embedding.shape)}
    for name, shape in asked.items():
        if name not in tensors:
            continue
        if (found := tuple(tensors[name].shape)) != shape:
            yield f"{name} does not fit its {CONFIG}: it is {found}, {shape} is asked for"
        elif tensors[name].dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            yield f"{name} is quantised ({str(tensors[name].dtype).removeprefix('torch.')})"
        elif not bool(tensors[name].isfinite().all()):
            yield f"{name} holds NaN or infinite numbers"


def _tied(config: dict[str, Any], embedding: Tensor | None) -> Iterator[str]:
    if embedding is not None and config.get("tie_word_embeddings"):
        yield f"{CONFIG} says tie_word_embeddings, and {EMBEDDING} is not the target's: a draft uses the target's head"


def _not_computable(architecture: DraftArchitecture) -> Iterator[str]:
    """Settings that no draft can be computed with."""
    from hass_core.draft_model.layers import Rotary

    if architecture.hidden_act not in ACT2FN:
        yield f"hidden_act = {architecture.hidden_act!r} in {CONFIG} is no known activation"
    rope = architecture.rope_parameters
    try:
        frequencies = Rotary(architecture.rotary_config()).inv_freq
    except (KeyError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # a kind or field is not there
        yield f"the rotary embedding in {CONFIG} makes no sense ({rope}): {' '.join(map(str, error.args))}"
        return
    if not bool(frequencies.isfinite().all()):
        yield f"the rotary embedding in {CONFIG} gives no finite frequencies ({rope})"


def _claims(config: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[str]:
    """What config.json says is there and the tensors do not show."""
    claims = {"qkv_bias": QKV_BIASES, "qk_norm": QK_NORMS, "bias": (FC_BIAS,), "mlp_bias": MLP_BIASES}
    if config.get("hass"):  # elsewhere it is the target's setting, copied with all others
        claims["attention_bias"] = (O_BIAS,)
    for setting, names in claims.items():
        if config.get(setting) and (missing := [name for name in names if name not in tensors]):
            yield f'{CONFIG} says "{setting}", but the tensors lack {", ".join(missing)}'


def _structure(config: dict[str, Any]) -> Iterator[str]:
    if contradiction := contradicting_ropes(config):
        yield f"{CONFIG} tells two rotary embeddings: {contradiction}; keep the one it was trained with"
    if (layers := config.get("num_hidden_layers", 1)) != 1:
        yield f"{CONFIG} says num_hidden_layers {layers}, a draft has one"
