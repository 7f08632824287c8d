"""The processors that shape a distribution over tokens, in their order: repetition penalty, temperature, top-k, top-p,
min-p.

The last three keep the tokens from some logit on; that logit, the edge, is all that drawing needs of them, and tokens
tied with it stay.

Shapes: V vocabulary.
"""

import math

import torch
from torch import Tensor

from hass_core import kernels
from hass_core.config import SamplingConfig

NEVER = float("-inf")
COLDEST = 1e-5  # the least temperature; below it float32 cannot hold both the logits and the noise
LIKELIEST = 64  # tokens looked at first for a nucleus; the search goes on where they do not fill it
BISECTIONS = 24  # resolve a nucleus' edge on a GPU to 30 / 2^24 of a nat
LOG_FLOOR = -30.0  # tokens e^30 times less likely than the best one are never in a nucleus


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens [...] of [..., V], and whether their logits are sound."""
    if kernels.usable(logits):
        log_probability, token_ids = top_tokens(logits, 1)
        return token_ids[..., 0], log_probability[..., 0].isfinite()
    top, token_ids = logits.max(-1)
    return token_ids, top.isfinite()


def probabilities(logits: Tensor, sampling: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """The distribution a token is drawn from, float32 [..., V]; `seen` [..., V] marks tokens for the penalty."""
    shaped = logits.float() if seen is None else penalize(logits.float(), seen, sampling)
    if sampling.temperature < COLDEST:
        return torch.zeros_like(shaped).scatter_(-1, shaped.argmax(-1, keepdim=True), 1.0)
    shaped = shaped * (1 / sampling.temperature)
    lowest = edge(shaped, sampling)
    return (shaped if lowest is None else shaped.masked_fill(shaped < lowest, NEVER)).softmax(-1)


def penalize(logits: Tensor, seen: Tensor, sampling: SamplingConfig) -> Tensor:
    """Divide positive and multiply negative logits of seen tokens by the penalty (CTRL, arXiv 1909.05858)."""
    penalty = sampling.repetition_penalty
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def edge(logits: Tensor, sampling: SamplingConfig, sharpness: float = 1.0) -> Tensor | None:
    """The lowest of sharpness · logits that top-k, top-p and min-p keep of [..., V], [..., 1]; None: they are off."""
    if not 0 < sampling.top_k < logits.shape[-1] and sampling.top_p == 1 and sampling.min_p == 0:
        return None
    shaped, found = logits.float() * sharpness, []
    if 0 < sampling.top_k < logits.shape[-1]:
        found.append(shaped.topk(sampling.top_k, dim=-1).values[..., -1:])
    if sampling.top_p < 1:
        kept = shaped.masked_fill(shaped < found[0], NEVER) if found else shaped
        found.append(nucleus_edge(kept, sampling.top_p))
    if sampling.min_p > 0:
        found.append(shaped.amax(-1, keepdim=True) + math.log(sampling.min_p))
    return torch.stack(found).amax(0)


def nucleus_edge(logits: Tensor, top_p: float | Tensor) -> Tensor:
    """The logit [..., 1] of the last of the likeliest tokens of [..., V] whose probability reaches `top_p`, a number or
    [..., 1]; the first always stays."""
    if logits.device.type != "cpu":  # a captured graph cannot look whether it has found enough
        return _bisected_edge(logits, top_p)
    mass, size = logits.logsumexp(-1, keepdim=True), logits.shape[-1]
    count = min(LIKELIEST, size)
    while True:
        ordered = logits.topk(count, dim=-1).values
        probability = (ordered - mass).exp()
        inside = probability.cumsum(-1) - probability < top_p
        if count == size or not bool(inside[..., -1].any()):
            return ordered.gather(-1, inside.sum(-1, keepdim=True).clamp(min=1) - 1)
        count = min(8 * count, size)


def _bisected_edge(logits: Tensor, top_p: float | Tensor) -> Tensor:
    highest = logits.amax(-1, keepdim=True)
    weights = (logits - highest).exp()
    wanted = top_p * weights.sum(-1, keepdim=True)
    low, high = torch.full_like(wanted, LOG_FLOOR), torch.zeros_like(wanted)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = torch.where(logits - highest >= middle, weights, 0.0).sum(-1, keepdim=True) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return highest + low


def top_tokens(logits: Tensor, k: int, token_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities, at most 0, and indices [..., k] of the k likeliest tokens of logits [..., V], best first; with
    `token_ids` [V], those instead of the indices.

    A log-probability is NaN where a logit of its row is NaN or +infinite.
    """
    if kernels.usable(logits):
        from hass_core.kernels.top_k import row_top_k  # Triton is there on a GPU only

        scores, index = row_top_k(logits.flatten(0, -2), k, token_ids)
        return scores.view(*logits.shape[:-1], k), index.view(*logits.shape[:-1], k)
    top, index = logits.topk(k, dim=-1)
    scores = (top.float() - logits.float().logsumexp(-1, keepdim=True)).clamp(max=0)
    return scores, index if token_ids is None else token_ids[index]
