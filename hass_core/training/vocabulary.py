"""The draft's own vocabulary: the tokens that the target's answers use most.

Drafting scores only these, which makes the head several times cheaper; verification still uses all tokens, so the
output does not change. Counts come from the answers in the training features.
"""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from hass_core.training.batch import Conversation

MAX_CONVERSATIONS = 5_000  # counts from so many rank the tokens well enough


def frequent_tokens(
    conversations: Iterable[Conversation], size: int, vocab_size: int, always: tuple[int, ...] = ()
) -> Tensor:
    """The `size` most frequent answer tokens in ascending order [D]; `always` (the end tokens) are among them."""
    return ranked_tokens(conversations, vocab_size, always)[:size].sort().values


def ranked_tokens(conversations: Iterable[Conversation], vocab_size: int, always: tuple[int, ...] = ()) -> Tensor:
    """All tokens [V], those `always` wanted first, then by how often they occur in answers."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for conversation in islice(conversations, MAX_CONVERSATIONS):
        counts += torch.bincount(conversation.token_ids[conversation.loss_mask.bool()].long(), minlength=vocab_size)
    counts[list(always)] = counts.max() + 1
    return counts.argsort(descending=True, stable=True)
