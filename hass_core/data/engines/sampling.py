"""Draw one token per row, entirely on the device: no value is read back, so the step can be captured in a graph.

One uniform number per row decides (inverse transform of the cumulative distribution), and that number is a hash of
the row's seed and the token's position: a conversation's random numbers do not depend on what else is in the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256  # the cumulative sum is taken over chunks first, then inside one chunk
BISECTIONS = 24  # resolve the nucleus' edge to 30 / 2^24 of a nat
LOG_FLOOR = -30.0  # tokens e^30 times less likely than the best one are never in a nucleus


def sample(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, uniform: Tensor, max_top_k: int, use_top_p: bool
) -> Tensor:
    """Token ids [B] from logits [B, V] with per-row settings [B]; temperature 0 takes the likeliest.

    top_k 0 and top_p 1 switch a row's filter off. `max_top_k` (0 = none) and `use_top_p` say on the host what the
    rows use at most, so that the common unfiltered case costs nothing.
    """
    scores = logits.float()
    best_score, best = scores.max(dim=-1)
    divisor = torch.where(temperature > 0, temperature, 1.0)
    scores = scores.sub_(best_score[:, None]) if scores is not logits else scores - best_score[:, None]
    scores.div_(divisor[:, None])  # ≤ 0, and 0 for the likeliest token
    if max_top_k:
        kth = scores.topk(max_top_k, dim=-1).values.gather(1, (top_k - 1).clamp(min=0)[:, None])
        scores.masked_fill_((scores < kth) & (top_k > 0)[:, None], -torch.inf)
    if use_top_p:
        edge = nucleus_edge(scores, top_p)
        scores.masked_fill_(scores < edge[:, None], -torch.inf)
    drawn = draw(scores.exp_(), uniform)
    mass = scores.gather(1, drawn[:, None])[:, 0]
    return torch.where((temperature > 0) & (mass > 0), drawn, best)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Indices [B] drawn from unnormalised weights [B, V] by uniform numbers [B] in [0, 1)."""
    chunks = F.pad(weights, (0, -weights.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))
    cumulative = chunks.sum(dim=-1).cumsum(dim=-1)
    point = uniform * cumulative[:, -1]
    chunk = (cumulative <= point[:, None]).sum(dim=-1).clamp(max=cumulative.shape[1] - 1)
    before = torch.where(chunk > 0, cumulative.gather(1, (chunk - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    inside = chunks.gather(1, chunk[:, None, None].expand(-1, 1, CHUNK))[:, 0].cumsum(dim=-1)
    offset = (inside <= (point - before)[:, None]).sum(dim=-1).clamp(max=CHUNK - 1)
    return (chunk * CHUNK + offset).clamp(max=weights.shape[1] - 1)


def nucleus_edge(scores: Tensor, top_p: Tensor) -> Tensor:
    """The score [B] of the last token inside the smallest set whose mass reaches top_p, found by bisection.

    `scores` [B, V] are log-weights whose maximum is 0.
    """
    weights = scores.exp()
    wanted = top_p * weights.sum(dim=-1)
    low = torch.full_like(wanted, LOG_FLOOR)
    high = torch.zeros_like(wanted)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = torch.where(scores >= middle[:, None], weights, 0.0).sum(dim=-1) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(top_p < 1, low, -torch.inf)


def uniform_at(seeds: Tensor, positions: Tensor) -> Tensor:
    """Numbers [B] in [0, 1), a hash (splitmix64) of 64-bit seeds [B] and token positions [B]."""
    value = seeds + (positions + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
    value = (value ^ _shifted(value, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    value = (value ^ _shifted(value, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return (_shifted(value ^ _shifted(value, 31), 40)).float() / 2**24


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
