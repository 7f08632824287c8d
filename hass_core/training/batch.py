"""One micro-batch: whole conversations laid end to end, and the row numbers that training needs.

There is no batch dimension: attention is told where each conversation begins (cu_seqlens). Row r holds feature f_r and
sees token x_{r+1}. Target position p holds feature f_p, which the head turns into the distribution of x_{p+1};
alignment step j predicts it from anchor r = p - j (the last verified feature of a drafted chain).

Nothing is padded for the sake of the computation. A CUDA graph, though, replays one shape only: for it `rounded_up`
adds conversations whose anchors nobody supervises, so loss and gradient stay what they were.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

FILLER_TOKENS = 128  # of an added conversation: short, so that attending within it costs next to nothing
SHAPES_PER_BATCH = 16


class Conversation(Protocol):
    """What the features reader hands out. L tokens, H hidden size."""

    @property
    def id(self) -> str: ...
    @property
    def token_ids(self) -> Tensor: ...  # [L]
    @property
    def loss_mask(self) -> Tensor: ...  # [L] bool, True on the assistant's answers
    @property
    def features(self) -> Tensor: ...  # [L, H]
    @property
    def taps(self) -> Tensor | None: ...  # [L, n·H] the states that the draft fuses, where it does


@dataclass(frozen=True)
class Documents:
    """Where conversations lie: C conversations, N rows, Q queries. A conversation's queries are its last rows.

    Names are those of flash attention for sequences of different lengths.
    """

    cu_seqlens_k: Tensor  # [C + 1] int32, first row of each conversation, then N
    cu_seqlens_q: Tensor  # [C + 1] int32, first query of each conversation, then Q
    max_seqlen_k: int  # rows of the longest conversation
    max_seqlen_q: int  # most queries of a conversation

    def slices(self) -> list[tuple[slice, slice]]:
        """Rows and queries of each conversation that has queries."""
        rows, queries = self.cu_seqlens_k.tolist(), self.cu_seqlens_q.tolist()
        bounds = zip(rows, rows[1:], queries, queries[1:], strict=False)
        return [(slice(a, b), slice(c, d)) for a, b, c, d in bounds if d > c]


@dataclass(frozen=True)
class Batch:
    """C conversations with N rows, Q anchors, P target positions, n alignment steps."""

    ids: tuple[str, ...]
    token_ids: Tensor  # [N]
    features: Tensor  # [N, H]
    position_ids: Tensor  # [N] index within the conversation
    documents: Documents
    anchors: Tensor  # [Q] rows that draft: from each conversation's first supervised one to its end
    targets: Tensor  # [P] target positions, as rows
    target_anchors: Tensor  # [n, P] the anchor (index into Q) that predicts each target at each step
    supervised: Tensor  # [n, P] bool, False where that anchor may not be supervised
    counts: Tensor  # [n] supervised rows of each step
    num_tokens: int  # of its conversations; there may be more rows, see `rounded_up`
    pack_rows: tuple[int, ...]  # rows of each pack, in order
    first_pack: int = 0  # the first one's number within the optimizer step
    taps: Tensor | None = None  # [N, n·H] states inside the target, which the draft is given in place of the features
    noisy: Tensor | None = None  # [N, H or n·H] what the draft is given instead, with noise

    @property
    def rows(self) -> int:
        return len(self.token_ids)

    @property
    def inputs(self) -> Tensor:
        """[N, H] features that the draft is given, or the states [N, n·H] that it fuses; what it is to predict stays
        without noise."""
        given = self.features if self.taps is None else self.taps
        return given if self.noisy is None else self.noisy

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; from pinned memory the copies run in the background."""
        return _moved(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory."""
        return _moved(self, lambda tensor: tensor.pin_memory())


def collate(conversations: Sequence[Conversation], align_steps: int) -> Batch:
    """Lay conversations end to end and find the supervised rows.

    Anchor r is supervised at step j when x_{r+1} (the chain's root), x_{r+j} and x_{r+j+1} are all answer tokens.
    """
    lengths = torch.tensor([len(c.token_ids) for c in conversations])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    answer = torch.cat([c.loss_mask for c in conversations]).bool()
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    rows = torch.arange(len(answer))
    targets, supervised = _supervision(answer, document, rows, align_steps)

    target_anchors = (targets - torch.arange(1, align_steps + 1)[:, None]).clamp(min=0)
    drafts = rows >= _first_anchors(target_anchors[supervised], document, starts)[document]
    anchors = rows[drafts]
    query_of_row = drafts.cumsum(0) - 1
    position_ids = rows - starts[document]
    return Batch(
        ids=tuple(c.id for c in conversations),
        token_ids=torch.cat([c.token_ids for c in conversations]).long(),
        features=torch.cat([c.features for c in conversations]),
        position_ids=position_ids,
        documents=_documents(starts, anchors),
        anchors=anchors,
        targets=targets,
        target_anchors=query_of_row[target_anchors].where(supervised, 0),
        supervised=supervised,
        counts=torch.from_numpy(supervised.numpy().sum(1)),
        num_tokens=len(answer),
        pack_rows=(len(answer),),
        taps=_laid_out([c.taps for c in conversations]),
    )


def _laid_out(parts: Sequence[Tensor | None]) -> Tensor | None:
    if all(part is None for part in parts):
        return None
    return torch.cat(cast(list[Tensor], parts))  # one without would shift all rows after it: cat refuses it


def add_noise(batch: Batch, half_width: float, seed: int, step: int, dtype: torch.dtype) -> Batch:
    """The batch with uniform noise on the draft's inputs, in `dtype`. A pack's noise depends on the seed, the
    optimizer step and its number within that, so it is the same however the step is divided."""
    noise = torch.zeros(batch.inputs.shape, device=batch.features.device)
    generator = torch.Generator(noise.device)
    first = 0
    for number, rows in enumerate(batch.pack_rows, batch.first_pack):
        generator.manual_seed(hash((seed, step, number)) % 2**63)
        noise[first : first + rows].uniform_(-half_width, half_width, generator=generator)
        first += rows
    return replace(batch, noisy=(batch.inputs + noise).to(dtype))


def _supervision(answer: Tensor, document: Tensor, rows: Tensor, align_steps: int) -> tuple[Tensor, Tensor]:
    """Target positions [P] and, for each step, whether their anchor is supervised [n, P]."""
    successor = (rows + 1).clamp(max=len(rows) - 1)
    follows = (successor > rows) & (document[successor] == document)
    answered = answer & answer[successor] & follows  # x_p and x_{p+1} are answer tokens
    supervised = []
    for step in range(1, align_steps + 1):
        anchor, root = (rows - step).clamp(min=0), (rows - step + 1).clamp(min=0)
        same = (rows >= step) & (document[anchor] == document)
        supervised.append(answered & same & answer[root])
    chosen = torch.stack(supervised).any(0)
    return rows[chosen], torch.stack(supervised)[:, chosen]


def _first_anchors(anchors: Tensor, document: Tensor, starts: Tensor) -> Tensor:
    """[C] first row that drafts in each conversation; its end where none does."""
    first = starts[1:].clone()
    return first.scatter_reduce(0, document[anchors], anchors, "amin") if len(anchors) else first


def _documents(starts: Tensor, anchors: Tensor, round_up: bool = False) -> Documents:
    """What lies where, from first rows [C + 1] and anchors [Q]; with `round_up` the longest conversation counts as if
    its tokens were a power of two."""
    lengths = starts.diff()
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    longest = int(lengths.max())
    if round_up:
        longest = 2 ** (longest - 1).bit_length()
    queries = torch.bincount(document[anchors], minlength=len(lengths))
    return Documents(
        cu_seqlens_k=starts.int(),
        cu_seqlens_q=torch.cat([torch.zeros(1, dtype=torch.long), queries.cumsum(0)]).int(),
        max_seqlen_k=longest,
        max_seqlen_q=longest if round_up else int(queries.max()),
    )


def rounded_up(batch: Batch, tokens_per_batch: int) -> Batch:
    """The batch in one of a few shapes; `tokens_per_batch` is about what a micro-batch has. A sixteenth of that as the
    unit costs some 3 % of a step."""
    return _rounded_to(batch, max(16, tokens_per_batch // SHAPES_PER_BATCH))


def _rounded_to(batch: Batch, step: int) -> Batch:
    """The batch with its numbers of rows, anchors and targets rounded up to multiples of `step`, and those of
    conversations and the longest one's tokens to powers of two."""
    new_anchors = -len(batch.anchors) % step
    new_rows = new_anchors + -(batch.rows + new_anchors) % step
    new_targets = -len(batch.targets) % step
    rows = batch.rows + new_rows
    added = torch.arange(new_rows)
    position_ids = torch.cat([batch.position_ids, added % FILLER_TOKENS])
    anchors = torch.cat([batch.anchors, torch.arange(rows - new_anchors, rows)])
    return replace(
        batch,
        token_ids=_longer(batch.token_ids, new_rows),
        features=_longer(batch.features, new_rows),
        taps=None if batch.taps is None else _longer(batch.taps, new_rows),
        position_ids=position_ids,
        documents=_documents(_starts(batch, rows, step), anchors, round_up=True),
        anchors=anchors,
        targets=_longer(batch.targets, new_targets),
        target_anchors=_longer(batch.target_anchors.T, new_targets).T.contiguous(),
        supervised=_longer(batch.supervised.T, new_targets).T.contiguous(),
    )


def _starts(batch: Batch, rows: int, step: int) -> Tensor:
    """First rows of the conversations and the added ones, some of them empty, then the number of rows."""
    own, added = batch.documents.cu_seqlens_k[:-1].long(), torch.arange(batch.rows, rows, FILLER_TOKENS)
    most = len(own) + 2 * step // FILLER_TOKENS + 1  # conversations there can be, whatever was rounded up
    empty = 2 ** (most - 1).bit_length() - len(own) - len(added)
    return torch.cat([own, added, torch.full((empty + 1,), rows)])


def _longer(x: Tensor, count: int) -> Tensor:
    """`count` more rows of zeros."""
    return torch.cat([x, x.new_zeros(count, *x.shape[1:])]) if count else x


def _moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    changed: dict[str, Any] = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, Tensor):
            changed[field.name] = move(part)
        elif isinstance(part, Documents):
            changed[field.name] = _moved(part, move)
        else:
            changed[field.name] = part
    return type(value)(**changed)
