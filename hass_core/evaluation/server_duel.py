"""Two servers face to face: one serves the champion, one the challenger, and the engine that will serve is the judge.

Each question goes to both, one right after the other, in turns; the clock runs here, acceptance is what they count.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hass_core.config import EvaluationConfig, SamplingConfig
from hass_core.errors import BadInput
from hass_core.evaluation.benchmarks import Question
from hass_core.evaluation.duel import Bout
from hass_core.evaluation.engine_metrics import Acceptance
from hass_core.evaluation.measure import opening
from hass_core.evaluation.metrics import Measurement
from hass_core.evaluation.server import Server
from hass_core.progress import Progress, no_progress


@dataclass(frozen=True)
class Contest:
    """What came of it: the bouts, and what each side counted meanwhile."""

    bouts: list[Bout]
    challenger: Acceptance
    champion: Acceptance


def contest(
    challenger: Server,
    champion: Server,
    questions: Sequence[Question],
    samplings: Sequence[SamplingConfig],
    rounds: int,
    config: EvaluationConfig,
    progress: Progress = no_progress,
) -> Contest:
    """Every question, with every sampling, in every round, by both. A first answer each is not counted.

    Raises BadInput when a server drafts nothing: it runs without the draft that it is asked to show.
    """
    sides = {"challenger": challenger, "champion": champion}
    for server in sides.values():
        server.answer(opening(questions[0]), samplings[0], config.max_new_tokens, config.seed)
    before = {name: server.counts() for name, server in sides.items()}
    bouts = list(_bouts(sides, questions, samplings, rounds, config, progress))
    counted = {name: server.counts().since(before[name]) for name, server in sides.items()}
    for name, acceptance in counted.items():
        if acceptance.tau is None:
            raise BadInput(f"the {name}'s server {sides[name].url} drafted nothing while it answered: it has no draft")
    return Contest(bouts, counted["challenger"], counted["champion"])


def _bouts(
    sides: dict[str, Server],
    questions: Sequence[Question],
    samplings: Sequence[SamplingConfig],
    rounds: int,
    config: EvaluationConfig,
    progress: Progress,
) -> Iterator[Bout]:
    total = rounds * len(samplings) * len(questions)
    work = [(lap, s, q) for lap in range(rounds) for s in samplings for q in questions]
    for number, (lap, sampling, question) in enumerate(work):
        progress(number, total, f"round {lap + 1} of {rounds}, by the servers")
        names = list(sides)[:: -1 if (number + lap) % 2 else 1]
        seen = {n: _measured(sides[n], question, sampling, config.seed + lap, config.max_new_tokens) for n in names}
        yield Bout(round=lap, challenger=seen["challenger"], opponent=seen["champion"])


def _measured(server: Server, question: Question, sampling: SamplingConfig, seed: int, max_tokens: int) -> Measurement:
    """The first turn, answered and timed."""
    answer = server.answer(opening(question), sampling, max_tokens, seed)
    if not answer.new_tokens:
        raise BadInput(f"{server.url} answered question {question.id} with no token: see what it says of itself")
    return Measurement(
        benchmark=question.benchmark, question=question.id, category=question.category,
        temperature=sampling.temperature, method="server", prompt_tokens=answer.prompt_tokens,
        new_tokens=answer.new_tokens, seconds=answer.seconds, decode_seconds=answer.seconds,
        accepted=[], drafted_depth=[], token_ids=[],
    )  # fmt: skip
