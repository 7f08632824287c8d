"""The promotion gate: is the challenger better than the champion on the same questions? Rules and reasons, no registry.

The gain is the challenger's speed-up over the champion's. Each speed-up is measured against plain decoding in the same
session, so a machine that was busier on one of the two days does not decide.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from hass_core.config import PromotionConfig
from hass_core.evaluation.metrics import Measurement, speedup
from hass_core.evaluation.render import md
from hass_core.evaluation.report import ALL, PLAIN
from hass_core.evaluation.statistics import Estimate, bootstrap

DRAFTED = "hass"


class Verdict(BaseModel):
    """Whether the challenger takes over, and why."""

    model_config = ConfigDict(frozen=True)
    promoted: bool
    reasons: tuple[str, ...]
    gain: Estimate | None = None
    gain_by_benchmark: dict[str, Estimate] = {}
    champion: str | None = None
    challenger: str | None = None

    @property
    def outcome(self) -> str:
        """One or two words."""
        if self.champion == self.challenger:
            return "champion"
        return "promoted" if self.promoted else "not promoted"

    @property
    def title(self) -> str:
        """The outcome, and what became of the champion before."""
        if self.champion in (None, self.challenger):
            return self.outcome
        before = f"version {self.champion}"
        return f"{self.outcome}, it replaces {before}" if self.promoted else f"{self.outcome}, {before} stays champion"

    def markdown(self) -> str:
        """The verdict for people."""
        lines = [f"## Version {self.challenger}: {self.title}", ""]
        lines += [f"- {reason}" for reason in self.reasons]
        if self.gain_by_benchmark:
            lines += ["", "| benchmark | speed-up over the champion's |", "|---|---|"]
            lines += [f"| {md(name)} | {_shown(gain)} |" for name, gain in self.gains().items()]
        return "\n".join(lines) + "\n"

    def gains(self) -> dict[str, Estimate]:
        """The gain of each benchmark by name, then over all where there are several."""
        each = dict(sorted(self.gain_by_benchmark.items()))
        return {**each, ALL: self.gain} if self.gain and len(each) > 1 else each


Pair = tuple[Measurement, Measurement]  # one question: with the draft, without
Match = tuple[Pair, Pair]  # one question: challenger, champion


def judge(
    challenger: Iterable[Measurement],
    champion: Iterable[Measurement],
    lossless: bool,
    rules: PromotionConfig,
    seed: int = 0,
) -> Verdict:
    """Compare on the questions that both answered, with a draft and plainly. Every rule that fails gives a reason."""
    matches = _matches(challenger, champion)
    if not matches:
        return Verdict(promoted=False, reasons=("the two drafts were measured on no common question",))
    gain = _gain(matches, seed)
    by_benchmark = {name: _gain(group, seed) for name, group in _by_benchmark(matches).items()}
    against = _objections(gain, by_benchmark, lossless, rules)
    return Verdict(
        promoted=not against,
        reasons=tuple(against) or (f"the gain over the champion is {_shown(gain)}",),
        gain=gain,
        gain_by_benchmark=by_benchmark,
    )


def _objections(gain: Estimate, by_benchmark: dict[str, Estimate], lossless: bool, rules: PromotionConfig) -> list[str]:
    against = [] if lossless else ["the challenger changes the target's output: it is not lossless"]
    if gain.low <= rules.margin:
        against.append(
            f"the gain over the champion is {_shown(gain)}: "
            f"its lower end is not above the margin of {rules.margin:+.1%}"
        )
    against += [
        f"{name} is {-own.value:.1%} slower than with the champion; {rules.tolerance:.1%} are allowed"
        for name, own in sorted(by_benchmark.items())
        if own.value < -rules.tolerance
    ]
    return against


def _matches(challenger: Iterable[Measurement], champion: Iterable[Measurement]) -> list[Match]:
    ours, theirs = _pairs(challenger), _pairs(champion)
    return [(pair, theirs[question]) for question, pair in ours.items() if question in theirs]


def _pairs(measured: Iterable[Measurement]) -> dict[tuple[str, str, float], Pair]:
    found = {(m.benchmark, m.question, m.temperature, m.method): m for m in measured}
    return {
        key[:3]: (found[*key[:3], DRAFTED], found[*key[:3], PLAIN])
        for key in found
        if key[3] == DRAFTED and (*key[:3], PLAIN) in found
    }


def _by_benchmark(matches: Sequence[Match]) -> dict[str, list[Match]]:
    groups: dict[str, list[Match]] = {}
    for match in matches:
        groups.setdefault(match[0][0].benchmark, []).append(match)
    return groups


def _gain(matches: Sequence[Match], seed: int) -> Estimate:
    """(challenger's speed-up / champion's speed-up) − 1 with its paired interval over questions."""
    ours, theirs = (speedup([m[side][0] for m in matches], [m[side][1] for m in matches]) for side in (0, 1))
    width = len(ours.columns)

    def gain(*columns: np.ndarray) -> np.ndarray:
        return ours.statistic(*columns[:width]) / theirs.statistic(*columns[width:]) - 1

    return bootstrap(gain, *ours.columns, *theirs.columns, seed=seed)


def _shown(gain: Estimate) -> str:
    return f"{gain.value:+.1%}, 95 % interval {gain.low:+.1%} to {gain.high:+.1%}"
