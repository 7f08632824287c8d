"""Races between tokens at positions of recorded answers, to fit a draft's calibration to.

At a position the target's distribution p follows from the recorded feature, and the draft's log q from the feature
before it, as in a cycle's first level. With fresh noise g the target draws the token whose log p + g is the largest:
that one has won, whatever the record holds there, so it does not matter how the answers were sampled.

Shapes: P positions, H hidden, V vocabulary, D draft vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core.config import SamplingConfig, TreeConfig
from hass_core.decoding.calibration import fit
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.replay import FRESH, Recording, replay_together, together
from hass_core.decoding.sampler import Proposal, Sampler
from hass_core.decoding.tree import TreeShape
from hass_core.draft_model.checkpoint import Draft
from hass_core.sampling.noise import gumbel, stream

TEMPERATURES = (0.6, 0.8, 1.0)  # between them sharpness and width are interpolated
MOST_POSITIONS = 256  # two weights are fitted; each position costs V numbers four times
FEWEST_POSITIONS = 64


@torch.no_grad()
def fitted_calibration(draft: Draft, answers: Sequence[Recording], head: Tensor) -> dict[str, tuple[float, float]]:
    """Sharpness and width by temperature, for the `hass` section of the draft's config; empty where the answers have
    too few positions. `head` [V, H] is the target's."""
    drafter = Drafter(draft, TreeShape.of(TreeConfig(kind="chain", depth=1), draft.head.size))
    stride = max(1, sum(len(a.token_ids) - a.start for a in answers) // MOST_POSITIONS)
    samplers = [RecordingSampler(some, head, stride) for some in together(answers)]
    for sampler in samplers:
        replay_together(drafter, sampler.answers, sampler)
    if sum(len(sampler.drafted) for sampler in samplers) < FEWEST_POSITIONS:
        return {}
    drafted = torch.stack([row for sampler in samplers for row in sampler.drafted]).float()
    wanted = torch.stack([row for sampler in samplers for row in sampler.wanted]).float()
    noise = fresh_noise(*wanted.shape).to(wanted.device)
    found = {}
    for temperature in TEMPERATURES:
        winners = (wanted / temperature + noise).argmax(1)
        inside, index = among(winners, draft.head.token_ids, len(head))
        raced = noise if draft.head.token_ids is None else noise[:, draft.head.token_ids]
        if int(inside.sum()) >= FEWEST_POSITIONS:
            log_q = (drafted[inside] / temperature).log_softmax(1)
            sharpness, width = fit(log_q, raced[inside], index[inside])
            found[str(temperature)] = (round(sharpness, 3), round(width, 3))
    return found


class RecordingSampler(Sampler):
    """Guesses as greedy decoding does, and keeps at every `stride`-th position what was guessed from."""

    def __init__(self, answers: Sequence[Recording], head: Tensor, stride: int):
        super().__init__(SamplingConfig(), len(answers), len(head), head.device)
        self.answers, self._head, self._stride, self._passed = answers, head, stride, 0
        self.drafted: list[Tensor] = []  # logits [D] each
        self.wanted: list[Tensor] = []  # logits [V] each

    def guess(self, proposal: Proposal) -> tuple[Tensor, Tensor]:
        """See `Sampler`."""
        rows = zip(self.answers, proposal.logits[:, 0], proposal.positions.tolist(), strict=True)
        for answer, row, certain in rows:
            position = certain + proposal.ahead
            if position >= len(answer.token_ids):
                continue
            if self._passed % self._stride == 0:
                self.drafted.append(row.clone())
                self.wanted.append(F.linear(answer.features[position - 1].to(self._head.dtype), self._head))
            self._passed += 1
        return super().guess(proposal)


def among(winners: Tensor, token_ids: Tensor | None, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Which winners [P] the draft vocabulary [D] holds, and their indices in it, 0 for the others."""
    if token_ids is None:
        return torch.ones_like(winners, dtype=torch.bool), winners
    index = torch.full((vocab_size,), -1, device=winners.device)
    index[token_ids] = torch.arange(len(token_ids), device=winners.device)
    found = index[winners]
    return found >= 0, found.clamp(min=0)


def fresh_noise(places: int, vocab_size: int) -> Tensor:
    """[P, V], nothing to do with any answer's."""
    words, token_ids = stream(FRESH, 0), np.arange(vocab_size, dtype=np.uint32)
    return torch.from_numpy(np.stack([gumbel(words, place, token_ids) for place in range(places)]))
