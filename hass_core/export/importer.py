"""Bring in an existing EAGLE, EAGLE-2 or HASS checkpoint, as a warm start or for evaluation.

The official trainers always make an fc.bias; vLLM has none. Folding it into the embedding is exact when the embedding
half of fc is invertible: with fc = [We | Wf], We·(e + x) + Wf·f = We·e + Wf·f + b for the x that solves We·x = b.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hass_core.draft_model.accounting import EMBEDDING, StoredDraft, read_draft
from hass_core.draft_model.architecture import FC_BIAS
from hass_core.draft_model.eagle3_files import offsets_of
from hass_core.draft_model.files import CONFIG, RANKS, VOCABULARY, WEIGHTS
from hass_core.draft_model.target import DraftedTarget
from hass_core.errors import BadInput, DraftMismatch
from hass_core.export.folders import IMPORTED, check_out, replacing

MAX_CONDITION = 1e6  # beyond this, fp32 loses more than half its digits in the solve
MAX_RELATIVE_ERROR = 1e-4


@dataclass(frozen=True)
class Folding:
    """How well a bias went into the embedding."""

    condition: float  # of the embedding half of fc
    relative_error: float  # of the fused output on random inputs, fp32


def import_draft(source: Path, target: DraftedTarget, out: Path) -> Path:
    """Convert a checkpoint folder (safetensors, shards or a .bin) to this project's layout; returns `out`.

    Every tensor arrives, but for the target's own embedding and head, which a draft shares. Raises CorruptFile when
    files are missing or broken, DraftMismatch naming tensors that are missing or have no place, or sizes that are not
    the target's; BadInput when `out` holds something else.
    """
    check_out(out, source)
    return _save(out, read_draft(source, target))


def fold_bias(folder: Path, target: DraftedTarget, out: Path) -> Folding:
    """Move fc.bias into an own copy of the target's embedding, for vLLM; writes `out`.

    Raises DraftMismatch with the condition number when that would not be exact, BadInput when there is no bias.
    """
    draft = read_draft(folder, target)
    if FC_BIAS not in draft.weights:
        raise BadInput(f"{folder} has no fc.bias: there is nothing to fold")
    before = (target.embedding if draft.embedding is None else draft.embedding).detach().float().cpu()
    weight, bias = draft.weights["fc.weight"].float(), draft.weights[FC_BIAS].float()
    half = weight[:, : bias.shape[0]].double()
    condition = float(torch.linalg.cond(half))
    shift = torch.linalg.lstsq(half, bias.double().unsqueeze(1)).solution.squeeze(1).float()
    error = _folding_error(weight, bias, shift, before)
    if not (condition <= MAX_CONDITION and error <= MAX_RELATIVE_ERROR):
        raise DraftMismatch(
            f"fc.bias of {folder} cannot be folded exactly: condition number {condition:.2e} "
            f"(limit {MAX_CONDITION:.0e}), relative error {error:.1e} (limit {MAX_RELATIVE_ERROR:.0e}); "
            "serve this draft with SGLang, which keeps the bias"
        )
    folded = replace(
        draft,
        architecture=draft.architecture.model_copy(update={"fc_bias": False}),
        weights={name: tensor for name, tensor in draft.weights.items() if name != FC_BIAS},
        embedding=(before + shift).contiguous(),
    )
    _save(out, folded)
    return Folding(condition, error)


def _folding_error(weight: Tensor, bias: Tensor, shift: Tensor, embedding: Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(embedding), (256,), generator=generator)
    features = torch.randn(256, weight.shape[0], generator=generator)
    before = torch.cat([embedding[rows], features], -1) @ weight.T + bias
    after = torch.cat([embedding[rows] + shift, features], -1) @ weight.T
    return float((after - before).norm() / before.norm())


def _save(out: Path, draft: StoredDraft) -> Path:
    """Write a stored draft in this project's layout, with the lists of tokens beside it."""
    section = {**draft.info, "target_model_type": draft.architecture.target_model_type, IMPORTED: True}
    tensors = dict(draft.weights)
    if draft.embedding is not None:
        tensors[EMBEDDING] = draft.embedding
        section["own_embedding"] = True
    config: dict[str, Any] = {
        **draft.architecture.to_config_json(),
        "bias": FC_BIAS in tensors,
        "torch_dtype": str(next(iter(draft.weights.values())).dtype).removeprefix("torch."),
        "hass": section,
    }
    if draft.architecture.own_head and draft.vocabulary is not None:
        tensors |= offsets_of(draft.vocabulary, draft.architecture.vocab_size)
    lists = {
        name: (draft.folder / name).read_bytes() for name in (VOCABULARY, RANKS) if (draft.folder / name).is_file()
    }
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(out) as partial:  # lists of tokens of a draft that was there before are not this one's
        save_file(contiguous, str(partial / WEIGHTS), {"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for name, content in lists.items():
            (partial / name).write_bytes(content)
    return out
