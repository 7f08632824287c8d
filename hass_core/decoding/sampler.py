"""Drawing and guessing tokens with the noise of their positions, for the B rows of a session.

A token is drawn as argmax (log p + g), p after all processors, g the noise of `hass_core.sampling`. Whatever
decodes a text with the same seed draws the same tokens. A drafter wants the tokens whose log q + g are largest: with
the same g it has a share in the draw's luck. Given the noise, a candidate is no longer right with probability q: were q
equal to p, the first one would be certain. What is uncertain is how far q is from p, so a candidate's score is its
log-softmax of (sharpness · log q + g) / width, both fitted to the draft (`hass_core.decoding.races`).

Shapes: B rows, n draws a row, N tree nodes, R tokens emitted, V vocabulary, D draft vocabulary, P tokens of paths.
"""

from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hass_core import kernels
from hass_core.config import SamplingConfig
from hass_core.decoding.tree import Tree
from hass_core.sampling import COLDEST, NEVER, as_signed, edge, greedy, gumbel, penalize, stream, top_tokens

NO_TOKEN = -1  # fills paths


class Proposal(NamedTuple):
    """A draft's logits at n nodes of a row, for the draws that come `ahead` of the certain tokens."""

    logits: Tensor  # [B, n, D], for `token_ids` or for the whole vocabulary
    positions: Tensor  # [B] of the certain tokens
    ahead: int
    k: int  # children wanted of a node
    token_ids: Tensor | None = None  # [D]
    path: Tensor | None = None  # [B, n, P] the tokens between the certain ones and each node, NO_TOKEN among them
    calibrated: tuple[float, float] = (1.0, 1.0)  # sharpness and width


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

    def guess(self, proposal: Proposal) -> tuple[Tensor, Tensor]:
        """The k likeliest draws, best first: scores [B, n, k], at most 0, and tokens.

        Top-k, top-p and min-p cut the target's distribution alone: cutting the draft's too loses (docs/results.md).
        """
        token_ids, k, (sharpness, width) = proposal.token_ids, proposal.k, proposal.calibrated
        logits = self._penalized(proposal.logits, proposal.path, token_ids)
        if self._greedy:
            return top_tokens(logits, k, token_ids)
        positions, sharpness = proposal.positions[:, None], sharpness / self.temperature
        return self._noise.largest(logits, positions, k, sharpness, width, proposal.ahead, token_ids)

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
            from hass_core.kernels.top_k import RowNoise, row_top_k  # Triton is there on a GPU only

            noise = RowNoise(self.streams, positions, ahead, sharpness, width, lowest)
            scores, index = row_top_k(logits.flatten(0, -2), k, token_ids, noise)
            return scores.view(*logits.shape[:-1], k), index.view(*logits.shape[:-1], k)
        x = self._added(logits.float() * sharpness, positions + ahead, token_ids, lowest)
        top, index = x.max(-1, keepdim=True) if k == 1 else x.topk(k, dim=-1)
        scores = top / width - (x / width).logsumexp(-1, keepdim=True) if k > 1 else top - top  # sound or not
        return scores.clamp(max=0), index if token_ids is None else token_ids[index]

    def _added(self, x: Tensor, positions: Tensor, token_ids: Tensor | None, lowest: Tensor | None) -> Tensor:
        """Tokens of x [B, n, D] from `lowest` on, with the noise of their positions [B, n or 1]; writes into x."""
        if lowest is not None:
            x = x.masked_fill_(x < lowest, NEVER)
        for row, asked in enumerate(positions.expand(-1, x.shape[1]).tolist()):
            start = 0
            for position, run in groupby(asked):
                stop = start + len(list(run))
                noise = self._at(row, position).to(x.device)
                x[row, start:stop] += noise if token_ids is None else noise[token_ids]
                start = stop
            known, first = self._known[row], min(asked)  # texts only grow: earlier positions do not come again
            for position in [position for position in known if position < first]:
                del known[position]
        return x

    def _at(self, row: int, position: int) -> Tensor:
        known = self._known[row]
        if position not in known:
            known[position] = torch.from_numpy(gumbel(self._rows[row], position, self._token_ids))
        return known[position]
