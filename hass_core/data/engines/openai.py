"""Answers from any server that speaks the OpenAI chat protocol: vLLM, SGLang, TGI and others.

Many requests are in flight at once, within a bound. What is worth repeating (busy, rate limit, server error, lost
connection) is repeated with growing pauses, as long as the server asks for when it says so; anything else becomes an
error on that one conversation.
"""

import asyncio
import os
import random
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from hass_core.config import ResponsesConfig
from hass_core.data.engines.base import Completion, Request, RequestQueue
from hass_core.data.templates import SkippedConversation, answer_tokens, special_token_ids
from hass_core.errors import ConfigError, TargetError

MAX_ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 0.5
MAX_PAUSE_SECONDS = 60.0
TIMEOUT_SECONDS = 600.0
WORTH_REPEATING = {408, 409, 425, 429, 500, 502, 503, 504}


class OpenAIEngine:
    """Requests to one server; a key, if it wants one, comes from the environment variable OPENAI_API_KEY."""

    def __init__(self, settings: ResponsesConfig, tokenizer: PreTrainedTokenizerBase):
        if not settings.server_url:
            raise ConfigError("responses.server_url is empty; give the server's address, ending in /v1")
        self._url = settings.server_url.rstrip("/")
        self._model = settings.server_model
        self._concurrency = settings.server_concurrency
        self._tokenizer = tokenizer

    def complete(self, queue: RequestQueue) -> Iterator[Completion]:
        """See `Engine`. Raises TargetError when the server cannot be reached at all."""
        with asyncio.Runner() as runner:
            client = self._client()
            try:
                model = self._model or runner.run(self._served_model(client))
                yield from self._completions(runner, client, model, queue)
            finally:
                runner.run(client.aclose())

    def _client(self) -> Any:
        import httpx  # here, because the core works without it

        key = os.environ.get("OPENAI_API_KEY")
        limits = httpx.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency)
        return httpx.AsyncClient(
            base_url=self._url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=limits,
            timeout=httpx.Timeout(TIMEOUT_SECONDS, connect=10.0),
        )

    async def _served_model(self, client: Any) -> str:
        """The one model the server offers: a first request that shows whether it is there."""
        import httpx

        try:
            reply = await client.get("/models")
            reply.raise_for_status()
            return reply.json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            raise TargetError(
                f"the server {self._url} does not list its models: {error}; check that it runs, or set "
                "responses.server_model"
            ) from error

    def _completions(
        self, runner: asyncio.Runner, client: Any, model: str, queue: RequestQueue
    ) -> Iterator[Completion]:
        """Keep `concurrency` requests in flight; yield what has arrived between two waits."""
        running: set[asyncio.Task[Completion]] = set()

        async def turn() -> set[asyncio.Task[Completion]]:
            for request in queue.take(self._concurrency - len(running)):
                running.add(asyncio.ensure_future(self._answer(client, model, request)))
            if not running:
                return set()
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            return done

        while done := runner.run(turn()):
            running -= done
            for task in done:
                yield task.result()

    async def _answer(self, client: Any, model: str, request: Request) -> Completion:
        """One answer, or the error that remained after all attempts. Raises TargetError when the server is gone."""
        import httpx

        for attempt in range(MAX_ATTEMPTS):
            try:
                reply = await client.post("/chat/completions", json=_body(model, request))
            except httpx.TransportError as error:
                if attempt == MAX_ATTEMPTS - 1:
                    raise TargetError(
                        f"the server {self._url} cannot be reached: {error!r}; start it and run the same command "
                        "again, finished answers are kept"
                    ) from error
                await asyncio.sleep(backoff_seconds(attempt, None))
                continue
            if reply.status_code == 200:
                return self._completion(request, reply.json())
            if reply.status_code not in WORTH_REPEATING or attempt == MAX_ATTEMPTS - 1:
                break
            await asyncio.sleep(backoff_seconds(attempt, reply.headers.get("retry-after")))
        return Completion(request.key, [], finished=False, error=f"server answered {reply.status_code}")

    def _completion(self, request: Request, reply: dict[str, Any]) -> Completion:
        """The server's own token ids where it gives them whole, else the tokenizer's cut of the text."""
        choice = reply["choices"][0]
        finished = choice["finish_reason"] == "stop"
        ids = choice.get("token_ids") or []
        if ids and (ids[-1] in special_token_ids(self._tokenizer)) == finished:
            return Completion(request.key, ids, finished)
        answer = {"role": "assistant", "content": choice["message"]["content"] or ""}
        try:
            ids = answer_tokens(self._tokenizer, [*request.messages, answer], finished)
            return Completion(request.key, ids, finished)
        except SkippedConversation as problem:
            return Completion(request.key, [], finished, error=problem.reason)


def backoff_seconds(attempt: int, retry_after: str | None) -> float:
    """Seconds before the next attempt: what the server asks for, else doubling, partly random against stampedes."""
    if retry_after is not None and retry_after.strip().replace(".", "", 1).isdigit():
        return min(float(retry_after), MAX_PAUSE_SECONDS)
    return min(FIRST_PAUSE_SECONDS * 2**attempt, MAX_PAUSE_SECONDS) * random.uniform(0.5, 1.0)


def _body(model: str, request: Request) -> dict[str, Any]:
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": list(request.messages),
        "max_tokens": request.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": request.seed % 2**31,
        "return_token_ids": True,  # vLLM; other servers ignore it
    }
    return body | {"top_k": sampling.top_k} if sampling.top_k else body
