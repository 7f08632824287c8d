"""From logits to tokens: the processors that shape a distribution, and drawing with the noise of a place.

A token is drawn as argmax (log p + g), p after all processors, g the noise of `hass_core.decoding.noise`. Whatever
decodes a text with the same seed draws the same tokens. A drafter wants the tokens whose log q + g are largest: with
the same g it has a share in the draw's luck. Given the noise, a candidate is no longer right with probability q: were q
equal to p, the first one would be certain. What is uncertain is how far q is from p, so a candidate's score is its
log-softmax of (sharpness · log q + g) / width, both fitted to the draft (`hass_core.decoding.calibration`).

Processors in their order: repetition penalty, temperature, top-k, top-p, min-p. The last three keep the tokens from
some logit on; that logit, the edge, is all that drawing needs of them, and tokens tied with it stay.

Shapes: B rows, n draws a row, N tree nodes, R tokens emitted, V vocabulary, D draft vocabulary, P places of paths.
"""

import math
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hass_core import kernels
from hass_core.config import SamplingConfig
from hass_core.decoding.noise import gumbel, stream, winner
from hass_core.decoding.tree import Tree

NEVER = float("-inf")
NO_TOKEN = -1  # fills paths
COLDEST = 1e-5  # the least temperature; below it float32 cannot hold both the logits and the noise
LIKELIEST = 64  # tokens looked at first for a nucleus; the search goes on where they do not fill it
BISECTIONS = 24  # resolve a nucleus' edge on a GPU to 30 / 2^24 of a nat
LOG_FLOOR = -30.0  # tokens e^30 times less likely than the best one are never in a nucleus


class Sampler:
    """What drawing and guessing need on the device, for B rows under one setting: noise, and tokens seen for the
    penalty. `start` loads new prompts into the same memory."""

    def __init__(
        self,
        sampling: SamplingConfig,
        rows: int,
        vocab_size: int,
        device: torch.device,
        noise: "Noise | None" = None,
    ):
        self._sampling, self._vocab_size, self.temperature = sampling, vocab_size, sampling.temperature
        self._greedy = sampling.temperature < COLDEST
        self._noise = noise or Noise(rows, vocab_size, device)
        self.capturable = self._greedy or kernels.usable(self._noise.streams)
        self.wants_paths = sampling.repetition_penalty != 1
        # one place more than tokens: NO_TOKEN's
        seen = torch.zeros(rows, vocab_size + 1, dtype=torch.bool, device=device) if self.wants_paths else None
        self._seen = seen

    def start(self, token_ids: Tensor, lengths: Tensor, seed: int) -> None:
        """Begin with prompts [B, L] of `lengths` [B] tokens."""
        self._noise.start(seed)
        if self._seen is not None:
            self._seen.zero_()
            self.remember(token_ids, lengths)

    def draw(self, logits: Tensor, positions: Tensor, tree: Tree | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [B, n] for sequence `positions` [B, n] and whether they are sound, from logits [B, n, V]."""
        if self.wants_paths:
            path = None if tree is None else torch.where(tree.visible, tree.token_ids[:, None], NO_TOKEN)
            logits = self._penalized(logits, path)
        if self._greedy:
            return greedy(logits)
        sharpness = 1 / self.temperature
        scores, token_ids = self._noise.largest(
            logits, positions, 1, sharpness, lowest=edge(logits, self._sampling, sharpness)
        )
        return token_ids[..., 0], scores[..., 0].isfinite()

    def guess(
        self,
        logits: Tensor,
        positions: Tensor,
        ahead: int,
        k: int,
        token_ids: Tensor | None = None,
        path: Tensor | None = None,
        calibrated: tuple[float, float] = (1.0, 1.0),
    ) -> tuple[Tensor, Tensor]:
        """The k likeliest draws, best first, `ahead` of `positions` [B]: scores [B, n, k], at most 0, and tokens.

        Logits [B, n, D] are a draft's, for `token_ids` [D] or for the whole vocabulary. `path` [B, n, P] are the tokens
        between the certain ones and each place, NO_TOKEN among them; `calibrated` the sharpness and the width.
        """
        logits = self._penalized(logits, path, token_ids)
        if self._greedy:
            return top_tokens(logits, k, token_ids)
        sharpness, width = calibrated
        return self._noise.largest(
            logits, positions[:, None], k, sharpness / self.temperature, width, ahead, token_ids
        )  # fmt: skip

    def remember(self, token_ids: Tensor, counts: Tensor) -> None:
        """Remember tokens [B, R], the first `counts` [B] of each row."""
        if self._seen is not None:
            live = torch.arange(token_ids.shape[1], device=token_ids.device) < counts[:, None]
            self._seen.scatter_(1, self._column(torch.where(live, token_ids, NO_TOKEN)), True)

    def _penalized(self, logits: Tensor, path: Tensor | None, token_ids: Tensor | None = None) -> Tensor:
        """Logits [B, n, V], or [B, n, D] of `token_ids`, after the penalty on seen tokens and those of the path."""
        if self._seen is None:
            return logits
        seen = self._seen[:, None]
        if path is not None:
            seen = seen.repeat(1, path.shape[1], 1).scatter_(2, self._column(path), True)
        return penalize(logits, seen[..., :-1] if token_ids is None else seen[..., token_ids], self._sampling)

    def _column(self, token_ids: Tensor) -> Tensor:
        return token_ids.remainder(self._vocab_size + 1)


class Noise:
    """The noise of B rows. On a CPU a position's is made once and kept while trees reach there; on a GPU the kernel
    that looks for the largest makes it again for every logit, for less than reading it would cost, unless it is not to
    be `fused`."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device, fused: bool = True):
        self._fused = fused
        self.streams = torch.zeros(rows, 2, dtype=torch.int32, device=device)
        self._token_ids = np.arange(vocab_size, dtype=np.uint32)
        self._rows: list[tuple[int, int]] = []
        self._known: list[dict[int, Tensor]] = []

    def start(self, seed: int) -> None:
        """Begin new texts under `seed`."""
        self._rows = [stream(seed, row) for row in range(len(self.streams))]
        self._known = [{} for _ in self._rows]
        self.streams.copy_(as_signed(self._rows))

    def largest(
        self,
        logits: Tensor,
        positions: Tensor,
        k: int,
        sharpness: float,
        width: float = 1.0,
        ahead: int = 0,
        token_ids: Tensor | None = None,
        lowest: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k largest of x = sharpness · logit + g in logits [B, n, D], `ahead` of positions [B, n or 1], best first:
        log-softmax of x / width [B, n, k], and indices [B, n, k], or what `token_ids` [D] has there. Of tied ones the
        lower index is the largest.

        Where `lowest` [B, n, 1] is given, only tokens with sharpness · logit from there on count. A score is not
        finite where a logit of its row is NaN or +infinite.
        """
        if self._fused and kernels.usable(logits):
            from hass_core.kernels.top_k import Places, row_top_k  # Triton is there on a GPU only

            places = Places(self.streams, positions, ahead, sharpness, width, lowest)
            scores, index = row_top_k(logits.flatten(0, -2), k, token_ids, places)
            return scores.view(*logits.shape[:-1], k), index.view(*logits.shape[:-1], k)
        x = self._added(logits.float() * sharpness, positions + ahead, token_ids, lowest)
        top, index = x.max(-1, keepdim=True) if k == 1 else x.topk(k, dim=-1)
        scores = top / width - (x / width).logsumexp(-1, keepdim=True) if k > 1 else top - top  # sound or not
        return scores.clamp(max=0), index if token_ids is None else token_ids[index]

    def _added(self, x: Tensor, positions: Tensor, token_ids: Tensor | None, lowest: Tensor | None) -> Tensor:
        """Tokens of x [B, n, D] from `lowest` on, with the noise of their positions [B, n or 1]; writes into x."""
        if lowest is not None:
            x = x.masked_fill_(x < lowest, NEVER)
        for row, places in enumerate(positions.expand(-1, x.shape[1]).tolist()):
            start = 0
            for position, run in groupby(places):
                stop = start + len(list(run))
                noise = self._at(row, position).to(x.device)
                x[row, start:stop] += noise if token_ids is None else noise[token_ids]
                start = stop
            known = self._known[row]  # texts only grow: what lies behind is not asked for again
            for position in [position for position in known if position < min(places)]:
                del known[position]
        return x

    def _at(self, row: int, position: int) -> Tensor:
        known = self._known[row]
        if position not in known:
            known[position] = torch.from_numpy(gumbel(self._rows[row], position, self._token_ids))
        return known[position]


def as_signed(row_streams: list[tuple[int, int]]) -> Tensor:
    """[B, 2] int32 of the words of streams."""
    return torch.from_numpy(np.array(row_streams, np.uint32).view(np.int32))


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


class Shaped(NamedTuple):
    """What rows with settings of their own are drawn from."""

    logits: Tensor  # [B, V] float32, divided by the temperature
    lowest: Tensor | None  # [B, 1] only logits from there on count
    cold: Tensor  # [B] rows that take the likeliest


def shape_rows(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, max_top_k: int, use_top_p: bool
) -> Shaped:
    """The processors on logits [B, V], each row with settings [B] of its own.

    top_k 0 and top_p 1 switch a row's filter off. `max_top_k` (0 = none) and `use_top_p` say on the host what the
    rows use at most, so that the common unfiltered case costs nothing.
    """
    cold = temperature < COLDEST
    shaped = logits.float() * torch.where(cold, 1.0, 1 / temperature)[:, None]
    lowest = None
    if max_top_k:
        kth = shaped.topk(max_top_k, dim=-1).values.gather(1, (top_k - 1).clamp(min=0)[:, None])
        lowest = torch.where((top_k > 0)[:, None], kth, NEVER)
    if use_top_p:
        kept = shaped if lowest is None else shaped.masked_fill(shaped < lowest, NEVER)
        share = torch.where(top_p < 1, top_p, 0.0)[:, None]
        nucleus = torch.where(share > 0, nucleus_edge(kept, share), NEVER)
        lowest = nucleus if lowest is None else torch.maximum(lowest, nucleus)
    return Shaped(shaped, lowest, cold)


def draw_rows(shaped: Shaped, streams: Tensor, positions: Tensor) -> Tensor:
    """Token ids [B] drawn at `positions` [B], with the noise of a stream [B, 2] for each row."""
    logits, lowest, cold = shaped
    if kernels.usable(logits):
        from hass_core.kernels.top_k import Places, row_top_k  # Triton is there on a GPU only

        drawn = row_top_k(logits, 1, None, Places(streams, positions, 0, 1.0, 1.0, lowest))[1][:, 0]
        return torch.where(cold, greedy(logits)[0], drawn)
    if lowest is not None:
        logits = logits.masked_fill(logits < lowest, NEVER)
    words = [(low, high) for low, high in streams.cpu().numpy().view(np.uint32).tolist()]
    rows = zip(logits.cpu().numpy(), words, positions.tolist(), cold.tolist(), strict=True)
    drawn = [int(row.argmax()) if is_cold else winner(row, word, place) for row, word, place, is_cold in rows]
    return torch.tensor(drawn, device=logits.device)
