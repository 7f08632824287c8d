"""A draft on disk: config.json and model.safetensors in EAGLE layout; draft_vocab.json when the vocabulary is trimmed,
else token_ranks.json, from which decoding may trim it.

The `hass` section of config.json names the target the draft was trained for; loading compares it.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.errors import CorruptFile, DraftMismatch
from hass_core.target_model.loader import Target

CONFIG, WEIGHTS, VOCABULARY, RANKS = "config.json", "model.safetensors", "draft_vocab.json", "token_ranks.json"
FUSION = "fc.weight"  # every draft has it, no other model
Q_NORM, FC_BIAS, EMBEDDING = "layers.0.self_attn.q_norm.weight", "fc.bias", "embed_tokens.weight"


@dataclass(frozen=True)
class Draft:
    """A draft ready to decode with: model and head on the target's device, `info` the config's `hass` section, `ranks`
    the tokens that the target's answers use most, best first, where the draft knows them; `eight_bits`: decode with
    its weights rounded to fp8."""

    model: DraftModel
    head: DraftHead
    info: dict[str, Any]
    ranks: Tensor | None = None
    eight_bits: bool = False

    def narrowed(self, size: int | None) -> "Draft":
        """The draft that proposes no more than the `size` most frequent tokens; itself where it knows no ranks."""
        if size is None or self.ranks is None or size >= self.head.size:
            return self
        return replace(self, head=DraftHead.from_target(self.head.weight, self.ranks[:size].sort().values))


def draft_info(target: Target, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """The `hass` section: which target the draft belongs to, and whatever `extra` tells."""
    return {**target.record(), **(extra or {})}


def save_draft(
    folder: Path, draft: DraftModel, head: DraftHead, extra: dict[str, Any], ranks: Tensor | None = None
) -> None:
    """Write the draft into `folder`; `extra` (see `draft_info`) becomes the `hass` section of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in draft.state_dict().items()}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    section = {"target_model_type": draft.architecture.target_model_type, "draft_vocab_size": head.size, **extra}
    config = {**draft.architecture.to_config_json(), "torch_dtype": dtype, "hass": section}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if head.token_ids is not None:
        (folder / VOCABULARY).write_text(json.dumps(head.token_ids.tolist()))
    elif ranks is not None:
        (folder / RANKS).write_text(json.dumps(ranks.tolist()))
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def load_draft(folder: Path, target: Target, check: bool = True) -> Draft:
    """Load a draft for `target`, on its device and in its dtype.

    Sizes must always agree; `check=False` skips comparing the target with the record. Raises DraftMismatch naming both
    sides, CorruptFile when a file is missing or broken.
    """
    config, tensors = _read(folder)
    if FUSION not in tensors:
        raise DraftMismatch(f"{folder} holds no draft: it has no {FUSION}. Name a draft's folder, not the target's")
    info = config.get("hass", {})
    _compare_sizes(folder, config, target)
    if check:
        _compare_origin(folder, info, target)
    architecture = DraftArchitecture.from_config_json(config, qk_norm=Q_NORM in tensors, fc_bias=FC_BIAS in tensors)
    own_embedding = tensors.pop(EMBEDDING, None)  # exports for some engines carry one
    embedding = target.embedding if own_embedding is None else own_embedding.to(target.device, target.dtype)
    model = DraftModel(architecture, embedding)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise DraftMismatch(f"{folder / WEIGHTS} does not fit its {CONFIG}: {error}") from error
    model.to(target.device, target.dtype).eval().requires_grad_(False)
    trimmed = draft_vocabulary(folder, target)
    ranks = None if trimmed is not None else _token_ids(folder / RANKS, target)
    return Draft(model, DraftHead.from_target(target.head, trimmed), info, ranks)


def draft_vocabulary(folder: Path, target: Target) -> Tensor | None:
    """Token ids [D] of a trimmed draft vocabulary, None for the full one. Raises DraftMismatch for unknown ids."""
    return _token_ids(folder / VOCABULARY, target)


def _token_ids(path: Path, target: Target) -> Tensor | None:
    if not path.exists():
        return None
    token_ids = torch.tensor(json.loads(path.read_text()), dtype=torch.long)
    rows = target.head.shape[0]
    if len(token_ids) == 0 or int(token_ids.min()) < 0 or int(token_ids.max()) >= rows:
        raise DraftMismatch(f"{path} names token ids outside the target's vocabulary of {rows}")
    return token_ids


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CorruptFile(f"{folder / name} is missing: a draft is a folder with {CONFIG} and {WEIGHTS}")
    try:
        return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise CorruptFile(f"the draft in {folder} is broken: {error}; train or export it again") from error


def _compare_sizes(folder: Path, config: dict[str, Any], target: Target) -> None:
    text = target.model.config.get_text_config()
    for name in ("hidden_size", "vocab_size"):
        if config.get(name) != getattr(text, name):
            raise DraftMismatch(
                f"the draft in {folder} has {name} {config.get(name)}, the target {target.name} has "
                f"{getattr(text, name)}; use the target it was trained for, or train a draft for this one"
            )


def _compare_origin(folder: Path, info: dict[str, Any], target: Target) -> None:
    if differing := target.differing(info):  # imported EAGLE drafts tell nothing
        raise DraftMismatch(
            f"the draft in {folder} was trained for {info.get('target', 'another target')}, which differs from the "
            f"target {target.name} in its {' and '.join(differing)}; train a draft for this target"
        )
