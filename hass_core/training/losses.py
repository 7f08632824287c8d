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

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core.config import TrainingConfig
from hass_core.model.head import DraftHead
from hass_core.training.batch import Batch

PARTS = ("regression", "soft_ce", "top_k", "accuracy")
LOGITS_PER_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 28}


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
    """What one chunk's targets say: R rows, D draft vocabulary."""

    probabilities: Tensor  # q [R, D]
    top_indices: Tensor  # [R, K]
    top_probabilities: Tensor  # [R, K]
    informative: Tensor  # [R] float, 0 where the next token is outside the draft vocabulary


def distill(
    outputs: list[Tensor], batch: Batch, head: DraftHead, objective: Objective, counts: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Parts [n, 4] (see PARTS) of this micro-batch's share of the mean, and the loss's gradient for each output.

    `outputs` are n estimates [Q, H]; `counts` [n] the supervised tokens of the whole optimizer step. Summed over all
    micro-batches and devices the parts are means over tokens, and so is the gradient.
    """
    steps = len(outputs)
    share = batch.supervised / counts.clamp(min=1)[:, None]  # [n, P]
    informative = head.contains(batch.token_ids[batch.targets + 1])
    parts = outputs[0].new_zeros(steps, len(PARTS), dtype=torch.float32)
    gradients = [torch.zeros_like(output) for output in outputs]
    rows_per_chunk = max(16, LOGITS_PER_CHUNK[outputs[0].device.type] // (head.size * (steps + 1)))
    for chunk in torch.arange(len(batch.targets), device=outputs[0].device).split(rows_per_chunk):
        targets, anchors = batch.targets[chunk], batch.target_anchors[:, chunk]
        features = batch.features[targets]
        teacher = teach(features, head, objective, informative[chunk])
        estimates = torch.stack([output.detach()[rows] for output, rows in zip(outputs, anchors, strict=True)])
        chunk_parts, chunk_gradients = _chunk(estimates, features, teacher, head, objective)
        parts += (chunk_parts * share[:, chunk, None]).sum(1)
        weights = share[:, chunk] * share.new_tensor(objective.step_weights)[:, None]
        for gradient, rows, values in zip(gradients, anchors, chunk_gradients * weights[..., None], strict=True):
            gradient.index_add_(0, rows, values.to(gradient.dtype))
    return parts, gradients


def teach(features: Tensor, head: DraftHead, objective: Objective, informative: Tensor) -> Teacher:
    """The target's distribution of the tokens after `features` [R, H], over the draft vocabulary."""
    probabilities = head.logits(features).float().softmax(-1)
    top, indices = probabilities.topk(min(objective.k, head.size))
    if objective.renormalize:
        top = top / top.sum(-1, keepdim=True)
    return Teacher(probabilities, indices, top, informative.to(probabilities.dtype))


def _chunk(
    estimates: Tensor, features: Tensor, teacher: Teacher, head: DraftHead, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Parts [n, R, 4] and gradients [n, R, H] of one chunk of estimates [n, R, H]."""
    parts, gradients = [], []
    for logits, estimate in zip(head.logits(estimates), estimates, strict=True):
        soft, top, right, by_logit = distribution_terms(logits, teacher, objective)
        error = estimate.float() - features.float()
        regression = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none").mean(-1)
        known = teacher.informative
        parts.append(torch.stack([regression, soft * known, top * known, right * known], dim=-1))
        by_feature = (by_logit.to(head.weight.dtype) @ head.weight).float() * known[:, None]
        gradients.append(by_feature + error.clamp(-1, 1) * (objective.regression / error.shape[-1]))
    return torch.stack(parts), torch.stack(gradients)


def distribution_terms(logits: Tensor, teacher: Teacher, objective: Objective) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Soft CE [R], Top-K loss [R], whether both favour the same token [R], and the weighted gradient [R, D]."""
    logits = logits.float()
    lse = logits.logsumexp(-1)
    soft = lse - (teacher.probabilities * logits).sum(-1)
    top_logits = logits.gather(1, teacher.top_indices)
    mass = teacher.top_probabilities.sum(-1)
    top = mass * lse - (teacher.top_probabilities * top_logits).sum(-1)
    right = (top_logits[:, 0] == logits.amax(-1)).float()
    gradient = (logits - lse[:, None]).exp() * (objective.soft_ce + objective.top_k * mass)[:, None]
    gradient = gradient - objective.soft_ce * teacher.probabilities
    gradient = gradient.scatter_add(1, teacher.top_indices, -objective.top_k * teacher.top_probabilities)
    return soft, top, right, gradient
