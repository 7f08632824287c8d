"""The draft's own vocabulary: the tokens that the target's answers use most.

Drafting scores only these, which makes the head several times cheaper; verification still uses all tokens, so the
output does not change. Counts come from the answers in the training features.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from hass_core.training.batch import Conversation

MAX_CONVERSATIONS = 20_000  # counts from so many rank the tokens well enough


def frequent_tokens(
    conversations: Iterable[Conversation], size: int, vocab_size: int, always: tuple[int, ...] = ()
) -> Tensor:
    """The `size` most frequent answer tokens in ascending order [D]; `always` (the end tokens) are among them."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for number, conversation in enumerate(conversations):
        if number == MAX_CONVERSATIONS:
            break
        counts += torch.bincount(conversation.token_ids[conversation.loss_mask.bool()].long(), minlength=vocab_size)
    counts[list(always)] = counts.max() + 1
    ranked = counts.argsort(descending=True, stable=True)
    return ranked[: min(size, vocab_size)].sort().values
