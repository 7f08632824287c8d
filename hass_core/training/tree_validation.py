"""What decoding's trees would gain with the draft as it is: cycles replayed over held-out answers.

The target's features and tokens are on record, so the target is not needed. The trees are those of the section `tree`.
"""

import copy
from collections.abc import Iterable
from itertools import islice

import torch

from hass_core.config import TreeConfig
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.replay import Recording, last_answer, replay, tree_tau
from hass_core.decoding.tree import TreeShape
from hass_core.draft_model.checkpoint import Draft
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.training.batch import Conversation


def recorded_answers(conversations: Iterable[Conversation], head: DraftHead, limit: int) -> list[Recording]:
    """Up to `limit` last answers, on the head's device and in its type."""
    found = (last_answer(c.token_ids, c.loss_mask, c.features) for c in conversations)
    device, dtype = head.weight.device, head.weight.dtype
    return [
        Recording(a.token_ids.to(device), a.features.to(device, dtype), a.start)
        for a in islice((a for a in found if a is not None), limit)
    ]


@torch.no_grad()
def validate_tree(draft: DraftModel, head: DraftHead, answers: list[Recording], tree: TreeConfig) -> dict[str, float]:
    """`val/tree_tau`: tokens per cycle. The draft runs in the head's type, as it will when it decodes."""
    model = copy.deepcopy(draft, {id(draft.embedding): draft.embedding}).to(head.weight.dtype)
    drafter = Drafter(Draft(model, head, {}), TreeShape.of(tree, head.size))
    return {"val/tree_tau": tree_tau(replay(drafter, answers))}
