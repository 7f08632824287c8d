"""A draft on disk: config.json and model.safetensors in EAGLE layout; draft_vocab.json when the vocabulary is trimmed,
else token_ranks.json, from which decoding may trim it.

The `hass` section of config.json names the target the draft was trained for; loading compares it.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hass_core.config import TreeConfig
from hass_core.draft_config import DraftConfig
from hass_core.draft_model.accounting import EMBEDDING, StoredDraft, read_draft
from hass_core.draft_model.architecture import O_BIAS, QK_NORMS, QKV_BIASES
from hass_core.draft_model.eagle3 import Eagle3Architecture
from hass_core.draft_model.eagle3_files import offsets_of
from hass_core.draft_model.files import CONFIG, RANKS, VOCABULARY, WEIGHTS
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel, build_draft
from hass_core.draft_model.target import DraftedTarget
from hass_core.errors import DraftMismatch, HassError


@dataclass(frozen=True)
class Draft:
    """A draft ready to decode with: model and head on the target's device, `info` the config's `hass` section, `ranks`
    the tokens that the target's answers use most, best first, where the draft knows them; `eight_bits`: decode with
    its weights rounded to fp8; `prompt_tokens`: read no more of a prompt than so many tokens at its end."""

    model: DraftModel
    head: DraftHead
    info: dict[str, Any]
    ranks: Tensor | None = None
    eight_bits: bool = False
    prompt_tokens: int | None = None

    def set_by(self, tree: TreeConfig) -> "Draft":
        """As a tree's settings want it to decode, but for their choice of tokens (`narrowed`)."""
        return replace(self, eight_bits=tree.eight_bits, prompt_tokens=tree.prompt_tokens)

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
) -> list[str]:
    """Write the draft into `folder` and return the names of its files; `extra` (see `draft_info`) becomes the `hass`
    section of config.json. `head` is the one over the tokens that are drafted."""
    folder.mkdir(parents=True, exist_ok=True)
    architecture, token_ids = draft.architecture, head.token_ids
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in draft.state_dict().items()}
    section = {"target_model_type": architecture.target_model_type, "draft_vocab_size": head.size, **extra}
    dtype = str(draft.dtype).removeprefix("torch.")
    lists: dict[str, Tensor] = {}
    if token_ids is None:
        lists = {} if ranks is None else {RANKS: ranks}
    elif architecture.own_head:
        tensors |= offsets_of(token_ids, architecture.vocab_size)
    else:
        lists = {VOCABULARY: token_ids}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for name, ids in lists.items():
        (folder / name).write_text(json.dumps(ids.tolist()))
    config = {**architecture.to_config_json(), "torch_dtype": dtype, "hass": section}
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    return [CONFIG, WEIGHTS, *lists]


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
    return Draft(model, model.head(DraftHead.from_target(target.head, stored.vocabulary)), stored.info, ranks)


def draft_model(stored: StoredDraft, embedding: Tensor) -> DraftModel:
    """The model with a stored draft's weights, in float32; it shares the target's `embedding` [V, H] unless the draft
    has its own."""
    own = stored.embedding
    model = build_draft(stored.architecture, embedding if own is None else own.to(embedding.device, embedding.dtype))
    model.load_state_dict(stored.weights)
    return model


def warm_start(folder: Path, target: DraftedTarget, wanted: DraftConfig | None = None) -> StoredDraft:
    """The draft that a training continues from; it keeps its own architecture, rotary embedding and biases.

    Raises CorruptFile or DraftMismatch as `read_draft` does, and DraftMismatch where the draft has its own embedding
    (training shares the target's) or is another than the `wanted` settings ask for.
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
    if wanted:
        _refuse_other_than(wanted, stored, target.num_layers)
    return stored


def _refuse_other_than(wanted: DraftConfig, stored: StoredDraft, layers: int) -> None:
    _refuse_other_architecture(stored, wanted, layers)
    not_llama = {*QKV_BIASES, O_BIAS, *QK_NORMS} & stored.weights.keys()
    if wanted.family == "llama" and not_llama:
        raise DraftMismatch(
            f'draft.warm_start: the draft in {stored.folder} is not of draft.family = "llama": it has '
            f"{', '.join(sorted(not_llama))}; leave draft.family out, or train from the start"
        )


def _refuse_other_architecture(stored: StoredDraft, wanted: DraftConfig, layers: int) -> None:
    found = stored.architecture
    kind = "eagle3" if isinstance(found, Eagle3Architecture) else "eagle"
    if kind != wanted.architecture:
        raise DraftMismatch(
            f'draft.warm_start: the draft in {stored.folder} is of draft.architecture = "{kind}", the settings say '
            f'"{wanted.architecture}"; say the same, or train from the start'
        )
    if not isinstance(found, Eagle3Architecture):
        return
    if wanted.vocab_size not in (None, found.draft_vocab_size):
        raise DraftMismatch(
            f"draft.warm_start: the draft in {stored.folder} drafts {found.draft_vocab_size} tokens by a head of its "
            f"own, draft.vocab_size is {wanted.vocab_size}; leave it out, or train from the start"
        )
    for name in ("norm_output", "fc_norm"):
        if getattr(wanted, name) and not getattr(found, name):
            raise DraftMismatch(
                f"draft.warm_start: the draft in {stored.folder} was trained without draft.{name}; leave it out, or "
                "train from the start"
            )
    if wanted.tapped(layers) != found.taps:
        raise DraftMismatch(
            f"draft.warm_start: the draft in {stored.folder} reads the target {_where(found.taps)}, the settings say "
            f"{_where(wanted.tapped(layers))}; set draft.taps = {_setting(found.taps)}, or train from the start"
        )


def _where(taps: tuple[int, ...]) -> str:
    return f"after layers {', '.join(map(str, taps))}" if taps else "at its last hidden state"


def _setting(taps: tuple[int, ...]) -> str:
    return str(list(taps)) if taps else '"last"'


def origin_difference(info: dict[str, Any], target: DraftedTarget) -> str | None:
    """In what the target differs from the one that a draft's record `info` names; imported EAGLE drafts name none."""
    differing = target.differing(info)
    if not differing:
        return None
    trained = info.get("target", "another target")
    return f"was trained for {trained}, which differs from the target {target.name} in its {' and '.join(differing)}"
