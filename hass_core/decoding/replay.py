"""Decoding's cycles repeated over answers on record, without the target: what a draft's trees would have gained.

The target's tokens and features are known, so each cycle goes as in decoding: extend the draft's cache with true
features, grow the tree, accept along the recorded tokens. On the target's greedy answers the accepted counts are those
of greedy decoding.

For an answer that was sampled, whoever sampled it, the noise is drawn that could have made it: given that token y won
a race of arrival times E_v / p_v with E_v = exp(−g_v), the winning time t is a standard exponential variate whatever y
is, and every other E_v is t·p_v and an exponential variate on top. So the counts have the distribution that decoding
under this sampling has on such answers.

Shapes: B answers at once, L tokens, H hidden, N tree nodes, R nodes of a tree's longest path, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hass_core.config import SamplingConfig
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.sampler import Noise, Sampler
from hass_core.decoding.tree import accept
from hass_core.sampling import probabilities

GREEDY = SamplingConfig()
FRESH = 0x7265706C6179  # a seed that no answer was drawn with: the noise must not know the winners
UNKNOWN = -1  # a token past the end of the answer: no draft equals it
ANSWERS_AT_ONCE = 16


@dataclass(frozen=True)
class Recording:
    """A recorded conversation up to the end of one answer, which begins at token `start`."""

    token_ids: Tensor  # [L]
    features: Tensor  # [L, H]
    start: int
    taps: Tensor | None = None  # [L, n·H] the states inside the target that the draft fuses, if any

    def drafted_from(self, drafter: Drafter) -> Tensor:
        """The features [L, H] that the drafter takes."""
        return self.features if self.taps is None else drafter.features_from(self.taps)


def last_answer(token_ids: Tensor, loss_mask: Tensor, features: Tensor, taps: Tensor | None = None) -> Recording | None:
    """The last run of supervised tokens with all that stands before it; None when it leaves nothing to draft."""
    supervised = loss_mask.nonzero().flatten().tolist()
    if not supervised:
        return None
    end = start = supervised[-1]
    while start and loss_mask[start - 1]:
        start -= 1
    if start == 0 or end - start < 2:
        return None
    return Recording(token_ids[: end + 1], features[: end + 1], start, None if taps is None else taps[: end + 1])


@torch.no_grad()
def replay(
    drafter: Drafter, answers: Sequence[Recording], head: Tensor, sampling: SamplingConfig = GREEDY
) -> list[list[int]]:
    """Accepted drafts of every cycle of every answer; `head` [V, H] is the target's."""
    found = []
    for some in together(answers):
        noise = RecordedNoise(some, head, sampling)
        found += replay_together(drafter, some, Sampler(sampling, len(some), len(head), head.device, noise))
    return found


def together(answers: Sequence[Recording]) -> list[Sequence[Recording]]:
    """The answers in batches that are replayed at once."""
    return [answers[first : first + ANSWERS_AT_ONCE] for first in range(0, len(answers), ANSWERS_AT_ONCE)]


class RecordedNoise(Noise):
    """Noise with which the recorded tokens win, and fresh noise past the answers' ends. A GPU draws it itself: nobody
    else has to know it, and a processor takes a millisecond for a position's."""

    def __init__(self, answers: Sequence[Recording], head: Tensor, sampling: SamplingConfig):
        super().__init__(len(answers), len(head), head.device, fused=False)
        self._answers, self._head, self._sampling = answers, head, sampling
        self._winners = [answer.token_ids.tolist() for answer in answers]
        self._generator = torch.Generator(head.device).manual_seed(FRESH) if head.is_cuda else None

    def _at(self, row: int, position: int) -> Tensor:
        known, winners = self._known[row], self._winners[row]
        if position not in known:
            noise = self._fresh(row, position)
            if position < len(winners):
                feature = self._answers[row].features[position - 1].to(self._head.dtype)
                p = probabilities(F.linear(feature, self._head), self._sampling)
                noise = noise_given(winners[position], p.to(noise.device), noise)
            known[position] = noise
        return known[position]

    def _fresh(self, row: int, position: int) -> Tensor:
        """[V], in the order of the questions: the same in every run."""
        if self._generator is None:
            return super()._at(row, position)
        noise = torch.empty(len(self._head), device=self._head.device)
        return noise.exponential_(generator=self._generator).log_().neg_()


def noise_given(winner: int, p: Tensor, noise: Tensor) -> Tensor:
    """Noise [V] with which `winner` is drawn from p [V], from fresh noise [V]; the winner's own decides when it won."""
    time = (-noise[winner]).exp()
    arrivals = (-noise).exp() + time * p
    arrivals[winner] = time * p[winner].clamp(min=torch.finfo(p.dtype).tiny)
    return -arrivals.log()


def tree_tau(cycles: Sequence[Sequence[int]]) -> float:
    """Tokens per cycle over all answers: accepted drafts and the token that every cycle adds."""
    counts = [accepted for answer in cycles for accepted in answer]
    return 1 + sum(counts) / max(1, len(counts))


def replay_together(drafter: Drafter, answers: Sequence[Recording], sampler: Sampler) -> list[list[int]]:
    """As `replay`, in one batch, with a sampler for as many rows."""
    token_ids = pad_sequence([a.token_ids for a in answers], batch_first=True, padding_value=UNKNOWN)
    features = pad_sequence([a.drafted_from(drafter) for a in answers], batch_first=True)
    lengths = torch.tensor([len(a.token_ids) for a in answers], device=token_ids.device)
    root = torch.tensor([a.start for a in answers], device=token_ids.device)  # position of each answer's root token
    longest = drafter.shape.longest_path
    cache = drafter.new_cache(len(answers), token_ids.shape[1] + longest + drafter.scratch_slots)
    read = int(root.max())
    estimate = drafter.extend(cache, features[:, :read], token_ids[:, 1 : read + 1].clamp(min=0), root)
    found: list[list[int]] = [[] for _ in answers]
    sampler.start(token_ids.clamp(min=0), root + 1, FRESH)
    while (running := root + 1 < lengths).any():
        tree = drafter.grow(cache, _at(token_ids, root), estimate, sampler)
        drawn = _at(token_ids, root[:, None] + 1 + tree.depths)
        counts = accept(tree, drawn, longest).counts * running
        for row, count in enumerate(counts.tolist()):
            found[row] += [count - 1] if count else []
        rows = root[:, None] + torch.arange(longest, device=root.device)
        window = features.gather(1, rows.clamp(max=features.shape[1] - 1)[:, :, None].expand(-1, -1, features.shape[2]))
        newest = drafter.extend(cache, window, _at(token_ids, rows + 1).clamp(min=0), counts)
        estimate = torch.where(running[:, None], newest, estimate)
        root = root + counts
    return found


def _at(token_ids: Tensor, positions: Tensor) -> Tensor:
    """Tokens at positions [B] or [B, …], UNKNOWN past the end."""
    flat = positions.reshape(len(positions), -1)
    taken = token_ids.gather(1, flat.clamp(max=token_ids.shape[1] - 1))
    return torch.where(flat < token_ids.shape[1], taken, UNKNOWN).view(positions.shape)
