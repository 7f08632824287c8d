"""From logits to tokens: the processors that shape a distribution, and drawing with one coin per position.

A token is drawn by inverting the cumulative distribution at a uniform number, its coin. Coins belong to positions of
the sequence, so whatever decodes a sequence with the same coins draws the same tokens: speculative and plain decoding
agree under sampling too. Pure functions on [..., V] logits; V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core import kernels
from hass_core.config import SamplingConfig
from hass_core.decoding.tree import Tree

NEVER = float("-inf")
CHUNK = 256  # a row's cumulative sum is taken over chunks first, then inside one chunk
BISECTIONS = 24  # resolve the nucleus' edge to 30 / 2^24 of a nat
LOG_FLOOR = -30.0  # tokens e^30 times less likely than the best one are never in a nucleus


class Sampler:
    """What drawing needs on the device, for B rows under one setting: coins by position, tokens seen for the penalty.

    `start` loads new prompts into the same memory. n draws a row, N tree nodes, R tokens emitted.
    """

    def __init__(self, sampling: SamplingConfig, rows: int, max_tokens: int, vocab_size: int, device: torch.device):
        self._sampling = sampling
        self._coins = torch.zeros(rows, max_tokens, dtype=torch.float64, device=device)
        self._first_position = torch.zeros(rows, dtype=torch.long, device=device)
        penalized = sampling.repetition_penalty != 1
        self._seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device) if penalized else None

    def start(self, token_ids: Tensor, lengths: Tensor, seed: int) -> None:
        """Begin with prompts [B, L] of `lengths` [B] tokens."""
        self._first_position.copy_(lengths)
        if self._sampling.temperature > 0:
            rows, count = self._coins.shape
            self._coins.copy_(torch.stack([position_coins(seed, row, count) for row in range(rows)]))
        if self._seen is not None:
            self._seen.zero_()
            self.remember(token_ids, lengths)

    def draw(self, logits: Tensor, positions: Tensor, tree: Tree | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [B, n] for sequence `positions` [B, n] and whether they are sound, from logits [B, n, V]."""
        index = (positions - self._first_position[:, None]).clamp(0, self._coins.shape[1] - 1)
        return draw(logits, self._sampling, self._coins.gather(1, index), self._seen_at(tree))

    def remember(self, token_ids: Tensor, counts: Tensor) -> None:
        """Remember tokens [B, R], the first `counts` [B] of each row."""
        if self._seen is not None:
            live = torch.arange(token_ids.shape[1], device=token_ids.device) < counts[:, None]
            self._seen.scatter_(1, torch.where(live, token_ids, token_ids[:, :1]), True)

    def _seen_at(self, tree: Tree | None) -> Tensor | None:
        """[B, n, V]: tokens of the sequence before each draw; at a tree's node those of its path too."""
        if self._seen is None or tree is None:
            return None if self._seen is None else self._seen[:, None]
        path = torch.where(tree.visible, tree.token_ids[:, None, :], tree.token_ids[:, :, None])
        return self._seen[:, None].repeat(1, path.shape[1], 1).scatter_(2, path, True)


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


def sample_rows(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, uniform: Tensor, max_top_k: int, use_top_p: bool
) -> Tensor:
    """Token ids [B] from logits [B, V], each row with settings [B] of its own; temperature 0 takes the likeliest.

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
    drawn = draw_weighted(scores.exp_(), uniform)
    mass = scores.gather(1, drawn[:, None])[:, 0]
    return torch.where((temperature > 0) & (mass > 0), drawn, best)


def draw_weighted(weights: Tensor, uniform: Tensor) -> Tensor:
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
