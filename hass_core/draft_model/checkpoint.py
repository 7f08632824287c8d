"""A draft on disk: config.json and model.safetensors in EAGLE layout; draft_vocab.json when the vocabulary is trimmed,
else token_ranks.json, from which decoding may trim it.

The `hass` section of config.json names the target the draft was trained for; loading compares it.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from hass_core.draft_model.accounting import EMBEDDING, SharedWeights, StoredDraft, read_draft
from hass_core.draft_model.architecture import O_BIAS, QK_NORMS, QKV_BIASES
from hass_core.draft_model.family import Family
from hass_core.draft_model.files import CONFIG, RANKS, VOCABULARY, WEIGHTS
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.errors import DraftMismatch, HassError


class DraftedTarget(SharedWeights, Protocol):
    """What a draft needs to know of its target: see `Target`."""

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def record(self) -> dict[str, Any]:
        """What a draft keeps of the target it was trained for."""
        ...

    def differing(self, record: dict[str, Any]) -> list[str]:
        """In what the target differs from a record, in words."""
        ...


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


def draft_info(target: DraftedTarget, extra: dict[str, Any] | None = None) -> dict[str, Any]:
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


def load_draft(folder: Path, target: DraftedTarget, check: bool = True) -> Draft:
    """Load a draft for `target`, on its device and in its dtype.

    Sizes and tensors must always agree; `check=False` skips comparing the target with the record. Raises DraftMismatch
    naming both sides, CorruptFile when a file is missing or broken.
    """
    stored = read_draft(folder, target)
    if check and (difference := origin_difference(stored.info, target)):
        raise DraftMismatch(f"the draft in {folder} {difference}; train a draft for this target")
    model = draft_model(stored, target.embedding).to(target.device, target.dtype).eval().requires_grad_(False)
    ranks = stored.ranks if stored.vocabulary is None else None
    return Draft(model, DraftHead.from_target(target.head, stored.vocabulary), stored.info, ranks)


def draft_model(stored: StoredDraft, embedding: Tensor) -> DraftModel:
    """The model with a stored draft's weights, in float32; it shares the target's `embedding` [V, H] unless the draft
    has its own."""
    own = stored.embedding
    model = DraftModel(stored.architecture, embedding if own is None else own.to(embedding.device, embedding.dtype))
    model.load_state_dict(stored.weights)
    return model


def warm_start(folder: Path, target: SharedWeights, family: Family = "auto") -> StoredDraft:
    """The draft that a training continues from; it keeps its own architecture, rotary embedding and biases.

    Raises CorruptFile or DraftMismatch as `read_draft` does, and DraftMismatch where the draft has its own embedding
    (training shares the target's) or is not of the `family` asked for.
    """
    try:
        stored = read_draft(folder, target)
    except HassError as error:
        raise type(error)(f"draft.warm_start: {error}; draft.warm_start = none trains from the start") from error
    if stored.embedding is not None:
        raise DraftMismatch(
            f"draft.warm_start: the draft in {folder} has an {EMBEDDING} of its own, and training shares the target's; "
            "start from a draft without one (a folded fc.bias: from the draft before `hass import --fold-bias`)"
        )
    not_llama = {*QKV_BIASES, O_BIAS, *QK_NORMS} & stored.weights.keys()
    if family == "llama" and not_llama:
        raise DraftMismatch(
            f'draft.warm_start: the draft in {stored.folder} is not of draft.family = "llama": it has '
            f"{', '.join(sorted(not_llama))}; leave draft.family out, or train from the start"
        )
    return stored


def origin_difference(info: dict[str, Any], target: DraftedTarget) -> str | None:
    """In what the target differs from the one that a draft's record `info` names; imported EAGLE drafts name none."""
    differing = target.differing(info)
    if not differing:
        return None
    trained = info.get("target", "another target")
    return f"was trained for {trained}, which differs from the target {target.name} in its {' and '.join(differing)}"
