"""Features made while they are needed: the frozen target runs beside the draft, and only tokens and masks are stored.

For those who lack the disk. It costs a forward pass of the target for every pass over the data.
"""

from collections.abc import Sequence

import numpy as np

from hass_core.features.reader import Conversation, FeatureDataset
from hass_core.target_model.capture import batches_for, capture_features
from hass_core.target_model.known import KnownTarget
from hass_core.target_model.loader import Target


class LiveFeatures:
    """A dataset without features, completed by the target. Same order, same conversations, bfloat16 features."""

    def __init__(self, stored: FeatureDataset, target: Target, max_tokens_per_batch: int):
        self._stored, self._target, self._max_tokens = stored, target, max_tokens_per_batch

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each conversation [N]."""
        return self._stored.lengths

    @property
    def blocks(self) -> np.ndarray:
        """As the stored dataset's."""
        return self._stored.blocks

    @property
    def groups_in_memory(self) -> int:
        """As the stored dataset's."""
        return self._stored.groups_in_memory

    def warm(self, indices: Sequence[int]) -> None:
        """As the stored dataset's; features are made when they are asked for."""
        self._stored.warm(indices)

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> Conversation:
        return self.many([index])[0]

    def many(self, indices: Sequence[int]) -> list[Conversation]:
        """Several conversations, their features computed together. Raises NonFinite naming one of them."""
        found = self._stored.many(indices)
        for chosen in batches_for(self._target, [len(c.token_ids) for c in found], self._max_tokens):
            batch = [found[index] for index in chosen]
            token_ids, names = [c.token_ids.tolist() for c in batch], [c.id for c in batch]
            rows = capture_features(self._target, token_ids, names, self._stored.info.taps)
            for index, states in zip(chosen, rows, strict=True):
                one, hidden = found[index], self._stored.info.hidden_size
                found[index] = Conversation.of(one.id, one.token_ids, one.loss_mask, states, hidden)
        return found


def with_features(
    stored: FeatureDataset, target: KnownTarget, max_tokens_per_batch: int
) -> "FeatureDataset | LiveFeatures":
    """The dataset to train on: the stored features, or the target's where none are stored, which takes its layers."""
    if stored.holds_features:
        return stored
    assert isinstance(target, Target)  # whoever trains without the layers has looked at the encoding
    return LiveFeatures(stored, target, max_tokens_per_batch)
