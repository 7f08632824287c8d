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

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel, Eagle3Model
from hass_core.training.batch import Conversation

ROWS_PER_BLOCK = 8192
MAX_ROWS = 100_000  # of a fit, or a few more
SCALE_ROWS = 4096
MAX_CONVERSATIONS = 5_000  # counts from so many rank the tokens well enough
COUNTED_TOGETHER = 1_000


class Answered(Protocol):
    """What is counted of a conversation: tokens [L], and which of them are answers [L]."""

    @property
    def token_ids(self) -> Tensor: ...
    @property
    def loss_mask(self) -> Tensor: ...


def start_least_squares(draft: DraftModel, conversations: Iterable[Conversation], ridge: float = 1e-4) -> None:
    """Fit `fc` on up to about `MAX_ROWS` supervised rows and silence attention and MLP. Changes `draft` in place.

    `ridge` is relative to the mean square of the inputs.
    """
    sums = _moments(_rows(conversation, draft.embedding) for conversation in conversations)
    if not sums:
        return
    squares, products = sums
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


def start_from_target(draft: Eagle3Model, head: DraftHead, conversations: Iterable[Conversation]) -> None:
    """Give the draft the target's rows `head` and their scale, from up to about `SCALE_ROWS` features. Changes `draft`
    in place."""
    squares, count = 0.0, 0
    for conversation in conversations:
        rows = conversation.features.float()
        squares, count = squares + float(rows.square().sum()), count + rows.numel()
        if count >= SCALE_ROWS * rows.shape[1]:
            break
    with torch.no_grad():
        draft.lm_head.weight.copy_(head.weight)
        draft.norm.weight.fill_((squares / count) ** 0.5 if count else 1.0)


@torch.no_grad()
def start_fusion(draft: Eagle3Model, conversations: Iterable[Conversation], ridge: float = 1e-4) -> None:
    """Fit `fc` on up to about `MAX_ROWS` answer tokens to the last hidden state. Changes `draft` in place.

    `ridge` is relative to each input's own mean square: some of a residual stream's numbers are far larger than others.
    """
    sums = _moments(_fused_rows(conversation, draft) for conversation in conversations)
    if sums:
        squares, products = sums
        own = squares.diagonal()
        damping = torch.diag(ridge * own.clamp(min=1e-6 * float(own.mean())))
        draft.fc.weight.copy_(torch.linalg.solve(squares + damping, products).T)


def _moments(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Σ x xᵀ [I, I] and Σ x yᵀ [I, O] in float64 over inputs x [R, I] and outputs y [R, O]; nothing without any."""
    sums: list[Tensor] = []
    rows = 0
    for x, y in _blocks(pairs):
        new = x.T @ x, x.T @ y
        sums = [s.add_(n) for s, n in zip(sums, new, strict=True)] if sums else [n.double() for n in new]
        rows += len(x)
        if rows >= MAX_ROWS:
            break
    return sums if rows else []


def _blocks(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs end to end, ROWS_PER_BLOCK rows and some at a time."""
    pending: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        pending.append(pair)
        if sum(len(x) for x, _ in pending) >= ROWS_PER_BLOCK:
            yield _joined(pending)
            pending = []
    if pending:
        yield _joined(pending)


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = zip(*pairs, strict=True)
    return torch.cat(x), torch.cat(y)


def _fused_rows(conversation: Conversation, draft: Eagle3Model) -> tuple[Tensor, Tensor]:
    """What `fc` takes [R, n·H] at the answer's tokens, and the last hidden states [R, H], in float64."""
    assert conversation.taps is not None
    answer, device = conversation.loss_mask.bool(), draft.embedding.device
    taps, last = (x[answer].to(device, torch.float32) for x in (conversation.taps, conversation.features))
    return draft.taken(taps).double(), last.double()


def _rows(conversation: Conversation, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [R, 2H] and outputs [R, H] of the rows supervised at the first step."""
    answer = conversation.loss_mask.bool()
    anchors = (answer[1:-1] & answer[2:]).nonzero()[:, 0]
    token_ids = conversation.token_ids.long().to(embedding.device)
    features = conversation.features.to(embedding.device, torch.float32)
    return torch.cat([embedding[token_ids[anchors + 1]].float(), features[anchors]], dim=-1), features[anchors + 1]


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
