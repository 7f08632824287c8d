"""Two servers face to face: one serves the champion, one the challenger, and the engine that will serve is the judge.

Each question goes to both, one right after the other, in turns; the clock runs here, acceptance is what they count.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from hass_core.config import EvaluationConfig, SamplingConfig
from hass_core.errors import BadInput
from hass_core.evaluation.benchmarks import Question
from hass_core.evaluation.duel import Bout
from hass_core.evaluation.engine_metrics import Acceptance, read_acceptance
from hass_core.evaluation.measure import opening
from hass_core.evaluation.metrics import Measurement
from hass_core.progress import Progress, no_progress

ANSWER_SECONDS = 600
Value = TypeVar("Value", str, int)


@dataclass(frozen=True)
class Contest:
    """What came of it: the bouts, and what each side counted meanwhile."""

    bouts: list[Bout]
    challenger: Acceptance
    champion: Acceptance


class Server:
    """An OpenAI-compatible server with a draft, by its base address (http://host:8000)."""

    def __init__(self, url: str):
        self.url = url.rstrip("/").removesuffix("/v1")
        self._client = httpx.Client(base_url=self.url, timeout=ANSWER_SECONDS)
        self._model = self._told(self._get("/v1/models"), str, "data", 0, "id")

    def counts(self) -> Acceptance:
        """What it has counted so far."""
        return read_acceptance(f"{self.url}/metrics")

    def answer(self, question: Question, sampling: SamplingConfig, seed: int, max_tokens: int) -> Measurement:
        """Have the first turn answered and take the time. Raises BadInput when the server refuses."""
        asked = {
            "model": self._model, "messages": [dict(message) for message in opening(question)], "seed": seed,
            "max_tokens": max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
        }  # fmt: skip
        started = time.perf_counter()
        answer = self._checked(self._client.post("/v1/chat/completions", json=asked))
        seconds = time.perf_counter() - started
        told, made = (self._told(answer, int, "usage", f"{kind}_tokens") for kind in ("prompt", "completion"))
        return Measurement(
            benchmark=question.benchmark, question=question.id, category=question.category,
            temperature=sampling.temperature, method="server", prompt_tokens=told,
            new_tokens=made, seconds=seconds, decode_seconds=seconds,
            accepted=[], drafted_depth=[], token_ids=[],
        )  # fmt: skip

    def _told(self, reply: Any, kind: type[Value], *place: str | int) -> Value:
        """What stands at a place of a reply. Raises BadInput where nothing does, or something of another type."""
        found: Any = reply
        for key in place:
            try:
                found = found[key]
            except (LookupError, TypeError):
                found = None
        if not isinstance(found, kind):
            missing = ".".join(map(str, place))
            raise BadInput(f"{self.url} does not answer as an OpenAI server: its reply has no {missing}")
        return found

    def _get(self, path: str) -> Any:
        return self._checked(self._client.get(path))

    def _checked(self, response: httpx.Response) -> Any:
        try:
            response.raise_for_status()
            return response.json()
        except (httpx.HTTPStatusError, ValueError, RecursionError) as error:
            raise BadInput(f"{self.url} does not answer as an OpenAI server: {error}") from error


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
        server.answer(questions[0], samplings[0], config.seed, config.max_new_tokens)
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
        seen = {n: sides[n].answer(question, sampling, config.seed + lap, config.max_new_tokens) for n in names}
        yield Bout(round=lap, challenger=seen["challenger"], opponent=seen["champion"])
