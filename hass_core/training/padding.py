"""Batches of few shapes: what a captured step needs, whose graph replays one shape only.

Rows, anchors and targets are rounded up. The rows added are conversations of their own, whose anchors nobody
supervises, so loss and gradient stay what they were.
"""

from dataclasses import replace

import torch
from torch import Tensor

from hass_core.config import TrainingConfig
from hass_core.training.batch import Batch, documents_of

FILLER_TOKENS = 128  # of an added conversation: short, so that attending within it costs next to nothing
SHAPE_STEPS = 16


def shape_step(config: TrainingConfig) -> int:
    """What to round up to: a sixteenth of a batch's tokens gives a few shapes and costs some 3 % of a step."""
    return max(16, config.packs_per_batch * config.tokens_per_pack // SHAPE_STEPS)


def padded(batch: Batch, step: int) -> Batch:
    """The batch with its numbers of rows, anchors and targets rounded up to multiples of `step`, and those of
    conversations and the longest one's tokens to powers of two."""
    new_anchors = -len(batch.anchors) % step
    new_rows = new_anchors + -(batch.rows + new_anchors) % step
    new_targets = -len(batch.targets) % step
    rows = batch.rows + new_rows
    place = torch.arange(new_rows)
    position_ids = torch.cat([batch.position_ids, place % FILLER_TOKENS])
    anchors = torch.cat([batch.anchors, torch.arange(rows - new_anchors, rows)])
    return replace(
        batch,
        token_ids=_longer(batch.token_ids, new_rows),
        features=_longer(batch.features, new_rows),
        position_ids=position_ids,
        documents=documents_of(_starts(batch, rows, step), position_ids, anchors, round_up=True),
        anchors=anchors,
        targets=_longer(batch.targets, new_targets),
        target_anchors=_longer(batch.target_anchors.T, new_targets).T.contiguous(),
        supervised=_longer(batch.supervised.T, new_targets).T.contiguous(),
    )


def _starts(batch: Batch, rows: int, step: int) -> Tensor:
    """First rows of the conversations and the added ones, some of them empty, then the number of rows."""
    own, added = batch.documents.starts[:-1].long(), torch.arange(batch.rows, rows, FILLER_TOKENS)
    most = len(own) + 2 * step // FILLER_TOKENS + 1  # conversations there can be, whatever was rounded up
    empty = 2 ** (most - 1).bit_length() - len(own) - len(added)
    return torch.cat([own, added, torch.full((empty + 1,), rows)])


def _longer(x: Tensor, count: int) -> Tensor:
    """`count` more rows of zeros."""
    return torch.cat([x, x.new_zeros(count, *x.shape[1:])]) if count else x
