"""From logits to tokens: the processors that shape a distribution, and drawing with one coin per position.

A token is drawn by inverting the cumulative distribution at a uniform number, its coin. Coins belong to positions of
the sequence, so whatever decodes a sequence with the same coins draws the same tokens: speculative and plain decoding
agree under sampling too. Pure functions on [..., V] logits; V vocabulary.
"""

import torch
from torch import Tensor

from hass_core import kernels
from hass_core.config import SamplingConfig
from hass_core.decoding.top_tokens import top_tokens

NEVER = float("-inf")


def draw(logits: Tensor, sampling: SamplingConfig, coins: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Token ids [...] and whether their logits were sound [...], from logits [..., V] and coins [...] in [0, 1).

    `seen` [..., V] marks tokens already in the sequence, for the repetition penalty. Temperature 0 ignores the coins.
    """
    if sampling.temperature == 0:
        return greedy(penalize(logits, seen, sampling.repetition_penalty))
    cumulative = probabilities(logits, sampling, seen).cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1:]
    token_ids = torch.searchsorted(cumulative, coins[..., None] * total, right=True)[..., 0]
    return token_ids.clamp(max=logits.shape[-1] - 1), total[..., 0].isfinite()


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens [...] of [..., V], and whether their logits are sound."""
    if kernels.usable(logits):
        log_probability, token_ids = top_tokens(logits, 1)
        return token_ids[..., 0], log_probability[..., 0].isfinite()
    top, token_ids = logits.max(-1)
    return token_ids, top.isfinite()


def probabilities(logits: Tensor, sampling: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """The distribution a token is drawn from, float32 [..., V]. Order: penalty, temperature, top-k, top-p, min-p."""
    shaped = penalize(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return torch.zeros_like(shaped).scatter_(-1, shaped.argmax(-1, keepdim=True), 1.0)
    shaped = shaped / sampling.temperature
    if 0 < sampling.top_k < shaped.shape[-1]:
        shaped = keep_top_k(shaped, sampling.top_k)
    if sampling.top_p < 1:
        shaped = keep_top_p(shaped, sampling.top_p)
    if sampling.min_p > 0:
        shaped = keep_min_p(shaped, sampling.min_p)
    return shaped.softmax(-1)


def penalize(logits: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of seen tokens by `penalty` (CTRL, arXiv 1909.05858)."""
    if seen is None or penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the `top_k` likeliest tokens, and those tied with the last of them."""
    threshold = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, NEVER)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens until their probability reaches `top_p`; the first always stays."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p), NEVER)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keep tokens at least `min_p` times as likely as the likeliest one."""
    probability = logits.softmax(-1)
    return logits.masked_fill(probability < min_p * probability.amax(-1, keepdim=True), NEVER)


def position_coins(seed: int, row: int, count: int) -> Tensor:
    """Coins [count] in float64 for the positions of one sequence, a function of the seed and the row alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63)
    return torch.rand(count, dtype=torch.float64, generator=generator)
