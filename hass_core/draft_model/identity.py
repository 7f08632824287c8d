"""Which draft it is: a name for its content, whatever folder, file layout or record it comes in."""

import hashlib
import json

import torch
from torch import Tensor

from hass_core.draft_model.accounting import EMBEDDING, StoredDraft
from hass_core.draft_model.files import RANKS, VOCABULARY

DIGITS = 16


def draft_identity(draft: StoredDraft) -> str:
    """16 hex digits over all that decides what the draft computes: every weight by its exact values (the same numbers
    in another type count as the same), its architecture, and the lists of tokens it drafts.

    Not part of it: names, paths, the record of its training, how its file is divided, biases that are zero.
    """
    decisive = draft.architecture.model_dump(exclude={"bos_token_id", "eos_token_id", "target_model_type"})
    for name in ("taps", "fc_norm"):  # drafts that have none keep the name that they had before there were any
        if not decisive.get(name):
            decisive.pop(name, None)
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    tensors = dict(sorted(draft.weights.items()))
    if draft.embedding is not None:
        tensors[EMBEDDING] = draft.embedding
    tensors |= {name: ids for name, ids in ((VOCABULARY, draft.vocabulary), (RANKS, draft.ranks)) if ids is not None}
    for name, tensor in tensors.items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:DIGITS]


def _bytes(tensor: Tensor) -> memoryview:
    """Floating-point numbers count as float32: the shorter types are exact in it."""
    exact = tensor.detach().cpu().float() if tensor.is_floating_point() else tensor
    return exact.contiguous().reshape(-1).view(torch.uint8).numpy().data
