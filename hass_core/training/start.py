"""What is taken from the features before training: a start better than random, and the draft's own vocabulary.

**The start** is the best linear prediction of the next feature.

Row t sees [embedding(x_{t+1}) ; f_t] and shall return f_{t+1}. The fusion layer's weight is fitted to that by ridge
regression in closed form, and the two projections that write into the residual stream, o_proj and down_proj, start at
zero: the untrained draft is exactly the fitted linear map, and training only adds to it.

(The fit is the same whichever way the error is measured: every output is its own regression, so weighting the outputs,
by the head for instance, has the same minimiser.)

An **eagle3** draft does not fuse embedding and feature, and what its layer returns is read through a norm by a head of
its own. That head starts as the target's, and the norm at the features' mean scale: what the layer adds to a feature is
then read as the target would. Where it fuses states inside the target, `fc` is fitted to make the target's last hidden
state of them, as far as a linear map can.

**The vocabulary** is the tokens that the target's answers use most. Drafting scores only these, which makes the head
several times cheaper; verification still uses all tokens, so the output does not change.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel, Eagle3Model
from hass_core.training.batch import Conversation

ROWS_PER_BLOCK = 8192
MAX_CONVERSATIONS = 5_000  # counts from so many rank the tokens well enough
COUNTED_TOGETHER = 1_000


class Answered(Protocol):
    """What is counted of a conversation: tokens [L], and which of them are answers [L]."""

    @property
    def token_ids(self) -> Tensor: ...
    @property
    def loss_mask(self) -> Tensor: ...


def start_least_squares(
    draft: DraftModel, conversations: Iterable[Conversation], max_rows: int = 100_000, ridge: float = 1e-4
) -> None:
    """Fit `fc` on up to `max_rows` supervised rows and silence attention and MLP. Changes `draft` in place.

    `ridge` is relative to the mean square of the inputs.
    """
    squares, products, rows = _moments(draft, conversations, max_rows)
    if rows == 0:
        return
    damping = ridge * squares.diagonal().mean() * torch.eye(len(squares), dtype=squares.dtype, device=squares.device)
    weight = torch.linalg.solve(squares + damping, products)
    with torch.no_grad():
        draft.fc.weight.copy_(weight.T)
        if draft.fc.bias is not None:
            draft.fc.bias.zero_()
        draft.layer.self_attn.o_proj.weight.zero_()
        if draft.layer.self_attn.o_proj.bias is not None:
            draft.layer.self_attn.o_proj.bias.zero_()
        draft.layer.mlp.down_proj.weight.zero_()


def start_from_target(
    draft: Eagle3Model, head: DraftHead, conversations: Iterable[Conversation], max_rows: int = 4096
) -> None:
    """Give the draft the target's rows `head` and their scale, from up to about `max_rows` features. Changes `draft` in
    place."""
    squares, count = 0.0, 0
    for conversation in conversations:
        rows = conversation.features.float()
        squares, count = squares + float(rows.square().sum()), count + rows.numel()
        if count >= max_rows * rows.shape[1]:
            break
    with torch.no_grad():
        draft.lm_head.weight.copy_(head.weight)
        draft.norm.weight.fill_((squares / count) ** 0.5 if count else 1.0)


@torch.no_grad()
def start_fusion(
    draft: Eagle3Model, conversations: Iterable[Conversation], max_rows: int = 100_000, ridge: float = 1e-4
) -> None:
    """Fit `fc` on up to about `max_rows` answer tokens to the last hidden state. Changes `draft` in place.

    `ridge` is relative to each input's own mean square: some of a residual stream's numbers are far larger than others.
    """
    hidden, width, device = draft.architecture.hidden_size, draft.fc.in_features, draft.embedding.device
    squares = torch.zeros(width, width, dtype=torch.float64, device=device)
    products = torch.zeros(width, hidden, dtype=torch.float64, device=device)
    rows, pending = 0, []
    for conversation in conversations:
        assert conversation.taps is not None
        answer = conversation.loss_mask.bool()
        taps, last = (x[answer].to(device, torch.float32) for x in (conversation.taps, conversation.features))
        pending.append((draft.taken(taps).double(), last.double()))
        if sum(len(x) for x, _ in pending) >= ROWS_PER_BLOCK:
            rows += _accumulate(squares, products, pending)
        if rows >= max_rows:
            break
    rows += _accumulate(squares, products, pending)
    if rows:
        own = squares.diagonal()
        damping = torch.diag(ridge * own.clamp(min=1e-6 * float(own.mean())))
        draft.fc.weight.copy_(torch.linalg.solve(squares + damping, products).T)


def _moments(draft: DraftModel, conversations: Iterable[Conversation], max_rows: int) -> tuple[Tensor, Tensor, int]:
    """Σ x xᵀ [2H, 2H], Σ x yᵀ [2H, H] in float64, and the number of rows."""
    hidden, device = draft.architecture.hidden_size, draft.embedding.device
    squares = torch.zeros(2 * hidden, 2 * hidden, dtype=torch.float64, device=device)
    products = torch.zeros(2 * hidden, hidden, dtype=torch.float64, device=device)
    rows, pending = 0, []
    for conversation in conversations:
        pending.append(_rows(conversation, draft.embedding))
        if sum(len(x) for x, _ in pending) >= ROWS_PER_BLOCK:
            rows += _accumulate(squares, products, pending)
        if rows >= max_rows:
            break
    rows += _accumulate(squares, products, pending)
    return squares, products, rows


def _rows(conversation: Conversation, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [R, 2H] and outputs [R, H] of the rows supervised at the first step."""
    answer = conversation.loss_mask.bool()
    anchors = (answer[1:-1] & answer[2:]).nonzero()[:, 0]
    token_ids = conversation.token_ids.long().to(embedding.device)
    features = conversation.features.to(embedding.device, torch.float32)
    return torch.cat([embedding[token_ids[anchors + 1]].float(), features[anchors]], dim=-1), features[anchors + 1]


def _accumulate(squares: Tensor, products: Tensor, pending: list[tuple[Tensor, Tensor]]) -> int:
    if not pending:
        return 0
    x, y = (torch.cat(parts) for parts in zip(*pending, strict=True))
    pending.clear()
    squares += x.T @ x
    products += x.T @ y
    return len(x)


def ranked_tokens(
    conversations: Iterable[Answered], vocab_size: int, always: tuple[int, ...] = (), before: Tensor | None = None
) -> Tensor:
    """All tokens [V], those `always` wanted (the end tokens) first, then by how often they occur in answers.

    A few answers hold a few tokens: those equally frequent stand as `before` ranks them, from more answers, then by
    their number.
    """
    counts = torch.zeros(vocab_size, dtype=torch.long)
    answers = (c.token_ids[c.loss_mask.bool()].long() for c in islice(conversations, MAX_CONVERSATIONS))
    while some := list(islice(answers, COUNTED_TOGETHER)):  # one by one, V sums each would cost far more than counting
        counts += torch.bincount(torch.cat(some), minlength=vocab_size)
    counts[list(always)] = counts.max() + 1
    order = torch.arange(vocab_size)
    if before is not None:
        order = torch.cat([before, order[~torch.isin(order, before)]])
    return order[counts[order].argsort(descending=True, stable=True)]
