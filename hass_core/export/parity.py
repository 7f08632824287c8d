"""Whether two readings of a draft draw the same: the engine's, and this project's own model of the stored draft."""

from dataclasses import replace

import torch
from torch import Tensor

from hass_core.draft_model.accounting import StoredDraft
from hass_core.draft_model.checkpoint import DraftedTarget, draft_model
from hass_core.export.readers import Reading

ROWS, LONGEST = 24, 4096


def feature_difference(reading: Reading, source: StoredDraft, target: DraftedTarget) -> float:
    """The relative difference of features on random inputs, at positions near and far; NaN where a reading is.

    Both use weights in the type of the target, which the export is written in, and compute in float32.
    """
    token_ids, features, positions = _inputs(source, target)
    dtype = target.embedding.dtype
    rounded = replace(source, weights={name: tensor.to(dtype) for name, tensor in source.weights.items()})
    embedding = target.embedding.detach().cpu()
    with torch.inference_mode():
        model = draft_model(rounded, embedding).float().eval()
        ours = model(token_ids[None], features[None], positions[None])[0]
        theirs = reading.features(token_ids, features, positions)
    return float((theirs - ours).norm() / ours.norm())


def _inputs(source: StoredDraft, target: DraftedTarget) -> tuple[Tensor, Tensor, Tensor]:
    """Next tokens [L], features [L, H] and rising positions [L]."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(target.embedding.shape[0], (ROWS,), generator=generator)
    features = torch.randn(ROWS, source.architecture.hidden_size, generator=generator)
    farthest = min(LONGEST, source.architecture.max_position_embeddings) - 1
    near = torch.arange(ROWS // 2)
    far = torch.linspace(ROWS // 2, max(farthest, ROWS), ROWS - ROWS // 2).long()
    return token_ids, features, torch.cat([near, far])
