"""The objective of one alignment step, its value and its gradient, a chunk of tokens at a time.

With q the target's distribution at temperature 1, log p the draft's, K the target's top-K set (HASS section 3.1):

    regression   mean over H of SmoothL1(f̂ - f)
    soft CE      -Σ_v q(v) log p(v)
    Top-K        -Σ_{v in K} q(v) log p(v)          neither q nor p renormalised on K

and, where their weights ask for it, terms for decoding that samples (sampling_losses.py);
each averaged over the supervised tokens of the whole optimizer step, on all devices and micro-batches. The n steps'
losses are summed.

A chunk needs no graph: with S = Σ_{v in K} q(v) the gradient by the draft's logits is

    soft CE      p - q                 Top-K      S·p - q·1_K

and times the head's weight it is the gradient of what the head reads of the draft. So [tokens × vocabulary] never
exists for more than one chunk, and the target's logits are computed once for all n steps. The head is the target's,
frozen; a draft with a head of its own (eagle3) trains that, and its gradient is the sum of the chunks' products.

With a trimmed draft vocabulary q is the target's distribution restricted to it and renormalised. Where the answer's own
next token is outside, that restriction says little, and no draft can be right: such rows keep the regression only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core import kernels
from hass_core.config import TrainingConfig
from hass_core.draft_model.head import DraftHead
from hass_core.training.batch import Batch
from hass_core.training.sampling_losses import sampling_terms

PARTS = ("regression", "soft_ce", "top_k", "sampling", "accuracy")  # `sampling` with its weights, the others without
LOGITS_PER_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 30}
SAMPLING_COPIES = 8  # what sampling_losses.py holds beside the logits, about


@dataclass(frozen=True)
class Objective:
    """Weights and switches of the terms. `step_weights` has one weight for each alignment step."""

    regression: float = 1.0
    soft_ce: float = 0.1
    top_k: float = 1.0
    k: int = 10
    acceptance: float = 0.0
    hybrid: float = 0.0
    agreement: float = 0.0
    candidates: int = 1
    step_weights: tuple[float, ...] = (1.0, 1.0, 1.0)

    @classmethod
    def from_config(cls, config: TrainingConfig) -> "Objective":
        return cls(
            regression=config.regression_weight,
            soft_ce=config.soft_ce_weight,
            top_k=config.top_k_weight,
            k=config.top_k,
            acceptance=config.acceptance_weight,
            hybrid=config.hybrid_weight,
            agreement=config.agreement_weight,
            candidates=config.agreement_candidates,
            step_weights=config.step_weights or (1.0,) * config.align_steps,
        )

    @property
    def samples(self) -> bool:
        """Whether there are terms of sampling_losses.py."""
        return bool(self.acceptance or self.hybrid or self.agreement)

    def combine(self, parts: Tensor) -> Tensor:
        """The loss from its parts [n, 5]."""
        weights = parts.new_tensor([self.regression, self.soft_ce, self.top_k, 1.0, 0.0])
        return (parts @ weights) @ parts.new_tensor(self.step_weights)


def distill(
    outputs: list[Tensor], batch: Batch, head: DraftHead, objective: Objective, counts: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Parts [n, 5] (see PARTS) of this micro-batch's share of the mean, and the loss's gradient for each output.

    `outputs` are n estimates [Q, H], and after them the weight [D, H] that reads them where that is not `head`, the
    target's over the same tokens; `counts` [n] the supervised tokens of the whole optimizer step. Summed over all
    micro-batches and devices the parts are means over tokens, and so is the gradient. A distribution term of weight 0
    is not computed, and reported as 0.
    """
    device, steps = outputs[0].device, len(objective.step_weights)
    estimates = [output.detach() for output in outputs[:steps]]
    own = [weight.detach().to(head.weight.dtype) for weight in outputs[steps:]]
    reading = head.with_weight(own[0]) if own else head
    by_head = [torch.zeros_like(weight, dtype=_precise(weight)) for weight in outputs[steps:]]
    share = batch.supervised / counts.clamp(min=1)[:, None]  # [n, P]
    # a tensor made from Python's numbers would be copied from the host, which a CUDA graph cannot
    weights = torch.stack([weight * own for weight, own in zip(objective.step_weights, share, strict=True)])
    informative = head.contains(batch.token_ids[batch.targets + 1])
    parts = torch.zeros(steps, len(PARTS), device=device)
    gradients = [torch.zeros_like(output) for output in estimates]
    rows_per_chunk = max(16, LOGITS_PER_CHUNK[device.type] // (head.size * (steps + 1)))
    if objective.samples:
        rows_per_chunk = max(16, rows_per_chunk // SAMPLING_COPIES)
    for first in range(0, len(batch.targets), rows_per_chunk):
        rows = slice(first, first + rows_per_chunk)
        anchors, features = batch.target_anchors[:, rows], batch.features[batch.targets[rows]]
        chosen = torch.stack([output[own] for output, own in zip(estimates, anchors, strict=True)])
        chunk_parts, by_estimate, by_logit = _chunk(chosen, features, informative[rows], head, reading, objective)
        parts += (chunk_parts * share[:, rows, None]).sum(1)
        _add_rows(gradients, anchors, (by_estimate * weights[:, rows, None]).to(chosen.dtype))
        for total in by_head:
            read = chosen * (weights[:, rows] * informative[rows])[..., None]
            total += by_logit.flatten(0, 1).mT @ read.to(by_logit.dtype).flatten(0, 1)
        del chosen, by_estimate, by_logit  # they would lie beside the next chunk's logits
    return parts, [*gradients, *by_head]


def _chunk(
    estimates: Tensor, features: Tensor, informative: Tensor, head: DraftHead, reading: DraftHead, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Parts [n, R, 5], gradients by one chunk of estimates [n, R, H] and by their logits [n, R, D]; rows whose next
    token is not in the draft vocabulary are not `informative` [R], and count by their estimates only."""
    teacher, logits = head.logits(features), reading.logits(estimates)
    sampling, by_sampling = _sampling(teacher, logits, objective)
    total, top, right, by_logit = _terms(teacher, logits, objective)
    by_logit = by_logit if by_sampling is None else by_logit + by_sampling
    soft = (total - objective.top_k * top) / objective.soft_ce if objective.soft_ce else torch.zeros_like(total)
    known = informative.to(total.dtype)
    error = estimates.to(total.dtype) - features.to(total.dtype)
    regression = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none").mean(-1)
    by_feature = (by_logit @ reading.weight).to(error.dtype) * known[:, None]
    gradient = by_feature + error.clamp(-1, 1) * (objective.regression / error.shape[-1])
    parts = torch.stack([regression, *(part * known for part in (soft, top, sampling, right))], dim=-1)
    return parts, gradient, by_logit


def _add_rows(gradients: list[Tensor], anchors: Tensor, added: Tensor) -> None:
    """Add [n, R, H] to the gradients [Q, H] of each step at `anchors` [n, R]."""
    for gradient, own, rows in zip(gradients, anchors, added, strict=True):
        gradient.index_add_(0, own, rows)


def _sampling(teacher: Tensor, logits: Tensor, objective: Objective) -> tuple[Tensor, Tensor | None]:
    """The terms for decoding that samples [n, R] and their gradient [n, R, D], where there are any."""
    if not objective.samples:
        return logits.new_zeros(logits.shape[:-1], dtype=_precise(logits)), None
    weights = objective.acceptance, objective.hybrid, objective.agreement
    return sampling_terms(teacher, logits, *weights, objective.candidates)


def _terms(teacher: Tensor, logits: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`distribution_terms` by the fastest means there is; `logits` may be overwritten."""
    settings = min(objective.k, logits.shape[-1]), objective.soft_ce, objective.top_k
    if kernels.usable(logits) and logits.dtype != torch.float64:
        from hass_core.kernels import distill as fused  # Triton is there on a GPU only

        return fused.distribution_terms(teacher, logits, *settings)
    return distribution_terms(teacher, logits, *settings)


def distribution_terms(
    teacher: Tensor, logits: Tensor, k: int, soft_ce: float, top_k: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For the target's logits [R, D] and the draft's [n, R, D]: the weighted sum of soft CE and Top-K [n, R], Top-K
    alone [n, R], whether both models favour the same token [n, R], and the gradient of the weighted sum by the draft's
    logits [n, R, D], in their dtype. The other parameters are `Objective`'s."""
    weights, mass, indices, top = _wanted(teacher, k, soft_ce, top_k)
    precise = logits.to(_precise(logits))
    largest = precise.amax(-1, keepdim=True)
    total = -(weights * precise).sum(-1)
    top_logits = precise.gather(-1, indices.expand(len(logits), -1, -1))
    exponentials = (precise - largest).exp_()
    normalizer = exponentials.sum(-1, keepdim=True)
    lse = (largest + normalizer.log())[..., 0]
    total += mass * lse
    own_top = top.sum(-1) * lse - (top * top_logits).sum(-1)
    right = (top_logits[..., :1] == largest)[..., 0].to(total.dtype)
    gradient = exponentials.mul_(mass[:, None] / normalizer).sub_(weights)
    return total, own_top, right, gradient.to(logits.dtype)


def _wanted(teacher: Tensor, k: int, soft_ce: float, top_k: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W [R, D] = w_ce · q + w_topk · q·1_K, so that the terms are Σ_v W(v) (-log p(v)); its mass [R] = Σ_v W(v); the
    top-K tokens [R, K] and their share of q [R, K]."""
    top_logits, indices = teacher.topk(k)
    precise = teacher.to(_precise(teacher))
    lse = precise.logsumexp(-1, keepdim=True)
    top = (top_logits.to(lse.dtype) - lse).exp()
    weights = (precise - lse).exp_().mul_(soft_ce).scatter_(1, indices, (soft_ce + top_k) * top)
    return weights, soft_ce + top_k * top.sum(-1), indices, top


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
