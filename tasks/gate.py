"""The promotion gate: does the challenger decode faster than its opponent? Rules and reasons, no registry.

The opponent is the champion, or plain decoding where there is no champion for this target. Both answered the same
questions one right after the other, at every temperature, in several rounds; the ratio of their tokens/s counts.
"""

from collections.abc import Callable, Sequence

import numpy as np
from pydantic import BaseModel

from hass_core.config import PromotionConfig
from hass_core.evaluation.duel import Bout
from hass_core.evaluation.metrics import Measurement
from hass_core.evaluation.render import md
from hass_core.evaluation.report import ALL
from hass_core.evaluation.statistics import Estimate, crossed_mean

PLAIN_DECODING = "plain decoding"
NOT_LOSSLESS = "the challenger changes the target's output: it is not lossless"
FAR = 4.0  # standard deviations
NORMAL_MAD = 1.4826  # standard deviation / median absolute deviation of a normal distribution


class Verdict(BaseModel, frozen=True):
    """Whether the challenger takes over, and why."""

    promoted: bool  # the gate lets it pass
    reasons: tuple[str, ...]
    waits: bool = False  # for a person's word
    gain: Estimate | None = None
    gain_by_benchmark: dict[str, Estimate] = {}
    gain_by_temperature: dict[str, Estimate] = {}
    opponent: str = "the champion"
    measured: str = ""  # how, in a sentence
    champion: str | None = None
    challenger: str | None = None

    @property
    def outcome(self) -> str:
        """One or two words."""
        if self.champion == self.challenger:
            return "champion"
        if self.waits:
            return "waits for approval"
        return "promoted" if self.promoted else "not promoted"

    @property
    def title(self) -> str:
        """The outcome, and what became of the champion before."""
        if self.champion in (None, self.challenger):
            return self.outcome
        before = f"version {self.champion}"
        replaces = self.promoted and not self.waits
        return f"{self.outcome}, it replaces {before}" if replaces else f"{self.outcome}, {before} stays champion"

    def __str__(self) -> str:
        return f"version {self.challenger}: {self.title} ({'; '.join(self.reasons)})"

    def gain_words(self) -> str:
        """The gain over the opponent with its interval."""
        return _shown(self.gain) if self.gain else "nothing was compared"

    def refused(self, reason: str) -> "Verdict":
        """The same after a person said no."""
        return self.model_copy(update={"promoted": False, "waits": False, "reasons": (reason, *self.reasons)})

    def markdown(self) -> str:
        """The verdict for people."""
        lines = [f"## Version {self.challenger}: {self.title}", ""]
        lines += [f"- {md(reason)}" for reason in self.reasons]
        if gains := self.gains():
            lines += ["", f"| | tokens/s over those of {md(self.opponent)} |", "|---|---|"]
            lines += [f"| {md(name)} | {_shown(gain)} |" for name, gain in gains.items()]
        if self.measured:
            lines += ["", md(self.measured)]
        return "\n".join(lines) + "\n"

    def gains(self) -> dict[str, Estimate]:
        """The gain of each benchmark and at each temperature by name, then over all where there are several."""
        each = {**dict(sorted(self.gain_by_benchmark.items())), **self.gain_by_temperature}
        several = len(self.gain_by_benchmark) > 1 or len(self.gain_by_temperature) > 1
        return {**each, ALL: self.gain} if self.gain and several else each


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict of several, all of which must promote; its table is of the one that refused, else of the last, and
    what refuses comes first among its reasons.
    """
    shown = next((verdict for verdict in verdicts if not verdict.promoted), verdicts[-1])
    ordered = sorted(verdicts, key=lambda verdict: verdict.promoted and not shown.promoted)
    reasons = dict.fromkeys(reason for verdict in ordered for reason in verdict.reasons)
    return shown.model_copy(update={"reasons": tuple(reasons)})


def judge(
    bouts: Sequence[Bout],
    lossless: bool,
    rules: PromotionConfig,
    opponent: str = "the champion",
) -> Verdict:
    """Compare the two sides of the bouts. Every rule that fails gives a reason."""
    if not bouts:
        return Verdict(promoted=False, reasons=("no question was answered by both sides",))
    ratios = _ratios(bouts)
    gain = _gain(bouts, ratios)
    by_benchmark = _by(bouts, ratios, lambda bout: bout.challenger.benchmark)
    by_temperature = _by(bouts, ratios, lambda bout: f"T = {bout.challenger.temperature:g}")
    against = [] if lossless else [NOT_LOSSLESS]
    if compiled := sum(m.compilations for bout in bouts for m in (bout.challenger, bout.opponent)):
        against.append(f"{compiled} compilations ran while the clock did: these times cannot be compared; try again")
    if len({(bout.challenger.benchmark, bout.challenger.question) for bout in bouts}) == 1:
        against.append("one question says nothing of others, nor does its interval: give evaluation.benchmarks more")
    if not gain.low > rules.margin:  # what is no number is not above it either
        against.append(
            f"the gain over {opponent} is {_shown(gain)}: its lower end is not above the margin of {rules.margin:+.1%}"
        )
    against += [
        f"{name} is {-own.value:.1%} slower than with {opponent}; {rules.tolerance:.1%} are allowed"
        for name, own in sorted({**by_benchmark, **by_temperature}.items())
        if own.value < -rules.tolerance
    ]
    return Verdict(
        promoted=not against,
        reasons=tuple(against) or (f"the gain over {opponent} is {_shown(gain)}",),
        gain=gain,
        gain_by_benchmark=by_benchmark,
        gain_by_temperature=by_temperature,
        opponent=opponent,
        measured=_setup_of(bouts),
    )


def _by(bouts: Sequence[Bout], ratios: Sequence[float], group: Callable[[Bout], str]) -> dict[str, Estimate]:
    groups: dict[str, list[tuple[Bout, float]]] = {}
    for bout, ratio in zip(bouts, ratios, strict=True):
        groups.setdefault(group(bout), []).append((bout, ratio))
    return {name: _gain(*zip(*members, strict=True)) for name, members in groups.items()}


def _ratios(bouts: Sequence[Bout]) -> list[float]:
    """log(challenger's tokens/s / opponent's) of each bout.

    A question's rounds are compared with each other: what lies further than four standard deviations (by the median
    deviation of all) from the median of its rounds is drawn in to there, for during one of the two answers the machine
    had other things to do. Questions are not compared: a draft may well be slow at some.
    """
    ratios = np.array([np.log(_rate(bout.challenger) / _rate(bout.opponent)) for bout in bouts])
    rounds: dict[tuple[str, str, float], list[int]] = {}
    for place, bout in enumerate(bouts):
        mine = bout.challenger
        rounds.setdefault((mine.benchmark, mine.question, mine.temperature), []).append(place)
    middle = np.empty_like(ratios)
    for places in rounds.values():
        middle[places] = np.median(ratios[places])
    reach = FAR * NORMAL_MAD * float(np.median(np.abs(ratios - middle)))
    return np.clip(ratios, middle - reach, middle + reach).tolist()


def _gain(bouts: Sequence[Bout], ratios: Sequence[float]) -> Estimate:
    """exp(mean of log ratios) − 1: each question counts the same, and so does each temperature.

    A question's temperatures are averaged first: they share what is particular to the question.
    """
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for bout, ratio in zip(bouts, ratios, strict=True):
        question = (bout.challenger.benchmark, bout.challenger.question)
        found.setdefault(question, {}).setdefault(bout.round, []).append(ratio)
    values = np.array([[np.mean(rounds[number]) for number in sorted(rounds)] for rounds in found.values()])
    estimate = crossed_mean(values)
    value, low, high = (float(np.expm1(number)) for number in (estimate.value, estimate.low, estimate.high))
    return Estimate(value=value, low=low, high=high)


def _rate(measurement: Measurement) -> float:
    return measurement.new_tokens / measurement.seconds


def _setup_of(bouts: Sequence[Bout]) -> str:
    questions = len({(bout.challenger.benchmark, bout.challenger.question) for bout in bouts})
    rounds = len({bout.round for bout in bouts})
    several = "s" if rounds > 1 else ""
    return (
        f"{questions} questions, answered in turns by both sides in {rounds} round{several} of one session with the "
        "same tree; the intervals hold what differs between questions and between rounds."
    )


def _shown(gain: Estimate) -> str:
    return f"{gain.value:+.1%}, 95 % interval {gain.low:+.1%} to {gain.high:+.1%}"
