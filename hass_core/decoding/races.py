"""A draft's calibration, fitted to races between tokens at positions of recorded answers.

At a position the target's distribution p follows from the recorded feature, and the draft's log q from the feature
before it, as in a cycle's first level. With fresh noise g the target draws the token whose log p + g is the largest:
that one has won, whatever the record holds there, so it does not matter how the answers were sampled.

A candidate wins where its log p + g is the largest. The draft knows log q + e·: with an error of some spread, the
winner's chance is near softmax((sharpness · log q + g) / width): sharpness > 1 because small probabilities are usually
smaller still, width because the error smears the race. At T = 1 both are near 1; at T = 0.7 the same error of the
logits counts 1 / 0.7 as much, and width grows to about 2. Both are fitted by maximum likelihood (a multinomial
logistic regression with two weights) when training ends, and stand in the draft's config.json.

Shapes: P positions, H hidden, V vocabulary, D draft vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core.config import SamplingConfig, TreeConfig
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.replay import FRESH, Recording, replay_together, together
from hass_core.decoding.sampler import Proposal, Sampler
from hass_core.decoding.tree import TreeShape
from hass_core.draft_model.checkpoint import Draft
from hass_core.sampling import gumbel, stream

TEMPERATURES = (0.6, 0.8, 1.0)  # between them sharpness and width are interpolated
MOST_POSITIONS = 256  # two weights are fitted; each position costs V numbers four times
FEWEST_POSITIONS = 64
NEWTON_STEPS = 20
WEIGHT_RANGE = (0.05, 20.0)  # a draft that is always right, or never, has no best weights


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


def fresh_noise(positions: int, vocab_size: int) -> Tensor:
    """[P, V], nothing to do with any answer's."""
    words, token_ids = stream(FRESH, 0), np.arange(vocab_size, dtype=np.uint32)
    return torch.from_numpy(np.stack([gumbel(words, position, token_ids) for position in range(positions)]))


def fit(log_q: Tensor, noise: Tensor, winners: Tensor) -> tuple[float, float]:
    """Sharpness and width by maximum likelihood from P races: of each the D candidates' log q and noise [P, D], and the
    index [P] of the one that won.

    Newton's method on the concave likelihood of weights (a, b) of log q and g; sharpness = a / b, width = 1 / b.
    """
    weights = torch.ones(2, dtype=torch.float64)
    inputs = (log_q, noise)
    won = [x.gather(1, winners[:, None])[:, 0] for x in inputs]
    for _ in range(NEWTON_STEPS):
        p = F.softmax(weights[0].item() * log_q + weights[1].item() * noise, 1)
        weighted = [p * x for x in inputs]
        means = [x.sum(1) for x in weighted]
        slope = _sums([w - mean for w, mean in zip(won, means, strict=True)])
        pairs = [(0, 0), (0, 1), (1, 1)]
        curve = _sums([(weighted[i] * inputs[j]).sum(1) - means[i] * means[j] for i, j in pairs])
        flat = torch.stack([curve[0], curve[1], curve[1], curve[2]]).view(2, 2) + 1e-6 * torch.eye(2)
        step = torch.linalg.solve(flat, slope)
        weights = (weights + step).clamp(*WEIGHT_RANGE)
        if float(step.abs().max()) < 1e-4:
            break
    return float(weights[0] / weights[1]), float(1 / weights[1])


def _sums(columns: Sequence[Tensor]) -> Tensor:
    return torch.stack([column.double().sum().cpu() for column in columns])
