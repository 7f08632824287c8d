"""Whether two readings of a draft draw the same: the engine's, and this project's own model of the stored draft."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core.draft_model.accounting import StoredDraft
from hass_core.draft_model.checkpoint import draft_model
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.draft_model.target import DraftedTarget
from hass_core.export.eagle3_reader import Eagle3Reading
from hass_core.export.readers import Reading

ROWS, LONGEST = 24, 4096


def feature_difference(reading: Reading, source: StoredDraft, target: DraftedTarget) -> float:
    """The relative difference of features on random inputs, at positions near and far; NaN where a reading is.

    Both use weights in the type of the target, which the export is written in, and compute in float32.
    """
    token_ids, features, positions = _inputs(source, target)
    with torch.inference_mode():
        model = _rounded(source, target)
        ours = model(token_ids[None], features[None], positions[None])[0]
        theirs = reading.features(token_ids, features, positions)
    return float((theirs - ours).norm() / ours.norm())


def eagle3_difference(reading: Eagle3Reading, source: StoredDraft, target: DraftedTarget) -> float:
    """The same of what the second architecture hands on to its next row, and of its logits over all of the target's
    tokens, of which the larger counts; infinite where other tokens can be drafted."""
    token_ids, before, positions = _inputs(source, target)
    weight, eps = target.final_norm or (torch.ones(before.shape[1]), 0.0)
    after = F.rms_norm(before, before.shape[1:], weight.detach().cpu().float(), eps)
    states = _states_before(before, target.num_layers)
    with torch.inference_mode():
        model = _rounded(source, target)
        read = torch.cat([states[layer] for layer in model.taps], -1) if model.taps else after
        ours = model(token_ids[None], model.features_from(read)[None], positions[None])[0]
        head = model.head(DraftHead.from_target(target.head.detach().cpu().float(), source.vocabulary))
        drawn = torch.full((len(ours), reading.vocab_size), -torch.inf)
        drawn[:, head.to_target_ids(torch.arange(head.size))] = head.logits(model.read(ours))
        rows = token_ids, reading.given(states, after), positions
        theirs, logits = reading.features(*rows), reading.logits(*rows)
    if not torch.equal(drawn.isinf(), logits.isinf()):
        return torch.inf
    can = ~drawn.isinf()
    return max(_relative(theirs, ours), _relative(logits[can], drawn[can]))


def _states_before(last: Tensor, layers: int) -> Tensor:
    """[N + 1, L, H]: other random numbers after each layer, and `last` [L, H] after the last."""
    generator = torch.Generator().manual_seed(1)
    return torch.cat([torch.randn(layers, *last.shape, generator=generator), last[None]])


def _rounded(source: StoredDraft, target: DraftedTarget) -> DraftModel:
    """The source's model in float32, with the weights of the target's type."""
    dtype = target.embedding.dtype
    rounded = replace(source, weights={name: tensor.to(dtype) for name, tensor in source.weights.items()})
    return draft_model(rounded, target.embedding.detach().cpu()).float().eval()


def _relative(theirs: Tensor, ours: Tensor) -> float:
    difference = float((theirs - ours).norm() / ours.norm())
    return torch.inf if math.isnan(difference) else difference


def _inputs(source: StoredDraft, target: DraftedTarget) -> tuple[Tensor, Tensor, Tensor]:
    """Next tokens [L], features [L, H] and rising positions [L]."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(target.embedding.shape[0], (ROWS,), generator=generator)
    features = torch.randn(ROWS, source.architecture.hidden_size, generator=generator)
    farthest = min(LONGEST, source.architecture.max_position_embeddings) - 1
    near = torch.arange(ROWS // 2)
    far = torch.linspace(ROWS // 2, max(farthest, ROWS), ROWS - ROWS // 2).long()
    return token_ids, features, torch.cat([near, far])
