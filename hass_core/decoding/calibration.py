"""How far a draft's guesses are to be trusted when the target's noise is known.

A candidate wins where its log p + g is the largest. The draft knows log q + e·: with an error of some spread, the
winner's chance is near softmax((sharpness · log q + g) / width): sharpness > 1 because small probabilities are usually
smaller still, width because the error smears the race. At T = 1 both are near 1; at T = 0.7 the same error of the
logits counts 1 / 0.7 as much, and width grows to about 2. Both are fitted by maximum likelihood (a multinomial
logistic regression with two weights) to draws at places of held-out answers (`hass_core.decoding.races`) when training
ends, and stand in the draft's config.json as `"hass": {"calibration": {"0.6": [sharpness, width], …}}`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Calibration = Mapping[float, tuple[float, float]]
FIELD = "calibration"
NEWTON_STEPS = 20
WEIGHT_RANGE = (0.05, 20.0)  # a draft that is always right, or never, has no best weights
# of a draft that does not tell: measured on a HASS draft of 148 M tokens for SmolLM2-135M, levels 1 of 24 answers
USUAL: Calibration = {0.6: (1.4, 2.0), 0.7: (1.6, 2.0), 1.0: (1.1, 1.0)}


def calibration_of(info: Mapping[str, Any]) -> Calibration:
    """Sharpness and width by temperature from the `hass` section of a draft's config."""
    told = info.get(FIELD)
    return {float(t): (float(s), float(w)) for t, (s, w) in told.items()} if told else USUAL


def at_temperature(calibration: Calibration, temperature: float) -> tuple[float, float]:
    """Sharpness and width between the nearest temperatures fitted, those of the last one beyond it."""
    known = sorted(calibration)
    below = max((t for t in known if t <= temperature), default=known[0])
    above = min((t for t in known if t >= temperature), default=known[-1])
    share = 0.0 if above == below else (temperature - below) / (above - below)
    (s0, w0), (s1, w1) = calibration[below], calibration[above]
    return s0 + share * (s1 - s0), w0 + share * (w1 - w0)


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
