"""One request's way through the server: checked, put in line, its steps turned into text as they come."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from hass_core.decoding.answers import Finished, Step, StopRule
from hass_core.decoding.decoder import Decoder
from hass_core.decoding.text import AnswerText
from hass_core.errors import BadInput, ContextTooLong
from hass_core.serving.messages import prompt_of_messages
from hass_core.serving.metrics import Metrics
from hass_core.serving.protocol import ChatRequest, CompletionRequest, GenerationRequest
from hass_core.serving.worker import Event, Job, Unavailable, Worker
from hass_core.target_model.loader import Target


@dataclass(frozen=True)
class Limits:
    """What one server allows."""

    max_new_tokens: int = 1024
    max_running: int = 4
    max_waiting: int = 256
    max_body_bytes: int = 1 << 20
    max_body_seconds: float = 30.0
    max_wait_seconds: float = 120.0  # in line


@dataclass(frozen=True)
class Piece:
    """New visible text and what has been counted so far."""

    text: str
    new_tokens: int
    finished: Finished | None


class Service:
    """Answers requests with one decoder. `model` is the name clients see."""

    def __init__(self, target: Target, decoder: Decoder, model: str, limits: Limits):
        self.target, self.model, self.limits = target, model, limits
        self._decoder = decoder
        self.metrics = Metrics(lambda: self._worker.running, lambda: self._worker.waiting)
        self._worker = Worker(decoder, limits.max_running, limits.max_waiting, self.metrics.observe)

    @property
    def failure(self) -> str | None:
        """Why nothing is decoded any more; None while all is well."""
        return self._worker.failure

    def close(self) -> None:
        """Stop decoding."""
        self._worker.close()

    def prompt_of(self, request: GenerationRequest) -> list[int]:
        """Token ids of the request's prompt. Raises BadInput when the model cannot take it."""
        self._check_model(request)
        if isinstance(request, ChatRequest):
            return prompt_of_messages(self.target.tokenizer, [message.plain() for message in request.messages])
        assert isinstance(request, CompletionRequest)
        if isinstance(request.prompt, str):
            return self.target.tokenizer(request.prompt)["input_ids"]  # pyright: ignore[reportReturnType]
        size = self.target.embedding.shape[0]
        if not all(0 <= token < size for token in request.prompt):
            raise BadInput(f"prompt: token ids must lie between 0 and {size - 1}")
        return request.prompt

    async def answer(self, request: GenerationRequest, prompt: list[int]) -> AsyncGenerator[Piece, None]:
        """The answer as it grows; leaving early cancels it.

        Raises Busy, Unavailable (also after too long a wait in line), BadInput, ContextTooLong, NonFinite.
        """
        stop = StopRule.of(self.target, request.stop_strings)
        text = AnswerText(self._decode, request.stop_strings)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        job = Job(
            prompt,
            request.sampling(),
            self._new_tokens(request, len(prompt)),
            stop,
            lambda event: _hand_over(loop, events, event),
        )
        self._worker.submit(job)
        counted, outcome = 0, "cancelled"
        try:
            event = await self._first(job, events)
            while True:
                if isinstance(event, Exception):
                    outcome = "failed"
                    raise event
                assert isinstance(event, Step)
                counted, finished = counted + len(event.token_ids), event.finished
                outcome = "ok" if finished else outcome
                yield Piece(text.add(event.token_ids, finished), counted, finished)
                if finished:
                    break
                event = await events.get()
        finally:
            self._worker.cancel(job)
            self.metrics.request(outcome, len(prompt))

    async def _first(self, job: Job, events: "asyncio.Queue[Event]") -> Event:
        """The first event; an error when the job was in line for too long."""
        patience = self.limits.max_wait_seconds
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                return await events.get()
        if job.started.is_set():
            return await events.get()
        return Unavailable(f"this request was in line for {patience:g} seconds; try again later")

    def _check_model(self, request: GenerationRequest) -> None:
        if request.model not in (None, self.model):
            raise BadInput(f"no model {request.model!r} here; this server has {self.model!r}")

    def _new_tokens(self, request: GenerationRequest, prompt_tokens: int) -> int:
        limit, context = self.limits.max_new_tokens, self.target.context_tokens
        if request.max_tokens is not None and request.max_tokens > limit:
            raise BadInput(f"max_tokens is {request.max_tokens}; this server allows {limit}")
        if prompt_tokens >= context:
            raise ContextTooLong(f"the prompt has {prompt_tokens} tokens; the model's context holds {context}")
        return min(request.max_tokens or limit, context - prompt_tokens)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.target.tokenizer.decode(token_ids, skip_special_tokens=True))


def _hand_over(loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[Event]", event: Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)
