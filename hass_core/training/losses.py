"""The objective of one alignment step, its value and its gradient, a chunk of tokens at a time.

With q the target's distribution at temperature 1, log p the draft's, K the target's top-K set (HASS section 3.1):

    regression   mean over H of SmoothL1(f̂ - f)
    soft CE      -Σ_v q(v) log p(v)
    Top-K        -Σ_{v in K} q(v) log p(v)          neither q nor p renormalised on K, unless asked for q

each averaged over the supervised tokens of the whole optimizer step, on all devices and micro-batches. The n steps'
losses are summed.

The head is frozen, so a chunk needs no graph: with S = Σ_{v in K} q(v) the gradient by the draft's logits is

    soft CE      p - q                 Top-K      S·p - q·1_K

and times the head's weight it is the gradient of the draft's features. So [tokens × vocabulary] never exists for more
than one chunk, and the target's logits are computed once for all n steps.

With a trimmed draft vocabulary q is the target's distribution restricted to it and renormalised. Where the answer's own
next token is outside, that restriction says little, and no draft can be right: such rows keep the regression only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core.config import TrainingConfig
from hass_core.model.head import DraftHead
from hass_core.training.batch import Batch

PARTS = ("regression", "soft_ce", "top_k", "accuracy")
LOGITS_PER_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 28}


@dataclass(frozen=True)
class Objective:
    """Weights and switches of the three terms. `step_weights` has one weight for each alignment step."""

    regression: float = 1.0
    soft_ce: float = 0.1
    top_k: float = 1.0
    k: int = 10
    renormalize: bool = False
    step_weights: tuple[float, ...] = (1.0, 1.0, 1.0)

    @classmethod
    def from_config(cls, config: TrainingConfig) -> "Objective":
        return cls(
            regression=config.regression_weight,
            soft_ce=config.soft_ce_weight,
            top_k=config.top_k_weight,
            k=config.top_k,
            renormalize=config.renormalize_top_k,
            step_weights=config.step_weights or (1.0,) * config.align_steps,
        )

    def combine(self, parts: Tensor) -> Tensor:
        """The loss from its parts [n, 4]."""
        weights = parts.new_tensor([self.regression, self.soft_ce, self.top_k, 0.0])
        return (parts @ weights) @ parts.new_tensor(self.step_weights)


@dataclass(frozen=True)
class Teacher:
    """What one chunk's targets say: R rows, D draft vocabulary, w the weights of soft CE and Top-K."""

    weights: Tensor  # W [R, D] = w_ce · q + w_topk · q·1_K: the loss is Σ_v W(v) (-log p(v))
    mass: Tensor  # [R] Σ_v W(v)
    top_indices: Tensor  # [R, K]
    top_probabilities: Tensor  # [R, K]
    informative: Tensor  # [R] float, 0 where the next token is outside the draft vocabulary


def distill(
    outputs: list[Tensor], batch: Batch, head: DraftHead, objective: Objective, counts: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Parts [n, 4] (see PARTS) of this micro-batch's share of the mean, and the loss's gradient for each output.

    `outputs` are n estimates [Q, H]; `counts` [n] the supervised tokens of the whole optimizer step. Summed over all
    micro-batches and devices the parts are means over tokens, and so is the gradient. A distribution term of weight 0
    is not computed, and reported as 0.
    """
    device, steps = outputs[0].device, len(outputs)
    share = batch.supervised / counts.clamp(min=1)[:, None]  # [n, P]
    weights = share * share.new_tensor(objective.step_weights)[:, None]
    informative = head.contains(batch.token_ids[batch.targets + 1])
    parts = torch.zeros(steps, len(PARTS), device=device)
    gradients = [torch.zeros_like(output) for output in outputs]
    rows_per_chunk = max(16, LOGITS_PER_CHUNK[device.type] // (head.size * (steps + 1)))
    for rows in torch.arange(len(batch.targets), device=device).split(rows_per_chunk):
        features, anchors = batch.features[batch.targets[rows]], batch.target_anchors[:, rows]
        teacher = teach(features, head, objective, informative[rows])
        estimates = torch.stack([output.detach()[own] for output, own in zip(outputs, anchors, strict=True)])
        chunk_parts, chunk_gradients = _chunk(estimates, features, teacher, head, objective)
        parts += (chunk_parts * share[:, rows, None]).sum(1)
        for gradient, own, values in zip(gradients, anchors, chunk_gradients * weights[:, rows, None], strict=True):
            gradient.index_add_(0, own, values.to(gradient.dtype))
    return parts, gradients


def teach(features: Tensor, head: DraftHead, objective: Objective, informative: Tensor) -> Teacher:
    """The target's distribution of the tokens after `features` [R, H], over the draft vocabulary."""
    logits = head.logits(features)
    top_logits, indices = logits.topk(min(objective.k, head.size))
    scaled = _compiled(scaled_softmax) if logits.is_cuda else scaled_softmax
    weights, lse = scaled(logits, objective.soft_ce)
    in_full = (top_logits.to(lse.dtype) - lse).exp()
    top = in_full / in_full.sum(-1, keepdim=True) if objective.renormalize else in_full
    weights.scatter_(1, indices, (objective.soft_ce * in_full + objective.top_k * top).to(weights.dtype))
    mass = objective.soft_ce + objective.top_k * top.sum(-1)
    return Teacher(weights, mass, indices, top, informative.to(lse.dtype))


def scaled_softmax(logits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """scale · softmax(logits) [R, D] in the logits' dtype, and their log-sum-exp [R, 1]."""
    precise = logits.to(_precise(logits))
    lse = precise.logsumexp(-1, keepdim=True)
    return ((precise - lse).exp_() * scale).to(logits.dtype), lse


def _chunk(
    estimates: Tensor, features: Tensor, teacher: Teacher, head: DraftHead, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Parts [n, R, 4] and gradients [n, R, H] of one chunk of estimates [n, R, H]."""
    terms = _compiled(distribution_terms) if estimates.is_cuda else distribution_terms
    total, top, right, by_logit = terms(
        head.logits(estimates), teacher.weights, teacher.mass, teacher.top_indices, teacher.top_probabilities
    )
    soft = (total - objective.top_k * top) / objective.soft_ce if objective.soft_ce else torch.zeros_like(total)
    known = teacher.informative
    error = estimates.to(_precise(estimates)) - features.to(_precise(estimates))
    regression = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none").mean(-1)
    by_feature = (by_logit @ head.weight).to(error.dtype) * known[:, None]
    gradient = by_feature + error.clamp(-1, 1) * (objective.regression / error.shape[-1])
    return torch.stack([regression, soft * known, top * known, right * known], dim=-1), gradient


def distribution_terms(
    logits: Tensor, weights: Tensor, mass: Tensor, top_indices: Tensor, top_probabilities: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For the draft's logits [n, R, D]: the weighted sum of soft CE and Top-K [n, R], Top-K alone [n, R], whether both
    models favour the same token [n, R], and the gradient of the weighted sum [n, R, D] in the logits' dtype."""
    precise = logits.to(_precise(logits))
    weights = weights.to(precise.dtype)
    largest = precise.amax(-1, keepdim=True)
    total = -(weights * precise).sum(-1)
    top_logits = precise.gather(-1, top_indices.expand(len(logits), -1, -1))
    exponentials = (precise - largest).exp_()
    normalizer = exponentials.sum(-1, keepdim=True)
    lse = (largest + normalizer.log())[..., 0]
    total += mass * lse
    top = top_probabilities.sum(-1) * lse - (top_probabilities * top_logits).sum(-1)
    right = (top_logits[..., :1] == largest)[..., 0].to(total.dtype)
    gradient = exponentials.mul_(mass[:, None] / normalizer).sub_(weights)
    return total, top, right, gradient.to(logits.dtype)


@cache
def _compiled(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The same function, fused: it passes over the logits two or three times instead of nine."""
    return torch.compile(function, dynamic=True)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
