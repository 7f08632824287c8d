"""An OpenAI-compatible server as one who answers questions and counts its drafts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from hass_core.config import SamplingConfig
from hass_core.data.templates import Message
from hass_core.errors import BadInput, Unreachable
from hass_core.evaluation.engine_metrics import Acceptance, Reading, read_acceptance, read_engine

ANSWER_SECONDS = 600
COUNTING_SECONDS = 10  # an engine may count an answer a little after it gave it
Value = TypeVar("Value", str, int)


@dataclass(frozen=True)
class Answer:
    """What came back, and how long it took."""

    text: str
    token_ids: tuple[int, ...]  # where the server tells them, else empty
    prompt_tokens: int
    new_tokens: int
    seconds: float


class Server:
    """A server by its base address (http://host:8000). Raises BadInput where none answers as one."""

    def __init__(self, url: str):
        self.url = url.rstrip("/").removesuffix("/v1")
        limits = httpx.Limits(max_connections=None)  # a row each: none waits for another's connection
        try:
            self._client = httpx.Client(base_url=self.url, timeout=ANSWER_SECONDS, limits=limits)
            reply = self._client.get("/v1/models")
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise BadInput(f"{url} is no address of a server: {error}; give one such as http://host:8000") from error
        except httpx.TransportError as error:
            raise Unreachable(f"no server answers at {url}: {error}; start it, or give its address") from error
        self.model = self._told(self._checked(reply), str, "data", 0, "id")

    def counts(self) -> Acceptance:
        """What its draft has been accepted so far."""
        return read_acceptance(f"{self.url}/metrics")

    def reading(self) -> Reading:
        """All that it has counted so far."""
        return read_engine(f"{self.url}/metrics")

    def reading_after(self, before: Reading, answers: Sequence[Answer]) -> Reading:
        """The counts when these answers, and nothing else, have been added to an earlier reading.

        Raises BadInput when something else was, or they are not counted within ten seconds.
        """
        requests, tokens = before.requests + len(answers), before.tokens + sum(a.new_tokens for a in answers)
        deadline = time.monotonic() + COUNTING_SECONDS
        while True:
            now = self.reading()
            if (now.requests, now.tokens) == (requests, tokens):
                return now
            if now.requests > requests or now.tokens > tokens or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        raise BadInput(
            f"{self.url} was asked for {len(answers)} answers and gave {tokens - before.tokens:.0f} tokens, but its "
            f"counters grew by {now.requests - before.requests:.0f} and {now.tokens - before.tokens:.0f}: it serves "
            "others too, or they belong to another process; measure while nobody else asks it"
        )

    def answer(
        self,
        messages: Sequence[Message],
        sampling: SamplingConfig,
        max_tokens: int,
        seed: int | None = None,
        with_token_ids: bool = False,
    ) -> Answer:
        """Have a conversation answered, and take the time. Token ids are vLLM's to tell, others refuse to be asked.

        Raises BadInput when the server refuses, Unreachable when it is gone.
        """
        asked: dict[str, Any] = {
            "model": self.model, "messages": [dict(message) for message in messages], "max_tokens": max_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p, "repetition_penalty": sampling.repetition_penalty,
        }  # fmt: skip
        asked |= {} if seed is None else {"seed": seed}
        asked |= {"return_token_ids": True} if with_token_ids else {}
        started = time.perf_counter()
        try:
            reply = self._client.post("/v1/chat/completions", json=asked)
        except httpx.TransportError as error:
            raise Unreachable(f"{self.url} answers no more: {error!r}; see what it says of itself") from error
        seconds = time.perf_counter() - started
        told = self._checked(reply)
        prompt, made = (self._told(told, int, "usage", f"{kind}_tokens") for kind in ("prompt", "completion"))
        text, ids = _at(told, "choices", 0, "message", "content"), _at(told, "choices", 0, "token_ids")
        return Answer(text if isinstance(text, str) else "", tuple(ids or ()), prompt, made, seconds)

    def _told(self, reply: Any, kind: type[Value], *place: str | int) -> Value:
        """What stands at a place of a reply. Raises BadInput where nothing does, or something of another type."""
        found = _at(reply, *place)
        if not isinstance(found, kind):
            missing = ".".join(map(str, place))
            raise BadInput(f"{self.url} does not answer as an OpenAI server: its reply has no {missing}")
        return found

    def _checked(self, response: httpx.Response) -> Any:
        try:
            response.raise_for_status()
            return response.json()
        except httpx.HTTPStatusError as error:
            said = " ".join(response.text.split())[:300]
            raise BadInput(f"{self.url} does not answer as an OpenAI server: {error}; it said: {said}") from error
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{self.url} does not answer as an OpenAI server: {error}") from error


def _at(reply: Any, *place: str | int) -> Any:
    """What stands at a place of a reply; None where nothing does."""
    for key in place:
        try:
            reply = reply[key]
        except (LookupError, TypeError):
            return None
    return reply
