"""The same training step written out plainly: what the fast one is measured beside, and held against.

PyTorch's eager operations only; conversations padded to the longest; alignment in HASS's own frame (section 3.2), j
full score matrices at step j and one softmax over their sum; all logits at once, the target's and those of every step;
the loss an expression that autograd differentiates.

Shapes: C conversations, L tokens of the longest, H hidden, A heads, d head size, V vocabulary, n alignment steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.training.batch import Conversation
from hass_core.training.losses import Objective


@dataclass(frozen=True)
class PaddedBatch:
    """Conversations side by side."""

    token_ids: Tensor  # [C, L]
    answer: Tensor  # [C, L] bool, False on padding
    features: Tensor  # [C, L, H]

    def to(self, device: torch.device) -> "PaddedBatch":
        return PaddedBatch(self.token_ids.to(device), self.answer.to(device), self.features.to(device))

    def supervised(self, steps: int) -> Tensor:
        """[n, C, L]: whether row t, which predicts x_{t+2}, is supervised at step j = 1..n. Its chain's root
        x_{t-j+2}, x_{t+1} and x_{t+2} are answer tokens."""
        ahead = F.pad(self.answer, (steps, 2))  # x_t is in column t + n
        length = self.answer.shape[1]
        pairs = ahead[:, steps + 1 : steps + 1 + length] & ahead[:, steps + 2 : steps + 2 + length]
        roots = [ahead[:, steps + 2 - j : steps + 2 - j + length] for j in range(1, steps + 1)]
        rows = torch.arange(length, device=pairs.device)
        return torch.stack([pairs & root & (rows >= j - 1) for j, root in enumerate(roots, 1)])


def side_by_side(conversations: Sequence[Conversation]) -> PaddedBatch:
    """Pad the conversations to the longest."""
    return PaddedBatch(
        pad_sequence([c.token_ids for c in conversations], batch_first=True).long(),
        pad_sequence([c.loss_mask for c in conversations], batch_first=True).bool(),
        pad_sequence([c.features for c in conversations], batch_first=True),
    )


def dense_outputs(draft: DraftModel, batch: PaddedBatch, features: Tensor, steps: int) -> list[Tensor]:
    """For each step the estimates of the next feature at all rows, [C, L, H]; no gradient from step to step."""
    length = batch.token_ids.shape[1]
    tokens = F.pad(batch.token_ids[:, 1:], (0, 1))
    positions = torch.arange(length, device=features.device)[None]
    sources, outputs = [features], []
    for step in range(1, steps + 1):
        us = [draft.fuse(tokens, source) for source in sources]
        queries = draft.qkv(us[-1], positions)[0]
        own = [draft.qkv(u, positions)[1:] for u in us]
        outputs.append(draft.output(us[-1], _attended(draft, queries, own, step)))
        sources.append(torch.cat([features[:, :1], outputs[-1][:, :-1].to(features.dtype)], 1).detach())
    return outputs


def _attended(draft: DraftModel, queries: Tensor, own: Sequence[Sequence[Tensor]], step: int) -> Tensor:
    """[C, A, L, d]: one softmax over all sources' keys, a row's own hops seen on their diagonals."""
    architecture, length = draft.architecture, queries.shape[2]
    groups = architecture.num_attention_heads // architecture.num_key_value_heads
    row = torch.arange(length, device=queries.device)
    back = row[:, None] - row  # how far before row t column c lies
    seen = [back >= step - 1, *(back == step - 1 - source for source in range(1, step))]
    scores = queries.new_full((1, 1, length, length), -math.inf)
    for visible, (keys, _) in zip(seen, own, strict=True):
        own_scores = queries @ keys.repeat_interleave(groups, 1).mT / math.sqrt(architecture.head_dim)
        scores = torch.where(visible, own_scores, scores)
    if step > 1:  # rows before the first anchor's see nothing; they are not supervised
        scores = torch.where(row[:, None] < step - 1, torch.zeros_like(scores), scores)
    weights = scores.softmax(-1).to(queries.dtype)
    parts = zip(seen, own, strict=True)
    return sum((weights * visible) @ values.repeat_interleave(groups, 1) for visible, (_, values) in parts)  # pyright: ignore[reportReturnType]


def dense_loss(outputs: Sequence[Tensor], batch: PaddedBatch, head: DraftHead, objective: Objective) -> Tensor:
    """The loss of a whole optimizer step. Every distribution is there in full; no draft vocabulary is trimmed."""
    wanted = F.pad(batch.features[:, 1:], (0, 0, 0, 1))
    q = head.logits(wanted).softmax(-1, dtype=torch.float32)
    top, best = q.topk(objective.k)
    supervised = batch.supervised(len(outputs))
    losses = []
    for output, mask, weight in zip(outputs, supervised, objective.step_weights, strict=True):
        log_p = F.linear(output.to(head.weight.dtype), head.weight).log_softmax(-1, dtype=torch.float32)
        rows = objective.regression * F.smooth_l1_loss(output.float(), wanted.float(), reduction="none").mean(-1)
        rows = rows - objective.soft_ce * (q * log_p).sum(-1) - objective.top_k * (top * log_p.gather(-1, best)).sum(-1)
        losses.append(weight * (rows * mask).sum() / mask.sum().clamp(min=1))
    return torch.stack(losses).sum()
