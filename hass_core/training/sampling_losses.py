"""Objectives for decoding that samples, with their gradients: terms beside the distillation of losses.py.

With q the target's distribution and p the draft's, both at temperature 1:

    α = Σ_v min(p(v), q(v))                              what rejection sampling accepts of one drafted token
    acceptance   -log α                                   (LK losses, arXiv 2602.23881)
    hybrid       λ·KL(q‖p) + (1 - λ)·(1 - α)              λ = exp(-3α) without gradient, by position; the same source

    A = Σ_v q(v)·(1 - (Λ_v / (1 + Λ_v))^k)               r_v = q(v) / p(v),  Λ_v = Σ_u max(0, r_v·p(u) - q(u))
    agreement    -log A

A is how often a coupled drafter's k candidates, the largest of log p + g, hold the target's draw, the largest of log q
with the same Gumbel noise g: exactly for k = 1 (Daliri, Musco and Suresh, arXiv 2408.07978), a lower bound for more. In
the order of r, Λ and all gradients are cumulative sums, so a row costs one sort.

Shapes: n steps, R rows, D vocabulary.
"""

import torch
from torch import Tensor

HYBRID_RATE = 3.0
LEAST = 1e-18  # of a probability that is divided by


def sampling_terms(
    teacher: Tensor, logits: Tensor, acceptance: float, hybrid: float, agreement: float, candidates: int
) -> tuple[Tensor, Tensor]:
    """For the target's logits [R, D] and the draft's [n, R, D]: the weighted sum of the terms [n, R], and its gradient
    by the draft's logits [n, R, D], in their dtype. The other parameters are `Objective`'s."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    log_q, log_p = teacher.to(precise).log_softmax(-1), logits.to(precise).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    value, gradient = p.new_zeros(p.shape[:-1]), torch.zeros_like(p)
    if acceptance or hybrid:
        alpha, slope = accepted(q, p)
        if acceptance:
            value -= acceptance * alpha.log()
            gradient -= acceptance / alpha[..., None] * slope
        if hybrid:
            share = (-HYBRID_RATE * alpha).exp()
            divergence = (q * (log_q - log_p)).sum(-1)
            value += hybrid * (share * divergence + (1 - share) * (1 - alpha))
            gradient += hybrid * (share[..., None] * (p - q) - (1 - share)[..., None] * slope)
    if agreement:
        agreed, slope = agreeing(q, p, candidates)
        value -= agreement * agreed.log()
        gradient -= agreement / agreed[..., None] * slope
    return value, gradient.to(logits.dtype)


def accepted(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """α [n, R] and its gradient by the logits of `p` [n, R, D]."""
    below = p * (p <= q)
    alpha = torch.minimum(p, q).sum(-1).clamp(min=LEAST)
    return alpha, below - p * below.sum(-1, keepdim=True)


def agreeing(q: Tensor, p: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """A [n, R] for that many candidates, and its gradient by the logits of `p` [n, R, D]."""
    ratio, order = (q / p.clamp(min=LEAST)).sort(-1)
    q, p = q.expand_as(p).gather(-1, order), p.gather(-1, order)
    smaller = p.cumsum(-1) - p  # Σ p over tokens of a smaller ratio: those that may win instead
    likelier = (ratio * smaller - (q.cumsum(-1) - q)).clamp(min=0)  # Λ
    missed = likelier / (1 + likelier)
    agreed = (q * (1 - missed**candidates)).sum(-1).clamp(min=LEAST)
    by_ratio = -candidates * q * ratio * missed ** (candidates - 1) / (1 + likelier).square()
    larger = by_ratio.flip(-1).cumsum(-1).flip(-1) - by_ratio
    return agreed, torch.empty_like(p).scatter_(-1, order, p * larger - by_ratio * smaller)
