"""Chain acceptance of one draft over a set of questions: the measurement every cause is weighed with.

A chain, not a tree: each cycle then tells at which position the draft first went wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hass_core.config import SamplingConfig, TreeConfig
from hass_core.decoding.answers import Generation, StopRule
from hass_core.decoding.decoder import SpeculativeDecoder
from hass_core.draft_model.checkpoint import Draft
from hass_core.target_model.loader import Target
from hass_core.target_model.runner import make_runner

DEPTH = 4
CHAIN = TreeConfig(kind="chain", depth=DEPTH, top_k=1, nodes=DEPTH + 1)
ROWS = 16  # questions answered at once


@dataclass(frozen=True)
class Asked:
    """One question, ready for the target."""

    category: str
    token_ids: list[int]


@dataclass(frozen=True)
class Cycle:
    """One verification: where it began and how many of the DEPTH drafted tokens it accepted."""

    question: int
    category: str
    context_tokens: int
    accepted: int


def chain_cycles(
    target: Target,
    draft: Draft,
    asked: Sequence[Asked],
    temperature: float,
    max_new_tokens: int,
    done: Callable[[int], None],
) -> list[Cycle]:
    """Answer every question by chain decoding, ROWS at once; `done` hears how many are answered.

    A question has the same random numbers at every call.
    """
    decoder, stop = SpeculativeDecoder(make_runner(target), draft, CHAIN), StopRule.of(target)
    cycles: list[Cycle] = []
    for start in range(0, len(asked), ROWS):
        sampling = SamplingConfig(temperature=temperature, seed=start)
        prompts = [question.token_ids for question in asked[start : start + ROWS]]
        for number, answer in enumerate(decoder.generate(prompts, sampling, max_new_tokens, stop), start):
            cycles += _cycles(number, asked[number], answer)
        done(min(start + ROWS, len(asked)))
    return cycles


def _cycles(number: int, question: Asked, answer: Generation) -> Iterator[Cycle]:
    at = len(question.token_ids) + 1  # the first token came with the prompt
    for trace in answer.cycles:
        yield Cycle(number, question.category, at, trace.accepted)
        at += trace.accepted + 1


def tau(cycles: Sequence[Cycle]) -> float:
    """Tokens a cycle yields: mean accepted + 1. 1 without any cycle."""
    return 1 + (sum(cycle.accepted for cycle in cycles) / len(cycles) if cycles else 0.0)


def right_after(cycles: Sequence[Cycle]) -> list[float]:
    """Share of right drafts at each depth among the cycles that got there (n-α); nan where none did."""
    reached = [sum(cycle.accepted >= depth for cycle in cycles) for depth in range(DEPTH + 1)]
    return [right / tried if tried else float("nan") for tried, right in pairwise(reached)]


def difference(cycles: Sequence[Cycle], others: Sequence[Cycle]) -> tuple[float, float]:
    """τ of `others` less τ of `cycles`, and the half width of the 95 % interval over the questions of both."""
    ours, theirs = _by_question(cycles), _by_question(others)
    gains = np.array([theirs[question] - ours[question] for question in ours.keys() & theirs.keys()])
    spread = 1.96 * gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else float("inf")
    return tau(others) - tau(cycles), float(spread)


def _by_question(cycles: Sequence[Cycle]) -> dict[int, float]:
    questions = {cycle.question for cycle in cycles}
    return {question: tau([c for c in cycles if c.question == question]) for question in questions}
