"""How well a draft guesses on held-out conversations: the chain acceptance, without decoding anything.

From every anchor the draft runs freely, feeding on its own features, along the text that the target wrote. Its j-th
guess is right when it is the target's own greedy choice at that place. A chain counts up to its first wrong guess:

    chain_j   share of anchors whose first j guesses are all right
    tau       1 + Σ_j chain_j, the tokens per verification of greedy chain drafting to that depth

On text sampled with a temperature the chain follows the sampled token where that differs from the greedy one.

And what decoding's trees would gain with it (`val/tree_tau`, tokens per cycle): cycles replayed over held-out answers,
whose features and tokens are on record, so the target is not needed.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hass_core.config import SamplingConfig, TreeConfig
from hass_core.decoding.drafter import CALIBRATION, Drafter
from hass_core.decoding.races import fitted_calibration
from hass_core.decoding.replay import Recording, last_answer, replay, tree_tau
from hass_core.decoding.tree import TreeShape
from hass_core.draft_model.checkpoint import Draft
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.training.alignment import Alignment
from hass_core.training.batch import Batch, Conversation, collate
from hass_core.training.losses import PARTS, Objective, distill
from hass_core.training.sharding import own_share, total

DEPTH = 5  # of the chains that tau sums, whatever the number of alignment steps
MAX_TOKENS = 65_536  # enough for an error of about 0.005 in tau
ROWS_PER_CHUNK = 512


@dataclass(frozen=True)
class HeldOut:
    """A validation batch with the target's greedy choices [P] at its target positions."""

    batch: Batch
    choices: Tensor


def held_out(
    conversations: Iterable[Conversation], head: Tensor, tokens_per_batch: int, align_steps: int
) -> list[HeldOut]:
    """Batches of up to MAX_TOKENS tokens in all, for the chains and `align_steps` of the loss; `head` [V, H] is the
    target's whole head."""
    groups: list[list[Conversation]] = [[]]
    tokens = 0
    for conversation in conversations:
        groups[-1].append(conversation)
        tokens += len(conversation.token_ids)
        if tokens >= MAX_TOKENS:
            break
        if sum(len(c.token_ids) for c in groups[-1]) >= tokens_per_batch:
            groups.append([])
    batches = [collate(group, max(DEPTH, align_steps)).to(head.device) for group in groups if group]
    return [HeldOut(batch, _choices(batch.features[batch.targets], head)) for batch in batches]


@torch.no_grad()
def validate(
    alignment: Alignment,
    head: DraftHead,
    held: Sequence[HeldOut],
    objective: Objective,
    dtype: torch.dtype,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """The record of one validation, keys as in metrics.py, divided among the processes of `accelerator`. The draft's
    weights are used as they are."""
    steps = len(objective.step_weights)
    runner = Alignment(alignment.draft, max(DEPTH, steps))
    counts = sum(h.batch.counts for h in held)
    right = torch.zeros_like(held[0].batch.counts)
    chains = torch.zeros_like(right)
    parts = torch.zeros(steps, len(PARTS), device=right.device)
    assert isinstance(counts, Tensor)
    for part in own_share(held, accelerator):
        batch = part.batch
        with torch.autocast(batch.features.device.type, dtype, enabled=dtype != torch.float32):
            outputs = runner(batch, batch.inputs.to(alignment.draft.dtype))
        hits = _hits(outputs, part, alignment.draft.head(head))
        right += hits.sum(1)
        chains += _chains(hits, batch)
        trained = replace(batch, target_anchors=batch.target_anchors[:steps], supervised=batch.supervised[:steps])
        read = [*outputs[:steps], *alignment.draft.own_head()]
        parts = parts + distill(read, trained, head, objective, counts[:steps])[0]
    right, chains, parts = (total(tensor, accelerator) for tensor in (right, chains, parts))
    accuracy, chain = (right / counts.clamp(min=1)).tolist(), (chains / counts[0].clamp(min=1)).tolist()
    return {
        "val/loss": float(objective.combine(parts)),
        "val/tau": 1 + sum(chain[:DEPTH]),
        **{f"val/accuracy_step_{j}": value for j, value in enumerate(accuracy, 1)},
        **{f"val/chain_{j}": value for j, value in enumerate(chain[:DEPTH], 1)},
    }


def _hits(outputs: list[Tensor], held: HeldOut, head: DraftHead) -> Tensor:
    """[steps, P]: the draft's greedy choice is the target's, at supervised rows."""
    batch = held.batch
    hits = []
    for output, anchors, supervised in zip(outputs, batch.target_anchors, batch.supervised, strict=True):
        guesses = [head.to_target_ids(head.logits(rows).argmax(-1)) for rows in output[anchors].split(ROWS_PER_CHUNK)]
        hits.append((torch.cat(guesses) == held.choices) & supervised if guesses else supervised)
    return torch.stack(hits)


def _chains(hits: Tensor, batch: Batch) -> Tensor:
    """[steps] anchors whose first j guesses are all right."""
    by_anchor = torch.zeros(len(hits), len(batch.anchors), dtype=torch.long, device=hits.device)
    for row, hit, anchors in zip(by_anchor, hits, batch.target_anchors, strict=True):
        row[anchors[hit]] = 1
    return by_anchor.cumprod(0).sum(1)


def _choices(features: Tensor, head: Tensor) -> Tensor:
    chunks = [(rows.to(head.dtype) @ head.T).argmax(-1) for rows in features.split(ROWS_PER_CHUNK)]
    return torch.cat(chunks) if chunks else torch.zeros(0, dtype=torch.long, device=head.device)


def recorded_answers(conversations: Iterable[Conversation], head: DraftHead, limit: int) -> list[Recording]:
    """Up to `limit` last answers, on the head's device and in its type."""
    found = (last_answer(c.token_ids, c.loss_mask, c.features, c.taps) for c in conversations)
    device, dtype = head.weight.device, head.weight.dtype
    return [
        Recording(
            a.token_ids.to(device),
            a.features.to(device, dtype),
            a.start,
            None if a.taps is None else a.taps.to(device, dtype),
        )
        for a in islice((a for a in found if a is not None), limit)
    ]


@torch.no_grad()
def validate_tree(
    draft: DraftModel,
    head: DraftHead,
    answers: Sequence[Recording],
    tree: TreeConfig,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """`val/tree_tau`: tokens per cycle, the answers divided among the processes of `accelerator`."""
    drafter = Drafter(as_decoded(draft, head, {}), TreeShape.of(tree, head.size))
    cycles = replay(drafter, own_share(answers, accelerator), head.weight)
    accepted = [count for answer in cycles for count in answer]
    counts = total(torch.tensor([sum(accepted), len(accepted)], device=head.weight.device), accelerator)
    return {"val/tree_tau": 1 + int(counts[0]) / max(1, int(counts[1]))}


def validate_sampling(
    draft: DraftModel, head: DraftHead, answers: list[Recording], tree: TreeConfig, target_head: Tensor
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """What a finished draft is worth where answers are sampled: its fitted calibration, and with it
    `tree_tau_sampled`, tokens per cycle at temperature 1; `target_head` [V, H]."""
    calibration = fitted_calibration(as_decoded(draft, head, {}), answers, target_head)
    info = {CALIBRATION: calibration} if calibration else {}
    drafter = Drafter(as_decoded(draft, head, info), TreeShape.of(tree, head.size))
    cycles = replay(drafter, answers, target_head, SamplingConfig(temperature=1.0))
    return calibration, {"tree_tau_sampled": tree_tau(cycles)}


def as_decoded(draft: DraftModel, head: DraftHead, info: dict[str, Any]) -> Draft:
    """The draft in the head's type, as it will be when it decodes; it shares the embedding."""
    model = copy.deepcopy(draft, {id(draft.embedding): draft.embedding}).to(head.weight.dtype)
    return Draft(model, model.head(head), info)
