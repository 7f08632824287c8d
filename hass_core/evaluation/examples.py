"""Example answers of an evaluation, cycle by cycle: what the draft guessed right, and what the target added."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hass_core.decoding.text import AnswerText
from hass_core.evaluation.benchmarks import Question
from hass_core.evaluation.metrics import Measurement

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Cycle:
    """The text of one verification: what the draft guessed, then the target's own token."""

    number: int  # 0 = the token that comes with the prompt
    drafted: str
    own: str
    accepted: int  # draft tokens
    offered: int  # levels of the tree


@dataclass(frozen=True)
class Turn:
    """One answer and what it answers."""

    asked: str
    cycles: tuple[Cycle, ...]


@dataclass(frozen=True)
class Example:
    """One question of the evaluation, answered with the draft."""

    name: str
    tau: float
    turns: tuple[Turn, ...]
    seconds: float  # with prefill


def choose_examples(
    measured: Sequence[Measurement], questions: Sequence[Question], method: str, decode: Decode
) -> list[Example]:
    """The answers with the highest, the median and the lowest τ; of the first temperature.

    `decode` turns token ids into text without special tokens.
    """
    asked = {(question.benchmark, question.id): question for question in questions}
    first = min((m.temperature for m in measured), default=0.0)
    own = [m for m in measured if m.method == method and m.temperature == first and m.accepted]
    ranked = sorted((m for m in own if (m.benchmark, m.question) in asked), key=_tau, reverse=True)
    places = dict.fromkeys((0, len(ranked) // 2, len(ranked) - 1)) if ranked else {}
    return [_example(ranked[place], asked, decode) for place in places]


def _tau(measurement: Measurement) -> float:
    return 1 + sum(measurement.accepted) / len(measurement.accepted)


def _example(m: Measurement, asked: Mapping[tuple[str, str], Question], decode: Decode) -> Example:
    question = asked[m.benchmark, m.question]
    users = [message["content"] for message in question.messages if message["role"] == "user"]
    traces = iter(zip(m.accepted, m.drafted_depth, strict=True))
    turns = [Turn(text, tuple(_cycles(ids, traces, decode))) for text, ids in zip(users, m.token_ids, strict=False)]
    return Example(f"{m.benchmark}: {m.question}", _tau(m), tuple(turns), m.seconds)


def _cycles(token_ids: list[int], traces: Iterator[tuple[int, int]], decode: Decode) -> Iterator[Cycle]:
    """The answer's tokens as its cycles made them; the last cycle may be cut where the answer ended."""
    text, taken, number = AnswerText(decode), 1, 0
    yield Cycle(0, "", text.add(token_ids[:1], None), 0, 0)
    while taken < len(token_ids):
        accepted, offered = next(traces)
        number += 1
        drafted = token_ids[taken : taken + accepted]
        own = token_ids[taken + accepted : taken + accepted + 1]
        taken += len(drafted) + len(own)
        ended = "length" if taken >= len(token_ids) else None
        guessed = text.add(drafted, None if own else ended)
        yield Cycle(number, guessed, text.add(own, ended) if own else "", len(drafted), offered)
